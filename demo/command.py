"""The `demo` command: render, train, score, compare, report; finished parts are never redone."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console
from scipy.special import softmax

from cwdpo_bench import __version__
from cwdpo_bench.calibration import reliability
from cwdpo_bench.calibration.plots import reliability_diagram, save_figure
from cwdpo_bench.demo import base_path
from cwdpo_bench.demo.layouts import DEFAULT as DEFAULT_SIZES
from cwdpo_bench.demo.layouts import SMOKE as SMOKE_SIZES
from cwdpo_bench.demo.layouts import render_world
from cwdpo_bench.demo.systems import (
    BASE,
    DEFAULT,
    EVERY_SYSTEM,
    SMOKE,
    SYSTEMS,
    chosen_learning_rates,
)
from cwdpo_bench.demo.workers import Job, run_jobs
from cwdpo_bench.errors import UserError
from cwdpo_bench.evaluate import thumbnails
from cwdpo_bench.evaluate.results import read_run
from cwdpo_bench.files import read_json, write_json, write_text
from cwdpo_bench.leaderboards import build_report, compare_runs, render, to_markdown

DYNAMICS_COLUMNS = ("chosen_mean_logp", "top1_probability", "token_ece", "tv", "js")
_DATA_SEED = 0
"""The learning rates were chosen on this world; `--seed` varies the training alone."""


def run_demo(
    output: Path,
    *,
    seed: int = 0,
    smoke: bool = False,
    every_system: bool = False,
    say: Callable[[str], None] | None = None,
) -> None:
    """Run the whole demo in `output`, or go on with it where it stopped.

    Args:
        output: new folder, or that of an interrupted demo with the same settings.
        seed: of every training.
        smoke: fewer of everything: a test that all of it runs, not a result.
        every_system: the extended table; in the folder of a finished demo only what it lacks is
            added.
        say: where the lines of progress go; standard error by default.

    Raises:
        UserError: the folder holds something else, TRL is missing for the extended table, or a part
            failed for a reason users can mend.
    """
    say = say or _stderr
    if every_system:
        # Whether TRL is there is better told now than when the other systems are trained.
        import_module("cwdpo_bench.train.grpo")
    _claim(output, seed=seed, smoke=smoke)
    data = output / "data"
    if not data.is_dir():
        say(f"rendering the world into {data}")
        render_world(data, _DATA_SEED, SMOKE_SIZES if smoke else DEFAULT_SIZES)
    systems = EVERY_SYSTEM if every_system else SYSTEMS
    say(f"training and scoring {', '.join((BASE, *systems))}")
    run_jobs(demo_jobs(output, systems, seed=seed, smoke=smoke))

    runs = [output / "runs" / name for name in (BASE, *systems)]
    comparison = compare_runs(runs)
    dynamics: dict[str, dict[str, float | str]] = {}
    for name in systems:
        checkpoint = output / "checkpoints" / name
        verdict = read_json(checkpoint / "provenance.json")["verdict"]["name"]
        dynamics[name] = {**last_dynamics(checkpoint), "verdict": verdict}
    first = pd.read_parquet(output / "checkpoints" / systems[0] / "dynamics.parquet").iloc[0]
    dynamics = {BASE: {c: float(first[c]) for c in DYNAMICS_COLUMNS}, **dynamics}
    title = f"cwdpo-bench demo, seed {seed}" + (", smoke test: not a result" if smoke else "")
    write_text(output / "LEADERBOARD.md", to_markdown(comparison, dynamics=dynamics, title=title))
    # Where the checkpoints lie is told: the folder may have been moved since they were scored.
    checkpoints = {name: output / "checkpoints" / name for name in systems}
    page = build_report(
        runs,
        title=title,
        pictures=thumbnails,
        data_root=data,
        checkpoints=checkpoints,
        comparison=comparison,
    )
    write_text(output / "report.html", page)
    _draw(output, systems)
    console = Console(width=None)
    console.print(render(comparison, details=False))
    console.print(_dynamics_table(dynamics))
    written = ("report.html", "LEADERBOARD.md", "plots", "runs")
    say(f"written: {', '.join(str(output / name) for name in written)}")


def demo_jobs(output: Path, systems: Sequence[str], *, seed: int, smoke: bool) -> list[Job]:
    """One job a system, the longest first so that no worker is left with it at the end."""
    rates = chosen_learning_rates()
    return [
        Job(
            system=name,
            recipe=None if name == BASE else name,
            learning_rate=rates.get(name, 0.0),
            seed=seed,
            budget=SMOKE if smoke else DEFAULT,
            base=base_path(),
            data=output / "data",
            checkpoint=output / "checkpoints" / name,
            run=output / "runs" / name,
        )
        for name in (*reversed(systems), BASE)
    ]


def last_dynamics(checkpoint: Path) -> dict[str, float]:
    """The last measurement of a checkpoint's learning dynamics."""
    row = pd.read_parquet(checkpoint / "dynamics.parquet").iloc[-1]
    return {column: float(row[column]) for column in DYNAMICS_COLUMNS}


def _stderr(line: str) -> None:
    Console(stderr=True).print(line, markup=False, highlight=False, soft_wrap=True)


def _claim(output: Path, *, seed: int, smoke: bool) -> None:
    """Take a new folder, or one in which the same demo was begun."""
    settings = {"cwdpo-bench": __version__, "seed": seed, "smoke": smoke}
    mark = output / "demo.json"
    if mark.is_file():
        found = read_json(mark)
        if found != settings:
            raise UserError(
                f"{output}: holds a demo with other settings ({found}); name another --output"
            )
        return
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output}: exists and is no demo's folder; name another --output")
    write_json(mark, settings)


def _draw(output: Path, systems: Sequence[str]) -> None:
    """Dynamics of every recipe, and reliability of every system's option probabilities."""
    plots = output / "plots"
    plots.mkdir(exist_ok=True)
    for name in systems:
        shutil.copyfile(
            output / "checkpoints" / name / "dynamics.png", plots / f"dynamics-{name}.png"
        )
    for name in (BASE, *systems):
        samples = read_run(output / "runs" / name).samples("mmmu").dropna(subset=["option_correct"])
        # Renormalised over the options, as the calibration metrics are.
        confidence = np.array([softmax(row).max() for row in samples["option_log_probabilities"]])
        bins = reliability(confidence, samples["option_correct"].to_numpy(dtype=bool))
        save_figure(
            reliability_diagram(bins, f"{name}: MMMU layout"), plots / f"reliability-{name}.png"
        )


def _dynamics_table(dynamics: dict[str, dict[str, float | str]]) -> object:
    from rich.table import Table

    table = Table(title="Learning dynamics at the end of training (held-out probe pairs)")
    table.add_column("system")
    for column in DYNAMICS_COLUMNS:
        table.add_column(column, justify="right")
    table.add_column("verdict")
    for name, row in dynamics.items():
        figures = (f"{row[column]:.3f}" for column in DYNAMICS_COLUMNS)
        table.add_row(name, *figures, str(row.get("verdict", "–")))
    return table
