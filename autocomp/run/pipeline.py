"""The main job, stage after stage: task → graph → space → layer database → study → measured candidates.

All that a run finds lies in its study (``study.db``): what was told, what was measured, the references. A run that is stopped
anywhere and resumed goes through the same stages, finds what is there, and does the rest.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from threadpoolctl import threadpool_limits

from autocomp.config.settings import Settings
from autocomp.devices.device import Device
from autocomp.devices.open import open_device
from autocomp.errors import AutocompError
from autocomp.front.pareto import promising
from autocomp.hardware.profile import load_profile
from autocomp.measurement.measurer import Measurer, reason_of
from autocomp.measurement.preflight import rehearse
from autocomp.processes.pool import Workers, cores, map_in_processes
from autocomp.progress import Progress, Stage
from autocomp.records.candidate import Candidate, Method
from autocomp.records.evaluation import Evaluation, Source, as_searched
from autocomp.records.precisions import FORMATS, FP32
from autocomp.run.budget import BASELINES, TELLING, Budget
from autocomp.run.folder import study_of
from autocomp.run.identity import compression_of, identity_of, refuse_another
from autocomp.run.judged import ignores_its_model, judged_otherwise
from autocomp.run.prepare import prepare
from autocomp.space.file import load_space
from autocomp.study.costs import Costs
from autocomp.study.solver import solve_front
from autocomp.study.study import Asked, Search, Space, open_search
from autocomp.study.useful import UNKNOWN, useful_divergence
from autocomp.tasks.task import Task, evaluate_task

if TYPE_CHECKING:
    import torch


UNIFORM_KEEPS = (1.0, 0.75, 0.5, 0.25)  # the baselines: one ratio for every group, in fp32 and in int8
SOLVER_SEEDS = 40
AHEAD = 8  # trials drawn before the first of them is told, in a deterministic run: as many on a machine of any number of cores
SEEDS_AGAIN = 12  # at most, after each round of measurement
FITTED = 64  # candidates stitched to fit tier 0 before the solver is first asked, where the budget of trials is four times that
DOMINATED = 1.25  # times the divergence of a told candidate thought to be faster: on 64 samples, reason enough to look at no more of them
SETTLED = 2.0  # seconds of work after which its rate says something
FITTING = 0.1  # of the time to search at most for that fit, where minutes are set
DEEP = 4  # one in so many measurements looks for what is fast at whatever loss within `UNKNOWN`; the others at what is of use
MEASURE_ROUNDS = 4  # the budget of measurements is spent in rounds, each choosing by all that is known then

_Work = tuple[Candidate, float]  # and the divergence above which it is not looked at any closer
_Scored = tuple[float | None, str, float]  # divergence, or None and why; seconds


class Pipeline:
    """One run. Made anew for each start; what it finds is written to the run's study as it goes."""

    def __init__(
        self, settings: Settings, task: Task, folder: Path, known: Mapping[str, Any] | None, progress: Progress
    ) -> None:
        """``known`` is what the study of a run that is resumed has recorded; None for a new run."""
        from autocomp.database.calibrate import collect
        from autocomp.database.database import LayerDatabase

        self.settings, self.folder, self.progress = settings, folder, progress
        self._group_seconds = 0.0  # that measuring a group of candidates last took
        self._warned = False  # that the minutes cannot be kept
        self.budget = Budget(settings.minutes)
        with progress.stage("preparing devices", len(settings.profiles)) as stage:
            self.devices = {name: _open_device(name, stage) for name in settings.profiles}
        rules = load_space(settings.space)
        identity = {**identity_of(task), "how layers are compressed": compression_of(settings, rules)}
        if known and "space" in known:  # else nothing was asked yet
            refuse_another(known.get("identity", {}), identity, folder)
        profiles = [device.profile for device in self.devices.values()]
        prepared = prepare(task, rules, profiles, settings.calibration_samples, progress)
        self.task = task = prepared.task
        self.graph, self.space, self.inputs = prepared.graph, prepared.space, prepared.inputs
        self.measurer = Measurer(task, self.devices, self.inputs, self.stitch)
        if not (known and (folder / "layers").exists()):  # else a run got past this before
            self._rehearse()
        with progress.stage("calibrating"):
            self.statistics = collect(task, self.graph, settings.calibration_samples, settings.seed)
        self.database = LayerDatabase(folder / "layers", task.model, self.graph, self.space, self.statistics)
        self.database.build(progress, workers=cores(), told=self._forecast)
        self.space = self.space.without(self.database.dominated(profiles))
        settled = settings.deterministic
        self.costs = Costs(self.graph, self.space, self.database.tables(self.space), self.devices, settled)
        self.scorers = Workers(self._score, cores(), AHEAD if settled else None)
        self.search = self._open_search(known is not None, {"identity": identity})
        # times from the end of an earlier start are of another moment than all others
        for evaluation in self.search.told:
            if evaluation.earlier:
                self.search.update(evaluation.trial, as_searched(evaluation))
        self._said: list[str] = self.search.get_attr("warnings", [])  # by earlier starts of the run
        self._spent: dict[str, float] = self.search.get_attr("seconds", {})
        if self.search.unreadable:
            progress.warn(
                f"{self.search.unreadable} trials of the study are not as this autocomp writes them; they are left as they are, and not used"
            )
        if settled:
            self._settle_times()
        self._measure_here()
        if self.measurer.rehearsed is not None:
            self.search.set_attr("seconds of a point", self.measurer.rehearsed.seconds)
        else:
            self._keep_for_the_end(self.search.get_attr("seconds of a point", 0.0))

    def run(self) -> None:
        """Search until the budgets are spent: baselines, solver seeds, proposals, and rounds of measurement.

        After each round the solver is asked again, at the coefficients and times fitted by then.
        """
        # Proposals are small products: on several threads, beside the scorers, they would wait for a core most of their time.
        with closing(self.scorers), threadpool_limits(1, "blas"):
            self._fit_additive()
            self._baselines()
            self._seed()
            self._search()
        self._doubt_metrics()
        self.costs.fit(self.search.told)
        errors = self.costs.held_out_errors(self.search.told)
        for evaluation in self.search.told:  # the final model's predictions, to be held against what was measured
            if evaluation.state == "measured":
                predicted = self.costs.predict(evaluation.candidate)
                error = errors.get(evaluation.trial, evaluation.error)
                self.search.update(evaluation.trial, replace(evaluation, predicted=predicted, error=error))

    def _rehearse(self) -> None:
        """Try all that could fail at the end, and see how long it takes."""
        rehearsed = rehearse(self.task, self.devices, self.inputs, self.progress)
        self.measurer.rehearsed = rehearsed
        self._keep_for_the_end(rehearsed.seconds)

    def _settle_times(self) -> None:
        """Fit the latency models to the kernel times that were stored when the run began, and to nothing that it measures itself."""
        known: dict[str, Any] | None = self.search.get_attr("kernel times")
        for name, device in self.devices.items():
            if known is None:
                device.model.fit_kernels(device.store.records())
            else:
                device.model.restore(known[name])
        self.search.set_attr("kernel times", {name: device.model.to_json() for name, device in self.devices.items()})

    def _measure_here(self) -> None:
        """Forget what another machine, or another compiler, measured: it is measured again, since its times must not meet ours in one ratio."""
        compiler = f"TVM {version('apache-tvm')}"
        here = {name: f"{device.profile.fingerprint}, {compiler}" for name, device in self.devices.items()}
        before = self.search.get_attr("targets", here)
        if before != here:
            again = [e for e in self.search.told if e.state == "measured"]
            for evaluation in again:
                self.search.update(
                    evaluation.trial, replace(evaluation, state="told", latency={}, earlier={}, metrics={})
                )
            self.search.set_attr("references", None)
            moved = ", ".join(name for name in here if before.get(name) != here[name])
            self.progress.warn(
                f"{len(again)} models were measured on another machine than this one, or compiled by another TVM ({moved}): they are measured "
                "again"
            )
        self.search.set_attr("targets", here)
        self._tell_versions()

    def _tell_versions(self) -> None:
        now = {name: version(name) for name in ("autocomp", "torch")}
        begun = self.search.get_attr("versions", now)
        for name in now:
            if begun.get(name) != now[name]:
                self.progress.warn(f"the run was begun with {name} {begun.get(name)}, and goes on with {now[name]}")
        self.search.set_attr("versions", begun)

    def _judge_again(self) -> None:
        """Read metrics anew where a run goes on. UsageError if they have other names; a warning if they differ."""
        rehearsed = self.measurer.rehearsed

        def now(evaluation: Evaluation) -> Mapping[str, float]:
            if rehearsed is not None and not evaluation.kl and set(rehearsed.metrics) == set(evaluation.metrics):
                return rehearsed.metrics
            return evaluate_task(self.task, self.stitch(evaluation.candidate), names=self.measurer.names)

        if said := judged_otherwise(self.search.told, self.dense(), lambda e: e.metrics or None, now):
            self.progress.warn(
                f"Task.evaluate judges {said} than when the run began: it draws at random, or its data changed; new points are not comparable "
                "with those before"
            )

    def _doubt_metrics(self) -> None:
        """Warn of the usual slip of a closure."""
        if count := ignores_its_model(self.search.told, self.dense()):
            self.progress.warn(
                f"Task.evaluate gave all of {count} compressed models exactly the numbers of the uncompressed one, though they answer "
                "otherwise: does it judge the model that it is given?"
            )

    def _keep_for_the_end(self, point: float) -> None:
        self.budget.keep_for_the_end(point, self.measurer.together, self.settings.references)

    def _forecast(self, share: float, seconds: float) -> None:
        """Warn once, in time, if the layer database, of which a share was made in so many seconds, will take the time to search."""
        if seconds < SETTLED or self._warned:
            return
        if said := self.budget.forecast("compressing the layers", seconds / share - seconds):
            self._warned = True
            self.progress.warn(said)

    def _seed(self) -> None:
        with self.progress.stage("solving for seeds"):
            problems = self.costs.problems()
            for problem in problems:
                for candidate in solve_front(problem, -(-SOLVER_SEEDS // len(problems))):
                    self.search.enqueue(candidate, "solver")

    def _search(self) -> None:
        """Rounds of telling and measuring. Where minutes are set, each round gets its part of them, and half of that for telling."""
        trials, budget = self.settings.trials, self.settings.measure
        with self.progress.stage("searching", trials) as stage:
            stage.advance(len(self.search.told))
            for part in range(1, MEASURE_ROUNDS + 1):
                until = self.budget.spent() + TELLING * self.budget.to_search() / (MEASURE_ROUNDS + 1 - part)
                told = self._tell_until(trials * part // MEASURE_ROUNDS, stage, until)
                self._measure_until(budget * part // MEASURE_ROUNDS)
                if not told and (self.budget.minutes is None or self.budget.late()):
                    break
                for candidate in solve_front(self.costs.problem(), SEEDS_AGAIN) if part < MEASURE_ROUNDS else ():
                    self.search.enqueue(candidate, "solver")
            self._measure_until(budget)
            if self.budget.minutes is not None:
                self._least(stage)
                self._say_what_was_left()

    def _least(self, stage: Stage) -> None:
        """What is searched however late it is: some of the solver's seeds, and one group of them measured. A front of nothing is none."""
        searched = [e for e in self.search.told if not _is_baseline(e.source)]
        if any(e.state != "told" for e in searched):
            return
        together = self.measurer.together
        if not searched:
            asked = (self.search.ask() for _ in range(min(4 * together, self.settings.trials - len(self.search.told))))
            for _ in self._tell(one for one in asked if one is not None):
                stage.advance()
        self._measure_until(min(together, self.settings.measure), anyhow=True)

    def _say_what_was_left(self) -> None:
        told, trials = len(self.search.told), self.settings.trials
        done = sum(e.state != "told" for e in self.search.told if not _is_baseline(e.source))
        if self.budget.late(self._group_seconds) and (told < trials or done < self.settings.measure):
            self.progress.warn(
                f"--minutes {self.budget.minutes:g} ended the search after {told} of {trials} trials, {done} of {self.settings.measure} measured"
            )

    def close(self) -> None:
        """Keep what this start of the run said and how long it took, for the starts after it; close the study."""
        try:
            self.search.set_attr("warnings", self.warnings())
            self.search.set_attr("seconds", self.seconds())
        except Exception as error:  # the disk is full, the folder gone: what ends the run then is told by another
            print(f"what this start said was not kept: {error}", file=sys.stderr)  # into the run's log
        finally:
            self.search.close()

    def warnings(self) -> list[str]:
        """What this start of the run said, and the ones before it."""
        return list(dict.fromkeys([*self._said, *self.progress.warnings]))

    def seconds(self) -> dict[str, float]:
        """Seconds of each stage, over all starts of the run."""
        before, now = self._spent, self.progress.seconds
        return {name: before.get(name, 0.0) + now.get(name, 0.0) for name in dict.fromkeys([*before, *now])}

    def dense(self) -> Evaluation:
        """The evaluation of the untouched model. AutocompError if it was not measured."""
        found = next((e for e in self.search.told if e.source == "dense"), None)
        if found is None or found.state != "measured":
            raise AutocompError(
                f"the uncompressed model was not measured: {(found and found.failure) or 'the time was up'}"
            )
        return found

    def stitch(self, candidate: Candidate) -> torch.nn.Module:
        """The candidate as a model of its own."""
        from autocomp.database.stitch import stitch

        return stitch(self.task.model, self.graph, self.database, candidate)

    def _open_search(self, resume: bool, records: Mapping[str, Any]) -> Search:
        url, name = study_of(self.settings, self.folder)
        levels = Space(self.space.widths, self.space.methods)
        problem, normalise = self.costs.problem, self.space.normalise
        return open_search(url, name, levels, self.settings.seed, resume, problem, normalise, records)

    def _fit_additive(self) -> None:
        """Fit tier 0 to the divergence of random candidates on few samples; a resumed run reads what was found before."""
        from autocomp.accuracy.additive import ENOUGH

        count = min(FITTED, self.settings.trials // 4)
        if count < ENOUGH or self.space.size < count or self.budget.late():
            return
        rng = np.random.default_rng(self.settings.seed)
        drawn = [self.space.draw(rng) for _ in range(count)]
        known: list[float] = self.search.get_attr("tier0", [])
        if len(known) != count:
            known = []
            with self.progress.stage("fitting the additive model", count) as stage:
                until = self.budget.spent() + FITTING * self.budget.to_search()
                for value in map_in_processes(self._score_early, drawn, cores()):
                    known.append(value if np.isfinite(value) else -1.0)  # -1 says nothing: the fit leaves it out
                    stage.advance()
                    if self.budget.spent() > until:
                        break
            self.search.set_attr("tier0", known)
        self.costs.observe(drawn[: len(known)], known)
        self.costs.fit(self.search.told)

    def _score_early(self, candidate: Candidate) -> float:
        from autocomp.accuracy.proxy import score_early

        try:
            return score_early(self.task.model, self.graph, self.database, candidate)
        except Exception:  # the model's own code runs here
            return float("nan")

    def _baselines(self) -> None:
        """Tell and measure dense and the uniform compressions: they stand beside the front, and fit the latency models."""
        offered = {method for methods in self.space.methods.values() for method in methods}
        precisions = [
            name for name, form in FORMATS.items() if form.baseline and (name == FP32 or Method(name) in offered)
        ]
        uniform = [self.space.uniform(keep, precision) for precision in precisions for keep in UNIFORM_KEEPS]
        self.search.enqueue(self.space.dense(), "dense")
        for candidate in uniform:
            self.search.enqueue(candidate, "uniform")
        missing = {candidate.id for candidate in (self.space.dense(), *uniform)}
        missing -= {evaluation.candidate.id for evaluation in self.search.told}  # by a run that was stopped
        with self.progress.stage("measuring baselines", 1 + len(uniform)) as stage:
            list(self._tell(self._ask_until(missing)))
            baselines = [e for e in self.search.told if _is_baseline(e.source)]
            stage.advance(1 + len(uniform) - len(baselines))  # some are the same
            dense = next((e for e in baselines if e.source == "dense" and e.state == "told"), None)
            if dense is not None:  # a failure here is the run's
                self.search.update(dense.trial, self.measurer.measure_dense(dense))
            self.measurer.names = tuple(self.dense().metrics)
            if dense is None:
                self._judge_again()
            todo = [e for e in baselines if e.state == "told" and e is not dense]
            stage.advance(len(baselines) - len(todo))
            self._measure(todo, stage, self.budget.spent() + BASELINES * self.budget.to_search())
        self._doubt_metrics()
        self.costs.fit(self.search.told)

    def _tell_until(self, count: int, stage: Stage, until: float) -> bool:
        """Tell trials up to a number, as many at once as there are scorers; False when the time is up or the space exhausted.

        ``until`` in seconds of the run's.
        """
        for evaluation in self._tell(self._ask(count - len(self.search.told), until)):
            stage.advance(note=f"KL {evaluation.kl:.4f}" if evaluation.kl is not None else "failed")
        return len(self.search.told) >= count

    def _ask_until(self, missing: set[str]) -> Iterator[Asked]:
        """Trials, until all of these candidates were among them."""
        while missing and (asked := self.search.ask()) is not None:
            missing.discard(asked.candidate.id)
            yield asked

    def _ask(self, count: int, until: float) -> Iterator[Asked]:
        for _ in range(count):
            if self.budget.spent() > until or (asked := self.search.ask()) is None:
                return
            yield asked

    def _tell(self, asked: Iterable[Asked]) -> Iterator[Evaluation]:
        """Score trials and tell what came of them, in their order; what is asked next knows of all but the last few."""
        begun: deque[Evaluation] = deque()

        def work() -> Iterator[_Work]:
            for one in asked:
                begun.append(self._thought(one))
                yield begun[-1].candidate, self._hopeless(begun[-1])

        for divergence, failure, seconds in self.scorers.map(work()):
            evaluation = begun.popleft()
            if divergence is None:
                evaluation = replace(evaluation, state="failed", failure=failure)
            else:
                evaluation = replace(evaluation, kl=divergence, seconds_spent=seconds)
            self.search.tell(evaluation.trial, evaluation)
            yield evaluation

    def _thought(self, asked: Asked) -> Evaluation:
        """What is known of a trial before it is looked at."""
        cost = self.costs.problem().cost(self.space.normalise(asked.candidate))
        predicted = self.costs.predict(asked.candidate)
        return Evaluation(asked.trial, asked.candidate, asked.source, "told", cost.error, cost.bytes, predicted)

    def _score(self, work: _Work) -> _Scored:
        from autocomp.accuracy.proxy import stitch_and_score

        start = time.perf_counter()
        try:
            divergence = stitch_and_score(self.task.model, self.graph, self.database, *work)[1]
        except Exception as error:  # the model's own code runs here
            return None, reason_of(error), time.perf_counter() - start
        return divergence, "", time.perf_counter() - start

    def _hopeless(self, evaluation: Evaluation) -> float:
        """The divergence above which a candidate is beaten for certain: by one that was told and is predicted no slower."""
        if (
            _is_baseline(evaluation.source) or len(self.devices) > 1
        ):  # one beaten on the whole may still be the best on one target
            return float(np.inf)
        seconds = next(iter(self.costs.relative([evaluation.candidate]).values()))[0]
        values = self.search.values()  # NaN for what failed
        return DOMINATED * float(values[values[:, 1] <= seconds, 0].min(initial=np.inf))

    def _measure_until(self, count: int, anyhow: bool = False) -> None:
        """Measure told candidates, the most promising first, until ``count`` of them (baselines aside) are measured or failed.

        Not past the time to search, unless ``anyhow``.
        """
        while anyhow or not self.budget.late(self._group_seconds):
            searched = [e for e in self.search.told if not _is_baseline(e.source)]
            spent = sum(e.state != "told" for e in searched)
            waiting = [e for e in searched if e.state == "told" and e.kl is not None and np.isfinite(e.kl)]
            if spent >= count or not waiting:
                return
            chosen = self._promising(waiting, count - spent)
            if not chosen:
                return
            with self.progress.stage("measuring", len(chosen)) as stage:
                until = np.inf if anyhow else self.budget.spent() + self.budget.to_search()
                self._measure([waiting[index] for index in chosen], stage, until)
            self.costs.fit(self.search.told)

    def _promising(self, waiting: Sequence[Evaluation], count: int) -> list[int]:
        """Which told candidates to measure: those that would add most to what is measured, each profile choosing its part."""
        measured = [e for e in self.search.told if e.state == "measured" and e.kl is not None]
        dense, seconds = self.dense(), self.costs.relative([e.candidate for e in waiting])
        objective = next(iter(dense.metrics))
        useful = useful_divergence(measured, dense, self.settings.goals, objective, self.task.higher_is_better)
        chosen: list[int] = []
        for share, (profile, relative) in enumerate(seconds.items(), 1):
            points = np.array([(e.kl, np.log(its)) for e, its in zip(waiting, relative, strict=True)])
            if self.settings.deterministic:
                times = self.costs.relative([e.candidate for e in measured])[profile]
            else:
                times = [e.latency[profile].seconds / dense.latency[profile].seconds for e in measured]
            known = np.array([(e.kl, np.log(its)) for e, its in zip(measured, times, strict=True)])
            want = count * share // len(seconds) - len(chosen)
            for part, corner in ((want - want // DEEP, useful), (want // DEEP, max(useful, UNKNOWN))):
                taken = np.concatenate([known, points[chosen]]) if chosen else known
                free = [index for index in range(len(points)) if index not in chosen]
                chosen += [free[k] for k in promising(points[free], taken, part, (corner, 0.0))]
        return chosen

    def _measure(self, evaluations: Sequence[Evaluation], stage: Stage, until: float) -> None:
        """Measure told candidates, but no group of them that would take longer than ``until``, in seconds of the run's.

        A failure is recorded with its candidate, and the search goes on.
        """
        together = self.measurer.together
        for start in range(0, len(evaluations), together):
            begun = self.budget.spent()
            if begun + self._group_seconds > until:
                return
            for done in self.measurer.measure_all(evaluations[start : start + together]):
                if done.state == "failed":
                    self.progress.warn(f"candidate {done.candidate.id} failed: {done.failure}")
                self.search.update(done.trial, done)
                stage.advance()
            self._group_seconds = self.budget.spent() - begun


def _open_device(name: str, stage: Stage) -> Device:
    device = open_device(load_profile(name))
    if device.store.corrupt:
        stage.warn(f"{device.store.corrupt} damaged records of the kernel store {device.store.folder} are tuned again")
        device.store.compact()
    for note in device.notes:
        stage.warn(note)
    stage.advance()
    return device


def _is_baseline(source: Source) -> bool:
    return source in ("dense", "uniform")
