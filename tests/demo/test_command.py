"""The demo: fair by construction, resumable, the same table for the same seed."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest

from cwdpo_bench.demo import command, workers
from cwdpo_bench.demo.command import demo_jobs, run_demo
from cwdpo_bench.demo.systems import (
    ABLATIONS,
    BASE,
    DEFAULT,
    EVERY_SYSTEM,
    SMOKE,
    SYSTEMS,
    TUNED,
    TUNING,
    Budget,
    chosen_learning_rates,
    demo_recipe,
)
from cwdpo_bench.errors import UserError
from cwdpo_bench.evaluate.results import read_run
from cwdpo_bench.files import read_json
from cwdpo_bench.study.file import load_study, recipe_of, tries
from cwdpo_bench.train.recipe import shipped_recipes

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("budget", [DEFAULT, SMOKE])
@pytest.mark.parametrize("name", EVERY_SYSTEM)
def test_every_system_takes_the_same_number_of_steps_of_the_same_size(
    name: str, budget: Budget
) -> None:
    recipe = demo_recipe(name, seed=3, budget=budget, learning_rate=1e-4)
    stages = [recipe.trainer_arguments(stage) for stage in recipe.stages().values()]
    assert sum(stage["max_steps"] for stage in stages) == budget.steps
    for stage in stages:
        batch = stage["per_device_train_batch_size"] * stage["gradient_accumulation_steps"]
        assert (batch, stage["learning_rate"], stage["seed"]) == (16, 1e-4, 3)
    if len(stages) == 2:
        assert stages[0]["max_steps"] == 0.75 * budget.steps


def test_every_system_had_the_same_tries_and_the_best_on_validation_was_chosen() -> None:
    log, study = read_json(TUNING), load_study(ROOT / "docs/study-tuning.yaml")
    tune = study.tune
    assert tune is not None
    assert (log["grid"], log["steps"], log["seed"]) == (tune.values, study.steps, tune.seed)
    assert set(log["chosen"]) == set(study.systems) == set(TUNED)
    for system in TUNED:
        tries = {t["learning_rate"]: t["scores"] for t in log["tries"] if t["system"] == system}
        assert sorted(tries) == sorted(tune.values)
        chosen = chosen_learning_rates()[system]
        assert tries[chosen][tune.metric] == max(scores[tune.metric] for scores in tries.values())
    # Ablations change one thing, so they keep the rate of what they are ablations of.
    assert {chosen_learning_rates()[name] for name in ABLATIONS} == {log["chosen"]["cw-dpo"]}


def test_a_try_trains_as_the_demo_does() -> None:
    study = load_study(ROOT / "docs/study-tuning.yaml")
    for attempt in tries(study):
        rate = attempt.settings["trainer.learning_rate"]
        assert recipe_of(study, attempt) == demo_recipe(
            attempt.system, seed=attempt.seed, budget=DEFAULT, learning_rate=rate
        )


def test_the_extended_table_holds_every_recipe_that_is_shipped() -> None:
    assert set(EVERY_SYSTEM) == set(shipped_recipes())


def test_all_jobs_start_from_the_base_and_read_the_same_data(tmp_path: Path) -> None:
    jobs = demo_jobs(tmp_path, SYSTEMS, seed=0, smoke=False)
    assert {job.system for job in jobs} == {BASE, *SYSTEMS}
    assert len({(job.base, job.data, job.budget, job.seed) for job in jobs}) == 1
    assert [job.system for job in jobs if job.recipe is None] == [BASE]


def test_finished_systems_need_no_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = demo_jobs(tmp_path, SYSTEMS, seed=0, smoke=True)
    for job in jobs:
        job.run.mkdir(parents=True)
        (job.run / "results.json").write_text("{}")
        job.checkpoint.mkdir(parents=True)

    def started(*_: object) -> None:
        raise AssertionError("a worker was started")

    monkeypatch.setattr(workers, "ProcessPoolExecutor", started)
    workers.run_jobs(jobs)
    shutil.rmtree(jobs[0].checkpoint)
    with pytest.raises(AssertionError, match="a worker was started"):
        workers.run_jobs(jobs)


def test_the_extended_table_says_at_once_that_trl_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "cwdpo_bench.train.grpo", raising=False)
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(UserError, match=r"pip install 'cwdpo-bench\[grpo\]'"):
        run_demo(tmp_path / "demo", every_system=True)
    assert not (tmp_path / "demo").exists()


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="no demo's folder"):
        run_demo(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_folder_of_a_demo_with_another_seed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise UserError("stopped here")

    monkeypatch.setattr(command, "render_world", stop)
    with pytest.raises(UserError, match="stopped here"):
        run_demo(tmp_path / "demo", seed=1)
    with pytest.raises(UserError, match="other settings"):
        run_demo(tmp_path / "demo", seed=2)
    with pytest.raises(UserError, match="other settings"):
        run_demo(tmp_path / "demo", seed=1, smoke=True)


@pytest.mark.slow
def test_the_smoke_demo_leaves_everything_and_repeats_itself(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    run_demo(first, smoke=True)
    for name in (BASE, *SYSTEMS):
        tasks = read_run(first / "runs" / name).results["tasks"]
        assert list(tasks) == ["coco", "flickr30k", "nocaps", "mmmu", "mmbench"]
        assert (first / "plots" / f"reliability-{name}.png").is_file()
    for name in SYSTEMS:
        dynamics = pd.read_parquet(first / "checkpoints" / name / "dynamics.parquet")
        assert dynamics["total_step"].iloc[-1] == SMOKE.steps
        assert (first / "plots" / f"dynamics-{name}.png").is_file()
    board = (first / "LEADERBOARD.md").read_text(encoding="utf-8")
    assert all(name in board for name in (BASE, *SYSTEMS))
    page = (first / "report.html").read_text(encoding="utf-8")
    assert "no curves" not in page.replace("base: no curves", "")
    assert "data:image/webp" in page
    assert '"pictures-0"' in page

    # An interrupted demo goes on: what is finished stays, what is missing is made again.
    finished = (first / "runs" / "sft" / "results.json").stat().st_mtime_ns
    shutil.rmtree(first / "runs" / "dpo")
    shutil.rmtree(first / "checkpoints" / "cw-dpo")
    shutil.rmtree(first / "runs" / "cw-dpo")
    run_demo(first, smoke=True)
    assert (first / "runs" / "sft" / "results.json").stat().st_mtime_ns == finished
    assert (first / "LEADERBOARD.md").read_text(encoding="utf-8") == board

    run_demo(second, smoke=True)
    assert (second / "LEADERBOARD.md").read_text(encoding="utf-8") == board
