"""The one log-probability operation: losses, probes, option scores and calibration all read it.

The head is applied to completion positions only, in blocks of at most `MAX_BLOCK` logits, and the
log-softmax is taken in fp32. Formulas: SPEC 1 (ℓ̄, Δ) and 2 (entropy, top-1, TV, JS).
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

from cwdpo_bench.errors import UserError
from cwdpo_bench.vlm.batch import Batch
from cwdpo_bench.vlm.last_layer import last_layer_on_tail
from cwdpo_bench.vlm.model import cache_name
from cwdpo_bench.vlm.packing import branch_mask
from cwdpo_bench.vlm.sharding import is_sharded, reshard, whole
from cwdpo_bench.vlm.vision import forward_inputs

MAX_BLOCK = 2**24
"""Logits that exist at a time: 64 MiB in fp32."""

Head = Callable[[torch.Tensor], torch.Tensor]


class Distribution(NamedTuple):
    """Next-token distributions in compact form: hidden states [..., H] and the head on them."""

    hidden: torch.Tensor
    head: Head


class TokenStatistics(NamedTuple):
    """Of N tokens, or of B rows of L positions where zeros stand on padding; all fp32.

    Attributes:
        logps: log π(token | prefix), nats.
        entropy: of the next-token distribution, nats; None unless asked for, as all below.
        top1_probability: the largest next-token probability.
        top1_id: the token that has it.
        tv: total variation to the second distribution, in [0, 1].
        js: Jensen-Shannon divergence to the second distribution, nats, in [0, ln 2].
        collision: Σ_v π(v)² of the next-token distribution, in [1/V, 1].
    """

    logps: torch.Tensor
    entropy: torch.Tensor | None = None
    top1_probability: torch.Tensor | None = None
    top1_id: torch.Tensor | None = None
    tv: torch.Tensor | None = None
    js: torch.Tensor | None = None
    collision: torch.Tensor | None = None


def token_statistics(
    hidden: torch.Tensor,
    head: Head,
    targets: torch.Tensor,
    *,
    statistics: bool = False,
    other: Distribution | None = None,
    max_block: int = MAX_BLOCK,
) -> TokenStatistics:
    """Log-probabilities of N target tokens from the hidden states before them.

    Args:
        hidden: [N, H], the states that predict the targets.
        head: maps [n, H] to logits [n, V].
        targets: [N] token ids.
        statistics: also entropy, top-1 and collision (without gradient).
        other: a second distribution for the same N positions; adds TV and JS (without gradient).
        max_block: at most this many logits exist at a time, also for the backward pass.
    """
    vocabulary = head(hidden[:1].detach()).shape[-1]
    rows = max(1, max_block // vocabulary)
    blocks = []
    for start in range(0, len(targets), rows):
        part = slice(start, start + rows)
        wanted = statistics or other is not None
        second = None if other is None else Distribution(other.hidden[part], other.head)
        if not torch.is_grad_enabled() and wanted:
            block = _all_statistics(head(hidden[part]), targets[part], second)
        else:
            if torch.is_grad_enabled() and len(targets) > rows:
                # Recomputing a block's logits in the backward pass keeps one block alive, not all.
                logps = checkpoint(_logps, hidden[part], head, targets[part], use_reentrant=False)
            else:
                logps = _logps(hidden[part], head, targets[part])
            block = TokenStatistics(logps)
            if wanted:
                with torch.no_grad():
                    every = _all_statistics(head(hidden[part]), targets[part], second)
                block = every._replace(logps=logps)
        blocks.append(block)
    columns: list[Any] = [
        None if column[0] is None else torch.cat(column) for column in zip(*blocks, strict=True)
    ]
    return TokenStatistics(*columns)


def _logps(hidden: torch.Tensor, head: Head, targets: torch.Tensor) -> torch.Tensor:
    logits = head(hidden).float()
    return logits.gather(-1, targets[:, None]).squeeze(-1) - logits.logsumexp(-1)


def _all_statistics(
    logits: torch.Tensor, targets: torch.Tensor, other: Distribution | None
) -> TokenStatistics:
    """Of logits [n, V], without gradient."""
    logits = logits.float()
    log_p = logits - logits.logsumexp(-1, keepdim=True)
    p = log_p.exp()
    top1_probability, top1_id = p.max(-1)
    # A token of probability 0 has log-probability -inf, and 0 · inf is not a number.
    entropy = -(p * log_p.clamp(min=torch.finfo(torch.float32).min)).sum(-1)
    block = TokenStatistics(
        logps=log_p.gather(-1, targets[:, None]).squeeze(-1),
        entropy=entropy,
        top1_probability=top1_probability,
        top1_id=top1_id,
        collision=p.square().sum(-1),
    )
    if other is None:
        return block
    q = other.head(other.hidden).float().softmax(-1)
    mixture = ((p + q) / 2).clamp(min=torch.finfo(torch.float32).tiny).log()
    js = 0.5 * (torch.xlogy(p, p) + torch.xlogy(q, q)).sum(-1) - ((p + q) / 2 * mixture).sum(-1)
    return block._replace(tv=(0.5 * (p - q).abs().sum(-1)).clamp(0, 1), js=js.clamp(0, math.log(2)))


def output_head(model: Any) -> Head:
    """The model's head as a function of hidden states; of sharded weights `at_the_head` only."""
    head = model.get_output_embeddings()
    return lambda hidden: head.forward(hidden)  # type: ignore[no-any-return]


def frozen_head(model: Any) -> Head:
    """The head of now, which training does not move.

    Raises:
        UserError: it is sharded, trained, and more than one matrix.
    """
    head = model.get_output_embeddings()
    if not any(parameter.requires_grad for parameter in head.parameters()):
        return output_head(model)
    if not is_sharded(head):
        return copy.deepcopy(head)  # type: ignore[no-any-return]
    if {name for name, _ in head.named_parameters()} - {"weight", "bias"}:
        raise UserError(
            "an adapter on the output head cannot be kept beside sharded weights; leave the head "
            "out of lora.target_modules, or train without FSDP"
        )
    reshard(head)
    weight = whole(head.weight.detach()).clone()
    bias = None if head.bias is None else whole(head.bias.detach()).clone()
    return lambda hidden: torch.nn.functional.linear(
        hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
    )


@contextmanager
def _head_returns(model: Any, compute: Head) -> Iterator[None]:
    """Let the model's own forward return `compute(hidden)` where it would return logits.

    Going through the outer forward keeps wrappers (PEFT, DDP, FSDP) and every family's own handling
    of images. Within `compute` the head is itself again, so that it can be applied in blocks; that
    is also the only place where sharded weights of a head are whole.
    """
    head = model.get_output_embeddings()
    own = vars(head).get("forward")

    def restore() -> None:
        vars(head).pop("forward", None)
        if own is not None:
            head.forward = own

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        restore()
        return compute(hidden)

    head.forward = forward
    try:
        yield
    finally:
        restore()


def at_the_head(model: Any, batch: Batch, compute: Head, cache: Any = None) -> torch.Tensor:
    """What `compute` makes of the hidden states [B, L, H] that predict a batch's completion tokens.

    It is called once, within the head's own call, and what it returns comes back through the
    model's forward: a loss must be made of that, or wrappers do not see it.

    Args:
        model: a (wrapped) vision-language model.
        batch: on the model's device, packed or plain.
        compute: tensor to tensor; may call `output_head`.
        cache: of a packed batch, the keys and values of all positions before its tail: the model
            has read the prompts and goes on from there. It grows by the tail.
    """
    length = batch.targets.shape[1]
    inner = getattr(model, "module", model)
    inputs = forward_inputs(batch.inputs)
    found: torch.Tensor
    if batch.segments is not None and batch.tail is not None and batch.columns is not None:
        dtype = inner.get_input_embeddings().weight.dtype
        tail, columns = len(batch.tail), batch.columns

        def of_tail(hidden: torch.Tensor) -> torch.Tensor:
            return compute(hidden[:, -tail:].flatten(0, 1)[columns])

        if cache is not None:
            name = cache_name(inspect.signature(inner.get_decoder().forward).parameters)
            with _head_returns(inner, of_tail):
                found = model(
                    input_ids=batch.inputs["input_ids"][:, -tail:],
                    position_ids=batch.inputs["position_ids"][..., -tail:],
                    attention_mask=branch_mask(batch.segments, dtype, tail),
                    use_cache=True,
                    **{name: cache},
                ).logits
            return found
        mask = branch_mask(batch.segments, dtype)
        with _head_returns(inner, of_tail), last_layer_on_tail(inner, tail):
            found = model(**inputs, attention_mask=mask, use_cache=False).logits
        return found
    with _head_returns(inner, lambda hidden: compute(hidden[:, -(length + 1) : -1])):
        # One column more: the last prompt token predicts the first completion token.
        found = model(**inputs, logits_to_keep=length + 1, use_cache=False).logits
    return found


def completion_hidden(model: Any, batch: Batch, cache: Any = None) -> torch.Tensor:
    """Hidden states [B, L, H] that predict the completion tokens; arguments of `at_the_head`."""
    return at_the_head(model, batch, lambda hidden: hidden, cache)


def completion_statistics(
    model: Any,
    batch: Batch,
    *,
    statistics: bool = False,
    other: Distribution | None = None,
    cache: Any = None,
) -> TokenStatistics:
    """Token statistics of a batch's completions, each [B, L] with zeros on padding.

    Args:
        model: a (wrapped) vision-language model.
        batch: on the model's device.
        statistics: also entropy and top-1.
        other: second distribution with hidden states [B, L, H]; adds TV and JS.
        cache: see `completion_hidden`.
    """
    mask = batch.mask
    found: list[TokenStatistics] = []

    def compute(hidden: torch.Tensor) -> torch.Tensor:
        found.append(
            token_statistics(
                hidden[mask],
                output_head(getattr(model, "module", model)),
                batch.targets[mask],
                statistics=statistics,
                other=None if other is None else Distribution(other.hidden[mask], other.head),
            )
        )
        return found[0].logps

    logps = at_the_head(model, batch, compute, cache)
    flat = found[0]._replace(logps=logps)
    columns: list[Any] = [None if values is None else _unflatten(values, mask) for values in flat]
    return TokenStatistics(*columns)


def _unflatten(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def sequence_logps(logps: torch.Tensor) -> torch.Tensor:
    """Σ_l log π(y_l | χ, y_<l) a row, [B, L] to [B]; padding holds zeros already."""
    return logps.sum(-1)


def average_confidence(logps: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """ℓ̄ = (1/L) Σ_l log π(y_l | χ, y_<l) a row (SPEC 1), [B, L] to [B]."""
    return logps.sum(-1) / mask.sum(-1)
