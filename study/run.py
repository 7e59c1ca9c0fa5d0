"""`cwdpo-bench study`: systems × sweeps × seeds, trained, scored and compared; resumable.

Every cell runs in a process of its own by the same command that a scheduler would start, so that
one that dies takes no other with it and the tables are the same wherever the cells ran.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from cwdpo_bench.errors import UserError, nearest
from cwdpo_bench.evaluate.results import read_run
from cwdpo_bench.progress import progress_bar
from cwdpo_bench.study.cell import (
    ELSEWHERE,
    NO_WORD,
    UNFINISHED,
    WAITS,
    benchmarks,
    is_running,
    mark_failed,
    read_cell,
    run_cell,
)
from cwdpo_bench.study.file import Cell, Study, cells, load_study, start_of, tries
from cwdpo_bench.study.record import write_results

Say = Callable[[str], None]


def run_study(file: Path, output: Path, *, jobs: int = 1, say: Say) -> dict[str, Any]:
    """Run what is not finished, `jobs` cells at a time, then write the tables.

    Args:
        file: the study's YAML.
        output: its folder, new or that of an earlier call.
        jobs: processes at a time; each has one thread.
        say: where the lines of progress go.

    Returns:
        What `study.json` holds.

    Raises:
        UserError: the file is broken, a cell's folder was made from something else, or cells
            failed or are running elsewhere: all are listed, after the tables of the others are
            written.
    """
    study = load_study(file)
    attempts = tries(study)
    # Made once here; the cells' processes find it.
    benchmarks((*attempts, *cells(study, {}))[0])
    failed = _run(study, file, attempts, output, jobs, say)
    if failed:
        raise UserError(_list(failed, "no value can be chosen before all tries are finished"))
    chosen = choose(study, output)
    for name, value in chosen.items():
        say(f"{name}: {study.tune.key if study.tune else ''}={value} won on validation data")
    planned = cells(study, chosen)
    # First what others start from.
    starts = {cell.key: start_of(study, cell) for cell in planned}
    failed = _run(study, file, [c for c in planned if starts[c.key] is None], output, jobs, say)
    ready = []
    for cell in planned:
        start = starts[cell.key]
        if start is not None and failed.get(start.key) == ELSEWHERE:
            failed[cell.key] = WAITS
        elif start is not None:
            ready.append(cell)
    failed |= _run(study, file, ready, output, jobs, say)
    record = write_results(study, file, output, planned, attempts, chosen, failed)
    for warning in record["warnings"]:
        say(f"warning: {warning}")
    say(f"written: {output}: {', '.join(record['written'])}")
    if failed:
        raise UserError(_list(failed, "mend what they say and run the same command again"))
    return record


def run_one(file: Path, output: Path, key: str) -> None:
    """Run one cell by its key, as in `cells/dpo/seed-0`; what a scheduler starts.

    Raises:
        UserError: no such cell (the nearest is named), or as `run_cell`.
    """
    study = load_study(file)
    attempts = {cell.key: cell for cell in tries(study)}
    if key not in attempts:
        # Without the tries' outcome a cell on test data does not know its settings.
        known = {cell.key: cell for cell in cells(study, {})}
        if key not in known:
            raise UserError(f"--cell: no cell {key!r}; {nearest(key, (*attempts, *known))}")
        attempts = {cell.key: cell for cell in cells(study, choose(study, output))}
    run_cell(study, attempts[key], output)


def choose(study: Study, output: Path) -> dict[str, Any]:
    """System → the value of `tune.key` with the best `tune.metric` on validation data.

    Raises:
        UserError: a try is not finished, or its run lacks the metric.
    """
    if study.tune is None:
        return {}
    task, metric = study.tune.metric.split("/")
    best: dict[str, tuple[float, Any]] = {}
    for cell in tries(study):
        if read_cell(study, cell, output)["status"] != "finished":
            raise UserError(f"{cell.key}: is not finished; the tries come before the cells")
        metrics = read_run(output / cell.key / "run").results["tasks"][task]["metrics"]
        if metric not in metrics:
            raise UserError(f"tune.metric: {task} has no {metric!r}; {nearest(metric, metrics)}")
        better = metrics[metric]["higher_is_better"]
        if better is None:
            raise UserError(f"tune.metric: neither a high nor a low {metric} is better")
        score = metrics[metric]["value"] * (1 if better else -1)
        # The first of equal ones: the file's order decides, not chance.
        if cell.system not in best or score > best[cell.system][0]:
            best[cell.system] = (score, cell.settings[study.tune.key])
    return {name: value for name, (_, value) in best.items()}


def plan(file: Path, output: Path) -> dict[str, Any]:
    """What there is to do: every cell with its state, and the time that it may take.

    Returns:
        `cells`: key, status, reason, seconds (measured, or expected from finished cells of the
        same system, else None) each; `expected_seconds` of all that is not finished, one at a
        time, None where a system's time is not known yet.
    """
    return _plan(load_study(file), output)


def _plan(study: Study, output: Path) -> dict[str, Any]:
    attempts = tries(study)
    states = {cell.key: read_cell(study, cell, output) for cell in attempts}
    tuned = all(state["status"] == "finished" for state in states.values())
    planned = cells(study, choose(study, output) if tuned else {})
    if tuned:
        states |= {cell.key: read_cell(study, cell, output) for cell in planned}
    every = [*attempts, *planned]
    known: dict[tuple[str, str], list[float]] = {}
    for cell in every:
        if cell.key in states and states[cell.key]["status"] == "finished":
            taken = sum(states[cell.key]["seconds"].values())
            known.setdefault((cell.phase, cell.system), []).append(taken)
    rows: list[dict[str, Any]] = []
    for cell in every:
        state = states.get(cell.key, {"status": "new", "reason": None})
        taken = known.get((cell.phase, cell.system))
        seconds = None if taken is None else statistics.median(taken)
        rows.append(
            {
                "key": cell.key,
                "status": state["status"],
                "reason": state["reason"],
                "seconds": seconds,
            }
        )
    left = [row["seconds"] for row in rows if row["status"] != "finished"]
    expected = None if None in left else sum(left)
    return {"cells": rows, "expected_seconds": expected}


def plan_text(found: dict[str, Any], jobs: int) -> str:
    """A plan in lines: each cell, then what is left and how long it may take."""
    lines = []
    for row in found["cells"]:
        time = "time unknown" if row["seconds"] is None else f"{row['seconds']:.0f} s"
        why = f" ({row['reason']})" if row["reason"] else ""
        lines.append(f"{row['status']:<12} {time:>12}  {row['key']}{why}")
    left = sum(row["status"] != "finished" for row in found["cells"])
    total = found["expected_seconds"]
    told = (
        "the time is unknown until a cell of every system is finished"
        if total is None
        else f"about {total / jobs / 60:.1f} min with --jobs {jobs}"
    )
    return "\n".join([*lines, f"{left} of {len(found['cells'])} cells to do, {told}"])


def commands(file: Path, output: Path) -> list[list[str]]:
    """One command for every cell that can start now: tries first, then what others start from."""
    study = load_study(file)
    every = _plan(study, output)["cells"]
    left = [row for row in every if row["status"] != "finished"]
    tuned = not any(row["key"].startswith("tune/") for row in left)
    rows = [row for row in left if row["key"].startswith("tune/") or tuned]
    if tuned:
        done = {row["key"] for row in every if row["status"] == "finished"}
        starts = {cell.key: start_of(study, cell) for cell in cells(study, {})}
        rows = [row for row in rows if (start := starts[row["key"]]) is None or start.key in done]
    return [_command(file, output, row["key"]) for row in rows if row["status"] != "running"]


def _command(file: Path, output: Path, key: str) -> list[str]:
    return ["cwdpo-bench", "study", str(file), "--output", str(output), "--cell", key]


# --- processes -----------------------------------------------------------------------------------


def _run(
    study: Study, file: Path, planned: Sequence[Cell], output: Path, jobs: int, say: Say
) -> dict[str, str]:
    """Run what is not finished; returns the cells that have no figures and why."""
    left = [cell for cell in planned if read_cell(study, cell, output)["status"] != "finished"]
    # Seed by seed: a study that is stopped early has every row, with fewer seeds.
    seeds = {seed: index for index, seed in enumerate(study.seeds)}
    left.sort(key=lambda cell: seeds.get(cell.seed, 0))
    if not left:
        return {}
    running: set[subprocess.Popen[bytes]] = set()
    failed: dict[str, str] = {}
    stopping = False

    def work(cell: Cell) -> str | None:
        return None if stopping else _run_process(study, file, cell, output, running)

    with _sigterm_as_interrupt(), progress_bar() as bar, ThreadPoolExecutor(jobs) as pool:
        task = bar.add_task(f"cells of {file.name}", total=len(left), note="")
        futures = {pool.submit(work, cell): cell for cell in left}
        try:
            for future in as_completed(futures):
                reason = future.result()
                if reason is not None:
                    failed[futures[future].key] = reason
                    verb = "" if reason in UNFINISHED else "failed: "
                    say(f"{futures[future].key}: {verb}{reason}")
                bar.update(task, note=futures[future].key)
                bar.advance(task)
        except BaseException:
            stopping = True
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(running):
                # They save first; a terminal's Ctrl-C has reached them already.
                process.terminate()
            raise
    return {key: failed[key] for key in (cell.key for cell in left) if key in failed}


def _run_process(
    study: Study, file: Path, cell: Cell, output: Path, running: set[subprocess.Popen[bytes]]
) -> str | None:
    """One cell in a process of one thread; returns why it is not finished, if it is not."""
    folder = output / cell.key
    if is_running(folder):
        return ELSEWHERE
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "cwdpo_bench", *_command(file, output, cell.key)[1:]]
    with (folder / "cell.log").open("ab") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            # A group of its own: the study passes signals on, so that each comes once.
            start_new_session=True,
            # Arithmetic of one thread gives the same figures whatever the number of cores.
            env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        )
        running.add(process)
        status = process.wait()
        running.discard(process)
    state = read_cell(study, cell, output)
    if status == 0 or state["status"] == "finished":
        return None
    if state["status"] == "running":
        # Its own process has ended: another took the cell before it.
        return ELSEWHERE
    if state["status"] == "new" or state["reason"] == NO_WORD:
        # It could not say so itself.
        reason = f"ended with status {status}; see {folder / 'cell.log'}"
        if status < 0:
            reason = f"killed by signal {-status}, perhaps for lack of memory"
        mark_failed(folder, reason)
        return reason
    return str(state["reason"])


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """A scheduler's SIGTERM stops the study as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _list(failed: dict[str, str], mend: str) -> str:
    elsewhere = {key: reason for key, reason in failed.items() if reason in UNFINISHED}
    own = {key: reason for key, reason in failed.items() if reason not in UNFINISHED}
    told = []
    if own:
        lines = "".join(f"\n  {key}: {reason}" for key, reason in own.items())
        told.append(f"{len(own)} cell(s) failed; {mend}{lines}")
    if elsewhere:
        lines = "".join(f"\n  {key}: {reason}" for key, reason in elsewhere.items())
        told.append(
            f"{len(elsewhere)} cell(s) are not finished yet; run the same command again when the "
            f"other process has ended{lines}"
        )
    return "\n".join(told)
