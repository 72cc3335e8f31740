"""Estimated targets whose profile also states a board: what the front keeps is measured there, and the estimate is kept beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from autocomp.errors import AutocompError
from autocomp.records import Evaluation

if TYPE_CHECKING:
    from autocomp.devices.rpc import RpcDevice
    from autocomp.pipeline import Pipeline


def remeasured(pipeline: Pipeline, evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """The evaluations with a board's measured latency in place of an estimate, which moves to ``predicted``, wherever a board is there.

    A board that is missing, lost or computes something else leaves the estimate standing, with a warning. What was measured is stored
    with the trial, so a resumed run does not measure it again.
    """
    found = list(evaluations)
    for name, device in pipeline.devices.items():
        if device.profile.how != "estimate" or device.profile.rpc is None:
            continue
        board = _board(pipeline, name)
        if board is None:
            continue
        with pipeline.progress.stage(f"measuring on boards of {name}", len(found)) as stage:
            for index, evaluation in enumerate(found):
                found[index] = _on_board(pipeline, evaluation, name, board)
                stage.advance()
    return found


def _board(pipeline: Pipeline, name: str) -> RpcDevice | None:
    from autocomp.devices.rpc import board_of

    try:
        return board_of(pipeline.devices[name].profile)
    except AutocompError as error:
        pipeline.progress.warn(f"the board of profile {name} is not there, so its latencies stay estimates: {error}")
        return None


def _on_board(pipeline: Pipeline, evaluation: Evaluation, name: str, board: RpcDevice) -> Evaluation:
    estimate = evaluation.latency[name]
    if estimate.how == "measured":
        return evaluation
    try:
        compiled = board.compile(pipeline.stitch(evaluation.candidate), pipeline.inputs)
        measured = board.time(compiled, pipeline.inputs[0])
    except AutocompError as error:
        pipeline.progress.warn(
            f"candidate {evaluation.candidate.id} keeps its estimate on {name}: the board failed: {error}"
        )
        return evaluation
    done = replace(
        evaluation,
        latency={**evaluation.latency, name: replace(measured, profile=name)},
        predicted={**evaluation.predicted, name: estimate.seconds},
    )
    pipeline.search.update(evaluation.trial, done)
    return done
