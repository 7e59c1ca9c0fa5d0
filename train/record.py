"""`provenance.json`: how a checkpoint was made, and whether a run may be taken up again."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from cwdpo_bench import __version__
from cwdpo_bench.errors import UserError
from cwdpo_bench.files import read_json, remove_unfinished
from cwdpo_bench.train.data import PreferenceData, fingerprint
from cwdpo_bench.train.recipe import Recipe
from cwdpo_bench.train.sections import Objective
from cwdpo_bench.vlm import need_bitsandbytes


def seed_of(recipe: Recipe) -> int:
    """The seed of the training, of the stages' shares and of the held-out pairs."""
    return int(recipe.trainer.get("seed", 42))


def new_record(
    recipe: Recipe, model: str, data: Path, rows: PreferenceData, probe: Path | None
) -> dict[str, Any]:
    """What is known of a run before its first step."""
    packages = ["torch", "transformers", "peft", "accelerate"]
    if recipe.model.load_in_4bit:
        need_bitsandbytes()
        packages.append("bitsandbytes")
    return {
        "schema": 1,
        "status": "running",
        "recipe": recipe.name,
        "lora": recipe.lora.model_dump(mode="json") if recipe.lora.enabled else None,
        "model": {"name": model},
        "data": {
            "file": data.name if data.exists() else str(data),
            "fingerprint": rows.fingerprint,
            "layouts": rows.layouts,
            "dropped_rows": rows.dropped,
            "probe_file": None if probe is None else probe.name,
            "probe_fingerprint": None if probe is None else fingerprint(probe),
        },
        "seed": seed_of(recipe),
        "versions": {
            "cwdpo-bench": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in packages},
        },
        "stages": {},
        "warnings": [],
    }


def hyperparameters(arguments: TrainingArguments, objective: Objective) -> dict[str, Any]:
    """What a stage's steps are taken with: `batch` is the pairs a step of all processes together,
    `beta` None where the objective has none."""
    rows = arguments.train_batch_size * arguments.gradient_accumulation_steps
    return {
        "learning_rate": arguments.learning_rate,
        "batch": rows * arguments.world_size,
        "beta": getattr(objective, "beta", None),
    }


def take_up(output: Path, recipe: Recipe, record: dict[str, Any], resume: bool) -> dict[str, Any]:
    """The given record for a new folder, that of the interrupted run for one that holds it.

    Raises:
        UserError: the folder holds other files, or the run in it is not the one asked for.
    """
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: is a file; name a folder with --output")
    remove_unfinished(*output.glob("**"))
    names = {path.name for path in output.iterdir()} if output.is_dir() else set()
    if names <= {"recipe.yaml"}:
        return record
    if not (output / "provenance.json").is_file():
        raise UserError(f"{output}: holds other files; name a new folder with --output")
    if not resume:
        raise UserError(f"{output}: holds a run; go on with --resume, or name another folder")
    found = read_json(output / "provenance.json")
    for key in ("recipe", "seed"):
        if found[key] != record[key]:
            raise UserError(
                f"{output}: the run there has {key} {found[key]!r}, not {record[key]!r}"
            )
    for key in ("fingerprint", "probe_fingerprint"):
        if found["data"][key] != record["data"][key]:
            raise UserError(f"{output}: the run there has other data; name another folder")
    if found["model"]["name"] != record["model"]["name"]:
        raise UserError(f"{output}: the run there starts from {found['model']['name']!r}")
    if (output / "recipe.yaml").read_text(encoding="utf-8") != recipe.to_yaml():
        raise UserError(f"{output}: the recipe there has other values; see its recipe.yaml")
    return dict(found)
