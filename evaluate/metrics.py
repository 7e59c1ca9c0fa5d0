"""The one rule by which a metric is recomposed from the per-sample columns of a run.

A metric is a function of statistics that add up over samples: BLEU of matches, guesses and lengths,
accuracy of hits and questions, ECE of three sums a bin. So `value(statistics(samples).sum(0))` is
the corpus value of the official scorer, and a bootstrap resamples the same sums without scoring
anything again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import pandas as pd

from cwdpo_bench.calibration import (
    aurc_from_sums,
    auroc_from_sums,
    ece_classwise_from_sums,
    ece_debiased_from_sums,
    ece_from_sums,
    equal_mass_index,
    equal_width_index,
    mce_from_sums,
    reliability_part,
    resolution_part,
    uncertainty_part,
)
from cwdpo_bench.evaluate.caption_statistics import (
    BLEU_ORDERS,
    bleu_of_sums,
    bleu_statistics,
    chair_sentence_statistics,
    chair_statistics,
    meteor_of_sums,
    meteor_statistics,
    object_recall_statistics,
    token_ece_statistics,
    token_mean,
)
from cwdpo_bench.evaluate.choice_statistics import (
    Statistics,
    after_temperature,
    aurc_statistics,
    binned,
    brier,
    circular_mean,
    correct_option,
    entropy,
    f1_of_sums,
    failure_mean,
    letter_excess,
    letter_recall,
    nll,
    offered_options,
    option_mass,
    option_scores,
    order_bias_of_sums,
    over_shifts,
    plain_mean,
    precision_of_sums,
    recall_of_sums,
    recall_spread_of_sums,
    top_1,
    yes_share_of_sums,
    yes_statistics,
)
from cwdpo_bench.evaluate.sums import Floats, Integers, column_mean, mean_of_sums

Value = Callable[[Floats], Floats]


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
        compared: whether differences of it are tested; not where it is a part or a variant of
            another one, which would make the correction for many tests stricter for all.
    """

    name: str
    higher_is_better: bool | None
    columns: tuple[str, ...]
    statistics: Callable[[pd.DataFrame], Floats]
    value: Callable[[Floats], Floats]
    token_columns: tuple[str, ...] = ()
    compared: bool = True

    def applies_to(self, samples: pd.DataFrame) -> bool:
        """Whether the columns are there and at least one row counts."""
        return _has(samples, self.columns) or _has(samples, self.token_columns)


def metric_names_for(samples: pd.DataFrame) -> list[str]:
    """The metrics that can be computed from these samples: lmms-eval's, then ours in order."""
    theirs = [str(column) for column in samples if str(column).startswith(LMMS)]
    own = [name for name, metric in METRICS.items() if metric.applies_to(samples)]
    return [name for name in theirs if METRICS[name].applies_to(samples)] + own


def _has(samples: pd.DataFrame, columns: tuple[str, ...]) -> bool:
    there = bool(columns) and all(column in samples for column in columns)
    return there and bool(samples[columns[0]].notna().any())


def _either(column: str, of_options: Statistics) -> Statistics:
    """A mean over tokens on captions, over questions on choices."""

    def statistics(samples: pd.DataFrame) -> Floats:
        return token_mean(column, samples) if column in samples else of_options(samples)

    return statistics


_BLEU_COLUMNS = ("bleu_matches", "bleu_guesses", "bleu_length", "bleu_reference_length")
_OPTIONS = ("option_log_probabilities", "gold")
_MENTIONS = ("named_objects", "hallucinated_objects")
_POLAR = ("said_yes", "gold")
_CIRCULAR = (*_OPTIONS, "shift")


def _mean(name: str, better: bool | None, columns: tuple[str, ...], of: Statistics) -> Metric:
    return Metric(name, better, columns, of, mean_of_sums)


def _bins(name: str, index_of: Callable[[Floats], Integers], value: Value) -> Metric:
    return Metric(name, False, _OPTIONS, partial(binned, index_of), value)


def _part(metric: Metric) -> Metric:
    """A part or a variant of another metric: reported, not tested."""
    return replace(metric, compared=False)


def _scaled(name: str, of: Statistics, value: Value = mean_of_sums) -> Metric:
    columns = ("temperature", *_OPTIONS)
    return _part(Metric(f"{name}_scaled", False, columns, after_temperature(of), value))


def _of_shifts(name: str, better: bool, of: Statistics, value: Value = mean_of_sums) -> Metric:
    return _part(Metric(f"{name}_shift_mean", better, _CIRCULAR, over_shifts(of), value))


def _of_letters(name: str, better: bool | None, value: Value) -> Metric:
    return _part(Metric(name, better, _OPTIONS, offered_options, value))


DIVERSITY = ("distinct-1", "distinct-2", "self-CIDEr", "vendi")
"""Of several sampled captions an image; more is not better by itself: noise is diverse too."""

LMMS = "lmms:"
"""What the metrics of lmms-eval's tasks start with, in results and as columns of the samples."""
_LOWER = ":lower"


def lmms_metric_name(metric: str, higher_is_better: bool) -> str:
    """Name and column of a metric of an lmms-eval task; the name says where less is better."""
    return f"{LMMS}{metric}{'' if higher_is_better else _LOWER}"


class Metrics(dict[str, Metric]):
    """The metrics by name; any name of `lmms_metric_name` is the mean of the column so called."""

    def __contains__(self, name: object) -> bool:
        """Whether it is one of ours, or could be one of lmms-eval's."""
        return super().__contains__(name) or (isinstance(name, str) and name.startswith(LMMS))

    def __missing__(self, name: str) -> Metric:
        """A metric of lmms-eval's."""
        if not name.startswith(LMMS):
            raise KeyError(name)
        return _mean(name, not name.endswith(_LOWER), (name,), partial(column_mean, name))


METRICS = Metrics(
    (metric.name, metric)
    for metric in (
        *(
            Metric(f"BLEU-{n}", True, _BLEU_COLUMNS, bleu_statistics, partial(bleu_of_sums, n))
            for n in range(1, BLEU_ORDERS + 1)
        ),
        Metric("METEOR", True, ("meteor_statistics",), meteor_statistics, meteor_of_sums),
        _mean("ROUGE-L", True, ("ROUGE-L",), partial(column_mean, "ROUGE-L")),
        _mean("CIDEr", True, ("CIDEr",), partial(column_mean, "CIDEr")),
        _part(_mean("CIDEr-plain", True, ("CIDEr-plain",), partial(column_mean, "CIDEr-plain"))),
        _mean("SPICE", True, ("SPICE",), partial(column_mean, "SPICE")),
        *(_part(_mean(name, None, (name,), partial(column_mean, name))) for name in DIVERSITY),
        _mean("accuracy", True, ("correct",), partial(circular_mean, "correct")),
        _mean(
            "accuracy_option", True, ("option_correct",), partial(circular_mean, "option_correct")
        ),
        _mean("accuracy_plain", True, ("correct", "shift"), plain_mean),
        _mean("parse_failures", False, ("cluster", "parsed"), failure_mean),
        _mean("CHAIR-i", False, ("objects", *_MENTIONS), chair_statistics),
        _mean("CHAIR-s", False, ("objects", *_MENTIONS), chair_sentence_statistics),
        _part(_mean("object_recall", True, ("objects", "found_objects"), object_recall_statistics)),
        _part(Metric("precision", True, _POLAR, yes_statistics, precision_of_sums)),
        _part(Metric("recall", True, _POLAR, yes_statistics, recall_of_sums)),
        Metric("f1", True, _POLAR, yes_statistics, f1_of_sums),
        _part(Metric("yes_share", None, _POLAR, yes_statistics, yes_share_of_sums)),
        _bins("ece", equal_width_index, ece_from_sums),
        _bins("ece_adaptive", equal_mass_index, ece_from_sums),
        _bins("ece_debiased", equal_mass_index, ece_debiased_from_sums),
        _bins("mce", equal_width_index, mce_from_sums),
        _of_letters("ece_classwise", False, ece_classwise_from_sums),
        _mean("brier", False, _OPTIONS, option_scores(brier)),
        _of_letters("brier_reliability", False, reliability_part),
        _of_letters("brier_resolution", True, resolution_part),
        _of_letters("brier_uncertainty", None, uncertainty_part),
        _mean("nll", False, _OPTIONS, option_scores(nll)),
        Metric("aurc", False, _OPTIONS, aurc_statistics, aurc_from_sums),
        _part(Metric("auroc", True, _OPTIONS, aurc_statistics, auroc_from_sums)),
        _part(_mean("temperature", None, ("temperature",), partial(column_mean, "temperature"))),
        _scaled("ece", partial(binned, equal_width_index), ece_from_sums),
        _scaled("ece_adaptive", partial(binned, equal_mass_index), ece_from_sums),
        _scaled("ece_debiased", partial(binned, equal_mass_index), ece_debiased_from_sums),
        _scaled("mce", partial(binned, equal_width_index), mce_from_sums),
        _scaled("brier", option_scores(brier)),
        _scaled("nll", option_scores(nll)),
        _of_shifts("accuracy_option", True, option_scores(correct_option)),
        _of_shifts("ece", False, partial(binned, equal_width_index), ece_from_sums),
        _of_shifts("brier", False, option_scores(brier)),
        _of_shifts("nll", False, option_scores(nll)),
        _part(_mean("option_mass", None, _OPTIONS, option_mass)),
        _part(Metric("option_order_bias", False, _CIRCULAR, letter_excess, order_bias_of_sums)),
        _part(Metric("option_recall_sd", False, _CIRCULAR, letter_recall, recall_spread_of_sums)),
        Metric(
            "entropy",
            None,
            _OPTIONS,
            _either("token_entropies", option_scores(entropy)),
            mean_of_sums,
            ("token_entropies",),
        ),
        Metric(
            "top1_probability",
            None,
            _OPTIONS,
            _either("token_confidences", option_scores(top_1)),
            mean_of_sums,
            ("token_confidences",),
        ),
        Metric(
            "token_ece",
            False,
            ("token_confidences", "token_correct"),
            token_ece_statistics,
            ece_from_sums,
        ),
        _mean("tv", None, ("token_tv",), partial(token_mean, "token_tv")),
        _mean("js", None, ("token_js",), partial(token_mean, "token_js")),
    )
)
