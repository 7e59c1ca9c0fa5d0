"""Test splits whose answers are hidden: what is asked, and the file that their servers want.

MMMU: `mmmu/<Subject>/test-*.parquet`, 10,500 questions. The file is one JSON object from id to
answer: the letter of a multiple-choice question, the reply itself of an open one, as MMMU's code
takes it (`main_eval_only.py`); to be sent to its EvalAI page.

MMBench v1.1: `mmbench/MMBench_TEST_EN_V11.tsv`, every row of it, circular copies included, because
its server counts over them. The file is the same table with a column `prediction` and without
images (VLMEvalKit, `mmb_eval_gradio.py`, which takes .tsv as well as .xlsx).
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from string import ascii_uppercase
from typing import TYPE_CHECKING

import pandas as pd

from cwdpo_bench.errors import UserError
from cwdpo_bench.evaluate.choices import Rules, answered_rows
from cwdpo_bench.evaluate.mmbench import (
    base_index,
    image_of,
    mmbench_prompt,
    option_columns,
    read_table,
)
from cwdpo_bench.evaluate.mmmu import FOLDER, load_files
from cwdpo_bench.evaluate.samples import MULTIPLE_CHOICE, ChoiceSample
from cwdpo_bench.files import write_text

if TYPE_CHECKING:
    # An engine needs torch, which no one should wait for who asks for a task's name.
    from cwdpo_bench.evaluate.engine import ChoiceAnswer

MMBENCH_TSV = Path("mmbench/MMBench_TEST_EN_V11.tsv")
SUBMISSIONS = "submissions"


def mmmu_test_files(root: Path) -> list[Path]:
    """The test parquet files under `root`, sorted by subject."""
    return sorted((root / FOLDER).glob("*/test-*.parquet"))


def load_mmmu_test(root: Path) -> list[ChoiceSample]:
    """The questions of every `mmmu/<Subject>/test-*.parquet`, without golds.

    Raises:
        UserError: no file, an unknown subject, or a row that is not in the official form.
    """
    return load_files(mmmu_test_files(root), root / FOLDER, "test-*.parquet", hidden=True)


def mmbench_test_files(root: Path) -> list[Path]:
    """The test table under `root`."""
    return [root / MMBENCH_TSV] if (root / MMBENCH_TSV).is_file() else []


def load_mmbench_test(root: Path) -> list[ChoiceSample]:
    """Every row of the test table as a question of its own, without golds.

    Raises:
        UserError: the file is missing or a row is not in the official form.
    """
    path = root / MMBENCH_TSV
    table = read_table(path, hidden=True)
    images = dict(zip(table["index"], table["image"], strict=True))
    samples = []
    for cells in table.to_dict("records"):
        row = {str(column): str(cell) for column, cell in cells.items()}
        index, where = row["index"], f"{path}: index {row['index']}"
        letters = option_columns(row)
        if len(letters) < 2 or letters != list(ascii_uppercase[: len(letters)]):
            raise UserError(f"{where}: needs two options or more, from A without a gap")
        options = tuple(row[letter] for letter in letters)
        hint = row["hint"] if row["hint"] not in ("", "nan") else None
        samples.append(
            ChoiceSample(
                id=index,
                cluster=base_index(index),
                images=(image_of(index, images, path),),
                prompt=mmbench_prompt(row["question"], options, hint),
                question_type=MULTIPLE_CHOICE,
                options=options,
                gold="",
                groups=tuple(dict.fromkeys((row["category"], row["l2-category"]))),
            )
        )
    if not samples:
        raise UserError(f"{path}: no rows")
    return samples


def submit_mmmu(samples: Sequence[ChoiceSample], rows: pd.DataFrame, _: Path) -> str:
    """MMMU's file: id → letter, or the reply to an open question.

    A reply in which no letter is found is an empty answer, which is wrong there.
    """
    answers = {
        sample.id: (parsed or "") if sample.question_type == MULTIPLE_CHOICE else reply
        for sample, reply, parsed in zip(samples, rows["prediction"], rows["parsed"], strict=True)
    }
    return json.dumps(answers, indent=1, ensure_ascii=False) + "\n"


def submit_mmbench(_: Sequence[ChoiceSample], rows: pd.DataFrame, root: Path) -> str:
    """MMBench's table with a column of replies, for the rows that were asked."""
    table = read_table(root / MMBENCH_TSV, hidden=True).drop(columns="image")
    reply_of = dict(zip(rows["id"], rows["prediction"], strict=True))
    asked = table[table["index"].isin(reply_of)]
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    writer.writerow([*asked.columns, "prediction"])
    for index, row in zip(asked["index"], asked.itertuples(index=False), strict=True):
        writer.writerow([*row, reply_of[index]])
    return text.getvalue()


Submit = Callable[[Sequence[ChoiceSample], pd.DataFrame, Path], str]
_FILES: dict[Rules, tuple[str, Submit, str]] = {
    "mmmu": ("mmmu_test.json", submit_mmmu, "https://eval.ai/web/challenges/challenge-page/2179"),
    "mmbench": ("mmbench_test_en_v11.tsv", submit_mmbench, "https://mmbench.opencompass.org.cn"),
}


def write_submission(
    benchmark: Rules,
    samples: Sequence[ChoiceSample],
    answers: Sequence[ChoiceAnswer],
    output: Path,
    root: Path = Path(),
) -> tuple[pd.DataFrame, list[str]]:
    """Write the file for a benchmark's server; return the rows, and where the file is.

    Args:
        benchmark: `mmmu` or `mmbench`.
        samples: those that were asked.
        answers: what the model said to each.
        output: the run folder; the file goes to `submissions/` in it.
        root: the data root.
    """
    name, submit, address = _FILES[benchmark]
    rows = answered_rows(samples, [answer.text for answer in answers], rules=benchmark)
    write_text(output / SUBMISSIONS / name, submit(samples, rows, root))
    told = f"answers are hidden; {SUBMISSIONS}/{name} is for {address}"
    return rows, [told]


write_mmmu = partial(write_submission, "mmmu")
write_mmbench = partial(write_submission, "mmbench")
