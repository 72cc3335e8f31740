"""The held-out test split: read once for each point of the front, after everything was chosen, and kept in the study."""

from __future__ import annotations

from dataclasses import replace

from autocomp.measurement.measurer import reason_of
from autocomp.records.evaluation import Evaluation
from autocomp.records.run import FrontPoint
from autocomp.run.found import Found
from autocomp.run.judged import judged_otherwise
from autocomp.run.prepare import Prepared
from autocomp.tasks.reading import Metrics
from autocomp.tasks.task import evaluate_task


class HeldOut:
    """Reads the test split of a run. Where it goes on, what was kept of other data counts no longer."""

    def __init__(self, prepared: Prepared, found: Found, dense: Evaluation) -> None:
        self.prepared, self.found, self.dense = prepared, found, dense
        self._of_dense: Metrics | None = None  # with its samples, if it was read in this start of the run
        if prepared.task.test is not None:
            self._check()

    def read(self, point: FrontPoint) -> FrontPoint:
        """The point with its test metrics and their errors; without any, and with a warning, where they cannot be read."""
        if self.prepared.task.test is None:
            return point
        key = self._key(point.evaluation)
        stored = self._stored(key)
        if stored is None:
            try:
                read = self._read(point.evaluation)
            except Exception as error:
                self.prepared.progress.warn(
                    f"candidate {point.evaluation.candidate.id} has no test metrics: {reason_of(error)}"
                )
                return point
            drops = {} if self._is_dense(point.evaluation) else read.drop_errors(self._of_dense)
            stored = [dict(read), read.errors(), drops]
            self.found.search.set_attr(key, stored)
        metrics, errors, drop_errors = stored
        return replace(point, test_metrics=metrics, test_errors=errors, test_drop_errors=drop_errors)

    def _stored(self, key: str) -> list[dict[str, float]] | None:
        """Metrics, their errors, and those of their differences from dense's, as the study has them; None if it has none."""
        stored = self.found.search.get_attr(key)
        return [stored, {}, {}] if isinstance(stored, dict) else stored  # metrics alone: a study of before

    def _read(self, evaluation: Evaluation) -> Metrics:
        read = evaluate_task(self.prepared.task, self.prepared.stitch(evaluation.candidate), split="test")
        if self._is_dense(evaluation):
            self._of_dense = read
        return read

    def _is_dense(self, evaluation: Evaluation) -> bool:
        return evaluation.trial == self.dense.trial

    def _key(self, evaluation: Evaluation) -> str:
        """Under which the study keeps a point's test metrics; those of test data that changed since have another number."""
        learnt = "" if evaluation.recovered is None else f":{evaluation.recovered.weights}:{evaluation.recovered.steps}"
        return f"test:{self.found.search.get_attr('test data', 0)}:{evaluation.candidate.id}{learnt}"

    def _check(self) -> None:
        """Read what was read before once more."""

        def kept(evaluation: Evaluation) -> dict[str, float] | None:
            stored = self._stored(self._key(evaluation))
            return stored[0] if stored else None

        progress = self.prepared.progress
        try:
            said = judged_otherwise(self.found.told, self.dense, kept, self._read)
        except Exception as error:
            progress.warn(f"Task.test failed: {reason_of(error)}; what it said before is shown")
            return
        if said:
            progress.warn(
                f"Task.test judges {said} than before: it draws at random, or its data changed; all points are judged again on what it reads now"
            )
            self.found.search.set_attr("test data", self.found.search.get_attr("test data", 0) + 1)
