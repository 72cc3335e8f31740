"""A point of a front, for files that are written of one."""

from __future__ import annotations

from autocomp.records.candidate import Candidate
from autocomp.records.evaluation import Evaluation
from autocomp.records.latency import Latency

EVALUATION = Evaluation(
    trial=3,
    candidate=Candidate({"stem": 32}, {}),
    source="dense",
    state="measured",
    error=0.0,
    bytes=1000,
    metrics={"accuracy": 0.9},
    latency={"x86-host": Latency(1e-5, 0.01, "measured", "x86-host", samples=(1e-5,))},
)
