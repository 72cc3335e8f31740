"""The task `speech` with windows of four seconds: for a module of another length, with the choices of a finished search.

    autocomp search speech --out runs/speech
    autocomp search examples.speech.lengths:four_seconds --replay runs/speech --out runs/speech-4s
    python examples/speech/transcribe.py runs/speech/models/ID runs/speech-4s/models/ID recording.wav

(In the folder that holds ``examples``.) No weight depends on the length. Windows of the task are filled up with silence, so that error
rates can be compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

from autocomp.tasks.speech.features import FRAMES
from autocomp.tasks.speech.task import load_speech_task
from autocomp.tasks.speech.trained import load
from autocomp.tasks.task import Evaluate, Task


def four_seconds() -> Task:
    return lengthened(load_speech_task(), 2 * FRAMES)


def lengthened(task: Task, frames: int) -> Task:
    """Return the task for windows of so many frames."""
    return Task(
        model=load(frames=frames),
        example_inputs=(filled(task.example_inputs[0], frames),),
        calibration=[(filled(inputs[0], frames),) for inputs in task.calibration],
        evaluate=Longer(task.evaluate, frames),
        test=None if task.test is None else Longer(task.test, frames),
        train=None if task.train is None else Batches(task.train, frames),
        loss=task.loss,
        objective=task.objective,
        higher_is_better=task.higher_is_better,
        unit=task.unit,
        outputs="classes@2",
        name=f"{task.name}-{frames // 100}s",
        description=f"{task.description}; filled up to {frames // 100} s",
    )


def filled(window: Tensor, frames: int) -> Tensor:
    """Return frames ``[N, T, 40]`` with silence behind them."""
    return functional.pad(window, (0, 0, 0, frames - window.shape[1]), value=-1.0)


class Filling(nn.Module):
    """Takes windows of two seconds for a model of longer ones."""

    def __init__(self, model: nn.Module, frames: int) -> None:
        super().__init__()
        self.model, self.frames = model, frames

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.model(filled(x, self.frames))
        return result


@dataclass(frozen=True)
class Longer:
    """An `evaluate` of windows of two seconds, for a model of longer ones."""

    evaluate: Evaluate
    frames: int

    def __call__(self, model: nn.Module) -> dict[str, Tensor]:
        return dict(self.evaluate(Filling(model, self.frames)))


@dataclass(frozen=True)
class Batches:
    """Training batches that are filled up."""

    batches: Iterable[tuple[tuple[Tensor, ...], Tensor]]
    frames: int

    def __iter__(self) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
        for inputs, target in self.batches:
            yield (filled(inputs[0], self.frames),), target
