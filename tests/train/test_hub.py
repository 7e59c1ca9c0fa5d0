"""Pushing to the Hub: what arrives, where, and that a push that fails loses nothing."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from huggingface_hub import constants

from cwdpo_bench.errors import UserError
from cwdpo_bench.train.hub import hub_of
from cwdpo_bench.train.recipe import load_recipe
from cwdpo_bench.vlm import load_vlm

PUSH = ["trainer.push_to_hub=true", "trainer.hub_model_id=me/mine"]


def _stand_in_module() -> ModuleType:
    path = Path(__file__).with_name("hub_stand_in.py")
    spec = importlib.util.spec_from_file_location("hub_stand_in", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["hub_stand_in"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with _stand_in_module().hub_stand_in() as stand_in:
        monkeypatch.setattr(constants, "ENDPOINT", stand_in.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield stand_in


def test_the_finished_checkpoint_arrives_whole_and_loads(
    hub: Any, run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    token = f"trainer.hub_token={hub.token}"
    private = "trainer.hub_private_repo=true"
    run("cw-dpo", "lora.enabled=true", "lora.r=4", *PUSH, token, private)
    asked = hub.repositories["me/mine"]
    assert asked.get("visibility") == "private" or asked.get("private") is True
    arrived = hub.files["me/mine", "main"]
    out = tmp_path / "out"
    for name in ("adapter_model.safetensors", "adapter_config.json", "processor_config.json"):
        assert name in arrived
    for name in ("README.md", "recipe.yaml", "provenance.json", "dynamics.parquet"):
        assert arrived[name] == (out / name).read_bytes()
    assert not [name for name in arrived if name.startswith("stage")]
    folder = tmp_path / "back"
    for name, content in arrived.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    load_vlm(folder)
    record = json.loads(arrived["provenance.json"])
    assert record["status"] == "finished"
    assert record["verdict"]["sentence"]
    assert hub.commits[-1] == ("me/mine", "main", "End of training")
    # The token is in nothing that was written or sent but the headers.
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "training_args.bin" for path in kept)
    for path in kept:
        assert hub.token.encode() not in path.read_bytes(), path
    assert not any(hub.token.encode() in body for body in hub.bodies)


@pytest.mark.parametrize(
    ("strategy", "messages", "under"),
    [
        ("end", 1, set()),
        ("every_save", 3, set()),
        ("checkpoint", 5, {"last-checkpoint"}),
        ("all_checkpoints", 5, {"stage1/checkpoint-2", "stage1/checkpoint-3"}),
    ],
)
def test_the_strategies_are_the_trainers(
    strategy: str,
    messages: int,
    under: set[str],
    hub: Any,
    run: Callable[..., dict[str, Any]],
) -> None:
    switches = [f"trainer.hub_strategy={strategy}", "trainer.hub_always_push=true"]
    keep = ["trainer.max_steps=3", "trainer.save_total_limit=9", f"trainer.hub_token={hub.token}"]
    run("sft", *PUSH, *switches, *keep, "trainer.hub_revision=try")
    assert len(hub.commits) == messages
    assert {revision for _, revision, _ in hub.commits} == {"try"}
    arrived = hub.files["me/mine", "try"]
    middle = {str(Path(name).parent) for name in arrived if name.endswith("optimizer.pt")}
    assert middle == under
    # A checkpoint of the middle has its card and its processor too.
    for place in under:
        assert b"Not finished" in arrived[f"{place}/README.md"]
        assert f"{place}/processor_config.json" in arrived
        assert f"{place}/trainer_state.json" in arrived
    assert b"Not finished" not in arrived["README.md"]


def test_without_a_token_nothing_is_trained(
    hub: Any, run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"me/mine.*hf auth login"):
        run("sft", *PUSH, "trainer.hub_token=hf_other", "trainer.max_steps=1")
    assert not (tmp_path / "out" / "stage1").exists()


@pytest.mark.parametrize("name", ["a/b/c", "me/--x"])
def test_a_name_that_is_none_is_told_before_training(
    name: str, hub: Any, run: Callable[..., dict[str, Any]]
) -> None:
    with pytest.raises(UserError, match="hub_model_id"):
        run("sft", PUSH[0], f"trainer.hub_model_id={name}", f"trainer.hub_token={hub.token}")


def test_without_a_network_the_training_is_kept_and_pushed_later(
    run: Callable[..., dict[str, Any]],
    tmp_path: Path,
    hub: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    address = hub.address
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    settings = ["trainer.max_steps=2", f"trainer.hub_token={hub.token}"]
    with pytest.raises(UserError, match="trained and saved") as raised:
        run("sft", *PUSH, *settings)
    assert "not reached" in caplog.text
    text = str(raised.value)
    assert str(tmp_path / "out") in text
    assert hub.token not in text + caplog.text
    assert json.loads((tmp_path / "out" / "provenance.json").read_text())["status"] == "finished"
    command = shlex.split(text[text.index("hf upload") : text.index("; or run")])
    # By hand, as it says: with the Hub's own command line.
    done = subprocess.run(
        [sys.executable, "-m", "huggingface_hub.cli.hf", *command[1:]],
        env={**os.environ, "HF_ENDPOINT": address, "HF_TOKEN": hub.token, "HF_HUB_OFFLINE": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    by_hand = dict(hub.files.pop(("me/mine", "main")))
    assert "model.safetensors" in by_hand
    # Or by the same command with --resume, which trains nothing again; another name will do.
    monkeypatch.setattr(constants, "ENDPOINT", address)
    before = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    run("sft", *PUSH, *settings, "trainer.hub_model_id=me/other", resume=True)
    assert hub.files["me/other", "main"] == by_hand
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == before


def test_a_push_that_is_refused_at_the_end_names_folder_and_command(
    hub: Any, run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    hub.refuse_commits = 403
    with pytest.raises(UserError, match=r"no space in this repository.*hf upload me/mine"):
        run("sft", *PUSH, "trainer.max_steps=2", f"trainer.hub_token={hub.token}")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_switches_are_no_part_of_the_recipe_as_run() -> None:
    recipe = load_recipe("cw-dpo", [*PUSH, "stage2.trainer.hub_token=hf_abc", "trainer.seed=3"])
    assert "hf_abc" not in repr(recipe) + json.dumps(recipe.model_dump(mode="json"))
    kept = yaml.safe_load(recipe.to_yaml())
    assert kept["trainer"]["seed"] == 3
    assert not [key for key in kept["trainer"] if "hub" in key]
    found = hub_of(recipe, Path("somewhere"))
    assert found is not None
    assert found.api.token == "hf_abc"
    assert "hf_abc" not in repr(found)
    assert hub_of(load_recipe("cw-dpo", []), Path("somewhere")) is None


def test_an_unknown_strategy_is_told_with_the_nearest() -> None:
    recipe = load_recipe("sft", [*PUSH, "trainer.hub_strategy=every_step"])
    with pytest.raises(UserError, match="every_save"):
        hub_of(recipe, Path("x"))
