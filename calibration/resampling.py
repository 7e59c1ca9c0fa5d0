"""Bootstrap over clusters, on statistics that add up over samples.

A corpus metric here is a function of sums (BLEU of matches and guesses, accuracy of hits and
questions), so a resample is one product of a count matrix with the sums of each cluster: nothing is
scored again. Clusters (all questions on one image, all circular shifts of one question) are drawn
whole, because samples that share an image are not independent.

Sources: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 8 (clusters), 13
(percentile interval); Koehn, Statistical Significance Tests for MT Evaluation (EMNLP 2004) for the
paired form; the +1 of the p value is Davison and Hinkley (1997), eq. 4.11.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cwdpo_bench.calibration._checks import Floats, finite_array

RESAMPLES = 1000
LEVEL = 0.95
CHUNK = 2**22
"""Drawn indices that exist at a time: 32 MiB."""


def cluster_sums(statistics: ArrayLike, clusters: ArrayLike) -> tuple[Floats, NDArray[np.str_]]:
    """Add the statistics of the samples of each cluster.

    Args:
        statistics: [N, k], additive over samples.
        clusters: [N] cluster names (read as strings).

    Returns:
        Sums [C, k] and the C cluster names, sorted: two runs on the same clusters agree row by row
        whatever the order of their samples.

    Raises:
        ValueError: a NaN, an empty array, or lengths that differ.
    """
    values = finite_array("statistics", statistics, 2)
    names = np.asarray(clusters).astype(str)
    if names.shape != (len(values),):
        raise ValueError(f"clusters have shape {names.shape}; ({len(values)},) expected")
    ids, inverse = np.unique(names, return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    starts = np.searchsorted(inverse[order], np.arange(len(ids)))
    return np.add.reduceat(values[order], starts, axis=0), ids


def bootstrap_counts(size: int, resamples: int = RESAMPLES, seed: int = 0) -> Iterator[Floats]:
    """Draw `size` clusters with replacement, `resamples` times.

    The draws depend on the three arguments alone, so two systems scored on the same clusters share
    them: a paired bootstrap.

    Yields:
        How often each cluster was drawn, [r, size] at a time, `resamples` rows in all.
    """
    if resamples < 1 or size < 1:
        raise ValueError(f"resamples and size must be 1 or more, not {resamples} and {size}")
    generator = np.random.default_rng(seed)
    rows_at_a_time = max(1, CHUNK // size)
    for start in range(0, resamples, rows_at_a_time):
        rows = min(rows_at_a_time, resamples - start)
        # Counted indices follow the multinomial law at a fraction of Generator.multinomial's cost.
        drawn = generator.integers(0, size, size=(rows, size))
        drawn += np.arange(rows)[:, None] * size
        counts = np.bincount(drawn.ravel(), minlength=rows * size)
        yield counts.reshape(rows, size).astype(np.float64)


def bootstrap_sums(sums: ArrayLike, resamples: int = RESAMPLES, seed: int = 0) -> Floats:
    """The sums of each resample of `bootstrap_counts`.

    The statistics of several metrics can stand side by side, to be drawn once.

    Args:
        sums: [C, k], as `cluster_sums` gives them.

    Returns:
        [resamples, k].
    """
    values = finite_array("sums", sums, 2)
    return np.concatenate([c @ values for c in bootstrap_counts(len(values), resamples, seed)])


class Estimate(NamedTuple):
    """A figure and how sure it is: standard error and the ends of its 95 % interval."""

    value: float
    stderr: float
    low: float
    high: float


def bootstrap_estimate(
    statistics: ArrayLike,
    value: Callable[[Floats], ArrayLike],
    clusters: ArrayLike | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """A figure with its interval, the clusters drawn with replacement.

    Args:
        statistics: [N, k], additive over samples: `bin_statistics`, `class_statistics`, or any sums
            that `value` reads.
        value: sums [..., k] → the figure [...]: `ece_from_sums`, …
        clusters: [N] names of what shares an image; every sample its own, by default.
        resamples: how often.
        seed: of the draws.
    """
    rows = finite_array("statistics", statistics, 2)
    names = np.arange(len(rows)) if clusters is None else clusters
    sums, _ = cluster_sums(rows, names)
    drawn = np.asarray(value(bootstrap_sums(sums, resamples, seed)))
    low, high = percentile_interval(drawn)
    return Estimate(float(np.asarray(value(sums.sum(axis=0)))), bootstrap_stderr(drawn), low, high)


def percentile_interval(values: ArrayLike, level: float = LEVEL) -> tuple[float, float]:
    """The central interval that holds `level` of the resampled values [R].

    A resample in which the metric is undefined (NaN: it drew no sample that counts) is left out.

    Raises:
        ValueError: no resample is defined, or `level` is not in (0, 1).
    """
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must lie in (0, 1), not {level}")
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(_defined(values), (tail, 1.0 - tail))
    return float(low), float(high)


def bootstrap_stderr(values: ArrayLike) -> float:
    """Standard error: the standard deviation of the resampled values [R] that are defined."""
    defined = _defined(values)
    return float(defined.std(ddof=1)) if len(defined) > 1 else 0.0


def paired_p_value(differences: ArrayLike) -> float:
    """Two-sided bootstrap p of "no difference": 2·min(share ≤ 0, share ≥ 0), at most 1.

    Args:
        differences: [R], candidate − baseline in each shared resample.

    One is added to both counts, because R resamples cannot show a p below 2/(R + 1).
    """
    defined = _defined(differences)
    below = 1 + int((defined <= 0).sum())
    above = 1 + int((defined >= 0).sum())
    return min(1.0, 2.0 * min(below, above) / (len(defined) + 1))


def _defined(values: ArrayLike) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"resampled values have shape {array.shape}; [R] expected")
    defined = array[np.isfinite(array)]
    if len(defined) == 0:
        raise ValueError("the metric is undefined in every resample")
    return defined
