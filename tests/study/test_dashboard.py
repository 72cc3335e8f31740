"""A study in optuna-dashboard, in a real browser: it shows parameters, values and front, with no help from us."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from autocomp.records.evaluation import Evaluation
from autocomp.study.study import Choices, Engine, open_search

pytestmark = pytest.mark.browser


@pytest.fixture
def dashboard(tmp_path: Path) -> Iterator[str]:
    """The address of a dashboard on a study of twenty trials."""
    from autocomp.records.candidate import Method

    space = Choices({"stages.0.conv1": (64, 48, 32, 16)}, {"head": (Method(), Method("w8a8"), Method("fp32", (16,)))})
    engine = Engine(constraints=lambda e: {"max_size": e.bytes / 50 - 1})
    search = open_search(f"journal:///{tmp_path / 'study.journal'}", "autocomp", space, engine, profiles=["x86-host"])
    while (asked := search.ask()) is not None:
        width = asked.candidate.widths["stages.0.conv1"]
        predicted = {"x86-host": width * 1e-3}
        search.tell(
            asked.trial, Evaluation(-1, asked.candidate, asked.source, "told", 1.0, width, predicted, 1 / width)
        )
    search.close()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = Path(sys.executable).with_name("optuna-dashboard")
    server = subprocess.Popen([program, tmp_path / "study.journal", "--port", str(port)], stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{address}/api/studies", timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        yield address
    finally:
        server.kill()
        server.wait()


def test_the_dashboard_shows_a_study(dashboard: str, tmp_path: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.fail("no chromium on the PATH: install it (apt-get install chromium)")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=30000", "--window-size=1400,2400"]
    command = [
        chromium,
        *flags,
        f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom",
        f"{dashboard}/dashboard/studies/0",
    ]
    page = subprocess.run(command, capture_output=True, text=True, check=True, timeout=180).stdout
    for text in (
        "Pareto Front",
        "x86-host: seconds / dense",
        "divergence",
        "width/stages.0.conv1",
        "method/head",
        "r16/fp32",
    ):
        assert text in page, text
