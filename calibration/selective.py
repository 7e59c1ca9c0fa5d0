"""Selective prediction: does confidence rank right answers above wrong ones?

Sources: Geifman and El-Yaniv, Selective Classification for Deep Neural Networks (NeurIPS 2017);
Geifman, Uziel and El-Yaniv, Bias-Reduced Uncertainty Estimation (ICLR 2019) for AURC; Hanley and
McNeil (1982) for AUROC as a rank statistic.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import rankdata

from cwdpo_bench.calibration._checks import Floats, confidence_pair


def aurc(confidences: ArrayLike, correct: ArrayLike) -> float:
    """Area under the risk-coverage curve, in [0, 1]; less is better.

    The mean over k = 1..N of the error rate among the k most confident answers. Equal confidences
    count as their mean over all orders, so the order of the samples never matters.

    Args:
        confidences: [N].
        correct: [N], 0 or 1.
    """
    confidence, right = confidence_pair(confidences, correct)
    _, level = np.unique(-confidence, return_inverse=True)
    counts, errors = np.bincount(level), np.bincount(level, weights=1.0 - right)
    return float(aurc_from_sums(np.concatenate([counts, errors])))


def aurc_from_sums(sums: ArrayLike) -> Floats:
    """AURC [...] from sums [..., 2·levels]; NaN where nothing was counted.

    The sums are a block of counts and a block of errors, by level of falling confidence.
    A level of m answers with e errors, met after n answers with E errors, adds
    Σ_{j=1..m} (E + j·e/m)/(n + j) = (E − n·e/m)·(H(n+m) − H(n)) + e, H the harmonic numbers.
    """
    counts, errors = _levels(sums)
    after = np.cumsum(counts, axis=-1)
    before = after - counts
    share = errors / np.maximum(counts, 1.0)
    rising = np.cumsum(errors, axis=-1) - errors - before * share
    # A table of H, looked up, is several times faster than digamma on every resample and level.
    total = after[..., -1]
    table = np.concatenate([[0.0], np.cumsum(1.0 / np.arange(1, int(total.max()) + 1))])
    harmonic = table[after.astype(np.intp)]
    steps = np.diff(harmonic, axis=-1, prepend=0.0)
    area = np.einsum("...l,...l->...", rising, steps) + errors.sum(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(total > 0, area / total, np.nan)


class RiskCoverage(NamedTuple):
    """What remains wrong when only the most confident answers are given.

    Attributes:
        threshold: [L] confidences, falling: all answers at least this confident are given.
        coverage: [L] their share of all answers, up to 1.
        risk: [L] the share of them that is wrong.
    """

    threshold: Floats
    coverage: Floats
    risk: Floats


def risk_coverage(confidences: ArrayLike, correct: ArrayLike) -> RiskCoverage:
    """The risk-coverage curve, a point for each distinct confidence (El-Yaniv and Wiener, 2010).

    Args:
        confidences: [N].
        correct: [N], 0 or 1.
    """
    confidence, right = confidence_pair(confidences, correct)
    values, level = np.unique(-confidence, return_inverse=True)
    counts = np.cumsum(np.bincount(level))
    errors = np.cumsum(np.bincount(level, weights=1.0 - right))
    return RiskCoverage(-values, counts / len(right), errors / counts)


def auroc_from_sums(sums: ArrayLike) -> Floats:
    """AUROC [...] from sums [..., 2·levels] as those of `aurc_from_sums`.

    NaN where all answers are right, or all wrong: there is no pair to rank.
    """
    counts, errors = _levels(sums)
    right = counts - errors
    less_confident = errors.sum(axis=-1, keepdims=True) - np.cumsum(errors, axis=-1)
    ranked = (right * (less_confident + 0.5 * errors)).sum(axis=-1)
    pairs = right.sum(axis=-1) * errors.sum(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(pairs > 0, ranked / pairs, np.nan)


def auroc(confidences: ArrayLike, correct: ArrayLike) -> float:
    """Probability that a right answer is more confident than a wrong one (ties ½), in [0, 1].

    Raises:
        ValueError: all answers are right, or all wrong: there is no pair to rank.
    """
    confidence, right = confidence_pair(confidences, correct)
    positives = right.sum()
    negatives = len(right) - positives
    if positives == 0 or negatives == 0:
        raise ValueError("auroc needs both right and wrong answers; all are the same")
    rank_sum = rankdata(confidence)[right == 1.0].sum()
    return float((rank_sum - positives * (positives + 1) / 2) / (positives * negatives))


def _levels(sums: ArrayLike) -> tuple[Floats, Floats]:
    array = np.asarray(sums, dtype=np.float64)
    if array.ndim == 0 or array.shape[-1] % 2 != 0:
        raise ValueError(f"sums have shape {array.shape}; [..., 2·levels] expected")
    counts, errors = np.split(array, 2, axis=-1)
    return counts, errors
