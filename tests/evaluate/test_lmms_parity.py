"""The named benchmarks from lmms-eval's data sets against lmms-eval's own task objects.

There is no hub in tests: the sets are written here, with the columns of lmms-eval's, and its own
definitions are read with nothing but the place of the set changed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cwdpo_bench.errors import UserError
from cwdpo_bench.evaluate.choices import choice_rows
from cwdpo_bench.evaluate.images import open_images
from cwdpo_bench.evaluate.lmms import load_tasks
from cwdpo_bench.evaluate.lmms_sets import load_from_lmms, samples_digest
from cwdpo_bench.evaluate.run import run_tasks
from cwdpo_bench.evaluate.samples import CaptionSample

lmms_eval = pytest.importorskip("lmms_eval")
datasets = pytest.importorskip("datasets")

HOME = Path(lmms_eval.__file__).parent / "tasks"
COLOURS = ("red", "green", "blue", "white", "black", "yellow")


def picture(number: int) -> Image.Image:
    return Image.new("RGB", (40 + number, 32), COLOURS[number % len(COLOURS)])


def _images(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> Any:
    features = datasets.Dataset.from_list(
        [{k: v for k, v in row.items() if k not in columns} for row in rows]
    ).features.copy()
    for column in columns:
        features[column] = datasets.Image()
    return datasets.Dataset.from_list(rows, features=datasets.Features(features))


def coco_rows() -> list[dict[str, Any]]:
    return [
        {
            "filepath": "val2014",
            "sentids": [1, 2],
            "filename": f"COCO_val2014_{100 + n:012}.jpg",
            "imgid": n,
            "split": "test",
            "sentences": [f"a thing number {n} .", f"there is number {n} \n"],
            "cocoid": 100 + n,
            "url": f"http://localhost:9/{n}.jpg",
        }
        for n in range(3)
    ]


def flickr_rows() -> list[dict[str, Any]]:
    return [
        {
            "image": picture(n),
            "caption": [f"a person number {n} .", "someone ."],
            "sentids": ["1", "2"],
            "img_id": str(n),
            "filename": f"10071298{n}.jpg",
        }
        for n in range(4)
    ]


def nocaps_rows() -> list[dict[str, Any]]:
    return [
        {
            "image": picture(n),
            "image_coco_url": "",
            "image_date_captured": "",
            "image_file_name": f"{n:016x}.jpg",
            "image_height": 32,
            "image_width": 40,
            "image_id": n,
            "image_license": 0,
            "image_open_images_id": f"{n:016x}",
            "annotations_ids": [2 * n, 2 * n + 1],
            "annotations_captions": [f"a {domain}", f"one {domain} thing"],
            "image_domain": domain,
        }
        for n, domain in enumerate(("in-domain", "near-domain", "out-domain"))
    ]


def mmmu_rows() -> list[dict[str, Any]]:
    empty = {f"image_{k}": None for k in range(1, 8)}
    first = {
        "id": "validation_Art_Theory_1",
        "question": "What is shown? <image 1>",
        "options": "['a car', 'a cat', 'None']",
        "explanation": "",
        **empty,
        "image_1": picture(0),
        "img_type": "['Photographs']",
        "answer": "B",
        "topic_difficulty": "Easy",
        "question_type": "multiple-choice",
        "subfield": "x",
    }
    second = {
        **first,
        "id": "validation_Math_2",
        "question": "Which?",
        "options": "['<image 2>', '<image 1>']",
        "answer": "A",
        "image_1": picture(1),
        "image_2": picture(2),
    }
    third = {
        **first,
        "id": "validation_Math_3",
        "question": "How many? <image 1>",
        "options": "[]",
        "answer": "['24/7', '3.429']",
        "question_type": "open",
    }
    return [first, second, third]


def mmbench_rows() -> list[dict[str, Any]]:
    first = {
        "index": 7,
        "question": "Which colour?",
        "hint": "nan",
        "answer": "B",
        "A": "red",
        "B": "white",
        "C": "None",
        "D": "nan",
        "category": "colour",
        "image": picture(3),
        "source": "made",
        "L2-category": "attribute",
        "comment": "nan",
        "split": "dev",
    }
    second = {**first, "index": 9, "question": "How many?", "hint": "Count.", "answer": "A"}
    second |= {"A": "1", "B": "2", "C": "nan", "image": picture(4)}
    copy = {**first, "index": 1000007, "A": "white", "B": "None", "C": "red", "answer": "A"}
    return [first, second, copy]


def pope_rows() -> list[dict[str, Any]]:
    return [
        {
            "id": str(n),
            "question_id": str(n // 3 + 1),
            "question": f"Is there a {('dog', 'cat')[n % 2]} in the image?",
            "answer": ("yes", "no")[n % 2],
            "image_source": f"COCO_val2014_{n // 3:012}",
            "image": picture(n),
            "category": ("adversarial", "popular", "random")[n % 3],
        }
        for n in range(6)
    ]


_MMMU_IMAGES = tuple(f"image_{k}" for k in range(1, 8))
SETS: dict[str, tuple[str, str, str, Any, tuple[str, ...]]] = {
    "coco": ("coco_cap/coco_karpathy_test.yaml", "coco_karpathy_test", "test", coco_rows, ()),
    "flickr30k": (
        "flickr30k/flickr30k_test.yaml",
        "flickr30k_test",
        "test",
        flickr_rows,
        ("image",),
    ),
    "nocaps": ("nocaps/nocaps_val.yaml", "nocaps_val", "validation", nocaps_rows, ("image",)),
    "mmmu": ("mmmu/mmmu_val.yaml", "mmmu_val", "validation", mmmu_rows, _MMMU_IMAGES),
    "mmbench": ("mmbench/mmbench_en_dev.yaml", "mmbench_en_dev", "dev", mmbench_rows, ("image",)),
    "pope": ("pope/pope.yaml", "pope", "test", pope_rows, ("image",)),
}
"""Our name → lmms-eval's file, task and split, rows, columns of images."""


def write_set(folder: Path, name: str) -> None:
    """The rows as parquet, and lmms-eval's own definition with nothing but the place changed."""
    origin, task, split, rows, images = SETS[name]
    folder.mkdir(parents=True, exist_ok=True)
    _images(rows(), images).to_parquet(folder / f"{name}.parquet")
    (folder / f"{task}.yaml").write_text(
        f"include: {HOME / origin}\n"
        f"task: {task}\n"
        "dataset_path: parquet\n"
        "dataset_name: null\n"
        "dataset_kwargs:\n"
        "  data_files:\n"
        f"    {split}: {folder / f'{name}.parquet'}\n"
    )


def _karpathy(root: Path) -> None:
    """The split of Flickr30k's rows: two of four are test images."""
    (root / "flickr30k").mkdir(parents=True)
    images = [
        {"filename": row["filename"], "split": "test" if n % 2 else "train"}
        for n, row in enumerate(flickr_rows())
    ]
    (root / "flickr30k/dataset_flickr30k.json").write_text(json.dumps({"images": images}))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The definitions in `yaml/`, a data root with next to nothing in `data/`."""
    folder = tmp_path_factory.mktemp("lmms")
    for name in SETS:
        write_set(folder / "yaml", name)
    _karpathy(folder / "data")
    return folder


def _ours(home: Path, name: str) -> Any:
    return load_from_lmms(name, home / "data", home / "yaml")


def _theirs(home: Path, name: str) -> Any:
    task = SETS[name][1]
    return load_tasks(task, home / "yaml")[task]


def _row_of(name: str, sample: Any, docs: Any) -> dict[str, Any]:
    """The document that a sample was made of."""
    keys = {
        "coco": lambda doc: str(doc["cocoid"]),
        "flickr30k": lambda doc: Path(doc["filename"]).stem,
        "nocaps": lambda doc: str(doc["image_id"]),
        "mmmu": lambda doc: doc["id"],
        "mmbench": lambda doc: str(doc["index"]),
        "pope": lambda doc: f"{doc['category']}-{doc['question_id']}",
    }
    wanted = sample.cluster if name == "mmbench" else sample.id
    return next(doc for doc in docs if keys[name](doc) == wanted)


@pytest.mark.parametrize("name", ["flickr30k", "nocaps", "mmmu", "mmbench", "pope"])
def test_prompts_are_those_of_lmms_evals_task(home, name):
    task = _theirs(home, name)
    for sample in _ours(home, name):
        if getattr(sample, "shift", 0) == 0:
            assert sample.prompt == task.doc_to_text(_row_of(name, sample, task.task_docs))


def test_cocos_prompt_differs_on_purpose(home):
    task = _theirs(home, "coco")

    assert task.doc_to_text(task.task_docs[0]) == "Describe the image briefly."
    assert {s.prompt for s in _ours(home, "coco")} == {
        "Provide a one-sentence caption for the provided image."
    }


@pytest.mark.parametrize("name", ["flickr30k", "nocaps", "mmmu", "mmbench", "pope"])
def test_images_are_those_of_lmms_evals_task(home, name):
    task = _theirs(home, name)
    for sample in _ours(home, name):
        theirs = task.doc_to_visual(_row_of(name, sample, task.task_docs))
        ours = open_images(sample, home / "data")
        assert len(ours) == len(theirs) > 0
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_mmmus_second_question_has_two_images_in_their_order(home):
    second = _ours(home, "mmmu")[1]

    assert [image.size for image in open_images(second, home)] == [(41, 32), (42, 32)]


@pytest.mark.parametrize("name", list(SETS))
def test_golds_are_those_of_lmms_evals_task(home, name):
    task = _theirs(home, name)
    for sample in _ours(home, name):
        doc = _row_of(name, sample, task.task_docs)
        if isinstance(sample, CaptionSample):
            result = task.process_results(doc, ["a reply"])
            gold = next(iter(result.values()))["answer"]
            assert list(sample.references) == [text.strip() for text in gold]
        elif name == "pope":
            assert sample.options["AB".index(sample.gold)].lower() == task.doc_to_target(doc)
        elif name == "mmbench":
            assert sample.options["ABCD".index(sample.gold)] == doc[task.doc_to_target(doc)]
        else:
            gold = task.doc_to_target(doc)
            assert sample.gold == (str(gold) if isinstance(gold, list) else gold)


def _is_right_for_lmms_eval(task: Any, sample: Any, reply: str) -> bool:
    doc = _row_of("mmmu", sample, task.task_docs)
    result = task.process_results(doc, [reply])["mmmu_acc"]
    return bool(task.aggregation()["mmmu_acc"]([result]) == 1.0)


def test_an_mmmu_reply_is_right_where_it_is_for_lmms_eval(home):
    task, samples = _theirs(home, "mmmu"), _ours(home, "mmmu")
    for replies in (["B", "(A)", "7"], ["C", "B", "no number"], ["The answer is B", "A", "-1"]):
        rows = choice_rows(samples, replies, rules="mmmu")
        for sample, reply, correct in zip(samples, replies, rows["correct"], strict=True):
            assert bool(correct) == _is_right_for_lmms_eval(task, sample, reply), reply


def test_one_of_several_accepted_answers_is_right_as_in_mmmus_own_code(home):
    """lmms-eval 0.7 looks for the text of the whole list in the reply."""
    sample = _ours(home, "mmmu")[2]

    assert sample.gold == "['24/7', '3.429']"
    assert bool(choice_rows([sample], ["24/7"], rules="mmmu")["correct"].iloc[0])
    assert not _is_right_for_lmms_eval(_theirs(home, "mmmu"), sample, "24/7")


def test_the_copies_of_mmbench_are_left_out(home):
    assert [s.id for s in _ours(home, "mmbench")] == ["7-0", "7-1", "7-2", "9-0", "9-1"]


def test_of_flickr30k_only_the_split_is_taken(home, tmp_path):
    assert [s.id for s in _ours(home, "flickr30k")] == ["100712981", "100712983"]
    with pytest.raises(UserError, match=r"dataset_flickr30k\.json, which is not there"):
        load_from_lmms("flickr30k", tmp_path, home / "yaml")


def test_coco_takes_the_pictures_that_lie_under_the_root(home, tmp_path):
    (tmp_path / "coco/val2014").mkdir(parents=True)
    name = coco_rows()[1]["filename"]
    picture(1).save(tmp_path / "coco/val2014" / name)
    samples = load_from_lmms("coco", tmp_path, home / "yaml")

    assert samples[1].image == Path("coco/val2014") / name
    assert open_images(samples[1], tmp_path)[0].size == (41, 32)
    with pytest.raises(UserError, match="sample 100: images of lmms:coco_karpathy_test row 0"):
        open_images(samples[0], tmp_path)


def test_the_digest_is_of_what_is_asked_and_right(home):
    samples = _ours(home, "mmmu")

    assert samples_digest(samples) == samples_digest(_ours(home, "mmmu"))
    assert samples_digest(samples) != samples_digest(samples[:2])


def test_a_run_reads_what_the_root_lacks_from_lmms_eval(home, tiny_model_folder, tmp_path):
    folder = run_tasks(
        tiny_model_folder,
        tasks=["nocaps", "mmmu", "mmbench"],
        data_root=home / "data",
        output=tmp_path / "run",
        include_path=home / "yaml",
    )
    tasks = folder.results["tasks"]

    assert list(tasks) == ["nocaps", "mmmu", "mmbench"]
    assert [tasks[name]["n"] for name in tasks] == [3, 3, 2]
    assert "/mmmu_val" in tasks["mmmu"]["signature"]
    assert set(tasks["nocaps"]["groups"]) == {"in-domain", "near-domain", "out-domain"}
    assert "accuracy_plain" in tasks["mmbench"]["metrics"]
