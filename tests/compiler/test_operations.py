"""Operations as users write them: compiled and equal to torch, in values, shapes and types, or refused with a message that helps."""

from __future__ import annotations

import operation_cases
import pytest
import torch
from places import ROOT
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autocomp.compiler.build import build
from autocomp.compiler.importer import export_program, unsupported
from autocomp.devices.local import LocalDevice
from autocomp.errors import ExportError
from autocomp.hardware.profile import load_profile

torch.set_num_threads(1)
_TOGETHER = 65
_NAMES = [name for name in operation_cases.CASES if name not in operation_cases.REFUSED | operation_cases.NOT_YET]
_ALL = [name for name in operation_cases.CASES if name not in operation_cases.REFUSED]
_SWEPT = 715  # cases, from the first on, that were seen to pass; the others are tried on request


class Called(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.function = operation_cases.CASES[name][0]

    def forward(self, *inputs: Tensor) -> object:
        return self.function(*inputs)


class Together(nn.Module):
    """Many cases in one module: one export and one compilation for all."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.cases = nn.ModuleList(Called(name) for name in names)
        self.counts = [len(operation_cases.CASES[name][1]) for name in names]

    def forward(self, *inputs: Tensor) -> list[object]:
        outputs, start = [], 0
        for case, count in zip(self.cases, self.counts, strict=True):
            outputs.append(case(*inputs[start : start + count]))
            start += count
        return outputs


def tensors(value: object) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def fault(value: Tensor, expected: Tensor) -> str:
    if value.dtype != expected.dtype:
        return f"{value.dtype} instead of {expected.dtype}"
    if value.shape != expected.shape:
        return f"{tuple(value.shape)} instead of {tuple(expected.shape)}"
    if not torch.allclose(value.double(), expected.double(), rtol=1e-4, atol=1e-4, equal_nan=True):
        return f"off by {float((value.double() - expected.double()).abs().max()):.2e}"
    return ""


@pytest.mark.sweep
@pytest.mark.parametrize("name", _ALL)
def test_every_case_alone(device: LocalDevice, name: str) -> None:
    compared(device, [name])


@pytest.mark.parametrize("start", range(0, _SWEPT, _TOGETHER))
def test_cases_equal_torch(device: LocalDevice, start: int) -> None:
    compared(device, _NAMES[start : start + _TOGETHER])


def compared(device: LocalDevice, names: list[str]) -> None:
    """Compile cases together, and compare each with torch."""
    groups = [operation_cases.inputs_of(name) for name in names]
    inputs = tuple(tensor for group in groups for tensor in group)
    model = Together(names).eval()
    with torch.no_grad():
        expected = [tensors(case(*group)) for case, group in zip(model.cases, groups, strict=True)]
    compiled = build(model, inputs, device.profile, device.tuner).run(*inputs)
    values = list(compiled) if isinstance(compiled, tuple) else [compiled]
    assert len(values) == sum(map(len, expected))
    faults = {}
    for name, wanted in zip(names, expected, strict=True):
        mine, values = values[: len(wanted)], values[len(wanted) :]
        found = [text for value, reference in zip(mine, wanted, strict=True) if (text := fault(value, reference))]
        if found:
            faults[name] = found
    assert not faults


def test_what_is_refused_is_named_with_its_place_and_what_to_do() -> None:
    """All at once: the operation, the module it stands in, the line of the model, an advice."""
    names = sorted(operation_cases.REFUSED)
    model = Together(names).eval()
    inputs = tuple(tensor for name in names for tensor in operation_cases.inputs_of(name))
    messages = unsupported(export_program(model, inputs), load_profile("x86-host"))
    for position, name in enumerate(names):
        mine = [text for text in messages if f"'cases.{position}'" in text]
        assert mine, name
        for text in mine:
            assert "operation aten." in text, text
            assert "test_operations.py:" in text, text
    assert any("random" in text for text in messages)


def test_a_supported_model_has_nothing_unsupported() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)).eval()
    assert unsupported(export_program(model, (torch.randn(1, 3, 8, 8),)), load_profile("x86-host")) == []


def test_building_a_refused_model_raises_all_its_messages(device: LocalDevice) -> None:
    model = Together(sorted(operation_cases.REFUSED)[:2]).eval()
    inputs = tuple(t for name in sorted(operation_cases.REFUSED)[:2] for t in operation_cases.inputs_of(name))
    with pytest.raises(ExportError) as raised:
        build(model, inputs, device.profile, device.tuner)
    assert "cases.0" in str(raised.value)
    assert "cases.1" in str(raised.value)


def test_the_page_of_operations_is_that_of_the_code() -> None:
    from autocomp.compiler.operations.document import page

    written = ROOT / "docs" / "operations.md"
    assert written.read_text() == page(), "run: python -m autocomp.compiler.operations > docs/operations.md"


WIDE = {
    "sinh": torch.sinh, "cosh": torch.cosh, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "exp": torch.exp, "expm1": torch.expm1,
    "erf": torch.erf, "asinh": torch.asinh, "atan": torch.atan, "sin": torch.sin, "softplus": nn.functional.softplus,
    "silu": nn.functional.silu, "gelu": nn.functional.gelu, "mish": nn.functional.mish, "elu": nn.functional.elu, "selu": nn.functional.selu,
    "logsigmoid": nn.functional.logsigmoid, "hardswish": nn.functional.hardswish, "log1p of squares": lambda x: torch.log1p(x * x),
    "rsqrt of squares": lambda x: torch.rsqrt(x * x + 1e-6),
}  # fmt: skip


def test_values_far_from_zero_are_as_right_as_those_near_it(device: LocalDevice) -> None:
    """Each value by itself: the largest error over the largest value would hide what is wrong among the small ones."""

    class All(nn.Module):
        def forward(self, x: Tensor) -> list[Tensor]:
            return [function(x) for function in WIDE.values()]

    x = torch.cat([torch.linspace(-80, 80, 161), torch.logspace(-6, 1, 40), -torch.logspace(-6, 1, 40)])[None]
    module = device.compile(All().eval(), [(torch.randn(x.shape),)])
    for name, value, expected in zip(WIDE, module.run(x), All()(x), strict=True):
        bound = 1e-3 * expected.abs() + 1e-5
        wrong = (value - expected).abs() > bound
        assert not wrong.any(), f"{name} at {x[wrong][:5].tolist()}: {value[wrong][:5].tolist()}"
