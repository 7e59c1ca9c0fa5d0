"""Tests, intervals and power as closed forms: numbers in, numbers out.

Sources: McNemar (1947) in its exact form (Dietterich, Approximate Statistical Tests, 1998); Wilson
(1927) for shares; Holm, A Simple Sequentially Rejective Multiple Test Procedure (1979); Cohen,
Statistical Power Analysis (1988), for the standardised paired difference and for power. When not to
trust each: docs/STATISTICS.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import binom, norm

POWER = 0.8
"""The chance with which a difference that is called detectable would be found."""


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: reject at level α where the adjusted p is at most α.

    Args:
        p_values: of one family of tests, in any order.

    Returns:
        Adjusted p values in the same order, each at most 1.
    """
    size = len(p_values)
    order = np.argsort(p_values, kind="stable")
    steps = np.asarray(p_values, dtype=np.float64)[order] * np.arange(size, 0, -1)
    adjusted = np.empty(size)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return [float(p) for p in adjusted]


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Two-sided exact p of McNemar's test.

    Under "both are right equally often" each question that exactly one of the two answered rightly
    is a fair coin; questions that both got right, or both wrong, say nothing.

    Args:
        only_first: questions that the first answered rightly and the second did not.
        only_second: the reverse.
    """
    discordant = only_first + only_second
    if discordant == 0:
        return 1.0
    tail = float(binom.cdf(min(only_first, only_second), discordant, 0.5))
    return min(1.0, 2.0 * tail)


def wilson_interval(hits: float, count: float, level: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a share: honest near 0 and 1, where resampling gives a point.

    Raises:
        ValueError: `count` is not positive, `hits` not within 0..count, or `level` not in (0, 1).
    """
    if not (count > 0 and 0 <= hits <= count and 0.0 < level < 1.0):
        raise ValueError(f"no share: {hits} of {count} at level {level}")
    z = _quantile(0.5 + level / 2)
    share = hits / count
    centre = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    # At the ends of the scale the bound is the end itself, whatever the rounding says.
    low = 0.0 if hits == 0 else (centre - half) / scale
    high = 1.0 if hits == count else (centre + half) / scale
    return low, high


def standardised(difference: float, stderr: float, clusters: int) -> float | None:
    """Cohen's d_z: the difference in units of its standard deviation over clusters.

    `stderr·√clusters` is that standard deviation also for corpus metrics, which have no value a
    cluster. None where nothing varies.
    """
    spread = stderr * math.sqrt(clusters)
    return difference / spread if spread > 0 else None


def detectable(stderr: float, level: float, power: float = POWER, *, sided: int = 2) -> float:
    """The smallest true difference that a test at `level` finds with chance `power`.

    (z_{1 − level/sided} + z_power) · stderr, from the normal law.
    """
    return (_quantile(1 - level / sided) + _quantile(power)) * stderr


def samples_needed(clusters: int, detectable_now: float, wanted: float) -> int:
    """How many clusters bring the detectable difference down to `wanted`; it falls with √n.

    Raises:
        ValueError: `wanted` is not positive.
    """
    if wanted <= 0:
        raise ValueError(f"the wanted difference must be positive, not {wanted}")
    return max(clusters, math.ceil(clusters * (detectable_now / wanted) ** 2))


def _quantile(p: float) -> float:
    return float(norm.ppf(p))
