"""What several rooms' tests share: a saved tiny model, built once a session."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

from cwdpo_bench.demo.tiny import build_tiny_vlm

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
