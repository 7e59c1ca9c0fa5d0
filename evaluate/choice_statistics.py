"""Scores of choices from per-question columns: accuracies, and the calibration of the options.

Sources: Liu et al., MMBench (ECCV 2024) for circular accuracy; Brier (1950) in its form for several
classes; Zheng et al., Large Language Models Are Not Robust Multiple Choice Selectors (ICLR 2024),
for the spread of recalls; those of the calibration errors and of AURC stand in
`cwdpo_bench.calibration`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
from scipy.special import logsumexp

from cwdpo_bench.calibration import BINS, bin_statistics, class_statistics, equal_mass_index
from cwdpo_bench.calibration.temperature import pad_options
from cwdpo_bench.evaluate.sums import (
    Bools,
    Floats,
    Integers,
    column_mean,
    counted,
    present,
    ratio,
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


def yes_statistics(samples: pd.DataFrame) -> Floats:
    """[n, 4]: said yes rightly, said yes wrongly, a yes not said, and 1."""
    said = samples["said_yes"].to_numpy(dtype=np.bool_)
    true = (samples["gold"] == "A").to_numpy(dtype=np.bool_)
    columns = (said & true, said & ~true, ~said & true, np.ones(len(samples)))
    return np.column_stack(columns).astype(np.float64)


def precision_of_sums(sums: Floats) -> Floats:
    """Of what was answered with yes, the share that is there; NaN where nothing was."""
    return ratio(sums[..., 0], sums[..., 0] + sums[..., 1])


def recall_of_sums(sums: Floats) -> Floats:
    """Of what is there, the share that was answered with yes."""
    return ratio(sums[..., 0], sums[..., 0] + sums[..., 2])


def f1_of_sums(sums: Floats) -> Floats:
    """The harmonic mean of precision and recall."""
    return ratio(2 * sums[..., 0], 2 * sums[..., 0] + sums[..., 1] + sums[..., 2])


def yes_share_of_sums(sums: Floats) -> Floats:
    """How often yes was the answer; half of POPE's questions are to be answered so."""
    return ratio(sums[..., 0] + sums[..., 1], sums[..., 3])


def _options(samples: pd.DataFrame) -> tuple[Bools, Floats, Integers]:
    """The rows that have them [n], their log p over the options [m, K], the gold's index [m].

    Renormalised over the options of the row; −inf where a row has fewer than K.
    """
    rows = present(samples, "option_log_probabilities")
    padded = pad_options(list(samples["option_log_probabilities"][rows]))
    logps = padded - logsumexp(padded, axis=1, keepdims=True) if rows.any() else padded
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


def offered_options(samples: pd.DataFrame) -> Floats:
    """[n, K·3·bins] for what is computed option by option: "the answer is letter k"."""
    rows, logps, gold = _options(samples)
    if not rows.any():
        return np.zeros((len(samples), 3 * BINS))
    probabilities = np.exp(logps)
    return spread(class_statistics(probabilities, gold, np.isfinite(logps)), rows)


def option_mass(samples: pd.DataFrame) -> Floats:
    """[n, 2] for the mean probability that the whole vocabulary leaves to the option letters."""
    rows = present(samples, "option_log_probabilities")
    lists = samples["option_log_probabilities"][rows]
    return counted(np.array([np.exp(np.asarray(x)).sum() for x in lists]), rows)


def after_temperature(statistics: Statistics) -> Statistics:
    """The statistics of the options' log-probabilities over the row's held-out temperature."""

    def scaled(samples: pd.DataFrame) -> Floats:
        lists = [
            None if logps is None else np.asarray(logps, np.float64) / temperature
            for logps, temperature in zip(
                samples["option_log_probabilities"], samples["temperature"], strict=True
            )
        ]
        return statistics(_with_options(samples, lists))

    return scaled


def over_shifts(statistics: Statistics) -> Statistics:
    """The statistics of a question's mean probabilities over all orders of its options.

    The question counts once, on the row of the benchmark's own order.
    """

    def averaged(samples: pd.DataFrame) -> Floats:
        lists: list[np.ndarray | None] = [None] * len(samples)
        rows, logps, _ = _options(samples)
        known = np.flatnonzero(rows)
        shifts = samples["shift"].to_numpy()
        means: dict[str, list[np.ndarray]] = {}
        for place, own in zip(known, logps, strict=True):
            options = np.exp(own[np.isfinite(own)])
            # Shift s shows option i at place i − s.
            own_order = np.roll(options, int(shifts[place]))
            means.setdefault(samples["cluster"].iloc[place], []).append(own_order)
        for place in known[shifts[known] == 0]:
            every = means[samples["cluster"].iloc[place]]
            # 0 has no logarithm; it stands for a probability below what fp64 tells.
            lists[place] = np.log(np.maximum(np.mean(every, axis=0), 1e-300))
        return statistics(_with_options(samples, lists))

    return averaged


def _with_options(samples: pd.DataFrame, lists: list[np.ndarray | None]) -> pd.DataFrame:
    return samples.assign(
        option_log_probabilities=pd.Series(lists, index=samples.index, dtype=object)
    )


def correct_option(logps: Floats, gold: Integers) -> Floats:
    """1 where the most probable option is the right one."""
    scores: Floats = (logps.argmax(axis=1) == gold).astype(np.float64)
    return scores


def letter_excess(samples: pd.DataFrame) -> Floats:
    """[n, K + 1]: the probability of each letter above its equal share, and 1."""
    rows, logps, _ = _options(samples)
    offered = np.isfinite(logps)
    shares = offered / np.maximum(offered.sum(axis=1, keepdims=True), 1)
    return spread(np.column_stack([np.exp(logps) - shares, np.ones(len(logps))]), rows)


def order_bias_of_sums(sums: Floats) -> Floats:
    """½ Σ_letter |mean excess|: total variation between the letters' mean odds and equal ones.

    Over all circular orders each option stands at each letter once, so a model that reads the
    options and not their places has 0; one that always takes the same letter of K, 1 − 1/K.
    """
    return ratio(0.5 * np.abs(sums[..., :-1]).sum(axis=-1), sums[..., -1])


def letter_recall(samples: pd.DataFrame) -> Floats:
    """[n, 2·K]: a block of hits and one of questions by the gold's letter."""
    rows, logps, gold = _options(samples)
    letters = np.eye(logps.shape[1])[gold]
    hits = letters * (logps.argmax(axis=1) == gold)[:, None]
    return spread(np.concatenate([hits, letters], axis=1), rows)


def recall_spread_of_sums(sums: Floats) -> Floats:
    """Standard deviation of the recalls of the letters (Zheng et al., ICLR 2024, RStd), in [0, ½].

    Over the letters that are the answer somewhere.
    """
    hits, questions = np.split(sums, 2, axis=-1)
    recalls = ratio(hits, questions)
    known = np.isfinite(recalls)
    count = np.maximum(known.sum(axis=-1), 1)
    mean = np.where(known, recalls, 0.0).sum(axis=-1) / count
    squares = np.where(known, (recalls - mean[..., None]) ** 2, 0.0).sum(axis=-1) / count
    return np.where(known.any(axis=-1), np.sqrt(squares), np.nan)


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
