"""Scores of choices from per-question columns: accuracies, and the calibration of the options.

Sources: Liu et al., MMBench (ECCV 2024) for circular accuracy; Brier (1950) in its form for several
classes; those of the calibration errors and of AURC stand in `cwdpo_bench.calibration`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
from scipy.special import logsumexp

from cwdpo_bench.calibration import bin_statistics, equal_mass_index
from cwdpo_bench.evaluate.sums import (
    Bools,
    Floats,
    Integers,
    column_mean,
    counted,
    present,
    spread,
)

Statistics = Callable[[pd.DataFrame], Floats]

AURC_BINS = 1000
"""AURC is exact up to so many samples; beyond, neighbours in confidence are ranked as ties."""


def circular_mean(column: str, samples: pd.DataFrame) -> Floats:
    """A question is right when every order of its options is; it counts once, on its first row."""
    if "shift" not in samples:
        return column_mean(column, samples)
    rows = present(samples, column)
    counting = samples[rows]
    right = counting[column].astype(bool).groupby(counting["cluster"]).transform("all")
    first = (~counting["cluster"].duplicated()).to_numpy(dtype=np.float64)
    return spread(np.column_stack([right.to_numpy(dtype=np.float64) * first, first]), rows)


def plain_mean(samples: pd.DataFrame) -> Floats:
    """[n, 2] for the accuracy in the benchmark's own order of the options."""
    first = samples["shift"].to_numpy() == 0
    return counted(samples["correct"][first].to_numpy(dtype=np.float64), first)


def failure_mean(samples: pd.DataFrame) -> Floats:
    """[n, 2] for the share of replies that could not be parsed."""
    failed = samples["parsed"].isna().to_numpy(dtype=np.float64)
    return np.column_stack([failed, np.ones(len(samples))])


def _options(samples: pd.DataFrame) -> tuple[Bools, Floats, Integers]:
    """The rows that have them [n], their log p over the options [m, K], the gold's index [m].

    Renormalised over the options of the row; −inf where a row has fewer than K.
    """
    rows = present(samples, "option_log_probabilities")
    lists = [np.asarray(x, np.float64) for x in samples["option_log_probabilities"][rows]]
    padded = np.full((len(lists), max(map(len, lists), default=1)), -np.inf)
    for row, values in zip(padded, lists, strict=True):
        row[: len(values)] = values
    logps = padded - logsumexp(padded, axis=1, keepdims=True) if lists else padded
    gold = np.array([ord(letter) - ord("A") for letter in samples["gold"][rows]], dtype=np.int64)
    return rows, logps, gold


def option_scores(score: Callable[[Floats, Integers], Floats]) -> Statistics:
    """The mean over questions of a score of (log p over the options [m, K], gold [m])."""

    def statistics(samples: pd.DataFrame) -> Floats:
        rows, logps, gold = _options(samples)
        return counted(score(logps, gold), rows)

    return statistics


def brier(logps: Floats, gold: Integers) -> Floats:
    """Sum over the options of the squared error: 0 to 2."""
    errors = np.exp(logps)
    errors[np.arange(len(gold)), gold] -= 1.0
    scores: Floats = (errors**2).sum(axis=1)
    return scores


def nll(logps: Floats, gold: Integers) -> Floats:
    """In nats."""
    return -logps[np.arange(len(gold)), gold]


def entropy(logps: Floats, _: Integers) -> Floats:
    """In nats; an option with probability 0 adds nothing."""
    scores: Floats = -(np.exp(logps) * np.where(np.isneginf(logps), 0.0, logps)).sum(axis=1)
    return scores


def top_1(logps: Floats, _: Integers) -> Floats:
    """The largest probability over the options."""
    scores: Floats = np.exp(logps.max(axis=1))
    return scores


def _confidences(samples: pd.DataFrame) -> tuple[Bools, Floats, Bools]:
    rows, logps, gold = _options(samples)
    return rows, np.clip(np.exp(logps.max(axis=1)), 0.0, 1.0), logps.argmax(axis=1) == gold


def binned(index_of: Callable[[Floats], Integers], samples: pd.DataFrame) -> Floats:
    """[n, 3·bins] for the calibration errors in the bins that `index_of` puts confidences in.

    Edges that depend on the data are those of the whole sample: the bootstrap resamples the sums of
    these bins and does not move the edges.
    """
    rows, confidence, correct = _confidences(samples)
    return spread(bin_statistics(confidence, correct, index_of(confidence)), rows)


def aurc_statistics(samples: pd.DataFrame) -> Floats:
    """[n, 2·bins]: count and errors in bins of falling confidence, a bin a value where it fits."""
    rows, confidence, correct = _confidences(samples)
    distinct = len(np.unique(confidence))
    if distinct > AURC_BINS:
        index, bins = equal_mass_index(confidence, AURC_BINS), AURC_BINS
    else:
        index, bins = np.unique(confidence, return_inverse=True)[1], distinct
    statistics = np.zeros((len(confidence), 2, bins))
    places = (np.arange(len(confidence)), slice(None), bins - 1 - index)
    statistics[places] = np.column_stack([np.ones(len(confidence)), ~correct])
    return spread(statistics.reshape(len(confidence), 2 * bins), rows)
