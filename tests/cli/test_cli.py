"""The front door: fast help, one-line errors, exit statuses, machine-readable output."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

import cwdpo_bench
from cwdpo_bench.cli import main
from cwdpo_bench.cli.evaluate import _data_root
from cwdpo_bench.errors import UserError

COMMANDS = [
    "demo",
    "train",
    "diagnose",
    "run",
    "score",
    "compare",
    "gate",
    "leaderboard",
    "report",
    "doctor",
]


class Done(NamedTuple):
    """What a command left: exit status and both streams."""

    returncode: int
    stdout: str
    stderr: str


Cli = Callable[..., Done]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs the front door in this process: a process of its own would load torch every time."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(*arguments: str | Path, **environment: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["cwdpo-bench", *map(str, arguments)])
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        code: object = 0
        try:
            main()
        except SystemExit as done:
            code = done.code or 0
        assert isinstance(code, int)
        return Done(code, *capsys.readouterr())

    return run


def _error(cli: Cli, *arguments: str | Path, **environment: str) -> str:
    """The one line on standard error of a command that must fail for a user's mistake."""
    done = cli(*arguments, **environment)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(lines) == 1, done.stderr
    return lines[0]


@pytest.fixture
def captions(tmp_path: Path) -> tuple[Path, Path]:
    texts = {1: "a red circle", 2: "a blue square above a star"}
    predictions, references = tmp_path / "predictions.json", tmp_path / "references.json"
    predictions.write_text(
        json.dumps([{"image_id": i, "caption": text} for i, text in texts.items()])
    )
    annotations = [
        {"id": 10 * i + k, "image_id": i, "caption": f"{text} on grey"}
        for i, text in texts.items()
        for k in range(2)
    ]
    references.write_text(
        json.dumps({"images": [{"id": i} for i in texts], "annotations": annotations})
    )
    return predictions, references


@pytest.fixture
def replies(tmp_path: Path) -> Path:
    """MMMU's official output folder with four answers, scored without Java."""
    folder = tmp_path / "replies" / "Math"
    folder.mkdir(parents=True)
    rows = [
        {
            "id": f"validation_Math_{i}",
            "question_type": "multiple-choice",
            "answer": "A",
            "all_choices": ["A", "B"],
            "index2ans": {"A": "one", "B": "two"},
            "response": "A" if i < 4 else "B",
        }
        for i in range(1, 5)
    ]
    (folder / "output.json").write_text(json.dumps(rows))
    return folder.parent


def test_help_of_every_command_works_and_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom cwdpo_bench.cli import main\n"
        f"for command in [[], *([name] for name in {COMMANDS!r})]:\n"
        "    sys.argv = ['cwdpo-bench', *command, '--help']\n"
        "    try:\n        main()\n    except SystemExit as done:\n        assert not done.code\n"
        "heavy = {'torch', 'transformers', 'pandas'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage: cwdpo-bench") == 1 + len(COMMANDS)
    assert all(f"  {name} " in done.stdout for name in COMMANDS)


def test_the_module_is_a_front_door_too() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cwdpo_bench", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == f"cwdpo-bench {cwdpo_bench.__version__}"


def test_score_and_compare_give_json(cli: Cli, replies: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = cli("score", "--task", "mmmu", "--predictions", replies, "--output", run, "--json")
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert results == json.loads((run / "results.json").read_text())
    assert results["tasks"]["mmmu"]["metrics"]["accuracy"]["value"] == 0.75
    done = cli("compare", run, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tasks"]


def test_leaderboard_writes_markdown(cli: Cli, replies: Path, tmp_path: Path) -> None:
    run, board = tmp_path / "run", tmp_path / "LEADERBOARD.md"
    cli("score", "--task", "mmmu", "--predictions", replies, "--output", run)
    done = cli("leaderboard", run, "--format", "markdown", "--output", board)
    assert done.returncode == 0, done.stderr
    assert "75.0" in board.read_text()
    assert "142.6" not in board.read_text()
    assert cli("leaderboard", run, "--output", board, "--published").returncode == 0
    assert "142.6" in board.read_text()


def test_leaderboard_writes_every_format_and_updates_a_file(
    cli: Cli, replies: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    cli("score", "--task", "mmmu", "--predictions", replies, "--output", run)
    for name, sign in {
        "csv": "task,group,system",
        "latex": r"\toprule",
        "html": "<!doctype html>",
        "model-index": "model-index:",
    }.items():
        done = cli("leaderboard", run, "--format", name, "--output", tmp_path / name)
        assert done.returncode == 0, done.stderr
        assert sign in (tmp_path / name).read_text()
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- cwdpo-bench:begin -->\n<!-- cwdpo-bench:end -->\nb\n")
    assert cli("leaderboard", run, "--update", readme).returncode == 0
    assert "75.0" in readme.read_text()
    assert "one of --output and --update" in _error(cli, "leaderboard", run)
    assert "csv" in _error(cli, "leaderboard", run, "--format", "cvs", "--output", "x")


def test_compare_gives_csv_and_takes_named_systems(cli: Cli, replies: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    cli("score", "--task", "mmmu", "--predictions", replies, "--output", run)
    done = cli("compare", f"mine={run}", "--csv")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1].startswith("mmmu,,mine,mine,accuracy,0.75,")
    assert "choose one" in _error(cli, "compare", run, "--csv", "--json")


def test_a_table_that_cannot_be_written_is_one_line(
    cli: Cli, replies: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    cli("score", "--task", "mmmu", "--predictions", replies, "--output", run)
    assert "cannot be written" in _error(cli, "leaderboard", run, "--output", "/proc/none/x.md")


def test_report_writes_one_page(cli: Cli, replies: Path, tmp_path: Path) -> None:
    run, page = tmp_path / "run", tmp_path / "report.html"
    cli("score", "--task", "mmmu", "--predictions", replies, "--output", run)
    done = cli("report", run, "--output", page, "--title", "Nightly")
    assert done.returncode == 0, done.stderr
    assert "<title>Nightly</title>" in page.read_text()
    assert f"{page}: {page.stat().st_size:,} bytes" in done.stdout
    assert "--output, or open the report with --serve" in _error(cli, "report", run)
    assert "SYSTEM=FOLDER" in _error(cli, "report", run, "--output", page, "--checkpoint", "x")
    assert "cannot be written" in _error(cli, "report", run, "--output", "/proc/none/x.html")


def test_report_is_served_until_it_is_interrupted(cli: Cli, replies: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    cli("score", "--task", "mmmu", "--predictions", replies, "--output", run)
    screens = ("DISPLAY", "WAYLAND_DISPLAY")
    with subprocess.Popen(
        [sys.executable, "-m", "cwdpo_bench", "report", str(run), "--serve"],
        env={name: value for name, value in os.environ.items() if name not in screens},
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        try:
            assert server.stdout is not None
            address = server.stdout.readline().split()[0]
            assert address.startswith("http://127.0.0.1:")
            with urllib.request.urlopen(address) as answer:
                assert b"<!doctype html>" in answer.read()
            server.send_signal(signal.SIGINT)
            assert server.wait(timeout=30) == 0
        finally:
            # Leaving the block waits for it, for ever if need be.
            server.kill()


def test_an_unknown_format_is_named(cli: Cli, replies: Path, tmp_path: Path) -> None:
    line = _error(cli, "leaderboard", replies, "--format", "word", "--output", tmp_path / "x")
    assert "'word'" in line


def test_gate_answers_by_its_exit_status(cli: Cli, replies: Path, tmp_path: Path) -> None:
    run, file = tmp_path / "run", tmp_path / "baseline.npz"
    cli("score", "--task", "mmmu", "--predictions", replies, "--output", run)
    done = cli("gate", "--candidate", run, "--write-baseline", file)
    assert (done.returncode, done.stderr) == (0, "")
    junit, summary = tmp_path / "junit.xml", tmp_path / "summary.md"
    forms = ("--junit", junit, "--summary", summary)
    done = cli("gate", "--candidate", run, "--baseline", file, *forms)
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[-1].startswith("gate: passed")
    assert junit.read_text().startswith("<?xml")
    assert summary.read_text().startswith("### ")
    done = cli("gate", "--candidate", run, "--baseline", "published:CW-DPO", "--json")
    assert json.loads(done.stdout)["exit_status"] == done.returncode == 3


@pytest.mark.parametrize(
    "arguments",
    [
        ("--candidate", "none", "--baseline", "none"),
        ("--candidate", "none"),
        ("--candidate", "none", "--write-baseline", "x"),
        ("--candidate", "none", "--write-baseline", "x", "--baseline", "y"),
        ("--candidate", "none", "--baseline", "y", "--policy", "none.yaml"),
        ("--canddate", "none"),
        ("--candidate", "none", "--baseline", "y", "--inconclusive", "maybe"),
        ("--candidate", "none", "--baseline", "y", "--junit", "/proc/none/x.xml"),
    ],
)
def test_no_mistake_in_a_gate_is_read_as_a_verdict(cli: Cli, arguments: tuple[str, ...]) -> None:
    done = cli("gate", *arguments)
    assert done.returncode == 3
    assert "Traceback" not in done.stderr


def test_a_fault_in_a_gate_is_no_regression(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("ours")

    monkeypatch.setattr("cwdpo_bench.leaderboards.gate.run_gate", fail)
    done = cli("gate", "--candidate", "a", "--baseline", "b")
    assert done.returncode == 3
    assert "RuntimeError: ours" in done.stderr


def test_a_missing_model_is_one_line(cli: Cli) -> None:
    line = _error(
        cli, "run", "--model", "/no/model", "--data-root", ".", "--output", "/tmp/none-run"
    )
    assert "/no/model" in line or "data" in line


def test_an_unknown_task_names_the_nearest(
    cli: Cli, tmp_path: Path, captions: tuple[Path, Path]
) -> None:
    predictions, references = captions
    line = _error(
        cli,
        "score",
        "--task",
        "coca",
        "--predictions",
        predictions,
        "--references",
        references,
        "--output",
        tmp_path / "run",
    )
    assert "did you mean 'coco'" in line
    assert not (tmp_path / "run").exists()


def test_run_without_data_says_how_to_name_them(
    cli: Cli, tiny_model_folder: Path, tmp_path: Path
) -> None:
    line = _error(
        cli, "run", "--model", tiny_model_folder, "--output", tmp_path / "run", CWDPO_BENCH_DATA=""
    )
    assert "--data-root" in line
    assert "CWDPO_BENCH_DATA" in line


def test_train_names_the_unknown_key(cli: Cli, tiny_model_folder: Path, tmp_path: Path) -> None:
    line = _error(
        cli,
        "train",
        "dpo",
        "--model",
        tiny_model_folder,
        "--data",
        tmp_path / "no.jsonl",
        "--output",
        tmp_path / "out",
        "objective.betta=1",
    )
    assert "objective.betta" in line
    assert "did you mean 'beta'" in line
    assert not (tmp_path / "out").exists()


def test_train_names_the_missing_data(cli: Cli, tiny_model_folder: Path, tmp_path: Path) -> None:
    line = _error(
        cli,
        "train",
        "dpo",
        "--model",
        tiny_model_folder,
        "--data",
        tmp_path / "no.jsonl",
        "--output",
        tmp_path / "out",
    )
    assert "no.jsonl" in line
    assert not (tmp_path / "out").exists()


def test_a_missing_model_leaves_no_folder_behind(cli: Cli, tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    rows = [{"prompt": "a", "chosen": f"b{i}", "rejected": f"c{i}"} for i in range(20)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = _error(
        cli, "train", "dpo", "--model", "/no/model", "--data", data, "--output", tmp_path / "out"
    )
    assert "/no/model" in line
    assert not (tmp_path / "out").exists()


def test_score_without_references_says_so(
    cli: Cli, tmp_path: Path, captions: tuple[Path, Path]
) -> None:
    line = _error(
        cli, "score", "--task", "coco", "--predictions", captions[0], "--output", tmp_path / "run"
    )
    assert "--references" in line


def test_score_wants_a_run_folder_or_a_file_of_values(
    cli: Cli, tmp_path: Path, captions: tuple[Path, Path]
) -> None:
    named = ("score", "--task", "coco", "--predictions", captions[0], "--references", captions[1])
    both = ("--output", tmp_path / "run", "--per-sample", tmp_path / "values.jsonl")
    for outputs in ((), both):
        assert "--per-sample" in _error(cli, *named, *outputs)
    alone = cli(*named, "--per-sample", tmp_path / "values.jsonl", "--json")
    lines = (tmp_path / "values.jsonl").read_text().splitlines()
    assert json.loads(alone.stdout) == [json.loads(line) for line in lines]


def test_a_broken_java_home_is_named(cli: Cli, captions: tuple[Path, Path], tmp_path: Path) -> None:
    predictions, references = captions
    line = _error(
        cli,
        "score",
        "--task",
        "coco",
        "--predictions",
        predictions,
        "--references",
        references,
        "--output",
        tmp_path / "run",
        JAVA_HOME="/no/java",
    )
    assert "JAVA_HOME" in line
    assert "/no/java" in line
    assert not (tmp_path / "run").exists()


def test_compare_of_a_folder_without_run_is_one_line(cli: Cli, tmp_path: Path) -> None:
    assert "results.json" in _error(cli, "compare", tmp_path)


def test_an_output_folder_of_another_run_is_refused(
    cli: Cli, replies: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert cli("score", "--task", "mmmu", "--predictions", replies, "--output", run).returncode == 0
    before = (run / "results.json").read_bytes()
    other = replies.rename(tmp_path / "other")
    assert "run" in _error(cli, "score", "--task", "mmmu", "--predictions", other, "--output", run)
    assert (run / "results.json").read_bytes() == before


def _checkpoint(folder: Path, model: str) -> Path:
    folder.mkdir()
    (folder / "provenance.json").write_text(json.dumps({"model": {"name": model}}))
    return folder


def test_what_was_trained_from_the_demo_is_scored_on_the_demos_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CWDPO_BENCH_DATA", raising=False)
    monkeypatch.setattr("cwdpo_bench.demo.data_root", lambda: tmp_path / "rendered")
    first = _checkpoint(tmp_path / "first", "demo")
    second = _checkpoint(tmp_path / "second", str(first))
    foreign = _checkpoint(tmp_path / "foreign", "Qwen/Qwen2.5-VL-7B-Instruct")
    for model in ("demo", str(first), str(second)):
        assert _data_root(model, None) == tmp_path / "rendered"
    for model in (str(foreign), str(tmp_path), "Qwen/Qwen2.5-VL-7B-Instruct"):
        with pytest.raises(UserError, match="--data-root"):
            _data_root(model, None)


def test_the_data_root_is_the_option_then_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CWDPO_BENCH_DATA", str(tmp_path / "variable"))
    assert _data_root("demo", tmp_path / "option") == tmp_path / "option"
    assert _data_root("demo", None) == tmp_path / "variable"


def test_tasks_are_listed_without_a_model(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco/dataset_coco.json").write_text("{}")
    listed = cli("run", "--tasks", "list", "--data-root", tmp_path)
    assert listed.returncode == 0
    assert f"coco, test (under {tmp_path})" in listed.stdout
    assert f"pope, coco (not under {tmp_path})" in listed.stdout
    lines = json.loads(cli("run", "--tasks", "list", "--json", CWDPO_BENCH_DATA="").stdout)
    assert {line["task"]: line["there"] for line in lines}["coco"] is None
    assert all(line["needs"] for line in lines)
    assert "--model" in _error(cli, "run", "--tasks", "coco", "--output", tmp_path / "run")


def test_the_doctors_exit_status_says_whether_something_needed_is_missing(
    cli: Cli, tmp_path: Path
) -> None:
    done = cli("doctor", "--json", CWDPO_BENCH_DATA="", JAVA_HOME="")
    checks = json.loads(done.stdout)
    assert done.returncode == (2 if any(c["state"] == "broken" for c in checks) else 0)
    broken = cli("doctor", "--data-root", tmp_path, JAVA_HOME=str(tmp_path))
    assert broken.returncode == 2
    assert "broken  java: JAVA_HOME=" in broken.stdout
    assert "absent  data of coco: not under" in broken.stdout
