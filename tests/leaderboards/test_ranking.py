import numpy as np

from cwdpo_bench.leaderboards.paired import resample
from cwdpo_bench.leaderboards.ranking import ranks_of
from cwdpo_bench.leaderboards.statistics import statistics_of


def ranks(make, gains, higher=True, noise=0.0):
    base = make.captions(0.5, size=100)
    generator = np.random.default_rng(0)
    systems = {}
    for name, gain in gains.items():
        luck = generator.normal(0, noise, len(base))
        # Without its mean: the differences are those of the gains.
        scores = base["CIDEr"] + gain + luck - luck.mean()
        systems[name] = [statistics_of(base.assign(CIDEr=scores))]
    drawn = resample(systems, ["CIDEr"], resamples=1000)
    return ranks_of(systems, drawn, {"CIDEr": higher}, 0.05)["CIDEr"]


def test_systems_that_are_apart_are_ranked_in_order_whatever_theirs_is(make):
    assert ranks(make, {"c": 0.0, "a": 0.2, "b": 0.1}) == {"a": 1, "b": 2, "c": 3}


def test_less_is_better_turns_the_order(make):
    found = ranks(make, {"c": 0.0, "a": 0.2, "b": 0.1}, higher=False)
    assert found == {"c": 1, "b": 2, "a": 3}


def test_equal_systems_share_a_rank_and_numbers_are_left_out_behind_them(make):
    assert ranks(make, {"a": 0.1, "b": 0.1, "c": 0.0}) == {"a": 1, "b": 1, "c": 3}


def test_being_apart_is_not_transitive_but_sharing_a_rank_is(make):
    # a is apart from c; b, in between, from neither: none of the three may be put above another.
    found = ranks(make, {"a": 0.14, "b": 0.07, "c": 0.0, "d": -5.0}, noise=0.35)
    assert found == {"a": 1, "b": 1, "c": 1, "d": 4}


def test_a_metric_without_a_better_side_has_no_ranks(make):
    systems = {name: [statistics_of(make.captions(seed=seed))] for seed, name in enumerate("ab")}
    drawn = resample(systems, ["entropy"], resamples=50)
    assert ranks_of(systems, drawn, {"entropy": None}, 0.05) == {}
