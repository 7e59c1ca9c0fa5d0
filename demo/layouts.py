"""The rendered world written in the layouts of the public sets, as their own loaders read them.

    coco/dataset_coco.json            Karpathy's form; images in coco/val2014/
    coco/annotations/instances_val2014.json   what stands in them, for CHAIR
    flickr30k/dataset_flickr30k.json  the same form in the striped style; flickr30k-images/
    nocaps/nocaps_val_4500_captions.json  COCO's form with `domain`; images/
    mmmu/<Subject>/validation-00000-of-00001.parquet   the official columns
    mmbench/MMBench_DEV_EN_V11.tsv    base64 images
    pope/coco_pope_{random,popular,adversarial}.json  about COCO's images
    pairs/{train,probe}.jsonl         preference data; images/
    validation/                       the benchmarks again from other scenes, for tuning

No scene stands in two of them but COCO's in POPE: a split holds only the scenes that hash to it,
and within a split each scene is drawn once.
"""

from __future__ import annotations

import base64
import csv
import json
import random
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cwdpo_bench.demo.captions import references
from cwdpo_bench.demo.objects import write_instances, write_pope
from cwdpo_bench.demo.pairs import EASY_SHARE, make_pairs
from cwdpo_bench.demo.questions import OPEN_KINDS, Question, ask
from cwdpo_bench.demo.world import (
    IMAGE_SIZE,
    Domain,
    Scene,
    Split,
    Style,
    draw_scene,
    png_bytes,
    render,
)
from cwdpo_bench.evaluate.coco import caption_prompt
from cwdpo_bench.files import write_json


@dataclass(frozen=True)
class BenchmarkSizes:
    """Images of the caption sets (NoCaps: a domain), questions of the choice sets."""

    coco: int
    flickr30k: int
    nocaps: int
    mmmu: int
    mmbench: int


@dataclass(frozen=True)
class Sizes:
    """How much of everything is rendered."""

    train_pairs: int
    probe_pairs: int
    test: BenchmarkSizes
    validation: BenchmarkSizes


DEFAULT = Sizes(
    train_pairs=1500,
    probe_pairs=64,
    test=BenchmarkSizes(coco=240, flickr30k=150, nocaps=50, mmmu=150, mmbench=60),
    validation=BenchmarkSizes(coco=120, flickr30k=60, nocaps=20, mmmu=75, mmbench=30),
)
SMOKE = Sizes(
    train_pairs=96,
    probe_pairs=16,
    test=BenchmarkSizes(coco=16, flickr30k=8, nocaps=4, mmmu=15, mmbench=6),
    validation=BenchmarkSizes(coco=4, flickr30k=4, nocaps=2, mmmu=5, mmbench=5),
)

SUBJECTS = {
    "Art": ("colour",),
    "Design": ("odd-one-out",),
    "Geography": ("place",),
    "Math": ("count", "arithmetic"),
    "Physics": ("relation",),
}
"""MMMU's own subject names, so that its map of disciplines holds."""

_INSTANCE = "finegrained_perception (instance-level)"
_CROSS_INSTANCE = "finegrained_perception (cross-instance)"
ABILITIES = {
    "count": ("object_localization", _INSTANCE),
    "place": ("object_localization", _INSTANCE),
    "colour": ("attribute_recognition", _INSTANCE),
    "presence": ("attribute_recognition", _INSTANCE),
    "relation": ("spatial_relationship", _CROSS_INSTANCE),
    "odd-one-out": ("attribute_comparison", _CROSS_INSTANCE),
}
"""MMBench's category and l2-category of each kind of question."""

DOMAINS: tuple[Domain, ...] = ("in-domain", "near-domain", "out-domain")
_OPEN_SHARE = 0.3
_STRIPED_SHARE = 0.3
_VAL_SHARE = 0.1
_IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_MMMU_SCHEMA = pa.schema(
    [("id", pa.string()), ("question", pa.string()), ("options", pa.string())]
    + [("explanation", pa.string())]
    + [(f"image_{number}", _IMAGE_TYPE) for number in range(1, 8)]
    + [("img_type", pa.string()), ("answer", pa.string()), ("topic_difficulty", pa.string())]
    + [("question_type", pa.string()), ("subfield", pa.string())]
)


class _Pool:
    """Draws the scenes of one split, each once, and renders them."""

    def __init__(self, split: Split, rng: random.Random) -> None:
        self.rng = rng
        self._split = split
        self._seen: set[str] = set()

    def draw(
        self, style: Style = "plain", domain: Domain = "in-domain", twins: bool = False
    ) -> Scene:
        while True:
            scene = draw_scene(self.rng, self._split, style=style, domain=domain, twins=twins)
            if scene.key not in self._seen:
                self._seen.add(scene.key)
                return scene

    def style(self) -> Style:
        return "striped" if self.rng.random() < _STRIPED_SHARE else "plain"

    def png(self, scene: Scene) -> bytes:
        return png_bytes(render(scene, self.rng))


def write_world(
    root: Path, seed: int, sizes: Sizes = DEFAULT, easy_share: float = EASY_SHARE
) -> None:
    """Render everything into `root`; the same arguments give the same bytes.

    Args:
        root: a folder that is new or empty.
        seed: of the scenes, the captions and the questions.
        sizes: how many of each.
        easy_share: of the preference pairs.
    """
    _write_pairs(root / "pairs", "train", sizes.train_pairs, "pairs", seed, easy_share)
    _write_pairs(root / "pairs", "probe", sizes.probe_pairs, "probe", seed, easy_share)
    _write_benchmarks(root, _Pool("test", random.Random(f"{seed}:test")), sizes.test)
    tuning = _Pool("validation", random.Random(f"{seed}:validation"))
    _write_benchmarks(root / "validation", tuning, sizes.validation)


def render_world(folder: Path, seed: int, sizes: Sizes = DEFAULT) -> None:
    """`write_world` into a folder that is there whole or not at all."""
    with _whole(folder) as temporary:
        write_world(temporary, seed, sizes)


def render_pairs(folder: Path, seed: int, easy_share: float, sizes: Sizes = DEFAULT) -> None:
    """The world's training pairs alone, with another share of easy ones; whole or not at all.

    The scenes are those of `render_world`; their captions and noise are drawn anew.
    """
    with _whole(folder) as temporary:
        _write_pairs(temporary, "train", sizes.train_pairs, "pairs", seed, easy_share)


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A temporary folder beside it, which takes its place at the end."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        yield temporary
        temporary.chmod(0o755)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_benchmarks(root: Path, pool: _Pool, sizes: BenchmarkSizes) -> None:
    coco = root / "coco"
    scenes = _write_karpathy(
        coco / "dataset_coco.json", coco / "val2014", pool, sizes.coco, "plain"
    )
    write_instances(coco / "annotations" / "instances_val2014.json", scenes)
    # A generator of its own: what the five benchmarks hold does not depend on POPE.
    write_pope(root / "pope", scenes, random.Random("pope"))
    flickr = root / "flickr30k"
    _write_karpathy(
        flickr / "dataset_flickr30k.json",
        flickr / "flickr30k-images",
        pool,
        sizes.flickr30k,
        "striped",
    )
    _write_nocaps(root / "nocaps", pool, sizes.nocaps)
    _write_mmmu(root / "mmmu", pool, sizes.mmmu)
    _write_mmbench(root / "mmbench" / "MMBench_DEV_EN_V11.tsv", pool, sizes.mmbench)


def _write_karpathy(
    path: Path, folder: Path, pool: _Pool, number: int, style: Style
) -> dict[str, Scene]:
    """`number` images of split `test` and a tenth as many of split `val`; the former by name."""
    is_coco = path.name == "dataset_coco.json"
    folder.mkdir(parents=True)
    images: list[dict[str, Any]] = []
    scenes: dict[str, Scene] = {}
    for imgid in range(number + max(1, round(_VAL_SHARE * number))):
        scene = pool.draw(style)
        # COCO names images by their id; Flickr30k's ids are the names.
        name = f"COCO_val2014_{imgid + 1:012}.png" if is_coco else f"{1_000_000 + imgid}.png"
        (folder / name).write_bytes(pool.png(scene))
        if imgid < number:
            scenes[name] = scene
        captions = references(scene, pool.rng)
        sentids = [len(captions) * imgid + k for k in range(len(captions))]
        image = {
            "filename": name,
            "imgid": imgid,
            "split": "test" if imgid < number else "val",
            "sentids": sentids,
            "sentences": [
                {"raw": raw, "tokens": _words(raw), "imgid": imgid, "sentid": sentid}
                for raw, sentid in zip(captions, sentids, strict=True)
            ],
        }
        if is_coco:
            image |= {"filepath": folder.name, "cocoid": imgid + 1}
        images.append(image)
    write_json(path, {"dataset": "coco" if is_coco else "flickr30k", "images": images})
    return scenes


def _words(caption: str) -> list[str]:
    return caption.replace(",", "").removesuffix(".").split()


def _write_nocaps(folder: Path, pool: _Pool, number: int) -> None:
    (folder / "images").mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for domain in DOMAINS:
        for _ in range(number):
            scene = pool.draw(domain=domain)
            name = f"{len(images):016x}.png"
            (folder / "images" / name).write_bytes(pool.png(scene))
            for caption in references(scene, pool.rng, 10):
                annotations.append(
                    {"image_id": len(images), "id": len(annotations), "caption": caption}
                )
            images.append(
                {
                    "id": len(images),
                    "open_images_id": Path(name).stem,
                    "file_name": name,
                    "width": IMAGE_SIZE,
                    "height": IMAGE_SIZE,
                    "domain": domain,
                }
            )
    write_json(
        folder / "nocaps_val_4500_captions.json", {"images": images, "annotations": annotations}
    )


def _questions(
    pool: _Pool, kinds: Sequence[str], number: int, open_share: float
) -> list[tuple[Scene, Question]]:
    """Questions of the kinds in turn, one a scene."""
    found: list[tuple[Scene, Question]] = []
    while len(found) < number:
        kind = kinds[len(found) % len(kinds)]
        scene = pool.draw(pool.style(), twins=kind == "odd-one-out")
        is_open = kind in OPEN_KINDS and pool.rng.random() < open_share
        question = ask(scene, kind, pool.rng, is_open=is_open)
        if question is not None:
            found.append((scene, question))
    return found


def _write_mmmu(folder: Path, pool: _Pool, number: int) -> None:
    for subject, kinds in SUBJECTS.items():
        rows = [
            _mmmu_row(subject, index, scene, question, pool)
            for index, (scene, question) in enumerate(
                _questions(pool, kinds, number // len(SUBJECTS), _OPEN_SHARE), start=1
            )
        ]
        (folder / subject).mkdir(parents=True)
        pq.write_table(
            pa.Table.from_pylist(rows, schema=_MMMU_SCHEMA),
            folder / subject / "validation-00000-of-00001.parquet",
        )


def _mmmu_row(
    subject: str, index: int, scene: Scene, question: Question, pool: _Pool
) -> dict[str, Any]:
    name = f"validation_{subject}_{index}"
    row: dict[str, Any] = dict.fromkeys(_MMMU_SCHEMA.names)
    return row | {
        "id": name,
        "question": question.marked_text,
        "options": str(list(question.options)),
        "explanation": "",
        "image_1": {"bytes": pool.png(scene), "path": f"{name}_1.png"},
        "img_type": "['Geometric Shapes']",
        "answer": question.answer,
        "topic_difficulty": ("Easy", "Medium", "Hard")[len(scene.things) - 1],
        "question_type": "multiple-choice" if question.options else "open",
        "subfield": question.kind,
    }


def _write_mmbench(path: Path, pool: _Pool, number: int) -> None:
    path.parent.mkdir(parents=True)
    columns = ["index", "question", "hint", "A", "B", "C", "D"]
    columns += ["answer", "category", "l2-category", "image", "split"]
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, delimiter="\t", lineterminator="\n")
        table.writerow(columns)
        for index, (scene, question) in enumerate(_questions(pool, tuple(ABILITIES), number, 0)):
            options = [*question.options, "", ""][:4]
            image = base64.b64encode(pool.png(scene)).decode()
            asked = [index, question.text, question.hint or "", *options, question.answer]
            table.writerow([*asked, *ABILITIES[question.kind], image, "dev"])


def _write_pairs(
    folder: Path, name: str, number: int, split: Split, seed: int, easy_share: float
) -> None:
    pool = _Pool(split, random.Random(f"{seed}:{split}"))
    (folder / "images").mkdir(parents=True, exist_ok=True)
    scenes = [pool.draw(pool.style()) for _ in range(number)]
    lines = []
    for index, pair in enumerate(make_pairs(scenes, pool.rng, easy_share)):
        image = f"images/{name}-{index:05}.png"
        (folder / image).write_bytes(pool.png(scenes[index]))
        row = {"id": f"{name}-{index:05}", "images": [image], "prompt": caption_prompt()}
        lines.append(row | {"chosen": pair.chosen, "rejected": pair.rejected, "kind": pair.kind})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
