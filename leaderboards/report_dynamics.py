"""The learning dynamics of the checkpoints that runs were made of, for curves side by side.

A run names its checkpoint in `provenance.checkpoint`; `dynamics.parquet` and `provenance.json` lie
beside the weights. They are read as files: the format is documented in `train/dynamics.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup
from pyarrow import ArrowException

from cwdpo_bench.errors import UserError
from cwdpo_bench.evaluate.results import RunFolder
from cwdpo_bench.files import read_json
from cwdpo_bench.leaderboards.charts import Curve, Moment, curve_panel, histogram_panel
from cwdpo_bench.leaderboards.svg import padded

DYNAMICS = "dynamics.parquet"
PROVENANCE = "provenance.json"

PANELS: dict[str, dict[str, str]] = {
    # The rejected answers fall so far that on their axis nothing of the others could be seen.
    "log p a token": {"chosen_mean_logp": "chosen", "argmax_mean_logp": "argmax"},
    "log p a token, rejected": {"rejected_mean_logp": "rejected"},
    "top-1 probability": {"top1_probability": "top-1 probability"},
    "entropy (nats)": {"entropy": "entropy"},
    "token ECE": {"token_ece": "token ECE"},
    "shift from the start": {"tv": "TV", "js": "JS (nats)"},
}
"""Row of panels → column of `dynamics.parquet` → name of its curve."""

HISTOGRAM = [f"cooling_weight_bin_{tenth}" for tenth in range(10)]


@dataclass(frozen=True)
class Recipe:
    """The curves of one checkpoint.

    Attributes:
        name: of the system.
        rows: of `dynamics.parquet`, in their order.
        sentence: the verdict in words; empty where the checkpoint states none.
        verdict: its name.
        moment: when it was earned; None for a healthy run.
    """

    name: str
    rows: pd.DataFrame
    sentence: str
    verdict: str
    moment: Moment | None


@dataclass(frozen=True)
class Strip:
    """A row of panels, one a recipe, on the same axes.

    Attributes:
        title: what is drawn.
        series: names of the curves with the place of their colours.
        panels: by recipe; None where it has no such column.
    """

    title: str
    series: tuple[tuple[str, int], ...]
    panels: tuple[Markup | None, ...]


def checkpoint_of(run: RunFolder) -> Path | None:
    """Where the run's weights lay, as it states; None where it states nothing."""
    stated = run.results["provenance"].get("checkpoint")
    return Path(stated) if isinstance(stated, str) else None


def read_recipes(
    runs: Mapping[str, RunFolder], named: Mapping[str, Path] | None = None
) -> tuple[list[Recipe], list[str]]:
    """The dynamics of those runs that have some, and notes on those that have none.

    Args:
        runs: by name.
        named: checkpoints that the caller knows better, by the same names.
    """
    found, notes = [], []
    for name, run in runs.items():
        folder = (named or {}).get(name) or checkpoint_of(run)
        if folder is None:
            notes.append(f"{name}: the run names no checkpoint, so there are no curves of it")
            continue
        try:
            recipe = _read(name, folder)
        except UserError as error:
            notes.append(f"{name}: no curves: {error}")
            continue
        if recipe is None:
            notes.append(f"{name}: no curves: {folder} holds no {DYNAMICS}")
        else:
            found.append(recipe)
    return found, notes


def _read(name: str, folder: Path) -> Recipe | None:
    path = folder / DYNAMICS
    if not path.is_file():
        return None
    try:
        rows = pd.read_parquet(path)
    except (ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as parquet ({error})") from error
    missing = [column for column in ("stage", "step", "total_step") if column not in rows]
    if missing or rows.empty:
        raise UserError(f"{path}: no {', '.join(missing) or 'rows'}; it is not of this version")
    record = read_json(folder / PROVENANCE) if (folder / PROVENANCE).is_file() else {}
    verdict = _dictionary(record, "verdict")
    name_of_verdict = str(verdict.get("name", ""))
    moment = _moment(rows, record, name_of_verdict)
    return Recipe(name, rows, str(verdict.get("sentence", "")), name_of_verdict, moment)


def _moment(rows: pd.DataFrame, record: Any, name: str) -> Moment | None:
    """The steps of the run at which the stage with its verdict earned it."""
    if name in ("", "healthy"):
        return None
    for stage, told in _dictionary(record, "stages").items():
        verdict = _dictionary(told, "verdict")
        own = rows[rows["stage"] == stage]
        if verdict.get("name") != name or own.empty:
            continue
        offset = float(own["total_step"].iloc[0] - own["step"].iloc[0])
        last = float(own["step"].iloc[-1])
        evidence = _dictionary(verdict, "evidence")
        first, until = evidence.get("first_step", last), evidence.get("last_step", last)
        return Moment(offset + float(first), offset + float(until), name)
    return None


def _dictionary(parent: Any, key: str) -> dict[str, Any]:
    value = parent.get(key) if isinstance(parent, dict) else None
    return value if isinstance(value, dict) else {}


def draw_strips(recipes: Sequence[Recipe]) -> list[Strip]:
    """Rows of panels, a column a recipe; a row that no recipe has values for is left out."""
    if not recipes:
        return []
    last = max(float(recipe.rows["total_step"].max()) for recipe in recipes)
    steps = (0.0, max(last, 1.0))
    strips = []
    for title, columns in PANELS.items():
        found = [_curves(recipe.rows, columns) for recipe in recipes]
        if not any(found):
            continue
        values = [value for curves in found for curve in curves for _, value in curve.points]
        ends = padded(values)
        panels = tuple(
            _panel(recipe, curves, ends, steps, title)
            for recipe, curves in zip(recipes, found, strict=True)
        )
        names = tuple((name, place) for place, name in enumerate(columns.values()))
        strips.append(Strip(title, names if len(names) > 1 else (), panels))
    histograms = tuple(_histogram(recipe, steps) for recipe in recipes)
    if any(panel is not None for panel in histograms):
        strips.append(Strip("w_c: cooling weights of the pairs", (), histograms))
    return strips


def _curves(rows: pd.DataFrame, columns: Mapping[str, str]) -> list[Curve]:
    found = []
    for place, (column, name) in enumerate(columns.items()):
        if column not in rows:
            continue
        values = pd.to_numeric(rows[column], errors="coerce").to_numpy(dtype=np.float64)
        steps = rows["total_step"].to_numpy(dtype=np.float64)
        points = [(s, v) for s, v in zip(steps.tolist(), values.tolist(), strict=True)]
        points = [point for point in points if np.isfinite(point[1])]
        if points:
            found.append(Curve(name, points, place))
    return found


def _panel(
    recipe: Recipe,
    curves: list[Curve],
    ends: tuple[float, float],
    steps: tuple[float, float],
    title: str,
) -> Markup | None:
    if not curves:
        return None
    told = "; ".join(f"{c.name} {c.points[0][1]:.3g} to {c.points[-1][1]:.3g}" for c in curves)
    return curve_panel(
        curves,
        ends,
        steps,
        f"{recipe.name}: {title}, over the update steps: {told}",
        moment=recipe.moment,
        borders=_borders(recipe.rows),
    )


def _histogram(recipe: Recipe, steps: tuple[float, float]) -> Markup | None:
    rows = recipe.rows
    if not all(column in rows for column in HISTOGRAM):
        return None
    measured = rows[rows[HISTOGRAM].notna().all(axis=1)]
    if measured.empty:
        return None
    columns = {
        float(step): [float(share) for share in tenths]
        for step, tenths in zip(measured["total_step"], measured[HISTOGRAM].to_numpy(), strict=True)
    }
    label = f"{recipe.name}: histogram of the cooling weights over the update steps"
    return histogram_panel(columns, steps, label, moment=recipe.moment, borders=_borders(rows))


def _borders(rows: pd.DataFrame) -> list[float]:
    """Where each stage but the first begins."""
    return [float(step) for step in rows.groupby("stage", sort=False)["total_step"].min()][1:]
