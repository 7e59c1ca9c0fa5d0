"""Models whose weights are spread over several processes (FSDP2, DeepSpeed ZeRO-3).

A shard is whole only while its module's own forward runs, so whatever reads weights must run there
(`vlm/logprobs.py` computes within the head's call) or gather them first, as here. Gathering is a
collective: every process must do it, in the same order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def is_sharded(model: Any) -> bool:
    """Whether any weight of the model lies in parts on several processes."""
    return any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters())


def is_partitioned_by_deepspeed(module: Any) -> bool:
    """Whether DeepSpeed has taken the module's weights apart (ZeRO-3)."""
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A weight as one process would hold it; its own tensor where it is in one piece."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def reshard(model: Any) -> None:
    """Let go of what a forward has gathered and FSDP2 keeps for the next one."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def device_of(model: Any) -> torch.device:
    """Where the model computes: a shard may be kept on the CPU and computed on an accelerator."""
    first = next(model.parameters())
    if isinstance(first, DTensor):
        kind = first.device_mesh.device_type
        if kind == "cpu":
            return torch.device(kind)
        return torch.device(kind, torch.get_device_module(kind).current_device())
    device: torch.device = first.device
    return device


def gathered_weights(model: Any, *, keep: bool) -> dict[str, torch.Tensor]:
    """The state dict in one piece on the CPU, one weight at a time; of an adapter its own alone.

    Args:
        model: of any kind, with shards or without.
        keep: whether this process wants it; the others take part and get an empty dictionary.
    """
    reshard(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    adapted = hasattr(model, "peft_config")
    once = {name for name, _ in model.named_parameters()}
    again = {name for name, _ in model.named_parameters(remove_duplicate=False)} - once
    state = {}
    for name, tensor in model.state_dict().items():
        # A weight that stands in two places (a tied head) is written once, as plain models do.
        if name in again or (adapted and name not in trained and "lora_" not in name):
            continue
        value = whole(tensor.detach())
        if keep:
            state[name] = value.cpu()
    return state
