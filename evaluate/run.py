"""The body of `cwdpo-bench run`: a model, some benchmarks and a data root give a run folder.

Everything that can be refused is refused before the model answers anything: unknown tasks, missing
data, broken annotations, an output folder that holds another run or that another run is writing.
Replies are kept as they come (`evaluate/store.py`), so the same command goes on after any end.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from cwdpo_bench import __version__
from cwdpo_bench.errors import UserError
from cwdpo_bench.evaluate.answered import Pending, Scored, begin_captions, score_choices
from cwdpo_bench.evaluate.asking import Asker, Failures
from cwdpo_bench.evaluate.captions import scorer_signature
from cwdpo_bench.evaluate.choices import ParseFailures
from cwdpo_bench.evaluate.engine import Engine
from cwdpo_bench.evaluate.in_process import InProcessEngine
from cwdpo_bench.evaluate.java import find_java
from cwdpo_bench.evaluate.meteor import kept_meteor
from cwdpo_bench.evaluate.plan import CaptionJob, Job, plan_tasks
from cwdpo_bench.evaluate.processes import ALONE, Processes, follow, share
from cwdpo_bench.evaluate.results import (
    SAMPLES,
    RunFolder,
    TaskResult,
    read_run,
    refuse_difference,
    refuse_other_run,
    signature_of,
    write_run,
)
from cwdpo_bench.evaluate.served import ServedEngine
from cwdpo_bench.evaluate.server import Server
from cwdpo_bench.evaluate.store import ReplyStore, open_store
from cwdpo_bench.files import existing_parent, remove_unfinished, write_json
from cwdpo_bench.progress import progress_bar
from cwdpo_bench.vlm import VLM, load_vlm

TIMINGS = "timings.json"
"""Beside the results, which hold nothing that differs from one start of a run to the next."""
_PRECISIONS = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
_LIBRARIES = ("torch", "transformers", "peft", "numpy", "pandas", "pycocoevalcap")


def run_tasks(
    model: VLM | str | Path,
    *,
    tasks: Sequence[str] | None,
    data_root: Path,
    output: Path,
    model_name: str | None = None,
    limit: int | None = None,
    batch_size: int | None = 16,
    reference_model: VLM | str | Path | None = None,
    diversity: int = 0,
    parse_failures: ParseFailures = "wrong",
    include_path: Path | None = None,
    max_failures: int = 0,
    trust_remote_code: bool = False,
    dtype: str | None = None,
    compiled: bool = False,
    server: Server | None = None,
    processes: Processes = ALONE,
    bars: Progress | None = None,
) -> RunFolder:
    """Answer and score benchmarks, and write a run folder.

    Args:
        model: a loaded model, a folder or a Hub id.
        tasks: names to run; None runs those of the five that the data root holds. A named task
            that it does not hold is read from lmms-eval's data set; `lmms:NAME` is a task or a
            group of lmms-eval.
        data_root: the folder that holds the benchmarks in their public layouts.
        output: the run folder to write; one of the same run is gone on with: what was answered is
            not asked again.
        model_name: what the results call the model; by default the name that it was loaded by.
        limit: only the first so many samples of each task (questions, with all their orders).
        batch_size: rows a forward; None starts with many and halves what the memory is too small
            for.
        reference_model: where given, captions also get TV and JS between it and the model.
        diversity: captions to sample an image, at least 2, for the diversity metrics; 0: none.
        parse_failures: what becomes of a reply in which nothing is found (`choice_rows`).
        include_path: a folder of YAML files that define tasks for lmms-eval, searched first.
        max_failures: so many samples may fail (a broken image, an input too long, a server's
            error); they get no row, and `failures` in the results says why.
        trust_remote_code: let the models' own code run.
        dtype: `float32`, `bfloat16` or `float16` for models that are loaded here; by default
            bfloat16 on an accelerator, float32 on a CPU.
        compiled: compile the language model with `torch.compile`: faster after minutes of work.
        server: where given, it answers, and `model` is the model's name there.
        processes: from `join`, where several answer this run; all call this alike. It returns in
            the first alone, the others end with `SystemExit` once that one has all replies.
        bars: a running display to draw the progress on, for callers that have one.

    Raises:
        UserError: a task is unknown or named but not there, data or an image are broken, the
            output folder holds another run, is being written by one or cannot be written,
            `JAVA_HOME` is broken, more samples fail than may, or the model gives no finite
            log-probabilities.
    """
    refuse_settings(batch_size, diversity, max_failures)
    jobs, missing = plan_tasks(tasks, data_root, limit, include_path, max_failures)
    if any(isinstance(job, CaptionJob) for job in jobs):
        find_java()
    _refuse_unwritable(output)
    opened = partial(
        open_engine,
        model,
        model_name,
        data_root,
        batch_size,
        reference_model,
        diversity,
        trust_remote_code,
        dtype,
        compiled,
        server,
    )
    if processes.rank:
        follow(opened(), jobs, processes)
        raise SystemExit
    # Locked before a model is loaded: a second run into one folder is refused at once.
    with open_store(output) as store:
        engine = opened()
        entry, shared = dict(engine.model), signature_of(_shared_parts(engine))
        signatures = {
            job.task.name: signature_of(_task_parts(job, limit, engine, parse_failures))
            for job in jobs
        }
        refuse_other_run(output, entry, shared, signatures)
        with (
            share(engine, jobs, processes) as engine,
            nullcontext(bars) if bars is not None else progress_bar() as display,
        ):
            _say(display, missing)
            asker = Asker(engine, store, data_root, Failures(max_failures))
            date = _begin(store, asker.engine_digest, entry, shared, signatures, display)
            scored = _answer_and_score(asker, jobs, parse_failures, output, display)
        failed = asker.failures.reasons
        results = {
            name: TaskResult(rows, signatures[name], warnings, failed.get(name, {}))
            for name, (rows, warnings) in scored.items()
        }
        provenance = {
            **_provenance(jobs, engine, data_root, date),
            **_checkpoint(model),
            "not_run": missing,
        }
        remove_unfinished(output, output / SAMPLES)
        timings = {name: timing._asdict() for name, timing in store.timings().items()}
        write_json(output / TIMINGS, timings)
        write_run(output, entry, results, provenance, shared)
    return read_run(output)


def refuse_settings(batch_size: int | None, diversity: int, max_failures: int) -> None:
    """Refuse numbers that mean nothing.

    Raises:
        UserError: one is out of its range.
    """
    if batch_size is not None and batch_size < 1:
        raise UserError(f"batch size must be 1 or more, not {batch_size}")
    if diversity < 0 or diversity == 1:
        raise UserError(f"diversity must be 0 (none) or 2 captions an image or more: {diversity}")
    if max_failures < 0:
        raise UserError(f"failures allowed must be 0 or more, not {max_failures}")


def open_engine(
    model: VLM | str | Path,
    model_name: str | None,
    data_root: Path,
    batch_size: int | None,
    reference_model: VLM | str | Path | None,
    diversity: int,
    trust_remote_code: bool,
    dtype: str | None,
    compiled: bool,
    server: Server | None,
) -> Engine:
    """The engine that `run_tasks` asks, from its arguments."""
    if server is not None:
        here = (reference_model is not None, diversity, trust_remote_code, dtype, compiled)
        _refuse_for_server(any(here))
        return ServedEngine(server, str(model), data_root)
    load = partial(_load, trust_remote_code=trust_remote_code, dtype=dtype)
    reference = None if reference_model is None else load(reference_model)
    vlm = load(model) if model_name is None else replace(load(model), name=model_name)
    return InProcessEngine(vlm, data_root, batch_size, reference, diversity, compiled)


def _load(model: VLM | str | Path, *, trust_remote_code: bool, dtype: str | None) -> VLM:
    if isinstance(model, VLM):
        return model
    precision = None if dtype is None else _PRECISIONS[dtype]
    return load_vlm(model, trust_remote_code=trust_remote_code, dtype=precision)


def _refuse_for_server(asked: bool) -> None:
    if asked:
        raise UserError(
            "--engine openai: leave --reference-model, --diversity, --trust-remote-code, --dtype "
            "and --compile out; they need the model in this process"
        )


def _say(display: Progress, lines: Iterable[str]) -> None:
    for line in lines:
        display.console.print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)


def _refuse_unwritable(output: Path) -> None:
    """Better now than after hours of answers."""
    folder = existing_parent(output)
    if not folder.is_dir():
        raise UserError(f"{folder}: is a file; name another output folder")
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder}: cannot be written; mend its rights or name another output")


# --- answers -------------------------------------------------------------------------------------


def _begin(
    store: ReplyStore,
    digest: str,
    model: Mapping[str, Any],
    signature: str,
    tasks: Mapping[str, str],
    display: Progress,
) -> str:
    """Note what the run is, refuse the replies of another; the day of its first start."""
    record = store.fact("run")
    if record is not None:
        refuse_difference(store.path, record, model, signature, tasks)
        if record["engine"] != digest:
            _say(
                display,
                [f"{store.path}: {store.drop_all()} replies of other weights or settings dropped"],
            )
            record = None
        else:
            _say(display, [f"{store.path}: {len(store)} replies of an earlier start are there"])
    date = datetime.now(UTC).date().isoformat() if record is None else str(record["date"])
    known = {} if record is None else record["tasks"]
    record = {
        "engine": digest,
        "model": dict(model),
        "signature": signature,
        "tasks": {**known, **{name: {"signature": text} for name, text in tasks.items()}},
        "date": date,
    }
    store.note("run", record)
    return date


def _answer_and_score(
    asker: Asker,
    jobs: Sequence[Job],
    parse_failures: ParseFailures,
    output: Path,
    display: Progress,
) -> dict[str, Scored]:
    scoring: dict[str, Callable[[], Pending]] = {}
    for job in jobs:
        bar = display.add_task(job.task.name, total=len(job.samples), note="")
        progress = partial(display.advance, bar)
        if isinstance(job, CaptionJob):
            scoring[job.task.name] = partial(begin_captions, job, asker.captions(job, progress))
        else:
            replies = asker.choices(job, progress)
            pending = partial(score_choices, job, replies, parse_failures, output)
            scoring[job.task.name] = partial(_already, pending)
    scored = {}
    with kept_meteor():
        # All captions wait for METEOR before the first task's other metrics are computed.
        begun = {name: begin() for name, begin in scoring.items()}
        for name, finish in begun.items():
            scored[name] = finish()
            _say(display, [f"{name}: {warning}" for warning in scored[name].warnings])
    return scored


def _already(pending: Pending) -> Pending:
    """What needs no beginning."""
    return pending


# --- what the run folder says about itself -------------------------------------------------------


def _shared_parts(engine: Engine) -> dict[str, object]:
    """What changes the scores of every task."""
    return {"cwdpo-bench": __version__, **engine.signature_parts}


def _task_parts(
    job: Job, limit: int | None, engine: Engine, parse_failures: ParseFailures
) -> dict[str, object]:
    """What changes the scores of this task."""
    parts: dict[str, object] = {
        "task": job.task.name,
        "split": job.task.split,
        "data": job.data_sha256[:12],
        "n": len({sample.cluster for sample in job.samples}),
        "limit": "none" if limit is None else limit,
        "prompt": hashlib.sha256(job.task.template.encode()).hexdigest()[:12],
        "max_new_tokens": job.task.max_new_tokens,
        "decoding": "greedy",
    }
    if job.task.origin is not None:
        parts["source"] = f"lmms-eval-{metadata.version('lmms_eval')}/{job.task.origin}"
    if isinstance(job, CaptionJob):
        shift_from = "none" if engine.shift_from is None else engine.shift_from
        drawn = {"drawn": f"{engine.draws}@temperature1"} if engine.draws else {}
        return {**parts, "scorer": scorer_signature(), "shift_from": shift_from, **drawn}
    if job.task.score is not None:
        return {**parts, "scorer": "the task's own"}
    return {**parts, "scorer": f"{job.task.rules}-rules", "parse_failures": parse_failures}


def _checkpoint(model: VLM | str | Path) -> dict[str, str]:
    """Where the weights lie on this machine, and their learning dynamics with them."""
    if isinstance(model, VLM) or not Path(model).is_dir():
        return {}
    return {"checkpoint": str(Path(model).resolve())}


def _provenance(jobs: Sequence[Job], engine: Engine, data_root: Path, date: str) -> dict[str, Any]:
    return {
        "cwdpo-bench": __version__,
        "date": date,
        "python": platform.python_version(),
        "libraries": {name: metadata.version(name) for name in _LIBRARIES},
        **engine.provenance,
        "data_root": str(data_root.resolve()),
        "data_sha256": {job.task.name: job.data_sha256 for job in jobs},
    }
