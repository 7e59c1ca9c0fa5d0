"""Processes that tests kill at any moment: forked from a server that has everything imported.

A new interpreter would spend most of its life on imports, and most kills would fall there.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cwdpo_bench.evaluate.in_process import InProcessEngine
from cwdpo_bench.evaluate.run import run_tasks

_CONTEXT = multiprocessing.get_context("forkserver")
# One server serves all tests of a session, so that this list is for all of them.
_CONTEXT.set_forkserver_preload(
    [
        "cwdpo_bench.train.run",
        "cwdpo_bench.evaluate.run",
        "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
        "transformers.models.qwen2_5_vl.processing_qwen2_5_vl",
        "transformers.models.qwen2_vl.image_processing_qwen2_vl",
    ]
)


def begin(work: Callable[..., Any], **arguments: Any) -> multiprocessing.process.BaseProcess:
    """Start `work(**arguments)`, a function that can be imported, in a process of its own."""
    process = _CONTEXT.Process(target=work, kwargs=arguments)
    process.start()
    return process


def finish(start: Callable[..., multiprocessing.process.BaseProcess], *arguments: Any) -> float:
    """Let the process that `start(*arguments)` begins end well; returns its seconds."""
    started = time.monotonic()
    process = start(*arguments)
    process.join()
    assert process.exitcode == 0
    return time.monotonic() - started


def run_and_note(asked: Path, **arguments: Any) -> None:
    """`run_tasks`, with a line in `asked` for every sample that the engine is asked about."""
    for name in ("answer_captions", "answer_choices"):
        setattr(InProcessEngine, name, _noting(getattr(InProcessEngine, name), asked))
    run_tasks(**arguments)


def _noting(ask: Callable[..., Any], asked: Path) -> Callable[..., Any]:
    def noted(engine: Any, samples: Sequence[Any], **settings: Any) -> Iterator[Any]:
        with asked.open("a") as file:
            file.write("".join(f"{sample.id}\n" for sample in samples))
        return ask(engine, samples, **settings)

    return noted
