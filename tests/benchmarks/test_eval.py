"""The evaluation benchmark runs; times are not judged."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "eval_vs_lmms.py"


@pytest.mark.slow
def test_every_side_is_measured() -> None:
    pytest.importorskip("decord")
    pytest.importorskip("lmms_eval")

    command = [sys.executable, str(SCRIPT), "--smoke"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr[-3000:]
    for row in (
        "| ours |",
        "| ours, the captions alone |",
        "| lmms-eval, batch 1 (its default) |",
        "| lmms-eval, batch 16 |",
        "| options behind one prompt |",
        "| one row an option |",
    ):
        assert row in done.stdout
