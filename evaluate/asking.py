"""Asking an engine for what is not kept yet, and keeping every reply as it comes.

The last bits of a log-probability change with what else is in its batch. So that a run that was cut
off ends with the same bits as one that was not, a task's samples are asked in groups that the task
and the engine alone decide (`Engine.chunk_size`), and a group's replies are kept all at once. Where
the engine's replies depend on no company (a group of 1), all that lack a reply are asked in one
call and each is kept as it arrives.

A sample that fails is never kept: the next start asks it again.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TypeVar, cast

from cwdpo_bench import __version__
from cwdpo_bench.errors import UserError
from cwdpo_bench.evaluate.engine import CaptionAnswer, ChoiceAnswer, Engine, Failure
from cwdpo_bench.evaluate.images import image_digests
from cwdpo_bench.evaluate.plan import CaptionJob, ChoiceJob, Job
from cwdpo_bench.evaluate.run_file import SCHEMA
from cwdpo_bench.evaluate.samples import CaptionSample, ChoiceSample
from cwdpo_bench.evaluate.store import Keep, ReplyStore

Sample = TypeVar("Sample", CaptionSample, ChoiceSample)
Answer = TypeVar("Answer", CaptionAnswer, ChoiceAnswer)
Progress = Callable[[], object]
"""Called once for every sample that has its reply, or has failed."""
_Ask = Callable[[Sequence[Sample]], Iterator[tuple[int, Answer | Failure]]]


@dataclass
class Failures:
    """The samples of a run that could not be answered.

    Attributes:
        allowed: how many may fail over all tasks.
        reasons: by task, sample id → what was wrong.
    """

    allowed: int
    reasons: dict[str, dict[str, str]] = field(default_factory=dict)

    def add(self, task: str, sample: str, reason: str) -> None:
        """Count one.

        Raises:
            UserError: it is one too many.
        """
        self.reasons.setdefault(task, {})[sample] = reason
        count = sum(map(len, self.reasons.values()))
        if count > self.allowed:
            if self.allowed:
                reason = f"{count} samples failed, {self.allowed} may; the last: {reason}"
            raise UserError(f"{reason} (--max-failures N leaves out up to N such samples)")


@dataclass
class Asker:
    """Answers jobs from the store and, for what it lacks, from the engine.

    Attributes:
        engine: what answers.
        store: where replies are kept.
        root: the data root, where the samples' images are.
        failures: where samples that cannot be answered are counted.
    """

    engine: Engine
    store: ReplyStore
    root: Path
    failures: Failures

    @cached_property
    def engine_digest(self) -> str:
        """Of all of the engine and this code that a reply follows from."""
        return _digest(
            {
                "schema": SCHEMA,
                "cwdpo-bench": __version__,
                "fields": [CaptionAnswer._fields, ChoiceAnswer._fields],
                "engine": self.engine.name,
                "fingerprint": self.engine.fingerprint(),
                "signature": {k: str(v) for k, v in self.engine.signature_parts.items()},
                "shift_from": self.engine.shift_from,
                "draws": self.engine.draws,
            }
        ).hex()

    def captions(self, job: CaptionJob, progress: Progress) -> list[CaptionAnswer | None]:
        """The captions of a task's samples in their order; None for one that failed.

        Raises:
            UserError: too many fail, the engine gives up, or a reply cannot be kept.
        """
        limit, name = job.task.max_new_tokens, job.task.name
        ask = partial(self.engine.answer_captions, max_new_tokens=limit)
        return self._answer(
            name, job.samples, lambda s: self._key(job, s, s.references[0]), ask, progress
        )

    def choices(self, job: ChoiceJob, progress: Progress) -> list[ChoiceAnswer | None]:
        """The replies to a task's questions, likewise."""
        limit, name = job.task.max_new_tokens, job.task.name
        ask = partial(self.engine.answer_choices, max_new_tokens=limit)
        return self._answer(
            name, job.samples, lambda s: self._key(job, s, s.option_replies), ask, progress
        )

    def _key(self, job: Job, sample: CaptionSample | ChoiceSample, scored: object) -> bytes:
        """Names all that a reply follows from; the sample's id is the seed of drawn captions."""
        return _digest(
            {
                "engine": self.engine_digest,
                "task": job.task.name,
                "data": job.data_sha256,
                "sample": sample.id,
                "prompt": sample.prompt,
                "images": image_digests(sample, self.root),
                "scored": scored,
                "max_new_tokens": job.task.max_new_tokens,
                "decoding": "greedy",
            }
        )

    def _answer(
        self,
        task: str,
        samples: Sequence[Sample],
        key_of: Callable[[Sample], bytes],
        ask: _Ask[Sample, Answer],
        progress: Progress,
    ) -> list[Answer | None]:
        found: list[Answer | None] = []
        size = self.engine.chunk_size
        step = len(samples) if size == 1 else size
        for start in range(0, len(samples), step):
            group = samples[start : start + step]
            keys = [key_of(sample) for sample in group]
            answers = cast("dict[bytes, Answer]", self.store.find(keys))
            for _ in answers:
                progress()
            lacking = [place for place, key in enumerate(keys) if key not in answers]
            if lacking:
                asked = [group[place] for place in lacking]
                for kept in self._kept(task, asked, [keys[p] for p in lacking], ask, size == 1):
                    answers |= kept
                    for _ in kept:
                        progress()
            found += [answers.get(key) for key in keys]
        return found

    def _kept(
        self,
        task: str,
        samples: Sequence[Sample],
        keys: Sequence[bytes],
        ask: _Ask[Sample, Answer],
        singly: bool,
    ) -> Iterator[dict[bytes, Answer]]:
        """One call of the engine; what is given has been kept: reply by reply, or the whole."""
        started = time.monotonic()
        fresh: dict[int, Answer] = {}

        def keep() -> dict[bytes, Answer]:
            nonlocal started, fresh
            rows = [Keep(keys[place], samples[place].id, fresh[place]) for place in sorted(fresh)]
            self.store.keep(task, rows, time.monotonic() - started)
            kept = {keys[place]: answer for place, answer in fresh.items()}
            started, fresh = time.monotonic(), {}
            return kept

        for place, answer in ask(samples):
            if isinstance(answer, Failure):
                self.failures.add(task, samples[place].id, answer.reason)
                continue
            fresh[place] = answer
            if singly:
                yield keep()
        if fresh:
            yield keep()


def _digest(value: object) -> bytes:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()
