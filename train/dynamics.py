"""Learning dynamics on held-out probe pairs (SPEC 2, first form): one row a measurement.

Columns of `dynamics.parquet`: `stage`, `step` (of the stage), `total_step`, then, under the policy
of that step: `chosen_mean_logp` and `rejected_mean_logp` (ℓ̄, nats a token, mean over pairs),
`chosen_logp` and `rejected_logp` (sums a pair, mean over pairs), and on the chosen answers'
contexts, means over token positions: `argmax_mean_logp`, `top1_probability`, `entropy`,
`token_ece`, `tv` and `js` (shift from the initial policy); `cooling_weight` is the mean w_c.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from transformers import TrainerCallback

from cwdpo_bench.calibration import ece
from cwdpo_bench.calibration.plots import save_figure
from cwdpo_bench.errors import UserError
from cwdpo_bench.files import write_with
from cwdpo_bench.train.data import Pair
from cwdpo_bench.vlm import (
    VLM,
    Batch,
    Distribution,
    TokenStatistics,
    average_confidence,
    build_batch,
    completion_hidden,
    completion_statistics,
    output_head,
    sequence_logps,
)

CoolingRule = Callable[[torch.Tensor], torch.Tensor]
"""ℓ̄_θ(y_l) of B pairs to their w_c."""


class Probe:
    """Probe pairs, encoded once, with the initial policy's distribution on the chosen answers."""

    def __init__(self, vlm: VLM, pairs: list[Pair], batch_size: int) -> None:
        """Encode the pairs and keep the policy of now as the initial one."""
        self._batches: list[tuple[Batch, Batch | None]] = []
        for start in range(0, len(pairs), batch_size):
            part = pairs[start : start + batch_size]
            prompts = [pair.open() for pair in part]
            rejected = [pair.rejected for pair in part if pair.rejected is not None]
            self._batches.append(
                (
                    build_batch(vlm.processor, prompts, [pair.chosen for pair in part]),
                    build_batch(vlm.processor, prompts, rejected)
                    if len(rejected) == len(part)
                    else None,
                )
            )
        head = output_head(vlm.model)
        # Where the head itself is trained, the initial distribution needs the head of now.
        trained = any(parameter.requires_grad for parameter in head.parameters())  # type: ignore[attr-defined]
        self._initial_head = copy.deepcopy(head) if trained else head
        self._initial_hidden: list[torch.Tensor] = []
        with torch.no_grad():
            for chosen, _ in self._batches:
                hidden = completion_hidden(vlm.model, chosen.to(vlm.device))
                self._initial_hidden.append(hidden.cpu())

    @torch.no_grad()
    def measure(self, model: Any, cooling: CoolingRule | None = None) -> dict[str, float]:
        """The columns of the module's docstring under the policy of now."""
        training, device = model.training, next(model.parameters()).device
        model.eval()
        chosen_parts, rejected_parts = [], []
        for (chosen, rejected), hidden in zip(self._batches, self._initial_hidden, strict=True):
            initial = Distribution(hidden.to(device), self._initial_head)
            on_device = chosen.to(device)
            scores = completion_statistics(model, on_device, statistics=True, other=initial)
            chosen_parts.append(_chosen_columns(scores, on_device))
            if rejected is not None:
                on_device = rejected.to(device)
                logps = completion_statistics(model, on_device).logps
                rejected_parts.append(_pair_columns(logps, on_device.mask))
        model.train(training)
        return _summary(chosen_parts, rejected_parts, cooling)


def _pair_columns(logps: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"mean_logp": average_confidence(logps, mask).cpu(), "logp": sequence_logps(logps).cpu()}


def _chosen_columns(scores: TokenStatistics, batch: Batch) -> dict[str, torch.Tensor]:
    assert scores.top1_id is not None
    assert scores.top1_probability is not None
    tokens = {
        "entropy": scores.entropy,
        "top1_probability": scores.top1_probability,
        "correct": scores.top1_id.eq(batch.targets),
        "tv": scores.tv,
        "js": scores.js,
    }
    columns = {name: values[batch.mask].cpu() for name, values in tokens.items()}  # type: ignore[index]
    argmax = average_confidence(
        scores.top1_probability.log().masked_fill(~batch.mask, 0), batch.mask
    )
    return {**columns, **_pair_columns(scores.logps, batch.mask), "argmax": argmax.cpu()}


def _summary(
    chosen_parts: list[dict[str, torch.Tensor]],
    rejected_parts: list[dict[str, torch.Tensor]],
    cooling: CoolingRule | None,
) -> dict[str, float]:
    chosen = {name: torch.cat([part[name] for part in chosen_parts]) for name in chosen_parts[0]}
    if not torch.isfinite(chosen["mean_logp"]).all():
        raise UserError(
            "the model gives log-probabilities that are not finite on the probe pairs; look at the "
            "starting weights, or lower trainer.learning_rate"
        )
    row: dict[str, Any] = {
        "chosen_mean_logp": chosen["mean_logp"].mean(),
        "chosen_logp": chosen["logp"].mean(),
        "argmax_mean_logp": chosen["argmax"].mean(),
        "token_ece": ece(
            chosen["top1_probability"].double().clamp(max=1).numpy(), chosen["correct"].numpy()
        ),
        **{name: chosen[name].mean() for name in ("top1_probability", "entropy", "tv", "js")},
    }
    if rejected_parts:
        confidence = torch.cat([part["mean_logp"] for part in rejected_parts])
        row["rejected_mean_logp"] = confidence.mean()
        row["rejected_logp"] = torch.cat([part["logp"] for part in rejected_parts]).mean()
        if cooling is not None:
            row["cooling_weight"] = cooling(confidence).mean()
    return {name: float(value) for name, value in row.items()}


class DynamicsLog:
    """The rows so far, kept on disk after every measurement."""

    def __init__(self, path: Path) -> None:
        """Go on with the rows of `path` where it exists."""
        self._path = path
        self.rows: list[dict[str, Any]] = (
            pd.read_parquet(path).to_dict("records") if path.is_file() else []  # type: ignore[assignment]
        )

    def forget_after(self, stage: str, step: int) -> None:
        """Drop the rows of steps that a resumed run takes again, and of later stages."""
        self.rows = [
            r
            for r in self.rows
            if r["stage"] < stage or (r["stage"] == stage and r["step"] <= step)
        ]

    def add(self, stage: str, step: int, total_step: int, row: dict[str, float]) -> None:
        """Append a measurement unless this step already has one."""
        if any(r["stage"] == stage and r["step"] == step for r in self.rows):
            return
        self.rows.append({"stage": stage, "step": step, "total_step": total_step, **row})
        frame = pd.DataFrame(self.rows)
        write_with(self._path, lambda path: frame.to_parquet(path, index=False))


class DynamicsCallback(TrainerCallback):
    """Measures before the first step of a stage, every `every` steps, and at its end."""

    def __init__(
        self,
        probe: Probe,
        log: DynamicsLog,
        *,
        stage: str,
        offset: int,
        every: int,
        cooling: CoolingRule | None,
    ) -> None:
        """`offset` is the number of steps of the stages before."""
        self._probe, self._log, self._stage = probe, log, stage
        self._offset, self._every, self._cooling = offset, every, cooling

    def _measure(self, step: int, model: Any) -> None:
        row = self._probe.measure(model, self._cooling)
        self._log.add(self._stage, step, self._offset + step, row)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the policy that the stage starts from."""
        if state.global_step == 0:
            self._measure(0, kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure every `every` steps and after the last one."""
        if state.global_step % self._every == 0 or state.global_step == state.max_steps:
            self._measure(state.global_step, kwargs["model"])


def plot_dynamics(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draw the curves of one run: log-probabilities, confidence, calibration, shift."""
    frame = pd.DataFrame(rows)
    panels = {
        "log p a token": ["chosen_mean_logp", "rejected_mean_logp", "argmax_mean_logp"],
        "confidence": ["top1_probability", "entropy", "cooling_weight"],
        "token ECE": ["token_ece"],
        "shift from the start": ["tv", "js"],
    }
    figure = Figure(figsize=(11, 6), layout="constrained")
    for axes, (label, columns) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        for column in columns:
            if column in frame and np.isfinite(frame[column]).any():
                axes.plot(frame["total_step"], frame[column], marker=".", label=column)
        axes.set_xlabel("update step")
        axes.set_title(label)
        axes.legend(fontsize="small")
    figure.suptitle(title)
    save_figure(figure, path)
