"""What every benchmark shares: the machine it ran on, a table on the screen, and JSON plus Markdown under ``reports/``."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from revision import revision

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


def mean_and_spread(values: Sequence[float]) -> str:
    """The mean and the standard deviation of several values; one alone as it is."""
    return f"{np.mean(values):.4f} ± {np.std(values):.4f}" if len(values) > 1 else f"{values[0]:.4f}"


def answered(file: str, *arguments: str, **environment: str) -> Any:
    """What a benchmark, run with these arguments in a process of its own, prints last: JSON."""
    command = [sys.executable, file, *arguments]
    done = subprocess.run(command, env={**os.environ, **environment}, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def machine(profile: Profile) -> dict[str, Any]:
    return {
        "when": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": revision(),
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


def kept(name: str, key: str, data: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """What under a key of ``data`` stands in ``NAME.json`` already, word for word, and when, at which commit and on what that was measured.

    A task that was measured again in part has a line for each part that was not: ``digits: joint``.
    """
    path = REPORTS / f"{name}.json"
    if not path.exists():
        return {}
    stored = json.loads(path.read_text())
    made = {label: stored["machine"].get(label, "unknown") for label in ("when", "commit", "device")}
    earlier_still, before, found = stored.get("kept", {}), stored.get(key, {}), {}
    for entry, value in json.loads(json.dumps(data[key])).items():
        old = before.get(entry)
        if value == old:
            found[entry] = earlier_still.get(entry, made)
            found |= {part: at for part, at in earlier_still.items() if part.startswith(f"{entry}: ")}
        elif isinstance(value, dict) and isinstance(old, dict):
            parts = [part for part, inner in value.items() if isinstance(inner, dict) and inner == old.get(part)]
            by_part = {f"{entry}: {part}": earlier_still.get(entry, made) for part in parts}
            found |= {part: earlier_still.get(part, at) for part, at in by_part.items()}
    return found


def publish(
    name: str,
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    data: Mapping[str, Any],
    profile: Profile,
    notes: Sequence[str] = (),
    write: bool = True,
    parts: str | None = None,
) -> None:
    """Print a table, and write ``reports/benchmarks/NAME.md`` and ``NAME.json`` (``write=False``: a smoke test, only print).

    Both say on which processor, on which day and at which commit (`revision`); where ``parts`` is the key of ``data`` that `earlier` gave, also
    what of it is older.
    """
    from autocomp.cli.tables import show_table

    show_table(headings, rows, title=name)
    for note in notes:
        print(note)
    if not write:
        return
    REPORTS.mkdir(parents=True, exist_ok=True)
    info = machine(profile)
    older = kept(name, parts, data) if parts else {}
    stamp = {"machine": info} | ({"kept": older} if older else {})
    (REPORTS / f"{name}.json").write_text(json.dumps(stamp | dict(data), indent=1) + "\n")
    plain = [heading.removeprefix(">") for heading in headings]
    align = ["---:" if heading.startswith(">") else "---" for heading in headings]
    lines = [f"| {' | '.join(cells)} |" for cells in (plain, align, *rows)]
    made = f"{info['device']}, {info['when']}, commit {info['commit']}"
    text = f"# {name}\n\n`python benchmarks/{Path(sys.argv[0]).name}` on {made}.\n\n" + "\n".join(lines) + "\n"
    old = [
        f"Not measured again: {what} ({at['device']}, {at['when']}, commit {at['commit']})."
        for what, at in older.items()
    ]
    (REPORTS / f"{name}.md").write_text(text + "".join(f"\n{note}\n" for note in (*notes, *old)))
