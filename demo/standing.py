"""Where the bundled base stands on each benchmark: `python -m cwdpo_bench.demo.standing DIR`.

DIR is a demo's folder. Beside the base's score stand the floor, what guessing gives, and for
captions what a person's caption gives: the first reference of each image scored against the others.
A base that is neither at the floor nor at the top leaves room to get better and to get worse.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cwdpo_bench.demo.systems import BASE
from cwdpo_bench.evaluate.captions import caption_rows
from cwdpo_bench.evaluate.results import read_run, summarize
from cwdpo_bench.evaluate.samples import CaptionSample, ChoiceSample
from cwdpo_bench.evaluate.tasks import DEFAULT_TASKS, CaptionTask, find_task


class Standing(NamedTuple):
    """One benchmark: its headline metric by guessing, by the base, and at the top."""

    task: str
    metric: str
    floor: float
    base: float
    top: float


def standings(folder: Path) -> list[Standing]:
    """The base of a finished demo on the five benchmarks of its data.

    Raises:
        UserError: the folder holds no run of the base, or no data.
    """
    scores = read_run(folder / "runs" / BASE).results["tasks"]
    found = []
    for name in DEFAULT_TASKS:
        task = find_task(name)
        metric = "CIDEr" if isinstance(task, CaptionTask) else "accuracy"
        base = float(scores[name]["metrics"][metric]["value"])
        if isinstance(task, CaptionTask):
            samples = task.load(folder / "data")
            found.append(Standing(name, metric, _of_others(samples), base, _of_people(samples)))
        else:
            found.append(Standing(name, metric, by_guessing(task.load(folder / "data")), base, 1.0))
    return found


def by_guessing(samples: list[ChoiceSample]) -> float:
    """Accuracy of a random option, in all orders of a question at once; open questions score 0."""
    orders: dict[str, list[float]] = {}
    for sample in samples:
        share = 1 / len(sample.options) if sample.options else 0.0
        orders.setdefault(sample.cluster, []).append(share)
    return float(np.mean([np.prod(shares) for shares in orders.values()]))


def _of_people(samples: list[CaptionSample]) -> float:
    """CIDEr of every image's first reference against its others."""
    return _cider(samples, [sample.references[0] for sample in samples])


def _of_others(samples: list[CaptionSample]) -> float:
    """CIDEr of the next image's first reference: right in form, of another picture."""
    return _cider(samples, [sample.references[0] for sample in [*samples[1:], samples[0]]])


def _cider(samples: list[CaptionSample], captions: list[str]) -> float:
    others = [replace(sample, references=sample.references[1:]) for sample in samples]
    predictions = {s.id: caption for s, caption in zip(samples, captions, strict=True)}
    rows = caption_rows(others, predictions).samples
    return float(summarize(rows)["metrics"]["CIDEr"]["value"])


def main() -> None:
    """Print the table as markdown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="of a finished demo")
    print("| benchmark | metric | by guessing | base | top |\n| --- | --- | ---: | ---: | ---: |")
    for row in standings(parser.parse_args().folder):
        figures = " | ".join(f"{100 * value:.1f}" for value in row[2:])
        print(f"| {row.task} | {row.metric} | {figures} |")


if __name__ == "__main__":
    main()
