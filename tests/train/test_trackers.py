"""Trackers by the Trainer's own switches: our figures arrive, a missing one is told in advance."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from cwdpo_bench.errors import UserError
from cwdpo_bench.train import trackers
from cwdpo_bench.train.recipe import load_recipe


def test_tensorboard_gets_objective_and_dynamics_of_each_stage(
    run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    run("cw-dpo", "trainer.report_to=tensorboard", "trainer.hub_token=hf_secretOfMine")
    table = pd.read_parquet(tmp_path / "out" / "dynamics.parquet")
    wanted = {"stage1": "train/penalty/active", "stage2": "train/cooling/mean"}
    for stage, own in wanted.items():
        (file,) = (tmp_path / "out" / stage / "runs").rglob("events.out.*")
        assert b"hf_secretOfMine" not in file.read_bytes()
        curves = events.EventAccumulator(str(file))
        curves.Reload()
        tags = curves.Tags()["scalars"]
        assert {"train/loss", own, "train/dynamics/chosen_mean_logp"} <= set(tags)
        rows = table[table["stage"] == stage]
        sent = curves.Scalars("train/dynamics/chosen_mean_logp")
        assert [event.step for event in sent] == rows["step"].tolist()
        np.testing.assert_allclose(
            [event.value for event in sent], rows["chosen_mean_logp"], rtol=1e-6
        )


def test_dynamics_are_no_lines_of_the_trainers_log(
    run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    settings = ["sft", "trainer.max_steps=2"]
    run(*settings, output="quiet")
    run(*settings, "trainer.report_to=tensorboard", output="told")
    states = [
        pd.read_json(tmp_path / name / "trainer_state.json", typ="series")["log_history"]
        for name in ("quiet", "told")
    ]
    assert [set(line) for line in states[0]] == [set(line) for line in states[1]]
    # Whom a run is shown to is no part of it.
    recipes = [(tmp_path / name / "recipe.yaml").read_text() for name in ("quiet", "told")]
    assert recipes[0] == recipes[1]


def test_wandb_gets_a_run_a_stage(
    run: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    found: list[tuple[str, dict[str, Any]]] = []
    finish = wandb.sdk.wandb_run.Run.finish

    def keep(self: Any, *args: Any, **kwargs: Any) -> None:
        found.append((self.name, dict(self.summary)))
        finish(self, *args, **kwargs)

    monkeypatch.setattr(wandb.sdk.wandb_run.Run, "finish", keep)
    token = "trainer.hub_token=hf_secretOfMine"
    run("cw-dpo", "trainer.report_to=wandb", "trainer.run_name=mine", token)
    table = pd.read_parquet(tmp_path / "out" / "dynamics.parquet")
    assert [name for name, _ in found] == ["mine-stage1", "mine-stage2"]
    wanted = {"stage1": "train/penalty/active", "stage2": "train/cooling/mean"}
    for (_, summary), (stage, own) in zip(found, wanted.items(), strict=True):
        last = table[table["stage"] == stage].iloc[-1]
        assert summary["train/dynamics/tv"] == pytest.approx(last["tv"])
        assert own in summary
    assert wandb.run is None
    kept = list((tmp_path / "wandb").rglob("*.wandb"))
    assert len(kept) == 2
    for path in (tmp_path / "wandb").rglob("*"):
        assert not path.is_file() or b"hf_secretOfMine" not in path.read_bytes()


def test_mlflow_gets_our_figures(
    run: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    address = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.chdir(tmp_path)
    run("cw-dpo", "trainer.report_to=mlflow", "trainer.run_name=mine")
    runs = mlflow.search_runs(output_format="list")
    assert sorted(one.info.run_name for one in runs) == ["mine-stage1", "mine-stage2"]
    by_name = {one.info.run_name: one.data.metrics for one in runs}
    assert {"penalty/active", "dynamics/tv"} <= by_name["mine-stage1"].keys()
    assert {"cooling/mean", "dynamics/tv"} <= by_name["mine-stage2"].keys()


def test_a_tracker_that_is_not_there_is_told_before_anything_is_loaded(
    run: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "_is_there", lambda module: module == "tensorboard")
    with pytest.raises(UserError, match=r"report_to: mlflow.*pip install mlflow"):
        run("sft", "trainer.report_to=[tensorboard, mlflow]", model=tmp_path / "no-model")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_a_tracker_left_is_no_tracker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a_tracker_that_nobody_has").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not trackers._is_there("a_tracker_that_nobody_has")
    assert not trackers._is_there("a_tracker_that_nobody_has.core")
    assert trackers._is_there("transformers")


def test_an_unknown_tracker_is_told_with_the_nearest(run: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(UserError, match=r"unknown 'wanbd'; did you mean 'wandb'"):
        run("sft", "trainer.report_to=wanbd")


def test_every_tracker_of_the_trainer_has_its_package() -> None:
    # The Trainer itself brings the callback of Kubeflow.
    assert set(trackers._CALLBACKS) - set(trackers._PACKAGES) <= {"kubeflow"}


def test_a_tracker_that_refuses_is_told_with_the_mend() -> None:
    error = type("UsageError", (Exception,), {"__module__": "wandb.errors"})
    arguments = type("Arguments", (), {"report_to": ["wandb"]})()
    with (
        pytest.raises(UserError, match=r"No API key.*wandb login.*WANDB_MODE=offline"),
        trackers.tracked(arguments),  # type: ignore[arg-type]
    ):
        raise error("No API key configured")
    with pytest.raises(ZeroDivisionError), trackers.tracked(arguments):  # type: ignore[arg-type]
        raise ZeroDivisionError


def test_logging_dir_is_told_where_it_went() -> None:
    with pytest.raises(UserError, match="TENSORBOARD_LOGGING_DIR"):
        load_recipe("sft", ["trainer.logging_dir=logs"])


def test_the_command_line_that_trackers_keep_shows_no_token(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from cwdpo_bench.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    print(*sys.argv)\n"
    )
    words = ["train", "sft", "--model", "none", "--data", "none.jsonl", "--output", "out"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words, "trainer.hub_token=hf_secretOfMine"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    assert "hub_token=***" in done.stdout
    assert "hf_secretOfMine" not in done.stdout + done.stderr
