"""A reader's copy-paste can't rot: every `$ cwdpo-bench …` line of README runs, in its order.

The one change is the demo's size: `demo` runs in its smoke form, whose folder the later lines use.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _commands() -> list[str]:
    blocks = re.findall(r"^```console\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    assert all(line.startswith("$ ") for line in lines)
    return [part.strip() for line in lines for part in line[2:].split("&&")]


def test_installation_and_test_command_stand_in_readme() -> None:
    commands = _commands()
    assert commands[:2] == ["pip install .", "cwdpo-bench demo"]
    assert "pip install tox" in commands
    assert "tox" in commands


def test_every_command_of_the_front_door_is_shown() -> None:
    shown = {command.split()[1] for command in _commands() if command.startswith("cwdpo-bench ")}
    assert shown == {
        "demo",
        "train",
        "diagnose",
        "export",
        "negatives",
        "run",
        "score",
        "study",
        "compare",
        "gate",
        "leaderboard",
        "report",
        "doctor",
    }


def test_every_room_stands_in_the_tree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for package in project["tool"]["setuptools"]["packages"][1:]:
        assert f"\n{package.split('.')[1]}/ " in README


def test_every_file_that_readme_links_to_is_there() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.slow
def test_the_commands_run_as_they_stand(tmp_path: Path) -> None:
    captions = {1: "a red circle on grey", 2: "a blue square above a star"}
    (tmp_path / "results.json").write_text(
        json.dumps([{"image_id": i, "caption": text} for i, text in captions.items()])
    )
    annotations = [{"image_id": i, "caption": text} for i, text in captions.items()]
    images = [{"id": i} for i in captions]
    (tmp_path / "captions.json").write_text(
        json.dumps({"images": images, "annotations": annotations})
    )
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    for command in _commands():
        if not command.startswith("cwdpo-bench "):
            continue
        arguments = shlex.split(command)[1:]
        if arguments == ["demo"]:
            arguments.append("--smoke")
        done = subprocess.run(
            [sys.executable, "-m", "cwdpo_bench", *arguments],
            cwd=tmp_path,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    for left in ("cwdpo-demo/report.html", "checkpoints/mine/config.json", "LEADERBOARD.md"):
        assert (tmp_path / left).is_file()
