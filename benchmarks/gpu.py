"""Qwen2.5-VL of 3B and 7B on a GPU: our DPO steps beside TRL's, and what of the device they use.

    python benchmarks/gpu.py                   # all shapes, a markdown table: docs/PERFORMANCE.md
    python benchmarks/gpu.py --only 3B --batch 1 --steps 10

Random weights of the published sizes, bfloat16, gradient checkpointing, frozen vision tower, one
image of 900 tokens a pair: 1,152 tokens with the prompt and both answers. Ours and TRL's run by
turns, each in a fresh process; the table shows medians over the runs, by the clock, of the steps
after the warm-up. Tokens are those of a pair, its prompt counted once, on both sides. `plan` is
`memory_plan.py`'s sum for one device without its reserve of 4 GB; the peaks are what torch had
allocated at most, the model included. MFU: `flops.py`, the same work a pair on both sides.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from flops import pair_flops, peak_flops, utilization  # type: ignore[import-not-found]
from memory_plan import REST, Way, plan  # type: ignore[import-not-found]
from shapes import SIZES, Qwen  # type: ignore[import-not-found]
from train_vs_trl import run_trl  # type: ignore[import-not-found]
from workload import (  # type: ignore[import-not-found]
    Shape,
    in_fresh_process,
    make_folder,
    run_ours,
    serve_worker,
)

IMAGE = {"width": 840, "height": 840, "prefix": 952, "completion": 100}
ON_GPU = {"frozen": True, "device": "cuda", "bf16": True, "checkpointing": True}
HEAD = ["shape", "batch", "pairs/s", "TRL", "ratio", "tokens/s", "TRL", "peak GB", "TRL", "plan"]
HEAD += ["MFU", "TRL", "Δ loss"]
BFLOAT16 = 0.05
"""Losses that are nearer are called the same: β times the noise of 100 log-probabilities' sums."""
Runner = Callable[[str, Shape, Path, int], dict[str, Any]]


def shapes(batch: int) -> list[Shape]:
    """What is measured, by the names of the table's rows."""
    return [
        Shape(f"{name}, {way}", **IMAGE, batch=batch, lora=lora, sizes=_fields(name), **ON_GPU)
        for name, way, lora in (
            ("3B", "LoRA r 16", True),
            ("3B", "all but the tower", False),
            ("7B", "LoRA r 16", True),
        )
    ]


def _fields(name: str) -> dict[str, Any]:
    return dataclasses.asdict(SIZES[name])


def row(
    shape: Shape, steps: int, repeats: int, peak: float | None, run: Runner, tolerance: float
) -> str:
    """One row of the table; a side that ran out of memory has no figures.

    Args:
        shape: what is trained.
        steps: update steps of a run.
        repeats: runs a side.
        peak: of the device, FLOP/s.
        run: trains once, in a process of its own.
        tolerance: how far apart the two sides' losses are called the same.
    """
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "trl": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_folder(shape, folder, pairs=steps * shape.batch)
        for _ in range(repeats):
            for side, results in runs.items():
                if (result := _run(run, side, shape, folder, steps)) is not None:
                    results.append(result)
    ours, trl = (_figures(shape, results, peak) for results in runs.values())
    size = Qwen(**shape.sizes)
    planned = plan(
        size, Way("", lora=shape.lora, spread=False), devices=1, tokens=shape.batch * shape.tokens
    )
    cells = [shape.name, str(shape.batch), ours["pairs"], trl["pairs"]]
    cells += [_ratio(runs), ours["tokens"], trl["tokens"], ours["peak"], trl["peak"]]
    cells += [f"{(planned.total - REST) / 1e9:.1f}", ours["mfu"], trl["mfu"]]
    return _line([*cells, _difference(shape, runs, tolerance)])


def _run(run: Runner, side: str, shape: Shape, folder: Path, steps: int) -> dict[str, Any] | None:
    try:
        return run(side, shape, folder, steps)
    except SystemExit as error:
        if "out of memory" not in str(error):
            raise
        return None


def _figures(shape: Shape, results: list[dict[str, Any]], peak: float | None) -> dict[str, str]:
    if not results:
        return dict.fromkeys(("pairs", "tokens", "peak", "mfu"), "out of memory")
    pairs = shape.batch / statistics.median(result["wall_seconds"] for result in results)
    most = statistics.median(r["loaded_bytes"] + r["peak_bytes"] for r in results)
    work = pair_flops(
        Qwen(**shape.sizes), lora=shape.lora, prefix=shape.prefix, completion=shape.completion
    )
    return {
        "pairs": f"{pairs:.2f}",
        "tokens": f"{pairs * shape.tokens:.0f}",
        "peak": f"{most / 1e9:.1f}",
        "mfu": "–" if peak is None else f"{utilization(pairs, work, peak):.0%}",
    }


def _ratio(runs: dict[str, list[dict[str, Any]]]) -> str:
    if not all(runs.values()):
        return "–"
    ours, trl = (statistics.median(r["wall_seconds"] for r in each) for each in runs.values())
    return f"{trl / ours:.2f}×"


def _difference(shape: Shape, runs: dict[str, list[dict[str, Any]]], tolerance: float) -> str:
    if not all(runs.values()):
        return "–"
    pairs = zip(*(each[0]["losses"] for each in runs.values()), strict=True)
    difference = max(abs(one - other) for one, other in pairs)
    return f"{difference:.0e}" + (" (not the same)" if difference > tolerance else "")


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def table_head() -> str:
    """The table's first two lines."""
    return f"{_line(HEAD)}\n|{' --- |' * len(HEAD)}"


def table_not_measured(batch: int = 4) -> str:
    """The table as the documentation has it while no GPU was at hand."""
    unknown = ["not measured"] + [""] * (len(HEAD) - 3)
    return "\n".join(
        [table_head(), *(_line([shape.name, str(batch), *unknown]) for shape in shapes(batch))]
    )


def require_gpu() -> str:
    """The name of the device.

    Raises:
        SystemExit: there is none.
    """
    if not torch.cuda.is_available():
        raise SystemExit(
            "gpu.py measures on a GPU and torch finds none here (torch.cuda.is_available() is "
            "false); run it where there is one. On a CPU: python benchmarks/train_vs_trl.py"
        )
    if find_spec("trl") is None:
        raise SystemExit("gpu.py measures beside TRL: pip install 'cwdpo-bench[grpo]'")
    return torch.cuda.get_device_name()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4, help="pairs a step")
    parser.add_argument("--only", default="", help="shapes whose name holds this text")
    parser.add_argument("--peak-tflops", type=float, help="of a device that flops.py does not list")
    options = parser.parse_args()
    device = require_gpu()
    peak = 1e12 * options.peak_tflops if options.peak_tflops else peak_flops(device)
    rate = "unknown: --peak-tflops" if peak is None else f"{peak / 1e12:.1f} TFLOP/s"
    print(f"{device}, torch {torch.__version__}, peak {rate}\n\n{table_head()}", flush=True)

    def run(side: str, shape: Shape, folder: Path, steps: int) -> dict[str, Any]:
        result: dict[str, Any] = in_fresh_process(__file__, side, shape, folder, steps)
        return result

    for shape in shapes(options.batch):
        if options.only in shape.name:
            print(row(shape, options.steps, options.repeats, peak, run, BFLOAT16), flush=True)


if __name__ == "__main__" and not serve_worker({"ours": run_ours, "trl": run_trl}):
    main()
