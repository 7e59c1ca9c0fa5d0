"""MMMU validation: 900 questions of 30 subjects, multiple-choice and open (Yue et al., CVPR 2024).

Layout: `mmmu/<Subject>/validation-*.parquet` in the official columns. The prompt is lmms-eval's
(task `mmmu_val`), its `<image k>` marks left in the text and the images put before it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import pyarrow.parquet as pq
from pyarrow import ArrowException

from cwdpo_bench.errors import UserError, nearest
from cwdpo_bench.evaluate.answers import DISCIPLINES
from cwdpo_bench.evaluate.samples import MULTIPLE_CHOICE as MULTIPLE_CHOICE
from cwdpo_bench.evaluate.samples import OPEN as OPEN
from cwdpo_bench.evaluate.samples import ChoiceSample, ImageSource

FOLDER = Path("mmmu")
_COLUMNS = ("id", "question", "options", "answer", "question_type")
IMAGE_MARK = re.compile(r"<image (\d+)>")
_DISCIPLINE_OF = {subject: name for name, subjects in DISCIPLINES.items() for subject in subjects}


def mmmu_prompt(question: str, options: Sequence[str], question_type: str) -> str:
    """The text of a question as lmms-eval writes it.

    Args:
        question: its text, `<image k>` marks included.
        options: the options' texts, A first; unused for an open question.
        question_type: `multiple-choice` or `open`.
    """
    if question_type == OPEN:
        return f"{question}\n\nAnswer the question using a single word or phrase."
    lines = lettered(options)
    instruction = "Answer with the option's letter from the given choices directly."
    return f"{question}\n{lines}\n\n{instruction}"


def lettered(options: Sequence[str]) -> str:
    """The options as lines `A. text`."""
    return "\n".join(f"{ascii_uppercase[k]}. {text}" for k, text in enumerate(options))


def mmmu_files(root: Path) -> list[Path]:
    """The validation parquet files under `root`, sorted by subject."""
    return sorted((root / FOLDER).glob("*/validation-*.parquet"))


def load_mmmu(root: Path) -> list[ChoiceSample]:
    """The questions of every `mmmu/<Subject>/validation-*.parquet`.

    Raises:
        UserError: no file, an unknown subject, or a row that is not in the official form.
    """
    return load_files(mmmu_files(root), root / FOLDER, "validation-*.parquet")


def load_files(
    files: Sequence[Path], folder: Path, pattern: str, *, hidden: bool = False
) -> list[ChoiceSample]:
    """The questions of parquet files in the official form.

    Args:
        files: `<Subject>/…`, sorted by subject.
        folder: where they were looked for, and
        pattern: as what, for the error where there are none.
        hidden: answers are "?"; golds are empty.

    Raises:
        UserError: no file, an unknown subject, or a row that is not in the official form.
    """
    if not files:
        raise UserError(f"{folder}: no <Subject>/{pattern} in it")
    return [sample for path in files for sample in _load_subject(path, hidden)]


def _load_subject(path: Path, hidden: bool) -> list[ChoiceSample]:
    subject = path.parent.name
    try:
        rows = pq.read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as parquet ({error}); fetch it again") from error
    return [
        mmmu_sample(row, subject, partial(_images, row, subject), f"{path}: row {index}", hidden)
        for index, row in enumerate(rows)
    ]


def mmmu_sample(
    row: Mapping[str, Any],
    subject: str,
    images: Callable[[str, str], tuple[ImageSource, ...]],
    where: str,
    hidden: bool = False,
) -> ChoiceSample:
    """A question from a row in the official columns.

    Args:
        row: `id`, `question`, `options`, `answer` and `question_type`.
        subject: one of the thirty.
        images: gives those that the prompt names, from the prompt and the row's place in words.
        where: the row's place, for errors.
        hidden: the answer is "?"; the gold is empty.

    Raises:
        UserError: an unknown subject, or a cell that is not in the official form.
    """
    if subject not in _DISCIPLINE_OF:
        hint = nearest(subject, _DISCIPLINE_OF)
        raise UserError(f"{where}: unknown subject {subject!r}; {hint}")
    where = f"{where} (id {row.get('id')!r})"
    for column in _COLUMNS:
        if not isinstance(row.get(column), str):
            raise UserError(f"{where}: column {column!r} must hold text, not {row.get(column)!r}")
    question_type = row["question_type"]
    if question_type not in (MULTIPLE_CHOICE, OPEN):
        raise UserError(
            f"{where}: question_type {question_type!r}; "
            f"{nearest(question_type, (MULTIPLE_CHOICE, OPEN))}"
        )
    options = _options(row["options"], where) if question_type == MULTIPLE_CHOICE else ()
    if question_type == MULTIPLE_CHOICE and not hidden:
        _check_letter(row["answer"], len(options), where)
    prompt = mmmu_prompt(row["question"], options, question_type)
    return ChoiceSample(
        id=row["id"],
        cluster=row["id"],
        groups=(_DISCIPLINE_OF[subject], subject),
        prompt=prompt,
        images=images(prompt, where),
        question_type=question_type,
        options=options,
        gold="" if hidden else row["answer"],
    )


def _options(text: str, where: str) -> tuple[str, ...]:
    """The official file holds a Python list as text."""
    try:
        options = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise UserError(f"{where}: options are not the text of a Python list: {text!r}") from error
    if not isinstance(options, list) or not 2 <= len(options) <= len(ascii_uppercase):
        raise UserError(f"{where}: options must be a list of 2 to 26 texts: {text!r}")
    if not all(isinstance(option, str) for option in options):
        raise UserError(f"{where}: options must be texts: {text!r}")
    return tuple(options)


def _check_letter(answer: str, count: int, where: str) -> None:
    letters = ascii_uppercase[:count]
    if answer == "?":
        raise UserError(
            f"{where}: the answer is hidden ('?'); use the validation files, or the task mmmu-test"
        )
    if len(answer) != 1 or answer not in letters:
        raise UserError(f"{where}: answer {answer!r} names no option; known: {', '.join(letters)}")


def _images(
    row: Mapping[str, Any], subject: str, prompt: str, where: str
) -> tuple[bytes | Path, ...]:
    """The images that the question or its options name, by number."""
    images: list[bytes | Path] = []
    for number in sorted({int(mark) for mark in IMAGE_MARK.findall(prompt)}):
        image = row.get(f"image_{number}")
        if not isinstance(image, dict) or not (image.get("bytes") or image.get("path")):
            raise UserError(f"{where}: the text names <image {number}>, that column is empty")
        images.append(image["bytes"] or FOLDER / subject / image["path"])
    return tuple(images)
