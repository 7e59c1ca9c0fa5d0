"""The tiny VLM: a real Qwen2.5-VL of about 1.5 million parameters with its own processor.

Everything is made from a seed and the world's own text, nothing is fetched: the configuration, a
byte-level BPE in which each word of the world is one token and any other text still encodes, the
image processor at 84 × 84 pixels (36 patches, 9 tokens after merging), and a chat template of
Qwen's form without the long system prompt.
"""

from __future__ import annotations

import json
import random
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from cwdpo_bench.demo.captions import describe, put_in_words
from cwdpo_bench.demo.questions import KINDS, NUMBERS_IN_DIGITS, ask
from cwdpo_bench.demo.world import IMAGE_SIZE, NOVEL_COLOURS, NOVEL_SHAPES, Domain, draw_scene
from cwdpo_bench.evaluate.coco import caption_prompt
from cwdpo_bench.evaluate.mmbench import mmbench_prompt
from cwdpo_bench.evaluate.mmmu import MULTIPLE_CHOICE, OPEN, mmmu_prompt

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

IMAGE_TOKEN = "<|image_pad|>"
WIDTH = 128
"""Of the bundled model's language model."""
# Layers this narrow start too quietly at the usual 0.02, which suits widths of thousands.
START: dict[str, Any] = {"initializer_range": 0.03}

_PATCH = 14
_MERGE = 2


def text_sizes(width: int = WIDTH) -> dict[str, Any]:
    """Sizes of the language model, whatever the architecture; heads are always 32 wide.

    Raises:
        ValueError: if `width` is no multiple of 64: two query heads share one of keys and values.
    """
    if width < 64 or width % 64:
        raise ValueError(f"width {width}: a multiple of 64 is wanted")
    return {
        "hidden_size": width,
        "intermediate_size": width * 11 // 4,
        "num_hidden_layers": 4,
        "num_attention_heads": width // 32,
        "num_key_value_heads": width // 64,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
    }


def build_tiny_vlm(
    seed: int, width: int = WIDTH
) -> tuple[Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor]:
    """An untrained tiny model in fp32 and its processor.

    Args:
        seed: the weights follow from it.
        width: of the language model, a multiple of 64; the vision tower has three quarters of it.
    """
    processor = build_processor()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(_config(processor.tokenizer, width))
    end_of_turn = processor.tokenizer.eos_token_id
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=end_of_turn, pad_token_id=processor.tokenizer.pad_token_id
    )
    return model, processor


def build_processor() -> Qwen2_5_VLProcessor:
    """Tokenizer, image and video processor, and chat template."""
    patches: dict[str, Any] = {"patch_size": _PATCH, "merge_size": _MERGE, "temporal_patch_size": 2}
    pixels: dict[str, Any] = {"min_pixels": IMAGE_SIZE**2, "max_pixels": IMAGE_SIZE**2}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**patches, **pixels),
        tokenizer=build_tokenizer(),
        video_processor=Qwen2VLVideoProcessor(**patches, **pixels),
        chat_template=CHAT_TEMPLATE,
    )


def _config(tokenizer: Qwen2Tokenizer, width: int) -> Qwen2_5_VLConfig:
    def token(text: str) -> int:
        return int(tokenizer.convert_tokens_to_ids(text))  # type: ignore[arg-type]

    ends: dict[str, Any] = {
        "eos_token_id": token("<|im_end|>"),
        "pad_token_id": token("<|endoftext|>"),
    }
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "mrope_section": [4, 6, 6],
            },
            "bos_token_id": None,
            **text_sizes(width),
            **ends,
            **START,
        },
        vision_config={
            "depth": 3,
            "hidden_size": width * 3 // 4,
            "intermediate_size": width * 2,
            "num_heads": width // 32,
            "out_hidden_size": width,
            "patch_size": _PATCH,
            "spatial_merge_size": _MERGE,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [2],
            **START,
        },
        image_token_id=token(IMAGE_TOKEN),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
        **ends,
        **START,
    )


def build_tokenizer() -> Qwen2Tokenizer:
    """Byte-level BPE that splits as Qwen does, trained until each word of the world is whole."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    raw.train_from_iterator(
        sorted(_world_text()),
        trainers.BpeTrainer(
            vocab_size=2048,
            min_frequency=1,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    bpe = json.loads(raw.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=bpe["vocab"],
        merges=[tuple(pair) for pair in bpe["merges"]],  # type: ignore[misc]
        unk_token=None,  # type: ignore[arg-type]
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=[
            t for t in SPECIAL_TOKENS if t not in ("<|im_end|>", "<|endoftext|>")
        ],
        model_max_length=1024,
    )


def _world_text() -> set[str]:
    """Every word of captions, questions and prompts, the words of novel shapes and colours too."""
    rng = random.Random(0)
    texts = {caption_prompt(), "user\n", "assistant\n", mmmu_prompt("", (), OPEN)}
    texts |= set(NUMBERS_IN_DIGITS) | set(NOVEL_COLOURS) | set(NOVEL_SHAPES)
    domains: tuple[Domain, ...] = ("in-domain", "near-domain", "out-domain")
    for index in range(1500):
        scene = draw_scene(
            rng,
            "pretraining" if index % 3 == 0 else "pairs",
            domain=domains[index % 3],
            style="striped" if rng.random() < 0.5 else "plain",
            twins=rng.random() < 0.2,
        )
        texts.add(put_in_words(describe(scene, rng)))
        for kind in KINDS:
            question = ask(scene, kind, rng)
            if question is not None:
                texts.add(mmmu_prompt(question.marked_text, question.options, MULTIPLE_CHOICE))
                texts.add(mmbench_prompt(question.text, question.options, question.hint))
                texts.add(question.truth)
    return texts
