"""The card beside a checkpoint: metadata that the Hub reads, the run's facts, nothing that is read
as markup, no path."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from cwdpo_bench.train.card import model_card
from cwdpo_bench.train.export import export_checkpoint
from cwdpo_bench.vlm import load_vlm

RECORD: dict[str, Any] = {
    "status": "finished",
    "recipe": "dpo",
    "lora": None,
    "model": {"name": "owner/base-7B"},
    "seed": 1,
    "versions": {"cwdpo-bench": "0", "torch": "2"},
    "data": {"file": "pairs.jsonl", "pairs": 9, "probe_pairs": 2, "fingerprint": "ab12"},
    "stages": {
        "stage1": {
            "objective": "dpo",
            "pairs": 9,
            "steps": 3,
            "verdict": {"sentence": "healthy: nothing fell"},
        }
    },
    "verdict": {"sentence": "healthy: nothing fell"},
    "warnings": [],
}


def test_every_checkpoint_has_a_card_that_the_hub_reads(
    run: Callable[..., dict[str, Any]], tmp_path: Path, tiny_model_folder: Path
) -> None:
    made = {
        name: run("dpo", "trainer.max_steps=2", *lora, output=name)
        for name, lora in (("full", []), ("lora", ["lora.enabled=true"]), ("again", []))
    }
    texts = {name: (tmp_path / name / "README.md").read_text() for name in made}
    for name, library in (("full", "transformers"), ("lora", "peft")):
        data = ModelCard(texts[name]).data
        assert data.library_name == library
        assert data.pipeline_tag == "image-text-to-text"
        assert "dpo" in (data.tags or [])
        assert made[name]["data"]["fingerprint"] in texts[name]
        assert made[name]["verdict"]["name"] in texts[name]
        assert str(tmp_path) not in texts[name]
        assert str(tiny_model_folder.parent) not in texts[name]
    assert "PeftModel" in texts["lora"]
    assert 'from_pretrained("BASE")' in texts["lora"]
    assert texts["again"] == texts["full"]


def test_every_checkpoint_of_the_middle_has_a_card_of_its_own(
    run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    lora = ["lora.enabled=true", "lora.r=4", "trainer.gradient_accumulation_steps=2"]
    run("cw-dpo", *lora, "stage2.beta=0.25", "trainer.save_steps=1", "trainer.save_total_limit=4")
    out = tmp_path / "out"
    middle = sorted(out.glob("stage*/checkpoint-*"))
    assert len(middle) == 3
    for folder in [*middle, out / "stage1"]:
        text = (folder / "README.md").read_text()
        assert ModelCard(text).data.library_name == "peft"
        assert "Not finished" in text
        assert "batch 8, learning rate 0.001" in text
        assert "LoRA adapter of rank 4" in text
        assert ("β 0.25" in text) == (folder.parent.name == "stage2")
        assert "dynamics.parquet" not in text
        assert (folder / "recipe.yaml").read_text() == (out / "recipe.yaml").read_text()
        record = json.loads((folder / "provenance.json").read_text())
        assert record["status"] == "running"
    steps = "1 update steps" if middle[0].name == "checkpoint-1" else "2 update steps"
    assert steps in (middle[0] / "README.md").read_text()
    text = (out / "README.md").read_text()
    assert "Not finished" not in text
    assert "β 0.25" in text
    assert "dynamics.parquet" in text
    # It loads as it stands, which the processor is a part of.
    load_vlm(middle[-1])


def test_what_is_exported_has_a_card_that_says_so(
    run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    run("sft", "lora.enabled=true", "lora.r=4", "trainer.max_steps=1")
    export_checkpoint(str(tmp_path / "out"), tmp_path / "merged", merge=True)
    text = (tmp_path / "merged" / "README.md").read_text()
    assert ModelCard(text).data.library_name == "transformers"
    assert "LoRA adapter of rank 4, α" in text
    assert "merged into its base" in text
    assert "PeftModel" not in text
    assert (tmp_path / "merged" / "recipe.yaml").is_file()
    assert str(tmp_path) not in text


def test_weights_in_parts_are_told_as_such() -> None:
    text = model_card(RECORD, adapter=False, model="owner/base-7B", whole=False)
    assert "from_pretrained" not in text
    assert "--resume" in text


def test_the_base_and_its_licence_are_named_where_they_are_known(tmp_path: Path) -> None:
    text = model_card(RECORD, adapter=True, model="owner/base-7B")
    data = ModelCard(text).data
    assert data.base_model == "owner/base-7B"
    assert 'from_pretrained("owner/base-7B")' in text
    assert data.license is None
    assert "look it up" in text
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    local = RECORD | {"model": {"name": str(tmp_path)}}
    text = model_card(local, adapter=False, model=str(tmp_path))
    assert ModelCard(text).data.license == "apache-2.0"
    # A folder here is no name that others could look up.
    assert ModelCard(text).data.base_model is None
    assert str(tmp_path) not in text


@pytest.mark.parametrize("broken", ["---\nlicense: [", "", "---\nlicense: <b>\n---\n", "\x00"])
def test_a_broken_card_of_the_base_tells_no_licence(tmp_path: Path, broken: str) -> None:
    (tmp_path / "README.md").write_text(broken)
    text = model_card(RECORD, adapter=False, model=str(tmp_path))
    assert ModelCard(text).data.license is None


def test_names_are_shown_as_text() -> None:
    hostile = "a`<script>|[x](http://y)\n# b"
    record = json.loads(json.dumps(RECORD))
    record["data"]["file"] = hostile
    record["model"]["name"] = hostile
    record["warnings"] = [hostile]
    text = model_card(record, adapter=True, model=hostile)
    body = text.split("---\n", 2)[2]
    assert "\n# b" not in body
    for line in body.splitlines():
        if not line.startswith("model ="):
            outside = "".join(line.replace("\\`", "").split("`")[::2])
            assert "<script>" not in outside.replace("\\<", "")
    assert ModelCard(text).data.base_model is None
