"""A candidate: a width for each group and a method for each layer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autocomp.records.precisions import FP32, PRECISIONS, Precision


@dataclass(frozen=True, order=True)
class Method:
    """How one layer is computed: precision, and ranks if it is factorised (one rank for SVD, two for Tucker-2)."""

    precision: Precision = FP32
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
