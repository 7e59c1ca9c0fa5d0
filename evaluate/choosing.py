"""From the names that a user gives to tasks that can be run: where the data of each come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from cwdpo_bench.errors import UserError
from cwdpo_bench.evaluate.lmms import PREFIX, is_installed, load_samples, load_tasks
from cwdpo_bench.evaluate.lmms_scores import score_replies
from cwdpo_bench.evaluate.lmms_sets import ORIGINS, load_from_lmms
from cwdpo_bench.evaluate.samples import ChoiceSample
from cwdpo_bench.evaluate.tasks import DEFAULT_TASKS, CaptionTask, ChoiceTask, find_task


def choose_tasks(
    names: Sequence[str] | None, root: Path, include: Path | None = None, limit: int | None = None
) -> tuple[list[CaptionTask | ChoiceTask], list[str]]:
    """The tasks that can be run, and a line on each that can't.

    A named task is read from its local layout under `root`; where that is missing, from lmms-eval's
    data set; `lmms:NAME` is a task or the tasks of a group of lmms-eval. Without names those of
    `DEFAULT_TASKS` that `root` holds.

    Raises:
        UserError: a task is unknown, or named and not there, or nothing is.
    """
    if names is None:
        local = [find_task(name) for name in DEFAULT_TASKS]
        found = [task for task in local if task.files(root)]
        missing = [_missing(task, root) for task in local if not task.files(root)]
        if not found:
            raise UserError("\n".join(missing))
        return list(found), missing
    chosen: list[CaptionTask | ChoiceTask] = []
    for name in dict.fromkeys(names):
        if name.startswith(PREFIX):
            chosen += _lmms_tasks(name.removeprefix(PREFIX), include, limit)
            continue
        task = find_task(name)
        if is_local(task, root):
            chosen.append(_at(root, task))
        elif is_installed() and name in ORIGINS:
            chosen.append(_elsewhere(task, include))
        else:
            other = "; or take them from lmms-eval's data set: pip install 'cwdpo-bench[lmms]'"
            raise UserError(_missing(task, root) + (other if name in ORIGINS else ""))
    return chosen, []


def is_local(task: CaptionTask | ChoiceTask, root: Path) -> bool:
    """Whether a data root holds the benchmark; Flickr30k's split alone is too little."""
    images = ("flickr30k/flickr30k-images", "flickr30k/images")
    if task.name == "flickr30k" and not any((root / folder).is_dir() for folder in images):
        return False
    return bool(task.files(root))


def _at(root: Path, task: CaptionTask | ChoiceTask) -> CaptionTask | ChoiceTask:
    """The task; one that scores itself is told where its data are."""
    if isinstance(task, ChoiceTask) and task.score is not None:
        own: Any = task.score
        return replace(task, score=partial(own, root=root))
    return task


def _missing(task: CaptionTask | ChoiceTask, root: Path) -> str:
    return f"{task.name} is not run: its data are not under {root}; get them: {task.source}"


def _elsewhere(task: CaptionTask | ChoiceTask, include: Path | None) -> CaptionTask | ChoiceTask:
    """The benchmark read from lmms-eval's data set."""
    load: Any = partial(load_from_lmms, task.name, include=include)
    return replace(task, files=_no_files, load=load, origin=ORIGINS[task.name])


def _no_files(_: Path) -> list[Path]:
    return []


def _lmms_tasks(name: str, include: Path | None, limit: int | None) -> list[ChoiceTask]:
    """A task of lmms-eval, or those of a group."""
    tasks = []
    for own, task in load_tasks(name, include).items():
        loaded = load_samples(own, task, limit)
        tasks.append(
            ChoiceTask(
                name=f"{PREFIX}{own}",
                split=str(task.config.test_split or task.config.validation_split),
                files=_no_files,
                load=partial(_given, loaded.samples),
                # Of any task: the prompts themselves are in the digest of the data.
                template="",
                max_new_tokens=loaded.max_new_tokens,
                source="the data set that lmms-eval's definition names",
                origin=own,
                rules=None,
                score=partial(score_replies, loaded),
            )
        )
    return tasks


def _given(samples: list[ChoiceSample], _: Path) -> list[ChoiceSample]:
    return samples
