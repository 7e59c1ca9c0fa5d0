"""What an update step costs: tokens that went through with a gradient, and seconds of one core.

    python docs/results/costs.py FOLDER     # recipes of study.yaml, a hundred steps each

Seconds are the process's own (one thread), so that other work on the machine counts little: the
median over the steps at which nothing is measured.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

from cwdpo_bench.demo import base_path
from cwdpo_bench.files import write_json
from cwdpo_bench.study.cell import training_data
from cwdpo_bench.study.file import Cell, Study, cells, load_study, recipe_of
from cwdpo_bench.train.run import train

FOLDER = Path(__file__).parent
ROWS = ("sft", "sft-c", "dpo", "sft-c+dpo", "cw-dpo", "opa-dpo")
STEPS = 96


def measure(study: Study, cell: Cell, folder: Path) -> dict[str, dict[str, float]]:
    """Stage → tokens and seconds a step."""
    recipe = recipe_of(study, cell)
    assert recipe is not None
    seconds: dict[str, list[float]] = {}
    before: dict[str, float] = {}

    def report(stage: str, step: int, *_: Any) -> None:
        now = time.process_time()
        if stage in before and step % recipe.dynamics.every:
            seconds.setdefault(stage, []).append(now - before[stage])
        before[stage] = now

    data, probe = training_data(study, cell)
    made = train(
        recipe, model=str(base_path()), data=data, probe=probe, output=folder, report=report
    )
    return {
        name: {
            "tokens": round(stage["tokens"]["trained"] / stage["steps"], 1),
            # The last step is measured after, too.
            "seconds": round(median(seconds[name][:-1]), 4),
        }
        for name, stage in made["stages"].items()
    }


def main() -> None:
    """Measure every recipe once and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    study = load_study(FOLDER.parent / "study.yaml").model_copy(update={"steps": STEPS})
    first = {cell.row: cell for cell in cells(study, {}) if cell.seed == study.seeds[0]}
    write_json(
        FOLDER / "costs.json",
        {
            "failed": {},
            "cells": [
                {"row": row, "seed": 0, "stages": measure(study, first[row], folder / row)}
                for row in ROWS
            ],
        },
    )


if __name__ == "__main__":
    main()
