"""MMBench v1.1 dev in its circular form: a question counts when every order of its options is
answered rightly (Liu et al., ECCV 2024).

Layout: `mmbench/MMBench_DEV_EN_V11.tsv` with base64 images and options A to D, some empty. The
file's own circular copies (index + 1,000,000 · n) are left out: the orders are made here, so that
files with and without them give the same rows. The prompt is lmms-eval's (task `mmbench_en_dev`).
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from string import ascii_uppercase

import pandas as pd

from cwdpo_bench.errors import UserError
from cwdpo_bench.evaluate.mmmu import lettered
from cwdpo_bench.evaluate.samples import MULTIPLE_CHOICE, ChoiceSample, ImageSource

TSV = Path("mmbench/MMBench_DEV_EN_V11.tsv")
_LETTERS = "ABCDE"
_REQUIRED = ("index", "question", "hint", "A", "B", "answer", "category", "l2-category", "image")
_CIRCULAR_STEP = 1_000_000
_LONGEST_INDEX = 16
"""An image text of at most so many digits is another row's index: no image is so short."""


def mmbench_prompt(question: str, options: Sequence[str], hint: str | None = None) -> str:
    """The text of a question as lmms-eval writes it, the options lettered from A."""
    lines = lettered(options)
    start = f"{hint} {question}" if hint else question
    instruction = "Answer with the option's letter from the given choices directly."
    return f"{start} There are several options:\n{lines}\n\n{instruction}"


def load_mmbench(root: Path) -> list[ChoiceSample]:
    """All cyclic orders of every question; rows of one question share a cluster.

    Raises:
        UserError: the file is missing or a row is not in the official form.
    """
    path = root / TSV
    table = read_table(path)
    images = dict(zip(table["index"], table["image"], strict=True))
    samples: list[ChoiceSample] = []
    for cells in table.to_dict("records"):
        row = {str(column): str(cell) for column, cell in cells.items()}
        index = row["index"]
        if is_copy(index, images):
            continue
        samples.extend(
            circular_orders(row, image_of(index, images, path), f"{path}: index {index}")
        )
    if not samples:
        raise UserError(f"{path}: no rows")
    return samples


def read_table(path: Path, *, hidden: bool = False) -> pd.DataFrame:
    """The official table as text, its columns but the options' in lower case.

    Args:
        path: the file.
        hidden: it has no answers, so the column need not be there.

    Raises:
        UserError: it is missing, no table, lacks a column, or an index is doubled or no number.
    """
    try:
        # Without keep_default_na an option that reads "None" or "NA" would become an empty one.
        table = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a tab-separated table ({error})") from error
    table = table.rename(columns=lambda name: name if name in _LETTERS else name.lower())
    needed = [column for column in _REQUIRED if not (hidden and column == "answer")]
    missing = [column for column in needed if column not in table]
    if missing:
        raise UserError(f"{path}: no column {', '.join(map(repr, missing))}")
    doubled = table["index"][table["index"].duplicated()]
    if len(doubled):
        raise UserError(f"{path}: index {doubled.iloc[0]!r} is doubled; every row needs its own")
    for line, index in enumerate(table["index"]):
        if not index.isdigit():
            raise UserError(f"{path}: row {line}: index {index!r} is not a whole number")
    return table


def is_copy(index: str, known: Container[str]) -> bool:
    """Whether a row is the circular copy of one that is known, by their indices."""
    base = base_index(index)
    return base != index and base in known


def base_index(index: str) -> str:
    """That of the question of which a row is a circular copy, or its own."""
    return str(int(index) % _CIRCULAR_STEP)


def image_of(index: str, images: Mapping[str, str], path: Path) -> str:
    """The row's base64 text, looked up where the column holds another row's index.

    Raises:
        UserError: there is none.
    """
    text = images[index]
    if len(text) <= _LONGEST_INDEX and text.isdigit():
        if text not in images:
            raise UserError(f"{path}: index {index}: the image is that of row {text}, not there")
        text = images[text]
    if not text or (len(text) <= _LONGEST_INDEX and text.isdigit()):
        raise UserError(f"{path}: index {index}: no image")
    return text


def option_columns(row: Mapping[str, str]) -> list[str]:
    """The letters of the row's options; lmms-eval's export writes an empty cell as "nan"."""
    return [letter for letter in _LETTERS if letter in row and row[letter] not in ("", "nan")]


def circular_orders(
    row: Mapping[str, str], image: ImageSource, where: str
) -> Iterator[ChoiceSample]:
    """A question in every cyclic order of its options, the file's own first.

    Args:
        row: the cells of the required columns as text; an absent one is empty or "nan".
        image: the question's picture.
        where: the row's place, for errors.

    Raises:
        UserError: no answer, one that names no option, or fewer than two options.
    """
    index = row["index"]
    columns = option_columns(row)
    if not row["answer"]:
        raise UserError(
            f"{where}: no answer; those of the test split are hidden, use the dev file "
            "(or task mmbench-test)"
        )
    if row["answer"] not in columns:
        raise UserError(f"{where}: answer {row['answer']!r} names no option; known: {columns}")
    if len(columns) < 2:
        raise UserError(f"{where}: a question needs two options or more")
    hint = row["hint"] if row["hint"] not in ("", "nan") else None
    gold = columns.index(row["answer"])
    for shift in range(len(columns)):
        options = tuple(row[c] for c in columns[shift:] + columns[:shift])
        yield ChoiceSample(
            id=f"{index}-{shift}",
            cluster=index,
            groups=tuple(dict.fromkeys((row["category"], row["l2-category"]))),
            prompt=mmbench_prompt(row["question"], options, hint),
            images=(image,),
            question_type=MULTIPLE_CHOICE,
            options=options,
            gold=ascii_uppercase[(gold - shift) % len(columns)],
            shift=shift,
        )
