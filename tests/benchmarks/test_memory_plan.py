"""The memory plan: its table is the documentation's, its counts are those of real models."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import Qwen2_5_VLForConditionalGeneration

from cwdpo_bench.vlm.quantized import four_bits

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def memory_plan() -> Any:
    folder = str(ROOT / "benchmarks")
    sys.path.insert(0, folder)
    try:
        spec = importlib.util.spec_from_file_location("memory_plan", f"{folder}/memory_plan.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(folder)


@pytest.fixture
def tiny(memory_plan: Any) -> Any:
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "window_size": 112}
    vision |= {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
    return memory_plan.Qwen("tiny", 4, 128, 384, 4, 2, 256, False, 64, vision)


def _built(size: Any) -> Any:
    torch.manual_seed(0)
    return Qwen2_5_VLForConditionalGeneration(size.config()).train()


def _inputs(tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "input_ids": torch.randint(0, 200, (1, tokens)),
        "attention_mask": torch.zeros(1, 1, tokens, tokens, dtype=dtype),
        "position_ids": torch.arange(tokens)[None, None].expand(3, 1, tokens),
        "use_cache": False,
    }


def test_the_table_of_the_documentation_is_the_scripts(memory_plan: Any) -> None:
    text = (ROOT / "docs" / "SCALING.md").read_text(encoding="utf-8")
    assert memory_plan.table(devices=8, tokens=1152) in text


@pytest.mark.parametrize("name", ["3B", "7B", "32B", "72B"])
def test_the_parameters_are_those_of_the_models(name: str, memory_plan: Any) -> None:
    size = memory_plan.SIZES[name]
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(size.config())
    assert size.parameters == sum(p.numel() for p in model.parameters())
    assert size.tower == sum(p.numel() for p in model.model.visual.parameters())
    layer = model.model.language_model.layers[0]
    assert size.layer == sum(p.numel() for p in layer.parameters())


@pytest.mark.parametrize("lora", [False, True])
def test_weights_gradients_and_optimizer_are_what_a_step_holds(
    lora: bool, memory_plan: Any, tiny: Any
) -> None:
    model = _built(tiny)
    if lora:
        model.to(torch.bfloat16)
        targets = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
        model = get_peft_model(model, LoraConfig(r=16, target_modules=targets))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    dtype = next(model.parameters()).dtype
    # The tower sees no picture here; its gradients are zero and there.
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    model(**_inputs(16, dtype)).logits.float().sum().backward()
    optimizer.step()
    weights = sum(p.nbytes for p in model.parameters())
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    moments = sum(
        state[name].nbytes
        for state in optimizer.state.values()
        for name in ("exp_avg", "exp_avg_sq")
    )
    way = memory_plan.Way("", lora=lora, spread=False)
    found = memory_plan.plan(tiny, way, devices=1, tokens=16)
    assert (found.weights, found.gradients, found.optimizer) == (weights, gradients, moments)


def test_weights_in_4_bits_are_what_bitsandbytes_keeps(
    memory_plan: Any, tiny: Any, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    _built(tiny).to(torch.bfloat16).save_pretrained(tmp_path)
    config = four_bits(str(tmp_path), torch.bfloat16, trust_remote_code=False)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=config
    )
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    targets = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    model = get_peft_model(model, LoraConfig(r=16, target_modules=targets))
    weights = 0
    for parameter in model.parameters():
        weights += parameter.nbytes
        if (state := getattr(parameter, "quant_state", None)) is not None:
            weights += state.absmax.nbytes + state.state2.absmax.nbytes
    way = memory_plan.Way("", lora=True, bits=4, spread=False)
    found = memory_plan.plan(tiny, way, devices=1, tokens=16)
    assert found.weights == pytest.approx(weights, rel=1e-3)


def _kept(model: Any, tokens: int, dtype: torch.dtype) -> int:
    """Bytes that autograd keeps for the backward pass, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.model(**_inputs(tokens, dtype))
    return sum(tensor.untyped_storage().nbytes() for tensor in seen.values())


def test_activations_a_layer_are_what_autograd_keeps(memory_plan: Any, tiny: Any) -> None:
    tokens, dtype = 128, torch.bfloat16
    fewer = memory_plan.Qwen("two", 2, *tiny_sizes(tiny))
    more, less = _built(tiny).to(dtype), _built(fewer).to(dtype)
    inner = (_kept(more, tokens, dtype) - _kept(less, tokens, dtype)) / 2
    assert inner == pytest.approx(tokens * (8 * tiny.intermediate + 24 * tiny.hidden), rel=0.02)
    for model in (more, less):
        model.gradient_checkpointing_enable()
    kept = (_kept(more, tokens, dtype) - _kept(less, tokens, dtype)) / 2
    assert kept == tokens * 2 * tiny.hidden


def tiny_sizes(size: Any) -> tuple[Any, ...]:
    names = ("hidden", "intermediate", "heads", "kv", "vocabulary", "tied")
    return (*(getattr(size, n) for n in names), size.vision_intermediate, size.vision)
