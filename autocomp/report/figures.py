"""Figures of the report as plotly specifications: plain dictionaries whose colours are names (``@front``) the page resolves.

The page knows the palette of its light and its dark theme; naming roles here keeps one figure right in both.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from autocomp.config.quantities import format_bytes
from autocomp.front.pareto import pareto_set, settled
from autocomp.records.evaluation import Evaluation, as_searched, untrained
from autocomp.records.latency import Latency
from autocomp.records.precisions import FORMATS, INT8
from autocomp.records.run import Run, comparable, comparable_reference, speedup

Figure = dict[str, Any]

LOST = 0.03  # share of the dense model's metric that a point may lose and still be within the frame, whatever the knee loses
SLOWER = 1.3  # times the dense model's latency that the frame reaches to
_MARKER_DIAMETER = 28  # pixels, of the largest model shown; areas are in proportion to bytes


class Metric:
    """How values of the objective are shown: shares (of the unit ``%``) as percentages and points, everything else as it is, with its unit."""

    def __init__(self, run: Run) -> None:
        self.name = run.task.objective
        self.higher_is_better = run.task.higher_is_better
        self.unit = run.task.unit
        self.percent = self.unit == "%"
        self.scale = 100.0 if self.percent else 1.0
        self.title = f"{self.name} ({self.unit})" if self.unit else self.name

    def text(self, value: float | None) -> str:
        """``97.4 %`` or four digits; a dash where there is none."""
        if value is None:
            return "–"
        shown = f"{value * 100:.1f}" if self.percent else f"{value:.4g}"
        return f"{shown} {self.unit}" if self.unit else shown

    def bare(self, value: float | None) -> str:
        """As ``text`` without the sign, for columns that carry it in their heading."""
        return self.text(value).removesuffix(f" {self.unit}")

    def loss(self, value: float, dense: float) -> float:
        """How much worse than dense, in the metric's units; negative: better."""
        lost = settled(dense) - settled(value)
        return lost if self.higher_is_better else -lost

    def error(self, error: float | None) -> str:
        """``± 0.9`` or three digits of a standard error; nothing where it is not known."""
        if error is None:
            return ""
        return f"± {error * 100:.1f}" if self.percent else f"± {error:.2g}"

    def change(self, value: float | None, dense: float | None) -> str:
        """Signed change against dense: ``−0.4 pt`` (percentage points) or four digits."""
        if value is None or dense is None:
            return "–"
        shown = f"{(value - dense) * 100:+.1f}" if self.percent else f"{value - dense:+.4g}"
        shown = shown.replace("-", "−") if float(shown) else "±0"
        return f"{shown} pt" if self.percent else shown


def plain(value: float | None, sign: str = "") -> str:
    """Four digits of a metric whose unit nobody said, behind a ``sign``; a dash for none, or nothing where there would be a sign."""
    return f"{sign}{value:.4g}" if value is not None else "" if sign else "–"


def latency_text(latency: Latency) -> str:
    """``0.123 ms ± 1.2 % measured``: the spread is the interquartile range, halved to each side."""
    error = latency.spread / 2 if latency.how == "measured" else latency.error
    around = f" ± {error * 100:.1f} %" if error is not None else ""
    return f"{milliseconds(latency.seconds)}{around} {latency.how}"


def milliseconds(seconds: float | None) -> str:
    """``0.123 ms``: three digits, never an exponent."""
    if seconds is None:
        return "–"
    ms = seconds * 1e3
    digits = max(0, 2 - math.floor(math.log10(ms))) if ms else 3
    return f"{ms:.{digits}f} ms"


def front_figure(
    run: Run,
    evaluations: Sequence[Evaluation],
    profile: str,
    knee: str | None,
    goals: Mapping[str, float | None],
    taken: str | None = None,
) -> Figure:
    """Metric against latency in milliseconds on one profile, marker area by bytes: front, dense, baselines, references.

    ``knee`` and ``taken`` (the point that meets the ``goals`` best) are candidate ids.
    """
    metric = Metric(run)
    shown = [point.evaluation for point in (run.dense, *run.front)]
    largest = max([e.bytes for e in shown] + [r.bytes for r in run.references] + [1])
    dense = run.dense.evaluation
    every = [p.evaluation for p in run.front if profile in p.evaluation.latency]
    front = front_of(every, metric, dense, profile)
    beaten = [e for e in every if e not in front]
    special = {e.candidate.id for e in (*shown, *run.baselines)}
    others = [
        e for e in evaluations
        if e.state == "measured" and profile in e.latency and e.metrics and e.candidate.id not in special
    ]  # fmt: skip
    hover = _hover(run, profile)

    def points(name: str, chosen: Sequence[Evaluation], mode: str = "markers", **style: Any) -> Figure:
        kept = [e for e in chosen if profile in e.latency and metric.name in e.metrics]
        marker = {"size": [e.bytes for e in kept], "opacity": 1, **_by_area(largest), **style.pop("marker")}
        return {
            "type": "scatter", "name": name, "mode": mode, "x": [comparable(e, dense, profile) * 1e3 for e in kept],
            "y": [e.metrics[metric.name] * metric.scale for e in kept], "text": [hover(e) for e in kept],
            "customdata": [e.candidate.id for e in kept], "hovertemplate": "%{text}<extra></extra>", "marker": marker, **style,
        }  # fmt: skip

    line = {"color": "@front", "width": 2, "shape": "hv"}
    outline = {"width": 1.5, "color": "@surface"}
    how = {e.latency[profile].how for e in (*others, *every)}
    label = "measured" if how <= {"measured"} else "estimated" if how == {"estimated"} else "measured or estimated"
    traces = [
        points(f"other candidates, {label}", others, marker={"color": "@faint", "opacity": 0.4, "line": {"width": 0}}),
        points("Pareto front", front, "lines+markers", line=line, marker={"color": "@front", "line": outline}),
        points("on another profile's front", beaten, marker={"color": "@front", "symbol": "circle-open"}),
        points("uniform compression", run.baselines, marker={"color": "@uniform", "symbol": "square", "line": outline}),
        points("dense", [dense], marker={"color": "@dense", "symbol": "diamond", "line": outline}),
    ]
    if ringed := [e for e in front if e.candidate.id == knee]:
        ring = {
            "color": "@front",
            "size": _MARKER_DIAMETER + 6,
            "line": {"width": 2},
            "symbol": "circle-open",
        }
        at = points("knee", ringed, marker=ring)
        traces.append({**at, "marker": ring, "hoverinfo": "skip", "hovertemplate": None})
    symbols = {
        "runtime": ("triangle-up", "star", "pentagon", "hexagon"),
        "classic": ("triangle-down", "x", "cross", "hourglass"),
    }
    colours = {"runtime": "@reference", "classic": "@uniform"}
    references = [r for r in run.references if r.latency.profile == profile and metric.name in r.metrics]
    for reference in references:
        text = (
            f"<b>{html.escape(reference.name)}</b><br>{html.escape(metric.name)} {metric.text(reference.metrics[metric.name])}"
            f"<br>{latency_text(reference.latency)}<br>{format_bytes(reference.bytes)}<br>{html.escape(reference.note)}"
        )
        own = [other for other in references if other.kind == reference.kind]
        symbol = symbols[reference.kind][own.index(reference) % 4]
        marker = {"color": colours[reference.kind], "symbol": symbol, "line": outline}
        traces.append(
            {
                "type": "scatter", "name": html.escape(reference.name), "mode": "markers",
                "x": [comparable_reference(reference, run) * 1e3], "y": [reference.metrics[metric.name] * metric.scale],
                "text": [text], "hovertemplate": "%{text}<extra></extra>",
                "marker": {"size": [reference.bytes], "opacity": 1, **_by_area(largest), "sizemin": 7, **marker},
            }
        )  # fmt: skip
    traces = [trace for trace in traces if trace["x"]]
    y = [r.metrics[metric.name] for r in references]
    y += [e.metrics[metric.name] for e in (*every, dense) if metric.name in e.metrics]
    y = _of_interest(metric, dense, [e.metrics[metric.name] for e in ringed], y)
    kinds = " or ".join(sorted(how)) or "measured"
    layout = layout_of(f"latency of one inference on {profile}, {kinds} (ms)", metric.title)
    layout["yaxis"] |= _framed([v * metric.scale for v in y])
    whole = dense.latency.get(profile)
    limit = SLOWER * whole.seconds * 1e3 if whole else float("inf")
    layout["xaxis"] |= _up_to(limit, [value for trace in traces for value in trace["x"]])
    layout["margin"]["r"] = 40  # the buttons' column
    shapes, notes = _goal_lines(metric, dense, goals)
    for e in every:
        if e.candidate.id == taken and taken != knee and metric.name in e.metrics:
            at = {
                "x": comparable(e, dense, profile) * 1e3,
                "y": e.metrics[metric.name] * metric.scale,
                "ax": 36,
                "ay": 44,
            }
            arrow = {
                "showarrow": True,
                "arrowhead": 0,
                "arrowcolor": "@goal",
                "arrowwidth": 1.2,
                "standoff": 9,
                "xanchor": "left",
            }
            notes.append({**at, **arrow, "text": "best within the goals", "font": {"color": "@goal", "size": 13}})
    return {"data": traces, "layout": {**layout, "shapes": shapes, "annotations": notes}}


def _of_interest(metric: Metric, dense: Evaluation, at_knee: Sequence[float], values: Sequence[float]) -> list[float]:
    """Those values that lose at most three times what the knee loses, or `LOST`: a front's fast end is often of no use to anyone."""
    full = dense.metrics.get(metric.name)
    if full is None or not at_knee:
        return list(values)
    allowed = max(3 * metric.loss(at_knee[0], full), LOST * abs(full))
    kept = [value for value in values if metric.loss(value, full) <= allowed]
    return kept if len(kept) > 2 else list(values)


def outside_frame(figure: Figure) -> int:
    """How many points of a front figure lie outside the ranges its axes open with."""
    everything = (float("-inf"), float("inf"))
    (left, right), (low, high) = (figure["layout"][axis].get("range", everything) for axis in ("xaxis", "yaxis"))
    points = [
        point
        for trace in figure["data"]
        if trace["name"] != "knee"
        for point in zip(trace["x"], trace["y"], strict=True)
    ]
    return sum(not (left <= x <= right and low <= y <= high) for x, y in points)


def hypervolume_figure(run: Run, evaluations: Sequence[Evaluation]) -> Figure | None:
    """Dominated share over told trials, with a dot per trial that raised it, coloured by who thought of it; None if unread."""
    history = list(run.hypervolume)
    if len(history) < 2:
        return None
    numbers = list(range(1, len(history) + 1))
    line: Figure = {
        "type": "scatter",
        "mode": "lines",
        "name": "share",
        "x": numbers,
        "y": history,
        "showlegend": False,
    }
    line |= {"line": {"color": "@front", "width": 2, "shape": "hv"}, "fill": "tozeroy", "fillcolor": "@wash"}
    line["hovertemplate"] = "after trial %{x}: %{y:.4f}<extra></extra>"
    traces: list[Figure] = [line]
    rises = [k for k in range(1, len(history)) if history[k] > history[k - 1]]
    sources = [evaluation.source for evaluation in evaluations]
    colours = {
        "dense": "@dense",
        "uniform": "@uniform",
        "solver": "@reference",
        "mutation": "@front",
        "optuna": "@optuna",
        "replay": "@front",
    }
    names = {
        "solver": "solver seed",
        "mutation": "mutation of the front",
        "optuna": "Optuna's sampler",
        "replay": "point of another run",
    }
    if len(sources) == len(history):
        for source in dict.fromkeys(sources[k] for k in rises):
            at = [k for k in rises if sources[k] == source]
            traces.append(
                {
                    "type": "scatter", "mode": "markers", "name": names.get(source, source), "x": [k + 1 for k in at],
                    "y": [history[k] for k in at], "marker": {"color": colours[source], "size": 6}, "hoverinfo": "skip",
                }
            )  # fmt: skip
    layout = layout_of("trials told", "dominated share")
    layout["yaxis"] |= _framed(history[1:], upper=1.0)
    return {"data": traces, "layout": layout}


def proxy_figure(run: Run, evaluations: Sequence[Evaluation], proxy: str) -> Figure | None:
    """What an accuracy proxy (``error`` or ``kl``) said against the metric that was read; None with fewer than 3 points."""
    metric = Metric(run)
    titles = {"error": "tier 0: sum of layer errors", "kl": "tier 1: divergence from the dense model"}

    def value(e: Evaluation) -> float | None:
        return e.kl if proxy == "kl" else e.error

    kept = [untrained(e) for e in evaluations if metric.name in e.metrics and (value(e) or 0) > 0]
    if len(kept) < 3:
        return None
    trace = {
        "type": "scatter", "mode": "markers", "x": [value(e) for e in kept], "showlegend": False,
        "y": [e.metrics[metric.name] * metric.scale for e in kept], "text": [f"trial {e.trial}" for e in kept],
        "marker": {"color": "@front", "size": 8, "opacity": 0.75},
        "hovertemplate": "%{text}: %{x:.3g}, %{y:.4g}<extra></extra>",
    }  # fmt: skip
    layout = layout_of(titles[proxy], metric.title)
    layout["xaxis"] |= {"type": "log", "exponentformat": "power", "nticks": 5}
    return {"data": [trace], "layout": layout}


def prediction_figure(evaluations: Sequence[Evaluation], profile: str) -> Figure | None:
    """Predicted against measured milliseconds of whole modules; None with fewer than 3 points."""
    kept = [e for e in evaluations if profile in e.predicted and profile in e.latency]
    kept = [e for e in kept if e.latency[profile].how == "measured"]
    if len(kept) < 3:
        return None
    x = [as_searched(e).latency[profile].seconds * 1e3 for e in kept]  # which predictions are fitted to
    y = [e.predicted[profile] * 1e3 for e in kept]
    ends = [0.0, max([*x, *y]) * 1.05]
    same: Figure = {"type": "scatter", "mode": "lines", "x": ends, "y": ends, "name": "equal", "hoverinfo": "skip"}
    same |= {"line": {"color": "@muted", "width": 1, "dash": "dot"}, "showlegend": False}
    dots: Figure = {"type": "scatter", "mode": "markers", "x": x, "y": y, "showlegend": False}
    dots |= {"text": [f"trial {e.trial}" for e in kept], "marker": {"color": "@front", "size": 8, "opacity": 0.75}}
    dots["hovertemplate"] = "%{text}: measured %{x:.3f} ms, predicted %{y:.3f} ms<extra></extra>"
    return {"data": [same, dots], "layout": layout_of("measured (ms)", "predicted (ms)")}


def choices_text(evaluation: Evaluation, dense: Evaluation) -> str:
    """One line on a candidate: share of widths kept, layers in int8, layers factorised."""
    widths, full = evaluation.candidate.widths, dense.candidate.widths
    methods = evaluation.candidate.methods.values()
    parts = []
    if sum(full.values()):
        parts.append(f"{100 * sum(widths.values()) / sum(full.values()):.0f} % of channels")
    if left := sum(width == 0 for width in widths.values()):
        parts.append(f"{left} group{'s' if left > 1 else ''} left out whole")
    parts.append(
        f"{sum(FORMATS[m.precision].family.arithmetic is INT8 for m in methods)} of {len(methods)} layers int8"
    )
    if factorised := sum(bool(m.ranks) for m in methods):
        parts.append(f"{factorised} factorised")
    return " · ".join(parts)


def _hover(run: Run, profile: str) -> Callable[[Evaluation], str]:
    metric, dense = Metric(run), run.dense.evaluation
    tests = {point.evaluation.candidate.id: point.test_metrics.get(metric.name) for point in (run.dense, *run.front)}

    def text(e: Evaluation) -> str:
        test = tests.get(e.candidate.id)
        lines = [
            f"<b>{e.candidate.id}</b> ({e.source}, trial {e.trial})",
            f"{html.escape(metric.name)} {metric.text(e.metrics[metric.name])}"
            + (f", test {metric.text(test)}" if test is not None else ""),
            latency_text(e.latency[profile]) + _times(dense, e, profile),
            f"{format_bytes(e.bytes)} ({dense.bytes / e.bytes:.1f}× smaller)" if e.bytes else format_bytes(e.bytes),
            choices_text(e, dense),
        ]
        return "<br>".join(lines)

    return text


def _times(dense: Evaluation, e: Evaluation, profile: str) -> str:
    if profile not in dense.latency or not e.latency[profile].seconds or e is dense:
        return ""
    return f", {speedup(e, dense, profile):.2f}× dense"


def _by_area(largest: int) -> Figure:
    return {"sizemode": "area", "sizeref": 2 * largest / _MARKER_DIAMETER**2, "sizemin": 5}


def _framed(values: Sequence[float], upper: float | None = None) -> Figure:
    """An axis range around the values that matter, so that one bad candidate does not flatten the rest."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    room = (high - low) * 0.12 or abs(high) * 0.05 or 1.0
    return {"range": [low - room, high + room if upper is None else min(high + room, upper)]}


def _up_to(limit: float, values: Sequence[float]) -> Figure:
    """An axis from zero that ends past ``limit``, so that one slow runtime does not squeeze the rest to the left."""
    return {"rangemode": "tozero"} if max(values, default=0.0) <= limit else {"range": [0.0, limit]}


def _goal_lines(
    metric: Metric, dense: Evaluation, goals: Mapping[str, float | None]
) -> tuple[list[Figure], list[Figure]]:
    line = {"type": "line", "line": {"color": "@goal", "width": 1.5, "dash": "dash"}, "layer": "below"}
    note = {"showarrow": False, "font": {"color": "@goal", "size": 12}}
    shapes, notes = [], []
    drop = goals.get("max_drop")
    if drop is not None and metric.name in dense.metrics:
        y = (dense.metrics[metric.name] + (-drop if metric.higher_is_better else drop)) * metric.scale
        shapes.append({**line, "xref": "paper", "x0": 0, "x1": 1, "y0": y, "y1": y})
        place = {"xref": "paper", "x": 1, "xanchor": "right", "y": y, "yanchor": "top"}
        notes.append({**note, **place, "text": "goal: largest drop"})
    for name in ("latency", "energy"):
        if (seconds := goals.get(name)) is None:
            continue
        x = seconds * 1e3
        shapes.append({**line, "yref": "paper", "y0": 0, "y1": 1, "x0": x, "x1": x})
        place = {"yref": "paper", "y": 0, "yanchor": "bottom", "x": x, "xanchor": "left"}
        notes.append({**note, **place, "text": f"goal: {name}"})
    return shapes, notes


def layout_of(x: str, y: str) -> Figure:
    axis = {
        "gridcolor": "@grid", "linecolor": "@line", "zeroline": False, "ticks": "outside", "tickcolor": "@line",
        "ticklen": 4, "automargin": True,
    }  # fmt: skip
    return {
        "xaxis": {**axis, "title": {"text": html.escape(x), "standoff": 10}},
        "yaxis": {**axis, "title": {"text": html.escape(y), "standoff": 8}},
        "margin": {"l": 48, "r": 16, "t": 12, "b": 44}, "hovermode": "closest",
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "itemsizing": "constant"},
        "modebar": {"orientation": "v", "bgcolor": "rgba(0,0,0,0)", "color": "@muted", "activecolor": "@text"},
        "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)", "font": {"color": "@text", "size": 13},
        "hoverlabel": {"align": "left", "bgcolor": "@surface", "bordercolor": "@line", "font": {"color": "@text"}},
    }  # fmt: skip


def front_of(evaluations: Sequence[Evaluation], metric: Metric, dense: Evaluation, profile: str) -> list[Evaluation]:
    """Those evaluations that no other dominates in (loss of the metric, seconds) on one profile, fast to slow."""
    kept = [e for e in evaluations if profile in e.latency and metric.name in e.metrics]
    pairs = [
        (metric.loss(e.metrics[metric.name], dense.metrics[metric.name]), comparable(e, dense, profile)) for e in kept
    ]
    return [kept[k] for k in pareto_set(pairs)]
