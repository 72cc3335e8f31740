"""Products of bytes in matrix registers (Intel AMX): 16 x 16 sums of 64 products each by one instruction, eight times VNNI's.

A register holds up to 16 rows of 64 bytes: 16 rows of sums of a vector of channels, as many rows of inputs, or 16 groups of four weights of each
channel. Inputs are read where they lie, a row a stride; weights are packed as VNNI reads them. So a kernel is the same function for both, and
which runs it is a matter of its tile. Source: Intel 64 and IA-32 Architectures Software Developer's Manual, vol. 1 chapter 18 and vol. 2
(LDTILECFG, TILELOADD, TDPBUSD); asking the system for the registers: Linux, Documentation/arch/x86/xstate.rst.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from autocomp.hardware.host import ASK_FOR_MATRIX
from autocomp.hardware.profile import Profile
from autocomp.kernels import rewrite
from autocomp.kernels.intrinsics import dot_product
from autocomp.kernels.schedules import blocks_named, flatten_rows, keep_in_registers, vectorise_last, write_back
from autocomp.kernels.tile import Anchor, Tile
from autocomp.records.precisions import arithmetic_of

_REGISTERS, _ROWS, _STEPS = 8, 16, 16  # matrix registers, rows of one, and groups of four products that a row holds
_MOST_UP, _MOST_ROWS = 4, 64
_LEAST_STEPS = 4  # groups of four products below which an instruction is mostly empty
_COLUMNS, _BYTES = 16, 64  # of a row of sums


def has_kernels(anchor: Anchor, profile: Profile) -> bool:
    """Whether a kernel may use matrix registers on a target."""
    dot = arithmetic_of(anchor.template).dot and dot_product(profile)
    fits = (
        dot
        and (dot.lanes, dot.depth, dot.steps) == (_COLUMNS, 4, 1)
        and anchor.template.startswith(("conv2d", "dense"))
    )
    return bool(fits) and profile.matrix and profile.cores == 1 and steps_of(anchor) >= _LEAST_STEPS


def steps_of(anchor: Anchor) -> int:
    """Groups of four products that one instruction takes of each sum."""
    depth = anchor.reduction[-2]
    return max(step for step in range(1, _STEPS + 1) if depth % step == 0)


def candidates(anchor: Anchor, profile: Profile) -> list[Tile]:
    """Tiles in matrix registers, the best guess first."""
    return sorted(_candidates(anchor), key=lambda tile: _cost(tile, anchor))


def _candidates(anchor: Anchor) -> Iterator[Tile]:
    *_, up, across = (1, *anchor.spatial[:-1])
    vectors = anchor.spatial[-1] // _COLUMNS
    for rows, count in itertools.product(_divisors(across, _MOST_ROWS), _divisors(vectors, _REGISTERS)):
        ups = _divisors(up, _MOST_UP) if rows == across and anchor.template.startswith("conv2d") else [1]
        for rows_up in ups:
            parts = _parts(rows) * rows_up
            if rows % _parts(rows) == 0 and parts * count + min(parts, count) + 1 <= _REGISTERS:
                for channels_outer in (True, False) if vectors > count else (True,):
                    yield Tile(rows, count, rows_up=rows_up, channels_outer=channels_outer, matrix=True)


def _parts(rows: int) -> int:
    """Registers that hold these rows."""
    return -(-rows // _ROWS)


def _cost(tile: Tile, anchor: Anchor) -> float:
    """Cycles a product, about: 16 an instruction, 8 a register that is loaded, twice as many for one that is stored at the end."""
    parts = _parts(tile.rows) * tile.rows_up
    sums, steps = parts * tile.vectors, steps_of(anchor)
    count = anchor.reduction[-2] // steps
    for extent in anchor.reduction[:-2]:
        count *= extent
    cycles = count * max(16 * sums, 8 * (parts + tile.vectors)) + 16 * sums
    return cycles / (count * tile.rows * tile.rows_up * tile.vectors * steps) * (1 + 0.01 * (not tile.channels_outer))


def _divisors(value: int, limit: int) -> list[int]:
    return [divisor for divisor in range(1, min(value, limit) + 1) if value % divisor == 0]


def tile_matrix(schedule: Any, tile: Tile, anchor: Anchor, profile: Profile) -> Any:
    """Schedule a fused function and put matrix instructions in the place of its anchor's inner loops; returns the function."""
    (block,) = blocks_named(schedule, "anchor")
    last = keep_in_registers(schedule, block, profile)
    if len(anchor.spatial) == 2:
        flatten_rows(schedule, last)
    loops = schedule.get_loops(block)
    spatial, reduction = loops[: len(anchor.spatial)], loops[len(anchor.spatial) :]
    *outer, across, channel = spatial
    inner: list[Any] = []
    if tile.rows_up > 1:
        up, up_inner = schedule.split(outer.pop(), [None, tile.rows_up])
        outer.append(up)
        inner.append(up_inner)
    across_outer, across_inner = schedule.split(across, [None, tile.rows])
    channel_outer, channel_inner = schedule.split(channel, [None, tile.vectors * _COLUMNS])
    outer = [channel_outer, *outer, across_outer] if tile.channels_outer else [*outer, across_outer, channel_outer]
    schedule.reorder(*outer, *reduction, *inner, across_inner, channel_inner)
    schedule.reverse_compute_at(last, outer[-1], preserve_unit_loops=True)
    if int(schedule.get(last).iter_vars[-1].dom.extent) != anchor.spatial[-1]:
        schedule.annotate(channel_outer, "pragma_loop_partition_hint", 1)  # as `templates` does for cropped columns
    write_back(schedule, last, len(outer), _COLUMNS)
    schedule.decompose_reduction(block, reduction[0])
    for pad in blocks_named(schedule, "pad", "pack"):
        vectorise_last(schedule, pad, profile)
    return _rewritten(schedule.mod["main"], _Registers.of(tile, anchor), len(outer))


@dataclass(frozen=True)
class _Registers:
    """Who is in which register: the sums first, then the operand of which all are held, then the other's, read in turn."""

    starts: list[tuple[int, int]]  # (row up, first row across) of each register of rows
    vectors: int
    height: int  # rows
    steps: int  # groups of four products

    @classmethod
    def of(cls, tile: Tile, anchor: Anchor) -> _Registers:
        height = tile.rows // _parts(tile.rows)
        starts = itertools.product(range(tile.rows_up), range(0, tile.rows, height))
        return cls(list(starts), tile.vectors, height, steps_of(anchor))

    @property
    def inputs_held(self) -> bool:
        return len(self.starts) <= self.vectors

    @property
    def held(self) -> int:
        """The first register behind the sums."""
        return len(self.starts) * self.vectors

    @property
    def turned(self) -> int:
        return self.held + min(len(self.starts), self.vectors)

    def sums(self, part: int, vector: int) -> int:
        return part * self.vectors + vector

    def words(self) -> list[int]:
        """What LDTILECFG reads, as eight 64-bit numbers: the bytes of a row and the rows of each register."""
        inputs, weights = (4 * self.steps, self.height), (_BYTES, self.steps)
        behind = [inputs if self.inputs_held else weights] * (self.turned - self.held)
        shapes = [(_BYTES, self.height)] * self.held + behind + [weights if self.inputs_held else inputs]
        table = bytearray(64)
        table[0] = 1  # the palette
        for register, (width, rows) in enumerate(shapes):
            table[16 + 2 * register : 18 + 2 * register] = width.to_bytes(2, "little")
            table[48 + register] = rows
        return [int.from_bytes(table[at : at + 8], "little", signed=True) for at in range(0, 64, 8)]


def _rewritten(function: Any, registers: _Registers, outer: int) -> Any:
    """The function with matrix instructions behind its ``outer`` loops, its registers shaped at the start and given back at the end."""
    from tvm import tirx

    update = rewrite.find_update(function.body)
    assert update is not None
    products = _products(update, registers, outer)

    def change(statement: Any) -> Any | None:
        parts = list(statement) if isinstance(statement, tirx.SeqStmt) else []
        at = next((index for index, part in enumerate(parts) if _is_init(part)), None)
        return None if at is None else tirx.SeqStmt([*parts[:at], *products, *parts[at + 2 :]])

    shapes = tirx.decl_buffer((8,), "int64", name="shapes", scope="local")
    asked = tirx.call_extern("int64", "syscall", *(tirx.const(value, "int64") for value in ASK_FOR_MATRIX))
    first = [
        tirx.Evaluate(asked),
        *(tirx.BufferStore(shapes, tirx.const(word, "int64"), [at]) for at, word in enumerate(registers.words())),
        rewrite.call("llvm.x86.ldtilecfg", tirx.address_of(shapes[0])),
    ]
    root = function.body
    body = [*first, rewrite.replaced(root.block.body, change), rewrite.call("llvm.x86.tilerelease")]
    return function.with_body(rewrite.with_block(root, tirx.SeqStmt(body), [shapes]))


def _is_init(statement: Any) -> bool:
    from tvm import s_tir, tirx

    while isinstance(statement, tirx.For):
        statement = statement.body
    return isinstance(statement, s_tir.SBlockRealize) and statement.block.name_hint == "anchor_init"


def _products(update: rewrite.Update, registers: _Registers, outer: int) -> list[Any]:
    """Sums set to zero, all products, and the sums stored where the epilogue reads them."""
    from tvm import tirx

    loops = update.loops[outer:]
    *up, across, channel = (loop for loop in loops if not _is_reduced(update, loop))
    *taps, step, within = (loop for loop in loops if _is_reduced(update, loop))
    data, weight = update.factors
    store = update.realize.block.body

    def place(buffer: Any, indices: Any, part: int, vector: int, row: int = 0, column: int = 0) -> Any:
        """Where a register's operand begins, or the element of it in a row and a column."""
        above, left = registers.starts[part]
        values = [*(rewrite.number(loop, above) for loop in up), rewrite.number(across, left + row)]
        values += [
            rewrite.number(channel, vector * _COLUMNS + column),
            step.loop_var * registers.steps,
            rewrite.zero(within),
        ]
        at = rewrite.substitute(
            [loop.loop_var for loop in (*up, across, channel, step, within)], update.at(indices), values
        )
        return tirx.address_of(buffer[tuple(at)])

    def load(register: int, buffer: Any, indices: Any, part: int, vector: int, stride: int) -> Any:
        return rewrite.call(
            "llvm.x86.tileloadd64",
            tirx.const(register, "int8"),
            place(buffer, indices, part, vector),
            tirx.const(stride, "int64"),
        )

    def inputs(register: int, part: int) -> Any:
        return load(register, data.source, data.indices, part, 0, stride)

    def weights(register: int, vector: int) -> Any:
        return load(register, weight.source, weight.indices, 0, vector, _BYTES)

    stride = _row_stride(update, data, across)
    parts, vectors = range(len(registers.starts)), range(registers.vectors)
    held, turned = (parts, vectors) if registers.inputs_held else (vectors, parts)
    load_held, load_turned = (inputs, weights) if registers.inputs_held else (weights, inputs)
    body = [load_held(registers.held + index, index) for index in held]
    for other in turned:
        body.append(load_turned(registers.turned, other))
        for index in held:
            part, vector = (index, other) if registers.inputs_held else (other, index)
            pair = (registers.held + index, registers.turned)
            a, b = pair if registers.inputs_held else pair[::-1]
            numbers = (tirx.const(register, "int8") for register in (registers.sums(part, vector), a, b))
            body.append(rewrite.call("llvm.x86.tdpbusd", *numbers))
    nest: Any = tirx.For(
        step.loop_var,
        step.min,
        rewrite.number(step, int(step.extent) // registers.steps),
        tirx.ForKind.SERIAL,
        tirx.SeqStmt(body),
    )
    for tap in reversed(taps):
        nest = rewrite.with_body(tap, nest)
    zeros = [rewrite.call("llvm.x86.tilezero", tirx.const(register, "int8")) for register in range(registers.held)]
    stores = [
        rewrite.call(
            "llvm.x86.tilestored64", tirx.const(registers.sums(part, vector), "int8"), place(store.buffer, store.indices, part, vector),
            tirx.const(4 * _COLUMNS * registers.vectors, "int64"),
        )
        for part in parts for vector in vectors
    ]  # fmt: skip
    # Where channels are cropped the epilogue reads fewer sums than are stored: naming the last keeps the room, and the stride, of all.
    last = place(store.buffer, store.indices, parts[-1], vectors[-1], registers.height - 1, _COLUMNS - 1)
    return [*zeros, nest, *stores, tirx.Evaluate(last)]


def _is_reduced(update: rewrite.Update, loop: Any) -> bool:
    block = update.realize.block
    values = [
        value for axis, value in zip(block.iter_vars, update.realize.iter_values, strict=True) if axis.iter_type != 0
    ]
    return rewrite.depends(values, loop)


def _row_stride(update: rewrite.Update, data: Any, across: Any) -> int:
    """Bytes from one row of inputs to the next."""
    variables = [loop.loop_var for loop in update.loops]
    places = []
    for row in (0, 1):
        values = [rewrite.number(loop, row if loop.same_as(across) else 0) for loop in update.loops]
        flat = 0
        for index, size in zip(
            rewrite.substitute(variables, update.at(data.indices), values), data.source.ty.shape, strict=True
        ):
            flat = flat * int(size) + int(index)
        places.append(flat)
    return places[1] - places[0]
