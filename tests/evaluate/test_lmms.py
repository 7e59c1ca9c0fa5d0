"""Any task of lmms-eval: one's own YAML files, asked and scored by lmms-eval's functions."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from scipy.special import logsumexp

from cwdpo_bench.errors import UserError
from cwdpo_bench.evaluate.engine import ChoiceAnswer
from cwdpo_bench.evaluate.lmms import load_samples, load_tasks
from cwdpo_bench.evaluate.lmms_scores import score_replies
from cwdpo_bench.evaluate.run import run_tasks
from cwdpo_bench.leaderboards import compare_runs, to_markdown

datasets = pytest.importorskip("datasets")
pytest.importorskip("lmms_eval")

FUNCTIONS = """
from sklearn.metrics import f1_score

def visual(doc):
    return [doc["image"]]

def judged(doc, results):
    right = results[0].strip().lower() == doc["answer"].lower()
    return {"right": float(right), "percent": {"score": float(right), "id": doc["name"]},
            "f1": (doc["answer"], results[0])}

def percent(items):
    return 100 * sum(item["score"] for item in items) / len(items)

def f1(items):
    return f1_score([gold == "yes" for gold, _ in items], [said == "yes" for _, said in items])

def submit(items, args):
    import json, os
    path = os.path.join(args.output_path, "submissions")
    os.makedirs(path, exist_ok=True)
    json.dump(len(items), open(os.path.join(path, "mine.json"), "w"))
"""
GENERATE = """
task: mine_polar
dataset_path: parquet
dataset_kwargs: {data_files: {test: ROOT/rows.parquet}}
test_split: test
output_type: generate_until
doc_to_visual: !function functions.visual
doc_to_text: "{{question}} Answer yes or no."
doc_to_target: answer
generation_kwargs: {max_new_tokens: 6, until: ["STOP"]}
process_results: !function functions.judged
metric_list:
  - {metric: right, aggregation: mean, higher_is_better: true}
  - {metric: percent, aggregation: !function functions.percent, higher_is_better: true}
  - {metric: f1, aggregation: !function functions.f1, higher_is_better: true}
  - {metric: right_files, aggregation: mean, higher_is_better: true}
"""
CHOICES = """
task: mine_choice
dataset_path: json
dataset_kwargs: {data_files: {test: ROOT/rows.json}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
LETTERED = """
task: mine_lettered
dataset_path: json
dataset_kwargs: {data_files: {test: ROOT/lettered.json}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}\\nA. {{A}}\\nB. {{B}}"
doc_to_target: answer
generation_kwargs: {max_new_tokens: 4, temperature: 0.7, do_sample: true}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
GROUP = """
group: mine
task: [mine_polar, mine_choice]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four tasks and a group in YAML, with their data and functions beside them."""
    root = tmp_path_factory.mktemp("tasks")
    rows = [
        {
            "name": f"row {n}",
            "question": f"Is there a circle, number {n}?",
            "answer": ("yes", "no")[n % 2],
            "image": Image.new("RGB", (56, 56), ("red", "blue", "green")[n % 3]),
        }
        for n in range(6)
    ]
    columns = {key: datasets.Value("string") for key in ("name", "question", "answer")}
    features = datasets.Features({**columns, "image": datasets.Image()})
    datasets.Dataset.from_list(rows, features=features).to_parquet(root / "rows.parquet")
    choices = [
        {"question": f"Number {n}?", "choices": ["a red circle", "two", "blue"], "gold": n % 3}
        for n in range(5)
    ]
    (root / "rows.json").write_text("\n".join(map(json.dumps, choices)))
    lettered = [
        {"question": "Which?", "A": "red", "B": "blue", "answer": "AB"[n % 2]} for n in range(4)
    ]
    (root / "lettered.json").write_text("\n".join(map(json.dumps, lettered)))
    (root / "functions.py").write_text(FUNCTIONS)
    for name, text in (
        ("polar", GENERATE),
        ("choice", CHOICES),
        ("lettered", LETTERED),
        ("group", GROUP),
    ):
        (root / f"{name}.yaml").write_text(text.replace("ROOT", str(root)))
    return root


def _loaded(folder, name, limit=None):
    return load_samples(name, load_tasks(name, folder)[name], limit)


def test_a_task_of_generation_is_asked_as_lmms_eval_asks(folder):
    loaded = _loaded(folder, "mine_polar")
    first = loaded.samples[0]

    assert first.prompt == "Is there a circle, number 0? Answer yes or no."
    assert [image.size for image in first.images[0].load()] == [(56, 56)]
    assert loaded.max_new_tokens == 6
    assert first.option_words == ("Yes", "No")
    assert [s.gold for s in loaded.samples] == ["A", "B"] * 3
    assert len(_loaded(folder, "mine_polar", limit=2).samples) == 2


def test_its_own_metrics_are_those_of_its_functions(folder, tmp_path):
    loaded = _loaded(folder, "mine_polar")
    texts = ["yes", "no", "no STOP yes", "no", "maybe", "yes"]
    answers = [ChoiceAnswer(text, None) for text in texts]
    rows, warnings = score_replies(loaded, loaded.samples, answers, tmp_path)

    assert list(rows["prediction"])[2] == "no "
    assert list(rows["lmms:right"]) == [1, 1, 0, 1, 0, 0]
    assert list(rows["lmms:percent"]) == [100, 100, 0, 100, 0, 0]
    # f1 = 2·1 / (2·1 + 1 + 2); no mean over samples, so no column.
    assert "lmms:f1" not in rows
    assert any(warning.startswith("lmms:f1 = 0.4 by the task's own") for warning in warnings)


def test_a_choice_takes_the_most_probable_and_the_most_probable_a_character(folder, tmp_path):
    rng = np.random.default_rng(0)
    loaded = _loaded(folder, "mine_choice")
    logps = rng.normal(-5, 3, size=(5, 3))
    answers = [ChoiceAnswer("two", row) for row in logps]
    rows, _ = score_replies(loaded, loaded.samples, answers, tmp_path)
    lengths = np.array([len(text) for text in ("a red circle", "two", "blue")])
    golds = np.arange(5) % 3

    assert list(rows["lmms:acc"]) == list((logps.argmax(1) == golds).astype(float))
    assert list(rows["lmms:acc_norm"]) == list(((logps / lengths).argmax(1) == golds).astype(float))
    assert list(rows["option_correct"]) == list(logps.argmax(1) == golds)
    assert loaded.samples[0].option_words == ("a red circle", "two", "blue")


def test_options_that_the_prompt_shows_with_letters_are_found(folder):
    loaded = _loaded(folder, "mine_lettered")

    assert loaded.samples[1].options == ("red", "blue")
    assert loaded.samples[1].option_replies == ("A", "B")
    assert loaded.samples[1].gold == "B"
    assert loaded.warnings == ["the task asks for sampled replies; they are greedy here"]


def test_a_group_runs_and_is_compared_like_any_other(folder, tiny_model_folder, tmp_path):
    settings = {"data_root": tmp_path, "include_path": folder}
    run = run_tasks(tiny_model_folder, tasks=["lmms:mine"], output=tmp_path / "run", **settings)
    task = run.results["tasks"]["lmms:mine_polar"]

    assert list(run.results["tasks"]) == ["lmms:mine_polar", "lmms:mine_choice"]
    assert (tmp_path / "run/samples/lmms-mine_choice.parquet").is_file()
    assert {"lmms:right", "lmms:percent", "accuracy_option", "ece", "brier"} <= set(task["metrics"])
    assert {"lmms:acc", "accuracy_option"} <= set(
        run.results["tasks"]["lmms:mine_choice"]["metrics"]
    )
    assert "source:lmms-eval-" in task["signature"]
    rows = run.samples("lmms:mine_choice")
    assert all(logsumexp(list(logps)) < 0 for logps in rows["option_log_probabilities"])
    run_tasks(
        tiny_model_folder,
        tasks=["lmms:mine"],
        output=tmp_path / "again",
        **settings,
        model_name="b",
    )
    comparison = compare_runs([tmp_path / "run", tmp_path / "again"])
    assert "lmms:right" in to_markdown(comparison)


def test_a_limit_takes_the_first_rows(folder, tiny_model_folder, tmp_path):
    run = run_tasks(
        tiny_model_folder,
        tasks=["lmms:mine_polar"],
        output=tmp_path / "run",
        data_root=tmp_path,
        include_path=folder,
        limit=2,
    )
    assert run.results["tasks"]["lmms:mine_polar"]["n"] == 2


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("mine_polr", "unknown task lmms:mine_polr; did you mean 'mine_polar'"),
        ("pope", "lmms:pope: lmms-eval cannot load it .ConnectionError: no hub.*hub reachable"),
    ],
)
def test_what_cannot_be_loaded_is_told(folder, monkeypatch, name, match):
    def unreachable(**_):
        raise ConnectionError("no hub here")

    if name == "pope":
        monkeypatch.setattr("tenacity.nap.time.sleep", lambda _: None)
        monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError, match=match):
        load_tasks(name, folder)


def test_a_folder_that_is_not_there_is_told(tmp_path):
    with pytest.raises(UserError, match=r"--include-path .*: no such folder"):
        load_tasks("mine_polar", tmp_path / "no")


def test_a_task_that_asks_for_more_than_text_is_refused(folder):
    task = load_tasks("mine_polar", folder)["mine_polar"]
    task.OUTPUT_TYPE = "generate_until_multi_round"
    with pytest.raises(UserError, match="output_type 'generate_until_multi_round' cannot be run"):
        load_samples("mine_polar", task)
