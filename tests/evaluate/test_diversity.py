"""Diversity against pycocoevalcap's CIDEr, closed forms, and bounds on random captions."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocoevalcap.cider.cider_scorer import CiderScorer

from cwdpo_bench.evaluate.diversity import (
    cider_kernel,
    distinct,
    diversity_columns,
    self_cider,
    vendi,
)
from cwdpo_bench.evaluate.ngrams import Cider, ngram_counts

WORDS = ["a", "red", "blue", "circle", "square", "left", "of", "two", "on", "white"]
captions = st.lists(st.lists(st.sampled_from(WORDS), max_size=9), min_size=2, max_size=6)


def counts_of(texts):
    return [ngram_counts(text.split()) for text in texts]


def corpus(seed, images=6):
    rng = np.random.default_rng(seed)
    return [
        [" ".join(rng.choice(WORDS, rng.integers(4, 10))) for _ in range(3)] for _ in range(images)
    ]


def plain_cosines(documents, one, other):
    """CIDEr without clipping and length penalty, from pycocoevalcap's own tf-idf weights."""
    scorer = CiderScorer(n=4, sigma=6.0)
    for references in documents:
        scorer += (references[0], references)
    scorer.compute_doc_freq()
    scorer.ref_len = np.log(float(len(scorer.crefs)))
    vectors = {}
    weights = CiderScorer(n=4)
    weights += (one, [other])
    for name, found in (("one", weights.ctest[0]), ("other", weights.crefs[0][0])):
        vector = [{} for _ in range(4)]
        for ngram, count in found.items():
            idf = scorer.ref_len - np.log(max(1.0, scorer.document_frequency[ngram]))
            vector[len(ngram) - 1][ngram] = count * idf
        vectors[name] = vector
    total = 0.0
    for a, b in zip(vectors["one"], vectors["other"], strict=True):
        norms = math.sqrt(sum(v * v for v in a.values())) * math.sqrt(
            sum(v * v for v in b.values())
        )
        if norms:
            total += sum(v * b.get(ngram, 0.0) for ngram, v in a.items()) / norms
    return total / 4


@pytest.mark.parametrize("seed", range(5))
def test_the_kernel_is_the_cosine_of_pycocoevalcaps_weights(seed):
    documents = corpus(seed)
    metric = Cider([counts_of(references) for references in documents])
    texts = documents[0] + documents[1]
    kernel = cider_kernel(metric, counts_of(texts))
    expected = [[plain_cosines(documents, a, b) for b in texts] for a in texts]
    np.testing.assert_allclose(kernel, expected, atol=1e-12)


@given(captions)
def test_bounds_and_the_order_of_the_captions(texts):
    metric = Cider([counts_of(references) for references in corpus(0)])
    counts = [ngram_counts(words) for words in texts]
    kernel = cider_kernel(metric, counts)
    assert np.linalg.eigvalsh(kernel).min() > -1e-9
    assert 0 <= self_cider(kernel) <= 1 + 1e-9
    assert 1 - 1e-9 <= vendi(kernel) <= len(texts) + 1e-9
    assert 0 <= distinct(counts, 1) <= 1
    turned = kernel[::-1, ::-1]
    assert self_cider(turned) == pytest.approx(self_cider(kernel), abs=1e-6)
    assert vendi(turned) == pytest.approx(vendi(kernel), abs=1e-6)


@pytest.mark.parametrize("m", [2, 5])
def test_closed_forms(m):
    # All alike: one eigenvalue m. All apart: m eigenvalues 1. Alike by s off the diagonal:
    # 1 + (m − 1) s once and 1 − s m − 1 times.
    assert self_cider(np.ones((m, m))) == pytest.approx(0, abs=1e-6)
    assert vendi(np.ones((m, m))) == pytest.approx(1)
    assert self_cider(np.eye(m)) == pytest.approx(1)
    assert vendi(np.eye(m)) == pytest.approx(m)
    s = 0.3
    kernel = np.full((m, m), s) + (1 - s) * np.eye(m)
    values = np.array([1 + (m - 1) * s] + [1 - s] * (m - 1))
    roots = np.sqrt(values)
    assert self_cider(kernel) == pytest.approx(-math.log(roots[0] / roots.sum()) / math.log(m))
    shares = values / m
    assert vendi(kernel) == pytest.approx(math.exp(-(shares * np.log(shares)).sum()))


def test_distinct_counts_repeats_within_and_across_captions():
    counts = counts_of(["a red circle", "a red red square"])
    assert distinct(counts, 1) == 4 / 7
    assert distinct(counts, 2) == 4 / 5  # "a red" stands in both
    assert distinct(counts_of(["", ""]), 1) == 0


def test_columns_of_tokenized_captions():
    references = {"1": ["A red circle.", "one circle"], "2": ["Two blue squares on white!"]}
    samples = {"2": ["A red circle.", "a red circle"], "1": ["two blue squares", "a red circle"]}
    columns = diversity_columns(references, samples)
    # The tokenizer takes case and full stop away: image 2's samples are the same caption.
    assert columns["distinct-1"] == [0.5, 1.0]
    assert columns["vendi"] == pytest.approx([1, 2])
    assert columns["self-CIDEr"] == pytest.approx([0, 1], abs=1e-6)


def test_one_caption_has_no_diversity():
    with pytest.raises(ValueError, match="two of them"):
        diversity_columns({"1": ["a"]}, {"1": ["a"]})
