"""One self-contained HTML file that a reviewer can look at: verdict, differences, curves, answers.

Everything in it comes from run folders (and the `dynamics.parquet` of their checkpoints); a part
that the runs hold nothing for is left out, and the page says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from markupsafe import Markup

from cwdpo_bench.errors import UserError, nearest
from cwdpo_bench.evaluate.results import RunFolder
from cwdpo_bench.leaderboards.charts import (
    Bar,
    Curve,
    bars,
    forest,
    reliability_chart,
    risk_coverage_chart,
    thinned,
)
from cwdpo_bench.leaderboards.compare import OnDifference, OnSignature, compare_runs
from cwdpo_bench.leaderboards.comparison import Comparison, TaskComparison
from cwdpo_bench.leaderboards.display import (
    CALIBRATION_HEADLINES,
    DASH,
    HEADLINES,
    MARKS,
    PROVENANCE_COLUMNS,
    caption,
    group_cell,
    interval,
    is_best,
    label,
    legend,
    metric_groups,
    number,
    overview,
    p_value,
    plain,
    provenance_rows,
    scale,
    value_with_mark,
)
from cwdpo_bench.leaderboards.report_calibration import Calibration, calibration_of
from cwdpo_bench.leaderboards.report_dynamics import Recipe, draw_strips, read_recipes
from cwdpo_bench.leaderboards.report_page import render_page
from cwdpo_bench.leaderboards.report_pictures import PictureReader, gather_pictures
from cwdpo_bench.leaderboards.report_samples import TaskSamples, choose, task_json, task_samples
from cwdpo_bench.leaderboards.report_verdict import headline, judge_systems, leaders
from cwdpo_bench.leaderboards.statistics import intersect
from cwdpo_bench.leaderboards.svg import series_class
from cwdpo_bench.leaderboards.systems import (
    Paths,
    Systems,
    find_baseline,
    holders_of,
    labelled,
    read_systems,
)

TITLE = "cwdpo-bench report"


def build_report(
    paths: Paths,
    baseline: str | Path | None = None,
    *,
    title: str = TITLE,
    policy: Path | None = None,
    pictures: PictureReader | None = None,
    data_root: Path | None = None,
    checkpoints: Mapping[str, Path] | None = None,
    on_mismatch: OnDifference = "stop",
    on_signature: OnSignature = "stop",
    test: Literal["bootstrap", "randomization"] = "bootstrap",
) -> str:
    """The report on run folders as HTML.

    Args:
        paths, baseline, on_mismatch, on_signature, test: as `compare_runs` takes them.
        title: of the page.
        policy: the gate's rules; the package's own by default.
        pictures: how the samples' pictures are read; without it the page has none.
        data_root: where the benchmarks lie, if not where the runs say.
        checkpoints: system → its checkpoint, where the run does not say or it was moved.

    Raises:
        UserError: as `compare_runs`; or `checkpoints` names no system.
    """
    comparison = compare_runs(
        paths, baseline, on_mismatch=on_mismatch, on_signature=on_signature, test=test
    )
    systems = read_systems(paths)
    base = find_baseline(systems, baseline)
    for name in checkpoints or {}:
        if name not in systems:
            raise UserError(f"--checkpoint {name}: no such system; {nearest(name, systems)}")
    verdicts = judge_systems(comparison, policy)
    recipes, without_curves = read_recipes(labelled(systems), _by_run(systems, checkpoints or {}))
    looks, browsed = _look_at_samples(systems, base, on_mismatch)
    kept, wanted = choose(browsed)
    gathered = gather_pictures(wanted, _first_holders(systems), pictures, data_root)
    samples = {
        task.name: task_json(task, kept[task.name], gathered) for task in browsed if kept[task.name]
    }
    series = {system.name: place for place, system in enumerate(comparison.systems)}
    content = {
        "title": plain(title),
        "baseline": plain(base),
        "systems": [(plain(name), series_class(place)) for name, place in series.items()],
        "headline": headline(verdicts, base),
        "verdicts": [
            {"gate": verdict, "dynamics": [r for r in recipes if _of_system(r, verdict.name)]}
            for verdict in verdicts
        ],
        "policy_name": "the default policy" if policy is None else policy.name,
        "leaders": leaders(comparison),
        "overview": _overview(comparison),
        "tasks": [_task(comparison, task, looks[task.name], series) for task in comparison.tasks],
        "strips": draw_strips(recipes),
        "recipes": recipes,
        "without_curves": without_curves,
        "sample_notes": _sample_notes(browsed, kept) + gathered.notes,
        "edge": gathered.edge,
        "reading": [*legend(comparison), "Bold: significantly better than every other system."],
        "notes": [plain(note) for note in comparison.notes],
        "provenance": (PROVENANCE_COLUMNS, provenance_rows(comparison)),
    }
    return render_page(content, samples, gathered.encoded)


# --- samples -------------------------------------------------------------------------------------


def _look_at_samples(
    systems: Systems, base: str, on_mismatch: OnDifference
) -> tuple[dict[str, dict[str, Calibration]], list[TaskSamples]]:
    """Calibration and answers, a task at a time, so that one task is in memory."""
    tasks = dict.fromkeys(
        task for runs in systems.values() for run in runs for task in run.results["tasks"]
    )
    looks, browsed = {}, []
    for task in tasks:
        tables = _tables(task, holders_of(task, systems), on_mismatch)
        looks[task] = {name: calibration_of(runs) for name, runs in tables.items()}
        first = {name: runs[0] for name, runs in tables.items()}
        browsed.append(task_samples(task, first, base))
    return looks, browsed


def _tables(
    task: str, holders: Systems, on_mismatch: OnDifference
) -> dict[str, list[pd.DataFrame]]:
    flat = [(name, run.samples(task)) for name, runs in holders.items() for run in runs]
    samples = [table for _, table in flat]
    if on_mismatch == "intersect":
        samples, _ = intersect(samples)
    found: dict[str, list[pd.DataFrame]] = {name: [] for name in holders}
    for (name, _), table in zip(flat, samples, strict=True):
        found[name].append(table)
    return found


def _first_holders(systems: Systems) -> dict[str, RunFolder]:
    """By task the first run that did it; runs of one task were given the same data."""
    found: dict[str, RunFolder] = {}
    for runs in systems.values():
        for run in runs:
            for task in run.results["tasks"]:
                found.setdefault(task, run)
    return found


def _sample_notes(browsed: Sequence[TaskSamples], kept: Mapping[str, Sequence[int]]) -> list[str]:
    return [
        f"{plain(task.name)}: {len(kept[task.name]):,} of {len(task.rows):,} samples are shown to "
        "keep the page small: those on which the systems differ most"
        for task in browsed
        if len(kept[task.name]) < len(task.rows)
    ]


def _by_run(systems: Systems, checkpoints: Mapping[str, Path]) -> dict[str, Path]:
    """Checkpoints by the names of `labelled`; a system of several seeds has one a run."""
    return {
        name: checkpoints[name]
        for name, runs in systems.items()
        if name in checkpoints and len(runs) == 1
    }


def _of_system(recipe: Recipe, name: str) -> bool:
    return recipe.name == name or recipe.name.startswith(f"{name} (")


# --- tables and charts ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Chart:
    """A drawing under its title."""

    title: str
    svg: Markup


def _overview(comparison: Comparison) -> list[dict[str, Any]]:
    tables = []
    for title, columns in overview(comparison).items():
        rows = [
            (_system_name(comparison, s.name), [_cell(t, m, s.name, "") for t, m in columns])
            for s in comparison.systems
        ]
        headings = [f"{plain(task.name)} {label(m, task.metrics[m])}" for task, m in columns]
        tables.append({"title": title, "headings": headings, "rows": rows})
    return tables


def _task(
    comparison: Comparison,
    task: TaskComparison,
    looks: Mapping[str, Calibration],
    series: Mapping[str, int],
) -> dict[str, Any]:
    forests = {metric: _forest(comparison, task, metric, series) for metric in task.metrics}
    drawn = {metric: chart for metric, chart in forests.items() if chart is not None}
    first = [m for m in (*HEADLINES, *CALIBRATION_HEADLINES) if m in drawn]
    return {
        "name": plain(task.name),
        "caption": caption(task),
        "forests": [drawn[metric] for metric in first],
        "more_forests": [chart for metric, chart in drawn.items() if metric not in first],
        "tables": [_metric_table(comparison, task, t, m) for t, m in metric_groups(task).items()],
        "groups": _groups(comparison, task, series),
        "reliability": _reliability(looks),
        "risk": _risk(task, looks, series),
    }


def _forest(
    comparison: Comparison, task: TaskComparison, metric: str, series: Mapping[str, int]
) -> Chart | None:
    rows = []
    for system in comparison.systems:
        score = task.scores.get(system.name, {}).get(metric)
        if score is None or score.difference is None:
            continue
        difference, by = score.difference, scale(metric)
        words = (
            f"{number(metric, difference.value, signed=True)} {MARKS[difference.verdict]}"
            f" p {p_value(difference.p_holm)}"
        )
        rows.append(
            Bar(
                plain(system.name),
                by * difference.value,
                by * difference.ci95[0],
                by * difference.ci95[1],
                words,
                difference.verdict,
                MARKS[difference.verdict],
                series[system.name],
            )
        )
    if not rows:
        return None
    title = f"{plain(task.name)} {label(metric, task.metrics[metric])}"
    told = "; ".join(f"{row.name} {row.words}" for row in rows)
    base = plain(comparison.baseline)
    return Chart(title, forest(rows, f"{title}, difference to {base} with 95 % interval: {told}"))


def _metric_table(
    comparison: Comparison, task: TaskComparison, title: str, metrics: Sequence[str]
) -> dict[str, Any]:
    rows = []
    for system in comparison.systems:
        scores = task.scores.get(system.name, {})
        cells = [
            _cell(task, m, system.name, interval(m, scores[m].ci95) if m in scores else "")
            for m in metrics
        ]
        rows.append((_system_name(comparison, system.name), cells))
    headings = [label(metric, task.metrics[metric]) for metric in metrics]
    return {"title": title.capitalize(), "headings": headings, "rows": rows}


def _cell(task: TaskComparison, metric: str, system: str, small: str) -> dict[str, Any]:
    score = task.scores.get(system, {}).get(metric)
    if score is None:
        return {"text": DASH, "small": "", "best": False, "verdict": ""}
    return {
        "text": value_with_mark(metric, score),
        "small": small,
        "best": is_best(task, metric, system),
        "verdict": "" if score.difference is None else score.difference.verdict,
    }


def _system_name(comparison: Comparison, name: str) -> str:
    return plain(name) + (" (baseline)" if name == comparison.baseline else "")


def _groups(comparison: Comparison, task: TaskComparison, series: Mapping[str, int]) -> list[Chart]:
    metric = task.group_metric
    if metric is None:
        return []
    known = [v[metric] for values in task.groups.values() for v in values.values() if metric in v]
    ends = scale(metric) * min(known, default=0.0), scale(metric) * max(known, default=1.0)
    charts = []
    for group, values in task.groups.items():
        rows = [
            Bar(
                plain(system.name),
                scale(metric) * values[system.name][metric],
                0.0,
                0.0,
                group_cell(task, group, system.name),
                _group_verdict(task, group, system.name),
                series=series[system.name],
            )
            for system in comparison.systems
            if metric in values.get(system.name, {})
        ]
        if rows:
            told = "; ".join(f"{row.name} {row.words}" for row in rows)
            charts.append(
                Chart(plain(group), bars(rows, ends, f"{metric} of {plain(group)}: {told}"))
            )
    return charts


def _group_verdict(task: TaskComparison, group: str, system: str) -> str:
    found = task.group_differences.get(group, {}).get(system)
    return "" if found is None else found.verdict


def _reliability(looks: Mapping[str, Calibration]) -> list[dict[str, Any]]:
    """A system's diagrams side by side."""
    shown = []
    for name, look in looks.items():
        charts = []
        for diagram in look.diagrams:
            said = f"{plain(name)}, {diagram.title}: ECE {100 * diagram.error:.1f}"
            svg = reliability_chart(diagram.bins, said, diagram.unit)
            count = int(diagram.bins.counts.sum())
            words = f"ECE {100 * diagram.error:.1f} · {count:,} {diagram.unit}"
            charts.append({"title": diagram.title, "words": words, "svg": svg})
        if charts:
            shown.append({"name": plain(name), "charts": charts})
    return shown


def _risk(
    task: TaskComparison, looks: Mapping[str, Calibration], series: Mapping[str, int]
) -> dict[str, Any] | None:
    curves, told = [], []
    for name, look in looks.items():
        if look.risk is not None:
            points = list(zip(look.risk.coverage.tolist(), look.risk.risk.tolist(), strict=True))
            curves.append(Curve(plain(name), thinned(points), series[name]))
            score = task.scores.get(name, {}).get("aurc")
            area = "" if score is None else f"AURC {number('aurc', score.value)}"
            told.append((plain(name), series_class(series[name]), area))
    if not curves:
        return None
    words = "; ".join(f"{name} {area}" for name, _, area in told)
    svg = risk_coverage_chart(curves, f"{plain(task.name)}, risk against coverage: {words}")
    return {"svg": svg, "series": told}
