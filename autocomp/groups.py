"""Groups of channels that go together: made from the ties of a graph, and each put to the test by removing half of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from autocomp.compress.convolution import Layers, outputs_first
from autocomp.compress.prune import take, with_weights
from autocomp.program import tensor_at

if TYPE_CHECKING:
    from autocomp.graph import Layer
    from autocomp.ties import Ties


class Count(NamedTuple):
    """A number in the model's operations (`CanonicalModel.sizes`) that follows the units: of its elements, those of ``units``
    that are kept are left (-1: always)."""

    name: str
    value: int
    units: tuple[int, ...]


class Slab(NamedTuple):
    """A bare parameter or buffer that loses slices along ``axis``; ``units`` says whose each slice is (-1: stays)."""

    path: str
    axis: int
    units: tuple[int, ...]


class Attention(NamedTuple):
    """A product of activations: for each unit of the group ``batch`` products of m x k by k x n."""

    batch: float
    m: int
    k: int
    n: int


@dataclass(frozen=True)
class Group:
    """Units that are kept or removed whole, ``width`` of them: channels, hidden units, heads.

    ``rows`` says for each output channel of a producer or norm, ``columns`` for each input column of a consumer (or of
    a grouped convolution), which unit it belongs to (-1: none, it always stays). ``producers`` are the layers whose
    output channels they are, in the order of execution (grouped convolutions that pass them on included), ``consumers``
    those that read them, ``norms`` the BatchNorms between, ``slabs`` the bare parameters and ``counts`` the numbers in
    operations that must follow. ``segments`` numbers the units by what they consist of: units of one segment are alike, and the
    same share of each segment is kept. ``attention`` are the products that become fewer with the units. The group is
    named after its first producer. ``reason`` says why a group that is not ``prunable`` must keep all its units, ``approximate`` which
    operation takes all units together (a norm over them): it is computed over those that are left, and so changes what they are.
    """

    name: str
    width: int
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    norms: tuple[str, ...] = ()
    prunable: bool = True
    reason: str = ""
    rows: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    columns: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    slabs: tuple[Slab, ...] = ()
    counts: tuple[Count, ...] = ()
    segments: tuple[int, ...] = ()
    attention: tuple[Attention, ...] = ()
    approximate: str = ""

    def rows_kept(self, name: str, kept: Tensor) -> Tensor:
        """Output channels of a producer or norm that are left when the units ``kept`` are."""
        return _left(self.rows[name], kept, self.width)

    def columns_kept(self, name: str, kept: Tensor) -> Tensor:
        """Input columns (channels of a convolution) of a layer that are left when the units ``kept`` are."""
        return _left(self.columns[name], kept, self.width)

    def sizes(self) -> tuple[int, ...]:
        """Number of units of each segment."""
        return tuple(self.segments.count(segment) for segment in range(max(self.segments, default=-1) + 1))

    def per_unit(self, units: Sequence[int]) -> tuple[int, tuple[int, ...]]:
        """How many of these rows or columns always stay, and how many each unit of a segment has."""
        counts = [0] * len(self.sizes())
        for unit in units:
            if unit >= 0:
                counts[self.segments[unit]] += 1
        return sum(unit < 0 for unit in units), tuple(c // n for c, n in zip(counts, self.sizes(), strict=True))


def balanced(group: Group, count: int, generator: torch.Generator) -> Tensor:
    """About ``count`` units drawn at random, ascending: the same share of every segment, and at least one of each.

    Halves that a model takes apart by their number (`chunk`) stay equal in this way.
    """
    segments = torch.tensor(group.segments)
    chosen = []
    for segment, size in enumerate(group.sizes()):
        members = (segments == segment).nonzero().flatten()
        chosen.append(members[torch.randperm(size, generator=generator)[: max(1, size * count // group.width)]])
    return torch.cat(chosen).sort().values


def _left(units: Sequence[int], kept: Tensor, width: int) -> Tensor:
    stays = torch.zeros(width + 1, dtype=torch.bool)
    stays[kept] = True
    stays[width] = True  # what -1 points to
    return stays[torch.tensor(units)].nonzero().flatten()


def make_groups(ties: Ties, layers: Mapping[str, Layer], model: nn.Module) -> list[Group]:
    """Form the groups of a traced graph, in no particular order; those with a reason are not prunable."""
    joined = _join(ties)
    members: dict[int, list[int]] = {}
    for component, root in joined.items():
        members.setdefault(root, []).append(component)
    producers: dict[int, list[str]] = {}
    for name in layers:
        for root in {joined[c] for c in ties.outputs.get(name, torch.zeros(0)).unique().tolist() if c in joined}:
            producers.setdefault(root, []).append(name)
    groups = []
    taken = set()
    for root, makers in producers.items():
        groups.append(_group(ties, layers, model, makers, members[root]))
        taken |= set(makers)
    stuck: dict[int, list[str]] = {}
    for name, atoms in ties.outputs.items():
        if name not in taken:
            stuck.setdefault(int(atoms[0]), []).append(name)
    for component, makers in stuck.items():
        reason = ties.frozen.get(component, "no layer reads its channels")
        groups.append(Group(makers[0], layers[makers[0]].out_channels, tuple(makers), (), (), False, reason))
    return groups


def _join(ties: Ties) -> dict[int, int]:
    """Map each removable component to the group it joins: a layer's side and a parameter belong to one group at most."""
    root: dict[int, int] = {}

    def find(component: int) -> int:
        while root[component] != component:
            component = root[component]
        return component

    sides = [*ties.outputs.values(), *ties.inputs.values(), *ties.norms.values()]
    for side in [*sides, *(part for parts in ties.parameters.values() for part in parts)]:
        live = [c for c in side.unique().tolist() if c != 0 and c not in ties.frozen]
        for component in live:
            root.setdefault(component, component)
            root[find(component)] = find(live[0])
    return {component: find(component) for component in root}


def _group(
    ties: Ties, layers: Mapping[str, Layer], model: nn.Module, makers: Sequence[str], components: Sequence[int]
) -> Group:
    member = set(components)
    order = dict.fromkeys(c for name in makers for c in ties.outputs[name].tolist() if c in member)
    order |= dict.fromkeys(c for c in components if c not in order)
    number = {component: unit for unit, component in enumerate(order)}

    def units(atoms: Tensor) -> tuple[int, ...]:
        return tuple(number.get(c, -1) for c in atoms.flatten().tolist())

    def within(atoms: Tensor) -> bool:
        return bool(member.intersection(atoms.unique().tolist()))

    readers = [name for name in layers if name in ties.inputs and within(ties.inputs[name])]
    norms = [name for name, atoms in ties.norms.items() if within(atoms)]
    rows = {name: units(ties.outputs[name]) for name in makers}
    columns = {name: units(ties.inputs[name]) for name in readers}
    rows |= {name: units(ties.norms[name]) for name in norms}
    slabs, reason = [], ""
    for path, parts in ties.parameters.items():
        for part in parts:
            if within(part):
                slab = _slab(path, torch.tensor(units(part)).view(part.shape))
                reason = reason or ("" if slab else f"parameter {path} has no axis along which they lie")
                slabs += [slab] if slab else []
    consumers = [name for name in readers if layers[name].conv_groups == 1]
    if not consumers:
        reason = "no layer reads its channels"
    sets = [*rows.values(), *columns.values()]
    counts = [[0] * len(sets) for _ in number]
    for index, members in enumerate(sets):
        for unit in members:
            if unit >= 0:
                counts[unit][index] += 1
    kinds: dict[tuple[int, ...], int] = {}
    segments = tuple(kinds.setdefault(tuple(count), len(kinds)) for count in counts)
    attention = []
    for product in ties.products:
        mine = sum(c in member for c in product.atoms.tolist())
        if mine:
            attention.append(Attention(product.batch / mine, product.m, product.k, product.n))
    return Group(
        makers[0], len(number), tuple(makers), tuple(consumers), tuple(sorted(norms)), not reason, reason,
        rows, columns, tuple(dict.fromkeys(slabs)), tuple(_counts(ties, number)), segments, tuple(attention),
        next((ties.approximate[c] for c in components if c in ties.approximate), ""),
    )  # fmt: skip


def _counts(ties: Ties, number: Mapping[int, int]) -> Iterator[Count]:
    """The numbers that count elements of which each belongs to one unit at most; others do not change with the units."""
    found: dict[str, Count] = {}
    for name, value, atoms in ties.counted:
        units = []
        for row in atoms.tolist():
            own = {number[c] for c in row if c in number}
            if len(own) > 1:
                break
            units.append(own.pop() if own else -1)
        if len(units) == len(atoms) and len({unit for unit in units if unit >= 0}) > 1 and name not in found:
            found[name] = Count(name, value, tuple(units))
    yield from found.values()


def _slab(path: str, units: Tensor) -> Slab | None:
    """The axis of a parameter that the units lie along; None if they lie along several."""
    for axis in range(units.dim()):
        lead = units.movedim(axis, 0).reshape(units.shape[axis], -1)
        if bool((lead == lead[:, :1]).all()):
            return Slab(path, axis, tuple(lead[:, 0].tolist()))
    return None


# --- removal ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Changes:
    """What a model without some units has instead: modules and bare tensors by name, and smaller sizes."""

    modules: Mapping[str, nn.Module]
    tensors: Mapping[str, Tensor]
    sizes: Mapping[str, int]  # by how much each becomes less

    def apply(self, model: nn.Module) -> None:
        """Set everything in place."""
        for name, module in self.modules.items():
            model.set_submodule(name, module)
        for path, tensor in self.tensors.items():
            owner, _, name = path.rpartition(".")
            holder = model.get_submodule(owner)
            tensors: dict[str, Any] = holder._parameters if name in holder._parameters else holder._buffers
            tensors[name] = tensor
        for name, less in self.sizes.items():
            model.sizes[name] -= less  # type: ignore[index, operator]


def narrowed(model: nn.Module, group: Group, kept: Tensor) -> Changes:
    """What ``model`` has instead when the group keeps the units ``kept``: norms, bare tensors and sizes, no layers."""
    modules = {name: take(model.get_submodule(name), group.rows_kept(name, kept)) for name in group.norms}
    tensors: dict[str, Tensor] = {}
    for path, axis, units in group.slabs:
        old = tensors[path] if path in tensors else tensor_at(model, path)
        new = old.detach().index_select(axis, _left(units, kept, group.width))
        tensors[path] = _like(old, new)
    sizes = {}
    for name, value, units in group.counts:  # N * heads counts each head N times
        sizes[name] = value - value * len(_left(units, kept, group.width)) // len(units)
    return Changes(modules, tensors, sizes)


def removed(model: nn.Module, group: Group, kept: Tensor) -> Changes:
    """As `narrowed`, and the layers too: what plain removal, without any update of weights, leaves of the model."""
    changes = narrowed(model, group, kept)
    modules = dict(changes.modules)
    for name in dict.fromkeys((*group.producers, *group.consumers)):
        rows = group.rows_kept(name, kept) if name in group.producers else None
        columns = group.columns_kept(name, kept) if name in group.consumers else None
        modules[name] = take(model.get_submodule(name), rows, columns)
    return replace(changes, modules=modules)


def masked(model: nn.Module, group: Group, kept: Tensor) -> Changes:
    """The consumers with zeros for the columns of the units that are not kept: the full-size model that ignores them."""
    modules = {}
    for name in group.consumers:
        module = model.get_submodule(name)
        columns = group.columns_kept(name, kept)
        assert isinstance(module, Layers)
        old = outputs_first(module).detach()
        weight = torch.zeros_like(old)
        weight[:, columns] = old[:, columns]
        modules[name] = with_weights(module, weight, module.bias)
    return Changes(modules, {}, {})


def verified(model: nn.Module, inputs: tuple[Tensor, ...], group: Group) -> Group:
    """Return the group, or, where its removal does not work, the group with the reason.

    Half the units, and other numbers of them, are removed and the outputs compared with those of the model whose consumers ignore them.
    Where that is approximate, they need only be of the same shapes; but with all units in another order they must be the same.
    """
    if group.width < 2:
        return replace(group, prunable=False, reason="it has a single channel or head")
    if group.approximate:
        try:
            reason = _shuffling_fails(model, inputs, group)
        except Exception as error:
            reason = f"the model fails with its channels in another order: {_first_line(error)}"
        if reason:
            return replace(group, prunable=False, reason=reason)
    counts = [group.width // 2] + ([group.width // 2 - 1] if group.counts and group.width > 3 else [])
    for count in counts:
        reason = _fails(model, inputs, group, count)
        if reason:
            return replace(group, prunable=False, reason=reason)
    return group


def _fails(model: nn.Module, inputs: tuple[Tensor, ...], group: Group, count: int) -> str:
    """Keep ``count`` units and compare with the model whose consumers ignore the others; say what differs, if any."""
    kept = balanced(group, count, torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            with swapped(model, masked(model, group, kept)):
                expected = _tensors(model(*inputs))
            with swapped(model, removed(model, group, kept)):
                actual = _tensors(model(*inputs))
    except Exception as error:  # a reshape in the user's forward that counts on the width, say
        return f"the model fails without some of its channels: {_first_line(error)}"
    if any(a.shape != b.shape for a, b in zip(actual, expected, strict=True)):
        return "its channels are the model's output"
    if not group.approximate and not _alike(actual, expected):
        return "removing its channels changes more than the layers that read them"
    return ""


def _alike(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return all(
        (a - b).abs().max() <= 1e-3 * b.abs().max().clamp_min(1e-6) for a, b in zip(actual, expected, strict=True)
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _shuffling_fails(model: nn.Module, inputs: tuple[Tensor, ...], group: Group) -> str:
    """Bring the units, each among its like, into another order: that changes no sum over them, so the outputs are the same."""
    order = list(range(group.width))
    generator = torch.Generator().manual_seed(0)
    for segment in range(len(group.sizes())):
        members = [unit for unit in order if group.segments[unit] == segment]
        shuffled = torch.randperm(len(members), generator=generator).tolist()
        for unit, other in zip(members, shuffled, strict=True):
            order[unit] = members[other]
    with torch.no_grad():
        expected = _tensors(model(*inputs))
        with swapped(model, reordered(model, group, order)):
            actual = _tensors(model(*inputs))
    if any(a.shape != b.shape for a, b in zip(actual, expected, strict=True)) or not _alike(actual, expected):
        return "its channels in another order give another result, so it is not known which goes where"
    return ""


def reordered(model: nn.Module, group: Group, order: Sequence[int]) -> Changes:
    """What ``model`` has instead when unit ``order[u]`` stands where unit ``u`` stood; both are of one segment."""

    def places(units: Sequence[int]) -> Tensor:
        own: dict[int, list[int]] = {}
        for place, unit in enumerate(units):
            own.setdefault(unit, []).append(place)
        result = list(range(len(units)))
        for unit, other in enumerate(order):
            for place, source in zip(own.get(unit, ()), own.get(other, ()), strict=True):
                result[place] = source
        return torch.tensor(result)

    modules = {}
    for name in dict.fromkeys((*group.norms, *group.producers, *group.consumers)):
        rows = places(group.rows[name]) if name in group.rows else None
        columns = places(group.columns[name]) if name in group.consumers else None
        modules[name] = take(model.get_submodule(name), rows, columns)
    tensors: dict[str, Tensor] = {}
    for path, axis, units in group.slabs:
        old = tensors[path] if path in tensors else tensor_at(model, path)
        tensors[path] = _like(old, old.detach().index_select(axis, places(units)))
    return Changes(modules, tensors, {})


def _like(old: Tensor, new: Tensor) -> Tensor:
    return nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new


@contextlib.contextmanager
def swapped(model: nn.Module, changes: Changes) -> Iterator[None]:
    """Apply changes for a while."""
    before = Changes(
        {name: model.get_submodule(name) for name in changes.modules},
        {path: tensor_at(model, path) for path in changes.tensors},
        {name: -less for name, less in changes.sizes.items()},
    )
    try:
        changes.apply(model)
        yield
    finally:
        before.apply(model)


def _tensors(output: Any) -> list[Tensor]:
    from torch.utils import _pytree

    return [leaf.float() for leaf in _pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
