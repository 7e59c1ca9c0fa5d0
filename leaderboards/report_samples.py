"""What the report's sample browser shows: every system's answer to every sample, as JSON.

Under a budget of bytes the samples on which the systems differ most stay. Where a system has
several seeds, the answers are those of its first run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from cwdpo_bench.evaluate.metrics import LMMS, METRICS
from cwdpo_bench.leaderboards.display import scale
from cwdpo_bench.leaderboards.report_calibration import option_probabilities
from cwdpo_bench.leaderboards.report_pictures import Pictures, Wanted

BUDGET = 9_000_000
"""Bytes of JSON for all samples of a page."""

CAPTION_SCORES = ("CIDEr", "METEOR", "ROUGE-L")
"""The first of them that the samples hold says which caption is better."""

LONGEST = 1500
"""Characters of a reply, prompt or reference; the rest is told by its length."""

CONFIDENT = 0.8
"""A wrong answer at this probability or more is "confidently wrong"."""

_UNSEEN = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Control characters but tab and line feed, and those that turn the direction of writing."""


@dataclass(frozen=True)
class TaskSamples:
    """The samples of one task, the baseline's order.

    Attributes:
        name: of the task.
        kind: "captions"; "choices", which are right or wrong; "replies" of tasks with scores of
            their own.
        metric: by which answers are better or worse; None where nothing tells.
        systems: names, the baseline first.
        rows: one a sample, as the page reads them.
        sizes: of each row as JSON, in bytes.
        interest: how far the systems' answers are apart, by row.
        prompts: that the rows refer to.
    """

    name: str
    kind: str
    metric: str | None
    systems: tuple[str, ...]
    rows: list[dict[str, Any]]
    sizes: list[int]
    interest: list[float]
    prompts: list[str]


def task_samples(task: str, systems: Mapping[str, pd.DataFrame], baseline: str) -> TaskSamples:
    """The samples of a task as the page shows them.

    Args:
        task: its name.
        systems: name → samples of its (first) run; all hold the same ids.
        baseline: the system that leads where it did the task.
    """
    names = tuple(sorted(systems, key=lambda name: name != baseline))
    first = systems[names[0]]
    kind, metric = _kind(systems.values())
    tables = {name: systems[name].set_index("id").loc[first["id"]].reset_index() for name in names}
    answers = [_ANSWERS[kind](table, metric) for table in tables.values()]
    prompts: dict[str, int] = {}
    rows = []
    for place, record in enumerate(first.to_dict("records")):
        prompt = _text(record.get("prompt", ""))
        row: dict[str, Any] = {
            "id": _text(record["id"]),
            "q": prompts.setdefault(prompt, len(prompts)),
            "a": [own[place] for own in answers],
        }
        if len(record["groups"]):
            row["g"] = [_text(group) for group in record["groups"]]
        if record.get("shift"):
            row["s"] = int(record["shift"])
        if kind == "captions":
            row["r"] = [_text(reference) for reference in record["references"]]
        else:
            row["o"] = [_text(option) for option in record.get("options", ())]
            row["t"] = _text(record.get("gold", ""))
        rows.append(row)
    return TaskSamples(
        name=task,
        kind=kind,
        metric=metric,
        systems=names,
        rows=rows,
        sizes=[len(dumps(row).encode()) for row in rows],
        interest=_interest(rows),
        prompts=list(prompts),
    )


def dumps(value: Any) -> str:
    """JSON without spaces that is safe inside a `<script>` of the page.

    No `<` is left, so that no text can end the element or begin a comment in it.
    """
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def choose(
    tasks: Sequence[TaskSamples], budget: int = BUDGET
) -> tuple[dict[str, list[int]], list[Wanted]]:
    """Which rows fit the page, and all of those in the order in which their pictures matter.

    Tasks are treated alike: each gives its most telling rows first.

    Returns:
        Task → places of the rows that stay, in their order; and these samples, the most telling
        first.
    """
    ranked = []
    for number, task in enumerate(tasks):
        order = sorted(range(len(task.rows)), key=lambda place: (-task.interest[place], place))
        ranked += [(rank / len(order), number, place) for rank, place in enumerate(order)]
    kept: dict[str, list[int]] = {task.name: [] for task in tasks}
    wanted, used = [], 0
    for _, number, place in sorted(ranked):
        task = tasks[number]
        used += task.sizes[place] + 16
        if used > budget:
            break
        kept[task.name].append(place)
        wanted.append(Wanted(task.name, task.rows[place]["id"]))
    return {name: sorted(places) for name, places in kept.items()}, wanted


def task_json(task: TaskSamples, places: Sequence[int], pictures: Pictures) -> str:
    """A task's samples as the page reads them."""
    rows = []
    for place in places:
        row = dict(task.rows[place])
        if own := pictures.of.get(Wanted(task.name, row["id"])):
            row["p"] = own
        rows.append(row)
    content = {
        "task": task.name,
        "kind": task.kind,
        "metric": task.metric,
        "scale": 1 if task.metric is None else scale(task.metric),
        "sign": -1 if task.metric is not None and not METRICS[task.metric].higher_is_better else 1,
        "systems": list(task.systems),
        "prompts": task.prompts,
        "confident": CONFIDENT,
        "total": len(task.rows),
        "rows": rows,
    }
    return dumps(content)


def _kind(tables: Iterable[pd.DataFrame]) -> tuple[str, str | None]:
    """What the answers are, and the column by which they are better or worse."""
    shared = set.intersection(*(set(map(str, table.columns)) for table in tables))
    if "references" in shared:
        return "captions", next((name for name in CAPTION_SCORES if name in shared), None)
    if {"correct", "parsed"} <= shared:
        return "choices", "accuracy"
    return "replies", min((name for name in shared if name.startswith(LMMS)), default=None)


def _scored(samples: pd.DataFrame, metric: str | None) -> list[list[Any]]:
    """Text and score of each answer; None where it has none."""
    scores = [None] * len(samples) if metric is None else samples[metric].tolist()
    return [
        [_text(answer), None if score is None or score != score else round(float(score), 4)]
        for answer, score in zip(samples["prediction"], scores, strict=True)
    ]


def _captions(samples: pd.DataFrame, metric: str | None) -> list[list[Any]]:
    """Text and score; where objects were looked for, also those named that are not there."""
    answers = _scored(samples, metric)
    if "hallucinated_objects" not in samples:
        return answers
    invented = samples["hallucinated_objects"]
    return [
        answer if names is None else [*answer, None, [_text(name) for name in names]]
        for answer, names in zip(answers, invented, strict=True)
    ]


def _choices(samples: pd.DataFrame, metric: str | None) -> list[list[Any]]:
    """Reply, whether it is right, the options' probabilities, and what was read from it."""
    return [
        [
            _text(reply),
            int(correct),
            odds,
            None if parsed is None or parsed != parsed else _text(parsed),
        ]
        for reply, parsed, correct, odds in zip(
            samples["prediction"],
            samples["parsed"],
            samples["correct"],
            _odds_of(samples),
            strict=True,
        )
    ]


def _replies(samples: pd.DataFrame, metric: str | None) -> list[list[Any]]:
    """Reply, score, and the options' probabilities."""
    return [
        [*answer, odds]
        for answer, odds in zip(_scored(samples, metric), _odds_of(samples), strict=True)
    ]


_ANSWERS = {"captions": _captions, "choices": _choices, "replies": _replies}


def _odds_of(samples: pd.DataFrame) -> list[list[float] | None]:
    if "option_log_probabilities" not in samples:
        return [None] * len(samples)
    rows = option_probabilities(samples)
    return [None if odds is None else [round(p, 4) for p in odds] for odds in rows]


def _interest(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """How far a sample's answers are apart: in score and in the odds of the right option."""
    spread = []
    for row in rows:
        odds = [_odds(a[2] if len(a) > 2 else None, row.get("t", "")) for a in row["a"]]
        scores = [(a[1] or 0.0) + p for a, p in zip(row["a"], odds, strict=True)]
        spread.append(float(max(scores) - min(scores)))
    return spread


def _odds(probabilities: Sequence[float] | None, gold: str) -> float:
    place = ord(gold) - ord("A") if len(gold) == 1 else -1
    if probabilities is None or not 0 <= place < len(probabilities):
        return 0.0
    return probabilities[place]


def _text(value: object) -> str:
    """Text of bounded length whose control and direction characters are spelt out."""
    words = str(value)
    if len(words) > LONGEST:
        words = f"{words[:LONGEST]}… ({len(words) - LONGEST:,} more characters)"
    return _UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", words)
