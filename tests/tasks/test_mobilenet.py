"""The built-in task ``digits-mobile``: its network, and what of it can be pruned."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from autocomp.graph.analyse import analyse
from autocomp.tasks import digits, mobilenet
from autocomp.tasks.task import evaluate_task, load_task

torch.set_num_threads(1)


def test_hidden_channels_of_every_block_can_be_pruned() -> None:
    torch.manual_seed(0)
    model = mobilenet.new_model().eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == 159_338
    graph = analyse(model, (torch.rand(1, 1, 16, 16),))
    depthwise = [layer for layer in graph.layers.values() if layer.kind == "depthwise"]
    assert len(depthwise) == 6
    for layer in depthwise:  # widened by the 1x1 before, read by the 1x1 behind
        group = graph.groups[layer.out_group]
        assert group.prunable
        assert group.width == 4 * graph.layers[group.producers[0]].in_channels
    assert all(group.prunable for name, group in graph.groups.items() if name != "classifier")


def test_the_task_is_digits_by_another_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOCOMP_CACHE", str(tmp_path))
    seen = {}

    def untrained(new_model, recipe, train, cache, progress):
        seen["recipe"] = recipe
        return new_model().eval()

    monkeypatch.setattr(digits, "trained", untrained)
    task = load_task("digits-mobile")
    assert (task.name, seen["recipe"].task) == ("digits-mobile", "digits-mobile")
    assert "MobileNetV2" in task.description
    assert sum(isinstance(m, nn.Conv2d) and m.groups > 1 for m in task.model.modules()) > 3  # depthwise
    assert list(evaluate_task(task, task.model))[:2] == ["accuracy", "accuracy/clean"]


@pytest.mark.slow  # the whole training
def test_full_recipe_reaches_its_accuracy() -> None:
    task = mobilenet.load_digits_mobile_task(cache=False)
    assert evaluate_task(task, task.model)["accuracy/clean"] >= 0.98
