"""The body of `cwdpo-bench run`: a model, some benchmarks and a data root give a run folder.

Everything that can be refused is refused before the model answers anything: unknown tasks, missing
data, broken annotations, an output folder that holds another run.
"""

from __future__ import annotations

import hashlib
import os
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from rich.progress import Progress

from cwdpo_bench import __version__
from cwdpo_bench.errors import UserError
from cwdpo_bench.evaluate.captions import begin_caption_rows, scorer_signature
from cwdpo_bench.evaluate.choices import ParseFailures, Rules, choice_rows, failure_warnings
from cwdpo_bench.evaluate.diversity import diversity_columns
from cwdpo_bench.evaluate.engine import CaptionAnswer, ChoiceAnswer, Engine, Failure
from cwdpo_bench.evaluate.in_process import InProcessEngine
from cwdpo_bench.evaluate.java import find_java
from cwdpo_bench.evaluate.meteor import kept_meteor
from cwdpo_bench.evaluate.plan import CaptionJob, Job, plan_tasks
from cwdpo_bench.evaluate.processes import ALONE, Processes, follow, share
from cwdpo_bench.evaluate.results import (
    RunFolder,
    TaskResult,
    read_run,
    refuse_other_run,
    signature_of,
    write_run,
)
from cwdpo_bench.evaluate.samples import CaptionSample, ChoiceSample
from cwdpo_bench.evaluate.served import ServedEngine
from cwdpo_bench.evaluate.server import Server
from cwdpo_bench.progress import progress_bar
from cwdpo_bench.vlm import VLM, load_vlm

_LIBRARIES = ("torch", "transformers", "peft", "numpy", "pandas", "pycocoevalcap")

Scored = tuple[pd.DataFrame, list[str]]
"""The rows of `samples/TASK.parquet`, and what a reader of the scores must know."""
Answer = TypeVar("Answer", CaptionAnswer, ChoiceAnswer)
Pending = Callable[[], Scored]
"""Waits for scores that were begun."""


def run_tasks(
    model: VLM | str | Path,
    *,
    tasks: Sequence[str] | None,
    data_root: Path,
    output: Path,
    model_name: str | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    reference_model: VLM | str | Path | None = None,
    diversity: int = 0,
    parse_failures: ParseFailures = "wrong",
    include_path: Path | None = None,
    trust_remote_code: bool = False,
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
        output: the run folder to write; one of the same run is overwritten.
        model_name: what the results call the model; by default the name that it was loaded by.
        limit: only the first so many samples of each task (questions, with all their orders).
        batch_size: rows a forward.
        reference_model: where given, captions also get TV and JS between it and the model.
        diversity: captions to sample an image, at least 2, for the diversity metrics; 0: none.
        parse_failures: what becomes of a reply in which nothing is found (`choice_rows`).
        include_path: a folder of YAML files that define tasks for lmms-eval, searched first.
        trust_remote_code: let the models' own code run.
        server: where given, it answers, and `model` is the model's name there.
        processes: from `join`, where several answer this run; all call this alike. It returns in
            the first alone, the others end with `SystemExit` once that one has all replies.
        bars: a running display to draw the progress on, for callers that have one.

    Raises:
        UserError: a task is unknown or named but not there, data or an image are broken, the
            output folder holds another run or cannot be written, `JAVA_HOME` is broken, or the
            model gives no finite log-probabilities.
    """
    if batch_size < 1:
        raise UserError(f"batch size must be 1 or more, not {batch_size}")
    if diversity < 0 or diversity == 1:
        raise UserError(f"diversity must be 0 (none) or 2 captions an image or more: {diversity}")
    jobs, missing = plan_tasks(tasks, data_root, limit, include_path)
    if any(isinstance(job, CaptionJob) for job in jobs):
        find_java()
    _refuse_unwritable(output)
    engine: Engine
    if server is None:
        load = partial(_load, trust_remote_code=trust_remote_code)
        reference = None if reference_model is None else load(reference_model)
        vlm = load(model) if model_name is None else replace(load(model), name=model_name)
        engine = InProcessEngine(vlm, data_root, batch_size, reference, diversity)
    else:
        _refuse_for_server(reference_model is not None or diversity > 0 or trust_remote_code)
        engine = ServedEngine(server, str(model), data_root)
    if processes.rank:
        follow(engine, jobs, processes)
        raise SystemExit
    entry, shared = dict(engine.model), signature_of(_shared_parts(engine))
    signatures = {
        job.task.name: signature_of(_task_parts(job, limit, engine, parse_failures)) for job in jobs
    }
    refuse_other_run(output, entry, shared, signatures)

    scoring: dict[str, Callable[[], Pending]] = {}
    results: dict[str, TaskResult] = {}
    seconds: dict[str, float] = {}
    with (
        share(engine, jobs, processes) as engine,
        nullcontext(bars) if bars is not None else progress_bar() as display,
    ):
        _say(display, missing)
        for job in jobs:
            started = time.monotonic()
            scoring[job.task.name] = _answer(engine, job, display, parse_failures, output)
            seconds[job.task.name] = round(time.monotonic() - started, 1)
        with kept_meteor():
            # All captions wait for METEOR before the first task's other metrics are computed.
            begun = {name: begin() for name, begin in scoring.items()}
            for name, finish in begun.items():
                rows, warnings = finish()
                results[name] = TaskResult(rows, signatures[name], warnings)
                _say(display, [f"{name}: {warning}" for warning in warnings])
    provenance = {
        **_provenance(jobs, engine, data_root),
        **_checkpoint(model),
        "not_run": missing,
        "seconds": seconds,
    }
    write_run(output, entry, results, provenance, shared)
    return read_run(output)


def _load(model: VLM | str | Path, *, trust_remote_code: bool) -> VLM:
    if isinstance(model, VLM):
        return model
    return load_vlm(model, trust_remote_code=trust_remote_code)


def _refuse_for_server(asked: bool) -> None:
    if asked:
        raise UserError(
            "--engine openai: leave --reference-model, --diversity and --trust-remote-code out; "
            "they need the model in this process"
        )


def _say(display: Progress, lines: Iterable[str]) -> None:
    for line in lines:
        display.console.print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)


def _refuse_unwritable(output: Path) -> None:
    """Better now than after hours of answers."""
    folder = output
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise UserError(f"{folder}: is a file; name another output folder")
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder}: cannot be written; mend its rights or name another output")


# --- answers -------------------------------------------------------------------------------------


def _answer(
    engine: Engine, job: Job, display: Progress, parse_failures: ParseFailures, output: Path
) -> Callable[[], Pending]:
    """Let the model answer all samples; what comes back begins to score them when called."""
    bar = display.add_task(job.task.name, total=len(job.samples), note="")
    limit = job.task.max_new_tokens
    progress = partial(display.advance, bar)
    if isinstance(job, CaptionJob):
        captions = _in_order(engine.answer_captions(job.samples, max_new_tokens=limit), progress)
        return partial(_begin_captions, job.samples, captions)
    replies = _in_order(engine.answer_choices(job.samples, max_new_tokens=limit), progress)
    if job.task.score is not None:
        own = job.task.score
        return lambda: partial(own, job.samples, replies, output)
    assert job.task.rules is not None
    score = partial(_score_choices, job.samples, replies, job.task.rules, parse_failures)
    return lambda: score


def _in_order(
    replies: Iterable[tuple[int, Answer | Failure]], progress: Callable[[], None]
) -> list[Answer]:
    """All replies in the samples' order; a sample that fails ends the run."""
    answers: dict[int, Answer] = {}
    for place, answer in replies:
        if isinstance(answer, Failure):
            raise UserError(answer.reason)
        answers[place] = answer
        progress()
    return [answers[place] for place in sorted(answers)]


def _score_choices(
    samples: Sequence[ChoiceSample],
    answers: Sequence[ChoiceAnswer],
    rules: Rules,
    parse_failures: ParseFailures,
) -> Scored:
    replies = [answer.text for answer in answers]
    logps = [answer.option_log_probabilities for answer in answers]
    empty = sum(not reply for reply in replies)
    warnings = [f"{empty} of {len(replies)} replies are empty"] if empty else []
    rows = choice_rows(samples, replies, logps, rules=rules, parse_failures=parse_failures)
    return rows, [*warnings, *failure_warnings(rows)]


def _begin_captions(samples: Sequence[CaptionSample], answers: Sequence[CaptionAnswer]) -> Pending:
    predictions = {s.id: a.text for s, a in zip(samples, answers, strict=True)}
    begun = begin_caption_rows(samples, predictions)

    def finish() -> Scored:
        rows, warnings = begun()
        return _with_diversity(_with_tokens(rows, answers), answers), warnings

    return finish


def _with_tokens(rows: pd.DataFrame, answers: Sequence[CaptionAnswer]) -> pd.DataFrame:
    """The rows with the statistics of the references' tokens, where the engine gives them."""
    scores = [a.reference_scores for a in answers if a.reference_scores is not None]
    if len(scores) < len(answers):
        return rows
    columns: dict[str, list[np.ndarray | None]] = {
        "token_confidences": [score.top1_probabilities for score in scores],
        "token_correct": [score.top1_correct for score in scores],
        "token_entropies": [score.entropies for score in scores],
        "token_tv": [score.tv for score in scores],
        "token_js": [score.js for score in scores],
    }
    for name, arrays in columns.items():
        # TV and JS are there for all samples or, without a reference model, for none.
        lists = [array.tolist() for array in arrays if array is not None]
        if lists:
            rows[name] = lists
    return rows


def _with_diversity(rows: pd.DataFrame, answers: Sequence[CaptionAnswer]) -> pd.DataFrame:
    """The rows with the sampled captions and how much they differ, where any were drawn."""
    if not all(answer.drawn for answer in answers):
        return rows
    drawn = [list(answer.drawn) for answer in answers]
    references, samples = (
        dict(zip(rows["id"], c, strict=True)) for c in (rows["references"], drawn)
    )
    rows["drawn"] = drawn
    return rows.assign(**diversity_columns(references, samples))


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


def _provenance(jobs: Sequence[Job], engine: Engine, data_root: Path) -> dict[str, Any]:
    return {
        "cwdpo-bench": __version__,
        "date": datetime.now(UTC).date().isoformat(),
        "python": platform.python_version(),
        "libraries": {name: metadata.version(name) for name in _LIBRARIES},
        **engine.provenance,
        "data_root": str(data_root.resolve()),
        "data_sha256": {job.task.name: job.data_sha256 for job in jobs},
    }
