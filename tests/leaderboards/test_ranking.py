import numpy as np

from cwdpo_bench.leaderboards.paired import resample
from cwdpo_bench.leaderboards.ranking import rank_systems
from cwdpo_bench.leaderboards.statistics import statistics_of


def ranks(make, gains, higher=True, noise=0.0, resamples=1000):
    base = make.captions(0.5, size=100)
    generator = np.random.default_rng(0)
    systems = {}
    for name, gain in gains.items():
        luck = generator.normal(0, noise, len(base))
        # Without its mean: the differences are those of the gains.
        scores = base["CIDEr"] + gain + luck - luck.mean()
        systems[name] = [statistics_of(base.assign(CIDEr=scores))]
    drawn = resample(systems, ["CIDEr"], resamples=resamples)
    found = rank_systems(systems, drawn, {"CIDEr": higher}, 0.05)
    # Whoever beats all others is alone on rank 1.
    if "CIDEr" in found.best:
        assert [n for n, rank in found.ranks["CIDEr"].items() if rank == 1] == [found.best["CIDEr"]]
    return found.ranks["CIDEr"], found.best.get("CIDEr")


def test_systems_that_are_apart_are_ranked_in_order_whatever_theirs_is(make):
    assert ranks(make, {"c": 0.0, "a": 0.2, "b": 0.1}) == ({"a": 1, "b": 2, "c": 3}, "a")


def test_less_is_better_turns_the_order(make):
    found = ranks(make, {"c": 0.0, "a": 0.2, "b": 0.1}, higher=False)
    assert found == ({"c": 1, "b": 2, "a": 3}, "c")


def test_equal_systems_share_a_rank_and_numbers_are_left_out_behind_them(make):
    assert ranks(make, {"a": 0.1, "b": 0.1, "c": 0.0}) == ({"a": 1, "b": 1, "c": 3}, None)


def test_a_rank_counts_who_is_clearly_better_though_being_apart_is_not_transitive(make):
    # a is apart from c; b, in between, from neither.
    found = ranks(make, {"a": 0.14, "b": 0.07, "c": 0.0, "d": -5.0}, noise=0.35)
    assert found == ({"a": 1, "b": 1, "c": 2, "d": 4}, None)


def test_a_chain_of_many_systems_does_not_end_on_one_rank(make):
    found, best = ranks(
        make, {f"{k:02}": -0.05 * k for k in range(16)}, noise=0.3, resamples=12_000
    )
    assert best is None
    assert found["00"] == 1
    assert found["15"] > 8
    # In the order of the values here, where all differences are about as sure.
    assert list(found.values()) == sorted(found.values())


def test_a_metric_without_a_better_side_has_no_ranks(make):
    systems = {name: [statistics_of(make.captions(seed=seed))] for seed, name in enumerate("ab")}
    drawn = resample(systems, ["entropy"], resamples=50)
    assert rank_systems(systems, drawn, {"entropy": None}, 0.05) == ({}, {})
