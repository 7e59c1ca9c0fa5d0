"""The objectives against TRL, against closed forms, and against the sign table of the method."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cwdpo_bench.train.objectives import (
    cooling_weight,
    cw_dpo_loss,
    dpo_loss,
    hard_constraint_loss,
    opa_dpo_loss,
    opa_sft_loss,
    sft_c_loss,
    sft_loss,
    v_dpo_loss,
)

seeds = st.integers(0, 2**32 - 1)


def _random(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, 3, shape))


def _trl_dpo_loss(logps: torch.Tensor, reference: torch.Tensor, beta: float) -> torch.Tensor:
    """TRL's own `_compute_loss` on token log-probabilities [2B, L], on a trainer of fields only."""
    trl = pytest.importorskip("trl")
    rows, length = logps.shape
    accelerator = SimpleNamespace(
        device="cpu", gather=lambda value: value, gather_for_metrics=lambda value: value
    )
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=accelerator,
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=["sigmoid"],
        loss_weights=[1.0],
        beta=beta,
        use_weighting=False,
        label_smoothing=0.0,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    outputs = SimpleNamespace(
        log_probs=logps,
        entropy=torch.zeros_like(logps),
        mean_logits=torch.zeros_like(logps),
        is_top1=torch.zeros_like(logps, dtype=torch.bool),
    )
    chosen, rejected = reference.chunk(2)
    ones = torch.ones(rows, length + 1, dtype=torch.long)
    inputs = {
        "input_ids": ones,
        "attention_mask": ones,
        "completion_mask": torch.cat([torch.zeros_like(ones[:, :1]), ones[:, 1:]], dim=1),
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }
    return trl.DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)


@given(seed=seeds, beta=st.floats(0.01, 2.0))
def test_dpo_equals_trl_on_random_batches(seed: int, beta: float) -> None:
    logps = -_random(seed, 6, 5).abs()
    reference = -_random(seed + 1, 6).abs() * 5
    delta = logps.sum(1) - reference
    ours = dpo_loss(delta[:3], delta[3:], beta=beta).mean()
    torch.testing.assert_close(ours, _trl_dpo_loss(logps, reference, beta))


@pytest.mark.parametrize(
    ("confidence", "detached", "undetached"),
    [(-2.0, 0.27, 0.21), (-3.0, 0.14, -0.14), (-4.0, 0.06, -0.24)],
)
def test_sign_table_of_the_cooled_gradient(
    confidence: float, detached: float, undetached: float
) -> None:
    """SPEC 1: L=12, β=.1, τ=.5, ℓ_floor=−3, reference ℓ̄ −1; undetached, the sign flips."""
    length, beta, tau, floor, reference = 12, 0.1, 0.5, -3.0, -1.0
    for detach, expected in ((True, detached), (False, undetached)):
        mean_logp = torch.tensor([confidence], dtype=torch.float64, requires_grad=True)
        weight = cooling_weight(mean_logp, floor=floor, tau=tau, detach=detach)
        delta = length * (mean_logp - reference)
        cw_dpo_loss(torch.zeros_like(delta), delta, weight, beta=beta).sum().backward()
        assert mean_logp.grad is not None
        # The table stands at equal Δ_w; its figures have two decimals.
        assert mean_logp.grad.item() == pytest.approx(expected, abs=0.006)


@given(seed=seeds, beta=st.floats(0.01, 2.0))
def test_cw_dpo_with_full_weight_is_dpo_exactly(seed: int, beta: float) -> None:
    chosen, rejected = _random(seed, 2, 7)
    torch.testing.assert_close(
        cw_dpo_loss(chosen, rejected, torch.ones(7), beta=beta),
        dpo_loss(chosen, rejected, beta=beta),
        rtol=0,
        atol=0,
    )
    # The same through the weight's own limit: a floor far below makes w_c exactly 1.
    weight = cooling_weight(torch.zeros(7, dtype=torch.float64), floor=-1e4, tau=1.0, detach=True)
    assert (weight == 1).all()


@given(seed=seeds, beta=st.floats(0.01, 2.0))
def test_cw_dpo_with_no_weight_keeps_the_winner_alone(seed: int, beta: float) -> None:
    chosen, rejected = _random(seed, 2, 7)
    rejected.requires_grad_(True)
    loss = cw_dpo_loss(chosen, rejected, torch.zeros(7), beta=beta)
    torch.testing.assert_close(loss, torch.nn.functional.softplus(-beta * chosen))
    loss.sum().backward()
    assert rejected.grad is not None
    assert not rejected.grad.any()


@given(confidence=st.floats(-50, 0), floor=st.floats(-10, 0), tau=st.floats(0.01, 10))
def test_cooling_weight_is_a_share_that_is_half_at_the_floor(
    confidence: float, floor: float, tau: float
) -> None:
    values = torch.tensor([confidence, floor], dtype=torch.float64)
    weight = cooling_weight(values, floor=floor, tau=tau, detach=True)
    assert 0 <= weight[0] <= 1
    assert weight[1].item() == 0.5
    assert weight[0] >= 0.5 if confidence > floor else weight[0] <= 0.5


def test_cooling_weight_is_a_constant_only_where_detached() -> None:
    values = torch.tensor([-2.0], requires_grad=True)
    assert not cooling_weight(values, floor=-3.0, tau=0.5, detach=True).requires_grad
    assert cooling_weight(values, floor=-3.0, tau=0.5, detach=False).requires_grad


@given(seed=seeds)
def test_sft_c_without_penalty_is_sft(seed: int) -> None:
    chosen, rejected = _random(seed, 2, 9).abs()
    torch.testing.assert_close(
        sft_c_loss(chosen, rejected, weight=0.0, threshold=5.0), sft_loss(chosen), rtol=0, atol=0
    )


@given(seed=seeds, weight=st.floats(0.1, 10), threshold=st.floats(-5, 5))
def test_sft_c_is_the_formula_and_acts_below_the_threshold(
    seed: int, weight: float, threshold: float
) -> None:
    chosen, rejected = _random(seed, 2, 9)
    rejected.requires_grad_(True)
    loss = sft_c_loss(chosen, rejected, weight=weight, threshold=threshold)
    mean = rejected.detach().mean().item()
    expected = chosen.mean().item() + weight * max(0.0, threshold - mean)
    assert loss.item() == pytest.approx(expected)
    loss.backward()
    assert rejected.grad is not None
    # Below the threshold the negatives are too likely: the step raises their NLL, never lowers it.
    torch.testing.assert_close(
        rejected.grad, torch.full_like(rejected, -weight / 9 if mean < threshold else 0.0)
    )


@given(seed=seeds, threshold=st.floats(-5, 5))
def test_hard_constraint_steps_on_the_constraint_or_on_the_positives(
    seed: int, threshold: float
) -> None:
    chosen, rejected = _random(seed, 2, 9)
    chosen.requires_grad_(True)
    rejected.requires_grad_(True)
    hard_constraint_loss(chosen, rejected, threshold=threshold).backward()
    violated = rejected.detach().mean().item() < threshold
    moved, still = (rejected, chosen) if violated else (chosen, rejected)
    # On the constraint the NLL of the negatives is raised, on the positives theirs is lowered.
    sign = -1 if violated else 1
    assert moved.grad is not None
    torch.testing.assert_close(moved.grad, torch.full_like(moved, sign / 9))
    assert still.grad is None or not still.grad.any()


@given(seed=seeds, beta=st.floats(0.01, 2.0))
def test_v_dpo_without_guidance_is_dpo_exactly(seed: int, beta: float) -> None:
    delta_chosen, delta_rejected, *logps = _random(seed, 6, 7)
    guided = v_dpo_loss(delta_chosen, delta_rejected, *logps, beta=beta, gamma=1.0)
    torch.testing.assert_close(
        guided, dpo_loss(delta_chosen, delta_rejected, beta=beta), rtol=0, atol=0
    )


@given(seed=seeds, beta=st.floats(0.01, 2.0), gamma=st.floats(1.0, 4.0))
def test_v_dpo_is_dpo_between_the_guided_policy_and_the_reference(
    seed: int, beta: float, gamma: float
) -> None:
    """Closed form of SPEC 3: score γ·log π(y|x,v) − (γ−1)·sg[log π(y|x)], reference unguided."""
    policy, blind, reference = _random(seed, 3, 2, 7)
    policy.requires_grad_(True)
    blind.requires_grad_(True)
    loss = v_dpo_loss(*(policy - reference), *policy, *blind, beta=beta, gamma=gamma)
    score = gamma * policy - (gamma - 1) * blind - reference
    torch.testing.assert_close(loss, torch.nn.functional.softplus(-beta * (score[0] - score[1])))
    loss.sum().backward()
    # The gradient goes through the policy with the image, γ times DPO's, and not through the other.
    weight = beta * gamma * torch.sigmoid(-beta * (score[0] - score[1])).detach()
    assert policy.grad is not None
    torch.testing.assert_close(policy.grad, torch.stack([-weight, weight]))
    assert blind.grad is None


@given(seed=seeds, gamma=st.floats(1.0, 4.0))
def test_v_dpo_on_image_contrast_needs_no_term_without_image(seed: int, gamma: float) -> None:
    """The same answer on both sides: log π(y|x) is one number and cancels."""
    policy, reference, blind = (
        _random(seed, 2, 7),
        _random(seed + 1, 2, 7),
        _random(seed + 2, 7),
    )
    losses = [
        v_dpo_loss(*(policy - reference), *policy, b, b, beta=0.5, gamma=gamma)
        for b in (blind, torch.zeros(7))
    ]
    torch.testing.assert_close(*losses)


@given(seed=seeds)
def test_opa_sft_is_sft_on_references_and_corrections_together(seed: int) -> None:
    chosen, corrected = _random(seed, 2, 7)
    torch.testing.assert_close(
        opa_sft_loss(chosen, corrected), sft_loss(torch.cat([chosen, corrected]))
    )


@given(
    seed=seeds,
    beta=st.floats(0.01, 2.0),
    mask_weight=st.floats(0, 2),
    anchor_weight=st.floats(0, 2),
)
def test_opa_dpo_is_its_six_terms_written_out(
    seed: int, beta: float, mask_weight: float, anchor_weight: float
) -> None:
    deltas = _random(seed, 5, 7)
    chosen, own, corrected, chosen_masked, corrected_masked = deltas.numpy()

    def above(better: np.ndarray, worse: np.ndarray | float) -> np.ndarray:
        return np.log1p(np.exp(-beta * (better - worse)))

    expected = above(chosen, own) + above(corrected, own)
    expected += mask_weight * (above(chosen, chosen_masked) + above(corrected, corrected_masked))
    # An anchor is a comparison with no change at all.
    expected += anchor_weight * (above(chosen, 0.0) + above(corrected, 0.0))
    loss = opa_dpo_loss(*deltas, beta=beta, mask_weight=mask_weight, anchor_weight=anchor_weight)
    np.testing.assert_allclose(loss.numpy(), expected, rtol=1e-9)


@given(seed=seeds, beta=st.floats(0.01, 2.0))
def test_opa_dpo_without_mask_and_anchors_on_one_better_answer_is_dpo_twice(
    seed: int, beta: float
) -> None:
    better, own, *masked = _random(seed, 4, 7)
    loss = opa_dpo_loss(better, own, better, *masked, beta=beta, mask_weight=0, anchor_weight=0)
    torch.testing.assert_close(loss, 2 * dpo_loss(better, own, beta=beta))


@given(seed=seeds)
def test_opa_dpo_raises_the_better_answers_and_lowers_own_and_masked(seed: int) -> None:
    deltas = _random(seed, 5, 7).requires_grad_(True)
    opa_dpo_loss(*deltas, beta=0.3, mask_weight=0.2, anchor_weight=1.0).sum().backward()
    assert deltas.grad is not None
    chosen, own, corrected, *masked = deltas.grad
    assert (chosen < 0).all()
    assert (corrected < 0).all()
    for worse in (own, *masked):
        assert (worse > 0).all()
