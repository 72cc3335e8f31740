"""What training brought, drawn: where it took each point, and the curves of loss and metric."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from autocomp.records.evaluation import Evaluation, untrained
from autocomp.records.run import Run, comparable
from autocomp.report.figures import Figure, Metric, front_of, layout_of


def arrows(run: Run, evaluations: Sequence[Evaluation], profile: str) -> tuple[list[Figure], list[Figure]]:
    """Over a figure of the front: that before any training as a trace, and an arrow from each point to where training took it."""
    metric, dense = Metric(run), run.dense.evaluation
    trained = [
        p.evaluation for p in run.front if p.evaluation.recovered is not None and profile in p.evaluation.latency
    ]
    if not trained:
        return [], []
    ids = {e.candidate.id for e in trained}
    every = [
        untrained(e)
        for e in (*trained, *(e for e in evaluations if e.state == "measured" and e.candidate.id not in ids))
    ]
    front = front_of(every, metric, dense, profile)
    trace: Figure = {
        "type": "scatter", "name": "front before training", "mode": "lines+markers",
        "x": [comparable(e, dense, profile) * 1e3 for e in front], "y": [e.metrics[metric.name] * metric.scale for e in front],
        "text": [f"<b>{e.candidate.id}</b> before training" for e in front], "hovertemplate": "%{text}: %{y:.4g}<extra></extra>",
        "customdata": [e.candidate.id for e in front],
        "line": {"color": "@muted", "width": 1.5, "dash": "dash", "shape": "hv"}, "marker": {"color": "@muted", "size": 6},
    }  # fmt: skip
    notes = []
    for e in trained:
        x = comparable(e, dense, profile) * 1e3
        before, after = (one.metrics[metric.name] * metric.scale for one in (untrained(e), e))
        notes.append(
            {
                "x": x, "y": after, "ax": x, "ay": before, "xref": "x", "yref": "y", "axref": "x", "ayref": "y", "text": "",
                "showarrow": True, "arrowhead": 2, "arrowsize": 1, "arrowwidth": 1.5, "arrowcolor": "@front", "standoff": 6,
            }
        )  # fmt: skip
    return [trace], notes


def curves(run: Run) -> dict[str, Figure]:
    """The training loss over steps and the objective over seconds, a line for each point that was trained."""
    metric = Metric(run)
    trained = [p.evaluation for p in run.front if p.evaluation.recovered is not None]
    drawn: dict[str, Figure] = {}
    losses, readings = [], []
    for e in trained:
        assert e.recovered is not None
        name = e.candidate.id
        line = {"type": "scatter", "name": name, "mode": "lines"}
        if e.recovered.losses:
            x, y = zip(*e.recovered.losses, strict=True)
            losses.append(
                {
                    **line,
                    "x": list(x),
                    "y": list(y),
                    "hovertemplate": f"{name}, step %{{x:.0f}}: %{{y:.4g}}<extra></extra>",
                }
            )
        if e.recovered.readings:
            x, y = zip(*e.recovered.readings, strict=True)
            readings.append(
                {
                    **line, "mode": "lines+markers", "x": list(x), "y": [value * metric.scale for value in y],
                    "hovertemplate": f"{name}, after %{{x:.0f}} s: %{{y:.4g}}<extra></extra>",
                }
            )  # fmt: skip
    if losses:
        drawn["recovery-loss"] = {"data": losses, "layout": layout_of("steps", "loss, smoothed")}
    if readings:
        drawn["recovery-metric"] = {
            "data": readings,
            "layout": layout_of("seconds of its training", f"{metric.title}, validation"),
        }
    return drawn


def rows(run: Run) -> list[dict[str, Any]]:
    """Who was trained: divergence before, what was lost of the objective after each round, and what it came to on the front."""
    if run.recovery is None:
        return []
    metric = Metric(run)
    points = {p.evaluation.candidate.id: p for p in run.front}
    count = max((len(entrant.drops) for entrant in run.recovery.entrants), default=0)
    found = []
    for entrant in run.recovery.entrants:
        point = points.get(entrant.id)
        done = point.evaluation.recovered if point is not None else None
        if done is not None and run.recovery.mark and not done.is_of(run.recovery.mark):
            done = None  # an earlier training's
        drops = [*entrant.drops, *[None] * (count - len(entrant.drops))]
        sign = -1.0 if metric.higher_is_better else 1.0
        found.append(
            {
                "id": entrant.id, "kl": f"{entrant.kl:.3g}", "failure": entrant.failure, "front": point is not None,
                "drops": [metric.change(sign * drop, 0.0) if drop is not None else "" for drop in drops],
                "before": metric.bare(done.before.get(metric.name)) if done else "",
                "after": metric.bare(point.evaluation.metrics.get(metric.name)) if point is not None and done else "",
                "steps": done.steps if done else "", "seconds": f"{done.seconds:.0f}" if done else "",
                "frozen": ", ".join(done.frozen) if done else "",
            }
        )  # fmt: skip
    return found
