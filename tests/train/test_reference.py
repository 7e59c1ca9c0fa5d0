"""Reference log-probabilities on disk: read again where they fit, refused where they don't."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from cwdpo_bench.errors import UserError
from cwdpo_bench.train.data import Pair, read_pairs
from cwdpo_bench.train.reference import Reference, kept_reference, reference_fingerprint
from cwdpo_bench.train.terms import SequenceScores
from cwdpo_bench.train.trainer import reference_scores
from cwdpo_bench.vlm import VLM, load_vlm

VIEWS = ("chosen", "rejected")


@pytest.fixture(scope="module")
def vlm(tiny_model_folder: Path) -> VLM:
    return load_vlm(tiny_model_folder)


@pytest.fixture
def pairs(noise_pairs: Path) -> list[Pair]:
    return read_pairs(noise_pairs).pairs[:4]


def _never() -> Reference:
    raise AssertionError("computed again")


def _fingerprint(vlm: VLM, pairs: list[Pair], precision: str = "float32") -> dict[str, str]:
    return reference_fingerprint(vlm.model, vlm.processor, pairs, precision)


def test_kept_scores_are_read_again_to_the_last_bit(
    vlm: VLM, pairs: list[Pair], tmp_path: Path
) -> None:
    path = tmp_path / "stage" / "reference.safetensors"
    first = kept_reference(
        path, _fingerprint(vlm, pairs), VIEWS, lambda: reference_scores(vlm, pairs, 3)
    )
    again = kept_reference(path, _fingerprint(vlm, pairs), VIEWS, _never)
    for view in VIEWS:
        for a, b in zip(first[view], again[view], strict=True):
            assert torch.equal(a, b)


def test_a_model_loaded_again_has_the_same_fingerprint(
    vlm: VLM, pairs: list[Pair], tmp_path: Path
) -> None:
    vlm.model.save_pretrained(tmp_path)
    vlm.processor.save_pretrained(tmp_path)
    assert _fingerprint(load_vlm(tmp_path), pairs) == _fingerprint(vlm, pairs)


def test_the_order_of_scoring_changes_no_score(vlm: VLM, noise_pairs: Path) -> None:
    """Pairs are scored by length; each score must come back to its own pair."""
    pairs = read_pairs(noise_pairs).pairs
    together = reference_scores(vlm, pairs, 5)
    for i, pair in enumerate(pairs):
        alone = reference_scores(vlm, [pair], 1)
        for view in VIEWS:
            torch.testing.assert_close(
                together[view].logp[i], alone[view].logp[0], atol=1e-4, rtol=0
            )


def _changed(what: str, vlm: VLM, pairs: list[Pair], folder: Path) -> Any:
    if what == "weights":
        model = load_vlm(vlm.name).model
        with torch.no_grad():
            next(model.parameters()).view(-1)[0] += 1e-6
        return reference_fingerprint(model, vlm.processor, pairs, "float32")
    if what == "image":
        # Another picture under the same name.
        source = pairs[0].images[0]
        assert isinstance(source, Path)
        other = folder / source.name
        other.write_bytes(source.read_bytes() + b"\0")
        return _fingerprint(vlm, [dataclasses.replace(pairs[0], images=(other,)), *pairs[1:]])
    if what == "answer":
        return _fingerprint(vlm, [dataclasses.replace(pairs[0], rejected="other"), *pairs[1:]])
    if what == "order":
        return _fingerprint(vlm, pairs[::-1])
    if what == "processor":
        processor = load_vlm(vlm.name).processor
        processor.chat_template += " "
        return reference_fingerprint(vlm.model, processor, pairs, "float32")
    return _fingerprint(vlm, pairs, "bfloat16")


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("weights", "the reference's weights"),
        ("image", "the pairs or their images"),
        ("answer", "the pairs or their images"),
        ("order", "the pairs or their images"),
        ("processor", "the processor"),
        ("precision", "the precision"),
    ],
)
def test_scores_of_something_else_are_refused(
    what: str, words: str, vlm: VLM, pairs: list[Pair], tmp_path: Path
) -> None:
    path = tmp_path / "reference.safetensors"
    scores = {view: SequenceScores(torch.ones(4), torch.ones(4)) for view in VIEWS}
    kept_reference(path, _fingerprint(vlm, pairs), VIEWS, lambda: scores)
    other = _changed(what, vlm, pairs, tmp_path)
    with pytest.raises(UserError, match=rf"not the same are {words}; .*delete the file"):
        kept_reference(path, other, VIEWS, _never)
    assert path.is_file()


def test_scores_of_other_views_are_refused(vlm: VLM, pairs: list[Pair], tmp_path: Path) -> None:
    path = tmp_path / "reference.safetensors"
    scores = {"chosen": SequenceScores(torch.ones(4), torch.ones(4))}
    kept_reference(path, _fingerprint(vlm, pairs), ("chosen",), lambda: scores)
    with pytest.raises(UserError, match="the answers that the objective scores"):
        kept_reference(path, _fingerprint(vlm, pairs), VIEWS, _never)


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04"])
def test_a_foreign_file_is_refused(
    content: bytes, vlm: VLM, pairs: list[Pair], tmp_path: Path
) -> None:
    path = tmp_path / "reference.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match="not a file of reference log-probabilities; delete it"):
        kept_reference(path, _fingerprint(vlm, pairs), VIEWS, _never)
