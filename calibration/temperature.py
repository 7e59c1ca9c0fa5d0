"""Temperature scaling of option log-probabilities.

Source: Guo et al., On Calibration of Modern Neural Networks (ICML 2017), section 4.2, eq. 9: one
number T > 0, fitted on a held-out split by NLL, divides every logit; the ranking never changes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from cwdpo_bench.calibration._checks import Floats, Integers, labels_of

BOUNDS = (0.01, 100.0)
"""Where no finite T is best (all answers right: the sharper the better) the nearer bound is."""


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


def apply_temperature(log_probabilities: ArrayLike, temperature: float) -> Floats:
    """Probabilities [N, K] of softmax(log p / T); options at −inf get 0."""
    if not temperature > 0.0:
        raise ValueError(f"temperature must be above 0, not {temperature}")
    probabilities: Floats = np.exp(log_softmax(_scores(log_probabilities) / temperature, axis=1))
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
