"""Finished answers in their official layouts, checked: COCO's captions, MMMU's output folder.

Every mistake is named by file, record and key, because these files come from other people's code.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from cwdpo_bench.errors import UserError, nearest
from cwdpo_bench.evaluate.answers import DISCIPLINES
from cwdpo_bench.evaluate.nocaps import DOMAINS
from cwdpo_bench.evaluate.samples import MULTIPLE_CHOICE, OPEN, CaptionSample, ChoiceSample
from cwdpo_bench.files import read_json

OTHER = "Other"
"""The discipline of a subject that MMMU does not have."""

# MMMU's output files say "short-answer" for what its data set calls open.
_QUESTION_TYPES = {MULTIPLE_CHOICE: MULTIPLE_CHOICE, OPEN: OPEN, "short-answer": OPEN}

_NAMED = 5
"""So many ids an error names of those that are wrong."""

# --- captions ------------------------------------------------------------------------------------


def read_references(path: Path, *, with_domain: bool) -> list[CaptionSample]:
    """Images with their captions from a file in COCO's annotation form.

    Args:
        path: `{"images": [{"id": …}], "annotations": [{"image_id": …, "caption": …}]}`.
        with_domain: every image carries NoCaps's `domain`, which becomes its group.

    Raises:
        UserError: the file is missing or of another layout, an id is doubled, an image has no
            caption, or a caption is empty or of no image.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: must be an object with 'images' and 'annotations' (COCO's form)")
    captions: dict[str, list[str]] = {}
    groups: dict[str, tuple[str, ...]] = {}
    for where, image in _records(content.get("images"), f"{path}: images"):
        name = _id(image, "id", where)
        if name in captions:
            raise UserError(f"{where}: image id {name} is doubled")
        captions[name] = []
        groups[name] = (_domain(image, where),) if with_domain else ()
    for where, annotation in _records(content.get("annotations"), f"{path}: annotations"):
        name = _id(annotation, "image_id", where)
        if name not in captions:
            raise UserError(f"{where}: image_id {name} is not among 'images'")
        captions[name].append(_text(annotation, "caption", f"{where} (image_id {name})"))
    if bare := [name for name, texts in captions.items() if not texts]:
        raise UserError(f"{path}: no reference for image id {some_of(bare)}; add its annotations")
    return [
        CaptionSample(id=name, image=b"", prompt="", references=tuple(texts), groups=groups[name])
        for name, texts in captions.items()
    ]


def _domain(image: dict[str, Any], where: str) -> str:
    domain = _text(image, "domain", where)
    if domain not in DOMAINS:
        raise UserError(f"{where}: unknown domain {domain!r}; {nearest(domain, DOMAINS)}")
    return domain


def read_predictions(path: Path) -> dict[str, str]:
    """Captions by image id from a file in COCO's result form.

    Raises:
        UserError: the file is missing or of another layout, an id is doubled, a caption is no text.
    """
    captions: dict[str, str] = {}
    for where, record in _records(read_json(path), str(path)):
        name = _id(record, "image_id", where)
        if name in captions:
            raise UserError(f"{where}: image_id {name} is doubled; leave one caption an image")
        captions[name] = _said(record, f"{where} (image_id {name})")
    return captions


def read_candidates(path: Path) -> list[dict[str, Any]]:
    """Captions in COCO's result form, any number an image, with whatever else their records hold.

    Returns:
        The records in the file's order, `image_id` as text.

    Raises:
        UserError: the file is missing or of another layout, or a caption is no text.
    """
    records = []
    for where, record in _records(read_json(path), str(path)):
        name = _id(record, "image_id", where)
        caption = _said(record, f"{where} (image_id {name})")
        records.append({**record, "image_id": name, "caption": caption})
    return records


def refuse_other_images(
    captions: dict[str, str], predictions: Path, samples: Sequence[CaptionSample], references: Path
) -> None:
    """Refuse predictions that are not of the very images of the references.

    Raises:
        UserError: an image has no prediction, or a prediction no image.
    """
    images = {sample.id for sample in samples}
    if missing := sorted(images - captions.keys()):
        raise UserError(
            f"{predictions}: no prediction for image id {some_of(missing)} of {references}; "
            "caption every image, or take the images out of the references"
        )
    if extra := sorted(captions.keys() - images):
        raise UserError(
            f"{references}: no reference for image id {some_of(extra)} of {predictions}; "
            "are the two of one split?"
        )


# --- MMMU ----------------------------------------------------------------------------------------


def read_mmmu_folder(folder: Path) -> list[tuple[ChoiceSample, str]]:
    """Questions with the model's replies from MMMU's official output folder.

    The subjects come by name, which is the order of the official code.

    Raises:
        UserError: the folder or a file is missing or of another layout, or an id is doubled.
    """
    files = mmmu_files(folder)
    answered = [pair for path in files for pair in _read_subject(path)]
    seen: set[str] = set()
    for sample, _ in answered:
        if sample.id in seen:
            raise UserError(f"{folder}: id {sample.id!r} is doubled; leave one answer of it")
        seen.add(sample.id)
    return answered


def mmmu_files(folder: Path) -> list[Path]:
    """The `<Subject>/output.json` of the folder, by subject.

    Raises:
        UserError: there is none.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    files = sorted(folder.glob("*/output.json"), key=lambda path: path.parent.name)
    if not files:
        raise UserError(f"{folder}: no <Subject>/output.json in it, the layout of MMMU's code")
    return files


def _read_subject(path: Path) -> list[tuple[ChoiceSample, str]]:
    subject = path.parent.name
    disciplines = [name for name, subjects in DISCIPLINES.items() if subject in subjects]
    groups = ((disciplines or [OTHER])[0], subject)
    return [
        (_question(record, groups, where), _response(record, where))
        for where, record in _records(read_json(path), str(path))
    ]


def _question(record: dict[str, Any], groups: tuple[str, ...], where: str) -> ChoiceSample:
    name = _text(record, "id", where)
    where = f"{where} (id {name})"
    question_type = _text(record, "question_type", where)
    if question_type not in _QUESTION_TYPES:
        hint = nearest(question_type, _QUESTION_TYPES)
        raise UserError(f"{where}: unknown question_type {question_type!r}; {hint}")
    options = _options(record, where) if question_type == MULTIPLE_CHOICE else ()
    sample = ChoiceSample(
        id=name,
        cluster=name,
        images=(),
        prompt="",
        question_type=_QUESTION_TYPES[question_type],
        options=options,
        gold=_gold(record, where),
        groups=groups,
    )
    if options and sample.gold not in sample.letters:
        known = ", ".join(sample.letters)
        raise UserError(f"{where}: 'answer' {sample.gold!r} is none of the letters {known}")
    return sample


def _options(record: dict[str, Any], where: str) -> tuple[str, ...]:
    letters, texts = record.get("all_choices"), record.get("index2ans")
    if not isinstance(letters, list) or not isinstance(texts, dict):
        raise UserError(
            f"{where}: multiple choice needs a list 'all_choices' and an object 'index2ans'"
        )
    expected = list(ascii_uppercase[: len(letters)])
    if not letters or letters != expected or list(texts) != expected:
        raise UserError(
            f"{where}: 'all_choices' and the keys of 'index2ans' must be A, B, … in order, "
            f"not {letters!r} and {list(texts)!r}"
        )
    for letter, text in texts.items():
        if not isinstance(text, str):
            raise UserError(f"{where}: 'index2ans' {letter} must be a text, not {text!r}")
    return tuple(_encodable(text, f"{where}: 'index2ans'") for text in texts.values())


def _gold(record: dict[str, Any], where: str) -> str:
    answer = record.get("answer")
    texts = answer if isinstance(answer, list) else [answer]
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise UserError(f"{where}: 'answer' must be a text or a list of texts, not {answer!r}")
    # Several answers go as the data set itself writes them, as the text of a Python list.
    gold = str(answer)
    return _encodable(gold, f"{where}: 'answer'")


def _response(record: dict[str, Any], where: str) -> str:
    response = record.get("response")
    if not isinstance(response, str):
        raise UserError(f"{where}: 'response' must be the model's text, not {response!r}")
    return _encodable(response, f"{where}: 'response'")


# --- records -------------------------------------------------------------------------------------


def _records(content: Any, where: str) -> Iterable[tuple[str, dict[str, Any]]]:
    """Each record of a non-empty list of objects, with the words that name its place."""
    if not isinstance(content, list) or not content:
        raise UserError(f"{where}: must be a list of objects with at least one")
    for index, record in enumerate(content):
        if not isinstance(record, dict):
            raise UserError(f"{where}[{index}]: must be an object, not {record!r}")
        yield f"{where}[{index}]", record


def _id(record: dict[str, Any], key: str, where: str) -> str:
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise UserError(f"{where}: {key!r} must be a whole number or a text, not {value!r}")
    return str(value)


def _text(record: dict[str, Any], key: str, where: str) -> str:
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: {key!r} must be a non-empty text, not {value!r}")
    return _encodable(value, f"{where}: {key!r}")


def _said(record: dict[str, Any], where: str) -> str:
    """A model's caption: it may be empty, and then scores as the empty reply of a run does."""
    value = record.get("caption")
    if not isinstance(value, str):
        raise UserError(f"{where}: 'caption' must be a text, not {value!r}")
    return _encodable(value, f"{where}: 'caption'")


def _encodable(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where} is not valid Unicode ({error.reason}): {text!r}") from error
    return text


def some_of(names: Sequence[str]) -> str:
    """The first names and how many more there are."""
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
