"""The page on calibration runs as it stands, and prints what it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "CALIBRATION.md"

pytestmark = pytest.mark.skipif(not PAGE.is_file(), reason="the docs are not beside the tests")


def test_the_page_runs_without_torch_and_prints_what_it_says(tmp_path: Path) -> None:
    text = PAGE.read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL))
    code += "\nimport sys; assert not {'torch', 'transformers', 'pandas'} & set(sys.modules)\n"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONUTF8": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "reliability.png").stat().st_size > 10_000
    (printed,) = re.findall(r"```text\n(.*?)```", text, flags=re.DOTALL)
    assert done.stdout == printed
