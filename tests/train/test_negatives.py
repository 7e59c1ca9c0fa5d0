"""Rejected answers: which are left out, and those drawn from the policy as it moves."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from cwdpo_bench.errors import UserError
from cwdpo_bench.train import negatives as negatives_module
from cwdpo_bench.train.data import Pair
from cwdpo_bench.train.negatives import (
    Negative,
    OnPolicyNegatives,
    filter_pairs,
    sample_answers,
)
from cwdpo_bench.train.reference import Reference
from cwdpo_bench.train.rewards import Rewards
from cwdpo_bench.train.sections import Filter, OnPolicy, Sampling
from cwdpo_bench.train.terms import SequenceScores
from cwdpo_bench.vlm import VLM, Sample, load_vlm

Run = Callable[..., dict[str, Any]]


def _pair(number: int, rejected: str | None = "A blue circle.", **fields: Any) -> Pair:
    pair = Pair(f"p{number}", "line", (), "?", "A red circle.", rejected, ("A red circle.",))
    return dataclasses.replace(pair, **fields)


def test_pairs_are_left_out_for_a_reason_each() -> None:
    other = (Path("other.png"),)
    pairs = [
        _pair(0),
        _pair(1, "  "),
        _pair(2, "a RED  circle"),
        _pair(3),
        _pair(4, "A red circle.", rejected_images=other),
        _pair(5),
    ]
    confidence = torch.tensor([-1.0, -0.1, -0.1, -9.0, -3.0, -5.0])
    kept = filter_pairs(pairs, confidence, Filter(below=-5.0))
    assert kept.places == [0, 4, 5]
    assert kept.dropped == {"empty": 1, "equal to chosen": 1, "extremely easy": 1}
    assert kept.easy_below == -5.0
    assert filter_pairs(pairs, confidence, Filter()).dropped == {"empty": 1, "equal to chosen": 1}


@pytest.mark.parametrize("quantile", [0.0, 0.1, 0.25, 0.5])
def test_a_quantile_drops_at_most_its_share_the_easiest_first(quantile: float) -> None:
    confidence = torch.from_numpy(np.random.default_rng(0).permutation(41)) - 50.0
    kept = filter_pairs([_pair(i) for i in range(41)], confidence, Filter(quantile=quantile))
    dropped = sorted(set(range(41)) - set(kept.places), key=lambda i: confidence[i])
    assert len(dropped) == int(quantile * 40)
    assert dropped == confidence.argsort()[: len(dropped)].tolist()
    assert sum(kept.dropped.values()) == len(dropped)


def test_the_stricter_of_number_and_quantile_holds() -> None:
    pairs, confidence = [_pair(i) for i in range(11)], -torch.arange(11.0)
    assert filter_pairs(pairs, confidence, Filter(quantile=0.2, below=-3)).easy_below == -3
    assert filter_pairs(pairs, confidence, Filter(quantile=0.2, below=-30)).easy_below == -8


def test_nothing_left_is_said() -> None:
    with pytest.raises(UserError, match=r"no pair is left.*'extremely easy': 2"):
        filter_pairs([_pair(0), _pair(1)], torch.tensor([-2.0, -3.0]), Filter(below=0.0))


def test_samples_follow_from_the_seed_and_leave_the_trainings_chance_alone(
    tiny_model_folder: Path,
) -> None:
    vlm, pairs = load_vlm(tiny_model_folder), [_pair(i) for i in range(3)]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    drawn = [
        [answer.ids for answer in sample_answers(vlm, pairs, Sampling(max_new_tokens=8), seed=seed)]
        for seed in (1, 1, 2)
    ]
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)
    assert drawn[0] == drawn[1] != drawn[2]


class _Recorder:
    """Stands for the trainer."""

    def __init__(self) -> None:
        self.calls: list[dict[int, Negative]] = []

    def replace(self, negatives: dict[int, Negative]) -> None:
        self.calls.append(negatives)


def _reward(rows: Sequence[Pair], answers: Sequence[str]) -> Rewards:
    """One point for "red", one for "circle"."""
    total = np.array([("red" in a.lower()) + ("circle" in a) for a in answers], dtype=float)
    return Rewards(total, {})


def _score(rows: Sequence[Pair]) -> Reference:
    """An answer's mean log-probability is minus its number of words."""
    means = torch.tensor([-float(len((pair.rejected or "").split())) for pair in rows])
    scores = SequenceScores(means * 10, means)
    return {"chosen": scores, "rejected": scores}


@pytest.fixture
def refresher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    def make(answers: list[Sample], **rule: Any) -> tuple[OnPolicyNegatives, _Recorder]:
        monkeypatch.setattr(negatives_module, "sample_answers", lambda *_, **__: answers)
        recorder = _Recorder()
        callback = OnPolicyNegatives(
            recorder,
            VLM(None, None, "none"),
            [_pair(i) for i in range(len(answers))],
            OnPolicy(share=1.0, every=10, **rule),
            folder=tmp_path,
            seed=3,
            reward=_reward,
            score=_score,
            easy_below=-4.0,
        )
        return callback, recorder

    return make


ANSWERS = [
    Sample("A green circle", [], True),
    Sample("", [], True),
    Sample("a red circle", [], True),
    Sample("A blue thing", [], False),
    Sample("red round circle", [], True),
    Sample("a thing of no words that are right", [], True),
    Sample("square", [], True),
]


def _begin(callback: TrainerCallback, step: int) -> None:
    state = TrainerState(global_step=step, max_steps=100)
    callback.on_train_begin(TrainingArguments("unused"), state, TrainerControl())


def test_only_what_is_worse_than_chosen_and_not_easy_is_kept_and_all_is_counted(
    refresher: Callable[..., Any],
) -> None:
    callback, recorder = refresher(ANSWERS)
    _begin(callback, 0)
    (negatives,) = recorder.calls
    assert {place: n.pair.rejected for place, n in negatives.items()} == {
        0: "A green circle",
        6: "square",
    }
    assert negatives[6].scores["rejected"] == SequenceScores(
        torch.tensor(-10.0), torch.tensor(-1.0)
    )
    (refresh,) = callback.record()["refreshes"]
    assert (refresh["step"], refresh["sampled"], refresh["kept"]) == (0, 7, 2)
    assert refresh["dropped"] == {
        "empty": 1,
        "equal to chosen": 1,
        "cut off": 1,
        "not worse than chosen": 1,
        "extremely easy": 1,
    }


def test_a_refresh_comes_every_n_steps_and_not_after_the_last(
    refresher: Callable[..., Any],
) -> None:
    callback, recorder = refresher(ANSWERS)
    _begin(callback, 0)
    for step in (5, 10, 15, 20, 100):
        state = TrainerState(global_step=step, max_steps=100)
        callback.on_step_end(TrainingArguments("unused"), state, TrainerControl())
    assert [r["step"] for r in callback.record()["refreshes"]] == [0, 10, 20]
    assert len(recorder.calls) == 3


def test_a_resumed_run_takes_up_the_samples_of_its_checkpoint_and_no_later_ones(
    refresher: Callable[..., Any],
) -> None:
    callback, first = refresher(ANSWERS)
    _begin(callback, 0)
    state = TrainerState(global_step=10, max_steps=100)
    callback.on_step_end(TrainingArguments("unused"), state, TrainerControl())
    resumed, second = refresher([Sample("never drawn", [], True)] * 7)
    _begin(resumed, 9)
    assert second.calls == first.calls[:1]
    assert [r["step"] for r in resumed.record()["refreshes"]] == [0]


ON_POLICY = [
    "objective.on_policy.share=0.5",
    "objective.on_policy.every=2",
    "objective.on_policy.max_new_tokens=300",
]


class _Interrupted(Exception):
    """Stands for the moment at which a run is cut off."""


@pytest.mark.parametrize("lora", ["true", "false"])
def test_a_run_with_on_policy_negatives_is_resumed_to_the_same_weights(
    lora: str, run: Run, tmp_path: Path
) -> None:
    """Cut after a refresh whose next batch had been fetched before it: that batch is made anew."""
    overrides = [*ON_POLICY, f"lora.enabled={lora}"]
    whole = run("dpo", *overrides, output="whole")
    refreshes = whole["stages"]["stage1"]["on_policy"]["refreshes"]
    assert [(refresh["step"], refresh["sampled"]) for refresh in refreshes] == [
        (0, 10),
        (2, 10),
        (4, 10),
    ]
    assert all(refresh["kept"] > 0 for refresh in refreshes)

    def cut(stage: str, step: int, last: int, loss: float | None) -> None:
        if step == 3:
            raise _Interrupted

    with pytest.raises(_Interrupted):
        run("dpo", *overrides, output="cut", report=cut)
    resumed = run("dpo", *overrides, output="cut", resume=True)
    assert resumed["stages"]["stage1"]["on_policy"] == whole["stages"]["stage1"]["on_policy"]
    name = "adapter_model.safetensors" if lora == "true" else "model.safetensors"
    a, b = (load_file(tmp_path / folder / name) for folder in ("whole", "cut"))
    for key in a:
        torch.testing.assert_close(a[key], b[key], atol=0, rtol=0)


def test_on_policy_negatives_start_at_no_difference_to_the_reference(
    run: Run, tmp_path: Path
) -> None:
    """The reference of a sampled answer is that of the stage: Δ = 0 before the first step."""
    run("dpo", "objective.on_policy.share=1", "objective.on_policy.max_new_tokens=300")
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert history[0]["rewards/rejected"] == pytest.approx(0, abs=1e-5)
    assert history[-2]["rewards/rejected"] != pytest.approx(0, abs=1e-3)


def test_filter_and_its_counts_stand_in_the_record(run: Run) -> None:
    record = run("no-smooth-sft", "stage2.filter.quantile=0.5")
    stage = record["stages"]["stage2"]
    assert stage["filter"]["pairs"] == 11
    assert stage["filter"]["dropped"] == {"extremely easy": 9}
    assert stage["steps"] == 3
    assert "filter" not in run("no-filter", output="b")["stages"]["stage2"]
