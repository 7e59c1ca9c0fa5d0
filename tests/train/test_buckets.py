"""The order of an epoch: every pair once, like lengths together, the same again from the seed."""

from __future__ import annotations

import itertools
import random

from hypothesis import given
from hypothesis import strategies as st

from cwdpo_bench.train.buckets import LengthBuckets


def _order(lengths: list[int], batch_size: int, seed: int, epoch: int) -> list[int]:
    sampler = LengthBuckets(lengths, batch_size, seed)
    sampler.set_epoch(epoch)
    return list(sampler)


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=200),
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 2**31),
    epoch=st.integers(0, 5),
)
def test_every_pair_comes_once_whatever_the_sizes(
    lengths: list[int], batch_size: int, seed: int, epoch: int
) -> None:
    order = _order(lengths, batch_size, seed, epoch)
    assert sorted(order) == list(range(len(lengths)))
    assert order == _order(lengths, batch_size, seed, epoch)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    lengths = [i % 7 for i in range(64)]
    orders = [_order(lengths, 4, seed, epoch) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert len({tuple(order) for order in orders}) == 6


def test_batches_hold_like_lengths() -> None:
    rng = random.Random(0)
    lengths = [rng.randint(10, 500) for _ in range(1000)]

    def padding(order: list[int]) -> int:
        batches = [order[i : i + 8] for i in range(0, len(order), 8)]
        return sum(sum(max(lengths[i] for i in b) - lengths[j] for j in b) for b in batches)

    shuffled = rng.sample(range(1000), 1000)
    assert padding(_order(lengths, 8, 0, 0)) < 0.15 * padding(shuffled)


def test_the_order_is_not_that_of_the_lengths() -> None:
    """Sorted over an epoch, short pairs would come first: each batch is drawn from all lengths."""
    lengths = list(range(512))
    batches = [_order(lengths, 8, 0, 0)[i : i + 8] for i in range(0, 512, 8)]
    means = [sum(batch) / 8 for batch in batches]
    rising = sum(a < b for a, b in itertools.pairwise(means))
    assert 20 < rising < 43


def test_an_incomplete_batch_comes_last() -> None:
    lengths = [5] * 8 + [100]
    for epoch in range(5):
        order = _order(lengths, 4, 3, epoch)
        assert order[-1] == 8
