"""Our DPO steps beside TRL's: the same model folder, pairs, batches and settings, on this machine.

    python benchmarks/train_vs_trl.py                # all shapes, 3 runs each, a markdown table
    python benchmarks/train_vs_trl.py --smoke        # seconds: that it runs and the losses agree

Ours and TRL's run by turns, each in a fresh process; the table shows medians. `steps` is the ratio
of pairs a second over the update steps in processor time, `wall` the same by the clock, which other
work on the machine disturbs; `whole` counts everything after the model is loaded, also our
preparation of the images and our reference scores, for one epoch over the pairs. Memory is the
peak above the loaded model. All losses are compared to 1e-4 before a row is printed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from workload import (  # type: ignore[import-not-found]
    BETA,
    Meter,
    Shape,
    arguments,
    in_fresh_process,
    load,
    make_folder,
    run_ours,
    serve_worker,
)

COCO = {"width": 644, "height": 476, "prefix": 415, "completion": 11, "batch": 8}
TINY = {"width": 112, "height": 112, "prefix": 30, "completion": 11, "batch": 16}
SHAPES = [
    Shape("tiny, LoRA", **TINY, lora=True, frozen=True),
    Shape("tiny, full", **TINY),
    Shape("COCO, LoRA", **COCO, lora=True, frozen=True),
    Shape("COCO, full", **COCO),
    Shape("COCO, vision frozen", **COCO, frozen=True),
]
HEAD = ["shape", "pairs/s", "TRL", "steps", "wall", "whole", "MiB", "TRL MiB", "memory", "Δ loss"]
FIGURES = ("step_seconds", "wall_seconds", "total_seconds", "peak_bytes")
SMOKE = [Shape("smoke", 112, 112, 30, 11, 2), Shape("smoke LoRA", 112, 112, 30, 11, 2, True, True)]


def run_trl(shape: Shape, folder: Path, steps: int) -> dict[str, Any]:
    from datasets import Dataset, Image
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    from cwdpo_bench.train.data import read_pairs
    from cwdpo_bench.vlm.batch import chat_text

    vlm = load(shape, folder)
    pairs = read_pairs(folder / "pairs.jsonl").pairs
    end = vlm.tokenizer.eos_token
    rows = [
        {
            "images": [str(source) for source in pair.images],
            "prompt": chat_text(vlm.processor, pair.open()),
            "chosen": pair.chosen + end,
            "rejected": pair.rejected + end,
        }
        for pair in pairs
    ]
    data = Dataset.from_list(rows).cast_column("images", [Image()])
    # TRL loads the reference of a fully trained model from the model's folder; random weights have
    # none.
    reference = None if shape.lora or shape.sizes is None else load(shape, folder).model
    meter = Meter()
    trainer = DPOTrainer(
        model=vlm.model,
        ref_model=reference,
        args=DPOConfig(**arguments(shape, folder, steps), beta=BETA, max_length=None),
        train_dataset=data,
        processing_class=vlm.processor,
        callbacks=[meter],
    )
    trainer.train()
    result: dict[str, Any] = meter.result(trainer)
    return result


def compare(shape: Shape, steps: int, repeats: int) -> str:
    """One row of the table."""
    runs: dict[str, list[Any]] = {"ours": [], "trl": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_folder(shape, folder, pairs=steps * shape.batch)
        for _ in range(repeats):
            for worker, results in runs.items():
                results.append(in_fresh_process(__file__, worker, shape, folder, steps))
    largest = max(
        abs(a - b) for a, b in zip(runs["ours"][0]["losses"], runs["trl"][0]["losses"], strict=True)
    )
    if not largest <= 1e-4:
        raise SystemExit(f"{shape.name}: losses differ by {largest:.2e}")
    ours, trl = (
        {key: statistics.median(run[key] for run in results) for key in FIGURES}
        for results in runs.values()
    )
    cells = [
        shape.name,
        f"{shape.batch / ours['step_seconds']:.1f}",
        f"{shape.batch / trl['step_seconds']:.1f}",
        f"{trl['step_seconds'] / ours['step_seconds']:.2f}×",
        f"{trl['wall_seconds'] / ours['wall_seconds']:.2f}×",
        f"{trl['total_seconds'] / ours['total_seconds']:.2f}×",
        f"{ours['peak_bytes'] / 2**20:.0f}",
        f"{trl['peak_bytes'] / 2**20:.0f}",
        f"{ours['peak_bytes'] / trl['peak_bytes']:.2f}×",
        f"{largest:.0e}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="", help="shapes whose name holds this text")
    options = parser.parse_args()
    steps, repeats = (5, 1) if options.smoke else (options.steps, options.repeats)
    print(f"| {' | '.join(HEAD)} |\n|{' --- |' * len(HEAD)}", flush=True)
    for shape in SMOKE if options.smoke else SHAPES:
        if options.only in shape.name:
            print(compare(shape, steps, repeats), flush=True)


if __name__ == "__main__" and not serve_worker({"ours": run_ours, "trl": run_trl}):
    main()
