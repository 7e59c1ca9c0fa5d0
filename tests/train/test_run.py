"""Training runs: what a checkpoint folder holds, the reference between the stages, resuming."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from cwdpo_bench.errors import UserError
from cwdpo_bench.train import stage as stage_module
from cwdpo_bench.train.data import read_pairs, split_stages
from cwdpo_bench.train.recipe import load_recipe, shipped_recipes
from cwdpo_bench.train.run import train
from cwdpo_bench.train.trainer import Reference, reference_scores
from cwdpo_bench.train.verdict import SEVERITY
from cwdpo_bench.vlm import VLM, load_vlm

SAMPLED = {
    "ppo": ["objective.rollout_size=4", "objective.epochs=1", "objective.max_new_tokens=4"],
    "grpo": [
        "trainer.num_generations=4",
        "trainer.max_completion_length=4",
        "trainer.max_steps=5",
    ],
}
"""What makes five steps of four answers of the recipes that sample."""


@pytest.mark.parametrize("lora", ["true", "false"])
@pytest.mark.parametrize("name", shipped_recipes())
def test_every_recipe_leaves_a_whole_checkpoint(
    name: str, lora: str, run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    # An untrained model seldom ends an answer.
    long = [f"{s}.own.max_new_tokens=200" for s in ("stage1", "stage2") if name == "opa-dpo"]
    record = run(name, f"lora.enabled={lora}", "lora.r=4", *long, *SAMPLED.get(name, []))
    out = tmp_path / "out"
    weights = "adapter_model.safetensors" if lora == "true" else "model.safetensors"
    config = "adapter_config.json" if lora == "true" else "config.json"
    for file in (config, weights, "recipe.yaml", "trainer_state.json"):
        assert (out / file).is_file(), file
    for file in ("processor_config.json", "dynamics.parquet", "dynamics.png", "provenance.json"):
        assert (out / file).is_file(), file
    assert record["status"] == "finished"
    assert record == json.loads((out / "provenance.json").read_text())
    assert record["data"]["pairs"] == 20
    stages = load_recipe(name).stages()
    assert list(record["stages"]) == list(stages)
    assert all((out / stage).is_dir() for stage in stages)
    counts = [(stage["pairs"], stage["steps"]) for stage in record["stages"].values()]
    if name == "opa-dpo":
        # Both stages see all pairs; the second learns where an own answer ended.
        own = record["stages"]["stage2"]["own_answers"]
        assert own["pairs"] + sum(own["unusable"].values()) == 20
        assert counts == [(20, 5), (20, -(-own["pairs"] // 4))]
    else:
        # Twenty pairs in batches of four, in one stage or shared 15 : 5 by two.
        assert counts == ([(15, 4), (5, 2)] if len(stages) == 2 else [(20, 5)])
    load_vlm(out)
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert all(np.isfinite(line["loss"]) for line in history if "loss" in line)


def test_dynamics_hold_every_measurement_of_both_stages(
    run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    run("cw-dpo")
    table = pd.read_parquet(tmp_path / "out" / "dynamics.parquet")
    assert table[["stage", "step", "total_step"]].to_numpy().tolist() == [
        ["stage1", 0, 0],
        ["stage1", 2, 2],
        ["stage1", 4, 4],
        ["stage2", 0, 4],
        ["stage2", 2, 6],
    ]
    first = table.iloc[0]
    assert first["tv"] == pytest.approx(0, abs=1e-5)
    assert table["tv"].iloc[-1] > 1e-3
    assert table["cooling_weight"].isna().tolist() == [True, True, True, False, False]
    assert (table["chosen_mean_logp"] <= table["argmax_mean_logp"] + 1e-6).all()
    assert table["top1_probability"].between(0, 1).all()
    assert table["token_ece"].between(0, 1).all()
    # Stage 2 starts from the policy that stage 1 left.
    for column in ("chosen_logp", "rejected_logp", "entropy", "js"):
        assert table[column].iloc[3] == pytest.approx(table[column].iloc[2], abs=1e-6)


def test_what_pulls_at_the_pairs_is_logged(
    run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    record = run("cw-dpo", "lora.enabled=true", "lora.r=4")
    table = pd.read_parquet(tmp_path / "out" / "dynamics.parquet")
    first = table[(table["stage"] == "stage2") & (table["step"] == 0)].iloc[0]
    # At its own start Δ = 0: a = 1/2, and the loss of a pair is log 2 whatever w_c.
    assert first["preference_probability"] == pytest.approx(0.5)
    assert first["delta_chosen"] == first["delta_margin"] == 0
    assert first["pair_loss"] == pytest.approx(np.log(2), abs=1e-6)
    last = table.iloc[-1]
    beta = 0.1
    assert 0 < last["chosen_residual"] < beta * 10
    assert 0 < last["rejected_residual"] < beta * 10
    bins = [f"cooling_weight_bin_{k}" for k in range(10)]
    assert last[bins].sum() == pytest.approx(1)
    assert 0 < last["loser_gradient_share"] < 1
    assert last["influence_correlation"] > 0.9
    for kind in ("shuffled", "train_chosen", "greedy", "initial_greedy", "blank_image"):
        assert last[f"{kind}_mean_logp"] < 0
    influence = pd.read_parquet(tmp_path / "out" / "influence.parquet")
    # Two pairs stepped on, three answers of each seen, at the start and the end of both stages.
    assert len(influence) == 4 * 2 * 2 * 3
    assert set(influence["answer"]) == {"chosen", "rejected", "greedy"}
    for stage in record["stages"].values():
        assert 0 < stage["dynamics"]["share_of_time"] < 1
        assert stage["dynamics"]["influence_left_out"] is None


@pytest.mark.parametrize("recipe", ["cw-dpo", "sft-c+dpo"])
@pytest.mark.parametrize("lora", ["true", "false"])
def test_the_reference_of_stage_2_is_the_end_of_stage_1(
    recipe: str,
    lora: str,
    run: Callable[..., dict[str, Any]],
    tiny_model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With LoRA, falling back to the base (adapters off) would show as Δ ≠ 0 at the first step."""
    seen: list[tuple[list[str], Reference]] = []

    def spy(vlm: VLM, pairs: Any, batch_size: int, views: Any, **kwargs: Any) -> Reference:
        reference = reference_scores(vlm, pairs, batch_size, views, **kwargs)
        seen.append((pairs, reference))
        return reference

    monkeypatch.setattr(stage_module, "reference_scores", spy)
    run(recipe, f"lora.enabled={lora}", "lora.r=4", "trainer.learning_rate=1e-2")
    # Stage 1 scores its rejected answers for an automatic threshold; the reference comes last.
    stage2_pairs, reference = seen[-1]

    first = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"][0]
    assert first["step"] == 1
    # Δ = 0 for every pair: no reward on either side, and the loss is log 2.
    assert first["rewards/chosen"] == pytest.approx(0, abs=1e-5)
    assert first["rewards/rejected"] == pytest.approx(0, abs=1e-5)
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-5)

    # And the reference is far from the base, so the test above can fail.
    base = reference_scores(load_vlm(tiny_model_folder), stage2_pairs, 4)
    assert (base["chosen"].logp - reference["chosen"].logp).abs().max() > 0.1
    stage1 = reference_scores(load_vlm(tmp_path / "out" / "stage1"), stage2_pairs, 4)
    torch.testing.assert_close(stage1["chosen"].logp, reference["chosen"].logp, atol=1e-4, rtol=0)
    torch.testing.assert_close(
        stage1["rejected"].logp, reference["rejected"].logp, atol=1e-4, rtol=0
    )


def test_a_lora_checkpoint_is_an_adapter_that_plain_peft_loads(
    run: Callable[..., dict[str, Any]], tiny_model_folder: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    run("dpo", "lora.enabled=true", "lora.r=4")
    out = tmp_path / "out"
    assert (out / "adapter_model.safetensors").is_file()
    assert not (out / "model.safetensors").exists()
    names = load_file(out / "adapter_model.safetensors")
    assert not any("visual" in name for name in names)
    base = AutoModelForImageTextToText.from_pretrained(tiny_model_folder)
    PeftModel.from_pretrained(base, out)
    assert load_vlm(out).processor is not None


def test_auto_cooling_is_mean_and_spread_of_the_reference(
    run: Callable[..., dict[str, Any]], pairs: Path, tmp_path: Path
) -> None:
    record = run("cw-dpo")
    cooling = record["stages"]["stage2"]["cooling"]
    vlm = load_vlm(tmp_path / "out" / "stage1")
    everything = read_pairs(pairs / "pairs.jsonl").pairs
    _, second = split_stages(everything, 0.75, 42)
    confidence = reference_scores(vlm, second, 4)["rejected"].mean_logp
    assert cooling["floor"] == pytest.approx(confidence.mean().item(), abs=1e-4)
    assert cooling["tau"] == pytest.approx(confidence.std(correction=0).item(), abs=1e-4)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(
    run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    for output, seed in (("a", 1), ("b", 1), ("c", 2)):
        run("dpo", f"trainer.seed={seed}", "trainer.max_steps=2", output=output)
    a, b, c = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)


class _Interrupted(Exception):
    """Stands for the moment at which a run is cut off."""


@pytest.mark.parametrize(
    ("moment", "cooling"),
    [
        (("stage1", 3), "auto"),
        (("stage2", 1), "auto"),
        (("stage2", 3), "auto"),
        (("stage2", 3), "auto-track"),
    ],
)
def test_an_interrupted_run_goes_on_to_the_same_weights(
    moment: tuple[str, int], cooling: str, run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    longer = ["trainer.num_train_epochs=2", "stage2.cooling.memory=8"]
    longer += [f"stage2.cooling.{key}={cooling}" for key in ("floor", "tau")]
    whole = run("cw-dpo", *longer, output="whole")

    def cut(stage: str, step: int, last: int, loss: float | None) -> None:
        if (stage, step) == moment:
            raise _Interrupted

    with pytest.raises(_Interrupted):
        run("cw-dpo", *longer, output="cut", report=cut)
    with pytest.raises(UserError, match="--resume"):
        run("cw-dpo", *longer, output="cut")
    resumed = run("cw-dpo", *longer, output="cut", resume=True)
    assert resumed["stages"]["stage2"]["cooling"] == whole["stages"]["stage2"]["cooling"]
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=0, rtol=0)
    tables = [pd.read_parquet(tmp_path / name / "dynamics.parquet") for name in ("whole", "cut")]
    pd.testing.assert_frame_equal(*tables)
    # A finished run is left as it is.
    assert run("cw-dpo", *longer, output="cut", resume=True) == resumed
    assert ("end" in resumed["stages"]["stage2"]["cooling"]) == (cooling == "auto-track")


def test_a_folder_of_another_run_is_not_resumed(
    run: Callable[..., dict[str, Any]], pairs: Path, tmp_path: Path
) -> None:
    run("sft", "trainer.max_steps=1")
    for recipe, overrides, words in [
        ("dpo", [], "recipe"),
        ("sft", ["trainer.seed=5"], "seed"),
        ("sft", ["trainer.max_steps=2"], "other values"),
    ]:
        with pytest.raises(UserError, match=words):
            run(recipe, "trainer.max_steps=1", *overrides, resume=True)
    other = tmp_path / "other.jsonl"
    row = json.loads((pairs / "pairs.jsonl").read_text().splitlines()[0])
    other.write_text(json.dumps({**row, "images": []}))
    with pytest.raises(UserError, match="other data"):
        run("sft", "trainer.max_steps=1", resume=True, data=other)


def test_a_folder_with_other_files_is_refused(
    run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="holds other files"):
        run("sft")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_a_loss_that_is_not_finite_names_step_and_pairs(
    run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"the loss is (nan|inf) at step \d+ on the pairs pair-"):
        run(
            "sft",
            "trainer.learning_rate=1e30",
            "trainer.max_grad_norm=0",
            "trainer.lr_scheduler_type=constant",
            "dynamics.every=1000",
        )
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_start_with_broken_weights_is_said_before_training(
    run: Callable[..., dict[str, Any]], tiny_model_folder: Path, tmp_path: Path
) -> None:
    vlm = load_vlm(tiny_model_folder)
    with torch.no_grad():
        next(vlm.model.model.language_model.layers[0].parameters()).fill_(float("nan"))
    vlm.model.save_pretrained(tmp_path / "nan")
    vlm.processor.save_pretrained(tmp_path / "nan")
    with pytest.raises(UserError, match="not finite on the probe pairs"):
        run("sft", model=tmp_path / "nan")


def test_a_broken_image_inside_names_the_row(
    run: Callable[..., dict[str, Any]], pairs: Path, tmp_path: Path
) -> None:
    """A picture whose header is whole and whose pixels are cut off is found when it is opened."""
    whole = (pairs / "3.png").read_bytes()
    rows = [json.loads(line) for line in (pairs / "pairs.jsonl").read_text().splitlines()[:4]]
    for i, row in enumerate(rows):
        (tmp_path / f"{i}.png").write_bytes(whole if i != 2 else whole[: len(whole) // 2])
        row["images"] = [f"{i}.png"]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"pairs\.jsonl: line 3.*2\.png is broken"):
        run("sft", data=data)


def test_too_few_pairs_for_two_stages_or_for_a_probe(
    run: Callable[..., dict[str, Any]],
    small: list[str],
    pairs: Path,
    tiny_model_folder: Path,
    tmp_path: Path,
) -> None:
    line = (pairs / "pairs.jsonl").read_text().splitlines()[0]
    data = tmp_path / "one.jsonl"
    data.write_text(json.dumps({**json.loads(line), "images": []}))
    with pytest.raises(UserError, match="two stages"):
        run("cw-dpo", data=data)
    with pytest.raises(UserError, match="--probe"):
        train(
            load_recipe("sft", small),
            model=str(tiny_model_folder),
            data=data,
            output=tmp_path / "o",
        )


def test_a_trainer_value_of_the_wrong_kind_is_named(run: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(UserError, match="no-such-schedule"):
        run("sft", "trainer.lr_scheduler_type=no-such-schedule")


def test_a_full_disk_is_one_clear_error_and_the_run_goes_on_afterwards(
    run: Callable[..., dict[str, Any]],
    small: list[str],
    tiny_model_folder: Path,
    pairs: Path,
    tmp_path: Path,
) -> None:
    """A limit on a file's size stands for the full disk; half a checkpoint is not resumed from."""
    code = f"""
import resource, signal, sys
from cwdpo_bench.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, resource.RLIM_INFINITY))
sys.argv = ["cwdpo-bench", "train", "sft", "--model", {str(tiny_model_folder)!r}, "--data",
            {str(pairs / "pairs.jsonl")!r}, "--probe", {str(pairs / "probe.jsonl")!r},
            "--output", {str(tmp_path / "out")!r}, "data.pixel_cache_gb=0", *{small!r}]
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "cannot be written" in done.stderr
    assert "--resume" in done.stderr
    assert not (tmp_path / "out" / "config.json").exists()
    assert run("sft", "data.pixel_cache_gb=0", resume=True)["status"] == "finished"


def test_the_verdict_is_told_of_every_stage_and_of_the_run(
    run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    seen: list[tuple[str, int, str]] = []
    record = run(
        "cw-dpo",
        measured=lambda row, verdict: seen.append((row["stage"], row["step"], verdict.name)),
    )
    names = [stage["verdict"]["name"] for stage in record["stages"].values()]
    assert record["verdict"]["name"] == max(names, key=SEVERITY.index)
    table = pd.read_parquet(tmp_path / "out" / "dynamics.parquet")
    assert [place[:2] for place in seen] == table[["stage", "step"]].to_records(
        index=False
    ).tolist()
    assert seen[-1][2] == names[-1]


@pytest.mark.parametrize("lora", ["true", "false"])
def test_an_early_stop_keeps_the_best_measurements_weights(
    lora: str, run: Callable[..., dict[str, Any]], pairs: Path, tmp_path: Path
) -> None:
    """Trained on each other's words the chosen answers first rise, then fall: some step is best."""
    overrides = ["dynamics.stop_on=[delta_logp]", "dynamics.patience=2", "dynamics.every=1"]
    overrides += [f"lora.enabled={lora}", "lora.r=4", "trainer.learning_rate=3e-2"]
    overrides += ["trainer.num_train_epochs=4", "trainer.lr_scheduler_type=constant"]
    record = run("dpo", *overrides)
    stopped = record["stages"]["stage1"]["stopped"]
    table = pd.read_parquet(tmp_path / "out" / "dynamics.parquet")
    assert stopped["reason"].startswith("delta_logp")
    assert stopped["step"] == table["step"].iloc[-1] == record["stages"]["stage1"]["steps"] < 20
    best = table.loc[table["delta_chosen"].idxmax()]
    assert stopped["kept_step"] == best["step"] == stopped["step"] - 2
    # The saved weights are those of that measurement, scored anew.
    probe = read_pairs(pairs / "probe.jsonl").pairs
    scores = reference_scores(load_vlm(tmp_path / "out"), probe, 4)["chosen"]
    assert scores.logp.mean().item() == pytest.approx(best["chosen_logp"], abs=1e-3)
    assert not list((tmp_path / "out").rglob("best-*"))


def test_an_interrupted_run_with_an_early_stop_ends_as_the_whole_one(
    run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    overrides = ["dynamics.stop_on=[delta_logp]", "dynamics.patience=3", "dynamics.every=1"]
    overrides += ["trainer.learning_rate=3e-2", "trainer.num_train_epochs=4"]
    whole = run("dpo", *overrides, output="whole")
    assert whole["stages"]["stage1"]["stopped"]["step"] > 3

    def cut(stage: str, step: int, last: int, loss: float | None) -> None:
        if step == 3:
            raise _Interrupted

    with pytest.raises(_Interrupted):
        run("dpo", *overrides, output="cut", report=cut)
    resumed = run("dpo", *overrides, output="cut", resume=True)
    assert resumed["stages"]["stage1"]["stopped"] == whole["stages"]["stage1"]["stopped"]
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_curriculum_takes_the_pairs_in_the_order_of_their_easiness(
    run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []
    trainers: list[Any] = []

    class Spy(stage_module.PreferenceTrainer):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            trainers.append(kwargs)

        def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kw: Any) -> Any:
            seen.append(inputs["index"].tolist())
            return super().compute_loss(model, inputs, *args, **kw)

    monkeypatch.setattr(stage_module, "PreferenceTrainer", Spy)
    record = run("dpo", "data.curriculum=easy_to_hard")
    assert record["stages"]["stage1"]["curriculum"] == "easy_to_hard"
    assert [index for batch in seen for index in batch] == list(range(20))
    likelihood = trainers[0]["reference"]["rejected"].mean_logp
    assert (likelihood.diff() >= 0).all()
    assert len(likelihood.unique()) > 10


def test_a_curriculum_without_rejected_answers_is_refused(
    run: Callable[..., dict[str, Any]],
) -> None:
    with pytest.raises(UserError, match=r"data\.curriculum"):
        run("sft", "data.curriculum=easy_to_hard")


def test_a_resumed_run_reads_its_reference_again_and_refuses_that_of_other_images(
    run: Callable[..., dict[str, Any]], pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "data"
    shutil.copytree(pairs, folder)

    def cut(stage: str, step: int, last: int, loss: float | None) -> None:
        if step == 3:
            raise _Interrupted

    for output in ("same", "other"):
        with pytest.raises(_Interrupted):
            run("dpo", output=output, data=folder / "pairs.jsonl", report=cut)
        assert (tmp_path / output / "stage1" / "reference.safetensors").is_file()

    def computed(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(stage_module, "reference_scores", computed)
    data = folder / "pairs.jsonl"
    assert run("dpo", output="same", data=data, resume=True)["status"] == "finished"
    # Another picture under an old name: the data file is the same to the letter.
    shutil.copy(folder / "3.png", folder / "2.png")
    with pytest.raises(UserError, match=r"the pairs or their images.*delete the file"):
        run("dpo", output="other", data=data, resume=True)
