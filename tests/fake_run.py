"""A made-up run folder that looks like a real one: a residual digits CNN searched for 300 trials, 24 of them measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from problems import random_problem

from autocomp.front.pareto import hypervolume_history, pareto_set, spaced
from autocomp.records.candidate import Candidate
from autocomp.records.evaluation import Evaluation, Reference, Sensitivity, Source
from autocomp.records.expected import Expected, ExpectedPoint
from autocomp.records.latency import KernelTime, Latency
from autocomp.records.run import Decider, FrontPoint, Kept, LayerInfo, Run, Summary, TaskInfo, Verified, write_front
from autocomp.records.table import write_evaluations
from autocomp.study.solver import solve_front

PROFILE = "x86-host"
PROBLEM = random_problem(4, layers=14)
DENSE = PROBLEM.decode(np.zeros(len(PROBLEM.sizes), dtype=int))
SCALE = 0.42e-3 / PROBLEM.cost(DENSE).seconds


def latency(rng: np.random.Generator, candidate: Candidate, profile: str = PROFILE, factor: float = 1.0) -> Latency:
    kernels = []
    for factor_, (i, o) in zip(PROBLEM.factors, PROBLEM.sides, strict=True):
        row = PROBLEM.encode(candidate)
        method = candidate.methods[factor_.layer]
        at = (row[i] if i >= 0 else 0, row[o] if o >= 0 else 0, factor_.methods.index(method))
        seconds = float(factor_.seconds[at]) * SCALE * factor * rng.normal(1, 0.02)
        operator = f"conv2d {method.precision}" if factor_.layer != "head" else f"dense {method.precision}"
        kernels.append(
            KernelTime(
                f"fused_{operator.split()[0]}_{factor_.layer.replace('.', '_')}_relu", f"k{at}", operator, seconds,
                int(seconds * 60e9), "measured", float(rng.uniform(0.35, 0.85)),
            )
        )  # fmt: skip
    total = (sum(kernel.seconds for kernel in kernels) * 1.04 + 6e-6) * rng.normal(1, 0.015)
    spread = float(rng.uniform(0.004, 0.02))
    samples = tuple(float(s) for s in total * rng.normal(1, spread, 30))
    return Latency(float(total), spread, "measured", profile, "this machine, core 1", samples, tuple(kernels))


def metrics(rng: np.random.Generator, kl: float, test: bool = False) -> dict[str, float]:
    clean = 0.992 - 0.30 * kl**1.2 + rng.normal(0, 0.002)
    noisy, rotated = clean - 0.02 - 0.2 * kl + rng.normal(0, 0.003), clean - 0.03 - 0.1 * kl + rng.normal(0, 0.003)
    slices = {"accuracy/clean": clean, "accuracy/noisy": noisy, "accuracy/rotated": rotated}
    slices = {name: float(np.clip(value - 0.004 * test, 0.1, 1)) for name, value in slices.items()}
    return {"accuracy": float(np.mean(list(slices.values()))), **slices}


def make_run(
    seed: int = 0, trials: int = 300, measured: int = 24, profiles: tuple[str, ...] = (PROFILE,)
) -> tuple[Run, list[Evaluation]]:
    """A run and all its evaluations; the dense candidate is trial 0, uniform baselines follow."""
    rng = np.random.default_rng(seed)
    half = {group: widths[len(widths) // 2] for group, widths in zip(PROBLEM.groups, PROBLEM.widths, strict=True)}
    int8 = {layer: PROBLEM.factors[0].methods[1] for layer in DENSE.methods}
    uniform = [Candidate(half, DENSE.methods), Candidate(DENSE.widths, int8), Candidate(half, int8)]
    proposals: list[tuple[Candidate, Source]] = [(DENSE, "dense")]
    proposals += [(candidate, "uniform") for candidate in uniform]
    proposals += [(candidate, "solver") for candidate in solve_front(PROBLEM, 40)]
    while len(proposals) < trials:
        base = PROBLEM.encode(proposals[int(rng.integers(min(len(proposals), 120)))][0])
        change = rng.integers(len(base), size=3)
        base[change] = rng.integers(PROBLEM.sizes[change])
        proposals.append((PROBLEM.decode(base), "optuna" if len(proposals) % 10 == 0 else "mutation"))
    told: list[Evaluation] = []
    seen: set[Candidate] = set()
    for candidate, source in proposals:
        if candidate in seen:
            continue
        seen.add(candidate)
        cost = PROBLEM.cost(candidate)
        kl = float(0.012 * cost.error**1.15 * rng.lognormal(0, 0.25)) if cost.error else 0.0
        predicted = {name: cost.seconds * SCALE * (1 + k) for k, name in enumerate(profiles)}
        told.append(
            Evaluation(
                len(told),
                candidate,
                source,
                "told",
                cost.error,
                cost.bytes,
                predicted,
                kl,
                seconds_spent=float(rng.uniform(0.1, 0.4)),
            )
        )
    points = np.array([(e.kl, e.predicted[profiles[0]] / told[0].predicted[profiles[0]]) for e in told])
    chosen = [k for k in spaced(points[4:], measured)]
    for k in [0, 1, 2, 3, *(k + 4 for k in chosen)]:
        times = {name: latency(rng, told[k].candidate, name, 1.0 + n) for n, name in enumerate(profiles)}
        told[k] = replace(told[k], state="measured", metrics=metrics(rng, told[k].kl or 0.0), latency=times)
    for k, reason in (
        (
            chosen[3] + 4,
            "the compiled module differs from torch at block4.a: largest relative error 0.021, allowed 0.001",
        ),
        (chosen[7] + 4, "the kernel conv2d 3x3 16->48 w8a8 did not compile: LLVM ran out of registers"),
    ):
        told[k] = replace(told[k], state="failed", failure=reason, latency={})
    usable = [e for e in told if e.latency and e.source not in ("dense", "uniform")]
    front = [
        usable[k] for k in pareto_set([(1 - e.metrics["accuracy"], e.latency[profiles[0]].seconds) for e in usable])
    ]
    dense_latency = told[0].latency[profiles[0]]

    def point(e: Evaluation, n: int) -> FrontPoint:
        files = {
            kind: f"models/{e.candidate.id}/{name}"
            for kind, name in (("so", "model.so"), ("onnx", "model.onnx"), ("manifest", "manifest.json"))
        }
        seconds = e.latency[profiles[0]].seconds
        checks = {
            "so": Verified(True, float(rng.uniform(1e-7, 1e-5)), seconds * rng.normal(1, 0.01)),
            "onnx": Verified(
                n != 2, 0.003 if n == 2 else 2e-4, None, "rounds differently in 3 of 256 samples" if n == 2 else ""
            ),
        }
        return FrontPoint(e, metrics(rng, e.kl or 0.0, test=True), checks, files)

    def reference(name: str, factor: float, size: float, loss: float, note: str) -> list[Reference]:
        values = {key: value - loss for key, value in told[0].metrics.items()}
        return [
            Reference(
                name,
                values,
                Latency(dense_latency.seconds * factor * (1 + n), 0.012, "measured", profile),
                int(told[0].bytes * size),
                note,
            )
            for n, profile in enumerate(profiles)
        ]

    run = Run(
        task=TaskInfo(
            "digits",
            "Handwritten digits (scikit-learn, 1,797 images at 16x16) by a residual CNN; slices: clean, noisy, rotated.",
            "accuracy",
            True,
            272_474,
            told[0].bytes,
            "%",
        ),
        profiles={name: "AVX-512 with VNNI (x86-64-v4), 1 thread, measured on this machine" for name in profiles},
        dense=point(told[0], 0),
        front=tuple(point(e, n) for n, e in enumerate(front, 1)),
        baselines=tuple(e for e in told if e.source == "uniform"),
        references=(
            *reference("ONNX Runtime fp32", 1.12, 1.0, 0.0, "1 thread, same model"),
            *reference("ONNX Runtime int8", 0.71, 0.27, 0.006, "static QDQ, same calibration data"),
            *(
                replace(found, kind="classic")
                for found in reference("uniform L1, 50% kept", 0.3, 0.3, 0.02, "BatchNorm re-estimated")
            ),
        ),
        hypervolume=tuple(hypervolume_history(points, (1.0, 1.0))),
        summary=Summary(
            len(told),
            sum(bool(e.latency) for e in told),
            2,
            {
                "train": 61.2,
                "layer database": 38.4,
                "kernels": 55.0,
                "search": 74.9,
                "measurements": 48.1,
                "export": 21.3,
            },
            {"error": -0.83, "kl": -0.96},
            1_900_000_000,
        ),
        layers=tuple(
            LayerInfo(f.layer, "linear" if f.layer == "head" else "conv2d", f.out_group, 64 if f.out_group else 10)
            for f in PROBLEM.factors
        ),
        sensitivity=(
            *(
                Sensitivity(f"block{k}", "width", str(64 - 16 * n), 0.01 * (k + 1) * 4**n, 1 - n / 4)
                for k in range(9)
                for n in (1, 2, 3)
            ),
            Sensitivity("head", "precision", "w8a8", 0.002, 0.26),
        ),
        deciders=tuple(
            Decider(f.layer, 0.5 / (k + 1) - 0.03, 0.4 / (k + 1)) for k, f in enumerate(PROBLEM.factors[:8])
        ),
        kept=(
            Kept("head", "width", "its channels are the model's output", 0.11),
            Kept("stem", "rank", "it has a single input channel", 0.04),
        ),
        warnings=(
            "the clock was not steady: samples of 2 of 27 modules spread by more than 3 %; close other programs and measure again",
        ),
        expected=expected(told, profiles),
    )
    return run, told


def expected(told: Sequence[Evaluation], profiles: tuple[str, ...]) -> Expected:
    """What such a run might have kept from before its first trial."""

    def point(candidate: Candidate) -> ExpectedPoint:
        cost = PROBLEM.cost(candidate)
        return ExpectedPoint(
            dict.fromkeys(profiles, PROBLEM.cost(DENSE).seconds / cost.seconds), cost.bytes, 0.01 * cost.error
        )

    points = tuple(point(candidate) for candidate in solve_front(PROBLEM, 12))
    seconds = {"until the first trial": 99.0, "trials": 60.0, "measuring": 40.0}
    spent = {"until the first trial": 99.0, "trials": 74.9, "measuring": 48.1}
    measured = {e.candidate.id: point(e.candidate) for e in told if e.state == "measured"}
    return Expected(points, seconds, 300, 24, dict.fromkeys(profiles, 0.11), spent, measured)


def write_fake_run(folder: Path, seed: int = 0, profiles: tuple[str, ...] = (PROFILE,)) -> Path:
    """Write all the files of a run that a report is made from."""
    run, told = make_run(seed, profiles=profiles)
    folder.mkdir(parents=True, exist_ok=True)
    write_evaluations(folder, told)
    write_front(folder, run)
    (folder / "config.yaml").write_text(
        "format_version: 1\ntask: digits\nprofiles: [x86-host]\nspace: default\ntrials: 300\nmeasure: 24\nseed: 0\n"
        "goals:\n  max_drop: 0.01\n  max_latency: null\n  max_size: null\nfamily: [1.5x, 3x, 99x]\n"
    )
    provenance = {
        "format_version": 1, "written": "2026-11-20T17:43:31Z", "command": "autocomp search --task digits --out runs/digits",
        "packages": {"autocomp": "0.1.0", "torch": "2.13.0+cpu", "apache-tvm": "0.27.0.post1", "optuna": "5.0.0"},
        "machine": {"cpu": "AMD EPYC 9R45", "cores": 2, "governor": None, "memory_bytes": 24_000_000_000}, "seed": 0,
        "git": {"commit": "3f2a9c1", "dirty": False},
    }  # fmt: skip
    (folder / "provenance.json").write_text(json.dumps(provenance))
    for kind in ("so", "onnx", "manifest"):
        file = folder / run.front[0].files[kind]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("made up")
    return folder
