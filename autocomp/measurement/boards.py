"""Estimated targets whose profile also states a board: what the front keeps is measured there, and the estimate is kept beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from autocomp.errors import AutocompError
from autocomp.records.evaluation import Evaluation

if TYPE_CHECKING:
    from autocomp.devices.device import Device
    from autocomp.devices.rpc import RpcDevice
    from autocomp.measurement.measurer import Measurer
    from autocomp.progress import Progress

    Update = Callable[[int, Evaluation], None]


def remeasured(
    measurer: Measurer, evaluations: Sequence[Evaluation], update: Update, progress: Progress
) -> list[Evaluation]:
    """The evaluations with a board's measured latency in place of an estimate, which moves to ``predicted``, wherever a board is there.

    A board that is missing, lost or computes something else leaves the estimate standing, with a warning. What was measured is stored
    with the trial (``update``), so a resumed run does not measure it again.
    """
    found = list(evaluations)
    for name, device in measurer.devices.items():
        if device.profile.reach != "estimate" or device.profile.rpc is None:
            continue
        board = _board(device, progress)
        if board is None:
            continue
        with progress.stage(f"measuring on boards of {name}", len(found)) as stage:
            for index, evaluation in enumerate(found):
                found[index] = _on_board(measurer, evaluation, name, board, progress)
                if found[index] is not evaluation:
                    update(evaluation.trial, found[index])
                stage.advance()
    return found


def _board(device: Device, progress: Progress) -> RpcDevice | None:
    from autocomp.devices.rpc import board_of

    try:
        return board_of(device.profile)
    except AutocompError as error:
        progress.warn(
            f"the board of profile {device.profile.name} is not there, so its latencies stay estimates: {error}"
        )
        return None


def _on_board(
    measurer: Measurer, evaluation: Evaluation, name: str, board: RpcDevice, progress: Progress
) -> Evaluation:
    estimate = evaluation.latency[name]
    if estimate.how == "measured":
        return evaluation
    try:
        compiled = board.compile(measurer.stitch(evaluation.candidate), measurer.inputs)
        measured = board.time(compiled, measurer.inputs[0])
    except AutocompError as error:
        progress.warn(f"candidate {evaluation.candidate.id} keeps its estimate on {name}: the board failed: {error}")
        return evaluation
    return replace(
        evaluation,
        latency={**evaluation.latency, name: replace(measured, profile=name)},
        predicted={**evaluation.predicted, name: estimate.seconds},
    )
