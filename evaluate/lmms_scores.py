"""Replies scored by an lmms-eval task's own functions, with our calibration beside them.

The filters, `process_results` and the aggregations are the task's. A metric that its aggregation
takes the mean of is kept a sample, in a column `lmms:METRIC`, so that it is resampled and compared
as any of ours (`evaluate/metrics.py`); one that is no mean (a judge's report, F1) is a value of the
whole task alone, without an interval, and said in a warning.
"""

from __future__ import annotations

import inspect
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd

from cwdpo_bench.errors import UserError
from cwdpo_bench.evaluate.choices import option_columns
from cwdpo_bench.evaluate.engine import ChoiceAnswer
from cwdpo_bench.evaluate.lmms import PREFIX, Loaded, cut_at_stops
from cwdpo_bench.evaluate.metrics import lmms_metric_name
from cwdpo_bench.evaluate.samples import ChoiceSample

_SAME = 1e-9
"""A mean and a task's own figure may differ by so much: the order of the sum."""


def score_replies(
    loaded: Loaded,
    samples: Sequence[ChoiceSample],
    answers: Sequence[ChoiceAnswer],
    output: Path,
) -> tuple[pd.DataFrame, list[str]]:
    """The rows of `samples/lmms:NAME.parquet`, and what a reader of the scores must know.

    Args:
        loaded: the task.
        samples: those that were asked, by the places of their rows.
        answers: the replies to them.
        output: where the task's own files go (submissions), below `submissions/`.

    Raises:
        UserError: the task's own code fails on a reply.
    """
    task = loaded.task
    settings = task.config.generation_kwargs or {}
    texts = [cut_at_stops(answer.text, settings) for answer in answers]
    rows = pd.DataFrame(
        {
            "id": [sample.id for sample in samples],
            "cluster": [sample.cluster for sample in samples],
            "groups": [list(sample.groups) for sample in samples],
            "prompt": [sample.prompt for sample in samples],
            "prediction": texts,
            "question_type": [sample.question_type for sample in samples],
            "options": [list(sample.options) for sample in samples],
            "gold": [sample.gold for sample in samples],
        }
    )
    found = _results(loaded, samples, texts, answers)
    warnings = list(loaded.warnings)
    for (metric, key), values in found.items():
        if metric not in task.aggregation():
            continue
        name = lmms_metric_name(
            metric if key == "none" else f"{metric},{key}", task.higher_is_better()[metric]
        )
        whole = _aggregate(task, metric, list(values.values()), output)
        column = _summands(values, whole, str(task.config.score_key))
        if column is None:
            warnings.append(_told(name, whole))
        else:
            # Null where the task's code gives the metric for other samples alone.
            rows[name] = pd.Series([column.get(sample.id) for sample in samples], dtype=object)
    logps = [answer.option_log_probabilities for answer in answers]
    if any(values is not None for values in logps):
        for name, column_values in option_columns(samples, logps).items():
            rows[name] = column_values
    return rows, warnings


def _told(name: str, whole: object) -> str:
    if isinstance(whole, int | float) and math.isfinite(whole):
        return f"{name} = {whole:.6g} by the task's own aggregation, no mean, so without interval"
    return f"{name}: the task's own aggregation gives no number"


def _results(
    loaded: Loaded,
    samples: Sequence[ChoiceSample],
    texts: Sequence[str],
    answers: Sequence[ChoiceAnswer],
) -> dict[tuple[str, str], dict[str, Any]]:
    """What `process_results` gives: (metric, filter) → sample id → value."""
    task = loaded.task
    requests: dict[str, list[Any]] = defaultdict(list)
    for request in task.instances:
        requests[str(request.doc_id)].append(request)
    found: dict[tuple[str, str], dict[str, Any]] = defaultdict(dict)
    asked = []
    for sample, text, answer in zip(samples, texts, answers, strict=True):
        own = sorted(requests[sample.id], key=lambda request: request.idx)
        for request, reply in zip(own, _replies(task, sample, text, answer, len(own)), strict=True):
            request.resps, request.filtered_resps = [reply], {}
        asked += own
    task._instances = asked
    try:
        task.apply_filters()
        for sample in samples:
            own = sorted(requests[sample.id], key=lambda request: request.idx)
            doc = task.eval_docs_no_media[int(sample.id)]
            for key in own[0].filtered_resps:
                replies = [request.filtered_resps[key] for request in own]
                extra = {"full_docs": task.task_docs} if task.config.full_docs else {}
                for metric, value in task.process_results(doc, replies, **extra).items():
                    found[metric, key][sample.id] = value
    except Exception as error:
        name = f"{PREFIX}{task.config.task}"
        raise UserError(
            f"task {name}: its own scoring fails ({type(error).__name__}: {error})"
        ) from error
    return found


def _replies(
    task: Any, sample: ChoiceSample, text: str, answer: ChoiceAnswer, count: int
) -> list[Any]:
    """What lmms-eval's model would have returned: a text, or (loss, is greedy) for each option."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return [text]
    logps = answer.option_log_probabilities
    if logps is None or len(logps) != count:
        raise UserError(
            f"task {PREFIX}{task.config.task}: sample {sample.id} needs the log-probability of "
            f"each of its {count} options, and the engine gives "
            f"{'none' if logps is None else len(logps)}"
        )
    # lmms-eval takes the least: its models return losses.
    return [
        (-float(logp), text.startswith(option))
        for logp, option in zip(logps, sample.options, strict=True)
    ]


def _aggregate(task: Any, metric: str, values: list[Any], output: Path) -> object:
    aggregate = task.aggregation()[metric]
    settings = {}
    if "args" in inspect.signature(aggregate).parameters:
        output.mkdir(parents=True, exist_ok=True)
        settings["args"] = SimpleNamespace(output_path=str(output))
    try:
        whole = aggregate(values, **settings)
    except Exception as error:
        raise UserError(
            f"task {PREFIX}{task.config.task}: its aggregation of {metric} fails "
            f"({type(error).__name__}: {error})"
        ) from error
    return float(whole) if isinstance(whole, int | float | np.number) else whole


def _summands(values: Mapping[str, Any], whole: object, score_key: str) -> dict[str, float] | None:
    """Each sample's part where the whole is their mean, in hundredths or not; else None."""
    numbers: dict[str, Any] = {
        name: value.get(score_key) if isinstance(value, Mapping) else value
        for name, value in values.items()
    }
    if not isinstance(whole, float) or not all(
        isinstance(number, bool | int | float | np.number) and math.isfinite(float(number))
        for number in numbers.values()
    ):
        return None
    mean = math.fsum(map(float, numbers.values())) / len(numbers)
    for scale in (1.0, 100.0):
        if abs(whole - scale * mean) <= _SAME * max(1.0, abs(whole)):
            return {name: scale * float(number) for name, number in numbers.items()}
    return None
