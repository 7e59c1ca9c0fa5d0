"""Exported checkpoints answer as the checkpoint does, in plain transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from cwdpo_bench.errors import UserError
from cwdpo_bench.train.data import read_pairs
from cwdpo_bench.train.export import export_checkpoint
from cwdpo_bench.train.trainer import reference_scores
from cwdpo_bench.vlm import VLM, load_vlm


def _scores(vlm: VLM, pairs: Path) -> torch.Tensor:
    return reference_scores(vlm, read_pairs(pairs / "probe.jsonl").pairs, 4)["chosen"].logp


@pytest.mark.parametrize("overrides", [[], ["lora.rslora=true"], ["lora.dora=true"]])
def test_a_merged_adapter_is_a_plain_model(
    overrides: list[str], run: Callable[..., dict[str, Any]], pairs: Path, tmp_path: Path
) -> None:
    run("sft", "lora.enabled=true", "trainer.max_steps=3", *overrides)
    said = export_checkpoint(str(tmp_path / "out"), tmp_path / "merged", merge=True)
    assert said == "an adapter merged into its base"
    assert not list((tmp_path / "merged").glob("adapter*"))
    plain = VLM(
        AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32),
        AutoProcessor.from_pretrained(tmp_path / "merged"),
        "plain",
    )
    expected = _scores(load_vlm(tmp_path / "out"), pairs)
    torch.testing.assert_close(_scores(plain, pairs), expected, atol=1e-4, rtol=0)
    record = json.loads((tmp_path / "merged" / "provenance.json").read_text())
    assert record["exported"]["merged"] is True
    assert record["recipe"] == "sft"
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    keys = {"lora.rslora=true": "use_rslora", "lora.dora=true": "use_dora"}
    assert all(config[key] == (name in overrides) for name, key in keys.items())


def test_an_adapter_is_not_merged_unasked(
    run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    run("sft", "lora.enabled=true", "trainer.max_steps=1")
    with pytest.raises(UserError, match="--merge"):
        export_checkpoint(str(tmp_path / "out"), tmp_path / "merged", merge=False)
    assert not (tmp_path / "merged").exists()


def test_a_full_model_is_written_without_the_trainings_files(
    tiny_model_folder: Path, pairs: Path, tmp_path: Path
) -> None:
    assert (
        export_checkpoint(str(tiny_model_folder), tmp_path / "full", merge=False) == "a full model"
    )
    found = _scores(load_vlm(tmp_path / "full"), pairs)
    torch.testing.assert_close(found, _scores(load_vlm(tiny_model_folder), pairs))
    with pytest.raises(UserError, match="is there already"):
        export_checkpoint(str(tiny_model_folder), tmp_path / "full", merge=False)
