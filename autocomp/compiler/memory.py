"""The memory that one inference of a compiled module needs, as TVM's planner lays it out; known before anything runs."""

from __future__ import annotations

import math
from typing import Any

STORAGE, OUTPUT = "relax.memory.alloc_storage", "relax.builtin.alloc_tensor"


def planned_bytes(module: Any) -> int:
    """Bytes of a scheduled Relax module while it runs: inputs, outputs, weights, and the buffers between its kernels.

    Buffers are counted as the virtual machine allocates them, which reuses those that are read no more. What a kernel keeps for itself (a
    tile on its stack) and TVM's own code are not in it.
    """
    import tvm
    from tvm import ir, relax

    passes = [
        relax.transform.ToNonDataflow(),
        relax.transform.RemovePurityChecking(),
        relax.transform.CallTIRRewrite(),
        relax.transform.StaticPlanBlockMemory(),
    ]
    main = tvm.transform.Sequential(passes)(module)["main"]
    allocated, weights = 0, {}
    calls = (binding.value for block in main.body.blocks for binding in block.bindings)
    for call in calls:
        name = getattr(getattr(call, "op", None), "name", "")
        if name == STORAGE:
            allocated += int(call.args[0].values[0])
        elif name == OUTPUT:
            allocated += _size(call.args[0].values, str(call.args[1].value))
        for argument in getattr(call, "args", ()):
            if isinstance(argument, ir.GenericConst) and isinstance(argument.ty, relax.TensorType):
                weights[argument] = _size(argument.ty.shape.values, str(argument.ty.dtype))
    inputs = sum(_size(given.ty.shape.values, str(given.ty.dtype)) for given in main.params)
    return allocated + inputs + sum(weights.values())


def _size(shape: Any, dtype: str) -> int:
    import tvm

    kind = tvm.DataType(dtype)
    return math.prod(int(axis) for axis in shape) * -(-int(kind.bits * kind.lanes) // 8)
