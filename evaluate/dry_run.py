"""What a run would do, without doing it: the body of `run --dry-run`. Writes nothing.

A few samples of each task, spread over it, are answered and thrown away; the rest is their rate.
Where the run folder already holds replies of the task, their rate counts and nothing is answered.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cwdpo_bench.evaluate.engine import Engine, Failure
from cwdpo_bench.evaluate.images import open_images
from cwdpo_bench.evaluate.in_process import InProcessEngine
from cwdpo_bench.evaluate.plan import CaptionJob, Job, plan_tasks
from cwdpo_bench.evaluate.run import open_engine, refuse_settings
from cwdpo_bench.evaluate.server import Server
from cwdpo_bench.evaluate.store import kept_timings, reply_to_bytes
from cwdpo_bench.files import existing_parent
from cwdpo_bench.vlm import VLM, Prompt, encode_prompt

SAMPLES = 8
"""Timed of each task, after one that warms up."""


class Estimate(NamedTuple):
    """Of one task.

    Attributes:
        task: its name.
        samples: to be answered, kept ones included.
        kept: replies that the run folder holds already.
        prompt_tokens: of all samples, images included; None for a model that is not here.
        new_tokens: at most.
        seconds: for what is not kept.
        disk: bytes of all replies; None where nothing was timed.
    """

    task: str
    samples: int
    kept: int
    prompt_tokens: int | None
    new_tokens: int
    seconds: float
    disk: int | None


def dry_run(
    model: str,
    *,
    tasks: Sequence[str] | None,
    data_root: Path,
    output: Path,
    model_name: str | None = None,
    limit: int | None = None,
    batch_size: int | None = 16,
    reference_model: VLM | None = None,
    diversity: int = 0,
    include_path: Path | None = None,
    max_failures: int = 0,
    trust_remote_code: bool = False,
    dtype: str | None = None,
    compiled: bool = False,
    server: Server | None = None,
) -> list[Estimate]:
    """What `run_tasks` would do with these arguments; raises what it would before any answer."""
    refuse_settings(batch_size, diversity, max_failures)
    jobs, _ = plan_tasks(tasks, data_root, limit, include_path, max_failures)
    engine = open_engine(
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
    return estimate(engine, jobs, data_root, output)


def told(estimates: Sequence[Estimate], output: Path) -> str:
    """A line a task, and one for all."""
    lines = []
    for e in estimates:
        prompts = "" if e.prompt_tokens is None else f"about {e.prompt_tokens:,} prompt tokens, "
        lines.append(
            f"{e.task}: {e.samples:,} samples ({e.kept:,} answered already), {prompts}at most "
            f"{e.new_tokens:,} new tokens, about {e.seconds:.0f} s"
        )
    seconds, disk = sum(e.seconds for e in estimates), sum(e.disk or 0 for e in estimates)
    free = free_bytes(output) / 2**30
    lines.append(
        f"all: about {seconds:.0f} s to answer, {disk / 2**20:.1f} MiB of replies, "
        f"{free:.1f} GiB free; nothing was written"
    )
    return "\n".join(lines)


def estimate(engine: Engine, jobs: list[Job], root: Path, output: Path) -> list[Estimate]:
    """Time a few samples of each job and tell what all of them will take.

    Raises:
        UserError: another run is writing into `output`, or the engine gives up.
    """
    timings = kept_timings(output)
    found = []
    for job in jobs:
        name, total = job.task.name, len(job.samples)
        step = max(1, total // SAMPLES)
        places = list(range(0, total, step))[:SAMPLES]
        kept, disk = 0, None
        if name in timings and timings[name].samples:
            kept = min(total, timings[name].samples)
            each = timings[name].seconds / timings[name].samples
        else:
            _timed(engine, job, places[:1])
            each, size = _timed(engine, job, places)
            disk = round(size * total)
        found.append(
            Estimate(
                name,
                total,
                kept,
                _prompt_tokens(engine, job, places, root),
                total * job.task.max_new_tokens,
                each * (total - kept),
                disk,
            )
        )
    return found


def free_bytes(output: Path) -> int:
    """What is free where the run folder would lie."""
    return shutil.disk_usage(existing_parent(output)).free


def _timed(engine: Engine, job: Job, places: list[int]) -> tuple[float, float]:
    """Seconds and bytes of a reply."""
    limit, started = job.task.max_new_tokens, time.monotonic()
    if isinstance(job, CaptionJob):
        captions = [job.samples[place] for place in places]
        replies = [reply for _, reply in engine.answer_captions(captions, max_new_tokens=limit)]
        sizes = [len(reply_to_bytes(r)) for r in replies if not isinstance(r, Failure)]
    else:
        asked = [job.samples[place] for place in places]
        answers = [reply for _, reply in engine.answer_choices(asked, max_new_tokens=limit)]
        sizes = [len(reply_to_bytes(r)) for r in answers if not isinstance(r, Failure)]
    seconds = time.monotonic() - started
    return seconds / len(places), sum(sizes) / max(1, len(sizes))


def _prompt_tokens(engine: Engine, job: Job, places: list[int], root: Path) -> int | None:
    if not isinstance(engine, InProcessEngine):
        return None
    counts = [
        encode_prompt(engine.vlm.processor, Prompt(sample.prompt, open_images(sample, root)))
        for sample in (job.samples[place] for place in places)
    ]
    tokens = sum(int(encoded["input_ids"].shape[-1]) for encoded in counts)
    return round(tokens / len(places) * len(job.samples))
