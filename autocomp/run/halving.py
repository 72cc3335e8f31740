"""The third part of a run: candidates are trained, in rounds of which the most promising half goes on.

Successive halving (Jamieson & Talwalkar 2016, arXiv:1502.07943): all are trained for a while, those that promise the most for longer. What each
round comes to lies in the study, and its weights in the run folder, so a run that was stopped goes on.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autocomp.measurement.measurer import reason_of
from autocomp.processes.outcome import Outcome
from autocomp.processes.pool import Workers, cores
from autocomp.records.evaluation import Evaluation, untrained
from autocomp.records.recovery import (
    Entrant,
    RecoverySummary,
    recovery_summary_to_json,
)
from autocomp.recovery.recipe import Recipe
from autocomp.recovery.schedules import DRAWING, Span
from autocomp.run.entrants import drafted, entrants, survivors, trainable
from autocomp.run.folder import LOST
from autocomp.run.jobs import FOLDER, Done, Job, renewed, trained
from autocomp.run.predictor import ENOUGH, features, fitted, little, predictions
from autocomp.run.taught import refuse_other_lessons
from autocomp.tasks.task import evaluate_task

if TYPE_CHECKING:
    from autocomp.recovery.lessons import Teaching
    from autocomp.recovery.rate import Rates
    from autocomp.run.found import Found
    from autocomp.run.prepare import Prepared
    from autocomp.tasks.reading import Metrics

# Chosen by hand, not measured.
RECIPES = "recipes"  # the study's attribute: what each that points were trained by says, by its name
SHARES = (0.3, 0.3, 0.4)  # of the stage's time, or of a finalist's steps, in each round
KEEP = 0.5  # of the candidates that go on after each round
MOST = 16  # candidates that enter
FIRST_STEPS = 80  # of each in the first round at least, or fewer enter
MANY = 8  # that enter where the length is stated in steps


class Stage:
    """The trainings of one run. ``chosen`` are the trials that are trained; the stage chooses them itself unless they are given."""

    def __init__(
        self, prepared: Prepared, found: Found, recipe: Recipe, length: tuple[float, str], chosen: Sequence[int] | None
    ) -> None:
        self.prepared, self.found, self.recipe = prepared, found, recipe
        self.amount, self.unit = length
        self.chosen = chosen
        self.folder = prepared.folder / FOLDER
        text = f"{recipe.model_dump_json()} {length} {sorted(chosen or [])}"
        self.key = f"recovery:{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        self.before = float(
            found.search.get_attr(f"{self.key}:seconds", 0.0)
        )  # that earlier starts of the run spent here
        self.start = time.monotonic()
        self._stop: Any = None

    def run(self) -> None:
        """Train, and keep what is better; a run that is resumed goes on where it was."""
        if self.done:
            return
        if self._lost():
            self.before = 0.0
        try:
            self._run()
        finally:
            self.found.search.set_attr(f"{self.key}:seconds", self.spent())

    @property
    def done(self) -> bool:
        """Whether it was, by an earlier start, and what points that were named learnt is there still."""
        return bool(self.found.search.get_attr(f"{self.key}:done")) and not (self.chosen is not None and self._lost())

    def _lost(self) -> list[str]:
        """Weights that are gone, of this stage or of the points that it was given: what it brought did not last."""
        ids = {e.candidate.id for e in self.found.told if e.trial in (self.chosen or ())}
        lost = self.found.search.get_attr(LOST, [])
        return [name for name in lost if f"-{self.mark}-" in name or Path(name).name.partition("-")[0] in ids]

    def found_since(self) -> int:
        """How many candidates were told after it was done."""
        return len(self.found.told) - int(self.found.search.get_attr(f"{self.key}:told", len(self.found.told)))

    def spent(self) -> float:
        """Seconds of this stage, over all starts of the run."""
        return self.before + time.monotonic() - self.start

    def left(self) -> float:
        """Seconds that the stage still has; infinite where its length is stated otherwise and the run has no minutes."""
        own = self.amount - self.spent() if self.unit == "seconds" else float("inf")
        return min(own, self.prepared.budget.to_search())

    def _run(self) -> None:
        search, progress = self.found.search, self.prepared.progress
        search.set_attr(
            RECIPES, {**search.get_attr(RECIPES, {}), self.recipe.name: self.recipe.model_dump(mode="json")}
        )
        with progress.stage("training: the teacher's answers"):
            teaching = self._teaching()
            refuse_other_lessons(self.found.search, f"{self.key}:taught", self.prepared.task, teaching)
        if (known := search.get_attr(f"{self.key}:entered")) is None:
            with progress.stage("training: the learning rate"):
                known = self._enter(teaching)
            if known is None:
                progress.warn(
                    "no candidate promises to be worth training: none that diverges from the uncompressed model is faster by so much that, "
                    "trained, it would be expected beyond what is measured"
                )
                return
            search.set_attr(f"{self.key}:entered", known)
        entered = self._by_trials(known["trials"])
        self.recipe = self.recipe.weighed(known.get("weights", {}))
        drops = self._rounds(entered, known.get("more", 0), teaching, known["rate"])
        entered = self._by_trials(list(drops))
        if not search.get_attr("recovery") or any(self._is_ours(e) for e in self.found.told):
            summary = self._summary(entered, drops, known["said"])
            search.set_attr("recovery", recovery_summary_to_json(summary))
        else:  # what an earlier training brought stands, and so does what is said of it
            progress.warn("training made no point better than it was: all stand as they were")
        lost = self._lost()
        search.set_attr(LOST, [name for name in search.get_attr(LOST, []) if name not in lost])
        search.set_attr(f"{self.key}:told", len(self.found.told))
        search.set_attr(f"{self.key}:done", True)

    def _teaching(self) -> Teaching:
        from autocomp.recovery.lessons import Teaching

        task = self.prepared.task
        teaching = replace(Teaching.of(task), calibration=self.prepared.statistics.batches)
        seconds = DRAWING * self.left() if self.left() < float("inf") else float("inf")
        teaching.lessons.draw(seconds)
        return teaching

    def _enter(self, teaching: Teaching) -> dict[str, Any] | None:
        """Who enters, and the learning rate that the one in the middle of them, by what it has lost, bears; None where nobody does."""
        from autocomp.recovery.one import reading
        from autocomp.recovery.rate import SEARCHING, search_rate
        from autocomp.recovery.weights import search_weights, steps_within

        if not (first := self._first(teaching)):
            return None
        middle = sorted(first, key=lambda e: e.kl or 0.0)[len(first) // 2]
        model = self.prepared.stitch_untrained(middle.candidate)
        most = SEARCHING * self.left()
        rates = search_rate(model, teaching, self.recipe, most)
        shared = self.prepared.shared_layers(middle.candidate)
        weights = search_weights(
            model, teaching, self.recipe, rates.taken, shared, lambda trained: reading(self.prepared.task, trained),
            steps_within(self.recipe, most, rates.step_seconds),
        )  # fmt: skip
        said = f"{rates}; weights: {weights}" if weights is not None else str(rates)
        count = self._count(teaching, rates, len(first))
        # the second half is chosen by what the first half came to
        more = count // 2 if self.chosen is None and count // 2 >= ENOUGH else 0
        return {
            "trials": [e.trial for e in first[: count - more]],
            "more": more,
            "rate": rates.taken,
            "said": said,
            "weights": dict(weights.taken) if weights is not None else {},
        }

    def _first(self, teaching: Teaching) -> list[Evaluation]:
        """Who may enter, most promising first."""
        if self.chosen is not None:
            return [untrained(e) for e in self.found.told if e.trial in self.chosen]
        return entrants(self.found, MOST if self.unit == "seconds" else MANY)

    def _count(self, teaching: Teaching, rates: Rates, most: int) -> int:
        """How many enter: each should have `FIRST_STEPS` steps in the first round. UsageError if there is no time for a single one."""
        from autocomp.recovery.one import refuse_too_short

        if self.unit != "seconds":
            refuse_too_short(Span(steps=self._steps(teaching)), rates.step_seconds, teaching)
            return most
        left = self.left()
        refuse_too_short(Span(seconds=max(0.0, left)), rates.step_seconds, teaching)
        if self.chosen is not None:
            return most
        each = FIRST_STEPS * max(rates.step_seconds, 1e-6)
        return max(1, min(most, int(SHARES[0] * left * self._workers(teaching) / each)))

    def _steps(self, teaching: Teaching) -> int:
        each = teaching.lessons.each_pass or FIRST_STEPS
        return int(self.amount * (each if self.unit == "epochs" else 1))

    def _workers(self, teaching: Teaching) -> int:
        """Trainings side by side; one where a loader of the task's own is gone through meanwhile, which may not bear to be forked."""
        return cores() if teaching.lessons.pool and not self.prepared.measurer.here else 1

    # --- rounds ---

    def _rounds(
        self, entered: list[Evaluation], more: int, teaching: Teaching, rate: float
    ) -> dict[int, list[float | None]]:
        """Train in rounds, ``more`` of them entering once the first ones are trained; what each lost of the objective after each round."""
        judge = self.found.judge()
        drops: dict[int, list[float | None]] = {e.trial: [] for e in entered}
        going = entered
        shares = SHARES if self.chosen is None else (1.0,)
        self._stop = _event()
        rounds = len(shares)
        for index, share in enumerate(shares):
            if index and self.chosen is None:
                going = survivors(
                    self.found, judge, {t: d[-1] for t, d in drops.items() if d and d[-1] is not None}, going,
                    max(1, round(len(going) * KEEP)), rounds - index,
                )  # fmt: skip
                going = self._measured(going)
            if not going:
                break
            rest = share / sum(shares[index:])
            said = f"training: round {index + 1} of {rounds}"
            if index == 0 and more:
                part = len(going) / (len(going) + more)
                drops |= self._round(said, going, index, rest * part, share, teaching, rate)
                others = self._drafted(going, drops, more)
                drops |= self._round(said, others, index, rest * (1 - part) / (1 - rest * part), share, teaching, rate)
                going = [*going, *others]
            else:
                for trial, lost in self._round(said, going, index, rest, share, teaching, rate).items():
                    drops[trial] += lost
            going = [e for e in going if drops[e.trial][-1] is not None]
        self._measured([e for e in going if e.state != "measured"])
        self._keep_best(list(drops))
        return drops

    def _round(
        self,
        said: str,
        going: Sequence[Evaluation],
        index: int,
        rest: float,
        share: float,
        teaching: Teaching,
        rate: float,
    ) -> dict[int, list[float | None]]:
        """Train some for a share of the time that is left, or of the steps; what each lost of the objective after it (None: it failed)."""
        judge, drops = self.found.judge(), {}
        with self.prepared.progress.stage(said, len(going)) as stage:
            jobs = self._jobs(going, index, rest, share, teaching) if going else []
            for job, metrics in self._trained(jobs, teaching, rate):
                evaluation = next(e for e in going if e.trial == job.trial)
                drops[job.trial] = [None if metrics is None else judge.drop(replace(evaluation, metrics=metrics))]
                stage.advance(note=f"{judge.objective} {metrics[judge.objective]:.4g}" if metrics else "failed")
        return drops

    def _drafted(
        self, entered: Sequence[Evaluation], drops: Mapping[int, Sequence[float | None]], count: int
    ) -> list[Evaluation]:
        """So many more candidates to train: by what a fit to those that were trained says of the others."""
        search, key = self.found.search, f"{self.key}:drafted"
        if (known := search.get_attr(key)) is None:
            lost = {trial: left[0] for trial, left in drops.items() if left and left[0] is not None}
            trained = [e for e in entered if e.trial in lost]
            others = [e for e in trainable(self.found) if e.trial not in drops]
            known, judge = [], self.found.judge()
            predictor = fitted(features(self.found, trained), [lost[e.trial] for e in trained], little(judge))
            if predictor is not None and others:
                expected = dict(zip((e.trial for e in others), predictor(features(self.found, others)), strict=True))
                known = [e.trial for e in drafted(self.found, expected, others, lost, count)]
            search.set_attr(key, known)
        return self._by_trials(known)

    def _by_trials(self, trials: Sequence[int]) -> list[Evaluation]:
        by_trial = {e.trial: e for e in self.found.told}
        return [by_trial[number] for number in trials]

    def _jobs(
        self, going: Sequence[Evaluation], index: int, rest: float, share: float, teaching: Teaching
    ) -> list[Job]:
        if self.unit == "seconds":
            side_by_side = min(self._workers(teaching), len(going))
            span = Span(seconds=max(0.5, self.left() * rest * side_by_side / len(going)))
        else:
            seconds = self.left() / len(going) if self.left() < float("inf") else None
            span = Span(steps=max(1, round(self._steps(teaching) * share)), seconds=seconds)
        return [
            Job(
                f"{e.candidate.id}-{self.mark}-{index}",
                e.trial,
                e.candidate,
                index,
                span,
                self._best(e.trial, index),
            )
            for e in going
        ]

    def _best(self, trial: int, before: int) -> str | None:
        """The weights to go on from: of the last round, or, of points that were named, those that they have."""
        for index in reversed(range(before)):
            if (kept := self._result(trial, index)) and not kept["done"]["failure"]:
                return str(kept["done"]["weights"])
        learnt = next(e.recovered for e in self.found.told if e.trial == trial)
        return learnt.weights if learnt is not None and self.chosen is not None else None

    def _result(self, trial: int, index: int) -> dict[str, Any] | None:
        found: dict[str, Any] | None = self.found.search.get_attr(f"{self.key}:{trial}:{index}")
        if found is None or found["done"]["failure"] or (self.prepared.folder / found["done"]["weights"]).exists():
            return found
        return None  # its weights are gone: it is trained again

    @property
    def mark(self) -> str:
        """What the names of this stage's files have in common."""
        return self.key.partition(":")[2][:6]

    def _is_ours(self, evaluation: Evaluation) -> bool:
        """Whether an evaluation has weights that this stage trained."""
        return evaluation.recovered is not None and evaluation.recovered.is_of(self.mark)

    def _trained(
        self, jobs: Sequence[Job], teaching: Teaching, rate: float
    ) -> Iterator[tuple[Job, Mapping[str, float] | None]]:
        """Each job with the metrics after it (None: it failed); what was done in an earlier start is read."""
        missing = [job for job in jobs if self._result(job.trial, job.round) is None]
        for job in jobs:
            if job not in missing:
                kept = self._result(job.trial, job.round)
                assert kept is not None
                yield job, kept["metrics"]
        workers = min(self._workers(teaching), len(missing))
        if not missing:
            return

        def work(job: Job) -> Outcome[Done]:
            return trained(self.prepared, teaching, self.recipe, rate, job, self.folder, self._stop)

        with closing(Workers(work, workers)) as crew:
            try:
                for job, outcome in zip(missing, crew.map(missing), strict=True):
                    yield job, self._judged(job, outcome)
            except BaseException:
                self._stop.set()  # those that are under way write down where they are
                raise

    def _judged(self, job: Job, outcome: Outcome[Done]) -> Mapping[str, float] | None:
        """Read the metrics of what was trained, and keep all of it in the study."""
        progress, metrics, failure = self.prepared.progress, None, outcome.failure
        done = outcome.value or Done("", 0, 0.0, [], [], [], failure)
        read: Metrics | None = None
        if not (failure := failure or done.failure):
            try:
                model = self.prepared.trained(job.candidate, done.weights)
                read = evaluate_task(self.prepared.task, model, names=self.prepared.measurer.names)
                metrics = dict(read)
            except Exception as error:
                failure = reason_of(error)
        if failure:
            progress.warn(f"training candidate {job.candidate.id} failed: {failure}; it keeps the weights that it had")
        dense = self.prepared.measurer.dense_metrics
        self.found.search.set_attr(
            f"{self.key}:{job.trial}:{job.round}",
            {
                "done": {**done.__dict__, "failure": failure}, "metrics": metrics, "at": self.spent(),
                "errors": read.errors() if read is not None else {},
                "drop_errors": read.drop_errors(dense) if read is not None else {},
            },
        )  # fmt: skip
        return metrics

    def _measured(self, evaluations: Sequence[Evaluation]) -> list[Evaluation]:
        """The evaluations, those measured that were not yet; what cannot be is left out. Untrained: the weights change no time."""
        together, progress = self.prepared.measurer.together, self.prepared.progress
        todo = [e for e in evaluations if e.state == "told"]
        done = {e.trial: e for e in evaluations if e.state == "measured"}
        if todo:
            with progress.stage("measuring those that were trained", len(todo)) as stage:
                for start in range(0, len(todo), together):
                    lot = self.found.measure(todo[start : start + together])
                    done |= {e.trial: e for e in lot if e.state != "failed"}
                    stage.advance(len(lot))
        return [done[e.trial] for e in evaluations if e.trial in done]

    # --- what comes of it ---

    def _keep_best(self, entered: Sequence[int]) -> None:
        """Give each measured entrant its best weights, where these are better on validation than what it has."""
        judge, sign = self.found.judge(), 1.0 if self.prepared.task.higher_is_better else -1.0
        rate = float(self.found.search.get_attr(f"{self.key}:entered")["rate"])
        told = {e.trial: e for e in self.found.told}
        before = {Path(e.recovered.weights).name for e in told.values() if e.recovered is not None}
        for trial in entered:
            evaluation = told[trial]
            if evaluation.state != "measured":
                continue
            results = [r for index in range(len(SHARES)) if (r := self._result(trial, index)) and r["metrics"]]
            went_on = self.chosen is not None
            better = renewed(evaluation, results, judge.objective, sign, self.recipe.name, rate, went_on)
            if better is not None and (lost := judge.lost(evaluation, better)):
                self.prepared.progress.warn(
                    f"candidate {evaluation.candidate.id} stays as it was: trained, it would miss a goal that it meets ({lost[0]})"
                )
                continue
            if better is not None:
                self.found.search.update(trial, better)
        self._sweep(before)

    def _sweep(self, before: set[str]) -> None:
        """Take away this stage's weights, and those that points had ``before``, that no point is made of: others' may be wanted yet."""
        wanted = {Path(e.recovered.weights).name for e in self.found.told if e.recovered is not None}
        for path in self.folder.glob("*"):
            if path.name not in wanted and (f"-{self.mark}-" in path.name or path.name in before):
                path.unlink(missing_ok=True)

    def _summary(
        self, entered: Sequence[Evaluation], drops: Mapping[int, Sequence[float | None]], rate: str
    ) -> RecoverySummary:
        notes: list[str] = []
        found = []
        lost = {trial: left[0] for trial, left in drops.items() if left and left[0] is not None}
        predicted = predictions(self.found, entered, lost)
        for e in entered:
            kept = [r for index in range(len(SHARES)) if (r := self._result(e.trial, index))]
            failure = next((r["done"]["failure"] for r in kept if r["done"]["failure"]), "")
            notes += [note for r in kept for note in r["done"]["notes"]]
            found.append(Entrant(e.candidate.id, e.kl or 0.0, tuple(drops[e.trial]), failure, predicted.get(e.trial)))
        stages = tuple(f"{stage.name}: {stage.share:.0%}" for stage in self.recipe.stages)
        return RecoverySummary(
            self.recipe.name, rate, round(self.spent(), 1), tuple(found), stages, tuple(dict.fromkeys(notes)), self.mark,
            self.chosen is not None,
        )  # fmt: skip


def _event() -> Any:
    import multiprocessing

    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    return multiprocessing.get_context(method).Event()
