"""How much several sampled captions of one image differ from each other.

Sources: Li et al., A Diversity-Promoting Objective Function (NAACL 2016): distinct-n; Wang and
Chan, Describing Like Humans: On Diversity in Image Captioning (CVPR 2019): Self-CIDEr; Friedman and
Dieng, The Vendi Score (TMLR 2023).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.stats import entropy

from cwdpo_bench.evaluate.captions import Captions, tokenize
from cwdpo_bench.evaluate.ngrams import SCALE, Cider, Counts, ngram_counts
from cwdpo_bench.evaluate.sums import Floats


def diversity_columns(
    references: Captions, samples: Mapping[str, Sequence[str]]
) -> dict[str, list[float]]:
    """`distinct-1`, `distinct-2`, `self-CIDEr` and `vendi` of each image's sampled captions.

    Args:
        references: image id → captions, not tokenized: the corpus of CIDEr's document frequencies.
        samples: image id → two sampled captions or more; each id has references.

    Returns:
        A list a metric, a value an image in the order of `samples`.

    Raises:
        ValueError: an image has fewer than two samples.
    """
    texts, drawn = tokenize(references, samples)
    metric = Cider([[ngram_counts(text.split()) for text in each] for each in texts.values()])
    counts = [[ngram_counts(text.split()) for text in captions] for captions in drawn.values()]
    kernels = [cider_kernel(metric, captions) for captions in counts]
    return {
        "distinct-1": [distinct(captions, 1) for captions in counts],
        "distinct-2": [distinct(captions, 2) for captions in counts],
        "self-CIDEr": [self_cider(kernel) for kernel in kernels],
        "vendi": [vendi(kernel) for kernel in kernels],
    }


def distinct(captions: Sequence[Counts], order: int) -> float:
    """Different n-grams of the captions over all their n-grams, in [0, 1]; 0 without any."""
    counted = [
        (ngram, count)
        for counts in captions
        for ngram, count in counts.items()
        if len(ngram) == order
    ]
    total = sum(count for _, count in counted)
    return len({ngram for ngram, _ in counted}) / total if total else 0.0


def cider_kernel(metric: Cider, captions: Sequence[Counts]) -> Floats:
    """[m, m] CIDEr between the captions over 10, in [0, 1]: symmetric, positive semidefinite.

    It is the first form of CIDEr, a sum of cosines; CIDEr-D's clipping would break both. A caption
    of fewer than four words is less than 1 like itself, as in the paper's code.

    Raises:
        ValueError: fewer than two captions.
    """
    if len(captions) < 2:
        raise ValueError("the diversity of captions needs two of them or more")
    kernel = np.eye(len(captions))
    for i, one in enumerate(captions):
        for j, other in enumerate(captions[: i + 1]):
            kernel[i, j] = kernel[j, i] = metric.score(one, [other]).cider / SCALE
    return kernel


def self_cider(kernel: Floats) -> float:
    """−log_m(√λ₁ / Σ_i √λ_i) with λ the kernel's eigenvalues, λ₁ the largest, in [0, 1].

    0 where all captions agree, and where none holds a word; 1 where none shares an n-gram.
    """
    roots = np.sqrt(np.clip(np.linalg.eigvalsh(kernel), 0, None))
    if not roots.sum():
        return 0.0
    return float(max(0.0, -math.log(roots.max() / roots.sum(), len(kernel))))


def vendi(kernel: Floats) -> float:
    """exp of the entropy of the eigenvalues of K/m, the number of captions that differ, in [1, m].

    K is the kernel with its diagonal scaled to 1, as the score's definition asks; captions without
    words are like each other and nothing else.
    """
    size = np.sqrt(np.diag(kernel))
    empty = size == 0
    scaled = kernel / np.outer(np.where(empty, 1, size), np.where(empty, 1, size))
    scaled[np.ix_(empty, empty)] = 1.0
    eigenvalues = np.clip(np.linalg.eigvalsh(scaled / len(kernel)), 0, None)
    return float(np.exp(entropy(eigenvalues)))
