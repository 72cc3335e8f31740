"""What is asked of a model of the corpus, stage by stage; each returns what goes into the table, or raises.

Nothing here trusts autocomp's own checks: outputs are compared on inputs that it has not seen.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from corpus.entry import Entry
from corpus.weights import build, spread_between, tensors

PROFILE = "x86-host"
SEEDS = (501, 502, 503)  # of the inputs that outputs are compared on; autocomp sees others
TOLERANCE = 1e-3  # of an output's range
CALIBRATION, HELD_OUT = 32, 32  # samples
NUDGES = 4  # a value at the edge of a step is moved over it by some of them


@dataclass(frozen=True)
class Budget:
    """``tiles`` tried for a kernel, ``trials`` and ``measurements`` of the search, ``minutes`` it may search."""

    tiles: int = 2
    trials: int = 24
    measurements: int = 3
    minutes: float = 1.0


def built(entry: Entry, _budget: Budget, _folder: Path) -> dict[str, Any]:
    """The model itself: is it one whose outputs say something?"""
    from corpus.count import count

    model = build(entry)
    spread = spread_between(model, entry)
    outputs = tensors(_run(model, entry.inputs(1)))
    return {
        **asdict(count(model, entry.inputs(0))),
        "outputs": [list(output.shape) for output in outputs],
        "spread": spread,
    }


def analysed(entry: Entry, _budget: Budget, _folder: Path) -> dict[str, Any]:
    """What `autocomp check` says: layers, groups, and how many multiplications are in those that can be pruned or quantised."""
    from autocomp.graph.analyse import analyse
    from autocomp.hardware.profile import load_profile
    from autocomp.run.checked import refuse_unsupported
    from autocomp.space.build import build_space
    from autocomp.space.file import load_space

    task, profile = make_task(entry), load_profile(PROFILE)
    graph = analyse(task.model, task.example_inputs)
    refuse_unsupported(task, profile)
    space = build_space(graph, load_space("default"), [profile])
    narrowed = {name for name, widths in space.widths.items() if len(widths) > 1}
    prunable = {n: x for n, x in graph.layers.items() if {x.in_group, x.out_group} & narrowed}
    quantised = {n for n, methods in space.methods.items() if any("8" in method.precision for method in methods)}
    return {
        "layers": len(graph.layers),
        "skipped": dict(graph.skipped),
        "groups": len(graph.groups),
        "narrowed": len(narrowed),
        "macs": sum(layer.total_macs for layer in graph.layers.values()),
        "prunable": sum(layer.total_macs for layer in prunable.values()),
        "quantisable": sum(graph.layers[name].total_macs for name in quantised),
        "frozen": {name: getattr(group, "reason", "") for name, group in graph.groups.items() if name not in narrowed},
    }


def compiled(entry: Entry, budget: Budget, _folder: Path) -> dict[str, Any]:
    """`autocomp.compile`, and whether what it returns equals torch on other inputs, twice in a row, and leaves the model alone."""
    import autocomp

    _tiles(budget)
    model = build(entry)
    reference = copy.deepcopy(model)
    example = entry.inputs(0)
    kept = [tensor.clone() for tensor in example]
    result: Any = autocomp.compile(model, example, PROFILE)
    if not all(torch.equal(a, b) for a, b in zip(example, kept, strict=True)):
        return {"equal": False, "why": "compiling changed the example inputs"}
    verdict = agrees(reference, result.run, [entry.inputs(seed) for seed in (*SEEDS, SEEDS[0])])
    return {**verdict, "kernels": len(result.kernels)}


def written(entry: Entry, budget: Budget, folder: Path) -> dict[str, Any]:
    """What `timed` times: our library, with the kernels tuned by `compiled`, and the ONNX file that torch itself exports."""
    import autocomp

    _tiles(budget)
    model, example = build(entry), entry.inputs(0)
    result: Any = autocomp.compile(copy.deepcopy(model), example, PROFILE)
    result.save(folder / "model.so")
    slow = sorted(result.kernels, key=lambda kernel: -kernel.seconds)[:3]
    found: dict[str, Any] = {"slowest": {kernel.name: 1e6 * kernel.seconds for kernel in slow}}
    try:
        torch.onnx.export(model, example, folder / "model.onnx", dynamo=True, verbose=False, external_data=False)
    except Exception as error:  # torch's exporter has limits of its own, which are not what is asked here
        (folder / "model.onnx").unlink(missing_ok=True)
        found["no_file"] = f"{type(error).__name__}: {error}"[:300]
    return found


def timed(entry: Entry, _budget: Budget, folder: Path) -> dict[str, Any]:
    """Our time over ONNX Runtime's, in turns, one thread each; ``ratio`` is None where torch exports no file that it takes.

    Nothing else may run meanwhile.
    """
    import numpy as np

    from autocomp.compiler.build import CompiledModel
    from autocomp.export.onnx import onnx_session
    from autocomp.hardware.profile import load_profile
    from autocomp.hardware.timing import interleaved, median_and_spread, quiet_core

    if not (folder / "model.onnx").exists():
        return {"ratio": None, "no_ratio": "torch exports no ONNX file of it"}
    example = entry.inputs(0)
    ours = CompiledModel.load(folder / "model.so", load_profile(PROFILE))
    try:
        session = onnx_session(folder / "model.onnx", exact=True)
        binding = session.io_binding()
        for value, tensor in zip(session.get_inputs(), example, strict=True):
            binding.bind_cpu_input(value.name, np.ascontiguousarray(tensor.numpy()))
        for value in session.get_outputs():
            binding.bind_output(value.name)
        session.run_with_iobinding(binding)
    except Exception as error:
        return {"ratio": None, "no_ratio": f"{type(error).__name__}: {error}"[:300]}
    with quiet_core():
        calls = {"ours": ours.prepare(*example), "theirs": lambda: session.run_with_iobinding(binding)}
        samples = interleaved(calls, repeats=15)
    for name in ("model.so", "model.onnx"):
        (folder / name).unlink()
    ratio, spread = median_and_spread(list(np.array(samples["ours"]) / np.array(samples["theirs"])))
    milliseconds = {side: 1e3 * float(np.median(values)) for side, values in samples.items()}
    return {"ratio": ratio, "spread": spread, "milliseconds": milliseconds}


def searched(entry: Entry, budget: Budget, folder: Path) -> dict[str, Any]:
    """A search of a minute with its report; the run folder stays for `reloaded`."""
    import autocomp

    _tiles(budget)
    result = autocomp.search(
        task=make_task(entry), profiles=[PROFILE], out=folder / "run", trials=budget.trials, measurements=budget.measurements,
        minutes=budget.minutes, calibration_samples=CALIBRATION, references=False,
    )  # fmt: skip
    summary, dense = result.run.summary, result.dense
    best = result.front[0]
    return {
        "points": len(result.front),
        "told": summary.told,
        "measured": summary.measured,
        "failed": summary.failed,
        "stages": {name: round(seconds, 1) for name, seconds in summary.seconds.items()},
        "fastest": dense.latency[PROFILE].seconds / best.latency[PROFILE].seconds,
        "agreement": dict(best.metrics),
        "warnings": list(result.run.warnings),
        "report": result.report.exists(),
    }


def reloaded(_entry: Entry, _budget: Budget, folder: Path) -> dict[str, Any]:
    """Every point of the front read back from its files: the torch model, its ONNX file and its library agree, or say that they do not."""
    from autocomp.api import SearchResult
    from autocomp.compiler.build import CompiledModel
    from autocomp.export.onnx import onnx_session, run_session
    from autocomp.hardware.profile import load_profile

    result, points = SearchResult(folder / "run"), {}
    batches = [_entry.inputs(seed) for seed in SEEDS]
    for point in result.front:
        model = point.load()
        files = point.record.files
        runs: dict[str, Callable[..., Any]] = {}
        if "so" in files:
            runs["so"] = CompiledModel.load(result.folder / files["so"], load_profile(PROFILE)).run
        if "onnx" in files:
            session = onnx_session(result.folder / files["onnx"], exact=True)
            runs["onnx"] = lambda *inputs, s=session: run_session(s, *inputs)
        found: dict[str, Any] = {}
        for kind in ("so", "onnx"):
            claimed = point.record.verified.get(kind)
            verdict = (
                agrees(model, runs[kind], batches, rounds=True) if kind in runs else {"equal": False, "why": "no file"}
            )
            said = bool(claimed and claimed.ok)
            note = "" if claimed is None else claimed.note
            found[kind] = {**verdict, "claimed": said, "note": note}
        points[point.candidate.id] = found
    return {
        "points": points,
        "ok": sum(all(found[kind]["equal"] and found[kind]["claimed"] for kind in found) for found in points.values()),
        "silently_wrong": sum(
            any(found[kind]["claimed"] and not found[kind]["equal"] for kind in found) for found in points.values()
        ),
    }


STAGES: Mapping[str, Callable[[Entry, Budget, Path], dict[str, Any]]] = {
    "build": built,
    "analyse": analysed,
    "compile": compiled,
    "files": written,
    "time": timed,
    "search": searched,
    "reload": reloaded,
}


def make_task(entry: Entry) -> Any:
    """A task on random data: the share of held-out samples on which a model decides as the dense one does."""
    import autocomp

    model = build(entry)
    held_out = [entry.inputs(2000 + index, 8) for index in range(HELD_OUT // 8)]
    dense = _decisions(model, held_out)

    def agreement(candidate: nn.Module) -> dict[str, float]:
        return {"agreement": float((_decisions(candidate, held_out, dense[1])[0] == dense[0]).float().mean())}

    return autocomp.Task(
        model=model,
        example_inputs=entry.inputs(0),
        calibration=[entry.inputs(3000 + index, 8) for index in range(CALIBRATION // 8)],
        evaluate=agreement,
        name=entry.name.replace("/", "-"),
    )


def _decisions(
    model: nn.Module, batches: Sequence[tuple[Tensor, ...]], centre: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What the first output decides: the place of the largest value along its channels, each taken from its mean over the samples.

    Random weights prefer one class whatever the input is; against the mean, the input decides.
    """
    first = torch.cat([next(t for t in tensors(_run(model, batch)) if t.is_floating_point()) for batch in batches])
    centre = first.mean(0) if centre is None else centre
    axis = 1 if first.dim() >= 4 else -1
    return (first - centre).argmax(axis), centre


def agrees(
    model: nn.Module, run: Callable[..., Any], batches: Sequence[tuple[Tensor, ...]], rounds: bool = False
) -> dict[str, Any]:
    """Whether ``run`` computes what torch does: ``equal``, ``error`` (largest, of the output's range), ``why`` not.

    Twice what torch's own output moves when its inputs change by a millionth, up or down at random, is allowed, and 1e-3. With ``rounds``, for
    models that round to integers, a mean error of 5 % of the spread of the output: a value near a step may fall to either side.
    """
    worst, mean, moved, integers = 0.0, 0.0, 0.0, 0
    for batch in batches:
        expected = tensors(_run(model, batch))
        nudges = [tensors(_run(model, tuple(_nudged(t, seed) for t in batch))) for seed in range(NUDGES)]
        with torch.no_grad():
            values = tensors(run(*(tensor.clone() for tensor in batch)))
        if [tuple(v.shape) for v in values] != [tuple(e.shape) for e in expected]:
            return {
                "equal": False,
                "why": f"outputs {[tuple(v.shape) for v in values]}, not {[tuple(e.shape) for e in expected]}",
            }
        for value, reference, *others in zip(values, expected, *nudges, strict=True):
            if not reference.is_floating_point():
                integers += int((value != reference).sum())
                continue
            if not bool(torch.isfinite(value).all()):
                return {"equal": False, "error": None, "why": "outputs are not finite"}
            scale = float(reference.abs().max()) or 1.0
            worst = max(worst, float((value - reference).abs().max()) / scale)
            moved = max(moved, *(float((other - reference).abs().max()) / scale for other in others))
            spread = float(reference.std()) if reference.numel() > 1 else scale
            mean = max(mean, float((value - reference).abs().mean()) / (spread or 1.0))
    allowed = max(TOLERANCE, 2 * moved)
    equal = not integers and (worst <= allowed or (rounds and mean <= max(0.05, 2 * moved)))
    why = (
        ""
        if equal
        else f"differs by {worst:.1e} (mean {mean:.1e}, torch itself moves by {moved:.1e}, {integers} integers)"
    )
    return {"equal": equal, "error": worst, "mean_error": mean, "moved": moved, "why": why}


def _nudged(tensor: Tensor, seed: int) -> Tensor:
    """The tensor with each value a millionth larger or smaller."""
    if not tensor.is_floating_point():
        return tensor
    signs = torch.randint(0, 2, tensor.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return tensor * (1 + 1e-6 * signs)


def _run(model: nn.Module, batch: tuple[Tensor, ...]) -> Any:
    with torch.no_grad():
        return model(*(tensor.clone() for tensor in batch))


def _tiles(budget: Budget) -> None:
    """Try so many tiles for a kernel: this process is the stage's own."""
    from autocomp.tuning.tune import Tuner

    defaults = Tuner.__init__.__kwdefaults__
    assert "budget" in defaults
    defaults["budget"] = budget.tiles
