"""lmms-eval's tasks: found by name, their data sets, prompts and images as samples of ours.

`lmms:NAME` is any task or group of lmms-eval or of the user's own YAML files (`--include-path`).
Its definition says what is asked (`doc_to_text`, `doc_to_visual`, few-shot examples), how long a
reply may be and how it is scored (`evaluate/lmms_scores.py`). lmms-eval is an extra of this
package (`pip install 'cwdpo-bench[lmms]'`) and imported only where one of its tasks is asked for.

A task whose rows offer options, `doc_to_choice`, option columns that the prompt shows, or a yes or
a no, also gets their probabilities and our calibration.
"""

from __future__ import annotations

import ast
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from string import ascii_uppercase
from typing import Any, NamedTuple

from PIL import Image

from cwdpo_bench.errors import UserError, nearest
from cwdpo_bench.evaluate.samples import MULTIPLE_CHOICE, OPEN, ChoiceSample, RowImages

PREFIX = "lmms:"
"""What tells a task of lmms-eval from one of ours."""
MAX_NEW_TOKENS = 1024
"""Where a task does not say; lmms-eval's own models differ there."""
_POLAR = ("Yes", "No")
_KINDS = ("generate_until", "multiple_choice")


class Options(NamedTuple):
    """What a row lets the model choose from.

    Attributes:
        texts: the options in their order.
        words: with what a reply that means each starts; empty where that is its letter.
        gold: the right one's place.
    """

    texts: tuple[str, ...]
    words: tuple[str, ...]
    gold: int


def is_installed() -> bool:
    """Whether lmms-eval can be imported."""
    return find_spec("lmms_eval") is not None


def need_lmms_eval(what: str) -> None:
    """Refuse what needs lmms-eval where it is not installed.

    Raises:
        UserError: it is not.
    """
    if not is_installed():
        raise UserError(f"{what} needs lmms-eval: pip install 'cwdpo-bench[lmms]'")


def load_tasks(name: str, include: Path | None = None) -> dict[str, Any]:
    """The task objects that a name stands for, by their own names: one, or those of a group.

    Args:
        name: of a task, a group or a tag.
        include: a folder of YAML files, searched first.

    Raises:
        UserError: there is none of that name (the nearest is named), lmms-eval is not installed,
            or its data set cannot be loaded.
    """
    need_lmms_eval(f"task {PREFIX}{name}")
    if include is not None and not include.is_dir():
        raise UserError(f"--include-path {include}: no such folder")
    _quiet()
    manager = _manager(_folders(name), include)
    if name not in manager.all_tasks:
        # A group may name tasks of another folder, and a typing error is in none.
        manager = _manager([_home()], include)
    if name not in manager.all_tasks:
        raise UserError(f"unknown task {PREFIX}{name}; {nearest(name, manager.all_tasks)}")
    try:
        try:
            loaded = manager.load_task_or_group(name)
        except KeyError:
            loaded = _manager([_home()], include).load_task_or_group(name)
        return _leaves(loaded)
    except UserError:
        raise
    except Exception as error:
        # Its data sets come from anywhere, so anything may be raised.
        raise UserError(
            f"task {PREFIX}{name}: lmms-eval cannot load it ({_reason(error)}); is its data set in "
            "the cache of `datasets`, or the hub reachable?"
        ) from error


def _reason(error: BaseException) -> str:
    """The last line of what really went wrong, tenacity's wrapping taken off."""
    attempt = getattr(error, "last_attempt", None)
    if attempt is not None and attempt.exception() is not None:
        error = attempt.exception()
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _quiet() -> None:
    from loguru import logger

    logger.disable("lmms_eval")


def _home() -> Path:
    spec = find_spec("lmms_eval")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "tasks"


def _folders(name: str) -> list[Path]:
    """The folders of lmms-eval in which a definition holds that name: the whole takes seconds."""
    word = re.compile(rf"(?<![\w-]){re.escape(name)}(?![\w-])")
    home = _home()
    found = {
        path.relative_to(home).parts[0]: None
        for path in sorted(home.rglob("*.yaml"))
        if word.search(path.read_text(encoding="utf-8", errors="replace"))
    }
    return [home / part for part in found if (home / part).is_dir()]


def _manager(folders: Sequence[Path], include: Path | None) -> Any:
    from lmms_eval.tasks import TaskManager

    # Of two definitions of a name lmms-eval takes that of the folder that comes first.
    first = [] if include is None else [str(include)]
    paths = first + [f"{folder}{os.sep}" for folder in folders]
    return TaskManager("ERROR", include_path=paths, include_defaults=False)


def _leaves(loaded: Mapping[Any, Any]) -> dict[str, Any]:
    """Groups unfolded."""
    found: dict[str, Any] = {}
    for name, task in loaded.items():
        if isinstance(task, Mapping):
            found |= _leaves(task)
        else:
            found[str(name)] = task
    return found


# --- requests as samples -------------------------------------------------------------------------


class Loaded(NamedTuple):
    """A task of lmms-eval with its samples.

    Attributes:
        task: the object, its requests built.
        samples: one a row, in the data set's order.
        max_new_tokens: of its generation settings.
        warnings: what of its definition is not followed.
    """

    task: Any
    samples: list[ChoiceSample]
    max_new_tokens: int
    warnings: list[str]


def load_samples(name: str, task: Any, limit: int | None = None) -> Loaded:
    """The samples of a task.

    Args:
        name: of the task.
        task: from `load_tasks`.
        limit: only the first so many rows.

    Raises:
        UserError: it asks for more than text (rounds, videos made, agents), or its own code fails.
    """
    if task.OUTPUT_TYPE not in _KINDS:
        raise UserError(
            f"task {PREFIX}{name}: output_type {task.OUTPUT_TYPE!r} cannot be run here; "
            f"known: {', '.join(_KINDS)}"
        )
    if task.multiple_input:
        raise UserError(f"task {PREFIX}{name}: its options are contexts; that cannot be run here")
    try:
        task.build_all_requests(limit=limit)
        requests = {request.doc_id: request for request in reversed(task.instances)}
        docs = task.eval_docs_no_media
        options = _options(task, {number: docs[number] for number in requests}, requests)
        samples = [
            _sample(name, task, number, requests[number].args[0], options.get(number))
            for number in sorted(requests)
        ]
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"task {PREFIX}{name}: its own code fails ({_reason(error)})") from error
    if task.OUTPUT_TYPE == "multiple_choice":
        counts = Counter(request.doc_id for request in task.instances)
        for sample in samples:
            if counts[int(sample.id)] != len(sample.options):
                raise UserError(
                    f"task {PREFIX}{name}: row {sample.id}: needs 2 to 26 options, no two alike, "
                    "and an answer among them"
                )
    settings = task.config.generation_kwargs or {}
    warnings = []
    if settings.get("do_sample") or float(settings.get("temperature") or 0) > 0:
        warnings.append("the task asks for sampled replies; they are greedy here")
    if task.config.repeats > 1:
        warnings.append(f"the task asks {task.config.repeats} times; once here")
    # Where the options are all that is scored, a reply is only read for `exact_match`.
    longest = 32 if task.OUTPUT_TYPE == "multiple_choice" else longest_reply(settings)
    return Loaded(task, samples, longest, warnings)


def row_images(task: Any, number: int) -> Sequence[Image.Image]:
    """The pictures of a row, by the task's own function.

    Raises:
        TypeError: it gives something that is no picture, as for videos.
    """
    return as_images(task.doc_to_visual(task.task_docs[number]))


def longest_reply(settings: Mapping[str, Any]) -> int:
    """Where generation stops, from a task's generation settings."""
    return int(settings.get("max_new_tokens") or MAX_NEW_TOKENS)


def cut_at_stops(text: str, settings: Mapping[str, Any]) -> str:
    """The reply up to the first of the stop texts in a task's generation settings."""
    until = settings.get("until") or []
    for stop in [until] if isinstance(until, str) else until:
        if stop:
            text = text.split(stop)[0]
    return text


def as_images(visuals: Any) -> Sequence[Image.Image]:
    """What a task's `doc_to_visual` gives, as a list of pictures.

    Raises:
        TypeError: it gives something that is no picture, as for videos.
    """
    images = list(visuals) if isinstance(visuals, list | tuple) else [visuals]
    images = [image for image in images if image is not None]
    if odd := [image for image in images if not isinstance(image, Image.Image)]:
        raise TypeError(f"{type(odd[0]).__name__} is no image")
    return images


def _sample(
    name: str, task: Any, number: int, prompt: str, options: Options | None
) -> ChoiceSample:
    images = RowImages(f"{PREFIX}{name} row {number}", partial(row_images, task, number))
    target = task.doc_to_target(task.eval_docs_no_media[number])
    return ChoiceSample(
        id=str(number),
        cluster=str(number),
        images=(images,) if task.config.doc_to_visual is not None else (),
        prompt=prompt,
        question_type=OPEN if options is None else MULTIPLE_CHOICE,
        options=() if options is None else options.texts,
        option_words=() if options is None else options.words,
        gold=str(target) if options is None else ascii_uppercase[options.gold],
    )


def _options(
    task: Any, docs: Mapping[int, Mapping[str, Any]], requests: Mapping[int, Any]
) -> dict[int, Options]:
    """The options of the rows that have some."""
    if task.config.doc_to_choice is not None:
        found = {number: _of_choices(task, doc) for number, doc in docs.items()}
    else:
        targets = {number: task.doc_to_target(doc) for number, doc in docs.items()}
        if {str(target).strip().casefold() for target in targets.values()} <= {"yes", "no"}:
            return {
                number: Options(_POLAR, _POLAR, int(str(target).strip().casefold() == "no"))
                for number, target in targets.items()
            }
        found = {
            number: _of_columns(doc, targets[number], requests[number].args[0])
            for number, doc in docs.items()
        }
    return {number: options for number, options in found.items() if options is not None}


def _of_choices(task: Any, doc: Mapping[str, Any]) -> Options | None:
    """What `doc_to_choice` offers; the model says the option itself."""
    texts = tuple(str(text).strip() for text in task.doc_to_choice(doc))
    target = task.doc_to_target(doc)
    gold = target if isinstance(target, int) else _place(str(target).strip(), texts)
    if gold is None or not 0 <= gold < len(texts) or not 2 <= len(set(texts)) == len(texts) <= 26:
        return None
    return Options(texts, texts, int(gold))


def _of_columns(doc: Mapping[str, Any], target: Any, prompt: str) -> Options | None:
    """A list `options` or `choices`, or columns A, B, …, that the prompt shows with letters."""
    texts = _listed(doc)
    if not 2 <= len(texts) <= len(ascii_uppercase):
        return None
    letters = ascii_uppercase[: len(texts)]
    if not all(re.search(rf"(?m)(?:^|[\s(]){letter}[.):]", prompt) for letter in letters):
        return None
    answer = str(target).strip()
    gold = letters.find(answer) if len(answer) == 1 else _place(answer, texts)
    return None if gold is None or gold < 0 else Options(texts, (), gold)


def _listed(doc: Mapping[str, Any]) -> tuple[str, ...]:
    for column in ("options", "choices"):
        value = doc.get(column)
        if isinstance(value, str):
            try:
                value = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                continue
        if isinstance(value, list | tuple) and value:
            return tuple(str(text) for text in value)
    cells = []
    for letter in ascii_uppercase:
        cell = doc.get(letter)
        if cell is None or str(cell) in ("", "nan"):
            break
        cells.append(str(cell))
    return tuple(cells)


def _place(text: str, texts: Sequence[str]) -> int | None:
    return texts.index(text) if texts.count(text) == 1 else None
