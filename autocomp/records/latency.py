"""A time, how it was obtained, and of what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

How = Literal["measured", "estimated"]


@dataclass(frozen=True)
class KernelTime:
    """One fused function of a compiled module: what it is and what it costs alone.

    ``seconds`` and ``flops`` (operations: a multiply-add is two) are of one call; ``key`` is its place in the store of tuned kernels.
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

    ``seconds`` is the median, ``spread`` the interquartile range over the median, ``how`` is ``measured`` or ``estimated``, ``device`` what it
    was taken on, ``error`` the known relative error of an estimate (None when measured), ``samples`` the raw repeats in seconds, ``kernels``
    the calls of one inference, in order. ``noisy``: other work on the machine disturbed it, and went on when it was measured again. ``tail`` has
    percentiles of single inferences in seconds (``p50``, ``p95``, ``p99``), where they were taken one by one: samples are averages of many.
    ``drift`` is what seconds and samples were multiplied by, to be as they would have been when the uncompressed model was first timed: it was
    timed again in turn with each candidate, since a machine's speed changes over minutes.
    ``watts`` is what one inference draws while it runs, above what the board draws idle, by its profile: `energy` is estimated from it, where
    ``joules`` of this very module were not counted, ``joules_spread`` being the interquartile range of its windows over their median.
    ``memory`` is how many bytes the module needs while it runs: weights, inputs, outputs and the buffers between kernels, as they are laid out.

    Examples:
        >>> latency = Latency(seconds=2e-4, spread=0.01, how="measured", profile="x86-host")
        >>> f"{latency.seconds * 1e3} ms, {latency.how}"
        '0.2 ms, measured'
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
    tail: Mapping[str, float] = field(default_factory=dict)
    memory: int | None = None
    drift: float = 1.0
    watts: float | None = None
    joules: float | None = None
    joules_spread: float | None = None

    @property
    def energy(self) -> float | None:
        """Joules of one inference: counted, else as though every one drew the same power, seconds times watts. None where no power is known.

        >>> Latency(seconds=2e-3, spread=0.0, how="estimated", profile="cortex-a76", watts=1.5).energy
        0.003
        """
        if self.joules is not None:
            return self.joules
        return None if self.watts is None else self.watts * self.seconds


def latency_to_json(latency: Latency) -> dict[str, Any]:
    """Return what JSON can hold, by the names of the fields; `latency_from_json` reads it back."""
    data = dict(latency.__dict__)
    data["samples"] = list(latency.samples)
    data["kernels"] = [dict(kernel.__dict__) for kernel in latency.kernels]
    data["tail"] = dict(latency.tail)
    for name in ("noisy", "tail", "memory", "watts"):  # which files of before do not say
        if not data[name]:
            del data[name]
    for name in ("joules", "joules_spread"):
        if data[name] is None:
            del data[name]
    if latency.drift == 1.0:
        del data["drift"]
    return data


def latency_from_json(data: Mapping[str, Any]) -> Latency:
    """Read what `latency_to_json` returned; KeyError or TypeError where it is something else."""
    fields = dict(data)
    fields["samples"] = tuple(data["samples"])
    fields["kernels"] = tuple(KernelTime(**kernel) for kernel in data["kernels"])
    return Latency(**fields)
