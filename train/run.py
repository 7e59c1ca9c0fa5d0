"""The `train` command: data → stages → a checkpoint folder that says how it was made.

The folder holds what `save_pretrained` writes, the processor, `recipe.yaml` as run,
`provenance.json`, the model card, `dynamics.parquet` and its plot, `trainer_state.json` of the last
stage, and each stage's own folder with the Trainer's checkpoints.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from cwdpo_bench.errors import UserError
from cwdpo_bench.files import existing_parent, write_json, write_text
from cwdpo_bench.train import processes
from cwdpo_bench.train.card import write_beside, write_card
from cwdpo_bench.train.checkpoints import save
from cwdpo_bench.train.data import Pair, read_pairs, split_stages
from cwdpo_bench.train.dynamics import DynamicsLog
from cwdpo_bench.train.hub import hub_of
from cwdpo_bench.train.kept_pairs import KeptPairs
from cwdpo_bench.train.plots import plot_dynamics, plot_influence
from cwdpo_bench.train.prepared import PreparedPairs
from cwdpo_bench.train.probes import Probe
from cwdpo_bench.train.recipe import Recipe
from cwdpo_bench.train.record import hyperparameters, new_record, seed_of, take_up
from cwdpo_bench.train.smoothing import never_acted
from cwdpo_bench.train.stage import train_stage, training_arguments
from cwdpo_bench.train.start import base_name, init_record, load, start_model
from cwdpo_bench.train.terms import needed_views, needs_rejected
from cwdpo_bench.train.trainer import autocast_of
from cwdpo_bench.train.verdict import Verdict, worst
from cwdpo_bench.train.views import OWN, by_image, has_image_contrast, under_image
from cwdpo_bench.train.watch import Measured, Stage, StepReport, Watch
from cwdpo_bench.vlm import VLM, is_sharded


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
        UserError: bad data, model, recipe or folder; a loss that is not finite; a push to the Hub
            that failed, after everything is saved.
    """
    # The first stage's arguments meet the launcher's other processes, where there are any.
    arguments = training_arguments(recipe, _first_stage(recipe, output))
    processes.meet(arguments)
    rejected = any(needs_rejected(objective) for objective in recipe.stages().values())
    if recipe.data.curriculum != "none" and not rejected:
        raise UserError(
            f"recipe {recipe.name}: data.curriculum orders pairs by their rejected answers, and "
            "this recipe reads none; remove the key"
        )
    rows = read_pairs(
        data,
        on_bad_row=recipe.data.on_bad_row,
        need_rejected=rejected,
        image_root=_image_root(recipe),
        layout=recipe.data.format,
        # Where a checkpoint has room, there is room for its pairs.
        folder=existing_parent(output),
    )
    pairs, probe_pairs = _hold_out(recipe, rows.pairs, probe)
    record = new_record(recipe, model_name or model, data, rows, probe)
    record["data"].update(pairs=len(pairs), probe_pairs=len(probe_pairs))
    if processes.is_first():
        record = take_up(output, recipe, record, resume)
    record = processes.agreed(record)
    hub = hub_of(recipe, output) if processes.is_first() else None
    if record["status"] == "finished":
        if hub is not None:
            hub.finish()
        return record
    if hub is not None:
        hub.open()

    vlm = processes.shard(start_model(recipe, model), arguments)
    record["model"].update(base=base_name(vlm), init=init_record(recipe))
    if processes.is_first():
        write_text(output / "recipe.yaml", recipe.to_yaml())
    _keep(output, record)

    def saved(stage: Stage, folder: Path, so_far: dict[str, Any]) -> None:
        vlm.processor.save_pretrained(str(folder))
        write_beside(folder, recipe.to_yaml(), _so_far(record, stage.name, so_far), model)
        if hub is not None:
            hub.checkpoint(folder)

    watch = Watch(
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
        saved,
    )
    # Whoever goes on with a run reads its rows before the first process adds to them.
    processes.wait()
    prepared = _prepare(recipe, vlm, pairs, output, arguments)
    record["data"]["prepared"] = prepared.provenance()
    record["processes"] = {"count": processes.count(), "sharded": is_sharded(vlm.model)}
    parts = _share_out(recipe, pairs)
    for name, objective in recipe.stages().items():
        last = name == list(recipe.stages())[-1]
        if name in record["stages"]:
            vlm = vlm if last else _load_stage(recipe, output / name, arguments)
            continue
        offset = sum(done["steps"] for done in record["stages"].values())
        stage = Stage(name, objective, parts[name], output / name, offset)
        started = time.monotonic()
        trainer, details = train_stage(recipe, stage, vlm, prepared, watch, resume)
        save(vlm, trainer, output if last else stage.folder)
        record["stages"][name] = {
            "objective": objective.kind,
            "pairs": len(stage.pairs),
            "steps": trainer.state.global_step,
            "hyperparameters": hyperparameters(trainer.args, objective),
            **details,
            "seconds": round(time.monotonic() - started, 1),
        }
        record["warnings"] += _warnings(recipe.key_of(name), record["stages"][name])
        if not last and processes.is_first():
            so_far = _so_far(record, name, record["stages"][name])
            write_beside(stage.folder, recipe.to_yaml(), so_far, model)
        _keep(output, record)
        if trainer.is_deepspeed_enabled and not last:
            # Its engine has taken the model apart; the next stage gets a new one.
            vlm = _load_stage(recipe, stage.folder, arguments)
    verdict = _verdict(record)
    record["verdict"] = verdict.record()
    title = f"{recipe.name}: {verdict.sentence}"
    if processes.is_first():
        plot_dynamics(watch.log.rows, output / "dynamics.png", title)
        if watch.log.influence:
            plot_influence(watch.log.influence, output / "influence.png", recipe.name)
    record["status"] = "finished"
    if processes.is_first():
        write_card(output, record, model)
    _keep(output, record)
    if hub is not None:
        hub.finish()
    return record


def _verdict(record: dict[str, Any]) -> Verdict:
    """The worst of the stages'."""
    return worst([Verdict(**stage["verdict"]) for stage in record["stages"].values()])


def _so_far(record: dict[str, Any], name: str, stage: dict[str, Any]) -> dict[str, Any]:
    """The record as it is while a stage, of which this is known, is under way or just done."""
    partial = record | {"stages": record["stages"] | {name: stage}}
    return partial | {"verdict": _verdict(partial).record()}


def _keep(output: Path, record: dict[str, Any]) -> None:
    """The provenance so far, written by the first process."""
    with processes.first_writes() as writes:
        if writes:
            write_json(output / "provenance.json", record)


def _first_stage(recipe: Recipe, output: Path) -> Stage:
    name, objective = next(iter(recipe.stages().items()))
    return Stage(name, objective, [], output / name, 0)


def _load_stage(recipe: Recipe, folder: Path, arguments: TrainingArguments) -> VLM:
    """The policy with which a stage that is done ended."""
    return processes.shard(load(recipe, str(folder)), arguments)


def _warnings(key: str, record: dict[str, Any]) -> list[str]:
    """What a user should know of a finished stage."""
    if record.get("penalty_active") == 0:
        return [never_acted(key, record["threshold"])]
    return []


def _prepare(
    recipe: Recipe, vlm: VLM, pairs: Sequence[Pair], output: Path, arguments: TrainingArguments
) -> PreparedPairs:
    """Tokens and images of all stages' pairs, made once."""
    views = {view for stage in recipe.stages().values() for view in needed_views(stage)}
    images = {OWN, *by_image(sorted(views), contrast=has_image_contrast(pairs))}
    return PreparedPairs(
        vlm,
        (under_image(pair, image) for image in sorted(images) for pair in pairs),
        limit=recipe.data.pixel_cache_gb * 2**30,
        folder=output,
        autocast=lambda: autocast_of(arguments),
    )


def _share_out(recipe: Recipe, pairs: Sequence[Pair]) -> dict[str, Sequence[Pair]]:
    if len(recipe.stages()) == 1 or recipe.data.stages == "shared":
        return dict.fromkeys(recipe.stages(), pairs)
    first, second = split_stages(pairs, recipe.data.stage1_share, seed_of(recipe))
    return {"stage1": first, "stage2": second}


def _image_root(recipe: Recipe) -> Path | None:
    return None if recipe.data.image_root is None else Path(recipe.data.image_root)


def _hold_out(
    recipe: Recipe, pairs: KeptPairs, probe: Path | None
) -> tuple[Sequence[Pair], Sequence[Pair]]:
    """Training pairs and probe pairs, which never overlap."""
    limit = recipe.dynamics.pairs
    if probe is not None:
        root = _image_root(recipe)
        return pairs, read_pairs(probe, need_rejected=False, image_root=root).pairs[:limit]
    size = min(limit, len(pairs) // 10)
    if size == 0:
        raise UserError(
            f"{len(pairs)} pairs are too few to hold a tenth out as the probe; name a probe file "
            "with --probe"
        )
    held_out = set(random.Random(seed_of(recipe)).sample(range(len(pairs)), size))
    rest = [i for i in range(len(pairs)) if i not in held_out]
    return pairs.take(rest), pairs.take(sorted(held_out))
