"""The named benchmarks from lmms-eval's data sets, where the data root holds no local layout.

What is read is what lmms-eval's own task reads; prompts, options and golds come from the same
functions as those of the local layouts, and `tests/evaluate/test_lmms_parity.py` holds them against
lmms-eval's task objects. Differences that are meant (docs/EVALUATION.md):

- COCO asks our one caption prompt; lmms-eval's task of that split asks another.
- lmms-eval's Flickr30k holds all 31,783 images; only those of Karpathy's test split are taken, by
  the names in `flickr30k/dataset_flickr30k.json` under the data root.
- MMBench's circular orders are made here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cwdpo_bench.errors import UserError
from cwdpo_bench.evaluate.chair import objects_shown, read_instances
from cwdpo_bench.evaluate.coco import FLICKR30K_ANNOTATIONS, SPLIT, caption_prompt, image_list
from cwdpo_bench.evaluate.lmms import PREFIX, load_tasks, row_images
from cwdpo_bench.evaluate.mmbench import circular_orders, is_copy
from cwdpo_bench.evaluate.mmmu import IMAGE_MARK, mmmu_sample
from cwdpo_bench.evaluate.nocaps import DOMAINS
from cwdpo_bench.evaluate.pope import SETTINGS, pope_sample
from cwdpo_bench.evaluate.samples import CaptionSample, ChoiceSample, RowImages
from cwdpo_bench.files import read_json

Samples = list[CaptionSample] | list[ChoiceSample]

ORIGINS = {
    "coco": "coco_karpathy_test",
    "flickr30k": "flickr30k_test",
    "nocaps": "nocaps_val",
    "mmmu": "mmmu_val",
    "mmbench": "mmbench_en_dev",
    "pope": "pope",
}
"""Our benchmark → the task of lmms-eval that reads its data set."""


def load_from_lmms(name: str, root: Path, include: Path | None = None) -> Samples:
    """The samples of a named benchmark from lmms-eval's data set.

    Args:
        name: in `ORIGINS`.
        root: the data root, for what lies there of the benchmark: COCO's pictures and instance
            annotations, Karpathy's split of Flickr30k.
        include: a folder of YAML files whose definitions go before lmms-eval's.

    Raises:
        UserError: lmms-eval is not installed, its data set cannot be loaded or has other columns,
            or the split's names are missing.
    """
    origin = ORIGINS[name]
    task = load_tasks(origin, include)[origin]
    rows = [dict(row) for row in task.eval_docs_no_media]
    where = f"{PREFIX}{origin}"

    def images(number: int) -> RowImages:
        return RowImages(f"{where} row {number}", partial(row_images, task, number))

    try:
        return _READERS[name](rows, images, root, where)
    except KeyError as error:
        raise UserError(f"{where}: its data set has no column {error}; update lmms-eval") from error


def samples_digest(samples: Sequence[CaptionSample] | Sequence[ChoiceSample]) -> str:
    """SHA-256 of what is asked and what is right: the texts, not the pictures."""
    digest = hashlib.sha256()
    for sample in samples:
        right = sample.references if isinstance(sample, CaptionSample) else sample.gold
        shown = () if isinstance(sample, CaptionSample) else sample.options
        digest.update(json.dumps([sample.id, sample.prompt, shown, right]).encode())
    return digest.hexdigest()


Images = Callable[[int], RowImages]
Rows = list[dict[str, Any]]


def _coco(rows: Rows, images: Images, root: Path, where: str) -> list[CaptionSample]:
    instances = read_instances(root)
    samples = []
    for number, row in enumerate(rows):
        # lmms-eval fetches every picture from the web; COCO's own folder goes first.
        local = Path("coco") / row["filepath"] / row["filename"]
        name, references = str(row["cocoid"]), _texts(row["sentences"], where, number)
        samples.append(
            CaptionSample(
                id=name,
                prompt=caption_prompt(),
                image=local if (root / local).is_file() else images(number),
                references=references,
                objects=objects_shown(name, references, instances),
            )
        )
    return samples


def _flickr30k(rows: Rows, images: Images, root: Path, where: str) -> list[CaptionSample]:
    path = root / FLICKR30K_ANNOTATIONS
    if not path.is_file():
        raise UserError(
            f"{where}: holds all of Flickr30k; the names of Karpathy's test split are read from "
            f"{path}, which is not there. Get it, or run all images with {PREFIX}flickr30k_test"
        )
    split = {
        image["filename"]
        for image in image_list(read_json(path), path)
        if image.get("split") == SPLIT
    }
    samples = [
        CaptionSample(
            id=Path(row["filename"]).stem,
            prompt=caption_prompt(),
            image=images(number),
            references=_texts(row["caption"], where, number),
        )
        for number, row in enumerate(rows)
        if row["filename"] in split
    ]
    if len(samples) < len(split):
        raise UserError(f"{where}: holds {len(samples)} of the {len(split)} test images of {path}")
    return samples


def _nocaps(rows: Rows, images: Images, _: Path, where: str) -> list[CaptionSample]:
    for number, row in enumerate(rows):
        if row["image_domain"] not in DOMAINS:
            raise UserError(f"{where} row {number}: unknown domain {row['image_domain']!r}")
    return [
        CaptionSample(
            id=str(row["image_id"]),
            prompt=caption_prompt(),
            image=images(number),
            references=_texts(row["annotations_captions"], where, number),
            groups=(row["image_domain"],),
        )
        for number, row in enumerate(rows)
    ]


def _mmmu(rows: Rows, images: Images, _: Path, where: str) -> list[ChoiceSample]:
    def of_row(number: int, prompt: str, __: str) -> tuple[RowImages, ...]:
        return (images(number),) if IMAGE_MARK.search(prompt) else ()

    return [
        # validation_<Subject>_<number>
        mmmu_sample(
            row,
            row["id"].partition("_")[2].rpartition("_")[0],
            partial(of_row, number),
            f"{where} row {number}",
        )
        for number, row in enumerate(rows)
    ]


def _mmbench(rows: Rows, images: Images, _: Path, where: str) -> list[ChoiceSample]:
    return list(_mmbench_orders(rows, images, where))


def _mmbench_orders(rows: Rows, images: Images, where: str) -> Iterator[ChoiceSample]:
    known = {str(row["index"]) for row in rows}
    for number, row in enumerate(rows):
        if is_copy(str(row["index"]), known):
            continue
        cells = {
            column if column in "ABCDE" else column.lower(): "" if cell is None else str(cell)
            for column, cell in row.items()
        }
        yield from circular_orders(cells, images(number), f"{where} row {number}")


def _pope(rows: Rows, images: Images, _: Path, where: str) -> list[ChoiceSample]:
    for number, row in enumerate(rows):
        if row["category"] not in SETTINGS:
            raise UserError(f"{where} row {number}: unknown category {row['category']!r}")
    return [
        pope_sample(
            {
                "question_id": row["question_id"],
                "image": row["image_source"],
                "text": row["question"],
                "label": row["answer"],
            },
            row["category"],
            images(number),
            f"{where} row {number}",
        )
        for number, row in enumerate(rows)
    ]


def _texts(captions: Sequence[str], where: str, number: int) -> tuple[str, ...]:
    texts = tuple(str(text).strip() for text in captions)
    if not texts or not all(texts):
        raise UserError(f"{where} row {number}: a caption is missing or empty")
    return texts


_READERS: Mapping[str, Callable[[Rows, Images, Path, str], Samples]] = {
    "coco": _coco,
    "flickr30k": _flickr30k,
    "nocaps": _nocaps,
    "mmmu": _mmmu,
    "mmbench": _mmbench,
    "pope": _pope,
}
