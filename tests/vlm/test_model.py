"""Loading: folders and adapters load, mistakes name the folder and the mend."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from cwdpo_bench.errors import UserError
from cwdpo_bench.vlm import load_vlm


def _adapter(base: Path, folder: Path) -> Path:
    vlm = load_vlm(base)
    config = LoraConfig(r=2, target_modules=r".*language_model.*q_proj", init_lora_weights=False)
    model = get_peft_model(vlm.model, config)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(folder)
    return folder


def test_an_adapter_loads_on_its_base_and_changes_it(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    adapted = load_vlm(_adapter(tiny_model_folder, tmp_path / "adapter"))
    assert adapted.processor is not None
    names = [name for name, _ in adapted.model.named_parameters() if "lora_B" in name]
    assert names
    assert not any(parameter.requires_grad for parameter in adapted.model.parameters())


def test_weights_are_fp32_on_a_cpu(tiny_model_folder: Path) -> None:
    assert load_vlm(tiny_model_folder, device="cpu").model.dtype == torch.float32


def test_a_missing_folder_is_named() -> None:
    with pytest.raises(UserError, match=r"/no/such/model.*no such folder"):
        load_vlm("/no/such/model")


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither config\.json nor adapter_config\.json"):
        load_vlm(tmp_path)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="is a file"):
        load_vlm(tmp_path / "model.bin")


def test_weights_that_are_no_safetensors_are_refused(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_model_folder, folder)
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="pickled"):
        load_vlm(folder)


def test_a_broken_weights_file_is_one_clear_error(tiny_model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(tiny_model_folder, folder)
    (folder / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(UserError, match="broken"):
        load_vlm(folder)


def test_an_adapter_whose_base_is_gone_names_it(tiny_model_folder: Path, tmp_path: Path) -> None:
    folder = _adapter(tiny_model_folder, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "/gone/base"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="/gone/base is not there"):
        load_vlm(folder)


def test_an_adapter_of_pickles_is_refused(tiny_model_folder: Path, tmp_path: Path) -> None:
    folder = _adapter(tiny_model_folder, tmp_path / "adapter")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match=r"adapter_model\.safetensors"):
        load_vlm(folder)


def test_a_text_model_is_refused(tiny_model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "text"
    shutil.copytree(tiny_model_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "no-such-type"}))
    with pytest.raises(UserError, match="text"):
        load_vlm(folder)


def test_a_models_own_code_is_not_run_unless_asked(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "own"))
    folder, trace = tmp_path / "own-code", tmp_path / "it-ran"
    shutil.copytree(tiny_model_folder, folder)
    (folder / "own.py").write_text(
        f"import pathlib\npathlib.Path({str(trace)!r}).touch()\n"
        "from transformers import Qwen2_5_VLConfig\n"
        "class Own(Qwen2_5_VLConfig):\n    model_type = 'own'\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"own-code.*cannot be loaded"):
        load_vlm(folder)
    assert not trace.exists()
    # The trap works: asked for, it runs, and what it holds is then judged as any other model.
    with pytest.raises(UserError):
        load_vlm(folder, trust_remote_code=True)
    assert trace.exists()
