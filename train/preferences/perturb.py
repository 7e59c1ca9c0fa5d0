"""Rejected captions by rule: one minimal change to a chosen one, in the kinds of SugarCrepe.

The kinds are those of Hsieh et al., SugarCrepe: Fixing Hackable Benchmarks for Vision-Language
Compositionality (NeurIPS 2023): replace, swap or add an object, an attribute or a relation. Theirs
were written by a language model; these follow rules over `words.yaml`, so they cost nothing, are
the same every time, and change one thing. They contradict the caption, not the image, which the
rules do not see: what is added or replaced may happen to be there.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from rapidfuzz.distance import Levenshtein

from cwdpo_bench.errors import UserError, nearest
from cwdpo_bench.train.data import normalized

KINDS = (
    "replace_obj",
    "replace_att",
    "replace_rel",
    "swap_obj",
    "swap_att",
    "add_obj",
    "add_att",
)
NO_RULE, EQUAL = "no rule applies", "equal to chosen"


class Change(NamedTuple):
    """A caption with one change.

    Attributes:
        text: the caption.
        kind: one of `KINDS`.
        edit: `old -> new`, the words that changed.
    """

    text: str
    kind: str
    edit: str


class Perturbed(NamedTuple):
    """One change a caption, None where there is none, and how many have none by reason."""

    changes: list[Change | None]
    dropped: dict[str, int]


def perturb(captions: Sequence[str], shares: Mapping[str, float], *, seed: int = 0) -> Perturbed:
    """Change each caption once, in kinds whose shares come as near the wanted ones as rules allow.

    A caption takes, of the kinds that apply to it, the one that lacks most; captions to which few
    kinds apply go first.

    Args:
        captions: to be changed.
        shares: kind → share; they are scaled to a sum of 1, and kinds that are not named get none.
        seed: of everything drawn.

    Raises:
        UserError: an unknown kind, or shares that are negative or all 0.
    """
    wanted = checked_shares(shares)
    options: list[dict[str, list[Change]]] = []
    for place, caption in enumerate(captions):
        rng = random.Random(f"{seed} {place} {caption}")
        by_kind = {kind: list(_RULES[kind](caption, rng)) for kind in wanted}
        options.append({kind: found for kind, found in by_kind.items() if found})
    changes: list[Change | None] = [None] * len(captions)
    counts: Counter[str] = Counter()
    rng = random.Random(seed)
    order = rng.sample(range(len(captions)), len(captions))
    for place in sorted(order, key=lambda i: len(options[i])):
        if not options[place]:
            continue
        total = counts.total() + 1
        kind = max(options[place], key=lambda k: (wanted[k] * total - counts[k], rng.random()))
        counts[kind] += 1
        changes[place] = rng.choice(options[place][kind])
    dropped = Counter(NO_RULE for change in changes if change is None)
    return Perturbed(changes, dict(dropped))


def checked_shares(shares: Mapping[str, float]) -> dict[str, float]:
    """Those above 0, scaled to a sum of 1.

    Raises:
        UserError: an unknown kind, or shares that are negative or all 0.
    """
    for kind, share in shares.items():
        if kind not in KINDS:
            raise UserError(f"kinds: unknown kind {kind!r}; {nearest(kind, KINDS)}")
        if not share >= 0:
            raise UserError(f"kinds: the share of {kind} is {share}; it must be 0 or more")
    total = sum(shares.values())
    if not 0 < total < float("inf"):
        raise UserError("kinds: no kind has a share above 0")
    return {kind: share / total for kind, share in shares.items() if share}


def edit_size(before: str, after: str) -> int:
    """How many words a change touches: Levenshtein's distance over words, case aside."""
    return Levenshtein.distance(before.lower().split(), after.lower().split())


# --- what stands in a caption --------------------------------------------------------------------


class _Found(NamedTuple):
    """A listed word in a caption: its place, its group, the entry, and whether it is a plural."""

    start: int
    end: int
    group: str
    entry: str
    plural: bool


@cache
def _words() -> dict[str, Any]:
    text = Path(__file__).with_name("words.yaml").read_text(encoding="utf-8")
    words: dict[str, Any] = yaml.safe_load(text)
    return words


def listed_words(section: str) -> Any:
    """A section of `words.yaml`, as it stands there."""
    return _words()[section]


@cache
def _inflect() -> Any:
    import inflect

    return inflect.engine()


@cache
def _forms(section: str) -> tuple[re.Pattern[str], dict[str, tuple[str, str, bool]]]:
    """A pattern for all words of a section, the longest first, and what each form stands for."""
    forms: dict[str, tuple[str, str, bool]] = {}
    for group, entries in _words()[section].items():
        for entry in entries:
            forms[entry] = (group, entry, False)
            if section == "objects":
                forms.setdefault(_plural(entry), (group, entry, True))
    longest = sorted(forms, key=len, reverse=True)
    pattern = re.compile(rf"(?<![\w-])({'|'.join(map(re.escape, longest))})(?![\w-])", re.I)
    return pattern, forms


@cache
def _plural(noun: str) -> str:
    plural: str = _inflect().plural_noun(noun)
    return plural


def _find(caption: str, section: str) -> list[_Found]:
    pattern, forms = _forms(section)
    return [
        _Found(match.start(), match.end(), *forms[match[1].lower()])
        for match in pattern.finditer(caption)
    ]


def _objects(caption: str) -> list[_Found]:
    """Things by name; not those in compounds ("kitchen table") or before "of" ("plate of food")."""
    found = _find(caption, "objects")
    starts, ends = {one.start for one in found}, {one.end for one in found}
    return [
        one
        for one in found
        if one.end + 1 not in starts
        and one.start - 1 not in ends
        and not caption[one.end :].startswith(" of ")
    ]


def _attributes(caption: str) -> list[_Found]:
    """Attributes; not in "full of"."""
    found = _find(caption, "attributes")
    return [one for one in found if not caption[one.end :].startswith(" of ")]


def _relations(caption: str) -> list[_Found]:
    return _find(caption, "relations")


_FINDERS = {"objects": _objects, "attributes": _attributes, "relations": _relations}
_LINKS = frozenset(
    "a an the and or of in on at to with by near from for is are that who while as its".split()  # noqa: SIM905
)
_WORD = re.compile(r"[A-Za-z][A-Za-z'-]*")
_DETERMINER = re.compile(r"(?<![\w-])(a|an|the|his|her|their|its|two|three|some) $", re.I)


def _class_of(group: str) -> str | None:
    classes: dict[str, list[str]] = _words()["swapped_objects"]
    return next((name for name, groups in classes.items() if group in groups), None)


# --- the rules -----------------------------------------------------------------------------------


def _replaced(caption: str, section: str, kind: str, rng: random.Random) -> Iterator[Change]:
    # A replacement that the caption names already would be no contradiction.
    named = {one.entry for one in _find(caption, section)}
    for one in _FINDERS[section](caption):
        others = [entry for entry in _words()[section][one.group] if entry not in named]
        if others:
            entry = rng.choice(others)
            new = _plural(entry) if one.plural else entry
            yield from _changed(caption, [(one, new)], kind)


def _objects_swapped(caption: str) -> Iterator[Change]:
    for one, other in combinations(_objects(caption), 2):
        alike = _class_of(one.group) is not None and _class_of(one.group) == _class_of(other.group)
        # "A cat and a dog" says the same the other way round.
        between = set(_WORD.findall(caption[one.end : other.start].lower()))
        if alike and not between <= {"and", "or", "a", "an", "the"}:
            yield from _swapped(caption, one, other, "swap_obj")


def _attributes_swapped(caption: str) -> Iterator[Change]:
    none_of_its_own = _LINKS.union(_forms("attributes")[1])
    for one, other in combinations(_attributes(caption), 2):
        # Each belongs to a thing of its own; in "red, white and blue" they do not.
        between = _WORD.findall(caption[one.end : other.start].lower())
        if one.group == other.group and not none_of_its_own.issuperset(between):
            yield from _swapped(caption, one, other, "swap_att")


def _swapped(caption: str, one: _Found, other: _Found, kind: str) -> Iterator[Change]:
    if one.entry == other.entry or one.plural != other.plural:
        return
    first, second = caption[one.start : one.end], caption[other.start : other.end]
    yield from _changed(caption, [(one, second.lower()), (other, first.lower())], kind)


def _object_added(caption: str, rng: random.Random) -> Iterator[Change]:
    body = caption.rstrip()
    stop = "." if body.endswith(".") else ""
    body = body.removesuffix(".").rstrip()
    if not body or body[-1] in "!?,;:":
        return
    groups = _words()["objects"]
    named = {one.group for one in _find(caption, "objects")}
    free = [group for group in _words()["added_objects"] if group not in named]
    if not named or not free:
        return
    noun = rng.choice(groups[rng.choice(free)])
    added = f" with {_inflect().a(noun)} nearby"
    yield Change(f"{body}{added}{stop}", "add_obj", f" -> {added.strip()}")


def _attribute_added(caption: str, rng: random.Random) -> Iterator[Change]:
    for one in _objects(caption):
        # Directly after its article, so that it has no attribute yet.
        if _DETERMINER.search(caption[: one.start]) is None:
            continue
        sort = "beings" if _class_of(one.group) == "beings" else "others"
        attribute = rng.choice(_words()["added_attributes"][sort])
        new = f"{attribute} {caption[one.start : one.end].lower()}"
        yield from _changed(caption, [(one, new)], "add_att")


_RULES: dict[str, Callable[[str, random.Random], Iterator[Change]]] = {
    "replace_obj": lambda caption, rng: _replaced(caption, "objects", "replace_obj", rng),
    "replace_att": lambda caption, rng: _replaced(caption, "attributes", "replace_att", rng),
    "replace_rel": lambda caption, rng: _replaced(caption, "relations", "replace_rel", rng),
    "swap_obj": lambda caption, _: _objects_swapped(caption),
    "swap_att": lambda caption, _: _attributes_swapped(caption),
    "add_obj": _object_added,
    "add_att": _attribute_added,
}


def _changed(caption: str, edits: Sequence[tuple[_Found, str]], kind: str) -> Iterator[Change]:
    """The caption with words replaced, their case and the article before them fitted."""
    text, told = caption, []
    for one, new in sorted(edits, key=lambda edit: edit[0].start, reverse=True):
        old = caption[one.start : one.end]
        new = new[0].upper() + new[1:] if old[0].isupper() else new
        text = text[: one.start] + new + text[one.end :]
        text = _with_article(text, one.start, new)
        told.append(f"{old} -> {new}")
    if normalized(text) != normalized(caption):
        yield Change(text, kind, "; ".join(reversed(told)))


def _with_article(text: str, start: int, word: str) -> str:
    """`a` or `an` before `start` as the word there asks for."""
    article = re.search(r"(?<![\w-])(an?) $", text[:start], re.I)
    if article is None:
        return text
    right: str = _inflect().a(word).split(" ")[0]
    right = right.capitalize() if article[1][0].isupper() else right
    return text[: article.start(1)] + right + text[article.end(1) :]
