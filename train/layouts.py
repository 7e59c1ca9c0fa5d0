"""Rows of public preference sets as rows of ours, told apart by their fields.

Layouts: RLHF-V (`text` holds question, chosen and rejected as JSON), RLAIF-V and MMPR (`question`),
POVID (LLaVA's `conversations` and `rejected_conversations`), VLFeedback (rated `completions`: the
best rated over the worst), mDPO (`img_path`) and SugarCrepe (`caption`, `negative_caption`). A row
of ours, TRL's, goes through as it is, but for a prompt that stands in the answers (TRL's implicit
prompt), which is taken out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from cwdpo_bench.errors import UserError, nearest
from cwdpo_bench.evaluate.coco import caption_prompt

Row = dict[str, Any]

IMAGE_TOKEN = "<image>"
AUTO = "auto"


class UnknownLayout(ValueError):
    """A row that has the fields of a known layout, and not in the form that it has there."""


def as_pair_row(row: Row, layout: str = AUTO) -> tuple[str, Row]:
    """The layout's name, and the row with our fields in the place of its own.

    Args:
        row: as it stands.
        layout: one of `LAYOUTS`, or `auto`: told by the row's fields.

    Raises:
        UnknownLayout: fields of a layout in another form; the text says which.
    """
    keys = row.keys()
    if layout == AUTO:
        layout = _told(tuple(row))
    elif missing := LAYOUTS[layout].needs - keys:
        raise UnknownLayout(
            f"field {min(missing)}: missing; a row of {layout} has "
            f"{', '.join(sorted(LAYOUTS[layout].needs))}"
        )
    if "img_path" in keys and not {"image", "images"} & keys:
        row = _renamed(row, img_path="image")
    return layout, LAYOUTS[layout].convert(row)


@lru_cache(maxsize=1024)
def _told(fields: tuple[str, ...]) -> str:
    """The first layout that a row with these fields fits; a source's rows have the same ones."""
    return next(name for name, known in LAYOUTS.items() if known.fits(set(fields)))


def checked_layout(name: str, option: str) -> str:
    """The name, where it is one of a layout or `auto`.

    Raises:
        UserError: it is not; the nearest is named.
    """
    if name not in (known := [AUTO, *LAYOUTS]):
        raise UserError(f"{option}: unknown layout {name!r}; {nearest(name, known)}")
    return name


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
    if not isinstance(question, str) or not isinstance(answer, str):
        raise UnknownLayout(f"field {field}: a turn is no text")
    return question, answer


def _from_ratings(row: Row) -> Row:
    completions = row["completions"]
    try:
        if isinstance(completions, Mapping):
            # As `datasets` gives a list of structures: a structure of lists.
            completions = _rows(completions)
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


def _from_captions(row: Row) -> Row:
    own = _renamed(row, caption="chosen", negative_caption="rejected", filename="image")
    return {"prompt": caption_prompt(), **own}


def _from_questions(row: Row) -> Row:
    return _renamed(row, question="prompt", idx="id")


def _from_trl(row: Row) -> Row:
    """TRL's implicit prompt: both answers begin with the user's turn."""
    if "prompt" in row:
        return row
    both = [row.get(name) for name in ("chosen", "rejected")]
    turns = [turn for turn in both if isinstance(turn, list) and len(turn) == 2]
    if len(turns) != 2:
        return row
    (asked, chosen), (other, rejected) = turns
    if asked != other:
        raise UnknownLayout("fields chosen and rejected: begin with another user's turn")
    return {**row, "prompt": [asked], "chosen": [chosen], "rejected": [rejected]}


class _Layout(NamedTuple):
    """What a row must have, how it becomes one of ours, and what else tells it from others."""

    needs: frozenset[str]
    convert: Callable[[Row], Row]
    among: frozenset[str] = frozenset()
    without: frozenset[str] = frozenset()

    def fits(self, keys: Any) -> bool:
        among = not self.among or bool(self.among & keys)
        return self.needs <= keys and among and not self.without & keys


def _fields(names: str) -> frozenset[str]:
    return frozenset(names.split())


LAYOUTS: dict[str, _Layout] = {
    "sugarcrepe": _Layout(_fields("caption negative_caption"), _from_captions),
    "povid": _Layout(_fields("conversations rejected_conversations"), _from_conversations),
    "vlfeedback": _Layout(_fields("prompt completions"), _from_ratings),
    "rlhf-v": _Layout(_fields("text"), _from_text, without=_fields("chosen")),
    "rlaif-v": _Layout(
        _fields("question chosen"),
        _from_questions,
        among=_fields("idx ds_name origin_dataset"),
        without=_fields("prompt"),
    ),
    "mmpr": _Layout(_fields("question"), _from_questions, without=_fields("prompt")),
    "mdpo": _Layout(
        _fields("img_path prompt chosen"), lambda row: row, without=_fields("image images")
    ),
    "trl": _Layout(frozenset(), _from_trl),
}
"""By name, in the order in which a row is held against them."""
