"""Tokens through the model: as many positions as its first layer sees, also in a resumed run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cwdpo_bench.train import stage
from cwdpo_bench.train.tokens import TokenCount


class _Recounted(TokenCount):
    """Counts a second time, at the first layer of the language model."""

    seen: dict[bool, int]
    at_the_end: dict[bool, int]

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        type(self).seen = {True: 0, False: 0}
        layer = next(m for n, m in model.named_modules() if n.endswith("layers.0"))
        layer.register_forward_pre_hook(self._again, with_kwargs=True)

    def _again(self, module: torch.nn.Module, inputs: tuple[Any, ...], kwargs: Any) -> None:
        hidden = inputs[0] if inputs else kwargs["hidden_states"]
        type(self).seen[module.training] += hidden.shape[0] * hidden.shape[1]

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        super().on_train_begin(*args, **kwargs)
        type(self).seen = {True: 0, False: 0}

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        super().on_train_end(*args, **kwargs)
        type(self).at_the_end = dict(type(self).seen)


@pytest.mark.parametrize("recipe", ["sft", "dpo", "ppo"])
def test_every_position_is_counted_once(
    run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    monkeypatch.setattr(stage, "TokenCount", _Recounted)
    own = ["objective.rollout_size=4", "objective.epochs=1"] if recipe == "ppo" else []
    made = run(recipe, "trainer.max_steps=3", *own)
    tokens = next(iter(made["stages"].values()))["tokens"]
    assert tokens["trained"] > 0
    again = _Recounted.at_the_end
    assert tokens == {"trained": again[True], "read": again[False]}


def test_dpo_reads_more_than_sft(run: Callable[..., dict[str, Any]]) -> None:
    trained = {
        recipe: next(iter(run(recipe, "trainer.max_steps=3", output=recipe)["stages"].values()))
        for recipe in ("sft", "dpo")
    }
    assert trained["dpo"]["tokens"]["trained"] > trained["sft"]["tokens"]["trained"]


def test_a_resumed_run_has_the_count_of_a_whole_one(
    run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    class Stop(Exception):
        pass

    def stop(stage: str, step: int, last: int, loss: float | None) -> None:
        if step == 5:
            raise Stop

    whole = run("dpo", "trainer.max_steps=6", output="whole")
    with pytest.raises(Stop):
        run("dpo", "trainer.max_steps=6", output="resumed", report=stop)
    resumed = run("dpo", "trainer.max_steps=6", output="resumed", resume=True)
    counts = [next(iter(made["stages"].values()))["tokens"] for made in (whole, resumed)]
    assert counts[0] == counts[1]
    assert counts[0]["trained"] > 0
