"""The influence decomposition against explicit Jacobians, finite differences and autograd."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cwdpo_bench.train.influence import (
    Step,
    agreement,
    answer_gradients,
    measure_influence,
    too_large,
    trained_parameters,
)
from cwdpo_bench.vlm import (
    Batch,
    Prompt,
    average_confidence,
    build_branches,
    completion_statistics,
    load_vlm,
)


class _Toy(torch.nn.Module):
    """Embeds tokens, mixes the past, reads off logits: small enough for whole Jacobians."""

    def __init__(self, vocabulary: int = 7, width: int = 4) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(vocabulary, width)
        self.mix = torch.nn.Linear(width, width)
        self.head = torch.nn.Linear(width, vocabulary, bias=False)

    def get_output_embeddings(self) -> Any:
        return self.head

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        seen = self.embedding(input_ids).cumsum(1)
        logits = self.head(torch.tanh(self.mix(seen)))

        class Output:
            pass

        output = Output()
        output.logits = logits  # type: ignore[attr-defined]
        return output


def _toy_batch(seed: int) -> Batch:
    """Two answers of 3 and 2 tokens behind prompts of 2."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 7, (2, 5), generator=generator)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    return Batch({"input_ids": ids}, ids[:, 2:], mask)


def _logits(model: _Toy, batch: Batch, row: int) -> torch.Tensor:
    """[L, V] at the answer's positions, by the model's plain forward."""
    length = int(batch.mask[row].sum())
    logits: torch.Tensor = model(batch.inputs["input_ids"]).logits
    return logits[row, 1 : 1 + length]


def _jacobian(model: _Toy, batch: Batch, row: int) -> torch.Tensor:
    """J = ∂z/∂θ of one answer, [L · V, parameters], a row at a time."""
    logits, weights = _logits(model, batch, row).flatten(), list(model.parameters())
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(z, weights, retain_graph=True)])
        for z in logits
    ]
    return torch.stack(rows)


def test_the_prediction_is_belief_times_kernel_times_residual() -> None:
    """Oracle: A, K = J_o J_uᵀ and G formed whole, for a step on pair u seen on the answers of o."""
    torch.manual_seed(0)
    model = _Toy()
    u, o = _toy_batch(1), _toy_batch(2)
    steps = [Step(-0.07, 0.04), Step(-0.05, None)]
    found = measure_influence(model, [u, o], steps, largest=1e-3)

    def residual(batch: Batch, row: int) -> torch.Tensor:
        targets = batch.targets[row][batch.mask[row]]
        pi = _logits(model, batch, row).softmax(-1)
        return (torch.nn.functional.one_hot(targets, 7) - pi).flatten().detach()

    # ∂L/∂z of both answers: c · (e_y − π), as ∂ log π(y)/∂z = e_y − π.
    g = torch.cat([-0.07 * residual(u, 0), 0.04 * residual(u, 1)])
    j_u = torch.cat([_jacobian(model, u, 0), _jacobian(model, u, 1)])
    for column, (batch, row) in enumerate([(u, 0), (u, 1), (o, 0), (o, 1)]):
        length = batch.mask[row].sum()
        a = residual(batch, row) / length
        k = _jacobian(model, batch, row) @ j_u.T
        product = (a @ k @ g).item()
        assert found.predicted[0, column] == pytest.approx(-found.rate * product, rel=1e-4)
        gain = product / (a.norm() * g.norm()).item()
        assert found.kernel[0, column] == pytest.approx(gain, rel=1e-4)
        assert found.beliefs[column] == pytest.approx(a.norm().item(), rel=1e-5)
    assert found.residuals[0] == pytest.approx(g.norm().item(), rel=1e-5)
    # The loser's part of the parameter gradient, by the chain rule on the whole Jacobian.
    loser = 0.04 * residual(u, 1) @ _jacobian(model, u, 1)
    assert found.rejected_norms[0] == pytest.approx(loser.norm().item(), rel=1e-4)
    assert found.rejected_norms[1] == 0


@pytest.fixture(scope="module")
def vlm_and_batches(tiny_model_folder: Path) -> tuple[Any, list[Batch]]:
    vlm = load_vlm(tiny_model_folder, trainable=True)
    rng = np.random.default_rng(0)
    batches = []
    for k in range(2):
        picture = Image.fromarray(rng.integers(0, 255, (84, 84, 3), dtype=np.uint8))
        answers = [f"a red circle {k}.", "two blue squares.", "a large star above a cross."]
        batches.append(build_branches(vlm, [Prompt("What is it?", (picture,))], [answers]))
    return vlm, batches


def test_the_gradient_of_an_answer_is_autograds(vlm_and_batches: tuple[Any, list[Batch]]) -> None:
    vlm, batches = vlm_and_batches
    found = answer_gradients(vlm.model, batches[0])
    logps = completion_statistics(vlm.model, batches[0]).logps
    means = average_confidence(logps, batches[0].mask)
    torch.testing.assert_close(found.mean_logps, means.detach(), atol=1e-5, rtol=1e-5)
    for row in range(3):
        parts = torch.autograd.grad(
            means[row],
            trained_parameters(vlm.model),
            retain_graph=True,
            materialize_grads=True,
            allow_unused=True,
        )
        expected = torch.cat([part.flatten() for part in parts])
        error = (found.vectors[row] - expected).norm() / expected.norm()
        assert error < 1e-4


def test_small_steps_do_what_is_predicted_and_leave_the_weights(
    vlm_and_batches: tuple[Any, list[Batch]],
) -> None:
    vlm, batches = vlm_and_batches
    before = [parameter.detach().clone() for parameter in vlm.model.parameters()]
    steps = [Step(-0.05, 0.03), Step(-0.02, 0.06)]
    found = measure_influence(vlm.model, batches, steps, largest=0.01)
    assert found.predicted.shape == found.realised.shape == (2, 6)
    assert np.abs(found.predicted).max() <= 0.01 * 3
    agree = agreement(found)
    assert agree["influence_correlation"] > 0.99
    assert agree["influence_error"] < 0.1
    # The winner's own answer rises, the loser's falls.
    assert found.realised[0, 0] > 0 > found.realised[0, 1]
    for old, parameter in zip(before, vlm.model.parameters(), strict=True):
        assert torch.equal(old, parameter)


def test_agreement_falls_where_the_step_is_too_long_for_first_order(
    vlm_and_batches: tuple[Any, list[Batch]],
) -> None:
    vlm, batches = vlm_and_batches
    steps = [Step(-0.05, 0.03), Step(-0.02, 0.06)]
    near = agreement(measure_influence(vlm.model, batches, steps, largest=0.01))
    far = agreement(measure_influence(vlm.model, batches, steps, largest=30.0))
    assert far["influence_error"] > 5 * near["influence_error"]


def test_what_does_not_fit_is_said(
    vlm_and_batches: tuple[Any, list[Batch]], monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm, _ = vlm_and_batches
    assert too_large(vlm.model, 2) is None
    monkeypatch.setattr("cwdpo_bench.train.influence.MOST_ELEMENTS", 1000)
    assert "LoRA" in str(too_large(vlm.model, 2))
