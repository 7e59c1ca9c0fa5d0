"""The other ways of computing on a CPU give the numbers of the usual ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from cwdpo_bench.vlm import cpu, load_vlm
from cwdpo_bench.vlm.packing import packing_refusal


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_fast", True)
    monkeypatch.setattr(cpu, "WORTH_IT", 0)


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("biased", [True, False])
def test_a_product_is_that_of_linear(biased: bool) -> None:
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this PyTorch has no oneDNN")
    states, weight = torch.randn(3, 7, 40), torch.randn(24, 40)
    bias = torch.randn(24) if biased else None

    with torch.inference_mode():
        strided = cpu.multiply(states.transpose(0, 1), weight, bias)
        product = cpu.multiply(states, weight, bias)

    torch.testing.assert_close(product, linear(states, weight, bias), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(strided, product.transpose(0, 1), atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("fast")
def test_gradients_and_autocast_go_the_usual_way(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.dtype] = []

    def noted(*given: Any) -> torch.Tensor:
        asked.append(given[0].dtype)
        return linear(*given)

    monkeypatch.setattr(cpu, "linear", noted)
    states, weight = torch.randn(8, 40), torch.randn(24, 40, requires_grad=True)

    cpu.multiply(states, weight).sum().backward()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        lower = cpu.multiply(states, weight)

    assert weight.grad is not None
    assert lower.dtype == torch.bfloat16
    assert len(asked) == 2


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("boolean", [True, False])
def test_attention_in_bf16_is_as_near_to_fp32_as_the_fused_one(queries: int, boolean: bool) -> None:
    torch.manual_seed(0)
    module = torch.nn.Identity()
    module.num_key_value_groups = 2  # type: ignore[assignment]
    query = torch.randn(3, 4, queries, 16)
    keys, values = torch.randn(2, 3, 2, 9, 16)
    seen = torch.rand(3, 1, queries, 9) < 0.7
    seen[..., 0] = True
    added = torch.zeros(seen.shape).masked_fill_(~seen, torch.finfo(torch.bfloat16).min)
    mask = seen if boolean else added.bfloat16()
    exact, _ = sdpa_attention_forward(module, query, keys, values, added, scaling=0.25)
    q, k, v = (states.bfloat16() for states in (query, keys, values))

    with torch.inference_mode():
        assert cpu.by_products(q, k)
        ours, _ = cpu._attention(module, q, k, v, mask, scaling=0.25)
        fused, _ = sdpa_attention_forward(module, q, k, v, mask, scaling=0.25)

    assert ours.shape == exact.shape == (3, queries, 4, 16)
    assert (ours - exact).abs().max() <= 2 * (fused - exact).abs().max()


@pytest.mark.usefixtures("fast")
def test_scores_that_leave_the_cache_are_left_to_the_fused_attention(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu, "MAX_SCORES", 2 * 3 * 5 * 5)
    query = torch.randn(2, 3, 5, 8).bfloat16()

    with torch.inference_mode():
        assert not cpu.by_products(query, query)
        attended = cpu.attend(query, query, query, 0.5)

    assert torch.equal(attended, scaled_dot_product_attention(query, query, query, scale=0.5))


def test_a_model_is_as_before_when_its_answers_are_written(packed_folder: Path) -> None:
    model = load_vlm(packed_folder, dtype=torch.bfloat16).model
    text = model.config.get_text_config()

    with cpu.fast_on_cpu(model):
        assert text._attn_implementation == cpu.ATTENTION
        assert packing_refusal(model) is None

    assert text._attn_implementation == "sdpa"
    assert not cpu._fast
