"""Finished answers scored from files, and a clear word for everything that is wrong with them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cwdpo_bench.errors import UserError
from cwdpo_bench.evaluate.meteor import kept_meteor
from cwdpo_bench.evaluate.results import read_run
from cwdpo_bench.evaluate.run_file import locked
from cwdpo_bench.evaluate.score import (
    score_candidates_file,
    score_captions_files,
    score_mmmu_folder,
)


@pytest.fixture(scope="module", autouse=True)
def one_meteor() -> Iterator[None]:
    with kept_meteor():
        yield


def prediction(image: int | str, caption: str = "a dog runs") -> dict[str, Any]:
    return {"image_id": image, "caption": caption}


@pytest.fixture
def files(tmp_path: Path) -> Callable[..., tuple[Path, Path, Path]]:
    """Writes predictions and references of three images, with changes; returns them and output."""

    def write(predictions: object = None, references: object = None) -> tuple[Path, Path, Path]:
        good = {
            "images": [
                {"id": 1, "domain": "in-domain"},
                {"id": 2, "domain": "out-domain"},
                {"id": 3, "domain": "out-domain"},
            ],
            "annotations": [
                {"image_id": n, "id": 10 * n + m, "caption": text}
                for n in (1, 2, 3)
                for m, text in enumerate((f"a dog runs {n}", "the dog is running"))
            ],
        }
        captions = [prediction(n) for n in (3, 1, 2)]
        for name, content, default in (
            ("predictions.json", predictions, captions),
            ("references.json", references, good),
        ):
            value = default if content is None else content
            text = value if isinstance(value, str) else json.dumps(value)
            (tmp_path / name).write_text(text)
        return tmp_path / "predictions.json", tmp_path / "references.json", tmp_path / "run"

    return write


def refused(match: str, task: str, *paths: Path) -> None:
    with pytest.raises(UserError, match=match):
        score_captions_files(task, *paths)
    assert not paths[2].exists()


def test_captions_become_a_run_folder(files: Callable[..., tuple[Path, Path, Path]]) -> None:
    predictions, references, output = files()
    results = score_captions_files("coco", predictions, references, output)
    run = read_run(output)
    assert run.results == results
    assert results["model"]["name"] == "predictions.json"
    assert results["signature"].startswith("cwdpo-bench:")
    task = results["tasks"]["coco"]
    assert task["n"] == 3
    assert {"BLEU-4", "METEOR", "ROUGE-L", "CIDEr"} <= set(task["metrics"])
    assert task["groups"] == {}
    assert "task:coco|n:3|references:" in task["signature"]
    assert task["signature"].endswith("scorer:pycocoevalcap-1.2")
    samples = run.samples("coco")
    assert samples["id"].tolist() == ["1", "2", "3"]
    assert samples["prediction"].tolist() == ["a dog runs"] * 3


def test_nocaps_has_its_domains_as_groups(files: Callable[..., tuple[Path, Path, Path]]) -> None:
    task = score_captions_files("nocaps", *files())["tasks"]["nocaps"]
    assert {name: group["n"] for name, group in task["groups"].items()} == {
        "in-domain": 1,
        "out-domain": 2,
    }
    scores = [task["groups"][d]["metrics"]["CIDEr"]["value"] for d in ("in-domain", "out-domain")]
    # CIDEr of the whole is the mean over its images, so of the domains by size.
    assert task["metrics"]["CIDEr"]["value"] == pytest.approx((scores[0] + 2 * scores[1]) / 3)


def test_an_unknown_task_is_refused_with_the_nearest(
    files: Callable[..., tuple[Path, Path, Path]],
) -> None:
    refused("unknown caption task 'cocoo'; did you mean 'coco'", "cocoo", *files())


@pytest.mark.parametrize(
    ("predictions", "match"),
    [
        ([prediction(1), prediction(2)], r"predictions\.json: no prediction for image id 3 of"),
        (
            [prediction(n) for n in (1, 2, 3, 99)],
            r"references\.json: no reference for image id 99 of",
        ),
        (
            [prediction(1), prediction(2), prediction(2), prediction(3)],
            r"predictions\.json\[2\]: image_id 2 is doubled",
        ),
        (
            [prediction(1), prediction("1"), prediction(2), prediction(3)],
            r"predictions\.json\[1\]: image_id 1 is doubled",
        ),
        (
            [{"image_id": 1, "caption": 5}],
            r"\[0\] \(image_id 1\): 'caption' must be a text, not 5",
        ),
        ([{"image_id": 1, "caption": None}], r"'caption' must be a text, not None"),
        ([{"image_id": 1, "caption": ["a"]}], r"'caption' must be a text, not \['a'\]"),
        ('[{"image_id": 1, "caption": "\\ud83d"}]', r"'caption' is not valid Unicode"),
        ([prediction(1), {"image_id": 2}], r"\[1\] \(image_id 2\): 'caption' must be"),
        ([{"caption": "a"}], r"\[0\]: 'image_id' must be a whole number or a text, not None"),
        ([{"image_id": 1.5, "caption": "a"}], r"'image_id' must be .*, not 1\.5"),
        ([{"image_id": True, "caption": "a"}], r"'image_id' must be .*, not True"),
        ([prediction(1), "a dog"], r"predictions\.json\[1\]: must be an object, not 'a dog'"),
        ({"1": "a dog"}, r"predictions\.json: must be a list of objects"),
        ([], r"predictions\.json: must be a list of objects with at least one"),
        ("[{", r"predictions\.json: line 1: not JSON"),
        ("[NaN]", r"predictions\.json: NaN is not a number"),
    ],
)
def test_wrong_predictions_name_file_record_and_image(
    files: Callable[..., tuple[Path, Path, Path]], predictions: object, match: str
) -> None:
    refused(match, "coco", *files(predictions=predictions))


IMAGES = [{"id": n} for n in (1, 2, 3)]
CAPTIONS = [{"image_id": n, "caption": "a dog"} for n in (1, 2, 3)]


@pytest.mark.parametrize(
    ("references", "match"),
    [
        ([], r"references\.json: must be an object with 'images' and 'annotations'"),
        ({"images": IMAGES}, r"references\.json: annotations: must be a list of objects"),
        ({"annotations": CAPTIONS}, r"references\.json: images: must be a list of objects"),
        (
            {"images": [*IMAGES, {"id": 1}], "annotations": CAPTIONS},
            r"images\[3\]: image id 1 is doubled",
        ),
        (
            {"images": [{"file_name": "x.jpg"}], "annotations": CAPTIONS},
            r"images\[0\]: 'id' must be",
        ),
        (
            {"images": IMAGES, "annotations": CAPTIONS[:2]},
            r"references\.json: no reference for image id 3",
        ),
        (
            {"images": IMAGES[:2], "annotations": CAPTIONS},
            r"annotations\[2\]: image_id 3 is not among 'images'",
        ),
        (
            {"images": IMAGES, "annotations": [{"image_id": 1, "caption": " "}]},
            r"annotations\[0\] \(image_id 1\): 'caption' must be a non-empty text",
        ),
    ],
)
def test_wrong_references_name_file_record_and_image(
    files: Callable[..., tuple[Path, Path, Path]], references: object, match: str
) -> None:
    refused(match, "coco", *files(references=references))


@pytest.mark.parametrize(
    ("image", "match"),
    [
        ({"id": 1}, "'domain' must be a non-empty text"),
        ({"id": 1, "domain": "indomain"}, "unknown domain 'indomain'; did you mean 'in-domain'"),
    ],
)
def test_nocaps_needs_a_domain_an_image(
    files: Callable[..., tuple[Path, Path, Path]], image: dict[str, Any], match: str
) -> None:
    refused(match, "nocaps", *files(references={"images": [image], "annotations": CAPTIONS[:1]}))


def test_a_missing_file_is_named(files: Callable[..., tuple[Path, Path, Path]]) -> None:
    predictions, references, output = files()
    refused(r"none\.json: no such file", "coco", Path("none.json"), references, output)
    refused(r"none\.json: no such file", "coco", predictions, Path("none.json"), output)


def test_a_broken_java_home_is_told_before_anything_is_written(
    files: Callable[..., tuple[Path, Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAVA_HOME", "/nowhere")
    refused("JAVA_HOME=/nowhere: no executable bin/java", "coco", *files())


def test_a_folder_that_is_being_written_is_refused(
    files: Callable[..., tuple[Path, Path, Path]], tmp_path: Path
) -> None:
    predictions, references, output = files()
    folder = mmmu_folder(tmp_path, Math=[record(1)])
    with locked(output):
        with pytest.raises(UserError, match="another run is writing into this folder"):
            score_captions_files("coco", predictions, references, output)
        with pytest.raises(UserError, match="another run is writing into this folder"):
            score_mmmu_folder(folder, output)
    assert not output.exists()


def test_the_replies_of_a_run_without_results_are_kept(
    files: Callable[..., tuple[Path, Path, Path]],
) -> None:
    predictions, references, output = files()
    with locked(output) as connection:
        connection.execute("INSERT INTO replies VALUES (x'00', 'coco', '1', x'00')")
    with pytest.raises(UserError, match=r"replies\.sqlite: holds the replies of a run"):
        score_captions_files("coco", predictions, references, output)
    assert [path.name for path in output.iterdir()] == ["replies.sqlite"]


def test_an_empty_caption_scores_nothing_and_stops_nothing(
    files: Callable[..., tuple[Path, Path, Path]],
) -> None:
    paths = files(predictions=[prediction(1), prediction(2, ""), prediction(3, " \n")])
    score_captions_files("coco", *paths)
    rows = read_run(paths[2]).samples("coco").set_index("id")
    assert rows.loc["1", "METEOR"] > 0
    for empty in ("2", "3"):
        assert rows.loc[empty, "METEOR"] == rows.loc[empty, "CIDEr"] == 0


def test_the_output_of_another_run_is_kept(files: Callable[..., tuple[Path, Path, Path]]) -> None:
    first = score_captions_files("coco", *files())
    assert score_captions_files("coco", *files())["tasks"] == first["tasks"]
    predictions, references, output = files(predictions=[prediction(n, "a cat") for n in (1, 2, 3)])
    with pytest.raises(UserError, match="holds another run"):
        score_captions_files("coco", predictions, references, output)
    assert read_run(output).results["tasks"] == first["tasks"]


# --- MMMU ----------------------------------------------------------------------------------------


def record(number: int, subject: str = "Math", **changes: object) -> dict[str, Any]:
    return {
        "id": f"validation_{subject}_{number}",
        "question_type": "multiple-choice",
        "answer": "B",
        "all_choices": ["A", "B"],
        "index2ans": {"A": "one", "B": "two"},
        "response": "B",
        **changes,
    }


def open_record(number: int, response: str, answer: object) -> dict[str, Any]:
    return {
        "id": f"validation_Math_{number}",
        "question_type": "short-answer",
        "answer": answer,
        "response": response,
    }


def mmmu_folder(tmp_path: Path, **subjects: object) -> Path:
    folder = tmp_path / "model-x"
    for subject, records in subjects.items():
        (folder / subject).mkdir(parents=True)
        text = records if isinstance(records, str) else json.dumps(records)
        (folder / subject / "output.json").write_text(text)
    return folder


def test_an_official_folder_becomes_a_run_folder(tmp_path: Path) -> None:
    folder = mmmu_folder(
        tmp_path,
        Math=[
            record(1),
            record(2, response="A"),
            record(3, response=""),
            open_record(4, "It is 3.43", ["24/7", "3.429"]),
            open_record(5, "", "7"),
        ],
        Art=[record(1, "Art")],
        Alchemy=[record(1, "Alchemy")],
    )
    results = score_mmmu_folder(folder, tmp_path / "run")
    assert read_run(tmp_path / "run").results == results
    assert results["model"]["name"] == "model-x"
    task = results["tasks"]["mmmu"]
    assert task["n"] == 7
    assert task["metrics"]["accuracy"]["value"] == pytest.approx(4 / 7)
    assert task["metrics"]["parse_failures"]["value"] == pytest.approx(2 / 7)
    assert set(task["metrics"]) == {"accuracy", "parse_failures"}
    assert {name: group["n"] for name, group in task["groups"].items()} == {
        "Science": 5,
        "Math": 5,
        "Art and Design": 1,
        "Art": 1,
        "Other": 1,
        "Alchemy": 1,
    }
    assert task["groups"]["Science"]["metrics"]["accuracy"]["value"] == pytest.approx(2 / 5)
    assert any(
        w.startswith("28 subjects of MMMU are missing: Accounting") for w in task["warnings"]
    )
    assert "not subjects of MMMU, under discipline 'Other': Alchemy" in task["warnings"]
    assert any("2 of 7 replies could not be parsed" in w for w in task["warnings"])


def test_guesses_are_another_run_than_wrong_answers(tmp_path: Path) -> None:
    folder = mmmu_folder(tmp_path, Math=[record(n, response="?") for n in range(40)])
    wrong = score_mmmu_folder(folder, tmp_path / "wrong")["tasks"]["mmmu"]["metrics"]
    guessed = score_mmmu_folder(folder, tmp_path / "random", "random")["tasks"]["mmmu"]["metrics"]
    assert wrong["accuracy"]["value"] == 0
    assert 0.2 < guessed["accuracy"]["value"] < 0.8
    assert wrong["parse_failures"]["value"] == guessed["parse_failures"]["value"] == 1
    with pytest.raises(UserError, match=r"holds another run .*parse_failures:wrong"):
        score_mmmu_folder(folder, tmp_path / "wrong", "random")


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in record(1).items() if name != key}


@pytest.mark.parametrize(
    ("records", "match"),
    [
        ("[", r"Math/output\.json: line 1: not JSON"),
        ({"a": 1}, r"Math/output\.json: must be a list of objects"),
        ([record(0), 7], r"Math/output\.json\[1\]: must be an object"),
        ([without("id")], r"output\.json\[0\]: 'id' must be a non-empty text, not None"),
        (
            [without("response")],
            r"output\.json\[0\]: 'response' must be the model's text, not None",
        ),
        ([record(1, response=3)], "'response' must be the model's text, not 3"),
        ([without("answer")], r"\(id validation_Math_1\): 'answer' must be a text"),
        ([record(1, answer="C")], "'answer' 'C' is none of the letters A, B"),
        ([record(1, answer="?")], r"'answer' '\?' is none of the letters A, B"),
        ([without("question_type")], "'question_type' must be a non-empty text"),
        (
            [record(1, question_type="multiple_choice")],
            "unknown question_type 'multiple_choice'; did you mean 'multiple-choice'",
        ),
        ([without("all_choices")], "needs a list 'all_choices' and an object 'index2ans'"),
        ([without("index2ans")], "needs a list 'all_choices' and an object 'index2ans'"),
        ([record(1, all_choices=["A", "C"])], "must be A, B, … in order"),
        ([record(1, index2ans={"A": "one"})], "must be A, B, … in order"),
        ([record(1, index2ans={"A": "one", "B": 2})], "'index2ans' B must be a text, not 2"),
        ([record(1), record(1)], "model-x: id 'validation_Math_1' is doubled"),
    ],
)
def test_wrong_records_name_file_record_and_key(
    tmp_path: Path, records: object, match: str
) -> None:
    folder = mmmu_folder(tmp_path, Math=records)
    with pytest.raises(UserError, match=match):
        score_mmmu_folder(folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_of_another_layout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        score_mmmu_folder(tmp_path / "none", tmp_path / "run")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: no <Subject>/output\.json in it"):
        score_mmmu_folder(tmp_path / "empty", tmp_path / "run")
    folder = mmmu_folder(tmp_path, Math=[record(1)])
    with pytest.raises(UserError, match="'guess'; known: random, wrong"):
        score_mmmu_folder(folder, tmp_path / "run", "guess")  # type: ignore[arg-type]


def test_scoring_loads_no_model_library() -> None:
    code = (
        "import sys, cwdpo_bench.evaluate.score\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- captions scored alone -----------------------------------------------------------------------


def test_every_candidate_gets_its_own_values(
    files: Callable[..., tuple[Path, Path, Path]], tmp_path: Path
) -> None:
    rated = [
        {**prediction(1, "a dog runs 1"), "ratings": [4, 4, 3], "id": "x"},
        {**prediction(1, "a cat sleeps"), "ratings": [1, 1, 1], "id": "y"},
        {**prediction(3, "a dog runs 1"), "ratings": [3, 2, 3], "id": "z"},
    ]
    predictions, references, _ = files(predictions=rated)
    output = tmp_path / "values.jsonl"
    lines = score_candidates_file("coco", predictions, references, output)
    assert [json.loads(line) for line in output.read_text().splitlines()] == lines
    assert [line["id"] for line in lines] == ["x", "y", "z"]
    assert lines[0]["ratings"] == [4, 4, 3]
    metrics = {*(f"BLEU-{n}" for n in range(1, 5)), "METEOR", "ROUGE-L", "CIDEr", "CIDEr-plain"}
    assert metrics <= set(lines[0])
    assert lines[0]["METEOR"] == lines[0]["ROUGE-L"] == 1.0
    for name in metrics:
        assert lines[0][name] > lines[2][name] >= lines[1][name], name
    # Alone it has the same values: nothing of the other candidates is in them.
    alone = score_candidates_file("coco", *files(predictions=rated[2:])[:2], output)
    assert alone == lines[2:]


@pytest.mark.parametrize(
    ("predictions", "match"),
    [
        ([prediction(1), prediction(9)], "no reference for image id 9"),
        ([{"image_id": 1, "caption": 1}], r"predictions.json\[0\].*caption"),
        ([{**prediction(1), "CIDEr": 1}], "record 0: key 'CIDEr' names a metric"),
        ([], "list of objects"),
    ],
)
def test_wrong_candidates_are_named(
    files: Callable[..., tuple[Path, Path, Path]], predictions: object, match: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=match):
        score_candidates_file("coco", *files(predictions=predictions)[:2], tmp_path / "v.jsonl")
    assert not (tmp_path / "v.jsonl").exists()
