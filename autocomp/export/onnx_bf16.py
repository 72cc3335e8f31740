"""Layers in bfloat16 → ONNX."""

from __future__ import annotations

from typing import Any

from autocomp.export.onnx_half import casts_about

_KIND = 16  # ONNX's number of the type


def translations(op: Any) -> dict[Any, Any]:
    """The translation of each op by itself, with onnxscript's operators ``op``."""
    import torch

    return casts_about(op, _KIND, torch.ops.autocomp.linear_bf16.default, torch.ops.autocomp.conv2d_bf16.default)
