"""The threshold C of constrained SFT: `auto` from the start's own scores, and whether it mattered.

The constraint E[NLL(y⁻)] ≥ C acts while the rejected answers are too likely. With a C far below
what they have it never acts and the stage is plain SFT; what it did is therefore counted and said.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch

from cwdpo_bench.train.data import Pair
from cwdpo_bench.train.sections import SFTC, HardConstraint, Objective
from cwdpo_bench.train.terms import SequenceScores

AUTO_QUANTILE = 0.25
"""C = auto is this quantile of the batch means of NLL(y⁻) under the start: at first the constraint
acts in a quarter of the batches, more often as the rejected answers grow likelier."""
AUTO_PAIRS = 1024
"""At most this many pairs, drawn by the seed, are scored for `auto`."""


def has_constraint(objective: Objective) -> bool:
    """Whether the objective holds E[NLL(y⁻)] above a threshold."""
    return isinstance(objective, SFTC | HardConstraint)


def wants_threshold(objective: Objective) -> bool:
    """Whether the threshold is to be found."""
    return isinstance(objective, SFTC | HardConstraint) and objective.threshold == "auto"


def sample_for_threshold(pairs: Sequence[Pair], seed: int) -> list[Pair]:
    """The pairs from which `auto` takes C, in a random order."""
    return random.Random(seed).sample(pairs, min(AUTO_PAIRS, len(pairs)))


def with_threshold(objective: Objective, rejected: SequenceScores, batch_size: int) -> Objective:
    """The objective with C as a number: a quantile of the batch means of NLL(y⁻).

    Args:
        objective: whose threshold is `auto`.
        rejected: scores under the start of the rejected answers of `sample_for_threshold`.
        batch_size: pairs whose mean the constraint sees at a time.
    """
    assert isinstance(objective, SFTC | HardConstraint)
    nll = -(rejected.mean_logp if objective.nll == "mean" else rejected.logp).double()
    # A last, smaller batch has a noisier mean; it is left out unless it is the only one.
    batches = nll.split(batch_size)
    whole = [batch for batch in batches if len(batch) == batch_size] or list(batches)
    means = torch.stack([batch.mean() for batch in whole])
    return objective.model_copy(update={"threshold": float(means.quantile(AUTO_QUANTILE))})


def share_active(log_history: Sequence[dict[str, Any]]) -> float | None:
    """How often the constraint acted over a stage, from the means in the Trainer's log.

    Args:
        log_history: `TrainerState.log_history`, whose lines mean over the steps since the last.

    Returns:
        A share in [0, 1] of the batches up to the last log line; None where nothing was logged.
    """
    total, before = 0.0, 0
    for line in log_history:
        if "penalty/active" in line:
            total += (line["step"] - before) * float(line["penalty/active"])
            before = line["step"]
    return total / before if before else None


def never_acted(key: str, threshold: float) -> str:
    """The warning for a stage whose constraint did nothing."""
    return (
        f"{key}: the constraint never acted: the rejected answers stayed less likely than "
        f"threshold {threshold:.3g} in every logged step, so the stage was plain SFT; raise "
        f"{key}.threshold, or set it to auto"
    )
