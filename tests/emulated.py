"""Running what is compiled for a Cortex-A76 on any machine: kernels, and whole lowered modules, in the emulator."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from autocomp.compiler.expressions import array_of, is_constant
from autocomp.compiler.importer import export_program, import_program
from autocomp.compiler.layout import to_channels_last
from autocomp.compiler.lower import lower
from autocomp.estimate import compile_object, run_kernel
from autocomp.hardware.profile import Profile
from autocomp.kernels import templates


def run_function(function: Any, arrays: list[np.ndarray], profile: Profile, pick: int = 0) -> np.ndarray:
    """Schedule a PrimFunc with the ``pick``-th tile (wrapping) and run it; its last parameter is the result."""
    anchor = templates.describe(function)
    tiles = templates.tiles(anchor, profile)
    scheduled = templates.apply(function, tiles[pick % len(tiles)], anchor, profile)
    out = function.params[-1].ty
    result = np.zeros([int(size) for size in out.shape], str(out.dtype).removeprefix("T."))
    return run_kernel(compile_object(scheduled, profile.target), [*arrays, result])[-1]


def run_te(inputs: list[Any], output: Any, arrays: list[np.ndarray], profile: Profile, pick: int = 0) -> np.ndarray:
    """``run_function`` of a TE graph."""
    from tvm import te

    return run_function(te.create_prim_func([*inputs, output]), arrays, profile, pick)


def lowered(model: nn.Module, x: torch.Tensor, profile: Profile) -> Any:
    """The module of fused functions that a model becomes."""
    from tvm.target import Target

    program = export_program(model.eval(), (x,))
    return lower(to_channels_last(import_program(program, profile)), profile, Target(dict(profile.target)))


def run_module(mod: Any, x: torch.Tensor, profile: Profile, pick: int = 0) -> np.ndarray:
    """Run a lowered module with one output, kernel by kernel."""
    from tvm import relax

    main = mod["main"]
    values: dict[Any, Any] = {main.params[0]: x.numpy()}

    def value_of(expression: Any) -> Any:
        if is_constant(expression):
            return array_of(expression)
        if isinstance(expression, relax.Tuple):
            return [value_of(field) for field in expression.fields]
        return values[expression]

    for block in main.body.blocks:
        for binding in block.bindings:
            call = binding.value
            if not isinstance(call, relax.Call):
                values[binding.var] = value_of(call)
            elif call.op.name == "relax.call_tir":
                values[binding.var] = run_function(mod[call.args[0]], value_of(call.args[1]), profile, pick)
            else:  # a view
                assert call.op.name == "relax.reshape", call.op.name
                values[binding.var] = value_of(call.args[0]).reshape([int(size) for size in binding.var.ty.shape])
    result = value_of(main.body.body)
    return result[0] if isinstance(result, list) else result
