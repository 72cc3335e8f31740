"""Search problems made up for tests: a residual network's tables, and a truth that their sums get somewhat wrong."""

from __future__ import annotations

import numpy as np

from autocomp.records.candidate import Method
from autocomp.study.solver import Factor, Problem, make_problem

NAMES = ("fp32", "w8a8", "r48/fp32", "r32/fp32", "r48/w8a8", "r32/w8a8", "r16/fp32", "r16/w8a8")
METHODS = tuple(map(Method.parse, NAMES))
SPEED = np.array([1, 0.35, 0.8, 0.6, 0.33, 0.25, 0.4, 0.2])
HARM = np.array([0, 0.02, 0.05, 0.15, 0.08, 0.2, 0.5, 0.55])


def random_problem(seed: int, layers: int = 12, widths: int = 4, methods: int = 5) -> Problem:
    """Stages of residual blocks: layers read and write a group of ``widths`` levels, the stem and the head only one."""
    rng = np.random.default_rng(seed)
    keep = np.linspace(1, 0.25, widths)
    levels = tuple(int(64 * share) for share in keep)
    groups: dict[str, tuple[int, ...]] = {"s0": levels}
    factors: list[Factor] = []

    def add(name: str, into: str | None, out: str | None) -> None:
        i = (keep if into else np.ones(1))[:, None, None]
        o = (keep if out else np.ones(1))[None, :, None]
        size, weight = rng.lognormal(0, 0.7), rng.lognormal(0, 1)
        speed = SPEED[:methods] * rng.uniform(0.8, 1.2, methods)
        harm = HARM[:methods] * rng.uniform(0.3, 3, methods)
        seconds = size * 1e-4 * (0.9 * i * o + 0.1) * speed
        error = weight * (rng.uniform(0.5, 2) * (1 - o) ** 1.8 + harm * (0.5 + o) + 0.1 * (1 - i))
        stored = 4e4 * size * i * o * np.linspace(1, 0.2, methods)
        shape = error.shape
        factors.append(
            Factor(
                name, into, out, levels if into else (64,), levels if out else (64,), METHODS[:methods], error,
                np.broadcast_to(seconds, shape).copy(), np.broadcast_to(stored, shape).copy(),
            )
        )  # fmt: skip

    add("stem", None, "s0")
    stage, block = "s0", 0
    while len(factors) < layers - 1:
        if block % 3 == 2:
            groups[f"s{block}"] = levels
            add(f"down{block}", stage, f"s{block}")
            stage = f"s{block}"
        else:
            groups[f"g{block}"] = levels
            add(f"block{block}.a", stage, f"g{block}")
            add(f"block{block}.b", f"g{block}", stage)
        block += 1
    add("head", stage, None)
    return make_problem(factors, groups)
