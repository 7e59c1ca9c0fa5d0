"""Training one stage: its data and reference, the trainer of its objective, what is on record."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PrinterCallback, TrainingArguments

from cwdpo_bench.errors import UserError
from cwdpo_bench.train import processes, trackers
from cwdpo_bench.train.base import BaseTrainer
from cwdpo_bench.train.checkpoints import (
    disk_errors,
    last_whole_checkpoint,
    memory_errors,
    step_of,
)
from cwdpo_bench.train.cooling import CoolingParameters, CoolingTracker, make_cooling
from cwdpo_bench.train.curriculum import curriculum_order, reordered
from cwdpo_bench.train.data import Pair
from cwdpo_bench.train.interruption import SaveOnSignal
from cwdpo_bench.train.negatives import OnPolicyNegatives
from cwdpo_bench.train.prepared import PreparedPairs
from cwdpo_bench.train.recipe import HUB_SWITCHES, Recipe, arguments_class
from cwdpo_bench.train.record import seed_of
from cwdpo_bench.train.reference import (
    REFERENCE_FILE,
    Reference,
    StartWeights,
    kept_reference,
    reference_fingerprint,
)
from cwdpo_bench.train.rewards import build_reward
from cwdpo_bench.train.sampled import sampled_trainer
from cwdpo_bench.train.sections import CWDPO, GRPO, PPO
from cwdpo_bench.train.smoothing import has_constraint, share_active
from cwdpo_bench.train.stage_data import stage_data
from cwdpo_bench.train.terms import needed_views, needs_rejected
from cwdpo_bench.train.tokens import TokenCount
from cwdpo_bench.train.trainer import PairCollator, PreferenceTrainer, autocast_of, reference_scores
from cwdpo_bench.train.watch import Stage, Watch
from cwdpo_bench.vlm import VLM, is_sharded


def train_stage(
    recipe: Recipe,
    stage: Stage,
    vlm: VLM,
    prepared: PreparedPairs,
    watch: Watch,
    resume: bool,
) -> tuple[BaseTrainer, dict[str, Any]]:
    """Train one stage; returns what its record says beside the counts."""
    arguments = training_arguments(recipe, stage)
    refresh = getattr(stage.objective, "on_policy", None)
    if is_sharded(vlm.model) and (refresh or isinstance(stage.objective, PPO | GRPO)):
        what = "on_policy" if refresh else f"recipe kind {stage.objective.kind}"
        raise UserError(
            f"{what} samples answers while it trains, which is not done with weights that are "
            "spread over several processes; train without FSDP"
        )
    if isinstance(stage.objective, PPO | GRPO):
        dynamics = watch.dynamics(stage, stage.objective, vlm, None)
        stopping = watch.stopping(stage, stage.objective)
        watching = watch.callbacks(stage, None, dynamics, stopping)
        sampled = sampled_trainer(stage.objective, vlm, stage.pairs, prepared, arguments, watching)
        tokens = _run_trainer(sampled, vlm, stage, watch, resume)
        return sampled, tokens | watch.outcome(sampled, stage, dynamics, stopping)
    batch_size = arguments.per_device_train_batch_size

    def score(pairs: Sequence[Pair], views: Sequence[str]) -> Reference:
        return reference_scores(
            vlm,
            pairs,
            batch_size,
            views,
            prepared=prepared,
            autocast=lambda: autocast_of(arguments),
        )

    def score_and_keep(pairs: Sequence[Pair], views: Sequence[str]) -> Reference:
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
        batch_size=batch_size * processes.count(),
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
    if refresh is not None:
        start = StartWeights(vlm.model)

        def score_at_start(rows: Sequence[Pair]) -> Reference:
            with start.in_place():
                return score(list(rows), views)

        on_policy = OnPolicyNegatives(
            trainer,
            vlm,
            pairs,
            refresh,
            folder=stage.folder,
            seed=seed,
            reward=build_reward(refresh.rewards, pairs),
            score=score_at_start,
            easy_below=easy_below,
        )
        trainer.add_callback(on_policy)
    details |= _run_trainer(trainer, vlm, stage, watch, resume)
    details["cooling"] = _cooling_record(cooling)
    details |= watch.outcome(trainer, stage, dynamics, stopping)
    if on_policy is not None:
        details["on_policy"] = on_policy.record()
    if has_constraint(objective):
        details["threshold"] = objective.threshold  # type: ignore[union-attr]
        details["penalty_active"] = share_active(trainer.state.log_history)
    return trainer, details


def _run_trainer(
    trainer: BaseTrainer, vlm: VLM, stage: Stage, watch: Watch, resume: bool
) -> dict[str, Any]:
    """From the first step, or the last whole checkpoint, to the end; tells the `tokens`."""
    trainer.remove_callback(PrinterCallback)
    tokens = TokenCount(vlm.model)
    trainer.add_callback(tokens)
    checkpoint = last_whole_checkpoint(stage.folder) if resume else None
    watch.log.forget_after(stage.name, -1 if checkpoint is None else step_of(checkpoint))
    interruption = SaveOnSignal()
    trainer.add_callback(interruption)
    trainer.add_callback(trackers.TrackDynamics(trainer, watch.log, stage.name))
    try:
        with disk_errors(stage.folder), memory_errors(trainer), trackers.tracked(trainer.args):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        interruption.release()
    interruption.raise_if_received(trainer.state.global_step)
    return {"tokens": tokens.record()}


def _cooling_record(
    cooling: CoolingParameters | CoolingTracker | None,
) -> dict[str, Any] | None:
    """ℓ_floor and τ at the start of a stage, and at its end where they were tracked."""
    if isinstance(cooling, CoolingTracker):
        now = cooling.parameters
        return {**cooling.start._asdict(), "end": {"floor": now.floor, "tau": now.tau}}
    return None if cooling is None else cooling._asdict()


def training_arguments(recipe: Recipe, stage: Stage) -> TrainingArguments:
    """The stage's `trainer:` keys on top of what every run of ours has.

    Raises:
        UserError: the Trainer refuses a value.
    """
    keys = {
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        **trackers.named(recipe, stage.name, recipe.trainer_arguments(stage.objective)),
    }
    # `train/hub.py` follows these: the Trainer would push a stage's folder, token and all.
    keys = {key: value for key, value in keys.items() if key not in HUB_SWITCHES}
    try:
        arguments = arguments_class(stage.objective)(output_dir=str(stage.folder), **keys)
    except (ValueError, TypeError) as error:
        raise UserError(f"recipe {recipe.name}: trainer: {' '.join(str(error).split())}") from error
    processes.refuse_other_precision(arguments)
    trackers.refuse_missing(arguments)
    return arguments


def _precision(vlm: VLM, arguments: TrainingArguments, prepared: PreparedPairs) -> str:
    mixed = "bf16" if arguments.bf16 else "fp16" if arguments.fp16 else "no"
    weights = vlm.model.get_input_embeddings().weight.dtype
    rows = "packed" if prepared.packed else "plain"
    return f"{weights} weights, {mixed} autocast, {rows} rows, {vlm.device.type}"
