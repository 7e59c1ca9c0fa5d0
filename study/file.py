"""A study's file: YAML in, typed and validated out, and the cells that it asks for.

A cell is one training with one seed, and its scores. The rows of the tables are the systems, or
where a system is swept over, the points of its grid.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import yaml
from pydantic import Field, ValidationError

from cwdpo_bench.errors import UserError, nearest
from cwdpo_bench.train.recipe import Recipe, load_recipe, shipped_recipes, step_settings
from cwdpo_bench.train.sections import Section

NO_TRAINING = "none"
"""The recipe of a system that is scored as it stands."""

Settings = dict[str, Any]
"""Dotted keys of a recipe and their values, as `train` takes them on its command line."""


class System(Section):
    """One row of the tables: a recipe (`none`: the model untrained) and its own settings.

    `start` names the system whose checkpoint of the same seed is trained on. `model`, `steps`,
    `data` and `easy_share` (of the demo's pairs) take the place of the study's; `pairs` keeps so
    many of the demo's, the first ones.
    """

    recipe: str
    model: str | None = None
    settings: Settings = Field(default_factory=dict)
    start: str | None = None
    steps: Annotated[int, Field(gt=1)] | None = None
    data: Path | None = None
    easy_share: Annotated[float, Field(ge=0, le=1)] | None = None
    pairs: Annotated[int, Field(gt=0)] | None = None


class Tune(Section):
    """The same tries for every system on validation data; the best one's value is used on test.

    `key` is a recipe's key, `metric` a task's, as in `coco/CIDEr`.
    """

    key: str
    values: Annotated[list[Any], Field(min_length=2)]
    data_root: Path | None = None
    tasks: Annotated[list[str], Field(min_length=1)]
    metric: Annotated[str, Field(pattern=r"^[^/]+/[^/]+$")]
    seed: int = 1000


class Study(Section):
    """A whole study.

    `data`, `probe` and `data_root` are relative to the file; with `model: demo`, or another model
    and `world: demo`, they may be left out. `steps` are the update steps of every cell; two stages
    share them. `shift` also measures TV and JS against the start, which takes the memory of a
    second model. `diversity` is how many captions an image are sampled beside the greedy one.
    """

    model: str
    world: Literal["demo"] | None = None
    data: Path | None = None
    probe: Path | None = None
    data_root: Path | None = None
    tasks: Annotated[list[str], Field(min_length=1)]
    limit: Annotated[int, Field(gt=0)] | None = None
    batch_size: Annotated[int, Field(gt=0)] = 16
    shift: bool = True
    diversity: Annotated[int, Field(ge=2)] | None = None
    steps: Annotated[int, Field(gt=1)] | None = None
    seeds: Annotated[list[int], Field(min_length=1)]
    settings: Settings = Field(default_factory=dict)
    systems: Annotated[dict[str, System], Field(min_length=1)]
    sweeps: dict[str, dict[str, Annotated[list[Any], Field(min_length=1)]]] = Field(
        default_factory=dict
    )
    baseline: str | None = None
    tune: Tune | None = None

    @property
    def is_in_demo_world(self) -> bool:
        """Whether what it does not name is the demo's."""
        return "demo" in (self.model, self.world)

    def model_of(self, system: str) -> str:
        """What a system starts from."""
        return self.systems[system].model or self.model


class Cell(NamedTuple):
    """One training and its scores.

    Attributes:
        phase: `tune` scores on validation data, `cells` on test data.
        row: its name in the tables.
        system: the system's name in the file.
        recipe: a shipped recipe's name, a file, or `none`.
        settings: all overrides, in the order in which they apply.
        seed: of the training.
        data_root: the benchmarks that it is scored on; None for the demo's own.
        tasks: which of them.
    """

    phase: Literal["tune", "cells"]
    row: str
    system: str
    recipe: str
    settings: Settings
    seed: int
    data_root: Path | None
    tasks: tuple[str, ...]

    @property
    def key(self) -> str:
        """Its folder in the study's, which `--cell` names it by."""
        return f"{self.phase}/{self.row}/seed-{self.seed}"


def load_study(file: Path) -> Study:
    """Read and validate a study's file; its paths come back absolute.

    Raises:
        UserError: not there, not YAML, an unknown key (the nearest is named), a bad value, a path
            that is not there, a recipe that cannot be read.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{file}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict):
        raise UserError(f"{file}: a study is a mapping of keys; docs/STUDY.md shows one")
    try:
        study = Study.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{file}: " + "; ".join(_explain(e) for e in error.errors())) from error
    _check_names(study, file)
    return _with_paths(study, file)


def tries(study: Study) -> list[Cell]:
    """The cells of the search on validation data: every trained system times every value."""
    if study.tune is None:
        return []
    tune = study.tune
    return [
        Cell(
            "tune",
            f"{name}@{_folder_name(_point({tune.key: value}))}",
            name,
            system.recipe,
            {**study.settings, **system.settings, tune.key: value},
            tune.seed,
            tune.data_root,
            tuple(tune.tasks),
        )
        for name, system in _trained(study).items()
        for value in tune.values
    ]


def cells(study: Study, chosen: Mapping[str, Any]) -> list[Cell]:
    """The cells on test data.

    Args:
        study: validated.
        chosen: system → the value of `tune.key` that won on validation data.
    """
    found = []
    for row, name, point in _rows(study):
        system = study.systems[name]
        settings = {**study.settings, **system.settings}
        if study.tune is not None and name in chosen:
            settings[study.tune.key] = chosen[name]
        settings |= point
        # A system without training is the same whatever the seed.
        seeds = study.seeds[:1] if system.recipe == NO_TRAINING else study.seeds
        found += [
            Cell(
                "cells",
                row,
                name,
                system.recipe,
                settings,
                seed,
                study.data_root,
                tuple(study.tasks),
            )
            for seed in seeds
        ]
    return found


def start_of(study: Study, cell: Cell) -> Cell | None:
    """The cell whose checkpoint this one trains on; None where it starts from the model."""
    name = study.systems[cell.system].start
    if name is None:
        return None
    return next(c for c in cells(study, {}) if c.system == name and c.seed == cell.seed)


def recipe_of(study: Study, cell: Cell) -> Recipe | None:
    """The recipe as the cell runs it; None without training.

    Raises:
        UserError: as `load_recipe`.
    """
    if cell.recipe == NO_TRAINING:
        return None
    asked = study.systems[cell.system].steps or study.steps
    # JSON is YAML, whatever the value holds.
    settings = [f"{key}={json.dumps(value)}" for key, value in cell.settings.items()]
    steps = [] if asked is None else step_settings(load_recipe(cell.recipe, settings), asked)
    return load_recipe(cell.recipe, [*steps, *settings, f"trainer.seed={cell.seed}"])


def _trained(study: Study) -> dict[str, System]:
    return {name: s for name, s in study.systems.items() if s.recipe != NO_TRAINING}


def _rows(study: Study) -> Iterator[tuple[str, str, Settings]]:
    """Row, its system, its point of the sweep."""
    for name in study.systems:
        grid = study.sweeps.get(name)
        if grid is None:
            yield name, name, {}
            continue
        for values in itertools.product(*grid.values()):
            point = dict(zip(grid, values, strict=True))
            yield f"{name}@{_folder_name(_point(point))}", name, point


def _point(point: Settings) -> str:
    """`learning_rate=0.0001,beta=0.1`: the last words of the keys where these tell them apart."""
    short = [key.rsplit(".", 1)[-1] for key in point]
    names = short if len(set(short)) == len(short) else list(point)
    return ",".join(f"{name}={value}" for name, value in zip(names, point.values(), strict=True))


def _folder_name(text: str) -> str:
    return re.sub(r"[^\w.+=@,-]", "_", text)


def _check_names(study: Study, file: Path) -> None:
    for name in study.systems:
        if _folder_name(name) != name or name.startswith(".") or "@" in name:
            raise UserError(
                f"{file}: systems.{name}: becomes a folder's name; use letters, digits, . + = , -"
            )
    for name, system in study.systems.items():
        _check_start(study, name, system, file)
        for key in ("easy_share", "pairs"):
            if getattr(system, key) is not None and (
                not study.is_in_demo_world or study.data or system.data
            ):
                raise UserError(
                    f"{file}: systems.{name}.{key}: is of the demo's own pairs; write "
                    "`model: demo` or `world: demo` without data, or remove it"
                )
    for name in study.sweeps:
        if name not in study.systems:
            raise UserError(
                f"{file}: sweeps.{name}: no such system; {nearest(name, study.systems)}"
            )
        if study.systems[name].recipe == NO_TRAINING:
            raise UserError(f"{file}: sweeps.{name}: is not trained; remove the sweep")
        if study.tune is not None and study.tune.key in study.sweeps[name]:
            raise UserError(
                f"{file}: sweeps.{name}: {study.tune.key} is chosen by tune; remove it from one"
            )
    rows = [row for row, *_ in _rows(study)]
    tried = [cell.row for cell in tries(study)]
    seeds = [str(seed) for seed in study.seeds]
    for kind, names in (("seeds", seeds), ("sweeps", rows), ("tune.values", tried)):
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UserError(f"{file}: {kind}: {twice} stands there twice; remove one")
    if study.baseline is not None and study.baseline not in rows:
        raise UserError(
            f"{file}: baseline: no row {study.baseline!r}; {nearest(study.baseline, rows)}"
        )
    if study.tune is not None and study.tune.metric.split("/")[0] not in study.tune.tasks:
        raise UserError(f"{file}: tune.metric: {study.tune.metric} is of none of tune.tasks")


def _check_start(study: Study, name: str, system: System, file: Path) -> None:
    """A start is one trained row that is not itself on the way from here."""
    if system.start is None:
        return
    key, start = f"{file}: systems.{name}.start", study.systems.get(system.start)
    if start is None:
        raise UserError(f"{key}: no such system; {nearest(system.start, study.systems)}")
    if NO_TRAINING in (start.recipe, system.recipe) or system.start in study.sweeps:
        raise UserError(f"{key}: must be from one trained system, without a sweep, to another")
    if study.model_of(name) != study.model_of(system.start):
        raise UserError(f"{key}: {system.start} has another model; give both the same")
    if start.start is not None:
        raise UserError(f"{key}: {system.start} has a start itself; only one may come before")
    if study.tune is not None:
        raise UserError(
            f"{key}: tries on validation data know no start; remove tune and write the value that "
            "a study of its own chose"
        )


def _with_paths(study: Study, file: Path) -> Study:
    """Paths made absolute and looked for, and every recipe read once."""
    folder = file.resolve().parent
    found: dict[str, Any] = {}
    for key in ("data", "probe", "data_root"):
        path = getattr(study, key)
        if path is not None:
            found[key] = _existing(folder / path, file, key)
        elif not study.is_in_demo_world and key != "probe":
            raise UserError(
                f"{file}: {key}: is missing; only `model: demo` and `world: demo` bring their own"
            )
    if (study.data is None) != (study.probe is None) and study.is_in_demo_world:
        raise UserError(f"{file}: data and probe: write both, or leave both to the demo")
    found["model"] = _model(study.model, folder)
    if study.tune is not None and study.tune.data_root is not None:
        root = _existing(folder / study.tune.data_root, file, "tune.data_root")
        found["tune"] = study.tune.model_copy(update={"data_root": root})
    elif study.tune is not None and study.data_root is not None:
        raise UserError(f"{file}: tune.data_root: name the validation data, never the test data")
    systems = dict(study.systems)
    for name, system in systems.items():
        own: dict[str, Any] = {}
        if system.model is not None:
            own["model"] = _model(system.model, folder)
        if system.recipe not in shipped_recipes() and (folder / system.recipe).is_file():
            own["recipe"] = str(folder / system.recipe)
        if system.data is not None:
            own["data"] = _existing(folder / system.data, file, f"systems.{name}.data")
        systems[name] = system.model_copy(update=own)
    study = study.model_copy(update={**found, "systems": systems})
    first = study.tune.values[0] if study.tune is not None else None
    for cell in (*tries(study), *cells(study, dict.fromkeys(_trained(study), first))):
        try:
            recipe_of(study, cell)
        except UserError as error:
            raise UserError(f"{file}: systems.{cell.system}: {error}") from error
    return study


def _model(name: str, folder: Path) -> str:
    """A folder beside the file by its absolute path; a Hub id or `demo` as it is."""
    return str(folder / name) if (folder / name).is_dir() else name


def _existing(path: Path, file: Path, key: str) -> Path:
    if not path.exists():
        raise UserError(f"{file}: {key}: {path}: not there; paths are relative to the file")
    return path


def _explain(error: Any) -> str:
    place = error["loc"]
    key = ".".join(map(str, place))
    if error["type"] == "extra_forbidden":
        sections: dict[str, type[Section]] = {"tune": Tune, "systems": System}
        section = sections.get(str(place[0]), Study) if len(place) > 1 else Study
        known = section.model_fields
        return f"unknown key {key!r}; {nearest(str(place[-1]), known)}"
    return f"{key}: {error['msg']}"
