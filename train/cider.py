"""CIDEr-D of single answers against the document frequencies of a whole corpus, in pure Python.

`evaluate/captions.py` scores a finished run: there the corpus is the run itself, and the tokenizer
a Java program. A reward scores a few sampled answers at a time, thousands of times, so here the
corpus is fixed beforehand and the tokenizer is a regular expression. The formula and its constants
are those of pycocoevalcap, which equals the paper but for two habits, kept here: the length of a
caption is its number of bigrams, and the four n-gram lengths are averaged.

Source: Vedantam et al., CIDEr: Consensus-based Image Description Evaluation (CVPR 2015), CIDEr-D.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

MAX_ORDER = 4
SIGMA = 6.0
"""Of the Gaussian that punishes a difference in length."""
SCALE = 10.0

Words = tuple[str, ...]

_WORD = re.compile(
    r"\d+(?:[.,:/]\d+)+"  # 3.5, 1,000, 10:30
    r"|(?:[^\W\d_]\.){2,}"  # u.s.
    r"|n't\b|'(?:s|m|d|re|ve|ll)\b"
    r"|[^\W_]+?(?=n't\b)"
    r"|[^\W_]+(?:[-&][^\W_]+)*"
)


def words_of(text: str) -> Words:
    """Words in lower case without punctuation, clitics apart ("isn't" is "is n't").

    This is what the PTB tokenizer of pycocoevalcap gives on plain captions; on the rest (currency,
    brackets, emoticons, abbreviations) the two may differ.
    """
    return tuple(_WORD.findall(text.lower().replace("’", "'")))


class _Vector(NamedTuple):
    """tf-idf weights of a caption's n-grams by order, their norms, and the length."""

    weights: list[dict[Words, float]]
    norms: list[float]
    length: int


class CiderD:
    """The metric with document frequencies taken once from a corpus of references."""

    def __init__(self, documents: Iterable[Sequence[str]]) -> None:
        """Count in how many documents each n-gram stands.

        Args:
            documents: for each image its references, one or more.

        Raises:
            ValueError: fewer than two documents, with which every weight would be log 1 = 0.
        """
        self._frequency: Counter[Words] = Counter()
        count = 0
        for references in documents:
            count += 1
            self._frequency.update({n for text in references for n in _ngrams(words_of(text))})
        if count < 2:
            raise ValueError("document frequencies need two documents or more")
        self._log_documents = math.log(count)

    def score(self, candidate: str, references: Sequence[str]) -> float:
        """CIDEr-D of one candidate, between 0 and 10.

        For each order n: the mean over references of
        exp(−(l_c − l_r)² / 2σ²) · Σ_g min(c_g, r_g) · r_g / (‖c‖ ‖r‖), with g over the candidate's
        n-grams, c and r tf-idf weights and l lengths; then the mean over n = 1 … 4, times 10.
        """
        vector = self._vector(candidate)
        total = sum(_similarity(vector, self._vector(reference)) for reference in references)
        return SCALE * total / (MAX_ORDER * len(references))

    def _vector(self, text: str) -> _Vector:
        weights: list[dict[Words, float]] = [{} for _ in range(MAX_ORDER)]
        words = words_of(text)
        for ngram, count in Counter(_ngrams(words)).items():
            # An n-gram that stands in no reference counts as standing in one.
            idf = self._log_documents - math.log(max(1, self._frequency[ngram]))
            weights[len(ngram) - 1][ngram] = count * idf
        norms = [math.sqrt(sum(w * w for w in order.values())) for order in weights]
        return _Vector(weights, norms, max(0, len(words) - 1))


def _ngrams(words: Words) -> Iterator[Words]:
    for order in range(1, MAX_ORDER + 1):
        for start in range(len(words) - order + 1):
            yield words[start : start + order]


def _similarity(candidate: _Vector, reference: _Vector) -> float:
    """The sum over the four orders."""
    difference = candidate.length - reference.length
    total = 0.0
    for order in range(MAX_ORDER):
        norm = candidate.norms[order] * reference.norms[order]
        if norm > 0:
            known = reference.weights[order]
            overlap = sum(
                min(weight, known[ngram]) * known[ngram]
                for ngram, weight in candidate.weights[order].items()
                if ngram in known
            )
            total += overlap / norm
    return total * math.exp(-(difference**2) / (2 * SIGMA**2))
