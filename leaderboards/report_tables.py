"""A comparison as the report's template shows it: tables of cells, charts under their titles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from cwdpo_bench.leaderboards.charts import (
    Bar,
    Curve,
    bars,
    forest,
    reliability_chart,
    risk_coverage_chart,
    thinned,
)
from cwdpo_bench.leaderboards.comparison import Comparison, TaskComparison
from cwdpo_bench.leaderboards.display import (
    CALIBRATION_HEADLINES,
    DASH,
    HEADLINES,
    MARKS,
    caption,
    group_cell,
    interval,
    is_best,
    label,
    metric_groups,
    number,
    overview,
    p_value,
    scale,
    value_with_mark,
)
from cwdpo_bench.leaderboards.report_calibration import Calibration
from cwdpo_bench.leaderboards.svg import series_class
from cwdpo_bench.markup import plain


@dataclass(frozen=True)
class Chart:
    """A drawing under its title."""

    title: str
    svg: Markup


def overview_tables(comparison: Comparison) -> list[dict[str, Any]]:
    """One headline a task, then one of its calibration: a table each."""
    tables = []
    for title, columns in overview(comparison).items():
        rows = [
            (_system_name(comparison, s.name), [_cell(t, m, s.name, "") for t, m in columns])
            for s in comparison.systems
        ]
        headings = [f"{plain(task.name)} {label(m, task.metrics[m])}" for task, m in columns]
        tables.append({"title": title, "headings": headings, "rows": rows})
    return tables


def task_parts(
    comparison: Comparison,
    task: TaskComparison,
    looks: Mapping[str, Calibration],
    series: Mapping[str, int],
) -> dict[str, Any]:
    """All that the page shows of a task.

    Args:
        comparison: that holds it.
        task: the task.
        looks: system → its calibration on the task.
        series: system → its place among all, for its colour.
    """
    forests = {metric: _forest(comparison, task, metric) for metric in task.metrics}
    drawn = {metric: chart for metric, chart in forests.items() if chart is not None}
    # Tasks of lmms-eval have metrics of their own; the first stand for them.
    first = [m for m in (*HEADLINES, *CALIBRATION_HEADLINES) if m in drawn] or list(drawn)[:2]
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


def _forest(comparison: Comparison, task: TaskComparison, metric: str) -> Chart | None:
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
    return plain(name) + comparison.baseline_mark(name)


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
