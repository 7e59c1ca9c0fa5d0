"""The layouts: official columns, same seed same bytes, no scene in two splits."""

import ast
import base64
import csv
import hashlib
import io
import json
import random

import pyarrow.parquet as pq
import pytest
from PIL import Image

from cwdpo_bench.demo import base_path, data_root, layouts
from cwdpo_bench.demo.layouts import SMOKE, BenchmarkSizes, Sizes, write_world
from cwdpo_bench.demo.pretrain import Plan, draw_scenes
from cwdpo_bench.errors import UserError
from cwdpo_bench.evaluate.coco import load_coco
from cwdpo_bench.evaluate.pope import SETTINGS, load_pope

_SIZES = Sizes(
    train_pairs=40,
    probe_pairs=8,
    test=BenchmarkSizes(coco=12, flickr30k=6, nocaps=4, mmmu=25, mmbench=12),
    validation=BenchmarkSizes(coco=6, flickr30k=4, nocaps=2, mmmu=10, mmbench=6),
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    write_world(root, seed=0, sizes=_SIZES)
    return root


def _digest(root):
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def _image(data):
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        return image


def test_same_seed_same_bytes_and_another_seed_other_scenes(world, tmp_path):
    write_world(tmp_path / "again", seed=0, sizes=_SIZES)
    write_world(tmp_path / "other", seed=1, sizes=_SIZES)
    assert _digest(world) == _digest(tmp_path / "again")
    first, second = _digest(world), _digest(tmp_path / "other")
    assert set(first) == set(second)
    assert not set(first.values()) & set(second.values())


@pytest.mark.parametrize("side", ["", "validation"])
@pytest.mark.parametrize(("name", "folder"), [("coco", None), ("flickr30k", "flickr30k-images")])
def test_caption_sets_have_karpathys_form(world, side, name, folder):
    home = world / side / name
    images = json.loads((home / f"dataset_{name}.json").read_text())["images"]
    sizes = _SIZES.validation if side else _SIZES.test
    assert sum(image["split"] == "test" for image in images) == getattr(sizes, name)
    assert any(image["split"] == "val" for image in images)
    for image in images:
        path = home / (folder or image["filepath"]) / image["filename"]
        assert _image(path.read_bytes()).size == (84, 84)
        assert len(image["sentences"]) == len(image["sentids"]) == 5
        for sentence, sentid in zip(image["sentences"], image["sentids"], strict=True):
            assert (sentence["imgid"], sentence["sentid"]) == (image["imgid"], sentid)
            assert " ".join(sentence["tokens"]) == sentence["raw"].replace(",", "").rstrip(".")
    sentids = [sentid for image in images for sentid in image["sentids"]]
    assert len(set(sentids)) == len(sentids)


def test_nocaps_has_coco_form_with_domains(world):
    content = json.loads((world / "nocaps/nocaps_val_4500_captions.json").read_text())
    domains = [image["domain"] for image in content["images"]]
    assert {d: domains.count(d) for d in set(domains)} == dict.fromkeys(layouts.DOMAINS, 4)
    captions = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        captions[annotation["image_id"]].append(annotation["caption"])
    assert all(len(texts) == 10 for texts in captions.values())
    for image in content["images"]:
        assert (world / "nocaps/images" / image["file_name"]).is_file()
        text = " ".join(captions[image["id"]])
        novel = any(word in text for word in ("pink", "brown", "diamond", "ring"))
        assert novel == (image["domain"] == "out-domain")


def test_mmmu_has_the_official_columns(world):
    files = sorted((world / "mmmu").glob("*/validation-00000-of-00001.parquet"))
    assert [file.parent.name for file in files] == sorted(layouts.SUBJECTS)
    kinds = set()
    for file in files:
        table = pq.read_table(file)
        assert table.schema.names == [
            *("id", "question", "options", "explanation"),
            *(f"image_{number}" for number in range(1, 8)),
            *("img_type", "answer", "topic_difficulty", "question_type", "subfield"),
        ]
        rows = table.to_pylist()
        assert len(rows) == 5
        for number, row in enumerate(rows, start=1):
            assert row["id"] == f"validation_{file.parent.name}_{number}"
            assert "<image 1>" in row["question"]
            assert _image(row["image_1"]["bytes"]).size == (84, 84)
            assert row["image_2"] is None
            kinds.add(row["question_type"])
            options = ast.literal_eval(row["options"])
            if row["question_type"] == "multiple-choice":
                assert row["answer"] in "ABCD"[: len(options)]
            else:
                assert options == []
    assert kinds == {"multiple-choice", "open"}


def test_mmbench_has_the_official_columns_and_some_empty_options(world):
    with (world / "mmbench/MMBench_DEV_EN_V11.tsv").open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    columns = "index question hint A B C D answer category l2-category image split"
    assert " ".join(rows[0]) == columns
    assert [row["index"] for row in rows] == [str(number) for number in range(12)]
    assert any(row["D"] == "" for row in rows)
    assert any(row["D"] for row in rows)
    for row in rows:
        assert row[row["answer"]]
        assert _image(base64.b64decode(row["image"], validate=True)).size == (84, 84)


def test_instances_and_pope_speak_of_the_pictures_as_they_are(world):
    for home in (world, world / "validation"):
        content = json.loads((home / "coco/annotations/instances_val2014.json").read_text())
        names = {image["id"]: image["file_name"] for image in content["images"]}
        kinds = {category["id"]: category["name"] for category in content["categories"]}
        shown = {name: [] for name in names.values()}
        for mark in content["annotations"]:
            shown[names[mark["image_id"]]].append(kinds[mark["category_id"]])
        samples = load_coco(home)
        assert [sample.image.name for sample in samples] == list(names.values())
        for sample in samples:
            assert sample.objects.shown == tuple(sorted(set(shown[sample.image.name])))
        for sample in load_pope(home):
            shape = sample.prompt.split(" in the image")[0].split()[-1]
            if sample.gold == "A":
                assert shape in shown[sample.cluster]
        for setting in SETTINGS:
            golds = [s.gold for s in load_pope(home) if s.groups == (setting,)]
            assert golds.count("A") == golds.count("B") > 0


def test_pairs_have_trls_fields_and_images_beside_the_file(world):
    for name, number in (("train", 40), ("probe", 8)):
        path = world / "pairs" / f"{name}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert len({row["id"] for row in rows}) == len(rows) == number
        assert sum(row["kind"] == "easy" for row in rows) == round(0.7 * number)
        for row in rows:
            assert list(row) == ["id", "images", "prompt", "chosen", "rejected", "kind"]
            assert row["prompt"] == "Provide a one-sentence caption for the provided image."
            (image,) = row["images"]
            assert _image((path.parent / image).read_bytes()).size == (84, 84)


def test_no_scene_stands_in_two_splits_or_twice_in_one(monkeypatch, tmp_path):
    drawn = []
    real = layouts._Pool.draw

    def record(self, *args, **kwargs):
        scene = real(self, *args, **kwargs)
        drawn.append((self._split, scene.key))
        return scene

    monkeypatch.setattr(layouts._Pool, "draw", record)
    for seed in (0, 1):
        drawn.clear()
        write_world(tmp_path / str(seed), seed=seed, sizes=SMOKE)
        keys = [key for _, key in drawn]
        assert {split for split, _ in drawn} == {"pairs", "probe", "test", "validation"}
        assert len(set(keys)) == len(keys)
        trained = {scene.key for scene in draw_scenes(Plan(), "pretraining", 3000)}
        assert not trained & set(keys)


def test_data_root_renders_once_and_leaves_nothing_beside(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(
        layouts,
        "write_world",
        lambda root, seed, _: calls.append(seed) or write_world(root, seed, SMOKE),
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    root = data_root(seed=7)
    assert root == data_root(seed=7)
    assert calls == [7]
    assert (root / "coco/dataset_coco.json").is_file()
    assert [path.name for path in (tmp_path / "cwdpo-bench").iterdir()] == [root.name]


def test_data_root_that_fails_leaves_no_half(monkeypatch, tmp_path):
    def full(root, seed, sizes):
        (root / "coco").mkdir()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(layouts, "write_world", full)
    with pytest.raises(UserError, match="No space left on device"):
        data_root(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_rooms_face_needs_neither_torch_nor_pandas():
    import subprocess
    import sys

    code = (
        "import sys, cwdpo_bench.demo as d; d.base_path();"
        "print([m for m in ('torch', 'pandas', 'transformers', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert base_path().name == "base"


def test_misfit_questions_are_drawn_again_not_dropped():
    pool = layouts._Pool("test", random.Random(0))
    asked = layouts._questions(pool, ("relation", "odd-one-out"), 9, 0.0)
    kinds = [question.kind for _, question in asked]
    assert kinds == ["relation", "odd-one-out"] * 4 + ["relation"]
