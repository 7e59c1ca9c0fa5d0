"""The in-process engine: a loaded model answers a benchmark's samples.

One forward over a prompt gives both the generated answer and the options' log-probabilities;
captions are also scored teacher-forced on their first reference. Images are opened a chunk at a
time and let go after it, so that a benchmark needs the memory of one chunk.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from cwdpo_bench.errors import UserError
from cwdpo_bench.evaluate.engine import CaptionAnswer, ChoiceAnswer, Failure
from cwdpo_bench.evaluate.images import open_images
from cwdpo_bench.evaluate.samples import CaptionSample, ChoiceSample
from cwdpo_bench.vlm import (
    VLM,
    Prompt,
    batches_by_length,
    encode_prompt,
    generate,
    processor_fingerprint,
    weights_fingerprint,
)
from cwdpo_bench.vlm import sample as sample_answers

CHUNK_BATCHES = 4
"""Batches whose images are open at a time: enough to sort like sizes into one batch."""
CHUNK_PIXELS = 64_000_000
"""A chunk ends early when its images reach this many pixels (192 MB decoded)."""

Sample = TypeVar("Sample", CaptionSample, ChoiceSample)
_Opened = tuple[int, Sample, Prompt]


@dataclass(frozen=True)
class InProcessEngine:
    """A loaded model.

    Attributes:
        vlm: the model that answers.
        root: the data root; no image may lie outside it.
        batch_size: rows a forward.
        reference: where given, captions get TV and JS of every position between it and `vlm`.
        draws: captions sampled an image, beside the greedy one, at temperature 1. An image's own
            depend on its id alone, not on what else is in its batch.
    """

    vlm: VLM
    root: Path
    batch_size: int
    reference: VLM | None = None
    draws: int = 0

    name = "hf"

    @property
    def model(self) -> dict[str, object]:
        """Name, architecture and number of parameters."""
        return {
            "name": self.vlm.name,
            "architecture": type(self.vlm.model).__name__,
            "parameters": sum(parameter.numel() for parameter in self.vlm.model.parameters()),
        }

    @property
    def signature_parts(self) -> dict[str, object]:
        """Precision and image resolution."""
        images = self.vlm.processor.image_processor
        size = ",".join(f"{k}={v}" for k, v in sorted(dict(getattr(images, "size", {})).items()))
        return {
            "engine": self.name,
            "dtype": str(self.vlm.model.dtype).removeprefix("torch."),
            "images": f"{type(images).__name__}({size})",
        }

    @property
    def provenance(self) -> dict[str, object]:
        """Device and batch size."""
        return {"device": str(self.vlm.device), "batch_size": self.batch_size}

    @property
    def chunk_size(self) -> int:
        """Enough to sort like sizes into one batch."""
        return self.batch_size * CHUNK_BATCHES

    @property
    def shift_from(self) -> str | None:
        """The reference model's name."""
        return None if self.reference is None else self.reference.name

    def fingerprint(self) -> str:
        """Contents of both models' weights and processors, the precision among them."""
        models = [vlm for vlm in (self.vlm, self.reference) if vlm is not None]
        parts = [
            (weights_fingerprint(vlm.model), processor_fingerprint(vlm.processor)) for vlm in models
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def answer_captions(
        self, samples: Sequence[CaptionSample], *, max_new_tokens: int
    ) -> Iterator[tuple[int, CaptionAnswer | Failure]]:
        """Greedy captions, and teacher-forced token statistics on each first reference.

        Raises:
            UserError: a log-probability is not a number, or the memory is too small for the batch
                size.
        """
        for batch in self._batches(samples):
            if isinstance(batch, tuple):
                yield batch
                continue
            with _out_of_memory_told(self.batch_size):
                replies = generate(
                    self.vlm,
                    [prompt for _, _, prompt in batch],
                    max_new_tokens=max_new_tokens,
                    batch_size=self.batch_size,
                    completions=[sample.references[0] for _, sample, _ in batch],
                    reference=self.reference,
                )
            for opened, reply in zip(batch, replies, strict=True):
                place, sample, prompt = opened
                scores = reply.scores
                assert scores is not None
                for values in (scores.logps, scores.entropies, scores.tv, scores.js):
                    _refuse_nan(values, self.vlm, sample.id)
                drawn = self._draw(sample.id, prompt, max_new_tokens)
                yield place, CaptionAnswer(reply.text, scores, drawn)

    def _draw(self, name: str, prompt: Prompt, max_new_tokens: int) -> tuple[str, ...]:
        if not self.draws:
            return ()
        prompts = [encode_prompt(self.vlm.processor, prompt)] * self.draws
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
        with torch.random.fork_rng(), _out_of_memory_told(self.draws):
            torch.manual_seed(seed)
            drawn = sample_answers(
                self.vlm, prompts, max_new_tokens=max_new_tokens, batch_size=self.draws
            )
        return tuple(one.text for one in drawn)

    def answer_choices(
        self, samples: Sequence[ChoiceSample], *, max_new_tokens: int
    ) -> Iterator[tuple[int, ChoiceAnswer | Failure]]:
        """Greedy replies with the options' log-probabilities from the same forward.

        Raises:
            UserError: a log-probability is not a number, or the memory is too small for the batch
                size.
        """
        for batch in self._batches(samples):
            if isinstance(batch, tuple):
                yield batch
                continue
            with _out_of_memory_told(self.batch_size):
                generations = generate(
                    self.vlm,
                    [prompt for _, _, prompt in batch],
                    max_new_tokens=max_new_tokens,
                    batch_size=self.batch_size,
                    options=[sample.option_replies or None for _, sample, _ in batch],
                )
            for (place, sample, _), reply in zip(batch, generations, strict=True):
                _refuse_nan(reply.option_logps, self.vlm, sample.id)
                yield place, ChoiceAnswer(reply.text, reply.option_logps)

    def _batches(
        self, samples: Sequence[Sample]
    ) -> Iterator[list[_Opened[Sample]] | tuple[int, Failure]]:
        """Samples of like length with their images open, and those whose images cannot be."""
        for chunk in self._chunks(samples):
            opened = []
            for place, sample, prompt in chunk:
                if isinstance(prompt, Failure):
                    yield place, prompt
                else:
                    opened.append((place, sample, prompt))
            prompts = [prompt for _, _, prompt in opened]
            for indices in batches_by_length(prompts, self.batch_size):
                yield [opened[i] for i in indices]

    def _chunks(
        self, samples: Sequence[Sample]
    ) -> Iterator[list[tuple[int, Sample, Prompt | Failure]]]:
        """At most `CHUNK_BATCHES` batches, and about `CHUNK_PIXELS`, at a time."""
        chunk: list[tuple[int, Sample, Prompt | Failure]] = []
        pixels = 0
        for place, sample in enumerate(samples):
            try:
                images = open_images(sample, self.root)
            except UserError as error:
                chunk.append((place, sample, Failure(str(error))))
                continue
            chunk.append((place, sample, Prompt(sample.prompt, images)))
            pixels += sum(image.width * image.height for image in images)
            if len(chunk) >= self.chunk_size or pixels >= CHUNK_PIXELS:
                yield chunk
                chunk, pixels = [], 0
        if chunk:
            yield chunk


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
