"""Metrics of captions that count n-grams: BLEU's statistics, CIDEr and CIDEr-D; and ROUGE-L.

All of them read captions as lists of words. The values are those of pycocoevalcap (its CIDEr is
CIDEr-D); the n-grams of a caption are counted once for all of them, and CIDEr's document
frequencies may come from a corpus of their own, so that a caption can be scored alone.

Sources: Papineni et al., BLEU (ACL 2002); Lin, ROUGE (2004), with pycocoevalcap's β = 1.2; Vedantam
et al., CIDEr: Consensus-based Image Description Evaluation (CVPR 2015), section 4 (CIDEr) and
section 6 (CIDEr-D); Hyyrö, Bit-Parallel LCS-length Computation Revisited (2004).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import NamedTuple

MAX_ORDER = 4
SIGMA = 6.0
"""Of CIDEr-D's Gaussian that punishes a difference in length."""
SCALE = 10.0
BETA = 1.2
"""Of ROUGE-L: how much recall counts beside precision."""

Words = Sequence[str]
Ngram = tuple[str, ...]
Counts = Counter[Ngram]
"""How often each n-gram of 1 to `MAX_ORDER` words stands in a caption."""


def ngram_counts(words: Words) -> Counts:
    """Count the n-grams of a caption."""
    shifted = [words[start:] for start in range(MAX_ORDER)]
    orders = range(1, MAX_ORDER + 1)
    return Counter(chain.from_iterable(zip(*shifted[:order], strict=False) for order in orders))


# --- BLEU ----------------------------------------------------------------------------------------


class BleuStatistics(NamedTuple):
    """What BLEU adds up over captions.

    Attributes:
        matches: [MAX_ORDER] n-grams of the candidate that a reference has, clipped to the most that
            one reference has of them.
        guesses: [MAX_ORDER] n-grams of the candidate.
        length: words of the candidate.
        reference_length: words of the reference nearest in length, the shorter one of two.
    """

    matches: list[int]
    guesses: list[int]
    length: int
    reference_length: int


def bleu_statistics_of(candidate: Counts, references: Sequence[Counts]) -> BleuStatistics:
    """BLEU's statistics of one caption against its references."""
    matches = [0] * MAX_ORDER
    for ngram, count in candidate.items():
        most = max(reference.get(ngram, 0) for reference in references)
        matches[len(ngram) - 1] += min(count, most)
    length = _length(candidate)
    _, nearest = min((abs(size - length), size) for size in map(_length, references))
    guesses = [max(0, length - order) for order in range(MAX_ORDER)]
    return BleuStatistics(matches, guesses, length, nearest)


def _length(counts: Counts) -> int:
    return sum(count for ngram, count in counts.items() if len(ngram) == 1)


# --- CIDEr ---------------------------------------------------------------------------------------


class CiderScores(NamedTuple):
    """Of one caption, each between 0 and 10.

    Attributes:
        cider: the paper's first form: the mean cosine of the tf-idf weights.
        cider_d: the form that COCO's code reports under the name CIDEr: weights clipped to the
            reference's, and a Gaussian on the difference in length.
    """

    cider: float
    cider_d: float


class _Vector(NamedTuple):
    """tf-idf weights of a caption's n-grams, their norms by order, and the length."""

    weights: dict[Ngram, float]
    norms: list[float]
    length: int


class Cider:
    """The two forms of CIDEr with document frequencies taken once from a corpus of references."""

    def __init__(self, documents: Iterable[Sequence[Counts]]) -> None:
        """Count in how many documents each n-gram stands.

        Args:
            documents: for each image the n-grams of its references. With one document every weight
                is log 1 = 0, and so is every score, as in pycocoevalcap.

        Raises:
            ValueError: there is no document.
        """
        frequency: Counts = Counter()
        count = 0
        for references in documents:
            count += 1
            frequency.update(set(chain.from_iterable(references)))
        if count == 0:
            raise ValueError("document frequencies need documents")
        # An n-gram that stands in no reference counts as standing in one.
        self._unseen = math.log(count)
        self._idf = {ngram: self._unseen - math.log(n) for ngram, n in frequency.items()}

    def score(self, candidate: Counts, references: Sequence[Counts]) -> CiderScores:
        """Both scores of a candidate against its references.

        For each order n: the mean over the references of Σ_g c_g · r_g / (‖c‖ ‖r‖), with g over the
        candidate's n-grams, c and r tf-idf weights; CIDEr-D has min(c_g, r_g) for c_g, and the
        factor exp(−(l_c − l_r)² / 2σ²). Then the mean over n = 1 … 4, times 10. pycocoevalcap
        takes the number of bigrams for the length l, and so do we.
        """
        vector = self._vector(candidate)
        plain = clipped = 0.0
        for reference in references:
            cosine, shared = _overlaps(vector, other := self._vector(reference))
            plain += cosine
            clipped += shared * math.exp(-((vector.length - other.length) ** 2) / (2 * SIGMA**2))
        scale = SCALE / (MAX_ORDER * len(references))
        return CiderScores(plain * scale, clipped * scale)

    def _vector(self, counts: Counts) -> _Vector:
        squares = [0.0] * MAX_ORDER
        length = 0
        weights = {}
        idf, unseen = self._idf, self._unseen
        for ngram, count in counts.items():
            order = len(ngram) - 1
            weights[ngram] = weight = count * idf.get(ngram, unseen)
            squares[order] += weight * weight
            if order == 1:
                length += count
        return _Vector(weights, [math.sqrt(square) for square in squares], length)


def _overlaps(candidate: _Vector, reference: _Vector) -> tuple[float, float]:
    """Σ_n of the cosine of the n-grams of order n, as they are and clipped to the reference."""
    plain, clipped = [0.0] * MAX_ORDER, [0.0] * MAX_ORDER
    known = reference.weights
    for ngram, weight in candidate.weights.items():
        other = known.get(ngram)
        if other is not None:
            order = len(ngram) - 1
            plain[order] += weight * other
            clipped[order] += min(weight, other) * other
    norms = [one * other for one, other in zip(candidate.norms, reference.norms, strict=True)]
    return _quotients(plain, norms), _quotients(clipped, norms)


def _quotients(parts: list[float], wholes: list[float]) -> float:
    return sum(part / whole for part, whole in zip(parts, wholes, strict=True) if whole > 0)


# --- ROUGE-L -------------------------------------------------------------------------------------


def rouge_l(candidate: Words, references: Sequence[Words]) -> float:
    """ROUGE-L in [0, 1]: F of the best precision and the best recall over the references.

    A caption without words is the list of one empty word, as pycocoevalcap splits it: two of them
    agree.
    """
    lengths = [_longest_common(candidate, reference) for reference in references]
    precision = max(length / len(candidate) for length in lengths)
    recall = max(
        length / len(reference) for length, reference in zip(lengths, references, strict=True)
    )
    if precision == 0 or recall == 0:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _longest_common(first: Words, second: Words) -> int:
    """The length of the longest common subsequence, a column of the table in one integer."""
    places: dict[str, int] = {}
    for place, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << place
    full = (1 << len(first)) - 1
    column = full
    for word in second:
        shared = column & places.get(word, 0)
        column = (column + shared | column - shared) & full
    return len(first) - column.bit_count()
