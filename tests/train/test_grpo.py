"""GRPO: TRL's trainer with our rewards, rows, log and folder."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cwdpo_bench.errors import UserError
from cwdpo_bench.train.recipe import arguments_class, load_recipe
from cwdpo_bench.vlm import load_vlm

GROUPS = [
    "trainer.num_generations=4",
    "trainer.per_device_train_batch_size=8",
    "trainer.max_completion_length=4",
    "trainer.max_steps=4",
]
OWN = "own_rewards_of_test_grpo"


@pytest.fixture
def early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An override: answers that start with a letter before m are worth 1."""
    (tmp_path / f"{OWN}.py").write_text(
        "def early(completions):\n"
        "    return [float(text[:1].lower() < 'm') for text in completions]\n"
        "def broken(completions):\n"
        "    return [float('nan')] * len(completions)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return f"objective.rewards=[{{kind: callable, function: '{OWN}:early'}}]"


def _history(folder: Path, column: str) -> list[float]:
    lines = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [line[column] for line in lines if column in line]


def test_a_model_learns_what_is_rewarded(
    early: str, run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """From chance to nearly always within 30 steps, on prompts without pictures."""
    rows = [{"prompt": f"Which? {i}", "chosen": "a circle", "rejected": "b"} for i in range(16)]
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(
        "grpo",
        *GROUPS,
        early,
        "trainer.num_generations=16",
        "trainer.max_completion_length=1",
        "trainer.per_device_train_batch_size=64",
        "trainer.max_steps=30",
        "trainer.lr_scheduler_type=constant",
        "trainer.learning_rate=3e-3",
        "trainer.save_steps=1000",
        "dynamics.every=1000",
        data=data,
    )
    means = _history(tmp_path / "out", "reward/mean")
    assert len(means) == 30
    assert np.mean(means[:2]) < 0.75
    assert np.mean(means[-5:]) > 0.95
    # Our name of the term, and TRL's own figures beside it.
    assert _history(tmp_path / "out", f"reward/{OWN}:early") == means
    np.testing.assert_allclose(_history(tmp_path / "out", "reward"), means, atol=1e-6)


def test_with_an_adapter_the_reference_is_the_adapter_of_the_start(
    early: str, run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    adapter = ["lora.enabled=true", "lora.r=4", "trainer.learning_rate=3e-2", "trainer.beta=0.1"]
    run("grpo", *GROUPS, early, *adapter, output="first")
    assert max(_history(tmp_path / "first", "kl")) > 1e-3
    run("grpo", *GROUPS, early, *adapter, output="second", model=tmp_path / "first")
    assert _history(tmp_path / "second", "kl")[0] == pytest.approx(0, abs=1e-5)
    # TRL's own copy of the adapter is no part of the checkpoint.
    assert not (tmp_path / "second" / "ref").exists()
    load_vlm(tmp_path / "second")


def test_the_reference_of_full_fine_tuning_is_the_start_and_not_its_origin(
    early: str, run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """An adapter that is merged before full fine-tuning names its base as where it came from."""
    run("grpo", *GROUPS, early, "lora.enabled=true", "trainer.learning_rate=3e-2", output="first")
    run("grpo", *GROUPS, early, "trainer.beta=0.1", output="second", model=tmp_path / "first")
    assert _history(tmp_path / "second", "kl")[0] == pytest.approx(0, abs=1e-5)


def test_an_interrupted_run_goes_on_to_the_same_weights(
    early: str, run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    class Interrupted(Exception):
        pass

    def cut(stage: str, step: int, last: int, loss: float | None) -> None:
        if step == 3:
            raise Interrupted

    run("grpo", *GROUPS, early, output="whole")
    with pytest.raises(Interrupted):
        run("grpo", *GROUPS, early, output="cut", report=cut)
    run("grpo", *GROUPS, early, output="cut", resume=True)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=0, rtol=0)


def test_a_reward_that_is_not_finite_names_the_sample(
    early: str, run: Callable[..., dict[str, Any]]
) -> None:
    with pytest.raises(UserError, match=r"nan for sample pair-\d+"):
        run("grpo", *GROUPS, early.replace("early", "broken"))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trainer.num_generation=4", ["trainer.num_generation", "'num_generations'"]),
        ("trainer.output_dir=x", ["trainer.output_dir", "--output"]),
        ("objective.beta=1", ["objective.beta"]),
    ],
)
def test_a_wrong_key_is_named_with_its_mend(override: str, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        load_recipe("grpo", [override])
    for word in words:
        assert word in str(error.value)


def test_groups_that_do_not_fit_the_batch_are_told(run: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(UserError, match="divisible by num_generations"):
        run("grpo", "trainer.num_generations=3")


def test_trl_s_keys_are_of_this_kind_alone() -> None:
    with pytest.raises(UserError, match=r"unknown key 'trainer\.num_generations'"):
        load_recipe("ppo", ["trainer.num_generations=4"])


def test_the_precision_is_that_of_the_other_recipes() -> None:
    """TRL would switch bfloat16 on wherever it can."""
    recipe = load_recipe("grpo")
    assert recipe.objective is not None
    arguments = arguments_class(recipe.objective)(output_dir="x", **recipe.trainer)
    assert not arguments.bf16
    assert not arguments.gradient_checkpointing


def test_without_trl_the_mend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "cwdpo_bench.train.grpo", raising=False)
    with pytest.raises(UserError, match=r"pip install 'cwdpo-bench\[grpo\]'"):
        load_recipe("grpo")
