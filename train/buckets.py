"""Batches of like length, so that little of a batch is padding; every pair once an epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

BATCHES_A_BUCKET = 16
"""Batches among which pairs are sorted: enough for little padding, few enough to stay random."""


class LengthBuckets(Sampler[int]):
    """Indices in the order of an epoch, which follows from seed and epoch alone.

    All indices are shuffled, cut into buckets of `BATCHES_A_BUCKET` batches, sorted by length in
    each, and the batches are shuffled again; an incomplete batch comes last. The same seed and
    epoch give the same order in every process and after a resume.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        """`batch_size` is one process's; `lengths` are of the pairs, in their order."""
        self._lengths, self._batch_size, self._seed = lengths, batch_size, seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration gives."""
        self._epoch = epoch

    def __len__(self) -> int:
        """The number of pairs."""
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        """The epoch's order."""
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        order = torch.randperm(len(self._lengths), generator=generator).tolist()
        bucket = BATCHES_A_BUCKET * self._batch_size
        batches: list[list[int]] = []
        for start in range(0, len(order), bucket):
            part = sorted(order[start : start + bucket], key=lambda i: self._lengths[i])
            batches += [
                part[first : first + self._batch_size]
                for first in range(0, len(part), self._batch_size)
            ]
        incomplete = [batches.pop()] if len(batches[-1]) < self._batch_size else []
        for index in torch.randperm(len(batches), generator=generator).tolist():
            yield from batches[index]
        for batch in incomplete:
            yield from batch
