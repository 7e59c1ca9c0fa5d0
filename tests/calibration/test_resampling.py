import time

import numpy as np
import pytest
import scipy.stats

from cwdpo_bench.calibration import (
    bootstrap_stderr,
    bootstrap_sums,
    cluster_sums,
    paired_p_value,
    percentile_interval,
)


def test_statistics_add_up_by_cluster_in_the_order_of_the_names():
    sums, ids = cluster_sums([[1, 10], [2, 20], [4, 40]], ["b", "a", "b"])
    assert ids.tolist() == ["a", "b"]
    assert sums.tolist() == [[2, 20], [5, 50]]


def test_cluster_sums_do_not_depend_on_the_order_of_the_samples():
    generator = np.random.default_rng(0)
    values, clusters = generator.integers(0, 9, (50, 3)), generator.integers(0, 12, 50)
    order = generator.permutation(50)
    sums, ids = cluster_sums(values, clusters)
    again, same = cluster_sums(values[order], clusters[order])
    assert (sums == again).all()
    assert ids.tolist() == same.tolist()


def test_systems_on_the_same_clusters_share_their_draws():
    generator = np.random.default_rng(0)
    first, second = generator.normal(size=(40, 2)), generator.normal(size=(40, 3))
    together = bootstrap_sums(np.hstack([first, second]), 50, seed=3)
    apart = np.hstack([bootstrap_sums(first, 50, seed=3), bootstrap_sums(second, 50, seed=3)])
    assert together == pytest.approx(apart, rel=1e-12)
    assert not np.allclose(together, bootstrap_sums(np.hstack([first, second]), 50, seed=4))


def test_every_resample_draws_as_many_clusters_as_there_are():
    totals = bootstrap_sums(np.eye(30), 200)
    assert (totals.sum(axis=1) == 30).all()
    assert (totals >= 0).all()


def test_draws_do_not_depend_on_how_many_are_held_at_a_time(monkeypatch):
    sums = np.random.default_rng(0).normal(size=(100, 2))
    whole = bootstrap_sums(sums, 64)
    monkeypatch.setattr("cwdpo_bench.calibration.resampling.CHUNK", 1000)
    assert bootstrap_sums(sums, 64) == pytest.approx(whole, rel=1e-12)


def test_standard_error_of_a_mean_is_the_textbook_s():
    values = np.random.default_rng(0).normal(size=(400, 1))
    means = bootstrap_sums(values, 4000)[:, 0] / 400
    assert bootstrap_stderr(means) == pytest.approx(scipy.stats.sem(values[:, 0], ddof=0), rel=0.05)


def test_interval_of_a_mean_agrees_with_scipy_s_bootstrap():
    values = np.random.default_rng(1).exponential(size=200)
    ours = percentile_interval(bootstrap_sums(values[:, None], 4000)[:, 0] / 200)
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=4000, method="percentile", random_state=0
    ).confidence_interval
    assert ours == pytest.approx(tuple(theirs), abs=0.02)


def test_interval_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(2)
    covered = 0
    for seed in range(300):
        values = generator.normal(size=(60, 1))
        low, high = percentile_interval(bootstrap_sums(values, 300, seed)[:, 0] / 60)
        covered += low <= 0 <= high
    assert 0.90 <= covered / 300 <= 0.98


def test_clusters_widen_the_interval_of_samples_that_repeat():
    values = np.random.default_rng(3).normal(size=(100, 1))
    repeated, clusters = np.repeat(values, 4, axis=0), np.repeat(np.arange(100), 4)
    clustered, _ = cluster_sums(repeated, clusters)
    honest = bootstrap_stderr(bootstrap_sums(clustered)[:, 0] / 400)
    naive = bootstrap_stderr(bootstrap_sums(repeated)[:, 0] / 400)
    assert honest == pytest.approx(2 * naive, rel=0.15)


def test_undefined_resamples_are_left_out_of_the_interval():
    assert percentile_interval([np.nan, 1.0, 1.0]) == (1.0, 1.0)
    with pytest.raises(ValueError, match="undefined in every"):
        percentile_interval([np.nan])


def test_p_value_of_no_difference_is_one():
    assert paired_p_value(np.zeros(1000)) == 1.0


def test_p_value_of_a_clear_difference_is_the_least_that_the_resamples_can_show():
    assert paired_p_value(np.ones(1000)) == pytest.approx(2 / 1001)
    assert paired_p_value(-np.ones(1000)) == pytest.approx(2 / 1001)


def test_p_value_of_a_mean_is_close_to_the_t_test():
    values = np.random.default_rng(4).normal(0.15, 1, size=(200, 1))
    ours = paired_p_value(bootstrap_sums(values, 4000)[:, 0])
    assert ours == pytest.approx(scipy.stats.ttest_1samp(values[:, 0], 0).pvalue, abs=0.02)


def test_p_values_are_uniform_under_the_null():
    generator = np.random.default_rng(5)
    values = [
        paired_p_value(bootstrap_sums(generator.normal(size=(80, 1)), 400, seed)[:, 0])
        for seed in range(300)
    ]
    assert np.mean(np.array(values) <= 0.05) == pytest.approx(0.05, abs=0.04)
    assert np.mean(np.array(values) <= 0.5) == pytest.approx(0.5, abs=0.1)


def test_a_thousand_resamples_of_a_thousand_clusters_are_quick():
    sums = np.random.default_rng(0).normal(size=(1000, 100))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        bootstrap_sums(sums, 1000)
        times.append(time.perf_counter() - start)
    # 0.1 s or less on an idle core; the margin is for a machine that does other things too.
    assert min(times) < 1.0


@pytest.mark.parametrize(
    ("statistics", "clusters", "words"),
    [
        ([[np.nan]], ["a"], "NaN"),
        ([[1.0]], ["a", "b"], "expected"),
        ([1.0], ["a"], "dimension"),
        (np.zeros((0, 2)), [], "empty"),
    ],
)
def test_bad_statistics_are_refused(statistics, clusters, words):
    with pytest.raises(ValueError, match=words):
        cluster_sums(statistics, clusters)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="resamples"):
        bootstrap_sums([[1.0]], 0)
    with pytest.raises(ValueError, match="level"):
        percentile_interval([1.0], 1.0)
    with pytest.raises(ValueError, match=r"\[R\]"):
        paired_p_value([[1.0]])
