"""The main job, stage after stage: task → graph → space → layer database → study → measured candidates.

All that a run finds lies in its study (``study.db``): what was told, what was measured, the references. A run that is stopped
anywhere and resumed goes through the same stages, finds what is there, and does the rest.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from threadpoolctl import threadpool_limits

from autocomp.config import Settings
from autocomp.costs import Costs
from autocomp.devices.device import Device, open_device
from autocomp.errors import AutocompError
from autocomp.hardware import load_profile
from autocomp.measure import Measurer
from autocomp.processes import Workers, cores, map_in_processes
from autocomp.progress import Progress, Stage
from autocomp.records import Candidate, Evaluation, Method, Precision, Source
from autocomp.search.pareto import promising
from autocomp.search.solver import solve_front
from autocomp.search.study import Asked, Search, Space, open_search
from autocomp.space import build_space
from autocomp.space_file import load_space
from autocomp.task import Task

if TYPE_CHECKING:
    import torch

    from autocomp.graph import Graph

UNIFORM_KEEPS = (1.0, 0.75, 0.5, 0.25)  # the baselines: one ratio for every group, in fp32 and in int8
SOLVER_SEEDS = 40
SEEDS_AGAIN = 12  # at most, after each round of measurement
FITTED = 64  # candidates stitched to fit tier 0 before the solver is first asked, where the budget of trials is four times that
DOMINATED = 1.25  # times the KL of a told candidate thought to be faster: on 64 samples, reason enough to look at no more of them
USEFUL = 0.25  # KL in nats: past it, a model answers so differently that its latency is measured only if there is nothing better
MEASURE_ROUNDS = 4  # the budget of measurements is spent in rounds, each choosing by all that is known then
CHECKED_SAMPLES = 4  # inputs on which a compiled module is compared with torch

_Work = tuple[Candidate, float]  # and the KL above which it is not looked at any closer
_Scored = tuple[float | None, str, float]  # KL, or None and why; seconds


class Pipeline:
    """One run. Made anew for each start; what it finds is written to the run's study as it goes."""

    def __init__(self, settings: Settings, task: Task, folder: Path, resume: bool, progress: Progress) -> None:
        from autocomp.accuracy.calibrate import collect
        from autocomp.compress.database import LayerDatabase
        from autocomp.graph import analyse

        self.settings, self.folder, self.progress = settings, folder, progress
        self.deadline = time.monotonic() + settings.minutes * 60 if settings.minutes else None
        task.model.eval()
        with progress.stage("preparing devices", len(settings.profiles)) as stage:
            self.devices = {name: _open_device(name, stage) for name in settings.profiles}
        with progress.stage("reading the model"):
            self.graph = analyse(task.model, task.example_inputs)
            profiles = [device.profile for device in self.devices.values()]
            rules = load_space(settings.space)
            self.space = build_space(self.graph, rules, profiles)
        if rules.equalise:
            with progress.stage("equalising channels"):
                task = _equalised(task, self.graph)
        self.task = task
        with progress.stage("calibrating"):
            self.statistics = collect(task, self.graph, settings.calibration_samples, settings.seed)
        self.database = LayerDatabase(folder / "layers", task.model, self.graph, self.space, self.statistics)
        self.database.build(progress, workers=cores())
        self.space = self.space.without(self.database.dominated(profiles))
        self.costs = Costs(self.graph, self.space, self.database.tables(self.space), self.devices)
        self.inputs = check_inputs(task)
        self.measurer = Measurer(task, self.devices, self.inputs, self.stitch)
        self.scorers = Workers(self._score, cores())
        self.search = self._open_search(resume)

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
        self.costs.fit(self.search.told)
        errors = self.costs.held_out_errors(self.search.told)
        for evaluation in self.search.told:  # the final model's predictions, to be held against what was measured
            if evaluation.state == "measured":
                predicted = self.costs.predict(evaluation.candidate)
                error = errors.get(evaluation.trial, evaluation.error)
                self.search.update(evaluation.trial, replace(evaluation, predicted=predicted, error=error))

    def _seed(self) -> None:
        with self.progress.stage("solving for seeds"):
            problems = self.costs.problems()
            for problem in problems:
                for candidate in solve_front(problem, -(-SOLVER_SEEDS // len(problems))):
                    self.search.enqueue(candidate, "solver")

    def _search(self) -> None:
        trials, budget = self.settings.trials, self.settings.measure
        with self.progress.stage("searching", trials) as stage:
            stage.advance(len(self.search.told))
            for part in range(1, MEASURE_ROUNDS + 1):
                if not self._tell_until(trials * part // MEASURE_ROUNDS, stage):
                    break
                self._measure_until(budget * part // MEASURE_ROUNDS)
                for candidate in solve_front(self.costs.problem(), SEEDS_AGAIN) if part < MEASURE_ROUNDS else ():
                    self.search.enqueue(candidate, "solver")
            self._measure_until(budget)

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
        from autocomp.compress.apply import stitch

        return stitch(self.task.model, self.graph, self.database, candidate)

    def _open_search(self, resume: bool) -> Search:
        storage = self.settings.storage or f"sqlite:///{self.folder / 'study.db'}"
        name = self.folder.name if self.settings.storage else "autocomp"
        resume = resume and (bool(self.settings.storage) or (self.folder / "study.db").exists())
        levels = Space(self.space.widths, self.space.methods)
        return open_search(storage, name, levels, self.settings.seed, resume, self.costs.problem, self.space.normalise)

    def _fit_additive(self) -> None:
        """Fit tier 0 to the divergence of random candidates on few samples; a resumed run reads what was found before."""
        from autocomp.accuracy.additive import ENOUGH

        count = min(FITTED, self.settings.trials // 4)
        if count < ENOUGH or self.space.size < count:
            return
        rng = np.random.default_rng(self.settings.seed)
        drawn = [self.space.draw(rng) for _ in range(count)]
        known: list[float] = self.search.get_attr("tier0", [])
        if len(known) != count:
            known = []
            with self.progress.stage("fitting the additive model", count) as stage:
                for value in map_in_processes(self._score_early, drawn, cores()):
                    known.append(value if np.isfinite(value) else -1.0)  # -1 says nothing: the fit leaves it out
                    stage.advance()
            self.search.set_attr("tier0", known)
        self.costs.observe(drawn, known)
        self.costs.fit(self.search.told)

    def _score_early(self, candidate: Candidate) -> float:
        from autocomp.accuracy.proxy import score_early

        try:
            return score_early(self.task.model, self.graph, self.database, candidate)
        except (AutocompError, RuntimeError):
            return float("nan")

    def _baselines(self) -> None:
        """Tell and measure dense and the uniform compressions: they stand beside the front, and fit the latency models."""
        precisions: list[Precision] = ["fp32"]
        if any(Method("w8a8") in methods for methods in self.space.methods.values()):
            precisions.append("w8a8")
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
                self.search.update(dense.trial, self.measurer.measure(dense))
            todo = [e for e in baselines if e.state == "told" and e is not dense]
            stage.advance(len(baselines) - len(todo))
            self._measure(todo, stage)
        self.dense()
        self.costs.fit(self.search.told)

    def _tell_until(self, count: int, stage: Stage) -> bool:
        """Tell trials up to a number, as many at once as there are scorers; False when the time is up or the space exhausted."""
        for evaluation in self._tell(self._ask(count - len(self.search.told))):
            stage.advance(note=f"KL {evaluation.kl:.4f}" if evaluation.kl is not None else "failed")
        return len(self.search.told) >= count

    def _ask_until(self, missing: set[str]) -> Iterator[Asked]:
        """Trials, until all of these candidates were among them."""
        while missing and (asked := self.search.ask()) is not None:
            missing.discard(asked.candidate.id)
            yield asked

    def _ask(self, count: int) -> Iterator[Asked]:
        for _ in range(count):
            if self._late() or (asked := self.search.ask()) is None:
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
        except (AutocompError, RuntimeError) as error:
            return None, str(error), time.perf_counter() - start
        return divergence, "", time.perf_counter() - start

    def _hopeless(self, evaluation: Evaluation) -> float:
        """The KL above which a candidate is beaten for certain: by one that was told and is predicted no slower."""
        if (
            _is_baseline(evaluation.source) or len(self.devices) > 1
        ):  # one beaten on the whole may still be the best on one target
            return float(np.inf)
        seconds = next(iter(self.costs.relative([evaluation.candidate]).values()))[0]
        values = self.search.values()  # NaN for what failed
        return DOMINATED * float(values[values[:, 1] <= seconds, 0].min(initial=np.inf))

    def _measure_until(self, count: int) -> None:
        """Measure told candidates, the most promising first, until ``count`` of them (baselines aside) are measured or failed."""
        while not self._late():
            searched = [e for e in self.search.told if not _is_baseline(e.source)]
            spent = sum(e.state != "told" for e in searched)
            waiting = [e for e in searched if e.state == "told" and e.kl is not None and np.isfinite(e.kl)]
            if spent >= count or not waiting:
                return
            chosen = self._promising(waiting, count - spent)
            if not chosen:
                return
            with self.progress.stage("measuring", len(chosen)) as stage:
                self._measure([waiting[index] for index in chosen], stage)
            self.costs.fit(self.search.told)

    def _promising(self, waiting: Sequence[Evaluation], count: int) -> list[int]:
        """Which told candidates to measure: those that would add most to what is measured, each profile choosing its part."""
        measured = [e for e in self.search.told if e.state == "measured" and e.kl is not None]
        dense, seconds = self.dense(), self.costs.relative([e.candidate for e in waiting])
        chosen: list[int] = []
        for share, (profile, relative) in enumerate(seconds.items(), 1):
            points = np.array([(e.kl, np.log(its)) for e, its in zip(waiting, relative, strict=True)])
            full = dense.latency[profile].seconds
            known = np.array([(e.kl, np.log(e.latency[profile].seconds / full)) for e in measured])
            want = count * share // len(seconds) - len(chosen)
            chosen += [index for index in promising(points, known, want, (USEFUL, 0.0)) if index not in chosen]
        return chosen

    def _measure(self, evaluations: Sequence[Evaluation], stage: Stage) -> None:
        """Measure told candidates until the time is up. A failure is recorded with its candidate, and the search goes on."""
        together = self.measurer.together
        for first in range(0, len(evaluations), together):
            if self._late():
                return
            for done in self.measurer.measure_all(evaluations[first : first + together]):
                if done.state == "failed":
                    self.progress.warn(f"candidate {done.candidate.id} failed: {done.failure}")
                self.search.update(done.trial, done)
                stage.advance()

    def _late(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline


def _equalised(task: Task, graph: Graph) -> Task:
    """The task with the channels of its model brought to like ranges; the model computes what it did."""
    from autocomp.compress.equalise import equalised

    return replace(task, model=equalised(task.model, graph, task.example_inputs, list(task.calibration))[0])


def check_inputs(task: Task) -> list[tuple[torch.Tensor, ...]]:
    """The example inputs and some calibration samples of the same shapes, on which modules are compared with torch."""
    size = len(task.example_inputs[0])
    inputs = [task.example_inputs]
    for batch in task.calibration:
        for start in range(0, len(batch[0]) - size + 1, size):
            if len(inputs) > CHECKED_SAMPLES:
                return inputs
            inputs.append(tuple(tensor[start : start + size] for tensor in batch))
    return inputs


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
