"""The loss of a batch: everything that a stage of a recipe learns from, added up."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from autocomp.recovery.attention import Maps, attention_loss
from autocomp.recovery.lessons import Lesson, Teaching, owned
from autocomp.recovery.losses import Features, distillation_loss, labels_loss, sureness
from autocomp.recovery.recipe import Phase
from autocomp.recovery.schedules import temperature


class Seen(NamedTuple):
    """What a model answered, and what was seen inside of it on the way."""

    answer: Any
    features: dict[str, Tensor]
    maps: list[Tensor]


def batch_loss(
    form: nn.Module,
    teaching: Teaching,
    features: Features,
    stage: Phase,
    within: float,
    lesson: Lesson,
    precision: Callable[[], AbstractContextManager[Any]],
) -> Tensor:
    """The loss of a model on a batch at a share ``within`` of a stage, a mean over samples; ``precision`` is what the model computes in."""
    look = bool(stage.features and features.shared), bool(stage.attention)
    with precision():
        actual = _seen(form, lesson, features, look)
    loss, comparison = torch.zeros(()), teaching.comparison
    if stage.logits:
        sure = sureness(comparison, lesson.rows) if stage.temperature == "entropy" else 1.0
        at = temperature(stage.temperature, stage.hot, stage.cold, within, sure)
        rows = comparison.rows(actual.answer, lesson.samples)
        found = [row.float() if row.is_floating_point() else row for row in rows]
        loss = loss + stage.logits * distillation_loss(comparison, lesson.rows, found, at)
    if stage.labels and teaching.loss is not None:
        loss = loss + stage.labels * labels_loss(teaching.loss, actual.answer, owned(lesson.target))
    if any(look):
        with torch.no_grad():
            expected = _seen(teaching.teacher, lesson, features, look)
        if stage.features:
            loss = loss + stage.features * features.loss(expected.features, actual.features)
        if stage.attention:
            loss = loss + stage.attention * attention_loss(expected.maps, actual.maps)
    return loss


def _seen(model: nn.Module, lesson: Lesson, features: Features, look: tuple[bool, bool]) -> Seen:
    with ExitStack() as stack:
        inside = stack.enter_context(features.recorded(model)) if look[0] else {}
        maps = stack.enter_context(Maps()) if look[1] else None
        answer = model(*lesson.inputs)
    return Seen(answer, inside, maps.found if maps is not None else [])
