"""What a benchmark is made of before any model has answered: images to caption, questions.

Images stay undecoded until an engine opens them, so that a whole benchmark fits in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import NamedTuple

from PIL import Image


@dataclass(frozen=True)
class RowImages:
    """The pictures of one row of a data set, which decodes them when asked.

    Attributes:
        name: what tells them from those of all other rows, for messages.
        load: gives them, none where the row has none.
    """

    name: str
    load: Callable[[], Sequence[Image.Image]]


ImageSource = Path | bytes | str | RowImages
"""A file (relative to the data root), its encoded bytes, base64 text, or a data set's row."""

MULTIPLE_CHOICE = "multiple-choice"
OPEN = "open"


class Objects(NamedTuple):
    """The categories of objects that a picture shows, and all that its benchmark knows."""

    shown: tuple[str, ...]
    known: tuple[str, ...]


@dataclass(frozen=True)
class CaptionSample:
    """An image to caption.

    Attributes:
        id: the benchmark's name of the image, unique in a task.
        image: where the picture is.
        prompt: the text of the user's turn.
        references: one human caption or more.
        groups: parts of the benchmark that it counts for besides the whole (NoCaps domains).
        objects: what the picture shows, where the benchmark says it (CHAIR).
    """

    id: str
    image: ImageSource
    prompt: str
    references: tuple[str, ...]
    groups: tuple[str, ...] = ()
    objects: Objects | None = None

    @property
    def cluster(self) -> str:
        """What the bootstrap draws as a whole: the image."""
        return self.id


@dataclass(frozen=True)
class ChoiceSample:
    """A question with options, or an open one.

    Attributes:
        id: unique in a task.
        cluster: what the bootstrap draws as a whole; circular shifts of one question share it.
        images: the pictures in the order in which the prompt speaks of them.
        prompt: the text of the user's turn, options included.
        question_type: `MULTIPLE_CHOICE` or `OPEN`.
        options: their texts in the order shown, A first; empty for an open question.
        gold: the right letter; for an open question the answer, or the text of a Python list of
            several accepted ones, as MMMU writes it.
        groups: parts of the benchmark that it counts for besides the whole.
        shift: by how many places the options were rotated; 0 is the benchmark's own order.
        option_words: what a reply says for each option, where that is not its letter (POPE).
    """

    id: str
    cluster: str
    images: tuple[ImageSource, ...]
    prompt: str
    question_type: str
    options: tuple[str, ...]
    gold: str
    groups: tuple[str, ...] = ()
    shift: int = 0
    option_words: tuple[str, ...] = ()

    @property
    def letters(self) -> tuple[str, ...]:
        """The options' letters, from A."""
        return tuple(ascii_uppercase[: len(self.options)])

    @property
    def option_replies(self) -> tuple[str, ...]:
        """With what a reply that means each option starts; empty for an open question."""
        return self.option_words or self.letters
