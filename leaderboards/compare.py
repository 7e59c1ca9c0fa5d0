"""Run folders in, one comparison out: systems × tasks × metrics, and each against a baseline.

Runs are compared only where they did the same task: the same benchmark, split, prompt and scorer,
and the same samples. What else differs (precision, engine, versions) is told in the notes.

A system is one run, or a group of runs of several training seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from cwdpo_bench.calibration import bootstrap_stderr, percentile_interval
from cwdpo_bench.errors import UserError
from cwdpo_bench.evaluate.metrics import METRICS
from cwdpo_bench.evaluate.results import RunFolder
from cwdpo_bench.leaderboards.comparison import (
    Comparison,
    Difference,
    Score,
    TaskComparison,
    Verdict,
)
from cwdpo_bench.leaderboards.paired import (
    Drawn,
    PairedDifference,
    Runs,
    paired_differences,
    resample,
)
from cwdpo_bench.leaderboards.ranking import rank_systems
from cwdpo_bench.leaderboards.signatures import check_signature, notes_on, signature_note
from cwdpo_bench.leaderboards.significance import holm, wilson_interval
from cwdpo_bench.leaderboards.statistics import (
    TaskStatistics,
    check_fresh,
    check_same_samples,
    intersect,
    share_counts,
    statistics_of,
)
from cwdpo_bench.leaderboards.systems import (
    Paths,
    Systems,
    find_baseline,
    holders_of,
    labelled,
    read_systems,
    system_of,
)

ALPHA = 0.05
RESAMPLES = 10_000
SEED = 0

OnDifference = Literal["stop", "intersect"]
OnSignature = Literal["stop", "warn"]

GROUP_METRICS = ("CIDEr", "accuracy")
"""The first that a task has is also compared group by group."""


@dataclass(frozen=True)
class _How:
    on_mismatch: OnDifference
    on_signature: OnSignature
    test: Literal["bootstrap", "randomization"]


def compare_runs(
    paths: Paths,
    baseline: str | Path | None = None,
    *,
    on_mismatch: OnDifference = "stop",
    on_signature: OnSignature = "stop",
    test: Literal["bootstrap", "randomization"] = "bootstrap",
) -> Comparison:
    """Compare run folders.

    Args:
        paths: run folders, a system each; or name → the folders of that system's training seeds.
            The order is that of the rows.
        baseline: one of the folders, or the name of a system; the first run by default.
        on_mismatch: runs that hold other samples are refused, or compared on what they share.
        on_signature: runs of another split, prompt or scorer are refused, or noted.
        test: where p comes from, except for shares (McNemar's exact test).

    Raises:
        UserError: a run is broken, given twice, or did another task than the baseline (other
            signature or samples); the baseline is none of the runs; no task is shared.
    """
    systems = read_systems(paths)
    base = find_baseline(systems, baseline)
    runs = labelled(systems)
    tasks = list(dict.fromkeys(task for run in runs.values() for task in run.results["tasks"]))
    if len(systems) > 1 and not any(
        holders_of(task, systems).keys() - {base}
        for task in tasks
        if base in holders_of(task, systems)
    ):
        told = "; ".join(f"{n}: {', '.join(r.results['tasks'])}" for n, r in runs.items())
        raise UserError(f"no task of the baseline was run by another system ({told})")
    how = _How(on_mismatch, on_signature, test)
    notes: list[str] = []
    compared = tuple(
        _compare_task(task, holders_of(task, systems), base, how, notes) for task in tasks
    )
    return Comparison(
        systems=tuple(system_of(name, group) for name, group in systems.items()),
        baseline=base,
        tasks=compared,
        alpha=ALPHA,
        seed=SEED,
        notes=(*notes, *notes_on(runs, next(iter(labelled({base: systems[base]}))), tasks)),
    )


# --- one task ------------------------------------------------------------------------------------


def _compare_task(
    task: str, holders: Systems, base: str, how: _How, notes: list[str]
) -> TaskComparison:
    # Where the baseline lacks the task, values still stand side by side and must be of one task.
    anchor = base if base in holders else next(iter(holders))
    first = holders[anchor][0]
    for runs in holders.values():
        for run in runs:
            if how.on_signature == "stop":
                check_signature(task, run, first)
            elif told := signature_note(task, run, first):
                notes.append(told)
    statistics, shared = _statistics(task, holders, anchor, how)
    if shared:
        notes.append(f"{task}: {shared}")
    metrics = _metrics(holders, task, statistics)
    known = [name for name in metrics if name in METRICS]
    tested = [name for name in known if METRICS[name].compared]
    # The least p is 2/(resamples + 1); it must stay small after Holm multiplies it by the number
    # of differences to the baseline, or of pairs to rank.
    others = len(holders) - 1
    resamples = max(RESAMPLES, 100 * len(tested) * others, 50 * len(holders) * others)
    several = len(holders) > 1 or shared or any(len(runs) > 1 for runs in holders.values())
    drawn = resample(statistics, known, resamples=resamples, seed=SEED) if several else {}
    of_tests = {s: {m: d for m, d in row.items() if m in tested} for s, row in drawn.items()}
    differences = (
        paired_differences(statistics, of_tests, base, test=how.test, seed=SEED)
        if drawn and base in holders
        else {}
    )
    scores = {
        name: _scores(task, runs, statistics[name], drawn.get(name, {}), bool(shared))
        for name, runs in holders.items()
    }
    ranking = rank_systems(statistics, drawn, metrics, ALPHA)
    grouped = next((name for name in GROUP_METRICS if name in known), None)
    return TaskComparison(
        name=task,
        n=int(statistics[anchor][0].asked.sum()),
        clusters=statistics[anchor][0].cluster_count,
        signature=first.results["tasks"][task]["signature"],
        metrics=metrics,
        scores=_with_differences(scores, _judged(differences, metrics)),
        groups={} if shared else _groups(holders, task),
        group_differences=_group_differences(statistics, base, grouped, metrics, how),
        group_metric=grouped,
        ranks=ranking.ranks,
        best=ranking.best,
        tests=sum(map(len, differences.values())),
        resamples=resamples if differences else 0,
    )


def _statistics(task: str, holders: Systems, anchor: str, how: _How) -> tuple[dict[str, Runs], str]:
    """The runs' statistics, and what was left out to make them comparable."""
    flat = [(name, run) for name, runs in holders.items() for run in runs]
    samples = [run.samples(task) for _, run in flat]
    whole = [statistics_of(table) for table in samples]
    for (_, run), statistics in zip(flat, whole, strict=True):
        check_fresh(run, task, statistics)
    told = ""
    if how.on_mismatch == "intersect":
        samples, told = intersect(samples)
        whole = [statistics_of(table) for table in samples] if told else whole
    found: dict[str, list[TaskStatistics]] = {name: [] for name in holders}
    for (name, _), statistics in zip(flat, whole, strict=True):
        found[name].append(statistics)
    against = holders[anchor][0].path
    for name, runs in holders.items():
        for run, own in zip(runs, found[name], strict=True):
            if run is not holders[anchor][0]:
                where = f"{task}: {run.path}"
                check_same_samples(own, found[anchor][0], where, str(against))
    return dict(found), told


def _metrics(holders: Systems, task: str, statistics: Mapping[str, Runs]) -> dict[str, bool | None]:
    """Every metric that all runs of a system report, in the order of METRICS; others last."""
    found: dict[str, bool | None] = {}
    for runs in holders.values():
        reported = [run.results["tasks"][task]["metrics"] for run in runs]
        for name, metric in reported[0].items():
            if all(name in row for row in reported):
                found.setdefault(name, metric["higher_is_better"])
    order = {name: place for place, name in enumerate(METRICS)}
    return dict(sorted(found.items(), key=lambda item: order.get(item[0], len(order))))


def _scores(
    task: str,
    runs: Sequence[RunFolder],
    statistics: Runs,
    drawn: Mapping[str, Drawn],
    recompute: bool,
) -> dict[str, Score]:
    reported = [run.results["tasks"][task]["metrics"] for run in runs]
    found = {}
    for name, metric in reported[0].items():
        if len(runs) > 1 or recompute:
            if name in drawn and all(name in row for row in reported):
                found[name] = _resampled_score(name, statistics, drawn[name])
            continue
        low, high = metric["ci95"]
        found[name] = Score(
            value=float(metric["value"]),
            stderr=float(metric["stderr"]),
            ci95=_share_interval(name, statistics[0]) or (float(low), float(high)),
        )
    return found


def _resampled_score(metric: str, statistics: Runs, drawn: Drawn) -> Score:
    values = [run.value(metric) for run in statistics]
    exact = _share_interval(metric, statistics[0]) if len(values) == 1 else None
    return Score(
        value=drawn.value,
        stderr=bootstrap_stderr(drawn.resampled),
        ci95=exact or percentile_interval(drawn.resampled),
        seed_sd=float(np.std(values, ddof=1)) if len(values) > 1 else None,
    )


def _share_interval(metric: str, statistics: TaskStatistics) -> tuple[float, float] | None:
    if metric not in statistics.blocks:
        return None
    counts = share_counts(statistics, metric)
    return None if counts is None else wilson_interval(counts[0].sum(), counts[1].sum())


def _judged(
    differences: Mapping[str, Mapping[str, PairedDifference]],
    metrics: Mapping[str, bool | None],
) -> dict[tuple[str, str], Difference]:
    """Every difference by (system, metric), with Holm over all of them."""
    flat = {(s, m): d for s, row in differences.items() for m, d in row.items()}
    return {
        key: _judge(difference, p, metrics[key[1]])
        for (key, difference), p in zip(
            flat.items(), holm([difference.p for difference in flat.values()]), strict=True
        )
    }


def _judge(d: PairedDifference, p_holm: float, higher_is_better: bool | None) -> Difference:
    verdict = _verdict(d.value, p_holm, higher_is_better)
    return Difference(d.value, d.ci95, d.p, p_holm, verdict, d.test, d.effect, d.detectable)


def _verdict(value: float, p_holm: float, higher_is_better: bool | None) -> Verdict:
    if p_holm > ALPHA or value == 0.0:
        return "same"
    if higher_is_better is None:
        return "higher" if value > 0 else "lower"
    return "better" if (value > 0) == higher_is_better else "worse"


def _with_differences(
    scores: Mapping[str, Mapping[str, Score]], judged: Mapping[tuple[str, str], Difference]
) -> dict[str, dict[str, Score]]:
    return {
        system: {
            metric: replace(score, difference=judged.get((system, metric)))
            for metric, score in row.items()
        }
        for system, row in scores.items()
    }


def _groups(holders: Systems, task: str) -> dict[str, dict[str, dict[str, float]]]:
    """Values by group; of several seeds, their means."""
    groups: dict[str, dict[str, dict[str, float]]] = {}
    for system, runs in holders.items():
        rows = [run.results["tasks"][task]["groups"] for run in runs]
        for group, summary in rows[0].items():
            shared = [row[group]["metrics"] for row in rows if group in row]
            values = {
                name: float(np.mean([metrics[name]["value"] for metrics in shared]))
                for name in summary["metrics"]
                if all(name in metrics for metrics in shared)
            }
            groups.setdefault(group, {})[system] = values
    return dict(sorted(groups.items()))


def _group_differences(
    statistics: Mapping[str, Runs],
    base: str,
    metric: str | None,
    metrics: Mapping[str, bool | None],
    how: _How,
) -> dict[str, dict[str, Difference]]:
    """`metric` of each group against the baseline, with Holm over groups × systems."""
    if metric is None or base not in statistics or len(statistics) < 2:
        return {}
    names = sorted({name for run in statistics[base] for name in run.group_names})
    flat: dict[tuple[str, str], PairedDifference] = {}
    # As for the whole: the least p must survive Holm.
    resamples = max(RESAMPLES, 100 * len(names) * (len(statistics) - 1))
    for name in names:
        parts = {system: [run.group(name) for run in runs] for system, runs in statistics.items()}
        drawn = resample(parts, [metric], resamples=resamples, seed=SEED)
        found = paired_differences(parts, drawn, base, test=how.test, seed=SEED)
        flat |= {(name, system): row[metric] for system, row in found.items() if metric in row}
    grouped: dict[str, dict[str, Difference]] = {}
    adjusted = holm([difference.p for difference in flat.values()])
    for ((name, system), found_difference), p in zip(flat.items(), adjusted, strict=True):
        judged = _judge(found_difference, p, metrics[metric])
        grouped.setdefault(name, {})[system] = judged
    return grouped
