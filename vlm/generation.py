"""Greedy and sampled answers and teacher-forced scores of many prompts, batched by length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from cwdpo_bench.errors import UserError
from cwdpo_bench.vlm.batch import (
    EncodedPrompt,
    Prompt,
    build_batch,
    encode_prompts,
    merge_prompts,
)
from cwdpo_bench.vlm.logprobs import (
    Distribution,
    completion_hidden,
    completion_statistics,
    output_head,
)
from cwdpo_bench.vlm.model import VLM
from cwdpo_bench.vlm.vision import forward_inputs

Progress = Callable[[int], None]
"""Called with the number of prompts just finished."""


class Generation(NamedTuple):
    """An answer.

    Attributes:
        text: decoded without special tokens, stripped.
        tokens: how many were generated, the end-of-turn token included.
        option_logps: [K] log-probability of each option letter as the first token of the answer,
            over the full vocabulary, nats; None where no options were given.
    """

    text: str
    tokens: int
    option_logps: np.ndarray | None


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


class TokenScores(NamedTuple):
    """Teacher-forced statistics of one completion of L tokens, each [L]."""

    logps: np.ndarray
    entropies: np.ndarray
    top1_probabilities: np.ndarray
    top1_correct: np.ndarray
    tv: np.ndarray | None
    js: np.ndarray | None


class _FirstLogps(LogitsProcessor):
    """Keeps the log-probabilities of the first generated position: option scores at no cost."""

    def __init__(self) -> None:
        self.logps: torch.Tensor | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> Any:
        if self.logps is None:
            self.logps = scores.float().log_softmax(-1)
        return scores


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)


def option_token_ids(tokenizer: Any, letters: Sequence[str]) -> list[int]:
    """The token with which an answer that is just this letter starts.

    Raises:
        UserError: two letters share a token, so that the tokenizer cannot tell them apart.
    """
    ids = [tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in letters]
    if len(set(ids)) < len(ids):
        raise UserError(f"the tokenizer writes two of the options {list(letters)} with one token")
    return ids


def batches_by_length(
    prompts: Sequence[Prompt], size: int, tails: Sequence[str] | None = None
) -> Iterator[list[int]]:
    """Indices in batches of like length, so that little of a batch is padding.

    Args:
        prompts: image sizes count first, then the texts' lengths.
        size: prompts a batch.
        tails: what stands behind each prompt.
    """

    def length(index: int) -> tuple[int, int]:
        prompt = prompts[index]
        pixels = sum(image.width * image.height for image in prompt.images)
        return pixels, len(prompt.text) + (0 if tails is None else len(tails[index]))

    order = sorted(range(len(prompts)), key=length)
    for start in range(0, len(order), size):
        yield order[start : start + size]


def generate(
    vlm: VLM,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    options: Sequence[Sequence[str] | None] | None = None,
    progress: Progress | None = None,
) -> list[Generation]:
    """Greedy answers in the prompts' order, with the options' probabilities from the same pass.

    Sampling, beams and repetition penalties that a model's own generation settings may switch on
    are switched off: an evaluation must give the same answer twice.
    """
    answers: list[Generation | None] = [None] * len(prompts)
    tokenizer = vlm.tokenizer
    with _evaluating(vlm.model):
        for indices in batches_by_length(prompts, batch_size):
            inputs = encode_prompts(vlm.processor, [prompts[i] for i in indices])
            first = _FirstLogps()
            new = _greedy(vlm, inputs, max_new_tokens, first)
            texts = tokenizer.batch_decode(new, skip_special_tokens=True)
            for row, index in enumerate(indices):
                letters = options[index] if options is not None else None
                scores = None
                if letters is not None and first.logps is not None:
                    ids = option_token_ids(tokenizer, letters)
                    scores = first.logps[row, ids].double().cpu().numpy()
                tokens = _length(new[row].tolist(), tokenizer.eos_token_id)
                answers[index] = Generation(texts[row].strip(), tokens, scores)
            if progress is not None:
                progress(len(indices))
    return [answer for answer in answers if answer is not None]


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
    with _evaluating(vlm.model):
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
    with _evaluating(vlm.model):
        new = _greedy(vlm, prompt_inputs, max_new_tokens).tolist()
    return [ids[: _length(ids, vlm.tokenizer.eos_token_id)] for ids in new]


def _greedy(
    vlm: VLM,
    prompt_inputs: dict[str, torch.Tensor],
    max_new_tokens: int,
    watcher: LogitsProcessor | None = None,
) -> torch.Tensor:
    """The generated columns, [B, at most max_new_tokens]; `watcher` sees the logits."""
    inputs = {name: value.to(vlm.device) for name, value in prompt_inputs.items()}
    output: torch.Tensor = vlm.model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        repetition_penalty=1.0,
        pad_token_id=vlm.pad_token_id,
        logits_processor=LogitsProcessorList([] if watcher is None else [watcher]),
    )
    return output[:, inputs["input_ids"].shape[1] :]


def _length(ids: list[int], eos: int) -> int:
    return ids.index(eos) + 1 if eos in ids else len(ids)


def score_completions(
    vlm: VLM,
    prompts: Sequence[Prompt],
    completions: Sequence[str],
    *,
    batch_size: int = 16,
    reference: VLM | None = None,
    progress: Progress | None = None,
) -> list[TokenScores]:
    """Teacher-forced statistics of each completion under its prompt, in the given order.

    Args:
        vlm: the model to be judged.
        prompts: N prompts.
        completions: N answers; the end-of-turn token is scored with each.
        batch_size: rows a forward.
        reference: where given, TV and JS between the two models' next-token distributions.
        progress: called after every batch.

    Raises:
        UserError: the two models' vocabularies differ.
    """
    if reference is not None and (
        reference.model.config.get_text_config().vocab_size
        != vlm.model.config.get_text_config().vocab_size
    ):
        raise UserError(f"models {vlm.name!r} and {reference.name!r} differ in their vocabularies")
    results: list[TokenScores | None] = [None] * len(prompts)
    with _evaluating(vlm.model):
        for indices in batches_by_length(prompts, batch_size, completions):
            batch = build_batch(
                vlm.processor, [prompts[i] for i in indices], [completions[i] for i in indices]
            )
            other = None
            if reference is not None:
                with _evaluating(reference.model):
                    other = Distribution(
                        completion_hidden(reference.model, batch.to(reference.device)).to(
                            vlm.device
                        ),
                        output_head(reference.model),
                    )
            batch = batch.to(vlm.device)
            scores = completion_statistics(vlm.model, batch, statistics=True, other=other)
            assert scores.top1_id is not None
            correct = scores.top1_id.eq(batch.targets)
            columns = [
                scores.logps,
                scores.entropy,
                scores.top1_probability,
                correct,
                scores.tv,
                scores.js,
            ]
            arrays = [None if column is None else column.cpu().numpy() for column in columns]
            lengths = batch.mask.sum(-1).tolist()
            for row, index in enumerate(indices):
                results[index] = TokenScores(
                    *(None if a is None else a[row, : lengths[row]] for a in arrays)  # type: ignore[arg-type]
                )
            if progress is not None:
                progress(len(indices))
    return [result for result in results if result is not None]
