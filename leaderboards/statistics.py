"""What resampling needs of one task of one run: additive statistics a sample, no text, no model.

Two runs are comparable where their ids, clusters and truth agree; truth is kept as a fingerprint a
sample and column, so that a baseline can be committed without the benchmark's texts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cwdpo_bench.calibration import cluster_sums
from cwdpo_bench.errors import UserError
from cwdpo_bench.evaluate.metrics import METRICS, metric_names_for
from cwdpo_bench.evaluate.results import RunFolder

Floats = NDArray[np.float64]
Names = NDArray[np.str_]

TRUTH_COLUMNS = ("gold", "references", "options", "objects")
"""What both runs must hold the same of, or they were not given the same task."""

SHARES = ("accuracy", "accuracy_option", "accuracy_plain", "parse_failures")
"""Metrics that are a share of questions: Wilson and McNemar apply."""

OWN_EDGES = ("ece_adaptive", "ece_debiased", "aurc", "auroc")
"""Metrics whose statistics depend on the other samples: they mean nothing in a part of them."""


STALE = 1e-6
"""Values in results.json and those that follow from the samples may differ by so much."""


@dataclass(frozen=True)
class TaskStatistics:
    """One task of one run, its n samples sorted by id.

    Attributes:
        ids: [n].
        clusters: [n] what is drawn as a whole.
        groups: [n] the parts of the benchmark that each sample counts for.
        asked: [n] whether the row is a sample of its own; further orders of a question are not.
        truth: column of `TRUTH_COLUMNS` → [n] fingerprints, uint64.
        blocks: metric → statistics [n, k]; metrics of the same statistics share the array.
    """

    ids: Names
    clusters: Names
    groups: tuple[tuple[str, ...], ...]
    asked: NDArray[np.bool_]
    truth: dict[str, NDArray[np.uint64]]
    blocks: dict[str, Floats]

    @property
    def metrics(self) -> list[str]:
        """The metrics that can be recomposed, in the order of `METRICS`."""
        return list(self.blocks)

    def value(self, metric: str) -> float:
        """The corpus value of a metric."""
        return float(METRICS[metric].value(self.blocks[metric].sum(axis=0)))

    def sums(self, metric: str) -> Floats:
        """The statistics of a metric, added up by cluster: [C, k], clusters sorted by name."""
        return cluster_sums(self.blocks[metric], self.clusters)[0]

    @property
    def cluster_count(self) -> int:
        """C."""
        return len(np.unique(self.clusters))

    def rows(self, keep: NDArray[np.bool_]) -> TaskStatistics:
        """The samples [n] that are kept, without the metrics of `OWN_EDGES`."""
        kept: dict[int, Floats] = {}
        for block in self.blocks.values():
            kept.setdefault(id(block), block[keep])
        return replace(
            self,
            ids=self.ids[keep],
            clusters=self.clusters[keep],
            groups=tuple(g for g, k in zip(self.groups, keep, strict=True) if k),
            asked=self.asked[keep],
            truth={name: column[keep] for name, column in self.truth.items()},
            blocks={n: kept[id(b)] for n, b in self.blocks.items() if n not in OWN_EDGES},
        )

    def group(self, name: str) -> TaskStatistics:
        """The samples that count for a group."""
        return self.rows(np.array([name in groups for groups in self.groups], dtype=np.bool_))

    @property
    def group_names(self) -> list[str]:
        """All groups, in the order in which the samples name them."""
        return list(dict.fromkeys(name for groups in self.groups for name in groups))


def statistics_of(samples: pd.DataFrame) -> TaskStatistics:
    """The statistics of a run's samples of one task."""
    ordered = samples.sort_values("id", ignore_index=True)
    shared: dict[tuple[Any, ...], Floats] = {}
    blocks = {}
    for name in metric_names_for(ordered):
        rule = METRICS[name].statistics
        key = _key(rule)
        if key not in shared:
            shared[key] = rule(ordered)
        blocks[name] = shared[key]
    return TaskStatistics(
        ids=ordered["id"].to_numpy().astype(str),
        clusters=ordered["cluster"].to_numpy().astype(str),
        groups=tuple(tuple(str(name) for name in groups) for groups in ordered["groups"]),
        asked=(ordered["shift"] == 0).to_numpy(dtype=np.bool_)
        if "shift" in ordered
        else np.ones(len(ordered), dtype=np.bool_),
        truth={
            column: np.array([_fingerprint(v) for v in ordered[column]], dtype=np.uint64)
            for column in TRUTH_COLUMNS
            if column in ordered
        },
        blocks=blocks,
    )


def read_statistics(run: RunFolder, task: str) -> TaskStatistics:
    """The statistics of a task of a run, which must be those of its results.

    Raises:
        UserError: the samples are broken, or of another run than `results.json`.
    """
    statistics = statistics_of(run.samples(task))
    check_fresh(run, task, statistics)
    return statistics


def check_fresh(run: RunFolder, task: str, statistics: TaskStatistics) -> None:
    """Refuse a run whose values in `results.json` do not follow from its samples.

    Raises:
        UserError: one differs; it is named with both values.
    """
    for name, metric in run.results["tasks"][task]["metrics"].items():
        if name not in METRICS:
            continue
        value = metric["value"]
        found = statistics.value(name) if name in statistics.blocks else float("nan")
        if not abs(found - value) <= STALE * max(1.0, abs(value)):
            raise UserError(
                f"{run.path}: {task}: results.json says {name} = {value:.6g}, its samples give "
                f"{found:.6g}; the files are of two runs, score it again"
            )


def _key(rule: Callable[..., Any]) -> tuple[Any, ...]:
    """Equal where two rules are the same function of the same arguments."""
    if isinstance(rule, partial):
        return (rule.func, *rule.args)
    return (rule,)


def _fingerprint(value: Any) -> int:
    digest = hashlib.blake2b(repr(_plain(value)).encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if value is None or value is pd.NA or value != value else value


# --- the same samples ----------------------------------------------------------------------------


def check_same_samples(
    candidate: TaskStatistics, baseline: TaskStatistics, where: str, against: str
) -> None:
    """Refuse two runs that were not given the same samples.

    Args:
        candidate: statistics of one run.
        baseline: statistics of the other, on the same task.
        where: names the task and the candidate's run in messages.
        against: names the baseline's run.

    Raises:
        UserError: the ids, the clusters or the truth differ; the overlap is told.
    """
    first, second = set(candidate.ids.tolist()), set(baseline.ids.tolist())
    if first != second:
        odd = min(first - second or second - first)
        raise UserError(
            f"{where} and {against} hold different samples: {len(first & second)} in common, "
            f"{len(first - second)} only in the former, {len(second - first)} only in the latter "
            f"(the first is {odd!r}); run both on the same data with the same --limit, or compare "
            "what they share with --on-mismatch intersect"
        )
    _check_same_truth(candidate, baseline, where, against)


def _check_same_truth(
    first: TaskStatistics, second: TaskStatistics, where: str, against: str
) -> None:
    columns = {"cluster": (first.clusters, second.clusters)} | {
        name: (first.truth[name], second.truth[name])
        for name in first.truth
        if name in second.truth
    }
    for name, (one, other) in columns.items():
        differing = np.flatnonzero(one != other)
        if len(differing):
            raise UserError(
                f"{where} and {against}: sample {str(first.ids[differing[0]])!r} has another "
                f"{name!r} in each; run both on the same data"
            )


def intersect(samples: Sequence[pd.DataFrame]) -> tuple[list[pd.DataFrame], str]:
    """The samples that all of several runs hold, cluster by whole cluster, and what is left out.

    Args:
        samples: of one task, a table a run.

    Returns:
        A table a run, and a sentence on the overlap; it is empty where the runs agree already.

    Raises:
        UserError: nothing is shared.
    """
    found = [set(table["id"]) for table in samples]
    shared, union = set.intersection(*found), set.union(*found)
    if shared == union:
        return list(samples), ""
    # A question that lost one of its orders cannot be scored over all of them.
    broken = {c for table in samples for c in table["cluster"][~table["id"].isin(shared)]}
    kept = [
        table[table["id"].isin(shared) & ~table["cluster"].isin(broken)].reset_index(drop=True)
        for table in samples
    ]
    if not len(kept[0]):
        raise UserError("the runs have no sample in common, so nothing can be compared")
    told = f"only the {len(kept[0])} of {len(union)} samples that all runs hold are compared"
    return kept, told


def same_statistics(one: TaskStatistics, other: TaskStatistics) -> bool:
    """Whether two runs gave the same answers as far as any metric can tell."""
    return one.blocks.keys() == other.blocks.keys() and all(
        np.array_equal(block, other.blocks[name]) for name, block in one.blocks.items()
    )


def share_counts(statistics: TaskStatistics, metric: str) -> tuple[Floats, Floats] | None:
    """Hits and questions by cluster [C] of a share; None where it is none a cluster.

    A cluster that holds several questions does not count as so many independent ones, so Wilson's
    interval and McNemar's test are left to clusters of one.
    """
    if metric not in SHARES:
        return None
    hits, count = statistics.sums(metric).T
    return (hits, count) if bool((count <= 1).all()) else None


def known_metrics(systems: Sequence[TaskStatistics]) -> list[str]:
    """The metrics that all of them have, in the order of `METRICS`."""
    return [name for name in systems[0].blocks if all(name in s.blocks for s in systems)]
