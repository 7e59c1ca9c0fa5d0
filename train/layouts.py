"""Rows of public preference sets as rows of ours, told apart by their fields.

Layouts: RLHF-V (`text` holds question, chosen and rejected as JSON), RLAIF-V and MMPR (`question`),
POVID (LLaVA's `conversations` and `rejected_conversations`), VLFeedback (rated `completions`: the
best rated over the worst), mDPO (`img_path`) and SugarCrepe (`caption`, `negative_caption`). A row
of ours, TRL's, goes through as it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from cwdpo_bench.evaluate.coco import caption_prompt

Row = dict[str, Any]

_IMAGE_TOKEN = "<image>"


class UnknownLayout(ValueError):
    """A row that has the fields of a known layout, and not in the form that it has there."""


def as_pair_row(row: Row) -> tuple[str, Row]:
    """The layout's name, and the row with our fields in the place of its own.

    Raises:
        UnknownLayout: fields of a layout in another form; the text says which.
    """
    if "img_path" in row and not {"image", "images"} & row.keys():
        row = _renamed(row, img_path="image")
    if {"caption", "negative_caption"} <= row.keys():
        own = _renamed(row, caption="chosen", negative_caption="rejected", filename="image")
        return "sugarcrepe", {"prompt": caption_prompt(), **own}
    if {"conversations", "rejected_conversations"} <= row.keys():
        return "povid", _from_conversations(row)
    if {"prompt", "completions"} <= row.keys():
        return "vlfeedback", _from_ratings(row)
    if "text" in row and "chosen" not in row:
        return "rlhf-v", _from_text(row)
    if "question" in row and "prompt" not in row:
        return "rlaif-v", _renamed(row, question="prompt", idx="id")
    return "trl", row


def _renamed(row: Row, **names: str) -> Row:
    # `id` stays where there is one: the other is then a field like any.
    return {
        (names[key] if key in names and names[key] not in row else key): value
        for key, value in row.items()
    }


def _from_text(row: Row) -> Row:
    text = row["text"]
    try:
        parts = json.loads(text) if isinstance(text, str) else text
        own = {
            "prompt": parts["question"],
            "chosen": parts["chosen"],
            "rejected": parts["rejected"],
        }
    except (ValueError, KeyError, TypeError) as error:
        raise UnknownLayout("field text: not JSON with question, chosen and rejected") from error
    rest = {key: value for key, value in row.items() if key != "text"}
    return _renamed({**rest, **own}, idx="id", question="prompt")


def _from_conversations(row: Row) -> Row:
    question, chosen = _turns(row, "conversations")
    other, rejected = _turns(row, "rejected_conversations")
    if question != other:
        raise UnknownLayout("fields conversations and rejected_conversations: another question")
    rest = {k: v for k, v in row.items() if k not in ("conversations", "rejected_conversations")}
    return {**rest, "prompt": question, "chosen": chosen, "rejected": rejected}


def _turns(row: Row, field: str) -> tuple[str, str]:
    try:
        speakers = [turn["from"] for turn in row[field]]
        question, answer = (turn["value"] for turn in row[field])
    except (KeyError, TypeError, ValueError) as error:
        raise UnknownLayout(f"field {field}: not one question and one answer") from error
    if speakers != ["human", "gpt"]:
        raise UnknownLayout(f"field {field}: the turns are {speakers}, not ['human', 'gpt']")
    return question.replace(_IMAGE_TOKEN, "").strip(), answer


def _from_ratings(row: Row) -> Row:
    completions = row["completions"]
    if isinstance(completions, Mapping):
        # As `datasets` gives a list of structures: a structure of lists.
        completions = _rows(completions)
    try:
        rated = [(_mean_rating(each["annotations"]), each["response"]) for each in completions]
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UnknownLayout("field completions: not responses with rated annotations") from error
    if not rated:
        raise UnknownLayout("field completions: empty")
    best, worst = (choose(rated, key=lambda pair: pair[0]) for choose in (max, min))
    if best[0] == worst[0]:
        raise UnknownLayout("field completions: all are rated alike, so none is preferred")
    rest = {key: value for key, value in row.items() if key != "completions"}
    return {**rest, "chosen": best[1], "rejected": worst[1]}


def _rows(columns: Mapping[str, list[Any]]) -> list[Row]:
    names = list(columns)
    return [dict(zip(names, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _mean_rating(annotations: Mapping[str, Any]) -> float:
    ratings = [float(aspect["Rating"]) for aspect in annotations.values()]
    return sum(ratings) / len(ratings)
