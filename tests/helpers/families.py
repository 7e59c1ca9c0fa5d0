"""Tiny models of the families that people use, each from its configuration with its real processor.

Nothing is fetched: the tokenizer is the demo's with the family's own special tokens, weights follow
from a seed, and pictures are small enough for a handful of image tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from cwdpo_bench.demo.tiny import CHAT_TEMPLATE, build_processor

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.1,
    "bos_token_id": None,
}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}:"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
"""Roles in words, the family's own image token in the place of IMAGE."""


def _tokenizer(*special: str) -> Any:
    tokenizer = build_processor().tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    return tokenizer


def _named(tokenizer: Any, **tokens: str) -> Any:
    """The tokenizer with special tokens under names, as the family's own tokenizer has them."""
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens.values())})
    tokenizer._set_model_specific_special_tokens(tokens)
    return tokenizer


def _ends(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def _qwen_tokens(tokenizer: Any) -> dict[str, int]:
    names = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    return {key: tokenizer.convert_tokens_to_ids(name) for key, name in names.items()}


def _rope(sections: list[int], **more: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": sections, **more}
    return {"rope_parameters": rope}


def qwen2_vl() -> tuple[Any, Any]:
    own = build_processor()
    processor = transformers.Qwen2VLProcessor(
        image_processor=own.image_processor,
        tokenizer=own.tokenizer,
        video_processor=own.video_processor,
        chat_template=CHAT_TEMPLATE,
    )
    config = transformers.Qwen2VLConfig(
        text_config={**TEXT, **_ends(own.tokenizer), **_rope([2, 3, 3])},
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 64,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        tie_word_embeddings=True,
        **_qwen_tokens(own.tokenizer),
    )
    return transformers.Qwen2VLForConditionalGeneration(config), processor


def qwen3_vl() -> tuple[Any, Any]:
    size = {"shortest_edge": 64 * 64, "longest_edge": 64 * 64}
    patches = {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2}
    tokenizer = build_processor().tokenizer
    processor = transformers.Qwen3VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(size=size, **patches),
        tokenizer=tokenizer,
        video_processor=transformers.Qwen3VLVideoProcessor(size=size, **patches),
        chat_template=CHAT_TEMPLATE,
    )
    config = transformers.Qwen3VLConfig(
        text_config={
            **TEXT,
            **_ends(tokenizer),
            "num_hidden_layers": 3,
            "head_dim": 16,
            **_rope([3, 3, 2], mrope_interleaved=True),
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        tie_word_embeddings=True,
        **_qwen_tokens(tokenizer),
    )
    return transformers.Qwen3VLForConditionalGeneration(config), processor


def llava() -> tuple[Any, Any]:
    tokenizer = _tokenizer("<image>")
    processor = transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(
            size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}
        ),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=PLAIN_TEMPLATE.replace("IMAGE", "<image>"),
    )
    config = transformers.LlavaConfig(
        text_config={"model_type": "llama", **TEXT, **_ends(tokenizer)},
        vision_config={
            "model_type": "clip_vision_model",
            **TOWER,
            "image_size": 56,
            "patch_size": 14,
            "projection_dim": 32,
        },
        vision_feature_layer=-1,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
    )
    return transformers.LlavaForConditionalGeneration(config), processor


def llava_onevision() -> tuple[Any, Any]:
    tokenizer = _tokenizer("<image>", "<video>")
    size = {"height": 56, "width": 56}
    grids = [[56, 56], [56, 112], [112, 56]]
    processor = transformers.LlavaOnevisionProcessor(
        image_processor=transformers.LlavaOnevisionImageProcessor(
            size=size, image_grid_pinpoints=grids
        ),
        tokenizer=tokenizer,
        video_processor=transformers.LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=PLAIN_TEMPLATE.replace("IMAGE", "<image>"),
    )
    config = transformers.LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **TEXT, **_ends(tokenizer)},
        vision_config={
            "model_type": "siglip_vision_model",
            **TOWER,
            "image_size": 56,
            "patch_size": 14,
            "vision_use_head": False,
        },
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_grid_pinpoints=grids,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        tie_word_embeddings=True,
    )
    return transformers.LlavaOnevisionForConditionalGeneration(config), processor


def internvl() -> tuple[Any, Any]:
    tokenizer = _named(
        build_processor().tokenizer,
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    size = {"height": 56, "width": 56}
    processor = transformers.InternVLProcessor(
        image_processor=transformers.GotOcr2ImageProcessor(
            size=size, crop_to_patches=False, min_patches=1, max_patches=1
        ),
        tokenizer=tokenizer,
        video_processor=transformers.InternVLVideoProcessor(size=size),
        image_seq_length=4,
        chat_template=PLAIN_TEMPLATE.replace("IMAGE", "<IMG_CONTEXT>"),
    )
    config = transformers.InternVLConfig(
        text_config={"model_type": "qwen2", **TEXT, **_ends(tokenizer)},
        vision_config={
            **TOWER,
            "image_size": [56, 56],
            "patch_size": [14, 14],
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        downsample_ratio=0.5,
        tie_word_embeddings=True,
    )
    return transformers.InternVLForConditionalGeneration(config), processor


def gemma3() -> tuple[Any, Any]:
    tokenizer = _named(
        build_processor().tokenizer,
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
        image_token="<image_soft_token>",
    )
    processor = transformers.Gemma3Processor(
        image_processor=transformers.Gemma3ImageProcessor(
            size={"height": 56, "width": 56}, do_pan_and_scan=False
        ),
        tokenizer=tokenizer,
        image_seq_length=4,
        chat_template=PLAIN_TEMPLATE.replace("IMAGE", "<start_of_image>"),
    )
    config = transformers.Gemma3Config(
        text_config={
            **TEXT,
            **_ends(tokenizer),
            "head_dim": 16,
            "sliding_window": 512,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        vision_config={**TOWER, "image_size": 56, "patch_size": 14, "vision_use_head": False},
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=tokenizer.convert_tokens_to_ids("<end_of_image>"),
        image_token_index=tokenizer.convert_tokens_to_ids("<image_soft_token>"),
        tie_word_embeddings=True,
    )
    model = transformers.Gemma3ForConditionalGeneration(config)
    # It starts at zero: an untrained model would be blind.
    projection = model.model.multi_modal_projector.mm_input_projection_weight
    torch.nn.init.normal_(projection, std=0.1)
    return model, processor


FAMILIES: dict[str, Callable[[], tuple[Any, Any]]] = {
    builder.__name__: builder
    for builder in (qwen2_vl, qwen3_vl, llava, llava_onevision, internvl, gemma3)
}


def save_family(name: str, folder: Path, seed: int = 0) -> None:
    """Save an untrained model of a family, in fp32, and its processor."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, processor = FAMILIES[name]()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
