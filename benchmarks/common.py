"""What every benchmark shares: the machine it ran on, a table on the screen, and JSON plus Markdown under ``reports/``."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from autocomp.compiler.build import describe_device
from autocomp.hardware.profile import Profile

REPORTS = Path(__file__).parent.parent / "reports" / "benchmarks"


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Median and quartiles of ``ours / theirs`` over interleaved repeats: pairs share what the machine did at the time."""
    ratios = np.array(ours) / np.array(theirs)
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    return float(middle), float(low), float(high)


def geometric_mean(values: Iterable[float]) -> float:
    return float(np.exp(np.mean(np.log(list(values)))))


def machine(profile: Profile) -> dict[str, Any]:
    return {
        "when": time.strftime("%Y-%m-%d", time.gmtime()),
        "device": describe_device(profile),
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("autocomp", "torch", "apache-tvm", "onnxruntime")},
    }


def earlier(name: str, key: str) -> dict[str, Any]:
    """What ``NAME.json`` holds under a key by task: a run of some tasks leaves the others as they were measured."""
    path = REPORTS / f"{name}.json"
    return dict(json.loads(path.read_text()).get(key, {})) if path.exists() else {}


def publish(
    name: str,
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    data: Mapping[str, Any],
    profile: Profile,
    notes: Sequence[str] = (),
    write: bool = True,
) -> None:
    """Print a table, and write ``reports/benchmarks/NAME.md`` and ``NAME.json`` (``write=False``: a smoke test, only print)."""
    from autocomp.cli.tables import show_table

    show_table(headings, rows, title=name)
    for note in notes:
        print(note)
    if not write:
        return
    REPORTS.mkdir(parents=True, exist_ok=True)
    info = machine(profile)
    (REPORTS / f"{name}.json").write_text(json.dumps({"machine": info, **data}, indent=1) + "\n")
    plain = [heading.removeprefix(">") for heading in headings]
    align = ["---:" if heading.startswith(">") else "---" for heading in headings]
    lines = [f"| {' | '.join(cells)} |" for cells in (plain, align, *rows)]
    text = (
        f"# {name}\n\n`python benchmarks/{name}.py` on {info['device']}, {info['when']}.\n\n" + "\n".join(lines) + "\n"
    )
    (REPORTS / f"{name}.md").write_text(text + "".join(f"\n{note}\n" for note in notes))
