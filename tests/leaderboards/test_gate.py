import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from cwdpo_bench.demo.captions import references as captions_of_scene
from cwdpo_bench.demo.world import draw_scene
from cwdpo_bench.evaluate.results import read_run
from cwdpo_bench.evaluate.score import score_captions_files
from cwdpo_bench.leaderboards.baseline_file import write_baseline
from cwdpo_bench.leaderboards.gate import run_gate, to_json
from cwdpo_bench.leaderboards.policy import policy_of

REAL = Path(__file__).parents[2].parent / "shared" / "real" / "flickr8k"


def policy(*rules, **settings):
    return policy_of({"rules": list(rules), **settings}, "test")


def verdicts(result):
    return {(check.task, check.metric): check.verdict for check in result.checks}


def flat(samples):
    """A question a cluster."""
    return samples.assign(cluster=samples["id"])


@pytest.fixture
def save(make, tmp_path):
    """Write run folders of one task each, or of several."""

    def write(name, samples, task="mmmu", **parts):
        tasks = {task: make.task(samples, task, **parts)} if task else samples
        return make.save(tmp_path / name, name, tasks)

    return write


# --- the four answers ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [5, 300])
def test_the_same_run_against_itself_passes_whatever_its_size(make, save, size):
    run = save("a", make.choices(0.6, size=size))
    result = run_gate(run, run)
    assert (result.verdict, result.exit_status) == ("pass", 0)
    assert {check.metric for check in result.checks} == {"accuracy", "ece", "parse_failures"}
    assert all(check.reason.startswith("the same answers") for check in result.checks)


def test_a_better_run_passes_and_turned_round_it_is_a_regression(make, save):
    worse = save("worse", flat(make.choices(0.5, size=400)))
    better = save("better", flat(make.choices(0.8, size=400)))
    rules = policy({"metric": "accuracy", "max_drop": 0, "detect": 6})
    assert run_gate(better, worse, rules).verdict == "pass"
    result = run_gate(worse, better, rules)
    assert (result.verdict, result.exit_status) == ("regression", 1)
    (check,) = result.checks
    assert check.difference == pytest.approx(check.value - check.baseline)
    assert check.interval[0] < check.difference < check.interval[1] < 0
    assert f"{100 * check.difference:+.1f}" in check.reason
    assert "90 % interval [" in check.reason
    assert check.name == "mmmu accuracy: max_drop 0, detect 6"


def score(folder, captions, references):
    folder.mkdir()
    images = [{"id": name} for name in references]
    annotations = [
        {"image_id": name, "caption": text} for name, texts in references.items() for text in texts
    ]
    truth, answers = folder / "references.json", folder / "answers.json"
    truth.write_text(json.dumps({"images": images, "annotations": annotations}))
    answers.write_text(
        json.dumps([{"image_id": name, "caption": text} for name, text in captions.items()])
    )
    score_captions_files("coco", answers, truth, folder / "run")
    return folder / "run"


def without_words(captions, share, seed=0):
    """Half of the words of a share of the captions are dropped."""
    generator = random.Random(seed)
    dropped = dict(captions)
    for name in generator.sample(sorted(captions), int(share * len(captions))):
        words = captions[name].split()
        dropped[name] = " ".join(words[: (len(words) + 1) // 2])
    return dropped


def test_words_dropped_from_a_tenth_of_the_captions_are_a_regression(tmp_path):
    generator = random.Random(0)
    references, captions = {}, {}
    for image in range(250):
        first, *rest = captions_of_scene(draw_scene(generator, "test"), generator, 6)
        captions[image], references[image] = first, rest
    whole = score(tmp_path / "whole", captions, references)
    cut = score(tmp_path / "cut", without_words(captions, 0.1), references)
    result = run_gate(cut, whole)
    assert (result.verdict, result.exit_status) == ("regression", 1)
    assert verdicts(result)["coco", "CIDEr"] == "regression"
    assert run_gate(whole, whole).exit_status == 0


@pytest.mark.skipif(not REAL.is_dir(), reason="the real captions are not here")
def test_words_dropped_from_a_tenth_of_real_captions_are_a_regression(tmp_path):
    predictions = json.loads((REAL / "human_predictions.json").read_text())
    cut = without_words({row["image_id"]: row["caption"] for row in predictions}, 0.1)
    answers = tmp_path / "cut.json"
    answers.write_text(
        json.dumps([{"image_id": name, "caption": text} for name, text in cut.items()])
    )
    truth = REAL / "references.json"
    score_captions_files("coco", REAL / "human_predictions.json", truth, tmp_path / "whole")
    score_captions_files("coco", answers, truth, tmp_path / "run")
    result = run_gate(tmp_path / "run", tmp_path / "whole")
    assert verdicts(result)["coco", "CIDEr"] == "regression"


def test_ten_samples_are_inconclusive_and_the_gate_says_how_many_would_do(make, save):
    base = save("base", make.choices(0.6, size=10, seed=1))
    other = save("other", make.choices(0.5, size=10, seed=2))
    result = run_gate(other, base)
    assert (result.verdict, result.exit_status) == ("inconclusive", 2)
    check = result.checks[0]
    assert check.metric == "accuracy"
    assert check.samples_needed > 100
    lenient = run_gate(other, base, inconclusive="pass")
    assert (lenient.verdict, lenient.exit_status) == ("inconclusive", 0)
    assert (
        run_gate(
            other, base, policy({"metric": "accuracy", "non_inferior": 1}, inconclusive="pass")
        ).exit_status
        == 0
    )


def test_the_number_that_would_do_does(make, save):
    """With as many questions as the gate asked for, the same gap is settled."""
    rules = policy({"metric": "accuracy", "max_drop": 0, "detect": 8})

    def pair(size):
        right = np.random.default_rng(3).random((2, size)) < 0.6
        return [
            save(f"{name}{size}", flat(make.choices(0.6, size=size)).assign(correct=right[k]))
            for k, name in enumerate("ab")
        ]

    first = run_gate(*pair(150), rules)
    assert first.verdict == "inconclusive"
    assert run_gate(*pair(first.checks[0].samples_needed + 60), rules).verdict != "inconclusive"


def test_a_missing_task_cannot_be_judged(make, save):
    both = {name: make.task(make.choices(0.6, size=100), name) for name in ("mmmu", "mmbench")}
    base = save("base", both, task=None)
    only = save("only", make.choices(0.6, size=100))
    result = run_gate(only, base)
    assert (result.verdict, result.exit_status) == ("not judged", 3)
    missing = [check for check in result.checks if check.task == "mmbench" and check.required]
    assert {check.reason for check in missing} == {"only did not run mmbench"}
    named = policy({"task": "nocaps", "metric": "CIDEr", "max_drop": 0, "detect": 5})
    assert run_gate(base, base, named).exit_status == 3


def test_a_regression_outweighs_what_cannot_be_judged(make, save):
    tasks = {name: make.task(make.choices(0.9, size=200), name) for name in ("mmmu", "mmbench")}
    base = save("base", tasks, task=None)
    worse = save("worse", make.choices(0.3, size=200))
    result = run_gate(worse, base)
    assert (result.verdict, result.exit_status) == ("regression", 1)


def option_scores(make, logits, gold):
    logps = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    right = logits.argmax(axis=1) == gold
    letters = np.array(list("ABCD"))
    return flat(make.choices(size=len(gold))).assign(
        option_log_probabilities=list(logps),
        gold=letters[gold],
        parsed=letters[logits.argmax(axis=1)],
        correct=right,
        option_correct=right,
    )


def test_overconfidence_trips_ece_while_accuracy_holds(make, save):
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 1.5, (600, 4))
    # Gumbel noise draws the answer from the softmax: the model is calibrated.
    gold = (logits + generator.gumbel(size=logits.shape)).argmax(axis=1)
    base = save("base", option_scores(make, logits, gold))
    sharp = save("sharp", option_scores(make, 3 * logits, gold))
    result = run_gate(sharp, base)
    found = verdicts(result)
    assert found["mmmu", "ece"] == "regression"
    assert found["mmmu", "accuracy"] == "pass"
    assert result.exit_status == 1


# --- what cannot be judged -----------------------------------------------------------------------


def test_other_prompts_other_samples_and_other_truth_cannot_be_judged(make, save):
    samples = make.choices(0.6, size=100)
    base = save("base", samples)
    rules = policy({"metric": "accuracy", "max_drop": 0, "detect": 6})
    told = []
    for name, other in {
        "prompt": save("a", samples, prompt="another"),
        "samples": save("b", samples[10:]),
        "truth": save("c", samples.assign(options=[["w", "x", "y", "z"]] * 100)),
    }.items():
        result = run_gate(other, base, rules)
        assert result.exit_status == 3, name
        told.append(result.checks[0].reason)
    assert "prompt: 'another' against 'abc'" in told[0]
    assert "90 in common, 0 only in the former, 10 only" in told[1]
    assert "sample 'q0000' has another 'options'" in told[2]


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (lambda text: text.replace('"value": 0.', '"value": NaN, "x": 0.', 1), "NaN"),
        (lambda text: text[:-50], "not JSON"),
        (lambda text: text.replace('"schema": 1', '"schema": 9'), "schema"),
        (lambda text: text.replace('"value": 0.', '"value": 0.1', 1), "score it again"),
    ],
)
def test_a_broken_result_file_cannot_be_judged(make, save, broken, words):
    run = save("a", make.choices(0.6, size=20))
    path = run / "results.json"
    path.write_text(broken(path.read_text()))
    result = run_gate(run, run)
    assert (result.verdict, result.exit_status) == ("not judged", 3)
    assert words in result.error
    json.dumps(to_json(result), allow_nan=False)


def test_missing_runs_and_broken_policies_cannot_be_judged(make, save, tmp_path):
    run = save("a", make.choices(0.6, size=20))
    assert "no such run folder" in run_gate(tmp_path / "none", run).error
    assert "no such run folder" in run_gate(run, tmp_path / "none").error
    (tmp_path / "p.yaml").write_text("rules: [{metric: acuracy, max_drop: 1, detect: 1}]")
    result = run_gate(run, run, tmp_path / "p.yaml")
    assert result.exit_status == 3
    assert "did you mean 'accuracy'" in result.error


def test_a_gate_without_any_required_rule_has_passed_nothing(make, save):
    run = save("a", make.choices(0.6, size=50))
    rules = policy({"metric": "accuracy", "max_drop": 0, "detect": 6, "required": False})
    assert run_gate(run, run, rules).verdict == "not judged"
    captions_only = policy({"metric": "CIDEr", "max_drop": 0, "detect": 6})
    assert run_gate(run, run, captions_only).verdict == "not judged"


# --- the kinds of limits -------------------------------------------------------------------------


def shifted(make, save, gain, size=200, spread=0.2):
    """A baseline, and a candidate whose CIDEr differs by exactly `gain` on average."""
    base = make.captions(0.5, size=size)
    luck = np.random.default_rng(4).normal(0, spread, size)
    other = base.assign(CIDEr=base["CIDEr"] + gain + luck - luck.mean())
    return save(f"other{gain}", other, "coco"), save("base", base, "coco")


@pytest.mark.parametrize(
    ("gain", "verdict"), [(-0.10, "regression"), (-0.04, "inconclusive"), (0.0, "pass")]
)
def test_no_worse_is_shown_and_not_read_from_a_large_p(make, save, gain, verdict):
    # The standard error is .014, the margin .05.
    rules = policy({"metric": "CIDEr", "non_inferior": 5})
    (check,) = run_gate(*shifted(make, save, gain), rules).checks
    assert check.verdict == verdict
    if verdict == "inconclusive":
        assert check.samples_needed > 200


def test_a_drop_within_the_limit_passes_and_one_that_is_shown_to_exceed_it_does_not(make, save):
    runs = shifted(make, save, -0.10)
    for limit, verdict in ((0, "regression"), (5, "regression"), (15, "pass")):
        rules = policy({"metric": "CIDEr", "max_drop": limit, "detect": 8})
        assert run_gate(*runs, rules).verdict == verdict


def test_a_pass_needs_a_test_set_that_could_have_told(make, save):
    runs = shifted(make, save, 0.0, spread=0.6)
    for detect, verdict in ((2, "inconclusive"), (20, "pass")):
        rules = policy({"metric": "CIDEr", "max_drop": 0, "detect": detect})
        (check,) = run_gate(*runs, rules).checks
        assert check.verdict == verdict
        assert "can show a change of" in check.reason


@pytest.mark.parametrize(
    "rule", [{"max_drop": 0, "detect": 6}, {"non_inferior": 5}, {"min_value": 95}]
)
def test_that_no_question_changed_shows_no_more_than_their_number_can(make, save, rule):
    """Three in a hundred losses may hide where none of a hundred questions changed."""
    rules = policy({"metric": "accuracy", **rule})
    skill = 1.1 if "min_value" in rule else 0.6
    for size, verdict in ((40, "inconclusive"), (400, "pass")):
        runs = [
            save(f"{seed}-{size}", flat(make.choices(skill, size=size, seed=seed)))
            for seed in (1, 0)
        ]
        (check,) = run_gate(*runs, rules).checks
        assert not check.reason.startswith("the same answers")
        assert "min_value" in rule or check.difference == 0
        assert check.verdict == verdict, check.reason


def test_a_floor_is_held_against_the_candidate_alone(make, save):
    candidate, base = shifted(make, save, 0.0)
    value = read_run(candidate).results["tasks"]["coco"]["metrics"]["CIDEr"]["value"]
    for points, verdict in ((-20, "pass"), (0, "inconclusive"), (20, "regression")):
        rules = policy({"metric": "CIDEr", "min_value": 100 * value + points})
        (check,) = run_gate(candidate, base, rules).checks
        assert check.verdict == verdict
        assert check.baseline == pytest.approx(value + points / 100)


def test_an_advisory_rule_is_told_and_does_not_fail(make, save):
    runs = shifted(make, save, -0.2)
    rules = policy(
        {"metric": "CIDEr", "max_drop": 0, "detect": 8, "required": False},
        {"metric": "ROUGE-L", "max_drop": 0, "detect": 8},
    )
    result = run_gate(*runs, rules)
    assert [check.verdict for check in result.checks] == ["regression", "pass"]
    assert result.exit_status == 0


def test_groups_are_judged_by_themselves(make, save):
    base = make.captions(0.5, size=300)
    hurt = [("out-domain" in groups) * 0.3 for groups in base["groups"]]
    runs = (
        save("hurt", base.assign(CIDEr=base["CIDEr"] - hurt), "nocaps"),
        save("b", base, "nocaps"),
    )
    one = {"metric": "CIDEr", "max_drop": 0, "detect": 8, "group": "out-domain"}
    assert run_gate(*runs, policy(one)).verdict == "regression"
    result = run_gate(*runs, policy({**one, "group": "*"}))
    assert {c.group: c.verdict for c in result.checks} == {
        "in-domain": "pass",
        "out-domain": "regression",
    }
    missing = run_gate(*runs, policy({**one, "task": "nocaps", "group": "out-domian"}))
    assert "did you mean 'out-domain'" in missing.checks[0].reason


def test_published_figures_are_points_and_marked_so(make, save):
    candidate, _ = shifted(make, save, 0.0)
    result = run_gate(
        candidate, "published:CW-DPO", policy({"metric": "CIDEr", "max_drop": 0, "detect": 8})
    )
    check = result.checks[0]
    assert (check.task, check.baseline) == ("coco", pytest.approx(1.426))
    assert check.verdict == "regression"
    assert "no paired test" in result.notes[0]
    # NoCaps has published figures too, and this run none.
    assert [c.verdict for c in result.checks[1:]] == ["not judged"] * 2
    assert "did you mean 'CW-DPO'" in run_gate(candidate, "published:CW_DPO").error


# --- a committed baseline ------------------------------------------------------------------------


def test_a_baseline_file_stands_for_its_run(make, save, tmp_path):
    tasks = {
        "coco": make.task(make.captions(0.6, size=80)),
        "mmmu": make.task(make.choices(0.6, size=80), "mmmu"),
    }
    base = save("base", tasks, task=None)
    other = save(
        "other",
        {
            "coco": make.task(make.captions(0.5, size=80, seed=1)),
            "mmmu": make.task(make.choices(0.5, size=80, seed=1), "mmmu"),
        },
        task=None,
    )
    file = tmp_path / "baseline.npz"
    write_baseline(read_run(base), file)
    assert run_gate(other, file).checks == run_gate(other, base).checks
    assert all(c.reason.startswith("the same answers") for c in run_gate(base, file).checks)
    again = tmp_path / "again.npz"
    write_baseline(read_run(base), again)
    assert again.read_bytes() == file.read_bytes()
    for text in (b"Describe.", b"a red square", b"Which?"):
        assert text not in file.read_bytes()


def test_a_baseline_of_coco_is_less_than_a_megabyte(make, save, tmp_path):
    generator = np.random.default_rng(0)
    size = 5000
    samples = make.captions(0.6, size=size)
    lengths = generator.integers(8, 14, size)
    for column in ("token_confidences", "token_entropies", "token_tv", "token_js"):
        samples[column] = [list(generator.random(n)) for n in lengths]
    samples["token_correct"] = [list(generator.random(n) < 0.7) for n in lengths]
    meteor = np.zeros((size, 23))
    meteor[:, :4] = generator.integers(4, 14, (size, 4))
    meteor[:, 4:8] = generator.integers(0, 8, (size, 4))
    meteor[:, 20:] = generator.integers(1, 9, (size, 3))
    samples = samples.assign(
        meteor_statistics=list(meteor), METEOR=generator.random(size), SPICE=generator.random(size)
    )
    samples["CIDEr"] = generator.random(size)
    samples["ROUGE-L"] = generator.random(size)
    samples["id"] = samples["cluster"] = [str(i) for i in generator.permutation(size) * 100 + 9]
    run = save("coco", samples, "coco")
    write_baseline(read_run(run), tmp_path / "baseline.npz")
    assert (tmp_path / "baseline.npz").stat().st_size < 1_000_000


def test_a_baseline_file_that_is_none_cannot_be_judged_by(make, save, tmp_path):
    run = save("a", make.choices(0.6, size=40))
    file = tmp_path / "baseline.npz"
    write_baseline(read_run(run), file)
    cut = tmp_path / "cut.npz"
    cut.write_bytes(file.read_bytes()[:-200])
    assert "no whole baseline file" in run_gate(run, cut).error
    (tmp_path / "text").write_text("hello")
    assert "no whole baseline file" in run_gate(run, tmp_path / "text").error
    other = shutil.copytree(run, tmp_path / "other")
    samples = make.choices(0.6, size=40).assign(options=[["w", "x", "y", "z"]] * 40)
    samples.to_parquet(other / "samples" / "mmmu.parquet")
    assert "another 'options'" in run_gate(other, file).checks[0].reason


# --- the level -----------------------------------------------------------------------------------


def test_false_alarms_are_as_rare_as_the_level_says(make):
    """Candidates as good as the baseline: at most 5 in 100 gates call a regression.

    Three rules a gate on independent metrics, so that Holm has something to do: without it about
    14 in 100 would.
    """
    from cwdpo_bench.leaderboards.gate import _judged, _plan
    from cwdpo_bench.leaderboards.sides import Side
    from cwdpo_bench.leaderboards.statistics import TaskStatistics

    generator = np.random.default_rng(8)
    size, trials = 200, 400
    metrics = ("CIDEr", "ROUGE-L", "SPICE")
    rules = policy(*({"metric": name, "max_drop": 0, "detect": 50} for name in metrics))
    ids = np.array([str(i) for i in range(size)])

    def side(name):
        blocks = {
            m: np.column_stack([generator.gamma(2, 0.5, size), np.ones(size)]) for m in metrics
        }
        whole = TaskStatistics(ids, ids, ((),) * size, np.ones(size, bool), {}, blocks)
        return Side(name, {"coco": (whole,)}, {"coco": ("",)})

    alarms = sum(
        any(
            c.verdict == "regression"
            for c in _judged(list(_plan(rules, side("a"), side("b"))), rules)
        )
        for _ in range(trials)
    )
    # Three standard errors of a share of .05 in 400.
    assert alarms / trials <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / trials)
    assert alarms / trials >= 0.02
