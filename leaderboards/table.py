"""The comparison in a terminal: an overview, then a block a task that fits the width.

Every sign is text, so that nothing is lost without colour, and every name is shown as it is: a
model called `[bold]` changes no style.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from cwdpo_bench.leaderboards.compare import Comparison, Score, TaskComparison
from cwdpo_bench.leaderboards.display import (
    DASH,
    caption,
    interval,
    label,
    legend,
    mark,
    metric_groups,
    number,
    overview,
    p_value,
    plain,
    value_with_mark,
)

WIDTH = 100
_LABEL_WIDTH = 19
_CELL_WIDTH = 18
_STYLES = {"▲": "green", "▼": "red"}


def render(comparison: Comparison, *, details: bool = True) -> RenderableType:
    """The overview and, with `details`, every metric of every task; print it on a rich console.

    Tables fit 100 columns; systems beyond those that fit go into a further block.
    """
    parts: list[RenderableType] = [_overview(comparison)]
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


def _overview(comparison: Comparison) -> Table:
    table = _table("Overview", "marks: against the baseline, Holm-adjusted within each task")
    table.add_column("system", width=_LABEL_WIDTH, overflow="fold")
    columns = overview(comparison)
    for task, metric in columns:
        table.add_column(Text(f"{plain(task.name)}\n{metric}"), justify="right", overflow="fold")
    for system in comparison.systems:
        scores = [(m, task.scores.get(system.name, {}).get(m)) for task, m in columns]
        cells = [Text(DASH) if s is None else _marked(m, s) for m, s in scores]
        table.add_row(_system_name(comparison, system.name), *cells)
    return table


def _task(comparison: Comparison, task: TaskComparison) -> Iterator[RenderableType]:
    fitting = (WIDTH - _LABEL_WIDTH - 3) // (_CELL_WIDTH + 2)
    names = [system.name for system in comparison.systems]
    others = [name for name in names if name != comparison.baseline]
    step = fitting - 1
    for start in range(0, max(len(others), 1), step):
        # The baseline leads every block, so that no block has to be read against another.
        yield _task_block(comparison, task, [comparison.baseline, *others[start : start + step]])


def _task_block(comparison: Comparison, task: TaskComparison, systems: Sequence[str]) -> Table:
    table = _table(plain(task.name), caption(task))
    table.add_column("metric", width=_LABEL_WIDTH, overflow="fold")
    for name in systems:
        heading = _system_name(comparison, name)
        table.add_column(heading, width=_CELL_WIDTH, overflow="fold", justify="right")
    for title, metrics in metric_groups(task).items():
        table.add_row(Text(title, style="bold italic"))
        for metric in metrics:
            scores = [task.scores.get(name, {}).get(metric) for name in systems]
            cells = [Text(DASH) if s is None else _cell(metric, s) for s in scores]
            table.add_row(Text(label(metric, task.metrics[metric])), *cells)
    return table


def _cell(metric: str, score: Score) -> Text:
    """Value, mark and interval; then the difference with its interval and adjusted p."""
    text = _marked(metric, score)
    text.append(f"\n{interval(metric, score.ci95)}", style="dim")
    if score.difference is not None:
        difference = score.difference
        text.append(f"\nΔ {number(metric, difference.value, signed=True)}")
        text.append(f"  p {p_value(difference.p_holm)}")
        text.append(f"\n{interval(metric, difference.ci95, signed=True)}", style="dim")
    return text


def _marked(metric: str, score: Score) -> Text:
    return Text(value_with_mark(metric, score), style=_STYLES.get(mark(score), ""))


def _system_name(comparison: Comparison, name: str) -> Text:
    suffix = " (baseline)" if name == comparison.baseline else ""
    return Text(f"{plain(name)}{suffix}")


def _table(title: str, caption: str) -> Table:
    return Table(
        title=Text(title, style="bold"),
        caption=Text(caption),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
    )
