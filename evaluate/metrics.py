"""The one rule by which a metric is recomposed from the per-sample columns of a run.

A metric is a function of statistics that add up over samples: BLEU of matches, guesses and lengths,
accuracy of hits and questions, ECE of three sums a bin. So `value(statistics(samples).sum(0))` is
the corpus value of the official scorer, and a bootstrap resamples the same sums without scoring
anything again.

Sources: pycocoevalcap 1.2 for BLEU's constants; METEOR 1.5 (Denkowski and Lavie, WMT 2014), whose
English parameters stand below; Liu et al., MMBench (ECCV 2024) for circular accuracy; Geifman and
El-Yaniv (NeurIPS 2017) for AURC; the calibration errors are those of `cwdpo_bench.calibration`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import digamma, logsumexp

from cwdpo_bench.calibration import (
    BINS,
    bin_statistics,
    ece_debiased_from_sums,
    ece_from_sums,
    equal_mass_index,
    equal_width_index,
    mce_from_sums,
)

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

AURC_BINS = 1000
"""AURC is exact up to so many samples; beyond, neighbours in confidence are ranked as ties."""


@dataclass(frozen=True)
class Metric:
    """How one metric is recomposed.

    Attributes:
        name: as it stands in `results.json`.
        higher_is_better: None where neither way is better by itself (entropy).
        columns: the sample columns that it needs; a row whose first one is null does not count.
        statistics: samples [n rows] → [n, k], additive over samples; k may depend on the samples.
        value: sums [..., k] → [...]; NaN where no row counts.
        token_columns: the columns in their place on captions, where the unit is a token.
    """

    name: str
    higher_is_better: bool | None
    columns: tuple[str, ...]
    statistics: Callable[[pd.DataFrame], Floats]
    value: Callable[[Floats], Floats]
    token_columns: tuple[str, ...] = ()

    def applies_to(self, samples: pd.DataFrame) -> bool:
        """Whether the columns are there and at least one row counts."""
        return _has(samples, self.columns) or _has(samples, self.token_columns)


def metric_names_for(samples: pd.DataFrame) -> list[str]:
    """The metrics that can be computed from these samples, in the order of `METRICS`."""
    return [name for name, metric in METRICS.items() if metric.applies_to(samples)]


def _has(samples: pd.DataFrame, columns: tuple[str, ...]) -> bool:
    there = bool(columns) and all(column in samples for column in columns)
    return there and bool(samples[columns[0]].notna().any())


# --- means ---------------------------------------------------------------------------------------


def _ratio(part: Floats, whole: Floats) -> Floats:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(whole > 0, part / whole, np.nan)


def _mean_of_sums(sums: Floats) -> Floats:
    """Sums [..., 2] of a quantity and of its count → mean."""
    return _ratio(sums[..., 0], sums[..., 1])


def _spread(values: Floats, rows: Bools) -> Floats:
    """Statistics [m, k] of the rows that count → [n, k], zero in the others."""
    spread = np.zeros((len(rows), values.shape[1]))
    spread[rows] = values
    return spread


def _counted(values: Floats, rows: Bools) -> Floats:
    """Values [m] of the rows that count → [n, 2]: value and 1."""
    return _spread(np.column_stack([values, np.ones(len(values))]), rows)


def _present(samples: pd.DataFrame, column: str) -> Bools:
    return samples[column].notna().to_numpy(dtype=np.bool_)


def _column_mean(column: str, samples: pd.DataFrame) -> Floats:
    rows = _present(samples, column)
    return _counted(samples[column][rows].to_numpy(dtype=np.float64), rows)


# --- captions ------------------------------------------------------------------------------------

_BLEU_ORDERS = 4
_BLEU_TINY, _BLEU_SMALL = 1e-15, 1e-9
"""pycocoevalcap's guards against division by zero: part of the value, so they stay as they are."""


def _bleu_statistics(samples: pd.DataFrame) -> Floats:
    """[n, 11]: clipped matches and guesses of four orders, both lengths, and 1."""
    rows = _present(samples, "bleu_matches")
    counting = samples[rows]
    return _spread(
        np.column_stack(
            [
                _rectangle(counting["bleu_matches"], _BLEU_ORDERS),
                _rectangle(counting["bleu_guesses"], _BLEU_ORDERS),
                counting["bleu_length"].to_numpy(dtype=np.float64),
                counting["bleu_reference_length"].to_numpy(dtype=np.float64),
                np.ones(len(counting)),
            ]
        ),
        rows,
    )


def _rectangle(lists: pd.Series, width: int) -> Floats:
    return np.array([np.asarray(x, dtype=np.float64) for x in lists]).reshape(len(lists), width)


def _bleu_of_sums(order: int, sums: Floats) -> Floats:
    matches, guesses = sums[..., :order], sums[..., _BLEU_ORDERS : _BLEU_ORDERS + order]
    length, reference_length, count = sums[..., 8], sums[..., 9], sums[..., 10]
    precisions = (matches + _BLEU_TINY) / (guesses + _BLEU_SMALL)
    ratio = (length + _BLEU_TINY) / (reference_length + _BLEU_SMALL)
    brevity = np.where(ratio < 1, np.exp(1 - 1 / np.minimum(ratio, 1.0)), 1.0)
    return np.where(count > 0, precisions.prod(axis=-1) ** (1 / order) * brevity, np.nan)


METEOR_STATISTICS = 23
_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.2, 0.6, 0.75
_STAGE_WEIGHTS = np.array([1.0, 0.6, 0.8, 0.6])
"""METEOR 1.5's parameters for English; the stages are exact, stem, synonym, paraphrase."""


def _meteor_statistics(samples: pd.DataFrame) -> Floats:
    rows = _present(samples, "meteor_statistics")
    statistics = _rectangle(samples["meteor_statistics"][rows], METEOR_STATISTICS)
    return _spread(np.column_stack([statistics, np.ones(len(statistics))]), rows)


def _meteor_of_sums(sums: Floats) -> Floats:
    """METEOR from its own segment statistics, added up.

    Their order: length of candidate and of reference, function words in each; for each stage the
    content words matched in candidate and reference, then the function words; chunks; words matched
    in candidate and reference.
    """
    length, reference_length, function, reference_function = np.moveaxis(sums[..., :4], -1, 0)
    stages = sums[..., 4:20].reshape(*sums.shape[:-1], 4, 4)
    chunks, matched, reference_matched, count = np.moveaxis(sums[..., 20:24], -1, 0)
    word_weights = np.array([_DELTA, _DELTA, 1 - _DELTA, 1 - _DELTA])
    weighted = (stages * word_weights * _STAGE_WEIGHTS[:, None]).sum(axis=-2)
    precision = _or_zero(
        weighted[..., 0] + weighted[..., 2],
        _DELTA * (length - function) + (1 - _DELTA) * function,
    )
    recall = _or_zero(
        weighted[..., 1] + weighted[..., 3],
        _DELTA * (reference_length - reference_function) + (1 - _DELTA) * reference_function,
    )
    f_mean = _or_zero(precision * recall, (1 - _ALPHA) * recall + _ALPHA * precision)
    identical = (matched == length) & (reference_matched == reference_length) & (chunks == 1)
    fragmentation = _or_zero(chunks, (matched + reference_matched) / 2)
    penalty = np.where(identical, 0.0, _GAMMA * fragmentation**_BETA)
    return np.where(count > 0, f_mean * (1 - penalty), np.nan)


def _or_zero(part: Floats, whole: Floats) -> Floats:
    return np.nan_to_num(_ratio(part, whole))


# --- tokens of captions --------------------------------------------------------------------------


def _tokens(samples: pd.DataFrame, column: str) -> tuple[NDArray[np.intp], Floats]:
    """The values of all tokens [T] of a list column and the row [T] that each belongs to."""
    lists = [np.asarray(x, dtype=np.float64) for x in samples[column][_present(samples, column)]]
    rows = np.flatnonzero(_present(samples, column))
    owner = np.repeat(rows, [len(x) for x in lists])
    return owner, np.concatenate([*lists, np.empty(0)])


def _token_mean(column: str, samples: pd.DataFrame) -> Floats:
    owner, values = _tokens(samples, column)
    size = len(samples)
    sums = np.bincount(owner, weights=values, minlength=size)
    return np.column_stack([sums, np.bincount(owner, minlength=size)]).astype(np.float64)


def _token_ece_statistics(samples: pd.DataFrame) -> Floats:
    owner, confidence = _tokens(samples, "token_confidences")
    _, correct = _tokens(samples, "token_correct")
    index = equal_width_index(np.clip(confidence, 0.0, 1.0)) if len(confidence) else owner
    place = owner * BINS + index
    size = len(samples) * BINS
    blocks = [np.bincount(place, weights=w, minlength=size) for w in (None, confidence, correct)]
    return np.concatenate([b.reshape(len(samples), BINS) for b in blocks], axis=1, dtype=np.float64)


# --- choices -------------------------------------------------------------------------------------


def _circular_mean(column: str, samples: pd.DataFrame) -> Floats:
    """A question is right when every order of its options is; it counts once, on its first row."""
    if "shift" not in samples:
        return _column_mean(column, samples)
    rows = _present(samples, column)
    counting = samples[rows]
    right = counting[column].astype(bool).groupby(counting["cluster"]).transform("all")
    first = (~counting["cluster"].duplicated()).to_numpy(dtype=np.float64)
    return _spread(np.column_stack([right.to_numpy(dtype=np.float64) * first, first]), rows)


def _plain_mean(samples: pd.DataFrame) -> Floats:
    first = samples["shift"].to_numpy() == 0
    return _counted(samples["correct"][first].to_numpy(dtype=np.float64), first)


def _failure_mean(samples: pd.DataFrame) -> Floats:
    failed = samples["parsed"].isna().to_numpy(dtype=np.float64)
    return np.column_stack([failed, np.ones(len(samples))])


def _options(samples: pd.DataFrame) -> tuple[Bools, Floats, NDArray[np.int64]]:
    """The rows that have them [n], their log p over the options [m, K], the gold's index [m].

    Renormalised over the options of the row; −inf where a row has fewer than K.
    """
    rows = _present(samples, "option_log_probabilities")
    lists = [np.asarray(x, np.float64) for x in samples["option_log_probabilities"][rows]]
    padded = np.full((len(lists), max(map(len, lists), default=1)), -np.inf)
    for row, values in zip(padded, lists, strict=True):
        row[: len(values)] = values
    logps = padded - logsumexp(padded, axis=1, keepdims=True) if lists else padded
    gold = np.array([ord(letter) - ord("A") for letter in samples["gold"][rows]], dtype=np.int64)
    return rows, logps, gold


def _option_scores(score: Callable[[Floats, NDArray[np.int64]], Floats]) -> _Statistics:
    """The mean over questions of a score of (log p over the options [m, K], gold [m])."""

    def statistics(samples: pd.DataFrame) -> Floats:
        rows, logps, gold = _options(samples)
        return _counted(score(logps, gold), rows)

    return statistics


def _brier(logps: Floats, gold: NDArray[np.int64]) -> Floats:
    """Sum over the options of the squared error: 0 to 2."""
    errors = np.exp(logps)
    errors[np.arange(len(gold)), gold] -= 1.0
    scores: Floats = (errors**2).sum(axis=1)
    return scores


def _nll(logps: Floats, gold: NDArray[np.int64]) -> Floats:
    return -logps[np.arange(len(gold)), gold]


def _entropy(logps: Floats, _: NDArray[np.int64]) -> Floats:
    """In nats; an option with probability 0 adds nothing."""
    scores: Floats = -(np.exp(logps) * np.where(np.isneginf(logps), 0.0, logps)).sum(axis=1)
    return scores


def _top_1(logps: Floats, _: NDArray[np.int64]) -> Floats:
    scores: Floats = np.exp(logps.max(axis=1))
    return scores


def _confidences(samples: pd.DataFrame) -> tuple[Bools, Floats, Bools]:
    rows, logps, gold = _options(samples)
    return rows, np.clip(np.exp(logps.max(axis=1)), 0.0, 1.0), logps.argmax(axis=1) == gold


def _binned(index_of: Callable[[Floats], NDArray[np.int64]], samples: pd.DataFrame) -> Floats:
    # Edges that depend on the data are those of the whole sample; the bootstrap resamples the sums
    # of these bins and does not move the edges.
    rows, confidence, correct = _confidences(samples)
    return _spread(bin_statistics(confidence, correct, index_of(confidence)), rows)


def _aurc_statistics(samples: pd.DataFrame) -> Floats:
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
    return _spread(statistics.reshape(len(confidence), 2 * bins), rows)


def _aurc_of_sums(sums: Floats) -> Floats:
    """Mean over coverages of the risk of the samples covered so far, most confident first.

    In a bin of c samples at error rate r after N samples with E errors, the expected sum of risks
    is Σ_{j ≤ c} (E + j·r)/(N + j) = c·r + (E − N·r)(ψ(N + c + 1) − ψ(N + 1)).
    """
    counts, errors = np.split(sums, 2, axis=-1)
    before = np.cumsum(counts, axis=-1) - counts
    errors_before = np.cumsum(errors, axis=-1) - errors
    rate = _or_zero(errors, counts)
    harmonic = digamma(before + counts + 1) - digamma(before + 1)
    risks = errors + (errors_before - before * rate) * harmonic
    return _ratio(risks.sum(axis=-1), counts.sum(axis=-1))


def _either(column: str, of_options: _Statistics) -> _Statistics:
    """A mean over tokens on captions, over questions on choices."""

    def statistics(samples: pd.DataFrame) -> Floats:
        return _token_mean(column, samples) if column in samples else of_options(samples)

    return statistics


# --- the table -----------------------------------------------------------------------------------

_Statistics = Callable[[pd.DataFrame], Floats]
_BLEU_COLUMNS = ("bleu_matches", "bleu_guesses", "bleu_length", "bleu_reference_length")
_OPTIONS = ("option_log_probabilities", "gold")


def _mean(name: str, better: bool | None, columns: tuple[str, ...], of: _Statistics) -> Metric:
    return Metric(name, better, columns, of, _mean_of_sums)


def _bins(name: str, index_of: Callable[[Floats], NDArray[np.int64]], value: _Value) -> Metric:
    return Metric(name, False, _OPTIONS, partial(_binned, index_of), value)


_Value = Callable[[Floats], Floats]

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        *(
            Metric(f"BLEU-{n}", True, _BLEU_COLUMNS, _bleu_statistics, partial(_bleu_of_sums, n))
            for n in range(1, _BLEU_ORDERS + 1)
        ),
        Metric("METEOR", True, ("meteor_statistics",), _meteor_statistics, _meteor_of_sums),
        _mean("ROUGE-L", True, ("ROUGE-L",), partial(_column_mean, "ROUGE-L")),
        _mean("CIDEr", True, ("CIDEr",), partial(_column_mean, "CIDEr")),
        _mean("SPICE", True, ("SPICE",), partial(_column_mean, "SPICE")),
        _mean("accuracy", True, ("correct",), partial(_circular_mean, "correct")),
        _mean(
            "accuracy_option", True, ("option_correct",), partial(_circular_mean, "option_correct")
        ),
        _mean("accuracy_plain", True, ("correct", "shift"), _plain_mean),
        _mean("parse_failures", False, ("correct", "parsed"), _failure_mean),
        _bins("ece", equal_width_index, ece_from_sums),
        _bins("ece_adaptive", equal_mass_index, ece_from_sums),
        _bins("ece_debiased", equal_mass_index, ece_debiased_from_sums),
        _bins("mce", equal_width_index, mce_from_sums),
        _mean("brier", False, _OPTIONS, _option_scores(_brier)),
        _mean("nll", False, _OPTIONS, _option_scores(_nll)),
        Metric("aurc", False, _OPTIONS, _aurc_statistics, _aurc_of_sums),
        Metric(
            "entropy",
            None,
            _OPTIONS,
            _either("token_entropies", _option_scores(_entropy)),
            _mean_of_sums,
            ("token_entropies",),
        ),
        Metric(
            "top1_probability",
            None,
            _OPTIONS,
            _either("token_confidences", _option_scores(_top_1)),
            _mean_of_sums,
            ("token_confidences",),
        ),
        Metric(
            "token_ece",
            False,
            ("token_confidences", "token_correct"),
            _token_ece_statistics,
            ece_from_sums,
        ),
        _mean("tv", None, ("token_tv",), partial(_token_mean, "token_tv")),
        _mean("js", None, ("token_js",), partial(_token_mean, "token_js")),
    )
}
