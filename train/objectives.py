"""The objectives as pure functions of log-probabilities (SPEC 1 and 3).

What a function gets is told by its parameters' names (`train/terms.py`): terms by position, the
keys of its recipe section by keyword.

Shapes: B pairs. `delta_chosen` and `delta_rejected` are Δ(y) = log π_θ(y|χ) − log π_ref(y|χ), sums
over the answer's tokens in nats; `nll_*` are negative log-likelihoods a pair. All fp32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import logsigmoid


def sft_loss(nll_chosen: torch.Tensor) -> torch.Tensor:
    """E[NLL(y_w)], a scalar; `nll_chosen` is [B] (SPEC 3, recipe `sft`)."""
    return nll_chosen.mean()


def sft_c_loss(
    nll_chosen: torch.Tensor, nll_rejected: torch.Tensor, *, weight: float, threshold: float
) -> torch.Tensor:
    """Constrained smooth SFT: E[NLL(y⁺)] + λ · ReLU(C − E[NLL(y⁻)]) (SPEC 1, stage 1).

    Both expectations are taken before the ReLU, so the penalty is a function of the batch and not
    a mean over pairs. It acts while the negatives are too LIKELY.

    Args:
        nll_chosen: [B].
        nll_rejected: [B], in the same unit (per token or per sequence).
        weight: λ ≥ 0; with 0 the loss is `sft_loss`.
        threshold: C, in that unit.
    """
    return sft_loss(nll_chosen) + weight * torch.relu(threshold - nll_rejected.mean())


def dpo_loss(
    delta_chosen: torch.Tensor, delta_rejected: torch.Tensor, *, beta: float
) -> torch.Tensor:
    """DPO: −log σ(β(Δ_w − Δ_l)), [B] (Rafailov et al., NeurIPS 2023, eq. 7)."""
    return -logsigmoid(beta * (delta_chosen - delta_rejected))


def cooling_weight(
    confidence_rejected: torch.Tensor, *, floor: float, tau: float, detach: bool
) -> torch.Tensor:
    """w_c = σ((ℓ̄_θ(y_l|χ) − ℓ_floor) / τ), [B] (SPEC 1, stage 2).

    Args:
        confidence_rejected: [B], ℓ̄_θ(y_l|χ), the mean log-probability a token.
        floor: ℓ_floor, in nats a token; answers far below it are "easy" and weigh nothing.
        tau: τ > 0, the width of the transition.
        detach: treat the weight as a constant of the step. Without it the gradient through w_c
            can push the rejected answer back up (the sign table of SPEC 1).
    """
    weight = torch.sigmoid((confidence_rejected - floor) / tau)
    return weight.detach() if detach else weight


def cw_dpo_loss(
    delta_chosen: torch.Tensor,
    delta_rejected: torch.Tensor,
    cooling: torch.Tensor | float,
    *,
    beta: float,
) -> torch.Tensor:
    """CW-DPO: −log σ(β(Δ_w − w_c · Δ_l)), [B] (SPEC 1, stage 2).

    With w_c = 1 it is `dpo_loss`; with w_c = 0 only the winner's term is left.
    """
    return dpo_loss(delta_chosen, cooling * delta_rejected, beta=beta)


OBJECTIVES: dict[str, Callable[..., torch.Tensor]] = {
    "sft": sft_loss,
    "sft-c": sft_c_loss,
    "dpo": dpo_loss,
    "cw-dpo": cw_dpo_loss,
}
"""By the `kind` of a recipe's section."""
