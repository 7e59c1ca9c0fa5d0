"""Stopping a stage early, with the weights of its best measurement (`dynamics.stop_on`).

The best measurement has the highest held-out Δlog p of the chosen answers, Δ_w since the start of
the stage (SPEC 1; the start itself counts, with 0). A stage stops

- on `squeezing`, when the verdict on its curves says so;
- on `delta_logp`, when `dynamics.patience` measurements in a row brought no new best;

and, stopped or not, ends with the weights of the best. All of it follows from the rows of
`dynamics.parquet`, so a resumed run decides as the whole one; the best weights lie in the stage's
folder until it is finished.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from cwdpo_bench.train import processes
from cwdpo_bench.train.dynamics import DynamicsLog
from cwdpo_bench.train.sections import Dynamics
from cwdpo_bench.train.verdict import judge


def best_step(rows: Sequence[dict[str, Any]]) -> int:
    """The step of the first measurement with the highest held-out Δ_w."""
    return int(max(rows, key=lambda row: row["delta_chosen"])["step"])


def stop_reason(
    rows: Sequence[dict[str, Any]], settings: Dynamics, *, pushes_down: bool
) -> str | None:
    """Why a stage with these measurements stops; None where it goes on."""
    if "squeezing" in settings.stop_on:
        verdict = judge(rows, settings.verdict, pushes_down=pushes_down)
        if verdict.name == "squeezing":
            return verdict.sentence
    since = sum(row["step"] > best_step(rows) for row in rows)
    if "delta_logp" in settings.stop_on and since >= settings.patience:
        return f"delta_logp: {since} measurements without a higher held-out Δlog p of the chosen"
    return None


class EarlyStopping(TrainerCallback):
    """Keeps the best weights while a stage trains; stands behind the callback that measures."""

    def __init__(
        self, log: DynamicsLog, settings: Dynamics, *, stage: str, folder: Path, pushes_down: bool
    ) -> None:
        """`folder` is the stage's; `pushes_down` says whether rejected answers are pushed down."""
        self._log, self._settings, self._stage = log, settings, stage
        self._folder, self._pushes_down = folder, pushes_down
        self._kept_with_checkpoint: int | None = None
        self.stopped_at: int | None = None
        self.reason: str | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the start, or take up the best of an interrupted run."""
        if state.global_step == 0:
            self._look(state, control, kwargs["model"])
        else:
            self._kept_with_checkpoint = best_step(self._log.of(self._stage))
            self._prune()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After a measurement: keep the weights where they are the best, stop where it is time."""
        if self._log.of(self._stage)[-1]["step"] == state.global_step:
            self._look(state, control, kwargs["model"])

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A run resumed from this checkpoint needs the best of now; older ones may go."""
        self._kept_with_checkpoint = best_step(self._log.of(self._stage))
        self._prune()

    def finish(self) -> Path:
        """The folder of the best weights, to be loaded before `clear`."""
        return self._best(best_step(self._log.of(self._stage)))

    def clear(self) -> None:
        """Drop what was kept."""
        self._kept_with_checkpoint = None
        processes.wait()
        if not processes.is_first():
            return
        for folder in self._folder.glob("best-*"):
            shutil.rmtree(folder)

    def record(self) -> dict[str, Any]:
        """For `provenance.json`: why and where it stopped, and whose weights were kept."""
        return {
            "reason": self.reason,
            "step": self.stopped_at,
            "kept_step": best_step(self._log.of(self._stage)),
        }

    def _look(self, state: Any, control: Any, model: Any) -> None:
        rows = self._log.of(self._stage)
        step = state.global_step
        if processes.agreed(best_step(rows) == step):
            self._keep(step, model)
        self.reason = processes.agreed(
            stop_reason(rows, self._settings, pushes_down=self._pushes_down)
        )
        if self.reason is not None:
            self.stopped_at = step
            control.should_training_stop = True

    def _keep(self, step: int, model: Any) -> None:
        """Half-written weights must not look whole: the folder gets its name at the end."""
        partial = self._folder / f"partial-best-{step}"
        with processes.first_writes() as writes:
            if writes:
                shutil.rmtree(partial, ignore_errors=True)
            processes.keep_weights(model, partial)
            if writes:
                shutil.rmtree(self._best(step), ignore_errors=True)
                partial.rename(self._best(step))
                self._prune()

    def _best(self, step: int) -> Path:
        return self._folder / f"best-{step}"

    def _prune(self) -> None:
        if not processes.is_first():
            return
        rows = self._log.of(self._stage)
        needed = {self._best(best_step(rows))}
        if self._kept_with_checkpoint is not None:
            needed.add(self._best(self._kept_with_checkpoint))
        for folder in self._folder.glob("best-*"):
            if folder not in needed:
                shutil.rmtree(folder)
