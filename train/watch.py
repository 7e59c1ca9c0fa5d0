"""What looks on while a stage trains: the dynamics and their verdict, early stops, the report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from cwdpo_bench.train.base import BaseTrainer
from cwdpo_bench.train.cooling import CoolingParameters, CoolingTracker
from cwdpo_bench.train.data import Pair
from cwdpo_bench.train.dynamics import DynamicsCallback, DynamicsLog
from cwdpo_bench.train.probes import Probe
from cwdpo_bench.train.record import hyperparameters
from cwdpo_bench.train.residuals import PairLoss, Scores
from cwdpo_bench.train.sections import GRPO, PPO, Dynamics, Objective
from cwdpo_bench.train.stopping import EarlyStopping
from cwdpo_bench.train.terms import SequenceScores, loss_and_metrics, needed_views, needs_rejected
from cwdpo_bench.train.verdict import Verdict, judge
from cwdpo_bench.vlm import VLM

Measured = Callable[[dict[str, Any], Verdict], None]
"""Called with every measurement and the verdict on its stage so far."""

StepReport = Callable[[str, int, int, float | None], None]
"""Called with the stage, the step, the stage's last step, and the last logged loss."""

Saved = Callable[["Stage", Path, dict[str, Any]], None]
"""Called with a checkpoint in the middle of a stage, and the record of that stage so far."""


@dataclass(frozen=True)
class Stage:
    """One stage of a run: what it minimises, on which pairs, where, after how many steps."""

    name: str
    objective: Objective
    pairs: Sequence[Pair]
    folder: Path
    offset: int


@dataclass(frozen=True)
class Watch:
    """What looks on while a stage trains."""

    probe: Probe
    log: DynamicsLog
    settings: Dynamics
    report: StepReport | None
    measured: Measured | None
    saved: Saved | None = None

    def verdict(self, stage: Stage) -> Verdict:
        """On the curves of a stage so far."""
        rows, rules = self.log.of(stage.name), self.settings.verdict
        return judge(rows, rules, pushes_down=_pushes_down(stage.objective))

    def outcome(
        self,
        trainer: BaseTrainer,
        stage: Stage,
        dynamics: DynamicsCallback,
        stopping: EarlyStopping | None,
    ) -> dict[str, Any]:
        """What the record of a stage says of its dynamics; an early stop's weights are loaded."""
        found = {"dynamics": dynamics.cost(), "verdict": self.verdict(stage).record()}
        if stopping is not None:
            trainer.load_weights(stopping.finish())
            stopping.clear()
            found["stopped"] = stopping.record()
        return found

    def dynamics(
        self,
        stage: Stage,
        objective: Objective,
        vlm: VLM,
        cooling: CoolingParameters | CoolingTracker | None,
    ) -> DynamicsCallback:
        """To be made before the stage's first step: it scores the policy of now."""

        def measured(rows: list[dict[str, Any]]) -> None:
            if self.measured is not None:
                self.measured(rows[-1], self.verdict(stage))

        return DynamicsCallback(
            self.probe,
            self.log,
            stage=stage.name,
            offset=stage.offset,
            every=self.settings.every,
            cooling=None if cooling is None else cooling.weight,
            start=vlm.model,
            settings=self.settings,
            pair_loss=_pair_loss(objective, cooling),
            beta=getattr(objective, "beta", None),
            on_measure=measured,
        )

    def stopping(self, stage: Stage, objective: Objective) -> EarlyStopping | None:
        """What ends the stage early and keeps its best weights, where the recipe wants it."""
        if not self.settings.stop_on:
            return None
        return EarlyStopping(
            self.log,
            self.settings,
            stage=stage.name,
            folder=stage.folder,
            pushes_down=_pushes_down(objective),
        )

    def callbacks(
        self,
        stage: Stage,
        cooling: CoolingParameters | CoolingTracker | None,
        dynamics: DynamicsCallback,
        stopping: EarlyStopping | None,
    ) -> list[TrainerCallback]:
        """All of it as the Trainer takes it, in the order in which it must look."""
        report = [] if self.report is None else [_ReportCallback(self.report, stage.name)]
        tracker = [cooling] if isinstance(cooling, CoolingTracker) else []
        # It reads what was measured at the same step.
        stops = [] if stopping is None else [stopping]
        saved = [] if self.saved is None else [_SavedCallback(self, stage, self.saved)]
        return [*tracker, dynamics, *stops, *report, *saved]


class _ReportCallback(TrainerCallback):
    """Passes every step on to the front door's progress display."""

    def __init__(self, report: StepReport, stage: str) -> None:
        self._report, self._stage = report, stage
        self._loss: float | None = None

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._loss = (kwargs.get("logs") or {}).get("loss", self._loss)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._report(self._stage, state.global_step, state.max_steps, self._loss)


class _SavedCallback(TrainerCallback):
    """Passes every checkpoint on, once it is whole."""

    def __init__(self, watch: Watch, stage: Stage, saved: Saved) -> None:
        self._watch, self._stage, self._saved = watch, stage, saved

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        stage = self._stage
        so_far = {
            "objective": stage.objective.kind,
            "pairs": len(stage.pairs),
            "steps": state.global_step,
            "hyperparameters": hyperparameters(args, stage.objective),
            "verdict": self._watch.verdict(stage).record(),
        }
        self._saved(stage, Path(args.output_dir) / f"checkpoint-{state.global_step}", so_far)


def _pushes_down(objective: Objective) -> bool:
    """Whether training lowers some answers' probability on purpose."""
    return needs_rejected(objective) or isinstance(objective, PPO | GRPO)


def _pair_loss(
    objective: Objective, cooling: CoolingParameters | CoolingTracker | None
) -> PairLoss | None:
    """The stage's loss of one pair; None where it reads more than the pair's two answers."""
    views = needed_views(objective)
    if not views or not set(views) <= {"chosen", "rejected"}:
        return None

    def loss(chosen: Scores, rejected: Scores, *reference: Scores) -> torch.Tensor:
        now = cooling.parameters if isinstance(cooling, CoolingTracker) else cooling
        policy, start = (
            {
                view: SequenceScores(side.logp, side.mean_logp)
                for view, side in zip(("chosen", "rejected"), sides, strict=True)
                if view in views
            }
            for sides in ((chosen, rejected), reference)
        )
        return loss_and_metrics(objective, policy, start, now)[0]

    return loss
