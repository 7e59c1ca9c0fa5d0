"""Prepared pairs: what is kept is what the processor gives, bounded, and skips the frozen tower."""

from __future__ import annotations

import errno
import logging
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cwdpo_bench.errors import UserError
from cwdpo_bench.train import prepared
from cwdpo_bench.train.data import Pair, read_pairs
from cwdpo_bench.train.prepared import PreparedPairs
from cwdpo_bench.train.trainer import reference_scores
from cwdpo_bench.vlm import VLM, encode_prompt, freeze_vision, load_vlm
from cwdpo_bench.vlm.vision import IMAGE_EMBEDDINGS

FAMILIES = ["tiny_model_folder", "tiny_plain_folder"]


@pytest.fixture(params=FAMILIES)
def vlm(request: pytest.FixtureRequest) -> VLM:
    return load_vlm(request.getfixturevalue(request.param))


@pytest.fixture
def pairs(noise_pairs: Path) -> list[Pair]:
    return read_pairs(noise_pairs).pairs


def test_kept_prompts_are_what_the_processor_gives(vlm: VLM, pairs: list[Pair]) -> None:
    prepared = PreparedPairs(vlm, pairs)
    for pair, prompt in zip(pairs, prepared.prompts(pairs), strict=True):
        expected = encode_prompt(vlm.processor, pair.open())
        assert prompt.keys() - {"position_ids"} == expected.keys()
        for name, value in expected.items():
            assert torch.equal(prompt[name], value), name


def test_an_image_that_several_pairs_share_is_kept_once(
    vlm: VLM, pairs: list[Pair], tmp_path: Path
) -> None:
    kept = PreparedPairs(vlm, pairs, folder=tmp_path).provenance()
    assert kept["images"] == 10
    assert kept["kind"] == "pixels"
    assert kept["images_prepared_each_step"] == 0
    one = PreparedPairs(vlm, pairs[:1]).provenance()["bytes"]
    assert kept["bytes"] == 10 * one
    # The file has no name: nothing is left behind, however the process ends.
    assert not list(tmp_path.iterdir())


def test_beyond_the_bound_images_are_prepared_each_step(
    vlm: VLM, pairs: list[Pair], caplog: pytest.LogCaptureFixture
) -> None:
    one = PreparedPairs(vlm, pairs[:1]).provenance()["bytes"]
    with caplog.at_level(logging.WARNING):
        prepared = PreparedPairs(vlm, pairs, limit=3.5 * one)
    kept = prepared.provenance()
    assert kept["bytes"] == 3 * one
    assert kept["images"] == 3
    assert kept["images_prepared_each_step"] == 7
    assert "7 of 10 images are prepared in each step" in caplog.text
    whole = PreparedPairs(vlm, pairs)
    for a, b in zip(prepared.prompts(pairs), whole.prompts(pairs), strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_embeddings_of_a_frozen_tower_score_as_its_pixels_do_without_it(
    vlm: VLM, pairs: list[Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    from_pixels = reference_scores(vlm, pairs, 4)
    freeze_vision(vlm.model)
    prepared = PreparedPairs(vlm, pairs)
    assert prepared.provenance()["kind"] == "embeddings"
    tower = (
        vlm.model.model.visual
        if hasattr(vlm.model.model, "visual")
        else (vlm.model.model.vision_model)
    )

    def called(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the tower ran")

    monkeypatch.setattr(tower, "forward", called)
    from_embeddings = reference_scores(vlm, pairs, 4, prepared=prepared)
    for view, scores in from_pixels.items():
        torch.testing.assert_close(from_embeddings[view].logp, scores.logp, atol=1e-4, rtol=0)


def test_a_batch_with_an_image_beyond_the_bound_goes_by_its_pixels(
    vlm: VLM, pairs: list[Pair]
) -> None:
    freeze_vision(vlm.model)
    one = PreparedPairs(vlm, pairs[:1]).provenance()["bytes"]
    prepared = PreparedPairs(vlm, pairs, limit=2 * one)
    assert all(IMAGE_EMBEDDINGS in prompt for prompt in prepared.prompts(pairs[:2]))
    assert all("pixel_values" in prompt for prompt in prepared.prompts(pairs[:3]))
    expected = reference_scores(vlm, pairs[:3], 3)
    got = reference_scores(vlm, pairs[:3], 3, prepared=prepared)
    torch.testing.assert_close(got["chosen"].logp, expected["chosen"].logp, atol=1e-4, rtol=0)


def test_half_precision_keeps_pixels_as_the_model_casts_them(
    tiny_model_folder: Path, pairs: list[Pair]
) -> None:
    vlm = load_vlm(tiny_model_folder, dtype=torch.bfloat16)
    prompt = PreparedPairs(vlm, pairs).prompts(pairs[:1])[0]
    expected = encode_prompt(vlm.processor, pairs[0].open())["pixel_values"].bfloat16()
    assert torch.equal(prompt["pixel_values"], expected)


def test_a_full_disk_is_one_clear_error(
    tiny_model_folder: Path, pairs: list[Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        def write(self, data: bytes) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    # The images' file alone; that of the tokens is `train/kept_pairs.py`'s.
    fake = SimpleNamespace(TemporaryFile=lambda dir: Full(), gettempdir=tempfile.gettempdir)
    monkeypatch.setattr(prepared, "tempfile", fake)
    with pytest.raises(UserError, match=r"No space left on device.*data\.pixel_cache_gb"):
        PreparedPairs(load_vlm(tiny_model_folder), pairs)
