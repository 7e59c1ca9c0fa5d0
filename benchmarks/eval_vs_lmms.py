"""Our in-process engine beside lmms-eval's own model class: captions and questions a second.

    python benchmarks/eval_vs_lmms.py                # 5 runs each, markdown tables
    python benchmarks/eval_vs_lmms.py --smoke        # two minutes: that it runs

lmms-eval's side is its `qwen2_5_vl` class, asked as its evaluator asks it: `generate_until` on a
list of requests. Both sides get one folder of a tiny Qwen2.5-VL, the same images, prompts, number
of new tokens and one thread, and images at their own size (its default would enlarge them). Both
are measured in bf16, which its class loads whatever the device, and in fp32, which is ours on a
CPU. A caption of ours comes with the statistics of its reference's tokens and a reply with its
options' log-probabilities, as in every run; theirs with neither, so a row of ours has the captions
alone. Each run is a fresh process, sides by turns; the tables show medians, and how many times
slower a side was in the median of the turns. `first` is the time from the start of the process to
its first reply, imports and loading included; rates are from the first request on, before anything
is warm.

The last table is ours alone: the options of each question, of several tokens each, packed behind
one reading of the prompt against one row an option. Needs `pip install lmms-eval==0.7.3 decord`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SIDE = 112
"""Width and height of the images: 16 image tokens."""
SIDES = {
    "captions": {
        "ours": ("ours", 64),
        "ours, the captions alone": ("alone", 64),
        "lmms-eval, batch 1 (its default)": ("lmms", 1),
        "lmms-eval, batch 16": ("lmms", 16),
    },
    "questions": {
        "ours": ("ours", 64),
        "lmms-eval, batch 1 (its default)": ("lmms", 1),
        "lmms-eval, batch 16": ("lmms", 16),
    },
}
"""What is measured, and the prompts a forward."""
DTYPES = ("bfloat16", "float32")
NEW_TOKENS = {"captions": 20, "questions": 16}
WORDS = ("red", "blue", "green", "left", "right", "yellow", "a", "above", "below")
CAPTION = "Provide a one-sentence caption for the provided image."
OPTIONS = 4

Record = dict[str, Any]


def make_folder(folder: Path, samples: int) -> None:
    """A model folder, images, and `captions.json` and `questions.json` with their samples."""
    import numpy as np
    from PIL import Image
    from transformers import Qwen2VLImageProcessor

    from cwdpo_bench.demo.tiny import build_tiny_vlm

    model, processor = build_tiny_vlm(seed=0)
    size: Record = {"min_pixels": 28 * 28, "max_pixels": SIDE * SIDE}
    size.update(patch_size=14, merge_size=2, temporal_patch_size=2)
    processor.image_processor = Qwen2VLImageProcessor(**size)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    rng = np.random.default_rng(0)
    captions, questions = [], []
    for i in range(samples):
        pixels = rng.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        reference = " ".join(rng.choice(WORDS, 10))
        captions.append({"image": f"{i}.png", "prompt": CAPTION, "reference": reference})
        # Lengths differ, as those of real questions do.
        text = " ".join(rng.choice(WORDS, int(rng.integers(8, 24))))
        options = [f"{word} {' '.join(rng.choice(WORDS, 3))}" for word in WORDS[:OPTIONS]]
        listed = "\n".join(f"{'ABCD'[k]}. {option}" for k, option in enumerate(options))
        prompt = f"{text}\n{listed}\nAnswer with the option's letter."
        questions.append({"image": f"{i}.png", "prompt": prompt, "options": options})
    for name, rows in (("captions", captions), ("questions", questions)):
        (folder / f"{name}.json").write_text(json.dumps(rows))


# --- the sides, each in a process of its own -----------------------------------------------------


def ours(
    folder: Path, kind: str, batch_size: int, dtype: str, *, alone: bool = False
) -> Iterator[int]:
    import torch

    # What `cwdpo-bench run` imports before it answers anything.
    import cwdpo_bench.evaluate.run  # noqa: F401
    from cwdpo_bench.evaluate.in_process import InProcessEngine
    from cwdpo_bench.evaluate.samples import MULTIPLE_CHOICE, OPEN, CaptionSample, ChoiceSample
    from cwdpo_bench.vlm import load_vlm

    rows = json.loads((folder / f"{kind}.json").read_text())
    engine = InProcessEngine(
        load_vlm(folder / "model", dtype=getattr(torch, dtype)), folder, batch_size
    )
    images = [Path(row["image"]) for row in rows]
    yield 0
    replies: Iterator[Any]
    if kind == "captions" and not alone:
        captions = [
            CaptionSample(image.name, image, row["prompt"], (row["reference"],))
            for image, row in zip(images, rows, strict=True)
        ]
        replies = engine.answer_captions(captions, max_new_tokens=NEW_TOKENS[kind])
    else:
        questions = [
            ChoiceSample(
                id=image.name,
                cluster=image.name,
                images=(image,),
                prompt=row["prompt"],
                question_type=OPEN if alone else MULTIPLE_CHOICE,
                options=() if alone else tuple(row["options"]),
                gold="A",
            )
            for image, row in zip(images, rows, strict=True)
        ]
        replies = engine.answer_choices(questions, max_new_tokens=NEW_TOKENS[kind])
    for _ in replies:
        yield 1


def theirs(folder: Path, kind: str, batch_size: int, dtype: str) -> Iterator[int]:
    import torch
    from lmms_eval.api.instance import Instance  # type: ignore[import-not-found]
    from lmms_eval.models.simple.qwen2_5_vl import Qwen2_5_VL  # type: ignore[import-not-found]
    from PIL import Image

    rows = json.loads((folder / f"{kind}.json").read_text())
    model = Qwen2_5_VL(
        pretrained=str(folder / "model"),
        device="cpu",
        device_map="cpu",
        batch_size=batch_size,
        min_pixels=28 * 28,
        max_pixels=SIDE * SIDE,
        # Ours has none; an empty one costs it five tokens.
        system_prompt="",
    )
    model._model.to(getattr(torch, dtype))
    # Its evaluator hands it data sets and a function that opens an example's images.
    model.task_dict = {kind: {"test": rows}}
    settings = {"max_new_tokens": NEW_TOKENS[kind], "temperature": 0, "do_sample": False}

    def images(row: Record) -> list[Image.Image]:
        return [Image.open(folder / row["image"]).convert("RGB")]

    requests = [
        Instance(
            request_type="generate_until",
            arguments=(row["prompt"], dict(settings), images, i, kind, "test"),
            idx=0,
            metadata={"task": kind, "doc_id": i, "repeats": 1},
        )
        for i, row in enumerate(rows)
    ]
    arrived: list[int] = []
    model.cache_hook = SimpleNamespace(add_partial=lambda *_: arrived.append(1))
    yield 0
    # It returns all replies at the end; its first is timed on a batch of its own.
    for part in (requests[:batch_size], requests[batch_size:]):
        yield from (1 for _ in model.generate_until(part))


def branches(folder: Path, kind: str, batch_size: int, dtype: str) -> Iterator[int]:
    """Options of several tokens, `packed` behind one reading of the prompt or a `row` each."""
    import torch

    from cwdpo_bench.vlm import Prompt, completion_statistics, generate, load_vlm, open_image
    from cwdpo_bench.vlm.answering import option_ids
    from cwdpo_bench.vlm.batch import append_completions, encode_prompts

    rows = json.loads((folder / "questions.json").read_text())
    vlm = load_vlm(folder / "model", dtype=getattr(torch, dtype))
    yield 0
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        prompts = [Prompt(r["prompt"], (open_image(folder / r["image"], name=""),)) for r in part]
        options = [row["options"] for row in part]
        if kind == "packed":
            generate(vlm, prompts, max_new_tokens=1, batch_size=batch_size, options=options)
        else:
            owners = [row for row in range(len(part)) for _ in range(OPTIONS)]
            ids = [tokens for texts in options for tokens in option_ids(vlm.tokenizer, texts)]
            for first in range(0, len(owners), batch_size):
                span = slice(first, first + batch_size)
                inputs = encode_prompts(vlm.processor, [prompts[i] for i in owners[span]])
                with torch.inference_mode():
                    completion_statistics(vlm.model, append_completions(inputs, ids[span]))
        yield from (1 for _ in part)


def work(side: str, kind: str, batch_size: int, dtype: str, folder: Path, born: float) -> None:
    """Run one side and print what it took, as JSON on the last line."""
    run: dict[str, Callable[[Path, str, int, str], Iterator[int]]] = {
        "ours": ours,
        "alone": partial(ours, alone=True),
        "lmms": theirs,
        "options": branches,
    }
    replies = run[side](folder, kind, batch_size, dtype)
    next(replies)
    clock, busy = time.perf_counter(), time.process_time()
    next(replies)
    first = time.time() - born
    count = 1 + sum(replies)
    record = {
        "first": first,
        "clock": count / (time.perf_counter() - clock),
        "busy": count / (time.process_time() - busy),
    }
    print(json.dumps(record))


# --- measuring -----------------------------------------------------------------------------------


def measure(side: str, kind: str, batch_size: int, dtype: str, folder: Path) -> Record:
    command = [sys.executable, __file__, "--worker", side, kind, str(batch_size), dtype]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command += [str(folder), str(time.time())]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    record: Record = json.loads(done.stdout.splitlines()[-1])
    return record


def measured(
    jobs: dict[str, tuple[str, str, int, str]], folder: Path, runs: int
) -> dict[str, list[Record]]:
    """Every job so many times, by turns."""
    records: dict[str, list[Record]] = {name: [] for name in jobs}
    for turn in range(runs):
        for name in list(jobs) if turn % 2 == 0 else reversed(jobs):
            records[name].append(measure(*jobs[name], folder))
    return records


def table(title: str, records: dict[str, list[Record]]) -> None:
    """A row a side: medians, and how many times slower it is than the first."""
    print(f"| {title} | a second | slower by | a CPU second | slower by | first reply, s |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    best = next(iter(records.values()))
    for name, rows in records.items():
        clock, busy, first = (
            statistics.median(row[key] for row in rows) for key in ("clock", "busy", "first")
        )
        slower, slower_busy = (
            statistics.median(b[key] / row[key] for b, row in zip(best, rows, strict=True))
            for key in ("clock", "busy")
        )
        print(
            f"| {name} | {clock:.1f} | {slower:.1f} × | {busy:.1f} | {slower_busy:.1f} × "
            f"| {first:.1f} |"
        )
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--samples", type=int, default=320)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", default="", help="tables whose title holds this text")
    options = parser.parse_args()
    samples, runs = (20, 1) if options.smoke else (options.samples, options.runs)
    print(f"load of the machine at the start: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_folder(folder, samples)
        for kind in NEW_TOKENS:
            for dtype in DTYPES[:1] if options.smoke else DTYPES:
                title = f"{kind}, {dtype}"
                jobs = {
                    name: (side, kind, size, dtype) for name, (side, size) in SIDES[kind].items()
                }
                if options.only in title:
                    table(title, measured(jobs, folder, runs))
        title = "questions' options, float32"
        jobs = {
            "options behind one prompt": ("options", "packed", 16, "float32"),
            "one row an option": ("options", "row", 16, "float32"),
        }
        if options.only in title:
            table(title, measured(jobs, folder, runs))


if __name__ == "__main__":
    if "--worker" in sys.argv:
        side, kind, size, dtype, folder, born = sys.argv[sys.argv.index("--worker") + 1 :]
        work(side, kind, int(size), dtype, Path(folder), float(born))
    else:
        main()
