"""Paired differences between systems that were scored on the same samples.

Both systems are resampled with the same draws of clusters, so that what makes an image hard for
both cancels. Statistics kept per sample are summed per resample; nothing is scored again.

Sources: Koehn, Statistical Significance Tests for Machine Translation Evaluation (EMNLP 2004), for
the paired bootstrap; Holm, A Simple Sequentially Rejective Multiple Test Procedure (1979).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cwdpo_bench.calibration import (
    bootstrap_counts,
    cluster_sums,
    paired_p_value,
    percentile_interval,
)
from cwdpo_bench.errors import UserError
from cwdpo_bench.evaluate.metrics import METRICS

Floats = NDArray[np.float64]

ROUNDING = 1e-12
"""Differences below it are 0: sums in another order differ by as much."""

TRUTH_COLUMNS = ("gold", "references", "options")
"""What both runs must hold the same of, or they were not given the same task."""


@dataclass(frozen=True)
class PairedDifference:
    """Candidate − baseline on one metric.

    Attributes:
        value: on the metric's own scale.
        ci95: percentile interval of the resampled differences.
        p: two-sided bootstrap p of "no difference".
    """

    value: float
    ci95: tuple[float, float]
    p: float


def paired_differences(
    candidates: Mapping[str, pd.DataFrame],
    baseline: pd.DataFrame,
    metrics: Sequence[str],
    *,
    resamples: int,
    seed: int = 0,
) -> dict[str, dict[str, PairedDifference]]:
    """Each candidate's difference to the baseline on one task, for every metric that both have.

    Args:
        candidates: samples by system name, aligned with the baseline's by `align`.
        baseline: samples of the baseline.
        metrics: names in `METRICS`.
        resamples: how often the clusters are drawn; the least p is 2/(resamples + 1).
        seed: of the draws.

    Returns:
        By candidate, then by metric.
    """
    known = [name for name in metrics if METRICS[name].applies_to(baseline)]
    shared = {
        name: [metric for metric in known if METRICS[metric].applies_to(samples)]
        for name, samples in candidates.items()
    }
    others = {name: _System(candidates[name], names) for name, names in shared.items() if names}
    if not others:
        return {name: {} for name in candidates}
    base = _System(baseline, known)
    for counts in bootstrap_counts(base.size, resamples, seed):
        for system in (base, *others.values()):
            system.draw(counts)
    return {
        name: {metric: _difference(others[name], base, metric) for metric in metrics}
        for name, metrics in shared.items()
    }


class _System:
    """The summed statistics of one system and its metrics' values in each resample so far."""

    def __init__(self, samples: pd.DataFrame, metrics: Sequence[str]) -> None:
        self.metrics = tuple(metrics)
        blocks = [METRICS[name].statistics(samples) for name in metrics]
        self._ends = np.cumsum([block.shape[1] for block in blocks])[:-1]
        self._sums, _ = cluster_sums(np.concatenate(blocks, axis=1), samples["cluster"])
        self.size = len(self._sums)
        self.values = self._evaluate(self._sums.sum(axis=0))
        self._drawn: dict[str, list[Floats]] = {name: [] for name in metrics}

    def draw(self, counts: Floats) -> None:
        for name, values in self._evaluate(counts @ self._sums).items():
            self._drawn[name].append(values)

    def drawn(self, metric: str) -> Floats:
        return np.concatenate(self._drawn[metric])

    def _evaluate(self, totals: Floats) -> dict[str, Floats]:
        parts = np.split(totals, self._ends, axis=-1)
        return {
            name: METRICS[name].value(part) for name, part in zip(self.metrics, parts, strict=True)
        }


def _difference(candidate: _System, baseline: _System, metric: str) -> PairedDifference:
    value = _rounded(candidate.values[metric] - baseline.values[metric])
    drawn = _rounded(candidate.drawn(metric) - baseline.drawn(metric))
    # With C clusters a test that flips signs cannot go below 2^(1 − C), so neither may we: one
    # sample, drawn again and again, would otherwise look like certainty.
    least = 2.0 ** (1 - min(baseline.size, 1000))
    return PairedDifference(
        value=float(value),
        ci95=percentile_interval(drawn),
        p=max(paired_p_value(drawn), least),
    )


def _rounded(differences: Floats) -> Floats:
    return np.where(np.abs(differences) < ROUNDING, 0.0, differences)


def corpus_values(samples: pd.DataFrame, metrics: Sequence[str]) -> dict[str, float]:
    """The value of each metric that applies, recomposed from the samples."""
    names = [name for name in metrics if METRICS[name].applies_to(samples)]
    return {
        name: float(METRICS[name].value(METRICS[name].statistics(samples).sum(axis=0)))
        for name in names
    }


def align(
    candidate: pd.DataFrame, baseline: pd.DataFrame, where: str, against: str
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Both sets of samples in the order of their ids.

    Args:
        candidate: samples of one run.
        baseline: samples of the other, on the same task.
        where: names the task and the candidate's run in messages.
        against: names the baseline's run.

    Raises:
        UserError: the ids, the clusters or the references differ; the overlap is told.
    """
    _check_same_ids(set(candidate["id"]), set(baseline["id"]), where, against)
    first = candidate.sort_values("id", ignore_index=True)
    second = baseline.sort_values("id", ignore_index=True)
    for column in ("cluster", *TRUTH_COLUMNS):
        if column in first and column in second:
            _check_same_column(first, second, column, where, against)
    return first, second


def _check_same_ids(candidate: set[str], baseline: set[str], where: str, against: str) -> None:
    only_candidate, only_baseline = candidate - baseline, baseline - candidate
    if only_candidate or only_baseline:
        first = min(only_candidate or only_baseline)
        raise UserError(
            f"{where} and {against} hold different samples: {len(candidate & baseline)} in common, "
            f"{len(only_candidate)} only in the former, {len(only_baseline)} only in the latter "
            f"(the first is {first!r}); run both on the same data with the same --limit"
        )


def _check_same_column(
    first: pd.DataFrame, second: pd.DataFrame, column: str, where: str, against: str
) -> None:
    for name, one, other in zip(first["id"], first[column], second[column], strict=True):
        if _plain(one) != _plain(other):
            raise UserError(
                f"{where} and {against}: sample {name!r} has another {column!r} in each; "
                "run both on the same data"
            )


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | list | tuple):
        return [_plain(item) for item in value]
    return None if value is None or value is pd.NA or value != value else value


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: reject at level α where the adjusted p is at most α.

    Args:
        p_values: of one family of tests, in any order.

    Returns:
        Adjusted p values in the same order, each at most 1.
    """
    size = len(p_values)
    order = np.argsort(p_values, kind="stable")
    steps = np.asarray(p_values, dtype=np.float64)[order] * np.arange(size, 0, -1)
    adjusted = np.empty(size)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return [float(p) for p in adjusted]
