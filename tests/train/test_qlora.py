"""QLoRA: adapters trained on a base in 4 bits, on a CPU; needs bitsandbytes."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

from cwdpo_bench.errors import UserError
from cwdpo_bench.evaluate.run import run_tasks
from cwdpo_bench.train.data import read_pairs
from cwdpo_bench.train.export import export_checkpoint
from cwdpo_bench.train.recipe import load_recipe
from cwdpo_bench.train.start import start_model
from cwdpo_bench.train.trainer import reference_scores
from cwdpo_bench.vlm import VLM, load_vlm, weights_fingerprint
from cwdpo_bench.vlm.quantized import keep_weights_as_they_are

bitsandbytes = pytest.importorskip("bitsandbytes", reason="4 bits need bitsandbytes")

FEW = ["dynamics.every=10", "dynamics.answers.pairs=1", "dynamics.influence.pairs=1"]
QLORA = ["model.load_in_4bit=true", "lora.enabled=true", *FEW]
Run = Callable[..., dict[str, Any]]


def _scores(vlm: VLM, pairs: Path) -> torch.Tensor:
    return reference_scores(vlm, read_pairs(pairs / "probe.jsonl").pairs, 4)["chosen"].logp


def _adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def _in_4_bits(folder: Path) -> Any:
    """As plain transformers has it, every linear layer but the head in NF4."""
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    return AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, quantization_config=config
    )


def test_the_language_models_layers_alone_are_in_4_bits(tiny_model_folder: Path) -> None:
    model = start_model(load_recipe("dpo", QLORA), str(tiny_model_folder)).model
    found = {n for n, m in model.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    bases = {name for name in found if name.endswith("base_layer")}
    assert found == bases
    assert len(bases) == 4 * 7
    assert all("language_model.layers" in name for name in bases)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)


def test_what_stays_whole_is_prepared_in_fp32(tiny_model_folder: Path) -> None:
    recipe = load_recipe("dpo", [*QLORA, "model.dtype=bfloat16"])
    model = start_model(recipe, str(tiny_model_folder)).model
    assert {p.dtype for p in model.parameters()} == {torch.float32, torch.uint8}
    layer = next(m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit))
    assert layer.compute_dtype == torch.bfloat16
    assert layer.weight.quant_type == "nf4"
    assert layer.weight.quant_state.nested


def test_cw_dpo_trains_resumes_loads_in_plain_peft_and_is_scored(
    run: Run, pairs: Path, tiny_model_folder: Path, caption_root: Path, tmp_path: Path
) -> None:
    settings = [*QLORA, "trainer.max_steps=2", "trainer.save_steps=1"]
    record = run("cw-dpo", *settings)
    assert "bitsandbytes" in record["versions"]
    out = tmp_path / "out"
    state = json.loads((out / "trainer_state.json").read_text())
    assert len([line for line in state["log_history"] if "loss" in line]) == 2
    moved = {n: v for n, v in _adapter(out).items() if "lora_B" in n and v.abs().max() > 0}
    assert moved

    # As it was when the run was killed in its second stage, after one step of two.
    cut = tmp_path / "cut"
    shutil.copytree(out, cut)
    shutil.rmtree(cut / "stage2" / "checkpoint-2")
    for file in [*cut.glob("*model.safetensors"), cut / "trainer_state.json"]:
        file.unlink()
    was = json.loads((cut / "provenance.json").read_text())
    was.update(status="running", stages={"stage1": was["stages"]["stage1"]}, warnings=[])
    (cut / "provenance.json").write_text(json.dumps(was))
    run("cw-dpo", *settings, output="cut", resume=True)
    for name, value in _adapter(out).items():
        torch.testing.assert_close(_adapter(cut)[name], value, atol=0, rtol=0, msg=name)

    ours = start_model(load_recipe("cw-dpo", [*QLORA, f"init={out}"]), str(tiny_model_folder))
    config = ours.model.get_base_model().config.quantization_config
    base = AutoModelForImageTextToText.from_pretrained(
        tiny_model_folder, dtype=torch.float32, quantization_config=config
    )
    keep_weights_as_they_are(base)
    plain = VLM(PeftModel.from_pretrained(base, out).eval(), ours.processor, "plain")
    torch.testing.assert_close(_scores(plain, pairs), _scores(ours, pairs), atol=1e-4, rtol=0)

    folder = run_tasks(out, tasks=["coco"], data_root=caption_root, output=tmp_path / "run")
    assert folder.results["tasks"]["coco"]["n"] == 2


def test_the_first_loss_is_that_of_an_unmoved_policy(run: Run, tmp_path: Path) -> None:
    run("dpo", *QLORA, "trainer.max_steps=1", "trainer.bf16=true", "trainer.use_cpu=true")
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["log_history"][0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_checkpointed_gradients_are_the_same(run: Run, tmp_path: Path) -> None:
    for name in ("true", "false"):
        run(
            "dpo",
            *QLORA,
            "trainer.max_steps=2",
            f"trainer.gradient_checkpointing={name}",
            output=name,
        )
    for name, value in _adapter(tmp_path / "true").items():
        torch.testing.assert_close(_adapter(tmp_path / "false")[name], value, atol=1e-5, rtol=0)


def test_an_adapter_is_merged_into_the_base_in_full_precision(
    run: Run, pairs: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    run("dpo", *QLORA, "trainer.max_steps=2")
    export_checkpoint(str(tmp_path / "out"), tmp_path / "merged", merge=True)
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert getattr(merged.config, "quantization_config", None) is None
    whole = load_vlm(tmp_path / "out")
    found = VLM(merged.eval(), whole.processor, "merged")
    torch.testing.assert_close(_scores(found, pairs), _scores(whole, pairs), atol=1e-4, rtol=0)
    # Not the base alone, whose weights it has but for the adapter's product.
    assert not torch.equal(_scores(found, pairs), _scores(load_vlm(tiny_model_folder), pairs))


@pytest.fixture
def folder_in_4_bits(tiny_model_folder: Path, tmp_path: Path) -> Path:
    """A model that was saved in 4 bits, as some are on the Hub."""
    _in_4_bits(tiny_model_folder).save_pretrained(tmp_path / "in-4-bits")
    AutoProcessor.from_pretrained(tiny_model_folder).save_pretrained(tmp_path / "in-4-bits")
    return tmp_path / "in-4-bits"


def test_a_folder_in_4_bits_trains_and_is_merged_in_whole_numbers(
    folder_in_4_bits: Path, run: Run, pairs: Path, tmp_path: Path
) -> None:
    run("dpo", "lora.enabled=true", "trainer.max_steps=1", model=folder_in_4_bits)
    export_checkpoint(str(tmp_path / "out"), tmp_path / "merged", merge=True)
    merged = load_vlm(tmp_path / "merged")
    assert not any(isinstance(m, bitsandbytes.nn.Linear4bit) for m in merged.model.modules())
    trained = load_vlm(tmp_path / "out")
    torch.testing.assert_close(_scores(merged, pairs), _scores(trained, pairs), atol=1e-3, rtol=0)


def test_full_fine_tuning_of_a_folder_in_4_bits_is_refused(
    folder_in_4_bits: Path, run: Run
) -> None:
    with pytest.raises(UserError, match=r"lora\.enabled=true"):
        run("dpo", model=folder_in_4_bits)


def test_weights_of_another_scale_have_another_fingerprint(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    vlm = load_vlm(tiny_model_folder)
    with torch.no_grad():
        vlm.model.get_decoder().layers[0].mlp.up_proj.weight.mul_(2)
    vlm.model.save_pretrained(tmp_path)
    first, second = (_in_4_bits(folder) for folder in (tiny_model_folder, tmp_path))
    codes = [m.get_decoder().layers[0].mlp.up_proj.weight for m in (first, second)]
    assert torch.equal(*codes)
    assert weights_fingerprint(first) != weights_fingerprint(second)


@pytest.mark.slow
def test_every_family_trains(family_folder: Path, run: Run, tmp_path: Path) -> None:
    run("dpo", *QLORA, "trainer.max_steps=2", model=family_folder)
    assert any(v.abs().max() > 0 for n, v in _adapter(tmp_path / "out").items() if "lora_B" in n)
    load_vlm(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["ppo", "grpo", "v-dpo", "opa-dpo"])
def test_recipes_that_sample_or_look_twice_train(recipe: str, run: Run, tmp_path: Path) -> None:
    group = ["trainer.num_generations=4"] if recipe == "grpo" else []
    run(recipe, *QLORA, "trainer.max_steps=2", *group)
    assert any(v.abs().max() > 0 for n, v in _adapter(tmp_path / "out").items() if "lora_B" in n)
