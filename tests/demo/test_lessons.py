"""The lessons of pre-training point at the right words, and at nothing else."""

import random

import pytest
import torch

from cwdpo_bench.demo.lessons import LOOK_WEIGHT, Lesson, lesson_loss, lesson_of, reading_lesson
from cwdpo_bench.demo.pretrain import Plan, build_corpus, guided_loss
from cwdpo_bench.demo.questions import KINDS, ask
from cwdpo_bench.demo.tiny import build_processor, build_tiny_vlm
from cwdpo_bench.demo.world import draw_scene
from cwdpo_bench.evaluate.mmbench import mmbench_prompt
from cwdpo_bench.evaluate.mmmu import MULTIPLE_CHOICE, OPEN, mmmu_prompt


@pytest.fixture(scope="module")
def tokenizer():
    return build_processor().tokenizer


def _decoded(tokenizer, ids):
    return tokenizer.decode(ids).strip()


def test_a_lesson_points_at_the_words_of_the_right_option(tokenizer):
    rng = random.Random(0)
    asked = 0
    for _ in range(120):
        scene = draw_scene(rng, "pretraining", twins=rng.random() < 0.3)
        question = ask(scene, rng.choice(tuple(KINDS)), rng) if asked % 2 else reading_lesson(rng)
        if question is None:
            continue
        asked += 1
        for prompt in (
            mmmu_prompt(question.text, question.options, MULTIPLE_CHOICE),
            mmbench_prompt(question.text, question.options, question.hint),
        ):
            lesson = lesson_of(question, prompt, tokenizer)
            ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            assert _decoded(tokenizer, lesson.words) == question.truth
            assert _decoded(tokenizer, [ids[p] for p in lesson.option]) == question.truth
            # The line before it starts with the letter that answers.
            before = tokenizer.decode(ids[: lesson.option[0]]).rsplit("\n", 1)[1]
            assert before.strip() == f"{question.answer}."
    assert asked > 100


def test_a_reading_lesson_names_its_answer():
    rng = random.Random(0)
    for _ in range(50):
        question = reading_lesson(rng)
        assert question.text == f"Where is {question.truth}?"
        assert len(set(question.options)) == len(question.options) >= 2
        assert question.options["ABCD".index(question.answer)] == question.truth


def test_an_open_question_has_words_and_no_option(tokenizer):
    rng = random.Random(0)
    question = ask(draw_scene(rng, "pretraining"), "count", rng, is_open=True)
    lesson = lesson_of(question, mmmu_prompt(question.text, (), OPEN), tokenizer)
    assert lesson.option == []
    assert _decoded(tokenizer, lesson.words) == question.truth


def test_the_loss_is_the_cross_entropy_of_the_words_and_of_the_look():
    generator = torch.Generator().manual_seed(0)
    known = torch.randn(3, 8, generator=generator)
    head = torch.nn.Linear(8, 11)
    looked = torch.rand(3, 4, 6, generator=generator).softmax(-1)
    lessons = [Lesson([4], [1]), Lesson([2, 9], [3, 4]), Lesson([7], [])]
    log_p = torch.log_softmax(known @ head.weight.T + head.bias, -1)
    words = -(log_p[0, 4] + (log_p[1, 2] + log_p[1, 9]) / 2 + log_p[2, 7]) / 3
    masses = torch.stack(
        [looked[0, 0, 1], looked[0, 1, 1], looked[1, 0, 3:5].sum(), looked[1, 1, 3:5].sum()]
    )
    expected = words - LOOK_WEIGHT * masses.log().mean()
    assert lesson_loss(known, looked, head, lessons).item() == pytest.approx(expected.item())
    alone = lesson_loss(known[2:], looked[2:], head, lessons[2:])
    assert alone.item() == pytest.approx(-log_p[2, 7].item())


def test_guidance_reaches_the_layers_that_it_speaks_of():
    model, processor = build_tiny_vlm(0)
    model.set_attn_implementation("eager")
    corpus = build_corpus(Plan(scenes=4), processor)
    for examples in (corpus.questions[:6], corpus.readings[:6]):
        model.zero_grad()
        _, lesson = guided_loss(model, corpus, examples)
        lesson.backward()
        reached = [
            any(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())
            for layer in model.model.language_model.layers
        ]
        # Known after the second layer, looked for by the third; the fourth only writes.
        assert reached == [True, True, True, False]
