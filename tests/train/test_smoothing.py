"""The threshold of constrained SFT: found by a stated rule, and whether it mattered is said."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from cwdpo_bench.train.recipe import load_recipe
from cwdpo_bench.train.sections import SFTC
from cwdpo_bench.train.smoothing import (
    AUTO_PAIRS,
    AUTO_QUANTILE,
    sample_for_threshold,
    share_active,
    wants_threshold,
    with_threshold,
)
from cwdpo_bench.train.terms import SequenceScores


def _scores(number: int) -> SequenceScores:
    values = -torch.rand(2, number, generator=torch.Generator().manual_seed(0)) * 5
    return SequenceScores(*values)


@pytest.mark.parametrize("nll", ["mean", "sum"])
def test_auto_is_the_lower_quartile_of_the_batch_means(nll: str) -> None:
    objective = load_recipe("sft-c", [f"objective.nll={nll}"]).objective
    assert objective is not None
    assert wants_threshold(objective)
    scores = _scores(50)
    found = with_threshold(objective, scores, batch_size=8)
    values = -(scores.mean_logp if nll == "mean" else scores.logp).double().numpy()
    means = values[:48].reshape(6, 8).mean(1)
    assert isinstance(found, SFTC)
    assert found.threshold == pytest.approx(np.quantile(means, AUTO_QUANTILE))
    assert not wants_threshold(found)
    # Under the start it acts in that share of the batches, as the rule says.
    assert (means < found.threshold).mean() == pytest.approx(AUTO_QUANTILE, abs=0.1)


def test_fewer_pairs_than_a_batch_are_one_batch() -> None:
    objective = load_recipe("sft-c").objective
    assert objective is not None
    scores = _scores(3)
    found = with_threshold(objective, scores, batch_size=8)
    assert isinstance(found, SFTC)
    assert found.threshold == pytest.approx(-scores.mean_logp.double().mean().item())


def test_the_sample_is_bounded_and_the_seeds_own() -> None:
    pairs: Any = list(range(AUTO_PAIRS + 10))
    sample = sample_for_threshold(pairs, 1)
    assert len(set(sample)) == AUTO_PAIRS
    assert sample == sample_for_threshold(pairs, 1) != sample_for_threshold(pairs, 2)


def test_the_share_of_a_stage_weighs_each_log_line_by_its_steps() -> None:
    history = [
        {"step": 10, "penalty/active": 1.0},
        {"step": 10, "eval": 3},
        {"step": 20, "penalty/active": 0.5},
        {"step": 24, "penalty/active": 0.0},
        {"step": 24, "train_runtime": 1.0},
    ]
    assert share_active(history) == pytest.approx(15 / 24)
    assert share_active([{"step": 5, "loss": 1.0}]) is None
