"""What a user's function may change beside its result: put back where it is the process's, told where it is the task's data."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def process_kept() -> Iterator[None]:
    """Put back torch's modes, dtype and threads, the standard streams and the working folder, whatever was done to them."""
    import torch

    gradients, dtype, threads = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()
    folder, streams = os.getcwd(), (sys.stdout, sys.stderr)
    try:
        yield
    finally:
        torch.set_grad_enabled(gradients)
        torch.set_default_dtype(dtype)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        sys.stdout, sys.stderr = streams
        with suppress(OSError):  # it was removed meanwhile: nobody can go back
            os.chdir(folder)


def versions(inputs: Sequence[Tensor], calibration: Sequence[Sequence[Tensor]]) -> Mapping[str, int]:
    """How often each tensor of the task's data was written to, by its name in the task; torch counts it, at no cost."""
    named: dict[str, Tensor] = {f"Task.example_inputs[{i}]": tensor for i, tensor in enumerate(inputs)}
    named |= {
        f"Task.calibration[{b}][{i}]": tensor for b, batch in enumerate(calibration) for i, tensor in enumerate(batch)
    }
    return {name: tensor._version for name, tensor in named.items() if not tensor.is_inference()}
