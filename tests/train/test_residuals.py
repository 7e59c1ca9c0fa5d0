"""Slopes and residuals of pairs against closed forms and autograd through a softmax."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import logsigmoid

from cwdpo_bench.train.objectives import cooling_weight, cw_dpo_loss
from cwdpo_bench.train.residuals import (
    PairLoss,
    Pull,
    Scores,
    easy_shares,
    histogram,
    pull,
    residual_norms,
)

BETA, FLOOR, TAU = 0.1, -3.0, 0.5


def _scores(seed: int, number: int = 6) -> Scores:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 12, (number,), generator=generator)
    means = -3 + torch.randn(number, generator=generator)
    return Scores(means * tokens, means, tokens)


def _cw_dpo(detach: bool) -> PairLoss:
    def loss(
        chosen: Scores, rejected: Scores, start_chosen: Scores, start_rejected: Scores
    ) -> torch.Tensor:
        weight = cooling_weight(rejected.mean_logp, floor=FLOOR, tau=TAU, detach=detach)
        return cw_dpo_loss(
            chosen.logp - start_chosen.logp,
            rejected.logp - start_rejected.logp,
            weight,
            beta=BETA,
        ).mean()

    return loss


@pytest.mark.parametrize("detach", [True, False])
def test_slopes_of_cw_dpo_are_the_closed_form(detach: bool) -> None:
    chosen, rejected, start_w, start_l = (_scores(seed) for seed in range(4))
    found = pull(_cw_dpo(detach), chosen, rejected, start_w, start_l)
    delta_w, delta_l = chosen.logp - start_w.logp, rejected.logp - start_l.logp
    w = torch.sigmoid((rejected.mean_logp - FLOOR) / TAU)
    a = torch.sigmoid(BETA * (delta_w - w * delta_l))
    torch.testing.assert_close(found.chosen, -BETA * (1 - a))
    expected = BETA * (1 - a) * w
    if not detach:
        # The product rule on w_c(ℓ̄) · Δ_l, ℓ̄ = Σ log π / L.
        expected = expected + BETA * (1 - a) * delta_l * w * (1 - w) / (TAU * rejected.tokens)
    torch.testing.assert_close(found.rejected, expected)
    torch.testing.assert_close(found.loss, -logsigmoid(BETA * (delta_w - w * delta_l)))


def test_a_loss_of_the_chosen_answer_alone_pulls_at_nothing_else() -> None:
    chosen, rejected = _scores(0), _scores(1)
    found = pull(lambda c, *_: -c.mean_logp.mean(), chosen, rejected, chosen, rejected)
    torch.testing.assert_close(found.chosen, -1 / chosen.tokens)
    assert found.rejected.abs().max() == 0


def test_slope_times_residual_is_autograds_gradient_in_the_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 9, generator=generator, requires_grad=True)
    targets = torch.randint(0, 9, (2, 5), generator=generator)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    log_p = logits.log_softmax(-1)
    logps = log_p.gather(-1, targets[..., None]).squeeze(-1).masked_fill(~mask, 0)
    sums, tokens = logps.sum(-1), mask.sum(-1)
    loss = -logsigmoid(BETA * (sums[0] - sums[1]))
    (gradient,) = torch.autograd.grad(loss, logits)
    winner, loser = (
        Scores(sums[i : i + 1], sums[i : i + 1] / tokens[i], tokens[i : i + 1]) for i in (0, 1)
    )
    zero = Scores(torch.zeros(1), torch.zeros(1), torch.ones(1))
    found = pull(
        lambda c, r, *_: -logsigmoid(BETA * (c.logp - r.logp)).mean(), winner, loser, zero, zero
    )
    norms = residual_norms(logps.detach(), log_p.detach().exp().square().sum(-1), mask)
    torch.testing.assert_close(found.chosen.abs()[0] * norms[0], gradient[0].norm())
    torch.testing.assert_close(found.rejected.abs()[0] * norms[1], gradient[1].norm())


def test_shares_of_the_easy_half() -> None:
    easiness = torch.tensor([-9.0, -1.0, -8.0, -2.0])
    found = Pull(torch.tensor([0.1, 1.0, 0.1, 0.8]), torch.zeros(4), torch.zeros(4))
    shares = easy_shares(easiness, found, torch.tensor([3.0, 1.0, 3.0, 1.0]))
    assert shares["easy_loss_share"] == pytest.approx(0.1)
    assert shares["easy_residual_share"] == pytest.approx(0.75)


def test_the_histogram_takes_in_both_ends() -> None:
    found = histogram(torch.tensor([0.0, 0.05, 0.999, 1.0]))
    assert found["cooling_weight_bin_0"] == 0.5
    assert found["cooling_weight_bin_9"] == 0.5
