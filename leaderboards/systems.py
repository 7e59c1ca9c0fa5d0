"""Systems and their runs: which folders belong to which row, and what the rows are called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from cwdpo_bench.errors import UserError, nearest
from cwdpo_bench.evaluate.results import RunFolder, read_run
from cwdpo_bench.leaderboards.comparison import System

Paths = Sequence[str | Path] | Mapping[str, Sequence[str | Path]]
"""Run folders, a system each; or name → the folders of that system's training seeds."""

Systems = Mapping[str, Sequence[RunFolder]]


def parse_systems(arguments: Sequence[str]) -> Paths:
    """`FOLDER` or `NAME=FOLDER,FOLDER` (the seeds of one system), as the command line has them.

    Raises:
        UserError: a name is given twice, or names no folder.
    """
    named = [argument for argument in arguments if "=" in argument and not Path(argument).exists()]
    if not named:
        return list(arguments)
    systems: dict[str, list[str]] = {}
    for argument in arguments:
        name, _, folders = argument.partition("=") if argument in named else ("", "", argument)
        name = name or Path(argument).name
        if name in systems:
            raise UserError(f"{argument}: a system of the name {name!r} stands there already")
        systems[name] = [folder for folder in folders.split(",") if folder]
        if not systems[name]:
            raise UserError(f"{argument}: name the run folders of {name!r} behind the sign =")
    return systems


def read_systems(paths: Paths) -> dict[str, list[RunFolder]]:
    """The runs of every system, by its name in the tables.

    Raises:
        UserError: a run is broken or given twice, or none is given.
    """
    groups = list(paths.values()) if isinstance(paths, Mapping) else [[path] for path in paths]
    folders = [Path(path) for group in groups for path in group]
    if not folders or not all(groups):
        raise UserError("no run folder given; name at least one that `cwdpo-bench run` wrote")
    seen: set[Path] = set()
    for path in folders:
        if path.resolve() in seen:
            raise UserError(f"{path}: the run is given twice; name each once")
        seen.add(path.resolve())
    runs = [[read_run(Path(path)) for path in group] for group in groups]
    names = list(paths) if isinstance(paths, Mapping) else _unique_names([run for (run,) in runs])
    return dict(zip(names, runs, strict=True))


def labelled(systems: Systems) -> dict[str, RunFolder]:
    """Every run by a name of its own: the system's, with the folder where it has several."""
    return {
        name if len(runs) == 1 else f"{name} ({run.path})": run
        for name, runs in systems.items()
        for run in runs
    }


def system_of(name: str, runs: Sequence[RunFolder]) -> System:
    """What the tables say of a system."""
    first = runs[0]
    return System(
        name=name,
        path=str(first.path),
        signature=first.results["signature"],
        seed=_seed(first),
        paths=tuple(str(run.path) for run in runs),
        seeds=tuple(_seed(run) for run in runs),
        provenance=first.results["provenance"],
    )


def holders_of(task: str, systems: Systems) -> dict[str, Sequence[RunFolder]]:
    """The systems of which a run did the task.

    Raises:
        UserError: only some seeds of a system did it.
    """
    holders = {}
    for name, runs in systems.items():
        lacking = [str(run.path) for run in runs if task not in run.results["tasks"]]
        if lacking and len(lacking) < len(runs):
            raise UserError(f"{name}: {task} was not run by every seed; {lacking[0]} lacks it")
        if not lacking:
            holders[name] = runs
    return holders


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


def find_baseline(systems: Systems, baseline: str | Path | None) -> str:
    """The name of the baseline, which may be given by its folder; the first system by default.

    Raises:
        UserError: it is none of the systems; the nearest is named.
    """
    if baseline is None:
        return next(iter(systems))
    if str(baseline) in systems:
        return str(baseline)
    for name, runs in systems.items():
        if any(run.path.resolve() == Path(baseline).resolve() for run in runs):
            return name
    raise UserError(
        f"baseline {str(baseline)!r} is none of the runs; {nearest(str(baseline), systems)}"
    )


def _seed(run: RunFolder) -> int | None:
    for part in (run.results["provenance"], run.results["model"]):
        if isinstance(part.get("seed"), int):
            return int(part["seed"])
    return None
