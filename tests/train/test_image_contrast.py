"""Pairs whose rejected answer stands under an image of its own, and scores under other images."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cwdpo_bench.train.data import read_pairs
from cwdpo_bench.train.prepared import PreparedPairs
from cwdpo_bench.train.trainer import PairCollator, reference_scores
from cwdpo_bench.vlm import (
    Batch,
    build_batch,
    completion_statistics,
    load_vlm,
    sequence_logps,
)

VIEWS = ["chosen", "rejected", "chosen_no_image", "chosen_masked"]


@pytest.fixture
def contrast(pairs: Path) -> Path:
    """The pairs, every second one with the same answer under another image as the worse side."""
    rows = [json.loads(line) for line in (pairs / "pairs.jsonl").read_text().splitlines()]
    for i, row in enumerate(rows):
        if i % 2:
            row.update(rejected=row["chosen"], rejected_images=[f"{(i + 1) % len(rows)}.png"])
    file = pairs / "contrast.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_every_view_is_scored_under_its_image(contrast: Path, tiny_model_folder: Path) -> None:
    """Oracle: one plain row a view, with the prompt and the image that the view says."""
    vlm, rows = load_vlm(tiny_model_folder), read_pairs(contrast).pairs[:4]
    scores = reference_scores(vlm, rows, 4, VIEWS)
    for i, pair in enumerate(rows):
        plain = pair.open()
        other = pair.rejected_images or pair.images
        shown = {
            "chosen": plain,
            "rejected": dataclasses.replace(pair, images=other).open(),
            "chosen_no_image": plain._replace(images=()),
        }
        for view, prompt in shown.items():
            answer = pair.rejected if view == "rejected" else pair.chosen
            assert answer is not None
            batch = build_batch(vlm.processor, [prompt], [answer])
            with torch.no_grad():
                expected = sequence_logps(completion_statistics(vlm.model, batch).logps)
            assert scores[view].logp[i].item() == pytest.approx(expected.item(), abs=1e-4)
    chosen, masked = scores["chosen"].logp, scores["chosen_masked"].logp
    assert (chosen - masked).abs().min() > 1e-6
    # The same answer under another image is another score, from which the loss can learn.
    assert (chosen - scores["rejected"].logp)[1::2].abs().min() > 1e-6


def test_packed_and_plain_rows_of_all_views_agree(contrast: Path, tiny_model_folder: Path) -> None:
    vlm, rows = load_vlm(tiny_model_folder), read_pairs(contrast).pairs[:4]
    prepared = PreparedPairs(vlm)
    items = list(enumerate(rows))
    packed, plain = (PairCollator(prepared, VIEWS, packed=p)(items) for p in (True, False))
    assert packed.keys() == plain.keys()
    assert packed.keys() == {"index", "own", "rejected_image", "no_image", "masked"}
    for image in packed.keys() - {"index"}:
        with torch.no_grad():
            a, b = (
                sequence_logps(completion_statistics(vlm.model, Batch(**c[image])).logps)
                for c in (packed, plain)
            )
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


@pytest.mark.parametrize("recipe", ["dpo", "v-dpo"])
@pytest.mark.parametrize("lora", ["true", "false"])
def test_preference_recipes_train_on_image_contrast(
    recipe: str, lora: str, contrast: Path, run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    run(recipe, f"lora.enabled={lora}", "trainer.max_steps=2", data=contrast)
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    for side in ("chosen", "rejected"):
        assert history[0][f"rewards/{side}"] == pytest.approx(0, abs=1e-5)
    if recipe == "dpo":
        assert history[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
