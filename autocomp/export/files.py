"""Front point → files to deploy: ``model.so``, ``model.onnx``, ``model.safetensors``, ``manifest.json``, each read back and checked."""

from __future__ import annotations

import hashlib
import json
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autocomp.cache import unwritable_reason, write_atomically
from autocomp.compiler.verify import coarsest, compare
from autocomp.config.versions import current
from autocomp.errors import AutocompError, MismatchError, UsageError, last_line
from autocomp.export.onnx import EXACT, export_onnx, onnx_session, run_session
from autocomp.records.evaluation import FORMAT_VERSION, Evaluation
from autocomp.records.latency import latency_to_json
from autocomp.records.precisions import INT8
from autocomp.records.recovery import recovery_to_json
from autocomp.records.run import Verified, is_of_others

if TYPE_CHECKING:
    import torch

    from autocomp.devices.device import Compiled

MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"
_PICKLED = "weights.pt"  # of version 0.1
ONNX = "model.onnx"
_STRUCTURE = "autocomp"  # in the metadata of the tensors' file
_NAME_LENGTH = 100  # of a profile's path in a file's name, which may have 255 bytes on most file systems


def export_point(
    evaluation: Evaluation,
    model: torch.nn.Module,
    compiled: Mapping[str, Compiled | Exception],
    inputs: Sequence[tuple[torch.Tensor, ...]],
    folder: Path,
) -> dict[str, Verified]:
    """Write one candidate's files into ``folder`` and return what reading each of them back found.

    ``compiled`` has for each profile its module, or why there is none (its board is gone, it does not compile any more); ``inputs`` some input
    tuples to compare on. Keys are ``so`` (of the first profile; ``so:NAME`` for others), ``onnx``, and ``weights`` where these could not be
    written. A file that fails, whatever its failure, is reported, never raised, and taken away. OSError where nothing can be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    libraries = _libraries(list(compiled))
    verified: dict[str, Verified] = {
        kind: _tried(folder / name, partial(_library, module, model, inputs))
        for (kind, name), module in zip(libraries.items(), compiled.values(), strict=True)
    }
    verified["onnx"] = _tried(folder / ONNX, partial(_onnx, model, inputs))
    weights = _tried(folder / WEIGHTS, partial(_weights, model, inputs))
    if not weights.ok:
        verified["weights"] = weights
    _write_manifest(folder, manifest_of(evaluation, model, inputs[0], verified))
    return verified


def files_of(profiles: Sequence[str]) -> dict[str, str]:
    """The files of a point by kind (``manifest``, ``weights``, ``so`` and ``so:NAME``, ``onnx``), as `export_point` names them."""
    return {"manifest": MANIFEST, "weights": WEIGHTS, **_libraries(profiles), "onnx": ONNX}


def library_of(profile: str, profiles: Sequence[str]) -> str:
    """The file of the library for one of a run's profiles."""
    return list(_libraries(profiles).values())[list(profiles).index(profile)]


def _libraries(profiles: Sequence[str]) -> dict[str, str]:
    """The kind of a library and its file for each profile. A profile of the user's own is named by the path of its file."""
    found: dict[str, str] = {}
    for profile in profiles:
        name = profile.removesuffix(".yaml").replace("/", "_")[-_NAME_LENGTH:]
        file = f"model.{name}.so" if found else "model.so"
        if file in found.values():  # two paths that are written alike
            file = f"model.{name}.{len(found)}.so"
        found[f"so:{profile}" if found else "so"] = file
    return found


def load_model(folder: Path) -> torch.nn.Module:
    """The compressed torch model of an exported point, in evaluation mode. Nothing in the file is run; UsageError if it is not readable.

    It takes batches of any size that the original takes. What the original returned in a class of its own comes as a dictionary with the same
    names, which are attributes too.
    """
    from safetensors import SafetensorError, safe_open

    from autocomp.graph.structure import FORMAT_VERSION as NEWEST
    from autocomp.graph.structure import rebuild

    path = folder / WEIGHTS
    if not path.exists():
        if (folder / _PICKLED).exists():
            raise UsageError(
                f"{folder / _PICKLED} was written by autocomp 0.1 as a pickle, which can run any code and is not opened any more: use the "
                "model.onnx or model.so beside it, load it with autocomp 0.1, or search again"
            )
        raise UsageError(f"there is no {WEIGHTS} in {folder}: its manifest.json says why it was not written")
    try:
        with safe_open(path, "pt") as file:
            structure = json.loads((file.metadata() or {}).get(_STRUCTURE, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, ValueError, OSError) as error:
        raise UsageError(f"{path} cannot be read: {last_line(error)}") from error
    if not isinstance(structure, dict):
        raise UsageError(f"{path} holds tensors, but not the structure of a model: it was not written by autocomp")
    structure = current(structure, path, NEWEST, assumed=NEWEST)
    try:
        return rebuild(structure, tensors).eval().requires_grad_(False)
    except (KeyError, TypeError, ValueError, AttributeError, AssertionError, IndexError, RuntimeError) as error:
        raise UsageError(f"{path} is damaged: {type(error).__name__}: {last_line(error)}") from error


def write_model(model: torch.nn.Module, example: tuple[torch.Tensor, ...], folder: Path) -> None:
    """Write what `load_model` reads. OSError where nothing can be written."""
    from safetensors.torch import save

    from autocomp.graph.canonical import canonical
    from autocomp.graph.structure import describe

    structure, tensors = describe(canonical(model, example))
    write_atomically(folder / WEIGHTS, save(tensors, {_STRUCTURE: json.dumps(structure)}))


def refuse_foreign(folder: Path, metrics: Mapping[str, float] | None = None) -> None:
    """UsageError if the torch model of a point is not the file that its manifest was written for, or that is of other ``metrics`` than these."""
    path = folder / WEIGHTS
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        said, whose = manifest["sha256"].get(WEIGHTS), manifest.get("id", folder.name)
        other = metrics is not None and is_of_others(manifest, metrics)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{folder / MANIFEST} is missing or damaged, so nobody knows what {WEIGHTS} is: {last_line(error)}"
        ) from error
    if whose != folder.name:
        raise UsageError(f"{folder} holds the files of another point, {whose}: write them again with --resume")
    if other:
        raise UsageError(
            f"{folder} holds the point with other metrics than front.json says: the run was stopped at its end. Go on with --resume"
        )
    if said is not None and path.is_file() and checksum(path) != said:
        raise UsageError(
            f"{path} is not the file that the run wrote: its checksum is not that of {MANIFEST}. Write it again with --resume"
        )


def checksum(path: Path) -> str:
    """Of a file, as manifests have it."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _tried(path: Path, write: Callable[[Path], Verified]) -> Verified:
    """What ``write`` found; a file that failed is not left for anyone to use."""
    try:
        return write(path)
    except Exception as error:
        if isinstance(error, OSError) and unwritable_reason(error):
            raise
        path.unlink(missing_ok=True)
        if isinstance(error, AutocompError):
            return Verified(False, note=str(error), wrong=isinstance(error, MismatchError))
        traceback.print_exc()  # into the run's log
        return Verified(False, note=f"{type(error).__name__}: {last_line(error)}")


def _library(
    module: Compiled | Exception, model: torch.nn.Module, inputs: Sequence[tuple[torch.Tensor, ...]], path: Path
) -> Verified:
    if isinstance(module, Exception):
        raise module
    module.save(path)
    found = compare(model, module.reload(path).run, inputs[: module.checked_inputs], path.name)
    return Verified(True, found.errors.worst, note=found.note)


def _onnx(model: torch.nn.Module, inputs: Sequence[tuple[torch.Tensor, ...]], path: Path) -> Verified:
    export_onnx(model, inputs[0], path)
    if coarsest(model) is INT8:  # as the manifest tells those to open it whose processor needs it
        run_session(onnx_session(path, exact=True, everywhere=True), *inputs[0])
    session = onnx_session(path, exact=True)
    found = compare(model, lambda *arguments: run_session(session, *arguments), inputs, path.name)
    return Verified(True, found.errors.worst, note=found.note)


def _weights(model: torch.nn.Module, inputs: Sequence[tuple[torch.Tensor, ...]], path: Path) -> Verified:
    write_model(model, inputs[0], path.parent)
    found = compare(model, load_model(path.parent), inputs, path.name)
    return Verified(True, found.errors.worst, note=found.note)


def _write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    manifest = {
        "format_version": FORMAT_VERSION,
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **facts,
        "sha256": {path.name: checksum(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST},
    }
    write_atomically(folder / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())


def manifest_of(
    evaluation: Evaluation,
    model: torch.nn.Module,
    example: tuple[torch.Tensor, ...],
    verified: Mapping[str, Verified],
) -> dict[str, Any]:
    """What a point's manifest says of it, beside its files and when they were written."""
    return {
        "id": evaluation.candidate.id,
        "candidate": evaluation.candidate.to_json(),
        "inputs": [
            {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")} for tensor in example
        ],
        "metrics": dict(evaluation.metrics),
        **({} if evaluation.recovered is None else {"recovered": recovery_to_json(evaluation.recovered)}),
        "bytes": evaluation.bytes,
        "latency": latencies_of(evaluation),
        "verified": {kind: asdict(check) for kind, check in verified.items()},
        "onnx_session_options": EXACT if coarsest(model) is INT8 else {},  # for processors without VNNI
    }


def renew_manifest(folder: Path, evaluation: Evaluation) -> None:
    """Write a point's latencies into its manifest anew: they were taken once more after its files were."""
    path = folder / MANIFEST
    if path.exists():
        manifest = json.loads(path.read_text())
        manifest["latency"] = latencies_of(evaluation)
        write_atomically(path, (json.dumps(manifest, indent=2) + "\n").encode())


def latencies_of(evaluation: Evaluation) -> dict[str, dict[str, Any]]:
    """A point's latencies by profile, as a manifest has them."""
    return {name: _brief(latency_to_json(latency)) for name, latency in evaluation.latency.items()}


def _brief(latency: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in latency.items() if key not in ("samples", "kernels")}
