"""What a training step keeps in memory is looked at beforehand, and batches go through in parts where it is much."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from autocomp.graph.canonical import canonical
from autocomp.recovery import memory
from autocomp.recovery.lessons import Teaching
from autocomp.recovery.memory import kept_bytes, parts_of
from autocomp.recovery.recipe import load_recipe
from autocomp.recovery.schedules import Span
from autocomp.recovery.train import Trained, train
from autocomp.tasks.task import Task

torch.set_num_threads(1)


class Net(nn.Module):
    def __init__(self, norm: bool = False, drop: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(8, 32), nn.Linear(32, 4)
        self.norm = nn.BatchNorm1d(32) if norm else nn.Identity()
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.drop(self.norm(self.first(x)).relu()))
        return out


def task(norm: bool = False) -> Task:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    model = canonical(Net(norm).eval(), (x[:1],))
    return Task(
        model, (x[:1],), [(x,)], lambda _: {"accuracy": 0.5}, train=[((x,), torch.arange(64) % 4)], loss=functional.cross_entropy
    )  # fmt: skip


def test_what_is_kept_is_counted_and_nothing_is_changed() -> None:
    net = Net(norm=True, drop=0.5).train()
    x = torch.randn(2, 8)
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    chance = torch.get_rng_state()
    few = kept_bytes(net, lambda: net(x).square().mean())
    assert kept_bytes(net, lambda: net(x.repeat(8, 1)).square().mean()) > 4 * few
    assert few >= x.nbytes + 2 * 32 * 4  # the input of each layer at least
    assert torch.equal(torch.get_rng_state(), chance)
    assert all(torch.equal(buffer, before[name]) for name, buffer in net.named_buffers())


def test_parts_grow_until_a_step_is_small_and_norms_see_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    net, normed = Net().train(), Net(norm=True).train()
    x = torch.randn(2, 8)
    each = kept_bytes(net, lambda: net(x).mean()) / 2
    monkeypatch.setattr(memory, "KEPT", int(each * 64 / 8))
    assert parts_of(net, 64, lambda: net(x).mean()) == 8
    assert parts_of(normed, 64, lambda: normed(x).mean()) == 4  # 16 samples at once
    assert parts_of(net, 4, lambda: net(x).mean()) == 1


def test_in_parts_a_model_learns_the_same_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    given = task()
    teaching = Teaching.of(given, 64)

    def trained() -> Trained:
        torch.manual_seed(0)
        return train(given.model, teaching, load_recipe("default"), Span(steps=6), 1e-3)

    whole = trained()
    assert not whole.notes
    monkeypatch.setattr(memory, "KEPT", 2000)
    parts = trained()
    assert any("parts, to take less memory" in note for note in parts.notes)
    for name, tensor in whole.weights.items():
        torch.testing.assert_close(parts.weights[name], tensor, rtol=1e-4, atol=1e-5)
