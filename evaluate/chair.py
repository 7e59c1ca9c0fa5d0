"""CHAIR: which objects a caption names, and which of them the picture does not show.

Rohrbach et al., "Object Hallucination in Image Captioning" (EMNLP 2018). An object of a picture is
one that an instance annotation marks or that one of its reference captions names. The words that
name COCO's 80 categories are the authors' (`chair_synonyms.txt`); a category that is not among them
is named by its own name alone.

Layout: COCO's `coco/annotations/instances_{train,val}2014.json`.

The authors bring nouns to the singular with a word list of `pattern`; here a word names an object
where it is one of the names or a regular or known plural of one, which needs no word list.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from cwdpo_bench.errors import UserError
from cwdpo_bench.evaluate.samples import CaptionSample, Objects
from cwdpo_bench.files import read_json

ANNOTATIONS = (
    Path("coco/annotations/instances_val2014.json"),
    Path("coco/annotations/instances_train2014.json"),
)
SYNONYMS = Path(__file__).parent / "chair_synonyms.txt"

Vocabulary = Mapping[str, str]
"""Word, or two words, in the singular or plural → the category that it names."""

_WORD_OR_MARK = re.compile(r"[^\W_]+(?:-[^\W_]+)*|[^\w\s]")
"""Marks are words too: those around a comma are no compound."""

_ANIMALS = (
    *("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe"),
    *("animal", "cub"),
)
"""A baby or an adult of these is no person."""
_CARRIERS = ("jet", "train")
"""A passenger jet is no passenger."""
_COMPOUNDS = {"bow tie": "tie", "toilet seat": "toilet", "train track": ""}
"""What these name; a track is no train (lmms-eval's addition)."""
_IRREGULAR = {
    "person": ("people", "persons"),
    "child": ("children",),
    "grandchild": ("grandchildren",),
    "ox": ("oxen",),
    "goose": ("geese",),
    "mouse": ("mice",),
    "knife": ("knives",),
    "pocketknife": ("pocketknives",),
    "calf": ("calves",),
}


class Named(NamedTuple):
    """The objects that a caption names, in its order: words as they stand in it, categories."""

    words: list[str]
    categories: list[str]


class Instances(NamedTuple):
    """What COCO's instance annotations say of every image."""

    categories: dict[str, tuple[str, ...]]
    """Image id → the categories of its instances, each once."""
    names: tuple[str, ...]
    """All categories of the file."""


@cache
def _synonyms() -> dict[str, tuple[str, ...]]:
    """Category → the words that name it, of COCO's 80."""
    lines = SYNONYMS.read_text(encoding="utf-8").splitlines()
    groups = [line.split(", ") for line in lines if line and not line.startswith("#")]
    return {words[0]: tuple(word.lower() for word in words) for words in groups}


@cache
def vocabulary_of(names: tuple[str, ...]) -> Vocabulary:
    """Every word and compound that names one of the categories, plurals included."""
    known = _synonyms()
    category_of = {word: name for name in names for word in known.get(name, (name.lower(),))}
    found = dict(category_of)
    for animal in _ANIMALS:
        for young in ("baby", "adult"):
            found[f"{young} {animal}"] = category_of.get(animal, "")
    for carrier in _CARRIERS:
        found[f"passenger {carrier}"] = category_of.get(carrier, "")
    for compound, word in _COMPOUNDS.items():
        found[compound] = category_of.get(word, "")
    for word, name in list(found.items()):
        for plural in _plurals(word):
            found.setdefault(plural, name)
    return found


def _plurals(word: str) -> tuple[str, ...]:
    start, _, last = word.rpartition(" ")
    lead = f"{start} " if start else ""
    if last in _IRREGULAR:
        return tuple(lead + plural for plural in _IRREGULAR[last])
    if last.endswith("man"):
        return (f"{lead}{last[:-3]}men",)
    if re.search(r"(?:s|x|z|ch|sh)$", last):
        return (f"{lead}{last}es",)
    if re.search(r"[^aeiou]y$", last):
        return (f"{lead}{last[:-1]}ies",)
    return (f"{lead}{last}s", f"{lead}{last}es") if last.endswith("o") else (f"{lead}{last}s",)


def objects_named(caption: str, vocabulary: Vocabulary) -> Named:
    """The objects that a caption names, each as often as it does.

    Two words that together name something are one ("hot dog" is no dog). Where a toilet is named, a
    seat is no chair.
    """
    words = _WORD_OR_MARK.findall(caption.lower())
    found = Named([], [])
    place = 0
    while place < len(words):
        compound = " ".join(words[place : place + 2])
        length = 2 if " " in compound and compound in vocabulary else 1
        word = compound if length == 2 else words[place]
        # "" stands for a compound that names nothing ("baby animal").
        if vocabulary.get(word):
            found.words.append(word)
            found.categories.append(vocabulary[word])
        place += length
    if any(word.startswith("toilet") for word in found.words):
        kept = [k for k, word in enumerate(found.words) if word not in ("seat", "seats")]
        return Named([found.words[k] for k in kept], [found.categories[k] for k in kept])
    return found


def read_instances(root: Path) -> Instances | None:
    """The instance annotations under a data root, or None where there are none.

    Raises:
        UserError: a file is not in COCO's form.
    """
    files = [root / path for path in ANNOTATIONS if (root / path).is_file()]
    if not files:
        return None
    categories: dict[str, tuple[str, ...]] = {}
    names: dict[str, None] = {}
    for path in files:
        content = read_json(path)
        name_of = {item["id"]: item["name"] for item in _objects(content, "categories", path)}
        names |= dict.fromkeys(name_of.values())
        shown: dict[str, dict[str, None]] = {
            str(image["id"]): {} for image in _objects(content, "images", path)
        }
        for index, mark in enumerate(_objects(content, "annotations", path)):
            image, category = str(mark.get("image_id")), mark.get("category_id")
            if image not in shown or category not in name_of:
                raise UserError(
                    f"{path}: annotations[{index}]: image_id {mark.get('image_id')!r} or "
                    f"category_id {category!r} is not in the file; fetch it again"
                )
            shown[image][name_of[category]] = None
        categories |= {image: tuple(found) for image, found in shown.items()}
    return Instances(categories, tuple(names))


def _objects(content: Any, key: str, path: Path) -> Sequence[dict[str, Any]]:
    items = content.get(key) if isinstance(content, dict) else None
    needs = {"categories": ("id", "name"), "images": ("id",), "annotations": ()}[key]
    if not isinstance(items, list) or not all(
        isinstance(item, dict) and all(field in item for field in needs) for item in items
    ):
        fields = f" with {' and '.join(map(repr, needs))}" if needs else ""
        raise UserError(f"{path}: needs an object with a list {key!r} of objects{fields}")
    return items


def objects_shown(
    image: str, references: Sequence[str], instances: Instances | None
) -> Objects | None:
    """The categories of the image's instances and of its references' words, sorted.

    None where there are no annotations, or they do not hold the image.
    """
    if instances is None or image not in instances.categories:
        return None
    vocabulary = vocabulary_of(instances.names)
    said = {c for text in references for c in objects_named(text, vocabulary).categories}
    return Objects(tuple(sorted(said | set(instances.categories[image]))), instances.names)


def chair_columns(
    samples: Sequence[CaptionSample], predictions: Mapping[str, str]
) -> dict[str, list[list[str] | None]]:
    """Columns of `samples/TASK.parquet`, in the order of the samples; null without `objects`.

    Returns:
        `objects`, what the picture shows; `named_objects`, the mentions in the prediction;
        `hallucinated_objects`, the mentions of what it does not show (both count repetitions);
        `found_objects`, the categories of `objects` that the prediction names. Empty where no
        sample says what its picture shows.
    """
    if all(sample.objects is None for sample in samples):
        return {}
    columns: dict[str, list[list[str] | None]] = {
        name: [] for name in ("objects", "named_objects", "hallucinated_objects", "found_objects")
    }
    for sample in samples:
        values: tuple[list[str] | None, ...] = (None, None, None, None)
        if sample.objects is not None:
            shown, known = sample.objects
            named = objects_named(predictions[sample.id], vocabulary_of(known))
            wrong = [w for w, c in zip(*named, strict=True) if c not in shown]
            right = sorted(set(named.categories) & set(shown))
            values = (list(shown), named.words, wrong, right)
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)
    return columns


def unjudged_warnings(samples: Sequence[CaptionSample]) -> list[str]:
    """A line that says how many captions CHAIR leaves out, where it judges the others."""
    unknown = [sample.id for sample in samples if sample.objects is None]
    if not unknown or len(unknown) == len(samples):
        return []
    return [
        f"CHAIR leaves out {len(unknown)} of {len(samples)} images, which are not in "
        f"{' or '.join(path.name for path in ANNOTATIONS)} (first: {unknown[0]})"
    ]
