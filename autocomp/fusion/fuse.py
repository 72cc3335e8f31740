"""Related models → one that holds much of their weights once, trained to answer as they do."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from autocomp.compress.batchnorm import reestimate_batchnorm, settled
from autocomp.database.calibrate import collect
from autocomp.errors import UsageError
from autocomp.fusion.align import aligned
from autocomp.fusion.joint import Together, joint, refuse_unlike
from autocomp.fusion.shared import OWN, Way, choose, replaced, ways
from autocomp.graph.analyse import analyse
from autocomp.graph.fold import dense_bytes
from autocomp.graph.graph import Graph
from autocomp.graph.program import tensor_at
from autocomp.progress import Progress
from autocomp.recovery.one import Recovered, recovered
from autocomp.recovery.recipe import Recipe
from autocomp.recovery.schedules import Span
from autocomp.tasks.reading import Metrics
from autocomp.tasks.task import Task, evaluate_task

SMALLER = 1.6  # times, in all: half is shared and a fourth of each is its own


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
    refuse_unlike(tasks, names)
    with progress.stage("reading the models", len(tasks)) as stage:
        graphs = [analyse(task.model, task.example_inputs) for task in tasks]
        alike = _alike(graphs, [task.model for task in tasks], names)
        first = tasks[0].model
        models: list[nn.Module] = []
        for task in tasks:
            same = aligned(task.model, first, graphs[0], task.example_inputs) if models else first
            models.append(settled(same, task.calibration, task.batch_axes))
            stage.advance()
    whole = joint(tasks, names, same_inputs=same_inputs)
    given, inputs = whole.model, None if same_inputs else [len(task.example_inputs) for task in tasks]
    metrics, sizes = {"apart": evaluate_task(whole, given)}, {"apart": dense_bytes(given)}
    averaged = _together(_averaged(models), tasks, inputs)
    metrics["averaged"] = evaluate_task(whole, averaged, names=metrics["apart"])
    seen = []
    with progress.stage("calibrating", len(tasks)) as stage:
        for task, model, graph in zip(tasks, models, graphs, strict=True):
            seen.append(collect(_with_model(task, model), graph, samples))
            stage.advance()
    with progress.stage("ways to share a layer", len(alike)) as stage:
        found: dict[str, list[Way]] = {}
        for name in alike:
            found[name] = ways(name, graphs[0], models, seen)
            stage.advance()
    rest = sizes["apart"] // 4 - sum(each[0].weights for each in found.values())  # numbers that stay with each model
    chosen = choose(found, max(0, int(sizes["apart"] / 4 / smaller) - rest))
    sharing = [
        replaced(model, {name: way.modules[index] for name, way in chosen.items() if way.name != OWN})
        for index, model in enumerate(models)
    ]
    joined = _together(sharing, tasks, inputs)
    metrics["shared"] = evaluate_task(whole, joined, names=metrics["apart"])
    training = None
    if span is not None:
        with progress.stage("training"):
            training = recovered(joined, whole, recipe, span)
        joined = training.model
    fused = joint(tasks, names, joined, same_inputs)
    metrics["fused"] = evaluate_task(fused, fused.model, names=metrics["apart"])
    sizes["fused"] = dense_bytes(fused.model)
    notes = [*(training.notes if training else ())]
    if sizes["fused"] > sizes["apart"] / smaller * 1.005:
        notes.append(
            f"{sizes['apart'] / sizes['fused']:.2f}x smaller in all, not {smaller:g}x: what layers can share is not more"
        )
    return Fused(
        fused,
        {name: way.name for name, way in chosen.items()},
        metrics,
        sizes,
        training,
        tuple(notes),
        tuple(names),
        same_inputs,
    )


def _names(tasks: Sequence[Task]) -> list[str]:
    """The tasks' names, numbered where they are the same."""
    if len(tasks) < 2:
        raise UsageError(f"two tasks at least are fused, got {len(tasks)}")
    given = [task.name for task in tasks]
    return [f"{name}{given[: k + 1].count(name)}" if given.count(name) > 1 else name for k, name in enumerate(given)]


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
            (graph.layers[name].kind, graph.layers[name].stride, graph.layers[name].conv_groups) for graph in graphs
        }
        if len(shapes) == 1 and len(kinds) == 1:
            found.append(name)
    found += _tables(models)
    if not found:
        raise UsageError(
            f"models of one architecture are fused: no layer of {', '.join(names)} has the same shape in all"
        )
    return found


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


def _together(models: Sequence[nn.Module], tasks: Sequence[Task], inputs: Sequence[int] | None) -> nn.Module:
    """The models in one, the statistics of their norms taken anew."""
    for model, task in zip(models, tasks, strict=True):
        reestimate_batchnorm(model, task.calibration, task.batch_axes)
    return Together(models, inputs).eval()


def _with_model(task: Task, model: nn.Module) -> Task:
    found = copy.copy(task)
    found.model = model
    return found
