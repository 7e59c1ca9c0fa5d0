"""The disease that the trainer watches for, on the demo's world: DPO at a high rate squeezes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cwdpo_bench.demo import base_path
from cwdpo_bench.demo.layouts import SMOKE, render_world
from cwdpo_bench.demo.systems import DEFAULT, demo_recipe
from cwdpo_bench.train.run import train

RATE = 3e-4
"""The highest of the tuning's grid: the objective's own nature shows."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's pairs and probe; no benchmark is scored here."""
    folder = tmp_path_factory.mktemp("world") / "data"
    render_world(folder, 0, replace(SMOKE, train_pairs=1500, probe_pairs=64))
    return folder


def _trained(recipe: str, seed: int, world: Path, output: Path) -> dict[str, Any]:
    return train(
        demo_recipe(recipe, seed=seed, budget=DEFAULT, learning_rate=RATE),
        model=str(base_path()),
        data=world / "pairs" / "train.jsonl",
        probe=world / "pairs" / "probe.jsonl",
        output=output,
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_dpo_is_called_squeezing_and_cw_dpo_healthy(seed: int, world: Path, tmp_path: Path) -> None:
    squeezed = _trained("dpo", seed, world, tmp_path / "dpo")["verdict"]
    cooled = _trained("cw-dpo", seed, world, tmp_path / "cw-dpo")["verdict"]
    assert squeezed["name"] == "squeezing", squeezed["sentence"]
    assert cooled["name"] == "healthy", cooled["sentence"]
    assert squeezed["evidence"]["chosen_change"] < cooled["evidence"]["chosen_change"] - 0.1
