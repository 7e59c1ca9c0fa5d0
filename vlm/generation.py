"""The model's own decoding: greedy, with what it has read kept for more, and sampled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from cwdpo_bench.vlm.batch import EncodedPrompt, merge_prompts
from cwdpo_bench.vlm.model import VLM, cache_name, evaluating
from cwdpo_bench.vlm.vision import forward_inputs


class Sample(NamedTuple):
    """A sampled answer.

    Attributes:
        text: decoded without special tokens, stripped.
        ids: its tokens, the end-of-turn token included where it came before the limit.
        ended: whether it came.
    """

    text: str
    ids: list[int]
    ended: bool


def sample(
    vlm: VLM,
    prompts: Sequence[EncodedPrompt],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    batch_size: int = 16,
) -> list[Sample]:
    """One sampled answer a prompt, in the prompts' order; chance is torch's global generator.

    With the defaults answers are drawn from the policy itself, as a policy gradient needs. A token
    that stands for an image is never drawn: no picture would belong to it.

    Args:
        vlm: the policy.
        prompts: from `encode_prompt`, with positions or embeddings or without; the same one more
            than once for several answers.
        max_new_tokens: where an answer is cut off.
        temperature: divides the logits.
        top_p: keep the likeliest tokens up to this share.
        batch_size: answers that are drawn together.
    """
    samples: list[Sample | None] = [None] * len(prompts)
    ends = _end_tokens(vlm)
    order = sorted(range(len(prompts)), key=lambda i: prompts[i]["input_ids"].shape[-1])
    with evaluating(vlm.model):
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            merged = merge_prompts([prompts[i] for i in indices], vlm.pad_token_id)
            # `generate` works the positions out itself, also those of the tokens to come.
            merged.pop("position_ids", None)
            inputs = {name: value.to(vlm.device) for name, value in merged.items()}
            output = vlm.model.generate(
                **forward_inputs(inputs),
                max_new_tokens=max_new_tokens,
                do_sample=True,
                num_beams=1,
                temperature=temperature,
                top_p=top_p,
                top_k=0,
                repetition_penalty=1.0,
                use_cache=True,
                pad_token_id=vlm.pad_token_id,
                eos_token_id=ends,
                suppress_tokens=_image_tokens(vlm.model.config),
            )
            for index, row in zip(indices, output[:, inputs["input_ids"].shape[1] :], strict=True):
                drawn = row.tolist()
                stops = [place for place, token in enumerate(drawn) if token in ends]
                ids = drawn[: stops[0] + 1] if stops else drawn
                text = vlm.tokenizer.decode(ids, skip_special_tokens=True).strip()
                samples[index] = Sample(text, ids, bool(stops))
    return [answer for answer in samples if answer is not None]


def _end_tokens(vlm: VLM) -> list[int]:
    """Every token that ends a turn: the tokenizer's and those that the model names besides."""
    named = vlm.model.generation_config.eos_token_id
    others = named if isinstance(named, list) else [] if named is None else [named]
    return list(dict.fromkeys([vlm.tokenizer.eos_token_id, *others]))


def _image_tokens(config: Any) -> list[int] | None:
    names = ("image_token_id", "video_token_id")
    found = [getattr(config, name, None) for name in names]
    return [token for token in found if token is not None] or None


def greedy_ids(
    vlm: VLM, prompt_inputs: dict[str, torch.Tensor], max_new_tokens: int
) -> list[list[int]]:
    """Token ids of the greedy answer of each encoded prompt, the end-of-turn token included.

    An answer cut off at `max_new_tokens` has none.
    """
    return greedy(vlm, prompt_inputs, max_new_tokens).ids


class Greedy(NamedTuple):
    """Greedy answers of B prompts.

    Attributes:
        ids: each answer's tokens, the end-of-turn token included where it came before the limit.
        first_logps: [B, V] fp32 log-probabilities of the answers' first token.
        cache: keys and values of the prompts and the answers.
        cached: how many positions they are, the prompts' padding included.
    """

    ids: list[list[int]]
    first_logps: torch.Tensor
    cache: Any
    cached: int


class _FirstLogps(LogitsProcessor):
    """Keeps the log-probabilities of the first generated position: option scores at no cost."""

    def __init__(self) -> None:
        self.logps: torch.Tensor | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> Any:
        if self.logps is None:
            self.logps = scores.float().log_softmax(-1)
        return scores


def greedy(vlm: VLM, prompt_inputs: dict[str, torch.Tensor], max_new_tokens: int) -> Greedy:
    """The greedy answer of each encoded prompt, and what the model computed on the way.

    Sampling, beams and repetition penalties that a model's own generation settings may switch on
    are switched off: an evaluation must give the same answer twice.
    """
    inputs = {name: value.to(vlm.device) for name, value in prompt_inputs.items()}
    first = _FirstLogps()
    with evaluating(vlm.model):
        output = vlm.model.generate(
            **forward_inputs(inputs),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            repetition_penalty=1.0,
            use_cache=True,
            pad_token_id=vlm.pad_token_id,
            logits_processor=LogitsProcessorList([first]),
            return_dict_in_generate=True,
        )
    new = output.sequences[:, inputs["input_ids"].shape[1] :].tolist()
    assert first.logps is not None
    # The last token was chosen and never read.
    cached = output.sequences.shape[1] - 1
    return Greedy(_until_end(new, vlm), first.logps, output[cache_name(output)], cached)


def _until_end(rows: list[list[int]], vlm: VLM) -> list[list[int]]:
    eos = vlm.tokenizer.eos_token_id
    return [ids[: ids.index(eos) + 1] if eos in ids else ids for ids in rows]
