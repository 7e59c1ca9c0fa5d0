"""Corpus scores of captions from per-caption statistics: BLEU, METEOR, CHAIR, tokens' calibration.

Sources: pycocoevalcap 1.2 for BLEU's constants; METEOR 1.5 (Denkowski and Lavie, WMT 2014), whose
statistics line and English parameters stand below.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from cwdpo_bench.calibration import BINS, equal_width_index
from cwdpo_bench.evaluate.sums import (
    Floats,
    Integers,
    counted,
    present,
    ratio_or_zero,
    rectangle,
    spread,
)

BLEU_ORDERS = 4
_BLEU_TINY, _BLEU_SMALL = 1e-15, 1e-9
"""pycocoevalcap's guards against division by zero: part of the value, so they stay as they are."""


def bleu_statistics(samples: pd.DataFrame) -> Floats:
    """[n, 11]: clipped matches and guesses of four orders, both lengths, and 1."""
    rows = present(samples, "bleu_matches")
    counting = samples[rows]
    return spread(
        np.column_stack(
            [
                rectangle(counting["bleu_matches"], BLEU_ORDERS),
                rectangle(counting["bleu_guesses"], BLEU_ORDERS),
                counting["bleu_length"].to_numpy(dtype=np.float64),
                counting["bleu_reference_length"].to_numpy(dtype=np.float64),
                np.ones(len(counting)),
            ]
        ),
        rows,
    )


def bleu_of_sums(order: int, sums: Floats) -> Floats:
    """BLEU-`order` [...] from summed statistics [..., 11], with pycocoevalcap's own guards."""
    matches, guesses = sums[..., :order], sums[..., BLEU_ORDERS : BLEU_ORDERS + order]
    length, reference_length, count = sums[..., 8], sums[..., 9], sums[..., 10]
    precisions = (matches + _BLEU_TINY) / (guesses + _BLEU_SMALL)
    ratio = (length + _BLEU_TINY) / (reference_length + _BLEU_SMALL)
    brevity = np.where(ratio < 1, np.exp(1 - 1 / np.minimum(ratio, 1.0)), 1.0)
    return np.where(count > 0, precisions.prod(axis=-1) ** (1 / order) * brevity, np.nan)


_SEGMENT = 23
_CHUNKS, _MATCHED = 20, slice(21, 23)
_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.2, 0.6, 0.75
_STAGE_WEIGHTS = np.array([1.0, 0.6, 0.8, 0.6])
"""METEOR 1.5's parameters for English; the stages are exact, stem, synonym, paraphrase."""


def meteor_statistics(samples: pd.DataFrame) -> Floats:
    """[n, 24]: METEOR's own statistics of the caption, as it adds them up itself, and 1."""
    rows = present(samples, "meteor_statistics")
    return spread(_summable(rectangle(samples["meteor_statistics"][rows], _SEGMENT)), rows)


def meteor_of_segments(statistics: Floats) -> Floats:
    """METEOR of single captions [n] from the lines [n, 23] that METEOR gives for them."""
    return meteor_of_sums(_summable(statistics))


def _summable(segments: Floats) -> Floats:
    statistics = np.column_stack([segments, np.ones(len(segments))])
    # A caption equal to its reference is one chunk, which METEOR does not count as fragmentation,
    # neither alone nor in the corpus.
    whole = (statistics[:, _MATCHED] == statistics[:, :2]).all(axis=1)
    statistics[whole & (statistics[:, _CHUNKS] == 1), _CHUNKS] = 0
    return statistics


def meteor_of_sums(sums: Floats) -> Floats:
    """METEOR from its own segment statistics, added up.

    Their order: length of candidate and of reference, function words in each; for each stage the
    content words matched in candidate and reference, then the function words; chunks; words matched
    in candidate and reference.
    """
    length, reference_length, function, reference_function = np.moveaxis(sums[..., :4], -1, 0)
    stages = sums[..., 4:20].reshape(*sums.shape[:-1], 4, 4)
    chunks, matched, reference_matched, count = np.moveaxis(sums[..., 20:24], -1, 0)
    word_weights = np.array([_DELTA, _DELTA, 1 - _DELTA, 1 - _DELTA])
    weighted = (stages * word_weights * _STAGE_WEIGHTS[:, None]).sum(axis=-2)
    precision = ratio_or_zero(
        weighted[..., 0] + weighted[..., 2],
        _DELTA * (length - function) + (1 - _DELTA) * function,
    )
    recall = ratio_or_zero(
        weighted[..., 1] + weighted[..., 3],
        _DELTA * (reference_length - reference_function) + (1 - _DELTA) * reference_function,
    )
    f_mean = ratio_or_zero(precision * recall, (1 - _ALPHA) * recall + _ALPHA * precision)
    fragmentation = ratio_or_zero(chunks, (matched + reference_matched) / 2)
    return np.where(count > 0, f_mean * (1 - _GAMMA * fragmentation**_BETA), np.nan)


def _tokens(samples: pd.DataFrame, column: str) -> tuple[Integers, Floats]:
    """The values of all tokens [T] of a list column and the row [T] that each belongs to."""
    lists = [np.asarray(x, dtype=np.float64) for x in samples[column][present(samples, column)]]
    rows = np.flatnonzero(present(samples, column))
    owner = np.repeat(rows, [len(x) for x in lists])
    return owner, np.concatenate([*lists, np.empty(0)])


def token_mean(column: str, samples: pd.DataFrame) -> Floats:
    """[n, 2] for the mean of a list column over all tokens."""
    owner, values = _tokens(samples, column)
    size = len(samples)
    sums = np.bincount(owner, weights=values, minlength=size)
    return np.column_stack([sums, np.bincount(owner, minlength=size)]).astype(np.float64)


def token_ece_statistics(samples: pd.DataFrame) -> Floats:
    """[n, 3·bins] for the ECE of the tokens' top-1 probability, equal-width bins."""
    owner, confidence = _tokens(samples, "token_confidences")
    _, correct = _tokens(samples, "token_correct")
    index = equal_width_index(np.clip(confidence, 0.0, 1.0)) if len(confidence) else owner
    place = owner * BINS + index
    size = len(samples) * BINS
    blocks = [np.bincount(place, weights=w, minlength=size) for w in (None, confidence, correct)]
    return np.concatenate([b.reshape(len(samples), BINS) for b in blocks], axis=1, dtype=np.float64)


def _lengths(samples: pd.DataFrame, column: str) -> Floats:
    """How long the lists of a column are, [m] for the rows that have objects."""
    return samples[column][present(samples, "objects")].map(len).to_numpy(dtype=np.float64)


def chair_statistics(samples: pd.DataFrame) -> Floats:
    """[n, 2]: hallucinated mentions of objects, and all mentions (CHAIR-i)."""
    wrong, named = _lengths(samples, "hallucinated_objects"), _lengths(samples, "named_objects")
    return spread(np.column_stack([wrong, named]), present(samples, "objects"))


def chair_sentence_statistics(samples: pd.DataFrame) -> Floats:
    """[n, 2]: whether the caption names an object that is not there, and 1 (CHAIR-s)."""
    wrong = _lengths(samples, "hallucinated_objects") > 0
    return counted(wrong.astype(np.float64), present(samples, "objects"))


def object_recall_statistics(samples: pd.DataFrame) -> Floats:
    """[n, 2]: objects of the picture that the caption names, and objects of the picture."""
    found, shown = _lengths(samples, "found_objects"), _lengths(samples, "objects")
    return spread(np.column_stack([found, shown]), present(samples, "objects"))
