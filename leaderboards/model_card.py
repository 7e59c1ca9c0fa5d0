"""What goes into other people's files: a model card's metadata, and a table between two markers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from cwdpo_bench.errors import UserError
from cwdpo_bench.files import write_text
from cwdpo_bench.leaderboards.comparison import Comparison, TaskComparison
from cwdpo_bench.leaderboards.display import CALIBRATION_HEADLINES, QUALITY, scale
from cwdpo_bench.markup import plain

BEGIN, END = "<!-- cwdpo-bench:begin -->", "<!-- cwdpo-bench:end -->"

_DATASETS = {
    "coco": ("COCO Captions, Karpathy split", "image-to-text"),
    "flickr30k": ("Flickr30k, Karpathy split", "image-to-text"),
    "nocaps": ("NoCaps", "image-to-text"),
    "mmmu": ("MMMU", "visual-question-answering"),
    "mmbench": ("MMBench v1.1", "visual-question-answering"),
}


def to_model_index(comparison: Comparison) -> str:
    """The `model-index` block of a Hugging Face model card, as YAML.

    It is of one model: the only run, or the one beside the baseline. Source: the Hub's
    documentation of model cards, "Evaluation results".

    Raises:
        UserError: there are several models to choose from.
    """
    names = [s.name for s in comparison.systems]
    chosen = [name for name in names if name != comparison.baseline] or names
    if len(chosen) > 1:
        raise UserError(
            f"a model card is of one model, not of {', '.join(plain(name) for name in chosen)}; "
            "name one run, and the baseline before it if there is one"
        )
    (name,) = chosen
    results = [
        _result(task, metric, name)
        for task in comparison.tasks
        for metric in task.scores.get(name, {})
        if metric in QUALITY or metric in CALIBRATION_HEADLINES
    ]
    entry = {"name": plain(name), "results": results}
    text: str = yaml.safe_dump(
        {"model-index": [entry]}, sort_keys=False, allow_unicode=True, width=100
    )
    return text


def _result(task: TaskComparison, metric: str, system: str) -> dict[str, Any]:
    title, kind = _DATASETS.get(task.name, (plain(task.name), "other"))
    score = task.scores[system][metric]
    return {
        "task": {"type": kind},
        "dataset": {"type": plain(task.name), "name": title},
        "metrics": [
            {
                "type": metric.lower(),
                "name": metric,
                "value": round(score.value * scale(metric), 3),
                "verified": False,
            }
        ],
    }


def update_between_markers(path: Path, block: str) -> None:
    """Put `block` between the two markers of a file and leave the rest as it is.

    Raises:
        UserError: the file is missing or cannot be written, or a marker is missing, doubled or
            before the other.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file to update") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    for marker in (BEGIN, END):
        if text.count(marker) != 1:
            raise UserError(
                f"{path}: the marker {marker} must stand there once, not {text.count(marker)} "
                "times; the table is written between the two"
            )
    before, rest = text.split(BEGIN)
    if END not in rest:
        raise UserError(f"{path}: the marker {END} stands before {BEGIN}; turn them round")
    newline = "\r\n" if "\r\n" in text else "\n"
    inside = block.strip().replace("\n", newline)
    after = rest.split(END)[1]
    whole = f"{before}{BEGIN}{newline}{newline}{inside}{newline}{newline}{END}{after}"
    write_text(path, whole)
