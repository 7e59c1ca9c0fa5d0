"""The in-process engine: a loaded model answers a benchmark's samples.

One forward over a prompt gives both the generated answer and the options' log-probabilities;
captions are also scored teacher-forced on their first reference. Images are opened a chunk at a
time and let go after it, so that a benchmark needs the memory of one chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image

from cwdpo_bench.errors import UserError
from cwdpo_bench.evaluate.samples import CaptionSample, ChoiceSample
from cwdpo_bench.vlm import VLM, Prompt, TokenScores, generate, open_image, score_completions

CHUNK_BATCHES = 4
"""Batches whose images are open at a time: enough to sort like sizes into one batch."""
CHUNK_PIXELS = 64_000_000
"""A chunk ends early when its images reach this many pixels (192 MB decoded)."""

Sample = TypeVar("Sample", CaptionSample, ChoiceSample)
Progress = Callable[[int], None]
"""Called with the number of samples just finished."""


class CaptionAnswer(NamedTuple):
    """A generated caption and the statistics of the first reference's tokens."""

    text: str
    reference_scores: TokenScores


class ChoiceAnswer(NamedTuple):
    """A generated reply and log p of every option's letter, None for an open question."""

    text: str
    option_log_probabilities: np.ndarray | None


def answer_captions(
    vlm: VLM,
    samples: Sequence[CaptionSample],
    root: Path,
    *,
    max_new_tokens: int,
    batch_size: int,
    reference: VLM | None = None,
    progress: Progress | None = None,
) -> list[CaptionAnswer]:
    """Greedy captions, and teacher-forced token statistics on each first reference.

    Args:
        vlm: the model that answers.
        samples: the benchmark's samples, answered in their order.
        root: the data root; no image may lie outside it.
        max_new_tokens: generation stops there.
        batch_size: rows a forward.
        reference: where given, TV and JS of every position between it and `vlm`.
        progress: called after every chunk.

    Raises:
        UserError: an image cannot be opened, or a log-probability is not a number.
    """
    answers: list[CaptionAnswer] = []
    for chunk in _chunks(samples, root, batch_size * CHUNK_BATCHES):
        prompts = [prompt for _, prompt in chunk]
        generations = generate(vlm, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)
        scores = score_completions(
            vlm,
            prompts,
            [sample.references[0] for sample, _ in chunk],
            batch_size=batch_size,
            reference=reference,
        )
        for (sample, _), generation, score in zip(chunk, generations, scores, strict=True):
            for values in (score.logps, score.entropies, score.tv, score.js):
                _refuse_nan(values, vlm, sample.id)
            answers.append(CaptionAnswer(generation.text, score))
        if progress is not None:
            progress(len(chunk))
    return answers


def answer_choices(
    vlm: VLM,
    samples: Sequence[ChoiceSample],
    root: Path,
    *,
    max_new_tokens: int,
    batch_size: int,
    progress: Progress | None = None,
) -> list[ChoiceAnswer]:
    """Greedy replies with the options' log-probabilities from the same forward.

    Args:
        vlm: the model that answers.
        samples: the benchmark's samples, answered in their order.
        root: the data root; no image may lie outside it.
        max_new_tokens: generation stops there.
        batch_size: rows a forward.
        progress: called after every chunk.

    Raises:
        UserError: an image cannot be opened, or a log-probability is not a number.
    """
    answers: list[ChoiceAnswer] = []
    for chunk in _chunks(samples, root, batch_size * CHUNK_BATCHES):
        generations = generate(
            vlm,
            [prompt for _, prompt in chunk],
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            options=[sample.letters or None for sample, _ in chunk],
        )
        for (sample, _), generation in zip(chunk, generations, strict=True):
            _refuse_nan(generation.option_logps, vlm, sample.id)
            answers.append(ChoiceAnswer(generation.text, generation.option_logps))
        if progress is not None:
            progress(len(chunk))
    return answers


def _refuse_nan(values: np.ndarray | None, vlm: VLM, sample: str) -> None:
    if values is not None and not np.isfinite(values).all():
        raise UserError(
            f"model {vlm.name!r}: a log-probability on sample {sample!r} is not a finite number; "
            "the weights are broken, or overflow in their precision"
        )


def _chunks(
    samples: Sequence[Sample], root: Path, size: int
) -> Iterator[list[tuple[Sample, Prompt]]]:
    """Samples with their images open, at most `size` of them and `CHUNK_PIXELS` at a time."""
    chunk: list[tuple[Sample, Prompt]] = []
    pixels = 0
    for sample in samples:
        images = _open_images(sample, root)
        chunk.append((sample, Prompt(sample.prompt, images)))
        pixels += sum(image.width * image.height for image in images)
        if len(chunk) == size or pixels >= CHUNK_PIXELS:
            yield chunk
            chunk, pixels = [], 0
    if chunk:
        yield chunk


def _open_images(sample: CaptionSample | ChoiceSample, root: Path) -> tuple[Image.Image, ...]:
    sources = sample.images if isinstance(sample, ChoiceSample) else (sample.image,)
    return tuple(open_image(source, name=f"sample {sample.id}", root=root) for source in sources)
