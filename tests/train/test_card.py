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
from cwdpo_bench.train.recipe import load_recipe

RECORD: dict[str, Any] = {
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


def test_the_base_and_its_licence_are_named_where_they_are_known(tmp_path: Path) -> None:
    recipe = load_recipe("dpo", [])
    text = model_card(recipe, RECORD, adapter=True, model="owner/base-7B")
    data = ModelCard(text).data
    assert data.base_model == "owner/base-7B"
    assert 'from_pretrained("owner/base-7B")' in text
    assert data.license is None
    assert "look it up" in text
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    local = RECORD | {"model": {"name": str(tmp_path)}}
    text = model_card(recipe, local, adapter=False, model=str(tmp_path))
    assert ModelCard(text).data.license == "apache-2.0"
    # A folder here is no name that others could look up.
    assert ModelCard(text).data.base_model is None
    assert str(tmp_path) not in text


@pytest.mark.parametrize("broken", ["---\nlicense: [", "", "---\nlicense: <b>\n---\n", "\x00"])
def test_a_broken_card_of_the_base_tells_no_licence(tmp_path: Path, broken: str) -> None:
    (tmp_path / "README.md").write_text(broken)
    text = model_card(load_recipe("dpo", []), RECORD, adapter=False, model=str(tmp_path))
    assert ModelCard(text).data.license is None


def test_names_are_shown_as_text() -> None:
    hostile = "a`<script>|[x](http://y)\n# b"
    record = json.loads(json.dumps(RECORD))
    record["data"]["file"] = hostile
    record["model"]["name"] = hostile
    record["warnings"] = [hostile]
    text = model_card(load_recipe("dpo", []), record, adapter=True, model=hostile)
    body = text.split("---\n", 2)[2]
    assert "\n# b" not in body
    for line in body.splitlines():
        if not line.startswith("model ="):
            outside = "".join(line.replace("\\`", "").split("`")[::2])
            assert "<script>" not in outside.replace("\\<", "")
    assert ModelCard(text).data.base_model is None
