"""Every family trains, is saved, loads where it should, and is scored: full and with LoRA."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from cwdpo_bench.evaluate.run import run_tasks
from cwdpo_bench.train.data import read_pairs
from cwdpo_bench.train.trainer import reference_scores
from cwdpo_bench.vlm import VLM, load_vlm

pytestmark = pytest.mark.slow


def _scores(vlm: VLM, pairs: Path) -> torch.Tensor:
    rows = read_pairs(pairs / "probe.jsonl").pairs
    return reference_scores(vlm, rows, 4)["chosen"].logp


@pytest.mark.parametrize("lora", [False, True])
def test_two_steps_then_plain_transformers_and_peft_and_a_run(
    lora: bool,
    family_folder: Path,
    run: Callable[..., dict[str, Any]],
    pairs: Path,
    caption_root: Path,
    tmp_path: Path,
) -> None:
    run(
        "dpo",
        "trainer.max_steps=2",
        f"lora.enabled={str(lora).lower()}",
        model=family_folder,
    )
    trained = load_vlm(tmp_path / "out")
    expected = _scores(trained, pairs)
    assert not torch.equal(expected, _scores(load_vlm(family_folder), pairs))
    if lora:
        from peft import PeftModel

        base = AutoModelForImageTextToText.from_pretrained(family_folder, dtype=torch.float32)
        plain = PeftModel.from_pretrained(base, tmp_path / "out")
    else:
        plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32)
    elsewhere = VLM(plain.eval(), trained.processor, "plain")
    torch.testing.assert_close(_scores(elsewhere, pairs), expected, atol=1e-4, rtol=0)
    folder = run_tasks(
        tmp_path / "out", tasks=["coco"], data_root=caption_root, output=tmp_path / "run"
    )
    assert folder.results["tasks"]["coco"]["n"] == 2
