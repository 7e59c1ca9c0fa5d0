"""The live panel of a training run in a terminal; plain lines where there is none.

Everything goes to standard error: small curves of the loss and of log p of the chosen, the rejected
and the argmax answers, the last measurement, the verdict, and the time left.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cwdpo_bench.train.verdict import Verdict

_BLOCKS = "▁▂▃▄▅▆▇█"
_WIDTH = 40
_COLOURS = {"healthy": "green", "displacement": "yellow", "squeezing": "red"}
_CURVES = {
    "chosen log p": "chosen_mean_logp",
    "rejected log p": "rejected_mean_logp",
    "argmax log p": "argmax_mean_logp",
}
_VALUES = {"top-1": "top1_probability", "token ECE": "token_ece", "w_c": "cooling_weight"}


def sparkline(values: Sequence[float], width: int = _WIDTH) -> str:
    """The last `width` values as blocks between their own least and largest; gaps are left out."""
    shown = [value for value in values if math.isfinite(value)][-width:]
    if not shown:
        return ""
    low, high = min(shown), max(shown)
    if high == low:
        return _BLOCKS[0] * len(shown)
    top = len(_BLOCKS) - 1
    return "".join(_BLOCKS[round(top * (value - low) / (high - low))] for value in shown)


class TrainPanel:
    """Shows one training run: `step` after every step, `measured` after every measurement."""

    def __init__(self, name: str, console: Console | None = None) -> None:
        """`name` is the recipe's; the console is standard error by default."""
        self._name = name
        self._console = Console(stderr=True) if console is None else console
        self._live: Live | None = None
        self._stage, self._step, self._last = "", 0, 0
        self._began: tuple[float, int] = (time.monotonic(), 0)
        self._losses: list[float] = []
        self._rows: list[dict[str, Any]] = []
        self._verdict: Verdict | None = None
        self._said = ""

    def __enter__(self) -> TrainPanel:
        """Take the terminal, where there is one."""
        if self._console.is_terminal:
            self._live = Live(self._draw(), console=self._console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the last picture standing."""
        if self._live is not None:
            self._live.update(self._draw())
            self._live.stop()

    def step(self, stage: str, step: int, last: int, loss: float | None) -> None:
        """One step of a stage is done."""
        self._enter(stage, step - 1)
        self._step, self._last = step, last
        if loss is not None and (not self._losses or loss != self._losses[-1]):
            self._losses.append(loss)
        if self._live is not None:
            self._live.update(self._draw())
        elif step == last:
            self._say()

    def measured(self, row: dict[str, Any], verdict: Verdict) -> None:
        """A measurement is done, before its step is told."""
        self._enter(row["stage"], row["step"])
        self._rows.append(row)
        self._verdict = verdict
        if self._live is not None:
            self._live.update(self._draw())
        else:
            self._step = row["step"]
            self._say()

    def _enter(self, stage: str, step: int) -> None:
        if stage != self._stage:
            self._stage, self._step = stage, step
            self._began = (time.monotonic(), step)
            self._losses, self._rows, self._verdict = [], [], None

    def _time_left(self) -> str:
        began, first = self._began
        done = self._step - first
        if done <= 0 or self._last == 0:
            return "–"
        seconds = (time.monotonic() - began) / done * (self._last - self._step)
        return f"{int(seconds // 60)}:{int(seconds % 60):02}"

    def _latest(self, column: str) -> float:
        value = self._rows[-1].get(column, math.nan) if self._rows else math.nan
        return float(value)

    def _line(self) -> str:
        parts = [f"{self._name} {self._stage}: step {self._step}"]
        if self._last:
            parts[0] += f"/{self._last}"
        if self._losses:
            parts.append(f"loss {self._losses[-1]:.4f}")
        for label, column in {**_CURVES, **_VALUES}.items():
            if math.isfinite(self._latest(column)):
                parts.append(f"{label} {self._latest(column):.3f}")
        if self._verdict is not None:
            parts.append(self._verdict.name)
        parts.append(f"{self._time_left()} left")
        return ", ".join(parts)

    def _say(self) -> None:
        """The line; not once more where a stage's last step was measured and says the same."""
        line = self._line()
        if line != self._said:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)
        self._said = line

    def _draw(self) -> RenderableType:
        curves = Table.grid(padding=(0, 2))
        lines = {"loss": self._losses}
        for label, column in _CURVES.items():
            lines[label] = [float(row.get(column, math.nan)) for row in self._rows]
        for label, values in lines.items():
            known = [value for value in values if math.isfinite(value)]
            latest = f"{known[-1]:.3f}" if known else "–"
            curves.add_row(label, Text(latest, justify="right"), sparkline(values))
        figures = [
            f"{label} {self._latest(column):.3f}"
            for label, column in _VALUES.items()
            if math.isfinite(self._latest(column))
        ]
        verdict = Text("no verdict yet", style="dim")
        if self._verdict is not None:
            verdict = Text(self._verdict.sentence, style=_COLOURS[self._verdict.name])
        bar = Table.grid(padding=(0, 2))
        bar.add_row(
            ProgressBar(total=self._last or 1, completed=self._step, width=_WIDTH),
            f"{self._step}/{self._last or '?'}",
            f"{self._time_left()} left",
        )
        body = Group(curves, Text("   ".join(figures)), verdict, bar)
        return Panel(body, title=Text(f"{self._name} {self._stage}"), title_align="left")
