"""One limit, one verdict: what is shown, what is excluded, and what the test set cannot tell.

With loss = how much worse the candidate is than the baseline (the floor, the published figure), and
a limit d:

- every rule: a regression where loss > d is shown: one-sided bootstrap p of "loss ≤ d", adjusted
  over the family, at most the level;
- `non_inferior`, `min_value`: pass where loss > d is excluded, that is the one-sided upper bound of
  the loss lies within d; otherwise inconclusive. "No worse" is shown, never read from a large p;
- `max_drop`, `max_rise`: pass where loss > d is excluded, or where it is not shown although a loss
  of d + `detect` would have been found with 80 % chance; otherwise inconclusive.

A side of several seeds is judged by the mean over them, with their spread: seeds are drawn first,
then samples within them (`paired.py`), and the tails are Student's.

Source of the non-inferiority test: Schuirmann (1987), one side of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from scipy import stats

from cwdpo_bench.calibration import bootstrap_stderr, percentile_interval
from cwdpo_bench.evaluate.metrics import METRICS
from cwdpo_bench.leaderboards.display import interval, number
from cwdpo_bench.leaderboards.paired import ROUNDING, Drawn, Runs
from cwdpo_bench.leaderboards.policy import Kind, Limit
from cwdpo_bench.leaderboards.signatures import FEW_SAMPLES
from cwdpo_bench.leaderboards.significance import detectable, samples_needed
from cwdpo_bench.leaderboards.statistics import SHARES, Floats, same_statistics

Verdict = Literal["pass", "regression", "inconclusive", "not judged"]


@dataclass(frozen=True)
class Question:
    """A limit with the numbers that decide it, on the metric's own scale.

    Attributes:
        metric, kind: what is limited, and how.
        limit: the loss that is allowed.
        detect: beyond the limit, for max_drop and max_rise.
        value, reference: candidate's, and what it is held against.
        sign: −1 where a rise is a loss.
        resampled: candidate − reference in each resample [R]; seeds widen it (`_as_students`).
        spread: standard error of the difference, by few seeds times what t's 5 % bound is wider.
        clusters: that were drawn.
        identical: both sides gave the same answers, as far as any metric can tell.
        p: one-sided, of "the loss is within the limit".
    """

    metric: str
    kind: Kind
    limit: float
    detect: float | None
    value: float
    reference: float
    sign: float
    resampled: Floats
    spread: float
    clusters: int
    identical: bool
    p: float

    @property
    def difference(self) -> float:
        """Candidate − reference."""
        return self.value - self.reference

    @property
    def stderr(self) -> float:
        """Of the difference.

        A share of C questions of which none changed may still change: up to 3/C of them (the rule
        of three), whose differences of ±1 have the standard error √3/C.
        """
        floor = math.sqrt(3) / self.clusters if self.metric in SHARES else 0.0
        return max(self.spread, floor)


class Answer(NamedTuple):
    """The verdict, in words, and what it rests on."""

    verdict: Verdict
    reason: str
    interval: tuple[float, float]
    samples_needed: int | None


def put_question(
    metric: str,
    limit: Limit,
    candidate: Runs,
    baseline: Runs,
    drawn: Drawn,
    paired: Drawn | None,
    point: float | None,
) -> Question:
    """Set up a limit for `judge`.

    Args:
        metric: what is limited.
        limit: how.
        candidate: statistics of its runs, one a seed.
        baseline: those of the baseline on the same samples; none where there is only a point.
        drawn: the candidate's value and resampled values.
        paired: the baseline's in the same resamples.
        point: a floor or a published figure in its place.
    """
    reference = point if paired is None else paired.value
    assert reference is not None
    differences = drawn.resampled - (reference if paired is None else paired.resampled)
    differences = np.where(np.abs(differences) < ROUNDING, 0.0, differences)
    spread = bootstrap_stderr(differences[np.isfinite(differences)])
    seeds = [len(runs) for runs in (candidate, baseline) if len(runs) > 1]
    if seeds:
        freedom = min(seeds) - 1
        differences = _as_students(differences, drawn.value - reference, spread, freedom)
        # Not the standard deviation of the widened: t's on one or two degrees of freedom has none.
        spread *= float(stats.t.isf(0.05, freedom) / stats.norm.isf(0.05))
    higher = METRICS[metric].higher_is_better
    sign = -1.0 if limit.kind == "max_rise" or higher is False else 1.0
    allowed = 0.0 if limit.kind == "min_value" else limit.value
    kept = differences[np.isfinite(differences)]
    clusters = candidate[0].cluster_count
    return Question(
        metric=metric,
        kind=limit.kind,
        limit=allowed,
        detect=limit.detect,
        value=drawn.value,
        reference=reference,
        sign=sign,
        resampled=kept,
        spread=spread,
        clusters=clusters,
        identical=paired is not None
        and bool(baseline)
        and all(same_statistics(run, baseline[0]) for run in (*candidate, *baseline)),
        p=max(
            (1 + int((sign * kept >= -allowed - ROUNDING).sum())) / (len(kept) + 1),
            # As for two-sided tests: one cluster, drawn again and again, is no certainty.
            2.0 ** -min(clusters, 1000),
        ),
    )


def _as_students(differences: Floats, value: float, stderr: float, freedom: int) -> Floats:
    """Resampled differences whose tails are Student's, as wide as so few seeds ask for.

    Each deviation keeps its place: a normal deviate of the resamples' standard deviation becomes
    the one of Student's t with the same tail. The degrees of freedom are those of the side with
    the fewest seeds, as if all the spread were the seeds': on the safe side where it is not.
    """
    if stderr == 0:
        return differences
    deviates = (differences - value) / stderr
    wide = np.sign(deviates) * stats.t.isf(stats.norm.sf(np.abs(deviates)), freedom)
    return np.asarray(value + stderr * wide)


def judge(question: Question, p_holm: float, level: float, family: int) -> Answer:
    """The verdict of one limit.

    Args:
        question: from `put_question`.
        p_holm: its p, adjusted over the family.
        level: one-sided.
        family: how many limits share the level.
    """
    ends = percentile_interval(question.resampled, 1 - 2 * level)
    said = _say(question, ends, level)
    lower = min(question.sign * end for end in ends) - _unseen(question, level)
    loss = -question.sign * question.difference
    if question.identical:
        return Answer("pass", f"the same answers as the baseline; {said}", ends, None)
    if question.clusters < FEW_SAMPLES:
        few = f"{question.clusters} images or questions are too few for any verdict"
        return Answer(
            "inconclusive",
            f"{said}; {few}",
            ends,
            max(FEW_SAMPLES, _needed(question, loss, level, family) or 0),
        )
    if p_holm <= level and loss > question.limit:
        return Answer("regression", f"{said}; worse than allowed (p {_p(p_holm)})", ends, None)
    if lower >= -question.limit - ROUNDING:
        return Answer("pass", f"{said}; worse than allowed is excluded", ends, None)
    needed = _needed(question, loss, level, family)
    if question.detect is not None:
        least = detectable(question.stderr, level / family, sided=1)
        if least <= question.detect:
            shown = f"not shown to be worse than allowed (p {_p(p_holm)})"
            return Answer("pass", f"{said}; {shown}, {_able(question, least)}", ends, None)
        return Answer("inconclusive", f"{said}; {_able(question, least)}", ends, needed)
    return Answer("inconclusive", f"{said}; neither shown nor excluded", ends, needed)


def _unseen(question: Question, level: float) -> float:
    """How far beyond the resamples' bound a share may lie of which no question changed.

    They all agree then, and say nothing of the changes that C questions were too few to hold: up to
    1 − level^(1/C) of all, about 3/C at 5 % (the rule of three).
    """
    if question.metric not in SHARES or np.ptp(question.resampled) > 0:
        return 0.0
    return float(1.0 - level ** (1 / question.clusters))


def _needed(question: Question, loss: float, level: float, family: int) -> int | None:
    """How many clusters would settle it; None where more would not."""
    if question.detect is not None:
        least = detectable(question.stderr, level / family, sided=1)
        return samples_needed(question.clusters, least, question.detect)
    room = question.limit - loss
    if room <= 0:
        return None
    return samples_needed(question.clusters, detectable(question.stderr, level, sided=1), room)


def _say(question: Question, ends: tuple[float, float], level: float) -> str:
    metric = question.metric
    against = {"min_value": "floor"}.get(question.kind, "baseline")
    return (
        f"{number(metric, question.value)} against {against} {number(metric, question.reference)}: "
        f"{number(metric, question.difference, signed=True)}, "
        f"{100 * (1 - 2 * level):g} % interval {interval(metric, ends, signed=True)}"
    )


def _able(question: Question, least: float) -> str:
    return (
        f"this test set can show a change of {number(question.metric, least)} beyond the limit, "
        f"the policy asks for {number(question.metric, question.detect or 0.0)}"
    )


def _p(p: float) -> str:
    return f"{p:.3g}"
