"""The comparison in a terminal: an overview, then a block a task that fits the width.

Every sign is text, so that nothing is lost without colour, and every name is shown as it is: a
model called `[bold]` changes no style.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from cwdpo_bench.leaderboards.comparison import Comparison, Score, TaskComparison
from cwdpo_bench.leaderboards.display import (
    DASH,
    caption,
    group_cell,
    interval,
    label,
    legend,
    mark,
    metric_groups,
    number,
    overview,
    p_value,
    value_with_mark,
)
from cwdpo_bench.markup import plain

_Item = TypeVar("_Item")

WIDTH = 100
_LABEL_WIDTH = 17
_CELL_WIDTH = 15
_MAX_GROUPS = 40
"""As many lines of groups as a terminal bears: MMMU has 30 subjects and 6 disciplines."""

_STYLES = {"▲": "green", "▼": "red"}


def render(comparison: Comparison, *, details: bool = True) -> RenderableType:
    """The overview and, with `details`, every metric of every task; print it on a rich console.

    Tables fit 100 columns; systems beyond those that fit go into a further block.
    """
    parts: list[RenderableType] = list(_overview(comparison))
    if details:
        for task in comparison.tasks:
            parts += [Text(), *_task(comparison, task)]
    parts += [Text(), *(Text(line) for line in legend(comparison))]
    parts += [Text(f"note: {plain(note)}", style="yellow") for note in comparison.notes]
    return Group(*parts)


def render_text(comparison: Comparison, *, details: bool = True, width: int = WIDTH) -> str:
    """`render` as plain text without styles."""
    console = Console(width=width, no_color=True, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(render(comparison, details=details))
    return capture.get()


def _overview(comparison: Comparison) -> Iterator[RenderableType]:
    for title, columns in overview(comparison).items():
        for part in _parts(columns, _cells_a_row()):
            table = _table(title)
            table.add_column("system", width=_LABEL_WIDTH, overflow="fold")
            for task, metric in part:
                _add_column(table, Text(f"{plain(task.name)}\n{metric}"))
            for system in comparison.systems:
                scores = [(m, task.scores.get(system.name, {}).get(m)) for task, m in part]
                cells = [Text(DASH) if s is None else _marked(m, s) for m, s in scores]
                table.add_row(_system_name(comparison, system.name), *cells)
            yield table
            yield Text()


def _task(comparison: Comparison, task: TaskComparison) -> Iterator[RenderableType]:
    names = [system.name for system in comparison.systems]
    others = [name for name in names if name != comparison.baseline]
    # The baseline leads every block, so that no block has to be read against another.
    yield Text(plain(task.name), style="bold")
    yield Text(caption(task), style="italic")
    for part in _parts(others, _cells_a_row() - 1) or [[]]:
        yield _task_block(comparison, task, [comparison.baseline, *part])


def _task_block(comparison: Comparison, task: TaskComparison, systems: Sequence[str]) -> Table:
    table = _table("")
    table.add_column("metric", width=_LABEL_WIDTH, overflow="fold")
    for name in systems:
        _add_column(table, _system_name(comparison, name))
    for title, metrics in metric_groups(task).items():
        table.add_row(Text(title, style="bold italic"))
        for metric in metrics:
            scores = [task.scores.get(name, {}).get(metric) for name in systems]
            cells = [Text(DASH) if s is None else _cell(metric, s) for s in scores]
            table.add_row(Text(label(metric, task.metrics[metric])), *cells)
    if task.group_metric is not None and task.groups:
        shown = list(task.groups)[:_MAX_GROUPS]
        table.add_row(Text(f"{task.group_metric} of", style="bold italic"))
        for group in shown:
            cells = [Text(group_cell(task, group, name)) for name in systems]
            table.add_row(Text(plain(group)), *cells)
        if more := len(task.groups) - len(shown):
            table.add_row(Text(f"{more} more: --csv", style="italic"))
    return table


def _cells_a_row() -> int:
    return (WIDTH - _LABEL_WIDTH) // (_CELL_WIDTH + 1)


def _parts(items: Sequence[_Item], size: int) -> list[Sequence[_Item]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _add_column(table: Table, heading: Text) -> None:
    table.add_column(heading, width=_CELL_WIDTH, overflow="fold", justify="right")


def _cell(metric: str, score: Score) -> Text:
    """Value, mark and interval; then the difference with its interval and adjusted p."""
    text = _marked(metric, score)
    text.append(f"\n{interval(metric, score.ci95)}", style="dim")
    if score.difference is not None:
        difference = score.difference
        text.append(f"\nΔ {number(metric, difference.value, signed=True)}")
        text.append(f" p {p_value(difference.p_holm)}")
        ends = interval(metric, difference.ci95, signed=True).replace(" ", "")
        text.append(f"\n{ends}", style="dim")
    return text


def _marked(metric: str, score: Score) -> Text:
    return Text(value_with_mark(metric, score), style=_STYLES.get(mark(score), ""))


def _system_name(comparison: Comparison, name: str) -> Text:
    suffix = comparison.baseline_mark(name)
    return Text(f"{plain(name)}{suffix}")


def _table(title: str) -> Table:
    return Table(
        title=Text(title, style="bold") if title else None,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,
        show_edge=False,
    )
