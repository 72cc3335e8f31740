"""Ask for a layer's next weights while the present ones are multiplied.

A network's weights rarely stay in the second-level cache from one inference to the next. A contraction reads them block after block, each for
all rows; while the rows of a block are computed, the lines of the next are fetched, as many for each row of tiles: all at once, they would
hold up the loads of the present one. Measured on AVX-512, weights out of the last-level cache: Winograd kernels of 9 to 17 MB take 0.5 to
0.6 of the time, matrices of 2 to 9 MB 0.82 to 0.93; where the weights are near, nothing changes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from autocomp.kernels import rewrite

_LEAST = 512 << 10  # bytes of weights below which waiting for them is short beside computing
_FAR = 2 << 20  # bytes that the second-level cache does not hold
_LEAST_ROWS = 4  # that are multiplied with a line of weights; with fewer, loading is all the work there is
_MOST_SHARED = 32  # steps to a line of weights, beyond which they are read so often that the first time hardly counts
_LINE = 64  # bytes that are fetched at once
_READ, _INTO_SECOND_LEVEL, _DATA = 0, 2, 1  # what llvm.prefetch is told: prefetcht1 on x86


def prefetch_weights(function: Any, blocks_axis: int, vectors: int) -> Any:
    """A scheduled function whose anchor fetches the next ``vectors`` blocks of its weights, which ``blocks_axis`` of them numbers.

    The same function where there is nothing to gain.
    """
    from tvm import tirx

    update = rewrite.find_update(function.body)
    if update is None:
        return function
    weight, reads = update.weight
    steps = [i for i, loop in enumerate(update.loops) if loop.kind == tirx.ForKind.SERIAL and int(loop.extent) > 1]
    if not steps:
        return function
    outer, inside = update.loops[: steps[-1] + 1], update.loops[steps[-1] + 1 :]
    reads = update.at(reads)
    at = rewrite.substitute([loop.loop_var for loop in inside], reads, [*map(rewrite.zero, inside)])
    at_once = math.prod(int(loop.extent) for loop in inside if not rewrite.depends(reads, loop))
    fetches = fetch(weight, at, blocks_axis, vectors, outer, at_once)
    if fetches is None:
        return function
    step = outer[-1]

    def change(statement: Any) -> Any | None:
        if not statement.same_as(step):
            return None
        return rewrite.with_body(statement, tirx.SeqStmt([fetches, statement.body]))

    return function.with_body(rewrite.replaced(function.body, change))


def fetch(
    buffer: Any, at: Sequence[Any], axis: int, vectors: int, outer: Sequence[Any], rows_at_once: int
) -> Any | None:
    """Fetch the share of this step, of the ``outer`` loops, in the ``vectors`` blocks behind those at ``at``; None where that is not worthwhile.

    ``axis`` of the buffer numbers blocks. The loops are those over rows, which read the same weights again, and those through a block; a step
    multiplies what it reads with ``rows_at_once`` rows.
    """
    from tvm import tirx

    shape = [int(extent) for extent in buffer.ty.shape]
    size = _bytes(buffer.ty.dtype)
    block = math.prod(shape[axis + 1 :])  # elements
    total = size * math.prod(shape)
    if total < _LEAST or size * block % _LINE:
        return None
    turns = [number for number, loop in enumerate(outer) if rewrite.depends(at[: axis + 1], loop)]  # to other blocks
    inner = outer[turns[-1] + 1 :] if turns else outer
    within = [loop for loop in inner if rewrite.depends(at, loop)]
    rows = [loop for loop in inner if int(loop.extent) > 1 and not rewrite.depends(at, loop)]
    times, steps = (math.prod(int(loop.extent) for loop in loops) for loops in (rows, within))
    lines = size * block * vectors // _LINE
    if not within or times * rows_at_once < _LEAST_ROWS or times * steps > _MOST_SHARED * lines:
        return None
    if total < _FAR and any(int(loop.extent) > 1 and not rewrite.depends(at, loop) for loop in outer[: -len(inner)]):
        return None  # they are all read again and again, and near from the second time on
    step = _flat([loop.loop_var - loop.min for loop in within], [int(loop.extent) for loop in within])
    at_once = -(-lines // (times * steps))  # lines of one step
    pause = 1 << max(times * steps // lines, 1).bit_length() - 1  # steps that share a line
    first = tirx.floordiv(step, pause) * at_once
    if rows:
        time = _flat([loop.loop_var - loop.min for loop in rows], [int(loop.extent) for loop in rows])
        first += time * (-(-steps // pause) * at_once)
    fetches = []
    for line in range(at_once):
        offset = (first + line) * (_LINE // size)
        place = [*at[:axis], at[axis] + vectors, *(0 for _ in shape[axis + 1 : -1]), offset]
        how = (tirx.const(value, "int32") for value in (_READ, _INTO_SECOND_LEVEL, _DATA))
        fetches.append(rewrite.call("llvm.prefetch", tirx.address_of(buffer[tuple(place)]), *how))
    return fetches[0] if len(fetches) == 1 else tirx.SeqStmt(fetches)


def _bytes(dtype: Any) -> int:
    import tvm

    return int(tvm.DataType(str(dtype).removeprefix("T.")).bits) // 8


def _flat(indices: Sequence[Any], extents: Sequence[int]) -> Any:
    """The number of an element, the last index running fastest."""
    number = indices[0]
    for index, extent in zip(indices[1:], extents[1:], strict=True):
        number = number * extent + index
    return number
