"""Starting from a trained checkpoint, for every recipe; threshold and warnings in the record."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cwdpo_bench.cli import main
from cwdpo_bench.demo.tiny import build_tiny_vlm
from cwdpo_bench.errors import UserError
from cwdpo_bench.train.recipe import load_recipe
from cwdpo_bench.train.start import start_model
from cwdpo_bench.vlm import load_vlm

Run = Callable[..., dict[str, Any]]


@pytest.mark.parametrize("lora", ["true", "false"])
@pytest.mark.parametrize("init_lora", ["true", "false"])
def test_a_run_starts_from_the_checkpoint_of_init(
    lora: str, init_lora: str, run: Run, tiny_model_folder: Path, tmp_path: Path
) -> None:
    """Also from an adapter to full fine-tuning and back: the start is what the checkpoint does."""
    run("sft-c", f"lora.enabled={init_lora}", "trainer.max_steps=2", output="sft-c")
    init = tmp_path / "sft-c"
    record = run("dpo", f"init={init}", f"lora.enabled={lora}", "trainer.max_steps=1")
    # Seen from the base the policy has moved already; seen from its reference it has not.
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert history[0]["rewards/chosen"] == pytest.approx(0, abs=1e-5)
    assert record["model"]["init"]["path"] == str(init)
    assert record["model"]["init"]["recipe"] == "sft-c"
    assert record["model"]["name"] == str(tiny_model_folder)

    recipe = load_recipe("dpo", [f"init={init}", f"lora.enabled={lora}"])
    started = start_model(recipe, str(tiny_model_folder)).model
    trained, base = load_vlm(init).model, load_vlm(tiny_model_folder).model
    ids = torch.arange(12)[None]
    with torch.no_grad():
        ours, theirs, bare = (m(input_ids=ids).logits for m in (started.eval(), trained, base))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert (theirs - bare).abs().max() > 1e-3


def test_without_init_the_record_says_none(run: Run) -> None:
    assert run("sft", "trainer.max_steps=1")["model"]["init"] is None


def test_init_must_be_there_and_of_the_models_architecture(run: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"init: 'no/such': no such folder.*trained checkpoint"):
        run("dpo", "init=no/such")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"init: .*neither config\.json nor adapter_config.json"):
        run("dpo", f"init={tmp_path / 'empty'}", output="b")
    model, processor = build_tiny_vlm(seed=0)
    model.config.text_config.vocab_size += 8
    model.resize_token_embeddings(model.config.text_config.vocab_size)
    model.save_pretrained(tmp_path / "other")
    processor.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"init: .*has vocab_size \d+, the model .* has \d+"):
        run("dpo", f"init={tmp_path / 'other'}", output="c")


def test_a_penalty_that_never_acted_is_said_in_the_record(run: Run) -> None:
    record = run("sft-c", "objective.threshold=-1")
    stage = record["stages"]["stage1"]
    assert (stage["threshold"], stage["penalty_active"]) == (-1, 0)
    (warning,) = record["warnings"]
    assert "never acted" in warning
    assert "objective.threshold" in warning
    stage = (record := run("sft-c", "objective.threshold=100", output="b"))["stages"]["stage1"]
    assert stage["penalty_active"] == 1
    assert record["warnings"] == []


def test_sft_c_whose_penalty_never_acts_is_sft(run: Run, tmp_path: Path) -> None:
    run("sft", output="sft")
    run("sft-c", "objective.threshold=-1", output="never")
    run("sft-c", "objective.threshold=100", output="always")
    sft, never, always = (
        load_file(tmp_path / name / "model.safetensors") for name in ("sft", "never", "always")
    )

    def furthest(other: dict[str, torch.Tensor]) -> float:
        return max((sft[name] - other[name]).abs().max().item() for name in sft)

    # The rows are computed in other company, whose last digits Adam's division makes larger.
    assert furthest(never) < 0.01 * furthest(always)


def test_the_command_line_says_the_warning(
    small: list[str],
    pairs: Path,
    tiny_model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = ["--data", str(pairs / "pairs.jsonl"), "--probe", str(pairs / "probe.jsonl")]
    command = ["cwdpo-bench", "train", "sft-c", "--model", str(tiny_model_folder), *files]
    command += ["--output", str(tmp_path / "out"), "objective.threshold=-1", *small]
    monkeypatch.setattr(sys, "argv", [*command, "trainer.max_steps=1"])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    assert "cwdpo-bench: warning: objective: the constraint never acted" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", ["sft-c", "hard-constraint"])
def test_auto_threshold_stands_in_the_record(recipe: str, run: Run) -> None:
    stage = run(recipe)["stages"]["stage1"]
    # An untrained model: about the log of the vocabulary, nats a token.
    assert 3 < stage["threshold"] < 10
    assert 0 <= stage["penalty_active"] <= 1


@pytest.mark.parametrize("launched", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_weights_in_4_bits_are_not_spread(
    launched: str, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(launched, "true")
    monkeypatch.setattr("cwdpo_bench.train.processes.count", lambda: 2)
    recipe = load_recipe("dpo", ["model.load_in_4bit=true", "lora.enabled=true"])
    with pytest.raises(UserError, match="under DDP"):
        start_model(recipe, str(tiny_model_folder))
