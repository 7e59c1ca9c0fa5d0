import numpy as np
import pandas as pd
import pytest

from cwdpo_bench.errors import UserError
from cwdpo_bench.evaluate.metrics import METRICS
from cwdpo_bench.leaderboards.statistics import (
    OWN_EDGES,
    check_same_samples,
    intersect,
    same_statistics,
    share_counts,
    statistics_of,
)


def check(candidate, baseline, where):
    check_same_samples(statistics_of(candidate), statistics_of(baseline), where, "runs/b")


def test_the_order_of_the_samples_never_matters(make):
    samples = make.choices(size=30)
    shuffled = samples.sample(frac=1, random_state=0)
    first, second = statistics_of(shuffled), statistics_of(samples)
    check_same_samples(first, second, "mmmu: runs/a", "runs/b")
    assert same_statistics(first, second)


def test_partly_overlapping_samples_are_refused_with_their_overlap(make):
    samples = make.choices(size=30)
    words = r"mmmu: runs/a and runs/b hold different samples: 20 in common, 5 only.*5 only.*--limit"
    with pytest.raises(UserError, match=words):
        check(samples[:25], samples[5:], "mmmu: runs/a")
    with pytest.raises(UserError, match="25 in common, 0 only in the former, 5 only"):
        check(samples[:25], samples, "mmmu: runs/a")


@pytest.mark.parametrize("column", ["cluster", "gold"])
def test_samples_with_another_truth_are_refused_by_name(make, column):
    samples = make.choices(size=10)
    other = samples.copy()
    other.loc[3, column] = "A" if samples.loc[3, column] != "A" else "B"
    with pytest.raises(UserError, match=f"'q0003' has another '{column}'"):
        check(other, samples, "mmmu: runs/a")


def test_other_references_are_refused(make):
    samples = make.captions(size=5)
    other = samples.assign(references=[["another caption"]] * 5)
    with pytest.raises(UserError, match="references"):
        check(other, samples, "coco: runs/a")


def test_values_are_recomposed_and_shared_statistics_are_kept_once(make):
    samples = make.captions()
    statistics = statistics_of(samples)
    for name, metric in METRICS.items():
        if metric.applies_to(samples):
            expected = float(metric.value(metric.statistics(samples).sum(axis=0)))
            assert statistics.value(name) == pytest.approx(expected, abs=1e-12)
    assert statistics.blocks["BLEU-1"] is statistics.blocks["BLEU-4"]
    choices = statistics_of(make.choices())
    assert choices.blocks["ece"] is choices.blocks["mce"]
    assert choices.blocks["ece"] is not choices.blocks["ece_adaptive"]


def test_a_group_holds_its_own_samples_and_no_metric_that_looks_at_others(make):
    samples = make.choices()
    art = statistics_of(samples).group("Art")
    assert art.ids.tolist() == samples["id"][1::2].tolist()
    assert art.value("accuracy") == samples["correct"][1::2].mean()
    assert not set(OWN_EDGES) & set(art.metrics)


def test_what_all_runs_hold_is_kept_by_whole_cluster(make):
    samples = make.choices(size=12)
    kept, told = intersect([samples[1:], samples[:10]])
    # q0000 and q0001 are one image, of which the first run lacks a question.
    assert kept[0]["id"].tolist() == kept[1]["id"].tolist() == [f"q{i:04}" for i in range(2, 10)]
    assert told == "only the 8 of 12 samples that all runs hold are compared"
    same, told = intersect([samples, samples])
    assert told == ""
    assert same[0] is samples
    with pytest.raises(UserError, match="no sample in common"):
        intersect([samples[:4], samples[6:]])


def test_a_share_of_questions_is_one_a_cluster_or_none(make):
    samples = make.choices(size=10)
    assert share_counts(statistics_of(samples), "accuracy") is None
    alone = statistics_of(samples.assign(cluster=samples["id"]))
    hits, count = share_counts(alone, "accuracy")
    assert hits.sum() == samples["correct"].sum()
    assert count.tolist() == [1.0] * 10
    assert share_counts(alone, "brier") is None


def test_all_orders_of_a_question_are_one_share(make):
    one = make.choices(size=8)
    orders = [one.assign(id=one["id"] + f"-{k}", cluster=one["id"], shift=k) for k in range(2)]
    statistics = statistics_of(pd.concat(orders, ignore_index=True))
    _, count = share_counts(statistics, "accuracy")
    assert count.tolist() == [1.0] * 8
    assert statistics.asked.sum() == 8
    assert np.array_equal(statistics.sums("accuracy")[:, 1], count)
