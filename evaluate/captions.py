"""Captions scored as pycocoevalcap does, one row a caption, so that the corpus scores recompose.

The tokenizer, METEOR and SPICE are pycocoevalcap's own jars; the first two are fed directly,
because its Python wrappers write into site-packages, leave processes behind, and lose step with
their input on some captions. BLEU's counts, CIDEr and ROUGE-L are computed in `evaluate/ngrams.py`.
The values are its values. METEOR takes the longest, so its captions are sent first and everything
else is computed while it works.

Sources: Chen et al., Microsoft COCO Captions (2015); Vedantam et al., CIDEr (CVPR 2015); Denkowski
and Lavie, Meteor Universal (WMT 2014); Anderson et al., SPICE (ECCV 2016).
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from pycocoevalcap.spice import spice
from pycocoevalcap.tokenizer import ptbtokenizer

from cwdpo_bench.evaluate.caption_statistics import (
    BLEU_ORDERS,
    bleu_of_sums,
    bleu_statistics,
    meteor_of_segments,
)
from cwdpo_bench.evaluate.chair import chair_columns, unjudged_warnings
from cwdpo_bench.evaluate.java import filter_lines, java_on_path
from cwdpo_bench.evaluate.meteor import begin_segments, kept_meteor
from cwdpo_bench.evaluate.ngrams import Cider, bleu_statistics_of, ngram_counts, rouge_l
from cwdpo_bench.evaluate.samples import CaptionSample

Captions = Mapping[str, Sequence[str]]
"""Captions by image id."""

Candidate = tuple[str, str]
"""The id of an image and a caption of it."""

_LINE_BREAKS = str.maketrans(dict.fromkeys("\n\r\v\f\x85\u2028\u2029", " "))
"""What the tokenizer takes for the end of a line."""

_SPICE_FOLDER = Path(spice.__file__).parent
_SPICE_JARS = ("lib/stanford-corenlp-3.6.0.jar", "lib/stanford-corenlp-3.6.0-models.jar")


class CaptionRows(NamedTuple):
    """One row a caption, and what a reader of the scores must know."""

    samples: pd.DataFrame
    warnings: list[str]


Pending = Callable[[], CaptionRows]
"""Waits for the scores of captions that were begun."""


def missing_spice_jar() -> str | None:
    """The first of SPICE's jars that is not there, as pycocoevalcap names it."""
    return next((jar for jar in _SPICE_JARS if not (_SPICE_FOLDER / jar).is_file()), None)


def scorer_signature() -> str:
    """The scorer and its version, for a run's signature."""
    return f"pycocoevalcap-{metadata.version('pycocoevalcap')}"


def caption_rows(samples: Sequence[CaptionSample], predictions: Mapping[str, str]) -> CaptionRows:
    """The rows of `samples/TASK.parquet` for captions, in the order of the samples.

    Args:
        samples: the images with their references.
        predictions: a caption by sample id; it may be empty. A sample that has none gets no row;
            its references count in CIDEr's document frequencies all the same, so that the others'
            values do not depend on it.
    """
    with kept_meteor(start=True):
        return begin_caption_rows(samples, predictions)()


def begin_caption_rows(samples: Sequence[CaptionSample], predictions: Mapping[str, str]) -> Pending:
    """`caption_rows` in two steps, so that several tasks keep one METEOR busy.

    To be called, and waited for, within a block of `kept_meteor`.
    """
    references = {sample.id: sample.references for sample in samples}
    samples = [sample for sample in samples if sample.id in predictions]
    begun = begin_scores(references, [(sample.id, predictions[sample.id]) for sample in samples])
    columns = {
        "id": [sample.id for sample in samples],
        "cluster": [sample.cluster for sample in samples],
        "groups": [list(sample.groups) for sample in samples],
        "prompt": [sample.prompt for sample in samples],
        "prediction": [predictions[sample.id] for sample in samples],
        "references": [list(sample.references) for sample in samples],
        **chair_columns(samples, predictions),
    }

    def finish() -> CaptionRows:
        scores = begun()
        rows = pd.concat([pd.DataFrame(columns), scores.samples], axis=1)
        return CaptionRows(rows, [*scores.warnings, *unjudged_warnings(samples)])

    return finish


def score_captions(references: Captions, predictions: Mapping[str, str]) -> CaptionRows:
    """Score a caption an image; the rows, indexed by id, come in the order of `references`.

    Args:
        references: image id → one caption or more, not tokenized.
        predictions: image id → caption, the same ids. An empty one scores as such.

    Returns:
        The columns of `begin_scores`; warnings.

    Raises:
        ValueError: the ids differ, or an image has no reference.
        UserError: `JAVA_HOME` is broken.
    """
    if references.keys() != predictions.keys():
        raise ValueError("references and predictions must name the same images, none without any")
    with kept_meteor(start=True):
        scores = begin_scores(references, [(name, predictions[name]) for name in references])()
    return CaptionRows(scores.samples.set_axis(pd.Index(references, name="id")), scores.warnings)


def score_candidates(references: Captions, candidates: Sequence[Candidate]) -> CaptionRows:
    """Score each caption alone: any number of captions an image, in the order given.

    The values do not depend on the other candidates. CIDEr's document frequencies are those of the
    references given, each image counted once whether it has candidates or not.

    Args:
        references: image id → one caption or more, not tokenized.
        candidates: image id and caption.

    Returns:
        `BLEU-1` … `BLEU-4`, `METEOR`, `ROUGE-L`, `CIDEr`, `CIDEr-plain`, `SPICE` (where its jars
        are), each the metric's value for the one caption; warnings.

    Raises:
        ValueError: a candidate's image has no reference.
        UserError: `JAVA_HOME` is broken.
    """
    with kept_meteor(start=True):
        rows, warnings = begin_scores(references, candidates)()
    statistics = bleu_statistics(rows)
    values = {f"BLEU-{n}": bleu_of_sums(n, statistics) for n in range(1, BLEU_ORDERS + 1)}
    names = [
        name for name in ("METEOR", "ROUGE-L", "CIDEr", "CIDEr-plain", "SPICE") if name in rows
    ]
    return CaptionRows(pd.concat([pd.DataFrame(values), rows[names]], axis=1), warnings)


def begin_scores(references: Captions, candidates: Sequence[Candidate]) -> Pending:
    """Tokenize captions and send them to METEOR; what comes back gives the rows.

    To be called, and waited for, within a block of `kept_meteor`.

    Args:
        references: image id → one caption or more, not tokenized: the corpus of CIDEr's document
            frequencies.
        candidates: image id and caption.

    Returns:
        Of a row a candidate, in their order: `CIDEr` (CIDEr-D, as COCO's code reports it),
        `CIDEr-plain` (without clipping and length penalty), `METEOR`, `ROUGE-L`, `SPICE` with
        `spice_tuples` (right, wrong and missing ones; where its jars are), `bleu_matches`,
        `bleu_guesses`, `bleu_length`, `bleu_reference_length`, `meteor_statistics`; warnings.

    Raises:
        ValueError: a candidate's image has no reference.
    """
    if not all(references.get(image) for image, _ in candidates):
        raise ValueError("references and predictions must name the same images, none without any")
    names = [str(place) for place in range(len(candidates))]
    texts, answers = tokenize(
        references, {name: [text] for name, (_, text) in zip(names, candidates, strict=True)}
    )
    truth = {name: texts[image] for name, (image, _) in zip(names, candidates, strict=True)}
    segments = begin_segments(truth, answers)

    def finish() -> CaptionRows:
        columns = _word_columns(texts, [image for image, _ in candidates], answers)
        spice_columns, warnings = _spice(truth, answers)
        statistics = segments()
        columns |= {
            "METEOR": meteor_of_segments(statistics).tolist(),
            "meteor_statistics": statistics.tolist(),
            **spice_columns,
        }
        told = _input_warnings([image for image, _ in candidates], answers, len(references))
        return CaptionRows(pd.DataFrame(columns), told + warnings)

    return finish


def _input_warnings(images: Sequence[str], answers: Captions, documents: int) -> list[str]:
    warnings = []
    empty = [image for image, (text,) in zip(images, answers.values(), strict=True) if not text]
    if empty:
        warnings.append(
            f"{len(empty)} of {len(answers)} captions hold no word and score as such "
            f"(first: image {empty[0]})"
        )
    if documents == 1:
        warnings.append("CIDEr of one image is 0: its document frequencies need a corpus")
    return warnings


# --- tokens --------------------------------------------------------------------------------------


def tokenize(*corpora: Captions) -> list[dict[str, list[str]]]:
    """Tokenize captions as the PTB tokenizer of pycocoevalcap does: lower case, no punctuation.

    All corpora go through one start of the Java program.
    """
    lines = [
        caption.translate(_LINE_BREAKS)
        for corpus in corpora
        for captions in corpus.values()
        for caption in captions
    ]
    tokenized = iter(filter_lines(_TOKENIZER, lines, Path(ptbtokenizer.__file__).parent))
    return [
        {name: [_words(next(tokenized)) for _ in captions] for name, captions in corpus.items()}
        for corpus in corpora
    ]


_TOKENIZER = (
    "-cp",
    ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR,
    "edu.stanford.nlp.process.PTBTokenizer",
    "-preserveLines",
    "-lowerCase",
)
_PUNCTUATION = frozenset(ptbtokenizer.PUNCTUATIONS)


def _words(line: str) -> str:
    return " ".join(word for word in line.rstrip().split(" ") if word not in _PUNCTUATION)


# --- scores --------------------------------------------------------------------------------------


def _word_columns(
    texts: Captions, images: Sequence[str], answers: Captions
) -> dict[str, Sequence[object]]:
    """What is counted in words: BLEU's statistics, CIDEr, ROUGE-L; a value a candidate."""
    # As pycocoevalcap splits: ROUGE-L takes a caption without words for one empty word.
    words = {image: [text.split(" ") for text in captions] for image, captions in texts.items()}
    counts = {
        image: [ngram_counts(text.split()) for text in captions]
        for image, captions in texts.items()
    }
    candidates = [ngram_counts(text.split()) for (text,) in answers.values()]
    pairs = list(zip(candidates, [counts[image] for image in images], strict=True))
    metric = Cider(counts.values())
    cider = [metric.score(candidate, references) for candidate, references in pairs]
    bleu = [bleu_statistics_of(candidate, references) for candidate, references in pairs]
    return {
        "CIDEr": [scores.cider_d for scores in cider],
        "CIDEr-plain": [scores.cider for scores in cider],
        "ROUGE-L": [
            rouge_l(text.split(" "), words[image])
            for (text,), image in zip(answers.values(), images, strict=True)
        ],
        "bleu_matches": [statistics.matches for statistics in bleu],
        "bleu_guesses": [statistics.guesses for statistics in bleu],
        "bleu_length": [statistics.length for statistics in bleu],
        "bleu_reference_length": [statistics.reference_length for statistics in bleu],
    }


def _spice(truth: Captions, answers: Captions) -> tuple[dict[str, Sequence[object]], list[str]]:
    """SPICE's columns, none where it does not run, and the warning that says so."""
    missing = missing_spice_jar()
    if missing is not None:
        return {}, [
            # Without this machine's path: the warning goes into tables that are shared.
            f"SPICE unavailable: pycocoevalcap/spice/{missing} is missing; "
            "`python -m pycocoevalcap.spice.get_stanford_models` downloads it"
        ]
    # SPICE sorts its images by id; numbers keep their order.
    numbered = [dict(enumerate(corpus.values())) for corpus in (truth, answers)]
    try:
        with java_on_path():
            _, scores = spice.Spice().compute_score(*numbered)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        return {}, [f"SPICE unavailable: it did not run ({error})"]
    whole = [score["All"] for score in scores]
    values = [float(score["f"]) for score in whole]
    if not np.isfinite(values).all():
        return {}, ["SPICE unavailable: it gave a caption no score"]
    tuples = [[float(score[kind]) for kind in ("tp", "fp", "fn")] for score in whole]
    return {"SPICE": values, "spice_tuples": tuples}, []
