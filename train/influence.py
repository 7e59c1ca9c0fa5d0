"""How one step on a pair moves the answers of another: first-order prediction and what happened.

Ren and Sutherland (ICLR 2025), as SPEC 2 writes it: after a step of gradient descent with rate η on
the pair χ_u, to first order

    Δℓ̄(y|χ_o) = −η · A_t · K_t · G_t,    K_t = J_o J_uᵀ,

A_t = ∂ℓ̄(y|χ_o)/∂z_o = (e_y − π)/L a position (the belief geometry), J = ∂z/∂θ the Jacobian of the
logits, G_t = ∂L/∂z_u = c_w (e_yw − π) and c_l (e_yl − π) on the two answers (the residual; c, the
loss's slopes, come from `residuals.pull`). A and G are written in closed form; J_oᵀ A_tᵀ and
J_uᵀ G_t are exact products by reverse-mode differentiation, so K_t, which has (L · vocabulary)²
entries, is never formed. With g(y) = Jᵀ Aᵀ = ∂ℓ̄(y)/∂θ, J_uᵀ G_t = c_w L_w g(y_w) + c_l L_l g(y_l):
one backward pass an answer is all that is needed.

What happened is measured: the step is taken with plain gradient descent, all answers are scored
again, and the weights are put back bit by bit. (The optimizer's own step also carries its moments
and the other pairs of the batch.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from cwdpo_bench.vlm import (
    Batch,
    average_confidence,
    completion_hidden,
    completion_statistics,
    output_head,
)

MOST_ELEMENTS = 500_000_000
"""Gradient entries that are kept at a time: 2 GB in fp32."""


class Gradients(NamedTuple):
    """Of K answers of one pair.

    Attributes:
        vectors: [K, parameters] ∂ℓ̄(y)/∂θ, fp32.
        beliefs: [K] ‖A_t‖.
        residuals: [K] ‖π − e_y‖.
        tokens: [K] L.
        mean_logps: [K] ℓ̄.
    """

    vectors: torch.Tensor
    beliefs: torch.Tensor
    residuals: torch.Tensor
    tokens: torch.Tensor
    mean_logps: torch.Tensor


class Step(NamedTuple):
    """A pair to step on: c_w and c_l, ∂L/∂ log π of its answers; None without a rejected answer."""

    chosen: float
    rejected: float | None


class Influence(NamedTuple):
    """Steps on U pairs, seen on O answers.

    Attributes:
        predicted: [U, O] −η A K G, nats a token.
        realised: [U, O] the change of ℓ̄ that the step made.
        kernel: [U, O] A K G / (‖A‖ ‖G‖): the eNTK's gain along the two directions.
        beliefs: [O] ‖A_t‖.
        residuals: [U] ‖G_t‖.
        rate: η.
        chosen_norms: [U] norm of the winner's part of the parameter gradient.
        rejected_norms: [U] of the loser's part; 0 where there is none.
    """

    predicted: np.ndarray
    realised: np.ndarray
    kernel: np.ndarray
    beliefs: np.ndarray
    residuals: np.ndarray
    rate: float
    chosen_norms: np.ndarray
    rejected_norms: np.ndarray


def trained_parameters(model: Any) -> list[torch.nn.Parameter]:
    """What a step moves: the adapter's weights with LoRA."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def too_large(model: Any, pairs: int) -> str | None:
    """Why the gradients of `pairs` pairs do not fit; None where they do."""
    size = sum(parameter.numel() for parameter in trained_parameters(model))
    answers = 3 * pairs + 2
    if size * answers <= MOST_ELEMENTS:
        return None
    return (
        f"the gradients of {answers} answers in {size:,} trained parameters exceed "
        f"{MOST_ELEMENTS:,} numbers; train with LoRA, or lower dynamics.influence.pairs"
    )


def answer_gradients(model: Any, batch: Batch) -> Gradients:
    """∂ℓ̄(y)/∂θ of every answer of a batch, by J_oᵀ A_tᵀ with A_t in closed form."""
    parameters = trained_parameters(model)
    head = output_head(getattr(model, "module", model))
    with torch.enable_grad():
        hidden = completion_hidden(model, batch)
        vectors, beliefs, residuals, means = [], [], [], []
        for row in range(len(batch.targets)):
            mask = batch.mask[row]
            targets, length = batch.targets[row][mask], int(mask.sum())
            logits = head(hidden[row][mask]).float()
            log_p = logits.detach().log_softmax(-1)
            # e_y − π
            belief = torch.nn.functional.one_hot(targets, log_p.shape[-1]) - log_p.exp()
            parts = torch.autograd.grad(
                logits,
                parameters,
                grad_outputs=belief / length,
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            vectors.append(torch.cat([part.flatten().float() for part in parts]))
            residuals.append(belief.norm())
            beliefs.append(belief.norm() / length)
            means.append(log_p.gather(-1, targets[:, None]).mean())
    return Gradients(
        torch.stack(vectors),
        torch.stack(beliefs),
        torch.stack(residuals),
        batch.mask.sum(-1),
        torch.stack(means),
    )


def measure_influence(
    model: Any, batches: Sequence[Batch], steps: Sequence[Step], largest: float
) -> Influence:
    """Predict and take a step on each pair, and watch all answers of all pairs.

    Args:
        model: left as it was, bit by bit.
        batches: of each pair, its answers: chosen first, then rejected where `steps` has one, then
            any others.
        steps: of each pair.
        largest: no step can change an average answer's ℓ̄ by more, nats a token:
            η = largest / (max_u ‖∂L/∂θ‖ · mean_o ‖∂ℓ̄/∂θ‖), the same for all pairs, so that pairs
            with small gradients move little, as in training.
    """
    training = model.training
    model.eval()
    gradients = [answer_gradients(model, batch) for batch in batches]
    updates, residuals, chosen_norms, rejected_norms = [], [], [], []
    for found, step in zip(gradients, steps, strict=True):
        chosen, rejected = _parts(found, step)
        updates.append(chosen + rejected)
        chosen_norms.append(float(chosen.norm()))
        rejected_norms.append(float(rejected.norm()))
        squares = [(step.chosen * found.residuals[0]) ** 2]
        if step.rejected is not None:
            squares.append((step.rejected * found.residuals[1]) ** 2)
        residuals.append(float(sum(squares)) ** 0.5)
    # [U, O]: A_t K_t G_t
    products = torch.stack(
        [torch.cat([found.vectors @ update for found in gradients]) for update in updates]
    )
    lengths = torch.cat([found.vectors.norm(dim=1) for found in gradients])
    steepest = max(float(update.norm()) for update in updates)
    rate = largest / max(steepest * float(lengths.mean()), torch.finfo(torch.float32).tiny)
    beliefs = torch.cat([found.beliefs for found in gradients])
    before = _mean_logps(model, batches)
    realised = [_after_step(model, rate * update, batches) - before for update in updates]
    model.train(training)
    scale = torch.tensor(residuals, device=beliefs.device)[:, None] * beliefs
    return Influence(
        predicted=(-rate * products).double().cpu().numpy(),
        realised=torch.stack(realised).double().cpu().numpy(),
        kernel=(products / scale.clamp(min=torch.finfo(torch.float32).tiny)).cpu().numpy(),
        beliefs=beliefs.cpu().numpy(),
        residuals=np.array(residuals),
        rate=rate,
        chosen_norms=np.array(chosen_norms),
        rejected_norms=np.array(rejected_norms),
    )


def _parts(found: Gradients, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
    """The winner's and the loser's part of ∂L/∂θ: c · L · ∂ℓ̄/∂θ."""
    chosen = step.chosen * found.tokens[0] * found.vectors[0]
    if step.rejected is None:
        return chosen, torch.zeros_like(chosen)
    return chosen, step.rejected * found.tokens[1] * found.vectors[1]


@torch.no_grad()
def _mean_logps(model: Any, batches: Sequence[Batch]) -> torch.Tensor:
    return torch.cat(
        [average_confidence(completion_statistics(model, b).logps, b.mask) for b in batches]
    )


@torch.no_grad()
def _after_step(model: Any, change: torch.Tensor, batches: Sequence[Batch]) -> torch.Tensor:
    """ℓ̄ of all answers at θ − change."""
    parameters = trained_parameters(model)
    kept = [parameter.detach().clone() for parameter in parameters]
    try:
        sizes = [parameter.numel() for parameter in parameters]
        for parameter, part in zip(parameters, change.split(sizes), strict=True):
            parameter.sub_(part.view_as(parameter).to(parameter.dtype))
        return _mean_logps(model, batches)
    finally:
        for parameter, old in zip(parameters, kept, strict=True):
            parameter.copy_(old)


def agreement(influence: Influence) -> dict[str, float]:
    """Predicted against realised: Pearson's r over all entries, and ‖p − r‖ / ‖r‖."""
    predicted, realised = influence.predicted.ravel(), influence.realised.ravel()
    spread = predicted.std() * realised.std()
    length = np.linalg.norm(realised)
    return {
        "influence_correlation": float(np.corrcoef(predicted, realised)[0, 1])
        if spread > 0
        else float("nan"),
        "influence_error": float(np.linalg.norm(predicted - realised) / length)
        if length > 0
        else float("nan"),
    }
