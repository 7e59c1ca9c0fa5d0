"""A training run as one of several processes; started by `test_processes.py`, not collected.

accelerate spreads weights on accelerators alone. Here it is told that processes on a CPU (gloo) may
do as those: all of its FSDP2 and of ours then runs as it would on GPUs.
"""

from __future__ import annotations

import json
import os
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


def main(settings: dict[str, Any]) -> None:
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


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
