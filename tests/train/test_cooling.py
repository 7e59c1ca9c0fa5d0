"""ℓ_floor and τ: taken once from the reference, or followed as the policy moves."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from cwdpo_bench.errors import UserError
from cwdpo_bench.train.cooling import (
    LEAST_SHARE,
    CoolingParameters,
    CoolingTracker,
    make_cooling,
    resolve_cooling,
)
from cwdpo_bench.train.sections import Cooling


def _confidence(number: int = 100, seed: int = 0) -> torch.Tensor:
    return -3 + torch.randn(number, generator=torch.Generator().manual_seed(seed))


def test_auto_is_mean_and_spread_and_numbers_stay() -> None:
    confidence = _confidence()
    found = resolve_cooling(Cooling(), confidence)
    assert found.floor == pytest.approx(confidence.mean().item(), abs=1e-6)
    assert found.tau == pytest.approx(confidence.std(correction=0).item(), abs=1e-6)
    assert resolve_cooling(Cooling(floor=-2.0, tau=0.5), confidence) == (
        -2.0,
        0.5,
        True,
        None,
    )
    assert isinstance(make_cooling(Cooling(), confidence), CoolingParameters)


def test_a_fixed_weight_is_that_of_every_answer() -> None:
    confidence = _confidence()
    for cooling in (Cooling(fixed=0.25), Cooling(fixed=0.25, floor="auto-track")):
        weight = make_cooling(cooling, confidence).weight(confidence)
        assert (weight == 0.25).all()
        assert not weight.requires_grad


def test_no_spread_is_said() -> None:
    for tau in ("auto", "auto-track"):
        with pytest.raises(UserError, match="no spread"):
            make_cooling(Cooling(tau=tau), torch.full((5,), -2.0))


def test_tracking_starts_where_auto_stands() -> None:
    confidence = _confidence()
    tracker = make_cooling(Cooling(floor="auto-track", tau="auto-track"), confidence)
    assert isinstance(tracker, CoolingTracker)
    assert tracker.parameters[:2] == pytest.approx(resolve_cooling(Cooling(), confidence)[:2])
    torch.testing.assert_close(tracker.weight(confidence), tracker.start.weight(confidence))


def test_tracking_is_the_exponential_mean_written_as_a_weighted_sum() -> None:
    """Oracle: after k batches the weight of batch j is ρ(1 − ρ)^(k − j), of the start (1 − ρ)^k."""
    start, batches = _confidence(), [_confidence(8, seed) - seed / 4 for seed in range(1, 13)]
    tracker = CoolingTracker(Cooling(floor="auto-track", tau="auto-track", memory=32), start)
    for batch in batches:
        tracker.observe(batch)
    rate, number = 8 / 32, len(batches)
    weights = [rate * (1 - rate) ** (number - 1 - j) for j in range(number)]
    weights.append((1 - rate) ** number)
    assert sum(weights) == pytest.approx(1)
    parts = [*batches, start]
    mean = sum(w * p.double().mean().item() for w, p in zip(weights, parts, strict=True))
    square = sum(w * p.double().square().mean().item() for w, p in zip(weights, parts, strict=True))
    assert tracker.parameters.floor == pytest.approx(mean)
    assert tracker.parameters.tau == pytest.approx((square - mean**2) ** 0.5)
    assert tracker.parameters.floor < tracker.start.floor


def test_a_batch_as_large_as_the_memory_replaces_it() -> None:
    batch = _confidence(64, seed=5) - 4
    tracker = CoolingTracker(
        Cooling(floor="auto-track", tau="auto-track", memory=64), _confidence()
    )
    tracker.observe(batch)
    assert tracker.parameters[:2] == pytest.approx(resolve_cooling(Cooling(), batch)[:2], rel=1e-6)


def test_what_the_recipe_fixes_stays_fixed() -> None:
    tracker = CoolingTracker(Cooling(floor="auto-track", tau=0.7, memory=8), _confidence())
    tracker.observe(torch.full((8,), -9.0))
    assert tracker.parameters == (-9.0, 0.7, True, None)
    tracker = CoolingTracker(Cooling(floor="auto", tau="auto-track", memory=8), _confidence())
    tracker.observe(torch.full((8,), -9.0))
    assert tracker.parameters.floor == tracker.start.floor


def test_a_tracked_width_does_not_collapse() -> None:
    tracker = CoolingTracker(Cooling(tau="auto-track", memory=8), _confidence())
    tracker.observe(torch.full((8,), -2.0))
    assert tracker.parameters.tau == pytest.approx(LEAST_SHARE * tracker.start.tau)


def test_the_state_goes_through_json_to_the_last_digit() -> None:
    cooling, start = Cooling(floor="auto-track", tau="auto-track"), _confidence()
    tracker = CoolingTracker(cooling, start)
    for seed in range(5):
        tracker.observe(_confidence(7, seed) / 3)
    saved = {"CoolingTracker": json.loads(json.dumps(tracker.state()))}
    other = CoolingTracker(cooling, start)
    other.on_train_begin(None, SimpleNamespace(stateful_callbacks=saved), None)
    assert other.parameters == tracker.parameters
