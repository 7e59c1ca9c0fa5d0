"""Run folders in, one comparison out: systems × tasks × metrics, and each against a baseline.

Runs are compared only where they did the same task: the same benchmark, split, prompt and scorer,
and the same samples. What else differs (precision, engine, versions) is told in the notes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from cwdpo_bench.errors import UserError, nearest
from cwdpo_bench.evaluate.metrics import METRICS
from cwdpo_bench.evaluate.results import RunFolder, read_run
from cwdpo_bench.leaderboards.paired import (
    PairedDifference,
    align,
    corpus_values,
    holm,
    paired_differences,
)
from cwdpo_bench.leaderboards.signatures import check_signature, notes_on

ALPHA = 0.05
RESAMPLES = 10_000
SEED = 0
STALE = 1e-6
"""Values in results.json and those that follow from the samples may differ by so much."""

Verdict = Literal["better", "worse", "higher", "lower", "same"]


@dataclass(frozen=True)
class Difference:
    """Candidate − baseline, on the metric's own scale.

    Attributes:
        value: the difference of the two corpus values.
        ci95: percentile interval of the paired bootstrap.
        p: two-sided.
        p_holm: adjusted over all differences of the task.
        verdict: "same" unless p_holm is at most 0.05; then "better" or "worse", or, for a metric
            that is neither, "higher" or "lower".
    """

    value: float
    ci95: tuple[float, float]
    p: float
    p_holm: float
    verdict: Verdict


@dataclass(frozen=True)
class Score:
    """A corpus value with its own interval, and its difference to the baseline where there is one.

    `difference` is None for the baseline itself and where the baseline lacks the metric.
    """

    value: float
    stderr: float
    ci95: tuple[float, float]
    difference: Difference | None = None


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
        groups: group → system → metric → value (no paired test).
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
    tests: int
    resamples: int


@dataclass(frozen=True)
class System:
    """One run: its name in the tables, its folder, what it states of itself."""

    name: str
    path: str
    signature: str
    seed: int | None


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


def compare_runs(paths: Sequence[str | Path], baseline: str | Path | None = None) -> Comparison:
    """Compare run folders.

    Args:
        paths: run folders; the order of the rows.
        baseline: one of the folders, or the name of a system; the first run by default.

    Raises:
        UserError: a run is broken, given twice, or did another task than the baseline (other
            signature or samples); the baseline is none of the runs.
    """
    runs = _read_all([Path(path) for path in paths])
    base = _find_baseline(runs, baseline)
    tasks = list(dict.fromkeys(task for run in runs.values() for task in run.results["tasks"]))
    return Comparison(
        systems=tuple(
            System(name, str(run.path), run.results["signature"], _seed(run))
            for name, run in runs.items()
        ),
        baseline=base,
        tasks=tuple(_compare_task(task, runs, base) for task in tasks),
        alpha=ALPHA,
        seed=SEED,
        notes=tuple(notes_on(runs, base, tasks)),
    )


def to_json(comparison: Comparison) -> dict[str, Any]:
    """The comparison as dictionaries, lists, text and finite numbers."""
    return asdict(comparison)


# --- runs and their names ------------------------------------------------------------------------


def _read_all(paths: Sequence[Path]) -> dict[str, RunFolder]:
    if not paths:
        raise UserError("no run folder given; name at least one that `cwdpo-bench run` wrote")
    seen: set[Path] = set()
    for path in paths:
        if path.resolve() in seen:
            raise UserError(f"{path}: the run is given twice; name each once")
        seen.add(path.resolve())
    runs = [read_run(path) for path in paths]
    return dict(zip(_unique_names(runs), runs, strict=True))


def _unique_names(runs: Sequence[RunFolder]) -> list[str]:
    """The models' names; where some are equal, with as much of the folder as tells them apart."""
    names = [run.results["model"]["name"] for run in runs]
    resolved = [run.path.resolve() for run in runs]
    for depth in range(1, max(len(path.parts) for path in resolved) + 1):
        named = [
            name if names.count(name) == 1 else f"{name} ({'/'.join(path.parts[-depth:])})"
            for name, path in zip(names, resolved, strict=True)
        ]
        if len(set(named)) == len(named):
            return named
    raise UserError(f"runs cannot be told apart by name: {', '.join(sorted(set(names)))}")


def _find_baseline(runs: Mapping[str, RunFolder], baseline: str | Path | None) -> str:
    if baseline is None:
        return next(iter(runs))
    if str(baseline) in runs:
        return str(baseline)
    for name, run in runs.items():
        if run.path.resolve() == Path(baseline).resolve():
            return name
    raise UserError(
        f"baseline {str(baseline)!r} is none of the runs; {nearest(str(baseline), runs)}"
    )


def _seed(run: RunFolder) -> int | None:
    for part in (run.results["provenance"], run.results["model"]):
        if isinstance(part.get("seed"), int):
            return int(part["seed"])
    return None


# --- one task ------------------------------------------------------------------------------------


def _compare_task(task: str, runs: Mapping[str, RunFolder], base: str) -> TaskComparison:
    holders = {name: run for name, run in runs.items() if task in run.results["tasks"]}
    # Where the baseline lacks the task, values still stand side by side and must be of one task.
    anchor = base if base in holders else next(iter(holders))
    first = holders[anchor].results["tasks"][task]
    for run in holders.values():
        check_signature(task, run, holders[anchor])
    samples = _aligned_samples(task, holders, anchor)
    scores = {name: _scores(task, run, samples[name]) for name, run in holders.items()}
    metrics = _metrics(holders, task)
    resamples, differences = _differences(samples, metrics, base) if base in holders else (0, {})
    return TaskComparison(
        name=task,
        n=first["n"],
        clusters=int(samples[anchor]["cluster"].nunique()),
        signature=first["signature"],
        metrics=metrics,
        scores=_with_differences(scores, _judged(differences, metrics)),
        groups=_groups(holders, task),
        tests=sum(map(len, differences.values())),
        resamples=resamples,
    )


def _metrics(holders: Mapping[str, RunFolder], task: str) -> dict[str, bool | None]:
    """Every metric that a run reports, in the order of METRICS; unknown ones last."""
    found: dict[str, bool | None] = {}
    for run in holders.values():
        for name, metric in run.results["tasks"][task]["metrics"].items():
            found.setdefault(name, metric["higher_is_better"])
    order = {name: place for place, name in enumerate(METRICS)}
    return dict(sorted(found.items(), key=lambda item: order.get(item[0], len(order))))


def _aligned_samples(
    task: str, holders: Mapping[str, RunFolder], anchor: str
) -> dict[str, pd.DataFrame]:
    reference = holders[anchor].samples(task)
    against = str(holders[anchor].path)
    aligned = {}
    for name, run in holders.items():
        own = reference if name == anchor else run.samples(task)
        aligned[name], _ = align(own, reference, f"{task}: {run.path}", against)
    return aligned


def _scores(task: str, run: RunFolder, samples: pd.DataFrame) -> dict[str, Score]:
    reported = run.results["tasks"][task]["metrics"]
    _check_fresh(task, run, reported, samples)
    return {
        name: Score(
            value=float(metric["value"]),
            stderr=float(metric["stderr"]),
            ci95=(float(metric["ci95"][0]), float(metric["ci95"][1])),
        )
        for name, metric in reported.items()
    }


def _check_fresh(
    task: str, run: RunFolder, reported: Mapping[str, Any], samples: pd.DataFrame
) -> None:
    known = [name for name in reported if name in METRICS]
    found = corpus_values(samples, known)
    for name in known:
        value = reported[name]["value"]
        if name not in found or abs(found[name] - value) > STALE * max(1.0, abs(value)):
            raise UserError(
                f"{run.path}: {task}: results.json says {name} = {value:.6g}, its samples give "
                f"{found.get(name, float('nan')):.6g}; the files are of two runs, score it again"
            )


def _differences(
    samples: Mapping[str, pd.DataFrame], metrics: Mapping[str, bool | None], base: str
) -> tuple[int, dict[str, dict[str, PairedDifference]]]:
    candidates = {name: rows for name, rows in samples.items() if name != base}
    known = [name for name in metrics if name in METRICS]
    # The least p is 2/(resamples + 1); it must stay small after Holm multiplies it.
    resamples = max(RESAMPLES, 100 * len(known) * len(candidates))
    if not candidates:
        return 0, {}
    return resamples, paired_differences(
        candidates, samples[base], known, resamples=resamples, seed=SEED
    )


def _judged(
    differences: Mapping[str, Mapping[str, PairedDifference]],
    metrics: Mapping[str, bool | None],
) -> dict[tuple[str, str], Difference]:
    """Every difference by (system, metric), with Holm over all of them."""
    flat = {(s, m): d for s, row in differences.items() for m, d in row.items()}
    adjusted = holm([difference.p for difference in flat.values()])
    return {
        key: Difference(d.value, d.ci95, d.p, p, _verdict(d.value, p, metrics[key[1]]))
        for (key, d), p in zip(flat.items(), adjusted, strict=True)
    }


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


def _groups(holders: Mapping[str, RunFolder], task: str) -> dict[str, dict[str, dict[str, float]]]:
    groups: dict[str, dict[str, dict[str, float]]] = {}
    for system, run in holders.items():
        for group, summary in run.results["tasks"][task]["groups"].items():
            values = {name: float(m["value"]) for name, m in summary["metrics"].items()}
            groups.setdefault(group, {})[system] = values
    return dict(sorted(groups.items()))
