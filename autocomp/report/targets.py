"""Several targets in one run: which mix each of them wants, layer by layer, and what one target's choice costs on the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from autocomp.front.goals import undisturbed
from autocomp.front.pareto import knee
from autocomp.records.evaluation import Evaluation, Reference
from autocomp.records.run import Run
from autocomp.report.figures import Metric


class Page(Protocol):
    """What is used of the page that is being built."""

    run: Run
    metric: Metric
    profiles: list[str]

    def layers(self, evaluation: Evaluation) -> list[dict[str, Any]]: ...

    def time(self, profile: str, of: Evaluation | Reference) -> Mapping[str, Any] | None: ...


def knee_of(run: Run, metric: Metric, profile: str) -> Evaluation | None:
    """The knee of one target's own front; None if nothing was measured there."""
    kept = [
        point.evaluation
        for point in run.front
        if profile in point.evaluation.latency and metric.name in point.evaluation.metrics
    ]
    kept = undisturbed(kept)
    dense = run.dense.evaluation.metrics.get(metric.name, 0.0)
    at = knee(
        [(metric.loss(e.metrics[metric.name], dense), e.latency[profile].seconds) for e in kept],
        [e.drop_errors.get(metric.name, 0.0) for e in kept],
    )
    return None if at is None else kept[at]


def targets(page: Page) -> dict[str, Any] | None:
    """Each target's knee, its time on every target, and the layers side by side; None unless two targets have one.

    ``agree`` says whether all chose the same candidate; a layer ``differs`` where the choices do.
    """
    found = {profile: knee_of(page.run, page.metric, profile) for profile in page.profiles}
    chosen = {profile: evaluation for profile, evaluation in found.items() if evaluation is not None}
    if len(chosen) < 2:
        return None
    columns = [page.layers(evaluation) for evaluation in chosen.values()]
    rows = [_row(cells) for cells in zip(*columns, strict=True)]
    return {
        "profiles": list(chosen),
        "agree": len({evaluation.candidate.id for evaluation in chosen.values()}) == 1,
        "differing": sum(row["differs"] for row in rows),
        "choices": [
            {
                "profile": profile,
                "id": evaluation.candidate.id,
                "metric": page.metric.bare(evaluation.metrics.get(page.metric.name)),
                "times": [page.time(other, evaluation) for other in chosen],
            }
            for profile, evaluation in chosen.items()
        ],
        "layers": rows,
    }


def _row(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    kinds = {(cell["kept"], cell["precision"], cell["rank"]) for cell in cells}
    return {"name": cells[0]["name"], "kind": cells[0]["kind"], "cells": list(cells), "differs": len(kinds) > 1}
