"""The records that flow between stages: frozen, free of torch and TVM, written to and read from JSON."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

FORMAT_VERSION = 1

How = Literal["measured", "estimated"]
# fp16: weights and activations in 16 bits. w8a8: both in 8. w8, w4: weights alone, a scale for 64 of them unless g32 or g128 says other.
# vq, rvq: codebooks, the number being bits a weight. What each stores: autocomp/precisions.py.
Precision = Literal[
    "fp32", "fp16", "w8a8", "w8", "w8g32", "w8g128", "w4", "w4g32", "w4g128",
    "vq8", "vq4", "vq2", "vq1", "rvq4", "rvq3", "rvq2",
]  # fmt: skip
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


@dataclass(frozen=True)
class KernelTime:
    """One fused function of a compiled module: what it is and what it costs alone.

    ``peak_fraction`` is achieved over peak arithmetic rate of the profile (None where no arithmetic peak applies).
    """

    name: str
    key: str
    operator: str
    seconds: float
    flops: int
    how: How = "measured"
    peak_fraction: float | None = None


@dataclass(frozen=True)
class Latency:
    """Seconds of one inference on a profile, and how they were obtained.

    ``seconds`` is the median, ``spread`` the interquartile range over the median, ``error`` the known relative error of an
    estimate (None when measured), ``samples`` the raw repeats in seconds. ``noisy``: other work on the machine disturbed it, and went on
    when it was measured again.
    """

    seconds: float
    spread: float
    how: How
    profile: str
    device: str = ""
    samples: tuple[float, ...] = ()
    kernels: tuple[KernelTime, ...] = ()
    error: float | None = None
    noisy: bool = False


@dataclass(frozen=True, order=True)
class Method:
    """How one layer is computed: precision, and ranks if it is factorised (one rank for SVD, two for Tucker-2)."""

    precision: Precision = "fp32"
    ranks: tuple[int, ...] = ()

    def __str__(self) -> str:
        rank = "r" + "x".join(map(str, self.ranks)) if self.ranks else ""
        return "/".join(part for part in (rank, self.precision) if part)

    @classmethod
    def parse(cls, text: str) -> Method:
        """Read the form ``str`` writes: ``fp32``, ``w8a8``, ``r32/w4``, ``r16x32/vq4``. ValueError otherwise."""
        head, _, tail = text.rpartition("/")
        if tail not in PRECISIONS or (head and not head.startswith("r")):
            raise ValueError(f"not a method: {text!r}")
        ranks = tuple(int(part) for part in head[1:].split("x")) if head else ()
        return cls(tail, ranks)


@dataclass(frozen=True)
class Candidate:
    """One choice for every group and layer: kept widths of the channel groups, methods of the layers."""

    widths: Mapping[str, int]
    methods: Mapping[str, Method]

    def to_json(self) -> dict[str, Any]:
        return {
            "widths": dict(sorted(self.widths.items())),
            "methods": {name: str(method) for name, method in sorted(self.methods.items())},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Candidate:
        methods = {name: Method.parse(text) for name, text in data["methods"].items()}
        return cls(dict(data["widths"]), methods)

    @property
    def id(self) -> str:
        """Ten hex digits that name the candidate by its content."""
        text = json.dumps(self.to_json(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:10]

    def __hash__(self) -> int:
        return hash(self.id)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Candidate) and self.to_json() == other.to_json()


Source = Literal["dense", "uniform", "solver", "mutation", "optuna"]
State = Literal["told", "measured", "failed"]


@dataclass(frozen=True)
class Evaluation:
    """Everything known of one told trial.

    ``error`` is the tier-0 additive proxy, ``kl`` the tier-1 divergence from the dense model's outputs (KL in nats, or
    what is as bad: `accuracy.divergence`), ``metrics`` the task's own on the validation split (tier 2), ``predicted`` the
    kernel-sum model's seconds by profile, ``latency`` whole compiled modules by profile, ``bytes`` the size of the stored weights.
    ``earlier`` has the latencies taken while searching, of profiles where ``latency`` was taken again, beside dense and the front.
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


def latency_to_json(latency: Latency) -> dict[str, Any]:
    data = dict(latency.__dict__)
    data["samples"] = list(latency.samples)
    data["kernels"] = [dict(kernel.__dict__) for kernel in latency.kernels]
    if not latency.noisy:  # which files of before do not say
        del data["noisy"]
    return data


def latency_from_json(data: Mapping[str, Any]) -> Latency:
    fields = dict(data)
    fields["samples"] = tuple(data["samples"])
    fields["kernels"] = tuple(KernelTime(**kernel) for kernel in data["kernels"])
    return Latency(**fields)


def evaluation_to_json(evaluation: Evaluation) -> dict[str, Any]:
    data = dict(evaluation.__dict__)
    data["candidate"] = evaluation.candidate.to_json()
    data["predicted"] = dict(evaluation.predicted)
    data["metrics"] = dict(evaluation.metrics)
    data["latency"] = {name: latency_to_json(value) for name, value in evaluation.latency.items()}
    data["earlier"] = {name: latency_to_json(value) for name, value in evaluation.earlier.items()}
    if not data["earlier"]:  # which files of before do not say
        del data["earlier"]
    return data


def evaluation_from_json(data: Mapping[str, Any]) -> Evaluation:
    fields = dict(data)
    fields["candidate"] = Candidate.from_json(data["candidate"])
    for name in ("latency", "earlier"):
        fields[name] = {profile: latency_from_json(value) for profile, value in data.get(name, {}).items()}
    return Evaluation(**fields)


def sound(evaluation: Evaluation, trial: int, candidate: Candidate) -> Evaluation:
    """The evaluation, if it can be that of this trial; ValueError for values that no search writes."""
    numbers = [evaluation.error, evaluation.seconds_spent, *evaluation.predicted.values(), *evaluation.metrics.values()]
    numbers += [] if evaluation.kl is None else [evaluation.kl]
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
