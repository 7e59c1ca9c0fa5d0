"""The five public layouts in miniature, written by hand so that a loader's bug can't hide."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image


def _png(colour: str, size: tuple[int, int] = (32, 32)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def _karpathy(path: Path, names: dict[str, str], **extra: object) -> None:
    images = [
        {
            "filename": name,
            "imgid": number,
            "split": split,
            "sentences": [
                {"raw": f"a red thing number {number} .", "tokens": []},
                {"raw": f"there is one thing , number {number} \n", "tokens": []},
            ],
            **extra,
        }
        for number, (name, split) in enumerate(names.items())
    ]
    path.write_text(json.dumps({"dataset": path.parent.name, "images": images}))


def _write_coco(root: Path) -> None:
    (root / "coco/val2014").mkdir(parents=True)
    names = {f"COCO_val2014_{n:012d}.jpg": "test" if n else "train" for n in range(4)}
    for name in names:
        Image.new("RGB", (40, 30), "red").save(root / "coco/val2014" / name)
    path = root / "coco/dataset_coco.json"
    _karpathy(path, names, filepath="val2014")
    content = json.loads(path.read_text())
    for image in content["images"]:
        image["cocoid"] = 100 + image["imgid"]
    path.write_text(json.dumps(content))


def _write_flickr30k(root: Path) -> None:
    (root / "flickr30k/flickr30k-images").mkdir(parents=True)
    names = {"1007129816.jpg": "test", "1009434119.jpg": "val", "101362133.jpg": "test"}
    for name in names:
        Image.new("RGB", (30, 40), "blue").save(root / "flickr30k/flickr30k-images" / name)
    _karpathy(root / "flickr30k/dataset_flickr30k.json", names)


def _write_nocaps(root: Path) -> None:
    (root / "nocaps/images").mkdir(parents=True)
    images, annotations = [], []
    for number, domain in enumerate(("in-domain", "near-domain", "out-domain")):
        name = f"{number:016x}.jpg"
        Image.new("RGB", (32, 32), "green").save(root / "nocaps/images" / name)
        images.append({"id": number, "file_name": name, "domain": domain})
        for word in ("a", "one"):
            caption = {"id": len(annotations), "image_id": number, "caption": f"{word} {domain}"}
            annotations.append(caption)
    (root / "nocaps/nocaps_val_4500_captions.json").write_text(
        json.dumps({"images": images, "annotations": annotations})
    )


def _write_mmmu(root: Path) -> None:
    def row(subject: str, number: int, **values: object) -> dict[str, object]:
        images = {f"image_{k}": None for k in range(1, 8)}
        images["image_1"] = {"bytes": _png("yellow"), "path": "image_1.png"}
        return {
            "id": f"validation_{subject}_{number}",
            "question": "What is shown? <image 1>",
            "options": "['a car', 'a cat', 'None']",
            "answer": "B",
            "question_type": "multiple-choice",
            **images,
            **values,
        }

    second = {"bytes": _png("black"), "path": "image_2.png"}
    subjects = {
        "Art": [
            row("Art", 1),
            row(
                "Art",
                2,
                question="Which?",
                options="['<image 2>', '<image 1>']",
                answer="A",
                image_2=second,
            ),
        ],
        "Math": [
            row(
                "Math",
                1,
                question="How many? <image 1>",
                options="[]",
                answer="['24/7', '3.429']",
                question_type="open",
            ),
            row("Math", 2, question="What is 1+1?", options="['1', '2']", answer="B"),
        ],
    }
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for subject, rows in subjects.items():
        (root / "mmmu" / subject).mkdir(parents=True)
        fields = [(name, image if name.startswith("image_") else pa.string()) for name in rows[0]]
        table = pa.Table.from_pylist(rows, schema=pa.schema(fields))
        pq.write_table(table, root / "mmmu" / subject / "validation-00000-of-00001.parquet")


def _write_mmbench(root: Path) -> None:
    image = base64.b64encode(_png("white")).decode()
    rows = (
        "index|question|hint|A|B|C|D|answer|category|l2-category|image|split",
        f"7|Which colour?||red|white|None||B|colour|attribute|{image}|dev",
        "9|How many?|Count.|1|2|||A|count|reasoning|7|dev",
        # A circular copy of the first question, as the official file holds them.
        "1000007|Which colour?||white|None|red||A|colour|attribute|7|dev",
    )
    (root / "mmbench").mkdir(parents=True)
    text = "\n".join(rows).replace("|", "\t") + "\n"
    (root / "mmbench/MMBench_DEV_EN_V11.tsv").write_text(text)


@pytest.fixture
def data_root(tmp_path: Path) -> Path:
    """A data root with a few samples of all five benchmarks, to be spoilt at will."""
    return _write_all(tmp_path / "data")


@pytest.fixture(scope="session")
def data_root_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for tests that only read it."""
    return _write_all(tmp_path_factory.mktemp("data"))


def _write_all(root: Path) -> Path:
    for write in (_write_coco, _write_flickr30k, _write_nocaps, _write_mmmu, _write_mmbench):
        write(root)
    return root
