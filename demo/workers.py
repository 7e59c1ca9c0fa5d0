"""Systems trained and scored side by side, one process and one thread each.

Single-threaded arithmetic gives the same figures whatever the number of cores, and two processes
of one thread outrun one process of two on a model as small as the demo's.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import Progress, TaskID

from cwdpo_bench.demo.systems import Budget, demo_recipe
from cwdpo_bench.errors import UserError
from cwdpo_bench.progress import progress_bar

MOST_WORKERS = 4
"""Each takes about 1.5 GB, METEOR's Java included."""
_STEP_WEIGHT = 10
"""A training step takes about as long as ten scored samples."""


class Job(NamedTuple):
    """Train one system (unless `recipe` is None) and score the checkpoint.

    Attributes:
        system: its name in the tables.
        recipe: name of the recipe, None for the base itself.
        learning_rate: of the recipe.
        seed: of the training.
        budget: update steps.
        base: the checkpoint to start from, also the reference of TV and JS.
        data: the rendered world: `pairs/` and the five layouts.
        checkpoint: folder of the trained checkpoint.
        run: folder of the scores.
    """

    system: str
    recipe: str | None
    learning_rate: float
    seed: int
    budget: Budget
    base: Path
    data: Path
    checkpoint: Path
    run: Path


class _Report(NamedTuple):
    """What a worker tells the display: work found, work done."""

    system: str
    total: float
    done: float


class _Forward(Progress):
    """Stands in for a display in a worker and passes the counts on."""

    def __init__(self, system: str, queue: SimpleQueue[_Report]) -> None:
        # What the run warns of stands in its results and below the comparison.
        super().__init__(disable=True, console=Console(quiet=True))
        self._system, self._queue = system, queue

    def add_task(
        self,
        description: str,
        start: bool = True,
        total: float | None = 100.0,
        completed: int = 0,
        visible: bool = True,
        **fields: Any,
    ) -> TaskID:
        self._queue.put(_Report(self._system, total or 0, 0))
        return super().add_task(description, start, total, completed, visible, **fields)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        self._queue.put(_Report(self._system, 0, advance))
        super().advance(task_id, advance)


def run_jobs(jobs: Sequence[Job]) -> None:
    """Run all jobs; finished parts of an earlier, interrupted call are kept.

    Raises:
        UserError: a job met one, or a worker was killed.
    """
    jobs = [job for job in jobs if not _finished(job)]
    if not jobs:
        return
    # Read by the workers' libraries when they are loaded; set back for the caller's own work.
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        context = multiprocessing.get_context("spawn")
        workers = min(MOST_WORKERS, len(jobs), available_cores())
        with context.Manager() as manager, progress_bar() as display:
            queue: Any = manager.Queue()
            with _Display(display, queue, jobs), ProcessPoolExecutor(workers, context) as pool:
                _wait(pool, {pool.submit(_run_job, job, queue): job for job in jobs})
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _finished(job: Job) -> bool:
    return (job.run / "results.json").is_file() and (job.recipe is None or job.checkpoint.is_dir())


def available_cores() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _wait(pool: ProcessPoolExecutor, futures: Mapping[Future[None], Job]) -> None:
    try:
        for future in as_completed(futures):
            future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed, perhaps for lack of memory; free some and run the same "
            "command again: it goes on where it stopped"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


class _Display:
    """One line a system, moved by the workers' reports."""

    def __init__(self, display: Progress, queue: Any, jobs: Sequence[Job]) -> None:
        self._display, self._queue = display, queue
        self._lines = {
            job.system: display.add_task(job.system, total=None, note="") for job in jobs
        }
        self._totals = dict.fromkeys(self._lines, 0.0)
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._queue.put(None)
        self._thread.join()

    def _follow(self) -> None:
        while (report := self._queue.get()) is not None:
            line = self._lines[report.system]
            if report.total:
                self._totals[report.system] += report.total
                self._display.update(line, total=self._totals[report.system])
            self._display.advance(line, report.done)


def _run_job(job: Job, queue: SimpleQueue[_Report]) -> None:
    """In a worker: train, then score."""
    from cwdpo_bench.quiet import quiet_libraries

    quiet_libraries()
    import torch

    torch.set_num_threads(1)
    model = job.base
    if job.recipe is not None:
        _train(job, lambda total, done: queue.put(_Report(job.system, total, done)))
        model = job.checkpoint
    _score(job, model, queue)


def _train(job: Job, report: Callable[[float, float], None]) -> None:
    from cwdpo_bench.train.run import train

    assert job.recipe is not None
    budget, done = job.budget, 0
    report(_STEP_WEIGHT * budget.steps, 0)

    def step(stage: str, step: int, last: int, loss: float | None) -> None:
        nonlocal done
        done += 1
        report(0, _STEP_WEIGHT)

    train(
        demo_recipe(job.recipe, seed=job.seed, budget=budget, learning_rate=job.learning_rate),
        model=str(job.base),
        model_name="demo",
        data=job.data / "pairs" / "train.jsonl",
        probe=job.data / "pairs" / "probe.jsonl",
        output=job.checkpoint,
        resume=job.checkpoint.exists(),
        report=step,
    )
    # Steps that an earlier call had finished already.
    report(0, _STEP_WEIGHT * max(0, budget.steps - done))


def _score(job: Job, model: Path, queue: SimpleQueue[_Report]) -> None:
    from cwdpo_bench.evaluate.run import run_tasks
    from cwdpo_bench.vlm import load_vlm

    run_tasks(
        model,
        model_name=job.system,
        tasks=None,
        data_root=job.data,
        output=job.run,
        batch_size=32,
        # Under its short name: where the package lies must not change a signature.
        reference_model=replace(load_vlm(job.base), name="demo"),
        bars=_Forward(job.system, queue),
    )
