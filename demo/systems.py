"""The systems of the demo: which recipes, with which settings, for how many steps.

All see the same pairs for the same number of update steps. The learning rate of each was chosen
beforehand on the validation scenes, from one grid with the same number of tries: `demo/tune.py`,
whose every try stands in `tuning.json`.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from cwdpo_bench.files import read_json
from cwdpo_bench.train.recipe import Recipe, load_recipe

BASE = "base"
SYSTEMS = ("sft", "dpo", "sft-c+dpo", "cw-dpo")
EVERY_SYSTEM = SYSTEMS
"""The extended table: every recipe that the package brings."""
TUNING = Path(__file__).parent / "tuning.json"


class Budget(NamedTuple):
    """Update steps of one system, and how often its dynamics are measured."""

    steps: int
    every: int


DEFAULT = Budget(steps=240, every=24)
SMOKE = Budget(steps=8, every=4)


def chosen_learning_rates() -> dict[str, float]:
    """The rate that won on validation, by system."""
    return {name: float(rate) for name, rate in read_json(TUNING)["chosen"].items()}


def demo_recipe(name: str, *, seed: int, budget: Budget, learning_rate: float) -> Recipe:
    """A shipped recipe at the demo's size: batch 16, the steps shared 75 : 25 by two stages."""
    settings = [
        f"trainer.seed={seed}",
        f"trainer.learning_rate={learning_rate}",
        "trainer.per_device_train_batch_size=16",
        "trainer.gradient_accumulation_steps=1",
        f"dynamics.every={budget.every}",
    ]
    stages = load_recipe(name).stages()
    if len(stages) == 1:
        settings.append(f"trainer.max_steps={budget.steps}")
    else:
        first = round(0.75 * budget.steps)
        settings.append(f"stage1.trainer.max_steps={first}")
        settings.append(f"stage2.trainer.max_steps={budget.steps - first}")
    return load_recipe(name, settings)
