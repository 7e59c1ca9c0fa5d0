"""The tiny VLM is a real Qwen2.5-VL whose tokenizer takes any text; the base is bundled."""

import json
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from cwdpo_bench.demo import base_path
from cwdpo_bench.demo.captions import describe, put_in_words
from cwdpo_bench.demo.pretrain import LOG_NAME, Plan, answer_loss, build_corpus, draw_scenes
from cwdpo_bench.demo.questions import KINDS, ask
from cwdpo_bench.demo.tiny import SPECIAL_TOKENS, build_processor, build_tiny_vlm
from cwdpo_bench.demo.world import (
    COLOURS,
    NOVEL_COLOURS,
    NOVEL_SHAPES,
    SHAPES,
    draw_scene,
    render,
)
from cwdpo_bench.evaluate.coco import caption_prompt
from cwdpo_bench.evaluate.mmbench import mmbench_prompt
from cwdpo_bench.vlm import generate, load_vlm
from cwdpo_bench.vlm.batch import Prompt, build_batch, encode_prompts


@pytest.fixture(scope="module")
def processor():
    return build_processor()


@pytest.fixture(scope="module")
def tiny():
    return build_tiny_vlm(0)


@given(text=st.text())
@settings(max_examples=200, deadline=None)
def test_any_text_survives_the_tokenizer(processor, text):
    import unicodedata

    # Qwen's tokenizer normalises to NFC, ours as well; nothing else may change.
    text = unicodedata.normalize("NFC", text)
    for token in SPECIAL_TOKENS:
        text = text.replace(token, "")
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert processor.tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_words_of_the_world_and_option_letters_are_one_token(processor):
    words = [*SHAPES, *COLOURS, *NOVEL_SHAPES, *NOVEL_COLOURS, "background", "left", "shapes"]
    for word in [f" {word}" for word in words] + list("ABCD"):
        assert len(processor.tokenizer(word, add_special_tokens=False)["input_ids"]) == 1, word
    assert 400 < len(processor.tokenizer) < 700


def test_the_same_tokenizer_is_built_each_time(processor):
    assert build_processor().tokenizer.get_vocab() == processor.tokenizer.get_vocab()


def test_an_image_becomes_nine_tokens_in_qwens_chat_form(processor):
    inputs = encode_prompts(processor, [Prompt("hello", (Image.new("RGB", (84, 84)),))])
    text = processor.tokenizer.decode(inputs["input_ids"][0])
    assert text == (
        "<|im_start|>user\n<|vision_start|>" + "<|image_pad|>" * 9 + "<|vision_end|>hello"
        "<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_model_is_tiny_seeded_and_ties_its_embeddings(tiny):
    model, _ = tiny
    assert 1.3e6 < sum(p.numel() for p in model.parameters()) < 1.6e6
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    same, other = build_tiny_vlm(0)[0], build_tiny_vlm(1)[0]
    weight = model.lm_head.weight
    assert torch.equal(weight, same.lm_head.weight)
    assert not torch.equal(weight, other.lm_head.weight)


def test_saved_and_loaded_it_gives_the_same_logits(tiny, tmp_path):
    model, processor = tiny
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32)
    inputs = encode_prompts(
        AutoProcessor.from_pretrained(tmp_path), [Prompt("a", (Image.new("RGB", (84, 84)),))]
    )
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model.eval()(**inputs).logits)


def test_the_corpus_is_encoded_as_the_models_processor_does(tiny):
    model, processor = tiny
    plan = Plan(scenes=6)
    corpus = build_corpus(plan, processor)
    assert len(corpus.captions) == len(corpus.questions) == len(corpus.readings) == 30
    blank = Image.new("RGB", (84, 84))
    example = corpus.captions[3]
    ids = encode_prompts(processor, [Prompt(caption_prompt(), (blank,))])["input_ids"][0]
    assert example.prompt == ids.tolist()
    assert example.completion[-1] == processor.tokenizer.eos_token_id
    # The loss of a padded batch is the token mean over its rows taken one by one.
    rows = [corpus.captions[0], corpus.questions[0], corpus.questions[7]]
    with torch.no_grad():
        alone = [answer_loss(model, corpus, [row]) * len(row.completion) for row in rows]
        together = answer_loss(model, corpus, rows)
    expected = sum(alone) / sum(len(row.completion) for row in rows)
    assert together == pytest.approx(float(expected), abs=1e-4)


def test_careless_annotators_make_the_captions_wrong(tiny):
    _, processor = tiny
    clean = build_corpus(Plan(scenes=40, mistaken_lookalikes=0.0, wrong_answers=0.0), processor)
    assert clean.wrong_captions == 0
    assert 0.3 < build_corpus(Plan(scenes=40), processor).wrong_captions < 0.6
    assert clean.captions[0].image == 0
    assert {e.image for e in clean.questions} == set(range(40))
    assert len(draw_scenes(Plan(), "pretraining", 40)) == 40


class TestBase:
    """The bundled checkpoint."""

    def test_is_small_and_safe(self):
        files = list(base_path().iterdir())
        assert sum(file.stat().st_size for file in files) <= 4 * 2**20
        assert not [file for file in files if file.suffix in {".bin", ".pt", ".py", ".pkl"}]

    def test_captions_what_it_sees(self):
        processor = AutoProcessor.from_pretrained(base_path())
        model = AutoModelForImageTextToText.from_pretrained(base_path(), dtype=torch.float32)
        rng = random.Random(0)
        scenes = [draw_scene(rng, "validation") for _ in range(48)]
        prompts = [Prompt(caption_prompt(), (render(scene, rng),)) for scene in scenes]
        truths = [put_in_words(describe(scene, rng)) for scene in scenes]

        @torch.no_grad()
        def loss(truths):
            batch = build_batch(processor, prompts, truths)
            logits = model(**batch.inputs).logits[:, -batch.targets.shape[1] - 1 : -1]
            nll = torch.nn.functional.cross_entropy(
                logits[batch.mask].float(), batch.targets[batch.mask]
            )
            return float(nll)

        assert loss(truths) < 1.2
        assert loss(truths) + 0.3 < loss(truths[1:] + truths[:1])

    def test_answers_above_chance_and_not_always(self):
        rng = random.Random(0)
        asked, prompts = [], []
        while len(asked) < 150:
            scene = draw_scene(rng, "validation")
            question = ask(scene, rng.choice(tuple(KINDS)), rng)
            if question is not None:
                asked.append(question)
                text = mmbench_prompt(question.text, question.options, question.hint)
                prompts.append(Prompt(text, (render(scene, rng),)))
        letters = ["ABCD"[: len(question.options)] for question in asked]
        answers = generate(load_vlm(base_path()), prompts, max_new_tokens=2, options=letters)
        right = [
            "ABCD"[int(answer.option_logps.argmax())] == question.answer
            for answer, question in zip(answers, asked, strict=True)
        ]
        chance = sum(1 / len(question.options) for question in asked) / len(asked)
        assert chance + 0.12 < sum(right) / len(right) < 0.85

    def test_states_the_run_that_made_it(self):
        entries = [json.loads(line) for line in (base_path() / LOG_NAME).read_text().splitlines()]
        assert 0.4 < entries[0]["wrong_captions"] < 0.5
        assert entries[0]["plan"] == json.loads(json.dumps(Plan().__dict__))
        assert entries[-1]["step"] == Plan().steps
        # Converged: the last fifth of the run brings little more.
        losses = [entry["caption_loss"] for entry in entries if "step" in entry]
        assert losses[-1] > 0.9 * losses[-len(losses) // 5]


def test_every_kind_of_question_is_in_the_corpus(tiny):
    _, processor = tiny
    corpus = build_corpus(Plan(scenes=60), processor)
    texts = [processor.tokenizer.decode(e.prompt) for e in corpus.questions]
    for words in ("How many", "more?", "What color", "Where is", "from the", "odd one", "Which of"):
        assert any(words in text for text in texts), words
    assert len(KINDS) == 7
