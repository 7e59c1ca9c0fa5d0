"""One self-contained HTML file that a reviewer can look at: verdict, differences, curves, answers.

Everything in it comes from run folders (and the `dynamics.parquet` of their checkpoints); a part
that the runs hold nothing for is left out, and the page says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from cwdpo_bench.errors import UserError, nearest
from cwdpo_bench.evaluate.results import RunFolder
from cwdpo_bench.leaderboards.compare import OnDifference, OnSignature, compare_runs
from cwdpo_bench.leaderboards.comparison import Comparison
from cwdpo_bench.leaderboards.display import (
    PROVENANCE_COLUMNS,
    legend,
    provenance_rows,
)
from cwdpo_bench.leaderboards.policy import load_policy
from cwdpo_bench.leaderboards.report_calibration import Calibration, calibration_of
from cwdpo_bench.leaderboards.report_dynamics import Recipe, draw_strips, read_recipes
from cwdpo_bench.leaderboards.report_page import render_page
from cwdpo_bench.leaderboards.report_pictures import BUDGET as PAGE_BUDGET
from cwdpo_bench.leaderboards.report_pictures import PictureReader, gather_pictures
from cwdpo_bench.leaderboards.report_samples import TaskSamples, choose, task_json, task_samples
from cwdpo_bench.leaderboards.report_tables import overview_tables, task_parts
from cwdpo_bench.leaderboards.report_verdict import headline, judge_systems, leaders
from cwdpo_bench.leaderboards.statistics import intersect
from cwdpo_bench.leaderboards.systems import (
    Paths,
    Systems,
    find_baseline,
    holders_of,
    labelled,
    read_systems,
)
from cwdpo_bench.markup import plain

TITLE = "cwdpo-bench report"


def build_report(
    paths: Paths,
    baseline: str | Path | None = None,
    *,
    title: str = TITLE,
    policy: Path | None = None,
    pictures: PictureReader | None = None,
    data_root: Path | None = None,
    checkpoints: Mapping[str, Path] | None = None,
    on_mismatch: OnDifference = "stop",
    on_signature: OnSignature = "stop",
    comparison: Comparison | None = None,
) -> str:
    """The report on run folders as HTML.

    Args:
        paths, baseline, on_mismatch, on_signature: as `compare_runs` takes them.
        title: of the page.
        policy: the gate's rules; the package's own by default.
        pictures: how the samples' pictures are read; without it the page has none.
        data_root: where the benchmarks lie, if not where the runs say.
        checkpoints: system → its checkpoint, where the run does not say or it was moved.
        comparison: what `compare_runs` gave for the same arguments, if it is there already.

    Raises:
        UserError: as `compare_runs`; `checkpoints` names no system or one of
            several seeds, or the policy is broken.
    """
    if comparison is None:
        comparison = compare_runs(
            paths, baseline, on_mismatch=on_mismatch, on_signature=on_signature
        )
    systems = read_systems(paths)
    base = find_baseline(systems, baseline)
    for name in checkpoints or {}:
        if name not in systems:
            raise UserError(f"--checkpoint {name}: no such system; {nearest(name, systems)}")
        if len(systems[name]) > 1:
            raise UserError(f"--checkpoint {name}: is several seeds; only their runs can name them")
    if policy is not None:
        # The gate would answer a broken one with "not judged"; here it is the user's mistake.
        load_policy(policy)
    verdicts = judge_systems(comparison, policy)
    recipes, without_curves = read_recipes(labelled(systems), checkpoints)
    looks, browsed = _look_at_samples(systems, base, on_mismatch)
    kept, wanted = choose(browsed)
    taken = sum(task.sizes[place] for task in browsed for place in kept[task.name])
    gathered = gather_pictures(
        wanted, _first_holders(systems), pictures, data_root, PAGE_BUDGET - taken
    )
    samples = {
        task.name: task_json(task, kept[task.name], gathered) for task in browsed if kept[task.name]
    }
    series = {system.name: place for place, system in enumerate(comparison.systems)}
    content = {
        "title": plain(title),
        "baseline": plain(base),
        "headline": headline(verdicts, base),
        "verdicts": [
            {"gate": verdict, "dynamics": [r for r in recipes if _of_system(r, verdict.name)]}
            for verdict in verdicts
        ],
        "policy_name": "the default policy" if policy is None else policy.name,
        "leaders": leaders(comparison),
        "overview": overview_tables(comparison),
        "tasks": [
            task_parts(comparison, task, looks[task.name], series) for task in comparison.tasks
        ],
        "strips": draw_strips(recipes),
        "recipes": recipes,
        "without_curves": without_curves,
        "sample_notes": _sample_notes(browsed, kept) + gathered.notes,
        "edge": gathered.edge,
        "reading": [*legend(comparison), "Bold: significantly better than every other system."],
        "notes": [plain(note) for note in comparison.notes],
        "provenance": (PROVENANCE_COLUMNS, provenance_rows(comparison)),
    }
    return render_page(content, samples, gathered.encoded)


# --- samples -------------------------------------------------------------------------------------


def _look_at_samples(
    systems: Systems, base: str, on_mismatch: OnDifference
) -> tuple[dict[str, dict[str, Calibration]], list[TaskSamples]]:
    """Calibration and answers, a task at a time, so that one task is in memory."""
    tasks = dict.fromkeys(
        task for runs in systems.values() for run in runs for task in run.results["tasks"]
    )
    looks, browsed = {}, []
    for task in tasks:
        tables = _tables(task, holders_of(task, systems), on_mismatch)
        looks[task] = {name: calibration_of(runs) for name, runs in tables.items()}
        first = {name: runs[0] for name, runs in tables.items()}
        browsed.append(task_samples(task, first, base))
    return looks, browsed


def _tables(
    task: str, holders: Systems, on_mismatch: OnDifference
) -> dict[str, list[pd.DataFrame]]:
    flat = [(name, run.samples(task)) for name, runs in holders.items() for run in runs]
    samples = [table for _, table in flat]
    if on_mismatch == "intersect":
        samples, _ = intersect(samples)
    found: dict[str, list[pd.DataFrame]] = {name: [] for name in holders}
    for (name, _), table in zip(flat, samples, strict=True):
        found[name].append(table)
    return found


def _first_holders(systems: Systems) -> dict[str, RunFolder]:
    """By task the first run that did it; runs of one task were given the same data."""
    found: dict[str, RunFolder] = {}
    for runs in systems.values():
        for run in runs:
            for task in run.results["tasks"]:
                found.setdefault(task, run)
    return found


def _sample_notes(browsed: Sequence[TaskSamples], kept: Mapping[str, Sequence[int]]) -> list[str]:
    return [
        f"{plain(task.name)}: {len(kept[task.name]):,} of {len(task.rows):,} samples are shown to "
        "keep the page small: those on which the systems differ most"
        for task in browsed
        if len(kept[task.name]) < len(task.rows)
    ]


def _of_system(recipe: Recipe, name: str) -> bool:
    return recipe.name == name or recipe.name.startswith(f"{name} (")
