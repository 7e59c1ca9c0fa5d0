"""What happens to a training run: killed, told to stop, out of memory; and nothing is lost."""

from __future__ import annotations

import json
import multiprocessing
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import forking
from cwdpo_bench.errors import UserError
from cwdpo_bench.train.interruption import Interrupted
from cwdpo_bench.train.recipe import load_recipe
from cwdpo_bench.train.run import train
from cwdpo_bench.train.trainer import PreferenceTrainer

TIMES = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos")
KILLS = 20


def _same_runs(one: Path, other: Path) -> None:
    """Weights, log and dynamics, bit for bit; seconds apart."""
    a, b = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
    logs = [
        [
            {key: value for key, value in line.items() if key not in TIMES}
            for line in json.loads((folder / "trainer_state.json").read_text())["log_history"]
        ]
        for folder in (one, other)
    ]
    assert logs[0] == logs[1]
    tables = [pd.read_parquet(folder / "dynamics.parquet") for folder in (one, other)]
    pd.testing.assert_frame_equal(*tables)


@pytest.fixture
def command(tiny_model_folder: Path, pairs: Path, small: list[str]) -> Callable[..., list[str]]:
    """The command line of a run into a folder."""

    def build(output: Path, *overrides: str, recipe: str = "cw-dpo") -> list[str]:
        return [
            *(sys.executable, "-m", "cwdpo_bench", "train", recipe),
            *("--model", str(tiny_model_folder), "--output", str(output), "--resume"),
            *("--data", str(pairs / "pairs.jsonl"), "--probe", str(pairs / "probe.jsonl")),
            *small,
            *overrides,
        ]

    return build


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_told_to_stop_saves_and_goes_on(
    number: signal.Signals, run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    longer = ["trainer.num_train_epochs=3", "trainer.save_strategy=epoch"]
    run("cw-dpo", *longer, output="whole")
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}

    def tell(stage: str, step: int, last: int, loss: float | None) -> None:
        if (stage, step) == ("stage1", 2):
            signal.raise_signal(number)

    with pytest.raises(Interrupted, match=f"{number.name}: saved at step") as told:
        run("cw-dpo", *longer, output="out", report=tell)
    assert (tmp_path / "out" / "stage1" / f"checkpoint-{told.value.step}").is_dir()
    assert {n: signal.getsignal(n) for n in handlers} == handlers
    run("cw-dpo", *longer, output="out", resume=True)
    _same_runs(tmp_path / "whole", tmp_path / "out")


def test_the_command_leaves_with_the_signals_status(
    command: Callable[..., list[str]], tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    process = subprocess.Popen(
        command(folder, "trainer.num_train_epochs=1000", recipe="sft"),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    # The first measurement of the dynamics is written when the steps have begun.
    deadline = time.monotonic() + 120
    while not (folder / "dynamics.parquet").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, said
    assert "SIGTERM: saved at step" in said
    assert "--resume" in said
    assert "Traceback" not in said


def test_a_second_signal_does_not_wait(run: Callable[..., dict[str, Any]]) -> None:
    def tell(stage: str, step: int, last: int, loss: float | None) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run("sft", report=tell)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_too_little_memory_names_the_keys(
    error: RuntimeError, run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(PreferenceTrainer, "compute_loss", fail)
    with pytest.raises(UserError, match=r"memory at step 1 with 4 pairs") as told:
        run("sft")
    assert "trainer.per_device_train_batch_size (now 4)" in str(told.value)
    assert "trainer.gradient_checkpointing=true" in str(told.value)


def test_another_fault_is_not_taken_for_too_little_memory(
    run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(PreferenceTrainer, "compute_loss", fail)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        run("sft")


def test_what_a_killed_write_leaves_does_not_stop_the_next_run(
    run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "recipe.yaml").write_text("half of a")
    (tmp_path / "out" / ".provenance.json.x1.tmp").write_text("{")
    assert run("sft")["status"] == "finished"
    assert not list((tmp_path / "out").glob(".*.tmp"))


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_as_an_uninterrupted_run(
    tiny_model_folder: Path, pairs: Path, small: list[str], tmp_path: Path
) -> None:
    longer = ["trainer.num_train_epochs=6", "trainer.save_strategy=steps"]
    recipe = load_recipe("cw-dpo", [*small, *longer])

    def begin(output: str) -> multiprocessing.process.BaseProcess:
        return forking.begin(
            train,
            recipe=recipe,
            model=str(tiny_model_folder),
            data=pairs / "pairs.jsonl",
            probe=pairs / "probe.jsonl",
            output=tmp_path / output,
            resume=True,
        )

    forking.finish(begin, "first")
    seconds = forking.finish(begin, "whole")
    rng = random.Random(0)
    runs, killed = 0, 0
    while killed < KILLS:
        # A run that is resumed often is over sooner or later: then the next one begins.
        name = f"killed-{runs}"
        process = begin(name)
        process.join(timeout=rng.uniform(0.0, 0.9) * seconds)
        if process.exitcode is None:
            process.kill()
            process.join()
            killed += 1
        else:
            assert process.exitcode == 0
            _same_runs(tmp_path / "whole", tmp_path / name)
            runs += 1
    forking.finish(begin, name)
    _same_runs(tmp_path / "whole", tmp_path / name)
