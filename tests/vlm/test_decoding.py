"""Our greedy decoding against transformers' own `generate`, token by token."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cwdpo_bench.vlm import VLM, Prompt, decoding, encode_prompts, load_vlm, with_positions
from cwdpo_bench.vlm.decoding import decoding_refusal, greedy, until_end

NEW = 24


@pytest.fixture
def vlm(packed_folder: Path) -> VLM:
    return load_vlm(packed_folder)


def _inputs(vlm: VLM, count: int) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(3)
    texts = ["What?", "How many circles are there in this picture?", "Colour?"]
    prompts = [
        Prompt(texts[i % 3], (Image.fromarray(rng.integers(0, 255, (84, 84, 3), dtype=np.uint8)),))
        for i in range(count)
    ]
    return encode_prompts(vlm.processor, [*prompts, Prompt("Say something.")])


def _generated(vlm: VLM, inputs: dict[str, torch.Tensor]) -> decoding.Greedy:
    with torch.inference_mode():
        return decoding._generate(vlm, inputs, NEW)


def _end_at(vlm: VLM, answers: list[list[int]]) -> None:
    """Let a token end turns that stands in some answers and not first, so that those end early."""
    firsts = {ids[0] for ids in answers}
    found = Counter(token for ids in answers for token in set(ids) - firsts)
    in_some = [token for token, count in found.items() if count < len(answers)]
    vlm.model.generation_config.eos_token_id = max(in_some, key=lambda token: found[token])


def _rows_of_forwards(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    rows: list[int] = []
    plain = vlm.model.forward

    def counted(**given: Any) -> Any:
        rows.append(len(given["input_ids"]))
        return plain(**given)

    monkeypatch.setattr(vlm.model, "forward", counted)
    return rows


def test_tokens_are_those_of_generate_and_ended_answers_leave(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = _inputs(vlm, 8)
    whole = greedy(vlm, inputs, NEW).ids
    _end_at(vlm, whole)
    monkeypatch.setattr(decoding, "KEEP", 1.0)
    rows = _rows_of_forwards(vlm, monkeypatch)

    ours = greedy(vlm, inputs, NEW)
    monkeypatch.undo()
    theirs = _generated(vlm, inputs)

    assert rows[0] == 9 > rows[-1]
    assert ours.ids == theirs.ids
    assert len({len(ids) for ids in ours.ids}) > 1
    ends = decoding.end_tokens(vlm)
    assert ours.ids == [until_end(ids, ends) for ids in whole]
    torch.testing.assert_close(ours.first_logps, theirs.first_logps, atol=1e-4, rtol=0)


def test_in_bf16_answers_part_from_those_of_generate_only_where_two_tokens_are_near(
    packed_folder: Path,
) -> None:
    """Its last bits differ with the shape of a product, and a tie may then go the other way."""
    vlm = load_vlm(packed_folder, dtype=torch.bfloat16)
    inputs = _inputs(vlm, 8)

    ours, theirs = greedy(vlm, inputs, NEW), _generated(vlm, inputs)

    torch.testing.assert_close(ours.first_logps, theirs.first_logps, atol=0.05, rtol=0)
    parted = [
        next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
        for one, other in zip(ours.ids, theirs.ids, strict=True)
    ]
    for row, place in enumerate(parted):
        if place is not None:
            near = _logps_after(vlm, inputs, row, ours.ids[row][:place])
            a, b = near[ours.ids[row][place]], near[theirs.ids[row][place]]
            assert abs(a - b) < 0.1
    assert parted.count(None) >= 5


def _logps_after(
    vlm: VLM, inputs: dict[str, torch.Tensor], row: int, answer: list[int]
) -> torch.Tensor:
    ids = torch.tensor([answer] * len(inputs["input_ids"]), dtype=torch.long)
    grown = {
        **inputs,
        "input_ids": torch.cat([inputs["input_ids"], ids], 1),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(ids)], 1),
    }
    if "mm_token_type_ids" in inputs:
        kinds = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(ids)], 1)
        grown["mm_token_type_ids"] = kinds
    with torch.inference_mode():
        logits: torch.Tensor = vlm.model(**grown).logits[row, -1]
    return logits.float().log_softmax(-1)


def test_what_was_read_of_the_prompts_is_kept_whole(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though rows have left, and whoever grows a branch of it changes nothing."""
    inputs = _inputs(vlm, 8)
    _end_at(vlm, greedy(vlm, inputs, NEW).ids)
    monkeypatch.setattr(decoding, "KEEP", 1.0)
    ours, theirs = greedy(vlm, with_positions(vlm.model, inputs), NEW), _generated(vlm, inputs)
    grown = decoding.branch(ours.cache)
    grown.layers[0].keys = torch.zeros(1)
    assert len(ours.cache.layers) == len(theirs.cache.layers)
    real = inputs["attention_mask"][:, :-1].bool()
    for a, b in zip(ours.cache.layers, theirs.cache.layers, strict=True):
        for mine, other in ((a.keys, b.keys), (a.values, b.values)):
            assert mine.shape == other.shape
            # What stands on the padding is read by no one.
            mine, other = (states.transpose(1, 2)[real] for states in (mine, other))
            torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)


def test_a_single_token_is_the_most_probable_one(vlm: VLM) -> None:
    read = greedy(vlm, _inputs(vlm, 2), 1)
    assert read.ids == [[token] for token in read.first_logps.argmax(-1).tolist()]


# --- what a model's own generation settings ask for ----------------------------------------------


@pytest.fixture
def settings(vlm: VLM) -> Any:
    """The model's generation settings, to be changed."""
    vlm.model.generation_config = copy.deepcopy(vlm.model.generation_config)
    return vlm.model.generation_config


def test_settings_that_families_ship_change_nothing(vlm: VLM, settings: Any) -> None:
    """Those of Qwen's own checkpoints: sampling, and a penalty on repetition."""
    inputs = _inputs(vlm, 4)
    plain = greedy(vlm, inputs, NEW).ids
    settings.update(do_sample=True, temperature=0.1, top_p=0.001, top_k=1, repetition_penalty=1.05)

    assert decoding_refusal(vlm.model) is None
    assert greedy(vlm, inputs, NEW).ids == plain == _generated(vlm, inputs).ids


@pytest.mark.parametrize(
    "asked",
    [
        {"no_repeat_ngram_size": 1},
        {"min_new_tokens": NEW},
        {"suppress_tokens": list(range(200))},
        {"bad_words_ids": [[token] for token in range(200)]},
    ],
)
def test_what_is_not_done_here_is_left_to_generate(
    vlm: VLM, settings: Any, asked: dict[str, Any]
) -> None:
    inputs = _inputs(vlm, 8)
    plain = greedy(vlm, inputs, NEW).ids
    if "min_new_tokens" in asked:
        _end_at(vlm, plain)
    settings.update(**asked)

    found = greedy(vlm, inputs, NEW).ids

    assert next(iter(asked)) in str(decoding_refusal(vlm.model))
    assert found == _generated(vlm, inputs).ids
    if "no_repeat_ngram_size" in asked:
        assert all(len(set(ids)) == len(ids) for ids in found)
    elif "min_new_tokens" in asked:
        assert {len(ids) for ids in found} == {NEW}
    else:
        assert all(token >= 200 for ids in found for token in ids)
