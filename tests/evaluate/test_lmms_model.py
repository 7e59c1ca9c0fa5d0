"""Our engine under lmms-eval's own command line: its replies are those of `cwdpo-bench run`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import cwdpo_bench
from cwdpo_bench.demo import base_path
from cwdpo_bench.errors import UserError
from cwdpo_bench.evaluate.run import run_tasks

datasets = pytest.importorskip("datasets")
pytest.importorskip("lmms_eval")

PACKAGE = Path(cwdpo_bench.__file__).parent
GENERATE = """
task: mine_generate
dataset_path: parquet
dataset_kwargs: {data_files: {test: ROOT/rows.parquet}}
test_split: test
output_type: generate_until
doc_to_visual: !function functions.visual
doc_to_text: question
doc_to_target: answer
generation_kwargs: {max_new_tokens: 8}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
CHOOSE = """
task: mine_choose
dataset_path: parquet
dataset_kwargs: {data_files: {test: ROOT/rows.parquet}}
test_split: test
output_type: multiple_choice
doc_to_visual: !function functions.visual
doc_to_text: question
doc_to_choice: ["a red circle", "two", "blue"]
doc_to_target: gold
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two tasks over the same rows."""
    root = tmp_path_factory.mktemp("tasks")
    rng = np.random.default_rng(0)
    rows = [
        {
            "question": f"What is shown in picture {n}?" + " Look well." * (n % 3),
            "answer": "a circle",
            "gold": n % 3,
            "image": Image.fromarray(rng.integers(0, 255, (56, 56 + 28 * (n % 2), 3), np.uint8)),
        }
        for n in range(7)
    ]
    features = datasets.Features(
        {
            "question": datasets.Value("string"),
            "answer": datasets.Value("string"),
            "gold": datasets.Value("int64"),
            "image": datasets.Image(),
        }
    )
    datasets.Dataset.from_list(rows, features=features).to_parquet(root / "rows.parquet")
    (root / "functions.py").write_text("def visual(doc):\n    return [doc['image']]\n")
    for name, text in (("generate", GENERATE), ("choose", CHOOSE)):
        (root / f"{name}.yaml").write_text(text.replace("ROOT", str(root)))
    return root


def _with_entry_points(folder: Path) -> dict[str, str]:
    """An environment in which pip seems to have installed the entry points of pyproject.toml."""
    file = Path(__file__).parents[2] / "pyproject.toml"
    points = tomllib.loads(file.read_text(encoding="utf-8"))["project"]["entry-points"]
    info = folder / "cwdpo_bench_under_test-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: cwdpo-bench-under-test\nVersion: 0\n"
    )
    lines = [f"{name} = {target}" for name, target in points["lmms_eval.models"].items()]
    (info / "entry_points.txt").write_text("\n".join(["[lmms_eval.models]", *lines, ""]))
    paths = [str(folder), str(PACKAGE.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }


def _samples(folder: Path, task: str) -> list[dict]:
    (path,) = folder.rglob(f"*samples_{task}.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return sorted(rows, key=lambda row: row["doc_id"])


def test_lmms_evals_command_line_gives_our_replies_one_by_one(folder, tmp_path):
    names = ("mine_generate", "mine_choose")
    command = [sys.executable, "-m", "lmms_eval", "--model", "cwdpo_bench"]
    command += ["--model_args", f"pretrained={base_path()}", "--batch_size", "4"]
    command += ["--tasks", ",".join(names), "--include_path", str(folder)]
    command += ["--log_samples", "--output_path", str(tmp_path / "theirs")]
    done = subprocess.run(
        command,
        env=_with_entry_points(tmp_path / "site"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    # It also ends with 0 where its evaluation failed.
    assert (tmp_path / "theirs").is_dir(), done.stdout[-3000:] + done.stderr[-3000:]
    ours = run_tasks(
        base_path(),
        tasks=[f"lmms:{name}" for name in names],
        data_root=tmp_path,
        output=tmp_path / "ours",
        batch_size=4,
        include_path=folder,
    )

    generated = _samples(tmp_path / "theirs", "mine_generate")
    replies = [row["filtered_resps"] for row in generated]
    assert replies == list(ours.samples("lmms:mine_generate")["prediction"])
    assert all(replies)
    chosen = _samples(tmp_path / "theirs", "mine_choose")
    logps = [list(x) for x in ours.samples("lmms:mine_choose")["option_log_probabilities"]]
    losses = [[float(reply[0]) for reply in row["filtered_resps"]] for row in chosen]
    np.testing.assert_allclose(-np.array(losses), np.array(logps), atol=1e-4)
    assert [row["acc"] for row in chosen] == list(ours.samples("lmms:mine_choose")["lmms:acc"])


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({}, "pretrained=CHECKPOINT"),
        ({"pretrained": "x", "batchsize": 4}, "batchsize: did you mean 'batch_size'"),
        ({"pretrained": "/no/such/folder"}, "no/such/folder"),
    ],
)
def test_wrong_arguments_are_told(arguments, match):
    from cwdpo_bench.evaluate.lmms_model import CwdpoBench

    with pytest.raises(UserError, match=match):
        CwdpoBench(**arguments)
