"""Rows from an engine's answers: what `samples/TASK.parquet` holds, without what failed.

A sample that failed gets no row and counts in no score; where a benchmark asks a question in all
its circular orders, the whole question goes with one of them. Its references still count in CIDEr's
document frequencies, so that the others' values do not depend on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from cwdpo_bench.errors import UserError
from cwdpo_bench.evaluate.captions import begin_caption_rows
from cwdpo_bench.evaluate.choices import ParseFailures, choice_rows, failure_warnings
from cwdpo_bench.evaluate.diversity import diversity_columns
from cwdpo_bench.evaluate.engine import CaptionAnswer, ChoiceAnswer
from cwdpo_bench.evaluate.plan import CaptionJob, ChoiceJob


class Scored(NamedTuple):
    """The rows of `samples/TASK.parquet`, and what a reader of the scores must know."""

    rows: pd.DataFrame
    warnings: list[str]


Pending = Callable[[], Scored]
"""Waits for scores that were begun."""


def score_choices(
    job: ChoiceJob,
    replies: Sequence[ChoiceAnswer | None],
    parse_failures: ParseFailures,
    output: Path,
) -> Scored:
    """Judge replies, by the benchmark's rules or by the task's own function.

    Args:
        job: the questions.
        replies: in their order; None for one that failed.
        parse_failures: what becomes of a reply in which nothing is found.
        output: the run folder, for a task that writes a file of its own there.

    Raises:
        UserError: every sample failed.
    """
    pairs = list(zip(job.samples, replies, strict=True))
    lost = {sample.cluster for sample, reply in pairs if reply is None}
    whole = any(sample.shift for sample in job.samples)
    kept = [
        (sample, reply)
        for sample, reply in pairs
        if reply is not None and not (whole and sample.cluster in lost)
    ]
    failed = [sample.id for sample, reply in pairs if reply is None]
    told = _failed_warnings(job.task.name, failed, len(pairs), len(kept))
    samples, answers = [sample for sample, _ in kept], [reply for _, reply in kept]
    if job.task.score is not None:
        rows, warnings = job.task.score(samples, answers, output)
        return Scored(rows, [*told, *warnings])
    assert job.task.rules is not None
    texts = [answer.text for answer in answers]
    logps = [answer.option_log_probabilities for answer in answers]
    empty = sum(not text for text in texts)
    if empty:
        told.append(f"{empty} of {len(texts)} replies are empty")
    offered = sum(bool(sample.options) for sample in samples)
    without = offered - sum(logp is not None for logp in logps)
    if without:
        told.append(
            f"{without} of {offered} questions have no option probabilities, because the engine "
            "gave none: they count in no calibration figure"
        )
    rows = choice_rows(samples, texts, logps, rules=job.task.rules, parse_failures=parse_failures)
    return Scored(rows, [*told, *failure_warnings(rows)])


def begin_captions(job: CaptionJob, replies: Sequence[CaptionAnswer | None]) -> Pending:
    """Begin to score captions within a block of `kept_meteor`; arguments and errors as above."""
    pairs = list(zip(job.samples, replies, strict=True))
    kept = [(sample, reply) for sample, reply in pairs if reply is not None]
    failed = [sample.id for sample, reply in pairs if reply is None]
    told = _failed_warnings(job.task.name, failed, len(pairs), len(kept))
    begun = begin_caption_rows(job.samples, {sample.id: reply.text for sample, reply in kept})
    return partial(_finish_captions, begun, [reply for _, reply in kept], told)


def _finish_captions(
    begun: Callable[[], tuple[pd.DataFrame, list[str]]],
    answers: Sequence[CaptionAnswer],
    told: list[str],
) -> Scored:
    rows, warnings = begun()
    return Scored(_with_diversity(_with_tokens(rows, answers), answers), [*told, *warnings])


def _failed_warnings(task: str, failed: Sequence[str], asked: int, kept: int) -> list[str]:
    """How many samples failed, and the other orders of questions that are left out with them."""
    if not failed:
        return []
    others = asked - len(failed) - kept
    along = f", with {others} other orders of their questions" if others else ""
    what = f"{len(failed)} of {asked} samples failed and are left out{along}"
    if not kept:
        raise UserError(f"{task}: {what}; nothing is left to score")
    return [f"{what} (first: {failed[0]})"]


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
