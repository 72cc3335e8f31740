"""torch → Relax: the model as exported, with our custom ops given their own lowering."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from autocomp.compiler import convolutions
from autocomp.compiler.normalise import decomposed
from autocomp.compiler.recurrent import KINDS, LoopConverter, RecurrentConverter
from autocomp.errors import ExportError
from autocomp.hardware.profile import Profile
from autocomp.records.precisions import FAMILIES, load

if TYPE_CHECKING:
    import torch
    import tvm


def export_program(model: torch.nn.Module, example_inputs: tuple[torch.Tensor, ...]) -> torch.export.ExportedProgram:
    """Export with ``torch.export`` and decompose to core operations. ExportError names the operation and where it stands."""
    import torch

    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.export.export(model, example_inputs)
            return decomposed(program)
    except ExportError:
        raise
    except Exception as error:
        detail = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ExportError(
            f"the model {type(model).__name__} cannot be exported by torch.export: {detail}; make its forward traceable "
            "(no branches on tensor values), see torch.export's documentation"
        ) from error


def import_program(program: torch.export.ExportedProgram, profile: Profile) -> tvm.IRModule:
    """Translate a decomposed program to a Relax module with one function ``main``. ExportError for what cannot be translated."""
    from autocomp.compiler.translate import Importer

    special: dict[str, Callable[[Any, Any], Any]] = {
        "convolution.default": convolutions.imported,
        **dict.fromkeys(("lstm.default", "rnn.default"), LoopConverter(program, profile)),
        **{name: RecurrentConverter(program, profile, kind) for name, kind in KINDS.items()},
    }
    for family in FAMILIES:
        if family.lowering:
            special |= load(family.lowering)(program, profile)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TVM copies the graph in a way torch deprecates
            return Importer(program, special).from_exported_program(program, False, True, False, None)
    except ExportError:
        raise
    except Exception as error:
        detail = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise ExportError(f"the compiler cannot import the model: {detail}") from error


def unsupported(program: torch.export.ExportedProgram, profile: Profile) -> list[str]:
    """What the compiler would refuse of a decomposed program: each operation, where it stands in the model, and what to do."""
    try:
        import_program(program, profile)
    except ExportError as error:
        return str(error).splitlines()
    return []
