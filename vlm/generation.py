"""Answers' tokens from the model's own decoding: sampled, and the greedy ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from cwdpo_bench.vlm.batch import EncodedPrompt, merge_prompts
from cwdpo_bench.vlm.decoding import end_tokens, greedy, until_end
from cwdpo_bench.vlm.model import VLM, evaluating
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
    ends = end_tokens(vlm)
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
                ids = until_end(drawn, ends)
                text = vlm.tokenizer.decode(ids, skip_special_tokens=True).strip()
                samples[index] = Sample(text, ids, ids[-1] in ends)
    return [answer for answer in samples if answer is not None]


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
