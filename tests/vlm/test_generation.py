"""Greedy answers: equal to plain `generate`, independent of the batch, option scores included."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cwdpo_bench.errors import UserError
from cwdpo_bench.vlm import VLM, Prompt, encode_prompts, generate, load_vlm, score_completions
from cwdpo_bench.vlm.generation import option_token_ids


@pytest.fixture(scope="module")
def vlm(tiny_model_folder: Path) -> VLM:
    return load_vlm(tiny_model_folder)


def _prompts(count: int) -> list[Prompt]:
    rng = np.random.default_rng(1)
    pictures = rng.integers(0, 255, (count, 84, 84, 3), dtype=np.uint8)
    texts = ["What is it?", "How many circles are there in this picture?", "Colour?"]
    return [Prompt(texts[i % 3], (Image.fromarray(p),)) for i, p in enumerate(pictures)]


def test_answers_do_not_depend_on_the_batch(vlm: VLM) -> None:
    prompts = _prompts(7)
    options = [["A", "B", "C"] if i % 2 else None for i in range(7)]
    one = generate(vlm, prompts, max_new_tokens=6, batch_size=1, options=options)
    many = generate(vlm, prompts, max_new_tokens=6, batch_size=7, options=options)
    assert [a.text for a in one] == [a.text for a in many]
    assert [a.tokens for a in one] == [a.tokens for a in many]
    for a, b, letters in zip(one, many, options, strict=True):
        assert (a.option_logps is None) == (b.option_logps is None) == (letters is None)
        if letters is not None:
            np.testing.assert_allclose(a.option_logps, b.option_logps, atol=1e-4)


def test_option_scores_are_those_of_the_first_answer_token(vlm: VLM) -> None:
    prompt = _prompts(1)
    answer = generate(vlm, prompt, max_new_tokens=2, options=[["A", "B", "C", "D"]])[0]
    with torch.no_grad():
        logps = vlm.model(**encode_prompts(vlm.processor, prompt)).logits[0, -1].log_softmax(-1)
    expected = logps[option_token_ids(vlm.tokenizer, ["A", "B", "C", "D"])]
    np.testing.assert_allclose(answer.option_logps, expected.numpy(), atol=1e-5)


def test_answers_are_greedy_whatever_the_model_ships(vlm: VLM) -> None:
    """A model's own sampling settings must not make an evaluation random."""
    prompts = _prompts(3)
    plain = [a.text for a in generate(vlm, prompts, max_new_tokens=6)]
    original = vlm.model.generation_config
    try:
        import copy

        vlm.model.generation_config = copy.deepcopy(original)
        vlm.model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=9.0)
        assert [a.text for a in generate(vlm, prompts, max_new_tokens=6)] == plain
    finally:
        vlm.model.generation_config = original


def test_letters_that_share_a_token_are_refused(vlm: VLM) -> None:
    with pytest.raises(UserError, match="one token"):
        option_token_ids(vlm.tokenizer, ["A", "A"])


def test_scores_come_in_the_given_order_with_their_own_lengths(vlm: VLM) -> None:
    prompts = _prompts(5)
    completions = ["a", "a red circle", "two", "left of the blue square", "x"]
    together = score_completions(vlm, prompts, completions, batch_size=4)
    for prompt, completion, scores in zip(prompts, completions, together, strict=True):
        alone = score_completions(vlm, [prompt], [completion])[0]
        assert len(scores.logps) == len(vlm.tokenizer(completion)["input_ids"]) + 1
        np.testing.assert_allclose(scores.logps, alone.logps, atol=1e-4)
        np.testing.assert_allclose(scores.entropies, alone.entropies, atol=1e-4)
        assert scores.tv is None


def test_the_shift_to_another_model_is_measured_both_ways_alike(
    vlm: VLM, tiny_model_folder: Path
) -> None:
    other = load_vlm(tiny_model_folder)
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    prompts, completions = _prompts(3), ["a circle"] * 3
    there = score_completions(vlm, prompts, completions, reference=other)
    back = score_completions(other, prompts, completions, reference=vlm)
    for a, b in zip(there, back, strict=True):
        assert a.tv is not None
        assert b.tv is not None
        assert a.tv.max() > 1e-3
        np.testing.assert_allclose(a.tv, b.tv, atol=1e-5)
        np.testing.assert_allclose(a.js, b.js, atol=1e-5)
