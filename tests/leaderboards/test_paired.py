import numpy as np
import pandas as pd
import pytest
import sacrebleu
import scipy.stats
from pycocoevalcap.bleu.bleu_scorer import cook_refs, cook_test
from sacrebleu.significance import PairedTest
from statsmodels.stats.contingency_tables import mcnemar

from cwdpo_bench.calibration import bootstrap_counts, percentile_interval
from cwdpo_bench.evaluate.metrics import METRICS, metric_names_for
from cwdpo_bench.leaderboards import paired
from cwdpo_bench.leaderboards.paired import paired_differences, randomization_p, resample
from cwdpo_bench.leaderboards.significance import detectable
from cwdpo_bench.leaderboards.statistics import statistics_of


def compare_seeds(candidates, baselines, metrics, resamples=2000, seed=0, test="bootstrap"):
    systems = {
        "x": [statistics_of(samples) for samples in candidates],
        "base": [statistics_of(samples) for samples in baselines],
    }
    drawn = resample(systems, list(metrics), resamples=resamples, seed=seed)
    return paired_differences(systems, drawn, "base", test=test, seed=seed)["x"]


def compare(candidate, baseline, metrics=("accuracy",), **settings):
    return compare_seeds([candidate], [baseline], metrics, **settings)


def test_the_difference_is_that_of_the_two_corpus_values(make):
    for build in (make.choices, make.captions):
        candidate, baseline = build(0.7, seed=1), build(0.5, seed=2)
        names = metric_names_for(baseline)
        found = compare(candidate, baseline, names, resamples=50)
        first, second = statistics_of(candidate), statistics_of(baseline)
        assert list(found) == names
        for name in names:
            expected = first.value(name) - second.value(name)
            assert found[name].value == pytest.approx(expected, abs=1e-12)


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
            assert (difference.effect, difference.detectable) == (None, 0.0)


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


def test_few_totals_at_a_time_give_the_same(make, monkeypatch):
    one, other = make.choices(0.6, seed=1), make.choices(0.5, seed=2)
    whole = compare(one, other, ["accuracy", "ece", "aurc"])
    monkeypatch.setattr(paired, "_TOTALS_AT_A_TIME", 1)
    parts = compare(one, other, ["accuracy", "ece", "aurc"])
    for metric, difference in whole.items():
        assert parts[metric].value == difference.value
        assert parts[metric].ci95 == pytest.approx(difference.ci95, abs=1e-12)
        assert parts[metric].stderr == pytest.approx(difference.stderr)


def test_a_metric_that_one_side_lacks_is_left_out(make):
    whole = make.choices()
    without = whole.drop(columns=["option_log_probabilities", "option_correct"])
    assert list(compare(without, whole, metric_names_for(whole))) == ["accuracy", "parse_failures"]
    nothing = without[["id", "cluster", "groups"]]
    assert compare(nothing, whole, metric_names_for(whole)) == {}


TEXT = "a red blue green circle square star above below left of the small large on grey"
WORDS = TEXT.split()


def captions_of(generator, references, changed):
    """The references with a share of their words replaced."""
    return [
        " ".join(
            str(generator.choice(WORDS)) if generator.random() < changed else word
            for word in reference.split()
        )
        for reference in references
    ]


def bleu_samples(sentences, references):
    """Samples with BLEU's statistics as `evaluate/captions.py` keeps them."""
    cooked = [
        cook_test(sentence, cook_refs([reference]), eff="closest")
        for sentence, reference in zip(sentences, references, strict=True)
    ]
    return pd.DataFrame(
        {
            "id": [f"{i:04}" for i in range(len(cooked))],
            "cluster": [f"{i:04}" for i in range(len(cooked))],
            "groups": [[] for _ in cooked],
            "bleu_matches": [c["correct"] for c in cooked],
            "bleu_guesses": [c["guess"] for c in cooked],
            "bleu_length": [c["testlen"] for c in cooked],
            "bleu_reference_length": [c["reflen"] for c in cooked],
        }
    )


def test_bleu_agrees_with_sacrebleus_paired_tests():
    """Value, interval and both p's of sacrebleu on the same sentences, to the draws' own error."""
    generator = np.random.default_rng(3)
    references = [" ".join(generator.choice(WORDS, 12)) for _ in range(200)]
    baseline = captions_of(generator, references, 0.30)
    candidate = captions_of(generator, references, 0.27)
    ours = {
        test: compare(
            bleu_samples(candidate, references),
            bleu_samples(baseline, references),
            ["BLEU-4"],
            resamples=4000,
            test=test,
        )["BLEU-4"]
        for test in ("bootstrap", "randomization")
    }
    bleu = sacrebleu.BLEU(tokenize="none", smooth_method="none")
    for kind, test in (("bs", "bootstrap"), ("ar", "randomization")):
        systems = [("base", baseline), ("x", candidate)]
        _, scores = PairedTest(systems, {"BLEU": bleu}, [references], kind, n_samples=4000)()
        base, other = scores["BLEU"]
        expected = (other.score - base.score) / 100
        assert ours[test].value == pytest.approx(expected, abs=1e-6)
        # sacrebleu's p is that of a shifted bootstrap: near ours where the law is near normal.
        assert ours[test].p == pytest.approx(other.p_value, abs=0.03)
        if kind == "bs":
            # Half the width of the candidate's own interval.
            single = statistics_of(bleu_samples(candidate, references))
            drawn = resample({"x": [single]}, ["BLEU-4"], resamples=4000)["x"]["BLEU-4"]
            low, high = np.quantile(drawn.resampled, (0.025, 0.975))
            assert (high - low) / 2 == pytest.approx(other.ci / 100, rel=0.1)


def test_corpus_bleu_is_recomposed_and_not_a_mean_of_sentences():
    generator = np.random.default_rng(4)
    references = [" ".join(generator.choice(WORDS, int(n))) for n in generator.integers(5, 20, 50)]
    statistics = statistics_of(bleu_samples(captions_of(generator, references, 0.3), references))
    keep = np.zeros(50, dtype=bool)
    singles = []
    for place in range(50):
        keep[:] = False
        keep[place] = True
        singles.append(statistics.rows(keep).value("BLEU-4"))
    assert abs(np.mean(singles) - statistics.value("BLEU-4")) > 0.01


def test_randomization_of_a_mean_equals_scipys_permutation_test(make):
    generator = np.random.default_rng(5)
    baseline = make.captions(0.5, size=60)
    candidate = baseline.assign(CIDEr=baseline["CIDEr"] + generator.normal(0.1, 0.35, 60))
    found = compare(candidate, baseline, ["CIDEr"], resamples=8000, test="randomization")["CIDEr"]
    oracle = scipy.stats.permutation_test(
        (candidate["CIDEr"].to_numpy(), baseline["CIDEr"].to_numpy()),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type="samples",
        n_resamples=8000,
        vectorized=True,
        rng=np.random.default_rng(0),
    )
    assert found.test == "randomization"
    assert found.p == pytest.approx(oracle.pvalue, abs=0.015)


def test_randomization_leaves_out_what_cannot_be_exchanged(make):
    one, other = (statistics_of(make.choices(skill)) for skill in (0.5, 0.6))
    found = randomization_p(one, other, ["accuracy", "ece", "ece_adaptive", "aurc"], resamples=50)
    assert list(found) == ["accuracy", "ece"]


def test_choices_one_a_cluster_get_mcnemars_exact_test(make):
    one, other = (
        make.choices(skill, size=90, seed=seed).assign(cluster=lambda s: s["id"])
        for skill, seed in ((0.6, 1), (0.5, 2))
    )
    found = compare(one, other)["accuracy"]
    table = pd.crosstab(one["correct"], other["correct"]).to_numpy()
    assert found.test == "mcnemar"
    assert found.p == pytest.approx(mcnemar(table, exact=True).pvalue, rel=1e-9)
    assert compare(make.choices(0.6), make.choices(0.5))["accuracy"].test == "bootstrap"


def test_the_effect_is_cohens_d_z_of_a_mean(make):
    generator = np.random.default_rng(6)
    baseline = make.captions(0.5, size=300)
    gains = generator.normal(0.05, 0.35, 300)
    candidate = baseline.assign(CIDEr=baseline["CIDEr"] + gains)
    found = compare(candidate, baseline, ["CIDEr"], resamples=4000)["CIDEr"]
    assert found.effect == pytest.approx(gains.mean() / gains.std(), rel=0.05)


def test_what_is_detectable_is_found_four_times_in_five():
    """The promise of `detectable`, kept in simulation."""
    generator = np.random.default_rng(7)
    size, spread = 400, 1.0
    gap = detectable(spread / np.sqrt(size), 0.05)
    noise = generator.normal(0, spread, (4000, size))
    p = scipy.stats.ttest_1samp(noise + gap, 0, axis=1).pvalue
    assert np.mean(p <= 0.05) == pytest.approx(0.8, abs=0.02)


# --- seeds ---------------------------------------------------------------------------------------


def seeded(make, mean, spread, seeds, generator, size=200):
    """Runs of one system: an image effect that all share, a seed effect a run."""
    images = np.random.default_rng(11).normal(1, 0.5, size)
    return [
        make.captions(size=size).assign(
            CIDEr=images + mean + offset + generator.normal(0, 0.1, size)
        )
        for offset in generator.normal(0, spread, seeds)
    ]


def test_seeds_widen_the_interval_by_their_own_spread(make):
    generator = np.random.default_rng(12)
    candidates = seeded(make, 0.1, 0.05, 5, generator)
    baselines = seeded(make, 0.0, 0.05, 5, generator)
    found = compare_seeds(candidates, baselines, ["CIDEr"], resamples=8000)["CIDEr"]
    means = [[s["CIDEr"].mean() for s in runs] for runs in (candidates, baselines)]
    assert found.value == pytest.approx(np.mean(means[0]) - np.mean(means[1]))
    of_seeds = np.sqrt(sum(np.var(m, ddof=1) / 5 for m in means))
    of_images = np.sqrt(2 * 0.1**2 / 5 / 200)
    assert found.stderr == pytest.approx(np.hypot(of_seeds, of_images), rel=0.1)
    one = compare(candidates[0], baselines[0], ["CIDEr"])["CIDEr"]
    assert one.stderr < found.stderr / 2


def test_equal_runs_as_seeds_have_no_spread_of_seeds(make):
    runs = [make.captions(0.6)] * 3
    single = compare(make.captions(0.6), make.captions(0.5, seed=1), ["CIDEr"])["CIDEr"]
    found = compare_seeds(runs, [make.captions(0.5, seed=1)] * 3, ["CIDEr"])["CIDEr"]
    assert found.stderr == pytest.approx(single.stderr)
    assert found.ci95 == pytest.approx(single.ci95)


# --- coverage ------------------------------------------------------------------------------------


def test_intervals_cover_the_truth_as_often_as_they_say(make):
    """95 % intervals of paired differences hold the true difference 93 to 97 times in 100.

    Samples are drawn from a finite population whose own difference is the truth: a mean, a share
    and a corpus ratio (BLEU), each of 200 clusters.
    """
    generator = np.random.default_rng(20)
    trials, size, population = 1500, 200, 20_000
    pairs = {}
    skill = generator.normal(1, 0.5, population)
    values = [skill + generator.normal(0, 0.3, population) for _ in range(2)]
    pairs["CIDEr"] = [np.column_stack([v, np.ones(population)]) for v in values]
    hard = generator.random(population)
    right = [(hard + generator.normal(0, 0.2, population)) < share for share in (0.62, 0.58)]
    pairs["accuracy"] = [np.column_stack([r, np.ones(population)]).astype(float) for r in right]
    lengths = generator.integers(8, 16, population)
    bleu = []
    for chance in (0.62, 0.6):
        guesses = np.column_stack([lengths - n for n in range(4)])
        unigram = generator.binomial(lengths, np.clip(chance + 0.1 * (skill - 1), 0, 1))
        longer = [generator.binomial(unigram, 0.6**n) for n in (1, 2, 3)]
        matches = np.minimum(np.column_stack([unigram, *longer]), guesses)
        bleu.append(np.column_stack([matches, guesses, lengths, lengths, np.ones(population)]))
    pairs["BLEU-4"] = [block.astype(float) for block in bleu]
    counts = np.concatenate(list(bootstrap_counts(size, 1000, seed=0)))
    for metric, (one, other) in pairs.items():
        value = METRICS[metric].value
        truth = value(one.sum(axis=0)) - value(other.sum(axis=0))
        covered = 0
        for _ in range(trials):
            rows = generator.integers(0, population, size)
            drawn = value(counts @ one[rows]) - value(counts @ other[rows])
            low, high = percentile_interval(drawn)
            covered += low <= truth <= high
        assert 0.93 <= covered / trials <= 0.97, (metric, covered / trials)
