"""Several processes answer one run: `accelerate launch -m cwdpo_bench run …`.

Every process plans the same run and loads the model on its own device. The first one leads: it
keeps the replies, scores and writes, and is the only one that says anything. What it asks of its
engine is cut in equal shares, one a process; the others follow until it has no more to ask. What is
sent are places of samples and replies, over gloo, whatever the devices.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
from torch import distributed

from cwdpo_bench.errors import UserError
from cwdpo_bench.evaluate.engine import CaptionAnswer, ChoiceAnswer, Engine, Failure
from cwdpo_bench.evaluate.plan import Job
from cwdpo_bench.evaluate.samples import CaptionSample, ChoiceSample

PATIENCE = timedelta(days=7)
"""Followers wait while the first process keeps replies; one that has died is noticed at once."""

Sample = TypeVar("Sample", CaptionSample, ChoiceSample)
Answer = TypeVar("Answer", CaptionAnswer, ChoiceAnswer)
_Replies = list[tuple[int, Any]]


class Processes(NamedTuple):
    """This process among those of the run.

    Attributes:
        rank: 0 leads.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1


ALONE = Processes()


def join() -> Processes:
    """Meet the other processes of a launcher (accelerate's, torchrun), where there is one.

    The process's own accelerator becomes the current one, so that models are loaded there.

    Raises:
        UserError: the others cannot be met.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count < 2:
        return ALONE
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    try:
        distributed.init_process_group("gloo", timeout=PATIENCE)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"WORLD_SIZE is {count}, but the other processes cannot be met ({error}); start the "
            "run with `accelerate launch -m cwdpo_bench run …`"
        ) from error
    return Processes(distributed.get_rank(), count)


class SharedEngine:
    """The leading process's engine: shares what is asked with the followers' engines."""

    def __init__(self, engine: Engine, jobs: Sequence[Job], count: int) -> None:
        """Share `jobs`' samples among `count` processes; no others can be asked."""
        self._engine = engine
        self._count = count
        self._places = {
            id(sample): (number, place)
            for number, job in enumerate(jobs)
            for place, sample in enumerate(job.samples)
        }
        self.name = engine.name
        self.model = engine.model
        self.signature_parts = engine.signature_parts
        self.shift_from = engine.shift_from
        self.draws = engine.draws

    @property
    def provenance(self) -> Mapping[str, object]:
        """The engine's, and the number of processes."""
        return {**self._engine.provenance, "processes": self._count}

    @property
    def chunk_size(self) -> int:
        """A whole chunk for every process."""
        return self._engine.chunk_size * self._count

    def fingerprint(self) -> str:
        """The engine's own: all hold the same model."""
        return self._engine.fingerprint()

    def answer_captions(
        self, samples: Sequence[CaptionSample], *, max_new_tokens: int
    ) -> Iterator[tuple[int, CaptionAnswer | Failure]]:
        """The replies of all processes; raises what any of them raises."""
        return self._answers("answer_captions", samples, max_new_tokens)

    def answer_choices(
        self, samples: Sequence[ChoiceSample], *, max_new_tokens: int
    ) -> Iterator[tuple[int, ChoiceAnswer | Failure]]:
        """The replies of all processes; raises what any of them raises."""
        return self._answers("answer_choices", samples, max_new_tokens)

    def _answers(
        self, ask: str, samples: Sequence[Any], max_new_tokens: int
    ) -> Iterator[tuple[int, Any]]:
        for start in range(0, len(samples), self.chunk_size):
            group = samples[start : start + self.chunk_size]
            places = [self._places[id(sample)] for sample in group]
            _tell((ask, places, max_new_tokens))
            outcomes: list[Any] = [None] * self._count
            mine = _share(self._engine, ask, group, max_new_tokens, 0, self._count)
            distributed.gather_object(mine, outcomes)
            for outcome in outcomes:
                if isinstance(outcome, BaseException):
                    raise outcome
            for replies in outcomes:
                for place, answer in replies:
                    yield start + place, answer


@contextmanager
def share(engine: Engine, jobs: Sequence[Job], processes: Processes) -> Iterator[Engine]:
    """The engine to ask in the leading process; at the end the followers are let go."""
    if processes.size == 1:
        yield engine
        return
    try:
        yield SharedEngine(engine, jobs, processes.size)
    finally:
        _tell(None)
        distributed.destroy_process_group()


def follow(engine: Engine, jobs: Sequence[Job], processes: Processes) -> None:
    """Answer this process's shares until the leading one has no more.

    Raises:
        UserError: the leading process is gone.
    """
    while True:
        wish: list[Any] = [None]
        try:
            distributed.broadcast_object_list(wish, src=0)
        except RuntimeError as error:
            raise UserError("the first process of the run has ended") from error
        if wish[0] is None:
            distributed.destroy_process_group()
            return
        ask, places, max_new_tokens = wish[0]
        samples = [jobs[number].samples[place] for number, place in places]
        rank, count = processes
        mine = _share(engine, ask, samples, max_new_tokens, rank, count)
        distributed.gather_object(mine)


def _tell(wish: object) -> None:
    distributed.broadcast_object_list([wish], src=0)


def _share(
    engine: Engine, ask: str, samples: Sequence[Any], max_new_tokens: int, rank: int, count: int
) -> _Replies | BaseException:
    """Every `count`-th sample's reply with its place, or what ends the run.

    Nothing is raised here: the others would wait for this share for ever.
    """
    places = range(rank, len(samples), count)
    try:
        replies = getattr(engine, ask)([samples[i] for i in places], max_new_tokens=max_new_tokens)
        return [(places[number], answer) for number, answer in replies]
    except UserError as error:
        return error
    except Exception:
        return RuntimeError(f"in process {rank}:\n{traceback.format_exc()}")
