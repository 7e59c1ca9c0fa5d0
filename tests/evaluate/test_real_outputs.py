"""Real outputs beside the project give the figures of the official scorers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cwdpo_bench.evaluate.metrics import METRICS
from cwdpo_bench.evaluate.results import read_run
from cwdpo_bench.evaluate.score import score_captions_files, score_mmmu_folder

REAL = Path(__file__).parents[2].parent / "shared" / "real"

pytestmark = pytest.mark.skipif(not REAL.is_dir(), reason="the real outputs are not here")


def test_flickr8k_gives_the_scores_of_pycocoevalcap(tmp_path: Path) -> None:
    folder = REAL / "flickr8k"
    results = score_captions_files(
        "coco", folder / "human_predictions.json", folder / "references.json", tmp_path
    )
    metrics = results["tasks"]["coco"]["metrics"]
    official = json.loads((folder / "expected_scores.json").read_text())
    assert len(official) == 7
    for name, value in official.items():
        ours = metrics[name.replace("Bleu_", "BLEU-").replace("_", "-")]["value"]
        assert ours == pytest.approx(value, abs=1e-9), name
    # The written samples alone give the same again.
    samples = read_run(tmp_path).samples("coco")
    for name, metric in metrics.items():
        value = METRICS[name].value(METRICS[name].statistics(samples).sum(axis=0))
        assert float(value) == pytest.approx(metric["value"], abs=1e-12), name


def test_mmmu_gives_the_official_accuracy(tmp_path: Path) -> None:
    folder = REAL / "mmmu" / "llava1.5_13b"
    official = score_mmmu_folder(folder, tmp_path / "random", "random")["tasks"]["mmmu"]
    assert official["n"] == 900
    assert round(official["metrics"]["accuracy"]["value"], 3) == 0.367
    ours = score_mmmu_folder(folder, tmp_path / "wrong")["tasks"]["mmmu"]
    # Two replies name no letter; the official guess makes one of them right.
    assert ours["metrics"]["parse_failures"]["value"] == pytest.approx(2 / 900)
    assert ours["metrics"]["accuracy"]["value"] == pytest.approx(329 / 900)
    assert official["metrics"]["accuracy"]["value"] == pytest.approx(330 / 900)
    assert len(ours["groups"]) == 36
