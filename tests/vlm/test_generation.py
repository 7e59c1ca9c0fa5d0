"""Greedy answers: equal to plain `generate`, independent of the batch, option scores included."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cwdpo_bench.errors import UserError
from cwdpo_bench.vlm import (
    VLM,
    Prompt,
    embed_images,
    encode_prompt,
    encode_prompts,
    generate,
    load_vlm,
    sample,
    score_completions,
    with_positions,
)
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


def test_samples_are_drawn_from_the_policy_itself(vlm: VLM) -> None:
    """First tokens of many draws against the exact distribution, whatever the model ships."""
    encoded = encode_prompt(vlm.processor, Prompt("Colour?"))
    with torch.no_grad():
        exact = vlm.model(**encoded).logits[0, -1].softmax(-1)
    original = vlm.model.generation_config
    try:
        vlm.model.generation_config = copy.deepcopy(original)
        vlm.model.generation_config.update(temperature=0.1, top_k=1, repetition_penalty=9.0)
        torch.manual_seed(0)
        drawn = sample(vlm, [encoded] * 2000, max_new_tokens=1, batch_size=500)
    finally:
        vlm.model.generation_config = original
    counts = torch.bincount(torch.tensor([answer.ids[0] for answer in drawn]), minlength=len(exact))
    assert 0.5 * (counts / 2000 - exact).abs().sum() < 3 * 0.5 * (exact / 2000).sqrt().sum()
    forbidden = [vlm.model.config.image_token_id, vlm.model.config.video_token_id]
    assert counts[forbidden].sum() == 0


def test_samples_come_in_order_and_end_at_the_end_of_turn(vlm: VLM) -> None:
    prompts = _prompts(5)
    encoded = [encode_prompt(vlm.processor, prompt) for prompt in prompts]
    # At temperature 0 in all but name the samples are the greedy answers.
    cold = sample(vlm, encoded, max_new_tokens=12, temperature=1e-4, batch_size=2)
    greedy = generate(vlm, prompts, max_new_tokens=12)
    assert [s.text for s in cold] == [g.text for g in greedy]
    torch.manual_seed(1)
    drawn = sample(vlm, encoded * 8, max_new_tokens=60, batch_size=40)
    eos = vlm.tokenizer.eos_token_id
    assert any(answer.ended for answer in drawn)
    for answer in drawn:
        assert answer.ended == (answer.ids[-1] == eos)
        assert answer.ids.count(eos) == answer.ended
        assert answer.ended or len(answer.ids) == 60


def test_embeddings_made_beforehand_give_the_same_samples(vlm: VLM) -> None:
    encoded = [encode_prompt(vlm.processor, prompt) for prompt in _prompts(3)]
    embedded = [
        embed_images(vlm.model, with_positions(vlm.model, prompt), vlm.device) for prompt in encoded
    ]
    assert all("pixel_values" not in prompt for prompt in embedded)
    answers = []
    for prompts in (encoded, embedded):
        torch.manual_seed(0)
        answers.append([s.ids for s in sample(vlm, prompts, max_new_tokens=8)])
    assert answers[0] == answers[1]
