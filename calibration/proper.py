"""Proper scores and entropy of class probabilities.

Sources: Brier, Verification of Forecasts Expressed in Terms of Probability (1950), in its original
form over all classes; Gneiting and Raftery, Strictly Proper Scoring Rules (JASA 2007), for both.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from cwdpo_bench.calibration._checks import Floats, Integers, distributions, labels_of


def brier(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Mean over samples of Σ_k (p_k − [k = label])², in [0, 2].

    The sum over all K classes: for two classes it is twice the one-sided score of scikit-learn's
    `brier_score_loss` on the positive class.

    Args:
        probabilities: [N, K], rows sum to 1; a class that a row lacks has probability 0.
        labels: [N] indices of the true class.
    """
    rows, truth = _rows_and_labels(probabilities, labels)
    target = np.zeros_like(rows)
    target[np.arange(len(rows)), truth] = 1.0
    return float(((rows - target) ** 2).sum(axis=1).mean())


def nll(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Mean negative log-probability of the true class, nats; arguments as `brier`.

    Raises:
        ValueError: a true class has probability 0, so the score is infinite.
    """
    rows, truth = _rows_and_labels(probabilities, labels)
    chosen = rows[np.arange(len(rows)), truth]
    if chosen.min() == 0.0:
        first = int(np.argmin(chosen))
        raise ValueError(f"probabilities: the true class of sample {first} has 0; nll is infinite")
    return float(-np.log(chosen).mean())


def entropy(probabilities: ArrayLike) -> Floats:
    """−Σ_k p_k log p_k over the last axis of [..., K], nats, in [0, ln K]."""
    rows = distributions("probabilities", probabilities)
    logs = np.log(np.where(rows > 0.0, rows, 1.0))
    each: Floats = np.maximum(-(rows * logs).sum(axis=-1), 0.0)
    return each


def _rows_and_labels(probabilities: ArrayLike, labels: ArrayLike) -> tuple[Floats, Integers]:
    rows = distributions("probabilities", probabilities)
    if rows.ndim != 2:
        raise ValueError(f"probabilities have shape {rows.shape}; [N, K] expected")
    return rows, labels_of(labels, *rows.shape)
