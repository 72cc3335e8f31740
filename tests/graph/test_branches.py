"""Branches that can be left out whole: which are found, which are not and why, and that what is left computes what it should."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from autocomp.compiler.importer import export_program
from autocomp.graph.analyse import analyse
from autocomp.graph.branches import bypassed
from autocomp.graph.canonical import canonical
from autocomp.graph.program import CanonicalModel
from autocomp.graph.structure import describe, rebuild


class Bottleneck(nn.Module):
    """Three convolutions around which a sum leads; ``into``: the branch is the sum's first operand, written into."""

    def __init__(self, into: bool = False) -> None:
        super().__init__()
        self.into = into
        self.conv1, self.bn1 = nn.Conv2d(8, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv3, self.bn3 = nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn3(self.conv3(self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())).relu()))
        if self.into:
            out += x
        else:
            out = x + out
        return out.relu()


class Gate(nn.Module):
    """Squeeze and excite: a product leads around it."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.up(self.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class Block(nn.Module):
    """Attention and a feed-forward branch, a norm behind each as BERT has them."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 32), nn.Linear(32, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        batch, steps, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, steps, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, steps, width)
        x = self.norm1(x + self.proj(mixed))
        return self.norm2(x + self.fc2(nn.functional.gelu(self.fc1(x))))


class Joined(nn.Module):
    """A branch that is put beside the data: a constant does not do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1), nn.Conv2d(16, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([x, self.b(self.a(x).relu())], 1).relu())


class Either(nn.Module):
    """Two branches, each the way around the other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Bottleneck(), Bottleneck()

    def forward(self, x: Tensor) -> Tensor:
        def of(branch: nn.Module) -> Tensor:
            return branch.conv3(branch.conv2(branch.conv1(x)).relu())

        return (of(self.a) + of(self.b)).relu()


class Counted(nn.Module):
    """A gate that is a sum over all steps: what a constant comes to depends on their number."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(16, 4), nn.Linear(4, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(self.down(x).relu()).sum(1, keepdim=True)


class Framed(nn.Module):
    """A branch that is padded with zeros behind its last layer: what it gives is no constant at the border."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return (x + nn.functional.pad(self.b(self.a(x).relu()), (1, 1, 1, 1))).relu()


class Upsampled(nn.Module):
    """A branch that ends in a transposed convolution; ``framed``: cut and padded with zeros again, so that it is no constant."""

    def __init__(self, framed: bool = False) -> None:
        super().__init__()
        self.framed = framed
        self.down, self.up = nn.Conv2d(8, 4, 2, 2), nn.ConvTranspose2d(4, 8, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        out = self.up(self.down(x).relu())
        if self.framed:
            out = nn.functional.pad(out[..., 1:-1, 1:-1], (1, 1, 1, 1))
        return (x + out).relu()


PICTURE = torch.randn(2, 3, 6, 6)


def on_pictures(*parts: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


FOUND = {
    "bottleneck": (on_pictures(Bottleneck(), Bottleneck()), PICTURE, {"1.conv2", "2.conv2"}),
    "written into": (on_pictures(Bottleneck(into=True)), PICTURE, {"1.conv2"}),
    "gate": (on_pictures(Gate()), PICTURE, {"1.down"}),
    "transformer": (nn.Sequential(Block(), Block()), torch.randn(2, 6, 16), {f"{i}.{n}" for i in "01" for n in ("qkv", "fc1")}),
    "either": (on_pictures(Either()), PICTURE, {"1.a.conv2"}),
    "counted": (nn.Sequential(nn.Linear(16, 16), Counted()), torch.randn(2, 6, 16), set()),
    "framed": (on_pictures(Framed()), PICTURE, set()),
    "upsampled": (on_pictures(Upsampled()), PICTURE, {"1.down"}),
    "upsampled, framed": (on_pictures(Upsampled(framed=True)), torch.randn(2, 3, 8, 8), set()),
    "joined": (on_pictures(Joined()), PICTURE, set()),
    "chain": (on_pictures(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1)), PICTURE, set()),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_branches_are_found_and_others_are_refused_with_a_reason(name: str) -> None:
    model, inputs, expected = FOUND[name]
    graph = analyse(model.eval(), (inputs,))
    assert set(graph.branches) == expected
    assert set(graph.whole) == set(graph.groups) - expected
    assert all(graph.whole.values())


def test_a_branch_takes_along_what_was_computed_for_it_alone() -> None:
    graph = analyse(on_pictures(Bottleneck()).eval(), (PICTURE,))
    branch = graph.branches["1.conv2"]
    assert branch.ends == ("1.conv3",)
    assert set(branch.layers) == {"1.conv1", "1.conv2"}
    assert branch.groups == ("1.conv2", "1.conv1")
    left = graph.without(["1.conv2"])
    assert set(left.layers) == {name for name in graph.layers if not name.startswith("1.")}
    assert all("1.conv3" not in group.producers for group in left.groups.values())


@pytest.mark.parametrize("name", [name for name, (_, _, found) in FOUND.items() if found])
def test_left_out_the_model_says_what_it_says_with_constants_in_the_place_of_the_branches(name: str) -> None:
    model, inputs, found = FOUND[name]
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # as training leaves them
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    base = canonical(model.eval(), (inputs,))
    graph = analyse(base, (inputs,))
    constants = {
        end: torch.randn(8 if "conv" in end or "up" in end else 16) for g in found for end in graph.branches[g].ends
    }
    small = bypassed(base, constants, (inputs,))
    blind = canonical(model, (inputs,))
    for end, constant in constants.items():
        module = blind.get_submodule(end)
        nn.init.zeros_(module.weight)  # type: ignore[arg-type]
        module.bias = nn.Parameter(constant)
    other = torch.randn(3, *inputs.shape[1:])  # another number of samples
    with torch.no_grad():
        torch.testing.assert_close(small(other), blind(other), rtol=1e-4, atol=1e-5)
    gone = {layer for g in found for layer in (*graph.branches[g].ends, *graph.branches[g].layers)}
    names = dict(small.named_modules())
    assert not gone & set(names)
    assert isinstance(small, CanonicalModel)
    again = rebuild(*describe(small))
    with torch.no_grad():
        torch.testing.assert_close(again(inputs), small(inputs))
    export_program(small, (inputs,))
