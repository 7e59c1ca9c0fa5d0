import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon

from cwdpo_bench.calibration import jensen_shannon, total_variation


def test_jensen_shannon_equals_scipy_in_nats():
    generator = np.random.default_rng(0)
    p, q = generator.dirichlet(np.ones(6), (2, 50))
    # SciPy gives the distance, the root of the divergence.
    assert jensen_shannon(p, q) == pytest.approx(jensenshannon(p, q, axis=1) ** 2)


def test_total_variation_is_the_largest_difference_over_events():
    p, q = [0.5, 0.3, 0.2], [0.2, 0.3, 0.5]
    assert total_variation(p, q) == pytest.approx(0.3)


def test_disjoint_distributions_are_as_far_apart_as_can_be():
    assert total_variation([1, 0], [0, 1]) == 1.0
    assert jensen_shannon([1, 0], [0, 1]) == np.log(2)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(0, 2**31))
def test_laws_of_both(classes, seed):
    generator = np.random.default_rng(seed)
    p, q, r = generator.dirichlet(np.full(classes, 0.3), 3)
    for distance, top in ((total_variation, 1.0), (jensen_shannon, np.log(2))):
        assert 0.0 <= distance(p, q) <= top
        assert distance(p, p) == 0.0
        assert distance(p, q) == pytest.approx(distance(q, p), abs=1e-12)
    assert total_variation(p, r) <= total_variation(p, q) + total_variation(q, r) + 1e-12
    # Lin (1991), theorem 3: JS ≤ ln 2 · TV, and Pinsker's inequality from below.
    assert jensen_shannon(p, q) <= np.log(2) * total_variation(p, q) + 1e-12
    assert jensen_shannon(p, q) >= total_variation(p, q) ** 2 / 2 - 1e-12


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="agree"):
        total_variation([0.5, 0.5], [0.2, 0.3, 0.5])


@pytest.mark.parametrize("bad", [[0.5, 0.6], [np.nan, 1.0], [-0.5, 1.5], []])
def test_what_is_no_distribution_is_refused(bad):
    with pytest.raises(ValueError, match="q"):
        jensen_shannon([0.5, 0.5], bad)
