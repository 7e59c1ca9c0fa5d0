"""Packed rows: one image encoding and one prompt for all completions that share them.

Layout of a row: `left padding | prompt | completion 1 | … | completion K | right padding`. A
completion sees the prompt and itself; its positions go on from the end of the prompt, as if the
others were not there. So every completion is scored exactly as in a row of its own, and the prompt
and its images, by far the most of a row, are computed once instead of K times.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cwdpo_bench.vlm.batch import (
    Batch,
    EncodedPrompt,
    Prompt,
    append_completions,
    completion_ids,
    encode_prompt,
    merge_prompts,
    pad_completions,
)
from cwdpo_bench.vlm.cpu import ATTENTION
from cwdpo_bench.vlm.model import VLM

PACKED_FAMILIES = {"qwen2_vl", "qwen2_5_vl", "qwen3_vl"}
"""Model types whose packed rows are tested to equal plain rows."""

_MASKED_ATTENTION = {"sdpa", "eager", ATTENTION}
_PROMPT = 1


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


def with_positions(model: Any, prompt: EncodedPrompt) -> EncodedPrompt:
    """Add the prompt's positions, [3, 1, P] from the model's own `get_rope_index` (M-RoPE)."""
    rope = next(m for m in model.modules() if hasattr(m, "get_rope_index"))
    ids = prompt["input_ids"]
    positions, _ = rope.get_rope_index(
        ids,
        mm_token_type_ids=prompt.get("mm_token_type_ids", torch.zeros_like(ids)),
        image_grid_thw=prompt.get("image_grid_thw"),
        attention_mask=prompt["attention_mask"],
    )
    return {**prompt, "position_ids": positions}


def pack_completions(
    prompt_inputs: dict[str, torch.Tensor],
    completions: Sequence[Sequence[int]],
    owners: Sequence[int] | None = None,
) -> Batch:
    """Put each completion behind its prompt, in one row a prompt.

    Args:
        prompt_inputs: `merge_prompts` of R encoded prompts with their positions.
        completions: N lists of token ids, any number a prompt.
        owners: the prompt of each completion; default i mod R (all chosen answers, then all
            rejected ones), the rule of `append_completions`.

    Returns:
        A batch whose targets and mask are [N, L], in the completions' order, for
        `completion_hidden` and all that is built on it.
    """
    rows, width = prompt_inputs["input_ids"].shape
    owners = [i % rows for i in range(len(completions))] if owners is None else owners
    ends = [width] * rows
    starts = []
    for owner, ids in zip(owners, completions, strict=True):
        starts.append(ends[owner])
        ends[owner] += len(ids)
    extra = max(ends) - width
    attention = prompt_inputs["attention_mask"]
    tokens = _widened(prompt_inputs["input_ids"], extra)
    segments = _widened(attention.long() * _PROMPT, extra)
    positions = _widened(prompt_inputs["position_ids"], extra)
    targets, mask = pad_completions(completions)
    # The prompt's last token predicts the first token of every completion.
    tail = torch.arange(width - 1, width + extra)
    columns = torch.zeros_like(targets)
    after_prompt = prompt_inputs["position_ids"].amax((0, 2)) + 1
    for n, (owner, ids, start) in enumerate(zip(owners, completions, starts, strict=True)):
        span = slice(start, start + len(ids))
        tokens[owner, span] = targets[n, : len(ids)]
        segments[owner, span] = segments[owner].max() + 1
        positions[:, owner, span] = after_prompt[owner] + torch.arange(len(ids))
        columns[n, : len(ids)] = owner * len(tail) + torch.arange(len(ids)) + start - width
        columns[n, 0] = owner * len(tail)
    per_row = ("attention_mask", "token_type_ids", "mm_token_type_ids")
    inputs = {name: value for name, value in prompt_inputs.items() if name not in per_row}
    inputs.update(input_ids=tokens, position_ids=positions)
    return Batch(inputs, targets, mask, segments, tail, columns)


def _widened(values: torch.Tensor, extra: int) -> torch.Tensor:
    return torch.nn.functional.pad(values, (0, extra))


def branch_mask(
    segments: torch.Tensor, dtype: torch.dtype, tail: int | None = None
) -> torch.Tensor:
    """The additive mask [R, 1, T, S] of packed rows: causal, the prompt and the own branch alone.

    Args:
        segments: [R, S], see `Batch`.
        dtype: of the model's attention.
        tail: the last so many positions T of each row ask; default all S.
    """
    size = segments.shape[1]
    first = 0 if tail is None else size - tail
    query, key = segments[:, first:, None], segments[:, None, :]
    places = torch.arange(size, device=segments.device)
    asking = places[first:, None]
    visible = (places <= asking) & (key > 0) & ((key == query) | (key == _PROMPT))
    # Padding sees itself: a softmax over nothing is not a number.
    visible |= places == asking
    hidden = torch.finfo(dtype).min
    mask = torch.zeros(visible.shape, dtype=dtype, device=segments.device)
    return mask.masked_fill_(~visible, hidden)[:, None]


def batch_completions(
    vlm: VLM,
    prompts: Sequence[EncodedPrompt],
    completions: Sequence[Sequence[int]],
    owners: Sequence[int] | None = None,
) -> Batch:
    """A batch of completions, packed where the family allows it and one row a completion elsewhere.

    Args:
        vlm: whose family decides, and whose positions and padding are used.
        prompts: R encoded prompts.
        completions: N lists of token ids.
        owners: the prompt of each completion; default i mod R.
    """
    pad = vlm.pad_token_id
    if packing_refusal(vlm.model) is None:
        prompts = [p if "position_ids" in p else with_positions(vlm.model, p) for p in prompts]
        return pack_completions(merge_prompts(prompts, pad), completions, owners)
    if owners is not None:
        prompts = [prompts[owner] for owner in owners]
    return append_completions(merge_prompts(prompts, pad), completions)


def build_branches(
    vlm: VLM, prompts: Sequence[Prompt], completions: Sequence[Sequence[str]]
) -> Batch:
    """All completions of each prompt: prompt 0's first, then prompt 1's, any number a prompt."""
    encoded = [encode_prompt(vlm.processor, prompt) for prompt in prompts]
    ids = [completion_ids(vlm.tokenizer, text) for texts in completions for text in texts]
    owners = [row for row, texts in enumerate(completions) for _ in texts]
    return batch_completions(vlm, encoded, ids, owners)
