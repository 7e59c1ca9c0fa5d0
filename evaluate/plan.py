"""What a run will do: the benchmarks that are named and there, with all their samples.

Everything about the data that can be refused is refused here, before any model is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cwdpo_bench.errors import UserError
from cwdpo_bench.evaluate.choosing import choose_tasks
from cwdpo_bench.evaluate.images import refuse_missing_images
from cwdpo_bench.evaluate.lmms_sets import samples_digest
from cwdpo_bench.evaluate.samples import CaptionSample, ChoiceSample
from cwdpo_bench.evaluate.tasks import (
    TASKS,
    CaptionTask,
    ChoiceTask,
    first_clusters,
    refuse_doubled_ids,
)
from cwdpo_bench.files import sha256_of


@dataclass(frozen=True)
class CaptionJob:
    """Images to caption: a benchmark's samples, and the digest of its annotations."""

    task: CaptionTask
    samples: list[CaptionSample]
    data_sha256: str


@dataclass(frozen=True)
class ChoiceJob:
    """Questions to answer, likewise."""

    task: ChoiceTask
    samples: list[ChoiceSample]
    data_sha256: str


Job = CaptionJob | ChoiceJob


def plan_tasks(
    names: Sequence[str] | None,
    root: Path,
    limit: int | None,
    include: Path | None = None,
    missing_images: int = 0,
) -> tuple[list[Job], list[str]]:
    """Load the samples of the tasks that can be run, and say which can't.

    Args:
        names: of tasks; None takes those of the default five that the root holds.
        root: the data root.
        limit: only the first so many samples of each task (questions, with all their orders).
        include: a folder of YAML files that define tasks for lmms-eval, searched first.
        missing_images: so many samples of a task may lack their image.

    Returns:
        What to run; a line for each default task that is not there, with where to get its data.

    Raises:
        UserError: a task is unknown or named but not there, or its data or an image are not whole.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit must be 1 or more, not {limit}")
    if not root.is_dir():
        folders = ", ".join(f"{name}/" for name in TASKS)
        raise UserError(f"data root {root}: no such folder; name the one that holds {folders}")
    chosen, missing = choose_tasks(names, root, include, limit)
    return [_job(task, root, limit, missing_images) for task in chosen], missing


def _job(task: CaptionTask | ChoiceTask, root: Path, limit: int | None, missing_images: int) -> Job:
    files = task.files(root)
    job: Job
    if isinstance(task, CaptionTask):
        captions = first_clusters(task.load(root), limit)
        job = CaptionJob(task, captions, sha256_of(files) if files else samples_digest(captions))
    else:
        asked = first_clusters(task.load(root), limit)
        job = ChoiceJob(task, asked, sha256_of(files) if files else samples_digest(asked))
    refuse_doubled_ids(job.samples, files[0] if files else f"lmms-eval's {task.origin}")
    refuse_missing_images(job.samples, root, missing_images)
    return job
