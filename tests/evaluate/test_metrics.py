"""Metrics recomposed from sums against the libraries and closed forms that define them."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocoevalcap.bleu.bleu import Bleu
from scipy.special import softmax
from scipy.stats import entropy
from sklearn.metrics import log_loss

from cwdpo_bench import calibration
from cwdpo_bench.evaluate.choice_statistics import AURC_BINS
from cwdpo_bench.evaluate.metrics import METRICS, metric_names_for

CALIBRATION = ("ece", "ece_adaptive", "ece_debiased", "mce", "brier", "nll", "aurc")
BY_LETTER = ("ece_classwise", "brier_reliability", "brier_resolution", "brier_uncertainty")
DATA_DEPENDENT = {"ece_adaptive", "ece_debiased", "aurc", "auroc", *BY_LETTER}
"""Bins or options are those of the samples at hand."""


def corpus_value(name: str, samples: pd.DataFrame) -> float:
    metric = METRICS[name]
    return float(metric.value(metric.statistics(samples).sum(axis=0)))


def choices(rng: np.random.Generator, questions: int, options: int | None = None) -> pd.DataFrame:
    sizes = [options or int(rng.integers(2, 7)) for _ in range(questions)]
    # Log-probabilities over a whole vocabulary: those of the options do not add up to 1.
    logps = [np.log(rng.dirichlet(np.ones(size)) * rng.uniform(0.1, 1)) for size in sizes]
    gold = ["ABCDEF"[rng.integers(size)] for size in sizes]
    best = ["ABCDEF"[int(np.argmax(values))] for values in logps]
    return pd.DataFrame(
        {
            "cluster": [str(n) for n in range(questions)],
            "gold": gold,
            "parsed": [letter if rng.random() < 0.8 else None for letter in best],
            "correct": rng.random(questions) < 0.5,
            "option_log_probabilities": [values.tolist() for values in logps],
            "option_correct": [a == b for a, b in zip(best, gold, strict=True)],
        }
    )


def captions(rng: np.random.Generator, rows: int) -> pd.DataFrame:
    lengths = rng.integers(0, 9, size=rows)
    return pd.DataFrame(
        {
            "cluster": [str(n) for n in range(rows)],
            "CIDEr": rng.random(rows),
            "token_confidences": [rng.random(n).tolist() for n in lengths],
            "token_correct": [(rng.random(n) < 0.5).tolist() for n in lengths],
            "token_entropies": [rng.random(n).tolist() for n in lengths],
            "token_tv": [rng.random(n).tolist() for n in lengths],
        }
    )


def option_arrays(samples: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities renormalised over the options [N, K] and the gold's index [N]."""
    logps = np.array(samples["option_log_probabilities"].tolist())
    return softmax(logps, axis=1), np.array(["ABCDEF".index(x) for x in samples["gold"]])


def test_bleu_from_sums_is_pycocoevalcap_bleu() -> None:
    from pycocoevalcap.bleu.bleu_scorer import cook_refs, cook_test

    rng = np.random.default_rng(0)
    words = np.array(
        ["a", "the", "dog", "cat", "runs", "on", "grass", "with", "two", "red", "balls"]
    )

    def sentence() -> str:
        return " ".join(rng.choice(words, rng.integers(0, 12)))

    for rows in (1, 2, 30):
        references = {n: [sentence() for _ in range(rng.integers(1, 6))] for n in range(rows)}
        predictions = {n: [sentence()] for n in range(rows)}
        cooked = [
            cook_test(predictions[n][0], cook_refs(references[n]), eff="closest")
            for n in range(rows)
        ]
        samples = pd.DataFrame(
            {
                "bleu_matches": [c["correct"] for c in cooked],
                "bleu_guesses": [c["guess"] for c in cooked],
                "bleu_length": [c["testlen"] for c in cooked],
                "bleu_reference_length": [c["reflen"] for c in cooked],
            }
        )
        official, _ = Bleu(4).compute_score(references, predictions, verbose=0)
        ours = [corpus_value(f"BLEU-{n}", samples) for n in range(1, 5)]
        assert ours == pytest.approx(official, abs=1e-12)


def test_calibration_metrics_are_those_of_the_calibration_room() -> None:
    samples = choices(np.random.default_rng(1), 300, options=4)
    probabilities, labels = option_arrays(samples)
    confidences = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == labels
    for name in ("ece", "ece_adaptive", "ece_debiased", "mce", "aurc"):
        expected = getattr(calibration, name)(confidences, correct)
        assert corpus_value(name, samples) == pytest.approx(expected, abs=1e-12), name
    for name in ("brier", "nll"):
        expected = getattr(calibration, name)(probabilities, labels)
        assert corpus_value(name, samples) == pytest.approx(expected, abs=1e-12), name


def test_calibration_metrics_match_other_libraries() -> None:
    samples = choices(np.random.default_rng(2), 400, options=4)
    probabilities, labels = option_arrays(samples)
    netcal = pytest.importorskip("netcal.metrics")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = netcal.ECE(bins=15).measure(probabilities, labels)
    assert corpus_value("ece", samples) == pytest.approx(reference, abs=1e-9)
    assert corpus_value("nll", samples) == pytest.approx(
        log_loss(labels, probabilities, labels=range(4)), abs=1e-9
    )
    assert corpus_value("entropy", samples) == pytest.approx(
        entropy(probabilities, axis=1).mean(), abs=1e-12
    )
    one_hot = np.eye(4)[labels]
    assert corpus_value("brier", samples) == pytest.approx(
        ((probabilities - one_hot) ** 2).sum(axis=1).mean(), abs=1e-12
    )


def test_aurc_with_many_distinct_confidences_is_near_the_exact_one() -> None:
    samples = choices(np.random.default_rng(3), 2 * AURC_BINS + 7, options=3)
    probabilities, labels = option_arrays(samples)
    exact = calibration.aurc(probabilities.max(axis=1), probabilities.argmax(axis=1) == labels)
    assert corpus_value("aurc", samples) == pytest.approx(exact, abs=1e-3)


def test_token_metrics_are_means_over_tokens_not_over_captions() -> None:
    samples = captions(np.random.default_rng(4), 40)
    tokens = {name: np.concatenate(samples[name].tolist()) for name in samples if "token" in name}
    assert corpus_value("entropy", samples) == pytest.approx(tokens["token_entropies"].mean())
    confidences = tokens["token_confidences"]
    assert corpus_value("top1_probability", samples) == pytest.approx(confidences.mean())
    assert corpus_value("tv", samples) == pytest.approx(tokens["token_tv"].mean())
    expected = calibration.ece(confidences, tokens["token_correct"].astype(bool))
    assert corpus_value("token_ece", samples) == pytest.approx(expected, abs=1e-12)


def test_circular_accuracy_needs_every_order_right() -> None:
    samples = pd.DataFrame(
        {
            "cluster": ["q", "q", "r", "r", "r", "s", "s"],
            "shift": [0, 1, 0, 1, 2, 0, 1],
            "correct": [True, True, True, False, True, False, False],
            "parsed": ["A"] * 6 + [None],
            "option_correct": [False, True, True, True, True, True, False],
        }
    )
    assert corpus_value("accuracy", samples) == pytest.approx(1 / 3)
    assert corpus_value("accuracy_plain", samples) == pytest.approx(2 / 3)
    assert corpus_value("accuracy_option", samples) == pytest.approx(1 / 3)
    assert corpus_value("parse_failures", samples) == pytest.approx(1 / 7)
    shuffled = samples.sample(frac=1, random_state=0)
    assert corpus_value("accuracy", shuffled) == pytest.approx(1 / 3)


def test_rows_without_the_column_do_not_count() -> None:
    samples = choices(np.random.default_rng(5), 30)
    columns = ["option_log_probabilities", "option_correct"]
    with_open = samples.astype(dict.fromkeys(columns, object))
    with_open.loc[10:19, columns] = None
    with_open.loc[10:19, "gold"] = "['24/7', '3.429']"
    counting = samples.drop(range(10, 20))
    for name in (*CALIBRATION, "entropy", "top1_probability", "accuracy_option"):
        assert corpus_value(name, with_open) == pytest.approx(corpus_value(name, counting)), name
    assert METRICS["ece"].statistics(with_open)[10:20].sum() == 0
    assert corpus_value("accuracy", with_open) == samples["correct"].mean()


def test_only_metrics_with_their_columns_are_named() -> None:
    samples = choices(np.random.default_rng(6), 5)
    assert set(metric_names_for(samples)) == {
        *CALIBRATION,
        *BY_LETTER,
        "auroc",
        "option_mass",
        "accuracy",
        "accuracy_option",
        "parse_failures",
        "entropy",
        "top1_probability",
    }
    only_open = samples.assign(option_log_probabilities=None, option_correct=None, parsed=None)
    assert metric_names_for(only_open) == ["accuracy", "parse_failures"]
    assert set(metric_names_for(captions(np.random.default_rng(6), 5))) == {
        "CIDEr",
        "entropy",
        "top1_probability",
        "token_ece",
        "tv",
    }


def test_no_token_at_all_is_undefined_not_zero() -> None:
    samples = captions(np.random.default_rng(7), 3)
    for name in ("token_confidences", "token_correct", "token_entropies"):
        samples[name] = [[]] * 3
    for name in ("token_ece", "entropy", "top1_probability"):
        assert np.isnan(corpus_value(name, samples)), name


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), questions=st.integers(1, 40))
def test_choice_metrics_keep_their_bounds_and_ignore_order(seed: int, questions: int) -> None:
    samples = choices(np.random.default_rng(seed), questions)
    shuffled = samples.sample(frac=1, random_state=seed % 1000)
    for name in metric_names_for(samples):
        value = corpus_value(name, samples)
        assert value == pytest.approx(corpus_value(name, shuffled), abs=1e-9, nan_ok=True), name
        # All right or all wrong: nothing to rank.
        if name == "auroc" and np.isnan(value):
            continue
        tops = {"brier": 2.0, "brier_reliability": 2.0, "nll": np.inf, "entropy": np.log(6)}
        assert 0 <= value <= tops.get(name, 1.0), name


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), first=st.integers(1, 20), second=st.integers(1, 20))
def test_statistics_of_parts_add_up_to_those_of_the_whole(
    seed: int, first: int, second: int
) -> None:
    rng = np.random.default_rng(seed)
    for make in (choices, captions):
        whole = make(rng, first + second)
        parts = (whole.iloc[:first], whole.iloc[first:])
        for name in set(metric_names_for(whole)) - DATA_DEPENDENT:
            statistics = METRICS[name].statistics
            added = sum(statistics(part).sum(axis=0) for part in parts)
            np.testing.assert_allclose(added, statistics(whole).sum(axis=0), atol=1e-9)


def test_value_takes_many_resamples_at_once() -> None:
    for samples in (choices(np.random.default_rng(8), 20), captions(np.random.default_rng(8), 20)):
        for name in metric_names_for(samples):
            metric = METRICS[name]
            sums = metric.statistics(samples).sum(axis=0)
            many = metric.value(np.stack([sums, 2 * sums, 0 * sums]))
            assert many[0] == pytest.approx(float(metric.value(sums)))
            assert np.isnan(many[2]), name


# --- options three ways --------------------------------------------------------------------------


def circular(
    rng: np.random.Generator, questions: int, options: int, place_weight: float
) -> pd.DataFrame:
    """Questions in all orders; log p = what the option says + `place_weight` × where it stands."""
    rows = []
    for question in range(questions):
        content, gold = rng.normal(size=options), int(rng.integers(options))
        for shift in range(options):
            # The benchmark's loader: the options from `shift` on, then those before it.
            shown = np.roll(content, -shift) - place_weight * np.arange(options)
            logps = shown - np.log(np.exp(shown).sum()) - 0.1
            rows.append(
                {
                    "cluster": f"q{question}",
                    "shift": shift,
                    "gold": "ABCDEF"[(gold - shift) % options],
                    "option_log_probabilities": logps.tolist(),
                }
            )
    return pd.DataFrame(rows)


def test_options_are_averaged_over_their_orders() -> None:
    samples = circular(np.random.default_rng(9), 30, 4, place_weight=1.5)
    first = samples[samples["shift"] == 0]
    expected = []
    for cluster in first["cluster"]:
        rows = samples[samples["cluster"] == cluster]
        by_option = [
            np.roll(softmax(row.option_log_probabilities), row.shift) for row in rows.itertuples()
        ]
        expected.append(np.mean(by_option, axis=0))
    gold = np.array(["ABCD".index(letter) for letter in first["gold"]])
    means = np.array(expected)
    assert corpus_value("brier_shift_mean", samples) == pytest.approx(
        calibration.brier(means, gold)
    )
    assert corpus_value("nll_shift_mean", samples) == pytest.approx(calibration.nll(means, gold))
    right = means.argmax(axis=1) == gold
    assert corpus_value("accuracy_option_shift_mean", samples) == pytest.approx(right.mean())
    assert corpus_value("ece_shift_mean", samples) == pytest.approx(
        calibration.ece(means.max(axis=1), right)
    )


def test_a_model_that_reads_the_options_has_no_order_bias() -> None:
    samples = circular(np.random.default_rng(10), 40, 4, place_weight=0.0)
    assert corpus_value("option_order_bias", samples) == pytest.approx(0, abs=1e-12)
    assert corpus_value("option_recall_sd", samples) == pytest.approx(0, abs=1e-12)
    for name in ("brier", "nll", "ece"):
        averaged = corpus_value(f"{name}_shift_mean", samples)
        assert averaged == pytest.approx(corpus_value(name, samples)), name


def test_a_model_that_always_takes_the_first_place_has_the_most_order_bias() -> None:
    samples = circular(np.random.default_rng(11), 40, 4, place_weight=100.0)
    assert corpus_value("option_order_bias", samples) == pytest.approx(1 - 1 / 4)
    assert corpus_value("option_recall_sd", samples) == pytest.approx(np.std([1, 0, 0, 0]))
    # Its mean over the orders knows nothing.
    assert corpus_value("nll_shift_mean", samples) == pytest.approx(np.log(4))


def test_recall_spread_is_the_deviation_of_the_letters_recalls() -> None:
    samples = circular(np.random.default_rng(12), 40, 3, place_weight=0.7)
    probabilities, labels = option_arrays(samples)
    hit = probabilities.argmax(axis=1) == labels
    expected = np.std([hit[labels == letter].mean() for letter in range(3)])
    assert corpus_value("option_recall_sd", samples) == pytest.approx(expected)


def test_option_mass_is_the_share_of_the_whole_vocabulary() -> None:
    samples = choices(np.random.default_rng(13), 50)
    expected = np.mean([np.exp(x).sum() for x in samples["option_log_probabilities"]])
    assert corpus_value("option_mass", samples) == pytest.approx(expected)


def test_scaled_metrics_are_those_of_the_scaled_probabilities() -> None:
    rng = np.random.default_rng(14)
    samples = choices(rng, 200, options=4).astype({"option_log_probabilities": object})
    samples["temperature"] = rng.choice([0.5, 2.0], 200)
    logps = np.array(samples["option_log_probabilities"].tolist())
    _, labels = option_arrays(samples)
    scaled = calibration.apply_temperature(logps, samples["temperature"].to_numpy())
    right = scaled.argmax(axis=1) == labels
    for name in ("brier", "nll"):
        expected = getattr(calibration, name)(scaled, labels)
        assert corpus_value(f"{name}_scaled", samples) == pytest.approx(expected), name
    for name in ("ece", "ece_adaptive", "ece_debiased", "mce"):
        expected = getattr(calibration, name)(scaled.max(axis=1), right)
        assert corpus_value(f"{name}_scaled", samples) == pytest.approx(expected), name
    assert corpus_value("temperature", samples) == pytest.approx(samples["temperature"].mean())


def test_parts_by_letter_are_those_of_the_calibration_room() -> None:
    samples = choices(np.random.default_rng(15), 200, options=4)
    probabilities, labels = option_arrays(samples)
    parts = calibration.brier_decomposition(probabilities, labels)
    for name in ("reliability", "resolution", "uncertainty"):
        assert corpus_value(f"brier_{name}", samples) == pytest.approx(getattr(parts, name)), name
    expected = calibration.ece_classwise(probabilities, labels)
    assert corpus_value("ece_classwise", samples) == pytest.approx(expected)
    right = probabilities.argmax(axis=1) == labels
    expected = calibration.auroc(probabilities.max(axis=1), right)
    assert corpus_value("auroc", samples) == pytest.approx(expected)
