"""The part of a model before its language model: frozen or not, and its output made beforehand.

A frozen vision tower gives the same embeddings for an image in every step, so they can be made once
and handed to the forward in place of the pixels, which then skips the tower.
"""

from __future__ import annotations

import inspect
from types import MethodType
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionPatchEmbed,
    Qwen2_5_VLVisionAttention,
    apply_rotary_pos_emb_vision,
)

from cwdpo_bench.vlm.batch import PER_TOKEN, EncodedPrompt
from cwdpo_bench.vlm.cpu import attend, multiply
from cwdpo_bench.vlm.sharding import is_sharded

IMAGE_EMBEDDINGS = "image_embeddings"
"""Name under which a prompt's image embeddings [image tokens, H] stand among its inputs."""

EMBEDDED_FAMILIES = {"qwen2_5_vl", "idefics3"}
"""Model types tested to give the same from an image's pooled embeddings as from its pixels."""

_HANDED_OVER = "mm_encoder_outputs"
# Read by the language model's positions, not by the tower alone.
_KEPT = {"image_grid_thw"}


def vision_parameters(model: Any) -> list[torch.nn.Parameter]:
    """All parameters between pixels and language model: the tower and what projects its output."""
    inner = getattr(model, "module", model)
    language = [inner.get_decoder(), inner.get_input_embeddings(), inner.get_output_embeddings()]
    known = {id(parameter) for part in language for parameter in part.parameters()}
    return [parameter for parameter in inner.parameters() if id(parameter) not in known]


def freeze_vision(model: Any) -> None:
    """Leave the parameters between pixels and language model as they are."""
    for parameter in vision_parameters(model):
        parameter.requires_grad_(False)


def vision_is_frozen(model: Any) -> bool:
    """Whether no step changes what the language model is given for an image."""
    return not any(parameter.requires_grad for parameter in vision_parameters(model))


def embedding_refusal(model: Any) -> str | None:
    """Why this model's images cannot be embedded beforehand; None where they can."""
    inner = getattr(model, "module", model)
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    if inner.config.model_type not in EMBEDDED_FAMILIES:
        return f"the family {inner.config.model_type!r} is not tested with embeddings"
    if _HANDED_OVER not in inspect.signature(inner.forward).parameters:
        return "this version of transformers takes pixels alone"
    if not vision_is_frozen(model):
        return "the vision tower is trained"
    if is_sharded(model):
        return "the tower's weights are spread over several processes"
    return None


@torch.no_grad()
def embed_images(model: Any, prompt: EncodedPrompt, device: torch.device) -> EncodedPrompt:
    """The prompt with its images' embeddings in place of their pixels."""
    inner = getattr(model, "module", model)
    images = {name: value.to(device) for name, value in prompt.items() if name not in PER_TOKEN}
    features = inner.get_image_features(**images, return_dict=True).pooler_output
    if not isinstance(features, torch.Tensor):
        features = torch.cat(list(features))
    kept = {n: value for n, value in prompt.items() if n in PER_TOKEN or n in _KEPT}
    return {**kept, IMAGE_EMBEDDINGS: features.flatten(0, -2).cpu()}


def multiply_patches(model: Any) -> None:
    """Let the patch embedding of Qwen2.5-VL multiply by its kernel instead of convolving.

    The processor cuts images into patches, so kernel and patch are of one size and the convolution
    is one matrix product: the same numbers and gradients at a fraction of a `Conv3d`'s time.
    """
    for module in model.modules():
        if isinstance(module, Qwen2_5_VisionPatchEmbed):
            module.forward = MethodType(_by_product, module)  # type: ignore[method-assign]


def _by_product(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    kernel = self.proj.weight.flatten(1)
    return multiply(hidden_states.view(-1, kernel.shape[1]).to(kernel.dtype), kernel)


def batch_windows(model: Any) -> None:
    """Let Qwen2.5-VL's vision attention take windows (or images) of one length in one call.

    Its own code splits the patches at every window and attends to one after the other: hundreds of
    small products an image. Flash attention, which takes them at once, is left as it is.
    """
    for module in model.modules():
        if isinstance(module, Qwen2_5_VLVisionAttention) and (
            module.config._attn_implementation == "sdpa"
        ):
            module.forward = MethodType(_by_length, module)  # type: ignore[method-assign]


def _by_length(
    self: Any,
    hidden_states: torch.Tensor,
    cu_seqlens: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    **_: Any,
) -> torch.Tensor:
    """[N, H] to [N, H]; window i is the rows from `cu_seqlens[i]` to `cu_seqlens[i + 1]`."""
    heads = self.qkv(hidden_states).view(len(hidden_states), 3, self.num_heads, -1)
    query, key, value = heads.unbind(1)
    query, key = apply_rotary_pos_emb_vision(query, key, *position_embeddings)
    lengths = cu_seqlens.diff()
    attended = torch.empty_like(value)
    for length in lengths.unique().tolist():
        starts = cu_seqlens[:-1][lengths == length]
        rows = starts[:, None] + torch.arange(length, device=starts.device)
        # [windows, heads, length, d]
        q, k, v = (states[rows].transpose(1, 2) for states in (query, key, value))
        together = attend(q, k, v, self.scaling)
        attended = attended.index_put((rows,), together.transpose(1, 2))
    output: torch.Tensor = self.proj(attended.flatten(1))
    return output


def forward_inputs(inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What the model's forward takes, embeddings in the form in which it takes them."""
    rest: dict[str, Any] = {n: value for n, value in inputs.items() if n != IMAGE_EMBEDDINGS}
    if IMAGE_EMBEDDINGS in inputs:
        features = [inputs[IMAGE_EMBEDDINGS]]
        output = BaseModelOutputWithPooling(pooler_output=features)  # type: ignore[arg-type]
        rest[_HANDED_OVER] = {"image": output}
    return rest
