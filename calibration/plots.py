"""Reliability diagrams, after Guo et al. (2017), figure 1, with the number of answers in each bin.

Figures are made through matplotlib's object interface: no pyplot, no display, no global state.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cwdpo_bench.calibration.binned import ReliabilityBins
from cwdpo_bench.files import write_with

# Blue and orange of Okabe and Ito's palette: told apart with colour blindness and in grey.
_BAR, _GAP = "#0072B2", "#E69F00"


def reliability_diagram(bins: ReliabilityBins, title: str = "") -> Figure:
    """Accuracy over confidence by bin with its interval, the gap to it hatched, counts beneath."""
    figure = Figure(figsize=(4.2, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    filled = bins.counts > 0
    left, width = bins.edges[:-1][filled], np.diff(bins.edges)[filled]
    accuracy, confidence = bins.accuracy[filled], bins.confidence[filled]
    upper.bar(left, accuracy, width, align="edge", color=_BAR, edgecolor="white", label="accuracy")
    upper.bar(
        left,
        confidence - accuracy,
        width,
        bottom=accuracy,
        align="edge",
        color="none",
        edgecolor=_GAP,
        hatch="//",
        label="gap to mean confidence",
    )
    middle = left + width / 2
    band = np.clip((accuracy - bins.low[filled], bins.high[filled] - accuracy), 0.0, None)
    upper.errorbar(
        middle,
        accuracy,
        yerr=band,
        fmt="none",
        ecolor="black",
        elinewidth=1,
        capsize=2,
        label="95 % interval",
    )
    upper.plot((0, 1), (0, 1), color="black", linestyle="--", linewidth=1)
    upper.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")
    upper.set_title(plain_title(title), fontsize=10)
    upper.legend(loc="upper left", fontsize=8)
    lower.bar(left, bins.counts[filled], width, align="edge", color=_BAR, edgecolor="white")
    lower.set(xlabel="confidence", ylabel="answers")
    return figure


def plain_title(text: str) -> str:
    """`text` as matplotlib shows it: a `$` in a name would start TeX and fail to draw."""
    return text.replace("$", r"\$")


def save_figure(figure: Figure, path: Path) -> None:
    """Write `figure` atomically, in the format that the suffix of `path` names (png, svg, pdf)."""
    kind = path.suffix.lstrip(".") or "png"
    write_with(path, lambda temporary: figure.savefig(temporary, format=kind, dpi=150))
