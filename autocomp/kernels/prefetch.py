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


def worthwhile(weight: Any) -> bool:
    """Whether the weights that a load reads are many enough."""
    return _bytes(weight.source.ty.dtype) * math.prod(int(extent) for extent in weight.source.ty.shape) >= _LEAST


def _bytes(dtype: Any) -> int:
    import tvm

    return int(tvm.DataType(str(dtype).removeprefix("T.")).bits) // 8


def prefetch_weights(function: Any, blocks_axis: int, vectors: int) -> Any:
    """A scheduled function whose anchor fetches the next ``vectors`` blocks of its weights, which ``blocks_axis`` of them numbers.

    The same function where there is nothing to gain.
    """
    from tvm import tirx

    update = rewrite.find_update(function.body)
    if update is None or not worthwhile(weight := update.factors[1]):
        return function
    steps = [i for i, loop in enumerate(update.loops) if loop.kind == tirx.ForKind.SERIAL and int(loop.extent) > 1]
    *outer, step = update.loops[: steps[-1] + 1]
    inside = update.loops[steps[-1] + 1 :]
    at = rewrite.substitute([loop.loop_var for loop in inside], update.at(weight.indices), [*map(rewrite.zero, inside)])
    places = [_moved(at, blocks_axis, vector) for vector in range(vectors, 2 * vectors)]
    fetches = fetch(weight.source, places, outer)

    def change(statement: Any) -> Any | None:
        if not statement.same_as(step):
            return None
        return rewrite.with_body(statement, tirx.SeqStmt([fetches, statement.body]))

    return function.with_body(rewrite.replaced(function.body, change))


def _moved(at: list[Any], axis: int, steps: int) -> list[Any]:
    return [index + steps if position == axis else index for position, index in enumerate(at)]


def fetch(buffer: Any, places: list[list[Any]], outer: list[Any]) -> Any:
    """Fetch the lines of ``buffer`` at ``places`` when the ``outer`` loops that change none of them, over rows, are at their beginning."""
    from tvm import tirx

    fetches = []
    for place in places:
        how = (tirx.const(value, "int32") for value in (_READ, _INTO_SECOND_LEVEL, _DATA))
        fetches.append(rewrite.call("llvm.prefetch", tirx.address_of(buffer[tuple(place)]), *how))
    body = fetches[0] if len(fetches) == 1 else tirx.SeqStmt(fetches)
    rows = [loop for loop in outer if int(loop.extent) > 1 and not rewrite.depends(places[0], loop)]
    if not rows:
        return body
    return tirx.IfThenElse(tirx.all(*(loop.loop_var == loop.min for loop in rows)), body, None)
