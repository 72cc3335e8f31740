"""Tier 0: what each option costs by itself, read off the layer database's tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autocomp.records import Candidate

if TYPE_CHECKING:
    from autocomp.compress.database import LayerTable


@dataclass(frozen=True)
class Sensitivity:
    """One row of a curve: the error (nats a sample) of one option of one layer or group, all else dense."""

    subject: str
    kind: str  # "method" of a layer, or "width" of a group
    option: str
    error: float


def curves(tables: Iterable[LayerTable]) -> list[Sensitivity]:
    """Return a row for each method of each layer at dense widths, and for each width of each group in fp32."""
    rows = []
    by_group: dict[str, dict[int, float]] = {}
    for table in tables:
        for m, method in enumerate(table.methods):
            rows.append(Sensitivity(table.layer, "method", str(method), float(table.error[0, 0, m])))
        if table.in_group is not None:
            errors = by_group.setdefault(table.in_group, {})
            for i, width in enumerate(table.widths_in):
                out = i if table.in_group == table.out_group else 0
                errors[width] = errors.get(width, 0.0) + float(table.error[i, out, 0])
    for group, errors in by_group.items():
        rows += [Sensitivity(group, "width", str(width), error) for width, error in errors.items()]
    return rows


def additive_error(tables: Iterable[LayerTable], candidate: Candidate) -> float:
    """Return the tier-0 proxy of a candidate: the sum of its layers' errors, nats a sample."""
    total = 0.0
    for table in tables:
        i = _level(table.widths_in, table.in_group, candidate.widths)
        o = _level(table.widths_out, table.out_group, candidate.widths)
        total += float(table.error[i, o, table.methods.index(candidate.methods[table.layer])])
    return total


def _level(widths: tuple[int, ...], group: str | None, chosen: Mapping[str, int]) -> int:
    return 0 if group is None else widths.index(chosen[group])
