"""Attention over packed rows: for which models, and causal over prompts with a small mask behind.

A mask [R, 1, S, S] over whole rows would make the kernels visit what no token may see. The prompt's
columns need none, being plainly causal; only the few queries behind them need a mask [R, 1, W, S].
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

PACKED_ATTENTION = "cwdpo_bench_packed"

PACKED_FAMILIES = {"qwen2_5_vl"}
"""Model types whose packed rows are tested to equal plain rows."""

_MASKED_ATTENTION = {"sdpa", "eager", PACKED_ATTENTION}


def packing_refusal(model: Any) -> str | None:
    """Why completions of this model are not packed; None where they are.

    A packed row needs a family whose equality with plain rows is tested, an attention that takes a
    mask [B, 1, S, S], and layers that see the whole row (a given mask replaces a sliding window).
    """
    config = getattr(model, "module", model).config
    text = config.get_text_config()
    if config.model_type not in PACKED_FAMILIES:
        return f"the family {config.model_type!r} is not tested with packed rows"
    attention = getattr(text, "_attn_implementation", None)
    if attention not in _MASKED_ATTENTION:
        return f"the attention {attention!r} takes no mask of its own; load with 'sdpa'"
    if "sliding_attention" in (getattr(text, "layer_types", None) or ()):
        return "the model has layers with a sliding window"
    return None


def packed_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """SDPA; where the mask is of the last W queries alone, the queries before are causal.

    Args:
        module: the attention layer, as transformers hands it over.
        query: [R, heads, S, D].
        key: [R, key heads, S, D].
        value: as `key`.
        attention_mask: additive; [R, 1, W, S] on packed rows, and on others what SDPA takes.
        kwargs: scaling, dropout and others of transformers.
    """
    length = query.shape[2]
    if attention_mask is None or attention_mask.shape[-2] == length:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return output, None
    width = length - attention_mask.shape[-2]
    prompts, _ = sdpa_attention_forward(
        module, query[:, :, :width], key[:, :, :width], value[:, :, :width], None, **kwargs
    )
    branches, _ = sdpa_attention_forward(
        module, query[:, :, width:], key, value, attention_mask, **kwargs
    )
    return torch.cat([prompts, branches], dim=1), None


def use_packed_attention(model: Any) -> None:
    """Let a language model that attends by SDPA do so by `packed_attention`, where it is packed."""
    if packing_refusal(model) or model.config.get_text_config()._attn_implementation != "sdpa":
        return
    AttentionInterface.register(PACKED_ATTENTION, packed_attention)
    AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)
    model.config.get_text_config()._attn_implementation = PACKED_ATTENTION
