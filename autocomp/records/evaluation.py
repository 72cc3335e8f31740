"""The records that flow between stages: frozen, free of torch and TVM, written to and read from JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from autocomp.records.candidate import Candidate
from autocomp.records.latency import Latency, latency_from_json, latency_to_json
from autocomp.records.recovery import Recovery, recovery_from_json, recovery_to_json

FORMAT_VERSION = 1

Source = Literal["dense", "uniform", "solver", "mutation", "optuna", "replay"]
State = Literal["told", "measured", "failed"]


@dataclass(frozen=True)
class Evaluation:
    """Everything known of one told trial.

    ``error`` is the tier-0 additive proxy, ``kl`` the tier-1 divergence from the dense model's outputs (KL in nats, or
    what is as bad: `tasks.divergence`), ``metrics`` the task's own on the validation split (tier 2), ``predicted`` the
    kernel-sum model's seconds by profile, ``latency`` whole compiled modules by profile, ``bytes`` the size of the stored weights.
    ``earlier`` has the latencies taken while searching, of profiles where ``latency`` was taken again, beside dense and the front.
    ``errors`` has the standard error of each metric that is a mean over samples, ``drop_errors`` that of its difference from dense's, sample by
    sample. ``recovered`` says how it was trained, where it was: ``metrics`` are then those after it, ``kl`` is still that before.
    """

    trial: int
    candidate: Candidate
    source: Source
    state: State
    error: float
    bytes: int
    predicted: Mapping[str, float] = field(default_factory=dict)
    kl: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    latency: Mapping[str, Latency] = field(default_factory=dict)
    failure: str | None = None
    seconds_spent: float = 0.0
    earlier: Mapping[str, Latency] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)
    drop_errors: Mapping[str, float] = field(default_factory=dict)
    recovered: Recovery | None = None

    @property
    def tier(self) -> int:
        """The dearest accuracy proxy that was read: 0, 1 or 2."""
        return 2 if self.metrics else 1 if self.kl is not None else 0

    @property
    def noisy(self) -> bool:
        """Whether a latency of it was disturbed."""
        return any(latency.noisy for latency in self.latency.values())


@dataclass(frozen=True)
class Reference:
    """A point beside the front that the search did not make: the same model in another runtime, or by a classic recipe in ours."""

    name: str
    metrics: Mapping[str, float]
    latency: Latency
    bytes: int
    note: str = ""
    kind: Literal["runtime", "classic"] = "runtime"


@dataclass(frozen=True)
class Sensitivity:
    """One point of a curve: what one option of one layer or group costs, all else dense.

    ``kind`` is ``width`` (of a group), ``rank``, ``precision`` or ``mask`` (of a layer); ``error`` in nats a sample; ``share`` of the bytes that
    the subject's weights (for a width: those of all layers that read the group) keep.
    """

    subject: str
    kind: Literal["width", "rank", "precision", "mask"]
    option: str
    error: float
    share: float


def as_searched(evaluation: Evaluation) -> Evaluation:
    """The evaluation with the times that were taken while searching, not those taken at the end of a run."""
    if not evaluation.earlier:
        return evaluation
    return replace(evaluation, latency={**evaluation.latency, **evaluation.earlier}, earlier={})


def untrained(evaluation: Evaluation) -> Evaluation:
    """The evaluation as it was before any training."""
    if (done := evaluation.recovered) is None:
        return evaluation
    return replace(
        evaluation, metrics=done.before, errors=done.before_errors, drop_errors=done.before_drop_errors, recovered=None
    )


def evaluation_to_json(evaluation: Evaluation) -> dict[str, Any]:
    data = dict(evaluation.__dict__)
    data["candidate"] = evaluation.candidate.to_json()
    data["predicted"] = dict(evaluation.predicted)
    data["metrics"] = dict(evaluation.metrics)
    data["latency"] = {name: latency_to_json(value) for name, value in evaluation.latency.items()}
    data["earlier"] = {name: latency_to_json(value) for name, value in evaluation.earlier.items()}
    for name in ("earlier", "errors", "drop_errors"):  # which files of before do not say
        data[name] = dict(data[name])
        if not data[name]:
            del data[name]
    if evaluation.recovered is None:  # nor do they say this
        del data["recovered"]
    else:
        data["recovered"] = recovery_to_json(evaluation.recovered)
    return data


def evaluation_from_json(data: Mapping[str, Any]) -> Evaluation:
    fields = dict(data)
    fields["candidate"] = Candidate.from_json(data["candidate"])
    for name in ("latency", "earlier"):
        fields[name] = {profile: latency_from_json(value) for profile, value in data.get(name, {}).items()}
    if data.get("recovered") is not None:
        fields["recovered"] = recovery_from_json(data["recovered"])
    return Evaluation(**fields)


def sound(evaluation: Evaluation, trial: int, candidate: Candidate) -> Evaluation:
    """The evaluation, if it can be that of this trial; ValueError for values that no search writes."""
    numbers = [evaluation.error, evaluation.seconds_spent, *evaluation.predicted.values(), *evaluation.metrics.values()]
    numbers += [] if evaluation.kl is None else [evaluation.kl]
    numbers += [*evaluation.errors.values(), *evaluation.drop_errors.values(), *untrained(evaluation).metrics.values()]
    times = [latency.seconds for latency in (*evaluation.latency.values(), *evaluation.earlier.values())]
    good = (
        evaluation.trial == trial and evaluation.candidate == candidate
        and evaluation.state in ("told", "measured", "failed") and isinstance(evaluation.bytes, int) and evaluation.bytes >= 0
        and all(isinstance(number, int | float) for number in numbers)
        and all(isinstance(seconds, int | float) and 0 < seconds < math.inf for seconds in times)
        and (evaluation.state != "measured" or bool(times and evaluation.metrics))
    )  # fmt: skip
    if not good:
        raise ValueError(f"no evaluation of trial {trial}")
    return evaluation


def reference_to_json(reference: Reference) -> dict[str, Any]:
    data = dict(reference.__dict__)
    data["metrics"] = dict(reference.metrics)
    data["latency"] = latency_to_json(reference.latency)
    if data["kind"] == "runtime":  # the only kind of earlier files, which do not say it
        del data["kind"]
    return data


def reference_from_json(data: Mapping[str, Any]) -> Reference:
    fields = dict(data)
    fields["latency"] = latency_from_json(data["latency"])
    return Reference(**fields)
