"""Everything that is asked of a prompt, from one forward over it.

The prompt and its images, by far the most of the work, are read once. From there the model writes
its greedy answer; options that are one token each are read from the distribution of the answer's
first token; and a given completion, or options of several tokens, go on from the keys and values
that the model has kept of the prompt, packed side by side (`vlm/packing.py`). Families that are not
packed score completions in rows of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from cwdpo_bench.errors import UserError
from cwdpo_bench.vlm.batch import (
    Prompt,
    append_completions,
    batches_by_length,
    completion_ids,
    encode_prompts,
)
from cwdpo_bench.vlm.cpu import fast_on_cpu
from cwdpo_bench.vlm.decoding import Greedy, branch, greedy
from cwdpo_bench.vlm.logprobs import completion_statistics, sequence_logps
from cwdpo_bench.vlm.model import VLM, evaluating
from cwdpo_bench.vlm.packing import pack_completions, packing_refusal, with_positions
from cwdpo_bench.vlm.scoring import (
    TokenScores,
    distribution_of,
    refuse_other_vocabulary,
    score_completions,
    token_scores,
)


class Generation(NamedTuple):
    """An answer.

    Attributes:
        text: decoded without special tokens, stripped.
        tokens: how many were generated, the end-of-turn token included.
        option_logps: [K] log-probability with which the answer starts with each option, over the
            full vocabulary, nats, the sum over an option's tokens; None where no options were
            given.
        scores: statistics of the given completion; None where none was given.
    """

    text: str
    tokens: int
    option_logps: np.ndarray | None = None
    scores: TokenScores | None = None


def generate(
    vlm: VLM,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    options: Sequence[Sequence[str] | None] | None = None,
    completions: Sequence[str] | None = None,
    reference: VLM | None = None,
) -> list[Generation]:
    """Greedy answers in the prompts' order, with what else is asked of the prompts.

    Args:
        vlm: the model that answers.
        prompts: N prompts.
        max_new_tokens: where an answer is cut off, if the model's context does not end before.
        batch_size: prompts a forward.
        options: for each prompt the texts whose log-probability as (the start of) the answer is
            wanted, or None.
        completions: an answer to each prompt to be scored, its end-of-turn token with it.
        reference: where given, TV and JS between the two models at the completions' tokens.

    Raises:
        UserError: two options of a prompt are the same tokens, or the two models' vocabularies
            differ.
    """
    answers: dict[int, Generation] = {}
    for indices in batches_by_length(prompts, batch_size, completions):
        batch = [prompts[i] for i in indices]
        replies = answer_batch(
            vlm,
            batch,
            encode_prompts(vlm.processor, batch),
            max_new_tokens=max_new_tokens,
            options=None if options is None else [options[i] for i in indices],
            completions=None if completions is None else [completions[i] for i in indices],
            reference=reference,
        )
        answers.update(zip(indices, replies, strict=True))
    return [answers[index] for index in range(len(prompts))]


def answer_batch(
    vlm: VLM,
    prompts: Sequence[Prompt],
    inputs: dict[str, torch.Tensor],
    *,
    max_new_tokens: int,
    options: Sequence[Sequence[str] | None] | None = None,
    completions: Sequence[str] | None = None,
    reference: VLM | None = None,
) -> list[Generation]:
    """What `generate` gives, for one batch that is encoded already.

    Args:
        inputs: of `encode_prompts` for these prompts.
    """
    if completions is not None:
        refuse_other_vocabulary(vlm, reference)
    with fast_on_cpu(vlm.model):
        if packing_refusal(vlm.model) is None:
            inputs = with_positions(vlm.model, inputs)
        read = _greedy_within(vlm, inputs, max_new_tokens)
        logps: list[np.ndarray | None] = [None] * len(prompts)
        scores: list[TokenScores | None] = [None] * len(prompts)
        if options is not None:
            ids = [[] if texts is None else option_ids(vlm.tokenizer, texts) for texts in options]
            logps = _option_logps(vlm, prompts, inputs, read, ids)
        if completions is not None:
            scores = [*_completion_scores(vlm, prompts, inputs, read, completions, reference)]
    texts = vlm.tokenizer.batch_decode(read.ids, skip_special_tokens=True)
    return [
        Generation(text.strip(), len(ids), logp, score)
        for text, ids, logp, score in zip(texts, read.ids, logps, scores, strict=True)
    ]


def _greedy_within(vlm: VLM, inputs: dict[str, torch.Tensor], max_new_tokens: int) -> Greedy:
    """Greedy answers, each cut off where the model's context ends.

    A row goes on while one with a shorter prompt has room, and is cut afterwards: what an answer
    starts with does not depend on how it ends, so none depends on what else is in its batch.
    """
    if vlm.context_length is None:
        return greedy(vlm, inputs, max_new_tokens)
    room = [vlm.context_length - length for length in inputs["attention_mask"].sum(-1).tolist()]
    read = greedy(vlm, inputs, max(1, min(max_new_tokens, max(room))))
    return read._replace(ids=[ids[: max(1, n)] for ids, n in zip(read.ids, room, strict=True)])


def option_ids(tokenizer: object, options: Sequence[str]) -> list[list[int]]:
    """The tokens with which an answer starts that is just this option, for each option.

    Raises:
        UserError: two options are the same tokens, so that nothing tells them apart, or one is
            empty.
    """
    ids = [tokenizer(option, add_special_tokens=False)["input_ids"] for option in options]  # type: ignore[operator]
    if not all(ids):
        raise UserError(f"one of the options {list(options)} is empty")
    if len({tuple(tokens) for tokens in ids}) < len(ids):
        raise UserError(f"the tokenizer writes two of the options {list(options)} alike")
    return ids


def _option_logps(
    vlm: VLM,
    prompts: Sequence[Prompt],
    inputs: dict[str, torch.Tensor],
    read: Greedy,
    options: Sequence[Sequence[Sequence[int]]],
) -> list[np.ndarray | None]:
    """[K] of each prompt: from the first token alone where it is all, else from all tokens."""
    first = read.first_logps.double().cpu().numpy()
    logps: list[np.ndarray | None] = [
        first[row, [ids[0] for ids in texts]] if texts else None
        for row, texts in enumerate(options)
    ]
    long = [row for row, texts in enumerate(options) if any(len(ids) > 1 for ids in texts)]
    if not long:
        return logps
    owners = [row for row in long for _ in options[row]]
    branches = [ids for row in long for ids in options[row]]
    sums = _branch_logps(vlm, prompts, inputs, read, branches, owners)
    for row in long:
        logps[row] = np.array([s for s, owner in zip(sums, owners, strict=True) if owner == row])
    return logps


def _branch_logps(
    vlm: VLM,
    prompts: Sequence[Prompt],
    inputs: dict[str, torch.Tensor],
    read: Greedy,
    branches: Sequence[Sequence[int]],
    owners: Sequence[int],
) -> list[float]:
    """Σ log p of each branch behind its prompt, end of turn not included."""
    with evaluating(vlm.model):
        if packing_refusal(vlm.model) is None:
            batch = pack_completions(inputs, branches, owners)
            batch = batch.to(vlm.device)
            scores = completion_statistics(vlm.model, batch, cache=branch(read.cache))
            return sequence_logps(scores.logps).double().tolist()
        sums: list[float] = []
        for start in range(0, len(branches), len(prompts)):
            part = slice(start, start + len(prompts))
            rows = encode_prompts(vlm.processor, [prompts[owner] for owner in owners[part]])
            plain = append_completions(rows, branches[part]).to(vlm.device)
            scores = completion_statistics(vlm.model, plain)
            sums += sequence_logps(scores.logps).double().tolist()
        return sums


def _completion_scores(
    vlm: VLM,
    prompts: Sequence[Prompt],
    inputs: dict[str, torch.Tensor],
    read: Greedy,
    completions: Sequence[str],
    reference: VLM | None,
) -> list[TokenScores]:
    """Statistics of one completion a prompt."""
    if packing_refusal(vlm.model) is not None:
        return score_completions(
            vlm, prompts, completions, batch_size=len(prompts), reference=reference
        )
    ids = [completion_ids(vlm.tokenizer, text) for text in completions]
    other = distribution_of(reference, append_completions(inputs, ids), vlm.device)
    with evaluating(vlm.model):
        batch = pack_completions(inputs, ids).to(vlm.device)
        scores = completion_statistics(
            vlm.model, batch, statistics=True, other=other, cache=branch(read.cache)
        )
    return token_scores(scores, batch)
