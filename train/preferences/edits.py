"""Is a rewritten caption the old one with exactly one minimal change of a kind? One stated rule.

The words of both are compared without case, punctuation, number, tense and a pronoun's person,
forms of "be" left out and "an" as "a", so that what only fits a word to its new neighbour is no
change. What both begin with and what both end with is taken off; what is left of the old caption
and of the new one is the change, and it has to be, by kind:

- `replace_*`: words on both sides, few, none in common, of one kind (else it were two changes);
- `swap_*`: `x … y` on one side and `y … x` on the other, with more than "and" between them;
- `add_*`: nothing on the old side, few words on the new one.

Refused too are changes that leave the caption true (synonyms and broader words of `words.yaml`, and
additions without a word of content) or that negate it, and such whose words the lists know as
another kind's. Words that the lists do not know are believed: there is no tagger here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from cwdpo_bench.train.data import normalized
from cwdpo_bench.train.preferences.perturb import KINDS, listed_words

EMPTY, EQUAL = "empty", "equal to chosen"
FORMS = "only word forms differ"
MORE = "more than one change"
LARGE = "too large a change"
NOT_ADDED, NOT_SWAPPED, NOT_REPLACED = "nothing added alone", "nothing swapped", "nothing replaced"
OTHER_KIND, SAME, NEGATED = "another kind", "says the same", "negated"

SCHEMA = 1
"""Of the rule; raised when it changes, so that what was judged by another one is judged again."""
LARGEST = {
    "replace_obj": 4,
    "replace_att": 4,
    "replace_rel": 5,
    "swap_obj": 4,
    "swap_att": 3,
    "add_obj": 8,
    "add_att": 4,
}
"""Words that a change may have on each side, by kind; of a swap, each of the two parts. What is
replaced is at most half of the caption."""

_WORD = re.compile(r"[a-z0-9]+(?:['’-][a-z0-9]+)*")
_BE = frozenset("is are was were be been being am".split())  # noqa: SIM905
_ARTICLES = frozenset("a an the this that these those his her its their some".split())  # noqa: SIM905
_LINKS = frozenset(
    "and or of in on at to with by near from for as while who which it there into onto off up down "  # noqa: SIM905
    "out over under above below behind beside between through across along around inside outside "
    "against next top front very really quite just also".split()
)
_FRAMES = frozenset("picture photo photograph image view scene shot close-up".split())  # noqa: SIM905
_NEGATIONS = frozenset("no not never none nobody nothing neither nor cannot".split())  # noqa: SIM905
_IRREGULAR = {
    "men": "man",
    "women": "woman",
    "children": "child",
    "people": "person",
    "mice": "mouse",
    "feet": "foot",
    "teeth": "tooth",
    "geese": "goose",
    "knives": "knife",
    "leaves": "leaf",
    "shelves": "shelf",
    "has": "have",
    "had": "have",
    "lying": "lie",
    "lies": "lie",
    "an": "a",
    **dict.fromkeys(("her", "hers", "their", "theirs", "its", "it's"), "his"),
    **dict.fromkeys(("she", "they", "it"), "he"),
    **dict.fromkeys(("herself", "themselves", "itself"), "himself"),
}


class Change(NamedTuple):
    """What differs between two captions.

    Attributes:
        old: words of the one, in order.
        new: words of the other.
        of: how many words the one has.
    """

    old: tuple[str, ...]
    new: tuple[str, ...]
    of: int

    def told(self) -> str:
        """`old -> new`."""
        return f"{' '.join(self.old)} -> {' '.join(self.new)}"


def change_between(caption: str, text: str) -> Change:
    """What is left of both when what they begin and end with alike is taken off."""
    old, new = _words(caption), _words(text)
    old_stems, new_stems = [_stem(word) for word in old], [_stem(word) for word in new]
    shorter = min(len(old), len(new))
    head = next((i for i in range(shorter) if old_stems[i] != new_stems[i]), shorter)
    rest = shorter - head
    tail = next((i for i in range(rest) if old_stems[-1 - i] != new_stems[-1 - i]), rest)
    return Change(tuple(old[head : len(old) - tail]), tuple(new[head : len(new) - tail]), len(old))


def refusal(caption: str, text: str, kind: str) -> str | None:
    """Why `text` is not `caption` with one minimal change of `kind`; None where it is.

    Args:
        caption: the chosen one.
        text: the rewritten one.
        kind: one of `perturb.KINDS`.
    """
    if not text.strip():
        return EMPTY
    if normalized(text) == normalized(caption):
        return EQUAL
    change = change_between(caption, text)
    if not change.old and not change.new:
        return FORMS
    if _NEGATIONS & set(change.new) - set(change.old) or any("n't" in w for w in change.new):
        return NEGATED
    return _CHECKS[kind.partition("_")[0]](change, kind)


def _refused_addition(change: Change, kind: str) -> str | None:
    old, new, _ = change
    if old:
        return NOT_ADDED
    if len(new) > LARGEST[kind]:
        return LARGE
    content = [word for word in new if word not in _ARTICLES | _LINKS | _FRAMES]
    if not content:
        return SAME
    if kind == "add_obj":
        # A thing comes with an article, a number or a link: "and a dog", "two cups next to".
        alone = len(new) == 1 and _sections(new) != {"objects"}
        attributes = all(_sections([word]) == {"attributes"} for word in content)
        return OTHER_KIND if alone or attributes else None
    return OTHER_KIND if _ARTICLES & set(new) or _sections(content) == {"objects"} else None


def _refused_replacement(change: Change, kind: str) -> str | None:
    old, new, _ = change
    if not old or not new:
        return NOT_REPLACED
    if {_stem(word) for word in old} & {_stem(word) for word in new}:
        return MORE
    if max(len(old), len(new)) > LARGEST[kind] or 2 * len(old) > change.of:
        return LARGE
    if _says_the_same(old, new):
        return SAME
    # The old words tell what is replaced; of the new ones alone the lists know less.
    known = _sections(old) or _sections(new)
    if known and _SECTIONS[kind] not in known:
        return OTHER_KIND
    # "red car" by "blue bus", "dog sits" by "cat sleeps".
    return MORE if len(_sections(old)) > 1 and len(new) > 1 else None


def _refused_swap(change: Change, kind: str) -> str | None:
    old, new, _ = change
    found = _exchanged(old, new)
    if found is None:
        return NOT_SWAPPED
    one, between, other = found
    # What moves over the rest is the shorter part.
    size = max if between else min
    if size(len(one), len(other)) > LARGEST[kind]:
        return LARGE
    # "A cat and a dog" says the same the other way round; a word that moves over a link does not:
    # "a plate on a blue mat", "a blue plate on a mat".
    over = between or max(one, other, key=len)
    if not set(over) - _ARTICLES - {"and", "or"} or not (between or _LINKS & set(over) - {"and"}):
        return SAME
    known = [_sections(side) for side in (one, other) if not set(side) <= _LINKS | _ARTICLES]
    wrong = [found for found in known if found and _SECTIONS[kind] not in found]
    return OTHER_KIND if wrong and len(wrong) == len(known) else None


_CHECKS = {"add": _refused_addition, "replace": _refused_replacement, "swap": _refused_swap}
_SECTIONS = {
    kind: {"obj": "objects", "att": "attributes", "rel": "relations"}[kind.partition("_")[2]]
    for kind in KINDS
}


def _exchanged(
    old: Sequence[str], new: Sequence[str]
) -> tuple[Sequence[str], Sequence[str], Sequence[str]] | None:
    """x, B and y where old is x B y and new is y B x; None where there are none."""
    size = len(old)
    if size != len(new) or size < 2:
        return None
    left, right = [_stem(word) for word in old], [_stem(word) for word in new]
    for first in range(1, size):
        for last in range(1, size - first + 1):
            moved = [*left[size - last :], *left[first : size - last], *left[:first]]
            if moved == right:
                return old[:first], old[first : size - last], old[size - last :]
    return None


def _says_the_same(old: Sequence[str], new: Sequence[str]) -> bool:
    pair = {_phrase(old), _phrase(new)}
    return len(pair) == 1 or any(pair <= group for group in _synonyms())


def _sections(words: Sequence[str]) -> set[str]:
    """The lists that know one of the words, or all of them as a phrase."""
    stems = {_stem(word) for word in words}
    phrase = _phrase(words)
    found = {name for name, known in _known().items() if phrase in known or stems & known}
    if not found and stems <= _LINKS | _ARTICLES:
        return {"relations"}
    return found


def _phrase(words: Sequence[str]) -> str:
    return " ".join(_stem(word) for word in words if word not in _ARTICLES)


@cache
def _known() -> dict[str, frozenset[str]]:
    return {
        section: frozenset(
            _phrase(_words(entry)) for group in listed_words(section).values() for entry in group
        )
        for section in ("objects", "attributes", "relations")
    }


@cache
def _synonyms() -> list[frozenset[str]]:
    return [frozenset(_phrase(_words(w)) for w in group) for group in listed_words("synonyms")]


def _words(text: str) -> list[str]:
    return [word for word in _WORD.findall(text.lower()) if word not in _BE]


@cache
def _stem(word: str) -> str:
    """The word without number and tense, roughly: alike for forms of one word is all it must be."""
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    for ending, instead in (("ies", "y"), ("sses", "ss"), ("ches", "ch"), ("shes", "sh")):
        if word.endswith(ending) and len(word) > 4:
            return word.removesuffix(ending) + instead
    if word.endswith("s") and len(word) > 3 and not word.endswith(("ss", "us", "is")):
        word = word[:-1]
    for ending in ("ing", "ed"):
        body = word.removesuffix(ending)
        if body != word and len(body) > 2 and re.search("[aeiouy]", body):
            doubled = body[-1] == body[-2] and body[-1] not in "lsz"
            word = body[:-1] if doubled else body
            break
    return word.removesuffix("e") if len(word) > 3 else word
