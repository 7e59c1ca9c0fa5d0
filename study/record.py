"""What a study ends in: tables, the figures of every cell and try, and the HTML report.

All of it is made from the cells' folders; the same command run again makes it again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from cwdpo_bench.demo.command import DYNAMICS_COLUMNS, last_dynamics
from cwdpo_bench.evaluate import thumbnails
from cwdpo_bench.evaluate.results import read_run
from cwdpo_bench.files import read_json, write_json, write_text
from cwdpo_bench.leaderboards import build_report, compare_runs, to_csv, to_json, to_markdown
from cwdpo_bench.leaderboards.markdown import table
from cwdpo_bench.study.cell import RECORD, UNFINISHED, benchmarks
from cwdpo_bench.study.file import Cell, Study

COSTS = ("pairs", "pairs_seen", "steps", "tokens_trained", "tokens_read")
CURVES = (
    *("total_step", "chosen_mean_logp", "rejected_mean_logp", "argmax_mean_logp"),
    *("greedy_mean_logp", "shuffled_mean_logp", "other_meaning_mean_logp"),
    *("top1_probability", "entropy", "token_ece", "tv", "js", "cooling_weight"),
    *("pair_loss", "chosen_residual", "rejected_residual", "easy_loss_share"),
    *("easy_residual_share", "preference_probability", "loser_gradient_share"),
    *("influence_belief", "influence_residual", "influence_kernel", "influence_correlation"),
)
"""The columns of a training's dynamics that the record keeps."""


def write_results(
    study: Study,
    file: Path,
    output: Path,
    planned: Sequence[Cell],
    tries: Sequence[Cell],
    chosen: Mapping[str, Any],
    missing: Mapping[str, str],
) -> dict[str, Any]:
    """Write RESULTS.md, results.csv, report.html and study.json; returns what the last one holds.

    Args:
        study: validated.
        file: its YAML.
        output: its folder.
        planned: all cells on test data.
        tries: all cells on validation data.
        chosen: system → the value that won there.
        missing: cell → why it has no figures.
    """
    finished = [cell for cell in planned if cell.key not in missing]
    entries = [_entry(cell, output) for cell in finished]
    warnings = [*unfair(entries), *_gaps(planned, missing)]
    record: dict[str, Any] = {
        "schema": 1,
        "study": file.name,
        "model": _portable_name(study.model),
        "seeds": study.seeds,
        "chosen": {} if study.tune is None else {"key": study.tune.key, "values": dict(chosen)},
        "cells": entries,
        "tries": [_entry(cell, output) for cell in tries],
        "failed": {key: why for key, why in missing.items() if why not in UNFINISHED},
        "running": [key for key, why in missing.items() if why in UNFINISHED],
        "warnings": warnings,
        "comparison": None,
        "written": ["study.json"],
    }
    rows: dict[str, list[Path]] = {}
    for cell in finished:
        rows.setdefault(cell.row, []).append(output / cell.key / "run")
    if rows:
        baseline = study.baseline if study.baseline in rows else next(iter(rows))
        if study.baseline not in (None, baseline):
            warnings.append(f"{study.baseline} has no finished cell; the baseline is {baseline}")
        comparison = compare_runs(rows, baseline)
        record["comparison"] = _portable(to_json(comparison), output)
        title = f"Study {file.name}"
        text = to_markdown(comparison, dynamics=_dynamics(finished, output), title=title)
        write_text(output / "RESULTS.md", text + "\n" + _sections(record, study))
        write_text(output / "results.csv", to_csv(comparison))
        page = build_report(
            rows,
            baseline,
            title=title,
            pictures=thumbnails,
            data_root=benchmarks(finished[0]),
            comparison=comparison,
        )
        write_text(output / "report.html", page)
        record["written"] = ["RESULTS.md", "results.csv", "report.html", "study.json"]
    write_json(output / "study.json", record)
    return record


def _portable_name(model: str) -> str:
    """A folder by its name: where it lies here means nothing elsewhere."""
    return Path(model).name if Path(model).is_absolute() else model


def _portable(comparison: dict[str, Any], output: Path) -> dict[str, Any]:
    """Runs by where they lie in the study's folder, which may be moved and handed on."""
    for system in comparison["systems"]:
        system["paths"] = [str(Path(path).relative_to(output)) for path in system["paths"]]
        system["path"] = system["paths"][0]
    return comparison


def unfair(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line for each quantity in which the trained rows differ."""
    found = []
    for key, said in (
        ("pairs", "training pairs"),
        ("pairs_seen", "pairs seen (steps × batch)"),
        ("steps", "update steps"),
    ):
        values: dict[int, list[str]] = {}
        for entry in entries:
            if entry["training"] is not None:
                rows = values.setdefault(entry["training"][key], [])
                if entry["row"] not in rows:
                    rows.append(entry["row"])
        if len(values) > 1:
            told = "; ".join(f"{value}: {', '.join(rows)}" for value, rows in values.items())
            found.append(f"unequal {said}: {told}")
    return found


def _gaps(planned: Sequence[Cell], missing: Mapping[str, str]) -> list[str]:
    lacking: dict[str, list[str]] = {}
    for cell in planned:
        if cell.key in missing:
            lacking.setdefault(cell.row, []).append(str(cell.seed))
    return [f"{row}: without seeds {', '.join(seeds)}" for row, seeds in lacking.items()]


def _entry(cell: Cell, output: Path) -> dict[str, Any]:
    """A cell's figures, without what only its own folder needs."""
    record = read_json(output / cell.key / RECORD)
    results = read_run(output / cell.key / "run").results
    checkpoint = output / cell.key / "checkpoint"
    return {
        "cell": cell.key,
        "row": cell.row,
        "system": cell.system,
        "model": _portable_name(record["fingerprint"]["model"]),
        "recipe": cell.recipe if "/" not in cell.recipe else Path(cell.recipe).name,
        "seed": cell.seed,
        "settings": cell.settings,
        "training": record.get("training"),
        "seconds": record["seconds"],
        "dynamics": last_dynamics(checkpoint) if checkpoint.is_dir() else None,
        "curves": _curves(checkpoint) if checkpoint.is_dir() else None,
        "scores": {
            f"{task}/{metric}": entry["value"]
            for task, result in results["tasks"].items()
            for metric, entry in result["metrics"].items()
        },
    }


def _curves(checkpoint: Path) -> dict[str, list[float | None]]:
    """Every measurement of the learning dynamics; None where a column was not measured."""
    frame = pd.read_parquet(checkpoint / "dynamics.parquet")
    columns = [name for name in CURVES if name in frame]
    return {
        name: [None if math.isnan(x) else float(f"{x:.6g}") for x in frame[name].astype(float)]
        for name in columns
    }


def _dynamics(finished: Sequence[Cell], output: Path) -> dict[str, dict[str, float | str]]:
    """The mean over a row's seeds, and each verdict with how many seeds had it."""
    rows: dict[str, list[Path]] = {}
    for cell in finished:
        checkpoint = output / cell.key / "checkpoint"
        if checkpoint.is_dir():
            rows.setdefault(cell.row, []).append(checkpoint)
    found: dict[str, dict[str, float | str]] = {}
    for row, checkpoints in rows.items():
        ends = [last_dynamics(checkpoint) for checkpoint in checkpoints]
        verdicts = [read_json(c / "provenance.json")["verdict"]["name"] for c in checkpoints]
        counted = {name: verdicts.count(name) for name in sorted(set(verdicts))}
        found[row] = {
            **{column: sum(end[column] for end in ends) / len(ends) for column in DYNAMICS_COLUMNS},
            "verdict": ", ".join(
                f"{name} {count}/{len(verdicts)}" for name, count in counted.items()
            ),
        }
    return found


def _sections(record: Mapping[str, Any], study: Study) -> str:
    """What the comparison itself does not tell: fairness, and every try."""
    parts = ["## What each cell cost\n"]
    lines = []
    for entry in record["cells"]:
        training = entry["training"] or {}
        figures = [str(training.get(key, "–")) for key in COSTS]
        times = [f"{entry['seconds'][part]:.0f}" for part in ("train", "run")]
        lines.append([entry["row"], str(entry["seed"]), *figures, *times])
    names = [key.replace("_", " ") for key in COSTS]
    headings = ["system", "seed", *names, "train s", "score s"]
    parts.append(table(headings, lines) + "\n")
    parts += [f"- {warning}\n" for warning in record["warnings"]]
    if study.tune is not None:
        parts.append(f"\n## All tries of {study.tune.key}\n")
        parts.append(
            f"{study.tune.metric} on validation data, seed {study.tune.seed}; "
            "test data were read only with the value in the last column.\n"
        )
        metric = study.tune.metric
        lines = [
            [
                entry["row"],
                str(entry["settings"][study.tune.key]),
                f"{entry['scores'][metric]:.4f}",
                str(record["chosen"]["values"][entry["system"]]),
            ]
            for entry in record["tries"]
        ]
        parts.append(table(["try", study.tune.key, metric, "chosen"], lines) + "\n")
    return "\n".join(parts)
