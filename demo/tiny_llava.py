"""A second tiny VLM: a real LLaVA-1.5 of the size of the demo's Qwen2.5-VL, with its words.

CLIP's tower (learned absolute positions, a class token, its last layer but one read), a projector
of two layers and Llama, where the other has a tower with windows and rotary positions, a merger and
Qwen with positions in three dimensions. The tokenizer, the chat template, the nine image tokens and
the sizes of the language model are the same, so that a comparison is of the architectures.
"""

from __future__ import annotations

import torch
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from cwdpo_bench.demo.tiny import (
    CHAT_TEMPLATE,
    IMAGE_TOKEN,
    START,
    WIDTH,
    build_tokenizer,
    text_sizes,
)
from cwdpo_bench.demo.world import IMAGE_SIZE

_CELL = IMAGE_SIZE // 3
"""A patch is one of the scene's nine cells."""


def build_tiny_llava(
    seed: int, width: int = WIDTH
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """An untrained tiny LLaVA in fp32 and its processor; seed and width as of the Qwen one."""
    tokenizer = build_tokenizer()
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": IMAGE_SIZE},
            crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        ),
        tokenizer=tokenizer,
        patch_size=_CELL,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE_TOKEN,
        chat_template=CHAT_TEMPLATE,
    )
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = LlavaConfig(
        text_config=LlamaConfig(
            vocab_size=len(tokenizer), bos_token_id=None, **text_sizes(width), **ends, **START
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=width * 3 // 4,
            intermediate_size=width * 2,
            projection_dim=width * 3 // 4,
            num_hidden_layers=4,
            num_attention_heads=width // 32,
            image_size=IMAGE_SIZE,
            patch_size=_CELL,
        ),
        vision_feature_layer=-2,
        image_token_index=processor.image_token_id,
        image_seq_length=(IMAGE_SIZE // _CELL) ** 2,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(do_sample=False, **ends)
    return model, processor
