"""What a CPU computes faster another way, to the same numbers: products in fp32, attention in bf16.

Both hold within `fast_on_cpu` alone, where answers are written and scored. Training is left as it
is, its reference scores too: policy and reference must round alike.

- PyTorch hands fp32 products to MKL, which leaves AVX-512 unused on processors of other makers.
  oneDNN, which PyTorch brings along and uses for bf16, is 2.2 times as fast there.
- The fused attention for CPUs takes two to nine times as long in bf16 as the two products and the
  fp32 softmax that it stands for, until these fill the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "sdpa_or_products"
"""Name of `attend` among transformers' attentions: it is asked as 'sdpa' is."""

WORTH_IT = 2**23
"""Multiplications of a product from which on oneDNN's start costs less than it saves."""
MAX_SCORES = 2**22
"""Attention scores from which on the fused attention is faster again: they leave the cache."""


_fast = False
"""Whether `fast_on_cpu` is entered."""


@contextmanager
def fast_on_cpu(model: Any) -> Iterator[None]:
    """Within, a model on a CPU computes as this module says; `ready_for_cpu` is called before."""
    global _fast
    before, text = _fast, model.config.get_text_config()
    attention = text._attn_implementation
    _fast = model.device.type == "cpu"
    if _fast and model.dtype == torch.bfloat16 and attention == "sdpa":
        AttentionInterface.register(ATTENTION, _attention)
        AttentionMaskInterface.register(ATTENTION, sdpa_mask)
        text._attn_implementation = ATTENTION
    try:
        yield
    finally:
        _fast, text._attn_implementation = before, attention


def ready_for_cpu(model: Any) -> None:
    """Let the linear layers ask `multiply`, where it has another way."""
    onednn = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if onednn and torch.backends.cpu.get_cpu_capability() == "AVX512":
        for module in model.modules():
            if type(module) is torch.nn.Linear:
                module.forward = MethodType(_linear, module)  # type: ignore[method-assign]


def _may_differ() -> bool:
    return (
        _fast
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def multiply(
    states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`torch.nn.functional.linear`, by oneDNN where that is faster and nothing else is asked."""
    if (
        not _fast
        or weight.dtype != torch.float32
        or states.numel() * len(weight) < WORTH_IT
        or states.numel() < 4 * states.shape[-1]
        or not _may_differ()
        or states.dtype != torch.float32
        or type(weight) not in (torch.Tensor, torch.nn.Parameter)
    ):
        return linear(states, weight, bias)
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")
    return product


def _linear(self: torch.nn.Linear, input: torch.Tensor) -> torch.Tensor:
    return multiply(input, self.weight, self.bias)


def by_products(query: torch.Tensor, keys: torch.Tensor) -> bool:
    """Whether `attend` is faster than the fused attention on these heads [B, h, L, d]."""
    return (
        query.dtype == torch.bfloat16
        and _may_differ()
        and query.shape[:-1].numel() * keys.shape[-2] < MAX_SCORES
    )


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention [B, h, L, d] over keys and values [B, h, S, d], the softmax in fp32.

    Args:
        mask: [B, 1, L, S], added to the scores, or True where a key is seen.
    """
    if not by_products(query, keys):
        return scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)
    scores = torch.matmul(query * scale, keys.transpose(-1, -2)).float()
    if mask is not None and mask.dtype == torch.bool:
        scores.masked_fill_(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores += mask
    return torch.matmul(scores.softmax(-1).to(values.dtype), values)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **given: Any,
) -> tuple[torch.Tensor, None]:
    """`attend` as transformers calls an attention: [B, h, L, d] to [B, L, h, d]."""
    if scaling is None or attention_mask is None or not by_products(query, key):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **given
        )
    rows, heads, length, width = query.shape
    # The heads that share keys and values ask them together: [B, kv, groups · L, d].
    groups = heads // key.shape[1]
    together = query.reshape(rows, key.shape[1], groups * length, width)
    mask = attention_mask if length == 1 else attention_mask.repeat(1, 1, groups, 1)
    output = attend(together, key, value, scaling, mask)
    return output.reshape(rows, heads, length, width).transpose(1, 2).contiguous(), None
