"""Progress on standard error: bars with the time left, plain lines where there is no terminal."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def progress_bar() -> Progress:
    """A bar with count and time left, on standard error."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=Console(stderr=True),
    )


class TrainProgress:
    """Shows the steps of every stage of one training run."""

    def __init__(self, name: str, bar: Progress | None = None) -> None:
        """`bar` lets several runs share one display."""
        self._name, self._shared = name, bar is not None
        self._bar = bar if bar is not None else progress_bar()
        self._tasks: dict[str, object] = {}

    def __enter__(self) -> TrainProgress:
        """Start the display unless it is shared."""
        if not self._shared:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop the display unless it is shared."""
        if not self._shared:
            self._bar.stop()

    def step(self, stage: str, step: int, last: int, loss: float | None) -> None:
        """One step of a stage is done; also a line at the end where there is no terminal."""
        note = "" if loss is None else f"loss {loss:.4f}"
        if stage not in self._tasks:
            self._tasks[stage] = self._bar.add_task(f"{self._name} {stage}", total=last, note=note)
        self._bar.update(self._tasks[stage], completed=step, note=note)  # type: ignore[arg-type]
        if step == last and not self._bar.console.is_terminal:
            self._bar.console.print(f"{self._name} {stage}: {step} steps {note}", markup=False)
