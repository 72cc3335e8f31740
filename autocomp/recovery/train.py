"""One compressed model trained in the form it is delivered in, along a recipe; safe to stop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autocomp.compress.batchnorm import reestimate_batchnorm
from autocomp.errors import CorruptError, UsageError, last_line
from autocomp.graph.batches import part
from autocomp.recovery import stored
from autocomp.recovery.autocast import Autocast
from autocomp.recovery.channels import Channels, Wide
from autocomp.recovery.forms.whole import converted, trainable
from autocomp.recovery.lessons import Lesson, Teaching
from autocomp.recovery.losses import Features
from autocomp.recovery.masks import Masks
from autocomp.recovery.memory import PARTS, PROBED, parts_of
from autocomp.recovery.objective import batch_loss
from autocomp.recovery.recipe import Phase, Recipe
from autocomp.recovery.refit import observed, refit, set_rounding
from autocomp.recovery.schedules import Span, learning_rate

CHECKPOINT = 20.0  # seconds between two
CURVE = 60  # points of a curve at most
SMOOTH = 0.9  # of the losses that a curve shows
STOPPED = "it was stopped"


@dataclass(frozen=True)
class Trained:
    """What came of a training: the delivered model, the weights it is made of, and the curve of its loss as (share of the training, loss).

    ``failure`` says why it ended early (it diverged): the model is then of no use.
    """

    model: nn.Module
    weights: dict[str, Tensor]
    steps: int
    seconds: float
    curve: list[tuple[float, float]]
    failure: str = ""
    notes: tuple[str, ...] = ()


def train(
    model: nn.Module,
    teaching: Teaching,
    recipe: Recipe,
    span: Span,
    rate: float,
    shared: dict[str, Tensor | None] | None = None,
    checkpoint: Path | None = None,
    begun: dict[str, Any] | None = None,
    stop: Callable[[], bool] = lambda: False,
    wide: Wide | None = None,
) -> Trained:
    """Train a copy of a compressed model for a span; ``rate`` is the highest learning rate (AdamW).

    ``shared`` are the layers matched where the recipe says so (`losses.Features`). With a ``checkpoint`` the training goes on where that left
    it; ``begun`` are the weights to begin with, those of ``model`` unless given. Where ``stop`` says so it writes down where it is and ends.
    ``wide`` is the candidate before its channels are chosen, for recipes that choose them. UsageError if nothing of the model can be trained.
    """
    form, recipe = trainable(model), recipe.weighed({})
    if begun is not None:
        form.load_state_dict(begun)
        recipe = recipe.on_chosen_channels()
    channels = None
    if recipe.refreshes:
        if wide is None:
            raise UsageError(
                f"recipe {recipe.name} chooses channels while training, which only points of a search can be trained by"
            )
        channels = Channels(wide)
    run = _Run(form, teaching, recipe, span, rate, Features(teaching.teacher, shared or {}), checkpoint, stop, channels)
    failure = run.all_stages()
    if not failure:
        run.settle()
    form = run.form
    weights = {name: tensor.detach().clone() for name, tensor in form.state_dict().items()}
    if checkpoint is not None and failure != STOPPED:
        for path in (checkpoint, _previous(checkpoint)):
            path.unlink(missing_ok=True)
    notes = [f"batches went through in {run.parts} parts, to take less memory"] if run.parts > 1 else []
    if kept := run.precision.kept:
        notes.append(f"kept in fp32, as {recipe.autocast} changes what they compute: {', '.join(kept)}")
    return Trained(converted(form), weights, run.step, run.seconds, run.thinned(), failure, tuple(notes))


def losses(model: nn.Module, teaching: Teaching, recipe: Recipe, span: Span, rate: float) -> list[float]:
    """The loss of each step of a short training at one rate, of which nothing is kept; fewer where it diverged."""
    recipe = recipe.weighed({}).on_chosen_channels()
    steady = recipe.model_copy(
        update={"schedule": "constant", "ema": 0.0, "stages": [recipe.stages[-1].model_copy(update={"share": 1.0})]}
    )
    run = _Run(trainable(model), teaching, steady, span, rate, Features(teaching.teacher, {}), None)
    run.all_stages()
    return [loss for _, loss in run.curve]


@dataclass
class _Run:
    """A training under way."""

    form: nn.Module
    teaching: Teaching
    recipe: Recipe
    span: Span
    rate: float
    features: Features
    checkpoint: Path | None
    stop: Callable[[], bool] = lambda: False
    channels: Channels | None = None  # that are being chosen: ``form`` waits meanwhile
    step: int = 0
    seconds: float = 0.0
    parts: int = 1  # that a batch is split into
    sized: bool = False  # whether it was looked at in this stage how many these must be
    curve: list[tuple[float, float]] = field(default_factory=list)
    average: dict[str, Tensor] = field(default_factory=dict)
    stage: int = 0

    def __post_init__(self) -> None:
        self.narrow = self.form
        self.units: dict[str, Tensor] = {}  # that were chosen, by group
        if self.channels is not None:
            self.form, self.features = self.channels.form, Features(self.features.teacher, self.channels.rows())

    def all_stages(self) -> str:
        """Train until the span is over; why it diverged, if it did."""
        try:
            failure = self._all_stages()
            if not failure:
                self._narrowed()  # where the time was up before
            return failure
        finally:
            self.precision.release()

    def _ready(self) -> None:
        """Take hold of the form that is to be trained."""
        self.precision = Autocast(self.recipe.autocast)
        self.precision.protect(self.form, self.teaching.calibration)
        self.parameters = [p for p in self.form.parameters() if p.requires_grad and p.is_floating_point()]
        if not self.parameters:
            raise UsageError("nothing of this model can be trained: it has no weights in a form that learns")
        self.masks = Masks(self.form)
        self.optimizer, self.average = self._optimizer(), {}

    def _all_stages(self) -> str:
        self._ready()
        self._take_up()
        lessons = self.teaching.lessons.begin(self.step)
        set_rounding(self.form, self.recipe.stages[self.stage].rounding)
        self.form.train()
        clock, saved = time.monotonic() - self.seconds, time.monotonic()
        while (along := self.span.along(self.step, self.seconds)) < 1.0:
            index, within = self._place(along)
            if index != self.stage:
                self._next_stage(index)
            if self.channels is not None and self.channels.due(along / self.recipe.refreshes):
                self._choose(along / self.recipe.refreshes)
            loss = self._step(self.recipe.stages[index], within, lessons)
            self.step += 1
            self.seconds = time.monotonic() - clock
            if not math.isfinite(loss):
                return f"the loss was not finite at step {self.step} (learning rate {self.rate:.1e})"
            self._note(along, loss)
            if self.stop():
                if self.checkpoint is not None:
                    self._save(self.checkpoint)
                return STOPPED
            if self.checkpoint is not None and time.monotonic() - saved > CHECKPOINT:
                self._save(self.checkpoint)
                saved = time.monotonic()
        return ""

    def settle(self) -> None:
        """The end: averaged weights, and BatchNorm statistics of the calibration data."""
        set_rounding(self.form, True)
        with torch.no_grad():
            for name, parameter in self.form.named_parameters():
                if name in self.average:
                    parameter.copy_(self.average[name])
        self.masks.apply()
        self.form.eval()
        reestimate_batchnorm(self.form, self.teaching.calibration, self.teaching.axes)

    def thinned(self) -> list[tuple[float, float]]:
        """The curve in `CURVE` points at most, smoothed."""
        found, smooth = [], self.curve[0][1] if self.curve else 0.0
        for along, loss in self.curve:
            smooth = SMOOTH * smooth + (1 - SMOOTH) * loss
            found.append((round(along, 5), float(f"{smooth:.5g}")))
        return found[:: max(1, -(-len(found) // CURVE))]

    def _place(self, along: float) -> tuple[int, float]:
        """The stage at a share of the whole, and the share of it that is done."""
        begun = 0.0
        for index, stage in enumerate(self.recipe.stages):
            if along < begun + stage.share or index == len(self.recipe.stages) - 1:
                return index, min(1.0, (along - begun) / stage.share)
            begun += stage.share
        raise AssertionError("a recipe has a stage")

    def _next_stage(self, index: int) -> None:
        before, after = self.recipe.stages[self.stage], self.recipe.stages[index]
        if after.channels == "chosen":
            self._narrowed()
        if after.rounding and not before.rounding:
            set_rounding(self.form, False)
            with observed(self.form):
                self._look()
            refit(self.form)
        self.form.train()
        set_rounding(self.form, after.rounding)
        self.stage, self.optimizer, self.average, self.sized = index, self._optimizer(), {}, False

    def _look(self) -> None:
        """Have the model see the calibration data."""
        self.form.eval()
        with torch.no_grad():
            for batch in self.teaching.calibration:
                self.form(*batch)

    def _choose(self, along: float) -> None:
        """Choose channels anew, by what they make of the calibration data."""
        assert self.channels is not None
        with self.channels.watched():
            self._look()
        self.form.train()
        self.channels.choose(along)

    def _narrowed(self) -> None:
        """Go on with the candidate's own form, in the channels that were chosen."""
        if self.channels is None:
            return
        if self.channels.due(1.0):
            self._choose(1.0)
        self.channels.into(self.narrow)
        self._take_narrow()

    def _take_narrow(self) -> None:
        assert self.channels is not None
        self.features, self.units = Features(self.features.teacher, self.channels.rows()), self.channels.kept
        self.precision.release()
        self.form, self.channels = self.narrow, None
        self._ready()

    def _optimizer(self) -> torch.optim.AdamW:
        # fused: a third of the time where parameters are many and small
        return torch.optim.AdamW(self.parameters, lr=self.rate, weight_decay=self.recipe.weight_decay, fused=True)

    def _step(self, stage: Phase, within: float, lessons: Iterator[Lesson]) -> float:
        lesson = next(lessons)
        self.masks.begin(stage, self.step, within)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * learning_rate(self.recipe.schedule, within)
        if not self.sized:
            self.parts, self.sized = max(self.parts, self._parts(stage, within, lesson)), True
        while True:
            self.optimizer.zero_grad()
            try:
                total = sum(self._backward(stage, within, piece, lesson.samples) for piece in self._pieces(lesson))
                break
            except (RuntimeError, MemoryError) as error:
                if not _out_of_memory(error) or 2 * self.parts > min(PARTS, lesson.samples):
                    raise
            self.parts *= 2
        if not math.isfinite(total):
            return total
        self.precision.unscale(self.optimizer)
        self.masks.move(stage, self.step, within)
        torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip)
        self.precision.step(self.optimizer)
        self.masks.apply()
        if self.channels is not None:
            self.channels.apply()
        if self.recipe.ema:
            self._average()
        return total

    def _parts(self, stage: Phase, within: float, lesson: Lesson) -> int:
        """In how many parts lessons go through."""
        if lesson.samples <= PROBED or not _splits(lesson):
            return 1
        few = self._piece(lesson, 0, PROBED)

        def loss() -> Tensor:
            return batch_loss(self.form, self.teaching, self.features, stage, within, few, self.precision)

        return parts_of(self.form, lesson.samples, loss)

    def _pieces(self, lesson: Lesson) -> list[Lesson]:
        """The lesson, in parts where memory does not suffice; a target that is no tensor of samples cannot be split."""
        if self.parts == 1:
            return [lesson]
        if not _splits(lesson):
            raise UsageError(
                "memory ran out, and batches cannot be split as their targets are no tensor of samples: use smaller ones"
            )
        ends = [lesson.samples * k // self.parts for k in range(self.parts + 1)]
        return [self._piece(lesson, start, stop) for start, stop in pairwise(ends) if stop > start]

    def _piece(self, lesson: Lesson, start: int, stop: int) -> Lesson:
        target = lesson.target if lesson.target is None else lesson.target[start:stop]
        rows = [row[start:stop] for row in lesson.rows]
        return Lesson(part(lesson.inputs, start, stop - start, self.teaching.axes), target, rows, stop - start)

    def _backward(self, stage: Phase, within: float, lesson: Lesson, samples: int) -> float:
        """Add the gradients of a part of a batch of so many samples; its share of the loss."""
        loss = batch_loss(self.form, self.teaching, self.features, stage, within, lesson, self.precision)
        share = loss * (lesson.samples / samples)
        if not share.requires_grad:
            raise UsageError("the loss does not depend on anything that can be trained")
        if bool(torch.isfinite(share)):
            self.precision.backward(share)
        return float(share.detach())

    def _average(self) -> None:
        decay = min(self.recipe.ema, self.step / (self.step + 10))  # the first weights count for little
        with torch.no_grad():
            for name, parameter in self.form.named_parameters():
                if name in self.average:
                    self.average[name].lerp_(parameter, 1 - decay)
                else:
                    self.average[name] = parameter.detach().clone()

    def _note(self, along: float, loss: float) -> None:
        self.curve.append((along, loss))
        if len(self.curve) > 20 * CURVE:
            self.curve = self.curve[::2]

    def _save(self, path: Path) -> None:
        """Write where the training is; the file before stays beside it."""
        if path.exists():
            path.replace(_previous(path))
        stored.write(
            path,
            {
                stored.FORM: self.form.state_dict(), "optimizer": self.optimizer.state_dict(), "average": self.average, "masks": self.masks.kept,
                "masked": [self.masks.stage, self.masks.first],
                "step": self.step, "seconds": self.seconds, "stage": self.stage, "parts": self.parts,
                "curve": [list(point) for point in self.curve], "rate": self.rate, "scaler": self.precision.state(),
                "units": self.channels.kept if self.channels is not None else self.units,
                "turn": self.channels.turn if self.channels is not None else None,
            },
        )  # fmt: skip

    def _take_up(self) -> None:
        """Go on where a checkpoint left it: the newest one that reads."""
        if self.checkpoint is None:
            return
        for path in (self.checkpoint, _previous(self.checkpoint)):
            try:
                data = stored.read(path)
            except (FileNotFoundError, CorruptError):
                continue
            if self.channels is not None:
                self.channels.kept = data["units"]
                if data["turn"] is None:  # they were chosen by then
                    self._take_narrow()
                else:
                    self.channels.turn = data["turn"]
            self.form.load_state_dict(data[stored.FORM])
            self.optimizer.load_state_dict(data["optimizer"])
            self.masks.kept, (self.masks.stage, self.masks.first) = data["masks"], data["masked"]
            self.average, self.stage, self.rate = data["average"], data["stage"], data["rate"]
            self.step, self.seconds, self.parts = data["step"], data["seconds"], data["parts"]
            self.curve = [(along, loss) for along, loss in data["curve"]]
            self.precision.take_up(data.get("scaler", {}))
            return


def _splits(lesson: Lesson) -> bool:
    target = lesson.target
    return target is None or (isinstance(target, Tensor) and target.dim() > 0 and len(target) == lesson.samples)


def _previous(path: Path) -> Path:
    return path.with_name(f"{path.name}.before")


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or "memory" in last_line(error).lower()
