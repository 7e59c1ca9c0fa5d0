"""The worked example of docs/EXTENDING.md, taken from the page and run."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cwdpo_bench.errors import UserError
from cwdpo_bench.train.recipe import load_recipe
from cwdpo_bench.train.terms import QUANTITIES
from cwdpo_bench.train.views import ANSWERS, SUFFIXES

PAGE = (Path(__file__).parents[2] / "docs" / "EXTENDING.md").read_text(encoding="utf-8")
PAGE = PAGE.split("\n# Add a benchmark")[0]
FILES = ("dpop.py", "dpop.yaml", "test_dpop.py")


def _blocks() -> dict[str, str]:
    found = re.findall(r"^`([\w.]+)`, .*?```\w+\n(.*?)```", PAGE, flags=re.S | re.M)
    return dict(found)


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name, text in _blocks().items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for module in ("dpop", "test_dpop"):
        sys.modules.pop(module, None)


def test_the_example_is_three_files_of_under_forty_lines() -> None:
    blocks = _blocks()
    assert tuple(blocks) == FILES
    assert sum(len(text.splitlines()) for text in blocks.values()) < 40


@pytest.mark.usefixtures("example")
def test_the_oracle_of_the_example_passes_and_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    module = importlib.import_module("test_dpop")
    module.test_dpop_against_closed_forms()
    monkeypatch.setattr(module, "dpop_loss", lambda *_, beta, penalty: torch.zeros(64))
    with pytest.raises(AssertionError):
        module.test_dpop_against_closed_forms()


@pytest.mark.parametrize("lora", ["true", "false"])
def test_the_example_trains(lora: str, example: Path, run: Callable[..., dict[str, Any]]) -> None:
    record = run(
        str(example / "dpop.yaml"), f"lora.enabled={lora}", "trainer.max_steps=2", output="ckpt"
    )
    assert record["recipe"] == "dpop"
    assert record["stages"]["stage1"]["objective"] == "dpop:dpop_loss"
    history = json.loads((example / "ckpt" / "trainer_state.json").read_text())["log_history"]
    # Δ = 0 before the first step: the loss is log 2.
    assert history[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert "penalty: 5.0" in (example / "ckpt" / "recipe.yaml").read_text()
    again = load_recipe(str(example / "ckpt" / "recipe.yaml"))
    assert again.objective is not None
    assert again.objective.kind == "dpop:dpop_loss"


def test_a_wrong_key_of_the_example_names_the_nearest(example: Path) -> None:
    with pytest.raises(UserError, match="'penalt'; did you mean 'penalty'"):
        load_recipe(str(example / "dpop.yaml"), ["objective.penalt=1"])


def test_the_page_names_every_quantity_and_view() -> None:
    for name in (*QUANTITIES, *ANSWERS, *(f"…{suffix}" for suffix in SUFFIXES)):
        assert f"`{name}`" in PAGE, name
