"""Input checks that the room shares: every function here returns clean float64 or int64 arrays.

Bad input is a ValueError in the caller's words: a NaN that slips into a sum makes every later
number NaN, and a probability of 1.2 makes a plausible wrong one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

SUM_TOLERANCE = 1e-4
"""How far a row of probabilities may be from 1: softmax in fp32 is 1e-6 off, in bf16 worse."""


def finite_array(name: str, values: ArrayLike, dimensions: int) -> Floats:
    """`values` as a non-empty float64 array of that many dimensions without NaN or infinity."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != dimensions:
        raise ValueError(f"{name} has shape {array.shape}; {dimensions} dimension(s) expected")
    if array.size == 0:
        raise ValueError(f"{name} is empty (shape {array.shape}); at least one sample is needed")
    if not np.isfinite(array).all():
        first = np.argwhere(~np.isfinite(array))[0].tolist()
        raise ValueError(f"{name} holds a NaN or an infinity at index {first}")
    return array


def unit_interval(name: str, values: ArrayLike, dimensions: int) -> Floats:
    """`values` as finite numbers in [0, 1]."""
    array = finite_array(name, values, dimensions)
    if array.min() < 0.0 or array.max() > 1.0:
        raise ValueError(
            f"{name} must lie in [0, 1]; it reaches from {array.min():g} to {array.max():g}"
        )
    return array


def distributions(name: str, values: ArrayLike) -> Floats:
    """`values` [..., K] as rows of probabilities that sum to 1 within `SUM_TOLERANCE`."""
    array = np.asarray(values, dtype=np.float64)
    array = unit_interval(name, array, max(array.ndim, 1))
    off = np.abs(array.sum(axis=-1) - 1.0).max()
    if off > SUM_TOLERANCE:
        raise ValueError(f"{name}: every row must sum to 1; one is off by {off:.3g}")
    return array


def correctness(correct: ArrayLike) -> Floats:
    """Correctness [N] as 0.0 or 1.0."""
    right = finite_array("correct", correct, 1)
    if not np.isin(right, (0.0, 1.0)).all():
        raise ValueError("correct must hold only 0 and 1 (or False and True)")
    return right


def confidence_pair(confidences: ArrayLike, correct: ArrayLike) -> tuple[Floats, Floats]:
    """Confidences [N] in [0, 1] and correctness [N] as 0.0 or 1.0."""
    confidence, right = unit_interval("confidences", confidences, 1), correctness(correct)
    if confidence.shape != right.shape:
        raise ValueError(f"confidences {confidence.shape} and correct {right.shape} must agree")
    return confidence, right


def labels_of(labels: ArrayLike, rows: int, classes: int) -> Integers:
    """Class indices [N] in [0, K)."""
    raw = np.asarray(labels)
    if raw.shape != (rows,):
        raise ValueError(f"labels have shape {raw.shape}; ({rows},) expected, one a row")
    index = raw.astype(np.int64)
    if not np.array_equal(index, raw):
        raise ValueError("labels must be whole numbers, the index of the true class")
    if index.min() < 0 or index.max() >= classes:
        raise ValueError(
            f"labels must lie in [0, {classes}); they reach from {index.min()} to {index.max()}"
        )
    return index
