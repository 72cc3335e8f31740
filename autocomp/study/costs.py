"""What candidates are thought to cost, before anything is compiled: additive error, predicted seconds, bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from autocomp.accuracy.additive import additive_model
from autocomp.devices.device import Device
from autocomp.devices.latency import LatencyModel
from autocomp.graph.shapes import resized
from autocomp.records.candidate import Candidate, Method
from autocomp.records.evaluation import Evaluation
from autocomp.space.space import Space
from autocomp.study.solver import Factor, Problem, make_problem

if TYPE_CHECKING:
    from autocomp.database.database import LayerTable
    from autocomp.graph.graph import Graph, Group, Layer

LEAST = 1e-12  # seconds of a candidate whose layers are all left out: its logarithm is asked for


class Costs:
    """The layer tables joined with the devices' latency models; both sides are refitted to what was told and measured.

    With ``settled`` the latency models stay as they are: what is predicted then does not follow what this run measures. ``models`` take the
    place of the devices' own.
    """

    def __init__(
        self,
        graph: Graph,
        space: Space,
        tables: Sequence[LayerTable],
        devices: Mapping[str, Device],
        settled: bool = False,
        models: Mapping[str, LatencyModel] | None = None,
    ) -> None:
        self.settled = settled
        self.models = dict(models) if models else {name: device.model for name, device in devices.items()}
        self.graph, self.space, self.tables, self.devices = graph, space, list(tables), devices
        self.additive = additive_model(self.tables)
        self._stitched: list[tuple[Candidate, float]] = []
        self._problems: dict[str | None, Problem] = {}

    def widen(self, space: Space, tables: Sequence[LayerTable]) -> None:
        """Go over to a space that offers more widths; the next ``fit`` fits its tables."""
        self.space, self.tables = space, list(tables)
        self.additive = additive_model(self.tables)
        self._problems.clear()

    def problem(self, profile: str | None = None) -> Problem:
        """The additive problem at the present state of all fits, seconds over dense's: one profile's, or the mean over all."""
        if profile not in self._problems:
            dense = self.predict(self.space.dense())
            names = list(self.devices) if profile is None else [profile]
            factors = [
                Factor(**vars(table), seconds=self._seconds(table, dense, names))
                for table in self.additive.fitted_tables()
            ]
            self._problems[profile] = make_problem(factors, self.space.widths, fixed_bytes=self.graph.other_bytes)
        return self._problems[profile]

    def problems(self) -> list[Problem]:
        """The problem of all profiles together and, where there are several, each one's own: they may want different mixes."""
        own = list(self.devices) if len(self.devices) > 1 else []
        return [self.problem(), *(self.problem(name) for name in own)]

    def predict(self, candidate: Candidate) -> dict[str, float]:
        """Predicted seconds of one inference by profile."""
        return {name: model.module_seconds(*self._kernel_sum(model, candidate)) for name, model in self.models.items()}

    def relative(self, candidates: Sequence[Candidate]) -> dict[str, list[float]]:
        """Predicted seconds of each candidate over dense's, by profile."""
        dense = self.predict(self.space.dense())
        predicted = [self.predict(candidate) for candidate in candidates]
        return {name: [max(ours[name], LEAST) / dense[name] for ours in predicted] for name in dense}

    def observe(self, candidates: Sequence[Candidate], divergences: Sequence[float]) -> None:
        """Take in the KL of candidates that were stitched to fit tier 0 and are no trials; the next ``fit`` uses them."""
        self._stitched = [(self.space.normalise(c), kl) for c, kl in zip(candidates, divergences, strict=True)]

    def held_out_errors(self, told: Sequence[Evaluation]) -> dict[int, float]:
        """By trial, the tier-0 error as fitted to the other trials: what tier 0 would have said of it. Trials with a KL only."""
        known = [e for e in told if e.kl is not None and np.isfinite(e.kl)]
        candidates = [self.space.normalise(e.candidate) for e in known]
        errors = self.additive.held_out(candidates, [e.kl for e in known if e.kl is not None])
        return {e.trial: float(error) for e, error in zip(known, errors, strict=True)}

    def fit(self, told: Sequence[Evaluation]) -> None:
        """Refit tier 0 to all divergences read, and the latency models to all kernels in the stores and modules measured so far."""
        pairs = [*self._stitched, *((self.space.normalise(e.candidate), e.kl) for e in told if e.kl is not None)]
        self.additive = self.additive.fitted([candidate for candidate, _ in pairs], [kl for _, kl in pairs])
        measured = [evaluation for evaluation in told if evaluation.state == "measured"]
        for name, device in () if self.settled else self.devices.items():
            model = self.models[name]
            model.fit_kernels(device.store.records())
            sums = [self._kernel_sum(model, evaluation.candidate) for evaluation in measured]
            model.fit_modules(sums, [evaluation.latency[name].seconds for evaluation in measured])
        self._problems.clear()

    def before(self, models: Mapping[str, LatencyModel]) -> Costs:
        """These costs as they were before the first trial was told, with latency models of that time; these here stay as they are."""
        costs = Costs(self.graph, self.space, self.tables, self.devices, True, models)
        costs._stitched = list(self._stitched)
        costs.fit([])
        return costs

    def _kernel_sum(self, model: LatencyModel, candidate: Candidate) -> tuple[float, int]:
        candidate = self.space.normalise(candidate)
        total, count = 0.0, 0
        for name, layer in self.graph.layers.items():
            shape = resized(layer, *self.space.shape(name, candidate.widths))
            seconds, kernels = model.layer_seconds(shape, candidate.methods[name])
            total, count = total + seconds, count + kernels
        for group in self.graph.groups.values():
            seconds, kernels = model.attention_seconds(group, candidate.widths.get(group.name, group.width))
            total, count = total + seconds, count + kernels
        return total, count

    def _seconds(self, table: LayerTable, dense: Mapping[str, float], names: Sequence[str]) -> np.ndarray:
        layer = self.graph.layers[table.layer]
        group = self.graph.groups.get(table.in_group or "")
        carries = group is not None and table.layer == group.consumers[0]  # one table has the products of attention
        seconds = np.zeros(table.error.shape)
        for i, width_in in enumerate(table.widths_in):
            for o, width_out in enumerate(table.widths_out):
                through = layer.conv_groups > 1 and table.in_group is not None  # read on the diagonal only
                inputs = self.space.columns(table.layer, width_in)
                outputs = self.space.rows(table.layer, width_in if through else width_out)
                for m, method in enumerate(table.methods):
                    effective = self.space.effective(table.layer, inputs, outputs, method)
                    attention = (group, width_in) if carries and group is not None else None
                    seconds[i, o, m] = self._share(resized(layer, inputs, outputs), effective, dense, attention, names)
        return seconds

    def _share(
        self,
        layer: Layer,
        method: Method,
        dense: Mapping[str, float],
        attention: tuple[Group, int] | None,
        names: Sequence[str],
    ) -> float:
        shares = []
        for name in names:
            model = self.models[name]
            total, count = model.layer_seconds(layer, method)
            if attention is not None:
                more, kernels = model.attention_seconds(*attention)
                total, count = total + more, count + kernels
            shares.append((model.module_seconds(total, count) - model.module_seconds(0.0, 0)) / dense[name])
        return float(np.mean(shares))
