"""Studies: a grid of cells, each made once, resumed, refused when changed; fair and told so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from cwdpo_bench.demo import base_path, first_pairs, training_pairs
from cwdpo_bench.demo.layouts import SMOKE, render_pairs, write_world
from cwdpo_bench.demo.systems import DEFAULT, EVERY_SYSTEM, chosen_learning_rates, demo_recipe
from cwdpo_bench.errors import UserError
from cwdpo_bench.evaluate.results import read_run
from cwdpo_bench.files import read_json, write_json
from cwdpo_bench.study import choose, commands, plan, plan_text, run_one, run_study
from cwdpo_bench.study import run as studies
from cwdpo_bench.study.cell import RECORD, _alone, benchmarks, read_cell, run_cell
from cwdpo_bench.study.file import cells, load_study, recipe_of, start_of, tries
from cwdpo_bench.study.record import unfair

ROOT = Path(__file__).parents[2]
TUNE = {
    "key": "trainer.learning_rate",
    "values": [1e-5, "1e-3"],
    "data_root": "world/validation",
    "tasks": ["mmmu"],
    "metric": "mmmu/nll",
}
SFT_B = {"b": {"recipe": "sft"}}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small rendered world."""
    folder = tmp_path_factory.mktemp("study") / "world"
    write_world(folder, 0, SMOKE)
    return folder


@pytest.fixture
def write(tmp_path: Path, world: Path) -> Callable[..., Path]:
    """Write a tiny study with some keys changed; None removes one."""
    (tmp_path / "world").symlink_to(world)

    def write(**changes: Any) -> Path:
        values: dict[str, Any] = {
            "model": "demo",
            "data": "world/pairs/train.jsonl",
            "probe": "world/pairs/probe.jsonl",
            "data_root": "world",
            "tasks": ["mmmu"],
            "limit": 5,
            "steps": 4,
            "seeds": [0, 1],
            "settings": {
                "trainer.per_device_train_batch_size": 4,
                "trainer.gradient_accumulation_steps": 1,
                "dynamics.every": 2,
                "dynamics.pairs": 4,
            },
            "systems": {"sft": {"recipe": "sft"}, "dpo": {"recipe": "dpo"}},
            **changes,
        }
        file = tmp_path / "study.yaml"
        kept = {key: value for key, value in values.items() if value is not None}
        file.write_text(yaml.safe_dump(kept, sort_keys=False))
        return file

    return write


def _finish(file: Path, output: Path, key: str, seconds: float = 10.0) -> None:
    """A cell's folder as a finished one leaves it, as far as the planning reads it."""
    study = load_study(file)
    cell = next(c for c in (*tries(study), *cells(study, {})) if c.key == key)
    record = read_cell(study, cell, output)
    record |= {"status": "finished", "seconds": {"train": seconds, "run": 0.0}}
    (output / key / "run").mkdir(parents=True)
    write_json(output / key / RECORD, record)
    write_json(output / key / "run" / "results.json", {})


# --- the file ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"sistems": {}}, "unknown key 'sistems'; did you mean 'systems'"),
        ({"systems": {"a": {"recipe": "sft", "seting": {}}}}, "did you mean 'settings'"),
        ({"tune": {**TUNE, "metrik": "x"}}, "unknown key 'tune.metrik'; did you mean 'metric'"),
        ({"systems": {"a": {"recipe": "cw-dp"}}}, "systems.a: no recipe and no file 'cw-dp'"),
        ({"settings": {"trainer.learning_rat": 1}}, "did you mean 'learning_rate'"),
        ({"systems": {"a/b": {"recipe": "sft"}}}, "becomes a folder's name"),
        ({"sweeps": {"spo": {"trainer.seed": [1]}}}, "sweeps.spo: no such system"),
        (
            {"systems": {"a": {"recipe": "dpo", "start": "b"}, "c": {"recipe": "sft"}}},
            "systems.a.start: no such system",
        ),
        ({"systems": {"a": {"recipe": "dpo", "start": "a"}}}, "a has a start itself"),
        (
            {"systems": {"a": {"recipe": "dpo", "start": "b"}, "b": {"recipe": "none"}}},
            "must be from one trained system",
        ),
        (
            {"systems": {"a": {"recipe": "dpo", "start": "b", "model": "some/other"}, **SFT_B}},
            "a.start: b has another model; give both the same",
        ),
        ({"diversity": 1}, "diversity: .*greater than or equal to 2"),
        (
            {"tune": TUNE, "systems": {"a": {"recipe": "dpo", "start": "b"}, **SFT_B}},
            "tries on validation data know no start",
        ),
        ({"systems": {"a": {"recipe": "dpo", "easy_share": 0.5}}}, "is of the demo's own pairs"),
        ({"systems": {"a": {"recipe": "dpo", "pairs": 8}}}, "a.pairs: is of the demo's own pairs"),
        ({"systems": {"a": {"recipe": "dpo", "easy_share": 1.5}}}, "systems.a.easy_share: "),
        ({"systems": {"a": {"recipe": "dpo", "data": "no.jsonl"}}}, "systems.a.data: .*not there"),
        ({"baseline": "sfft"}, "baseline: no row 'sfft'; did you mean 'sft'"),
        ({"seeds": [1, 1]}, "seeds: 1 stands there twice"),
        ({"seeds": []}, "seeds: "),
        ({"data": "nowhere.jsonl"}, "data: .*nowhere.jsonl: not there"),
        ({"model": "some/model", "data_root": None}, "data_root: is missing"),
        ({"tune": {**TUNE, "data_root": None}}, "tune.data_root: name the validation data"),
        ({"tune": {**TUNE, "metric": "coco/CIDEr"}}, "is of none of tune.tasks"),
        (
            {"tune": TUNE, "sweeps": {"dpo": {"trainer.learning_rate": [1e-4]}}},
            "trainer.learning_rate is chosen by tune",
        ),
    ],
)
def test_a_mistake_in_the_file_names_the_key_and_the_mend(
    write: Callable[..., Path], changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError, match=told):
        load_study(write(**changes))


def test_cells_are_systems_times_sweep_points_times_seeds(write: Callable[..., Path]) -> None:
    sweep = {"objective.beta": [0.1, 0.3], "trainer.learning_rate": [1e-5, "3e-4"]}
    systems = {"base": {"recipe": "none"}, "sft": {"recipe": "sft"}, "dpo": {"recipe": "dpo"}}
    study = load_study(write(systems=systems, sweeps={"dpo": sweep}))
    planned = cells(study, {})
    rows = list(dict.fromkeys(cell.row for cell in planned))
    assert rows[:3] == ["base", "sft", "dpo@beta=0.1,learning_rate=1e-05"]
    assert len(rows) == 2 + 4
    # What is not trained is the same for all seeds.
    assert [cell.seed for cell in planned if cell.row == "base"] == [0]
    assert len(planned) == 1 + 2 + 4 * 2
    recipe = recipe_of(study, planned[-1])
    assert recipe is not None
    assert recipe.trainer["learning_rate"] == 3e-4
    assert recipe.trainer["seed"] == 1


@pytest.mark.parametrize("recipe", ["sft", "cw-dpo", "no-cw-dpo", "ppo"])
def test_every_recipe_takes_the_studys_steps(write: Callable[..., Path], recipe: str) -> None:
    study = load_study(write(steps=9, systems={"a": {"recipe": recipe}}))
    made = recipe_of(study, cells(study, {})[0])
    assert made is not None
    stages = made.stages().values()
    assert sum(made.trainer_arguments(stage)["max_steps"] for stage in stages) == 9


def test_every_system_gets_the_same_tries_on_validation_data(write: Callable[..., Path]) -> None:
    study = load_study(write(tune=TUNE))
    attempts = tries(study)
    tried = {
        name: [c.settings["trainer.learning_rate"] for c in attempts if c.system == name]
        for name in study.systems
    }
    assert tried == {"sft": [1e-5, "1e-3"], "dpo": [1e-5, "1e-3"]}
    assert {cell.data_root.name for cell in attempts if cell.data_root} == {"validation"}
    assert {cell.seed for cell in attempts} == {1000}
    won = {cell.system: cell.settings for cell in cells(study, {"sft": "1e-3", "dpo": 1e-5})}
    assert won["sft"]["trainer.learning_rate"] == "1e-3"
    assert won["dpo"]["trainer.learning_rate"] == 1e-5


@pytest.mark.parametrize(
    ("name", "number"),
    [
        *(("study", 126), ("study-squeezing", 86), ("study-llava", 36)),
        *(("study-sensitivity", 60), ("study-cooling", 20)),
        ("study-llava-ablations", 30),
        *(("study-captions", 46), ("study-llava-systems", 26), ("study-width", 52)),
    ],
)
def test_the_documented_studies_are_valid_and_fair_in_steps(name: str, number: int) -> None:
    study = load_study(ROOT / "docs" / f"{name}.yaml")
    planned = cells(study, {})
    assert len(planned) == number
    for cell in planned:
        recipe = recipe_of(study, cell)
        if recipe is not None:
            stages = recipe.stages().values()
            steps = sum(recipe.trainer_arguments(stage)["max_steps"] for stage in stages)
            before = start_of(study, cell)
            earlier = 0 if before is None else study.systems[before.system].steps
            assert steps + (earlier or 0) == study.steps or cell.system == "sft-c-180"


def test_the_documented_study_trains_as_the_demo_does_at_the_rates_that_were_tuned() -> None:
    study = load_study(ROOT / "docs" / "study.yaml")
    rates = chosen_learning_rates()
    first = {cell.system: cell for cell in cells(study, {}) if cell.seed == 0}
    assert set(EVERY_SYSTEM) < set(first)
    for name in EVERY_SYSTEM:
        ours = demo_recipe(name, seed=0, budget=DEFAULT, learning_rate=rates[name])
        assert recipe_of(study, first[name]) == ours


def test_the_study_of_captions_trains_what_the_documented_one_does() -> None:
    first, again = (load_study(ROOT / "docs" / f"study{k}.yaml") for k in ("", "-captions"))
    recipes = {cell.key: recipe_of(first, cell) for cell in cells(first, {})}
    for cell in cells(again, {}):
        ours, theirs = recipe_of(again, cell), recipes[cell.key]
        if ours is None or theirs is None:
            assert ours is theirs
            continue
        every = {"dynamics": {**ours.model_dump()["dynamics"], "every": 24}}
        assert {**ours.model_dump(), **every} == theirs.model_dump()


def test_a_system_has_its_own_data_and_steps(write: Callable[..., Path]) -> None:
    own = {"recipe": "sft", "data": "world/pairs/probe.jsonl", "steps": 2}
    study = load_study(write(systems={"sft": {"recipe": "sft"}, "own": own}, seeds=[0]))
    usual, other = cells(study, {})
    recipe = recipe_of(study, other)
    assert recipe is not None
    assert recipe.trainer["max_steps"] == 2
    prints = [read_cell(study, cell, Path("nowhere"))["fingerprint"] for cell in (usual, other)]
    assert prints[0]["data"] != prints[1]["data"] == prints[1]["probe"]


def test_another_model_may_be_studied_in_the_demos_world(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "base").mkdir()
    mine = {"model": "base", "world": "demo", "data": None, "probe": None, "data_root": None}
    systems = {"dpo": {"recipe": "dpo"}, "easy": {"recipe": "dpo", "easy_share": 0.5}}
    study = load_study(write(**mine, systems=systems))
    assert study.model == str(tmp_path / "base")
    monkeypatch.setattr("cwdpo_bench.study.cell.demo_world", lambda: tmp_path / "world")
    assert benchmarks(cells(study, {})[0]) == tmp_path / "world"
    with pytest.raises(UserError, match=r"world: demo. bring their own"):
        load_study(write(**mine | {"world": None}))
    with pytest.raises(UserError, match="easy_share: is of the demo's own pairs"):
        load_study(write(model="base", world=None, systems=systems))
    with pytest.raises(UserError, match="world: "):
        load_study(write(**mine | {"world": "mars"}))


def test_a_system_has_its_own_model_and_captions_are_sampled_as_often_as_asked(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _in_process(monkeypatch)
    (tmp_path / "other").symlink_to(base_path())
    systems = {
        "a": {"recipe": "none"},
        "b": {"recipe": "sft", "model": "other"},
        "c": {"recipe": "none", "model": "nobody/nothing"},
    }
    study = load_study(write(systems=systems))
    assert [study.model_of(name) for name in "abc"] == [
        *("demo", str(tmp_path / "other"), "nobody/nothing")
    ]
    prints = [read_cell(study, cell, tmp_path)["fingerprint"]["model"] for cell in cells(study, {})]
    assert prints == ["demo", *[str(tmp_path / "other")] * 2, "nobody/nothing"]
    del systems["c"]
    file = write(systems=systems, tasks=["coco"], diversity=2, seeds=[0])
    record = run_study(file, tmp_path / "out", say=lambda _: None)
    assert [cell["model"] for cell in record["cells"]] == ["demo", "other"]
    assert all(0 < cell["scores"]["coco/distinct-1"] <= 1 for cell in record["cells"])
    provenance = read_json(tmp_path / "out/cells/b/seed-0/checkpoint/provenance.json")
    assert provenance["model"]["base"] == str(tmp_path / "other")


def test_another_share_of_easy_pairs_is_rendered_once(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def small(folder: Path, seed: int, easy_share: float) -> None:
        render_pairs(folder, seed, easy_share, SMOKE)

    monkeypatch.setattr("cwdpo_bench.demo.layouts.render_pairs", small)
    shares = {}
    for share in (0, 0.25, 0.25, 1):
        file = training_pairs(share, tmp_path / "cache")
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        assert all((file.parent / row["images"][0]).is_file() for row in rows)
        shares[share] = sum(row["kind"] == "easy" for row in rows) / len(rows)
    assert shares == {0: 0, 0.25: 0.25, 1: 1}
    assert sorted(f.name.split("easy-")[1] for f in (tmp_path / "cache").iterdir()) == [
        "0",
        "0.25",
        "1",
    ]


def test_the_first_pairs_are_a_prefix_beside_the_others(tmp_path: Path) -> None:
    every = tmp_path / "train.jsonl"
    every.write_text("".join(f'{{"id": {i}}}\n' for i in range(5)))
    part = first_pairs(every, 2)
    assert part.parent == every.parent
    assert every.read_text().startswith(part.read_text())
    assert part.read_text().count("\n") == 2
    with pytest.raises(UserError, match=r"pairs: 6: .* has 5"):
        first_pairs(every, 6)


def test_steps_go_to_the_stages_as_their_pairs(write: Callable[..., Path]) -> None:
    for share, steps in ((0.25, [2, 6]), (0.75, [6, 2]), (0.99, [7, 1])):
        settings = {"data.stage1_share": share}
        systems = {"a": {"recipe": "cw-dpo", "settings": settings}}
        study = load_study(write(steps=8, settings={}, systems=systems))
        recipe = recipe_of(study, cells(study, {})[0])
        assert recipe is not None
        made = [recipe.trainer_arguments(stage)["max_steps"] for stage in recipe.stages().values()]
        assert made == steps


# --- planning ------------------------------------------------------------------------------------


def test_the_plan_tells_what_is_finished_and_the_time_left(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    file, output = write(), tmp_path / "out"
    assert plan(file, output)["expected_seconds"] is None
    assert not output.exists()
    _finish(file, output, "cells/sft/seed-0", 30)
    assert plan(file, output)["expected_seconds"] is None
    _finish(file, output, "cells/dpo/seed-0", 60)
    found = plan(file, output)
    assert [row["status"] for row in found["cells"]] == ["finished", "new", "finished", "new"]
    assert found["expected_seconds"] == 90
    assert "2 of 4 cells to do, about 0.8 min with --jobs 2" in plan_text(found, 2)


def test_commands_name_what_is_left_and_the_tries_before_the_cells(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    file, output = write(), tmp_path / "out"
    _finish(file, output, "cells/sft/seed-0")
    told = [" ".join(command) for command in commands(file, output)]
    assert len(told) == 3
    assert told[0] == f"cwdpo-bench study {file} --output {output} --cell cells/sft/seed-1"
    keys = [command[-1] for command in commands(write(tune=TUNE), tmp_path / "tuned")]
    assert len(keys) == 4
    assert all(key.startswith("tune/") for key in keys)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"steps": 6}, "recipe.trainer.max_steps: 4 there, 6 asked for"),
        ({"limit": 4}, "limit: 5 there, 4 asked for"),
        ({"tasks": ["coco"]}, "tasks: "),
        ({"data": "world/pairs/probe.jsonl"}, "data: "),
    ],
)
def test_a_cell_that_was_made_from_something_else_is_refused_with_the_mend(
    write: Callable[..., Path], tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    output = tmp_path / "out"
    _finish(write(), output, "cells/sft/seed-0")
    with pytest.raises(UserError, match=told) as refused:
        plan(write(**changes), output)
    assert "remove that folder" in str(refused.value)


def test_an_unknown_cell_is_refused_with_the_nearest(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"no cell 'cells/dpo/seed-01'; did you mean"):
        run_one(write(), tmp_path / "out", "cells/dpo/seed-01")


def test_test_data_wait_for_the_tries(write: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the tries come before the cells"):
        run_one(write(tune=TUNE), tmp_path / "out", "cells/dpo/seed-0")


def test_unequal_pairs_and_steps_are_told() -> None:
    def entry(row: str, steps: int) -> dict[str, Any]:
        return {"row": row, "training": {"pairs": 96, "pairs_seen": 4 * steps, "steps": steps}}

    base = {"row": "base", "training": None}
    assert unfair([base, entry("a", 8), entry("a", 8), entry("b", 8)]) == []
    assert unfair([base, entry("a", 8), entry("b", 6)]) == [
        "unequal pairs seen (steps × batch): 32: a; 24: b",
        "unequal update steps: 8: a; 6: b",
    ]


# --- running -------------------------------------------------------------------------------------


def _in_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Cells in this process, for speed; returns the keys of those that were begun."""
    begun: list[str] = []

    def run(study: Any, file: Path, cell: Any, output: Path, running: Any) -> str | None:
        begun.append(cell.key)
        try:
            run_one(file, output, cell.key)
        except UserError as error:
            return str(error)
        return None

    monkeypatch.setattr(studies, "_run_process", run)
    return begun


def test_a_study_is_tuned_run_compared_and_never_redone(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = _in_process(monkeypatch)
    output = tmp_path / "out"
    systems = {"base": {"recipe": "none"}, "sft": {"recipe": "sft"}}
    file = write(tune=TUNE, systems=systems, baseline="base", seeds=[1])
    record = run_study(file, output, say=lambda _: None)
    assert [key.split("/")[0] for key in begun] == ["tune"] * 2 + ["cells"] * 2
    scores = {
        entry["settings"]["trainer.learning_rate"]: entry["scores"]["mmmu/nll"]
        for entry in record["tries"]
    }
    # NLL is better when it is lower.
    assert record["chosen"]["values"] == {"sft": min(scores, key=lambda rate: scores[rate])}
    assert choose(load_study(file), output) == record["chosen"]["values"]
    assert [system["name"] for system in record["comparison"]["systems"]] == ["base", "sft"]
    run = read_run(output / "cells/sft/seed-1/run")
    figure = next(e for e in record["cells"] if e["cell"] == "cells/sft/seed-1")["scores"]
    assert figure["mmmu/accuracy"] == run.results["tasks"]["mmmu"]["metrics"]["accuracy"]["value"]
    curves = {entry["row"]: entry["curves"] for entry in record["cells"]}
    assert curves["base"] is None
    assert curves["sft"]["total_step"] == [0, 2, 4]
    assert curves["sft"]["chosen_mean_logp"][-1] == pytest.approx(
        record["cells"][1]["dynamics"]["chosen_mean_logp"], rel=1e-5
    )
    trained = [entry["training"] for entry in record["cells"] if entry["training"]]
    assert [(t["pairs"], t["pairs_seen"], t["steps"]) for t in trained] == [(96, 16, 4)]
    assert record["warnings"] == []
    text = (output / "RESULTS.md").read_text()
    assert "All tries of trainer.learning_rate" in text
    assert "<html" in (output / "report.html").read_text()

    before = {name: (output / name).read_bytes() for name in ("RESULTS.md", "results.csv")}
    begun.clear()
    again = run_study(file, output, say=lambda _: None)
    assert begun == []
    # Tuples become lists in JSON.
    assert json.loads(json.dumps(again)) == read_json(output / "study.json")
    assert again == record
    assert before == {name: (output / name).read_bytes() for name in before}


def test_failed_cells_are_listed_and_tried_again_and_the_others_compared(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = _in_process(monkeypatch)
    output = tmp_path / "out"
    (tmp_path / "start").mkdir()
    broken = {"recipe": "sft", "settings": {"init": str(tmp_path / "start")}}
    file = write(systems={"base": {"recipe": "none"}, "sft": broken}, seeds=[0])
    for _ in range(2):
        begun.clear()
        with pytest.raises(UserError, match=r"1 cell\(s\) failed.*\n  cells/sft/seed-0: init: "):
            run_study(file, output, say=lambda _: None)
        assert begun[-1] == "cells/sft/seed-0"
        record = read_json(output / "study.json")
        assert list(record["failed"]) == ["cells/sft/seed-0"]
        assert "sft: without seeds 0" in record["warnings"]
        assert [system["name"] for system in record["comparison"]["systems"]] == ["base"]
    assert begun == ["cells/sft/seed-0"]
    assert plan(file, output)["cells"][1]["status"] == "failed"


def test_a_system_trains_on_anothers_checkpoint_of_the_same_seed(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = _in_process(monkeypatch)
    output = tmp_path / "out"
    later = {"recipe": "dpo", "start": "sft", "steps": 2}
    file = write(systems={"later": later, "sft": {"recipe": "sft"}}, seeds=[1], limit=2)
    assert [command[-1] for command in commands(file, output)] == ["cells/sft/seed-1"]
    with pytest.raises(UserError, match=r"cells/sft/seed-1: is not finished, and cells/later"):
        run_one(file, output, "cells/later/seed-1")
    record = run_study(file, output, say=lambda _: None)
    assert begun == ["cells/sft/seed-1", "cells/later/seed-1"]
    trained = {entry["row"]: entry["training"] for entry in record["cells"]}
    # What came before counts: 4 steps of 4 pairs, then 2.
    assert (trained["later"]["steps"], trained["later"]["pairs_seen"]) == (6, 24)
    assert (trained["sft"]["steps"], trained["sft"]["pairs_seen"]) == (4, 16)
    ends = {
        row: load_file(output / f"cells/{row}/seed-1/checkpoint/model.safetensors")
        for row in ("sft", "later")
    }
    begin = load_file(base_path() / "model.safetensors")
    name = next(key for key in begin if key.endswith("down_proj.weight"))
    step = (ends["later"][name] - ends["sft"][name]).abs().max()
    assert 0 < step < (ends["sft"][name] - begin[name]).abs().max()


def _command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cwdpo_bench", "study", *arguments],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_process_that_is_killed_is_a_failed_cell(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(studies, "_command", lambda *_: ["", "-c"], raising=True)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "killed"))
    (tmp_path / "killed").write_text("#!/bin/sh\nkill -9 $$\n")
    (tmp_path / "killed").chmod(0o755)
    with pytest.raises(UserError, match="killed by signal 9, perhaps for lack of memory"):
        run_study(write(seeds=[0]), tmp_path / "out", say=lambda _: None)


def test_a_cell_that_runs_elsewhere_has_not_failed(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(studies, "_command", lambda *_: pytest.fail("it was started again"))
    systems = {"base": {"recipe": "none"}, **SFT_B, "then": {"recipe": "dpo", "start": "b"}}
    file, output = write(systems=systems, seeds=[0]), tmp_path / "out"
    _finish(file, output, "cells/base/seed-0")
    folder = output / "cells/b/seed-0"
    folder.mkdir(parents=True)
    study = load_study(file)
    cell = cells(study, {})[1]
    write_json(folder / RECORD, read_cell(study, cell, output) | {"status": "running"})
    with _alone(folder):
        states = [row["status"] for row in plan(file, output)["cells"]]
        assert states == ["finished", "running", "new"]
        assert commands(file, output) == []
        monkeypatch.setattr(studies, "write_results", _fake_results)
        with pytest.raises(UserError, match=r"^2 cell\(s\) are not finished yet") as told:
            run_study(file, output, say=lambda _: None)
        assert "cells/b/seed-0: is running in another process" in str(told.value)
        assert "cells/then/seed-0: waits for a cell that is running" in str(told.value)
        assert "failed" not in str(told.value)
        with pytest.raises(UserError, match="another process works on this cell"):
            run_cell(study, cell, output)
        assert read_json(folder / RECORD)["status"] == "running"
    # Its process is gone, and had no time to say why.
    row = plan(file, output)["cells"][1]
    assert (row["status"], row["reason"]) == ("interrupted", "its process ended without a word")


def _fake_results(*arguments: Any) -> dict[str, Any]:
    assert set(arguments[-1]) == {"cells/b/seed-0", "cells/then/seed-0"}
    return {"warnings": [], "written": []}


@pytest.mark.slow
def test_the_command_runs_two_cells_at_a_time_and_goes_on(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    file, output = write(), tmp_path / "out"
    alone = _command(str(file), "--output", str(output), "--cell", "cells/dpo/seed-1")
    assert alone.returncode == 0, alone.stderr
    before = (output / "cells/dpo/seed-1" / RECORD).stat().st_mtime_ns
    done = _command(str(file), "--output", str(output), "--jobs", "2")
    assert done.returncode == 0, done.stderr
    assert (output / "cells/dpo/seed-1" / RECORD).stat().st_mtime_ns == before
    assert (output / "RESULTS.md").is_file()
    listed = _command(str(file), "--output", str(output), "--dry-run", "--json")
    assert {row["status"] for row in json.loads(listed.stdout)["cells"]} == {"finished"}


@pytest.mark.slow
def test_a_cell_of_the_documented_study_is_reproduced(tmp_path: Path, world: Path) -> None:
    values = yaml.safe_load((ROOT / "docs" / "study.yaml").read_text())
    pairs = {"data": world / "pairs/train.jsonl", "probe": world / "pairs/probe.jsonl"}
    values |= {"steps": 8, "data_root": str(world)} | {k: str(p) for k, p in pairs.items()}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    scores = []
    for name in ("first", "second"):
        run_one(tmp_path / "study.yaml", tmp_path / name, "cells/cw-dpo/seed-1")
        tasks = read_run(tmp_path / name / "cells/cw-dpo/seed-1/run").results["tasks"]
        scores.append({task: tasks[task]["metrics"] for task in ("coco", "mmmu")})
    assert scores[0] == scores[1]
