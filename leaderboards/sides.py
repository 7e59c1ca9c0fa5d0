"""The two sides of a gate: a run folder, a committed baseline file, or a published row."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cwdpo_bench.errors import UserError, nearest
from cwdpo_bench.evaluate.results import read_run
from cwdpo_bench.leaderboards import published
from cwdpo_bench.leaderboards.baseline_file import read_baseline
from cwdpo_bench.leaderboards.display import scale
from cwdpo_bench.leaderboards.statistics import TaskStatistics, read_statistics

PUBLISHED = "published:"


@dataclass(frozen=True)
class Side:
    """What a run leaves to judge it by.

    Attributes:
        name: of the run, in messages.
        tasks: statistics by task.
        signatures: by task.
    """

    name: str
    tasks: dict[str, TaskStatistics]
    signatures: dict[str, str]

    def has(self, task: str, group: str | None, metric: str) -> bool:
        """Whether there is something to compare with."""
        part = self.tasks.get(task)
        known = part is not None and (group is None or group in part.group_names)
        return known and part is not None and metric in part.blocks


@dataclass(frozen=True)
class PublishedSide:
    """Published points.

    Attributes:
        name: of the row.
        tasks: those of which a figure is published.
        figures: task, metric, group → value on the metric's own scale.
    """

    name: str
    tasks: tuple[str, ...]
    figures: dict[tuple[str, str, str | None], float]

    def has(self, task: str, group: str | None, metric: str) -> bool:
        """Whether there is a figure to compare with."""
        return (task, metric, group) in self.figures


def load_candidate(path: str | Path) -> Side:
    """A run folder; a run is refused whose values do not follow from its samples.

    Raises:
        UserError: the folder is missing or broken.
    """
    run = read_run(Path(path))
    tasks = {name: read_statistics(run, name) for name in run.results["tasks"]}
    return Side(
        name=run.results["model"]["name"],
        tasks=tasks,
        signatures={name: task["signature"] for name, task in run.results["tasks"].items()},
    )


def load_side(baseline: str | Path) -> Side | PublishedSide:
    """A run folder, a file of `write_baseline`, or `published:NAME`.

    Raises:
        UserError: it is none of them, or broken.
    """
    if str(baseline).startswith(PUBLISHED):
        return _published(str(baseline).removeprefix(PUBLISHED))
    path = Path(baseline)
    if not path.is_file():
        return load_candidate(path)
    header, tasks = read_baseline(path)
    signatures = {name: task["signature"] for name, task in header["tasks"].items()}
    return Side(f"{header['model']} ({path.name})", tasks, signatures)


def _published(name: str) -> PublishedSide:
    if name not in published.SYSTEMS:
        raise UserError(f"no published row {name!r}; {nearest(name, published.SYSTEMS)}")
    figures = {
        (task, metric, group): value / scale(metric)
        for (task, metric, group), value in zip(
            published.COLUMN_METRICS, published.SYSTEMS[name], strict=True
        )
        if value is not None
    }
    tasks = tuple(dict.fromkeys(task for task, _, _ in figures))
    return PublishedSide(f"{name} (published)", tasks, figures)
