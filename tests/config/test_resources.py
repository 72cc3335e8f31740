"""Files that ship with autocomp are found in a source tree and in a wheel, where they lie in different places."""

from __future__ import annotations

from pathlib import Path

import pytest

from autocomp.config import shipped as resources


@pytest.mark.parametrize("place", ["autocomp/hardware_profiles", "hardware_profiles"])
def test_found_inside_and_beside_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    (tmp_path / "autocomp").mkdir()
    (tmp_path / place).mkdir()
    (tmp_path / place / "board.yaml").write_text("")
    monkeypatch.setattr(resources, "__file__", str(tmp_path / "autocomp/config/shipped.py"))
    assert resources.shipped_files("hardware_profiles") == {"board": tmp_path / place / "board.yaml"}


def test_broken_installation_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "__file__", str(tmp_path / "autocomp/config/shipped.py"))
    with pytest.raises(FileNotFoundError, match="install autocomp again"):
        resources.data_folder("hardware_profiles")


@pytest.mark.parametrize("folder", ["hardware_profiles", "recipes", "search_spaces"])
def test_both_folders_ship(folder: str) -> None:
    assert resources.shipped_files(folder)
