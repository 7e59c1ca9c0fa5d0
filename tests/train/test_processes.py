"""Several processes train as one does, with whole weights (DDP) and with spread ones (FSDP2)."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from cwdpo_bench.errors import UserError
from cwdpo_bench.train.export import export_checkpoint
from cwdpo_bench.train.machines import CONFIGURATIONS, configuration

SCRIPT = Path(__file__).with_name("in_processes.py")
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}
"""What accelerate's launcher makes of `train/machines/fsdp2.yaml`."""
ZERO3 = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
    "DS_ACCELERATOR": "cpu",
}
"""What accelerate's launcher makes of `train/machines/zero3.yaml`, and where DeepSpeed computes."""
SHARED = ["data.stages=shared"]
"""Whole batches only: an incomplete one is filled up with other pairs by accelerate."""
LORA = "lora.enabled=true"
LEFT_OUT = {"loser_gradient_share", "chosen_gradient_norm", "rejected_gradient_norm"}
Launch = Callable[..., Path]


@pytest.fixture
def launch(small: list[str], tiny_model_folder: Path, pairs: Path, tmp_path: Path) -> Launch:
    """Two processes on one recipe with two pairs each; `refused` is what they must say.

    Without a `launcher` the script forks them itself.
    """

    def start(
        recipe: str,
        *overrides: str,
        output: str = "two",
        environment: dict[str, str] = FSDP,
        resume: bool = False,
        refused: str | None = None,
        launcher: tuple[str, ...] = (),
    ) -> Path:
        settings = {
            "recipe": recipe,
            "overrides": [*small, *overrides, "trainer.per_device_train_batch_size=2"],
            "model": str(tiny_model_folder),
            "data": str(pairs / "pairs.jsonl"),
            "probe": str(pairs / "probe.jsonl"),
            "output": str(tmp_path / output),
            "resume": resume,
        }
        done = subprocess.run(
            [sys.executable, *launcher, str(SCRIPT), json.dumps(settings)],
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        if refused is None:
            assert done.returncode == 0, done.stderr[-3000:]
        else:
            assert f"refused: {refused}" in done.stderr, done.stderr[-3000:]
        return tmp_path / output

    return start


def _losses(folder: Path) -> list[float]:
    state = json.loads((folder / "trainer_state.json").read_text())
    return [line["loss"] for line in state["log_history"] if "loss" in line]


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*model.safetensors")
    return load_file(file)


def _assert_same_run(one: Path, two: Path, *, atol: float = 1e-4) -> None:
    """Losses of every step of every stage, final weights and dynamics."""
    stages = [folder.name for folder in one.glob("stage*") if (two / folder.name).is_dir()]
    for place in [".", *stages]:
        if (one / place / "trainer_state.json").is_file():
            assert _losses(two / place) == pytest.approx(_losses(one / place), abs=atol)
    expected, found = _weights(one), _weights(two)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=atol, rtol=0, msg=name)
    rows, others = (pd.read_parquet(folder / "dynamics.parquet") for folder in (one, two))
    for column in ("chosen_mean_logp", "rejected_mean_logp", "delta_margin", "tv", "token_ece"):
        assert others[column].tolist() == pytest.approx(rows[column].tolist(), abs=1e-3), column


def test_a_step_with_spread_weights_is_that_of_one_process(
    launch: Launch, run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """The least that shows it; what the slow tests compare takes them a minute."""
    few = ["trainer.max_steps=1", "dynamics.pairs=2"]
    few += ["dynamics.answers.pairs=0", "dynamics.influence.pairs=0", "data.pixel_cache_gb=0"]
    two = launch("sft", *few)
    run("sft", *few, output="one")
    _assert_same_run(tmp_path / "one", two)
    record = json.loads((two / "provenance.json").read_text())
    assert record["processes"] == {"count": 2, "sharded": True}


@pytest.mark.slow
def test_spread_weights_give_the_losses_of_one_process(
    launch: Launch, run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    two = launch("dpo", "trainer.max_steps=2")
    run("dpo", "trainer.max_steps=2", output="one")
    _assert_same_run(tmp_path / "one", two)
    record = json.loads((two / "provenance.json").read_text())
    assert record["processes"] == {"count": 2, "sharded": True}
    said = record["stages"]["stage1"]["dynamics"]["influence_left_out"]
    assert "several processes" in said
    assert not LEFT_OUT & set(pd.read_parquet(two / "dynamics.parquet"))
    AutoModelForImageTextToText.from_pretrained(two)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [[], [LORA]], ids=["full", "lora"])
def test_mixed_precision_keeps_log_probabilities_in_fp32(lora: list[str], launch: Launch) -> None:
    two = launch("dpo", "trainer.bf16=true", "trainer.max_steps=2", *lora)
    reference = load_file(two / "stage1" / "reference.safetensors")["chosen"]
    assert (reference != reference.bfloat16().float()).float().mean() > 0.5
    # Policy and reference share the precision: Δ = 0 before the first step.
    assert _losses(two)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert {value.dtype for value in _weights(two).values()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("lora", [[], [LORA]], ids=["full", "lora"])
@pytest.mark.parametrize("recipe", ["sft-c", "cw-dpo"])
def test_every_stage_with_spread_weights_is_that_of_one_process(
    recipe: str,
    lora: list[str],
    launch: Launch,
    run: Callable[..., dict[str, Any]],
    tmp_path: Path,
) -> None:
    settings = [*SHARED, "trainer.max_steps=4", *lora]
    two = launch(recipe, *settings)
    run(recipe, *settings, output="one")
    _assert_same_run(tmp_path / "one", two)
    if lora:
        export_checkpoint(str(two), tmp_path / "merged", merge=True)
        AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["sft-c", "cw-dpo"])
def test_two_whole_models_are_one(
    recipe: str, launch: Launch, run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    settings = [*SHARED, "trainer.max_steps=4"]
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    two = launch(recipe, *settings, environment={}, launcher=torchrun)
    run(recipe, *settings, output="one")
    _assert_same_run(tmp_path / "one", two)
    record = json.loads((two / "provenance.json").read_text())
    assert record["processes"] == {"count": 2, "sharded": False}


@pytest.mark.slow
@pytest.mark.parametrize("lora", [[], [LORA]], ids=["full", "lora"])
def test_a_resumed_run_with_spread_weights_is_the_whole_one(
    lora: list[str], launch: Launch, tmp_path: Path
) -> None:
    settings = [
        "trainer.max_steps=4",
        "trainer.gradient_checkpointing=true",
        "dynamics.stop_on=[delta_logp]",
        *lora,
    ]
    whole = launch("dpo", *settings, output="whole")
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    # As it was when the run was killed between the checkpoints of step 2 and step 4.
    shutil.rmtree(cut / "stage1" / "checkpoint-4")
    for file in [*cut.glob("*model.safetensors"), cut / "trainer_state.json"]:
        file.unlink()
    record = json.loads((cut / "provenance.json").read_text())
    record.update(status="running", stages={}, warnings=[])
    (cut / "provenance.json").write_text(json.dumps(record))
    # Early stopping had kept the start and the checkpoint's weights.
    step = json.loads((whole / "provenance.json").read_text())["stages"]["stage1"]["stopped"]
    assert step["kept_step"] is not None
    launch("dpo", *settings, output="cut", resume=True)
    for name, value in _weights(whole).items():
        torch.testing.assert_close(_weights(cut)[name], value, atol=0, rtol=0, msg=name)
    assert _losses(cut) == _losses(whole)


@pytest.mark.slow
@pytest.mark.parametrize("environment", [{}, FSDP], ids=["ddp", "fsdp2"])
def test_dpo_of_adapters_is_that_of_one_process(
    environment: dict[str, str], launch: Launch, run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    settings = [*SHARED, "trainer.max_steps=4", LORA]
    two = launch("dpo", *settings, environment=environment)
    run("dpo", *settings, output="one")
    _assert_same_run(tmp_path / "one", two)
    record = json.loads((two / "provenance.json").read_text())
    assert record["processes"] == {"count": 2, "sharded": bool(environment)}


@pytest.mark.slow
def test_adapters_on_4_bits_train_in_two_processes_as_in_one(
    launch: Launch, run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes", reason="4 bits need bitsandbytes")
    settings = [*SHARED, "trainer.max_steps=4", LORA, "model.load_in_4bit=true"]
    two = launch("dpo", *settings, environment={})
    run("dpo", *settings, output="one")
    _assert_same_run(tmp_path / "one", two)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [[], [LORA]], ids=["full", "lora"])
def test_zero3_is_one_process(
    lora: list[str], launch: Launch, run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    pytest.importorskip("deepspeed")
    settings = [*SHARED, "trainer.max_steps=4", *lora]
    two = launch("dpo", *settings, environment=ZERO3)
    run("dpo", *settings, output="one")
    _assert_same_run(tmp_path / "one", two)


@pytest.mark.slow
def test_what_spread_weights_do_not_allow_is_refused(launch: Launch) -> None:
    for number, (recipe, override, environment, words) in enumerate(
        [
            ("ppo", "trainer.max_steps=1", FSDP, "recipe kind ppo samples answers"),
            ("dpo", "objective.on_policy.every=2", FSDP, "on_policy samples answers"),
            ("dpo", "trainer.max_steps=1", {**FSDP, "FSDP_VERSION": "1"}, "FSDP's first version"),
            ("ppo", "trainer.max_steps=1", {}, "recipe kind ppo trains in one process"),
        ]
    ):
        launch(recipe, override, output=str(number), environment=environment, refused=words)


def test_the_launchers_precision_must_be_the_recipes(
    run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(UserError, match=r"trainer\.bf16=true"):
        run("dpo")


def test_processes_that_do_not_meet_are_told(
    run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="accelerate launch"):
        run("dpo")


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_accelerate_reads_the_configurations(name: str, tmp_path: Path) -> None:
    file = tmp_path / f"{name}.yaml"
    file.write_text(configuration(name))
    found = load_config_from_file(str(file))
    assert found.num_processes == 8
    assert str(found.distributed_type).endswith(
        {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero3": "DEEPSPEED"}[name]
    )


def test_the_tests_environment_is_what_the_launcher_makes_of_the_configuration(
    tmp_path: Path,
) -> None:
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    file = tmp_path / "fsdp2.yaml"
    file.write_text(configuration("fsdp2"))
    given = ["--config_file", str(file), "--num_cpu_threads_per_process=1", "script.py"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(given))
    found = prepare_multi_gpu_env(arguments)
    assert {key: found[key] for key in FSDP} == FSDP


def test_the_tests_environment_is_what_the_launcher_makes_for_zero3(tmp_path: Path) -> None:
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env

    file = tmp_path / "zero3.yaml"
    file.write_text(configuration("zero3"))
    given = ["--config_file", str(file), "--num_cpu_threads_per_process=1", "script.py"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(given))
    # Which keys the file has; the launcher tells it to DeepSpeed's own configuration files.
    arguments.deepspeed_fields_from_accelerate_config = ""
    _, found = prepare_deepspeed_cmd_env(arguments)
    ours = {key: value for key, value in ZERO3.items() if key != "DS_ACCELERATOR"}
    assert {key: found[key] for key in ours} == ours


def test_an_unknown_configuration_names_the_nearest() -> None:
    with pytest.raises(UserError, match="fsdp2"):
        configuration("fsdp")
