"""The training benchmarks run; that losses equal TRL's is part of them, times are not judged."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def _run(script: str, *options: str) -> str:
    command = [sys.executable, str(BENCHMARKS / script), "--smoke", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_our_first_losses_are_trls() -> None:
    """The script stops with an error where one of the losses differs by more than 1e-4."""
    rows = _run("train_vs_trl.py").splitlines()
    assert len(rows) == 4
    assert all("×" in row for row in rows[2:])


@pytest.mark.slow
def test_the_scaling_table_has_every_point(tmp_path: Path) -> None:
    out = _run("train_scaling.py", "--output", str(tmp_path / "scaling"))
    assert (tmp_path / "scaling.png").stat().st_size > 0
    table = (tmp_path / "scaling.md").read_text()
    assert table in out
    for row in ("| completion | 4 |", "| completion | 8 |", "| vocabulary | 4096 |"):
        assert row in table
