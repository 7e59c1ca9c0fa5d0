"""The systems of the demo: which recipes, with which settings, for how many steps.

All see the same pairs for the same number of update steps. The learning rate of each was chosen
beforehand on the validation scenes, from one grid with the same number of tries:
`docs/study-tuning.yaml`, whose every try stands in `tuning.json`. Ablations keep the rate of
`cw-dpo`: all else equal.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from cwdpo_bench.files import read_json
from cwdpo_bench.train.recipe import Recipe, load_recipe, step_settings

BASE = "base"
SYSTEMS = ("sft", "dpo", "sft-c+dpo", "cw-dpo", "ppo")
TUNED = (*SYSTEMS, "sft-c", "v-dpo", "opa-dpo", "grpo")
"""The systems with a learning rate of their own."""
ABLATIONS = (
    "no-smooth-sft",
    "no-negative-sampling",
    "hard-constraint",
    "no-cw-dpo",
    "no-cooling",
    "no-filter",
)
EVERY_SYSTEM = (*TUNED, *ABLATIONS)
"""The extended table: every recipe that the package brings."""
TUNING = Path(__file__).parent / "tuning.json"


class Budget(NamedTuple):
    """Update steps of one system, and how often its dynamics are measured."""

    steps: int
    every: int


SETTINGS = {
    # 15 rollouts in 240 steps of 16; the value head has little time to catch up.
    "ppo": (
        "objective.rollout_size=128",
        "objective.epochs=2",
        "objective.sample_batch_size=64",
        "objective.value_learning_rate=3e-3",
    ),
}
"""What a system's recipe needs beside the steps, the batch and the learning rate."""

DEFAULT = Budget(steps=240, every=24)
SMOKE = Budget(steps=8, every=4)


def chosen_learning_rates() -> dict[str, float]:
    """The rate that won on validation, by system."""
    chosen = {name: float(rate) for name, rate in read_json(TUNING)["chosen"].items()}
    return {**chosen, **dict.fromkeys(ABLATIONS, chosen["cw-dpo"])}


def demo_recipe(name: str, *, seed: int, budget: Budget, learning_rate: float) -> Recipe:
    """A shipped recipe at the demo's size: batch 16, the steps shared 75 : 25 by two stages."""
    settings = [
        f"trainer.seed={seed}",
        f"trainer.learning_rate={learning_rate}",
        "trainer.per_device_train_batch_size=16",
        "trainer.gradient_accumulation_steps=1",
        f"dynamics.every={budget.every}",
        # The whole probe: a short run is watched more closely than the recipes' default.
        "dynamics.pairs=64",
        *SETTINGS.get(name, ()),
        *step_settings(load_recipe(name), budget.steps),
    ]
    return load_recipe(name, settings)
