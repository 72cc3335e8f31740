"""The instructions of a kernel in matrix registers (`matrix`), put in the place of a scheduled function's inner loops."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from autocomp.hardware.host import ASK_FOR_MATRIX
from autocomp.kernels import rewrite
from autocomp.kernels.intrinsics import DotProduct
from autocomp.kernels.prefetch import fetch
from autocomp.kernels.tile import Tile

REGISTERS, COLUMNS = 8, 16  # matrix registers, and sums in a row of one
_ROWS, _BYTES = 16, 64  # of a register, at most, and of a row
_STEPS = 16  # groups of products (four, or two of 16 bits) in a row


def steps_of(depth: int) -> int:
    """Groups of products that one instruction takes of each sum, of ``depth`` such groups."""
    return max(step for step in range(1, _STEPS + 1) if depth % step == 0)


def parts_of(rows: int) -> int:
    """Registers that hold these rows."""
    return -(-rows // _ROWS)


@dataclass(frozen=True)
class Registers:
    """Who is in which register: the sums first, then the operand of which all are held, then the other's, read in turn."""

    starts: tuple[tuple[int, int], ...]  # (row up, first row across) of each register of rows
    vectors: int
    height: int  # rows
    steps: int  # groups of products

    @classmethod
    def of(cls, tile: Tile, depth: int) -> Registers:
        height = tile.rows // parts_of(tile.rows)
        starts = itertools.product(range(tile.rows_up), range(0, tile.rows, height))
        return cls(tuple(starts), tile.vectors, height, steps_of(depth))

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


def in_matrix_registers(function: Any, registers: Registers, dot: DotProduct, outer: int) -> Any:
    """The function with matrix instructions behind its ``outer`` loops, its registers shaped at the start and given back at the end."""
    from tvm import tirx

    update = rewrite.find_update(function.body)
    assert update is not None
    products = _Products(update, registers, dot, outer)
    if registers.vectors > 1 and products.in_groups:
        raise ValueError("vectors of several groups read other inputs: a tile in matrix registers holds one of them")
    computed = products.statements()

    def change(statement: Any) -> Any | None:
        parts = list(statement) if isinstance(statement, tirx.SeqStmt) else []
        at = next((index for index, part in enumerate(parts) if _is_init(part)), None)
        return None if at is None else tirx.SeqStmt([*parts[:at], *computed, *parts[at + 2 :]])

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


@dataclass(frozen=True)
class _Products:
    """What replaces an anchor's loops behind its ``outer`` ones: sums set to zero, all products, and the sums stored for the epilogue."""

    update: rewrite.Update
    registers: Registers
    dot: DotProduct
    outer: int

    @property
    def in_groups(self) -> bool:
        """Whether the inputs depend on the channel."""
        return rewrite.depends(self.update.at(self.update.factors[0].indices), self._kept[-1])

    def statements(self) -> list[Any]:
        from tvm import tirx

        registers, store = self.registers, self.update.realize.block.body
        sums = [(part, vector) for part in range(len(registers.starts)) for vector in range(registers.vectors)]
        zeros = [rewrite.call("llvm.x86.tilezero", _register(registers.sums(*each))) for each in sums]
        row = tirx.const(4 * COLUMNS * registers.vectors, "int64")
        stores = [
            rewrite.call("llvm.x86.tilestored64", _register(registers.sums(*each)), self._address(store.buffer, store.indices, *each), row)
            for each in sums
        ]  # fmt: skip
        # Where channels are cropped the epilogue reads fewer sums than are stored: naming the last keeps the room, and the stride, of all.
        last = self._address(store.buffer, store.indices, *sums[-1], registers.height - 1, COLUMNS - 1)
        nest: Any = tirx.SeqStmt(self._step())
        for loop in reversed(self._through):
            nest = rewrite.with_body(loop, nest)
        return [*zeros, nest, *stores, tirx.Evaluate(last)]

    def _step(self) -> list[Any]:
        """One instruction for each register of sums, what it reads, and the lines that the next block of weights will read."""
        registers = self.registers
        parts, vectors = range(len(registers.starts)), range(registers.vectors)
        held, turned = (parts, vectors) if registers.inputs_held else (vectors, parts)
        load_held, load_turned = (
            (self._inputs, self._weights) if registers.inputs_held else (self._weights, self._inputs)
        )
        body = [load_held(registers.held + one, one) for one in held]
        for other in turned:
            body.append(load_turned(registers.turned, other))
            for one in held:
                part, vector = (one, other) if registers.inputs_held else (other, one)
                operands = (registers.held + one, registers.turned)
                a, b = operands if registers.inputs_held else operands[::-1]
                numbers = map(_register, (registers.sums(part, vector), a, b))
                body.append(rewrite.call(self.dot.tile, *numbers))
        return [*self._ahead(), *body]

    def _ahead(self) -> list[Any]:
        weight, loops = self.update.factors[1], [*self.update.loops[: self.outer], *self._through]
        at, registers = self._place(weight.indices, 0, 0), self.registers
        fetches = fetch(weight.source, at, 0, registers.vectors, loops, registers.height * len(registers.starts))
        return [] if fetches is None else [fetches]

    @cached_property
    def _through(self) -> list[Any]:
        """The loops through the weights of a block: taps, and steps of as many groups of products as a register holds."""
        from tvm import tirx

        *taps, step, _ = self._reduced
        count = rewrite.number(step, int(step.extent) // self.registers.steps)
        return [*taps, tirx.For(step.loop_var, step.min, count, tirx.ForKind.SERIAL, tirx.Evaluate(count))]

    def _inputs(self, register: int, part: int) -> Any:
        data = self.update.factors[0]
        return self._load(register, self._address(data.source, data.indices, part, 0), self._stride)

    def _weights(self, register: int, vector: int) -> Any:
        weight = self.update.factors[1]
        return self._load(register, self._address(weight.source, weight.indices, 0, vector), _BYTES)

    def _load(self, register: int, address: Any, stride: int) -> Any:
        from tvm import tirx

        return rewrite.call("llvm.x86.tileloadd64", _register(register), address, tirx.const(stride, "int64"))

    def _address(self, buffer: Any, indices: Any, part: int, vector: int, row: int = 0, column: int = 0) -> Any:
        from tvm import tirx

        return tirx.address_of(buffer[tuple(self._place(indices, part, vector, row, column))])

    def _place(self, indices: Any, part: int, vector: int, row: int = 0, column: int = 0) -> list[Any]:
        """Where a register's operand begins, or its element in a row and a column."""
        (above, left), (*up, across, channel) = self.registers.starts[part], self._kept
        *_, step, within = self._reduced
        values = [
            *(rewrite.number(loop, above) for loop in up), rewrite.number(across, left + row),
            rewrite.number(channel, vector * COLUMNS + column), step.loop_var * self.registers.steps, rewrite.zero(within),
        ]  # fmt: skip
        variables = [loop.loop_var for loop in (*up, across, channel, step, within)]
        return rewrite.substitute(variables, self.update.at(indices), values)

    @cached_property
    def _reduced(self) -> list[Any]:
        block = self.update.realize.block
        pairs = zip(block.iter_vars, self.update.realize.iter_values, strict=True)
        values = [value for axis, value in pairs if axis.iter_type != 0]
        return [loop for loop in self.update.loops[self.outer :] if rewrite.depends(values, loop)]

    @cached_property
    def _kept(self) -> list[Any]:
        """Loops over the rows and channels of a tile."""
        return [
            loop for loop in self.update.loops[self.outer :] if not any(loop.same_as(each) for each in self._reduced)
        ]

    @cached_property
    def _stride(self) -> int:
        """Bytes from one row of inputs to the next."""
        data, across = self.update.factors[0], self._kept[-2]
        variables, places = [loop.loop_var for loop in self.update.loops], []
        for row in (0, 1):
            values = [rewrite.number(loop, row if loop.same_as(across) else 0) for loop in self.update.loops]
            flat = 0
            found = rewrite.substitute(variables, self.update.at(data.indices), values)
            for index, size in zip(found, data.source.ty.shape, strict=True):
                flat = flat * int(size) + int(index)
            places.append(flat)
        return (places[1] - places[0]) * self.dot.element_bytes


def _register(number: int) -> Any:
    from tvm import tirx

    return tirx.const(number, "int8")
