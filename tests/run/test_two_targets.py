"""Two targets on a machine that has nothing of the system's: each target's library is made, checked, and told of where it is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake_run import make_run
from torch import nn

from autocomp.cli.tables import show_front
from autocomp.devices.open import open_device
from autocomp.export.files import export_point, files_of
from autocomp.hardware import link
from autocomp.hardware.profile import load_profile
from autocomp.records.run import FrontPoint, Run
from autocomp.report.build import render
from autocomp.tuning.store import KernelStore

torch.set_num_threads(1)
TARGETS = ("x86-host", "cortex-a76")
HEADER = {"so": 62, "so:cortex-a76": 183}  # e_machine of an ELF file

Export = Callable[[Path], FrontPoint]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Write the files of one point of a run with two targets into ``run/models/ID``."""
    model, x = (
        nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)).eval(),
        torch.randn(1, 1, 8, 8),
    )
    compiled = {}
    for name in TARGETS:
        profile = replace(load_profile(name), precisions=("fp32",))  # whose peak is the only one that is measured first
        device = open_device(profile, KernelStore.open(profile, tmp_path_factory.mktemp(name)))
        device.tuner.budget = 1
        compiled[name] = device.compile(model, [(x,)])

    def write(run: Path) -> FrontPoint:
        evaluation = make_run(profiles=TARGETS)[0].front[0].evaluation
        place = Path("models") / evaluation.candidate.id
        checks = export_point(evaluation, model, compiled, [(x,)], run / place)
        files = {kind: str(place / name) for kind, name in files_of(TARGETS).items() if (run / place / name).exists()}
        return FrontPoint(evaluation, {}, checks, files)

    return write


def run_of(point: FrontPoint) -> Run:
    run = make_run(profiles=TARGETS)[0]
    return replace(run, front=(point, *run.front[1:2]))


def test_both_targets_deliver_their_files(export: Export, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    point = export(tmp_path)
    assert {kind: check.note for kind, check in point.verified.items() if not check.ok} == {}
    assert set(point.files) == {"manifest", "weights", "onnx", *HEADER}
    for kind, machine in HEADER.items():
        library = (tmp_path / point.files[kind]).read_bytes()
        assert int.from_bytes(library[18:20], "little") == machine
    show_front(run_of(point))
    said = capsys.readouterr().out
    assert "so, so:cortex-a76, onnx" in said
    assert "MISSING" not in said
    assert 'href="' + point.files["so:cortex-a76"] in render(run_of(point), [], folder=tmp_path)


def test_a_file_that_could_not_be_made_is_named_everywhere(
    export: Export, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = link.find_linker
    monkeypatch.setattr(link, "find_linker", lambda name=None: None if name == "aarch64" else honest(name))
    point = export(tmp_path)
    reason = "no linker for aarch64 on this machine"
    assert set(point.files) == {"manifest", "weights", "onnx", "so"}
    show_front(run_of(point))
    said = " ".join(capsys.readouterr().out.split())
    assert "so, so:cortex-a76 MISSING, onnx" in said
    assert f"so:cortex-a76: {reason}" in said
    assert f"so:cortex-a76: not there, {reason}" in render(run_of(point), [], folder=tmp_path)
    manifest = json.loads((tmp_path / point.files["manifest"]).read_text())
    assert not manifest["verified"]["so:cortex-a76"]["ok"]


def test_files_of_many_targets_have_names_of_their_own() -> None:
    profiles = ["x86-host", "a/b.yaml", "a_b.yaml", "/" + "deep/" * 80 + "one.yaml", "/" + "deep/" * 80 + "two.yaml"]
    files = files_of(profiles)
    assert len(files) == len(set(files.values())) == len(profiles) + 3
    assert all(len(name.encode()) < 255 and "/" not in name for name in files.values())
