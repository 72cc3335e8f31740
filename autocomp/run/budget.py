"""The minutes of a run and how they are shared out: what is kept for its end, and when each part must stop."""

from __future__ import annotations

import math
import time

# Shares and counts below are chosen by hand, not measured, but for what a point takes to write, which each run measures on the dense model.
POINTS = 6  # that a front usually has
_REFERENCES = 4.0  # times what one point takes to write: two files of ONNX Runtime's, and classic recipes compiled
_MOST = 0.5  # of the minutes is kept for the end
BASELINES = 0.3  # of the time that is left when they begin
TELLING = 0.5  # of a round; the rest is for measuring


class Budget:
    """Minutes of a run (None: as long as it takes), of which some seconds are ``spent``; all counts, from reading the model to the last file."""

    def __init__(self, minutes: float | None, spent: float = 0.0) -> None:
        self.minutes = minutes
        self.start = time.monotonic() - spent
        self.total = minutes * 60 if minutes is not None else math.inf
        self.kept = 0.0  # seconds for the end of the run
        self.training = 0.0  # seconds for training candidates, until that begins

    def keep_for_the_end(self, point: float, together: int, references: bool) -> None:
        """Keep what writing a front should take, where one point takes ``point`` seconds and ``together`` are written side by side."""
        seconds = point * (math.ceil(POINTS / together) + (_REFERENCES if references else 0.0))
        self.kept = min(seconds, _MOST * self.total)

    def spent(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start

    def left(self) -> float:
        """Seconds until the whole must be done; below zero past that."""
        return self.total - self.spent()

    def to_search(self) -> float:
        """Seconds until training, or the end of the run, must begin."""
        return self.left() - self.kept - self.training

    def late(self, seconds: float = 0.0) -> bool:
        """Whether something that takes so long would run into the time kept for the end."""
        return self.to_search() < seconds

    def forecast(self, stage: str, seconds: float) -> str:
        """What to warn of if a stage needs so many more seconds and that leaves no time to search; "" if it does."""
        if self.to_search() > seconds:
            return ""
        needed = math.ceil((self.spent() + seconds + 2 * self.kept + self.training + 60) / 60)
        return (
            f"--minutes {self.minutes:g} cannot be kept: {stage} will have taken about {_text(self.spent() + seconds)}, and writing the "
            f"models takes about {_text(self.kept)}. The search does the least it must; give it --minutes {needed} or more"
        )


def _text(seconds: float) -> str:
    return f"{seconds / 60:.1f} minutes" if seconds >= 90 else f"{seconds:.0f} s"
