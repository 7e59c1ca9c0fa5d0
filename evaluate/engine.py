"""The in-process engine: a loaded model answers a benchmark's samples.

One forward over a prompt gives both the generated answer and the options' log-probabilities;
captions are also scored teacher-forced on their first reference. Images are opened a chunk at a
time and let go after it, so that a benchmark needs the memory of one chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image

from cwdpo_bench.errors import UserError
from cwdpo_bench.evaluate.samples import CaptionSample, ChoiceSample, ImageSource
from cwdpo_bench.vlm import (
    VLM,
    Prompt,
    TokenScores,
    generate,
    open_image,
    path_inside,
    score_completions,
)

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
        UserError: an image cannot be opened, a log-probability is not a number, or the memory is
            too small for the batch size.
    """
    answers: list[CaptionAnswer] = []
    for chunk in _chunks(samples, root, batch_size * CHUNK_BATCHES):
        prompts = [prompt for _, prompt in chunk]
        with _out_of_memory_told(batch_size):
            generations = generate(
                vlm, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size
            )
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
        UserError: an image cannot be opened, a log-probability is not a number, or the memory is
            too small for the batch size.
    """
    answers: list[ChoiceAnswer] = []
    for chunk in _chunks(samples, root, batch_size * CHUNK_BATCHES):
        with _out_of_memory_told(batch_size):
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


@contextmanager
def _out_of_memory_told(batch_size: int) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the accelerator's memory is too small for a batch of {batch_size}; "
            "make the batch size smaller"
        ) from error


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


def refuse_missing_images(
    samples: Sequence[CaptionSample] | Sequence[ChoiceSample], root: Path
) -> None:
    """Look for every image file without opening it, before the first hour of answers is spent.

    Raises:
        UserError: a file is not there or outside `root`.
    """
    for sample in samples:
        for source in _sources(sample):
            if isinstance(source, Path):
                path = path_inside(root, source, name=_place(sample))
                if not path.is_file():
                    raise UserError(f"{_place(sample)}: image {path} does not exist")


def _open_images(sample: CaptionSample | ChoiceSample, root: Path) -> tuple[Image.Image, ...]:
    return tuple(open_image(source, name=_place(sample), root=root) for source in _sources(sample))


def _sources(sample: CaptionSample | ChoiceSample) -> tuple[ImageSource, ...]:
    return sample.images if isinstance(sample, ChoiceSample) else (sample.image,)


def _place(sample: CaptionSample | ChoiceSample) -> str:
    return f"sample {sample.id}"
