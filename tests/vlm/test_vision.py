"""The frozen part, and the patch embedding as one matrix product."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionPatchEmbed

from cwdpo_bench.vlm import freeze_vision, load_vlm, vision_is_frozen, vision_parameters
from cwdpo_bench.vlm.vision import embedding_refusal, multiply_patches


def test_the_product_is_the_convolution_also_in_its_gradient() -> None:
    torch.manual_seed(0)
    layer = Qwen2_5_VisionPatchEmbed(14, 2, 3, 16)
    patches = torch.randn(10, 3 * 2 * 14 * 14)
    results = []
    for _ in range(2):
        layer.zero_grad()
        out = layer(patches)
        (out**2).sum().backward()
        assert layer.proj.weight.grad is not None
        results.append((out.detach(), layer.proj.weight.grad.clone()))
        multiply_patches(layer)
    for convolved, multiplied in zip(*results, strict=True):
        torch.testing.assert_close(convolved, multiplied, atol=1e-4, rtol=1e-4)


def test_vision_is_all_before_the_language_model(tiny_model_folder: Path) -> None:
    model = load_vlm(tiny_model_folder).model
    found = {id(parameter) for parameter in vision_parameters(model)}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in found) == ("visual" in name), name


def test_why_images_are_not_embedded_is_said(
    tiny_model_folder: Path, tiny_plain_folder: Path
) -> None:
    for folder in (tiny_model_folder, tiny_plain_folder):
        model = load_vlm(folder, trainable=True).model
        assert embedding_refusal(model) == "the vision tower is trained"
        freeze_vision(model)
        assert vision_is_frozen(model)
        assert embedding_refusal(model) is None
        model.config.model_type = "qwen9"
        assert "'qwen9' is not tested" in str(embedding_refusal(model))


def test_windows_of_one_length_at_once_are_windows_one_by_one(tiny_model_folder: Path) -> None:
    """Images of several sizes, whose windows are cut at the borders; also in the gradient."""
    model = load_vlm(tiny_model_folder).model
    tower = model.model.visual
    grid = torch.tensor([[1, 10, 14], [1, 4, 6], [1, 10, 14], [1, 18, 2]])
    torch.manual_seed(0)
    patches = torch.randn(int(grid.prod(-1).sum()), 3 * 2 * 14 * 14)
    results = []
    for batched in (True, False):
        if not batched:
            for block in tower.blocks:
                del block.attn.forward
        model.zero_grad()
        out = tower(patches, grid_thw=grid).pooler_output
        (out**2).sum().backward()
        results.append((out.detach(), tower.blocks[0].attn.qkv.weight.grad.clone()))
    for together, alone in zip(*results, strict=True):
        torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-3)
