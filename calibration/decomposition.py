"""The Brier score taken apart: calibration, sharpness, and what the task itself leaves open.

In bins of the probability given to a class, with n_b predictions, mean probability p_b and share
right o_b: reliability Σ (n_b/N)(p_b − o_b)², resolution Σ (n_b/N)(o_b − o)², uncertainty o(1 − o),
each summed over the classes. Binning loses what varies within a bin; that is kept as its own term,
so that Brier = reliability − resolution + uncertainty + within exactly.

Sources: Murphy, A New Vector Partition of the Probability Score (1973); Stephenson, Coelho and
Jolliffe, Two Extra Components in the Brier Score Decomposition (2008), for the terms within bins.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from cwdpo_bench.calibration._checks import Floats
from cwdpo_bench.calibration.binned import BINS, by_class, class_statistics
from cwdpo_bench.calibration.proper import brier


class BrierParts(NamedTuple):
    """Brier = reliability − resolution + uncertainty + within.

    Attributes:
        reliability: how far probabilities are from the shares; 0 is perfectly calibrated.
        resolution: how far the shares of the bins are from each other; more is better.
        uncertainty: of the classes themselves, whatever is predicted.
        within: what the bins hide; 0 where all probabilities of a bin are equal.
    """

    reliability: float
    resolution: float
    uncertainty: float
    within: float


def brier_decomposition(
    probabilities: ArrayLike, labels: ArrayLike, bins: int = BINS
) -> BrierParts:
    """The parts of `brier` of probabilities [N, K] and labels [N], in equal-width bins."""
    sums = class_statistics(probabilities, labels, bins=bins).sum(axis=0)
    parts = [float(part(sums, bins)) for part in (reliability_part, resolution_part)]
    uncertainty = float(uncertainty_part(sums, bins))
    within = brier(probabilities, labels) - (parts[0] - parts[1] + uncertainty)
    return BrierParts(parts[0], parts[1], uncertainty, within)


def reliability_part(sums: ArrayLike, bins: int = BINS) -> Floats:
    """Reliability [...] from summed `class_statistics` [..., K·3·bins]; NaN where none counts."""
    counts, confidence, right = _of_classes(sums, bins)
    return _over_rows(_square_over(confidence - right, counts).sum(axis=(-2, -1)), counts)


def resolution_part(sums: ArrayLike, bins: int = BINS) -> Floats:
    """Resolution [...] from summed `class_statistics` [..., K·3·bins]; NaN where none counts."""
    counts, _, right = _of_classes(sums, bins)
    between = _square_over(right, counts).sum(axis=-1)
    overall = _square_over(right.sum(axis=-1), counts.sum(axis=-1))
    # Equal shares may differ by rounding, to either side.
    return _over_rows(np.maximum((between - overall).sum(axis=-1), 0.0), counts)


def uncertainty_part(sums: ArrayLike, bins: int = BINS) -> Floats:
    """Uncertainty [...] from summed `class_statistics` [..., K·3·bins]; NaN where none counts."""
    counts, _, right = _of_classes(sums, bins)
    total, whole = right.sum(axis=-1), counts.sum(axis=-1)
    return _over_rows((total - _square_over(total, whole)).sum(axis=-1), counts)


def _of_classes(sums: ArrayLike, bins: int) -> tuple[Floats, Floats, Floats]:
    """Counts, confidences and right ones, each [..., K, bins]."""
    counts, confidence, right = np.split(by_class(sums, bins), 3, axis=-1)
    return counts, confidence, right


def _square_over(value: Floats, counts: Floats) -> Floats:
    """value² / counts, 0 where nothing was counted."""
    return np.where(counts > 0, value**2 / np.maximum(counts, 1e-300), 0.0)


def _over_rows(total: Floats, counts: Floats) -> Floats:
    """Per row; every row offers the first class."""
    rows = counts[..., 0, :].sum(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(rows > 0, total / rows, np.nan)
