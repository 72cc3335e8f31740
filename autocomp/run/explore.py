"""The second part of a run, the search itself: baselines, seeds, and rounds of telling and measuring until the budgets are spent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace

import numpy as np
from threadpoolctl import threadpool_limits

from autocomp.front.goals import Judge, family
from autocomp.front.pareto import promising
from autocomp.processes.pool import cores, map_in_processes
from autocomp.progress import Stage
from autocomp.records.candidate import Candidate, Method
from autocomp.records.evaluation import Evaluation, Source
from autocomp.records.precisions import FORMATS, FP32
from autocomp.run.budget import BASELINES, TELLING
from autocomp.run.entrants import LEFT
from autocomp.run.expect import expect
from autocomp.run.finer import refine
from autocomp.run.found import Found, is_baseline
from autocomp.run.prepare import Prepared
from autocomp.run.tell import Teller
from autocomp.study.aims import Known, aims, choose, worth
from autocomp.study.samplers import OURS
from autocomp.study.solver import solve_front
from autocomp.study.study import Asked
from autocomp.study.useful import MOST, UNKNOWN, of_use, useful_divergence

# What steers a search. Where nothing else is said, chosen by hand, not measured.
UNIFORM_KEEPS = (1.0, 0.75, 0.5, 0.25)  # the baselines: one ratio for every group, in fp32 and in int8
SOLVER_SEEDS = 40
SEEDS_AGAIN = 12  # at most, after each round of measurement
FITTED = 64  # candidates stitched to fit tier 0 before the solver is first asked, where the budget of trials is four times that
FITTING = 0.1  # of the time to search at most for that fit, where minutes are set
DEEP = 4  # one in so many measurements looks for what is fast at whatever loss within `UNKNOWN`; the others at what is of use
SHARE = 1.5  # error rates may be a little above 1
FRONT_EVERY = 4  # one lot of measurements in so many is for the front around the goals
FINER = 4  # times as many seeds are solved for where only those near the goals are taken
BASELINES_TOGETHER = (
    2  # times as many as of others: nothing is learnt between them, and kernels are tuned in fewer rounds
)
MEASURE_ROUNDS = 4  # the budget of measurements is spent in rounds, each choosing by all that is known then


def explore(prepared: Prepared) -> Found:
    """Search a prepared run until its budgets are spent. What is found is written to the run's study as it goes; close it.

    AutocompError if the uncompressed model cannot be measured, UsageError if the study is of another run, or cannot be written.
    """
    found = Found(prepared)
    try:
        # Proposals are small products: on several threads, beside the scorers, they would wait for a core most of their time.
        with closing(Teller(found)) as teller, threadpool_limits(1, "blas"):
            _Explorer(found, teller).explore()
    except BaseException:
        found.close()
        raise
    return found


class _Explorer:
    """The steps of one search. After each round of measurement the solver is asked again, at what is fitted by then."""

    def __init__(self, found: Found, teller: Teller) -> None:
        self.found, self.teller, self.prepared = found, teller, found.prepared
        self.search, self.costs = found.search, found.costs
        self.settings, self.progress, self.budget = self.prepared.settings, self.prepared.progress, self.prepared.budget
        self.space, self.measurer = self.prepared.space, self.prepared.measurer
        self._lots = 0  # lots of measurements so far: those that are compiled and timed together
        self._lot_seconds = 0.0  # that measuring a lot of candidates last took

    @property
    def _ours(self) -> bool:
        """Whether the engine is autocomp's, which the solver belongs to; another sampler is left to itself."""
        return self.prepared.sampler is None and self.settings.sampler == OURS

    @property
    def judge(self) -> Judge:
        return self.found.judge()

    def explore(self) -> None:
        if self.prepared.replayed:
            self._baselines([])
            self._replay()
        else:
            expect(self.found, self._fit_additive())
            self._baselines(self._uniform())
            self._trained_elsewhere()
            if self._ours:
                self._seed()
            self._search()
        if not self.budget.late():
            self.found.judge_again(later=True)
        self.found.doubt_metrics()
        self._predict_anew()

    def _fit_additive(self) -> float | None:
        """Fit tier 0 to the divergence of random candidates on few samples; a resumed run reads what was found before.

        Returns the seconds that each of them took, None where none was looked at.
        """
        from autocomp.accuracy.additive import ENOUGH

        count = min(FITTED, self.settings.trials // 4)
        if count < ENOUGH or self.space.size < count or self.budget.late():
            return None
        rng = np.random.default_rng(self.settings.seed)
        drawn = [self.space.draw(rng) for _ in range(count)]
        known: list[float] = self.search.get_attr("tier0", [])
        took = None
        if len(known) != count:
            known, begun = [], self.budget.spent()
            with self.progress.stage("fitting the additive model", count) as stage:
                until = self.budget.spent() + FITTING * self.budget.to_search()
                for value in map_in_processes(self._score_early, drawn, cores()):
                    known.append(value if np.isfinite(value) else -1.0)  # -1 says nothing: the fit leaves it out
                    stage.advance()
                    if self.budget.spent() > until:
                        break
            self.search.set_attr("tier0", known)
            took = (self.budget.spent() - begun) / len(known)
        self.costs.observe(drawn[: len(known)], known)
        self.costs.fit(self.search.told)
        return took

    def _score_early(self, candidate: Candidate) -> float:
        from autocomp.accuracy.proxy import score_early

        prepared = self.prepared
        return score_early(prepared.task.model, prepared.graph, prepared.database, candidate)

    def _uniform(self) -> list[Candidate]:
        """The compressions that treat all layers alike."""
        offered = {method for methods in self.space.methods.values() for method in methods}
        precisions = [
            name for name, form in FORMATS.items() if form.baseline and (name == FP32 or Method(name) in offered)
        ]
        return [self.space.uniform(keep, precision) for precision in precisions for keep in UNIFORM_KEEPS]

    def _baselines(self, uniform: Sequence[Candidate]) -> None:
        """Tell and measure dense and the uniform compressions: they stand beside the front, and fit the latency models."""
        with self.progress.stage("measuring baselines", 1 + len(uniform)) as stage:
            self._tell([(self.space.dense(), "dense"), *((candidate, "uniform") for candidate in uniform)])
            baselines = [e for e in self.search.told if is_baseline(e.source)]
            stage.advance(1 + len(uniform) - len(baselines))  # some are the same
            dense = next((e for e in baselines if e.source == "dense" and e.state == "told"), None)
            if dense is not None:  # a failure here is the run's
                self.search.update(dense.trial, self.measurer.measure_dense(dense))
            self.measurer.names = tuple(self.found.dense().metrics)
            self._doubt_unit()
            for goal in self.judge.met_by_dense():
                self.progress.warn(f"the uncompressed model meets the goal {goal} already: it asks for nothing")
            for goal in self.judge.that_allow_nothing():
                self.progress.warn(
                    f"{goal} is nothing, since the uncompressed model's is 0: state what may be lost in points (0.5pt) or in its own units"
                )
            if dense is None:
                self.found.judge_again()
            todo = [e for e in baselines if e.state == "told" and e is not dense]
            stage.advance(len(baselines) - len(todo))
            until = self.budget.spent() + BASELINES * self.budget.to_search()
            self._measure(todo, stage, until, BASELINES_TOGETHER * self.measurer.together)
        self.found.doubt_metrics()
        self.costs.fit(self.search.told)

    def _doubt_unit(self) -> None:
        """Warn of an objective that is in percent where a share is due: what goals allow would be a hundredth of what is meant."""
        task, value = self.prepared.task, self.found.dense().metrics[self.judge.objective]
        if task.unit == "%" and abs(value) > SHARE:
            self.progress.warn(
                f"{self.judge.objective} of the uncompressed model is {value:.6g}, but Task.unit '%' says that it is a share between 0 and 1: "
                "return shares (0.97), or give another unit (points); goals in pt or % are read as shares too"
            )

    def _trained_elsewhere(self) -> None:
        """Measure here what was trained, and measured, on another machine: its weights are as good as they were."""
        todo = [e for e in self._searched() if e.state == "told" and e.recovered is not None]
        if todo:
            with self.progress.stage("measuring what was trained", len(todo)) as stage:
                self._measure(todo, stage, np.inf)

    def _replay(self) -> None:
        """Tell and measure what another run found."""
        with self.progress.stage("measuring what is replayed", len(self.prepared.replayed)) as stage:
            self._tell([(choice.candidate, "replay") for choice in self.prepared.replayed])
            todo = [e for e in self._searched() if e.state == "told"]
            stage.advance(len(self.prepared.replayed) - len(todo))
            self._measure(todo, stage, np.inf)
        self.costs.fit(self.search.told)

    def _tell(self, chosen: Sequence[tuple[Candidate, Source]]) -> None:
        """Tell these candidates, but those that a start before this one told."""
        for candidate, source in chosen:
            self.search.enqueue(candidate, source)
        missing = {candidate.id for candidate, _ in chosen} - {
            evaluation.candidate.id for evaluation in self.search.told
        }
        list(self.teller.tell(self._ask_until(missing)))

    def _ask_until(self, missing: set[str]) -> Iterator[Asked]:
        """Trials, until all of these candidates were among them."""
        while missing and (asked := self.search.ask()) is not None:
            missing.discard(asked.candidate.id)
            yield asked

    def _seed(self) -> None:
        with self.progress.stage("solving for seeds"):
            problems = self.costs.problems()
            for problem in problems:
                for candidate in solve_front(problem, -(-SOLVER_SEEDS // len(problems))):
                    self.search.enqueue(candidate, "solver")

    def _search(self) -> None:
        """Rounds of telling and measuring. Where minutes are set, each round gets its part of them, and half of that for telling."""
        trials, budget = self.settings.trials, self.settings.measurements
        with self.progress.stage("searching", trials) as stage:
            stage.advance(len(self.search.told))
            for part in range(1, MEASURE_ROUNDS + 1):
                until = self.budget.spent() + TELLING * self.budget.to_search() / (MEASURE_ROUNDS + 1 - part)
                told = self._tell_until(trials * part // MEASURE_ROUNDS, stage, until)
                self._measure_until(budget * part // MEASURE_ROUNDS)
                if self._met():
                    break
                finer = part < MEASURE_ROUNDS and self._ours and refine(self.found)
                if not told and not finer and (self.budget.minutes is None or self.budget.late()):
                    break
                for candidate in self._seeds_again() if part < MEASURE_ROUNDS else ():
                    self.search.enqueue(candidate, "solver")
            self._measure_until(budget)
            self._say_what_is_of_no_use()
            if self.budget.minutes is not None:
                self._least(stage)
                self._say_what_was_left()

    def _seeds_again(self) -> list[Candidate]:
        """The solver's answers at what is fitted by now, where the engine is ours.

        With a goal on the objective those about as far from dense as that allows, after training where the run trains.
        """
        if not self._ours:
            return []
        if self.judge.objective not in self.judge.max_drops:
            return solve_front(self.costs.problem(), SEEDS_AGAIN)
        problem = self.costs.problem()
        useful = useful_divergence(self.found.measured(), self.judge)
        most = useful / LEFT if self.settings.training[0] else useful
        near = [c for c in solve_front(problem, FINER * SEEDS_AGAIN) if useful / FINER < problem.cost(c).error < most]
        return near[:: max(1, len(near) // SEEDS_AGAIN)][:SEEDS_AGAIN]

    def _tell_until(self, count: int, stage: Stage, until: float) -> bool:
        """Tell trials up to a number, as many at once as there are scorers; False when the time is up or the space exhausted.

        ``until`` in seconds of the run's.
        """
        for evaluation in self.teller.tell(self.teller.ask(count - len(self.search.told), until)):
            stage.advance(note=f"KL {evaluation.kl:.4f}" if evaluation.kl is not None else "failed")
        return len(self.search.told) >= count

    def _measure_until(self, count: int, anyhow: bool = False) -> None:
        """Measure told candidates, the most promising first, until ``count`` of them (baselines aside) are measured or failed.

        Not past the time to search, unless ``anyhow``.
        """
        while (anyhow or not self.budget.late(self._lot_seconds)) and not self._met():
            searched = self._searched()
            spent = sum(e.state != "told" for e in searched)
            waiting = [e for e in of_use(searched) if e.state == "told"]
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
        """Which told candidates to measure next: for the goals, where there are some, and else what adds most to what is measured.

        With goals only one lot is chosen, since what is measured changes what is worth it; one in `FRONT_EVERY` is for the front around.
        """
        measured = self.found.measured()
        seconds = self.costs.relative([e.candidate for e in waiting])
        judge = self.found.steering_judge()
        wanted = aims(judge, list(seconds), self.settings.speedups)
        if not wanted:
            return self._for_the_front(waiting, seconds, measured, count)
        count = min(count, self.measurer.together)
        here, there = Known.of(waiting, seconds), Known.of(measured, self._relative(measured))
        predicted = Known.of(measured, self.costs.relative([e.candidate for e in measured])).seconds
        steered = self.found.steered(measured)
        worths = [worth(aim, judge, here, steered, there, predicted) for aim in wanted]
        self._lots += 1
        chosen = [] if self._lots % FRONT_EVERY == 0 else choose(worths, here, count)
        return chosen or self._for_the_front(waiting, seconds, measured, count)

    def _for_the_front(
        self,
        waiting: Sequence[Evaluation],
        seconds: Mapping[str, Sequence[float]],
        measured: Sequence[Evaluation],
        count: int,
    ) -> list[int]:
        """Which told candidates would add most to what is measured, each profile choosing its part."""
        useful, times = useful_divergence(measured, self.judge), self._relative(measured)
        chosen: list[int] = []
        for share, (profile, relative) in enumerate(seconds.items(), 1):
            points = np.array([(e.kl, np.log(its)) for e, its in zip(waiting, relative, strict=True)])
            known = np.array([(e.kl, np.log(its)) for e, its in zip(measured, times[profile], strict=True)])
            want = count * share // len(seconds) - len(chosen)
            for part, corner in ((want - want // DEEP, useful), (want // DEEP, max(useful, UNKNOWN))):
                taken = np.concatenate([known, points[chosen]]) if chosen else known
                free = [index for index in range(len(points)) if index not in chosen]
                chosen += [free[k] for k in promising(points[free], taken, part, (corner, 0.0))]
        return chosen

    def _relative(self, measured: Sequence[Evaluation]) -> Mapping[str, Sequence[float]]:
        """Seconds over dense's by profile, as they steer: measured, or predicted in a deterministic run."""
        dense, steered = self.found.steering_judge().dense.latency, self.found.steered(measured)
        return {name: [e.latency[name].seconds / its.seconds for e in steered] for name, its in dense.items()}

    def _met(self) -> bool:
        """Whether the search may end early: what is measured meets the goals, and every member of the family is there."""
        if not self.settings.stop_when_met:
            return False
        quiet = [e for e in self.search.told if e.state == "measured" and not e.noisy and not is_baseline(e.source)]
        members = family(self.judge, quiet, self.settings.speedups, list(self.prepared.devices)).values()
        return any(self.judge.feasible(e) for e in quiet) and all(member is not None for member in members)

    def _measure(self, evaluations: Sequence[Evaluation], stage: Stage, until: float, together: int = 0) -> None:
        """Measure told candidates, but no lot of them that would take longer than ``until``, in seconds of the run's.

        A failure is recorded with its candidate, and the search goes on.
        """
        usual = self.measurer.together
        together = together or usual
        for start in range(0, len(evaluations), together):
            begun = self.budget.spent()
            lot = evaluations[start : start + together]
            if begun + self._lot_seconds * len(lot) / usual > until:
                return
            stage.advance(len(self.found.measure(lot)))
            self._lot_seconds = (self.budget.spent() - begun) * usual / len(lot)

    def _least(self, stage: Stage) -> None:
        """What is searched however late it is: some of the solver's seeds, and one lot of them measured. A front of nothing is none."""
        searched = self._searched()
        if any(e.state != "told" for e in searched):
            return
        together = self.measurer.together
        if not searched:
            count = min(4 * together, self.settings.trials - len(self.search.told))
            for _ in self.teller.tell(self.teller.ask(count, np.inf)):
                stage.advance()
        self._measure_until(min(together, self.settings.measurements), anyhow=True)

    def _say_what_is_of_no_use(self) -> None:
        searched, wanted = self._searched(), self.settings.measurements
        done = sum(e.state != "told" for e in searched)
        far = sum(e.state == "told" for e in searched)
        if done < wanted and far and all(e.state != "told" for e in of_use(searched)):
            self.progress.warn(
                f"{done} of {wanted} measurements were made: the other {far} candidates told are more than {MOST:g} nat from the "
                f"uncompressed model, which is about chance"
            )

    def _say_what_was_left(self) -> None:
        told, trials = len(self.search.told), self.settings.trials
        done = sum(e.state != "told" for e in self._searched())
        if self.budget.late(self._lot_seconds) and (told < trials or done < self.settings.measurements):
            self.progress.warn(
                f"--minutes {self.budget.minutes:g} ended the search after {told} of {trials} trials, {done} of "
                f"{self.settings.measurements} measured"
            )

    def _searched(self) -> list[Evaluation]:
        return [e for e in self.search.told if not is_baseline(e.source)]

    def _predict_anew(self) -> None:
        """The final model's predictions, to be held against what was measured."""
        self.costs.fit(self.search.told)
        errors = self.costs.held_out_errors(self.search.told)
        for evaluation in self.search.told:
            if evaluation.state == "measured":
                predicted = self.costs.predict(evaluation.candidate)
                error = errors.get(evaluation.trial, evaluation.error)
                self.search.update(evaluation.trial, replace(evaluation, predicted=predicted, error=error))
