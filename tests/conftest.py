"""What several rooms' tests share: saved tiny models of two families, built once a session."""

from __future__ import annotations

import os

# Read when torch is loaded. The models are tiny: a second thread gains little when the machine is
# idle, and when it is not the two wait for each other at every operation.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from cwdpo_bench.demo.tiny import build_processor, build_tiny_vlm
from families import FAMILIES, TEXT, TOWER, save_family

# Started in the background by a shell, all would ignore Ctrl-C, also the commands that tests stop.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Tests do not time: on a busy machine an example that is slow once proves nothing.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained Qwen2.5-VL of the demo's size, saved with its processor."""
    folder = tmp_path_factory.mktemp("tiny-vlm")
    model, processor = build_tiny_vlm(seed=0)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


IDEFICS3_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}:"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ ' ' + part['text'] }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


def build_tiny_idefics3(seed: int) -> tuple[Any, Any]:
    """An untrained Idefics3 (SmolVLM's architecture) with its real processor, from its config.

    A family that is not packed: token type ids and M-RoPE are missing, a row's images lie in one
    block [1, images, C, H, W] and a picture larger than the tower's is cut into tiles.
    """
    from transformers import (
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        Idefics3ImageProcessor,
        Idefics3Processor,
    )

    tokenizer = build_processor().tokenizer
    tiles = [f"<row_{i + 1}_col_{j + 1}>" for i in range(6) for j in range(6)]
    special = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *tiles]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    size = {"longest_edge": 56}
    processor = Idefics3Processor(
        image_processor=Idefics3ImageProcessor(size=size, max_image_size=size),
        tokenizer=tokenizer,
        image_seq_len=4,
        chat_template=IDEFICS3_TEMPLATE,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Idefics3ForConditionalGeneration(
            Idefics3Config(
                text_config={
                    "model_type": "llama",
                    "vocab_size": len(tokenizer),
                    "pad_token_id": tokenizer.pad_token_id,
                    "eos_token_id": tokenizer.eos_token_id,
                    **TEXT,
                },
                vision_config={**TOWER, "image_size": 56, "patch_size": 14},
                scale_factor=2,
                image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
                pad_token_id=tokenizer.pad_token_id,
                tie_word_embeddings=True,
            )
        )
    return model, processor


@pytest.fixture(scope="session")
def tiny_plain_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model of a family that is not packed."""
    folder = tmp_path_factory.mktemp("tiny-idefics3")
    model, processor = build_tiny_idefics3(seed=0)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", params=list(FAMILIES))
def family_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny model of each family in turn; its `config.json` tells which."""
    folder = tmp_path_factory.mktemp(request.param)
    save_family(request.param, folder)
    return folder


@pytest.fixture(scope="session", params=["qwen2_5_vl", "qwen2_vl", "qwen3_vl"])
def packed_folder(
    request: pytest.FixtureRequest,
    tiny_model_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A saved tiny model of each family that is packed in turn."""
    if request.param == "qwen2_5_vl":
        return tiny_model_folder
    folder = tmp_path_factory.mktemp(request.param)
    save_family(request.param, folder)
    return folder
