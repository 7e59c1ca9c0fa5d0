"""Who may import whom: the rooms of DESIGN, held over the syntax trees.

A room's files may import the rooms in its row, and the ground floor. Imports inside functions
count: laziness is about time, not about knowledge.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GROUND = {"errors", "files", "markup", "named", "progress", "quiet", ""}
ROOMS = {
    "calibration": set(),
    "vlm": set(),
    "evaluate": {"calibration", "vlm"},
    "train": {"calibration", "vlm", "evaluate"},
    "leaderboards": {"calibration", "evaluate"},
    "demo": {"calibration", "vlm", "evaluate", "train", "leaderboards"},
    "study": {"calibration", "vlm", "evaluate", "train", "leaderboards", "demo"},
    "cli": {"calibration", "vlm", "evaluate", "train", "leaderboards", "demo", "study"},
}
# Of evaluate, the leaderboards know the results format and the metrics' rule, not the engines.
LEADERBOARDS_OF_EVALUATE = {"results", "metrics"}


def _imports(path: Path) -> Iterator[tuple[str, ...]]:
    """The parts after `cwdpo_bench` of every import in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            # `from cwdpo_bench.evaluate import run` names a module in its last word.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            names = [f"cwdpo_bench.{path.parent.name}.{node.module or ''}"]
        else:
            continue
        for name in names:
            parts = tuple(name.split("."))
            if parts[0] == "cwdpo_bench":
                yield parts[1:]


def _room_of(parts: tuple[str, ...]) -> str:
    return parts[0] if parts and parts[0] in {*ROOMS, *GROUND} else ""


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_its_row_allows(room: str) -> None:
    files = sorted((ROOT / room).glob("**/*.py"))
    assert files
    for path in files:
        for parts in _imports(path):
            target = _room_of(parts)
            allowed = target in GROUND or target == room or target in ROOMS[room]
            assert allowed, f"{path.relative_to(ROOT)} imports {'.'.join(parts)}"


def test_leaderboards_know_only_the_results_of_evaluate() -> None:
    for path in sorted((ROOT / "leaderboards").glob("*.py")):
        for parts in _imports(path):
            if parts[0] == "evaluate":
                assert parts[1] in LEADERBOARDS_OF_EVALUATE, f"{path.name}: {'.'.join(parts)}"


def test_the_ground_floor_knows_no_room() -> None:
    for name in GROUND - {""}:
        for parts in _imports(ROOT / f"{name}.py"):
            assert _room_of(parts) in GROUND, f"{name}.py imports {'.'.join(parts)}"


def test_every_room_is_packaged() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = set(project["tool"]["setuptools"]["packages"])
    files = [path for room in ROOMS for path in (ROOT / room).glob("**/*.py")]
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in files}
    assert packages == {"cwdpo_bench", *(f"cwdpo_bench.{folder}" for folder in folders)}


def test_evaluate_leaves_hugging_face_its_name() -> None:
    """Started in the root, `import evaluate` must not find our folder as a regular package."""
    assert not (ROOT / "evaluate" / "__init__.py").exists()
    code = "import importlib.util as u; s = u.find_spec('evaluate'); print(s and s.origin)"
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    # Theirs may lie below the root too: tox keeps its environment there.
    assert not out.strip().startswith(str(ROOT / "evaluate"))


@pytest.mark.parametrize(
    ("module", "banned"),
    [
        ("cwdpo_bench.cli", {"torch", "transformers", "pandas", "numpy", "matplotlib"}),
        ("cwdpo_bench.demo", {"torch", "transformers", "pandas"}),
        ("cwdpo_bench.calibration", {"torch", "transformers", "pandas"}),
        ("cwdpo_bench.evaluate.score", {"torch", "transformers"}),
        ("cwdpo_bench.leaderboards", {"torch", "transformers"}),
    ],
)
def test_light_doors_open_without_heavy_libraries(module: str, banned: set[str]) -> None:
    code = f"import sys, {module}; print(*sorted(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not banned & set(out.stdout.split())
