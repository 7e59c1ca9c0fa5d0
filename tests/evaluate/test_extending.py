"""The worked example of a benchmark in docs/EXTENDING.md, taken from the page and run."""

import re
import sys
from pathlib import Path

import pytest
from PIL import Image

from cwdpo_bench.errors import UserError
from cwdpo_bench.evaluate.run import run_tasks
from cwdpo_bench.evaluate.tasks import find_task

PAGE = (Path(__file__).parents[2] / "docs" / "EXTENDING.md").read_text(encoding="utf-8")
ROWS = "id,image,question,answer\nq1,a.png,How many dots?,two\nq2,a.png,How many lines?,one\n"


@pytest.fixture
def example(tmp_path, monkeypatch):
    (text,) = re.findall(r"^`counting.py`, .*?```python\n(.*?)```", PAGE, flags=re.S | re.M)
    (tmp_path / "counting.py").write_text(text, encoding="utf-8")
    (tmp_path / "root" / "counting").mkdir(parents=True)
    (tmp_path / "root" / "counting" / "questions.csv").write_text(ROWS)
    Image.new("RGB", (84, 84)).save(tmp_path / "root" / "counting" / "a.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("counting", None)


def test_the_example_is_run_by_its_name(example, tiny_model_folder):
    folder = run_tasks(
        tiny_model_folder,
        tasks=["counting:TASK"],
        data_root=example / "root",
        output=example / "run",
    )
    task = folder.results["tasks"]["counting"]
    assert task["n"] == 2
    assert {"accuracy", "accuracy_option", "ece"} <= task["metrics"].keys()
    assert set(task["groups"]) == {"one", "two"}
    assert folder.samples("counting")["cluster"].tolist() == ["a.png", "a.png"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("counting:TASKS", "did you mean 'TASK'"),
        ("counting:load", "no CaptionTask or ChoiceTask 'load'"),
        ("count:TASK", "cannot import 'count'"),
    ],
)
@pytest.mark.usefixtures("example")
def test_a_wrong_name_is_told(name, said):
    with pytest.raises(UserError, match=said):
        find_task(name)


def test_a_bad_row_of_the_example_is_named(example):
    (example / "root" / "counting" / "questions.csv").write_text(ROWS.replace("two", "many"))
    with pytest.raises(UserError, match=r"line 2: answer 'many'"):
        find_task("counting:TASK").load(example / "root")


def test_a_name_of_ours_is_not_taken(example):
    text = (example / "counting.py").read_text().replace('name="counting"', 'name="mmmu"')
    (example / "counting.py").write_text(text)
    with pytest.raises(UserError, match="is the name of a task of ours"):
        find_task("counting:TASK")
