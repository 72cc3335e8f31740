"""Numbers that are written into operations and follow the number of channels: sizes of reshapes and splits, ends of slices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from torch import fx

from autocomp.graph.program import Size

_TIMES = "<built-in function mul>"


class Place(NamedTuple):
    """Where a number stands in the arguments of an operation, and what it counts: elements of ``axis`` of the operation's
    input or of its output (``item`` of several), all of them (``size``) or those before or after a cut."""

    argument: int
    item_of: int | None  # position in a list of numbers
    what: Literal["size", "before", "after"]
    of: Literal["input", "output"]
    axis: int
    item: int = 0


def places(node: fx.Node) -> Iterator[Place]:
    """The numbers of an operation that may follow channels."""
    name = str(node.target).removeprefix("aten.")
    args = node.args
    if name in ("view.default", "reshape.default", "_unsafe_view.default", "expand.default"):
        rank = len(_list(args[1]))
        yield from (Place(1, i, "size", "output", i - rank) for i in range(rank))
    elif name == "unflatten.int":
        count = len(_list(args[2]))
        first = int(args[1]) if int(args[1]) >= 0 else int(args[1]) - count + 1  # type: ignore[arg-type]
        yield from (Place(2, i, "size", "output", first + i) for i in range(count))
    elif name == "split.Tensor":
        yield Place(1, None, "size", "output", _axis(args, 2), 0)
    elif name in ("split_with_sizes.default", "split.sizes"):
        yield from (Place(1, i, "size", "output", _axis(args, 2), i) for i in range(len(_list(args[1]))))
    elif name == "tensor_split.indices":
        for i, value in enumerate(_list(args[1])):
            yield Place(1, i, "before" if _number(value) >= 0 else "after", "input", _axis(args, 2))
    elif name == "slice.Tensor":
        for position in (2, 3):
            if len(args) > position and isinstance(args[position], int):
                yield Place(
                    position, None, "before" if _number(args[position]) >= 0 else "after", "input", _axis(args, 1)
                )
    elif name == "narrow.default":
        yield Place(2, None, "before", "input", _axis(args, 1))
        yield Place(3, None, "size", "output", _axis(args, 1))
    elif name == "select.int":
        yield Place(2, None, "before" if _number(args[2]) >= 0 else "after", "input", _axis(args, 1))
    elif name in ("layer_norm.default", "rms_norm.default"):
        rank = len(_list(args[1]))
        yield from (Place(1, i, "size", "input", i - rank) for i in range(rank))


def _groups(node: fx.Node) -> bool:
    """Whether the second argument counts groups of channels: `tie_rules` says which."""
    return str(node.target) == "aten.group_norm.default"


def name_sizes(graph: fx.Graph) -> dict[str, int]:
    """Turn these numbers of a graph into `Size`s, in place; returns their values by name.

    Where a size is computed as a multiple of another (N * heads), its factor is named; each reader has a product of its own.
    """
    values: dict[str, int] = {}

    def named(node: fx.Node, value: Any) -> Any:
        if isinstance(value, fx.Node) and str(value.target) == _TIMES and any(type(part) is int for part in value.args):
            with graph.inserting_before(node):
                own = graph.call_function(value.target, value.args)  # type: ignore[arg-type]
            own.args = tuple(named(own, part) for part in own.args)
            return own
        if type(value) is not int or value in (0, 1, -1) or abs(value) > 1 << 48:
            return value
        size = Size(value, f"{node.name}.{len(values)}")
        values[size.name] = value
        return size

    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        arguments = list(node.args)
        if _groups(node):
            arguments[1] = named(node, arguments[1])
        for place in places(node):
            value = arguments[place.argument]
            if place.item_of is None:
                arguments[place.argument] = named(node, value)
            else:
                items = list(_list(value))
                items[place.item_of] = named(node, items[place.item_of])
                arguments[place.argument] = items
        node.args = tuple(arguments)
    for node in reversed(graph.nodes):
        if str(node.target) == _TIMES and not node.users:
            graph.erase_node(node)
    return values


def size_at(node: fx.Node, place: Place) -> Size | None:
    """The `Size` that stands at a place, or that what stands there is a multiple of."""
    value = node.args[place.argument]
    value = value if place.item_of is None else _list(value)[place.item_of]
    if isinstance(value, Size):
        return value
    if isinstance(value, fx.Node) and str(value.target) == _TIMES:
        return next((part for part in value.args if isinstance(part, Size)), None)
    return None


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else []


def _axis(args: tuple[Any, ...], position: int) -> int:
    return int(args[position]) if len(args) > position and isinstance(args[position], int) else 0


def _number(value: Any) -> int:
    return int(value) if isinstance(value, int) else 0
