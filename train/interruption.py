"""A run that is told to stop saves first: SIGINT and SIGTERM become a checkpoint and a status.

The signal is kept until the step in progress is done, then the Trainer writes a checkpoint of that
step, from which `--resume` goes on. A second signal does not wait.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from transformers import TrainerCallback

from cwdpo_bench.train import processes

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """The run was told to stop and has saved what it had.

    Attributes:
        signal: which told it.
        step: of the checkpoint.
    """

    def __init__(self, number: signal.Signals, step: int) -> None:
        """Say it in words that name the mend."""
        self.signal, self.step = number, step
        super().__init__(f"{number.name}: saved at step {step}; go on with --resume")


class SaveOnSignal(TrainerCallback):
    """Ends the training after the step in which a signal came, with a checkpoint of it."""

    def __init__(self) -> None:
        """Wait for the first step."""
        self._received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the signals over; only the main thread may."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop where a signal has come, to this process or to another one."""
        told = processes.gathered(self._received)
        self._received = next((number for number in told if number is not None), None)
        if self._received is not None:
            control.should_save = True
            control.should_training_stop = True

    def release(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def raise_if_received(self, step: int) -> None:
        """After the training has ended.

        Raises:
            Interrupted: a signal had come.
        """
        if self._received is not None:
            raise Interrupted(self._received, step)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._received is not None:
            self.release()
            raise KeyboardInterrupt
        self._received = signal.Signals(number)
