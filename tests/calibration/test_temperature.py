import numpy as np
import pytest
from netcal.scaling import TemperatureScaling
from sklearn.linear_model import LogisticRegression

from cwdpo_bench.calibration import apply_temperature, ece, fit_temperature, nll


def overconfident(size=2000, classes=4, sharpness=3.0):
    generator = np.random.default_rng(0)
    scores = generator.normal(size=(size, classes))
    probabilities = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    labels = np.array([generator.choice(classes, p=row) for row in probabilities])
    return sharpness * np.log(probabilities), labels


def test_the_temperature_that_spoiled_the_scores_is_found_again():
    scores, labels = overconfident()
    assert fit_temperature(scores, labels) == pytest.approx(3.0, rel=0.07)


def test_temperature_of_two_classes_is_the_slope_of_a_logistic_regression():
    scores, labels = overconfident(classes=2)
    difference = (scores[:, 1] - scores[:, 0])[:, None]
    slope = (
        LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-8).fit(difference, labels).coef_
    )
    assert fit_temperature(scores, labels) == pytest.approx(1 / slope.item(), rel=1e-4)


def test_scaled_probabilities_are_as_good_as_netcal_s():
    scores, labels = overconfident()
    ours = apply_temperature(scores, fit_temperature(scores, labels))
    theirs = TemperatureScaling()
    theirs.fit(apply_temperature(scores, 1.0), labels)
    scaled = theirs.transform(apply_temperature(scores, 1.0))
    assert nll(ours, labels) <= nll(scaled, labels) + 1e-6


def test_scaling_mends_calibration_and_keeps_every_answer():
    scores, labels = overconfident()
    before = apply_temperature(scores, 1.0)
    after = apply_temperature(scores, fit_temperature(scores[:1000], labels[:1000]))
    answers = before.argmax(1)
    assert (after.argmax(1) == answers).all()
    assert ece(after.max(1), answers == labels) < 0.3 * ece(before.max(1), answers == labels)


def test_missing_options_change_nothing():
    scores, labels = overconfident()
    padded = np.column_stack([scores, np.full(len(scores), -np.inf)])
    assert fit_temperature(padded, labels) == pytest.approx(fit_temperature(scores, labels))
    assert (apply_temperature(padded, 2.0)[:, -1] == 0).all()


def test_a_constant_added_to_a_row_changes_nothing():
    scores, labels = overconfident(size=200)
    shifted = scores + np.arange(200)[:, None]
    assert fit_temperature(shifted, labels) == pytest.approx(fit_temperature(scores, labels))


def test_answers_that_are_all_right_end_at_the_bound_instead_of_zero():
    temperature = fit_temperature(np.log([[0.9, 0.1], [0.2, 0.8]]), [0, 1])
    assert 0.01 <= temperature < 0.2


@pytest.mark.parametrize(
    ("scores", "labels", "words"),
    [
        ([[np.nan, 0.0]], [0], "NaN"),
        ([[np.inf, 0.0]], [0], "infinity"),
        ([[-np.inf, 0.0]], [0], "true option"),
        ([[-np.inf, -np.inf]], [0], "no finite option"),
        ([[0.0, 0.0]], [2], "labels"),
        ([0.0, 0.0], [0], r"\[N, K\]"),
        (np.zeros((0, 2)), [], r"\[N, K\]"),
    ],
)
def test_bad_scores_are_refused(scores, labels, words):
    with pytest.raises(ValueError, match=words):
        fit_temperature(scores, labels)


@pytest.mark.parametrize("temperature", [0.0, -1.0, np.nan])
def test_a_temperature_must_be_above_zero(temperature):
    with pytest.raises(ValueError, match="above 0"):
        apply_temperature([[0.0, 0.0]], temperature)
