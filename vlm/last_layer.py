"""The last decoder layer for the end of each row alone.

Of the last layer nothing is read but the hidden states that predict completion tokens. The prompt
before them is needed there as keys and values only, so its queries, its attention output and its
feed-forward network are left out: one layer's work on the prompt, a fourth of a model of four
layers and a twenty-eighth of one of twenty-eight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from cwdpo_bench.vlm.model import cache_name
from cwdpo_bench.vlm.sharding import is_partitioned_by_deepspeed

Forward = Callable[..., torch.Tensor]


class _Recorded(Exception):
    """The attention has handed over its keys and values; the rest of its work is not wanted."""


class _PromptKeys:
    """What the attention takes for its cache: holds the prompt's keys and values, [R, h, P, d]."""

    def __init__(self) -> None:
        self._prompt: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep the first keys and values, and put them before the second."""
        if self._prompt is None:
            self._prompt = keys, values
            raise _Recorded
        before, values_before = self._prompt
        return torch.cat([before, keys], 2), torch.cat([values_before, values], 2)


@contextmanager
def last_layer_on_tail(model: Any, tail: int) -> Iterator[None]:
    """Within, the model's last decoder layer returns the last `tail` positions of each row.

    Under gradient checkpointing in training it returns all positions as ever: there a layer that is
    given a cache is refused by transformers. So it does under DeepSpeed's ZeRO-3, which notes the
    order in which modules run and end. Callers take the last `tail` positions either way.

    Args:
        model: a vision-language model, maybe with adapters, whose decoder layers keep their keys
            and values through `cache.update(keys, values, …)`, called with a 4D mask.
        tail: positions [R, tail] to keep, at least one.
    """
    layer = model.get_decoder().layers[-1]
    checkpointed = getattr(layer, "gradient_checkpointing", False) and layer.training
    if checkpointed or is_partitioned_by_deepspeed(layer):
        yield
        return
    whole = layer.forward
    layer.forward = lambda hidden, **given: _on_tail(layer, whole, tail, hidden, given)
    try:
        yield
    finally:
        del layer.forward


def _on_tail(
    layer: Any, whole: Forward, tail: int, hidden: torch.Tensor, given: dict[str, Any]
) -> torch.Tensor:
    before = hidden.shape[1] - tail
    if not before:
        return whole(hidden, **given)
    cos, sin = given.pop("position_embeddings")
    mask = given.pop("attention_mask")
    given[cache_name(given)] = _PromptKeys()
    with suppress(_Recorded):
        layer.self_attn(
            hidden_states=layer.input_layernorm(hidden[:, :before]),
            attention_mask=mask[:, :, :before, :before],
            position_embeddings=(cos[..., :before, :], sin[..., :before, :]),
            **given,
        )
    return whole(
        hidden[:, before:],
        attention_mask=mask[:, :, before:],
        position_embeddings=(cos[..., before:, :], sin[..., before:, :]),
        **given,
    )
