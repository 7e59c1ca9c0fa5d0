"""Captions scored with pycocoevalcap, one row a caption, so that the corpus scores recompose.

The tokenizer and METEOR are pycocoevalcap's own jars, fed directly: its Python wrappers write into
site-packages, leave processes behind, and lose step with their input on some captions. BLEU's
counts, CIDEr, ROUGE-L and SPICE are its Python functions. The values are its values.

Sources: Chen et al., Microsoft COCO Captions (2015); Vedantam et al., CIDEr (CVPR 2015); Denkowski
and Lavie, Meteor Universal (WMT 2014); Anderson et al., SPICE (ECCV 2016).
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from pycocoevalcap.bleu.bleu_scorer import cook_refs, cook_test
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.spice import spice
from pycocoevalcap.tokenizer import ptbtokenizer

from cwdpo_bench.evaluate.caption_statistics import meteor_of_segments
from cwdpo_bench.evaluate.java import filter_lines, java_on_path
from cwdpo_bench.evaluate.meteor import segment_statistics
from cwdpo_bench.evaluate.samples import CaptionSample

Captions = Mapping[str, Sequence[str]]
"""Tokenized captions by image id."""

_LINE_BREAKS = str.maketrans(dict.fromkeys("\n\r\v\f\x85\u2028\u2029", " "))
"""What the tokenizer takes for the end of a line."""

_SPICE_FOLDER = Path(spice.__file__).parent
_SPICE_JARS = ("lib/stanford-corenlp-3.6.0.jar", "lib/stanford-corenlp-3.6.0-models.jar")


class CaptionRows(NamedTuple):
    """One row a caption, and what a reader of the scores must know."""

    samples: pd.DataFrame
    warnings: list[str]


def scorer_signature() -> str:
    """The scorer and its version, for a run's signature."""
    return f"pycocoevalcap-{metadata.version('pycocoevalcap')}"


def caption_rows(samples: Sequence[CaptionSample], predictions: Mapping[str, str]) -> CaptionRows:
    """The rows of `samples/TASK.parquet` for captions, in the order of the samples.

    Args:
        samples: the images with their references.
        predictions: a caption for the id of every sample; it may be empty.
    """
    scores = score_captions(
        {sample.id: sample.references for sample in samples},
        {sample.id: predictions[sample.id] for sample in samples},
    )
    columns = {
        "id": [sample.id for sample in samples],
        "cluster": [sample.cluster for sample in samples],
        "groups": [list(sample.groups) for sample in samples],
        "prompt": [sample.prompt for sample in samples],
        "prediction": [predictions[sample.id] for sample in samples],
        "references": [list(sample.references) for sample in samples],
    }
    rows = pd.concat([pd.DataFrame(columns), scores.samples.reset_index(drop=True)], axis=1)
    return CaptionRows(rows, scores.warnings)


def score_captions(references: Captions, predictions: Mapping[str, str]) -> CaptionRows:
    """Score captions; the rows, indexed by id, come in the order of `references`.

    Args:
        references: image id → one caption or more, not tokenized.
        predictions: image id → caption, the same ids. An empty one scores as such.

    Returns:
        Columns `CIDEr`, `METEOR`, `ROUGE-L`, `SPICE` (where its jars are), `bleu_matches`,
        `bleu_guesses`, `bleu_length`, `bleu_reference_length`, `meteor_statistics`; warnings.

    Raises:
        ValueError: the ids differ, or an image has no reference.
        UserError: `JAVA_HOME` is broken.
    """
    if references.keys() != predictions.keys() or not all(references.values()):
        raise ValueError("references and predictions must name the same images, none without any")
    truth, candidates = tokenize(references, {name: [predictions[name]] for name in references})
    statistics = segment_statistics(truth, candidates)
    columns = pd.DataFrame(
        {
            "CIDEr": _cider(truth, candidates),
            "METEOR": meteor_of_segments(statistics),
            "ROUGE-L": [Rouge().calc_score(candidates[name], truth[name]) for name in truth],
            "meteor_statistics": statistics.tolist(),
            **_bleu_columns(truth, candidates),
        },
        index=pd.Index(truth, name="id"),
    )
    spice_scores, warnings = _spice(truth, candidates)
    if spice_scores is not None:
        columns["SPICE"] = spice_scores
    return CaptionRows(columns, _input_warnings(candidates) + warnings)


def _input_warnings(candidates: Captions) -> list[str]:
    warnings = []
    empty = [name for name, (caption,) in candidates.items() if not caption]
    if empty:
        warnings.append(
            f"{len(empty)} of {len(candidates)} captions hold no word and score as such "
            f"(first: image {empty[0]})"
        )
    if len(candidates) == 1:
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


def _bleu_columns(truth: Captions, candidates: Captions) -> dict[str, list[object]]:
    cooked = [
        cook_test(candidates[name][0], cook_refs(truth[name]), eff="closest") for name in truth
    ]
    return {
        "bleu_matches": [counts["correct"] for counts in cooked],
        "bleu_guesses": [counts["guess"] for counts in cooked],
        "bleu_length": [counts["testlen"] for counts in cooked],
        "bleu_reference_length": [counts["reflen"] for counts in cooked],
    }


def _cider(truth: Captions, candidates: Captions) -> np.ndarray:
    if not any(caption.strip() for captions in truth.values() for caption in captions):
        return np.zeros(len(truth))  # Without a word in any reference pycocoevalcap fails.
    _, scores = Cider().compute_score(dict(truth), dict(candidates))
    return np.asarray(scores, dtype=np.float64)


def _spice(truth: Captions, candidates: Captions) -> tuple[list[float] | None, list[str]]:
    missing = [jar for jar in _SPICE_JARS if not (_SPICE_FOLDER / jar).is_file()]
    if missing:
        return None, [
            # Without this machine's path: the warning goes into tables that are shared.
            f"SPICE unavailable: pycocoevalcap/spice/{missing[0]} is missing; "
            "`python -m pycocoevalcap.spice.get_stanford_models` downloads it"
        ]
    # SPICE sorts its images by id; numbers keep their order.
    numbered = [dict(enumerate(corpus.values())) for corpus in (truth, candidates)]
    try:
        with java_on_path():
            _, scores = spice.Spice().compute_score(*numbered)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        return None, [f"SPICE unavailable: it did not run ({error})"]
    values = [float(score["All"]["f"]) for score in scores]
    if not np.isfinite(values).all():
        return None, ["SPICE unavailable: it gave a caption no score"]
    return values, []
