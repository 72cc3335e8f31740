"""Layers, groups of tied channels, and what is refused."""

from __future__ import annotations

import nets
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from autocomp.errors import ExportError
from autocomp.graph.analyse import analyse

torch.set_num_threads(1)


def test_layers_of_a_residual_net():
    graph = analyse(nets.make(), (nets.images(1),))
    assert list(graph.layers) == [
        "stem",
        "block1.conv1",
        "block1.conv2",
        "block2.conv1",
        "block2.conv2",
        "block2.shortcut.0",
        "head",
    ]
    strided = graph.layers["block2.conv1"]
    assert (strided.kind, strided.in_channels, strided.out_channels) == ("conv2d", 16, 32)
    assert (strided.stride, strided.padding, strided.in_size, strided.out_size) == ((2, 2), (1, 1), (12, 12), (6, 6))
    assert strided.macs == 32 * 16 * 9 * 36
    assert strided.norm == "block2.bn1"
    assert graph.layers["head"].norm is None
    assert graph.norms()["stem"] == "bn"


def test_residual_additions_tie_channels():
    graph = analyse(nets.make(), (nets.images(1),))
    tied = graph.groups["stem"]
    assert tied.producers == ("stem", "block1.conv2")
    assert set(tied.consumers) == {"block1.conv1", "block2.conv1", "block2.shortcut.0"}
    assert set(tied.norms) == {"bn", "block1.bn2"}
    assert tied.prunable
    assert graph.groups["block2.conv2"].producers == ("block2.conv2", "block2.shortcut.0")
    assert graph.groups["block2.conv2"].consumers == ("head",)
    assert not graph.groups["head"].prunable
    assert "output" in graph.groups["head"].reason
    assert graph.layers["stem"].in_group is None
    assert graph.layers["block1.conv2"].in_group == "block1.conv1"
    assert graph.layers["block1.conv2"].out_group == "stem"


def test_depthwise_passes_its_group_on():
    graph = analyse(nets.make(depthwise=True), (nets.images(1),))
    layer = graph.layers["block2.conv1"]
    assert layer.kind == "depthwise"
    assert layer.in_group == layer.out_group == "stem"
    assert "block2.conv1" in graph.groups["stem"].producers
    assert "block2.conv2" in graph.groups["stem"].consumers
    assert graph.groups["stem"].prunable


def test_flatten_spreads_channels():
    graph = analyse(nets.Flat(), (nets.images(1),))
    assert graph.groups["conv"].columns["hidden"] == tuple(channel for channel in range(8) for _ in range(16))
    assert graph.groups["conv"].prunable
    assert graph.groups["hidden"].consumers == ("head",)


def test_a_layer_used_twice_is_one_layer_called_twice():
    graph = analyse(nets.Twice(), (nets.images(1),))
    assert graph.layers["shared"].calls == 2
    assert sum(layer.calls for layer in graph.layers.values()) == len(graph.layers) + 1


class Pyramid(nn.Module):
    """One head on maps of three sizes, as detectors have it, and one transposed convolution on two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1)
        self.up, self.out = nn.ConvTranspose2d(16, 16, 2, stride=2), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        fine = torch.relu(self.stem(x))
        coarse = [nn.functional.max_pool2d(fine, size) for size in (2, 4)]
        maps = [fine, *coarse, *(self.up(x) for x in coarse)]
        return (*(self.head(each) for each in maps), *(self.out(each.mean(3).transpose(1, 2)) for each in maps[:3]))


def test_multiplications_are_those_of_every_call_at_its_own_size() -> None:
    model, x = Pyramid().eval(), torch.randn(1, 3, 16, 16)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    layers = analyse(model, (x,)).layers
    assert {name: layer.calls for name, layer in layers.items()} == {"stem": 1, "up": 2, "head": 5, "out": 3}
    assert 2 * sum(layer.total_macs for layer in layers.values()) == counter.get_total_flops()


def test_concatenated_layers_are_one_group_of_two_segments():
    graph = analyse(nets.Concatenated(), (nets.images(1),))
    group = graph.groups["left"]
    assert group.prunable
    assert group.producers == ("left", "right")
    assert group.sizes() == (8, 16)
    assert group.columns["join"] == tuple(range(24))
    assert group.rows["right"] == tuple(range(8, 24))
    assert graph.groups["join"].prunable


def test_tied_modules_and_other_members():
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.norm = nn.LayerNorm(8)
            self.again = nn.Linear(8, 8)
            self.again.weight = self.first.weight
            self.free = nn.Linear(8, 12)
            self.last = nn.Linear(12, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(torch.relu(self.free(self.again(self.norm(self.first(x))))))

    graph = analyse(Mixed(), (torch.rand(2, 8),))
    assert set(graph.layers) == {"free", "last"}
    assert graph.groups["free"].prunable


def test_a_group_that_breaks_the_model_is_found_out():
    """A shuffle mixes channels in a way the dependency graph may not follow: removal is put to the test."""

    class Shuffle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.last = nn.Conv2d(1, 8, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            y = y.view(1, 2, 4, 12, 12).transpose(1, 2).reshape(1, 8, 12, 12)
            return self.last(y)

    graph = analyse(Shuffle(), (nets.images(1),))
    assert not graph.groups["conv"].prunable
    assert graph.groups["conv"].reason


def test_a_layer_that_reads_and_feeds_its_own_group():
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv, self.head = nn.Conv2d(1, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.relu(self.stem(x))
            return self.head(torch.relu(y + self.conv(y)).mean((2, 3)))

    graph = analyse(Single(), (nets.images(1),))
    assert graph.groups["stem"].prunable
    assert graph.groups["stem"].consumers == ("conv", "head")
    assert graph.layers["conv"].in_group == graph.layers["conv"].out_group == "stem"


def test_a_returned_feature_map_keeps_its_channels():
    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.last = nn.Conv2d(1, 8, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = torch.relu(self.conv(x))
            return y, self.last(y)

    assert not analyse(Features(), (nets.images(1),)).groups["conv"].prunable


def test_data_dependent_control_flow_is_refused_with_its_line(capfd):
    with pytest.raises(ExportError, match=r"nets.py:\d+ in forward, `if x.sum\(\) > 0:`"):
        analyse(nets.Branching(), (torch.rand(1, 4),))
    assert capfd.readouterr().err == ""


def test_an_operation_torch_cannot_trace_is_named():
    class Numpy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(x.numpy())

    with pytest.raises(ExportError, match="numpy"):
        analyse(Numpy(), (torch.rand(1, 4),))


def test_the_model_is_left_untouched():
    model = nets.make().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    analyse(model, (nets.images(1),))
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(not hook for hook in (model._forward_hooks, model.stem._forward_hooks))
