"""Is a delivered model still right and fast here? What a build server asks of a run's folder, and what it is told.

A point's files are held to their manifest, run, and compared with torch; its metric is read anew, and its latency taken in turn with the
uncompressed model's, on this machine. Each check ends in a verdict of its own, and the worst of them is the gate's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from autocomp.config.files import read_json
from autocomp.config.settings import Settings, read_settings
from autocomp.errors import AutocompError, UsageError, last_line, shown
from autocomp.front.goals import Judge
from autocomp.processes.alone import attempt_alone
from autocomp.progress import Progress
from autocomp.records.run import speedup
from autocomp.run.folder import CONFIG, LOCK
from autocomp.run.identity import identity_of, profiles_identity
from autocomp.run.result import Point, SearchResult
from autocomp.tasks.reading import NOTHING, otherwise

if TYPE_CHECKING:
    import torch

    from autocomp.hardware.profile import Profile
    from autocomp.tasks.task import Task

SILENT = 600.0  # seconds after which a library that is run is given up
ROUNDING = (
    0.1  # of what a metric lost, or may lose: by as much it may be read otherwise and be the same. Chosen by hand
)
FLOAT = 1e-6  # of a metric: what sums in another order make of it
SLOWER = 0.10  # share of the speed-up that may be lost before it counts; two runs of one module on a quiet machine differ by less


class Verdict(StrEnum):
    """What a check found, best first."""

    ACCEPT = "ACCEPT"
    INCONCLUSIVE = "INCONCLUSIVE"
    CANNOT_RUN = "CANNOT RUN"
    REGRESSION = "REGRESSION"

    @property
    def exit_code(self) -> int:
        """0 for what is accepted, then 4 regression, 5 inconclusive, 6 cannot run."""
        return {"ACCEPT": 0, "REGRESSION": 4, "INCONCLUSIVE": 5, "CANNOT RUN": 6}[self.value]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: its name, what it came to, and what was seen, in words and numbers."""

    name: str
    verdict: Verdict
    said: str
    numbers: Mapping[str, float]


@dataclass(frozen=True)
class Gated:
    """A point, by its id, and what each check found."""

    point: str
    checks: tuple[Check, ...]

    @property
    def verdict(self) -> Verdict:
        order = list(Verdict)
        return max((check.verdict for check in self.checks), key=order.index, default=Verdict.CANNOT_RUN)

    def to_json(self) -> dict[str, Any]:
        return {"point": self.point, "verdict": self.verdict.value, "checks": [asdict(check) for check in self.checks]}


def judged_again(
    run: str | Path,
    point: str | None = None,
    baseline: str | Path | None = None,
    slower: float = SLOWER,
    task: Task | None = None,
    progress: Progress | None = None,
) -> Gated:
    """Check a delivered point of a run folder again, on this machine.

    ``point`` is its id, by default the one that meets the run's goals best (without goals the knee). Its speed-up is held to the run's, or to
    that in ``baseline``, the JSON of an earlier gate; it may be ``slower`` by a share (0.1: 10 %). ``task`` is needed where the run was made
    from a Task that no name leads to. UsageError if the run, the point or the baseline cannot be read.

    Time that was measured on another machine says nothing here as such; the ratio to the uncompressed model, timed in turn, does.
    """
    with _alone_in(Path(run)):
        found = SearchResult(run)
        settings = read_settings(found.folder / CONFIG)
        chosen = _chosen(found, settings, point)
        wanted = _baseline(Path(baseline), chosen) if baseline is not None else _speedups(found, chosen)
        checks = _Checks(found, settings, chosen, wanted, slower, progress or Progress())
        return Gated(chosen.candidate.id, tuple(checks.all(task)))


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keep searches and training out of a run folder while it is read, where one was ever at work; a read-only folder needs no keeping."""
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        if (folder / LOCK).is_file():
            lock.acquire()
    except Timeout:
        raise UsageError(
            f"a search or training is at work in {folder}, which would change what is checked: wait for it"
        ) from None
    except OSError:
        pass
    try:
        yield
    finally:
        lock.release()  # nothing, where it is not held


class _Checks:
    """The checks of one point, one after the other."""

    def __init__(
        self,
        found: SearchResult,
        settings: Settings,
        point: Point,
        wanted: Mapping[str, float],
        slower: float,
        progress: Progress,
    ) -> None:
        self.found, self.settings, self.point = found, settings, point
        self.wanted, self.slower, self.progress = wanted, slower, progress
        self.place = found.folder / "models" / point.candidate.id

    def all(self, task: Task | None) -> list[Check]:
        from autocomp.export.files import load_model, refuse_foreign
        from autocomp.run.prepare_task import checked_inputs
        from autocomp.tasks.task import load_task, within

        checks = [self._tried("files", self._files)]
        try:
            with self.progress.stage("loading the task"):
                task = task or load_task(self.settings.task or "", self.progress)
                if self.settings.evaluate_timeout is not None:
                    task = within(task, self.settings.evaluate_timeout)
                refuse_foreign(self.place)  # that the manifest has other numbers is told as such
                model = load_model(self.place)
                inputs = checked_inputs(task)
        except AutocompError as error:
            return [*checks, _check("task", Verdict.CANNOT_RUN, str(error))]
        checks += [
            self._tried("manifest", lambda: self._told(model, inputs)),
            self._tried("task", lambda: self._task(task)),
            self._tried("size", lambda: self._size(model)),
        ]
        with self.progress.stage("metric"):
            checks.append(self._tried("metric", lambda: self._metric(task, model)))
        if "onnx" in self.point.record.files:
            with self.progress.stage("outputs of model.onnx"):
                checks.append(self._tried("onnx", lambda: self._onnx(model, inputs)))
        for profile in self.found.run.profiles:
            with self.progress.stage(f"outputs and latency on {profile}"):
                checks += self._on(profile, task, model, inputs)
        return checks

    def _files(self) -> Check:
        """Whether every file is the one that the run wrote."""
        from autocomp.export.files import checksum

        manifest = self._manifest()
        said, whose = dict(manifest["sha256"]), manifest.get("id", self.place.name)
        there = [name for name in said if (self.place / name).is_file()]
        wrong = [name for name in there if checksum(self.place / name) != said[name]]
        gone = [name for name in said if name not in there]
        if whose != self.place.name:
            return _check("files", Verdict.REGRESSION, f"the manifest is of another point, {whose}")
        if wrong:
            return _check("files", Verdict.REGRESSION, f"not as the run wrote them: {', '.join(wrong)}")
        if gone or not said:
            return _check("files", Verdict.CANNOT_RUN, f"not there: {', '.join(gone) or 'any'}")
        return _check("files", Verdict.ACCEPT, f"{len(said)} files as the run wrote them")

    def _told(self, model: torch.nn.Module, inputs: Sequence[tuple[torch.Tensor, ...]]) -> Check:
        """Whether the manifest says of the point what the run does; its bytes are counted."""
        from autocomp.export.files import manifest_of

        manifest, record = self._manifest(), self.point.record
        here = manifest_of(record.evaluation, model, inputs[0], record.verified)
        here = json.loads(json.dumps({name: fact for name, fact in here.items() if name != "bytes"}))
        if other := [name for name, fact in here.items() if manifest.get(name) != fact]:
            return _check("manifest", Verdict.REGRESSION, f"it says otherwise than the run of: {', '.join(other)}")
        return _check("manifest", Verdict.ACCEPT, "it says what the run does")

    def _task(self, task: Task) -> Check:
        """Whether the model, its data and how it is judged are those that the run was made from."""
        was = self.found.run.identity
        if not was:
            return _check(
                "task", Verdict.ACCEPT, "the run was written by an autocomp that did not note what it was made from"
            )
        changed = [name for name, digest in identity_of(task).items() if was.get(name, digest) != digest]
        if changed:
            return _check("task", Verdict.INCONCLUSIVE, f"not what the run was made from: {', '.join(changed)}")
        return _check("task", Verdict.ACCEPT, "model, data and metric are those that the run was made from")

    def _size(self, model: torch.nn.Module) -> Check:
        """Whether the tensors of the delivered model are as large as the run says."""
        from autocomp.graph.fold import folded_bytes

        was, said, now = self.point.bytes, self._manifest().get("bytes"), folded_bytes(model)
        if self.point.record.evaluation.source == "dense":
            # as large as what its author's form of it holds (`dense_bytes`)
            now = min(now, self.found.run.task.bytes)
        text = (
            f"{now} bytes of tensors in model.safetensors, BatchNorm folded; {was} in the run, {said} in the manifest"
        )
        verdict = Verdict.ACCEPT if now == was == said else Verdict.REGRESSION
        return _check("size", verdict, text, now=now, run=was)

    def _manifest(self) -> Any:
        return read_json(self.place / "manifest.json")

    def _metric(self, task: Task, model: torch.nn.Module) -> Check:
        from autocomp.tasks.task import evaluate_task

        run, point = self.found.run, self.point.record.evaluation
        now, then = evaluate_task(task, model), self.point.metrics
        name = run.task.objective
        said = f"{name} {now[name]:.7g}, {then[name]:.7g} in the run"
        numbers = {"now": now[name], "run": then[name]}
        dense = evaluate_task(task, task.model)
        was = Judge.of(run, self.settings.goals)
        judge = replace(was, dense=replace(was.dense, metrics=dense))
        # a metric may be large beside all that it may lose: its thousandth is then no measure of what is the same
        floors = {m: max(FLOAT * abs(value), NOTHING) for m, value in then.items()}
        allowed = {m: ROUNDING * max(most, abs(was.drop(point, m))) + floors[m] for m, most in was.max_drops.items()}
        changed = otherwise(then, now, allowed)
        other = otherwise(run.dense.evaluation.metrics, dense, allowed)
        for metric in dict.fromkeys([name, *judge.max_drops]):
            lost, before = judge.drop(replace(point, metrics=now), metric), was.drop(point, metric)
            if lost > max(before, judge.max_drops.get(metric, before)) + abs(before) * ROUNDING + floors[metric]:
                if not changed and not other and metric not in judge.max_drops:
                    continue  # of two numbers that are the same, the difference is rounding
                text = f"{said}; against the uncompressed model {metric} loses {lost:.4g} now, {before:.4g} in the run"
                return _check("metric", Verdict.REGRESSION, text, **numbers)
        if not changed and not other:
            return _check("metric", Verdict.ACCEPT, said, **numbers)
        text = f"{said} ({changed or 'the same'}); the uncompressed model: {other or 'the same'}. Another model, or other data"
        return _check("metric", Verdict.INCONCLUSIVE, text, **numbers)

    def _onnx(self, model: torch.nn.Module, inputs: list[tuple[torch.Tensor, ...]]) -> Check:
        from autocomp.export.onnx import onnx_session, run_session

        session = onnx_session(self.place / "model.onnx")
        return _compared("onnx", model, lambda *given: run_session(session, *given), inputs)

    def _on(
        self, profile: str, task: Task, model: torch.nn.Module, inputs: list[tuple[torch.Tensor, ...]]
    ) -> list[Check]:
        """Outputs of the library, and its time beside the uncompressed model's."""
        from autocomp.devices.open import open_device
        from autocomp.export.files import library_of
        from autocomp.hardware.profile import load_profile

        names = f"so on {profile}", f"latency on {profile}"
        try:
            device = open_device(load_profile(profile))
            dense = device.compile(task.model, inputs)
            # what is emulated is taken through its own steps; what is run brings them along
            own = device.compile(model, inputs) if device.profile.reach == "estimate" else dense
        except Exception as error:
            return [_check(name, Verdict.CANNOT_RUN, last_line(error)) for name in names]

        def looked_at(path: Path, _: None) -> list[Check]:
            library = own.reload(path)
            right = _compared(names[0], model, library.run, inputs[: library.checked_inputs])
            if right.verdict is not Verdict.ACCEPT:
                return [right]
            return [right, self._tried(names[1], lambda: self._latency(profile, device, dense, library, inputs))]

        # in a process of its own: a library for another processor ends the one that runs it
        path = self.place / library_of(profile, list(self.found.run.profiles))
        found = attempt_alone([path], lambda _: None, looked_at, timeout=SILENT)[0]
        if found.value is None:
            return [_check(name, Verdict.CANNOT_RUN, found.failure) for name in names]
        checks: list[Check] = found.value
        return checks

    def _latency(
        self, profile: str, device: Any, dense: Any, library: Any, inputs: list[tuple[torch.Tensor, ...]]
    ) -> Check:
        from autocomp.hardware.timing import steady

        name = f"latency on {profile}"
        if (was := self.wanted.get(profile, 0.0)) <= 0:
            return _check(name, Verdict.CANNOT_RUN, f"the baseline has no accepted latency on {profile}")
        whole, ours = steady(lambda: device.time_in_turn([dense, library], inputs[0]))
        times = whole.seconds / ours.seconds
        spread = max(whole.spread, ours.spread)
        said = (
            f"{times:.2f}x faster than the uncompressed model (spread {spread:.0%}, {ours.how}), {was:.2f}x in the "
            f"baseline; {ours.seconds * 1e3:.3g} ms"
        )
        numbers = {"now": times, "baseline": was, "spread": spread, "seconds": ours.seconds}
        floor, noisy = was * (1 - self.slower), ours.noisy or whole.noisy
        if times * (1 - spread / 2) >= floor:
            verdict = Verdict.ACCEPT
        else:
            verdict = Verdict.INCONCLUSIVE if noisy or times * (1 + spread / 2) >= floor else Verdict.REGRESSION
        if self._is_other(profile, device.profile):
            if ours.how == "estimated":
                verdict, said = Verdict.INCONCLUSIVE, f"{said}; the profile is not what it was when the run was made"
            else:
                said = f"{said}; the machine or the profile is not what it was when the run was made"
        return _check(name, verdict, said, **numbers)

    def _is_other(self, name: str, profile: Profile) -> bool:
        """Whether what times depend on is not as it was: of this machine it may be another, of an estimate all that it reckons with."""
        was = self.found.run.identity
        return any(was.get(name, digest) != digest for name, digest in profiles_identity({name: profile}).items())

    def _tried(self, name: str, check: Callable[[], Check]) -> Check:
        try:
            return check()
        except Exception as error:
            return _check(name, Verdict.CANNOT_RUN, last_line(error))


def _compared(
    name: str,
    model: torch.nn.Module,
    run: Callable[..., object],
    inputs: list[tuple[torch.Tensor, ...]],
) -> Check:
    from autocomp.compiler.verify import check_outputs
    from autocomp.errors import MismatchError

    try:
        error = check_outputs(model, run, inputs, name)
    except MismatchError as wrong:
        return _check(name, Verdict.REGRESSION, str(wrong))
    return _check(name, Verdict.ACCEPT, f"differs from torch by at most {error:.1e}, relative", error=error)


def _check(name: str, verdict: Verdict, said: str, **numbers: float) -> Check:
    return Check(name, verdict, said, numbers)


def _chosen(found: SearchResult, settings: Settings, point: str | None) -> Point:
    if point is None:
        return found.best_of(settings.goals)
    for known in (*found.front, found.dense):
        if known.candidate.id == point:
            return known
    ids = ", ".join(known.candidate.id for known in found.front)
    raise UsageError(f"--point: the run in {found.folder} has no point {shown(point)}; its front has {ids}")


def _speedups(found: SearchResult, point: Point) -> dict[str, float]:
    dense = found.run.dense.evaluation
    return {profile: speedup(point.record.evaluation, dense, profile) for profile in point.latency}


def _baseline(path: Path, point: Point) -> dict[str, float]:
    """Speed-ups by profile, from the JSON of an earlier gate. UsageError if it is none, or of another point."""
    try:
        data = read_json(path)
        if data["point"] != point.candidate.id:
            raise UsageError(f"--baseline: {path} is of point {shown(data['point'])}, not of {point.candidate.id}")
        return {
            check["name"].removeprefix("latency on "): float(check["numbers"]["now"])
            for check in data["checks"]
            if check["name"].startswith("latency on ")
            and check["verdict"] == Verdict.ACCEPT.value
            and 0 < float(check["numbers"]["now"]) < math.inf
        }
    except FileNotFoundError:
        raise UsageError(f"--baseline: there is no file {path}") from None
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise UsageError(
            f"--baseline: {path} is not what `autocomp gate --json` prints ({type(error).__name__})"
        ) from None
