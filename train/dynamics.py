"""Learning dynamics on held-out probe pairs (SPEC 2): one row of `dynamics.parquet` a measurement.

Every row: `stage`, `step` (of the stage), `total_step`, and under the policy of that step, means
over held-out pairs, nats:

- `chosen_*`, `rejected_*`: `mean_logp` (ℓ̄, a token) and `logp` (the sum);
- on the chosen answers' contexts: `argmax_mean_logp`, `argmax_logp` (log p of the argmax token),
  `top1_probability`, `entropy`, `token_ece`, `tv` and `js` (shift from the initial policy);
- since the start of the stage: `delta_chosen`, `delta_rejected`, `delta_margin` (held-out Δlog p),
  `chosen_change_error` (standard error of the change of the chosen answers' ℓ̄),
  `preference_accuracy` (share of Δ_w > Δ_l), `preference_probability` (a);
- what pulls at the pairs: `pair_loss`, `chosen_residual`, `rejected_residual`, `easy_loss_share`,
  `easy_residual_share`, `cooling_weight` with `cooling_weight_bin_0` to `_9`.

In rows of every few measurements also the other answers (`probes.py`) and the influence
decomposition (`influence.py`), whose every entry stands in `influence.parquet`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import TrainerCallback

from cwdpo_bench.files import write_with
from cwdpo_bench.train.influence import Step, agreement, measure_influence, too_large
from cwdpo_bench.train.probes import ANSWER_KINDS, Core, Probe, core_columns
from cwdpo_bench.train.residuals import CoolingRule, PairLoss, Pull, Scores, easy_shares, pull
from cwdpo_bench.train.sections import Dynamics
from cwdpo_bench.vlm import is_sharded

OnMeasure = Callable[[list[dict[str, Any]]], None]
"""Called after every measurement with the rows of its stage."""


class DynamicsLog:
    """The rows so far, kept on disk after every measurement."""

    def __init__(self, path: Path) -> None:
        """Go on with the rows of `path` where it exists."""
        self._path = path
        self._influence_path = path.with_name("influence.parquet")
        self.rows = _read_rows(path)
        self.influence = _read_rows(self._influence_path)

    def forget_after(self, stage: str, step: int) -> None:
        """Drop the rows of steps that a resumed run takes again, and of later stages."""

        def kept(row: dict[str, Any]) -> bool:
            return bool(row["stage"] < stage or (row["stage"] == stage and row["step"] <= step))

        self.rows = [row for row in self.rows if kept(row)]
        self.influence = [row for row in self.influence if kept(row)]

    def of(self, stage: str) -> list[dict[str, Any]]:
        """The rows of one stage."""
        return [row for row in self.rows if row["stage"] == stage]

    def add(
        self,
        stage: str,
        step: int,
        total_step: int,
        row: dict[str, float],
        influence: list[dict[str, Any]] | None = None,
        *,
        write: bool = True,
    ) -> None:
        """Append a measurement unless this step has one; without `write` in memory alone."""
        if any(r["step"] == step for r in self.of(stage)):
            return
        place = {"stage": stage, "step": step, "total_step": total_step}
        self.rows.append({**place, **row})
        self.influence += [{**place, **entry} for entry in influence or ()]
        if write:
            _write_rows(self._path, self.rows)
            if self.influence:
                _write_rows(self._influence_path, self.influence)


def _read_rows(path: Path) -> list[dict[str, Any]]:
    return pd.read_parquet(path).to_dict("records") if path.is_file() else []  # type: ignore[return-value]


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    frame = pd.DataFrame(rows)
    write_with(path, lambda temporary: frame.to_parquet(temporary, index=False))


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
        start: Any = None,
        settings: Dynamics | None = None,
        pair_loss: PairLoss | None = None,
        beta: float | None = None,
        on_measure: OnMeasure | None = None,
    ) -> None:
        """Score the policy that the stage starts from, the reference of Δ.

        Args:
            probe: held-out pairs.
            log: where the rows go.
            stage: name of the stage.
            offset: steps of the stages before.
            every: steps between two measurements.
            cooling: w_c of now, where the stage cools.
            start: the model as the stage starts from it; by default the one of the probe.
            settings: how often the answers and the influence are measured; never by default.
            pair_loss: the stage's objective on one pair; without it nothing is said of what pulls.
            beta: of the objective, where it has one, for a = σ(β(Δ_w − Δ_l)).
            on_measure: called after every measurement.
        """
        self._probe, self._log, self._stage = probe, log, stage
        self._offset, self._every, self._cooling = offset, every, cooling
        self._settings, self._pair_loss, self._beta = settings, pair_loss, beta
        self._on_measure = on_measure
        self._made = time.monotonic()
        self._start = probe.core(probe.vlm.model if start is None else start)
        self.seconds = time.monotonic() - self._made
        self.left_out: str | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the policy that the stage starts from."""
        if state.global_step == 0:
            self._measure(args, state, kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure every `every` steps and after the last one."""
        if state.global_step % self._every == 0 or state.global_step == state.max_steps:
            self._measure(args, state, kwargs["model"])

    def cost(self) -> dict[str, Any]:
        """What watching cost since this was made, and what was left out and why."""
        return {
            "seconds": round(self.seconds, 1),
            "share_of_time": round(self.seconds / (time.monotonic() - self._made), 3),
            "answers_left_out": self._probe.left_out,
            "influence_left_out": self.left_out,
        }

    def _measure(self, args: Any, state: Any, model: Any) -> None:
        started, step = time.monotonic(), state.global_step
        core = self._start if step == 0 else self._probe.core(model)
        pulled = self._pull(core)
        row = core_columns(core, self._cooling) | change_columns(
            core, self._start, pulled=pulled, beta=self._beta
        )
        last = step == state.max_steps
        entries: list[dict[str, Any]] = []
        if self._settings is not None:
            if step == 0 and self._log.rows and not self._settings.stop_on:
                # The policy that the stage before ended with: its answers are known.
                row |= answer_columns(self._log.rows[-1])
            elif self._due(self._settings.answers.every, step, last):
                row |= self._probe.answers(model)
            if self._due(self._settings.influence.every, step, last) and pulled is not None:
                found, entries = self._influence(args, model, pulled, core)
                row |= found
        # Every process keeps the rows, which decide when to stop; one writes them.
        write = state.is_world_process_zero
        self._log.add(self._stage, step, self._offset + step, row, entries, write=write)
        self.seconds += time.monotonic() - started
        if self._on_measure is not None and write:
            self._on_measure(self._log.of(self._stage))

    def _due(self, measurements: int, step: int, last: bool) -> bool:
        return last or step % (self._every * measurements) == 0

    def _pull(self, core: Core) -> Pull | None:
        """Of the pairs with a rejected answer; the reference is the start of the stage."""
        if self._pair_loss is None or core.rejected is None or self._start.rejected is None:
            return None
        index = core.with_rejected
        return pull(
            self._pair_loss,
            _picked(core.chosen.scores, index),
            core.rejected.scores,
            _picked(self._start.chosen.scores, index),
            self._start.rejected.scores,
        )

    def _influence(
        self, args: Any, model: Any, pulled: Pull, core: Core
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """The summary for the row, and one entry a (pair stepped on, answer seen)."""
        assert self._settings is not None
        settings = self._settings.influence
        eligible = core.with_rejected[core.with_rejected < self._settings.answers.pairs].tolist()
        pairs = eligible[: settings.pairs]
        if not pairs:
            return {}, []
        self.left_out = too_large(model, len(pairs))
        if is_sharded(model):
            self.left_out = "the weights are spread over several processes"
        if self.left_out is not None:
            return {}, []
        place = {pair: position for position, pair in enumerate(core.with_rejected.tolist())}
        steps = [
            Step(float(pulled.chosen[place[p]]), float(pulled.rejected[place[p]])) for p in pairs
        ]
        branches = [self._probe.branches(model, pair) for pair in pairs]
        found = measure_influence(model, [batch for _, batch in branches], steps, settings.step)
        winner, loser = found.chosen_norms, found.rejected_norms
        row = {
            **agreement(found),
            "loser_gradient_share": float(np.mean(loser / np.maximum(winner + loser, 1e-30))),
            "chosen_gradient_norm": float(winner.mean()),
            "rejected_gradient_norm": float(loser.mean()),
            "influence_belief": float(found.beliefs.mean()),
            "influence_residual": float(found.residuals.mean()),
            "influence_kernel": float(np.abs(found.kernel).mean()),
        }
        seen = [
            (self._probe.pairs[pair].id, kind)
            for pair, (kinds, _) in zip(pairs, branches, strict=True)
            for kind in kinds
        ]
        entries = [
            {
                "updated": self._probe.pairs[pair].id,
                "observed": identity,
                "answer": kind,
                "predicted": found.predicted[u, o],
                "realised": found.realised[u, o],
                "belief": float(found.beliefs[o]),
                "kernel": float(found.kernel[u, o]),
                "residual": found.residuals[u],
                "rate": found.rate,
            }
            for u, pair in enumerate(pairs)
            for o, (identity, kind) in enumerate(seen)
        ]
        return row, entries


def change_columns(
    core: Core, start: Core, *, pulled: Pull | None = None, beta: float | None = None
) -> dict[str, float]:
    """What changed since `start`, and what pulls at the pairs.

    Args:
        core: the policy of now.
        start: the reference of Δ, of the same pairs.
        pulled: the objective's slopes; without them nothing is said of what pulls.
        beta: for a = σ(β(Δ_w − Δ_l)); without it a is absent.
    """
    chosen = core.chosen.scores.logp - start.chosen.scores.logp
    change = (core.chosen.scores.mean_logp - start.chosen.scores.mean_logp).double()
    row: dict[str, float] = {"delta_chosen": float(chosen.mean())}
    if len(change) > 1:
        row["chosen_change_error"] = float(change.std() / len(change) ** 0.5)
    if core.rejected is None or start.rejected is None:
        return row
    rejected = core.rejected.scores.logp - start.rejected.scores.logp
    margin = chosen[core.with_rejected] - rejected
    row["delta_rejected"] = float(rejected.mean())
    row["delta_margin"] = float(margin.mean())
    row["preference_accuracy"] = float((margin > 0).float().mean())
    if beta is not None:
        row["preference_probability"] = float(torch.sigmoid(beta * margin).mean())
    if pulled is not None:
        loser = pulled.rejected.abs() * core.rejected.residuals
        winner = pulled.chosen.abs() * core.chosen.residuals[core.with_rejected]
        row["pair_loss"] = float(pulled.loss.mean())
        row["chosen_residual"] = float(winner.mean())
        row["rejected_residual"] = float(loser.mean())
        row |= easy_shares(core.rejected.scores.mean_logp, pulled, loser)
    return row


def answer_columns(row: dict[str, Any]) -> dict[str, float]:
    """The columns of the second measurement in a row that has them."""
    names = [f"{kind}_{unit}" for kind in ANSWER_KINDS for unit in ("mean_logp", "logp")]
    return {
        name: row[name] for name in (*names, "image_gain") if name in row and np.isfinite(row[name])
    }


def _picked(scores: Scores, index: torch.Tensor) -> Scores:
    return Scores(*(column[index] for column in scores))
