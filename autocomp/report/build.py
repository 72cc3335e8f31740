"""``report.html`` from the files of a run folder: one page, everything embedded, opened from a file without a network."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from autocomp.cache import write_atomically
from autocomp.config.files import read_json, read_yaml, validated
from autocomp.config.quantities import format_bytes, parse_factor
from autocomp.config.settings import Goals, renamed
from autocomp.config.versions import current
from autocomp.errors import CorruptError, InfeasibleError, UsageError, shown
from autocomp.front.goals import Judge
from autocomp.records.evaluation import Evaluation, Reference, Sensitivity
from autocomp.records.run import (
    FORMAT_VERSION,
    OURS,
    Deployed,
    FrontPoint,
    Run,
    comparable,
    comparable_reference,
    finite,
    read_run,
    speedup,
)
from autocomp.records.table import read_evaluations
from autocomp.report import figures, recovery
from autocomp.report.curves import sensitivity_figures
from autocomp.report.figures import Metric, milliseconds, plain
from autocomp.report.goals import family_rows, goal_rows
from autocomp.report.targets import knee_of, targets

REPORT = "report.html"
MAX_KERNELS = 14  # rows of a kernel table; the rest is summed in one more


def build_report(folder: Path) -> Path:
    """Build ``report.html`` of a run folder from its ``front.json``, ``evaluations.csv``, config and provenance.

    Returns its path. UsageError and CorruptError as ``read_run``; a missing config or provenance is left out.
    """
    run, evaluations = read_run(folder), read_evaluations(folder)
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
    page = _Page(run, _goals((config or {}).get("goals")), folder)
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
            _speedups((config or {}).get("family")),
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
        kernels={profile: page.kernels(profile) for profile in run.profiles},
        failed=[e for e in evaluations if e.state == "failed"],
        stages=page.stages(),
        provenance=_flat({key: value for key, value in (provenance or {}).items() if key != "format_version"}),
        config=_flat({key: value for key, value in (config or {}).items() if key != "format_version"}),
        created=str((provenance or {}).get("written", ""))[:16].replace("T", " "),
        style=(here / "report.css").read_text(encoding="utf-8"),
        script=(here / "report.js").read_text(encoding="utf-8"),
        plotly=_packed_plotly(),
        milliseconds=milliseconds,
        size=format_bytes,
    )


class _Page:
    """What the template shows, worked out: texts and shares, no markup."""

    def __init__(self, run: Run, goals: Goals, folder: Path | None) -> None:
        self.run, self.folder = run, folder
        self.metric = Metric(run)
        self.judge = Judge.of(run, goals)
        self.profiles = list(run.profiles)
        self.slices = [name for name in run.dense.evaluation.metrics if name != self.metric.name]
        self.dense = run.dense.evaluation
        self.knee = self._knee()
        self.unmet = False  # whether there are goals that no point meets
        self.met = False  # whether the recommended point was chosen by goals
        self.recommended = self._recommended()
        self.estimated = any(
            latency.how == "estimated" for point in run.front for latency in point.evaluation.latency.values()
        )

    def is_dense(self, point: FrontPoint) -> bool:
        """Whether a point is the uncompressed model: on the front too if nothing is as accurate."""
        return point.evaluation.candidate == self.dense.candidate

    def comparisons(self) -> list[Evaluation | Reference]:
        """Baselines that are not on the front themselves, and references."""
        shown = {point.evaluation.candidate.id for point in self.run.front}
        return [*(e for e in self.run.baselines if e.candidate.id not in shown), *self.run.references]

    def short(self, name: str) -> str:
        """``noisy`` of ``accuracy/noisy``."""
        return name.removeprefix(f"{self.metric.name}/")

    def cards(self) -> list[dict[str, str]]:
        """The headline: what the point to take costs and saves, in the reader's units."""
        chosen = self.recommended
        if chosen is None or not self.profiles:
            return []
        evaluation, profile = chosen.evaluation, self.profiles[0]
        test, dense_test = chosen.test_metrics.get(self.metric.name), self.run.dense.test_metrics.get(self.metric.name)
        split = "test" if test is not None else "validation"
        now = test if test is not None else evaluation.metrics.get(self.metric.name)
        then = dense_test if test is not None else self.dense.metrics.get(self.metric.name)
        error = (chosen.test_drop_errors if test is not None else evaluation.drop_errors).get(self.metric.name)
        cards = []
        if profile in evaluation.latency and profile in self.dense.latency:
            here, there = evaluation.latency[profile], self.dense.latency[profile]
            cards.append(
                {
                    "title": "faster than dense",
                    "value": f"{speedup(evaluation, self.dense, profile):.1f}×",
                    "note": f"{milliseconds(there.seconds)} → {milliseconds(here.seconds)}, {here.how}",
                }
            )
            references = [r for r in self.run.references if r.latency.profile == profile and r.kind == "runtime"]
            others = [r for r in references if not r.name.startswith(OURS)]
            own = next((r for r in references if r.name.startswith(OURS)), None)
            if others:
                fastest = min(others, key=lambda r: r.latency.seconds)
                beside = own.latency if own is not None else there  # timed in turn with it, and called as it is
                against = fastest.latency.seconds / beside.seconds
                cards.append(
                    {
                        "title": f"faster than {fastest.name}",
                        "value": f"{against * speedup(evaluation, self.dense, profile):.1f}×",
                        "note": f"which took {against:.2f} of the time of dense, {fastest.latency.how}",
                    }
                )
        if evaluation.bytes:
            cards.append(
                {
                    "title": "smaller weights",
                    "value": f"{self.dense.bytes / evaluation.bytes:.1f}×",
                    "note": f"{format_bytes(self.dense.bytes)} → {format_bytes(evaluation.bytes)}",
                }
            )
        cards.append(
            {
                "title": f"{self.metric.name} against dense",
                "value": self.metric.change(now, then),
                "note": f"{self.metric.error(error)} (standard error); " * (error is not None)
                + f"{self.metric.text(then)} → {self.metric.text(now)}, {split} split",
            }
        )
        return cards

    @property
    def unit(self) -> str:
        """``(%)``, which stands over all columns that `_cells` fills; nothing where some are metrics that nobody said the unit of."""
        alike = all(self._is_objective(name) for name in self.slices)
        return f" ({self.metric.unit})" if self.metric.unit and alike else ""

    def headings(self) -> list[str]:
        """Of the columns that `_cells` fills, with the unit where it does not stand over all of them."""
        unit = f" ({self.metric.unit})" if self.metric.unit and not self.unit else ""
        names = {
            self.metric.name: "all" if self.slices else self.metric.name,
            **{s: self.short(s) for s in self.slices},
        }
        return [f"{shown}{unit}" if self._is_objective(name) else shown for name, shown in names.items()]

    def _is_objective(self, name: str) -> bool:
        return name == self.metric.name or name.startswith(f"{self.metric.name}/")

    def _cells(self, metrics: Mapping[str, float], errors: Mapping[str, float]) -> list[dict[str, str]]:
        """The objective, its slices and other metrics, each with its standard error where that is known."""
        return [
            {"value": self.metric.bare(metrics.get(key)), "error": self.metric.error(errors.get(key))}
            if self._is_objective(key)
            else {"value": plain(metrics.get(key)), "error": plain(errors.get(key), "± ")}
            for key in (self.metric.name, *self.slices)
        ]

    def _within_noise(self, evaluation: Evaluation) -> bool:
        """Whether an evaluation differs from dense by less than two standard errors of the difference."""
        name, error = self.metric.name, evaluation.drop_errors.get(self.metric.name)
        return error is not None and abs(evaluation.metrics[name] - self.dense.metrics[name]) < 2 * error

    def row(self, point: FrontPoint) -> dict[str, Any]:
        """One point of the table."""
        e = point.evaluation
        name = self.metric.name
        return {
            "id": e.candidate.id,
            "evaluation": e,
            "dense": self.is_dense(point),
            "uniform": e.source == "uniform",
            "knee": e.candidate.id == self.knee,
            "recommended": self.recommended is not None and e.candidate.id == self.recommended.evaluation.candidate.id,
            "validation": self._cells(e.metrics, e.errors),
            "test": self._cells(point.test_metrics, point.test_errors),
            "change": self.metric.change(e.metrics.get(name), self.dense.metrics.get(name)),
            "change_error": self.metric.error(e.drop_errors.get(name)),
            "noise": self._within_noise(e),
            "latency": [self.time(profile, e) for profile in self.profiles],
            "size": format_bytes(e.bytes),
            "smaller": f"{self.dense.bytes / e.bytes:.1f}×" if e.bytes else "–",
            "memory": self._memory(e),
            "files": self._files(point),
            "deployed": [self._deployed(profile, read, e) for profile, read in point.deployed.items()],
            "tails": [self._tail(profile, latency.tail) for profile, latency in e.latency.items() if latency.tail],
            "differs": [profile for profile, read in point.deployed.items() if read.differs],
            "choices": figures.choices_text(e, self.dense),
            "layers": self.layers(e),
        }

    def _memory(self, evaluation: Evaluation) -> str:
        """What its compiled modules need while they run; of several targets the most."""
        known = [latency.memory for latency in evaluation.latency.values() if latency.memory]
        return format_bytes(max(known)) if known else "–"

    def _tail(self, profile: str, tail: Mapping[str, float]) -> str:
        """Percentiles of single inferences, in a line."""
        where = f" on {profile}" if len(self.profiles) > 1 else ""
        return f"Single inferences{where}: " + ", ".join(f"{name} {milliseconds(s)}" for name, s in tail.items())

    def offers(self) -> list[dict[str, Any]]:
        """What each point of the front costs in the objective and gives, for the question what a larger loss would buy."""
        rows = []
        for point in (self.run.dense, *self.run.front):
            e = point.evaluation
            value, dense = e.metrics.get(self.metric.name), self.dense.metrics.get(self.metric.name)
            if value is None or dense is None or e.noisy:
                continue
            times = {p: comparable(e, self.dense, p) for p in self.profiles if p in e.latency}
            rows.append(
                {
                    "id": "" if self.is_dense(point) else e.candidate.id,
                    "loss": max(0.0, self.metric.loss(value, dense)) * self.metric.scale,
                    "change": self.metric.change(value, dense),
                    "value": self.metric.text(value),
                    "size": format_bytes(e.bytes),
                    "seconds": times,
                    "faster": {p: f"{self.dense.latency[p].seconds / s:.1f}×" for p, s in times.items()},
                    "time": {p: milliseconds(s) for p, s in times.items()},
                }
            )
        return rows

    def deciders(self) -> list[dict[str, Any]]:
        """Layers with their shares, each with the length of its two bars."""
        longest = max((max(abs(d.divergence), abs(d.seconds)) for d in self.run.deciders), default=1.0) or 1.0
        return [
            {
                "layer": d.layer,
                "bars": [{"share": s, "length": max(0.0, s) / longest} for s in (d.divergence, d.seconds)],
            }
            for d in self.run.deciders
        ]

    def _deployed(self, profile: str, read: Deployed, torchs: Evaluation) -> str:
        """What the metric is of a written file, in a line."""
        where = f"{self.metric.name} as {read.file} computes it" + (f" ({profile})" if len(self.profiles) > 1 else "")
        if read.note:
            return f"{where}: {read.note}"
        now, then = read.metrics.get(self.metric.name), torchs.metrics.get(self.metric.name)
        change, error = self.metric.change(now, then), self.metric.error(read.errors.get(self.metric.name))
        said = "as torch" if now == then else f"{change} {error}".strip() + " against torch"
        if read.differs:
            said += f"; more than noise: {', '.join(read.differs)}"
        return f"{where}: {self.metric.text(now)}, {said}"

    def _files(self, point: FrontPoint) -> list[dict[str, Any]]:
        """Kinds of files with their check, where one was made, and their path, where it is there to be opened."""
        found = []
        for kind in dict.fromkeys([*point.verified, *point.files]):
            path, check = self._link(point.files.get(kind)), point.verified.get(kind)
            said = []
            if check is not None:
                said.append("verified" if check.ok else "verification failed" if path else "not there")
                said += [check.note] if check.note else []
                said += [f"largest relative error {check.max_error:.1e}"] if check.max_error is not None else []
                said += [f"timed again at {milliseconds(check.seconds)}"] if check.seconds is not None else []
            if path or check:
                found.append({"kind": kind, "path": path, "check": check, "title": ", ".join(said)})
        return found

    def _link(self, path: str | None) -> str | None:
        """The address of a file of the run folder; None for what is not there, or leads out of it."""
        if not isinstance(path, str) or self.folder is None:
            return None if path is None else quote(str(path))
        place = (self.folder / path).resolve()
        inside = place.is_relative_to(self.folder.resolve()) and place.is_file()
        return quote(path) if inside and not Path(path).is_absolute() else None

    def other(self, item: Evaluation | Reference) -> dict[str, Any]:
        """A baseline or a reference in the same table."""
        value = item.metrics.get(self.metric.name)
        if isinstance(item, Evaluation):
            title, note = "uniform", figures.choices_text(item, self.dense)
        else:
            title, note = item.name, item.note
        return {
            "title": title,
            "note": note,
            "validation": self._cells(item.metrics, item.errors if isinstance(item, Evaluation) else {}),
            "change": self.metric.change(value, self.dense.metrics.get(self.metric.name)),
            "change_error": self.metric.error(item.drop_errors.get(self.metric.name))
            if isinstance(item, Evaluation)
            else "",
            "noise": self._within_noise(item) if isinstance(item, Evaluation) else False,
            "latency": [self.time(profile, item) for profile in self.profiles],
            "size": format_bytes(item.bytes),
            "smaller": f"{self.dense.bytes / item.bytes:.1f}×" if item.bytes else "–",
        }

    def kernels(self, profile: str) -> list[dict[str, Any]]:
        """Where time goes in dense and in the recommended point, on one scale."""
        tables: list[dict[str, Any]] = []
        for title, point in (("dense", self.run.dense), ("recommended", self.recommended)):
            latency = point.evaluation.latency.get(profile) if point is not None else None
            if point is None or latency is None or not latency.kernels:
                continue
            if title != "dense" and self.is_dense(point):
                continue
            kernels = sorted(latency.kernels, key=lambda kernel: -kernel.seconds)
            rest = kernels[MAX_KERNELS:]
            tables.append(
                {
                    "title": title,
                    "latency": latency,
                    "sum": sum(kernel.seconds for kernel in kernels),
                    "count": len(kernels),
                    "kernels": kernels[:MAX_KERNELS],
                    "rest": sum(kernel.seconds for kernel in rest),
                    "rest_count": len(rest),
                }
            )
        longest = max((table["kernels"][0].seconds for table in tables), default=1.0)
        return [{**table, "longest": longest or 1.0} for table in tables]

    def stages(self) -> list[tuple[str, float, float]]:
        """Stage, seconds, and share of the longest."""
        seconds = self.run.summary.seconds
        longest = max(seconds.values(), default=0.0) or 1.0
        return [(name, value, value / longest) for name, value in seconds.items()]

    def time(self, profile: str, of: Evaluation | Reference) -> dict[str, Any] | None:
        """Whose time on a profile, as it would be when dense was last timed, and how many times faster than dense that is."""
        latencies = {of.latency.profile: of.latency} if isinstance(of, Reference) else of.latency
        if (latency := latencies.get(profile)) is None:
            return None
        seconds = (
            comparable_reference(of, self.run) if isinstance(of, Reference) else comparable(of, self.dense, profile)
        )
        error = latency.spread / 2 if latency.how == "measured" else latency.error
        there = self.dense.latency.get(profile)
        times = there.seconds / seconds if there and seconds else None
        return {
            "ms": milliseconds(seconds).removesuffix(" ms"),
            "around": f"± {error * 100:.1f} %" if error is not None else "",
            "how": latency.how,
            "noisy": latency.noisy,
            "times": f"{times:.2f}×" if times is not None else "–",
        }

    def layers(self, evaluation: Evaluation) -> list[dict[str, Any]]:
        widths, full = evaluation.candidate.widths, self.dense.candidate.widths
        known = {layer.name: layer for layer in self.run.layers}
        rows = []
        for name in [*known, *(layer for layer in evaluation.candidate.methods if layer not in known)]:
            if (method := evaluation.candidate.methods.get(name)) is None:
                continue
            layer = known.get(name)
            group = layer.out_group if layer else None
            dense = full.get(group, layer.out_channels if layer else 0) if group else layer.out_channels if layer else 0
            kept = widths.get(group, dense) if group else dense
            rows.append(
                {
                    "name": name, "kind": layer.kind if layer else "", "kept": kept, "dense": dense,
                    "share": kept / dense if dense else 1.0, "precision": method.precision,
                    "rank": " × ".join(map(str, method.ranks)), "fixed": group is None,
                }
            )  # fmt: skip
        return rows

    def _knee(self) -> str | None:
        knees = (knee_of(self.run, self.metric, profile) for profile in self.profiles)
        return next((found.candidate.id for found in knees if found is not None), None)

    def _recommended(self) -> FrontPoint | None:
        """The point that meets the goals best; without goals, or where none meets them, the knee."""
        points = {point.evaluation.candidate.id: point for point in self.run.front}
        if self.judge.goals.any:
            try:
                chosen = self.judge.best([point.evaluation for point in self.run.front])
                self.met = True
                return points[chosen.candidate.id]
            except InfeasibleError:
                self.unmet = True
        return points.get(self.knee or "")


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
    run: Run, evaluations: Sequence[Evaluation], page: _Page
) -> dict[str, tuple[figures.Figure, dict[str, Any]]]:
    """Figures by element id, each with what its caption needs."""
    drawn: dict[str, tuple[figures.Figure, dict[str, Any]]] = {}
    judge = page.judge
    for k, profile in enumerate(run.profiles):
        taken = page.recommended.evaluation.candidate.id if page.recommended and page.met else None
        limits = {"max_drop": judge.max_drops.get(judge.objective), "max_latency": judge.max_latency(profile)}
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
        raise CorruptError(str(error)) from error
    return current(data, path, FORMAT_VERSION)
