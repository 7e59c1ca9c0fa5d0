"""Proximal policy optimization as pure functions of sampled answers.

Everything is a matrix [B, L]: B answers of up to L tokens, padded on the right, with a mask that is
True on tokens. A token is an action, the prefix before it the state, an answer an episode.

Sources: Schulman et al., Proximal Policy Optimization Algorithms (2017); Schulman et al.,
High-Dimensional Continuous Control Using Generalized Advantage Estimation (ICLR 2016); Ouyang et
al., Training language models to follow instructions with human feedback (NeurIPS 2022); Huang et
al., The N Implementation Details of RLHF with PPO (2023).
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class KL(NamedTuple):
    """Estimates of KL(p ‖ q), nats a token, from tokens that p sampled; each [B, L]."""

    k1: torch.Tensor
    k2: torch.Tensor
    k3: torch.Tensor


def kl_estimates(logps: torch.Tensor, other: torch.Tensor) -> KL:
    """Schulman's three estimators of KL(p ‖ q) (Approximating KL Divergence, 2020).

    With r = q/p on the sampled token: k1 = −log r is unbiased, k2 = ½ (log r)² is biased with less
    variance, k3 = (r − 1) − log r is unbiased and never negative.

    Args:
        logps: [B, L] log p of the sampled tokens.
        other: [B, L] log q of the same tokens.
    """
    log_ratio = other - logps
    return KL(-log_ratio, 0.5 * log_ratio**2, log_ratio.expm1() - log_ratio)


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean over the tokens of a batch, [B, L] to a scalar."""
    return values.masked_fill(~mask, 0).sum() / mask.sum()


def whiten(values: torch.Tensor, mask: torch.Tensor, *, center: bool = True) -> torch.Tensor:
    """Scale to unit variance over all tokens of a batch, and shift to mean zero where `center`.

    Rewards keep their mean (Huang et al., detail on reward whitening), advantages lose it.

    Args:
        values: [B, L].
        mask: [B, L]; the rest comes back as zeros.
    """
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean) ** 2, mask)
    white = (values - mean) * (variance + 1e-8).rsqrt()
    return (white if center else white + mean).masked_fill(~mask, 0)


def token_rewards(
    scores: torch.Tensor, kl: torch.Tensor, mask: torch.Tensor, *, kl_coefficient: float
) -> torch.Tensor:
    """r_t = −β · k1_t, and the answer's score on its last token (Ouyang et al., equation 2).

    Args:
        scores: [B] what each whole answer is worth.
        kl: [B, L] k1 of the sampling policy against the reference, nats.
        mask: [B, L].
        kl_coefficient: β.
    """
    rewards = (-kl_coefficient * kl).masked_fill(~mask, 0)
    last = mask.sum(-1) - 1
    return rewards.scatter_add(-1, last[:, None], scores[:, None].to(rewards.dtype))


class Advantages(NamedTuple):
    """Advantages, and the returns that the value head learns, each [B, L]."""

    advantages: torch.Tensor
    returns: torch.Tensor


def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, *, gamma: float, lam: float
) -> Advantages:
    """Generalized advantage estimation (Schulman et al. 2016, equation 16; 2017, equation 11).

    δ_t = r_t + γ V_{t+1} − V_t;  A_t = δ_t + γλ A_{t+1}, both zero behind the last token;
    returns = A + V.

    Args:
        rewards: [B, L].
        values: [B, L] V of the state in which each token was chosen.
        mask: [B, L].
        gamma: discount γ.
        lam: λ, from one-step differences (0) to whole returns (1).
    """
    rewards, values = rewards.masked_fill(~mask, 0), values.masked_fill(~mask, 0)
    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    deltas = rewards + gamma * following - values
    advantages = torch.zeros_like(deltas)
    running = torch.zeros_like(deltas[:, 0])
    for t in reversed(range(deltas.shape[1])):
        running = deltas[:, t] + gamma * lam * running
        advantages[:, t] = running
    return Advantages(advantages.masked_fill(~mask, 0), (advantages + values).masked_fill(~mask, 0))


class ClippedLoss(NamedTuple):
    """A scalar loss, and the share of tokens whose gradient the clipping removed."""

    loss: torch.Tensor
    clipped: torch.Tensor


def clipped_policy_loss(
    logps: torch.Tensor,
    old_logps: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    clip: float,
) -> ClippedLoss:
    """−E_t[min(ρ_t A_t, clip(ρ_t, 1 − ε, 1 + ε) A_t)], ρ = π/π_old (Schulman et al. 2017, eq. 7).

    Args:
        logps: [B, L] of the policy of now, with gradient.
        old_logps: [B, L] of the policy that sampled.
        advantages: [B, L].
        mask: [B, L]; the expectation is a mean over tokens.
        clip: ε.
    """
    ratio = (logps - old_logps).masked_fill(~mask, 0).exp()
    free = -advantages * ratio
    bounded = -advantages * ratio.clamp(1 - clip, 1 + clip)
    return ClippedLoss(
        masked_mean(torch.maximum(free, bounded), mask),
        masked_mean((bounded > free).to(free.dtype), mask).detach(),
    )


def clipped_value_loss(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor,
    *,
    clip: float,
) -> ClippedLoss:
    """½ E_t[max((V_t − R_t)², (clip(V_t, V_old ± ε) − R_t)²)] (Huang et al., value clipping).

    Args:
        values: [B, L] of the value head of now, with gradient.
        old_values: [B, L] of the value head when the answers were sampled.
        returns: [B, L].
        mask: [B, L].
        clip: ε, in the unit of the values.
    """
    near = torch.clamp(values, old_values - clip, old_values + clip)
    free, bounded = (values - returns) ** 2, (near - returns) ** 2
    return ClippedLoss(
        0.5 * masked_mean(torch.maximum(free, bounded), mask),
        masked_mean((bounded > free).to(free.dtype), mask).detach(),
    )
