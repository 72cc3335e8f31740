"""Pareto sets, knee and hypervolume of points to be minimised on every axis: pure functions over arrays."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]


def pareto_set(points: npt.ArrayLike) -> Indices:
    """Indices of the points ``[n, axes]`` that no other dominates, ascending by the last axis.

    Of equal points the first belongs to it. Points with a value that is not finite never belong to it.

    Examples:
        >>> pareto_set([(0.1, 5.0), (0.3, 2.0), (0.4, 3.0)]).tolist()
        [1, 0]
    """
    rows = _rows(points)
    finite = np.flatnonzero(np.isfinite(rows).all(axis=1))
    # Sorted so that a point can only be dominated by an earlier one.
    order = finite[np.lexsort((finite, *rows[finite].T))]
    if rows.shape[1] == 2:
        error = rows[order, 0]
        return order[error < np.concatenate([[np.inf], np.minimum.accumulate(error)[:-1]])] if len(order) else order
    kept: list[int] = []
    for k in order:
        if not (rows[kept] <= rows[k]).all(axis=1).any():
            kept.append(int(k))
    return np.array(kept, dtype=np.intp)


def ranks(points: npt.ArrayLike) -> Indices:
    """Front number of every point ``[n, axes]``: 0 for the Pareto set, 1 for that of the rest, and so on; -1 where not finite.

    Examples:
        >>> ranks([(0.1, 5.0), (0.3, 2.0), (0.4, 3.0), (float("nan"), 1.0)]).tolist()
        [0, 0, 1, -1]
    """
    rows = _rows(points)
    result = np.full(len(rows), -1, dtype=np.intp)
    left = np.flatnonzero(np.isfinite(rows).all(axis=1))
    rank = 0
    while len(left):
        result[left[pareto_set(rows[left])]] = rank
        left = left[result[left] < 0]
        rank += 1
    return result


def spaced(points: npt.ArrayLike, count: int) -> list[int]:
    """Choose ``count`` points worth a dear evaluation: the Pareto set first, along its last axis, then later fronts.

    Within a front that is larger than what is left to choose, each next point is the one farthest (on the last axis)
    from those chosen already, so that any prefix of the result is spread too. Points that are not finite are never
    chosen.
    """
    rows = _rows(points)
    rank = ranks(rows)
    chosen: list[int] = []
    for level in range(int(rank.max(initial=-1)) + 1):
        members = [int(k) for k in np.flatnonzero(rank == level)]
        members.sort(key=lambda k: rows[k, -1])
        while members and len(chosen) < count:
            if not chosen:
                best = members[0]
            else:
                taken = rows[chosen, -1]
                best = max(members, key=lambda k: float(np.abs(taken - rows[k, -1]).min()))
            chosen.append(best)
            members.remove(best)
    return chosen


def gains(points: npt.ArrayLike, front: npt.ArrayLike, reference: tuple[float, float]) -> Floats:
    """Hypervolume that each of ``points`` ``[n, 2]`` would add to that of ``front`` ``[m, 2]``, up to the reference corner."""
    rows, corner = _rows(points), np.array([reference])
    kept = _rows(front)
    kept = kept[np.isfinite(kept).all(axis=1) & (kept[:, 1] < reference[1])]
    kept = np.concatenate([kept[np.argsort(kept[:, 1])], corner])
    # Steps of the front along the last axis: from each start to each end, what lies below ``height`` is free.
    starts, ends = np.concatenate([[-np.inf], kept[:-1, 1]]), kept[:, 1]
    height = np.minimum.accumulate(np.concatenate([[reference[0]], kept[:-1, 0]]))
    x, y = rows[:, :1], rows[:, 1:]
    with np.errstate(invalid="ignore"):
        area = np.maximum(height - x, 0.0) * np.maximum(ends - np.maximum(starts, y), 0.0)
    result: Floats = np.where(np.isfinite(rows).all(axis=1), area.sum(axis=1), 0.0)
    return result


def promising(points: npt.ArrayLike, known: npt.ArrayLike, count: int, reference: tuple[float, float]) -> list[int]:
    """Choose ``count`` of ``points`` ``[n, 2]`` for a dear evaluation, given those ``known`` already.

    Each next one adds the most hypervolume to the known and chosen ones; where none adds any, as `spaced` does. Points that are not
    finite are never chosen.
    """
    rows, front = _rows(points), _rows(known)
    chosen: list[int] = []
    while len(chosen) < count:
        area = gains(rows, front, reference)
        area[chosen] = 0.0
        if not len(rows) or area.max() <= 0:
            break
        best = int(area.argmax())
        chosen.append(best)
        front = np.concatenate([front, rows[[best]]])
    left = [k for k in range(len(rows)) if k not in chosen]
    return chosen + [left[k] for k in spaced(rows[left], count - len(chosen))]


def knee(points: npt.ArrayLike, errors: npt.ArrayLike | None = None) -> int | None:
    """Index of the front point farthest below the chord of the front's ends, points ``[n, 2]``; None for no points.

    Axes are scaled to the front's own extent, so the answer does not depend on units. With fewer than three points, or
    none below the chord, it is the point nearest to the ideal corner, of equally near ones (two points always are) the lowest on the first axis.

    ``errors`` ``[n]`` are standard errors on the first axis (0 where none is known). Then it is the lowest on the second axis of those that are
    no more than their own error above that point on the first: the one-standard-error rule (Breiman et al., Classification and Regression
    Trees, 1984).

    Examples:
        >>> knee([(0.0, 10.0), (0.1, 2.0), (1.0, 1.0)])
        1
        >>> knee([(0.0, 10.0), (0.1, 2.0), (1.0, 1.0)], errors=[0.0, 0.5, 1.5])
        2
    """
    rows = _rows(points)
    at = _sharpest(rows)
    if at is None or errors is None:
        return at
    allowed = rows[at, 0] + np.asarray(errors, dtype=np.float64)
    return min((int(k) for k in pareto_set(rows) if k == at or rows[k, 0] <= allowed[k]), key=lambda k: rows[k, 1])


def _sharpest(rows: Floats) -> int | None:
    front = pareto_set(rows)
    if not len(front):
        return None
    extent = np.ptp(rows[front], axis=0)
    scaled = (rows[front] - rows[front].min(axis=0)) / np.where(extent > 0, extent, 1.0)
    below = 1.0 - scaled.sum(axis=1)  # signed distance from the chord (0, 1)-(1, 0), times the root of 2
    if len(front) < 3 or below.max() <= 1e-9:
        return int(front[np.lexsort((rows[front, 0], (scaled**2).sum(axis=1).round(9)))[0]])
    return int(front[np.argmax(below)])


def hypervolume(points: npt.ArrayLike, reference: tuple[float, float]) -> float:
    """Area that the points ``[n, 2]`` dominate up to the reference corner; exact. Points beyond it add nothing.

    Examples:
        >>> hypervolume([(0.0, 0.5), (0.5, 0.0), (2.0, 2.0)], reference=(1.0, 1.0))
        0.75
    """
    rows = _rows(points)
    area, best = 0.0, reference[0]
    for k in pareto_set(rows):  # ascending by the second axis
        x, y = rows[k]
        if y < reference[1] and x < best:
            area += (best - x) * (reference[1] - y)
            best = x
    return float(area)


def hypervolume_history(points: npt.ArrayLike, reference: tuple[float, float]) -> list[float]:
    """Hypervolume of the first point, of the first two, and so on; never falls."""
    rows = _rows(points)
    history: list[float] = []
    front = np.zeros((0, 2))
    for row in rows:
        if np.isfinite(row).all() and not (front <= row).all(axis=1).any():
            front = np.concatenate([front[~(row <= front).all(axis=1)], row[None]])
            history.append(hypervolume(front, reference))
        else:
            history.append(history[-1] if history else 0.0)
    return history


def settled(metric: float) -> float:
    """A metric without its last binary digits, which the same samples summed in another order change: no point is better by these.

    >>> settled(0.1 + 0.2) == settled(0.3)
    True
    """
    return float(f"{metric:.12g}")


def _rows(points: npt.ArrayLike) -> Floats:
    rows = np.asarray(points, dtype=np.float64)
    return rows.reshape(0, 2) if rows.size == 0 else rows
