"""Pre-train the base of the demo from its seed: `python -m cwdpo_bench.demo.pretrain`.

The base stands for a pre-trained VLM: it converges on a noisy corpus, whose annotators take some
colours and shapes for others and get some answers wrong, so that every benchmark leaves room both
ways. The scenes are of the `pretraining` split, which no other data may hold.

First the vision tower learns to see (`demo/sight.py`), then the whole model to speak. There a
step is one batch each of captions, questions and reading lessons, each padded for itself; the loss
is the sum of their means over tokens, plus the guidance of `demo/lessons.py` for the latter two.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from cwdpo_bench.demo.captions import describe, is_true, misperceive, put_in_words
from cwdpo_bench.demo.lessons import KNOWS, LOOKS, Lesson, lesson_loss, lesson_of, reading_lesson
from cwdpo_bench.demo.questions import KINDS, OPEN_KINDS, Question, ask, misread
from cwdpo_bench.demo.sight import Images, learn_to_see
from cwdpo_bench.demo.tiny import WIDTH, build_tiny_vlm, text_sizes
from cwdpo_bench.demo.tiny_llava import build_tiny_llava
from cwdpo_bench.demo.world import Scene, Split, draw_scene, render
from cwdpo_bench.evaluate.coco import caption_prompt
from cwdpo_bench.evaluate.mmbench import mmbench_prompt
from cwdpo_bench.evaluate.mmmu import MULTIPLE_CHOICE, OPEN, mmmu_prompt
from cwdpo_bench.files import write_text
from cwdpo_bench.vlm.batch import Prompt, chat_text, completion_ids

BASE = Path(__file__).parent / "base"
LOG_NAME = "pretrain_log.jsonl"


@dataclass(frozen=True)
class Plan:
    """How the base is made; the bundled one has these values."""

    seed: int = 0
    width: int = WIDTH
    sight_steps: int = 700
    sight_learning_rate: float = 2e-3
    steps: int = 1900
    captions_per_step: int = 24
    questions_per_step: int = 32
    readings_per_step: int = 12
    scenes: int = 8000
    captions_per_scene: int = 5
    questions_per_scene: int = 5
    striped_share: float = 0.3
    twin_share: float = 0.15
    open_share: float = 0.25
    mistaken_lookalikes: float = 0.6
    wrong_answers: float = 0.1
    learning_rate: float = 1.5e-3
    warmup_share: float = 0.05
    weight_decay: float = 0.01


class Architecture(NamedTuple):
    """How an untrained model is built from a seed and a width, and how its base is made."""

    build: Callable[[int, int], tuple[Any, Any]]
    plan: Plan


ARCHITECTURES = {
    "qwen2.5-vl": Architecture(build_tiny_vlm, Plan()),
    # A tower that sees each cell as one flat patch takes longer to tell the shapes apart.
    "llava": Architecture(build_tiny_llava, Plan(sight_steps=2400)),
}


@dataclass(frozen=True)
class Example:
    """A prompt and its completion in token ids.

    Attributes:
        image: the number of its scene's image, None for a text alone.
        prompt: through the chat template.
        completion: the end-of-turn token included.
        lesson: of a question, what is to be known before it is answered.
    """

    image: int | None
    prompt: list[int]
    completion: list[int]
    lesson: Lesson | None = None


@dataclass(frozen=True)
class Corpus:
    """Images and what is said of them.

    Attributes:
        scenes: what the images show.
        images: of the scenes.
        captions: five an image, some wrong.
        questions: in the prompts of MMMU and MMBench, some answers wrong.
        readings: questions without an image that name their answer.
        wrong_captions: the share that says something false.
    """

    scenes: list[Scene]
    images: Images
    captions: list[Example]
    questions: list[Example]
    readings: list[Example]
    wrong_captions: float


def draw_scenes(plan: Plan, split: Split, number: int) -> list[Scene]:
    """Scenes of the training domain, no two alike."""
    rng = random.Random(f"{plan.seed}:{split}:scenes")
    scenes: dict[str, Scene] = {}
    while len(scenes) < number:
        scene = draw_scene(
            rng,
            split,
            style="striped" if rng.random() < plan.striped_share else "plain",
            twins=rng.random() < plan.twin_share,
        )
        scenes.setdefault(scene.key, scene)
    return list(scenes.values())


def draw_questions(scene: Scene, rng: random.Random, plan: Plan) -> list[Question]:
    """Questions of random kinds, a share of those that can be open asked so."""
    questions: list[Question] = []
    while len(questions) < plan.questions_per_scene:
        kind = rng.choice(tuple(KINDS))
        is_open = kind in OPEN_KINDS and rng.random() < plan.open_share
        question = ask(scene, kind, rng, is_open=is_open)
        if question is not None:
            questions.append(question)
    return questions


def question_prompt(question: Question, rng: random.Random) -> str:
    """The prompt in which MMMU or MMBench would ask it."""
    if not question.options:
        return mmmu_prompt(question.marked_text, (), OPEN)
    if rng.random() < 0.5:
        return mmmu_prompt(question.marked_text, question.options, MULTIPLE_CHOICE)
    return mmbench_prompt(question.text, question.options, question.hint)


def build_corpus(plan: Plan, processor: Any) -> Corpus:
    """Render, caption and question every scene; all prompts go through the chat template."""
    rng = random.Random(f"{plan.seed}:corpus")
    scenes = draw_scenes(plan, "pretraining", plan.scenes)
    images = encode_images([render(scene, rng) for scene in scenes], processor)
    encode = _Encoder(processor)
    captions, questions, wrong = [], [], 0
    for number, scene in enumerate(scenes):
        for _ in range(plan.captions_per_scene):
            said = describe(misperceive(scene, rng, plan.mistaken_lookalikes), rng)
            wrong += not is_true(said, scene)
            captions.append(encode(number, caption_prompt(), put_in_words(said)))
        for question in draw_questions(scene, rng, plan):
            prompt = question_prompt(question, rng)
            heard = misread(question, rng) if rng.random() < plan.wrong_answers else question
            questions.append(encode(number, prompt, heard.answer, heard))
    lessons = [reading_lesson(rng) for _ in questions]
    readings = [encode(None, question_prompt(q, rng), q.answer, q) for q in lessons]
    return Corpus(scenes, images, captions, questions, readings, wrong / len(captions))


def encode_images(images: Sequence[Image.Image], processor: Any, chunk: int = 500) -> Images:
    """The images as the processor cuts them."""
    parts, grid = [], None
    for start in range(0, len(images), chunk):
        encoded = processor.image_processor(
            images=list(images[start : start + chunk]), return_tensors="pt"
        )
        pixels = encoded["pixel_values"]
        if "image_grid_thw" in encoded:
            grid = encoded["image_grid_thw"][0]
            pixels = pixels.view(-1, int(grid.prod()), pixels.shape[-1])
        parts.append(pixels.half())
    return Images(torch.cat(parts), grid)


class _Encoder:
    """Token ids as the processor makes them, without running it on each image again."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._blank = Image.new("RGB", (28, 28))
        shown = processor(text=[processor.image_token], images=[[self._blank]])["input_ids"][0]
        self._image_tokens = list(shown).count(processor.image_token_id)

    def __call__(
        self, image: int | None, prompt: str, completion: str, question: Question | None = None
    ) -> Example:
        images = () if image is None else (self._blank,)
        text = chat_text(self._processor, Prompt(prompt, images))
        pad = self._processor.image_token
        text = text.replace(pad, pad * self._image_tokens)
        tokenizer = self._processor.tokenizer
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        lesson = None if question is None else lesson_of(question, text, tokenizer)
        return Example(image, ids, completion_ids(tokenizer, completion), lesson)


def answer_loss(model: Any, corpus: Corpus, examples: Sequence[Example]) -> torch.Tensor:
    """Mean cross-entropy over the completions' tokens."""
    return _forward(model, corpus, examples)[0]


def guided_loss(model: Any, corpus: Corpus, examples: Sequence[Example]) -> torch.Tensor:
    """The two losses of questions: that of the answers, and that of their lessons; [2]."""
    answers, output = _forward(
        model, corpus, examples, output_hidden_states=True, output_attentions=True
    )
    rows = torch.arange(len(examples))
    ends = torch.tensor([len(example.prompt) - 1 for example in examples])
    known = model.model.language_model.norm(output.hidden_states[KNOWS][rows, ends])
    looked = output.attentions[LOOKS][rows, :, ends]
    lessons = [example.lesson for example in examples if example.lesson is not None]
    return torch.stack([answers, lesson_loss(known, looked, model.lm_head, lessons)])


def _forward(
    model: Any, corpus: Corpus, examples: Sequence[Example], **asked: bool
) -> tuple[torch.Tensor, Any]:
    """The mean cross-entropy over the completions and the model's output, padded on the right."""
    width = max(len(e.prompt) + len(e.completion) for e in examples)
    ids = torch.full((len(examples), width), model.config.text_config.pad_token_id)
    labels = torch.full_like(ids, -100)
    attention = torch.zeros_like(ids)
    for row, example in enumerate(examples):
        start, end = len(example.prompt), len(example.prompt) + len(example.completion)
        ids[row, :end] = torch.tensor(example.prompt + example.completion)
        labels[row, start:end] = torch.tensor(example.completion)
        attention[row, :end] = 1
    numbers = [example.image for example in examples if example.image is not None]
    inputs = corpus.images.inputs(numbers) if numbers else {}
    if corpus.images.grid is not None:
        inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).long()
    output = model(input_ids=ids, attention_mask=attention, use_cache=False, **inputs, **asked)
    loss = torch.nn.functional.cross_entropy(
        output.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
    )
    return loss, output


def _epochs(examples: list[Example], size: int, rng: random.Random) -> Iterator[list[Example]]:
    """Batches without end, shuffled anew each time all were seen."""
    while True:
        order = rng.sample(examples, len(examples))
        yield from (order[i : i + size] for i in range(0, len(order) - size + 1, size))


def pretrain(
    plan: Plan, log: list[dict[str, Any]], architecture: str = "qwen2.5-vl"
) -> tuple[Any, Any]:
    """Train from scratch; every 50th step is appended to `log`. Returns model and processor."""
    model, processor = ARCHITECTURES[architecture].build(plan.seed, plan.width)
    started = time.monotonic()
    corpus = build_corpus(plan, processor)
    log.append(
        {
            "plan": asdict(plan),
            "wrong_captions": round(corpus.wrong_captions, 3),
            "corpus_seconds": round(time.monotonic() - started, 1),
        }
    )
    print(log[-1], flush=True)
    seen = learn_to_see(
        model,
        corpus.images,
        corpus.scenes,
        steps=plan.sight_steps,
        learning_rate=plan.sight_learning_rate,
        seed=plan.seed,
    )
    log.append({"sight_accuracy": round(seen, 3), "seconds": round(time.monotonic() - started, 1)})
    print(log[-1], flush=True)
    # A short memory of squared gradients suits a run of some thousand steps.
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=plan.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=plan.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, plan.learning_rate, total_steps=plan.steps, pct_start=plan.warmup_share
    )
    rng = random.Random(f"{plan.seed}:order")
    captions = _epochs(corpus.captions, plan.captions_per_step, rng)
    questions = _epochs(corpus.questions, plan.questions_per_step, rng)
    readings = _epochs(corpus.readings, plan.readings_per_step, rng)
    # Only this implementation gives out the attention that the lessons guide.
    model.set_attn_implementation("eager")
    model.train()
    sums = torch.zeros(len(_LOSSES))
    started = time.monotonic()
    for step in range(1, plan.steps + 1):
        losses = torch.cat(
            [
                answer_loss(model, corpus, next(captions))[None],
                guided_loss(model, corpus, next(questions)),
                guided_loss(model, corpus, next(readings)),
            ]
        )
        optimizer.zero_grad()
        losses.sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        sums += losses.detach()
        if step % _EVERY == 0 or step == plan.steps:
            means = (sums / ((step - 1) % _EVERY + 1)).tolist()
            sums.zero_()
            log.append(
                {
                    "step": step,
                    **{name: round(mean, 4) for name, mean in zip(_LOSSES, means, strict=True)},
                    "learning_rate": schedule.get_last_lr()[0],
                    "seconds": round(time.monotonic() - started, 1),
                }
            )
            print(log[-1], flush=True)
    model.set_attn_implementation("sdpa")
    return model.eval(), processor


_LOSSES = ("caption_loss", "answer_loss", "lesson_loss", "reading_loss", "reading_lesson_loss")
_EVERY = 50


def save(model: Any, processor: Any, log: Sequence[dict[str, Any]], folder: Path) -> None:
    """Write the checkpoint in half precision with the log of its run."""
    folder.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(folder)
    processor.save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)
    write_text(folder / LOG_NAME, "".join(json.dumps(entry) + "\n" for entry in log))


def main() -> None:
    """Pre-train and save; the defaults make the bundled base again."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--architecture", choices=sorted(ARCHITECTURES), default="qwen2.5-vl")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--seed", type=int, default=Plan.seed)
    parser.add_argument("--steps", type=int, default=Plan.steps)
    parser.add_argument(
        "--width", type=int, default=WIDTH, help="of the language model, a multiple of 64"
    )
    arguments = parser.parse_args()
    try:
        text_sizes(arguments.width)
    except ValueError as error:
        parser.error(f"--{error}")
    output = arguments.output
    if output is None:
        if (arguments.architecture, arguments.width) != ("qwen2.5-vl", WIDTH):
            parser.error(f"--output FOLDER: the bundled base is the Qwen one of width {WIDTH}")
        output = BASE
    log: list[dict[str, Any]] = []
    plan = replace(
        ARCHITECTURES[arguments.architecture].plan,
        seed=arguments.seed,
        width=arguments.width,
        steps=arguments.steps,
    )
    model, processor = pretrain(plan, log, arguments.architecture)
    save(model, processor, log, output)


if __name__ == "__main__":
    main()
