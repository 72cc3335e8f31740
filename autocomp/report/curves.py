"""The curves of sensitivity: what each option of each layer or group costs alone."""

from __future__ import annotations

import html
from collections.abc import Sequence

from autocomp.records.evaluation import Sensitivity
from autocomp.report.figures import Figure, layout_of

NAMED = 6  # most sensitive layers of a figure that the legend names; the others are grey and named where they are pointed at


def sensitivity_figures(rows: Sequence[Sensitivity]) -> dict[str, Figure]:
    """Curves of error against the share of bytes kept, a line a layer or group: a figure for each kind of option."""
    titles = {
        "width": "share of the readers' weights kept",
        "rank": "share of weights kept",
        "precision": "share of bytes kept",
        "mask": "share of bytes kept",
    }
    drawn: dict[str, Figure] = {}
    for kind, title in titles.items():
        by_subject: dict[str, list[Sensitivity]] = {}
        for row in rows:
            if row.kind == kind and row.error > 0:  # a logarithm has no place for what costs nothing
                by_subject.setdefault(row.subject, []).append(row)
        if not by_subject:
            continue
        worst = sorted(by_subject, key=lambda name: -max(row.error for row in by_subject[name]))
        traces = []
        for place, name in enumerate(worst):
            points = sorted(by_subject[name], key=lambda row: (row.share, row.error))
            named = place < NAMED
            traces.append(
                {
                    "type": "scatter", "mode": "lines+markers" if kind in ("width", "rank") else "markers", "name": html.escape(name),
                    "x": [row.share for row in points], "y": [row.error for row in points], "showlegend": named,
                    "text": [f"<b>{html.escape(name)}</b><br>{kind} {html.escape(row.option)}" for row in points],
                    "hovertemplate": "%{text}: %{y:.3g} nats, %{x:.0%} kept<extra></extra>",
                    "marker": {"size": 7, **({} if named else {"color": "@faint"})}, "opacity": 1 if named else 0.5,
                    "line": {"width": 2 if named else 1, **({} if named else {"color": "@faint"})},
                }
            )  # fmt: skip
        layout = layout_of(title, "error alone (nats a sample)")
        layout["yaxis"] |= {"type": "log", "exponentformat": "power", "nticks": 6}
        layout["xaxis"] |= {"tickformat": ".0%", "rangemode": "tozero"}
        layout["legend"] = {"font": {"size": 11}, "itemsizing": "constant"}
        drawn[f"sensitivity-{kind}"] = {"data": traces[::-1], "layout": layout}
    return drawn
