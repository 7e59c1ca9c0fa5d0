"""What stands in the rendered pictures, in the layouts of COCO's instances and of POPE.

A category is a shape for CHAIR, which reads captions word by word, and a shape with its colour for
POPE, which asks whether it is there. Nothing is rendered: both speak of COCO's pictures.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cwdpo_bench.demo.questions import NAMES, thing_name
from cwdpo_bench.demo.world import CELL, IMAGE_SIZE, SHAPES, SIZES, Scene
from cwdpo_bench.files import write_json

POPE_IMAGES = 50
"""The first so many pictures are asked about."""
QUESTIONS_AN_IMAGE = 2
"""So many with the answer yes and as many with the answer no, each way of drawing."""


def write_instances(path: Path, scenes: Mapping[str, Scene]) -> None:
    """COCO's instances file: a box for every thing.

    Args:
        path: the file.
        scenes: by the name of the picture, which ends in its number.
    """
    ids = {shape: number for number, shape in enumerate(SHAPES, start=1)}
    images: list[dict[str, Any]] = []
    marks: list[dict[str, Any]] = []
    for name, scene in scenes.items():
        image = int(Path(name).stem.rpartition("_")[2])
        images.append({"id": image, "file_name": name, "width": IMAGE_SIZE, "height": IMAGE_SIZE})
        for thing in scene.things:
            side = 2 * SIZES[thing.size]
            left = (thing.column + 0.5) * CELL - side / 2
            top = (thing.row + 0.5) * CELL - side / 2
            marks.append(
                {
                    "id": len(marks) + 1,
                    "image_id": image,
                    "category_id": ids[thing.shape],
                    "bbox": [left, top, side, side],
                    "area": side * side,
                    "iscrowd": 0,
                }
            )
    categories = [{"id": number, "name": shape} for shape, number in ids.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"images": images, "annotations": marks, "categories": categories})


def write_pope(folder: Path, scenes: Mapping[str, Scene], rng: random.Random) -> None:
    """POPE's three files: for every picture things that are there, and as many that are not.

    Those that are not are drawn at random, from what most pictures show, or from what most often
    stands beside what is there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shown = {name: sorted({thing_name(t) for t in scene.things}) for name, scene in scenes.items()}
    popular = Counter(thing for things in shown.values() for thing in things)
    beside: Counter[tuple[str, str]] = Counter(
        (one, other) for things in shown.values() for one in things for other in things
    )
    rows: dict[str, list[dict[str, Any]]] = {"random": [], "popular": [], "adversarial": []}
    for name, things in list(shown.items())[:POPE_IMAGES]:
        asked = rng.sample(things, min(QUESTIONS_AN_IMAGE, len(things)))
        absent = [thing for thing in NAMES if thing not in things]
        rng.shuffle(absent)
        company = Counter(
            {thing: sum(beside[there, thing] for there in things) for thing in absent}
        )
        most = Counter({thing: popular[thing] for thing in absent})
        drawn = {
            "random": absent,
            "popular": [thing for thing, _ in most.most_common()],
            "adversarial": [thing for thing, _ in company.most_common()],
        }
        for setting, wrong in drawn.items():
            for there, missing in zip(asked, wrong, strict=False):
                for thing, label in ((there, "yes"), (missing, "no")):
                    article = "an" if thing[0] in "aeiou" else "a"
                    rows[setting].append(
                        {
                            "question_id": len(rows[setting]) + 1,
                            "image": name,
                            "text": f"Is there {article} {thing} in the image?",
                            "label": label,
                        }
                    )
    for setting, lines in rows.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"coco_pope_{setting}.json").write_text(text, encoding="utf-8")
