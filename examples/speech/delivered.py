"""What a search delivered is opened: a compiled module, or an ONNX file."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from torch import Tensor

from autocomp.errors import UsageError, last_line
from autocomp.tasks.speech.features import BANDS
from autocomp.tasks.speech.runner import STRIDE, Module


def opened(folder: Path, onnx: bool = False) -> Module:
    """Open the ``model.so`` (or ``model.onnx``) of an exported point, ``RUN/models/ID``.

    UsageError if the folder is none, or its model reads no log-mel frames, or a package is missing.
    """
    manifest = folder / "manifest.json"
    try:
        shapes = [tuple(one["shape"]) for one in json.loads(manifest.read_text())["inputs"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{folder} is no exported model, give RUN/models/ID: {last_line(error)}") from error
    match shapes:
        case [(1, int(frames), bands)] if bands == BANDS and frames % STRIDE == 0:
            pass
        case _:
            raise UsageError(
                f"a recogniser reads frames of the shape (1, frames, {BANDS}), the model in {folder} reads {shapes}: give one that "
                "`autocomp search speech` wrote"
            )
    path = folder / ("model.onnx" if onnx else "model.so")
    if not path.exists():
        raise UsageError(f"there is no {path.name} in {folder}: its manifest.json says why it was not written")
    return Module(frames, _onnx(path) if onnx else _compiled(path))


def _onnx(path: Path) -> Callable[[Tensor], Tensor]:
    if find_spec("onnxruntime") is None:
        raise UsageError(f"{path.name} is run by ONNX Runtime, which is not installed: pip install onnxruntime")
    from autocomp.export.onnx import onnx_runner

    try:
        run = onnx_runner(path)
    except Exception as error:  # ONNX Runtime has many kinds
        raise UsageError(f"{path} cannot be opened by ONNX Runtime: {last_line(error)}") from error
    return lambda frames: _logits(run(frames))


def _compiled(path: Path) -> Callable[[Tensor], Tensor]:
    if find_spec("tvm") is None:
        raise UsageError(
            f"{path.name} is run by Apache TVM, which is not installed: pip install autocomp, or run model.onnx"
        )
    from autocomp.compiler.build import CompiledModel
    from autocomp.hardware.profile import load_profile

    run = CompiledModel.load(path, load_profile("x86-host")).run
    return lambda frames: _logits(run(frames))


def _logits(found: Tensor | tuple[Tensor, ...]) -> Tensor:
    return found if isinstance(found, Tensor) else found[0]
