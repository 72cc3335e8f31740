"""Tier 0, fitted: the layer tables' errors brought to the divergence that stitched candidates really show.

The tables add up what each choice costs alone, in Fisher-weighted squared error. That ranks well within one kind of compression and badly
across kinds (quantisation noise and missing channels hurt a network differently), and it misses that errors of neighbours add up before
they are squared. So the divergence is modelled as a sum over layers of a few terms, each with a coefficient fitted by non-negative least
squares: the layer's error by narrower groups, by a branch left out, by ranks and by each precision, and the geometric means of these with
the error of the groups on its two sides (adjacent pairs, after CLADO: Deng et al. 2023, arXiv:2307.05657). Every term is a function of one
layer's own table, so the exact solver takes the fitted tables as it takes the raw ones. Pairs of methods of two layers would not fit one
table and are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from autocomp.records.candidate import Candidate, Method
from autocomp.records.precisions import FP32

if TYPE_CHECKING:
    from autocomp.database.database import LayerTable

Floats = npt.NDArray[np.float64]

# Candidates below which the raw tables are used: the terms have some ten coefficients, and this is about twice as many. Chosen by
# hand, not measured; fitted to 48, the tables rank other candidates better than raw on all three tasks (reports/benchmarks/fidelity.md).
ENOUGH = 24
# Pull of each layer's own factors towards 1, for relative errors. Held-out rank correlation on digits, digits-mobile and tokens (100 to 160
# candidates, a third held out) was the same within .01 from .01 to .1, and .015 lower at 1: read once, when this was written (commit 0fc7dca).
PULL = 0.1
FLOOR = 0.3  # of the median divergence, added before errors are taken relative to it; chosen by hand, not measured
LEFT_OUT = "left out"
FOLDS = 5  # of the cross-validation in `held_out`, the usual number


@dataclass(frozen=True)
class AdditiveModel:
    """Terms of every layer, ``[terms, widths in, widths out, methods]`` each, and the fitted coefficients ``[layers, terms]``.

    ``names`` name the terms; ``coefficients`` is None before a fit, and the tables then stay as they are.
    """

    tables: tuple[LayerTable, ...]
    names: tuple[str, ...]
    terms: tuple[Floats, ...]
    coefficients: Floats | None = None

    def fitted(self, candidates: Sequence[Candidate], divergences: Sequence[float]) -> AdditiveModel:
        """Return the model fitted to candidates (normalised, of this space) and their KL in nats; itself where they are too few.

        First one coefficient a term for all layers, then a factor for each layer's share of widths, methods and pairs, pulled towards 1.
        Divergences that are not finite and positive say nothing here and are left out.
        """
        kept = [k for k, value in enumerate(divergences) if np.isfinite(value) and value > 0]
        if len(kept) < ENOUGH:
            return self
        features = self._features([candidates[k] for k in kept])  # [candidates, layers, terms]
        target, whole = np.array(divergences)[kept], np.array([0 not in candidates[k].widths.values() for k in kept])
        if whole.all() or whole.sum() < ENOUGH:
            return replace(self, coefficients=_fit(features, target, self._families()))
        # What a branch left out costs is foreseen roughly: it is fitted to what the rest leaves, and says nothing of that.
        coefficients = _fit(features[whole], target[whole], self._families())
        rest = np.einsum("clt,lt->c", features[~whole], coefficients)
        out = features[~whole] * [name == LEFT_OUT for name in self.names]
        return replace(
            self, coefficients=coefficients + _fit(out, np.maximum(target[~whole] - rest, 0), self._families())
        )

    def fitted_tables(self) -> list[LayerTable]:
        """Return the layer tables with the fitted divergence in the place of the raw error."""
        if self.coefficients is None:
            return list(self.tables)
        result = []
        for table, terms, weights in zip(self.tables, self.terms, self.coefficients, strict=True):
            error = np.where(np.isfinite(table.error), np.tensordot(weights, terms, axes=1), table.error)
            result.append(replace(table, error=error))
        return result

    def predict(self, candidates: Sequence[Candidate]) -> Floats:
        """Return the additive error of candidates: fitted, or raw without a fit."""
        if self.coefficients is None:
            at = [[table.error[_place(table, c)] for table in self.tables] for c in candidates]
            found: Floats = np.array(at, dtype=np.float64).reshape(len(candidates), -1).sum(1)
            return found
        result: Floats = np.einsum("clt,lt->c", self._features(candidates), self.coefficients)
        return result

    def held_out(self, candidates: Sequence[Candidate], divergences: Sequence[float]) -> Floats:
        """Return what a fit to the other four fifths predicts for each candidate: how well the model does on new ones."""
        order = np.random.default_rng(0).permutation(len(candidates))
        predicted = np.full(len(candidates), np.nan)
        for fold in range(FOLDS):
            out = order[fold::FOLDS]
            rest = np.setdiff1d(order, out)
            model = self.fitted([candidates[k] for k in rest], [divergences[k] for k in rest])
            if len(out):
                predicted[out] = model.predict([candidates[k] for k in out])
        return predicted

    def _features(self, candidates: Sequence[Candidate]) -> Floats:
        features = np.zeros((len(candidates), len(self.tables), len(self.names)))
        for c, candidate in enumerate(candidates):
            for k, (table, terms) in enumerate(zip(self.tables, self.terms, strict=True)):
                features[c, k] = terms[(slice(None), *_place(table, candidate))]
        return features

    def _families(self) -> list[int]:
        """0 for the term of widths, 1 for those of methods, 2 for pairs."""
        return [0 if name == "width" else 2 if name.startswith("pair") else 1 for name in self.names]


def additive_model(tables: Sequence[LayerTable]) -> AdditiveModel:
    """Return the unfitted model of layer tables."""
    precisions = sorted({m.precision for table in tables for m in table.methods if m.precision != FP32})
    names = ("width", "rank", LEFT_OUT, *precisions, "pair of widths", "pair with method")
    curves: dict[str, Floats] = {}
    for table in tables:
        if table.in_group is not None:
            own = _finite(table.error)
            same = table.in_group == table.out_group
            curve = np.array([own[i, i if same else 0, 0] for i in range(len(own))])
            curves[table.in_group] = curves.get(table.in_group, 0.0) + curve
    return AdditiveModel(tuple(tables), names, tuple(_terms(table, names, curves) for table in tables))


def _terms(table: LayerTable, names: Sequence[str], curves: Mapping[str, Floats]) -> Floats:
    error = _finite(table.error)
    width = error[:, :, :1]
    by_rank = np.zeros_like(error)
    for m, method in enumerate(table.methods):
        if method.ranks:
            whole = (
                table.methods.index(Method(FP32, method.ranks)) if Method(FP32, method.ranks) in table.methods else m
            )
            by_rank[:, :, m] = np.maximum(error[:, :, whole] - width[:, :, 0], 0)
    rest = np.maximum(error - width - by_rank, 0)
    terms = np.zeros((len(names), *error.shape))
    terms[names.index("width")] = width
    terms[names.index("rank")] = by_rank
    for m, method in enumerate(table.methods):
        if method.precision != FP32:
            terms[names.index(method.precision), :, :, m] = rest[:, :, m]
    # What narrowing the groups on either side costs all who read them: its root is an amplitude, as the root of the layer's own is.
    before = curves.get(table.in_group or "", np.zeros(error.shape[0]))[:, None, None]
    behind = curves.get(table.out_group or "", np.zeros(error.shape[1]))[None, :, None]
    if table.in_group is not None and table.in_group == table.out_group:
        behind = np.zeros_like(behind)
    terms[names.index("pair of widths")] = np.sqrt(before * behind)
    terms[names.index("pair with method")] = np.sqrt((rest + by_rank) * (before + behind))
    ends = [i for i, kept in enumerate(table.widths_in) if not kept and table.in_group is not None]
    terms[:, ends] = 0.0
    terms[names.index(LEFT_OUT), ends] = np.broadcast_to(width, error.shape)[ends]
    if table.out_group is not None:  # a layer that is left out costs nothing itself
        terms[:, :, [o for o, width in enumerate(table.widths_out) if not width]] = 0.0
    return terms


def _fit(features: Floats, target: Floats, families: Sequence[int]) -> Floats:
    """Coefficients [layers, terms] for features [candidates, layers, terms], least squares of relative errors."""
    from scipy.optimize import nnls

    weight = 1 / np.maximum(target + FLOOR * np.median(target), 1e-12)
    summed = features.sum(1)
    scale = np.maximum(summed.max(0), 1e-300)
    shared = nnls(summed / scale * weight[:, None], target * weight)[0] / scale
    parts = np.stack(  # [candidates, layers, families]
        [(features * shared)[:, :, [f == family for f in families]].sum(2) for family in range(3)], axis=2
    )
    used = np.flatnonzero(parts.max(0).ravel() > 0)
    columns = parts.reshape(len(target), -1)[:, used] * weight[:, None]
    pull = np.sqrt(PULL)
    solved = nnls(
        np.concatenate([columns, pull * np.eye(len(used))]),
        np.concatenate([target * weight, np.full(len(used), pull)]),
    )[0]
    factors = np.ones(parts.shape[1] * 3)
    factors[used] = solved
    result: Floats = shared * factors.reshape(-1, 3)[:, list(families)]
    return result


def _place(table: LayerTable, candidate: Candidate) -> tuple[int, int, int]:
    def level(widths: tuple[int, ...], group: str | None) -> int:
        return 0 if group is None else widths.index(candidate.widths[group])

    return (
        level(table.widths_in, table.in_group),
        level(table.widths_out, table.out_group),
        table.methods.index(candidate.methods[table.layer]),
    )


def _finite(error: Floats) -> Floats:
    return np.where(np.isfinite(error), np.maximum(error, 0), 0.0)
