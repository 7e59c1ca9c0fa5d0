"""Several processes train one model: `accelerate launch -m cwdpo_bench train …`.

The Trainer and accelerate share the batches out and the gradients or weights among them. What is
here is the rest of a run: one process decides and writes, all score a share of the reference, and
weights that FSDP2 is to spread are spread as soon as they are loaded, so that no device ever holds
them all. Started without a launcher, everything here is a no-op.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import distributed
from transformers import TrainingArguments

from cwdpo_bench.errors import UserError
from cwdpo_bench.vlm import VLM, gathered_weights, is_sharded, reshard

_WHOLE = "whole.safetensors"
T = TypeVar("T")


def meet(arguments: TrainingArguments) -> None:
    """Meet the launcher's other processes.

    Raises:
        UserError: there are others, and they cannot be met.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    device = arguments.device
    if started != count():
        raise UserError(
            f"the launcher started {started} processes, which do not meet on {device}; without "
            "accelerators start them with `accelerate launch --cpu` or set trainer.use_cpu=true"
        )


def count() -> int:
    """How many processes train together."""
    return distributed.get_world_size() if _met() else 1


def rank() -> int:
    """Which of them this is."""
    return distributed.get_rank() if _met() else 0


def is_first() -> bool:
    """Whether this process writes and reports."""
    return rank() == 0


def wait() -> None:
    """Until all are here."""
    if _met():
        distributed.barrier()


def agreed(value: T) -> T:
    """The first process's value in all of them."""
    if not _met():
        return value
    values = [value]
    distributed.broadcast_object_list(values, src=0)
    return values[0]


def gathered(value: T) -> list[T]:
    """Every process's value, in their order, in all of them."""
    if not _met():
        return [value]
    values: list[Any] = [None] * count()
    distributed.all_gather_object(values, value)
    return values


def means(values: Mapping[str, float]) -> dict[str, float]:
    """Means over the processes that have a value of that name."""
    found: dict[str, list[float]] = {}
    for each in gathered(dict(values)):
        for name, value in each.items():
            found.setdefault(name, []).append(value)
    return {name: sum(each) / len(each) for name, each in found.items()}


def _met() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def spreads_weights() -> bool:
    """Whether the launcher asks for FSDP."""
    return count() > 1 and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def uses_deepspeed() -> bool:
    """Whether the launcher asks for DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


@contextmanager
def loading_whole() -> Iterator[None]:
    """Within, transformers loads weights whole under ZeRO-3 too.

    It would spread them as they are read, whatever the launcher's file says, and before DeepSpeed's
    engine is there nothing gathers them again: the reference could not be scored.
    """
    if not uses_deepspeed():
        yield
        return
    from transformers.integrations import deepspeed

    asked = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = asked


def refuse_other_precision(arguments: TrainingArguments) -> None:
    """The launcher's mixed precision must be the Trainer's: the reference is scored under it.

    Raises:
        UserError: the two differ.
    """
    by_launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    ours = "bf16" if arguments.bf16 else "fp16" if arguments.fp16 else "no"
    if by_launcher not in ("no", ours):
        raise UserError(
            f"the launcher's mixed_precision is {by_launcher!r} and the recipe's is {ours!r}; set "
            f"trainer.{by_launcher}=true, or mixed_precision: 'no' in the launcher's configuration"
        )


def shard(vlm: VLM, arguments: TrainingArguments) -> VLM:
    """The model with its weights spread over the processes, where FSDP2 is asked for.

    Raises:
        UserError: FSDP's first version, or its own activation checkpointing.
    """
    if arguments.fsdp:
        raise UserError(
            "trainer.fsdp: weights are spread as soon as they are loaded, which the launcher must "
            "ask for: `accelerate launch --config_file …` (docs/SCALING.md); remove the key"
        )
    if not spreads_weights():
        return vlm
    # Where the launcher says nothing, accelerate takes the first.
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("FSDP's first version is not supported; set fsdp_version: 2")
    from accelerate import Accelerator

    precision = "bf16" if arguments.bf16 else "fp16" if arguments.fp16 else "no"
    accelerator = Accelerator(mixed_precision=precision)
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        raise UserError(
            f"FSDP is asked for, but accelerate does not spread weights on {accelerator.device}; "
            "start it on accelerators, or take a configuration without FSDP"
        )
    if plugin.activation_checkpointing:
        raise UserError(
            "set fsdp_activation_checkpointing: false in the launcher's configuration, and "
            "trainer.gradient_checkpointing=true for the recipe"
        )
    if precision != "no":
        from torch.distributed.fsdp import MixedPrecisionPolicy

        # accelerate's own would round what a forward returns, which are log-probabilities in fp32.
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if arguments.bf16 else torch.float16,
            reduce_dtype=torch.float32,
        )
    # accelerate takes a model with its optimizer alone; the Trainer makes the one that steps.
    trained = [parameter for parameter in vlm.model.parameters() if parameter.requires_grad]
    model, _ = accelerator.prepare(vlm.model, torch.optim.SGD(trained, lr=0.0))
    _gather_for_generation(model)
    return VLM(model, vlm.processor, vlm.name)


def _gather_for_generation(model: Any) -> None:
    """An adapter's `generate` goes past its forward, which is what gathers the root's weights."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    register_fsdp_forward_method(model, "generate")


def leave_sharded(accelerator: Any) -> None:
    """Let the Trainer's accelerator take a model of `shard` as it is.

    It would look for the names of layers that FSDP2 has given others, and tell parameters apart by
    their address, which an empty shard does not have.
    """
    prepare = accelerator.prepare

    def prepare_others(*objects: Any, **settings: Any) -> Any:
        if not isinstance(objects[0], torch.nn.Module):
            return prepare(*objects, **settings)
        model, optimizer = objects
        return model, accelerator.prepare_optimizer(optimizer)

    accelerator.prepare = prepare_others


def save_pretrained(model: Any, folder: Path) -> None:
    """What `save_pretrained` writes, by the first process, of weights in one piece.

    To be called by all processes: sharded weights are gathered one at a time.
    """
    if is_sharded(model):
        state = gathered_weights(model, keep=is_first())
        if is_first():
            model.save_pretrained(str(folder), state_dict=state)
    elif is_first():
        model.save_pretrained(str(folder))


def keep_weights(model: Any, folder: Path) -> None:
    """Weights to take up again in this run: `take_weights` finds them sharded or not."""
    if not is_sharded(model):
        save_pretrained(model, folder)
        return
    state = gathered_weights(model, keep=is_first())
    if is_first():
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in state.items()}, folder / _WHOLE)


def take_weights(model: Any, folder: Path) -> bool:
    """Take what `keep_weights` kept of a sharded model; whether it was one."""
    if not is_sharded(model):
        return False
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    reshard(model)
    state: dict[str, Any] = dict(load_file(folder / _WHOLE)) if is_first() else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    set_model_state_dict(model, state, options=options)
    return True


@contextmanager
def first_writes() -> Iterator[bool]:
    """True in the process that writes; the others go on when it is done."""
    yield is_first()
    wait()
