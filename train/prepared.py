"""What every step needs of the pairs and no step changes, made once: tokens, pixels, embeddings.

Prompts' tokens lie in a file; of the answers' the last ones stay in memory. Images lie in one
memory-mapped file as the processor leaves them, in the model's precision, or, where the vision
tower is frozen, as the embeddings it makes of them, so that training skips both. That file is
bounded: images beyond the bound are prepared in each step.
"""

from __future__ import annotations

import hashlib
import logging
import math
import mmap
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cwdpo_bench.errors import UserError
from cwdpo_bench.train import processes
from cwdpo_bench.train.data import ImageSource, Pair
from cwdpo_bench.train.kept_pairs import Records
from cwdpo_bench.vlm import (
    VLM,
    EncodedPrompt,
    embed_images,
    embedding_refusal,
    encode_prompt,
    packing_refusal,
    with_positions,
)
from cwdpo_bench.vlm.batch import PER_TOKEN, completion_ids

logger = logging.getLogger(__name__)

ANSWERS_KEPT = 2**16
"""Answers whose tokens stay in memory; others are tokenized again, a small part of a step."""


class _Place(NamedTuple):
    offset: int
    shape: torch.Size
    dtype: torch.dtype


class PreparedPairs:
    """The encoded prompts and answers of a run's pairs.

    Attributes:
        packed: whether the completions of a prompt share a row (see `vlm/packing.py`).
        embedded: whether images are kept as embeddings.
    """

    def __init__(
        self,
        vlm: VLM,
        pairs: Iterable[Pair] = (),
        *,
        limit: float = math.inf,
        folder: Path | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """Prepare `pairs`; others are prepared when asked for and not kept.

        Args:
            vlm: whose processor, family, precision and vision tower count.
            pairs: of every stage of a run.
            limit: bytes that the images may take; never more than half of what is free there.
            folder: where the file lies; the system's temporary folder by default. It has no name
                there: its space is given back when the process ends, however it ends.
            autocast: the precision of the training steps, for the embeddings.

        Raises:
            UserError: an image is missing or broken, or the disk is full.
        """
        self._vlm, self._autocast = vlm, autocast
        self.packed = packing_refusal(vlm.model) is None
        self.embedded = embedding_refusal(vlm.model) is None
        # By the key of a prompt, or of its images: where its record lies.
        self._tokens: dict[bytes, int] = {}
        self._places: dict[bytes, int] = {}
        self._answer = lru_cache(ANSWERS_KEPT)(lambda text: completion_ids(vlm.tokenizer, text))
        self._bytes, self._left_out = 0, 0
        self._map: mmap.mmap | None = None
        folder = folder or Path(tempfile.gettempdir())
        self._records = Records(folder)
        # Every process keeps a file of its own.
        self._limit = min(limit, shutil.disk_usage(folder).free / 2) / processes.count()
        training = vlm.model.training
        vlm.model.eval()
        try:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - lives as long as we
            for pair in pairs:
                self._keep(pair)
            self._file.flush()
            self._records.flush()
        except OSError as error:
            raise UserError(
                f"{folder}: prepared images cannot be written ({error.strerror}); free space or "
                "lower data.pixel_cache_gb, then go on with --resume"
            ) from error
        vlm.model.train(training)
        if self._bytes:
            # Copy-on-write: PyTorch wants memory that it could write to.
            self._map = mmap.mmap(self._file.fileno(), self._bytes, access=mmap.ACCESS_COPY)
        if self._left_out:
            logger.warning(
                "%d of %d images are prepared in each step: the kept ones fill the bound of "
                "%.3g GiB (data.pixel_cache_gb)",
                self._left_out,
                self._left_out + len(self._places),
                self._limit / 2**30,
            )

    @property
    def pad_token_id(self) -> int:
        """The token that fills rows up."""
        return self._vlm.pad_token_id

    def provenance(self) -> dict[str, Any]:
        """What was kept, for `provenance.json`."""
        return {
            "kind": "embeddings" if self.embedded else "pixels",
            "images": len(self._places),
            "bytes": self._bytes,
            "images_prepared_each_step": self._left_out,
        }

    def prompts(self, pairs: Iterable[Pair]) -> list[EncodedPrompt]:
        """The encoded prompts of a batch; all with embeddings or none, as a forward takes them."""
        pairs = list(pairs)
        if self._map is not None:
            # The batch before is done with: only what a batch needs stays in memory.
            self._map.madvise(mmap.MADV_DONTNEED)
        kept = [self._is_kept(pair) for pair in pairs]
        # Embeddings of some and pixels of others do not go into one forward.
        if self.embedded and not all(kept):
            kept = [False] * len(pairs)
        return [
            self._load(pair) if is_kept else self._encode(pair)
            for pair, is_kept in zip(pairs, kept, strict=True)
        ]

    def _is_kept(self, pair: Pair) -> bool:
        tokens = _key(pair.images, pair.prompt) in self._tokens
        return tokens and (not pair.images or _key(pair.images) in self._places)

    def answer(self, text: str) -> list[int]:
        """Token ids of an answer, the end-of-turn token behind them."""
        return self._answer(text)

    def length(self, pair: Pair) -> int:
        """Tokens of a pair: prompt, chosen and rejected answer."""
        record = self._tokens.get(_key(pair.images, pair.prompt))
        prompt = self._encode(pair) if record is None else self._records[record]
        answers = [pair.chosen] if pair.rejected is None else [pair.chosen, pair.rejected]
        return int(prompt["input_ids"].shape[1]) + sum(len(self.answer(text)) for text in answers)

    def _encode(self, pair: Pair) -> EncodedPrompt:
        prompt = encode_prompt(self._vlm.processor, pair.open())
        return with_positions(self._vlm.model, prompt) if self.packed else prompt

    def _keep(self, pair: Pair) -> None:
        key, images_key = _key(pair.images, pair.prompt), _key(pair.images)
        if key in self._tokens:
            return
        prompt = self._encode(pair)
        self._tokens[key] = self._records.add(
            # PyTorch's own way of writing small tensors takes ten times as long.
            {name: value.numpy() for name, value in prompt.items() if name in PER_TOKEN}
        )
        if not pair.images or images_key in self._places:
            return
        if self.embedded:
            with self._autocast():
                prompt = embed_images(self._vlm.model, prompt, self._vlm.device)
        dtype = self._vlm.model.get_input_embeddings().weight.dtype
        images = {
            # Every family casts pixels to its weights' precision: kept so, nothing is lost.
            name: (value.to(dtype) if value.is_floating_point() else value).contiguous()
            for name, value in prompt.items()
            if name not in PER_TOKEN
        }
        size = sum(_aligned(value.nbytes) for value in images.values())
        if self._bytes + size > self._limit:
            self._left_out += 1
            return
        self._places[images_key] = self._records.add(
            {name: self._append(value) for name, value in images.items()}
        )

    def _append(self, value: torch.Tensor) -> _Place:
        place = _Place(self._bytes, value.shape, value.dtype)
        self._file.write(value.flatten().view(torch.uint8).numpy().tobytes())
        self._file.write(b"\0" * (_aligned(value.nbytes) - value.nbytes))
        self._bytes += _aligned(value.nbytes)
        return place

    def _load(self, pair: Pair) -> EncodedPrompt:
        tokens = self._records[self._tokens[_key(pair.images, pair.prompt)]]
        prompt = {name: torch.from_numpy(value) for name, value in tokens.items()}
        record = self._places.get(_key(pair.images))
        places = {} if record is None else self._records[record]
        for name, place in places.items():
            flat = torch.frombuffer(
                self._map, dtype=place.dtype, count=place.shape.numel(), offset=place.offset
            )
            prompt[name] = flat.view(place.shape)
        return prompt


def _key(images: Sequence[ImageSource], prompt: str | None = None) -> bytes:
    """Names a prompt's images, and the prompt under them where there is one."""
    digest = hashlib.blake2b(digest_size=16)
    for source in images:
        digest.update(b"image" + (source if isinstance(source, bytes) else repr(source).encode()))
    if prompt is not None:
        digest.update(b"prompt" + prompt.encode())
    return digest.digest()


def _aligned(size: int) -> int:
    """Up to the next multiple of 64: every tensor starts where its type may."""
    return -(-size // 64) * 64
