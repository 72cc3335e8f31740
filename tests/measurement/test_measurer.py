"""A candidate's time is that of the moment when the uncompressed model was first timed: the two are timed in turn, and a drift is taken out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from points import EVALUATION

from autocomp.measurement.measurer import Measurer
from autocomp.records.latency import Latency, latency_from_json, latency_to_json


class Drifting:
    """A device of this machine on which everything takes ``slower`` times as long as at first; modules are numbers of seconds."""

    def __init__(self, reach: str = "local", spreads: Sequence[float] = (0.01,)) -> None:
        self.profile = SimpleNamespace(reach=reach, cores=1)
        self.slower, self.calls, self.spreads = 1.0, 0, list(spreads)

    def compile(self, model: Any, _inputs: Any) -> float:
        return float(model)

    def time(self, module: float, _inputs: Any) -> Latency:
        return self.time_in_turn([module], _inputs)[0]

    def time_in_turn(self, modules: Sequence[float], _inputs: Any) -> list[Latency]:
        spread = self.spreads[min(self.calls, len(self.spreads) - 1)]
        self.calls += 1
        return [Latency(m * self.slower, spread, "measured", "here", samples=(m * self.slower,)) for m in modules]


def measurer(device: Drifting) -> Measurer:
    task: Any = SimpleNamespace(model=1e-3)
    found = Measurer(task, {"here": device}, [(torch.zeros(1),)], lambda _: 2e-4)  # type: ignore[dict-item, arg-type, return-value]
    found.dense_seconds = {"here": 1e-3}
    return found


@pytest.mark.parametrize("slower", [0.6, 1.0, 1.7])
def test_a_drift_of_the_machine_is_taken_out(slower: float) -> None:
    device = Drifting()
    device.slower = slower
    latency = measurer(device)._time(EVALUATION.candidate, lambda: None)["here"]
    assert latency.seconds == pytest.approx(2e-4)
    assert latency.samples[0] == pytest.approx(2e-4)
    assert latency.drift == pytest.approx(1 / slower)
    assert latency_from_json(latency_to_json(latency)) == latency


def test_a_noisy_pair_is_timed_once_more_and_the_quieter_is_kept() -> None:
    device = Drifting(spreads=[0.3, 0.02])
    assert measurer(device)._time(EVALUATION.candidate, lambda: None)["here"].spread == 0.02
    assert device.calls == 2


@pytest.mark.parametrize("reach", ["estimate", "rpc"])
def test_what_is_not_timed_here_is_as_the_device_says(reach: str) -> None:
    device = Drifting(reach)
    device.slower = 2.0
    latency = measurer(device)._time(EVALUATION.candidate, lambda: None)["here"]
    assert (latency.seconds, latency.drift) == (pytest.approx(4e-4), 1.0)


def test_a_time_without_drift_is_written_as_before() -> None:
    plain = replace(EVALUATION.latency["x86-host"], drift=1.0)
    assert "drift" not in latency_to_json(plain)
    assert latency_from_json(latency_to_json(plain)) == plain
