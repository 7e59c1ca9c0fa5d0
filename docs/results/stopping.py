"""Regret of the stopping rules: what an oracle that scores every checkpoint would have kept.

    python docs/results/stopping.py FOLDER     # rows of study-squeezing.yaml; goes on where it was

One training keeps a checkpoint at every measurement, and each is scored on COCO. Where a rule of
`dynamics.stop_on` stops follows from the measurements up to there alone, so the same training tells
what every rule keeps. The oracle keeps the checkpoint with the highest CIDEr on the test images.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cwdpo_bench.demo import base_path, data_root
from cwdpo_bench.evaluate.captions import score_candidates
from cwdpo_bench.evaluate.coco import load_coco
from cwdpo_bench.evaluate.engine import CaptionAnswer
from cwdpo_bench.evaluate.in_process import InProcessEngine
from cwdpo_bench.evaluate.tasks import TASKS
from cwdpo_bench.files import read_json, write_json, write_text
from cwdpo_bench.study.cell import training_data
from cwdpo_bench.study.file import Cell, Study, cells, load_study, recipe_of
from cwdpo_bench.train.dynamics import DynamicsLog
from cwdpo_bench.train.recipe import Recipe
from cwdpo_bench.train.run import train
from cwdpo_bench.train.sections import Dynamics
from cwdpo_bench.train.stopping import best_step, stop_reason
from cwdpo_bench.train.terms import needs_rejected
from cwdpo_bench.vlm import VLM, load_vlm

FOLDER = Path(__file__).parent
STUDY = FOLDER.parent / "study-squeezing.yaml"
ROWS = ("dpo", "sft", "cooled", "dpo-slow")
RULES = ("squeezing", "delta_logp")
RECORD = "stopping.json"


def kept(rows: list[dict[str, Any]], rule: str, settings: Dynamics, pushes_down: bool) -> list[int]:
    """The steps at which a rule stops (the last where it does not) and whose weights it keeps."""
    asked = settings.model_copy(update={"stop_on": [rule]})
    for count in range(1, len(rows) + 1):
        seen = rows[:count]
        if stop_reason(seen, asked, pushes_down=pushes_down) is not None:
            break
    return [seen[-1]["step"], best_step(seen)]


def checkpointed(recipe: Recipe) -> Recipe:
    """The recipe with a checkpoint of the weights alone at every measurement."""
    every = recipe.dynamics.every
    keys = {"save_steps": every, "save_total_limit": None, "save_only_model": True}
    return recipe.model_copy(update={"trainer": {**recipe.trainer, **keys}})


def measure(study: Study, cell: Cell, folder: Path) -> dict[str, Any]:
    """Train a cell, score its start and every checkpoint, and replay the rules."""
    recipe = recipe_of(study, cell)
    assert recipe is not None
    (stage,) = recipe.stages().values()
    data, probe = training_data(study, cell)
    train(
        checkpointed(recipe),
        model=str(base_path()),
        data=data,
        probe=probe,
        output=folder,
        resume=(folder / "provenance.json").is_file(),
    )
    rows = DynamicsLog(folder / "dynamics.parquet").rows
    start = load_vlm(base_path())
    policies = [start]
    for row in rows[1:]:
        (saved,) = folder.glob(f"*/checkpoint-{row['step']}")
        policies.append(replace(start, model=type(start.model).from_pretrained(saved).eval()))
    found = ciders(policies, study.batch_size)
    for saved in folder.glob("*/checkpoint-*"):
        shutil.rmtree(saved)
    return {
        "row": cell.row,
        "seed": cell.seed,
        "steps": [row["step"] for row in rows],
        "chosen_mean_logp": [row["chosen_mean_logp"] for row in rows],
        "cider": found,
        "rules": {rule: kept(rows, rule, recipe.dynamics, needs_rejected(stage)) for rule in RULES},
    }


def ciders(policies: Sequence[VLM], batch_size: int) -> list[float]:
    """COCO's CIDEr of every policy; all captions go through one start of the Java programs."""
    task, samples = TASKS["coco"], load_coco(data_root())
    candidates: list[tuple[str, str]] = []
    for policy in policies:
        engine = InProcessEngine(policy, data_root(), batch_size)
        for place, answer in engine.answer_captions(samples, max_new_tokens=task.max_new_tokens):
            assert isinstance(answer, CaptionAnswer)
            candidates.append((samples[place].id, answer.text))
    references = {sample.id: sample.references for sample in samples}
    values = score_candidates(references, candidates).samples["CIDEr"].to_numpy()
    return [float(part.mean()) for part in np.split(values, len(policies))]


def main() -> None:
    """Measure what is not measured yet, seed by seed, and write the record anew after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", nargs="+", default=list(ROWS))
    parser.add_argument("--seeds", type=int, nargs="+", default=None)
    asked = parser.parse_args()
    study = load_study(STUDY)
    planned = [
        cell
        for cell in cells(study, {})
        if cell.row in asked.rows and cell.seed in (asked.seeds or study.seeds)
    ]
    planned.sort(key=lambda cell: (cell.seed, asked.rows.index(cell.row)))
    for cell in planned:
        result = asked.folder / cell.row / str(cell.seed) / "result.json"
        if not result.is_file():
            write_json(result, measure(study, cell, result.parent))
    done = [read_json(file) for file in sorted(asked.folder.glob("*/*/result.json"))]
    lines = ",\n".join(json.dumps(entry, allow_nan=False) for entry in done)
    write_text(FOLDER / RECORD, f'{{"failed": {{}}, "cells": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
