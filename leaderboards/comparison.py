"""What a comparison is: values, differences and verdicts, as tables and exports read them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from cwdpo_bench.leaderboards.paired import Test

Verdict = Literal["better", "worse", "higher", "lower", "same"]


@dataclass(frozen=True)
class Difference:
    """Candidate − baseline, on the metric's own scale.

    Attributes:
        value: the difference of the two corpus values.
        ci95: percentile interval of the paired bootstrap.
        p: two-sided.
        p_holm: adjusted over all differences of the task (of its groups, for those).
        verdict: "same" unless p_holm is at most 0.05; then "better" or "worse", or, for a metric
            that is neither, "higher" or "lower".
        test: what p comes from.
        effect: in standard deviations over clusters (Cohen's d_z); None where nothing varies.
        detectable: the smallest difference that this test set shows with 80 % chance, unadjusted.
    """

    value: float
    ci95: tuple[float, float]
    p: float
    p_holm: float
    verdict: Verdict
    test: Test
    effect: float | None
    detectable: float


@dataclass(frozen=True)
class Score:
    """A corpus value with its own interval, and its difference to the baseline where there is one.

    Attributes:
        value: of the run; of several seeds, their mean.
        stderr: of the bootstrap over clusters, and over seeds where there are several.
        ci95: Wilson's for a share of independent questions, else the bootstrap's.
        difference: None for the baseline itself and where the baseline lacks the metric.
        seed_sd: standard deviation over the seeds; None for a single run.
    """

    value: float
    stderr: float
    ci95: tuple[float, float]
    difference: Difference | None = None
    seed_sd: float | None = None


@dataclass(frozen=True)
class TaskComparison:
    """One task.

    Attributes:
        name: of the task.
        n: samples.
        clusters: images or questions that are drawn whole.
        signature: of the task, as the first run that has it states it.
        metrics: name → whether higher is better, None where neither is.
        scores: system → metric → score; a system that lacks the task or metric lacks the key.
        groups: group → system → metric → value.
        group_differences: group → system → the paired difference of `group_metric`.
        group_metric: what is compared by group; None where nothing is.
        ranks: metric → system → rank, one more than the systems that are significantly better.
        best: metric → the system that is significantly better than every other, where one is.
        tests: differences in the Holm family.
        resamples: draws behind p and the differences' intervals.
    """

    name: str
    n: int
    clusters: int
    signature: str
    metrics: dict[str, bool | None]
    scores: dict[str, dict[str, Score]]
    groups: dict[str, dict[str, dict[str, float]]]
    group_differences: dict[str, dict[str, Difference]]
    group_metric: str | None
    ranks: dict[str, dict[str, int]]
    best: dict[str, str]
    tests: int
    resamples: int


@dataclass(frozen=True)
class System:
    """A row of the tables: its name, the folder of its run, what the run states of itself.

    Of a group of seeds, `path`, `signature` and `seed` are those of its first run; `paths` and
    `seeds` tell all.
    """

    name: str
    path: str
    signature: str
    seed: int | None
    paths: tuple[str, ...]
    seeds: tuple[int | None, ...]
    provenance: dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """All of it; `to_json` gives it as plain values.

    Attributes:
        systems: in the order given.
        baseline: the name of the system that the others are compared with.
        tasks: in the order in which the runs hold them.
        alpha: the level of the verdicts after Holm.
        seed: of the draws.
        notes: what a reader must know: missing tasks, differing settings, warnings of the runs.
    """

    systems: tuple[System, ...]
    baseline: str
    tasks: tuple[TaskComparison, ...]
    alpha: float
    seed: int
    notes: tuple[str, ...]

    def baseline_mark(self, name: str) -> str:
        """What tables write behind a system's name; nothing where it stands alone."""
        return " (baseline)" if name == self.baseline and len(self.systems) > 1 else ""


def to_json(comparison: Comparison) -> dict[str, Any]:
    """The comparison as dictionaries, lists, text and finite numbers."""
    return asdict(comparison)
