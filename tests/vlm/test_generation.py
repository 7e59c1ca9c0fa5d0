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
    append_completions,
    completion_statistics,
    embed_images,
    encode_prompt,
    encode_prompts,
    generate,
    load_vlm,
    sample,
    score_completions,
    with_positions,
)
from cwdpo_bench.vlm.answering import option_ids


@pytest.fixture(scope="module")
def vlm(tiny_model_folder: Path) -> VLM:
    return load_vlm(tiny_model_folder)


def _prompts(count: int) -> list[Prompt]:
    rng = np.random.default_rng(1)
    pictures = rng.integers(0, 255, (count, 84, 84, 3), dtype=np.uint8)
    texts = ["What is it?", "How many circles are there in this picture?", "Colour?"]
    return [Prompt(texts[i % 3], (Image.fromarray(p),)) for i, p in enumerate(pictures)]


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


def test_an_answer_ends_where_the_models_context_does(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = _prompts(5)
    whole = generate(vlm, prompts, max_new_tokens=20)
    lengths = [encode_prompt(vlm.processor, p)["input_ids"].shape[1] for p in prompts]
    context = max(lengths) + 3
    monkeypatch.setattr(VLM, "context_length", property(lambda _: context))
    for batch_size in (1, 5):
        cut = generate(vlm, prompts, max_new_tokens=20, batch_size=batch_size)
        for answer, full, length in zip(cut, whole, lengths, strict=True):
            assert answer.tokens == min(full.tokens, context - length)
            assert full.text.startswith(answer.text)
    assert {length + 3 for length in lengths} != {context}
    assert any(answer.tokens < full.tokens for answer, full in zip(cut, whole, strict=True))


@pytest.mark.parametrize("options", [["A", "A"], ["two", "A", "two"]])
def test_options_that_nothing_tells_apart_are_refused(vlm: VLM, options: list[str]) -> None:
    with pytest.raises(UserError, match="alike"):
        option_ids(vlm.tokenizer, options)


def test_an_empty_option_is_refused(vlm: VLM) -> None:
    with pytest.raises(UserError, match="is empty"):
        option_ids(vlm.tokenizer, ["A", ""])


TEXTS = ["a red circle left of two", "a", "a red", "blue", "B"]


@pytest.fixture(scope="module", params=["packed", "plain"])
def either(request: pytest.FixtureRequest, tiny_plain_folder: Path, vlm: VLM) -> VLM:
    return vlm if request.param == "packed" else load_vlm(tiny_plain_folder)


def test_options_of_several_tokens_get_the_sum_over_their_tokens(either: VLM) -> None:
    """Against one forward of its own for every option."""
    prompts = _prompts(4)
    options = [TEXTS, None, TEXTS[:2], ["A", "B"]]
    answers = generate(either, prompts, max_new_tokens=5, batch_size=4, options=options)
    plain = generate(either, prompts, max_new_tokens=5, batch_size=4)
    assert [a.text for a in answers] == [a.text for a in plain]
    assert answers[1].option_logps is None
    for prompt, answer, texts in zip(prompts, answers, options, strict=True):
        inputs = encode_prompts(either.processor, [prompt])
        for place, ids in enumerate(option_ids(either.tokenizer, texts or [])):
            batch = append_completions(inputs, [ids])
            with torch.no_grad():
                expected = completion_statistics(either.model, batch).logps.sum()
            assert answer.option_logps is not None
            assert answer.option_logps[place] == pytest.approx(expected.item(), abs=1e-4)


def test_a_completion_is_scored_on_what_was_read_for_the_answer(either: VLM) -> None:
    prompts = [*_prompts(3), Prompt("Say something."), *_prompts(1)]
    completions = ["a red circle", "two", "x", "left of the blue square and of two", "a"]
    answers = generate(
        either, prompts, max_new_tokens=6, batch_size=3, completions=completions, reference=either
    )
    oracle = score_completions(either, prompts, completions, batch_size=5)
    alone = [generate(either, [prompt], max_new_tokens=6)[0] for prompt in prompts]
    assert [a.text for a in answers] == [a.text for a in alone]
    for answer, expected in zip(answers, oracle, strict=True):
        scores = answer.scores
        assert scores is not None
        assert scores.tv is not None
        assert scores.js is not None
        np.testing.assert_allclose(scores.logps, expected.logps, atol=1e-4)
        np.testing.assert_allclose(scores.entropies, expected.entropies, atol=1e-4)
        np.testing.assert_allclose(
            scores.top1_probabilities, expected.top1_probabilities, atol=1e-4
        )
        np.testing.assert_array_equal(scores.top1_correct, expected.top1_correct)
        # Read two ways, from the cache and in a row of its own, it is one distribution.
        assert scores.tv.max() < 1e-4
        assert abs(scores.js).max() < 1e-4


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
