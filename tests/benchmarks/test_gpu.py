"""The GPU benchmark: all of it but the device, on a tiny model; its FLOPs against torch's count."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cwdpo_bench.train.data import read_pairs
from cwdpo_bench.train.prepared import PreparedPairs
from cwdpo_bench.train.trainer import PairCollator
from cwdpo_bench.vlm import Batch, completion_statistics

ROOT = Path(__file__).parents[2]
NAMES = ("gpu", "flops", "workload", "shapes", "memory_plan", "train_vs_trl")


@pytest.fixture(scope="module")
def benchmarks() -> Iterator[Any]:
    """The scripts as modules: they find each other where Python puts a script's own folder."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
        for name in NAMES:
            sys.modules.pop(name, None)


def _shape(benchmarks: Any, *, lora: bool) -> Any:
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "window_size": 112}
    vision |= {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
    size = benchmarks.shapes.Qwen("tiny", 3, 128, 192, 4, 2, 1024, lora, 64, vision)
    settings = {"prefix": 40, "completion": 7, "batch": 2, "lora": lora, "frozen": True}
    sizes = dataclasses.asdict(size)
    return benchmarks.workload.Shape("tiny", 112, 112, **settings, sizes=sizes, device="cpu")


def test_without_a_gpu_it_says_so_and_measures_nothing(
    benchmarks: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit, match="measures on a GPU and torch finds none here"):
        benchmarks.gpu.main()
    assert not capsys.readouterr().out


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_the_flops_of_a_pair_are_what_torch_counts(
    lora: bool, benchmarks: Any, tmp_path: Path
) -> None:
    shape = _shape(benchmarks, lora=lora)
    benchmarks.workload.make_folder(shape, tmp_path, pairs=2)
    vlm = benchmarks.workload.load(shape, tmp_path)
    prepared = PreparedPairs(vlm, pairs := read_pairs(tmp_path / "pairs.jsonl").pairs)
    collated = PairCollator(prepared, ("chosen", "rejected"))(list(enumerate(pairs)))
    (tensors,) = (value for name, value in collated.items() if name != "index")
    vlm.model.train()
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        completion_statistics(vlm.model, Batch(**tensors)).logps.sum().backward()
    size = benchmarks.shapes.Qwen(**shape.sizes)
    expected = benchmarks.flops.pair_flops(size, lora=lora, prefix=40, completion=7)
    # Beside the work needed: the prompt's queries in the last layer.
    extra = 2 * (40 - 1) * (128 * 128 + (16 * 2 * 128 if lora else 0))
    assert counter.get_total_flops() / 2 == pytest.approx(expected + extra, rel=0.01)


def test_utilization_is_work_over_time_and_peak(benchmarks: Any) -> None:
    flops = benchmarks.flops
    size = benchmarks.shapes.SIZES["7B"]
    work = flops.pair_flops(size, lora=False, prefix=952, completion=100)
    # Six FLOPs a parameter and token (Kaplan et al., 2020), attention and the last layer aside.
    weights = size.layers * sum(a * b for a, b in size.linears)
    assert work == pytest.approx(6 * weights * 1152, rel=0.1)
    assert flops.utilization(4.0, work, 8.0 * work) == 0.5


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA A10G", 70e12),
        ("Tesla K80", None),
    ],
)
def test_the_peak_is_found_by_the_devices_name(
    name: str, peak: float | None, benchmarks: Any
) -> None:
    assert benchmarks.flops.peak_flops(name) == peak


def test_the_documentations_table_is_the_scripts(benchmarks: Any) -> None:
    text = (ROOT / "docs" / "PERFORMANCE.md").read_text(encoding="utf-8")
    assert benchmarks.gpu.table_not_measured() in text


def test_a_side_without_memory_has_no_figures_and_other_faults_stop(benchmarks: Any) -> None:
    shape = _shape(benchmarks, lora=True)
    result = {"wall_seconds": 0.5, "loaded_bytes": 1e9, "peak_bytes": 2e9, "losses": [0.7]}

    def run(side: str, *_: Any) -> Any:
        if side == "trl":
            raise SystemExit("torch.OutOfMemoryError: CUDA out of memory.")
        return result

    cells = benchmarks.gpu.row(shape, 1, 1, None, run, 0.0).split(" | ")
    assert cells[2:6] == ["4.00", "out of memory", "–", "216"]
    assert cells[7:9] == ["3.0", "out of memory"]
    apart = iter([0.7, 0.9])
    run_apart = lambda *_: {**result, "losses": [next(apart)]}  # noqa: E731
    assert "(not the same)" in benchmarks.gpu.row(shape, 1, 1, None, run_apart, 0.1)

    def fail(*_: Any) -> Any:
        raise SystemExit("KeyError: 'x'")

    with pytest.raises(SystemExit, match="KeyError"):
        benchmarks.gpu.row(shape, 1, 1, None, fail, 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_both_sides_are_measured_and_their_losses_agree(lora: bool, benchmarks: Any) -> None:
    """Everything that runs on a GPU, with the device and the model's size as parameters."""
    pytest.importorskip("trl")
    shape = dataclasses.replace(_shape(benchmarks, lora=lora), checkpointing=True)

    def run(side: str, *given: Any) -> Any:
        return benchmarks.workload.in_fresh_process(benchmarks.gpu.__file__, side, *given)

    cells = benchmarks.gpu.row(shape, 5, 1, 1e9, run, 1e-4).strip("| ").split(" | ")
    assert len(cells) == len(benchmarks.gpu.HEAD)
    assert all(float(cells[place]) > 0 for place in (2, 3, 5, 6))
    assert cells[4].endswith("×")
    assert cells[10].endswith("%")
    assert float(cells[-1]) <= 1e-4
