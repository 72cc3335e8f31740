"""Related models → one that holds much of their weights once, trained to answer as they do."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autocomp.compress.batchnorm import reestimate_batchnorm, settled
from autocomp.database.calibrate import collect
from autocomp.errors import UsageError
from autocomp.fusion.align import aligned
from autocomp.fusion.joint import Together, joint
from autocomp.fusion.shared import OWN, Way, choose, replaced, ways
from autocomp.graph.analyse import analyse
from autocomp.graph.fold import dense_bytes
from autocomp.graph.graph import Graph, Layer
from autocomp.graph.program import tensor_at
from autocomp.progress import Progress
from autocomp.recovery.one import Recovered, recovered
from autocomp.recovery.recipe import Recipe
from autocomp.recovery.schedules import Span
from autocomp.tasks.reading import Metrics
from autocomp.tasks.task import Task, evaluate_task

FLOAT = 4  # bytes of a number
NEAR = 1.005  # of the room that was asked for: layers are shared whole


@dataclass(frozen=True)
class Fused:
    """Related models in one, and what came of it.

    ``task`` is that of all models at once, its model the fused one: compress it with ``autocomp.search(task=fused.task)``. ``ways`` says of each
    layer how it is shared. ``metrics`` are of the joint task, by what they were read from: ``apart`` (the models as given), ``averaged`` (all
    weights averaged, after the channels were put in one order), ``shared`` (before training), ``fused``; ``bytes`` by the same names.
    ``training`` is how it was trained, None where it was not.
    """

    task: Task
    ways: Mapping[str, str]
    metrics: Mapping[str, Metrics]
    bytes: Mapping[str, int]
    training: Recovered | None = None
    notes: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    same_inputs: bool = False


def fuse(
    tasks: Sequence[Task],
    smaller: float,
    recipe: Recipe,
    span: Span | None,
    progress: Progress,
    same_inputs: bool = False,
    samples: int = 256,
) -> Fused:
    """Fuse the models of two or more tasks. UsageError where they are not of one architecture, or not judged alike.

    With ``same_inputs`` all answer about the same ones. Their weights together become ``smaller`` so many times, as far as layers that are alike
    allow; ``span`` is how long is trained (None: not).
    """
    names = _names(tasks)
    whole = joint(tasks, names, same_inputs=same_inputs)
    with progress.stage("reading the models", len(tasks)) as stage:
        graphs = []
        for task in tasks:
            graphs.append(analyse(task.model, task.example_inputs))
            stage.advance()
    alike = _alike(graphs, [task.model for task in tasks], names)
    models = _in_one_order(tasks, graphs[0])
    metrics, sizes = {"apart": evaluate_task(whole, whole.model)}, {"apart": dense_bytes(whole.model)}

    def read(which: str, those: Sequence[nn.Module]) -> nn.Module:
        for model, task in zip(those, tasks, strict=True):
            reestimate_batchnorm(model, task.calibration, task.batch_axes)
        together = Together(those, None if same_inputs else [len(task.example_inputs) for task in tasks]).eval()
        metrics[which] = evaluate_task(whole, together, names=metrics["apart"])
        return together

    read("averaged", _averaged(models))
    chosen = _chosen(tasks, graphs, models, alike, sizes["apart"] / smaller, samples, progress)
    model = read("shared", [_with_ways(model, chosen, index) for index, model in enumerate(models)])
    training = None
    if span is not None:
        with progress.stage("training"):
            training = recovered(model, whole, recipe, span)
        model = training.model
    fused = joint(tasks, names, model, same_inputs)
    metrics["fused"], sizes["fused"] = (
        evaluate_task(fused, fused.model, names=metrics["apart"]),
        dense_bytes(fused.model),
    )
    notes = list(training.notes) if training else []
    if training is not None and not training.better:
        notes.append("training made the fused model no better on validation: it is as it was shared")
    if sizes["fused"] > sizes["apart"] / smaller * NEAR:
        notes.append(
            f"{sizes['apart'] / sizes['fused']:.2f}x smaller in all, not {smaller:g}x: what layers can share is not more"
        )
    ways_taken = {name: way.name for name, way in chosen.items()}
    return Fused(fused, ways_taken, metrics, sizes, training, tuple(notes), tuple(names), same_inputs)


def _in_one_order(tasks: Sequence[Task], graph: Graph) -> list[nn.Module]:
    """The models with their channels in the order of the first one's."""
    first = tasks[0].model
    found = [first, *(aligned(task.model, first, graph, task.example_inputs) for task in tasks[1:])]
    return [settled(model, task.calibration, task.batch_axes) for model, task in zip(found, tasks, strict=True)]


def _chosen(
    tasks: Sequence[Task],
    graphs: Sequence[Graph],
    models: Sequence[nn.Module],
    alike: Sequence[str],
    most: float,
    samples: int,
    progress: Progress,
) -> dict[str, Way]:
    """For each layer that is alike the way it is shared, such that all models take so many bytes at most."""
    seen = []
    with progress.stage("calibrating", len(tasks)) as stage:
        for task, model, graph in zip(tasks, models, graphs, strict=True):
            seen.append(collect(_with_model(task, model), graph, samples))
            stage.advance()
    found: dict[str, list[Way]] = {}
    with progress.stage("ways to share a layer", len(alike)) as stage:
        for name in alike:
            found[name] = ways(name, graphs[0], models, seen)
            stage.advance()
    own = sum(each[0].weights for each in found.values())
    rest = sum(dense_bytes(task.model) for task in tasks) // FLOAT - own  # numbers that stay with each model
    return choose(found, max(0, int(most / FLOAT) - rest))


def _with_ways(model: nn.Module, chosen: Mapping[str, Way], index: int) -> nn.Module:
    return replaced(model, {name: way.modules[index] for name, way in chosen.items() if way.name != OWN})


def _names(tasks: Sequence[Task]) -> list[str]:
    """The tasks' names, numbered where they are the same."""
    if len(tasks) < 2:
        raise UsageError(f"two tasks at least are fused, got {len(tasks)}")
    given, found = [task.name for task in tasks], []
    for name in given:
        numbered = (f"{name}{number}" for number in itertools.count(1))
        found.append(name if given.count(name) == 1 else next(n for n in numbered if n not in given and n not in found))
    return found


def _alike(graphs: Sequence[Graph], models: Sequence[nn.Module], names: Sequence[str]) -> list[str]:
    """The layers that all models have in the same shape. UsageError where they are not of one architecture."""
    first = graphs[0]
    for graph, name in zip(graphs[1:], names[1:], strict=True):
        if list(graph.layers) != list(first.layers):
            other = sorted({*graph.layers} ^ {*first.layers})
            raise UsageError(
                f"models of one architecture are fused: {name} and {names[0]} have other layers{', such as ' + other[0] if other else ''}"
            )
    found = []
    for name in first.layers:
        shapes = {tensor_at(model, f"{name}.weight").shape for model in models}
        kinds = {
            _reads(graph.layers[name], model.get_submodule(name)) for graph, model in zip(graphs, models, strict=True)
        }
        if len(shapes) == 1 and len(kinds) == 1:
            found.append(name)
    found += _tables(models)
    if not found:
        raise UsageError(
            f"models of one architecture are fused: no layer of {', '.join(names)} has the same shape in all"
        )
    return found


def _reads(layer: Layer, module: nn.Module) -> tuple[Any, ...]:
    """How a layer reads its input, whatever its weights are."""
    sizes = (layer.kernel, layer.stride, layer.padding, layer.dilation, layer.conv_groups, layer.output_padding)
    return (layer.kind, *sizes, getattr(module, "padding_mode", ""))


def _tables(models: Sequence[nn.Module]) -> list[str]:
    """The embeddings that all models have in the same shape, each for itself: one that is a head's weight too stays so."""
    found: list[set[str]] = []
    for model in models:
        tensors = Counter(id(tensor) for _, tensor in model.named_parameters(remove_duplicate=False))
        found.append(
            {
                f"{name} {tuple(module.weight.shape)}"
                for name, module in model.named_modules()
                if isinstance(module, nn.Embedding) and tensors[id(module.weight)] == 1 and module.max_norm is None
            }
        )
    return sorted(text.partition(" ")[0] for text in set.intersection(*found))


def _averaged(models: Sequence[nn.Module]) -> list[nn.Module]:
    """The models with the mean of all that they have in the same shape: what sharing everything costs without any more."""
    found = [copy.deepcopy(model) for model in models]
    states = [model.state_dict() for model in found]
    with torch.no_grad():
        for name, tensor in states[0].items():
            others = [state[name] for state in states if name in state and state[name].shape == tensor.shape]
            if len(others) == len(states) and tensor.is_floating_point():
                mean = torch.stack(others).mean(0)
                for other in others:
                    other.copy_(mean)
    return found


def _with_model(task: Task, model: nn.Module) -> Task:
    found = copy.copy(task)
    found.model = model
    return found
