"""Statistics that add up over samples, and the means that they give back.

Every function keeps one row a sample, so that clusters can be added and resampled; rows that do not
count for a metric hold zeros.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Integers = NDArray[np.int64]


def ratio(part: Floats, whole: Floats) -> Floats:
    """`part / whole`, NaN where `whole` is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(whole > 0, part / whole, np.nan)


def mean_of_sums(sums: Floats) -> Floats:
    """Sums [..., 2] of a quantity and of its count → mean."""
    return ratio(sums[..., 0], sums[..., 1])


def spread(values: Floats, rows: Bools) -> Floats:
    """Statistics [m, k] of the rows that count → [n, k], zero in the others."""
    spread = np.zeros((len(rows), values.shape[1]))
    spread[rows] = values
    return spread


def counted(values: Floats, rows: Bools) -> Floats:
    """Values [m] of the rows that count → [n, 2]: value and 1."""
    return spread(np.column_stack([values, np.ones(len(values))]), rows)


def present(samples: pd.DataFrame, column: str) -> Bools:
    """The rows [n] in which the column is not null."""
    return samples[column].notna().to_numpy(dtype=np.bool_)


def column_mean(column: str, samples: pd.DataFrame) -> Floats:
    """[n, 2] for the mean of a column of numbers over the rows that have one."""
    rows = present(samples, column)
    return counted(samples[column][rows].to_numpy(dtype=np.float64), rows)


def rectangle(lists: pd.Series, width: int) -> Floats:
    """A column of lists of one length as [n, width]."""
    return np.array([np.asarray(x, dtype=np.float64) for x in lists]).reshape(len(lists), width)


def ratio_or_zero(part: Floats, whole: Floats) -> Floats:
    """`part / whole`, 0 where `whole` is 0."""
    return np.nan_to_num(ratio(part, whole))
