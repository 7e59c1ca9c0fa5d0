"""The body of `cwdpo-bench score`: finished answers in, a run folder out. No model, no torch.

Captions come in COCO's result form with references in its annotation form; MMMU's answers in the
folder layout of its official code.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from cwdpo_bench import __version__
from cwdpo_bench.errors import UserError, nearest
from cwdpo_bench.evaluate.answers import DISCIPLINES
from cwdpo_bench.evaluate.captions import caption_rows, scorer_signature
from cwdpo_bench.evaluate.choices import choice_rows
from cwdpo_bench.evaluate.results import TaskResult, refuse_other_run, signature_of, write_run
from cwdpo_bench.evaluate.samples import MULTIPLE_CHOICE, OPEN, CaptionSample, ChoiceSample
from cwdpo_bench.files import read_json

CAPTION_TASKS = ("coco", "flickr30k", "nocaps")
DOMAINS = ("in-domain", "near-domain", "out-domain")
PARSE_FAILURES = ("wrong", "random")
OTHER = "Other"
"""The discipline of a subject that MMMU does not have."""

_NAMED = 5
"""So many ids an error names of those that are wrong."""

# --- captions ------------------------------------------------------------------------------------


def score_captions_files(
    task: str, predictions: Path, references: Path, output: Path
) -> dict[str, Any]:
    """Score a file of captions and write a run folder; return the content of `results.json`.

    Args:
        task: one of `CAPTION_TASKS`. For nocaps every image carries its `domain`.
        predictions: a list of `{"image_id": …, "caption": …}`, one for every image.
        references: `{"images": [{"id": …}], "annotations": [{"image_id": …, "caption": …}]}`.
        output: the run folder.

    Raises:
        UserError: an unknown task, a file that is missing or of another layout, an image without
            prediction or a prediction without image, a doubled id, an empty caption, a broken
            `JAVA_HOME`, or an output folder of another run.
    """
    if task not in CAPTION_TASKS:
        raise UserError(f"unknown caption task {task!r}; {nearest(task, CAPTION_TASKS)}")
    samples = _read_references(references, with_domain=task == "nocaps")
    captions = _read_predictions(predictions)
    _same_images(captions, predictions, {sample.id for sample in samples}, references)
    signature = signature_of(
        {
            "task": task,
            "n": len(samples),
            "references": _sha256([references])[:12],
            "scorer": scorer_signature(),
        }
    )
    model = _model(predictions, [predictions])
    refuse_other_run(output, model, _shared_signature(), {task: signature})
    rows = caption_rows(samples, captions)
    return write_run(
        output,
        model,
        {task: TaskResult(rows.samples, signature, rows.warnings)},
        _provenance({"predictions": predictions, "references": references}),
        _shared_signature(),
    )


def _read_references(path: Path, *, with_domain: bool) -> list[CaptionSample]:
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
        captions[name].append(_caption(annotation, f"{where} (image_id {name})"))
    if bare := [name for name, texts in captions.items() if not texts]:
        raise UserError(f"{path}: no reference for image id {_some(bare)}; add its annotations")
    return [
        CaptionSample(id=name, image=b"", prompt="", references=tuple(texts), groups=groups[name])
        for name, texts in captions.items()
    ]


def _domain(image: dict[str, Any], where: str) -> str:
    domain = _text(image, "domain", where)
    if domain not in DOMAINS:
        raise UserError(f"{where}: unknown domain {domain!r}; {nearest(domain, DOMAINS)}")
    return domain


def _read_predictions(path: Path) -> dict[str, str]:
    captions: dict[str, str] = {}
    for where, record in _records(read_json(path), str(path)):
        name = _id(record, "image_id", where)
        if name in captions:
            raise UserError(f"{where}: image_id {name} is doubled; leave one caption an image")
        captions[name] = _caption(record, f"{where} (image_id {name})")
    return captions


def _same_images(
    captions: dict[str, str], predictions: Path, images: set[str], references: Path
) -> None:
    if missing := sorted(images - captions.keys()):
        raise UserError(
            f"{predictions}: no prediction for image id {_some(missing)} of {references}; "
            "caption every image, or take the images out of the references"
        )
    if extra := sorted(captions.keys() - images):
        raise UserError(
            f"{references}: no reference for image id {_some(extra)} of {predictions}; "
            "are the two of one split?"
        )


# --- MMMU ----------------------------------------------------------------------------------------


def score_mmmu_folder(
    predictions: Path, output: Path, parse_failures: Literal["wrong", "random"] = "wrong"
) -> dict[str, Any]:
    """Score MMMU's official output folder and write a run folder; return `results.json`.

    Args:
        predictions: holds `<Subject>/output.json`, a list of records with `id`, `question_type`,
            `answer`, `response` and, for multiple choice, `all_choices` and `index2ans`.
        output: the run folder.
        parse_failures: a reply that names no letter counts as wrong, or as the official code's
            random guess, drawn in its order with its seed.

    Raises:
        UserError: a folder or file that is missing or of another layout, a doubled id, an unknown
            `parse_failures`, or an output folder of another run.
    """
    if parse_failures not in PARSE_FAILURES:
        hint = nearest(parse_failures, PARSE_FAILURES)
        raise UserError(f"unknown way of parse failures {parse_failures!r}; {hint}")
    if not predictions.is_dir():
        raise UserError(f"{predictions}: no such folder")
    # The official code goes through the subjects by name, and its guesses depend on that order.
    files = sorted(predictions.glob("*/output.json"), key=lambda path: path.parent.name)
    if not files:
        raise UserError(f"{predictions}: no <Subject>/output.json in it")
    answered = [pair for path in files for pair in _read_subject(path)]
    samples = [sample for sample, _ in answered]
    _refuse_doubled(samples, predictions)
    signature = signature_of(
        {"task": "mmmu", "n": len(samples), "rules": "mmmu", "parse_failures": parse_failures}
    )
    model = _model(predictions, files)
    refuse_other_run(output, model, _shared_signature(), {"mmmu": signature})
    rows = choice_rows(
        samples,
        [response for _, response in answered],
        rules="mmmu",
        parse_failures=parse_failures,
    )
    return write_run(
        output,
        model,
        {"mmmu": TaskResult(rows, signature, _subject_warnings(files))},
        _provenance({"predictions": predictions}),
        _shared_signature(),
    )


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
    options = _options(record, where) if question_type == MULTIPLE_CHOICE else ()
    sample = ChoiceSample(
        id=name,
        cluster=name,
        images=(),
        prompt="",
        # The official files say "short-answer" for what the data set calls open.
        question_type=MULTIPLE_CHOICE if question_type == MULTIPLE_CHOICE else OPEN,
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
            f"{where}: a multiple-choice record needs a list 'all_choices' and an object 'index2ans'"
        )
    expected = [chr(ord("A") + place) for place in range(len(letters))]
    if not letters or letters != expected or list(texts) != expected:
        raise UserError(
            f"{where}: 'all_choices' and the keys of 'index2ans' must be A, B, … in order, "
            f"not {letters!r} and {list(texts)!r}"
        )
    if not all(isinstance(text, str) for text in texts.values()):
        raise UserError(f"{where}: the values of 'index2ans' must be texts")
    return tuple(texts.values())


def _gold(record: dict[str, Any], where: str) -> str:
    answer = record.get("answer")
    if isinstance(answer, list) and answer and all(isinstance(text, str) for text in answer):
        return repr(answer)
    if not isinstance(answer, str) or not answer.strip():
        raise UserError(f"{where}: 'answer' must be a text or a list of texts, not {answer!r}")
    return answer


def _response(record: dict[str, Any], where: str) -> str:
    response = record.get("response")
    if not isinstance(response, str):
        raise UserError(
            f"{where}: 'response' must be a text (what the model said), not {response!r}"
        )
    return _encodable(response, f"{where}: 'response'")


def _refuse_doubled(samples: Iterable[ChoiceSample], predictions: Path) -> None:
    seen: set[str] = set()
    for sample in samples:
        if sample.id in seen:
            raise UserError(
                f"{predictions}: id {sample.id!r} is doubled; leave one answer a question"
            )
        seen.add(sample.id)


def _subject_warnings(files: list[Path]) -> list[str]:
    found = {path.parent.name for path in files}
    official = {subject for subjects in DISCIPLINES.values() for subject in subjects}
    warnings = []
    if missing := sorted(official - found):
        warnings.append(f"{len(missing)} of {len(official)} subjects are missing: {_some(missing)}")
    if extra := sorted(found - official):
        warnings.append(f"not subjects of MMMU, under discipline {OTHER!r}: {_some(extra)}")
    return warnings


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


def _caption(record: dict[str, Any], where: str) -> str:
    return _text(record, "caption", where)


def _encodable(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where} is not valid Unicode ({error.reason}): {text!r}") from error
    return text


def _some(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


# --- what the run folder says about itself -------------------------------------------------------


def _model(predictions: Path, files: list[Path]) -> dict[str, Any]:
    return {"name": predictions.resolve().name, "predictions_sha256": _sha256(files)}


def _shared_signature() -> str:
    return signature_of({"cwdpo-bench": __version__, "engine": "files"})


def _provenance(inputs: dict[str, Path]) -> dict[str, Any]:
    return {
        "cwdpo-bench": __version__,
        "python": platform.python_version(),
        "libraries": {
            name: metadata.version(name) for name in ("numpy", "pandas", "pycocoevalcap")
        },
        "inputs": {name: str(path.resolve()) for name, path in inputs.items()},
    }


def _sha256(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()
