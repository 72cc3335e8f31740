"""The additive search problem, solved exactly where its graph of groups is thin: seeds for the study in milliseconds.

Every layer has a table of error, seconds and bytes over (width of its input group, width of its output group, method).
Their sums are what a candidate is thought to cost [multiple-choice knapsack: SPDY]. For a price on seconds, the methods
are minimised inside each table, and what is left, a sum of tables over pairs of groups, falls to min-sum elimination,
or to coordinate descent with warm starts where elimination would need too large a table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from autocomp.records.candidate import Candidate, Method

Floats = npt.NDArray[np.float64]
Levels = npt.NDArray[np.int64]

# Of one elimination table. 40 prices at once, in float64, then take 10 MB (40 x 2^15 x 8 bytes), and a step about 5 ms, as seen when it was
# written (commit 44e7e4e); no benchmark holds that.
MAX_CELLS = 1 << 15
_FORBIDDEN = 1e30  # stands for an infinite error: finite, so that a weight of 0 does not turn it into NaN


class Cost(NamedTuple):
    """What the tables say of a candidate: additive error, seconds of one inference, bytes of weights."""

    error: float
    seconds: float
    bytes: int


@dataclass(frozen=True)
class Factor:
    """One layer's tables, each of shape ``[len(widths_in), len(widths_out), len(methods)]``.

    A group of None is a side that no group narrows; its widths are then one entry. An infinite error forbids a
    combination. A layer whose two sides are one group (depthwise) is read on the diagonal of its tables.
    """

    layer: str
    in_group: str | None
    out_group: str | None
    widths_in: tuple[int, ...]
    widths_out: tuple[int, ...]
    methods: tuple[Method, ...]
    error: Floats
    seconds: Floats
    bytes: Floats


@dataclass(frozen=True)
class Problem:
    """Tables over numbered variables: first the groups, then the layers' methods; level 0 is dense.

    Made by ``make_problem``. Where a candidate is a row of integers (*levels*), columns are in the order of ``groups``
    and then of ``factors``; ``sizes`` counts the levels of each column.
    """

    factors: tuple[Factor, ...]
    groups: tuple[str, ...]
    widths: tuple[tuple[int, ...], ...]
    fixed_seconds: float
    fixed_bytes: int
    sides: tuple[tuple[int, int], ...]  # per factor: columns of its input and output group, -1 for none
    order: tuple[int, ...] | None = field(repr=False)  # elimination order of the groups, None if one step is too large

    @property
    def sizes(self) -> Levels:
        return np.array([len(w) for w in self.widths] + [len(f.methods) for f in self.factors], dtype=np.int64)

    def encode(self, candidate: Candidate) -> Levels:
        """Levels of a candidate, shape ``[columns]``. ValueError where it names a width or method that is no level."""
        levels = []
        for group, widths in zip(self.groups, self.widths, strict=True):
            levels.append(widths.index(candidate.widths[group]))
        for factor in self.factors:
            levels.append(factor.methods.index(candidate.methods[factor.layer]))
        return np.array(levels, dtype=np.int64)

    def decode(self, levels: Sequence[int] | Levels) -> Candidate:
        """The candidate of one row of levels."""
        chosen = [int(level) for level in levels]
        split = len(self.groups)
        widths = {g: w[k] for g, w, k in zip(self.groups, self.widths, chosen[:split], strict=True)}
        methods = {f.layer: f.methods[k] for f, k in zip(self.factors, chosen[split:], strict=True)}
        return Candidate(widths, methods)

    def cost(self, candidate: Candidate) -> Cost:
        """Look a candidate up in the tables."""
        error, seconds, size = self.costs(self.encode(candidate)[None])
        return Cost(float(error[0]), float(seconds[0]), int(size[0]))

    def costs(self, levels: Levels) -> tuple[Floats, Floats, Floats]:
        """Error, seconds and bytes of many candidates at once: levels ``[n, columns]`` → three arrays ``[n]``."""
        start, strides, columns, tables = self._flat
        at = start + sum(levels[:, column] * stride for column, stride in zip(columns, strides, strict=True))
        error, seconds, size = (table[at].sum(axis=1) for table in tables)
        return error, self.fixed_seconds + seconds, self.fixed_bytes + size

    @cached_property
    def _flat(self) -> tuple[Levels, list[Levels], list[Levels], list[Floats]]:
        """All tables one behind the other, and where a row of levels is read: each factor's start, strides and columns (stride 0: no group)."""
        shapes = np.array([factor.error.shape for factor in self.factors], dtype=np.int64).reshape(-1, 3)
        lengths = shapes.prod(axis=1)
        sides = np.array(self.sides, dtype=np.int64).reshape(-1, 2)
        strides = [
            (sides[:, 0] >= 0) * shapes[:, 1] * shapes[:, 2],
            (sides[:, 1] >= 0) * shapes[:, 2],
            np.ones_like(lengths),
        ]
        columns = [*np.maximum(sides.T, 0), len(self.groups) + np.arange(len(self.factors))]
        tables = [
            np.concatenate([getattr(factor, name).ravel() for factor in self.factors] or [np.zeros(0)])
            for name in ("error", "seconds", "bytes")
        ]
        return np.cumsum(lengths) - lengths, strides, columns, tables


def make_problem(
    factors: Sequence[Factor],
    widths: Mapping[str, tuple[int, ...]],
    fixed_seconds: float = 0.0,
    fixed_bytes: int = 0,
) -> Problem:
    """Number the variables and check the tables; ``widths`` are those of the search space, descending.

    ``fixed_seconds`` and ``fixed_bytes`` are what no choice changes. ValueError for a table of a wrong shape, a NaN, or
    a group that ``widths`` lacks.
    """
    column = {group: k for k, group in enumerate(widths)}
    sides: list[tuple[int, int]] = []
    cleaned = []
    for factor in factors:
        shape = (len(factor.widths_in), len(factor.widths_out), len(factor.methods))
        for group, count in ((factor.in_group, shape[0]), (factor.out_group, shape[1])):
            expected = 1 if group is None else len(widths[group]) if group in widths else -1
            if count != expected:
                raise ValueError(f"layer {factor.layer!r}: {count} widths for group {group!r}, which has {expected}")
        tables = {}
        for name in ("error", "seconds", "bytes"):
            table = np.asarray(getattr(factor, name), dtype=np.float64)
            if table.shape != shape:
                raise ValueError(f"layer {factor.layer!r}: table {name!r} has shape {table.shape}, not {shape}")
            if np.isnan(table).any():
                raise ValueError(f"layer {factor.layer!r}: table {name!r} holds NaN")
            tables[name] = np.minimum(table, _FORBIDDEN)
        into, out = (-1 if g is None else column[g] for g in (factor.in_group, factor.out_group))
        sides.append((into, out))
        cleaned.append(Factor(**{**factor.__dict__, **tables}))
    sizes = [len(w) for w in widths.values()]
    order = _elimination_order(sizes, [{c for c in side if c >= 0} for side in sides])
    columns = tuple(tuple(levels) for levels in widths.values())
    return Problem(tuple(cleaned), tuple(widths), columns, fixed_seconds, fixed_bytes, tuple(sides), order)


def solve_front(problem: Problem, n: int = 40) -> list[Candidate]:
    """At most ``n`` unique candidates along the additive front of (error, seconds), spread evenly in seconds.

    First the convex hull, by bisecting the gaps between its known points; then, because a hull may leave wide gaps, a
    greedy walk fills each of ``n`` evenly spaced budgets. Ordered from slow to fast; the cheapest ends of both axes
    included.
    """
    pool = _hull(problem, n)
    error, seconds, _ = problem.costs(pool)
    fastest, slowest = seconds.min(), seconds.max()
    budgets = np.linspace(fastest, slowest, max(n, 2))
    filled = []
    for budget in budgets[1:-1]:
        below = np.flatnonzero(seconds <= budget)
        filled.append(_fill(problem, pool[below[np.argmin(error[below])]], float(budget)))
    pool = np.unique(np.concatenate([pool, np.array(filled).reshape(-1, pool.shape[1])]), axis=0)
    error, seconds, _ = problem.costs(pool)
    order = np.lexsort((error, seconds))
    best = np.minimum.accumulate(error[order])
    front = order[np.r_[True, best[1:] < best[:-1]]]  # non-dominated, fast to slow
    chosen = sorted({int(np.argmin(np.abs(seconds[front] - budget))) for budget in budgets}, reverse=True)
    return [problem.decode(pool[front[k]]) for k in chosen[:n]]


def neighbours(problem: Problem, candidate: Candidate) -> list[Candidate]:
    """Every candidate one change away: a group one level wider or narrower, or a layer with another method."""
    return [problem.decode(row) for row in _moves(problem, problem.encode(candidate))]


def minimise(problem: Problem, prices: Floats, starts: Levels | None = None, exact: bool = True) -> Levels:
    """Levels ``[prices, columns]`` that minimise ``price[0] * error + price[1] * seconds`` for every row of ``prices``.

    Exact by elimination where the graph of groups allows (``exact=False`` or too wide a graph: coordinate descent from
    ``starts``, from all-dense and from all-smallest, the best kept).
    """
    tables: _Tables = []
    methods = []
    for factor, (i, o) in zip(problem.factors, problem.sides, strict=True):
        table = prices[:, 0, None, None, None] * factor.error + prices[:, 1, None, None, None] * factor.seconds
        best = np.asarray(table.argmin(axis=3))
        table = np.take_along_axis(table, best[..., None], axis=3)[..., 0]
        if i >= 0 and i == o:
            diagonal = np.arange(table.shape[1])
            table = table[:, diagonal, diagonal]
        elif i < 0:
            table = table[:, 0] if o >= 0 else table[:, 0, 0]
        elif o < 0:
            table = table[:, :, 0]
        tables.append(((i, o) if -1 != i != o != -1 else (max(i, o),) if max(i, o) >= 0 else (), table))
        methods.append(best)
    if exact and problem.order is not None:
        widths = _eliminate(problem, problem.order, tables, len(prices))
    else:
        widths = _descend(problem, tables, len(prices), starts)
    rows = np.arange(len(prices))
    zero = np.zeros(len(prices), dtype=np.int64)
    columns = [widths]
    for best, (i, o) in zip(methods, problem.sides, strict=True):
        columns.append(best[rows, widths[:, i] if i >= 0 else zero, widths[:, o] if o >= 0 else zero][:, None])
    return np.concatenate(columns, axis=1)


_Tables = list[tuple[tuple[int, ...], Floats]]  # (columns of groups, table [prices, *levels of these])


def _elimination_order(sizes: list[int], scopes: list[set[int]]) -> tuple[int, ...] | None:
    """Greedy order that keeps the joint table small; None if one would exceed ``MAX_CELLS``."""
    left, order = set(range(len(sizes))), []
    scopes = [set(scope) for scope in scopes]
    while left:
        joint = {v: {v}.union(*(s for s in scopes if v in s)) for v in left}
        cells = {v: int(np.prod([sizes[u] for u in joint[v]], dtype=np.float64)) for v in left}
        best = min(left, key=lambda v: (cells[v], v))
        if cells[best] > MAX_CELLS:
            return None
        scopes = [s for s in scopes if best not in s] + [joint[best] - {best}]
        order.append(best)
        left.remove(best)
    return tuple(order)


def _eliminate(problem: Problem, order: tuple[int, ...], tables: _Tables, count: int) -> Levels:
    """Min-sum variable elimination, all prices at once; the argmins are walked backwards for the levels."""
    live = list(tables)
    steps: list[tuple[int, tuple[int, ...], npt.NDArray[np.intp]]] = []
    for variable in order:
        touched = [t for t in live if variable in t[0]]
        live = [t for t in live if variable not in t[0]]
        scope = tuple(sorted({c for t in touched for c in t[0]} - {variable}))
        joint = np.zeros((count, *(len(problem.widths[c]) for c in scope), len(problem.widths[variable])))
        for columns, table in touched:
            joint += _aligned(table, columns, (*scope, variable))
        steps.append((variable, scope, joint.argmin(axis=-1)))
        live.append((scope, joint.min(axis=-1)))
    levels = np.zeros((count, len(problem.groups)), dtype=np.int64)
    rows = np.arange(count)
    for variable, scope, best in reversed(steps):
        levels[:, variable] = best[(rows, *(levels[:, c] for c in scope))]
    return levels


def _aligned(table: Floats, columns: tuple[int, ...], scope: tuple[int, ...]) -> Floats:
    """View a table over ``columns`` as one over ``scope`` (a superset), with axes of length 1 for the others."""
    present = [c for c in scope if c in columns]
    turned = table.transpose(0, *(1 + columns.index(c) for c in present))
    sizes = iter(turned.shape[1:])
    return turned.reshape(len(table), *(next(sizes) if c in columns else 1 for c in scope))


def _descend(problem: Problem, tables: _Tables, count: int, starts: Levels | None) -> Levels:
    """Coordinate descent over the groups, all prices and starts at once; ``starts``: ``[starts, prices, columns]``."""
    groups = len(problem.groups)
    smallest = np.array([len(w) - 1 for w in problem.widths], dtype=np.int64)
    begin = [np.zeros((count, groups), dtype=np.int64), np.tile(smallest, (count, 1))]
    if starts is not None:
        begin += [start[:, :groups] for start in starts]
    levels = np.stack(begin)  # [starts, prices, groups]
    rows = np.arange(count)[None, :]
    touching = [[t for t in tables if g in t[0]] for g in range(groups)]
    for _ in range(100):  # each sweep lowers some cost or is the last; 100 was never reached in random problems
        before = levels.copy()
        for g in range(groups):
            total = np.zeros((*levels.shape[:2], len(problem.widths[g])))
            for columns, table in touching[g]:
                if len(columns) == 1:
                    total += table
                elif columns[0] == g:
                    total += table[rows, :, levels[:, :, columns[1]]]
                else:
                    total += table[rows, levels[:, :, columns[0]], :]
            levels[:, :, g] = total.argmin(axis=-1)
        if (before == levels).all():
            break
    value = np.zeros(levels.shape[:2])
    for columns, table in tables:
        value += table[(rows, *(levels[:, :, c] for c in columns))]
    result: Levels = levels[value.argmin(axis=0), np.arange(count)]
    return result


def _hull(problem: Problem, n: int) -> Levels:
    """Points of the lower convex hull of (seconds, error): solve for the slope of every gap that is still too wide."""
    spread_e = (
        sum(float(np.ptp(f.error[f.error < _FORBIDDEN])) for f in problem.factors if (f.error < _FORBIDDEN).any())
        or 1.0
    )
    spread_s = sum(float(np.ptp(f.seconds)) for f in problem.factors) or 1.0
    # The other axis gets a price too small to matter and large enough to break ties.
    ends = np.array([[1 / spread_e, 1e-9 / spread_s], [1e-9 / spread_e, 1 / spread_s]])
    points = np.unique(minimise(problem, ends), axis=0)
    for _ in range(12):  # the gaps halve: 12 rounds part a range into thousands
        error, seconds, _ = problem.costs(points)
        order = np.argsort(seconds)
        points, error, seconds = points[order], error[order], seconds[order]
        wide = np.diff(seconds) > (seconds[-1] - seconds[0]) / (2 * n)
        falls = np.diff(error) < 0
        at = np.flatnonzero(wide & falls)
        if not len(at):
            break
        prices = np.stack([seconds[at + 1] - seconds[at], error[at] - error[at + 1]], axis=1)
        found = minimise(problem, prices, np.stack([points[at], points[at + 1]]))
        grown = np.unique(np.concatenate([points, found]), axis=0)
        if len(grown) == len(points):
            break
        points = grown
    return points


def _fill(problem: Problem, levels: Levels, budget: float) -> Levels:
    """Walk by the single change that lowers the error most while the seconds stay within the budget."""
    error = float(problem.costs(levels[None])[0][0])
    for _ in range(len(levels)):
        moves = _moves(problem, levels)
        errors, seconds, _ = problem.costs(moves)
        errors[seconds > budget] = np.inf
        best = int(errors.argmin()) if len(errors) else 0
        if not len(errors) or not errors[best] < error:
            break
        levels, error = moves[best], float(errors[best])
    return levels


def _moves(problem: Problem, levels: Levels) -> Levels:
    """Rows of levels one change away: groups by one level, methods to any other."""
    column, level = [], []
    for k, size in enumerate(problem.sizes):
        now = int(levels[k])
        others = [now - 1, now + 1] if k < len(problem.groups) else [other for other in range(size) if other != now]
        for other in others:
            if 0 <= other < size:
                column.append(k)
                level.append(other)
    rows = np.tile(levels, (len(column), 1))
    rows[np.arange(len(column)), column] = level
    return rows
