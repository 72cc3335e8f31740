"""What makes one doubt a task's own functions."""

from __future__ import annotations

from autocomp.records.candidate import Candidate
from autocomp.records.evaluation import Evaluation, Source
from autocomp.run.judged import of_other_samples


def judged(trial: int, source: Source, paired: bool, state: str = "measured") -> Evaluation:
    errors = {"accuracy": 0.01, "loss": 0.1}
    drops = {} if source == "dense" else {name: 0.01 for name in errors if paired or name != "loss"}
    metrics = {"accuracy": 0.9, "loss": 1.0, "speed": 3.0}
    candidate = Candidate({"g": 64 - trial}, {})
    return Evaluation(trial, candidate, source, state, 0.1, 100, metrics=metrics, errors=errors, drop_errors=drops)


def test_metrics_of_other_samples_than_the_uncompressed_models_are_named() -> None:
    dense = judged(0, "dense", paired=True)
    assert of_other_samples([dense, judged(1, "solver", paired=True)], dense) == []
    assert of_other_samples([dense, judged(1, "solver", paired=False)], dense) == ["loss"]
    assert of_other_samples([dense, judged(1, "solver", paired=False, state="failed")], dense) == []
