"""Runs that are cut off: what was kept is not asked again, and the results have the same bytes.

The engine here answers by arithmetic, and every answer depends on what else is in its call, as the
last bits of a model's do: only a run that asks in the same groups ends with the same results.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import forking
from cwdpo_bench.errors import UserError
from cwdpo_bench.evaluate import run as run_module
from cwdpo_bench.evaluate.asking import Asker, Failures
from cwdpo_bench.evaluate.engine import CaptionAnswer, ChoiceAnswer, Failure
from cwdpo_bench.evaluate.plan import CaptionJob, plan_tasks
from cwdpo_bench.evaluate.results import RunFolder, read_run
from cwdpo_bench.evaluate.run import run_tasks
from cwdpo_bench.evaluate.run_file import FILE
from cwdpo_bench.evaluate.samples import CaptionSample, ChoiceSample
from cwdpo_bench.evaluate.store import open_store
from cwdpo_bench.vlm import VLM, TokenScores

Sample = CaptionSample | ChoiceSample


class Arithmetic:
    """An engine without a model; stands in for `InProcessEngine` and takes its arguments."""

    name = "hf"
    model = {"name": "arithmetic"}  # noqa: RUF012
    signature_parts = {"engine": "hf", "dtype": "float64"}  # noqa: RUF012
    provenance = {"device": "none"}  # noqa: RUF012
    shift_from = None
    draws = 0
    chunk_size = 3
    weights = "one"
    seconds = 0.0
    log: Path | None = None
    failing: frozenset[str] = frozenset()

    def __init__(self, *_: object) -> None:
        self.calls: list[list[str]] = []

    def fingerprint(self) -> str:
        return self.weights

    def answer_captions(
        self, samples: Sequence[CaptionSample], *, max_new_tokens: int
    ) -> Iterator[tuple[int, CaptionAnswer | Failure]]:
        for place, draw in self._draws(samples):
            if draw is None:
                yield place, Failure(f"sample {samples[place].id}: will not")
                continue
            values = draw.random(4).astype(np.float32)
            scores = TokenScores(-values, values, values, values > 0.5, None, None)
            words = draw.choice(["a", "red", "thing", "number", "one"], 5)
            yield place, CaptionAnswer(" ".join(words), scores)

    def answer_choices(
        self, samples: Sequence[ChoiceSample], *, max_new_tokens: int
    ) -> Iterator[tuple[int, ChoiceAnswer | Failure]]:
        for place, draw in self._draws(samples):
            if draw is None:
                yield place, Failure(f"sample {samples[place].id}: will not")
                continue
            options = samples[place].options
            logps = np.log(draw.dirichlet(np.ones(len(options)))) if options else None
            yield place, ChoiceAnswer(str(draw.choice(["A", "B", "none"])), logps)

    def _draws(self, samples: Sequence[Sample]) -> Iterator[tuple[int, np.random.Generator | None]]:
        ids = [sample.id for sample in samples]
        self.calls.append(ids)
        if self.log is not None:
            with self.log.open("a") as file:
                file.write("".join(f"{name}\n" for name in ids))
        # A group of one promises that no reply depends on its company.
        company = ids if self.chunk_size > 1 else []
        for place in reversed(range(len(samples))):
            time.sleep(self.seconds)
            seed = hashlib.sha256(json.dumps([ids[place], company]).encode()).digest()
            failed = ids[place] in self.failing
            yield place, None if failed else np.random.default_rng(list(seed))


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> type[Arithmetic]:
    """A class of its own, set by each test, in the place of the in-process engine."""

    class Mine(Arithmetic):
        pass

    monkeypatch.setattr(run_module, "InProcessEngine", Mine)
    return Mine


MODEL = VLM(model=None, processor=None, name="arithmetic")


def _run(root: Path, output: Path, tasks: Sequence[str] | None = None, **more: Any) -> RunFolder:
    return run_tasks(MODEL, tasks=tasks, data_root=root, output=output, **more)


def _bytes(folder: Path) -> dict[str, bytes]:
    """Everything that results are made of."""
    files = [folder / "results.json", *sorted((folder / "samples").iterdir())]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def _stored(folder: Path) -> set[str]:
    with open_store(folder) as store:
        return {f"{t}/{s}" for t, s in store._run("SELECT task, sample FROM replies")}


def _start(root: Path, output: Path) -> None:
    os.close(2)
    _run(root, output, ["mmbench", "mmmu"])
    os._exit(0)


@pytest.mark.parametrize("chunk_size", [1, 3])
def test_a_run_killed_twenty_times_ends_with_the_same_bytes_and_asks_nothing_twice(
    engine: type[Arithmetic], data_root: Path, tmp_path: Path, chunk_size: int
) -> None:
    engine.chunk_size = chunk_size
    whole = _run(data_root, tmp_path / "whole", ["mmbench", "mmmu"])
    engine.seconds, engine.log = 0.02, tmp_path / "asked"
    output, draw = tmp_path / "killed", random.Random(chunk_size)
    context = multiprocessing.get_context("fork")
    kills = 0
    for _ in range(40):
        before = _stored(output) if (output / FILE).exists() else set()
        engine.log.write_text("")
        child = context.Process(target=_start, args=(data_root, output))
        child.start()
        if kills < 20:
            child.join(draw.uniform(0, 0.25))
            if child.is_alive():
                assert child.pid is not None
                os.kill(child.pid, signal.SIGKILL)
                kills += 1
        child.join(60)
        asked = set(engine.log.read_text().split())
        assert not asked & {name.partition("/")[2] for name in before}
        if kills == 20 and child.exitcode == 0:
            break
        if child.exitcode == 0:
            # Done before the twentieth kill: begin anew.
            assert _bytes(output) == _bytes(whole.path)
            shutil.rmtree(output)
    assert kills == 20
    assert _bytes(output) == _bytes(whole.path)
    assert not list(output.rglob("*.tmp"))


def test_a_finished_run_is_not_asked_again(
    engine: type[Arithmetic], data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _run(data_root, tmp_path / "run", ["mmmu", "mmbench"])
    before = _bytes(first.path)

    def refuse(*_: object) -> Any:
        raise AssertionError("asked")

    monkeypatch.setattr(engine, "_draws", refuse)
    _run(data_root, tmp_path / "run", ["mmmu", "mmbench"])
    assert _bytes(tmp_path / "run") == before


def test_other_weights_under_the_same_name_are_asked_anew(
    engine: type[Arithmetic], data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _run(data_root, tmp_path / "run", ["mmbench"])
    engine.weights, engine.log = "two", tmp_path / "asked"
    _run(data_root, tmp_path / "run", ["mmbench"])
    assert len(engine.log.read_text().split()) == 5
    assert "5 replies of other weights or settings dropped" in capsys.readouterr().err


def test_another_picture_under_the_same_name_is_asked_anew(
    engine: type[Arithmetic], data_root: Path, tmp_path: Path
) -> None:
    job = plan_tasks(["coco"], data_root, None)[0][0]
    assert isinstance(job, CaptionJob)

    def ask() -> list[list[str]]:
        mine = engine()
        with open_store(tmp_path) as store:
            Asker(mine, store, data_root, Failures(0)).captions(job, lambda: None)
        return mine.calls

    assert (ask(), ask()) == ([["101", "102", "103"]], [])
    picture = data_root / "coco/val2014/COCO_val2014_000000000003.jpg"
    shutil.copy(data_root / "flickr30k/flickr30k-images/1007129816.jpg", picture)
    assert ask() == [["103"]]


def test_replies_of_another_run_are_refused_even_without_results(
    engine: type[Arithmetic], data_root: Path, tmp_path: Path
) -> None:
    engine.failing = frozenset({"9-1"})
    engine.chunk_size = 1
    with pytest.raises(UserError, match="sample 9-1: will not"):
        _run(data_root, tmp_path / "run", ["mmmu", "mmbench"])
    assert not (tmp_path / "run/results.json").exists()
    with pytest.raises(UserError, match=r"replies\.sqlite: holds another run .*limit"):
        _run(data_root, tmp_path / "run", ["mmmu"], limit=1)
    engine.failing = frozenset()
    engine.log = tmp_path / "asked"
    _run(data_root, tmp_path / "run", ["mmmu", "mmbench"])
    assert all(name[0] in "79" for name in engine.log.read_text().split())


def test_a_second_run_into_one_folder_is_refused(
    engine: type[Arithmetic], data_root: Path, tmp_path: Path
) -> None:
    with (
        open_store(tmp_path / "run"),
        pytest.raises(UserError, match="another run is writing into this folder"),
    ):
        _run(data_root, tmp_path / "run", ["mmbench"])


# --- samples that fail ---------------------------------------------------------------------------


def test_failures_that_are_allowed_are_told_counted_and_left_out(
    engine: type[Arithmetic], data_root: Path, tmp_path: Path
) -> None:
    engine.failing = frozenset({"102", "validation_Math_2"})
    folder = _run(data_root, tmp_path / "run", ["coco", "mmmu"], max_failures=2)
    tasks = folder.results["tasks"]
    assert tasks["coco"]["failures"] == {"102": "sample 102: will not"}
    assert tasks["mmmu"]["failures"] == {"validation_Math_2": "sample validation_Math_2: will not"}
    assert tasks["coco"]["warnings"][0] == "1 of 3 samples failed and are left out (first: 102)"
    assert list(folder.samples("coco")["id"]) == ["101", "103"]
    assert (tasks["coco"]["n"], tasks["mmmu"]["n"]) == (2, 3)
    assert read_run(folder.path).results == folder.results
    engine.failing = frozenset()
    mended = _run(data_root, tmp_path / "run", ["mmmu"], max_failures=2).results["tasks"]
    assert "failures" not in mended["mmmu"]
    assert mended["mmmu"]["n"] == 4
    assert mended["coco"] == tasks["coco"]


def test_one_failure_too_many_stops_the_run_and_keeps_the_rest(
    engine: type[Arithmetic], data_root: Path, tmp_path: Path
) -> None:
    engine.failing = frozenset({"102", "validation_Math_2"})
    with pytest.raises(UserError, match=r"2 samples failed, 1 may; the last: sample valid.*--max"):
        _run(data_root, tmp_path / "run", ["coco", "mmmu"], max_failures=1)
    assert _stored(tmp_path / "run") >= {"coco/101", "coco/103"}
    with pytest.raises(UserError, match="0 or more"):
        _run(data_root, tmp_path / "other", max_failures=-1)


def test_a_question_goes_with_one_of_its_orders(
    engine: type[Arithmetic], data_root: Path, tmp_path: Path
) -> None:
    engine.failing = frozenset({"7-1"})
    folder = _run(data_root, tmp_path / "run", ["mmbench"], max_failures=1)
    task = folder.results["tasks"]["mmbench"]
    assert set(folder.samples("mmbench")["id"]) == {"9-0", "9-1"}
    assert task["n"] == 1
    assert task["warnings"][0] == (
        "1 of 5 samples failed and are left out, with 2 other orders of their questions "
        "(first: 7-1)"
    )


def test_the_others_captions_score_as_if_nothing_had_failed(
    engine: type[Arithmetic], data_root: Path, tmp_path: Path
) -> None:
    engine.chunk_size = 1
    whole = _run(data_root, tmp_path / "whole", ["coco"]).samples("coco").set_index("id")
    engine.failing = frozenset({"102"})
    part = _run(data_root, tmp_path / "part", ["coco"], max_failures=1).samples("coco")
    assert part.set_index("id").to_json() == whole.drop(index="102").to_json()


def test_a_task_of_which_nothing_is_left_stops_the_run(
    engine: type[Arithmetic], data_root: Path, tmp_path: Path
) -> None:
    engine.failing = frozenset({"101", "102", "103"})
    with pytest.raises(UserError, match=r"coco: 3 of 3 samples failed.*nothing is left"):
        _run(data_root, tmp_path / "run", ["coco"], max_failures=9)


def test_a_picture_that_is_not_there_may_be_allowed(
    tiny_model_folder: Path, data_root: Path, tmp_path: Path
) -> None:
    (data_root / "coco/val2014/COCO_val2014_000000000002.jpg").unlink()
    (data_root / "coco/val2014/COCO_val2014_000000000003.jpg").write_bytes(b"no picture")
    folder = run_tasks(
        tiny_model_folder,
        tasks=["coco"],
        data_root=data_root,
        output=tmp_path / "run",
        max_failures=2,
    )
    failures = folder.results["tasks"]["coco"]["failures"]
    assert "does not exist" in failures["102"]
    assert "broken" in failures["103"]


@pytest.mark.slow
def test_a_models_run_killed_twenty_times_ends_with_the_same_bytes_and_asks_nothing_twice(
    tiny_model_folder: Path, data_root: Path, tmp_path: Path
) -> None:
    def begin(output: Path) -> multiprocessing.process.BaseProcess:
        return forking.begin(
            forking.run_and_note,
            asked=tmp_path / "asked",
            model=tiny_model_folder,
            # No captions: METEOR's Java would take most of each run.
            tasks=["mmmu", "mmbench"],
            data_root=data_root,
            output=output,
            batch_size=1,
        )

    forking.finish(begin, tmp_path / "first")
    seconds = forking.finish(begin, tmp_path / "whole")
    draw, runs, kills = random.Random(0), 0, 0
    while kills < 20:
        output = tmp_path / f"killed-{runs}"
        before = _stored(output) if (output / FILE).exists() else set()
        (tmp_path / "asked").write_text("")
        process = begin(output)
        process.join(draw.uniform(0, 0.9) * seconds)
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
        else:
            # A run that goes on often is over sooner or later: then the next one begins.
            assert process.exitcode == 0
            assert _bytes(output) == _bytes(tmp_path / "whole")
            runs += 1
        asked = set((tmp_path / "asked").read_text().split())
        assert not asked & {name.partition("/")[2] for name in before}
        assert not (output / FILE).exists() or before <= _stored(output)
    forking.finish(begin, output)
    assert _bytes(output) == _bytes(tmp_path / "whole")
