"""One cell of a study: train, score, and a `cell.json` that says what was done and how it ended.

    DIR/cells/ROW/seed-N/    checkpoint/  run/  cell.json  cell.log
    DIR/tune/ROW/seed-N/     the same for the tries on validation data

A finished cell is never redone, an interrupted one goes on where it stopped, and one whose recipe,
model, data or versions are no longer those that the study asks for is refused.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cwdpo_bench import __version__
from cwdpo_bench.demo import model_path
from cwdpo_bench.errors import UserError
from cwdpo_bench.files import is_locked, lock, read_json, write_json
from cwdpo_bench.study.file import Cell, Study, recipe_of, start_of
from cwdpo_bench.train.data import fingerprint

RECORD = "cell.json"
LOCK = ".lock"
NO_WORD = "its process ended without a word"
ELSEWHERE = "is running in another process"
WAITS = "waits for a cell that is running in another process"
UNFINISHED = (ELSEWHERE, WAITS)
"""Why a cell has no figures that did not fail."""
STAGE_FIGURES = (
    *("objective", "pairs", "steps", "seconds", "tokens", "dynamics", "stopped"),
    *("cooling", "threshold", "penalty_active"),
)
"""What the record keeps of a stage's provenance, where the stage has it."""


def run_cell(study: Study, cell: Cell, output: Path) -> None:
    """Train and score a cell, or go on with it; a finished one is left alone.

    Raises:
        UserError: the folder holds another cell, another process works in it, or the training or
            the scoring met a mistake, which `cell.json` then tells as the reason.
    """
    folder = output / cell.key
    record = read_cell(study, cell, output)
    if record["status"] == "finished":
        return
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        record |= {"status": "running", "reason": None}
        write_json(folder / RECORD, record)
        try:
            _train_and_score(study, cell, folder, record)
        except BaseException as error:
            from cwdpo_bench.train.interruption import Interrupted

            stopped = isinstance(error, Interrupted) or not isinstance(error, Exception)
            record["status"] = "interrupted" if stopped else "failed"
            told = (
                str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            )
            record["reason"] = told
            write_json(folder / RECORD, record)
            raise


def read_cell(study: Study, cell: Cell, output: Path) -> dict[str, Any]:
    """What `cell.json` says; a record of status `new` where there is none.

    Raises:
        UserError: it was made from something else than what the study asks for now.
    """
    file = output / cell.key / RECORD
    wanted = _fingerprint(study, cell)
    if not file.is_file():
        return {
            "schema": 1,
            "status": "new",
            "reason": None,
            "row": cell.row,
            "system": cell.system,
            "seed": cell.seed,
            "settings": cell.settings,
            "seconds": {"train": 0.0, "run": 0.0},
            "fingerprint": wanted,
        }
    found: dict[str, Any] = read_json(file)
    changed = _changes(found["fingerprint"], wanted)
    if changed:
        raise UserError(
            f"{file.parent}: was made with other values ({'; '.join(changed[:3])}); set them back, "
            "name another --output, or remove that folder to have the cell made again"
        )
    if found["status"] == "finished" and not (file.parent / "run" / "results.json").is_file():
        found["status"] = "interrupted"
    if found["status"] == "running" and not is_running(file.parent):
        found |= {"status": "interrupted", "reason": NO_WORD}
    return found


def is_running(folder: Path) -> bool:
    """Whether a process works on the cell of this folder, here or on another node."""
    return is_locked(folder / LOCK)


def mark_failed(folder: Path, reason: str) -> None:
    """Note the end of a cell whose process could not do it itself."""
    file = folder / RECORD
    if file.is_file():
        write_json(file, {**read_json(file), "status": "failed", "reason": reason})


def demo_world() -> Path:
    """The rendered world of `model: demo` and `world: demo`."""
    from cwdpo_bench.demo import data_root

    return data_root()


def benchmarks(cell: Cell) -> Path:
    """The data root that the cell is scored on."""
    if cell.data_root is not None:
        return cell.data_root
    return demo_world() / "validation" if cell.phase == "tune" else demo_world()


# --- work ----------------------------------------------------------------------------------------


def _train_and_score(study: Study, cell: Cell, folder: Path, record: dict[str, Any]) -> None:
    from cwdpo_bench.evaluate.run import run_tasks
    from cwdpo_bench.train.run import train
    from cwdpo_bench.vlm import load_vlm

    base_name = study.model_of(cell.system)
    base = model_path(base_name)
    recipe, model, seconds = recipe_of(study, cell), base, record["seconds"]
    if recipe is not None:
        data, probe = training_data(study, cell)
        model = str(folder / "checkpoint")
        before = _start(study, cell, folder)
        with _timed(seconds, "train"):
            made = train(
                recipe,
                model=base if before is None else str(before / "checkpoint"),
                model_name=base_name if before is None else before.parent.name,
                data=data,
                probe=probe,
                output=folder / "checkpoint",
                resume=(folder / "checkpoint" / "provenance.json").is_file(),
            )
        record["training"] = _training(made, recipe)
        if before is not None:
            earlier = read_json(before / RECORD)["training"]
            for key in ("pairs_seen", "steps", "tokens_trained", "tokens_read"):
                record["training"][key] += earlier[key]
    with _timed(seconds, "run"):
        run_tasks(
            model,
            model_name=cell.row,
            tasks=list(cell.tasks),
            data_root=benchmarks(cell),
            output=folder / "run",
            limit=study.limit,
            batch_size=study.batch_size,
            diversity=study.diversity or 0,
            # By its short name: where the model lies must not change a signature.
            reference_model=replace(load_vlm(base), name=Path(base_name).name)
            if study.shift
            else None,
        )
    # The Trainer's own checkpoints are only there to go on from.
    for leftover in (folder / "checkpoint").glob("stage*/checkpoint-*"):
        shutil.rmtree(leftover)
    record["status"] = "finished"
    write_json(folder / RECORD, record)


def _start(study: Study, cell: Cell, folder: Path) -> Path | None:
    """The finished folder of the cell that this one trains on."""
    start = start_of(study, cell)
    if start is None:
        return None
    before = folder.parents[2] / start.key
    if read_cell(study, start, folder.parents[2])["status"] != "finished":
        raise UserError(f"{before}: is not finished, and {cell.key} starts from it; run it first")
    return before


def _training(made: Mapping[str, Any], recipe: Any) -> dict[str, Any]:
    """What the fairness of a comparison is judged by."""
    seen = 0
    for name, stage in recipe.stages().items():
        arguments = recipe.trainer_arguments(stage)
        batch = arguments.get("per_device_train_batch_size", 8)
        seen += (
            made["stages"][name]["steps"] * batch * arguments.get("gradient_accumulation_steps", 1)
        )
    return {
        "pairs": made["data"]["pairs"],
        "pairs_seen": seen,
        "steps": sum(stage["steps"] for stage in made["stages"].values()),
        "tokens_trained": sum(stage["tokens"]["trained"] for stage in made["stages"].values()),
        "tokens_read": sum(stage["tokens"]["read"] for stage in made["stages"].values()),
        "stages": {
            name: {key: stage[key] for key in STAGE_FIGURES if key in stage}
            for name, stage in made["stages"].items()
        },
        "verdict": made["verdict"]["name"],
        "warnings": made["warnings"],
    }


@contextmanager
def _timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    """Adds to what earlier, interrupted calls took."""
    started = time.monotonic()
    try:
        yield
    finally:
        seconds[part] = round(seconds[part] + time.monotonic() - started, 1)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """The lock goes with the process, however that ends."""
    with (folder / LOCK).open("w") as file:
        lock(file, folder, f"{folder}: another process works on this cell; let it end")
        yield


def training_data(study: Study, cell: Cell) -> tuple[Path, Path | None]:
    """Training and held-out pairs. The latter are the study's, so that rows can be compared."""
    system = study.systems[cell.system]
    if study.data is not None:
        return system.data or study.data, study.probe
    pairs = demo_world() / "pairs"
    if system.data is not None:
        return system.data, pairs / "probe.jsonl"
    return _demo_pairs(system.easy_share, system.pairs), pairs / "probe.jsonl"


def _demo_pairs(easy_share: float | None, number: int | None) -> Path:
    from cwdpo_bench.demo import first_pairs, training_pairs

    every = (
        demo_world() / "pairs" / "train.jsonl" if easy_share is None else training_pairs(easy_share)
    )
    return every if number is None else first_pairs(every, number)


# --- fingerprint ---------------------------------------------------------------------------------


def _fingerprint(study: Study, cell: Cell) -> dict[str, Any]:
    """All that a cell's figures depend on."""
    recipe = recipe_of(study, cell)
    data, probe = training_data(study, cell)
    start = start_of(study, cell)
    return {
        **({} if start is None else {"start": _fingerprint(study, start)}),
        "recipe": None if recipe is None else recipe.model_dump(mode="json", by_alias=True),
        "model": study.model_of(cell.system),
        "data": None if recipe is None else _content(data),
        "probe": None if recipe is None or probe is None else _content(probe),
        "data_root": "demo" if cell.data_root is None else str(cell.data_root),
        "tasks": list(cell.tasks),
        "limit": study.limit,
        "shift": study.shift,
        **({"diversity": study.diversity} if study.diversity else {}),
        "versions": {
            "cwdpo-bench": __version__,
            **{name: version(name) for name in ("torch", "transformers", "peft")},
        },
    }


@cache
def _content(path: Path) -> str:
    return fingerprint(path)


def _changes(found: Any, wanted: Any, key: str = "") -> list[str]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        return [
            change
            for name in dict.fromkeys((*found, *wanted))
            for change in _changes(found.get(name), wanted.get(name), f"{key}.{name}".strip("."))
        ]
    return [] if found == wanted else [f"{key}: {found} there, {wanted} asked for"]
