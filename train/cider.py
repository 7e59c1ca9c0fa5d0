"""CIDEr-D of single answers against the document frequencies of a whole corpus, without Java.

The metric is that of `evaluate/ngrams.py`. A finished run takes its words from the PTB tokenizer, a
Java program; a reward scores a few sampled answers at a time, thousands of times, so here the words
come from a regular expression.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from cwdpo_bench.evaluate.ngrams import Cider, Counts, ngram_counts

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


class CiderD:
    """The metric with document frequencies taken once from a corpus of references."""

    def __init__(self, documents: Iterable[Sequence[str]]) -> None:
        """Count in how many documents each n-gram stands.

        Args:
            documents: for each image its references, one or more.

        Raises:
            ValueError: fewer than two documents, with which every weight would be log 1 = 0.
        """
        counted = [[_counts(text) for text in references] for references in documents]
        if len(counted) < 2:
            raise ValueError("document frequencies need two documents or more")
        self._metric = Cider(counted)

    def score(self, candidate: str, references: Sequence[str]) -> float:
        """CIDEr-D of one candidate, between 0 and 10."""
        known = [_counts(reference) for reference in references]
        return self._metric.score(_counts(candidate), known).cider_d


def _counts(text: str) -> Counts:
    return ngram_counts(words_of(text))
