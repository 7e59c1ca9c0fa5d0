"""How far one distribution has moved from another: total variation and Jensen-Shannon.

Sources: SPEC 2; Lin, Divergence Measures Based on the Shannon Entropy (1991), eq. 3.4 with equal
weights. In nats, so that Jensen-Shannon reaches ln 2 where the supports do not meet.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from cwdpo_bench.calibration._checks import Floats, distributions


def total_variation(p: ArrayLike, q: ArrayLike) -> Floats:
    """½ Σ_k |p_k − q_k| over the last axis of [..., K], in [0, 1]."""
    first, second = _same_shape(p, q)
    each: Floats = np.minimum(0.5 * np.abs(first - second).sum(axis=-1), 1.0)
    return each


def jensen_shannon(p: ArrayLike, q: ArrayLike) -> Floats:
    """½ KL(p‖m) + ½ KL(q‖m) with m = (p + q)/2, over the last axis of [..., K], in [0, ln 2]."""
    first, second = _same_shape(p, q)
    middle = 0.5 * (first + second)
    divergence = 0.5 * (_relative_entropy(first, middle) + _relative_entropy(second, middle))
    # Rounding may step over either bound by an ulp.
    return np.clip(divergence, 0.0, np.log(2.0))


def _relative_entropy(p: Floats, m: Floats) -> Floats:
    ratio = np.where(p > 0.0, p, 1.0) / np.where(p > 0.0, m, 1.0)
    each: Floats = (p * np.log(ratio)).sum(axis=-1)
    return each


def _same_shape(p: ArrayLike, q: ArrayLike) -> tuple[Floats, Floats]:
    first, second = distributions("p", p), distributions("q", q)
    if first.shape != second.shape:
        raise ValueError(f"p has shape {first.shape} and q {second.shape}; they must agree")
    return first, second
