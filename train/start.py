"""What a run starts from: the model, a checkpoint that the recipe's `init` names, adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig

from cwdpo_bench.errors import UserError
from cwdpo_bench.files import read_json
from cwdpo_bench.train import processes
from cwdpo_bench.train.recipe import Recipe
from cwdpo_bench.train.record import seed_of
from cwdpo_bench.vlm import VLM, freeze_vision, is_quantized, load_vlm, vision_is_frozen
from cwdpo_bench.vlm.model import base_of


def start_model(recipe: Recipe, model: str) -> VLM:
    """The policy before the first step: `init` or else `model`, with the recipe's adapters.

    Raises:
        UserError: nothing to load there, or `init` is of another architecture than `model`.
    """
    if recipe.init is None:
        return _frozen(with_lora(load(recipe, model), recipe), recipe)
    folder = Path(recipe.init)
    if not folder.is_dir():
        raise UserError(f"init: {recipe.init!r}: no such folder; name that of a trained checkpoint")
    try:
        vlm = load(recipe, recipe.init)
    except UserError as error:
        raise UserError(f"init: {error}") from error
    _check_architecture(recipe, vlm, model)
    return _frozen(with_lora(vlm, recipe), recipe)


def init_record(recipe: Recipe) -> dict[str, Any] | None:
    """How the checkpoint of `init` was made, for the provenance."""
    if recipe.init is None:
        return None
    file = Path(recipe.init) / "provenance.json"
    made: dict[str, Any] = read_json(file) if file.is_file() else {}
    keys = ("recipe", "seed", "data", "model", "stages")
    return {"path": str(Path(recipe.init).resolve()), **{k: made[k] for k in keys if k in made}}


def load(recipe: Recipe, name: str) -> VLM:
    """A folder or Hub id as the recipe's `model:` wants it, adapters trainable."""
    dtype = None if recipe.model.dtype == "auto" else getattr(torch, recipe.model.dtype)
    if dtype is None and processes.spreads_weights() and torch.cuda.is_available():
        dtype = torch.bfloat16
    if recipe.model.load_in_4bit:
        _refuse_spread_bits(recipe)
    with processes.loading_whole():
        vlm = load_vlm(
            name,
            dtype=dtype,
            # What FSDP will spread must not lie on one device before.
            device="cpu" if processes.spreads_weights() else None,
            trust_remote_code=recipe.model.trust_remote_code,
            trainable=True,
            load_in_4bit=recipe.model.load_in_4bit,
        )
    if is_quantized(vlm.model):
        # Also where the folder's weights are so, without the recipe's key.
        _refuse_spread_bits(recipe)
        if not recipe.lora.enabled:
            raise UserError(
                f"recipe {recipe.name}: the weights of {name!r} are quantized, which full "
                "fine-tuning cannot change; set lora.enabled=true, or name a model that is not"
            )
    return _frozen(vlm, recipe)


def _refuse_spread_bits(recipe: Recipe) -> None:
    if processes.spreads_weights() or processes.uses_deepspeed():
        raise UserError(
            f"recipe {recipe.name}: weights in 4 bits are not spread over processes (FSDP, "
            "DeepSpeed); a device holds them whole under DDP: `cwdpo-bench machines ddp`"
        )


def _frozen(vlm: VLM, recipe: Recipe) -> VLM:
    """The vision tower frozen where the recipe wants it so."""
    freeze = recipe.model.freeze_vision
    # `auto` leaves alone what an adapter was put into, and all of a model that is trained whole.
    if freeze is True or (freeze == "auto" and recipe.lora.enabled and vision_is_frozen(vlm.model)):
        freeze_vision(vlm.model)
    return vlm


def _check_architecture(recipe: Recipe, vlm: VLM, model: str) -> None:
    try:
        config = AutoConfig.from_pretrained(
            base_of(model), trust_remote_code=recipe.model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise UserError(f"model {model!r} cannot be loaded: {error}") from error
    wanted, found = _architecture(config), _architecture(vlm.model.config)
    for key, value in wanted.items():
        if found[key] != value:
            raise UserError(
                f"init: {recipe.init!r} has {key} {found[key]}, the model {model!r} has {value}; "
                "name a checkpoint that was trained from this model"
            )


def _architecture(config: Any) -> dict[str, Any]:
    text = config.get_text_config()
    sizes = ("hidden_size", "num_hidden_layers", "vocab_size")
    return {"model_type": config.model_type, **{name: getattr(text, name) for name in sizes}}


def with_lora(vlm: VLM, recipe: Recipe) -> VLM:
    """Adapters as the recipe wants them; full fine-tuning of an adapter's model merges it first.

    Raises:
        UserError: `lora.target_modules` finds no module.
    """
    adapted = isinstance(vlm.model, PeftModel)
    if recipe.lora.enabled and not adapted:
        lora = recipe.lora
        config = LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            use_rslora=lora.rslora,
            use_dora=lora.dora,
            target_modules=lora.target_modules,
            task_type="CAUSAL_LM",
        )
        try:
            # An adapter starts from random numbers: the run's seed makes them the same again.
            with torch.random.fork_rng():
                torch.manual_seed(seed_of(recipe))
                model = get_peft_model(vlm.model, config)
        except ValueError as error:
            raise UserError(f"recipe {recipe.name}: lora.target_modules: {error}") from error
        if Path(vlm.name).is_dir():
            # An adapter that names its base by a relative path is lost in any other folder.
            for peft_config in model.peft_config.values():
                peft_config.base_model_name_or_path = str(Path(vlm.name).resolve())
        return VLM(model, vlm.processor, vlm.name)
    if adapted and not recipe.lora.enabled:
        # Peft froze what lies below its adapters, and merging leaves it so.
        merged = vlm.model.merge_and_unload().requires_grad_(True)
        return VLM(merged, vlm.processor, vlm.name)
    return vlm


def base_name(vlm: VLM) -> str:
    """The folder or Hub id of the weights below any adapter."""
    if isinstance(vlm.model, PeftModel):
        return str(vlm.model.peft_config["default"].base_model_name_or_path)
    return vlm.name
