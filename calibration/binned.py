"""Calibration error in bins: ECE and its relatives, and the bins of a reliability diagram.

A prediction comes with a confidence in [0, 1] and is right or wrong. In bins of similar confidence,
accuracy should equal mean confidence; the errors below say how far it does not.

Every error is a function of three sums a bin (count, confidence, correct), so that the bootstrap
can resample them: `bin_statistics` makes the rows, `*_from_sums` the errors.

Sources: Guo et al., On Calibration of Modern Neural Networks (ICML 2017), eq. 3 (ECE) and 5 (MCE);
Nixon et al., Measuring Calibration in Deep Learning (CVPR workshops 2019) for equal mass; Kumar et
al., Verified Uncertainty Calibration (NeurIPS 2019), section 5, and Roelofs et al., Mitigating Bias
in Calibration Error Estimation (AISTATS 2022) for the debiased form; Kull et al., Beyond
Temperature Scaling (NeurIPS 2019), eq. 3 for classwise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import beta

from cwdpo_bench.calibration._checks import (
    Floats,
    Integers,
    confidence_pair,
    distributions,
    labels_of,
    unit_interval,
)
from cwdpo_bench.calibration.resampling import LEVEL, bootstrap_sums, cluster_sums

BINS = 15


@dataclass(frozen=True)
class ReliabilityBins:
    """A reliability diagram's B bins; means of an empty bin are NaN.

    Attributes:
        edges: [B + 1] from 0 to 1.
        counts: [B] predictions in the bin.
        confidence: [B] their mean confidence.
        accuracy: [B] the share of them that is right.
        low: [B] lower end of the accuracy's 95 % interval.
        high: [B] its upper end.
    """

    edges: Floats
    counts: Integers
    confidence: Floats
    accuracy: Floats
    low: Floats
    high: Floats


def equal_width_index(confidences: ArrayLike, bins: int = BINS) -> Integers:
    """The bin [N] of each confidence [N]: bin m holds (m/bins, (m+1)/bins], and 0 is in bin 0."""
    confidence = unit_interval("confidences", confidences, 1)
    return _index(confidence, np.linspace(0.0, 1.0, _checked(bins) + 1)[1:-1])


def equal_mass_index(confidences: ArrayLike, bins: int = BINS) -> Integers:
    """The bin [N] of each confidence [N], with edges that put (nearly) N/bins in each bin.

    Equal confidences share a bin, so that the order of the samples never matters; with many ties,
    or fewer samples than bins, some bins stay empty.
    """
    confidence = unit_interval("confidences", confidences, 1)
    ordered = np.sort(confidence)
    firsts = np.arange(1, _checked(bins)) * len(ordered) // bins
    # Bin m is closed above by its own largest member, so ties across an edge fall to the lower bin.
    edges = np.where(firsts > 0, ordered[np.maximum(firsts - 1, 0)], -1.0)
    return _index(confidence, edges)


def bin_statistics(
    confidences: ArrayLike, correct: ArrayLike, index: ArrayLike, bins: int = BINS
) -> Floats:
    """Additive statistics [N, 3·bins]: a block of counts, one of confidences, one of correct."""
    confidence, right = confidence_pair(confidences, correct)
    place = labels_of(index, len(confidence), _checked(bins))
    statistics = np.zeros((len(confidence), 3, bins))
    rows = np.arange(len(confidence))
    statistics[rows, 0, place] = 1.0
    statistics[rows, 1, place] = confidence
    statistics[rows, 2, place] = right
    return statistics.reshape(len(confidence), 3 * bins)


def ece_from_sums(sums: ArrayLike) -> Floats:
    """ECE [...] from summed statistics [..., 3·bins]: Σ_b (n_b/N) |accuracy_b − confidence_b|."""
    counts, confidence, correct = _blocks(sums)
    return _ratio(np.abs(correct - confidence).sum(axis=-1), counts.sum(axis=-1))


def mce_from_sums(sums: ArrayLike) -> Floats:
    """MCE [...] from summed statistics [..., 3·bins]: the largest gap of a non-empty bin."""
    counts, confidence, correct = _blocks(sums)
    gaps = np.abs(correct - confidence) / np.maximum(counts, 1e-300)
    largest: Floats = np.where(counts > 0, gaps, 0.0).max(axis=-1)
    return np.where(counts.sum(axis=-1) > 0, largest, np.nan)


def ece_debiased_from_sums(sums: ArrayLike) -> Floats:
    """Debiased ℓ2 error [...] from summed statistics [..., 3·bins].

    √max(0, Σ_b (n_b/N) [(accuracy_b − confidence_b)² − accuracy_b(1 − accuracy_b)/(n_b − 1)]).
    A bin of one sample has no variance to subtract and counts 0, as in Kumar et al.'s code.
    """
    counts, confidence, correct = _blocks(sums)
    safe = np.maximum(counts, 2.0)
    accuracy = correct / safe
    gap = (correct - confidence) / safe
    squares = gap**2 - accuracy * (1.0 - accuracy) / (safe - 1.0)
    total = np.where(counts >= 2.0, counts * squares, 0.0).sum(axis=-1)
    root: Floats = np.sqrt(np.maximum(_ratio(total, counts.sum(axis=-1)), 0.0))
    return root


def ece(confidences: ArrayLike, correct: ArrayLike, bins: int = BINS) -> float:
    """Expected calibration error of confidences [N] and correctness [N], equal-width bins, [0, 1].

    Guo et al. (2017), eq. 3.
    """
    index = equal_width_index(confidences, bins)
    return float(ece_from_sums(_sums(confidences, correct, index, bins)))


def ece_adaptive(confidences: ArrayLike, correct: ArrayLike, bins: int = BINS) -> float:
    """ECE of the top label in equal-mass bins, in [0, 1] (Nixon et al., 2019)."""
    index = equal_mass_index(confidences, bins)
    return float(ece_from_sums(_sums(confidences, correct, index, bins)))


def ece_debiased(confidences: ArrayLike, correct: ArrayLike, bins: int = BINS) -> float:
    """Debiased ℓ2 calibration error in equal-mass bins, in [0, 1] (Kumar et al., 2019).

    The plain ECE of a perfectly calibrated model is positive on a finite sample; here the expected
    share of that is subtracted. The unit is that of ECE, but the norm is ℓ2, so it is not the
    smaller of the two by rule.
    """
    index = equal_mass_index(confidences, bins)
    return float(ece_debiased_from_sums(_sums(confidences, correct, index, bins)))


def mce(confidences: ArrayLike, correct: ArrayLike, bins: int = BINS) -> float:
    """Maximum calibration error over equal-width bins, in [0, 1] (Guo et al., 2017, eq. 5)."""
    index = equal_width_index(confidences, bins)
    return float(mce_from_sums(_sums(confidences, correct, index, bins)))


def ece_classwise(probabilities: ArrayLike, labels: ArrayLike, bins: int = BINS) -> float:
    """Mean over the K classes of the ECE of "the label is k", probabilities [N, K], labels [N].

    Kull et al. (2019), eq. 3.
    """
    sums = class_statistics(probabilities, labels, bins=bins).sum(axis=0)
    return float(ece_classwise_from_sums(sums, bins))


def class_statistics(
    probabilities: ArrayLike,
    labels: ArrayLike,
    offered: ArrayLike | None = None,
    bins: int = BINS,
) -> Floats:
    """Additive statistics [N, K·3·bins]: for each class those of "the label is k", equal widths.

    Args:
        probabilities: [N, K], rows sum to 1.
        labels: [N] indices of the true class.
        offered: [N, K] whether the row has that class at all (questions differ in their number of
            options); a class that it lacks is no prediction of the row. All, by default.
    """
    rows = distributions("probabilities", probabilities)
    if rows.ndim != 2:
        raise ValueError(f"probabilities have shape {rows.shape}; [N, K] expected")
    truth = labels_of(labels, *rows.shape)
    mask = np.ones(rows.shape, dtype=bool) if offered is None else np.asarray(offered, dtype=bool)
    if mask.shape != rows.shape:
        raise ValueError(f"offered has shape {mask.shape}; {rows.shape} expected")
    blocks = []
    for k in range(rows.shape[1]):
        index = equal_width_index(rows[:, k], bins)
        blocks.append(bin_statistics(rows[:, k], truth == k, index, bins) * mask[:, [k]])
    return np.concatenate(blocks, axis=1)


def ece_classwise_from_sums(sums: ArrayLike, bins: int = BINS) -> Floats:
    """Classwise ECE [...] from summed `class_statistics` [..., K·3·bins]: mean over the classes.

    A class that no row has does not count.
    """
    errors = ece_from_sums(by_class(sums, bins))
    return _ratio(np.nansum(errors, axis=-1), np.isfinite(errors).sum(axis=-1).astype(np.float64))


def by_class(sums: ArrayLike, bins: int = BINS) -> Floats:
    """Summed `class_statistics` [..., K·3·bins] as [..., K, 3·bins]."""
    array = np.asarray(sums, dtype=np.float64)
    if array.ndim == 0 or array.shape[-1] % (3 * bins) != 0:
        raise ValueError(f"sums have shape {array.shape}; [..., classes·3·{bins}] expected")
    return array.reshape(*array.shape[:-1], -1, 3 * bins)


def reliability(
    confidences: ArrayLike,
    correct: ArrayLike,
    bins: int = BINS,
    clusters: ArrayLike | None = None,
) -> ReliabilityBins:
    """The equal-width bins of confidences [N] and correctness [N], for a reliability diagram.

    Args:
        confidences: [N] in [0, 1].
        correct: [N], 0 or 1.
        bins: how many.
        clusters: [N] names of what shares an image. With them the intervals come from resampling
            the clusters; without, they are a binomial's exact ones (Clopper and Pearson, 1934).
    """
    statistics = bin_statistics(confidences, correct, equal_width_index(confidences, bins), bins)
    counts, confidence, right = _blocks(statistics.sum(axis=0))
    if clusters is None:
        low, high = _binomial_band(right, counts)
    else:
        low, high = _cluster_band(statistics, clusters)
    empty = counts == 0
    return ReliabilityBins(
        edges=np.linspace(0.0, 1.0, bins + 1),
        counts=counts.astype(np.int64),
        confidence=_ratio(confidence, counts),
        accuracy=_ratio(right, counts),
        low=np.where(empty, np.nan, low),
        high=np.where(empty, np.nan, high),
    )


def _binomial_band(right: Floats, counts: Floats) -> tuple[Floats, Floats]:
    tail = (1.0 - LEVEL) / 2.0
    wrong = counts - right
    low = np.where(right > 0, beta.ppf(tail, np.maximum(right, 1), wrong + 1), 0.0)
    high = np.where(wrong > 0, beta.ppf(1.0 - tail, right + 1, np.maximum(wrong, 1)), 1.0)
    return low, high


def _cluster_band(statistics: Floats, clusters: ArrayLike) -> tuple[Floats, Floats]:
    sums, _ = cluster_sums(statistics, clusters)
    counts, _, right = _blocks(bootstrap_sums(sums))
    tail = (1.0 - LEVEL) / 2.0
    with np.errstate(invalid="ignore"):
        drawn = _ratio(right, counts)
        # A bin that a resample leaves empty has no accuracy there.
        known = np.isfinite(drawn).any(axis=0)
        ends = np.full((2, drawn.shape[1]), np.nan)
        ends[:, known] = np.nanquantile(drawn[:, known], (tail, 1.0 - tail), axis=0)
    return ends[0], ends[1]


def _checked(bins: int) -> int:
    if bins < 1:
        raise ValueError(f"bins must be 1 or more, not {bins}")
    return bins


def _index(confidence: Floats, inner_edges: Floats) -> Integers:
    return np.searchsorted(inner_edges, confidence, side="left").astype(np.int64)


def _sums(confidences: ArrayLike, correct: ArrayLike, index: Integers, bins: int) -> Floats:
    total: Floats = bin_statistics(confidences, correct, index, bins).sum(axis=0)
    return total


def _blocks(sums: ArrayLike) -> tuple[Floats, Floats, Floats]:
    array = np.asarray(sums, dtype=np.float64)
    if array.ndim == 0 or array.shape[-1] % 3 != 0:
        raise ValueError(f"sums have shape {array.shape}; [..., 3·bins] expected")
    counts, confidence, correct = np.split(array, 3, axis=-1)
    return counts, confidence, correct


def _ratio(part: Floats, whole: Floats) -> Floats:
    """`part / whole`, NaN where `whole` is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(whole > 0, part / whole, np.nan)
