"""Channels-last: the transposes cancel all through a network's body, and nothing that is computed changes."""

from __future__ import annotations

from typing import Any

import nets
import torch
from torch import Tensor, nn
from wholes import mobile

from autocomp.compiler.build import build
from autocomp.compiler.importer import export_program, import_program
from autocomp.compiler.layout import to_channels_last
from autocomp.compiler.verify import check_outputs
from autocomp.devices.local import LocalDevice
from autocomp.graph.fold import fold_batchnorm
from autocomp.hardware.profile import load_profile

torch.set_num_threads(1)


def transposes(model: nn.Module, x: Tensor, *, fold: bool = True) -> list[tuple[int, ...]]:
    """Shapes of the activations that are transposed after the pass (of weights, which folding takes care of, none)."""
    from tvm import relax

    from autocomp.compiler.expressions import shape_of

    program = export_program(fold_batchnorm(model) if fold else model.eval(), (x,))
    mod = to_channels_last(import_program(program, load_profile("x86-host")))
    found: list[tuple[int, ...]] = []

    def visit(expression: Any) -> None:
        transposed = isinstance(expression, relax.Call) and getattr(expression.op, "name", "") == "relax.permute_dims"
        if transposed and isinstance(expression.args[0], relax.Var):
            found.append(shape_of(expression) or ())

    relax.analysis.post_order_visit(mod["main"], visit)
    return found


class Preactivated(nn.Module):
    """BatchNorm and ReLU before the convolution, as in ResNet v2 and DenseNet: there is nothing to fold it into."""

    def __init__(self, affine: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width, affine=affine) for width in (16, 32))
        self.convs = nn.ModuleList([nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(32, 16, 3, stride=2, padding=1)])
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([x, self.convs[0](torch.relu(self.norms[0](x)))], 1)
        return self.head(self.convs[1](nn.functional.relu6(self.norms[1](x))).mean((2, 3)))


def test_no_transpose_inside_a_mobile_body() -> None:
    """Strided, residual, squeeze-and-excite, ReLU6: only the image itself is brought to channels-last."""
    torch.manual_seed(0)
    model = nets.randomise(mobile())
    assert transposes(model, torch.randn(1, 3, 37, 37)) == [(1, 37, 37, 3)]
    assert transposes(model[3:], torch.randn(1, 16, 19, 19)) == [(1, 19, 19, 16)]


def test_one_channel_needs_no_transpose_at_all() -> None:
    assert transposes(nets.make(), nets.images(1)) == []


def test_batchnorm_that_cannot_be_folded_stays_channels_last(device: LocalDevice) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 12, 12)
    model = nets.randomise(Preactivated())
    assert transposes(model, x) == [(2, 12, 12, 3)]
    assert check_outputs(model, build(model, (x,), device.profile, device.tuner).run, [(x,)], "preactivated") < 1e-4
    assert transposes(nets.make(), nets.images(1), fold=False) == [], "nor does one that nobody folded"


def test_batchnorm_without_factors_equals_torch(device: LocalDevice) -> None:
    torch.manual_seed(0)
    model = Preactivated(affine=False).eval()
    for norm in model.norms:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
    x = torch.randn(1, 3, 12, 12)
    assert check_outputs(model, build(model, (x,), device.profile, device.tuner).run, [(x,)], "no factors") < 1e-4


def test_order_is_restored_where_it_matters(device: LocalDevice) -> None:
    """A flatten of a whole map, a softmax over channels and a reduction over one spatial axis read the original order."""

    class Ordered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            y = torch.relu(self.conv(x))
            return y, y.flatten(1), torch.softmax(y, 1), y.mean(2)

    torch.manual_seed(0)
    model, x = Ordered().eval(), torch.randn(2, 3, 5, 6)
    compiled = build(model, (x,), device.profile, device.tuner)
    assert check_outputs(model, compiled.run, [(x,)], "ordered") < 1e-5


def test_two_orders_that_meet_are_brought_together(device: LocalDevice) -> None:
    class Meeting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return y + y.transpose(2, 3) * x + y.permute(0, 1, 3, 2).mean(1, keepdim=True)

    torch.manual_seed(0)
    model, x = Meeting().eval(), torch.randn(2, 4, 6, 6)
    assert check_outputs(model, build(model, (x,), device.profile, device.tuner).run, [(x,)], "meeting") < 1e-5
