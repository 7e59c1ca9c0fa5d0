"""CIDEr-D for rewards: equal to pycocoevalcap where the tokens agree, and laws of the metric."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocoevalcap.cider.cider import Cider

from cwdpo_bench.evaluate.captions import tokenize
from cwdpo_bench.train.cider import CiderD, words_of

WORDS = ["a", "red", "blue", "circle", "square", "left", "of", "the", "striped", "above"]
captions = st.lists(st.sampled_from(WORDS), min_size=0, max_size=12).map(" ".join)
references = st.lists(captions.filter(bool), min_size=1, max_size=4)


@given(st.lists(st.tuples(captions, references), min_size=2, max_size=8))
def test_cider_d_is_that_of_pycocoevalcap(images: list[tuple[str, list[str]]]) -> None:
    truth = {str(i): texts for i, (_, texts) in enumerate(images)}
    answers = {str(i): [text] for i, (text, _) in enumerate(images)}
    _, expected = Cider().compute_score(truth, answers)
    metric = CiderD(truth.values())
    found = [metric.score(text, texts) for text, texts in images]
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_a_candidate_of_unseen_words_scores_zero_and_a_lone_reference_ten() -> None:
    metric = CiderD([["a red circle left of a square"], ["a blue circle"]])
    assert metric.score("something else", ["a red circle left of a square"]) == 0
    assert metric.score("", ["a blue circle"]) == 0
    whole = metric.score("a red circle left of a square", ["a red circle left of a square"])
    assert whole == pytest.approx(10)


def test_one_document_is_refused() -> None:
    with pytest.raises(ValueError, match="two documents"):
        CiderD([["a circle"]])


def test_words_are_those_of_the_ptb_tokenizer_on_plain_captions() -> None:
    texts = [
        "A man's dog isn't here, but it's 3.5 miles away.",
        "Two T-shirts and a hot-dog; 1,000 people!",
        "There is a red circle, left of a blue square.",
        'a black-and-white cat -- sitting: "well"',
        "She'll say they've seen I'd won't",
        "café naïve at 10:30",
    ]
    tokenized = tokenize({str(i): [text] for i, text in enumerate(texts)})[0]
    for i, text in enumerate(texts[:4] + texts[5:]):
        key = str(i if i < 4 else 5)
        assert " ".join(words_of(text)) == tokenized[key][0]
