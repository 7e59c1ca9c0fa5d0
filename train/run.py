"""The `train` command: data → stages → a checkpoint folder that says how it was made.

The folder holds what `save_pretrained` writes, the processor, `recipe.yaml` as run,
`provenance.json`, `dynamics.parquet` and its plot, `trainer_state.json` of the last stage, and each
stage's own folder with the Trainer's checkpoints.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PrinterCallback, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from cwdpo_bench.errors import UserError
from cwdpo_bench.files import write_json, write_text
from cwdpo_bench.train.base import BaseTrainer
from cwdpo_bench.train.cooling import CoolingParameters, CoolingTracker, make_cooling
from cwdpo_bench.train.curriculum import curriculum_order, reordered
from cwdpo_bench.train.data import Pair, read_pairs, split_stages
from cwdpo_bench.train.dynamics import DynamicsCallback, DynamicsLog
from cwdpo_bench.train.negatives import OnPolicyNegatives, frozen_copy
from cwdpo_bench.train.plots import plot_dynamics, plot_influence
from cwdpo_bench.train.prepared import PreparedPairs
from cwdpo_bench.train.probes import Probe
from cwdpo_bench.train.recipe import Recipe, arguments_class
from cwdpo_bench.train.record import new_record, seed_of, take_up
from cwdpo_bench.train.reference import (
    REFERENCE_FILE,
    Reference,
    kept_reference,
    reference_fingerprint,
)
from cwdpo_bench.train.residuals import PairLoss, Scores
from cwdpo_bench.train.rewards import build_reward
from cwdpo_bench.train.sampled import sampled_trainer
from cwdpo_bench.train.sections import CWDPO, GRPO, PPO, Dynamics, Objective
from cwdpo_bench.train.smoothing import has_constraint, never_acted, share_active
from cwdpo_bench.train.stage_data import stage_data
from cwdpo_bench.train.start import base_name, init_record, load, start_model
from cwdpo_bench.train.stopping import EarlyStopping
from cwdpo_bench.train.terms import (
    SequenceScores,
    loss_and_metrics,
    needed_views,
    needs_rejected,
)
from cwdpo_bench.train.trainer import (
    PairCollator,
    PreferenceTrainer,
    autocast_of,
    reference_scores,
)
from cwdpo_bench.train.verdict import Verdict, judge, worst
from cwdpo_bench.train.views import OWN, by_image, has_image_contrast, under_image
from cwdpo_bench.vlm import VLM

Measured = Callable[[dict[str, Any], Verdict], None]
"""Called with every measurement and the verdict on its stage so far."""

StepReport = Callable[[str, int, int, float | None], None]
"""Called with the stage, the step, the stage's last step, and the last logged loss."""


@dataclass(frozen=True)
class _Stage:
    """One stage of a run: what it minimises, on which pairs, where, after how many steps."""

    name: str
    objective: Objective
    pairs: list[Pair]
    folder: Path
    offset: int


@dataclass(frozen=True)
class _Watch:
    """What looks on while a stage trains."""

    probe: Probe
    log: DynamicsLog
    settings: Dynamics
    report: StepReport | None
    measured: Measured | None

    def verdict(self, stage: _Stage) -> Verdict:
        """On the curves of a stage so far."""
        rows, rules = self.log.of(stage.name), self.settings.verdict
        return judge(rows, rules, pushes_down=_pushes_down(stage.objective))

    def outcome(
        self,
        trainer: BaseTrainer,
        stage: _Stage,
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
        stage: _Stage,
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

    def stopping(self, stage: _Stage, objective: Objective) -> EarlyStopping | None:
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
        stage: _Stage,
        cooling: CoolingParameters | CoolingTracker | None,
        dynamics: DynamicsCallback,
        stopping: EarlyStopping | None,
    ) -> list[TrainerCallback]:
        report = [] if self.report is None else [_ReportCallback(self.report, stage.name)]
        tracker = [cooling] if isinstance(cooling, CoolingTracker) else []
        # It reads what was measured at the same step.
        stops = [] if stopping is None else [stopping]
        return [*tracker, dynamics, *stops, *report]


class _ReportCallback(TrainerCallback):
    """Passes every step on to the front door's progress display."""

    def __init__(self, report: StepReport, stage: str) -> None:
        self._report, self._stage = report, stage
        self._loss: float | None = None

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._loss = (kwargs.get("logs") or {}).get("loss", self._loss)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._report(self._stage, state.global_step, state.max_steps, self._loss)


def train(
    recipe: Recipe,
    *,
    model: str,
    data: Path,
    output: Path,
    probe: Path | None = None,
    resume: bool = False,
    model_name: str | None = None,
    report: StepReport | None = None,
    measured: Measured | None = None,
) -> dict[str, Any]:
    """Run every stage of a recipe and save the checkpoint in `output`; returns the provenance.

    Args:
        recipe: validated.
        model: folder or Hub id of the start.
        data: preference file.
        output: a new folder, or with `resume` the folder of the interrupted run.
        probe: held-out pairs for the dynamics; without it a tenth of the data, at most
            `dynamics.pairs`, is held out.
        resume: go on from the last checkpoint.
        model_name: what the provenance calls the model; default `model`.
        report: called after every step.
        measured: called after every measurement of the dynamics.

    Raises:
        UserError: bad data, model, recipe or folder; a loss that is not finite.
    """
    rejected = any(needs_rejected(objective) for objective in recipe.stages().values())
    if recipe.data.curriculum != "none" and not rejected:
        raise UserError(
            f"recipe {recipe.name}: data.curriculum orders pairs by their rejected answers, and "
            "this recipe reads none; remove the key"
        )
    rows = read_pairs(data, on_bad_row=recipe.data.on_bad_row, need_rejected=rejected)
    pairs, probe_pairs = _hold_out(recipe, rows.pairs, probe)
    record = new_record(recipe, model_name or model, data, rows, probe)
    record["data"].update(pairs=len(pairs), probe_pairs=len(probe_pairs))
    record = take_up(output, recipe, record, resume)
    if record["status"] == "finished":
        return record

    vlm = start_model(recipe, model)
    record["model"].update(base=base_name(vlm), init=init_record(recipe))
    write_text(output / "recipe.yaml", recipe.to_yaml())
    write_json(output / "provenance.json", record)
    watch = _Watch(
        Probe(
            vlm,
            probe_pairs,
            batch_size=16,
            train_pairs=pairs,
            answer_pairs=recipe.dynamics.answers.pairs,
            seed=seed_of(recipe),
        ),
        DynamicsLog(output / "dynamics.parquet"),
        recipe.dynamics,
        report,
        measured,
    )
    prepared = _prepare(recipe, vlm, pairs, output)
    record["data"]["prepared"] = prepared.provenance()
    parts = _share_out(recipe, pairs)
    for name, objective in recipe.stages().items():
        last = name == list(recipe.stages())[-1]
        if name in record["stages"]:
            vlm = vlm if last else load(recipe, str(output / name))
            continue
        offset = sum(done["steps"] for done in record["stages"].values())
        stage = _Stage(name, objective, parts[name], output / name, offset)
        started = time.monotonic()
        trainer, details = _train_stage(recipe, stage, vlm, prepared, watch, resume)
        _save(vlm, trainer, output if last else stage.folder)
        record["stages"][name] = {
            "objective": objective.kind,
            "pairs": len(stage.pairs),
            "steps": trainer.state.global_step,
            **details,
            "seconds": round(time.monotonic() - started, 1),
        }
        record["warnings"] += _warnings(recipe.key_of(name), record["stages"][name])
        write_json(output / "provenance.json", record)
    verdict = worst([Verdict(**stage["verdict"]) for stage in record["stages"].values()])
    record["verdict"] = verdict.record()
    title = f"{recipe.name}: {verdict.sentence}"
    plot_dynamics(watch.log.rows, output / "dynamics.png", title)
    if watch.log.influence:
        plot_influence(watch.log.influence, output / "influence.png", recipe.name)
    record["status"] = "finished"
    write_json(output / "provenance.json", record)
    return record


def _train_stage(
    recipe: Recipe,
    stage: _Stage,
    vlm: VLM,
    prepared: PreparedPairs,
    watch: _Watch,
    resume: bool,
) -> tuple[BaseTrainer, dict[str, Any]]:
    """Train one stage; returns what its record says beside the counts."""
    arguments = _training_arguments(recipe, stage)
    if isinstance(stage.objective, PPO | GRPO):
        dynamics = watch.dynamics(stage, stage.objective, vlm, None)
        stopping = watch.stopping(stage, stage.objective)
        watching = watch.callbacks(stage, None, dynamics, stopping)
        sampled = sampled_trainer(stage.objective, vlm, stage.pairs, prepared, arguments, watching)
        _run_trainer(sampled, stage, watch, resume)
        return sampled, watch.outcome(sampled, stage, dynamics, stopping)
    batch_size = arguments.per_device_train_batch_size

    def score(pairs: list[Pair], views: Sequence[str], policy: VLM = vlm) -> Reference:
        return reference_scores(
            policy,
            pairs,
            batch_size,
            views,
            prepared=prepared,
            autocast=lambda: autocast_of(arguments),
        )

    def score_and_keep(pairs: list[Pair], views: Sequence[str]) -> Reference:
        precision = _precision(vlm, arguments, prepared)
        return kept_reference(
            stage.folder / REFERENCE_FILE,
            reference_fingerprint(vlm.model, vlm.processor, pairs, precision),
            views,
            lambda: score(pairs, views),
        )

    seed = seed_of(recipe)
    objective, pairs, reference, easy_below, details = stage_data(
        recipe.key_of(stage.name),
        stage.objective,
        stage.pairs,
        vlm,
        folder=stage.folder,
        seed=seed,
        batch_size=batch_size,
        score=score,
        score_and_keep=score_and_keep,
    )
    if recipe.data.curriculum != "none" and needs_rejected(objective):
        scores = reference or score(pairs, ["chosen", "rejected"])
        if recipe.data.easiness == "margin" and "chosen" not in scores:
            scores = score(pairs, ["chosen", "rejected"])
        pairs, reference = reordered(pairs, reference, curriculum_order(scores, recipe.data))
        arguments.train_sampling_strategy = "sequential"
        details["curriculum"] = recipe.data.curriculum
    views = needed_views(objective)
    collator = PairCollator(prepared, views)
    cooling: CoolingParameters | CoolingTracker | None = None
    if isinstance(objective, CWDPO) and reference is not None:
        cooling = make_cooling(objective.cooling, reference["rejected"].mean_logp)
    dynamics = watch.dynamics(stage, objective, vlm, cooling)
    stopping = watch.stopping(stage, objective)
    trainer = PreferenceTrainer(
        model=vlm.model,
        args=arguments,
        data_collator=collator,
        objective=objective,
        pairs=pairs,
        reference=reference,
        cooling=cooling,
        lengths=[prepared.length(pair) for pair in pairs],
        callbacks=watch.callbacks(stage, cooling, dynamics, stopping),
    )
    on_policy: OnPolicyNegatives | None = None
    if (refresh := getattr(objective, "on_policy", None)) is not None:
        start = frozen_copy(vlm)
        on_policy = OnPolicyNegatives(
            trainer,
            vlm,
            pairs,
            refresh,
            folder=stage.folder,
            seed=seed,
            reward=build_reward(refresh.rewards, pairs),
            score=lambda rows: score(list(rows), views, start),
            easy_below=easy_below,
        )
        trainer.add_callback(on_policy)
    _run_trainer(trainer, stage, watch, resume)
    details["cooling"] = _cooling_record(cooling)
    details |= watch.outcome(trainer, stage, dynamics, stopping)
    if on_policy is not None:
        details["on_policy"] = on_policy.record()
    if has_constraint(objective):
        details["threshold"] = objective.threshold  # type: ignore[union-attr]
        details["penalty_active"] = share_active(trainer.state.log_history)
    return trainer, details


def _run_trainer(trainer: BaseTrainer, stage: _Stage, watch: _Watch, resume: bool) -> None:
    """From the first step or, resumed, from the last whole checkpoint to the end."""
    trainer.remove_callback(PrinterCallback)
    checkpoint = _last_whole_checkpoint(stage.folder) if resume else None
    watch.log.forget_after(stage.name, -1 if checkpoint is None else _step_of(checkpoint))
    with _disk_errors(stage.folder):
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))


def _warnings(key: str, record: dict[str, Any]) -> list[str]:
    """What a user should know of a finished stage."""
    if record.get("penalty_active") == 0:
        return [never_acted(key, record["threshold"])]
    return []


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


def _cooling_record(
    cooling: CoolingParameters | CoolingTracker | None,
) -> dict[str, Any] | None:
    """ℓ_floor and τ at the start of a stage, and at its end where they were tracked."""
    if isinstance(cooling, CoolingTracker):
        now = cooling.parameters
        return {**cooling.start._asdict(), "end": {"floor": now.floor, "tau": now.tau}}
    return None if cooling is None else cooling._asdict()


def _last_whole_checkpoint(folder: Path) -> Path | None:
    """The Trainer writes `trainer_state.json` last: a checkpoint without it was cut off."""
    whole = [path for path in folder.glob("checkpoint-*") if (path / TRAINER_STATE_NAME).is_file()]
    return max(whole, key=_step_of, default=None)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[1])


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Every library says in its own way that the disk is full; users get one."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        text = str(error)
        signs = ("No space left", "File too large", "PytorchStreamWriter", "os error 28")
        if not any(sign in text for sign in signs):
            raise
        raise UserError(
            f"{folder}: a checkpoint cannot be written ({text.splitlines()[0]}); free space, then "
            "go on with --resume"
        ) from error


def _training_arguments(recipe: Recipe, stage: _Stage) -> TrainingArguments:
    keys = {
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        **recipe.trainer_arguments(stage.objective),
    }
    try:
        return arguments_class(stage.objective)(output_dir=str(stage.folder), **keys)
    except (ValueError, TypeError) as error:
        raise UserError(f"recipe {recipe.name}: trainer: {' '.join(str(error).split())}") from error


def _prepare(recipe: Recipe, vlm: VLM, pairs: list[Pair], output: Path) -> PreparedPairs:
    """Tokens and images of all stages' pairs, made once."""
    name, objective = next(iter(recipe.stages().items()))
    arguments = _training_arguments(recipe, _Stage(name, objective, pairs, output / name, 0))
    views = {view for stage in recipe.stages().values() for view in needed_views(stage)}
    images = {OWN, *by_image(sorted(views), contrast=has_image_contrast(pairs))}
    return PreparedPairs(
        vlm,
        [under_image(pair, image) for image in sorted(images) for pair in pairs],
        limit=recipe.data.pixel_cache_gb * 2**30,
        folder=output,
        autocast=lambda: autocast_of(arguments),
    )


def _precision(vlm: VLM, arguments: TrainingArguments, prepared: PreparedPairs) -> str:
    mixed = "bf16" if arguments.bf16 else "fp16" if arguments.fp16 else "no"
    weights = vlm.model.get_input_embeddings().weight.dtype
    rows = "packed" if prepared.packed else "plain"
    return f"{weights} weights, {mixed} autocast, {rows} rows, {vlm.device.type}"


def _save(vlm: VLM, trainer: BaseTrainer, folder: Path) -> None:
    with _disk_errors(folder):
        vlm.model.save_pretrained(str(folder))
        vlm.processor.save_pretrained(str(folder))
        trainer.state.save_to_json(str(folder / TRAINER_STATE_NAME))


def _share_out(recipe: Recipe, pairs: list[Pair]) -> dict[str, list[Pair]]:
    if len(recipe.stages()) == 1 or recipe.data.stages == "shared":
        return dict.fromkeys(recipe.stages(), pairs)
    first, second = split_stages(pairs, recipe.data.stage1_share, seed_of(recipe))
    return {"stage1": first, "stage2": second}


def _hold_out(
    recipe: Recipe, pairs: list[Pair], probe: Path | None
) -> tuple[list[Pair], list[Pair]]:
    """Training pairs and probe pairs, which never overlap."""
    limit = recipe.dynamics.pairs
    if probe is not None:
        return pairs, read_pairs(probe, need_rejected=False).pairs[:limit]
    size = min(limit, len(pairs) // 10)
    if size == 0:
        raise UserError(
            f"{len(pairs)} pairs are too few to hold a tenth out as the probe; name a probe file "
            "with --probe"
        )
    held_out = set(random.Random(seed_of(recipe)).sample(range(len(pairs)), size))
    train_pairs = [pair for i, pair in enumerate(pairs) if i not in held_out]
    return train_pairs, [pairs[i] for i in sorted(held_out)]
