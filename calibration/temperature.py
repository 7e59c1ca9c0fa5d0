"""Temperature scaling of option log-probabilities.

Source: Guo et al., On Calibration of Modern Neural Networks (ICML 2017), section 4.2, eq. 9: one
number T > 0, fitted on a held-out split by NLL, divides every logit; the ranking never changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from cwdpo_bench.calibration._checks import Floats, Integers, labels_of

BOUNDS = (0.01, 100.0)
"""Where no finite T is best (all answers right: the sharper the better) the nearer bound is."""


def pad_options(rows: Sequence[ArrayLike]) -> Floats:
    """[N, K] of log-probabilities of up to K options a row, −inf where a row has fewer."""
    arrays = [np.asarray(row, dtype=np.float64) for row in rows]
    padded = np.full((len(arrays), max(map(len, arrays), default=1)), -np.inf)
    for row, values in zip(padded, arrays, strict=True):
        row[: len(values)] = values
    return padded


def fit_temperature(log_probabilities: ArrayLike, labels: ArrayLike) -> float:
    """The T in `BOUNDS` that minimises the NLL of softmax(log p / T) on a held-out split.

    Args:
        log_probabilities: [N, K] of the options, up to a constant a row; −inf marks an option
            that a question lacks.
        labels: [N] index of the true option.

    Raises:
        ValueError: a NaN, a true option at −inf, or labels that do not fit.
    """
    scores = _scores(log_probabilities)
    truth = labels_of(labels, *scores.shape)
    if not np.isfinite(scores[np.arange(len(scores)), truth]).all():
        raise ValueError("log_probabilities: a true option is -inf; no temperature can mend that")
    # NLL is convex in 1/T, so it has one minimum in log T too; the logarithm evens out the steps.
    best = minimize_scalar(
        lambda log_t: _mean_nll(scores, truth, float(np.exp(log_t))),
        bounds=tuple(np.log(BOUNDS)),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return float(np.exp(best.x))


def cross_fit_temperature(
    log_probabilities: ArrayLike, labels: ArrayLike, clusters: ArrayLike
) -> Floats:
    """A temperature a row [N], fitted without the row's own half of the clusters.

    The clusters are halved; the temperature that is fitted on one half is for the other, so every
    row has one that has not seen it, nor anything else on its image. The halves depend on the names
    of the clusters alone, not on the order of the rows.

    Args:
        log_probabilities: as `fit_temperature` takes them.
        labels: [N] index of the true option.
        clusters: [N] names of what shares an image.

    Raises:
        ValueError: as `fit_temperature`, or there are fewer than two clusters.
    """
    scores = _scores(log_probabilities)
    truth = labels_of(labels, *scores.shape)
    names = np.asarray(clusters).astype(str)
    if names.shape != (len(scores),):
        raise ValueError(f"clusters have shape {names.shape}; ({len(scores)},) expected")
    # By hash: sorted by name a half would hold the first subjects, or the oldest images.
    ordered = sorted(set(names.tolist()), key=lambda name: sha256(name.encode()).digest())
    if len(ordered) < 2:
        raise ValueError("a held-out fit needs two clusters or more")
    second = np.isin(names, ordered[len(ordered) // 2 :])
    temperatures = np.empty(len(scores))
    for half in (second, ~second):
        temperatures[half] = fit_temperature(scores[~half], truth[~half])
    return temperatures


def apply_temperature(log_probabilities: ArrayLike, temperature: ArrayLike) -> Floats:
    """Probabilities [N, K] of softmax(log p / T); options at −inf get 0.

    Args:
        log_probabilities: [N, K] of the options.
        temperature: one above 0, or one a row [N].
    """
    scores, divisor = _scores(log_probabilities), np.asarray(temperature, dtype=np.float64)
    if not (divisor > 0.0).all():
        raise ValueError(f"temperature must be above 0, not {temperature!r}")
    if divisor.shape not in ((), (len(scores),)):
        raise ValueError(
            f"temperature has shape {divisor.shape}; one, or ({len(scores)},) expected"
        )
    probabilities: Floats = np.exp(log_softmax(scores / divisor.reshape(-1, 1), axis=1))
    return probabilities


def _mean_nll(scores: Floats, truth: Integers, temperature: float) -> float:
    logs = log_softmax(scores / temperature, axis=1)
    return float(-logs[np.arange(len(scores)), truth].mean())


def _scores(log_probabilities: ArrayLike) -> Floats:
    scores = np.asarray(log_probabilities, dtype=np.float64)
    if scores.ndim != 2 or scores.size == 0:
        raise ValueError(f"log_probabilities have shape {scores.shape}; [N, K] expected")
    if np.isnan(scores).any() or np.isposinf(scores).any():
        raise ValueError("log_probabilities hold a NaN or +infinity")
    if np.isneginf(scores).all(axis=1).any():
        raise ValueError("log_probabilities: a row has no finite option")
    return scores
