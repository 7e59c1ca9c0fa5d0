"""The two sides of a gate: runs of one system, a committed baseline file, or a published row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cwdpo_bench.errors import UserError, nearest
from cwdpo_bench.leaderboards import published
from cwdpo_bench.leaderboards.baseline_file import read_baseline
from cwdpo_bench.leaderboards.display import scale
from cwdpo_bench.leaderboards.statistics import TaskStatistics, read_statistics
from cwdpo_bench.leaderboards.systems import holders_of, parse_systems, read_systems

PUBLISHED = "published:"


@dataclass(frozen=True)
class Side:
    """What the runs of a system leave to judge it by, one a training seed.

    Attributes:
        name: in messages.
        tasks: statistics of each run, by task.
        signatures: of each run, by task.
    """

    name: str
    tasks: dict[str, tuple[TaskStatistics, ...]]
    signatures: dict[str, tuple[str, ...]]

    @property
    def seeds(self) -> int:
        """How many runs it has."""
        return max((len(runs) for runs in self.tasks.values()), default=1)

    def has(self, task: str, group: str | None, metric: str) -> bool:
        """Whether there is something to compare with."""
        return task in self.tasks and all(
            (group is None or group in part.group_names) and metric in part.blocks
            for part in self.tasks[task]
        )


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


def load_candidate(runs: str | Path | Sequence[str | Path]) -> Side:
    """A run folder, the folders of several seeds, or both as `NAME=FOLDER,FOLDER`.

    Raises:
        UserError: a folder is missing, broken or given twice, its values do not follow from its
            samples, or a task was not run by every seed.
    """
    if isinstance(runs, str | Path):
        systems = read_systems(parse_systems([str(runs)]))
    else:
        systems = read_systems({"": runs})
    name, folders = next(iter(systems.items()))
    found = dict.fromkeys(task for run in folders for task in run.results["tasks"])
    for task in found:
        holders_of(task, systems)
    return Side(
        name=name or folders[0].results["model"]["name"],
        tasks={task: tuple(read_statistics(run, task) for run in folders) for task in found},
        signatures={
            task: tuple(run.results["tasks"][task]["signature"] for run in folders)
            for task in found
        },
    )


def load_side(baseline: str | Path | Sequence[str | Path]) -> Side | PublishedSide:
    """What `load_candidate` reads, a file of `write_baseline`, or `published:NAME`.

    Raises:
        UserError: it is none of them, or broken.
    """
    if not isinstance(baseline, str | Path):
        return load_candidate(baseline)
    if str(baseline).startswith(PUBLISHED):
        return _published(str(baseline).removeprefix(PUBLISHED))
    path = Path(baseline)
    if not path.is_file():
        return load_candidate(baseline)
    header, tasks = read_baseline(path)
    return Side(
        f"{header['model']} ({path.name})",
        {name: (task,) for name, task in tasks.items()},
        {name: (task["signature"],) for name, task in header["tasks"].items()},
    )


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
