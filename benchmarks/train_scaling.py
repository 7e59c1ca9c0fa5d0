"""What a DPO step costs against completion length, prefix length, batch and vocabulary.

    python benchmarks/train_scaling.py --output scaling     # scaling.md and scaling.png
    python benchmarks/train_scaling.py --smoke

One thing is varied at a time; each point is a process of its own that trains the tiny Qwen2.5-VL
whole on pairs of that shape. Time is processor time a step, the median after a warm-up; memory is
the peak above the loaded model. The exponent of a point is the log-log slope from the
point before: up to 1 the cost is at most linear, and where it passes 1.1 the table says so.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import multiprocessing
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from workload import Shape, make_folder, run_ours  # type: ignore[import-not-found]

BASE = Shape("base", 112, 112, prefix=30, completion=11, batch=8, vocabulary=2048)
# The demo's tokenizer has about fifteen hundred tokens: a vocabulary is at least that.
SWEEPS: dict[str, Sequence[int]] = {
    "completion": (11, 44, 176, 352),
    "prefix": (30, 120, 480),
    "batch": (2, 8, 32),
    "vocabulary": (2048, 8192, 32768),
}
SMOKE: dict[str, Sequence[int]] = {"completion": (4, 8), "vocabulary": (2048, 4096)}
STEPS, SMOKE_STEPS = 7, 5
LINEAR = 1.1


def measure(shape: Shape, steps: int) -> dict[str, Any]:
    """The figures of one point."""
    with tempfile.TemporaryDirectory() as name:
        make_folder(shape, Path(name), pairs=2 * shape.batch)
        # Forked, not started: the libraries are imported once for all points.
        with multiprocessing.get_context("fork").Pool(1) as pool:
            return dict(pool.apply(run_ours, (shape, Path(name), steps)))


def sweep(what: str, values: Sequence[int], base: Shape, steps: int) -> list[dict[str, Any]]:
    """One thing varied: value, milliseconds a step, MiB, and the exponent of the time."""
    rows: list[dict[str, Any]] = []
    for value in values:
        result = measure(dataclasses.replace(base, **{what: value}), steps)
        row = {
            "value": value,
            "milliseconds": 1000 * result["step_seconds"],
            "mebibytes": result["peak_bytes"] / 2**20,
            "exponent": math.nan,
        }
        if rows:
            grown = math.log(row["milliseconds"] / rows[-1]["milliseconds"])
            row["exponent"] = grown / math.log(value / rows[-1]["value"])
        rows.append(row)
        print(
            f"{what} {value}: {row['milliseconds']:.0f} ms, {row['mebibytes']:.0f} MiB", flush=True
        )
    return rows


def table(sweeps: dict[str, list[dict[str, Any]]]) -> str:
    """All points as markdown, and a sentence a sweep on where it stops being linear."""
    lines = ["| varied | value | ms a step | MiB | exponent |", "| --- | --- | --- | --- | --- |"]
    verdicts = []
    for what, rows in sweeps.items():
        for row in rows:
            exponent = "" if math.isnan(row["exponent"]) else f"{row['exponent']:.2f}"
            lines.append(
                f"| {what} | {row['value']} | {row['milliseconds']:.0f} | {row['mebibytes']:.0f} | "
                f"{exponent} |"
            )
        beyond = [row["value"] for row in rows if row["exponent"] > LINEAR]
        verdicts.append(
            f"- {what}: at most linear up to {rows[-1]['value']}."
            if not beyond
            else f"- {what}: more than linear from {beyond[0]} on."
        )
    return "\n".join([*lines, "", *verdicts]) + "\n"


def plot(sweeps: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Time and memory against each varied thing, with a line of slope 1 through the first point."""
    figure = Figure(figsize=(4 * len(sweeps), 6), layout="constrained")
    grid = figure.subplots(2, len(sweeps), squeeze=False)
    for column, (what, rows) in enumerate(sweeps.items()):
        values = [row["value"] for row in rows]
        for axes, key in zip(grid[:, column], ("milliseconds", "mebibytes"), strict=True):
            axes.loglog(values, [row[key] for row in rows], marker="o")
            start = rows[0][key]
            axes.loglog(values, [start * v / values[0] for v in values], ":", label="linear")
            axes.set_xlabel(what)
            axes.set_ylabel(f"{key} a step" if key == "milliseconds" else f"peak {key}")
            axes.legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("train_scaling"))
    options = parser.parse_args()
    plan, steps = (SMOKE, SMOKE_STEPS) if options.smoke else (SWEEPS, STEPS)
    sweeps = {what: sweep(what, values, BASE, steps) for what, values in plan.items()}
    text = table(sweeps)
    options.output.with_suffix(".md").write_text(text, encoding="utf-8")
    plot(sweeps, options.output.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    main()
