"""The curves of a run, and predicted against realised influence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from cwdpo_bench.calibration.plots import plain_title, save_figure

PANELS = {
    "log p a token": ["chosen_mean_logp", "rejected_mean_logp", "argmax_mean_logp"],
    "log p a token, other answers": [
        "greedy_mean_logp",
        "initial_greedy_mean_logp",
        "paraphrase_mean_logp",
        "other_meaning_mean_logp",
        "train_chosen_mean_logp",
        "held_out_chosen_mean_logp",
        "shuffled_mean_logp",
    ],
    "chosen under other images": ["blank_image_mean_logp", "other_image_mean_logp"],
    "confidence": ["top1_probability", "entropy", "cooling_weight"],
    "token ECE": ["token_ece"],
    "shift from the start": ["tv", "js"],
    "held-out Δlog p": ["delta_chosen", "delta_rejected"],
    "logit residuals": ["chosen_residual", "rejected_residual"],
    "the easy half's share": ["easy_loss_share", "easy_residual_share", "loser_gradient_share"],
}


def plot_dynamics(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draw the curves of one run; panels without a value are left out."""
    frame = pd.DataFrame(rows)
    panels = {
        label: [c for c in columns if c in frame and np.isfinite(frame[c].astype(float)).any()]
        for label, columns in PANELS.items()
    }
    panels = {label: columns for label, columns in panels.items() if columns}
    height = -(-len(panels) // 3)
    figure = Figure(figsize=(14, 3.2 * height + 0.6), layout="constrained")
    grid = figure.subplots(height, 3, squeeze=False)
    for axes, (label, columns) in zip(grid.flat, panels.items(), strict=False):
        for column in columns:
            # Measured less often than the others: join what is there.
            points = frame[["total_step", column]].dropna()
            axes.plot(points["total_step"], points[column], marker=".", label=column)
        axes.set_xlabel("update step")
        axes.set_title(label)
        axes.legend(fontsize="x-small")
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    figure.suptitle(plain_title(title), wrap=True)
    save_figure(figure, path)


def plot_influence(entries: list[dict[str, Any]], path: Path, title: str) -> None:
    """Predicted against realised Δℓ̄ of every step on every observed answer, by kind of answer."""
    frame = pd.DataFrame(entries)
    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.subplots()
    for kind, part in frame.groupby("answer"):
        axes.scatter(part["predicted"], part["realised"], s=10, label=str(kind))
    bound = float(frame[["predicted", "realised"]].abs().to_numpy().max())
    axes.plot((-bound, bound), (-bound, bound), color="black", linestyle="--", linewidth=1)
    axes.set(xlabel="predicted Δℓ̄", ylabel="realised Δℓ̄")
    axes.legend(fontsize="small")
    axes.set_title(plain_title(title), fontsize=10)
    save_figure(figure, path)
