"""Pre-train the base of the demo from its seed: `python -m cwdpo_bench.demo.pretrain`.

The base stands for a pre-trained VLM: it converges on a noisy corpus, in which a stated share of
the captions is wrong in one attribute and of the answers is wrong at all, so that every benchmark
leaves room both ways. The scenes are of the `pretraining` split, which no other data may hold.

First the vision tower learns to see (`demo/sight.py`), then the whole model to speak. There a
step is one batch of captions and one of questions, each padded for itself; the loss is the mean
over the captions' tokens plus the mean over the answers' tokens.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from cwdpo_bench.demo.captions import ATTRIBUTES, describe, falsify, put_in_words
from cwdpo_bench.demo.questions import KINDS, OPEN_KINDS, Question, ask, misread
from cwdpo_bench.demo.sight import learn_to_see
from cwdpo_bench.demo.tiny import build_tiny_vlm
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
    sight_steps: int = 250
    sight_learning_rate: float = 2e-3
    steps: int = 1400
    captions_per_step: int = 24
    questions_per_step: int = 24
    scenes: int = 8000
    captions_per_scene: int = 5
    questions_per_scene: int = 5
    striped_share: float = 0.3
    twin_share: float = 0.15
    open_share: float = 0.25
    wrong_captions: float = 0.3
    wrong_answers: float = 0.1
    learning_rate: float = 1.5e-3
    warmup_share: float = 0.05
    weight_decay: float = 0.01


@dataclass(frozen=True)
class Example:
    """A prompt and its completion in token ids, and the number of its scene's image."""

    image: int
    prompt: list[int]
    completion: list[int]


@dataclass(frozen=True)
class Corpus:
    """Images through the processor, in half precision, and what is said of them.

    Attributes:
        scenes: what the images show.
        pixels: [images, 36, 1176].
        grid: [3], frames, rows and columns of patches, the same for each image.
        captions: five an image, some wrong.
        questions: in the prompts of MMMU and MMBench, some answers wrong.
    """

    scenes: list[Scene]
    pixels: torch.Tensor
    grid: torch.Tensor
    captions: list[Example]
    questions: list[Example]


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
    pixels, grid = encode_images([render(scene, rng) for scene in scenes], processor)
    encode = _Encoder(processor, int(grid.prod()) // processor.image_processor.merge_size**2)
    captions, questions = [], []
    for number, scene in enumerate(scenes):
        for _ in range(plan.captions_per_scene):
            said = describe(scene, rng)
            if rng.random() < plan.wrong_captions:
                said = falsify(said, scene, rng, ATTRIBUTES) or said
            captions.append(encode(number, caption_prompt(), put_in_words(said)))
        for question in draw_questions(scene, rng, plan):
            prompt = question_prompt(question, rng)
            heard = misread(question, rng) if rng.random() < plan.wrong_answers else question
            questions.append(encode(number, prompt, heard.answer))
    return Corpus(scenes, pixels, grid, captions, questions)


def encode_images(
    images: Sequence[Image.Image], processor: Any, chunk: int = 500
) -> tuple[torch.Tensor, torch.Tensor]:
    """The processor's patches [images, patches, values] in half precision, and their grid [3]."""
    parts = []
    for start in range(0, len(images), chunk):
        encoded = processor.image_processor(
            images=list(images[start : start + chunk]), return_tensors="pt"
        )
        grid = encoded["image_grid_thw"][0]
        parts.append(encoded["pixel_values"].view(-1, int(grid.prod()), 1176).half())
    return torch.cat(parts), grid


class _Encoder:
    """Token ids as the processor makes them, without running it on each image again."""

    def __init__(self, processor: Any, image_tokens: int) -> None:
        self._processor = processor
        self._image_tokens = image_tokens
        self._blank = Image.new("RGB", (28, 28))

    def __call__(self, image: int, prompt: str, completion: str) -> Example:
        text = chat_text(self._processor, Prompt(prompt, (self._blank,)))
        pad = self._processor.image_token
        text = text.replace(pad, pad * self._image_tokens)
        tokenizer = self._processor.tokenizer
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return Example(image, ids, completion_ids(tokenizer, completion))


def answer_loss(model: Any, corpus: Corpus, examples: Sequence[Example]) -> torch.Tensor:
    """Mean cross-entropy over the completions' tokens, rows padded on the right."""
    width = max(len(e.prompt) + len(e.completion) for e in examples)
    ids = torch.full((len(examples), width), model.config.text_config.pad_token_id)
    labels = torch.full_like(ids, -100)
    attention = torch.zeros_like(ids)
    for row, example in enumerate(examples):
        start, end = len(example.prompt), len(example.prompt) + len(example.completion)
        ids[row, :end] = torch.tensor(example.prompt + example.completion)
        labels[row, start:end] = torch.tensor(example.completion)
        attention[row, :end] = 1
    numbers = [example.image for example in examples]
    logits = model(
        input_ids=ids,
        attention_mask=attention,
        mm_token_type_ids=(ids == model.config.image_token_id).long(),
        pixel_values=corpus.pixels[numbers].flatten(0, 1).float(),
        image_grid_thw=corpus.grid.expand(len(numbers), 3),
        use_cache=False,
    ).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
    )


def _epochs(examples: list[Example], size: int, rng: random.Random) -> Iterator[list[Example]]:
    """Batches without end, shuffled anew each time all were seen."""
    while True:
        order = rng.sample(examples, len(examples))
        yield from (order[i : i + size] for i in range(0, len(order) - size + 1, size))


def pretrain(plan: Plan, log: list[dict[str, Any]]) -> tuple[Any, Any]:
    """Train from scratch; every 50th step is appended to `log`. Returns model and processor."""
    model, processor = build_tiny_vlm(plan.seed)
    started = time.monotonic()
    corpus = build_corpus(plan, processor)
    log.append({"plan": asdict(plan), "corpus_seconds": round(time.monotonic() - started, 1)})
    print(log[-1], flush=True)
    seen = learn_to_see(
        model,
        corpus.pixels,
        corpus.grid,
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
    streams = (
        _epochs(corpus.captions, plan.captions_per_step, rng),
        _epochs(corpus.questions, plan.questions_per_step, rng),
    )
    model.train()
    sums = torch.zeros(2)
    started = time.monotonic()
    for step in range(1, plan.steps + 1):
        losses = [answer_loss(model, corpus, next(batches)) for batches in streams]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        sums += torch.stack(losses).detach()
        if step % 50 == 0 or step == plan.steps:
            done = (step - 1) % 50 + 1
            caption, answer = (sums / done).tolist()
            sums.zero_()
            log.append(
                {
                    "step": step,
                    "caption_loss": round(caption, 4),
                    "answer_loss": round(answer, 4),
                    "learning_rate": schedule.get_last_lr()[0],
                    "seconds": round(time.monotonic() - started, 1),
                }
            )
            print(log[-1], flush=True)
    return model.eval(), processor


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
    parser.add_argument("--output", type=Path, default=BASE)
    parser.add_argument("--seed", type=int, default=Plan.seed)
    parser.add_argument("--steps", type=int, default=Plan.steps)
    arguments = parser.parse_args()
    log: list[dict[str, Any]] = []
    model, processor = pretrain(Plan(seed=arguments.seed, steps=arguments.steps), log)
    save(model, processor, log, arguments.output)


if __name__ == "__main__":
    main()
