import pytest

from cwdpo_bench.errors import UserError
from cwdpo_bench.leaderboards.policy import load_policy, policy_of


def problem(**rule):
    with pytest.raises(UserError) as caught:
        policy_of({"rules": [rule]}, "gate.yaml")
    return str(caught.value)


def test_the_default_policy_asks_for_scores_and_calibration():
    policy = load_policy()
    required = {rule.metric for rule in policy.rules if rule.required}
    assert required == {"CIDEr", "accuracy", "ece", "token_ece"}
    assert (policy.level, policy.inconclusive) == (0.05, "fail")


def test_limits_are_in_the_unit_of_the_tables():
    policy = policy_of(
        {
            "rules": [
                {"metric": "CIDEr", "max_drop": 1, "detect": 5, "min_value": 120},
                {"metric": "nll", "max_rise": 0.1, "detect": 0.2},
            ]
        },
        "gate.yaml",
    )
    first, second = policy.rules
    assert [tuple(limit) for limit in first.limits()] == [
        ("max_drop", 0.01, 0.05),
        ("min_value", 1.2, 0.05),
    ]
    assert [tuple(limit) for limit in second.limits()] == [("max_rise", 0.1, 0.2)]
    assert first.describe("max_drop") == "max_drop 1, detect 5"
    assert first.describe("min_value") == "min_value 120"


def test_an_unknown_metric_names_the_nearest():
    told = problem(metric="CIDER", max_drop=0, detect=1)
    assert told == "gate.yaml: rules.0: unknown metric 'CIDER'; did you mean 'CIDEr'?"


def test_an_unknown_key_names_the_nearest():
    told = problem(metric="CIDEr", max_drp=0, detect=1)
    assert "rules.0.max_drp: unknown key; did you mean 'max_drop'?" in told
    with pytest.raises(UserError, match=r"rule: unknown key; did you mean 'rules'"):
        policy_of({"rule": [], "rules": [{"metric": "CIDEr", "non_inferior": 1}]}, "p")


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({"metric": "CIDEr"}, "CIDEr has no limit; write one of max_drop, max_rise"),
        ({"metric": "ece", "max_drop": 1, "detect": 1}, "less ece is better; write max_rise"),
        ({"metric": "CIDEr", "max_rise": 1, "detect": 1}, "more CIDEr is better; write max_drop"),
        ({"metric": "ece", "min_value": 1}, "min_value needs a metric of which more is better"),
        ({"metric": "entropy", "non_inferior": 1}, "entropy has no better side"),
        ({"metric": "CIDEr", "max_drop": 1}, "write `detect` beside max_drop"),
        ({"metric": "aurc", "max_rise": 1, "detect": 1, "group": "Art"}, "cannot be judged by gr"),
        ({"metric": "CIDEr", "max_drop": -1, "detect": 1}, "rules.0.max_drop: Input should be gr"),
        ({"metric": "CIDEr", "non_inferior": "two"}, "rules.0.non_inferior: Input should be a va"),
        ({"max_drop": 1}, "rules.0.metric: Field required"),
    ],
)
def test_a_rule_that_says_nothing_or_the_wrong_thing_is_refused(rule, words):
    assert words in problem(**rule)


def test_a_policy_without_rules_is_refused():
    with pytest.raises(UserError, match=r"rules: .*at least 1"):
        policy_of({"rules": []}, "p")


def test_files_that_are_none_are_refused(tmp_path):
    path = tmp_path / "gate.yaml"
    with pytest.raises(UserError, match="no such policy file"):
        load_policy(path)
    path.write_text("rules:\n  - {metric: CIDEr\n")
    with pytest.raises(UserError, match=r"gate\.yaml: line \d: not YAML"):
        load_policy(path)
    path.write_text("- 1\n")
    with pytest.raises(UserError, match="a policy is a mapping"):
        load_policy(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"gate\.yaml"):
        load_policy(path)
