"""A preference row as a checked pair: a prompt with its chosen and its rejected answer.

Fields (TRL's conventions): `images` (or `image`), `prompt`, `chosen`, `rejected`; optional `id`,
`references` (all texts that count as right, for rewards; else `chosen`), `corrected` (the rejected
answer mended) and `rejected_images` (image contrast), and for the probe `paraphrase` (of the chosen
answer) and `other_meaning` (in its form); plain strings or lists of messages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cwdpo_bench.train.layouts import IMAGE_TOKEN
from cwdpo_bench.train.row_images import ImageSource, RowImages, open_source
from cwdpo_bench.train.sources import BadRow
from cwdpo_bench.vlm import Prompt

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt with its chosen and its rejected answer; images are opened when needed.

    Attributes:
        id: unique in its file.
        where: file and line, for messages.
        images: what the chosen answer describes.
        prompt: the user's turn.
        chosen: the better answer.
        rejected: the worse one, where there is one.
        references: what a reward compares an answer with, one text or more.
        corrected: the worse one with its faults mended, where the row brings it.
        rejected_images: what the rejected answer is judged under, where it is not `images`.
    """

    id: str
    where: str
    images: tuple[ImageSource, ...]
    prompt: str
    chosen: str
    rejected: str | None
    references: tuple[str, ...]
    corrected: str | None = None
    rejected_images: tuple[ImageSource, ...] | None = None
    paraphrase: str | None = None
    other_meaning: str | None = None

    def open(self) -> Prompt:
        """The prompt with its images decoded.

        Raises:
            UserError: an image is missing or broken; the row is named.
        """
        return Prompt(self.prompt, tuple(open_source(source, self.where) for source in self.images))


def pair_of(row: Row, where: str, images: RowImages | None, need_rejected: bool) -> Pair:
    """A row with our fields as a checked pair.

    Args:
        row: as `layouts.as_pair_row` gives it.
        where: its place, for messages; its last word is the id of a row without one.
        images: what checks them; None where they are not wanted.
        need_rejected: whether a row without a rejected answer is bad.

    Raises:
        BadRow: names the field.
    """
    prompt, places = _prompt(row)
    chosen = _text(row, "chosen")
    own, contrast = _images_of(row, where, images)
    if images is not None and places not in (0, len(own)):
        raise BadRow(
            "image count",
            f"field prompt: holds {places} {IMAGE_TOKEN} and the row {len(own)} images; write one "
            "for each, or none",
        )
    rejected = None
    if need_rejected or row.get("rejected") is not None:
        rejected = _text(row, "rejected")
        if contrast is None and normalized(chosen) == normalized(rejected):
            raise BadRow("equal answers", "fields chosen and rejected: the same answer")
    corrected = _optional_text(row, "corrected")
    if corrected is not None and rejected is None:
        raise BadRow("no rejected", "field corrected: needs the rejected answer it corrects")
    return Pair(
        id=_identity(row, where),
        where=where,
        images=own,
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        references=_references(row) or (chosen,),
        corrected=corrected,
        rejected_images=contrast,
        paraphrase=_optional_text(row, "paraphrase"),
        other_meaning=_optional_text(row, "other_meaning"),
    )


def normalized(text: str) -> str:
    """The text without what makes no other answer: case, spacing, the full stop at the end."""
    return " ".join(text.lower().split()).rstrip(".")


def _identity(row: Row, where: str) -> str:
    identity = row.get("id")
    if identity is None:
        return where.rsplit(" ", 1)[-1]
    if isinstance(identity, bool) or not isinstance(identity, str | int):
        raise BadRow("bad id", "field id: not a string")
    return _checked(str(identity), "id")


def _images_of(
    row: Row, where: str, images: RowImages | None
) -> tuple[tuple[ImageSource, ...], tuple[ImageSource, ...] | None]:
    """Those of the prompt, and those of the rejected answer where it has its own."""
    if images is None:
        return (), None
    own = tuple(images.of(row.get("images", row.get("image")), "images", where))
    if row.get("rejected_images") is None:
        return own, None
    contrast = tuple(images.of(row["rejected_images"], "rejected_images", where))
    if contrast == own:
        raise BadRow("equal images", "fields images and rejected_images: the same images")
    return own, contrast


def _prompt(row: Row) -> tuple[str, int]:
    """The user's turn without the places of its images, which go before it, and how many those are.

    A place is `<image>` in a text, or a part of the type `image` in a message.
    """
    text = _text(row, "prompt", role="user")
    places = text.count(IMAGE_TOKEN)
    if isinstance(row["prompt"], list) and isinstance(parts := row["prompt"][0]["content"], list):
        places += sum(isinstance(part, dict) and part.get("type") == "image" for part in parts)
    if IMAGE_TOKEN in text:
        text = text.replace(IMAGE_TOKEN, "").strip()
        if not text:
            raise BadRow("empty prompt", f"field prompt: nothing but {IMAGE_TOKEN}")
    return text, places


def _references(row: Row) -> tuple[str, ...]:
    value = row.get("references")
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise BadRow("bad references", "field references: not a list of texts")
    if not value or not all(text.strip() for text in value):
        raise BadRow("empty references", "field references: empty, or holds an empty text")
    return tuple(_checked(text, "references") for text in value)


def _optional_text(row: Row, field: str) -> str | None:
    return None if row.get(field) is None else _text(row, field)


def _text(row: Row, field: str, role: str = "assistant") -> str:
    value = row.get(field)
    if value is None:
        raise BadRow(f"no {field}", f"field {field}: missing")
    if isinstance(value, list):
        value = _last_message(value, field, role)
    if not isinstance(value, str):
        raise BadRow(f"bad {field}", f"field {field}: neither text nor a list of messages")
    return _checked(value, field)


def _checked(text: str, field: str) -> str:
    """The text, where it is one that a tokenizer takes and that says something."""
    if not text or text.isspace():
        raise BadRow(f"empty {field}", f"field {field}: empty")
    if text.isascii():
        unusable = "\0" in text
    else:
        unusable = "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text)
    if unusable:
        raise BadRow(
            f"bad {field}", f"field {field}: holds a NUL or half a character (a lone surrogate)"
        )
    return text


def _last_message(messages: list[Any], field: str, role: str) -> Any:
    """The text of a one-message conversation, TRL's conversational form."""
    if len(messages) != 1 or not isinstance(messages[0], dict) or messages[0].get("role") != role:
        raise BadRow(f"bad {field}", f"field {field}: not one message of the role {role!r}")
    content = messages[0].get("content")
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        if not all(isinstance(text, str | None) for text in parts):
            raise BadRow(f"bad {field}", f"field {field}: a part's text is no text")
        return "\n".join(text for text in parts if text)
    return content
