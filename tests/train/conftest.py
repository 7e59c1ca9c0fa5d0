"""What the training tests share: a few pairs with pictures, and a run of a few steps on them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cwdpo_bench.train.recipe import load_recipe
from cwdpo_bench.train.run import train

SMALL = [
    "trainer.per_device_train_batch_size=4",
    "trainer.gradient_accumulation_steps=1",
    "trainer.learning_rate=1e-3",
    "trainer.warmup_steps=0",
    "trainer.logging_steps=1",
    "trainer.save_steps=2",
    "dynamics.every=2",
    "dynamics.pairs=4",
]


@pytest.fixture(scope="session")
def small() -> list[str]:
    """Overrides that make a run a matter of seconds."""
    return SMALL


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    words = ["red", "blue", "circle", "square", "left", "right", "of", "a"]
    rows = []
    for i in range(24):
        picture = rng.integers(0, 255, (84, 84, 3), dtype=np.uint8)
        Image.fromarray(picture).save(folder / f"{i}.png")
        chosen, rejected = (" ".join(rng.choice(words, 3 + i % 3)) + f" {j}" for j in "ab")
        rows.append(
            {
                "id": f"pair-{i}",
                "images": [f"{i}.png"],
                "prompt": "What is it?",
                "chosen": chosen,
                "rejected": rejected,
            }
        )
    for name, part in (("pairs.jsonl", rows[:20]), ("probe.jsonl", rows[20:])):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


@pytest.fixture
def run(tiny_model_folder: Path, pairs: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def start(
        recipe: str,
        *overrides: str,
        output: str = "out",
        model: Path = tiny_model_folder,
        **kwargs: Any,
    ) -> dict[str, Any]:
        return train(
            load_recipe(recipe, [*SMALL, *overrides]),
            model=str(model),
            data=kwargs.pop("data", pairs / "pairs.jsonl"),
            probe=pairs / "probe.jsonl",
            output=tmp_path / output,
            **kwargs,
        )

    return start


@pytest.fixture(scope="session")
def noise_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen rows with answers and prompts of several lengths, on ten pictures."""
    folder = tmp_path_factory.mktemp("noise-pairs")
    rng = np.random.default_rng(7)
    words = ["red", "blue", "circle", "square", "left", "right", "of", "a"]
    rows = []
    for i in range(10):
        picture = rng.integers(0, 255, (84, 84, 3), dtype=np.uint8)
        Image.fromarray(picture).save(folder / f"{i}.png")
    for i in range(16):
        chosen, rejected = (" ".join(rng.choice(words, 2 + i % 5)) + f" {j}" for j in "ab")
        prompt = "What is it?" if i % 2 else "What is it, and where is it?"
        row = {"id": f"pair-{i}", "images": [f"{i % 10}.png"], "prompt": prompt}
        rows.append({**row, "chosen": chosen, "rejected": rejected})
    data = folder / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return data


@pytest.fixture(scope="session")
def caption_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with two captioned pictures in COCO's layout."""
    root = tmp_path_factory.mktemp("captions")
    (root / "coco" / "val2014").mkdir(parents=True)
    images = []
    for i in range(2):
        name = f"COCO_val2014_{i:012d}.jpg"
        Image.new("RGB", (90, 84), (90 * i, 60, 60)).save(root / "coco" / "val2014" / name)
        sentences = [{"raw": f"a red circle {i}"}, {"raw": "two squares"}]
        image = {"filepath": "val2014", "filename": name, "cocoid": i, "split": "test"}
        images.append({**image, "sentences": sentences})
    (root / "coco" / "dataset_coco.json").write_text(json.dumps({"images": images}))
    return root
