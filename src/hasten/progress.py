"""Progress bars with the remaining time, on stderr."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Bars:
    """Shows one line a stage: a bar that fills where the stage counts its work, the time spent and the time left."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._quiet = not console.is_terminal
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=24), TimeElapsedColumn(), TextColumn("left"),
            TimeRemainingColumn(), console=console, disable=self._quiet,
        )  # fmt: skip
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        """Starts the display."""
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stops the display."""
        if kind is None:
            self._end()
        self._progress.stop()

    def stage(self, name: str) -> None:
        """Begins a new line."""
        self._end()
        if self._quiet:
            self._console.print(name, highlight=False, markup=False)
        self._task = self._progress.add_task(name, total=None)

    def advance(self, done: int, total: int) -> None:
        """Fills the bar of the current line."""
        if self._task is not None:
            self._progress.update(self._task, completed=done, total=total)

    def _end(self) -> None:
        if self._task is not None:
            self._progress.update(self._task, total=1, completed=1)
