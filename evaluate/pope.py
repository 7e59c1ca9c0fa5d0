"""POPE: is an object in the picture, yes or no (Li et al., EMNLP 2023).

Half of the questions are about something that is there. The other half are about something that is
not: drawn at random, from what pictures show most (popular), or from what most often stands beside
what is there (adversarial); each way is a group.

Layout: `pope/coco_pope_{random,popular,adversarial}.json` as the authors publish them, an object a
line; the images in `pope/images/`, `pope/val2014/`, or COCO's own `coco/val2014/`. The prompt is
lmms-eval's (task `pope`). The options are "Yes" and "No", letters A and B in the rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from cwdpo_bench.errors import UserError
from cwdpo_bench.evaluate.coco import text_field
from cwdpo_bench.evaluate.samples import MULTIPLE_CHOICE, ChoiceSample, ImageSource

FOLDER = Path("pope")
SETTINGS = ("random", "popular", "adversarial")
IMAGE_FOLDERS = (FOLDER / "images", FOLDER / "val2014", FOLDER, Path("coco/val2014"))
ANSWERS = ("Yes", "No")


def pope_prompt(question: str) -> str:
    """The text of a question as lmms-eval writes it."""
    return f"{question.strip()}\nAnswer the question using a single word or phrase."


def pope_files(root: Path) -> list[Path]:
    """The question files under `root`, in the order of `SETTINGS`."""
    paths = (root / FOLDER / f"coco_pope_{setting}.json" for setting in SETTINGS)
    return [path for path in paths if path.is_file()]


def load_pope(root: Path) -> list[ChoiceSample]:
    """The questions of all three files; those about one image share a cluster.

    Raises:
        UserError: a file is missing, or a line is not in the published form.
    """
    files = pope_files(root)
    if len(files) < len(SETTINGS):
        needed = ", ".join(f"coco_pope_{setting}.json" for setting in SETTINGS)
        raise UserError(f"{root / FOLDER}: needs {needed}; one without the others is no POPE")
    return [
        pope_sample(row, setting, partial(_image, root=root), where)
        for setting, path in zip(SETTINGS, files, strict=True)
        for row, where in _rows(path)
    ]


def _rows(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Each line's object with its place."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); fetch it again") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}: not JSON ({error}); one object a line is needed") from error
        if not isinstance(row, dict):
            raise UserError(f"{where}: must be an object, not {row!r}")
        yield row, where


def pope_sample(
    row: Mapping[str, Any],
    setting: str,
    image: ImageSource | Callable[[str], ImageSource],
    where: str,
) -> ChoiceSample:
    """A question from a row in the published form.

    Args:
        row: `question_id`, `image`, `text` and `label`.
        setting: one of `SETTINGS`.
        image: the picture, or what finds it by its name.
        where: the row's place, for errors.

    Raises:
        UserError: a cell that is not in that form.
    """
    number, label = row.get("question_id"), text_field(row, "label", where).strip().lower()
    if isinstance(number, bool) or not isinstance(number, int | str):
        raise UserError(f"{where}: 'question_id' must be a number or text, not {number!r}")
    if label not in ("yes", "no"):
        raise UserError(f"{where}: 'label' must be yes or no, not {label!r}")
    name = text_field(row, "image", where)
    return ChoiceSample(
        id=f"{setting}-{number}",
        cluster=name,
        groups=(setting,),
        prompt=pope_prompt(text_field(row, "text", where)),
        images=(image(name) if callable(image) else image,),
        question_type=MULTIPLE_CHOICE,
        options=ANSWERS,
        option_words=ANSWERS,
        gold="A" if label == "yes" else "B",
    )


def _image(name: str, root: Path) -> Path:
    """Where the picture is; where it is nowhere, COCO's own folder, for the error to name."""
    places = [folder / name for folder in IMAGE_FOLDERS]
    return next((place for place in places if (root / place).is_file()), places[-1])
