"""Two checkpoints, measured with one probe: the base, and the base made sharper or worse."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cwdpo_bench.cli import app
from cwdpo_bench.errors import UserError
from cwdpo_bench.train.diagnose import diagnose
from cwdpo_bench.vlm import VLM, load_vlm, score_completions


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("diagnose")
    rng = np.random.default_rng(0)
    rows = []
    for i in range(4):
        pixels = rng.integers(0, 255, (84, 84, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        row = {"images": [f"{i}.png"], "prompt": "What is it?"}
        rows.append(row | {"chosen": f"a red circle {i}.", "rejected": f"a blue star {i}."})
    file = folder / "probe.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def _changed(folder: Path, scale: float) -> VLM:
    """The tiny model with a last norm, and so all logits, scaled."""
    vlm = load_vlm(folder)
    with torch.no_grad():
        vlm.model.model.language_model.norm.weight.mul_(scale)
    return vlm


def test_figures_of_both_and_a_verdict(tiny_model_folder: Path, data: Path, tmp_path: Path) -> None:
    base, changed = load_vlm(tiny_model_folder), _changed(tiny_model_folder, 30.0)
    record = diagnose(changed, data, base=base, output=tmp_path / "out")
    assert record == json.loads((tmp_path / "out" / "diagnose.json").read_text())
    assert (tmp_path / "out" / "diagnose.png").stat().st_size > 0
    before, after = record["base"]["figures"], record["checkpoint"]["figures"]
    from cwdpo_bench.train.data import read_pairs

    pairs = read_pairs(data).pairs
    scores = score_completions(
        changed, [pair.open() for pair in pairs], [pair.chosen for pair in pairs]
    )
    expected = np.mean([s.logps.mean() for s in scores])
    assert after["chosen_mean_logp"] == pytest.approx(expected, abs=1e-4)
    assert before["tv"] == pytest.approx(0, abs=1e-5)
    assert after["tv"] > 0.1
    assert after["delta_chosen"] == pytest.approx(
        after["chosen_logp"] - before["chosen_logp"], abs=1e-3
    )
    # An untrained model made sharp: everything but its own top falls.
    assert after["argmax_mean_logp"] > before["argmax_mean_logp"]
    assert record["verdict"]["name"] in {"squeezing", "displacement"}


def test_a_model_against_itself_is_healthy(tiny_model_folder: Path, data: Path) -> None:
    base = load_vlm(tiny_model_folder)
    record = diagnose(base, data, base=base)
    assert record["verdict"]["name"] == "healthy"
    assert record["checkpoint"]["figures"] == pytest.approx(record["base"]["figures"], abs=1e-6)


def test_without_a_base_there_are_figures_and_no_verdict(
    tiny_model_folder: Path, data: Path
) -> None:
    record = diagnose(load_vlm(tiny_model_folder), data)
    assert record["verdict"] is None
    assert record["base"] is None
    assert "shuffled_mean_logp" in record["checkpoint"]["figures"]


def test_rows_of_a_public_set_with_images_elsewhere_are_read(
    tiny_model_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    other = tmp_path / "mmpr.jsonl"
    other.write_text(
        "".join(
            json.dumps({"question" if key == "prompt" else key: v for key, v in row.items()}) + "\n"
            for row in rows
        )
    )
    with pytest.raises(UserError, match="does not exist"):
        diagnose(load_vlm(tiny_model_folder), other)
    args = ["diagnose", str(tiny_model_folder), "--data", str(other), "--json"]
    args += ["--image-root", str(data.parent), "--format"]
    with pytest.raises(UserError, match="--format: unknown layout"):
        app([*args, "mmpar"], standalone_mode=False)
    app([*args, "mmpr"], standalone_mode=False)
    found = json.loads(capsys.readouterr().out)
    own = diagnose(load_vlm(tiny_model_folder), data)
    assert found["checkpoint"]["figures"] == own["checkpoint"]["figures"]


def test_other_tokenizers_are_refused(tiny_model_folder: Path, data: Path) -> None:
    base, other = load_vlm(tiny_model_folder), load_vlm(tiny_model_folder)
    other.tokenizer.add_tokens(["<new>"])
    with pytest.raises(UserError, match="different tokenizers"):
        diagnose(other, data, base=base)
