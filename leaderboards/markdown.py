"""The comparison as markdown: the same bytes for the same runs, whatever the models are called.

Published figures are a block of their own under a heading that says so, below every row of ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from cwdpo_bench.leaderboards import published
from cwdpo_bench.leaderboards.comparison import Comparison, Difference, TaskComparison
from cwdpo_bench.leaderboards.display import (
    DASH,
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
    provenance_rows,
    value_with_mark,
)
from cwdpo_bench.markup import escape

Dynamics = Mapping[str, Mapping[str, float | str]]

TITLE = "Leaderboard"


def to_markdown(
    comparison: Comparison,
    *,
    with_published: bool = False,
    dynamics: Dynamics | None = None,
    title: str = TITLE,
    brief: bool = False,
) -> str:
    """The comparison as a markdown document.

    Args:
        comparison: what `compare_runs` gave.
        with_published: also the figures of SPEC 5, set apart.
        dynamics: learning dynamics at the end of training: system → column → number or
            word; a missing or undefined one is a dash.
        title: of the document.
        brief: only the overview, the ranks and how to read them, without a title: a part of
            another document.
    """
    if brief:
        lines = [*legend(comparison), *comparison.notes]
        states = [f"{name}: {signature}" for name, *_, signature in provenance_rows(comparison)]
        foot = "\n".join(f"- {escape(line)}" for line in (*lines, *states))
        return "\n\n".join(filter(None, [_overview(comparison), _ranks(comparison), foot])) + "\n"
    blocks = [f"# {escape(title)}", _overview(comparison)]
    if ranks := _ranks(comparison):
        blocks.append(ranks)
    if dynamics:
        blocks.append(_dynamics(dynamics))
    for task in comparison.tasks:
        blocks += [f"## {escape(task.name)}", f"{caption(task)}.", *_task_tables(comparison, task)]
    blocks += [_reading(comparison), _provenance(comparison)]
    if with_published:
        blocks.append(_published())
    return "\n\n".join(blocks) + "\n"


def _overview(comparison: Comparison) -> str:
    columns = [column for part in overview(comparison).values() for column in part]
    headings = [f"{escape(task.name)} {escape(metric)}" for task, metric in columns]
    rows = [
        [_system_name(comparison, system.name)]
        + [_cell(task, metric, system.name, with_interval=False) for task, metric in columns]
        for system in comparison.systems
    ]
    return table(["system", *headings], rows)


def _task_tables(comparison: Comparison, task: TaskComparison) -> Iterator[str]:
    names = [system.name for system in comparison.systems]
    for title, metrics in metric_groups(task).items():
        headings = [escape(label(metric, task.metrics[metric])) for metric in metrics]
        rows = [
            [_system_name(comparison, name)] + [_cell(task, metric, name) for metric in metrics]
            for name in names
        ]
        yield f"**{title.capitalize()}**\n\n{table(['system', *headings], rows)}"
    if task.group_metric is not None and task.groups:
        yield _groups(comparison, task)
    compared = [n for n in names if any(s.difference for s in task.scores.get(n, {}).values())]
    if compared:
        yield _differences(task, compared)


def _cell(task: TaskComparison, metric: str, system: str, *, with_interval: bool = True) -> str:
    score = task.scores.get(system, {}).get(metric)
    if score is None:
        return DASH
    value = value_with_mark(metric, score)
    if is_best(task, metric, system):
        value = f"**{value}**"
    return f"{value} {interval(metric, score.ci95)}" if with_interval else value


def _groups(comparison: Comparison, task: TaskComparison) -> str:
    names = [system.name for system in comparison.systems]
    rows = [
        [escape(group), *(escape(group_cell(task, group, name)) for name in names)]
        for group in task.groups
    ]
    headings = ["group", *(_system_name(comparison, name) for name in names)]
    tests = sum(map(len, task.group_differences.values()))
    how = f"paired difference to the baseline, Holm over {tests}" if tests else "values only"
    return f"**{escape(task.group_metric or '')} by group** ({how})\n\n{table(headings, rows)}"


def _differences(task: TaskComparison, systems: Sequence[str]) -> str:
    rows = []
    for metric, higher_is_better in task.metrics.items():
        row = [escape(label(metric, higher_is_better))]
        for system in systems:
            score = task.scores[system].get(metric)
            difference = None if score is None else score.difference
            if difference is None:
                row.append(DASH)
                continue
            row.append(
                f"{number(metric, difference.value, signed=True)} "
                f"{interval(metric, difference.ci95, signed=True)}, "
                f"p {escape(p_value(difference.p))}, Holm {escape(p_value(difference.p_holm))}"
                f"{_effect(difference)}"
            )
        rows.append(row)
    headings = ["metric", *(escape(system) for system in systems)]
    return f"**Paired difference to the baseline**\n\n{table(headings, rows)}"


def _effect(difference: Difference) -> str:
    said = "" if difference.effect is None else f", d {difference.effect:+.2f}"
    return said + (", McNemar" if difference.test == "mcnemar" else "")


def _ranks(comparison: Comparison) -> str:
    columns = [
        (task, metric)
        for part in overview(comparison).values()
        for task, metric in part
        if metric in task.ranks
    ]
    if not columns:
        return ""
    rows = [
        [_system_name(comparison, system.name)]
        + [str(task.ranks[metric].get(system.name, DASH)) for task, metric in columns]
        for system in comparison.systems
    ]
    headings = ["system", *(f"{escape(task.name)} {escape(metric)}" for task, metric in columns)]
    how = "one more than the systems that are significantly better; Holm over the pairs of a column"
    return f"**Ranks** ({how})\n\n{table(headings, rows)}"


def _dynamics(dynamics: Dynamics) -> str:
    columns = list(dict.fromkeys(column for row in dynamics.values() for column in row))
    rows = [
        [escape(system), *(_figure(row.get(column)) for column in columns)]
        for system, row in dynamics.items()
    ]
    headings = ["system", *(escape(column) for column in columns)]
    return f"## Learning dynamics at the end of training\n\n{table(headings, rows)}"


def _figure(value: float | str | None) -> str:
    if isinstance(value, str):
        return escape(value)
    if value is None or not math.isfinite(value):
        return DASH
    return f"{round(value, 3) + 0.0:.3f}"


def _reading(comparison: Comparison) -> str:
    lines = [
        *legend(comparison),
        "Bold: significantly better than every other system of its column (Holm over the pairs).",
        *comparison.notes,
    ]
    return "## How to read this\n\n" + "\n".join(f"- {escape(line)}" for line in lines)


def _provenance(comparison: Comparison) -> str:
    rows = [[escape(cell) or DASH for cell in row] for row in provenance_rows(comparison)]
    tasks = [[escape(task.name), str(task.n), escape(task.signature)] for task in comparison.tasks]
    return (
        f"## Signatures\n\nSeed of the resampling: {comparison.seed}.\n\n"
        f"{table(PROVENANCE_COLUMNS, rows)}\n\n"
        f"{table(['task', 'n', 'signature of the task'], tasks)}"
    )


def _published() -> str:
    figures = [
        ("Systems", published.SYSTEM_COLUMNS, published.SYSTEMS),
        ("Ablations of CW-DPO", published.ABLATION_COLUMNS, published.ABLATIONS),
    ]
    tables = [
        f"**{title} (published)**\n\n{table(['published', *columns], _published_rows(rows))}"
        for title, columns, rows in figures
    ]
    dynamics = [[f"{name} (published)", *row] for name, row in published.DYNAMICS.items()]
    last = table(["published", *published.DYNAMICS_COLUMNS], dynamics)
    tables.append(f"**Dynamics (published)**\n\n{last}\n\n{published.DYNAMICS_NOTE}")
    return "\n\n".join(["---", "## Published figures", f"> {published.SOURCE}", *tables])


def _published_rows(rows: Mapping[str, tuple[float | None, ...]]) -> list[list[str]]:
    return [
        [f"{name} (published)", *(DASH if v is None else f"{v:.1f}" for v in row)]
        for name, row in rows.items()
    ]


def _system_name(comparison: Comparison, name: str) -> str:
    return escape(name) + comparison.baseline_mark(name)


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table of cells that are escaped already; all but the first column are numbers."""
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
