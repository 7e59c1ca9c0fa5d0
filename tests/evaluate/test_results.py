"""The run folder: what is written is what is read, and nothing broken passes for a result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from cwdpo_bench.errors import UserError
from cwdpo_bench.evaluate.results import (
    TaskResult,
    read_run,
    refuse_other_run,
    signature_of,
    summarize,
    write_run,
)

MODEL = {"name": "m"}


def questions(rows: int = 30, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    logps = [np.log(rng.dirichlet(np.ones(4))).tolist() for _ in range(rows)]
    return pd.DataFrame(
        {
            "id": [f"q{n}" for n in range(rows)],
            "cluster": [f"q{n}" for n in range(rows)],
            "groups": [["all", "even"] if n % 2 == 0 else ["all"] for n in range(rows)],
            "prediction": "A",
            "gold": ["ABCD"[rng.integers(4)] for _ in range(rows)],
            "parsed": pd.Series(["A"] * (rows - 1) + [None], dtype=object),
            "correct": rng.random(rows) < 0.5,
            "option_log_probabilities": pd.Series([*logps[:-1], None], dtype=object),
            "option_correct": pd.Series([True] * (rows - 1) + [None], dtype=object),
        }
    )


def write(path: Path, samples: pd.DataFrame | None = None, **changes: Any) -> dict[str, Any]:
    task = TaskResult(questions() if samples is None else samples, "task:mmmu", ["beware"])
    call = {"model": MODEL, "tasks": {"mmmu": task}, "provenance": {"seed": 0}, "signature": "s"}
    return write_run(path, **{**call, **changes})


def test_a_run_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = write(tmp_path / "run")
    run = read_run(tmp_path / "run")
    assert run.results == written
    assert run.results["schema"] == 1
    task = run.results["tasks"]["mmmu"]
    assert task["signature"] == "task:mmmu"
    assert task["warnings"] == ["beware"]
    samples = run.samples("mmmu")
    # The table alone gives every number again.
    assert summarize(samples) == {key: task[key] for key in ("n", "metrics", "groups")}
    assert samples["id"].tolist() == questions()["id"].tolist()
    assert pd.isna(samples["parsed"].iloc[-1])
    assert samples["option_log_probabilities"].iloc[-1] is None
    assert list(samples["groups"].iloc[0]) == ["all", "even"]


def test_summary_has_value_error_and_interval_per_metric_and_group() -> None:
    samples = questions(200)
    summary = summarize(samples)
    assert summary["n"] == 200
    accuracy = summary["metrics"]["accuracy"]
    share = samples["correct"].mean()
    assert accuracy["value"] == share
    assert accuracy["stderr"] == pytest.approx(np.sqrt(share * (1 - share) / 200), rel=0.15)
    low, high = accuracy["ci95"]
    assert low < share < high
    assert high - low == pytest.approx(2 * 1.96 * accuracy["stderr"], rel=0.15)
    assert accuracy["higher_is_better"] is True
    assert summary["metrics"]["ece"]["higher_is_better"] is False
    assert summary["metrics"]["entropy"]["higher_is_better"] is None
    assert list(summary["groups"]) == ["all", "even"]
    assert summary["groups"]["all"] == {"n": 200, "metrics": summary["metrics"]}
    even = summary["groups"]["even"]
    assert even["n"] == 100
    assert even["metrics"]["accuracy"]["value"] == samples["correct"][::2].mean()


def test_samples_of_one_cluster_are_drawn_together() -> None:
    samples = questions(200)
    fours = samples.assign(cluster=[str(n // 4) for n in range(200)])
    # Four copies of one answer a cluster: the error is that of 50 questions.
    fours["correct"] = [bool(n // 4 % 2) for n in range(200)]
    assert summarize(fours)["metrics"]["accuracy"]["stderr"] == pytest.approx(
        np.sqrt(0.25 / 50), rel=0.15
    )


def test_the_seed_fixes_the_interval() -> None:
    samples = questions(50)
    assert summarize(samples, seed=1) == summarize(samples, seed=1)
    assert summarize(samples, seed=1) != summarize(samples, seed=2)


def test_one_sample_and_no_variance_give_numbers() -> None:
    one = summarize(questions(2).iloc[:1])["metrics"]["accuracy"]
    assert one["stderr"] == 0
    assert one["ci95"] == [one["value"], one["value"]]
    same = questions(20).assign(correct=True)
    assert summarize(same)["metrics"]["accuracy"] == {
        "value": 1.0,
        "stderr": 0.0,
        "ci95": [1.0, 1.0],
        "higher_is_better": True,
    }


def test_circular_orders_of_a_question_are_one_sample(tmp_path: Path) -> None:
    samples = questions(12).assign(
        cluster=[str(n // 3) for n in range(12)], shift=[n % 3 for n in range(12)]
    )
    assert write(tmp_path / "run", samples)["tasks"]["mmmu"]["n"] == 4
    assert len(read_run(tmp_path / "run").samples("mmmu")) == 12


def test_signature_escapes_what_would_break_its_form() -> None:
    assert signature_of({"prompt": "a|b\nc\\", "n": 3}) == "prompt:a\\|b\\nc\\\\|n:3"


def test_another_run_is_not_overwritten(tmp_path: Path) -> None:
    write(tmp_path)
    before = (tmp_path / "results.json").read_bytes()
    for change in ({"model": {"name": "other"}}, {"signature": "t"}):
        with pytest.raises(UserError, match=r"holds another run .* choose another output folder"):
            write(tmp_path, **change)
    with pytest.raises(UserError, match="'task:mmmu', not 'task:mmmu2'"):
        write(tmp_path, tasks={"mmmu": TaskResult(questions(), "task:mmmu2")})
    assert (tmp_path / "results.json").read_bytes() == before
    refuse_other_run(tmp_path, MODEL, "s", {"mmmu": "task:mmmu", "coco": "anything"})


def test_the_same_run_is_continued(tmp_path: Path) -> None:
    first = write(tmp_path)
    both = write(tmp_path, tasks={"mmbench": TaskResult(questions(seed=1), "task:mmbench")})
    assert list(both["tasks"]) == ["mmmu", "mmbench"]
    assert both["tasks"]["mmmu"] == first["tasks"]["mmmu"]
    assert read_run(tmp_path).results == both


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_is_not_written(tmp_path: Path, bad: float) -> None:
    lists = questions(3)
    lists["option_log_probabilities"] = [[-1.0, -1.0, bad, -1.0]] * 3
    for column, samples in (
        ("option_log_probabilities", lists),
        ("CIDEr", questions(3).assign(CIDEr=[1.0, bad, 2.0])),
    ):
        with pytest.raises(UserError, match=f"{column!r} holds a NaN"):
            write(tmp_path / "run", samples)
    assert not (tmp_path / "run").exists()


def test_doubled_ids_and_no_samples_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="id 'q0' is doubled"):
        write(tmp_path / "run", pd.concat([questions(2)] * 2))
    with pytest.raises(UserError, match="no samples"):
        write(tmp_path / "run", questions(2).iloc[:0])
    assert not (tmp_path / "run").exists()


def test_an_output_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write(tmp_path / "file" / "run")


def test_a_failed_write_leaves_the_old_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cwdpo_bench.evaluate.results.pq.write_table", full_disk)
    with pytest.raises(UserError, match="No space left on device"):
        write(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such run folder"):
        read_run(tmp_path / "none")
    with pytest.raises(UserError, match=r"results\.json: no such file"):
        read_run(tmp_path)


def set_key(path: Path, keys: tuple[str, ...], value: object) -> None:
    content = json.loads((path / "results.json").read_text())
    place = content
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    (path / "results.json").write_text(json.dumps(content))


ACCURACY = ("tasks", "mmmu", "metrics", "accuracy")


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("schema",), 2, "'schema' must be 1"),
        (("model",), {}, r"model\.name must be text"),
        (("signature",), None, "signature must be text"),
        (("tasks",), [], "tasks must be an object"),
        (("tasks", "mmmu", "n"), "30", r"tasks\.mmmu\.n must be a whole number"),
        (("tasks", "mmmu", "n"), 31, "30 samples, results.json says 31"),
        (("tasks", "mmmu", "groups"), None, r"tasks\.mmmu\.groups must be an object"),
        (ACCURACY, {"value": 1.0}, r"metrics\.accuracy: no stderr, ci95"),
        ((*ACCURACY, "value"), None, r"metrics\.accuracy\.value must be a finite number"),
        ((*ACCURACY, "value"), True, r"metrics\.accuracy\.value must be a finite number"),
        ((*ACCURACY, "value"), float("nan"), "NaN is not a number"),
        ((*ACCURACY, "ci95"), [0.1], r"metrics\.accuracy\.ci95 must be two finite numbers"),
        ((*ACCURACY, "higher_is_better"), "yes", "higher_is_better must be true, false or null"),
    ],
)
def test_a_broken_results_file_names_the_key(
    tmp_path: Path, keys: tuple[str, ...], value: object, message: str
) -> None:
    write(tmp_path)
    set_key(tmp_path, keys, value)
    with pytest.raises(UserError, match=message):
        read_run(tmp_path)


def test_broken_samples_are_named(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "samples" / "mmmu.parquet"
    pd.concat([questions(15)] * 2).to_parquet(path)
    with pytest.raises(UserError, match=r"mmmu\.parquet: id 'q0' is doubled"):
        read_run(tmp_path)
    questions().drop(columns="cluster").to_parquet(path)
    with pytest.raises(UserError, match="no column cluster"):
        read_run(tmp_path)
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match="cannot be read as parquet"):
        read_run(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match="no such file; the run is not whole"):
        read_run(tmp_path)


def test_nan_in_samples_is_refused_when_they_are_read(tmp_path: Path) -> None:
    write(tmp_path)
    samples = questions().assign(token_tv=[[0.5, float("nan")]] * 30)
    samples.to_parquet(tmp_path / "samples" / "mmmu.parquet")
    with pytest.raises(UserError, match="column 'token_tv' holds a NaN"):
        read_run(tmp_path).samples("mmmu")


def test_an_unknown_task_of_a_run_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(UserError, match="no task 'mmmmu'; did you mean 'mmmu'"):
        read_run(tmp_path).samples("mmmmu")
