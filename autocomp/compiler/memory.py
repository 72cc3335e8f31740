"""The memory that one inference of a compiled module needs, as TVM's planner lays it out; known before anything runs."""

from __future__ import annotations

import math
from typing import Any

STORAGE, OUTPUT = "relax.memory.alloc_storage", "relax.builtin.alloc_tensor"


def planned_bytes(module: Any) -> int:
    """Bytes of a scheduled Relax module while it runs: inputs, outputs, weights, and the buffers between its kernels.

    Buffers are counted as the virtual machine allocates them, which reuses those that are read no more, and beside them the most that one
    kernel takes for itself while it runs (a padded input, transformed tiles). What lies on a kernel's stack and TVM's own code are not in it.
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
    kernels = (function for function in module.functions.values() if isinstance(function, tvm.tirx.PrimFunc))
    return allocated + inputs + sum(weights.values()) + max(map(workspace_bytes, kernels), default=0)


def workspace_bytes(function: Any) -> int:
    """Bytes that a scheduled function allocates when it is called: each buffer where it is used, of the size that is used there."""
    import tvm
    from tvm import s_tir

    passes = [
        s_tir.transform.LowerInitBlock(),
        s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
        s_tir.transform.ConvertBlocksToOpaque(),
        s_tir.transform.CompactBufferAllocation(),
    ]
    lowered = tvm.transform.Sequential(passes)(tvm.IRModule({"main": function}))["main"]
    return _allocated(lowered.body)


def _allocated(statement: Any) -> int:
    """Bytes of the buffers outside the stack in a statement and those within it: of statements in a row, the most that one takes."""
    from tvm import s_tir, tirx

    if isinstance(statement, tirx.For):
        return _allocated(statement.body)
    if isinstance(statement, tirx.SeqStmt):
        return max(map(_allocated, statement))
    if isinstance(statement, s_tir.SBlockRealize):
        block = statement.block
        own = [buffer for buffer in block.alloc_buffers if buffer.scope() == "global"]
        return sum(_size(buffer.shape, str(buffer.dtype)) for buffer in own) + _allocated(block.body)
    return 0


def _size(shape: Any, dtype: str) -> int:
    import tvm

    kind = tvm.DataType(dtype.removeprefix("T."))
    return math.prod(int(axis) for axis in shape) * -(-int(kind.bits * kind.lanes) // 8)
