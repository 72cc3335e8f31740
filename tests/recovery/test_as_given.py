"""What training a model of one's own starts from, and what it says of it."""

from __future__ import annotations

import tiny_task
import torch
from torch import nn

import autocomp
from autocomp.recovery.one import unkept

torch.set_num_threads(1)


class Dropped(nn.Module):
    """The tiny net with a dropout behind it: in training mode its answers are others."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.drop = tiny_task.model(), nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.net(x))


def test_a_model_in_training_mode_is_judged_and_handed_back_in_evaluation_mode() -> None:
    task = tiny_task.task()
    given = Dropped()
    expected = task.evaluate(Dropped().eval())
    done = autocomp.recover(given.train(), task, length="20steps")
    assert done.before == {name: float(value) for name, value in expected.items()}
    assert not any(module.training for module in done.model.modules())
    assert all(module.training for module in given.modules()), "the caller's own stays as it was"


def test_what_training_does_not_keep_is_said() -> None:
    fixed = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    fixed[0].requires_grad_(False)
    assert unkept(fixed, fixed) == [
        "2 of 4 parameters were fixed (requires_grad=False) in the model given; they are trained like all others"
    ]
    pruned, trained = nn.Linear(16, 16), nn.Linear(16, 16)
    with torch.no_grad():
        pruned.weight[:12] = 0.0
        trained.weight.fill_(1.0)
    assert unkept(pruned, trained) == [
        "192 weights were 0 in the model given, 0 are: zeros are kept by recipes with masks alone"
    ]
    assert unkept(trained, trained) == []
