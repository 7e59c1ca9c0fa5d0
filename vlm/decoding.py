"""Greedy decoding: the model reads the prompts once, and what it has read is kept for more.

Families that are packed (`vlm/packing.py`) are decoded here, a token of every unfinished answer a
forward, with none of the work that the model's own `generate` does between two forwards. Answers
that have ended leave the batch, so that the longest one is not paid for by all. `generate` decodes
other families and whatever a model's generation settings ask for besides; it is also the oracle of
the tests.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from cwdpo_bench.vlm.model import VLM, cache_name, evaluating
from cwdpo_bench.vlm.packing import packing_refusal, with_positions
from cwdpo_bench.vlm.vision import forward_inputs

KEEP = 0.75
"""Ended answers leave when no more than this share of the rows is left: leaving copies the rest."""

_NOT_ASKED = {"bos_token_id", "pad_token_id", "eos_token_id", "transformers_version"}
_NOT_ASKED |= {"do_sample", "temperature", "top_p", "top_k", "min_p", "typical_p"}
_NOT_ASKED |= {"repetition_penalty", "num_beams", "early_stopping", "length_penalty"}
_NOT_ASKED |= {"max_length", "max_new_tokens", "use_cache"}
_NOT_ASKED |= {"output_attentions", "output_hidden_states", "return_dict_in_generate"}
"""Generation settings that greedy decoding of a given length does without."""


class Greedy(NamedTuple):
    """Greedy answers of B prompts.

    Attributes:
        ids: each answer's tokens, the end-of-turn token included where it came before the limit.
        first_logps: [B, V] fp32 log-probabilities of the answers' first token.
        cache: keys and values of all but the prompts' last token, for what goes on from there:
            that token is read again, because its hidden state predicts what follows.
    """

    ids: list[list[int]]
    first_logps: torch.Tensor
    cache: Any


def end_tokens(vlm: VLM) -> list[int]:
    """Every token that ends a turn: the tokenizer's and those that the model names besides."""
    named = vlm.model.generation_config.eos_token_id
    others = named if isinstance(named, list) else [] if named is None else [named]
    return list(dict.fromkeys([vlm.tokenizer.eos_token_id, *others]))


def until_end(ids: list[int], ends: list[int]) -> list[int]:
    """The tokens up to the first that ends the turn, that one included."""
    stops = [place for place, token in enumerate(ids) if token in ends]
    return ids[: stops[0] + 1] if stops else ids


def branch(cache: Any) -> Any:
    """A cache of the same keys and values that grows, and is cut, by itself.

    Nothing is copied: a dynamic cache never changes a tensor, it puts a new one in its place.
    """
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    return other


def decoding_refusal(model: Any) -> str | None:
    """Why `generate` decodes this model; None where it is done here."""
    settings = getattr(model, "module", model).generation_config.to_diff_dict()
    asked = sorted(n for n in set(settings) - _NOT_ASKED if not n.startswith("_"))
    if asked:
        return f"its generation settings ask for {', '.join(asked)}"
    return packing_refusal(model)


def greedy(vlm: VLM, prompt_inputs: dict[str, torch.Tensor], max_new_tokens: int) -> Greedy:
    """The greedy answer of each encoded prompt, and what the model computed on the way.

    Sampling, beams and repetition penalties that a model's own generation settings may switch on
    are switched off: an evaluation must give the same answer twice.
    """
    here = decoding_refusal(vlm.model) is None
    if here and "position_ids" not in prompt_inputs:
        prompt_inputs = with_positions(vlm.model, prompt_inputs)
    inputs = {name: value.to(vlm.device) for name, value in prompt_inputs.items()}
    with evaluating(vlm.model):
        return (_decode if here else _generate)(vlm, inputs, max_new_tokens)


def _decode(vlm: VLM, inputs: dict[str, torch.Tensor], max_new_tokens: int) -> Greedy:
    model, ends = vlm.model, end_tokens(vlm)
    output = model(**forward_inputs(inputs), use_cache=True, logits_to_keep=1)
    first_logps = output.logits[:, -1].float().log_softmax(-1)
    name = cache_name(output)
    cache = output[name]
    prompts = branch(cache)
    prompts.crop(-1)
    rows, width = inputs["input_ids"].shape
    tokens = first_logps.argmax(-1)
    answers = torch.full((rows, max_new_tokens), ends[0], device=vlm.device)
    answers[:, 0] = tokens
    is_end = torch.tensor(ends, device=vlm.device)
    places = torch.arange(rows, device=vlm.device)
    ended = torch.isin(tokens, is_end)
    positions = inputs["position_ids"].amax((0, 2)) + 1
    mask = _decoding_mask(inputs["attention_mask"], max_new_tokens, model.dtype)
    for step in range(1, max_new_tokens):
        live = int((~ended).sum())
        if not live:
            break
        if live <= KEEP * len(ended):
            kept = (~ended).nonzero()[:, 0]
            cache.batch_select_indices(kept)
            tokens, places, ended, positions, mask = (
                values[kept] for values in (tokens, places, ended, positions, mask)
            )
        logits = model(
            input_ids=tokens[:, None],
            position_ids=positions[None, :, None].expand(3, -1, -1),
            attention_mask=mask[..., : width + step],
            use_cache=True,
            **{name: cache},
        ).logits[:, -1]
        # In fp32, because a CPU takes five times as long to find the largest of bf16.
        tokens, positions = logits.float().argmax(-1), positions + 1
        answers[places, step] = tokens
        ended = ended | torch.isin(tokens, is_end)
    return Greedy([until_end(ids, ends) for ids in answers.tolist()], first_logps, prompts)


def _decoding_mask(attention: torch.Tensor, new: int, dtype: torch.dtype) -> torch.Tensor:
    """The additive mask [B, 1, 1, P + new] of one query a row: the padding is hidden from it."""
    mask = torch.zeros(attention.shape, dtype=dtype, device=attention.device)
    mask = mask.masked_fill_(attention == 0, torch.finfo(dtype).min)
    return torch.nn.functional.pad(mask, (0, new))[:, None, None]


class _FirstLogps(LogitsProcessor):
    """Keeps the log-probabilities of the first generated position."""

    def __init__(self) -> None:
        self.logps: torch.Tensor | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> Any:
        if self.logps is None:
            self.logps = scores.float().log_softmax(-1)
        return scores


def _generate(vlm: VLM, inputs: dict[str, torch.Tensor], max_new_tokens: int) -> Greedy:
    first, ends = _FirstLogps(), end_tokens(vlm)
    # `generate` works the positions out itself, also those of the tokens to come.
    rest = {name: value for name, value in inputs.items() if name != "position_ids"}
    output = vlm.model.generate(
        **forward_inputs(rest),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        repetition_penalty=1.0,
        use_cache=True,
        pad_token_id=vlm.pad_token_id,
        eos_token_id=ends,
        logits_processor=LogitsProcessorList([first]),
        return_dict_in_generate=True,
    )
    width = inputs["input_ids"].shape[1]
    assert first.logps is not None
    cache = output[cache_name(output)]
    # All but the prompts' last token: of the answers, the last one was chosen and never read.
    cache.crop(width - output.sequences.shape[1])
    ids = output.sequences[:, width:].tolist()
    return Greedy([until_end(row, ends) for row in ids], first.logps, cache)
