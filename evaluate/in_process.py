"""The in-process engine: a loaded model answers a benchmark's samples.

One forward over a prompt gives both the generated answer and the options' log-probabilities;
captions are also scored teacher-forced on their first reference. Images are opened a chunk at a
time and let go after it, so that a benchmark needs the memory of one chunk. While the model answers
a batch, the next one is opened and encoded beside it.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
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
    Generation,
    Prompt,
    answer_batch,
    batches_by_length,
    encode_prompt,
    encode_prompts,
    processor_fingerprint,
    weights_fingerprint,
)
from cwdpo_bench.vlm import sample as sample_answers

AUTO_ROWS = 64
"""Where `batch_size` is left to the engine it starts here: more gain little, on a CPU none."""
CHUNK_BATCHES = 4
"""Batches whose images are open at a time: enough to sort like sizes into one batch."""
CHUNK_PIXELS = 64_000_000
"""A chunk ends early when its images reach this many pixels (192 MB decoded)."""

Sample = TypeVar("Sample", CaptionSample, ChoiceSample)
Answer = TypeVar("Answer", CaptionAnswer, ChoiceAnswer)
Item = TypeVar("Item")
_Opened = tuple[int, Sample, Prompt]
_Encoded = dict[str, torch.Tensor]

_COMPILER = ("torch._dynamo", "torch._inductor")
"""Whose errors say that this machine cannot compile."""
_Ask = Callable[[list[_Opened[Sample]], _Encoded], list[Generation]]


@dataclass
class InProcessEngine:
    """A loaded model.

    Attributes:
        vlm: the model that answers.
        root: the data root; no image may lie outside it.
        batch_size: rows a forward; None starts with `AUTO_ROWS` and halves what the accelerator's
            memory is too small for. The replies do not depend on it.
        reference: where given, captions get TV and JS of every position between it and `vlm`.
        draws: captions sampled an image, beside the greedy one, at temperature 1. An image's own
            depend on its id alone, not on what else is in its batch.
        compiled: the language model's forward goes through `torch.compile`.
    """

    vlm: VLM
    root: Path
    batch_size: int | None
    reference: VLM | None = None
    draws: int = 0
    compiled: bool = False
    rows: int = field(init=False)

    name = "hf"

    def __post_init__(self) -> None:
        """Begin with as many rows as are asked for, or may be tried."""
        self.rows = AUTO_ROWS if self.batch_size is None else self.batch_size
        if self.compiled:
            # The part that is asked at every token; lengths differ from one forward to the next.
            self.vlm.model.get_decoder().compile(dynamic=True)

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
        """Device, batch size, as it is by now, and whether the model was compiled."""
        device = str(self.vlm.device)
        return {"device": device, "batch_size": self.rows, "compiled": self.compiled}

    @property
    def chunk_size(self) -> int:
        """Enough to sort like sizes into one batch; it stays when batches are halved."""
        return (AUTO_ROWS if self.batch_size is None else self.batch_size) * CHUNK_BATCHES

    @property
    def shift_from(self) -> str | None:
        """The reference model's name."""
        return None if self.reference is None else self.reference.name

    def fingerprint(self) -> str:
        """Contents of both models' weights and processors, the precision among them.

        And whether the model was compiled: it then rounds otherwise.
        """
        models = [vlm for vlm in (self.vlm, self.reference) if vlm is not None]
        parts: list[object] = [
            (weights_fingerprint(vlm.model), processor_fingerprint(vlm.processor)) for vlm in models
        ]
        parts += ["compiled"] if self.compiled else []
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def answer_captions(
        self, samples: Sequence[CaptionSample], *, max_new_tokens: int
    ) -> Iterator[tuple[int, CaptionAnswer | Failure]]:
        """Greedy captions, and teacher-forced token statistics on each first reference.

        Raises:
            UserError: a log-probability is not a number, or the memory is too small for the batch
                size.
        """

        def answer(sample: CaptionSample, prompt: Prompt, reply: Generation) -> CaptionAnswer:
            scores = reply.scores
            assert scores is not None
            for values in (scores.logps, scores.entropies, scores.tv, scores.js):
                _refuse_nan(values, self.vlm, sample.id)
            drawn = self._draw(sample.id, prompt, max_new_tokens)
            return CaptionAnswer(reply.text, scores, drawn)

        return self._answers(samples, partial(self._captions, max_new_tokens), answer)

    def _draw(self, name: str, prompt: Prompt, max_new_tokens: int) -> tuple[str, ...]:
        if not self.draws:
            return ()
        encoded = encode_prompt(self.vlm.processor, prompt)
        prompts = [encoded] * self.draws
        if self.vlm.context_length is not None:
            room = self.vlm.context_length - encoded["input_ids"].shape[-1]
            max_new_tokens = min(max_new_tokens, room)
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

        def answer(sample: ChoiceSample, _: Prompt, reply: Generation) -> ChoiceAnswer:
            _refuse_nan(reply.option_logps, self.vlm, sample.id)
            return ChoiceAnswer(reply.text, reply.option_logps)

        return self._answers(samples, partial(self._choices, max_new_tokens), answer)

    def _answers(
        self,
        samples: Sequence[Sample],
        ask: _Ask[Sample],
        answer: Callable[[Sample, Prompt, Generation], Answer],
    ) -> Iterator[tuple[int, Answer | Failure]]:
        """What every batch is answered, with its places, and what could not be opened."""
        for item in _ahead(self._batches(samples)):
            if isinstance(item[1], Failure):
                yield item
                continue
            for (place, sample, prompt), reply in self._asked(*item, ask):
                yield place, answer(sample, prompt, reply)

    def _captions(
        self, max_new_tokens: int, batch: Sequence[_Opened[CaptionSample]], inputs: _Encoded
    ) -> list[Generation]:
        return answer_batch(
            self.vlm,
            [prompt for _, _, prompt in batch],
            inputs,
            max_new_tokens=max_new_tokens,
            completions=[sample.references[0] for _, sample, _ in batch],
            reference=self.reference,
        )

    def _choices(
        self, max_new_tokens: int, batch: Sequence[_Opened[ChoiceSample]], inputs: _Encoded
    ) -> list[Generation]:
        return answer_batch(
            self.vlm,
            [prompt for _, _, prompt in batch],
            inputs,
            max_new_tokens=max_new_tokens,
            options=[sample.option_replies or None for _, sample, _ in batch],
        )

    def _asked(
        self, batch: list[_Opened[Sample]], inputs: _Encoded, ask: _Ask[Sample]
    ) -> Iterator[tuple[_Opened[Sample], Generation]]:
        """What a batch is answered, in as many parts as the memory needs."""
        parts: list[tuple[list[_Opened[Sample]], _Encoded | None]] = [(batch, inputs)]
        while parts:
            part, encoded = parts.pop(0)
            try:
                replies = ask(part, self._encode(part) if encoded is None else encoded)
            except torch.OutOfMemoryError as error:
                if self.batch_size is not None or len(part) == 1:
                    raise _too_little_memory(self.batch_size or 1) from error
                replies = []
            except Exception as error:
                if self.compiled and type(error).__module__.startswith(_COMPILER):
                    reason = str(error).strip().partition("\n")[0]
                    raise UserError(
                        f"--compile: torch.compile fails here ({reason}); leave it out"
                    ) from error
                raise
            if replies:
                yield from zip(part, replies, strict=True)
                continue
            # Out of the handler, whose traceback holds the failed forward's tensors.
            half = len(part) // 2
            self.rows = min(self.rows, half)
            parts[:0] = [(part[:half], None), (part[half:], None)]
            torch.cuda.empty_cache()
            said = f"a batch of {len(part)} is too much, going on with {half}"
            print(f"batch size auto: {said}", file=sys.stderr)

    def _batches(
        self, samples: Sequence[Sample]
    ) -> Iterator[tuple[list[_Opened[Sample]], _Encoded] | tuple[int, Failure]]:
        """Samples of like length, opened and encoded, and those that cannot be."""
        for chunk in self._chunks(samples):
            opened = []
            for place, sample, prompt in chunk:
                if isinstance(prompt, Failure):
                    yield place, prompt
                else:
                    opened.append((place, sample, prompt))
            prompts = [prompt for _, _, prompt in opened]
            for indices in batches_by_length(prompts, self.rows):
                batch = [opened[i] for i in indices]
                inputs = self._encode(batch)
                too_long = self._too_long([sample for _, sample, _ in batch], inputs)
                for row, length in too_long.items():
                    place, sample, _ = batch[row]
                    yield place, Failure(f"sample {sample.id}: {length}")
                if too_long:
                    batch = [one for row, one in enumerate(batch) if row not in too_long]
                    inputs = self._encode(batch) if batch else {}
                if batch:
                    yield batch, inputs

    def _encode(self, batch: Sequence[_Opened[Sample]]) -> _Encoded:
        return encode_prompts(self.vlm.processor, [prompt for _, _, prompt in batch])

    def _too_long(self, samples: Sequence[Sample], inputs: _Encoded) -> dict[int, str]:
        """The rows that leave the model no room for an answer or for what is scored, and why."""
        context = self.vlm.context_length
        if context is None:
            return {}
        found = {}
        for row, length in enumerate(inputs["attention_mask"].sum(-1).tolist()):
            told = f"the prompt is {length} tokens long, images included"
            if length >= context:
                found[row] = f"{told}; the model reads {context} with its answer"
                continue
            longest = self._longest_scored(samples[row], context - length)
            if length + longest > context:
                what = "option" if isinstance(samples[row], ChoiceSample) else "first reference"
                found[row] = f"{told}, and its {what} {longest}; the model reads {context}"
        return found

    def _longest_scored(self, sample: CaptionSample | ChoiceSample, room: int) -> int:
        """Tokens of the longest text that is scored behind a prompt; 0 where all surely fit."""
        if isinstance(sample, CaptionSample):
            texts, end = [sample.references[0]], 1
        else:
            texts, end = [*sample.option_replies], 0
        # No token is less than a byte.
        if all(len(text.encode()) + end <= room for text in texts):
            return 0
        ids = [self.vlm.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        return max(map(len, ids)) + end

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


def _ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items, none of them None, each made in a thread while the last is in use."""
    with ThreadPoolExecutor(1) as worker:
        coming = worker.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = worker.submit(next, items, None)
            yield item


@contextmanager
def _out_of_memory_told(batch_size: int) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise _too_little_memory(batch_size) from error


def _too_little_memory(batch_size: int) -> UserError:
    mend = "make the batch size smaller" if batch_size > 1 else "limit the images' pixels"
    return UserError(f"the accelerator's memory is too small for a batch of {batch_size}; {mend}")


def _refuse_nan(values: np.ndarray | None, vlm: VLM, sample: str) -> None:
    if values is not None and not np.isfinite(values).all():
        raise UserError(
            f"model {vlm.name!r}: a log-probability on sample {sample!r} is not a finite number; "
            "the weights are broken, or overflow in their precision"
        )
