"""What answers a benchmark's samples: the protocol that every engine keeps, and what a reply is.

An engine is given samples and yields replies one by one as they come, each with the place of its
sample, in any order. Whoever keeps replies can therefore keep each as it arrives and give the
engine no more than the samples that have none yet.

A reply holds text, numbers and NumPy arrays alone, never a tensor, an image or a handle, so that
it can be written down and read back equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from cwdpo_bench.evaluate.samples import CaptionSample, ChoiceSample
from cwdpo_bench.vlm import TokenScores


class CaptionAnswer(NamedTuple):
    """A generated caption and the statistics of the first reference's tokens.

    Attributes:
        text: the caption.
        reference_scores: arrays [L] over the reference's tokens, the end of the turn included
            (fp32, `top1_correct` bool); TV and JS where a reference model was given. None from an
            engine that cannot score a given text.
        drawn: captions sampled from the model, as many as the engine was asked for.
    """

    text: str
    reference_scores: TokenScores | None
    drawn: tuple[str, ...] = ()


class ChoiceAnswer(NamedTuple):
    """A generated reply and log p of every option's letter.

    Attributes:
        text: the reply.
        option_log_probabilities: float64 [K], nats over the full vocabulary, in the options'
            order; None for an open question, or from an engine that has none.
    """

    text: str
    option_log_probabilities: np.ndarray | None


class Failure(NamedTuple):
    """A sample that could not be answered; the others go on.

    Attributes:
        reason: one line that names the sample and what was wrong; no address, no key.
    """

    reason: str


class Engine(Protocol):
    """What answers samples: a model in this process, or a server."""

    @property
    def name(self) -> str:
        """As `--engine` and the signature name it."""

    @property
    def model(self) -> Mapping[str, object]:
        """What `results.json` calls the model: `name`, and what else tells it from another."""

    @property
    def signature_parts(self) -> Mapping[str, object]:
        """What of the engine changes the scores of every task: precision, resolution, …"""

    @property
    def provenance(self) -> Mapping[str, object]:
        """How it answers without changing what it answers: device, batch size, …"""

    @property
    def chunk_size(self) -> int:
        """Samples a call that the engine works well on.

        With the composition of a batch the last bits of log-probabilities change. Who needs the
        same bits from an interrupted and an uninterrupted run asks for the same samples in the same
        calls: whole groups of this size, and a group again whole.
        """

    @property
    def shift_from(self) -> str | None:
        """Name of the model against which captions' TV and JS are measured, where there is one."""

    @property
    def draws(self) -> int:
        """How many captions are sampled an image beside the greedy one; 0 or at least 2."""

    def fingerprint(self) -> str:
        """What every reply follows from besides sample and generation settings, in one digest.

        Weights, processor, precision and the reference model of an engine that holds them; of a
        server only what it says of itself, so that its owner must name another model another way.
        """

    def answer_captions(
        self, samples: Sequence[CaptionSample], *, max_new_tokens: int
    ) -> Iterator[tuple[int, CaptionAnswer | Failure]]:
        """Greedy captions, and teacher-forced token statistics on each first reference.

        Yields:
            The sample's place in `samples` and its reply, each place once, in any order.

        Raises:
            UserError: what no other sample would escape: broken weights, too little memory, a
                server that is not there.
        """

    def answer_choices(
        self, samples: Sequence[ChoiceSample], *, max_new_tokens: int
    ) -> Iterator[tuple[int, ChoiceAnswer | Failure]]:
        """Greedy replies with the options' log-probabilities; yields and raises as above."""
