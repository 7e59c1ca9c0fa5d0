"""A training run in two processes; started by `test_processes.py`, not collected.

Started by a launcher this is one of them. Otherwise it loads what they need once and forks them,
with the variables that a launcher sets: to import torch and transformers costs more than a run.

accelerate spreads weights on accelerators alone. Here it is told that processes on a CPU (gloo) may
do as those: all of its FSDP2 and of ours then runs as it would on GPUs.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from cwdpo_bench.errors import UserError
from cwdpo_bench.train.recipe import load_recipe
from cwdpo_bench.train.run import train

_initialise = AcceleratorState.__init__


def _as_on_accelerators(self: Any, *args: Any, **kwargs: Any) -> None:
    state = PartialState._shared_state
    if os.environ.get("ACCELERATE_USE_FSDP") and state:
        state["distributed_type"] = DistributedType.MULTI_GPU
    _initialise(self, *args, **kwargs)


def _without_compiling() -> None:
    """DeepSpeed would compile collectives of its own for a CPU, for minutes; gloo's do."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def main(settings: dict[str, Any]) -> None:
    if os.environ.get("ACCELERATE_USE_DEEPSPEED"):
        _without_compiling()
    AcceleratorState.__init__ = _as_on_accelerators  # type: ignore[method-assign]
    try:
        train(
            load_recipe(settings["recipe"], [*settings["overrides"], "trainer.use_cpu=true"]),
            model=settings["model"],
            data=Path(settings["data"]),
            probe=Path(settings["probe"]),
            output=Path(settings["output"]),
            resume=settings.get("resume", False),
        )
    except UserError as error:
        # In one write: the processes share the pipe.
        sys.stderr.write(f"refused: {error}\n")
        sys.exit(2)


def fork(number: int) -> None:
    """Go on as each of so many processes; this one waits for them and tells how they ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE=str(number))
    os.environ["LOCAL_WORLD_SIZE"] = str(number)
    children = set()
    for rank in range(number):
        child = os.fork()
        if not child:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            return
        children.add(child)
    status = 0
    while children:
        child, ended = os.wait()
        children.remove(child)
        if ended and not status:
            # The others wait for it for ever.
            status = os.waitstatus_to_exitcode(ended)
            for other in children:
                os.kill(other, signal.SIGTERM)
    sys.exit(status)


if __name__ == "__main__":
    if "WORLD_SIZE" not in os.environ:
        fork(2)
    main(json.loads(sys.argv[1]))
