"""What pulls at each pair: a, w_c, and the logit residuals of the winner and of the loser (SPEC 2).

The loss of a pair is a function of its answers' log-probabilities, so its gradient in the logits
of answer y is a slope times the softmax residual: ∂L/∂z = c · (e_y − π) a position. For DPO and
CW-DPO (w_c a constant of the step) c_w = −β(1 − a) and c_l = β(1 − a) · w_c, with a that of the
loss, σ(β(Δ_w − w_c Δ_l)); `pull` takes the slopes from the objective's own function, whatever it
is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch


class Scores(NamedTuple):
    """Of B answers, each [B]: Σ log π, ℓ̄, and the number of tokens."""

    logp: torch.Tensor
    mean_logp: torch.Tensor
    tokens: torch.Tensor


PairLoss = Callable[[Scores, Scores, Scores, Scores], torch.Tensor]
"""Chosen, rejected, and both under the reference, of one pair, to the pair's loss."""

CoolingRule = Callable[[torch.Tensor], torch.Tensor]
"""ℓ̄_θ(y_l) of B pairs to their w_c."""

HISTOGRAM_BINS = 10


class Pull(NamedTuple):
    """Of B pairs, each [B]: the loss, and ∂L/∂ log π of the chosen and of the rejected answer."""

    loss: torch.Tensor
    chosen: torch.Tensor
    rejected: torch.Tensor


def pull(
    pair_loss: PairLoss,
    chosen: Scores,
    rejected: Scores,
    reference_chosen: Scores,
    reference_rejected: Scores,
) -> Pull:
    """Each pair's loss and its derivatives with respect to the two answers' Σ log π.

    A derivative with respect to ℓ̄ is one with respect to Σ log π over the number of tokens.
    """
    with torch.enable_grad():
        leaves = [
            values.detach().clone().requires_grad_()
            for side in (chosen, rejected)
            for values in (side.logp, side.mean_logp)
        ]
        chosen = Scores(leaves[0], leaves[1], chosen.tokens)
        rejected = Scores(leaves[2], leaves[3], rejected.tokens)
        losses = torch.stack(
            [
                pair_loss(
                    *(
                        Scores(*(column[i : i + 1] for column in side))
                        for side in (chosen, rejected, reference_chosen, reference_rejected)
                    )
                )
                for i in range(len(chosen.logp))
            ]
        )
        slopes = torch.autograd.grad(losses.sum(), leaves, materialize_grads=True)
    return Pull(
        losses.detach(),
        slopes[0] + slopes[1] / chosen.tokens,
        slopes[2] + slopes[3] / rejected.tokens,
    )


def residual_norms(
    logps: torch.Tensor, collision: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """‖π − e_y‖ of B answers over all their positions and the whole vocabulary, [B].

    ‖π − e_y‖² = Σ_v π(v)² − 2π(y) + 1 a position, summed over an answer's positions.

    Args:
        logps: [B, L] log π(y_l).
        collision: [B, L] Σ_v π(v)².
        mask: [B, L] True on tokens.
    """
    squares = (collision - 2 * logps.exp() + 1).clamp(min=0)
    return squares.masked_fill(~mask, 0).sum(-1).sqrt()


def easy_shares(easiness: torch.Tensor, pull: Pull, residual: torch.Tensor) -> dict[str, float]:
    """The easier half's share of the loss and of the losers' residual norm.

    "Small loss, large gradient" says that easy pairs (ℓ̄(y_l) under the median) have little of the
    first and much of the second.

    Args:
        easiness: [B], ℓ̄_θ(y_l); low is easy.
        pull: of the same pairs.
        residual: [B], the norm of the loser's residual.
    """
    easy = easiness.argsort()[: len(easiness) // 2]
    shares = {"easy_loss_share": pull.loss, "easy_residual_share": residual}
    return {
        name: float(values[easy].sum() / values.sum()) if values.sum() > 0 else float("nan")
        for name, values in shares.items()
    }


def histogram(weights: torch.Tensor) -> dict[str, float]:
    """Share of the pairs whose w_c lies in [k/10, (k+1)/10), by column name."""
    bins = (weights * HISTOGRAM_BINS).long().clamp(0, HISTOGRAM_BINS - 1)
    counts = torch.bincount(bins, minlength=HISTOGRAM_BINS) / len(weights)
    return {f"cooling_weight_bin_{k}": float(share) for k, share in enumerate(counts)}
