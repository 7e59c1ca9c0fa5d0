"""PPO's parts against loops, and closed forms, on random inputs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Categorical, kl_divergence

from cwdpo_bench.train.policy_gradient import (
    clipped_policy_loss,
    clipped_value_loss,
    gae,
    kl_estimates,
    token_rewards,
    whiten,
)

seeds = st.integers(0, 2**31)


def _batch(seed: int, count: int = 1) -> tuple[torch.Tensor, ...]:
    """A mask [B, L] of 1 … L tokens a row, and `count` random matrices, not zero on padding."""
    generator = torch.Generator().manual_seed(seed)
    rows, length = 1 + seed % 5, 1 + seed % 7
    lengths = torch.randint(1, length + 1, (rows,), generator=generator)
    mask = torch.arange(length) < lengths[:, None]
    drawn = torch.randn(count, rows, length, generator=generator, dtype=torch.float64)
    return mask, *drawn


@given(seeds, st.floats(0, 1), st.floats(0, 1))
def test_gae_is_the_sum_of_discounted_differences(seed: int, gamma: float, lam: float) -> None:
    mask, rewards, values = _batch(seed, 2)
    found = gae(rewards, values, mask, gamma=gamma, lam=lam)
    for row in range(len(mask)):
        length = int(mask[row].sum())
        r, v = rewards[row, :length].tolist(), [*values[row, :length].tolist(), 0.0]
        for t in range(length):
            expected = sum(
                (gamma * lam) ** (k - t) * (r[k] + gamma * v[k + 1] - v[k])
                for k in range(t, length)
            )
            assert found.advantages[row, t].item() == pytest.approx(expected, abs=1e-9)
            assert found.returns[row, t].item() == pytest.approx(expected + v[t], abs=1e-9)
        assert not found.advantages[row, length:].any()
        assert not found.returns[row, length:].any()


@given(seeds, st.floats(0, 1))
def test_with_lambda_1_returns_are_the_discounted_rewards(seed: int, gamma: float) -> None:
    """Whatever the value head says: λ = 1 is the Monte Carlo return, λ = 0 one step."""
    mask, rewards, values = _batch(seed, 2)
    returns = gae(rewards, values, mask, gamma=gamma, lam=1.0).returns
    for row in range(len(mask)):
        length = int(mask[row].sum())
        for t in range(length):
            total = sum(gamma ** (k - t) * rewards[row, k].item() for k in range(t, length))
            assert returns[row, t].item() == pytest.approx(total, abs=1e-9)
    one_step = gae(rewards, values, mask, gamma=gamma, lam=0.0).advantages
    following = torch.cat([values[:, 1:] * mask[:, 1:], torch.zeros(len(mask), 1)], dim=1)
    torch.testing.assert_close(one_step, (rewards + gamma * following - values) * mask)


@given(seeds)
def test_policy_loss_is_the_formula_token_by_token(seed: int) -> None:
    mask, logps, old, advantages = _batch(seed, 3)
    found = clipped_policy_loss(logps, old, advantages, mask, clip=0.2)
    terms, clipped = [], []
    for row, t in mask.nonzero().tolist():
        ratio = math.exp(logps[row, t] - old[row, t])
        a = advantages[row, t].item()
        terms.append(min(ratio * a, min(max(ratio, 0.8), 1.2) * a))
        clipped.append((ratio > 1.2 and a > 0) or (ratio < 0.8 and a < 0))
    assert found.loss.item() == pytest.approx(-np.mean(terms))
    assert found.clipped.item() == pytest.approx(np.mean(clipped))


@given(seeds)
def test_the_first_gradient_is_that_of_reinforce(seed: int) -> None:
    """At π = π_old the clipped loss has the gradient of −E[A log π]."""
    mask, logps, advantages = _batch(seed, 2)
    logps.requires_grad_()
    clipped_policy_loss(logps, logps.detach(), advantages, mask, clip=0.2).loss.backward()
    torch.testing.assert_close(logps.grad, -advantages * mask / mask.sum())


def test_clipping_removes_the_gradient_where_the_ratio_went_too_far() -> None:
    logps = torch.tensor([[0.5, 0.5, -0.5, -0.5]], requires_grad=True)
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    found = clipped_policy_loss(logps, torch.zeros(1, 4), advantages, mask, clip=0.2)
    found.loss.backward()
    assert logps.grad is not None
    # Up with a good token that is up already, down with a bad one that is down: no more of it.
    assert (logps.grad != 0).tolist() == [[False, True, True, False]]
    assert found.clipped.item() == 0.5


@given(seeds)
def test_value_loss_is_the_formula_token_by_token(seed: int) -> None:
    mask, values, old, returns = _batch(seed, 3)
    terms = []
    for row, t in mask.nonzero().tolist():
        v, o, r = (x[row, t].item() for x in (values, old, returns))
        near = min(max(v, o - 0.3), o + 0.3)
        terms.append(0.5 * max((v - r) ** 2, (near - r) ** 2))
    found = clipped_value_loss(values, old, returns, mask, clip=0.3)
    assert found.loss.item() == pytest.approx(np.mean(terms))
    # Without a bound in reach it is half the mean squared error.
    free = clipped_value_loss(values, old, returns, mask, clip=math.inf).loss
    mean_squared = torch.nn.functional.mse_loss(values[mask], returns[mask])
    torch.testing.assert_close(free, 0.5 * mean_squared)


@given(seeds)
def test_whitened_values_have_unit_variance_and_keep_or_lose_their_mean(seed: int) -> None:
    mask, values = _batch(seed, 1)
    if mask.sum() < 2:
        return
    white = whiten(values, mask)[mask]
    variance = values[mask].var(correction=0).item()
    assert white.mean().item() == pytest.approx(0, abs=1e-9)
    # Of almost equal values what keeps the division finite is a part.
    assert white.var(correction=0).item() == pytest.approx(variance / (variance + 1e-8), abs=1e-9)
    kept = whiten(values, mask, center=False)
    assert kept[mask].mean().item() == pytest.approx(values[mask].mean().item(), abs=1e-9)
    assert not kept[~mask].any()


def test_kl_estimates_have_the_true_mean_and_k3_is_never_negative() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = (Categorical(logits=0.5 * torch.randn(6, generator=generator)) for _ in range(2))
    torch.manual_seed(0)
    tokens = p.sample((200_000,))
    found = kl_estimates(p.log_prob(tokens), q.log_prob(tokens))
    exact = kl_divergence(p, q).item()
    assert found.k1.mean().item() == pytest.approx(exact, abs=0.01)
    assert found.k3.mean().item() == pytest.approx(exact, abs=0.01)
    assert (found.k3 >= 0).all()
    assert found.k3.std() < found.k1.std()
    torch.testing.assert_close(found.k2, 0.5 * found.k1**2)


@given(seeds)
def test_the_expectation_of_k1_and_k3_is_the_divergence(seed: int) -> None:
    """Exactly, by summing over the vocabulary instead of sampling."""
    generator = torch.Generator().manual_seed(seed)
    p, q = (Categorical(logits=torch.randn(7, generator=generator).double()) for _ in range(2))
    found = kl_estimates(p.logits, q.logits)
    for estimate in (found.k1, found.k3):
        torch.testing.assert_close((p.probs * estimate).sum(), kl_divergence(p, q))


@given(seeds)
def test_the_score_stands_on_the_last_token(seed: int) -> None:
    mask, kl = _batch(seed, 1)
    scores = torch.arange(1.0, len(mask) + 1, dtype=torch.float64)
    found = token_rewards(scores, kl, mask, kl_coefficient=0.1)
    torch.testing.assert_close(found.sum(-1), scores - 0.1 * (kl * mask).sum(-1))
    for row in range(len(mask)):
        last = int(mask[row].sum()) - 1
        assert found[row, last].item() == pytest.approx(row + 1 - 0.1 * kl[row, last].item())
        assert not found[row, last + 1 :].any()
