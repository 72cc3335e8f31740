"""Asked trials → told ones: stitched and scored side by side, told in the order in which they were asked."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from autocomp.measurement.measurer import reason_of
from autocomp.processes.pool import Workers, cores
from autocomp.records.candidate import Candidate
from autocomp.records.evaluation import Evaluation
from autocomp.run.found import Found, is_baseline
from autocomp.study.study import Asked

AHEAD = 8  # trials drawn before the first of them is told, in a deterministic run: as many on a machine of any number of cores
# Times the divergence of a told candidate thought to be faster: on 64 samples, reason enough to look at no more of them. Chosen by hand, so that
# the error of so few samples decides nothing.
DOMINATED = 1.25

_Work = tuple[Candidate, float]  # and the divergence above which it is not looked at any closer
_Scored = tuple[float | None, str, float, int]  # divergence, or None and why; seconds; bytes as stored


class Teller:
    """Scores the trials of a study in processes of its own, which end with ``close``."""

    def __init__(self, found: Found) -> None:
        self.found, self.prepared = found, found.prepared
        self.scorers = Workers(self._score, cores(), AHEAD if self.prepared.settings.deterministic else None)

    def close(self) -> None:
        self.scorers.close()

    def ask(self, count: int, until: float) -> Iterator[Asked]:
        """So many trials, fewer where the space is exhausted or ``until``, in seconds of the run's, is past."""
        for _ in range(count):
            if self.prepared.budget.spent() > until or (asked := self.found.search.ask()) is None:
                return
            yield asked

    def tell(self, asked: Iterable[Asked]) -> Iterator[Evaluation]:
        """Score trials and tell what came of them, in their order; what is asked next knows of all but the last few."""
        from autocomp.graph.fold import dense_bytes

        begun: deque[Evaluation] = deque()

        def work() -> Iterator[_Work]:
            for one in asked:
                begun.append(self._thought(one))
                yield begun[-1].candidate, self._hopeless(begun[-1])

        for divergence, failure, seconds, size in self.scorers.map(work()):
            evaluation = begun.popleft()
            if divergence is None:
                evaluation = replace(evaluation, state="failed", failure=failure)
            else:
                size = dense_bytes(self.prepared.task.model) if evaluation.source == "dense" else size
                evaluation = replace(evaluation, kl=divergence, seconds_spent=seconds, bytes=size)
            self.found.search.tell(evaluation.trial, evaluation)
            yield evaluation

    def _thought(self, asked: Asked) -> Evaluation:
        """What is known of a trial before it is looked at."""
        costs = self.found.costs
        cost = costs.problem().cost(self.prepared.space.normalise(asked.candidate))
        predicted = costs.predict(asked.candidate)
        return Evaluation(asked.trial, asked.candidate, asked.source, "told", cost.error, cost.bytes, predicted)

    def _score(self, work: _Work) -> _Scored:
        from autocomp.accuracy.proxy import stitch_and_score
        from autocomp.graph.fold import folded_bytes

        prepared, start = self.prepared, time.perf_counter()
        try:
            model, divergence = stitch_and_score(prepared.task.model, prepared.graph, prepared.database, *work)
        except Exception as error:  # the model's own code runs here
            return None, reason_of(error), time.perf_counter() - start, 0
        # counted, not looked up: the tables know nothing of tensors that belong to no layer and shrink with one
        return divergence, "", time.perf_counter() - start, folded_bytes(model)

    def _hopeless(self, evaluation: Evaluation) -> float:
        """The divergence above which a candidate is beaten for certain: by one that was told and is predicted no slower."""
        # one beaten on the whole may still be the best on one target
        if is_baseline(evaluation.source) or len(self.prepared.devices) > 1:
            return float(np.inf)
        seconds = next(iter(self.found.costs.relative([evaluation.candidate]).values()))[0]
        values = self.found.search.values()  # NaN for what failed
        return DOMINATED * float(values[values[:, 1] <= seconds, 0].min(initial=np.inf))
