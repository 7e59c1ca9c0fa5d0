"""Teacher-forced statistics of given answers, one row an answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from cwdpo_bench.errors import UserError
from cwdpo_bench.vlm.batch import (
    Batch,
    Prompt,
    append_completions,
    batches_by_length,
    completion_ids,
    encode_prompts,
)
from cwdpo_bench.vlm.logprobs import (
    Distribution,
    TokenStatistics,
    completion_hidden,
    completion_statistics,
    output_head,
)
from cwdpo_bench.vlm.model import VLM, evaluating


class TokenScores(NamedTuple):
    """Teacher-forced statistics of one completion of L tokens, each [L]."""

    logps: np.ndarray
    entropies: np.ndarray
    top1_probabilities: np.ndarray
    top1_correct: np.ndarray
    tv: np.ndarray | None
    js: np.ndarray | None


def score_completions(
    vlm: VLM,
    prompts: Sequence[Prompt],
    completions: Sequence[str],
    *,
    batch_size: int = 16,
    reference: VLM | None = None,
) -> list[TokenScores]:
    """Teacher-forced statistics of each completion under its prompt, in the given order.

    Args:
        vlm: the model to be judged.
        prompts: N prompts.
        completions: N answers; the end-of-turn token is scored with each.
        batch_size: rows a forward.
        reference: where given, TV and JS between the two models' next-token distributions.

    Raises:
        UserError: the two models' vocabularies differ.
    """
    refuse_other_vocabulary(vlm, reference)
    results: dict[int, TokenScores] = {}
    with evaluating(vlm.model):
        for indices in batches_by_length(prompts, batch_size, completions):
            ids = [completion_ids(vlm.tokenizer, completions[i]) for i in indices]
            inputs = encode_prompts(vlm.processor, [prompts[i] for i in indices])
            batch = append_completions(inputs, ids).to(vlm.device)
            other = distribution_of(reference, batch, vlm.device)
            scores = completion_statistics(vlm.model, batch, statistics=True, other=other)
            results.update(zip(indices, token_scores(scores, batch), strict=True))
    return [results[index] for index in range(len(prompts))]


def refuse_other_vocabulary(vlm: VLM, reference: VLM | None) -> None:
    """Distributions over other vocabularies have no distance.

    Raises:
        UserError: the two models' vocabularies differ.
    """
    if reference is not None and (
        reference.model.config.get_text_config().vocab_size
        != vlm.model.config.get_text_config().vocab_size
    ):
        raise UserError(f"models {vlm.name!r} and {reference.name!r} differ in their vocabularies")


def distribution_of(
    reference: VLM | None, batch: Batch, device: torch.device
) -> Distribution | None:
    """The reference model's next-token distributions for a batch of plain rows, on `device`."""
    if reference is None:
        return None
    with evaluating(reference.model):
        hidden = completion_hidden(reference.model, batch.to(reference.device))
    return Distribution(hidden.to(device), output_head(reference.model))


def token_scores(scores: TokenStatistics, batch: Batch) -> list[TokenScores]:
    """The statistics of each row without its padding, as arrays."""
    assert scores.top1_id is not None
    columns = [
        scores.logps,
        scores.entropy,
        scores.top1_probability,
        scores.top1_id.eq(batch.targets),
        scores.tv,
        scores.js,
    ]
    arrays = [None if column is None else column.cpu().numpy() for column in columns]
    return [
        TokenScores(*(None if a is None else a[row, :length] for a in arrays))  # type: ignore[arg-type]
        for row, length in enumerate(batch.mask.sum(-1).tolist())
    ]
