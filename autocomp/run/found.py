"""What a run has found: its open study, and what candidates are thought to cost. A run that goes on is taken up here.

All that a run finds lies in its study: what was told, what was measured, the references. A run that is stopped anywhere and resumed goes
through the same stages, finds what is there, and does the rest.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from types import TracebackType
from typing import TYPE_CHECKING, Any

from autocomp.errors import AutocompError, UsageError, shown
from autocomp.front.goals import Judge
from autocomp.measurement.measurer import reason_of
from autocomp.records.candidate import Candidate
from autocomp.records.evaluation import Evaluation, Source, as_searched, untrained
from autocomp.records.latency import Latency
from autocomp.run.folder import LOST, PLACE, study_of
from autocomp.run.identity import FIRST, first_widths
from autocomp.run.judged import ignores_its_model, judged_otherwise, of_other_samples
from autocomp.run.prepare import Prepared
from autocomp.run.replay import ATTRIBUTE, to_json
from autocomp.study.aims import thought_misses
from autocomp.study.costs import Costs
from autocomp.study.samplers import OURS
from autocomp.study.study import Choices, Engine, Search, open_search
from autocomp.tasks.task import evaluate_task, objective_of

if TYPE_CHECKING:
    import torch

    from autocomp.space.space import Space


OFFERED = "offered"  # the study's attribute: widths, and layers with finer ranks, that are offered by now, if these are more than at first


class Found:
    """The study of a prepared run, opened; to be closed, or used in a ``with``.

    One that does not go on with its search (``searches`` is false) measures nothing again: UsageError where its targets are not what they were.
    """

    def __init__(self, prepared: Prepared, searches: bool = True) -> None:
        self.prepared, self._searches = prepared, searches
        settings, space, devices = prepared.settings, prepared.space, prepared.devices
        self.costs = Costs(prepared.graph, space, prepared.database.tables(space), devices, settings.deterministic)
        self.every = _every(prepared)
        url, name = study_of(settings, prepared.folder)
        engine = Engine(
            prepared.sampler or (settings.sampler if searches else OURS),  # a caller's own is there for a search alone
            settings.seed,
            self.costs.problem,
            space.normalise,
            self._constraints,
            Choices(space.widths, space.methods),
        )
        self.search: Search = open_search(
            url,
            name,
            self.every,
            engine,
            prepared.known is not None,
            {
                "identity": prepared.identity,
                FIRST: first_widths(space),
                **({ATTRIBUTE: to_json(prepared.replayed)} if prepared.replayed else {}),
            },
            list(devices),
        )
        said = self.search.get_attr("warnings", [])  # by earlier starts of the run
        self._said: list[str] = [str(each) for each in said] if isinstance(said, list) else []
        self._spent: dict[str, float] = self.search.get_attr("seconds", {})
        if settings.storage is not None:
            self.search.set_attr(PLACE, str(prepared.folder.absolute()))
        prepared.measurer.stitch = self._stitch
        try:
            self._offer_again()
            self._take_up()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Found:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Keep what this start of the run said and how long it took, for the starts after it; close the study."""
        try:
            self.search.set_attr("warnings", self.warnings())
            self.search.set_attr("seconds", self.seconds())
        except Exception as error:  # the disk is full, the folder gone: what ends the run then is told by another
            print(f"what this start said was not kept: {error}", file=sys.stderr)  # into the run's log
        finally:
            self.search.close()

    @property
    def told(self) -> list[Evaluation]:
        return self.search.told

    def measured(self) -> list[Evaluation]:
        """What was measured and compared with dense, as it was before any training."""
        return [untrained(e) for e in self.told if e.state == "measured" and e.kl is not None]

    def offer(self, space: Space) -> None:
        """Offer what this space does from now on, for as long as the run lasts: some of what the study knows."""
        first, database = self.prepared.space, self.prepared.database
        self.costs.widen(space, database.tables(space))
        self.costs.fit(self.told)
        refined = [name for name, methods in space.methods.items() if methods != first.methods[name]]
        self.search.set_attr(OFFERED, {"widths": dict(space.widths), "ranks": refined})
        self.search.offer(Choices(space.widths, space.methods))

    def _offer_again(self) -> None:
        """What an earlier start of the run came to offer."""
        if offered := self.search.get_attr(OFFERED):
            space = self.prepared.space
            try:
                widths = {name: tuple(chosen) for name, chosen in offered["widths"].items()}
                again = space.offering(widths, {name: space.every_method[name] for name in offered["ranks"]})
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise UsageError(
                    f"the study's attribute {OFFERED!r} is not as autocomp writes it ({type(error).__name__}: {shown(error)}): put it back, "
                    "or choose another --out"
                ) from error
            self.offer(again)

    def dense(self) -> Evaluation:
        """The evaluation of the untouched model. AutocompError if it was not measured."""
        found = next((e for e in self.told if e.source == "dense"), None)
        if found is None or found.state != "measured":
            raise AutocompError(
                f"the uncompressed model was not measured: {(found and found.failure) or 'the time was up'}"
            )
        return found

    def _stitch(self, candidate: Candidate) -> torch.nn.Module:
        """A candidate's model, with what it learnt since it was compressed."""
        learnt = next((e.recovered for e in self.told if e.recovered is not None and e.candidate == candidate), None)
        if learnt is None:
            return self.prepared.stitch_untrained(candidate)
        return self.prepared.trained(candidate, learnt.weights)

    def judge(self) -> Judge:
        """What evaluations are held against, once the untouched model is measured."""
        dense, task = self.dense(), self.prepared.task
        return Judge(dense, self.prepared.settings.goals, objective_of(task, dense.metrics), task.higher_is_better)

    def steering_judge(self) -> Judge:
        """The judge that decides what is tried and measured: in a deterministic run one of predicted times, which follow no clock."""
        judge = self.judge()
        return replace(judge, dense=self.steered([judge.dense])[0])

    def steered(self, evaluations: Sequence[Evaluation]) -> list[Evaluation]:
        """Evaluations as they decide what is tried and measured: in a deterministic run with predicted times in the place of measured ones."""
        if not self.prepared.settings.deterministic:
            return list(evaluations)
        return [self._as_predicted(evaluation) for evaluation in evaluations]

    def _as_predicted(self, evaluation: Evaluation) -> Evaluation:
        seconds = self.costs.predict(evaluation.candidate)
        latency = {name: replace(its, seconds=seconds[name]) for name, its in evaluation.latency.items()}
        return replace(evaluation, latency=latency, earlier={})

    def _constraints(self, evaluation: Evaluation) -> dict[str, float]:
        """By how much a told trial is thought to miss each goal, as Optuna's constraints: 0 or less where it meets it."""
        if not self.prepared.settings.goals.any or not any(e.source == "dense" and e.metrics for e in self.told):
            return {}
        return thought_misses(evaluation, self.steering_judge(), [e for e in self.told if e.state == "measured"])

    def measure(self, lot: Sequence[Evaluation]) -> list[Evaluation]:
        """Measure so many told candidates as are measured together. A failure is said, and recorded with its candidate."""
        done = self.prepared.measurer.measure_all(lot)
        for evaluation in done:
            if evaluation.state == "failed":
                self._warn(f"candidate {evaluation.candidate.id} failed: {evaluation.failure}")
            self.search.update(evaluation.trial, evaluation)
        return done

    def take_back(self, said: str) -> None:
        """Leave out what an earlier start warned of, as it begins, since it is so no more."""
        self._said = [text for text in self._said if not text.startswith(said)]

    def warnings(self) -> list[str]:
        """What this start of the run said, and the ones before it."""
        return list(dict.fromkeys([*self._said, *self.prepared.progress.warnings]))

    def seconds(self) -> dict[str, float]:
        """Seconds of each stage, over all starts of the run."""
        before, now = self._spent, self.prepared.progress.seconds
        return {name: before.get(name, 0.0) + now.get(name, 0.0) for name in dict.fromkeys([*before, *now])}

    def judge_again(self, later: bool = False, refuse: bool = False) -> None:
        """Read metrics anew where a run goes on, or at its end (``later``), when what fails is only said. UsageError if they have other names; a
        warning if they differ, or UsageError (``refuse``)."""
        measurer, task = self.prepared.measurer, self.prepared.task
        rehearsed = measurer.rehearsed

        def now(evaluation: Evaluation) -> Mapping[str, float]:
            known = None if later or evaluation.kl or rehearsed is None else rehearsed.metrics
            if known is None or set(known) != set(evaluation.metrics):
                known = evaluate_task(task, self.prepared.stitch(evaluation.candidate), names=measurer.names)
            if evaluation.source == "dense":
                measurer.dense_metrics = known
            return known

        try:
            said = judged_otherwise(self.told, self.dense(), lambda e: e.metrics or None, now)
        except Exception as error:
            if refuse or not later:
                raise
            self._warn(
                f"Task.evaluate failed when it was read again: {reason_of(error)}; whether it judges as it did is not known"
            )
            return
        if said:
            why = f"Task.evaluate judges {said} than before: it draws at random, keeps what it said of another model, or its data changed"
            if refuse:
                raise UsageError(
                    f"{why}; nothing was done: what comes of it could not be compared with what the run has"
                )
            self._warn(f"{why}; points are not comparable with one another")

    def doubt_metrics(self) -> None:
        """Warn of the usual slip of a closure, and of metrics whose samples follow the model."""
        if names := of_other_samples(self.told, self.dense()):
            self._warn(
                f"{', '.join(names)}: Task.evaluate read more samples of some models than of others. Differences between them then say little, "
                "and have no standard error but by chance: judge all models on the same samples"
            )
        if count := ignores_its_model(self.told, self.dense()):
            self._warn(
                f"Task.evaluate gave all of {count} compressed models exactly the numbers of the uncompressed one, though they answer "
                "otherwise: does it judge the model that it is given?"
            )

    def _take_up(self) -> None:
        """Bring what earlier starts left into the state that this one goes on from."""
        search, measurer = self.search, self.prepared.measurer
        for evaluation in search.told:  # what was learnt may be lost, or another's
            if evaluation.recovered is not None and not self._is_there(evaluation.recovered.weights):
                said = f"the weights that {evaluation.candidate.id} learnt are lost: it stands as it was before it was trained"
                self._warn(said)
                search.update(evaluation.trial, untrained(evaluation))
                search.set_attr(LOST, [*search.get_attr(LOST, []), evaluation.recovered.weights])
                if summary := search.get_attr("recovery"):
                    search.set_attr("recovery", {**summary, "notes": [*summary.get("notes", []), said]})
        # times from the end of an earlier start are of another moment than all others
        for evaluation in search.told:
            if evaluation.earlier:
                search.update(evaluation.trial, as_searched(evaluation))
        if search.unreadable:
            self._warn(
                f"{search.unreadable} trials of the study are not as this autocomp writes them; they are left as they are, and not used"
            )
        if self.prepared.settings.deterministic:
            self._settle_times()
        self._measure_here()
        self._draw_as_stated()
        dense = next((e for e in self.told if e.source == "dense" and e.state == "measured"), None)
        if dense is not None:
            measurer.dense_seconds = {name: latency.seconds for name, latency in dense.latency.items()}
        if measurer.rehearsed is not None:
            search.set_attr("seconds of a point", measurer.rehearsed.seconds)
        else:
            self.prepared.keep_for_the_end(search.get_attr("seconds of a point", 0.0))

    def _is_there(self, weights: str) -> bool:
        from autocomp.recovery.stored import read

        try:
            read(self.prepared.folder / weights)
        except (OSError, AutocompError):
            return False
        return True

    def _settle_times(self) -> None:
        """Fit the latency models to the kernel times that were stored when the run began, and to nothing that it measures itself."""
        devices = self.prepared.devices
        known: dict[str, Any] | None = self.search.get_attr("kernel times")
        for name, device in devices.items():
            if known is None:
                device.model.fit_kernels(device.store.records())
            else:
                device.model.restore(known[name])
        self.search.set_attr("kernel times", {name: device.model.to_json() for name, device in devices.items()})

    def _measure_here(self) -> None:
        """Forget what another machine, or another compiler, measured: it is measured again, since its times must not meet ours in one ratio."""
        compiler = f"TVM {version('apache-tvm')}"
        here = {name: f"{device.profile.fingerprint}, {compiler}" for name, device in self.prepared.devices.items()}
        before = self.search.get_attr("targets", here)
        if before != here:
            again = [e for e in self.told if e.state == "measured"]
            moved = ", ".join(name for name in here if before.get(name) != here[name])
            if not self._searches:
                raise UsageError(
                    f"what the run's times were measured on is not what it was ({moved}: another machine, profile or TVM); nothing was done: "
                    "go on with `autocomp search --resume` first, which measures again"
                )
            for evaluation in again:
                empty: dict[str, Any] = {}
                forgotten = replace(
                    evaluation,  # what it learnt is true on any machine
                    state="told",
                    latency=empty,
                    earlier=empty,
                    metrics=empty,
                    errors=empty,
                    drop_errors=empty,
                )
                self.search.update(evaluation.trial, forgotten)
            self.search.set_attr("references", None)
            self._warn(
                f"{len(again)} models were measured on another machine than this one, or compiled by another TVM ({moved}): they are measured "
                "again"
            )
        self.search.set_attr("targets", here)
        self._tell_versions()

    def _draw_as_stated(self) -> None:
        """What an inference draws is as the profiles state it now: what was measured before must not be held to another power."""
        watts = {name: device.profile.watts for name, device in self.prepared.devices.items()}

        def stated(latencies: Mapping[str, Latency]) -> dict[str, Latency]:
            return {name: replace(one, watts=watts.get(name, one.watts)) for name, one in latencies.items()}

        for evaluation in self.search.told:
            renewed = replace(evaluation, latency=stated(evaluation.latency), earlier=stated(evaluation.earlier))
            if renewed != evaluation:
                self.search.update(evaluation.trial, renewed)

    def _tell_versions(self) -> None:
        now = {name: version(name) for name in ("autocomp", "torch")}
        begun = self.search.get_attr("versions", now)
        for name in now:
            if begun.get(name) != now[name]:
                self._warn(f"the run was begun with {name} {begun.get(name)}, and goes on with {now[name]}")
        self.search.set_attr("versions", begun)

    def _warn(self, text: str) -> None:
        self.prepared.progress.warn(text)


def _every(prepared: Prepared) -> Choices:
    """What the study knows: what is finer too, where autocomp's engine searches, and the run was not begun without it."""
    space, begun = prepared.space, (prepared.known or {}).get("space")
    first = Choices(space.widths, space.methods)
    if prepared.sampler is not None or prepared.settings.sampler != OURS or begun == first.recorded:
        return first
    return Choices(space.every_width, space.every_method)


def is_baseline(source: Source) -> bool:
    """Whether a trial stands beside the search: the uncompressed model, and the uniform compressions."""
    return source in ("dense", "uniform")
