"""Groups of channels that go together: made from the ties of a graph, and each put to the test by removing half of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from autocomp.graph.graph import Count, Group, HeadProducts, Slab, balanced
from autocomp.graph.program import tensors_of
from autocomp.graph.removal import masked, removed, reordered, swapped

if TYPE_CHECKING:
    from autocomp.graph.graph import Layer
    from autocomp.graph.labels import Ties


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
        width = layers[makers[0]].out_channels
        sizes = {name: layers[name].out_channels for name in makers}
        # all of them stay, or go with a branch that they are inside of: which unit a channel belongs to says nothing more
        rows = {name: tuple(range(size)) if size == width else (0,) * size for name, size in sizes.items()}
        groups.append(Group(makers[0], width, tuple(makers), (), (), False, reason, rows, segments=(0,) * width))
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
            attention.append(HeadProducts(product.batch / mine, product.m, product.k, product.n))
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
                expected = tensors_of(model(*inputs))
            with swapped(model, removed(model, group, kept)):
                actual = tensors_of(model(*inputs))
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
        expected = tensors_of(model(*inputs))
        with swapped(model, reordered(model, group, order)):
            actual = tensors_of(model(*inputs))
    if any(a.shape != b.shape for a, b in zip(actual, expected, strict=True)) or not _alike(actual, expected):
        return "its channels in another order give another result, so it is not known which goes where"
    return ""
