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


def hard_constraint_loss(
    nll_chosen: torch.Tensor, nll_rejected: torch.Tensor, *, threshold: float
) -> torch.Tensor:
    """Constrained SFT by a switching subgradient step (SPEC 1; Polyak 1967).

    min E[NLL(y⁺)] subject to E[NLL(y⁻)] ≥ C. While the batch violates the constraint, the step is
    on it alone: C − E[NLL(y⁻)]; else on the positives alone: E[NLL(y⁺)]. The value jumps where the
    two meet, the step is what counts.

    Args:
        nll_chosen: [B].
        nll_rejected: [B], in the same unit.
        threshold: C, in that unit.
    """
    violation = threshold - nll_rejected.mean()
    return violation if violation.item() > 0 else nll_chosen.mean()


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


def v_dpo_loss(
    delta_chosen: torch.Tensor,
    delta_rejected: torch.Tensor,
    logp_chosen: torch.Tensor,
    logp_rejected: torch.Tensor,
    logp_chosen_no_image: torch.Tensor,
    logp_rejected_no_image: torch.Tensor,
    *,
    beta: float,
    gamma: float,
) -> torch.Tensor:
    """V-DPO: DPO with a vision-guided policy score, [B] (Xie et al., EMNLP Findings 2024; SPEC 3).

    The policy's score of an answer is γ · log π_θ(y|x,v) − (γ − 1) · sg[log π_θ(y|x)], classifier-
    free guidance with the image v as the condition; the reference's is log π_ref(y|x,v), unguided.
    With Δ the unguided difference, the guided one is
    Δ + (γ − 1)(log π_θ(y|x,v) − sg[log π_θ(y|x)]), and the loss −log σ(β(Δ'_w − Δ'_l)).
    Pairs of image contrast (the same answer, another image as the worse side) fit without change:
    the terms without image cancel.

    Left open, and what we do: x without v is the prompt with its images taken out (the released
    training code puts noise in their place); γ is the recipe's own; γ = 1 is `dpo_loss` exactly.

    Args:
        delta_chosen: [B], Δ_w.
        delta_rejected: [B], Δ_l.
        logp_chosen: [B], log π_θ(y_w|x,v).
        logp_rejected: [B], log π_θ(y_l|x,v), under its own image where it has one.
        logp_chosen_no_image: [B], log π_θ(y_w|x); no gradient goes through it.
        logp_rejected_no_image: [B], likewise of y_l.
        beta: β > 0.
        gamma: γ ≥ 1.
    """
    guidance_chosen = (gamma - 1) * (logp_chosen - logp_chosen_no_image.detach())
    guidance_rejected = (gamma - 1) * (logp_rejected - logp_rejected_no_image.detach())
    return dpo_loss(delta_chosen + guidance_chosen, delta_rejected + guidance_rejected, beta=beta)


def opa_sft_loss(nll_chosen: torch.Tensor, nll_corrected: torch.Tensor) -> torch.Tensor:
    """Stage 1 of OPA-DPO: E[NLL] over the references and the corrected own answers, a scalar.

    It brings both near the policy before they are preferred (Yang et al., CVPR 2025). Both are [B].
    """
    return (nll_chosen.mean() + nll_corrected.mean()) / 2


def opa_dpo_loss(
    delta_chosen: torch.Tensor,
    delta_rejected: torch.Tensor,
    delta_corrected: torch.Tensor,
    delta_chosen_masked: torch.Tensor,
    delta_corrected_masked: torch.Tensor,
    *,
    beta: float,
    mask_weight: float,
    anchor_weight: float,
) -> torch.Tensor:
    """Stage 2 of OPA-DPO, [B] (Yang et al., CVPR 2025; SPEC 3).

    With D(a, b) = −log σ(β(a − b)), the reference answer w, the policy's own answer o, its
    correction c, and m for the same answer under the image with a part hidden:

        D(Δ_w, Δ_o) + D(Δ_c, Δ_o)                       reference > own, corrected > own
        + mask_weight · (D(Δ_w, Δ_wm) + D(Δ_c, Δ_cm))   the image > the masked image
        − anchor_weight · (log σ(βΔ_w) + log σ(βΔ_c))   the better answers gain likelihood

    Left open, and what we do: the authors weigh tokens by their annotator's severity scores, which
    other data do not have: all weigh one here. Their released code takes the sigmoid of every token
    and the mean over all; ours is the paper's, of sequences. It anchors the reference twice and the
    correction with the sign turned; here each once, upwards.

    Args:
        delta_chosen: [B], Δ_w.
        delta_rejected: [B], Δ_o.
        delta_corrected: [B], Δ_c.
        delta_chosen_masked: [B], Δ_wm.
        delta_corrected_masked: [B], Δ_cm.
        beta: β > 0.
        mask_weight: ≥ 0.
        anchor_weight: ≥ 0.
    """
    language = dpo_loss(delta_chosen, delta_rejected, beta=beta) + dpo_loss(
        delta_corrected, delta_rejected, beta=beta
    )
    image = dpo_loss(delta_chosen, delta_chosen_masked, beta=beta) + dpo_loss(
        delta_corrected, delta_corrected_masked, beta=beta
    )
    anchors = logsigmoid(beta * delta_chosen) + logsigmoid(beta * delta_corrected)
    return language + mask_weight * image - anchor_weight * anchors


OBJECTIVES: dict[str, Callable[..., torch.Tensor]] = {
    "sft": sft_loss,
    "sft-c": sft_c_loss,
    "hard-constraint": hard_constraint_loss,
    "dpo": dpo_loss,
    "cw-dpo": cw_dpo_loss,
    "v-dpo": v_dpo_loss,
    "opa-sft": opa_sft_loss,
    "opa-dpo": opa_dpo_loss,
}
"""By the `kind` of a recipe's section."""
