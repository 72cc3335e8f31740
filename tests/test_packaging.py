"""What ships: a wheel that works away from the sources, and an editable install that works on them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("hardware_profiles", "recipes", "search_spaces")


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def run_away(folder: Path, path: Sequence[Path], *arguments: str) -> str:
    """Run Python in an empty folder with ``path`` before the environment's packages, and return what it prints."""
    folder.mkdir(exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, path))
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("autocomp-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    pip("install", "--quiet", "--no-deps", "--target", str(target), str(wheel))
    return target


def test_wheel_holds_what_it_must_and_no_more(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {"autocomp/py.typed"}
    for folder in FOLDERS:
        expected |= {f"autocomp/{folder}/{path.name}" for path in (ROOT / folder).glob("*.yaml")}
    sources = (path for path in (ROOT / "autocomp").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    expected |= {str(path.relative_to(ROOT)) for path in sources}
    assert {name for name in names if ".dist-info/" not in name} == expected
    information = {name.partition(".dist-info/")[2] for name in names if ".dist-info/" in name}
    assert {"METADATA", "entry_points.txt", "licenses/LICENSE"} <= information


def test_wheel_works_away_from_the_sources(installed: Path, tmp_path: Path) -> None:
    where = run_away(tmp_path / "away", [installed], "-c", "import autocomp; print(autocomp.__file__)")
    assert Path(where.strip()).is_relative_to(installed)
    for command, folder in (("profiles", "hardware_profiles"), ("recipes", "recipes"), ("spaces", "search_spaces")):
        listed = json.loads(run_away(tmp_path / "away", [installed], "-m", "autocomp.cli.main", command, "--json"))
        assert {entry["name"] for entry in listed} == {path.stem for path in (ROOT / folder).glob("*.yaml")}
    spaces = json.loads(run_away(tmp_path / "away", [installed], "-m", "autocomp.cli.main", "spaces", "--json"))
    assert all(Path(space["path"]).is_relative_to(installed) for space in spaces)


def test_wheel_builds_reports(installed: Path, tmp_path: Path) -> None:
    """The template, style and script of the report are data of the package, too."""
    code = f"from pathlib import Path; from fake_run import *; write_fake_run(Path({str(tmp_path / 'run')!r}))"
    run_away(tmp_path / "away", [installed, ROOT / "tests"], "-c", code)
    run_away(tmp_path / "away", [installed], "-m", "autocomp.cli.main", "report", str(tmp_path / "run"))
    assert "<html" in (tmp_path / "run/report.html").read_text()[:200]


def test_editable_install_finds_the_folders_beside_the_package(tmp_path: Path) -> None:
    target = tmp_path / "editable"
    pip("install", "--quiet", "--no-deps", "--no-build-isolation", "--target", str(target), "--editable", str(ROOT))
    (pth,) = target.glob("*.pth")
    assert pth.read_text().strip() == str(ROOT)
    code = f"import site; site.addsitedir({str(target)!r}); from autocomp.config.shipped import shipped_files as f; print(f({{!r}}))"
    for folder in FOLDERS:  # -S: the environment's own packages, an editable autocomp among them, are left out
        found = run_away(tmp_path / "away", [], "-S", "-c", code.format(folder))
        assert all(repr(str(path)) in found for path in (ROOT / folder).glob("*.yaml"))
