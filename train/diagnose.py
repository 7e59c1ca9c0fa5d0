"""`diagnose`: the probe's figures of any two checkpoints, trained here or elsewhere, and a verdict.

The base takes the place of a stage's start: Δ, TV, JS and the initial greedy answer refer to it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from cwdpo_bench.calibration.plots import plain_title, save_figure
from cwdpo_bench.errors import UserError
from cwdpo_bench.files import write_json
from cwdpo_bench.train.data import read_pairs
from cwdpo_bench.train.dynamics import change_columns
from cwdpo_bench.train.layouts import AUTO
from cwdpo_bench.train.probes import ANSWER_KINDS, Probe, core_columns
from cwdpo_bench.train.sections import Dynamics
from cwdpo_bench.train.verdict import judge
from cwdpo_bench.vlm import VLM

_KINDS = ("chosen", "rejected", "argmax", *ANSWER_KINDS)


def diagnose(
    checkpoint: VLM,
    data: Path,
    *,
    base: VLM | None = None,
    output: Path | None = None,
    image_root: Path | None = None,
    layout: str = AUTO,
) -> dict[str, Any]:
    """Measure a checkpoint on held-out pairs, beside the base it is compared with.

    Args:
        checkpoint: the model in question.
        data: held-out pairs; rows need no rejected answer.
        base: what it came from, or any model with the same tokenizer; without it there are
            figures and no verdict.
        output: a folder for `diagnose.json` and `diagnose.png`.
        image_root: what image paths are relative to; default the file's folder.
        layout: of the rows, see `train/layouts.py`.

    Returns:
        `checkpoint` and `base`: figures by the names of `dynamics.parquet`; `verdict`; `pairs`.

    Raises:
        UserError: bad data, two models with different tokenizers, or not finite figures.
    """
    settings = Dynamics()
    found = read_pairs(data, need_rejected=False, image_root=image_root, layout=layout)
    pairs = found.pairs[: settings.pairs]
    start = checkpoint if base is None else base
    if start.tokenizer.get_vocab() != checkpoint.tokenizer.get_vocab():
        raise UserError(
            f"models {start.name!r} and {checkpoint.name!r} have different tokenizers: their "
            "log-probabilities a token cannot be compared"
        )
    probe = Probe(start, pairs, batch_size=16, answer_pairs=settings.answers.pairs)
    core = probe.core(start.model)
    rows = [_figures(probe, start, core_columns(core) | change_columns(core, core))]
    if base is not None:
        now = probe.core(checkpoint.model)
        columns = core_columns(now) | change_columns(now, core)
        rows.append(_figures(probe, checkpoint, columns))
    record: dict[str, Any] = {
        "data": str(data),
        "pairs": len(pairs),
        "checkpoint": {"name": checkpoint.name, "figures": rows[-1]},
        "base": None if base is None else {"name": base.name, "figures": rows[0]},
        "verdict": None,
    }
    if base is not None:
        steps = [{"step": step, **row} for step, row in enumerate(rows)]
        # Two points are all there is: nothing can persist.
        rules = settings.verdict.model_copy(update={"persist": 1})
        record["verdict"] = judge(steps, rules).record()
    if output is not None:
        write_json(output / "diagnose.json", record)
        _plot(record, output / "diagnose.png")
    return record


def _figures(probe: Probe, vlm: VLM, columns: dict[str, float]) -> dict[str, float]:
    figures = columns | probe.answers(vlm.model)
    return {name: value for name, value in figures.items() if np.isfinite(value)}


def table(record: dict[str, Any]) -> Table:
    """The figures side by side, with their differences."""
    base = record["base"]
    columns = ["checkpoint"] if base is None else ["base", "checkpoint", "change"]
    shown = Table(title=f"{record['checkpoint']['name']}: {record['pairs']} held-out pairs")
    shown.add_column("figure")
    for column in columns:
        shown.add_column(column, justify="right")
    for name, value in record["checkpoint"]["figures"].items():
        cells = [f"{value:.3f}"]
        if base is not None:
            before = base["figures"].get(name)
            cells.insert(0, "" if before is None else f"{before:.3f}")
            cells.append("" if before is None else f"{value - before:+.3f}")
        shown.add_row(name, *cells)
    return shown


def _plot(record: dict[str, Any], path: Path) -> None:
    """ℓ̄ of every answer under both models."""
    figures = record["checkpoint"]["figures"]
    kinds = [kind for kind in _KINDS if f"{kind}_mean_logp" in figures][::-1]
    models = [("checkpoint", record["checkpoint"])]
    if record["base"] is not None:
        models.insert(0, ("base", record["base"]))
    figure = Figure(figsize=(8, 0.45 * len(kinds) + 1.5), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(models)
    for number, (label, model) in enumerate(models):
        values = [model["figures"].get(f"{kind}_mean_logp", np.nan) for kind in kinds]
        places = np.arange(len(kinds)) - number * height
        axes.barh(places, values, height=height, label=label)
    axes.set_yticks(np.arange(len(kinds)) - 0.4 + height / 2, kinds)
    axes.set_xlabel("log p a token (nats), mean over held-out pairs")
    axes.legend()
    verdict = record["verdict"]
    title = "no base to compare with" if verdict is None else verdict["sentence"]
    axes.set_title(plain_title(title), fontsize=9, wrap=True)
    save_figure(figure, path)
