"""N-gram metrics against pycocoevalcap on tokens, and their laws."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocoevalcap.bleu.bleu_scorer import cook_refs, cook_test
from pycocoevalcap.cider.cider import Cider as OfficialCider
from pycocoevalcap.rouge.rouge import Rouge

from cwdpo_bench.evaluate.ngrams import Cider, bleu_statistics_of, ngram_counts, rouge_l

WORDS = ["a", "red", "blue", "circle", "square", "left", "of", "the"]
captions = st.lists(st.sampled_from(WORDS), min_size=0, max_size=12).map(" ".join)
references = st.lists(captions, min_size=1, max_size=4)
images = st.lists(st.tuples(captions, references), min_size=2, max_size=8)


def counts(text: str) -> dict[tuple[str, ...], int]:
    return ngram_counts(text.split())


@settings(deadline=None)
@given(images)
def test_cider_d_is_that_of_pycocoevalcap(corpus: list[tuple[str, list[str]]]) -> None:
    truth = {n: texts for n, (_, texts) in enumerate(corpus)}
    if not any(text for texts in truth.values() for text in texts):
        return  # pycocoevalcap fails on references without any word.
    answers = {n: [text] for n, (text, _) in enumerate(corpus)}
    _, expected = OfficialCider().compute_score(truth, answers)
    metric = Cider([counts(text) for text in texts] for texts in truth.values())
    found = [
        metric.score(counts(text), [counts(other) for other in texts]).cider_d
        for text, texts in corpus
    ]
    np.testing.assert_allclose(found, expected, atol=1e-9)


@settings(deadline=None)
@given(images)
def test_plain_cider_is_the_mean_cosine_of_the_weights(corpus: list[tuple[str, list[str]]]) -> None:
    """Section 4 of the paper, on dense vectors."""
    documents = [[counts(text) for text in texts] for _, texts in corpus]
    known = sorted({ngram for d in documents for c in d for ngram in c})
    frequency = np.array([sum(any(g in c for c in d) for d in documents) for g in known])
    metric = Cider(documents)
    for text, texts in corpus:
        expected = 0.0
        for order in range(1, 5):
            vocabulary = {g: i for i, g in enumerate(known) if len(g) == order}
            rows = []
            for caption in (text, *texts):
                own = counts(caption)
                unseen = [own[g] for g in own if len(g) == order and g not in vocabulary]
                weights = [
                    own[g] * np.log(len(corpus) / frequency[i]) for g, i in vocabulary.items()
                ]
                rows.append([*weights, np.sqrt(np.sum(np.square(unseen))) * np.log(len(corpus))])
            norms = np.linalg.norm(rows, axis=1)
            for row, norm in zip(rows[1:], norms[1:], strict=True):
                # The unseen n-grams of the candidate lengthen it and match nothing.
                dot = np.dot(rows[0][:-1], row[:-1])
                expected += dot / (norms[0] * norm) if norms[0] * norm > 0 else 0.0
        score = metric.score(counts(text), [counts(other) for other in texts]).cider
        assert score == pytest.approx(10 * expected / (4 * len(texts)), abs=1e-9)


@settings(deadline=None)
@given(captions, references)
def test_bleu_statistics_are_those_of_pycocoevalcap(text: str, texts: list[str]) -> None:
    cooked = cook_test(text, cook_refs(texts), eff="closest")
    found = bleu_statistics_of(counts(text), [counts(other) for other in texts])
    assert found.matches == cooked["correct"]
    assert found.guesses == cooked["guess"]
    assert (found.length, found.reference_length) == (cooked["testlen"], cooked["reflen"])


@settings(deadline=None)
@given(captions, references)
def test_rouge_l_is_that_of_pycocoevalcap(text: str, texts: list[str]) -> None:
    expected = Rouge().calc_score([text], texts)
    found = rouge_l(text.split(" "), [other.split(" ") for other in texts])
    assert found == pytest.approx(expected, abs=1e-12)


def test_rouge_l_of_long_captions_is_that_of_pycocoevalcap() -> None:
    rng = np.random.default_rng(0)
    text, other = (" ".join(rng.choice(WORDS, size)) for size in (700, 500))
    found = rouge_l(text.split(" "), [other.split(" ")])
    assert found == pytest.approx(Rouge().calc_score([text], [other]), abs=1e-12)


def test_length_and_repetition_cost_cider_d_alone() -> None:
    corpus = [["a red circle left of the square"], ["the blue square"], ["a circle"]]
    metric = Cider([counts(text) for text in texts] for texts in corpus)
    reference = [counts("a red circle left of the square")]
    same = metric.score(counts("a red circle left of the square"), reference)
    assert same.cider == pytest.approx(10)
    assert same.cider_d == pytest.approx(10)
    twice = metric.score(counts("red red circle circle left left"), reference)
    assert twice.cider_d < twice.cider


def test_document_frequencies_need_a_document() -> None:
    with pytest.raises(ValueError, match="documents"):
        Cider([])
