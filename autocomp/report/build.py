"""``report.html`` from the files of a run folder: one page, everything embedded, opened from a file without a network."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from autocomp.cache import write_atomically
from autocomp.config.addresses import masked
from autocomp.config.files import read_json, read_yaml, validated
from autocomp.config.quantities import format_bytes, parse_factor
from autocomp.config.settings import Goals, renamed
from autocomp.config.versions import current
from autocomp.errors import CorruptError, UsageError, shown
from autocomp.records.evaluation import Evaluation, Sensitivity
from autocomp.records.run import (
    FORMAT_VERSION,
    Run,
    finite,
    read_run,
    refuse_other_table,
)
from autocomp.records.table import read_evaluations
from autocomp.report import figures, recovery
from autocomp.report.curves import sensitivity_figures
from autocomp.report.expected import expected_and_found
from autocomp.report.figures import milliseconds
from autocomp.report.goals import family_rows, goal_rows
from autocomp.report.page import Page
from autocomp.report.targets import targets

REPORT = "report.html"


def build_report(folder: Path) -> Path:
    """Build ``report.html`` of a run folder from its ``front.json``, ``evaluations.csv``, config and provenance.

    Returns its path. UsageError and CorruptError as ``read_run``; a missing config or provenance is left out.
    """
    run, evaluations = read_run(folder), read_evaluations(folder)
    refuse_other_table(folder, run)
    config = _read(folder / "config.yaml", read_yaml)
    provenance = _read(folder / "provenance.json", read_json)
    path = folder / REPORT
    try:
        page = render(run, evaluations, config, provenance, folder)
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        # The records are whole files of a known format: what is in them of another kind than it should be shows when it is drawn.
        raise CorruptError(
            f"the records of {folder} do not make a report ({type(error).__name__}: {shown(error)}): they were changed since the search "
            "wrote them; write them again with `autocomp search --resume`"
        ) from error
    write_atomically(path, page.encode())
    return path


def render(
    run: Run,
    evaluations: Sequence[Evaluation],
    config: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    folder: Path | None = None,
) -> str:
    """The page as text. With a ``folder``, only files that exist in it are linked."""
    from jinja2 import Environment, FileSystemLoader

    here = Path(__file__).parent
    environment = Environment(loader=FileSystemLoader(here), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    config = dict(config or {})
    if run.goals is not None:  # what it was asked for stands in its front; of earlier versions, in the config alone
        config |= {"goals": run.goals, "family": list(run.family)}
    page = Page(run, _goals(config.get("goals")), folder)
    drawn = _figures(run, evaluations, page)
    return environment.get_template("template.html.j2").render(
        page=page,
        run=run,
        metric=page.metric,
        cards=page.cards(),
        goals=goal_rows(page.judge, page.recommended.evaluation if page.recommended else None, page.metric),
        family=family_rows(
            page.judge,
            [p.evaluation for p in run.front],
            _speedups(config.get("family")),
            page.profiles,
            page.metric,
        ),
        rows=[page.row(run.dense), *(page.row(point) for point in run.front if not page.is_dense(point))],
        offers=_embedded({"unit": "pt" if page.metric.percent else page.metric.unit, "points": page.offers()}),
        others=[page.other(item) for item in page.comparisons()],
        figures=drawn,
        figure_json=_embedded({name: figure for name, (figure, _) in drawn.items()}),
        targets=targets(page) if len(run.profiles) > 1 else None,
        recovered=recovery.rows(run),
        expected=expected_and_found(run, evaluations),
        kernels={profile: page.kernels(profile) for profile in run.profiles},
        failed=[e for e in evaluations if e.state == "failed"],
        stages=page.stages(),
        provenance=_flat({key: value for key, value in (provenance or {}).items() if key != "format_version"}),
        config=_flat(_settings(config)),
        created=str((provenance or {}).get("written", ""))[:16].replace("T", " "),
        style=(here / "report.css").read_text(encoding="utf-8"),
        script=(here / "report.js").read_text(encoding="utf-8"),
        plotly=_packed_plotly(),
        milliseconds=milliseconds,
        size=format_bytes,
    )


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run's config as they are shown: what was chosen automatically stands with its reason."""
    chosen = config.get("auto")
    reasons = chosen if isinstance(chosen, Mapping) else {}
    shown = {key: value for key, value in config.items() if key not in ("format_version", "auto")}
    if isinstance(shown.get("storage"), str):
        shown["storage"] = masked(shown["storage"])
    return {
        key: f"{value}, chosen automatically: {reasons[key]}" if key in reasons else value
        for key, value in shown.items()
    }


def _goals(data: Any) -> Goals:
    """The goals of a run's config. TypeError if they are none."""
    if data is not None and not isinstance(data, Mapping):
        raise TypeError(f"goals are {shown(data)}")
    try:
        return validated(Goals, renamed(data or {}), "goals.")
    except UsageError as error:
        raise TypeError(str(error)) from error


def _speedups(data: Any) -> list[float]:
    """The family of a run's config. TypeError if it is none."""
    if not isinstance(data or [], list):
        raise TypeError(f"family is {shown(data)}")
    return [parse_factor(str(text)) for text in data or ()]


def _figures(
    run: Run, evaluations: Sequence[Evaluation], page: Page
) -> dict[str, tuple[figures.Figure, dict[str, Any]]]:
    """Figures by element id, each with what its caption needs."""
    drawn: dict[str, tuple[figures.Figure, dict[str, Any]]] = {}
    judge = page.judge
    for k, profile in enumerate(run.profiles):
        taken = page.recommended.evaluation.candidate.id if page.recommended and page.met else None
        limits = {
            "max_drop": judge.max_drops.get(judge.objective),
            "latency": judge.max_latency(profile),
            "energy": judge.energy_seconds(profile),
        }
        figure = figures.front_figure(run, evaluations, profile, page.knee, limits, taken)
        before, moved = recovery.arrows(run, evaluations, profile)
        figure["data"][1:1] = before
        figure["layout"]["annotations"] = [*figure["layout"]["annotations"], *moved]
        drawn[f"front-{k}"] = (figure, {"profile": profile, "outside": figures.outside_frame(figure)})
    if history := figures.hypervolume_figure(run, evaluations):
        drawn["hypervolume"] = (history, {})
    for proxy in ("error", "kl"):
        if scatter := figures.proxy_figure(run, evaluations, proxy):
            found = (value for name, value in run.summary.spearman.items() if proxy in name.lower())
            drawn[f"proxy-{proxy}"] = (scatter, {"spearman": next(found, None)})
    for k, profile in enumerate(run.profiles):
        if scatter := figures.prediction_figure(evaluations, profile):
            drawn[f"prediction-{k}"] = (scatter, {"profile": profile})
    for some in (sensitivity_figures(run.sensitivity), recovery.curves(run)):
        drawn |= {name: (figure, {}) for name, figure in some.items()}
    return drawn


def render_sensitivity(task: str, rows: Sequence[Sensitivity]) -> str:
    """The page of `autocomp sensitivity`: the curves and a table, with everything embedded."""
    from jinja2 import Environment, FileSystemLoader

    here = Path(__file__).parent
    environment = Environment(loader=FileSystemLoader(here), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    drawn = sensitivity_figures(rows)
    return environment.get_template("sensitivity.html.j2").render(
        task=task,
        rows=rows,
        figures=drawn,
        figure_json=_embedded(drawn),
        style=(here / "report.css").read_text(encoding="utf-8"),
        script=(here / "report.js").read_text(encoding="utf-8"),
        plotly=_packed_plotly(),
    )


@cache
def _packed_plotly() -> str:
    """Plotly's script, deflated: it is nearly all of a page, and the browser unpacks it faster than a page is read."""
    from plotly.offline import get_plotlyjs

    return base64.b64encode(zlib.compress(get_plotlyjs().encode(), 9)).decode()


def _embedded(data: Any) -> str:
    """JSON that may stand inside a script element."""
    text = json.dumps(finite(data), allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _flat(data: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in data.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{key} · ")
        elif value is not None:
            shown = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            rows.append((f"{prefix}{key}", shown))
    return rows


def _read(path: Path, read: Callable[[Path], Any]) -> Mapping[str, Any] | None:
    try:
        data = read(path)
    except FileNotFoundError:
        return None
    except UsageError as error:
        raise CorruptError(f"{error}: put it back, or take it away, and the report is made without it") from error
    return current(data, path, FORMAT_VERSION)
