"""The fast path follows the trajectory of the plain one: packed or not, in one batch or in parts.

Each run is one step of plain gradient descent, so that the change of the weights is the gradient.
"""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainingArguments

from cwdpo_bench.train.data import Pair, read_pairs
from cwdpo_bench.train.prepared import PreparedPairs
from cwdpo_bench.train.sections import DPO, SFTC, Objective
from cwdpo_bench.train.terms import needed_views, needs_reference
from cwdpo_bench.train.trainer import (
    PairCollator,
    PreferenceTrainer,
    autocast_of,
    reference_scores,
)
from cwdpo_bench.vlm import VLM, Batch, completion_statistics, freeze_vision, load_vlm

FAMILIES = ["tiny_model_folder", "tiny_plain_folder"]
RATE = 0.1
A_DPO = DPO(kind="dpo", beta=0.5)


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def pairs(noise_pairs: Path) -> list[Pair]:
    return read_pairs(noise_pairs).pairs[:8]


def _train(
    folder: Path,
    pairs: list[Pair],
    objective: Objective,
    tmp_path: Path,
    *,
    packed: bool | None = None,
    frozen: bool = False,
    **arguments: Any,
) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """The change of the weights over the learning rate, and the log."""
    vlm = load_vlm(folder, device="cpu")
    if frozen:
        freeze_vision(vlm.model)
    before = {name: p.detach().clone() for name, p in vlm.model.named_parameters()}
    settings = TrainingArguments(
        **{
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 8,
            "max_steps": 1,
            "optim": "sgd",
            "learning_rate": RATE,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "remove_unused_columns": False,
            "use_cpu": True,
            **arguments,
        }
    )
    prepared = PreparedPairs(vlm, pairs, autocast=lambda: autocast_of(settings))
    views = needed_views(objective)
    reference = None
    if needs_reference(objective):
        reference = reference_scores(
            vlm, pairs, 8, views, prepared=prepared, autocast=lambda: autocast_of(settings)
        )
    trainer = PreferenceTrainer(
        model=vlm.model,
        args=settings,
        data_collator=PairCollator(prepared, views, packed=packed),
        objective=objective,
        pairs=pairs,
        reference=reference,
        cooling=None,
        lengths=[prepared.length(pair) for pair in pairs],
    )
    trainer.train()
    after = dict(vlm.model.named_parameters())
    change = {name: (before[name] - after[name].detach()) / RATE for name in before}
    return change, [line for line in trainer.state.log_history if "loss" in line]


def _assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert sum(value.norm() ** 2 for value in a.values()) > 1e-4
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], atol=1e-4, rtol=1e-3, msg=name)


def test_packed_steps_are_plain_steps(
    tiny_model_folder: Path, pairs: list[Pair], tmp_path: Path
) -> None:
    packed, log = _train(tiny_model_folder, pairs, A_DPO, tmp_path)
    plain, plain_log = _train(tiny_model_folder, pairs, A_DPO, tmp_path, packed=False)
    _assert_same(packed, plain)
    for name, value in log[0].items():
        if name == "rewards/accuracies":
            continue  # the sign of rounding: margins are 0 before the first step
        assert value == pytest.approx(plain_log[0][name], abs=1e-4), name


def test_dpo_in_eight_parts_is_dpo_in_one_batch(
    folder: Path, pairs: list[Pair], tmp_path: Path
) -> None:
    whole, log = _train(folder, pairs, A_DPO, tmp_path)
    parts, parts_log = _train(
        folder,
        pairs,
        A_DPO,
        tmp_path,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=8,
    )
    _assert_same(whole, parts)
    for name in ("loss", "logps/chosen", "mean_logps/rejected"):
        assert log[0][name] == pytest.approx(parts_log[0][name], abs=1e-4), name


@pytest.mark.parametrize(
    "threshold", [pytest.param(100.0, id="always active"), pytest.param(-1.0, id="never active")]
)
def test_sft_c_in_parts_is_exact_where_the_penalty_acts_in_all_parts_or_in_none(
    threshold: float, folder: Path, pairs: list[Pair], tmp_path: Path
) -> None:
    objective = SFTC.model_validate({"kind": "sft-c", "lambda": 0.5, "threshold": threshold})
    whole, log = _train(folder, pairs, objective, tmp_path)
    parts, parts_log = _train(
        folder,
        pairs,
        objective,
        tmp_path,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=8,
    )
    _assert_same(whole, parts)
    assert log[0]["loss"] == pytest.approx(parts_log[0]["loss"], abs=1e-4)


def test_sft_c_in_parts_is_an_upper_bound_where_the_penalty_acts_in_some(
    tiny_model_folder: Path, pairs: list[Pair], tmp_path: Path
) -> None:
    """ReLU is convex: the mean of the parts' penalties is at least the penalty of the mean."""
    vlm = load_vlm(tiny_model_folder)
    nll = -reference_scores(vlm, pairs, 8)["rejected"].mean_logp
    objective = SFTC.model_validate(
        {"kind": "sft-c", "lambda": 1.0, "threshold": nll.mean().item()}
    )
    _, log = _train(tiny_model_folder, pairs, objective, tmp_path)
    _, parts_log = _train(
        tiny_model_folder,
        pairs,
        objective,
        tmp_path,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=8,
    )
    gap = torch.relu(nll.mean() - nll).mean().item()
    assert gap > 1e-2
    assert parts_log[0]["loss"] - log[0]["loss"] == pytest.approx(gap, abs=1e-3)


def test_gradient_checkpointing_changes_no_gradient(
    folder: Path, pairs: list[Pair], tmp_path: Path
) -> None:
    plain, _ = _train(folder, pairs, A_DPO, tmp_path)
    checkpointed, _ = _train(folder, pairs, A_DPO, tmp_path, gradient_checkpointing=True)
    _assert_same(plain, checkpointed)


def test_a_frozen_tower_leaves_the_rest_of_the_gradient(
    folder: Path, pairs: list[Pair], tmp_path: Path
) -> None:
    whole, _ = _train(folder, pairs, A_DPO, tmp_path)
    frozen, _ = _train(folder, pairs, A_DPO, tmp_path, frozen=True)
    still = {name for name, value in frozen.items() if not value.any()}
    assert any("vision" in name or "visual" in name for name in still)
    _assert_same({n: v for n, v in frozen.items() if n not in still}, whole)


def test_mixed_precision_starts_at_its_reference(
    folder: Path, pairs: list[Pair], tmp_path: Path
) -> None:
    """Reference and policy share bf16, so Δ = 0: the first loss is log 2, to the last digits."""
    _, full = _train(folder, pairs, A_DPO, tmp_path)
    change, log = _train(folder, pairs, A_DPO, tmp_path, bf16=True)
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert all(torch.isfinite(value).all() for value in change.values())
    assert log[0]["logps/chosen"] == pytest.approx(full[0]["logps/chosen"], rel=0.02)
    assert log[0]["logps/chosen"] != full[0]["logps/chosen"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_score_in_fp32(
    dtype: torch.dtype, folder: Path, pairs: list[Pair]
) -> None:
    vlm = load_vlm(folder, dtype=dtype)
    half = reference_scores(vlm, pairs, 4)["chosen"]
    full = reference_scores(load_vlm(folder), pairs, 4)["chosen"]
    assert half.logp.dtype == torch.float32
    torch.testing.assert_close(half.logp, full.logp, atol=0.5, rtol=0.02)


def _saved_bytes(vlm: VLM, batch: Batch) -> int:
    """Bytes that autograd keeps between forward and backward, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in vlm.model.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        completion_statistics(vlm.model, batch).logps.sum()
    return sum(seen.values())


def test_activation_memory_does_not_grow_with_vocabulary_times_length(
    folder: Path, pairs: list[Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    from cwdpo_bench.vlm import logprobs

    kept = []
    for vocabulary in (3000, 12000):
        vlm = load_vlm(folder)
        vlm.model.resize_token_embeddings(vocabulary)
        collate = PairCollator(PreparedPairs(vlm), ("chosen", "rejected"))
        batch = Batch(**collate(list(enumerate(pairs)))["own"])
        # Blocks of four tokens: the whole would be some hundred times the larger vocabulary.
        monkeypatch.setattr(
            logprobs.token_statistics,
            "__kwdefaults__",
            {**(logprobs.token_statistics.__kwdefaults__ or {}), "max_block": 4 * vocabulary},
        )
        kept.append(_saved_bytes(vlm, batch))
    tokens = int(batch.mask.sum())
    assert kept[1] - kept[0] < 0.05 * tokens * (12000 - 3000) * 4


SCRIPT = """
import sys
from pathlib import Path
from safetensors.torch import save_file
sys.path.insert(0, str(Path(sys.argv[1]).parent))
import importlib.util
spec = importlib.util.spec_from_file_location("fast_path", sys.argv[1])
tests = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tests)
folder, data, output, batch = Path(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]), sys.argv[5]
import os
change, _ = tests._train(
    folder, tests.read_pairs(data).pairs[:8], tests.A_DPO, output,
    per_device_train_batch_size=int(batch), ddp_backend="gloo",
    train_sampling_strategy="sequential",
)
if os.environ.get("RANK", "0") == "0":
    save_file({k: v.contiguous() for k, v in change.items()}, output / "change.safetensors")
"""


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_two_processes_are_one(
    family: str, request: pytest.FixtureRequest, noise_pairs: Path, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(family)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    changes = []
    for processes in (1, 2):
        output = tmp_path / str(processes)
        output.mkdir()
        values = [__file__, folder, noise_pairs, output, 8 // processes]
        launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [sys.executable, "-m", *launcher, script, *values]
        done = subprocess.run(
            [str(part) for part in command], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        changes.append(load_file(output / "change.safetensors"))
    _assert_same(*changes)
