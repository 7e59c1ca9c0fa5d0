"""Rejected answers that a stage trains on: filtered, and drawn from the moving policy (SPEC 1).

Filtering drops pairs whose rejected answer is empty, equal to the chosen one after normalisation,
or extremely easy (ℓ̄_ref(y_l) low). On-policy negatives take the places of the data's for a share
of the pairs: every N steps answers are sampled from the policy of now, and those that the reward
finds worse than the chosen answer stay until the next time. Every drop is counted by its reason.

A refresh follows from seed, step and weights alone, and is kept in the stage's folder, so that a
resumed run takes it up again.
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from transformers import TrainerCallback

from cwdpo_bench.errors import UserError
from cwdpo_bench.files import read_json, write_json
from cwdpo_bench.train import processes
from cwdpo_bench.train.data import Pair, normalized
from cwdpo_bench.train.reference import Reference
from cwdpo_bench.train.rewards import RewardFunction
from cwdpo_bench.train.sections import Filter, OnPolicy, Sampling
from cwdpo_bench.train.terms import SequenceScores
from cwdpo_bench.vlm import VLM, Sample, encode_prompt, sample

SAMPLES_A_BATCH = 64
EMPTY, EQUAL, EASY = "empty", "equal to chosen", "extremely easy"
CUT_OFF, NOT_WORSE = "cut off", "not worse than chosen"


class Kept(NamedTuple):
    """What a filter left: places of pairs, drops by reason, the ℓ̄_ref under which it drops."""

    places: list[int]
    dropped: dict[str, int]
    easy_below: float | None


def filter_pairs(pairs: Sequence[Pair], confidence: torch.Tensor, rule: Filter) -> Kept:
    """The pairs that are trained on.

    A quantile q drops the floor(q (n − 1)) pairs below it, of n that are neither empty nor equal.

    Args:
        pairs: of the stage.
        confidence: [pairs], ℓ̄_ref(y_l), nats a token.
        rule: the recipe's.

    Raises:
        UserError: no pair is left.
    """
    reasons: list[str | None] = [_unusable(pair) for pair in pairs]
    usable = [place for place, reason in enumerate(reasons) if reason is None]
    floors = [] if rule.below is None else [rule.below]
    if rule.quantile is not None and usable:
        values = confidence[usable].double()
        floors.append(float(values.quantile(rule.quantile, interpolation="lower")))
    easy_below = max(floors, default=None)
    for place in usable:
        if easy_below is not None and float(confidence[place]) < easy_below:
            reasons[place] = EASY
    kept = [place for place, reason in enumerate(reasons) if reason is None]
    dropped = dict(Counter(reason for reason in reasons if reason is not None))
    if not kept:
        raise UserError(
            f"filter: no pair is left ({dropped}); lower filter.below, or bring more rows"
        )
    return Kept(kept, dropped, easy_below)


def _unusable(pair: Pair) -> str | None:
    """Why the pair's rejected answer is none, whoever wrote it."""
    if pair.rejected is None or not pair.rejected.strip():
        return EMPTY
    # Under another image the same answer is worse: image contrast.
    if pair.rejected_images is None and normalized(pair.rejected) == normalized(pair.chosen):
        return EQUAL
    return None


def without(reference: Reference, kept: Kept) -> Reference:
    """The scores of the pairs that a filter left."""
    return {
        view: SequenceScores(*(column[kept.places] for column in columns))
        for view, columns in reference.items()
    }


def sample_answers(
    vlm: VLM, pairs: Sequence[Pair], sampling: Sampling, *, seed: int
) -> list[Sample]:
    """One answer of the policy of now to each pair; the training's own chance is left alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return [
            answer
            # Encoded images of a whole data set would not fit into memory.
            for start in range(0, len(pairs), SAMPLES_A_BATCH)
            for answer in sample(
                vlm,
                [
                    encode_prompt(vlm.processor, pair.open())
                    for pair in pairs[start : start + SAMPLES_A_BATCH]
                ],
                max_new_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                batch_size=SAMPLES_A_BATCH,
            )
        ]


def judge_sampled(
    pairs: Sequence[Pair], answers: Sequence[Sample], reward: RewardFunction
) -> list[str | None]:
    """Why each sampled answer is no rejected answer of its pair; None where it is one."""
    texts = [answer.text for answer in answers]
    sampled = reward(pairs, texts).total
    chosen = reward(pairs, [pair.chosen for pair in pairs]).total
    reasons = []
    for pair, answer, ours, best in zip(pairs, answers, sampled, chosen, strict=True):
        reason = _unusable(_with_rejected(pair, answer.text))
        if reason is None and not answer.ended:
            reason = CUT_OFF
        if reason is None and ours >= best:
            reason = NOT_WORSE
        reasons.append(reason)
    return reasons


class Negative(NamedTuple):
    """A rejected answer in the place of the data's: the pair with it, and its reference scores."""

    pair: Pair
    scores: dict[str, SequenceScores]


class _Replaceable(Protocol):
    """The trainer, as far as it is needed here."""

    def replace(self, negatives: dict[int, Negative]) -> None: ...


class OnPolicyNegatives(TrainerCallback):
    """Refreshes a stage's on-policy negatives before its first step and every N steps."""

    def __init__(
        self,
        trainer: _Replaceable,
        vlm: VLM,
        pairs: Sequence[Pair],
        rule: OnPolicy,
        *,
        folder: Path,
        seed: int,
        reward: RewardFunction,
        score: Callable[[Sequence[Pair]], Reference],
        easy_below: float | None,
    ) -> None:
        """Refresh `pairs`, the trainer's, in their order.

        Args:
            trainer: what trains on them.
            vlm: the policy.
            pairs: of the stage, as the data brings them.
            rule: the recipe's.
            folder: of the stage; holds a file a refresh.
            seed: of the run.
            reward: by which a sampled answer must be worse than the chosen one.
            score: the frozen reference's scores of pairs, all views of the objective.
            easy_below: ℓ̄_ref under which an answer is dropped as extremely easy.
        """
        self._trainer, self._vlm, self._pairs, self._rule = trainer, vlm, pairs, rule
        self._folder, self._seed = folder, seed
        self._reward, self._score, self._easy_below = reward, score, easy_below

    def record(self) -> dict[str, Any]:
        """Every refresh with its counts, for the provenance."""
        refreshes = [read_json(self._file(step)) for step in self._steps()]
        counts = ("step", "sampled", "kept", "dropped")
        return {
            "share": self._rule.share,
            "refreshes": [{key: refresh[key] for key in counts} for refresh in refreshes],
        }

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Sample before the first step, or take up what the interrupted run had sampled."""
        with processes.first_writes() as writes:
            for step in self._steps() if writes else ():
                if step > state.global_step or state.global_step == 0:
                    self._file(step).unlink(missing_ok=True)
        if state.global_step == 0:
            self._refresh(0)
        else:
            self._take_up(max(self._steps()))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Sample every N steps; before a checkpoint of the same step, which so belongs to it."""
        step = state.global_step
        if step % self._rule.every == 0 and step < state.max_steps:
            self._refresh(step)

    def _steps(self) -> list[int]:
        return sorted(int(file.stem.rsplit("-", 1)[1]) for file in self._folder.glob("negatives-*"))

    def _file(self, step: int) -> Path:
        return self._folder / f"negatives-{step:06d}.json"

    def _refresh(self, step: int) -> None:
        number = max(1, round(self._rule.share * len(self._pairs)))
        places = random.Random(f"{self._seed} {step}").sample(range(len(self._pairs)), number)
        places.sort()
        seed = self._seed * 1_000_003 + step
        pairs = [self._pairs[place] for place in places]
        answers = sample_answers(self._vlm, pairs, self._rule, seed=seed)
        reasons = judge_sampled(pairs, answers, self._reward)
        candidates = [
            (place, _with_rejected(pair, answer.text))
            for place, pair, answer, reason in zip(places, pairs, answers, reasons, strict=True)
            if reason is None
        ]
        dropped = Counter(reason for reason in reasons if reason is not None)
        rows = []
        scores = self._score([pair for _, pair in candidates]) if candidates else {}
        for i, (place, pair) in enumerate(candidates):
            own = {
                view: [float(column[i]) for column in columns] for view, columns in scores.items()
            }
            if self._easy_below is not None and own["rejected"][1] < self._easy_below:
                dropped[EASY] += 1
                continue
            rows.append({"place": place, "id": pair.id, "text": pair.rejected, "scores": own})
        counts = {"step": step, "sampled": number, "kept": len(rows), "dropped": dict(dropped)}
        # Every process draws the same answers; where rounding makes them differ, the first's count.
        with processes.first_writes() as writes:
            if writes:
                write_json(self._file(step), {**counts, "answers": rows})
        self._take_up(step)

    def _take_up(self, step: int) -> None:
        negatives = {}
        for row in read_json(self._file(step))["answers"]:
            scores = {
                view: SequenceScores(*(torch.tensor(value) for value in values))
                for view, values in row["scores"].items()
            }
            pair = _with_rejected(self._pairs[row["place"]], row["text"])
            negatives[row["place"]] = Negative(pair, scores)
        self._trainer.replace(negatives)


def _with_rejected(pair: Pair, answer: str) -> Pair:
    """The pair with another rejected answer, which was given to the pair's own image."""
    return dataclasses.replace(pair, rejected=answer, rejected_images=None)
