"""What is thought of a search before its first trial: by `autocomp plan`, and kept by every search, to be held against what it finds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from autocomp.devices.latency import LatencyModel
from autocomp.records.evaluation import Evaluation
from autocomp.records.expected import (
    MEASURING,
    PREPARING,
    TELLING,
    Expected,
    ExpectedPoint,
    expected_from_json,
    expected_to_json,
)
from autocomp.records.latency import Latency
from autocomp.records.run import speedup
from autocomp.study.solver import solve_front

if TYPE_CHECKING:
    from torch import nn

    from autocomp.records.candidate import Candidate
    from autocomp.run.found import Found
    from autocomp.study.costs import Costs

FORMAT_VERSION = 1  # of the study's attribute
ATTRIBUTE = "expected"
POINTS = 12  # of the predicted front
# Times what a candidate takes that is stitched and read on 64 samples: a trial is read on all of them, and its proposal is thought of. 3.3 on
# digits, 2.3 to 5.7 on the four models of reports/benchmarks/cost.json ((searching - measuring) / trials, over fitting / candidates).
WHOLE = 3.0
# Times what the rehearsal took to write the dense model's files: a candidate is compiled and timed, others beside it, and shares kernels with
# them. 0.4 to 0.6 of its whole rehearsal on digits with two cores (reports/digits); a guess for others.
MEASURED = 0.5
LEAST = 1e-9  # seconds of a candidate whose layers are all left out, which the layer tables know nothing of: others are divided by them


def expected_front(costs: Costs, count: int = POINTS) -> list[Evaluation]:
    """What is thought of the solver's front, slow to fast, in the place of evaluations: nothing of it was looked at."""
    return [thought(costs, candidate) for candidate in solve_front(costs.problem(), count)]


def thought_of_dense(costs: Costs, model: nn.Module) -> Evaluation:
    """What is thought of the uncompressed model; its bytes are known."""
    from autocomp.graph.fold import dense_bytes

    return replace(thought(costs, costs.space.dense()), bytes=dense_bytes(model))


def thought(costs: Costs, candidate: Candidate) -> Evaluation:
    """What is thought of a candidate: seconds by profile, bytes (a tensor in several layers counted in each), divergence in nats by the layer
    tables."""
    cost, predicted = costs.problem().cost(candidate), costs.predict(candidate)
    latency = {
        name: Latency(max(seconds, LEAST), 0.0, "estimated", name, watts=costs.devices[name].profile.watts)
        for name, seconds in predicted.items()
    }
    return Evaluation(0, candidate, "solver", "told", cost.error, cost.bytes, predicted, latency=latency)


def counted(
    costs: Costs, model: nn.Module, stitched: Callable[[Candidate], nn.Module], evaluations: Sequence[Evaluation]
) -> list[Evaluation]:
    """Evaluations with the bytes of their models, where the tables count otherwise: layers may share tensors."""
    from autocomp.graph.fold import folded_bytes

    if thought(costs, costs.space.dense()).bytes == folded_bytes(model):
        return list(evaluations)
    return [replace(e, bytes=folded_bytes(stitched(e.candidate))) for e in evaluations]


def expected_point(evaluation: Evaluation, dense: Evaluation) -> ExpectedPoint:
    """What is thought of a candidate against what is thought of dense."""
    faster = {profile: speedup(evaluation, dense, profile) for profile in evaluation.latency}
    return ExpectedPoint(faster, evaluation.bytes, evaluation.error)


def telling_seconds(trials: int, each: float) -> float:
    """Seconds that trials are expected to take, where a candidate that is read on 64 samples takes ``each`` with all cores at work."""
    return WHOLE * trials * each


def expect(found: Found, trial: float | None) -> None:
    """Keep what is expected of a search that has told no trial yet, in its study; nothing where it has, or where it is kept already.

    ``trial`` is the seconds that a candidate took to be read on 64 samples, with all cores at work; None where none was.
    """
    search, prepared = found.search, found.prepared
    if search.told or search.get_attr(ATTRIBUTE) is not None:
        return
    models = {name: LatencyModel(d.profile, d.model.peaks) for name, d in prepared.devices.items()}
    for name, model in models.items():
        model.fit_kernels(prepared.devices[name].store.records())
    costs = found.costs.before(models)
    dense = thought_of_dense(costs, prepared.task.model)
    trials, measurements = prepared.settings.trials, prepared.settings.measurements
    seconds = {PREPARING: prepared.budget.spent()}
    if trial is not None:
        seconds[TELLING] = telling_seconds(trials, trial)
    if point := search.get_attr("seconds of a point", 0.0):
        seconds[MEASURING] = MEASURED * measurements * point
    front = counted(costs, prepared.task.model, prepared.stitch_untrained, expected_front(costs))
    points = tuple(expected_point(evaluation, dense) for evaluation in front)
    errors = {name: model.kernel_error for name, model in models.items()}
    _keep(
        found,
        Expected(points, seconds, trials, measurements, errors),
        {name: (model.peaks, model.to_json()) for name, model in models.items()},
    )


def expected_of(found: Found) -> Expected | None:
    """What was expected of a search, with what was thought then of each candidate that it measured, and with what its parts took.

    None where that was not kept: an earlier autocomp began the run, or a later one.
    """
    kept = found.search.get_attr(ATTRIBUTE)
    if not kept or kept.get("format_version") != FORMAT_VERSION:
        return None
    expected = expected_from_json(kept["expected"])
    new = [e.candidate for e in found.told if e.state == "measured" and e.candidate.id not in expected.candidates]
    if new:
        models = {}
        for name, (peaks, fitted) in kept["models"].items():
            models[name] = LatencyModel(found.prepared.devices[name].profile, peaks)
            models[name].restore(fitted)
        costs = found.costs.before(models)
        dense = thought_of_dense(costs, found.prepared.task.model)
        more = {c.id: expected_point(thought(costs, found.prepared.space.normalise(c)), dense) for c in new}
        expected = replace(expected, candidates={**expected.candidates, **more})
    seconds = found.seconds()
    measuring = seconds.get("measuring", 0.0)
    spent = {PREPARING: expected.seconds[PREPARING], MEASURING: measuring}
    spent[TELLING] = max(0.0, seconds.get("searching", 0.0) - measuring)
    expected = replace(expected, spent=spent)
    _keep(found, expected, kept["models"])
    return expected


def _keep(found: Found, expected: Expected, models: Mapping[str, Any]) -> None:
    data = {"format_version": FORMAT_VERSION, "expected": expected_to_json(expected), "models": dict(models)}
    found.search.set_attr(ATTRIBUTE, data)
