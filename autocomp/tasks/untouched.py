"""What a user's function may change beside its result: put back where it is the process's, told where it is the task's data."""

from __future__ import annotations

import os
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any, TextIO

from autocomp.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn


@contextmanager
def process_kept() -> Iterator[None]:
    """Put back torch's modes, dtype, products, device and threads, the standard streams and the working folder, whatever was done to them."""
    import torch

    gradients, dtype, threads = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()
    device, mixed = torch.get_default_device(), torch.is_autocast_enabled("cpu")
    products = torch.get_float32_matmul_precision()
    folder, streams = os.getcwd(), (sys.stdout, sys.stderr)
    files = [_copy_of(number) for number in (1, 2)]
    try:
        yield
    finally:
        torch.set_grad_enabled(gradients)
        torch.set_default_dtype(dtype)
        torch.set_float32_matmul_precision(products)
        if torch.get_default_device() != device:
            torch.set_default_device(device)
        torch.set_autocast_enabled("cpu", mixed)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        sys.stdout, sys.stderr = (
            _opened(number, *kept) for number, kept in enumerate(zip(streams, files, strict=True), 1)
        )
        with suppress(OSError):  # it was removed meanwhile: nobody can go back
            os.chdir(folder)


def _copy_of(number: int) -> int | None:
    """A copy of an open file, by its number; None where there is none."""
    try:
        return os.dup(number)
    except OSError:
        return None


def _opened(number: int, stream: TextIO, file: int | None) -> TextIO:
    """A standard stream, and the file below it, opened again where they were closed; ``file`` is a copy of that, which is spent."""
    if file is None:
        return stream
    try:
        os.fstat(number)
    except OSError:
        os.dup2(file, number)
    if stream is None or not stream.closed:
        os.close(file)
        return stream
    return os.fdopen(file, "w")


@contextmanager
def in_float32() -> Iterator[None]:
    """torch's default type, products, device and modes as they are delivered, whatever the caller or a task's module set: the one enters what is
    exported, the others are what compiled modules are compared with, and what trains needs gradients."""
    import torch

    before, products = torch.get_default_dtype(), torch.get_float32_matmul_precision()
    torch.set_default_dtype(torch.float32)
    torch.set_float32_matmul_precision("highest")
    try:
        with ExitStack() as modes:
            modes.enter_context(torch.inference_mode(False))
            modes.enter_context(torch.enable_grad())
            for kind in ("cpu", "cuda"):
                if torch.is_autocast_enabled(kind):
                    modes.enter_context(torch.autocast(kind, enabled=False))
            if torch.get_default_device().type != "cpu":
                modes.enter_context(torch.device("cpu"))
            yield
    finally:
        torch.set_default_dtype(before)
        torch.set_float32_matmul_precision(products)


_shells: list[nn.Module] = []  # of models that were judged: empty


def _holders(thing: Any) -> int:
    return sys.getrefcount(thing)


def _one_holder() -> int:
    thing = object()
    return _holders(thing)


# What is counted for something that the caller alone holds: other releases of Python count otherwise.
_ONE_HOLDER = _one_holder()


def keep_its_place(model: nn.Module) -> None:
    """Keep what is left of a model that nobody else holds, emptied, so that no later one gets its address: a function that remembers what it
    found by ``id(model)`` would take the one for the other."""
    if sys.getrefcount(model) <= _ONE_HOLDER:
        vars(model).clear()
        _shells.append(model)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's own generator at a seed meanwhile; the caller's goes on afterwards where it was."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextmanager
def unwritten(where: str, inputs: Sequence[Tensor], calibration: Sequence[Sequence[Tensor]]) -> Iterator[None]:
    """UsageError where what a user's code did meanwhile, ``where`` it stands, changed the task's data; what it raises itself goes before."""
    before = checksums(inputs, calibration)
    yield
    for name, found in checksums(inputs, calibration).items():
        if found != before.get(name):
            raise UsageError(f"{where} changed {name} in place: let it work on copies (tensor.clone())")


def checksums(inputs: Sequence[Tensor], calibration: Sequence[Sequence[Tensor]]) -> Mapping[str, int]:
    """A checksum of each tensor of the task's data, by its name in the task: however it was written to, it shows."""
    named: dict[str, Tensor] = {f"Task.example_inputs[{i}]": tensor for i, tensor in enumerate(inputs)}
    named |= {
        f"Task.calibration[{b}][{i}]": tensor for b, batch in enumerate(calibration) for i, tensor in enumerate(batch)
    }
    return {name: zlib.crc32(tensor.detach().contiguous().numpy().data) for name, tensor in named.items()}
