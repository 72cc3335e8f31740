"""Front point → files a user can deploy: ``model.so``, ``model.onnx``, ``weights.pt``, ``manifest.json``, each read back and checked."""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autocomp.cache import write_atomically
from autocomp.errors import AutocompError, BoardError
from autocomp.onnx_export import export_onnx, onnx_session, run_session
from autocomp.records import FORMAT_VERSION, Evaluation, latency_to_json
from autocomp.report.data import Verified
from autocomp.verify import check_outputs

if TYPE_CHECKING:
    import torch

    from autocomp.devices.device import Compiled

MANIFEST = "manifest.json"
WEIGHTS = "weights.pt"


def export_point(
    evaluation: Evaluation,
    model: torch.nn.Module,
    compiled: Mapping[str, Compiled | BoardError],
    inputs: Sequence[tuple[torch.Tensor, ...]],
    folder: Path,
) -> dict[str, Verified]:
    """Write one candidate's files into ``folder`` and return what reading each of them back found.

    ``compiled`` has for each profile its module, or why its board could not be reached; ``inputs`` some input tuples to compare on. Keys
    are ``so`` (of the first profile; ``so:NAME`` for others) and ``onnx``. A file that fails is reported as failed, never raised.
    """
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    verified: dict[str, Verified] = {}
    for profile, module in compiled.items():
        first = not verified
        # a profile of the user's own is named by the path of its file
        path = folder / ("model.so" if first else f"model.{profile.removesuffix('.yaml').replace('/', '_')}.so")
        verified["so" if first else f"so:{profile}"] = _library(module, path, model, inputs)
    verified["onnx"] = _onnx(model, folder / "model.onnx", inputs)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    write_atomically(folder / WEIGHTS, buffer.getvalue())
    _write_manifest(folder, evaluation, inputs[0], verified)
    return verified


def load_model(folder: Path) -> torch.nn.Module:
    """Load the compressed torch model of an exported point. The file is a pickle: open only what you trust."""
    import torch

    import autocomp.compress.quantize  # noqa: F401 - registers the custom ops the model may call

    model: torch.nn.Module = torch.load(folder / WEIGHTS, weights_only=False)
    return model.eval()


def _library(
    module: Compiled | BoardError, path: Path, model: torch.nn.Module, inputs: Sequence[tuple[torch.Tensor, ...]]
) -> Verified:
    if isinstance(module, BoardError):
        return Verified(False, note=str(module))
    try:
        module.save(path)
        loaded = module.reload(path)
        error = check_outputs(model, loaded.run, inputs[: module.checked_inputs], path.name)
        return Verified(True, error, loaded.time(*inputs[0]).seconds)
    except AutocompError as failure:
        return Verified(False, note=str(failure))


def _onnx(model: torch.nn.Module, path: Path, inputs: Sequence[tuple[torch.Tensor, ...]]) -> Verified:
    try:
        export_onnx(model, inputs[0], path)
        session = onnx_session(path)
        return Verified(
            True, check_outputs(model, lambda *arguments: run_session(session, *arguments), inputs, path.name)
        )
    except AutocompError as failure:
        return Verified(False, note=str(failure))


def _write_manifest(
    folder: Path, evaluation: Evaluation, example: tuple[torch.Tensor, ...], verified: Mapping[str, Verified]
) -> None:
    manifest = {
        "format_version": FORMAT_VERSION,
        "id": evaluation.candidate.id,
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "candidate": evaluation.candidate.to_json(),
        "inputs": [
            {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")} for tensor in example
        ],
        "metrics": dict(evaluation.metrics),
        "bytes": evaluation.bytes,
        "latency": {name: _brief(latency_to_json(latency)) for name, latency in evaluation.latency.items()},
        "verified": {kind: asdict(check) for kind, check in verified.items()},
        "sha256": {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.iterdir())
            if path.name != MANIFEST
        },
    }
    write_atomically(folder / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())


def _brief(latency: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in latency.items() if key not in ("samples", "kernels")}
