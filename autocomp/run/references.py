"""What stands beside the front and the search did not make: other runtimes on the same model, and classic recipes in ours."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from autocomp.measurement.measurer import reason_of
from autocomp.records.evaluation import Reference, reference_from_json, reference_to_json
from autocomp.run.found import Found
from autocomp.run.prepare import Prepared
from autocomp.tasks.task import evaluate_task

if TYPE_CHECKING:
    from autocomp.devices.local import LocalDevice


def references(prepared: Prepared, found: Found) -> list[Reference]:
    """ONNX Runtime on the same model, measured once a run; a reference that fails is a warning, not the end."""
    from autocomp.compiler.build import CompiledModel
    from autocomp.devices.local import LocalDevice
    from autocomp.measurement.references import measure_references

    if not prepared.settings.references:
        return []
    stored = found.search.get_attr("references")
    if stored is not None:
        try:
            return [reference_from_json(reference) for reference in stored]
        except (KeyError, TypeError, ValueError, AttributeError):
            prepared.progress.warn(
                "the references in the study are not as autocomp writes them: they are measured anew"
            )
    with prepared.progress.stage("measuring references"):
        name, device = next(((n, d) for n, d in prepared.devices.items() if isinstance(d, LocalDevice)), ("", None))
        if device is None:  # ONNX Runtime runs here: beside an estimate or a board it would compare nothing
            return []
        if prepared.budget.left() < 0:
            prepared.progress.warn(
                "the minutes were over, so no reference was measured; --resume with more of them measures them"
            )
            return []
        try:
            compiled = prepared.measurer.dense_module(name)
            assert isinstance(compiled, CompiledModel)
            taken = measure_references(
                prepared.task, compiled, prepared.settings.calibration_samples, prepared.progress.warn
            )
            taken += _classic(prepared, device)
        except Exception as error:
            prepared.progress.warn(f"ONNX Runtime could not be measured as a reference: {reason_of(error)}")
            return []
    found.search.set_attr("references", [reference_to_json(reference) for reference in taken])
    return taken


def _classic(prepared: Prepared, device: LocalDevice) -> list[Reference]:
    """Uniform L1 and global magnitude pruning, compiled and timed as the front is. One that fails is a warning."""
    from autocomp.measurement.classic import classic_models

    taken = []
    with tempfile.TemporaryDirectory() as temporary:
        models = classic_models(
            prepared.task.model, prepared.graph, prepared.space, prepared.statistics, Path(temporary)
        )
        for classic in models:
            if prepared.budget.left() < 0:
                prepared.progress.warn(f"the minutes were over, so {classic.name} was not measured")
                continue
            try:
                latency = device.time(device.compile(classic.model, prepared.inputs), prepared.inputs[0])
                metrics = evaluate_task(prepared.task, classic.model)
            except Exception as error:
                prepared.progress.warn(f"{classic.name} could not be measured: {reason_of(error)}")
                continue
            taken.append(Reference(classic.name, metrics, latency, classic.bytes, classic.note, "classic"))
    return taken
