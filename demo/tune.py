"""Choose each system's learning rate on the validation scenes: `python -m cwdpo_bench.demo.tune`.

Every system gets the same grid, so the same number of tries; the winner has the highest COCO CIDEr
on validation (the paper's headline metric). Test scenes are never read. The log holds every try
with its scores and stands beside this file as `tuning.json`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cwdpo_bench.demo import base_path
from cwdpo_bench.demo.command import last_dynamics
from cwdpo_bench.demo.layouts import render_world
from cwdpo_bench.demo.systems import DEFAULT, TUNED, TUNING
from cwdpo_bench.demo.workers import Job, run_jobs
from cwdpo_bench.evaluate.results import read_run
from cwdpo_bench.files import write_json

GRID = (1e-5, 3e-5, 1e-4, 3e-4)
SEED = 1000
"""Of the tuning runs' training; the demo's own seeds start at 0."""
DATA_SEED = 0
CRITERION = ("coco", "CIDEr")


def tune(work: Path, log: Path) -> dict[str, Any]:
    """Try the grid for every system in `work` and write the log; returns the log."""
    data = work / "data"
    if not data.is_dir():
        render_world(data, DATA_SEED)
    jobs = {(system, rate): _job(work, system, rate) for system in TUNED for rate in GRID}
    run_jobs(list(jobs.values()))
    tries = [_outcome(system, rate, job) for (system, rate), job in jobs.items()]
    value = "/".join(CRITERION)
    best = {
        system: max((t for t in tries if t["system"] == system), key=lambda t: t["scores"][value])
        for system in TUNED
    }
    record = {
        "criterion": f"{value} on the validation scenes",
        "grid": list(GRID),
        "steps": DEFAULT.steps,
        "seed": SEED,
        "chosen": {system: attempt["learning_rate"] for system, attempt in best.items()},
        "tries": tries,
    }
    write_json(log, record)
    return record


def _job(work: Path, system: str, rate: float) -> Job:
    name = f"{system}@{rate:g}"
    return Job(
        system=name,
        recipe=system,
        learning_rate=rate,
        seed=SEED,
        budget=DEFAULT,
        base=base_path(),
        data=work / "data",
        benchmarks=work / "data" / "validation",
        checkpoint=work / "checkpoints" / name,
        run=work / "runs" / name,
        tasks=("coco", "mmmu", "mmbench"),
    )


def _outcome(system: str, rate: float, job: Job) -> dict[str, Any]:
    tasks = read_run(job.run).results["tasks"]
    shown = {"coco": ["CIDEr", "token_ece"], "mmmu": ["accuracy"], "mmbench": ["accuracy"]}
    return {
        "system": system,
        "learning_rate": rate,
        "scores": {
            f"{task}/{metric}": round(tasks[task]["metrics"][metric]["value"], 4)
            for task, metrics in shown.items()
            for metric in metrics
        },
        "dynamics": {name: round(x, 4) for name, x in last_dynamics(job.checkpoint).items()},
    }


def main() -> None:
    """Run the grid; an interrupted one goes on where it stopped."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("cwdpo-tuning"))
    parser.add_argument("--log", type=Path, default=TUNING)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    for system, rate in tune(arguments.work, arguments.log)["chosen"].items():
        print(f"{system}: {rate:g}")


if __name__ == "__main__":
    main()
