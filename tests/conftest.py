"""Every test run has a cache of its own: what the user has tuned or trained is neither read nor changed.

Tests marked ``board`` run only where they are asked for: they download an arm64 system once, 130 MB, and need qemu.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

from autocomp.processes.outcome import Outcome

if TYPE_CHECKING:
    import autocomp
    from autocomp.api import SearchResult
    from autocomp.devices.local import LocalDevice

# No test is about how long something takes. Where CI is set in the environment, hypothesis draws the same cases every time, so that what fails
# there failed because of a change; everywhere else it looks at new ones.
settings.register_profile("autocomp", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("autocomp")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    before = os.environ.get("AUTOCOMP_CACHE")
    os.environ["AUTOCOMP_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["AUTOCOMP_CACHE"]
    else:
        os.environ["AUTOCOMP_CACHE"] = before


@pytest.fixture(scope="session", autouse=True)
def no_pauses() -> Iterator[None]:
    """Measure once, however busy the machine is: no test is about how long something takes."""
    from autocomp.hardware import timing

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "PAUSES", ())
        yield


def reckoned(jobs: Sequence[Any]) -> list[Outcome[float]]:
    """What a timer answers, reckoned from the arithmetic: every kernel is scheduled, none is compiled and timed by itself.

    Half of the time of a test that compiles modules would go into that; modules are compiled whole, run and timed all the same.
    """
    from autocomp.kernels import templates

    results: list[Outcome[float]] = []
    for job in jobs:
        try:
            job.build()
            results.append(Outcome(1e-6 + templates.describe(job.function).flops / 1e11))
        except Exception as error:
            results.append(Outcome(None, str(error)))
    return results


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> LocalDevice:
    """This machine with an empty store and the first guess of every kernel: what is computed does not depend on the tile."""
    from autocomp.devices.local import LocalDevice
    from autocomp.hardware.profile import load_profile
    from autocomp.tuning.store import KernelStore

    with pytest.MonkeyPatch.context() as patch:
        _first_guesses(patch)
        profile = load_profile("x86-host")
        device = LocalDevice(profile, KernelStore.open(profile, tmp_path_factory.mktemp("store")))
    device.tuner.budget = 1
    device.tuner.timer.attempt = reckoned  # type: ignore[method-assign]
    return device


@pytest.fixture(scope="module")
def short_tuning() -> Iterator[None]:
    """One tile a kernel, its time reckoned: what is tested here does not depend on how fast a kernel is."""
    with pytest.MonkeyPatch.context() as patch:
        _first_guesses(patch)
        yield


def _first_guesses(patch: pytest.MonkeyPatch) -> None:
    from autocomp.tuning.timers import LocalTimer
    from autocomp.tuning.tune import Tuner

    patch.setitem(Tuner.__init__.__kwdefaults__, "budget", 1)
    patch.setattr(LocalTimer, "attempt", lambda _timer, jobs: reckoned(jobs))


@pytest.fixture(scope="module")
def spaces(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """``wide`` has two widths, ``full`` keeps all channels, so that a run has but two baselines.

    The head stays fp32: with four outputs from a few inputs, one activation rounded the other way is a percent of them.
    """
    import yaml

    folder = tmp_path_factory.mktemp("spaces")
    for name, keep in (("wide", [1.0, 0.5]), ("full", [1.0])):
        rule = {"layers": "*", "keep": keep, "ranks": [0.25], "precisions": ["fp32", "w8a8"]}
        rules = {"format_version": 1, "rules": [rule, {"layers": "head", "precisions": ["fp32"]}]}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(rules))
    return {name: str(folder / f"{name}.yaml") for name in ("wide", "full")}


@pytest.fixture(scope="session")
def recipe_at(tmp_path_factory: pytest.TempPathFactory) -> Callable[[float], str]:
    """The path of a recipe like the default, at a learning rate that is stated."""
    import yaml

    def recipe(rate: float) -> str:
        path = tmp_path_factory.mktemp("recipes") / "short.yaml"
        path.write_text(yaml.safe_dump({"format_version": 1, "learning_rate": rate, "stages": [{"name": "distil"}]}))
        return str(path)

    return recipe


@pytest.fixture
def without_exports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the files of front points, half of the time of a run, where a test is about what goes before."""
    from autocomp.measurement import preflight
    from autocomp.records.run import FrontPoint
    from autocomp.run import finish

    monkeypatch.setattr(finish, "write_points", lambda _pipeline, found: [FrontPoint(e) for e in found])
    monkeypatch.setattr(preflight, "export_point", lambda *_: {})


@pytest.fixture
def small(spaces: dict[str, str], tmp_path: Path) -> Callable[..., SearchResult]:
    """Run a search of the ``full`` space with the fewest steps that have every stage."""

    import autocomp

    def run(task: autocomp.Task | str = "tiny_task:task", **options: Any) -> SearchResult:
        settings = {
            "trials": 4,
            "measurements": 1,
            "out": tmp_path / "run",
            "space": spaces["full"],
            "references": False,
        }
        return autocomp.search(task=task, **settings | options)

    return run


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mount a small file system of its own; where this machine does not let us, there is nothing to test."""
    folders: list[Path] = []

    def mount(options: str) -> Path:
        folder = tmp_path / "mounted"
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, check=False
        )
        if done.returncode:
            pytest.skip("mounting needs root")
        folders.append(folder)
        return folder

    yield mount
    for folder in folders:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


ON_REQUEST = ("slow", "browser", "postgres", "board", "sweep", "corpus")
# the files that take longest, first: side by side, no worker is left alone with one of them at the end
LONGEST = (
    "test_operations", "test_search_stopped", "test_kills", "test_corpus", "test_search", "test_identity", "test_faults", "test_rpc",
    "test_user_functions", "test_reproducible", "test_random_graphs",
)  # fmt: skip


def pytest_report_header(config: pytest.Config) -> str:
    """Say which tests are left to commands of their own, so that none is left out in silence."""
    left = [f"`make test-{name}`" for name in ON_REQUEST if name not in config.option.markexpr]
    return f"left to {' and '.join(left)}: the tests marked so" if left else ""


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Say at once what failed: a run that is stopped, or whose worker died, has no summary."""
    in_worker = "PYTEST_XDIST_WORKER" in os.environ
    if report.failed and not in_worker:
        print(f"\n{report.nodeid} ({report.when}) failed:\n{str(report.longrepr)[-3000:]}", flush=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what ``-m`` must speak of (`ON_REQUEST`); what is left out is counted as deselected."""
    unasked = [name for name in ON_REQUEST if name not in config.option.markexpr]
    left_out = [item for item in items if any(item.get_closest_marker(name) for name in unasked)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
