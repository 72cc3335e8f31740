"""A candidate: a width for each group and a method for each layer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from autocomp.records.precisions import FP32, PRECISIONS, Precision


@dataclass(frozen=True, order=True)
class Method:
    """How one layer is computed: precision, and ranks if it is factorised (one rank for SVD, two for Tucker-2).

    Examples:
        >>> str(Method("w8a8", ranks=(32,)))
        'r32/w8a8'
    """

    precision: Precision = FP32
    ranks: tuple[int, ...] = ()

    def __str__(self) -> str:
        rank = "r" + "x".join(map(str, self.ranks)) if self.ranks else ""
        return "/".join(part for part in (rank, self.precision) if part)

    @classmethod
    def parse(cls, text: str) -> Method:
        """Read the form ``str`` writes: ``fp32``, ``w8a8``, ``r32/w4``, ``r16x32/vq4``.

        Raises:
            ValueError: It is another text.

        Examples:
            >>> Method.parse("r16x32/vq4")
            Method(precision='vq4', ranks=(16, 32))
        """
        head, _, tail = text.rpartition("/")
        if tail not in PRECISIONS or (head and not head.startswith("r")):
            raise ValueError(f"not a method: {text!r}")
        ranks = tuple(int(part) for part in head[1:].split("x")) if head else ()
        return cls(tail, ranks)


@dataclass(frozen=True)
class Candidate:
    """One choice for every group and layer: kept widths of the channel groups (in channels), methods of the layers.

    Two are equal where they choose the same, whatever the order.

    Examples:
        >>> candidate = Candidate({"hidden": 16}, {"fc": Method("w8a8"), "head": Method("fp32")})
        >>> candidate.id
        '57dff0832c'
        >>> Candidate.from_json(candidate.to_json()) == candidate
        True
    """

    widths: Mapping[str, int]
    methods: Mapping[str, Method]

    def to_json(self) -> dict[str, Any]:
        """Return what JSON can hold: widths by group, methods by layer as texts, each sorted by name."""
        return {
            "widths": dict(sorted(self.widths.items())),
            "methods": {name: str(method) for name, method in sorted(self.methods.items())},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Candidate:
        """Read what `to_json` returned; KeyError or ValueError where it is something else."""
        methods = {name: Method.parse(text) for name, text in data["methods"].items()}
        return cls(dict(data["widths"]), methods)

    @cached_property
    def id(self) -> str:
        """Ten hex digits that name the candidate by its content."""
        text = json.dumps(self.to_json(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:10]

    def __hash__(self) -> int:
        return hash(self.id)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Candidate) and self.widths == other.widths and self.methods == other.methods
