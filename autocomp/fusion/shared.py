"""What two or more layers in the same place may share, what each way costs and saves, and which is taken where.

``own``: nothing. ``shared``: one weight for all, that which moves all their outputs least together (the closed form of Jin et al., Dataless
knowledge fusion by merging weights, 2023, https://arxiv.org/abs/2212.09849). ``shared+R``: the same, and for each model a product of rank R of
what it lacks. ``basis R``: one basis of R rows that all read their inputs in, and factors of each model's own: the joint decomposition of the
weights side by side. Products and bases are taken where inputs are whitened, so that what is left out is what outputs notice least.
Biases are always each model's own, and make up for the mean of what is left out.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autocomp.accuracy.proxy import kl
from autocomp.compress.batchnorm import reestimate_batchnorm
from autocomp.compress.hessian import add_to_diagonal, diagonal
from autocomp.database.calibrate import LayerStatistics, Statistics
from autocomp.graph.graph import Graph, Layer
from autocomp.graph.program import tensor_at
from autocomp.layers.convolution import outputs_first
from autocomp.layers.narrow import with_weights

OWN, SHARED = "own", "shared"
DAMPING = 1e-2  # of the mean of the inputs' second moments, added to each
# Of the least side of a weight. Chosen by hand: finer ones cost a reading each and change little, as ranks of the search are too.
RANKS, BASES = (1 / 16, 1 / 8, 1 / 4), (1 / 4, 1 / 2)


class Shared(nn.Module):
    """A layer without bias that several models call, and what is this model's own: a product of low rank, a bias."""

    def __init__(self, shared: nn.Module, down: nn.Module | None, up: nn.Module | None, bias: Tensor | None) -> None:
        super().__init__()
        self.shared, self.down, self.up = shared, down, up
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.shared(x)
        if self.up is not None and self.down is not None:
            y = y + self.up(self.down(x))
        return y if self.bias is None else y + self.bias


@dataclass(frozen=True)
class Way:
    """One way for the layers in one place: the ``modules`` of the models, ``weights`` stored in all, and the divergence it costs (nats)."""

    name: str
    modules: tuple[nn.Module, ...]
    weights: int
    error: float = 0.0


def ways(name: str, graph: Graph, models: Sequence[nn.Module], seen: Sequence[Statistics]) -> list[Way]:
    """The ways for one layer or embedding, their errors read from the models with only it changed; ``own`` first."""
    modules = tuple(model.get_submodule(name) for model in models)
    found = [Way(OWN, modules, sum(tensor_at(model, f"{name}.weight").numel() for model in models))]
    if name in graph.layers:
        layer = graph.layers[name]
        # a bias, or the statistics of a norm, take the mean of what is left out
        centred = layer.norm is not None or all(getattr(module, "bias", None) is not None for module in modules)
        offered = _ways(layer, modules, [one.layers[name] for one in seen], centred)
    else:
        offered = _of_tables(modules)
    for way in offered:
        changed = [replaced(model, {name: module}) for model, module in zip(models, way.modules, strict=True)]
        error = sum(divergence(model, statistics) for model, statistics in zip(changed, seen, strict=True))
        found.append(Way(way.name, way.modules, way.weights, max(error, 0.0)))
    return found


def replaced(model: nn.Module, modules: Mapping[str, nn.Module]) -> nn.Module:
    """A copy of the model with other modules in these places, which it shares with whoever has them too."""
    found = copy.deepcopy(model)
    for name, module in modules.items():
        found.set_submodule(name, module)
    return found


def divergence(model: nn.Module, statistics: Statistics) -> float:
    """How far a model is from the one that the statistics are of, its BatchNorm statistics taken anew; it is changed."""
    with torch.no_grad():
        reestimate_batchnorm(model, statistics.batches, statistics.axes)
    return kl(model, statistics)


def choose(found: Mapping[str, Sequence[Way]], most: int) -> dict[str, Way]:
    """For each layer the way that keeps the sum of weights within ``most`` at the least sum of errors, as far as prices tell.

    All ways whose error plus weights times a price is least; the price is the lowest that is enough. Then what is left buys back the errors
    that it can. The smallest where nothing is small enough.
    """

    def at(price: float) -> dict[str, Way]:
        return {name: min(each, key=lambda w: (w.error + price * w.weights, w.weights)) for name, each in found.items()}

    def total(chosen: Mapping[str, Way]) -> int:
        return sum(way.weights for way in chosen.values())

    if total(at(0.0)) <= most:
        return at(0.0)
    low, high = 1e-15, 1e6
    for _ in range(80):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if total(at(middle)) > most else (low, middle)
    chosen = at(high)
    while True:
        left = most - total(chosen)
        better = [
            (chosen[name].error - way.error, name, way)
            for name, each in found.items()
            for way in each
            if way.error < chosen[name].error and way.weights - chosen[name].weights <= left
        ]
        if not better:
            return chosen
        _, name, way = max(better, key=lambda one: one[0])
        chosen[name] = way


def _ways(layer: Layer, modules: Sequence[nn.Module], seen: Sequence[LayerStatistics], centred: bool) -> Iterator[Way]:
    weights = [outputs_first(module).detach() for module in modules]  # type: ignore[arg-type]
    flat = [weight.double().flatten(1) for weight in weights]
    plain = layer.conv_groups == 1 and layer.output_padding is None and seen[0].covariance.dim() == 2
    moments = [_moment(one, centred) for one in seen] if plain else []
    common = _common(flat, moments) if plain else torch.stack(flat).mean(0)
    yield Way(SHARED, _shared(modules, common, flat, seen, [None] * len(flat)), layer.weights)
    outputs, columns = flat[0].shape
    if not plain:
        return
    for rank in _ranks(RANKS, outputs, columns):
        products = [_product(weight - common, moment, rank) for weight, moment in zip(flat, moments, strict=True)]
        size = layer.weights + len(flat) * rank * (outputs + columns)
        if size < len(flat) * layer.weights:
            yield Way(f"{SHARED}+{rank}", _shared(modules, common, flat, seen, products), size)
    for rank in _ranks(BASES, outputs, columns):
        size = rank * columns + len(flat) * rank * outputs
        if size < len(flat) * layer.weights:
            yield Way(f"basis {rank}", _basis(modules, flat, moments, seen, rank), size)


def _of_tables(modules: Sequence[nn.Module]) -> Iterator[Way]:
    """The ways for embeddings: one mean table; one table [N, R], and for each model what makes its own rows of that."""
    tables = [module.weight.detach().double() for module in modules]  # type: ignore[operator]
    rows, columns = tables[0].shape
    yield Way(SHARED, (_table(modules[0], torch.stack(tables).mean(0)),) * len(tables), rows * columns)
    u, s, v = torch.linalg.svd(torch.cat(tables, dim=1), full_matrices=False)
    for rank in _ranks(BASES, rows, columns):
        shared = _table(modules[0], u[:, :rank] * s[:rank])
        own = [_onto(nn.Linear(1, 1), factor.T, None) for factor in v[:rank].split(columns, dim=1)]
        yield Way(
            f"basis {rank}", tuple(nn.Sequential(shared, one) for one in own), rank * (rows + len(tables) * columns)
        )


def _table(module: nn.Module, weight: Tensor) -> nn.Embedding:
    assert isinstance(module, nn.Embedding)
    made = nn.Embedding(weight.shape[0], weight.shape[1], module.padding_idx, device="meta")
    made.weight = nn.Parameter(weight.float())
    return made


def _ranks(shares: Sequence[float], outputs: int, columns: int) -> list[int]:
    """Ranks of these shares of the least side, whole fours."""
    return sorted(
        {max(4, round(share * min(outputs, columns) / 4) * 4) for share in shares if min(outputs, columns) >= 8}
    )


def _moment(seen: LayerStatistics, centred: bool) -> Tensor:
    """Second moments of the inputs [K, K], about their mean where something makes up for that, damped."""
    moment = seen.covariance if centred else seen.covariance + torch.outer(seen.mean, seen.mean)
    return add_to_diagonal(moment, DAMPING * diagonal(moment).mean().clamp_min(1e-12))


def _common(weights: Sequence[Tensor], moments: Sequence[Tensor]) -> Tensor:
    """The weight [O, K] that moves all outputs least: the mean, weighed by what each model's inputs are."""
    scaled = [moment / diagonal(moment).mean() for moment in moments]
    total = torch.stack([w @ m for w, m in zip(weights, scaled, strict=True)]).sum(0)
    found: Tensor = torch.linalg.solve(torch.stack(scaled).sum(0), total, left=False)
    return found


def _product(lack: Tensor, moment: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors [O, R], [R, K] of what a weight lacks, the least of it that outputs notice left out."""
    root = torch.linalg.cholesky(moment)
    u, s, v = torch.linalg.svd(lack @ root, full_matrices=False)
    half = s[:rank].sqrt()
    return u[:, :rank] * half, torch.linalg.solve_triangular(root, half[:, None] * v[:rank], upper=False, left=False)


def _shared(
    modules: Sequence[nn.Module],
    common: Tensor,
    weights: Sequence[Tensor],
    seen: Sequence[LayerStatistics],
    products: Sequence[tuple[Tensor, Tensor] | None],
) -> tuple[nn.Module, ...]:
    shared, made = _like(modules[0], common), []
    for module, weight, statistics, product in zip(modules, weights, seen, products, strict=True):
        whole = common if product is None else common + product[0] @ product[1]
        bias = _bias(module, weight - whole, statistics)
        down, up = (None, None) if product is None else (_like(module, product[1]), _onto(module, product[0], bias))
        made.append(Shared(shared, down, up, None if bias is None or up is not None else _spread(module, bias)))
    return tuple(made)


def _basis(
    modules: Sequence[nn.Module],
    weights: Sequence[Tensor],
    moments: Sequence[Tensor],
    seen: Sequence[LayerStatistics],
    rank: int,
) -> tuple[nn.Module, ...]:
    """One basis [R, K] from the joint decomposition of all weights where inputs are whitened, and each model's own factors [O, R]."""
    root = torch.linalg.cholesky(torch.stack([moment / diagonal(moment).mean() for moment in moments]).sum(0))
    _, _, v = torch.linalg.svd(torch.cat([weight @ root for weight in weights]), full_matrices=False)
    basis = torch.linalg.solve_triangular(root, v[:rank], upper=False, left=False)
    shared, made = _like(modules[0], basis), []
    for module, weight, moment, statistics in zip(modules, weights, moments, seen, strict=True):
        # least squares of the model's own outputs on what the basis tells of its inputs
        read = basis @ moment
        factor = torch.linalg.solve(read @ basis.T, weight @ read.T, left=False)
        bias = _bias(module, weight - factor @ basis, statistics)
        made.append(nn.Sequential(shared, _onto(module, factor, bias)))
    return tuple(made)


def _bias(module: nn.Module, lack: Tensor, seen: LayerStatistics) -> Tensor | None:
    """The bias with what the weights lack at the mean of the inputs; none where there was none."""
    bias, groups = module.bias, getattr(module, "groups", 1)
    if bias is None:
        return None
    mean = torch.einsum("gok,gk->go", lack.unflatten(0, (groups, -1)), seen.mean.view(groups, -1)).flatten()
    return (bias.detach().double() + mean).float()  # type: ignore[operator]


def _like(module: nn.Module, weight: Tensor) -> nn.Module:
    """A layer that reads its input as ``module`` does, by other weights [R, K], without bias."""
    shape = outputs_first(module).shape[1:]  # type: ignore[arg-type]
    return with_weights(module, weight.float().unflatten(1, shape) if len(shape) > 1 else weight.float(), None)  # type: ignore[arg-type]


def _onto(module: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A layer of weights [O, R] at each place alone, over as many axes as ``module`` has."""
    made: nn.Module
    if isinstance(module, nn.Linear):
        made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
        made.weight = nn.Parameter(weight.float())
    else:
        axes = outputs_first(module).dim() - 2  # type: ignore[arg-type]
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
        made = kind(weight.shape[1], weight.shape[0], 1, bias=bias is not None, device="meta")
        made.weight = nn.Parameter(weight.float().reshape(*weight.shape, *[1] * axes))
    if bias is not None:
        made.bias = nn.Parameter(bias)
    return made.eval()


def _spread(module: nn.Module, bias: Tensor) -> Tensor:
    """A bias as it is added to the outputs of a layer: along their last axis, or their second."""
    return bias if isinstance(module, nn.Linear) else bias.reshape(-1, *[1] * (outputs_first(module).dim() - 2))  # type: ignore[arg-type]
