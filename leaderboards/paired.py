"""Paired differences between systems that were scored on the same samples.

All systems are resampled with the same draws of clusters, so that what makes an image hard for
all cancels. Statistics kept per sample are summed per resample; nothing is scored again. A system
may be several runs, one a training seed: then seeds are drawn first, and images within them.

Sources: Koehn, Statistical Significance Tests for Machine Translation Evaluation (EMNLP 2004), for
the paired bootstrap; Riezler and Maxwell, On Some Pitfalls in Automatic Evaluation (2005), for
approximate randomization; Davison and Hinkley (1997), section 3.8, for drawing in two stages; Rao
and Wu, Resampling Inference with Complex Survey Data (1988), for drawing one seed less.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from cwdpo_bench.calibration import (
    LEVEL,
    bootstrap_counts,
    bootstrap_stderr,
    cluster_sums,
    paired_p_value,
    percentile_interval,
)
from cwdpo_bench.evaluate.metrics import METRICS
from cwdpo_bench.leaderboards.significance import detectable, mcnemar_exact, standardised
from cwdpo_bench.leaderboards.statistics import (
    OWN_EDGES,
    Floats,
    TaskStatistics,
    known_metrics,
    share_counts,
)

Test = Literal["bootstrap", "randomization", "mcnemar"]
Runs = Sequence[TaskStatistics]
"""The runs of one system on one task, one a training seed."""

ROUNDING = 1e-12
"""Differences below it are 0: sums in another order differ by as much."""

_SHUFFLES_AT_A_TIME = 2**22
_TOTALS_AT_A_TIME = 2**26
"""Half a gigabyte: a study of 25 systems with five seeds each has 10,000 columns and more."""


class Drawn(NamedTuple):
    """One metric of one system: its value, and its value in each resample [R]."""

    value: float
    resampled: Floats


@dataclass(frozen=True)
class PairedDifference:
    """Candidate − baseline on one metric, on the metric's own scale.

    Attributes:
        value: the difference of the two values; of the means over seeds where there are several.
        ci95: percentile interval of the resampled differences.
        p: two-sided, of "no difference".
        test: what p comes from.
        stderr: standard deviation of the resampled differences.
        effect: the difference in standard deviations over clusters (Cohen's d_z); None where
            nothing varies.
        detectable: the smallest true difference that this test set shows with 80 % chance at a
            two-sided level of 5 %, before any adjustment.
    """

    value: float
    ci95: tuple[float, float]
    p: float
    test: Test
    stderr: float
    effect: float | None
    detectable: float


def resample(
    systems: Mapping[str, Runs], metrics: Sequence[str], *, resamples: int, seed: int = 0
) -> dict[str, dict[str, Drawn]]:
    """Every metric of every system, in the whole and in each resample.

    With S seeds, a resample averages S − 1 of them, drawn with replacement: so the resampled
    variance of the mean over seeds is unbiased. One seed says nothing of its spread.

    Args:
        systems: by name, runs that hold the same samples (`check_same_samples`).
        metrics: names in `METRICS`; a system that lacks one is left out there.
        resamples: how often the clusters are drawn.
        seed: of the draws, which depend on it and the number of clusters alone.

    Returns:
        By system, then by metric.
    """
    shared = {
        name: [m for m in metrics if m in known_metrics(runs)] for name, runs in systems.items()
    }
    members = [_Run(run, shared[name]) for name, runs in systems.items() for run in runs]
    size = members[0].statistics.cluster_count
    stacked = np.concatenate([member.sums for member in members], axis=1)
    ends = np.cumsum([member.sums.shape[1] for member in members])[:-1]
    # Empty bins and unused stages are columns of zeros; most of a calibration error's are.
    used = np.flatnonzero(stacked.any(axis=0))
    product = np.ascontiguousarray(stacked[:, used])
    rows = max(1, _TOTALS_AT_A_TIME // max(1, stacked.shape[1]))
    for batch in bootstrap_counts(size, resamples, seed):
        for start in range(0, len(batch), rows):
            counts = batch[start : start + rows]
            totals = np.zeros((len(counts), stacked.shape[1]))
            totals[:, used] = counts @ product
            for member, part in zip(members, np.split(totals, ends, axis=1), strict=True):
                member.draw(part)
    found, rest = {}, iter(members)
    for place, (name, runs) in enumerate(systems.items()):
        own = [next(rest) for _ in runs]
        picks = _seed_picks(len(own), resamples, (seed, place))
        found[name] = {metric: _combined(own, metric, picks) for metric in shared[name]}
    return found


class _Run:
    """The sums of one run by cluster, each distinct block once, and its values so far."""

    def __init__(self, statistics: TaskStatistics, metrics: Sequence[str]) -> None:
        self.statistics = statistics
        blocks = {id(statistics.blocks[m]): statistics.blocks[m] for m in metrics}
        ends = np.cumsum([block.shape[1] for block in blocks.values()])
        places = {
            key: slice(end - block.shape[1], end)
            for (key, block), end in zip(blocks.items(), ends, strict=True)
        }
        self._places = {m: places[id(statistics.blocks[m])] for m in metrics}
        self.sums = np.empty((statistics.cluster_count, 0))
        if blocks:
            joined = np.concatenate(list(blocks.values()), axis=1)
            self.sums, _ = cluster_sums(joined, statistics.clusters)
        self.drawn: dict[str, list[Floats]] = {m: [] for m in metrics}

    def draw(self, totals: Floats) -> None:
        for metric, drawn in self.drawn.items():
            drawn.append(METRICS[metric].value(totals[:, self._places[metric]]))


def _seed_picks(seeds: int, resamples: int, key: tuple[int, int]) -> np.ndarray:
    """Which seeds [R, S − 1] each resample averages."""
    generator = np.random.default_rng([*key, 1])
    return generator.integers(0, seeds, size=(resamples, max(1, seeds - 1)))


def _combined(runs: Sequence[_Run], metric: str, picks: np.ndarray) -> Drawn:
    values = np.column_stack([np.concatenate(run.drawn[metric]) for run in runs])
    mean = float(np.mean([run.statistics.value(metric) for run in runs]))
    return Drawn(mean, np.take_along_axis(values, picks, axis=1).mean(axis=1))


def paired_differences(
    systems: Mapping[str, Runs],
    drawn: Mapping[str, Mapping[str, Drawn]],
    baseline: str,
    *,
    test: Literal["bootstrap", "randomization"] = "bootstrap",
    seed: int = 0,
) -> dict[str, dict[str, PairedDifference]]:
    """Each other system's difference to the baseline, for every metric that both have.

    p of a share of questions, one a cluster, is McNemar's exact one, whatever `test` says;
    randomization is not defined over seeds, nor where a metric's bins depend on the system
    (`OWN_EDGES`): p is the bootstrap's there.

    Args:
        systems: by name, their runs.
        drawn: what `resample` gave for them.
        baseline: the name of the system to compare with.
        test: where p comes from.
        seed: of the shuffles; as many as there were resamples.

    Returns:
        By system, then by metric.
    """
    base, clusters = drawn[baseline], systems[baseline][0].cluster_count
    found: dict[str, dict[str, PairedDifference]] = {}
    for name, row in drawn.items():
        if name == baseline:
            continue
        shared = [metric for metric in row if metric in base]
        pair = (systems[name], systems[baseline])
        other: dict[str, tuple[Test, float]] = {}
        if test == "randomization" and shared:
            other = _randomization(*pair, shared, len(row[shared[0]].resampled), seed)
        other |= exact_p(*pair, shared)
        found[name] = {
            metric: difference(row[metric], base[metric], clusters, other.get(metric))
            for metric in shared
        }
    return found


def difference(
    candidate: Drawn, baseline: Drawn, clusters: int, tested: tuple[Test, float] | None = None
) -> PairedDifference:
    """The difference of two metrics that were resampled together.

    Args:
        candidate: value and resampled values.
        baseline: those of the other system, in the same resamples.
        clusters: how many were drawn.
        tested: another test and its p, in place of the bootstrap's.
    """
    drawn = _rounded(candidate.resampled - baseline.resampled)
    value = float(_rounded(np.asarray(candidate.value - baseline.value)))
    # With C clusters a test that flips signs cannot go below 2^(1 − C), so neither may we: one
    # sample, drawn again and again, would otherwise look like certainty.
    least = 2.0 ** (1 - min(clusters, 1000))
    name, p = tested or ("bootstrap", max(paired_p_value(drawn), least))
    stderr = bootstrap_stderr(drawn)
    return PairedDifference(
        value=value,
        ci95=percentile_interval(drawn),
        p=p,
        test=name,
        stderr=stderr,
        effect=standardised(value, stderr, clusters),
        detectable=detectable(stderr, 1 - LEVEL),
    )


def _rounded(differences: Floats) -> Floats:
    return np.where(np.abs(differences) < ROUNDING, 0.0, differences)


def exact_p(
    candidate: Runs, baseline: Runs, metrics: Sequence[str]
) -> dict[str, tuple[Test, float]]:
    """McNemar's p of those metrics for which it holds, of single runs."""
    if len(candidate) > 1 or len(baseline) > 1:
        return {}
    found: dict[str, tuple[Test, float]] = {}
    for metric in metrics:
        one, other = (share_counts(runs[0], metric) for runs in (candidate, baseline))
        if one is not None and other is not None:
            first, second = one[0] > 0, other[0] > 0
            p = mcnemar_exact(int((first & ~second).sum()), int((second & ~first).sum()))
            found[metric] = ("mcnemar", p)
    return found


def _randomization(
    candidate: Runs, baseline: Runs, metrics: Sequence[str], resamples: int, seed: int
) -> dict[str, tuple[Test, float]]:
    if len(candidate) > 1 or len(baseline) > 1:
        return {}
    p_values = randomization_p(candidate[0], baseline[0], metrics, resamples=resamples, seed=seed)
    return {metric: ("randomization", p) for metric, p in p_values.items()}


def randomization_p(
    one: TaskStatistics,
    other: TaskStatistics,
    metrics: Sequence[str],
    *,
    resamples: int,
    seed: int = 0,
) -> dict[str, float]:
    """Two-sided p of "the two systems are interchangeable", by approximate randomization.

    Each cluster's statistics are exchanged between the two with chance ½; p is the share of such
    shuffles, and the one seen, whose difference is at least as large as the one seen.

    Metrics of `OWN_EDGES` are left out: their statistics cannot be exchanged.
    """
    chosen = [
        m for m in metrics if m not in OWN_EDGES and one.blocks[m].shape == other.blocks[m].shape
    ]
    sums = {m: (one.sums(m), other.sums(m)) for m in chosen}
    seen = {m: _gap(m, a.sum(axis=0), b.sum(axis=0)) for m, (a, b) in sums.items()}
    as_large = dict.fromkeys(chosen, 1)
    for swaps in _swaps(one.cluster_count, resamples, seed):
        for metric, (a, b) in sums.items():
            moved = swaps @ (a - b)
            gaps = _gap(metric, a.sum(axis=0) - moved, b.sum(axis=0) + moved)
            # An undefined shuffle counts against a finding.
            as_large[metric] += int((~(gaps < seen[metric] - ROUNDING)).sum())
    return {metric: count / (resamples + 1) for metric, count in as_large.items()}


def _gap(metric: str, one: Floats, other: Floats) -> Floats:
    value = METRICS[metric].value
    gap: Floats = np.abs(value(one) - value(other))
    return gap


def _swaps(size: int, resamples: int, seed: int) -> Iterator[Floats]:
    generator = np.random.default_rng(seed)
    rows_at_a_time = max(1, _SHUFFLES_AT_A_TIME // size)
    for start in range(0, resamples, rows_at_a_time):
        rows = min(rows_at_a_time, resamples - start)
        yield generator.integers(0, 2, size=(rows, size), dtype=np.uint8).astype(np.float64)
