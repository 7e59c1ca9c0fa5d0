"""The results that are committed: remade byte for byte, their statistics, one cell trained anew."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from scipy import stats

from cwdpo_bench.files import read_json, write_json
from cwdpo_bench.study import run_one
from cwdpo_bench.study.file import cells, load_study, tries

DOCS = Path(__file__).parents[1] / "docs"
CELL = ("dpo-easy-0", 0)


def _remake() -> Any:
    """The script beside the records, as a module."""
    spec = importlib.util.spec_from_file_location("remake", DOCS / "results" / "remake.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["remake"] = module
    spec.loader.exec_module(module)
    return module


remake = _remake()


@pytest.mark.parametrize(("page", "made"), [("PAGE", "tables"), ("README", "front")])
def test_the_pages_are_what_their_records_give(page: str, made: str) -> None:
    text = getattr(remake, page).read_text(encoding="utf-8")
    assert remake.fill(text, getattr(remake, made)()) == text


def test_the_figure_is_what_its_records_give(tmp_path: Path) -> None:
    committed = (DOCS / "results" / "squeezing.svg").read_text(encoding="utf-8")
    if f"Matplotlib v{mpl.__version__}" not in committed:
        pytest.skip("drawn by another version of Matplotlib")
    remake.draw(tmp_path / "squeezing.svg")
    assert (tmp_path / "squeezing.svg").read_text(encoding="utf-8") == committed


def test_the_records_are_small_and_whole() -> None:
    files = sorted((DOCS / "results").glob("*.json"))
    assert sum(file.stat().st_size for file in files) < 5_000_000
    for file in files:
        record = read_json(file)
        assert record["failed"] == {}
        # Every row has the seeds that it says, once.
        cells = [(cell["row"], cell["seed"]) for cell in record["cells"]]
        assert len(set(cells)) == len(cells)


@pytest.mark.parametrize(
    "file", sorted(DOCS.glob("results/study*.json")), ids=lambda file: str(file.stem)
)
def test_a_record_has_the_cells_that_its_file_asks_for(file: Path) -> None:
    study = load_study(DOCS / f"{file.stem}.yaml")
    record = read_json(file)
    chosen = record.get("chosen", {}).get("values", {})
    asked = {cell.key: cell.settings for cell in cells(study, chosen)}
    assert {cell["cell"]: cell["settings"] for cell in record["cells"]} == asked
    tried = [attempt.settings for attempt in tries(study)]
    assert [attempt["settings"] for attempt in record.get("tries", [])] == tried


def test_a_new_record_keeps_the_cells_that_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remake, "FOLDER", tmp_path)

    def record(*taken: tuple[int, float]) -> dict[str, Any]:
        return {
            **{"study": "s.yaml", "model": "demo", "seeds": [], "warnings": [], "failed": {}},
            **{"chosen": {}, "tries": []},
            "comparison": {"systems": [{"provenance": {"libraries": {}}}]},
            "cells": [
                {"cell": f"cells/a/seed-{k}", "row": "a", "seed": k, "scores": x} for k, x in taken
            ],
        }

    for number, cells_of_it in enumerate([((0, 1.0), (1, 2.0)), ((1, 3.0), (2, 4.0))]):
        write_json(tmp_path / f"{number}", record(*cells_of_it))
        remake.take(tmp_path / f"{number}")
    assert {k: cell["scores"] for k, cell in remake.read("s")["a"].items()} == {0: 1, 1: 3, 2: 4}
    assert read_json(tmp_path / "s.json")["seeds"] == [0, 1, 2]


def test_what_two_studies_trained_scores_the_same_in_both() -> None:
    first, again = remake.read("study")["cw-dpo"], remake.read("study-sensitivity")["cw-dpo"]
    assert set(first) == set(again)
    for seed, cell in again.items():
        assert cell["scores"] == {
            name: pytest.approx(first[seed]["scores"][name], abs=1e-6) for name in cell["scores"]
        }


def test_the_study_of_captions_scored_what_the_first_one_trained() -> None:
    first, again = remake.read("study"), remake.read("study-captions")
    ends = {
        name: {
            (row, seed): cell["curves"]["chosen_mean_logp"][-1]
            for row in remake.SYSTEMS
            for seed, cell in cells_of_it[row].items()
        }
        for name, cells_of_it in (("first", first), ("again", again))
    }
    assert ends["again"] == pytest.approx(ends["first"], abs=1e-5)


def test_intervals_and_p_are_scipys() -> None:
    rng = np.random.default_rng(0)
    for count in (2, 3, 5, 20):
        first, second = rng.normal(0, 1, count), rng.normal(0.5, 2, count)
        middle, width = remake.interval(list(first - second))
        theirs = stats.ttest_rel(first, second)
        low, high = theirs.confidence_interval(0.95)
        assert (middle - width, middle + width) == pytest.approx((low, high))
        assert remake.p_value(list(first - second)) == pytest.approx(theirs.pvalue)
    assert math.isnan(remake.interval([1.0])[1])


def test_differences_are_paired_by_seed() -> None:
    def cell(value: float) -> dict[str, Any]:
        return {"scores": {"coco/CIDEr": value}}

    cells = {"a": {0: cell(1), 2: cell(5)}, "b": {0: cell(0.5), 1: cell(9), 2: cell(4)}}
    assert remake.paired(cells, "a", "b", remake.score("coco/CIDEr", 1)) == [0.5, 1]


def test_what_was_spent_until_a_level_goes_stage_by_stage() -> None:
    cell = {
        "curves": {"total_step": [0, 4, 8, 8, 12], "chosen_mean_logp": [-1, -1, -0.9, -0.9, -0.5]},
        "training": {"stages": {"stage1": {"steps": 8}, "stage2": {"steps": 8}}},
    }
    costs = {"stage1": {"tokens": 10.0}, "stage2": {"tokens": 100.0}}
    assert remake.spent(-1, costs, "tokens")(cell) == 4 * 10
    assert remake.spent(-0.6, costs, "tokens")(cell) == 8 * 10 + 4 * 100
    assert remake.spent(-0.1, costs, "tokens")(cell) == math.inf


def test_regret_is_the_loss_against_the_best_checkpoint() -> None:
    def entry(cider: list[float], kept: int) -> dict[str, Any]:
        rules = {"squeezing": [48, kept], "delta_logp": [72, 72]}
        return {"steps": [0, 24, 48, 72], "cider": cider, "rules": rules}

    cells = {"a": {0: entry([1, 2, 1.5, 0], 0), 1: entry([1, 0, 0.5, 0.25], 0)}}
    line = remake.regret(cells).splitlines()[-1]
    cells_of_line = [text.strip() for text in line.split("|")[1:-1]]
    assert cells_of_line[:2] == ["a", "2"]
    means = [float(text.split(" ")[0]) for text in cells_of_line[2:] if "/" not in text]
    assert means == [150, 138, 50, 138]
    assert [text for text in cells_of_line if "/" in text] == ["2/2", "0/2"]


def test_the_rules_stop_where_the_study_stopped_and_the_checkpoints_score_as_its_cells() -> None:
    """The regret is of a replay: it must take the decisions that training itself took."""
    squeezing, stopping = remake.read("study-squeezing"), remake.read("stopping")
    for seed, entry in stopping["dpo"].items():
        for rule, row in (("squeezing", "dpo-stop-squeezing"), ("delta_logp", "dpo-stop-delta")):
            assert entry["rules"][rule][0] == squeezing[row][seed]["training"]["steps"]
            kept = entry["cider"][entry["steps"].index(entry["rules"][rule][1])]
            assert kept == pytest.approx(squeezing[row][seed]["scores"]["coco/CIDEr"])
    for row, seeds in stopping.items():
        for seed, entry in seeds.items():
            assert entry["cider"][-1] == pytest.approx(
                squeezing[row][seed]["scores"]["coco/CIDEr"], abs=1e-6
            )


def test_studies_stand_side_by_side_with_the_differences_that_each_has_alone() -> None:
    rng = np.random.default_rng(1)

    def study() -> dict[str, dict[int, dict[str, Any]]]:
        return {
            row: {k: {"scores": {"t/m": rng.normal(), "t/n": rng.normal()}} for k in range(4)}
            for row in "abc"
        }

    studies = {"one": study(), "two": study()}
    del studies["two"]["c"]
    columns = [(name, remake.score(f"t/{name}", 1), 2) for name in "mn"]
    text = remake.side_by_side(studies, [("a", "b"), ("a", "c")], columns).splitlines()
    assert text[0] == "| difference | m, one | m, two | n, one | n, two |"
    # A pair that one study lacks is told of neither.
    assert len(text) == 3
    alone = [
        remake.differences_table(c, [("a", "b")], columns).split("|") for c in studies.values()
    ]
    (one_m, one_n), (two_m, two_n) = (cells[-3:-1] for cells in alone)
    assert text[2].split("|")[2:-1] == [one_m, two_m, one_n, two_n]


def test_a_mark_without_a_table_is_refused() -> None:
    with pytest.raises(AssertionError, match="lost"):
        remake.fill("<!-- table: lost -->\n<!-- end -->", {})
    page = "a\n<!-- table: x -->\nold\n<!-- end -->\nb"
    assert remake.fill(page, {"x": "new"}) == "a\n<!-- table: x -->\n\nnew\n\n<!-- end -->\nb"


def test_marks_tell_better_from_worse_and_only_where_it_is_sure() -> None:
    def cells(values: list[float]) -> dict[int, dict[str, Any]]:
        return {seed: {"scores": {"t/m": value}} for seed, value in enumerate(values)}

    found = {
        "ours": cells([1.0, 1.1, 0.9]),
        "high": cells([2.0, 2.1, 1.91]),
        "low": cells([0.0, 0.1, -0.11]),
        "noisy": cells([2.0, 0.1, 1.9]),
    }
    for heading, better, worse in (("CIDEr", "▲", "▼"), ("token ECE", "▼", "▲")):
        columns = [(heading, remake.score("t/m", 1), 1)]
        text = remake.marked_table(found, list(found), columns, "ours")
        assert f"| high | 2.0 {better} |" in text
        assert f"| low | -0.0 {worse} |" in text
        assert "| noisy | 1.3 |" in text
        assert "| **ours** | 1.0 |" in text
        # One of the family that lacks the score is no part of it.
        more = {**found, "other": {k: {"scores": {}} for k in range(3)}}
        assert remake.marked_table(more, list(found), columns, "ours", ["other"]) == text


@pytest.mark.slow
def test_a_committed_cell_is_reproduced(tmp_path: Path) -> None:
    """Another torch may round otherwise, and squeezing amplifies it: its direction must hold."""
    row, seed = CELL
    run_one(DOCS / "study-squeezing.yaml", tmp_path, f"cells/{row}/seed-{seed}")
    made = read_json(tmp_path / "cells" / row / f"seed-{seed}" / "cell.json")
    committed = remake.read("study-squeezing")[row][seed]
    assert made["training"]["verdict"] == committed["training"]["verdict"] == "displacement"
    assert made["training"]["pairs_seen"] == committed["training"]["pairs_seen"]
    scores = read_json(tmp_path / "cells" / row / f"seed-{seed}" / "run" / "results.json")
    cider = scores["tasks"]["coco"]["metrics"]["CIDEr"]["value"]
    assert cider == pytest.approx(committed["scores"]["coco/CIDEr"], abs=0.2)
