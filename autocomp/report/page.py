"""What the report's template shows of a run, worked out: texts and shares, no markup."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from autocomp.config.files import read_json
from autocomp.config.quantities import format_bytes, format_joules
from autocomp.config.settings import Goals
from autocomp.errors import InfeasibleError, UsageError
from autocomp.front.goals import Judge, undisturbed
from autocomp.records.evaluation import Evaluation, Reference
from autocomp.records.run import (
    OURS,
    Deployed,
    FrontPoint,
    Run,
    Verified,
    comparable,
    comparable_reference,
    is_of_others,
    speedup,
)
from autocomp.report import figures
from autocomp.report.figures import Metric, milliseconds, plain
from autocomp.report.targets import knee_of

_STOPPED = "it is of the point as it was trained since: the run was stopped at its end, go on with --resume"
MAX_KERNELS = 14  # rows of a kernel table; the rest is summed in one more


class Page:
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
            "energy": self._energy(e),
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

    def _energy(self, evaluation: Evaluation) -> list[str]:
        """What one inference draws above the idle machine, by target, and how that is known."""
        lines = []
        for profile, latency in evaluation.latency.items():
            where = f" on {profile}" if len(self.profiles) > 1 else ""
            if latency.joules is not None:
                spread = f", ± {latency.joules_spread:.0%} between windows" if latency.joules_spread is not None else ""
                lines.append(f"Energy of an inference{where}: {format_joules(latency.joules)}, counted{spread}")
            elif latency.energy is not None:
                lines.append(
                    f"Energy of an inference{where}: {format_joules(latency.energy)}, estimated as power times time"
                )
        return lines

    def _tail(self, profile: str, tail: Mapping[str, float]) -> str:
        """Percentiles of single inferences, in a line."""
        where = f" on {profile}" if len(self.profiles) > 1 else ""
        return f"Single inferences{where}: " + ", ".join(f"{name} {milliseconds(s)}" for name, s in tail.items())

    def offers(self) -> list[dict[str, Any]]:
        """What each point of the front costs in the objective and gives, for the question what a larger loss would buy."""
        rows = []
        steady = undisturbed([point.evaluation for point in self.run.front])
        for point in (self.run.dense, *self.run.front):
            e = point.evaluation
            value, dense = e.metrics.get(self.metric.name), self.dense.metrics.get(self.metric.name)
            if value is None or dense is None or not (self.is_dense(point) or e in steady):
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
        found, others = [], self._of_other_weights(point)
        for kind in dict.fromkeys([*point.verified, *point.files]):
            path, check = self._link(point.files.get(kind)), point.verified.get(kind)
            if others:
                path, check = None, Verified(False, note=_STOPPED)
            said = []
            if check is not None:
                said.append("verified" if check.ok else "verification failed" if path else "not there")
                said += [check.note] if check.note else []
                said += [f"largest relative error {check.max_error:.1e}"] if check.max_error is not None else []
                said += [f"timed again at {milliseconds(check.seconds)}"] if check.seconds is not None else []
            if path or check:
                found.append({"kind": kind, "path": path, "check": check, "title": ", ".join(said)})
        return found

    def _of_other_weights(self, point: FrontPoint) -> bool:
        """Whether the files are of the point as it was trained since: a run that is stopped while it writes them has yet to write its front."""
        path = point.files.get("manifest")
        if self.folder is None or self._link(path) is None:
            return False
        try:
            manifest = read_json(self.folder / str(path))
        except UsageError:
            return False
        return isinstance(manifest, dict) and is_of_others(manifest, point.evaluation.metrics)

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
            left_out = layer is not None and 0 in (widths.get(layer.out_group or ""), widths.get(layer.in_group or ""))
            kept = 0 if left_out else kept
            rows.append(
                {
                    "name": name, "kind": layer.kind if layer else "", "kept": kept, "dense": dense,
                    "share": kept / dense if dense else 1.0, "precision": "left out" if left_out else method.precision,
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
