"""Progress of the stages of a run: silent unless given a console, so that libraries can take it as an argument."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autocomp.processes import interrupt

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import TaskID


@dataclass
class Stage:
    """One running stage; made by `Progress.stage`."""

    name: str
    total: int | None
    progress: Progress
    done: int = 0
    note: str = ""
    task: TaskID | None = None

    def advance(self, n: int = 1, note: str = "") -> None:
        """Count ``n`` more steps as done; ``note`` is shown behind the bar until the next one."""
        interrupt.check()
        self.done += n
        self.note = note or self.note
        self.progress._show(self)

    def warn(self, text: str) -> None:
        """Show a warning above the bar and keep it in ``progress.warnings``."""
        self.progress.warn(text)


class Progress:
    """Stages of a run and how long each took.

    Without a console it only keeps ``seconds`` (by stage name, summed over repeats) and ``warnings``. With a rich
    console that is a terminal it draws bars; with one that is not (a log file) it prints one line as each outermost
    stage ends.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console
        self.seconds: dict[str, float] = {}
        self.warnings: list[str] = []
        self._stages: list[Stage] = []
        self._bars: Bars | None = None

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Stage]:
        """Enter a stage of ``total`` steps (None: unknown); stages may nest."""
        interrupt.check()
        stage = Stage(name, total, self)
        started = time.perf_counter()
        self._open(stage)
        finished = False
        try:
            yield stage
            finished = True
        finally:
            seconds = time.perf_counter() - started
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
            self._close(stage, seconds, finished)

    def warn(self, text: str) -> None:
        """Show a warning, once for each text, and keep it."""
        if text in self.warnings:
            return
        self.warnings.append(text)
        self._print(f"[yellow]warning:[/yellow] {_plain(text)}")

    def say(self, lines: Sequence[str]) -> None:
        """Show lines of text; they are not kept."""
        for line in lines:
            self._print(_plain(line))

    def _open(self, stage: Stage) -> None:
        self._stages.append(stage)
        if self.console is None or not self.console.is_terminal:
            return
        if self._bars is None:
            self._bars = _new_bars(self.console)
            self._bars.start()
        indent = "  " * (len(self._stages) - 1)
        stage.task = self._bars.add_task(indent + _plain(stage.name), total=stage.total, note="")

    def _show(self, stage: Stage) -> None:
        if self._bars is not None and stage.task is not None:
            self._bars.update(stage.task, completed=stage.done, note=_plain(stage.note))

    def _close(self, stage: Stage, seconds: float, finished: bool) -> None:
        self._stages.remove(stage)
        outermost = not self._stages
        if self._bars is not None and stage.task is not None:
            if finished:
                done = stage.total or stage.done or 1
                self._bars.update(stage.task, total=done, completed=done)
            if outermost:
                self._bars.stop()
                self._bars = None
            else:
                self._bars.remove_task(stage.task)
        elif self.console is not None and outermost:
            counted = f" {stage.done}" + (f"/{stage.total}" if stage.total else "") if stage.done else ""
            ending = "" if finished else " (stopped)"
            note = f" · {stage.note}" if stage.note else ""
            self._print(_plain(f"{stage.name}:{counted} in {seconds:.1f} s{note}{ending}"))

    def _print(self, text: str) -> None:
        if self.console is None:
            return
        try:
            self.console.print(text, highlight=False, soft_wrap=True)
        except (
            BrokenPipeError,
            SystemExit,
        ):  # rich's answer to the former: whoever read this left, which is no reason to stop
            self.console = None


def _plain(text: str) -> str:
    """Rich reads square brackets as markup; layer names and messages contain them."""
    from rich.markup import escape

    return escape(text)


def _new_bars(console: Console) -> Bars:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    return Bars(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("[dim]{task.fields[note]}"),
        console=console,
        redirect_stderr=False,  # what others write there is caught: autocomp.processes.chatter
    )
