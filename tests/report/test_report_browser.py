"""The report in a real browser, opened from a file: plotly draws, nothing fails, nothing is loaded."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from fake_run import write_fake_run

from autocomp.report.build import build_report

pytestmark = pytest.mark.browser

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--virtual-time-budget=5000",
]


@pytest.fixture(scope="module")
def chromium() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.fail("no chromium on the PATH: install it (apt-get install chromium)")
    return found


def open_page(chromium: str, path: Path, profile: Path, *flags: str) -> tuple[str, list[str]]:
    """The document after its scripts ran, and what they wrote to the console."""
    command = [chromium, *FLAGS, f"--user-data-dir={profile}", *flags, "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.parametrize(
    "flags", [("--window-size=1400,2000",), ("--window-size=500,2000", "--blink-settings=preferredColorScheme=0")]
)
def test_plotly_draws(chromium: str, tmp_path: Path, flags: tuple[str, ...]) -> None:
    folder = write_fake_run(tmp_path / "run")
    dom, console = open_page(chromium, build_report(folder), tmp_path / "profile", *flags)
    assert console == []  # an error, or something the content policy kept from being loaded
    drawn = re.findall(r'id="([a-z0-9-]+)"[^>]*data-drawn="yes"', dom)
    curves = ["sensitivity-precision", "sensitivity-width"]
    assert sorted(drawn) == ["front-0", "hypervolume", "prediction-0", "proxy-error", "proxy-kl", *curves]
    points = re.search(r'id="front-0".*?id="p-', dom, re.DOTALL)
    assert points is not None
    assert len(re.findall(r'<path class="point\b', points[0])) > 25
    assert 'data-title="Share' not in dom  # plotly's button that uploads


def test_the_end_of_the_slider_allows_the_largest_loss(chromium: str, tmp_path: Path) -> None:
    """The fastest point was offered by no place of the slider where its loss was rounded down."""
    page = build_report(write_fake_run(tmp_path / "run"))
    found = re.search(r'(<script[^>]*id="offers"[^>]*>)(.*?)(</script>)', page.read_text(), re.DOTALL)
    assert found is not None
    offers = json.loads(found[2])
    fastest = max(offers["points"], key=lambda point: point["loss"])
    fastest["loss"] = 10.44
    text = page.read_text().replace(found[0], found[1] + json.dumps(offers) + found[3])
    page.write_text(text.replace('step="1" value="50"', 'step="1" value="100"'))
    dom, console = open_page(chromium, page, tmp_path / "profile")
    assert console == []
    assert re.search(r'id="allowed"[^>]*>11 pt<', dom)
    assert re.search(rf'id="got"[^>]*>[^<]*<span>[^<]*<a href="#p-{fastest["id"]}"', dom)


def test_screenshot_is_not_blank(chromium: str, tmp_path: Path) -> None:
    folder = write_fake_run(tmp_path / "run")
    shot = tmp_path / "report.png"
    flags = [
        "--hide-scrollbars",
        "--window-size=1400,1600",
        f"--screenshot={shot}",
        f"--user-data-dir={tmp_path / 'p'}",
    ]
    page = build_report(folder).as_uri()
    subprocess.run([chromium, *FLAGS, *flags, page], capture_output=True, check=True, timeout=120)
    assert shot.stat().st_size > 60_000  # a blank page of this size takes less than 10 kB
