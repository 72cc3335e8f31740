"""What a candidate must meet: limits on what it loses, on its time, its energy, its size and its memory."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from autocomp.config.limits import ALL, read_drops, read_energies, read_latencies, read_size

LONGEST = 2000  # characters of a name, a path or an address


def _printable(text: str) -> str:
    if not text.isprintable() or len(text) > LONGEST:
        raise ValueError(f"must be one line of at most {LONGEST} printable characters")
    return text


Text = Annotated[str, Field(min_length=1), AfterValidator(_printable)]

Limit = float | str  # absolute, or against the uncompressed model: text
Limits = Limit | dict[Text, Limit]  # for all, or by the name of a metric or profile; ``*`` names all others


class Goals(BaseModel):
    """What a candidate must meet to count as feasible; None: no limit.

    A text states a limit against the uncompressed model: a drop of ``1%``, a latency of ``2x`` (twice as fast), a size of ``5x``.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    max_drop: Annotated[Limits | None, BeforeValidator(read_drops)] = Field(
        default=None,
        description="largest loss against the uncompressed model, in the metric's units, in points (0.5pt) or of its value (1%): of the "
        "objective, or by metric or slice ('accuracy/noisy')",
    )
    max_latency: Annotated[Limits | None, BeforeValidator(read_latencies)] = Field(
        default=None,
        description="seconds, text with a unit (0.5ms), or how many times faster than the uncompressed model (2x): on every profile, or by "
        "profile",
    )
    max_energy: Annotated[Limits | None, BeforeValidator(read_energies)] = Field(
        default=None,
        description="joules of one inference, text with a unit (5mJ), or how many times less than the uncompressed model (2x): on every "
        "profile, or by profile; known where a profile states power.idle and power.load",
    )
    max_size: Annotated[int | str | None, BeforeValidator(read_size)] = Field(
        default=None, description="bytes of stored weights, text with a unit (500KB), or how many times smaller (5x)"
    )

    max_memory: Annotated[int | str | None, BeforeValidator(read_size)] = Field(
        default=None,
        description="bytes that the compiled module may need while it runs, on every profile: text with a unit (2MB), or how many times less "
        "than the uncompressed model (3x)",
    )

    def latency(self, profile: str) -> Limit | None:
        """The limit on a profile's latency."""
        return _of(self.max_latency, profile)

    def energy(self, profile: str) -> Limit | None:
        """The limit on the energy of one inference on a profile."""
        return _of(self.max_energy, profile)

    def drops(self, objective: str) -> dict[str, Limit]:
        """The limits on what metrics may lose, by metric."""
        if not isinstance(self.max_drop, dict):
            return {} if self.max_drop is None else {objective: self.max_drop}
        others = {objective: self.max_drop[ALL]} if ALL in self.max_drop else {}
        return others | {name: limit for name, limit in self.max_drop.items() if name != ALL}  # a name wins over ``*``

    def profiles_named(self) -> list[tuple[str, str]]:
        """Each profile that a limit names, with the name of the limit before it."""
        limits = {"max_latency": self.max_latency, "max_energy": self.max_energy}
        return [
            (goal, name) for goal, given in limits.items() if isinstance(given, dict) for name in given if name != ALL
        ]

    @property
    def any(self) -> bool:
        """Whether there is a goal at all."""
        return any(value is not None for value in dict(self).values())

    def __str__(self) -> str:
        return ", ".join(f"{name} {_goal_text(value)}" for name, value in self if value is not None) or "none"


def _of(limits: Limits | None, name: str) -> Limit | None:
    return limits.get(name, limits.get(ALL)) if isinstance(limits, dict) else limits


def _goal_text(value: object) -> str:
    return " ".join(f"{name}={limit}" for name, limit in value.items()) if isinstance(value, dict) else str(value)
