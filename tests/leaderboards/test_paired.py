import numpy as np
import pandas as pd
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from cwdpo_bench.errors import UserError
from cwdpo_bench.evaluate.metrics import metric_names_for
from cwdpo_bench.leaderboards.paired import align, corpus_values, holm, paired_differences


def compare(candidate, baseline, metrics=("accuracy",), resamples=2000, seed=0):
    found = paired_differences(
        {"x": candidate}, baseline, list(metrics), resamples=resamples, seed=seed
    )
    return found["x"]


def test_the_difference_is_that_of_the_two_corpus_values(make):
    for build in (make.choices, make.captions):
        candidate, baseline = build(0.7, seed=1), build(0.5, seed=2)
        names = metric_names_for(baseline)
        found = compare(candidate, baseline, names, resamples=50)
        first, second = corpus_values(candidate, names), corpus_values(baseline, names)
        assert list(found) == names
        for name in names:
            assert found[name].value == pytest.approx(first[name] - second[name], abs=1e-12)


def test_interval_and_p_of_a_mean_are_close_to_the_paired_t_test(make):
    generator = np.random.default_rng(0)
    baseline = make.captions(0.5, size=200)
    candidate = baseline.assign(CIDEr=baseline["CIDEr"] + generator.normal(0.05, 0.35, 200))
    found = compare(candidate, baseline, ["CIDEr"], resamples=8000)["CIDEr"]
    test = scipy.stats.ttest_rel(candidate["CIDEr"], baseline["CIDEr"])
    assert found.ci95 == pytest.approx(tuple(test.confidence_interval()), abs=0.01)
    assert found.p == pytest.approx(test.pvalue, abs=0.02)


def test_pairing_sees_what_separate_intervals_hide(make):
    baseline = make.captions(0.5, size=80)
    candidate = baseline.assign(CIDEr=baseline["CIDEr"] + 0.01)
    found = compare(candidate, baseline, ["CIDEr"])["CIDEr"]
    assert found.p < 0.01
    assert found.ci95 == pytest.approx((0.01, 0.01))


def test_equal_systems_differ_by_nothing(make):
    for build in (make.choices, make.captions):
        samples = build()
        for difference in compare(samples, samples.copy(), metric_names_for(samples)).values():
            assert (difference.value, difference.ci95, difference.p) == (0.0, (0.0, 0.0), 1.0)


def test_the_sign_turns_with_the_roles_and_p_stays(make):
    one, other = make.choices(0.7, seed=1), make.choices(0.5, seed=2)
    forth, back = compare(one, other)["accuracy"], compare(other, one)["accuracy"]
    assert forth.value == -back.value
    assert forth.p == back.p
    assert forth.ci95 == pytest.approx((-back.ci95[1], -back.ci95[0]))


def test_one_sample_proves_nothing(make):
    right, wrong = make.choices(1.0, size=1), make.choices(0.0, size=1)
    found = compare(right, wrong)["accuracy"]
    assert found.value == 1.0
    assert found.p == 1.0


def test_samples_of_one_cluster_prove_nothing(make):
    right, wrong = make.choices(1.0, size=50), make.choices(0.0, size=50)
    found = compare(right.assign(cluster="c"), wrong.assign(cluster="c"))["accuracy"]
    assert found.p == 1.0


def test_zero_variance_gives_a_point_and_no_nan(make):
    right, wrong = make.choices(1.0), make.choices(0.0)
    found = compare(right, wrong)["accuracy"]
    assert found.ci95 == (1.0, 1.0)
    assert found.p == pytest.approx(2 / 2001)


def test_clusters_are_drawn_whole(make):
    # Four copies of every sample must not look like four times the evidence.
    one, other = make.choices(0.6, seed=1), make.choices(0.5, seed=2)
    narrow = compare(one, other)["accuracy"]
    copies = [
        pd.concat([s.assign(id=s["id"] + str(k)) for k in range(4)], ignore_index=True)
        for s in (one, other)
    ]
    again = compare(*copies)["accuracy"]
    assert again.ci95 == pytest.approx(narrow.ci95)
    assert again.p == narrow.p


def test_the_same_seed_gives_the_same_numbers_and_another_does_not(make):
    one, other = make.choices(0.6, seed=1), make.choices(0.5, seed=2)
    first = compare(one, other, ["ece", "aurc"])
    assert compare(one, other, ["ece", "aurc"]) == first
    assert compare(one, other, ["ece", "aurc"], seed=1) != first


def test_a_metric_that_one_side_lacks_is_left_out(make):
    whole = make.choices()
    without = whole.drop(columns=["option_log_probabilities", "option_correct"])
    assert list(compare(without, whole, metric_names_for(whole))) == ["accuracy", "parse_failures"]
    assert compare(without[["id", "cluster"]], whole, metric_names_for(whole)) == {}


def test_align_brings_both_into_one_order(make):
    samples = make.choices(size=30)
    shuffled = samples.sample(frac=1, random_state=0)
    first, second = align(shuffled, samples, "mmmu: runs/a", "runs/b")
    assert first["id"].tolist() == second["id"].tolist()
    assert first["gold"].tolist() == second["gold"].tolist()


def test_partly_overlapping_samples_are_refused_with_their_overlap(make):
    samples = make.choices(size=30)
    words = r"mmmu: runs/a and runs/b hold different samples: 20 in common, 5 only.*5 only.*--limit"
    with pytest.raises(UserError, match=words):
        align(samples[:25], samples[5:], "mmmu: runs/a", "runs/b")
    with pytest.raises(UserError, match="25 in common, 0 only in the former, 5 only"):
        align(samples[:25], samples, "mmmu: runs/a", "runs/b")


@pytest.mark.parametrize("column", ["cluster", "gold"])
def test_samples_with_another_truth_are_refused_by_name(make, column):
    samples = make.choices(size=10)
    other = samples.copy()
    other.loc[3, column] = "Z"
    with pytest.raises(UserError, match=f"'q0003' has another '{column}'"):
        align(other, samples, "mmmu: runs/a", "runs/b")


def test_other_references_are_refused(make):
    samples = make.captions(size=5)
    other = samples.assign(references=[["another caption"]] * 5)
    with pytest.raises(UserError, match="references"):
        align(other, samples, "coco: runs/a", "runs/b")


def test_holm_equals_the_example_by_hand():
    # Sorted .01 .02 .03 .04 times 4 3 2 1 = .04 .06 .06 .04, made non-decreasing.
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_laws_of_holm(p_values):
    adjusted = holm(p_values)
    for p, q in zip(p_values, adjusted, strict=True):
        assert p <= q <= min(1.0, p * len(p_values)) + 1e-12
    assert holm(p_values[::-1]) == adjusted[::-1]
    order = np.argsort(p_values, kind="stable")
    assert (np.diff(np.array(adjusted)[order]) >= 0).all()
