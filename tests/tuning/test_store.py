"""The kernel store: append-only, shared, and read back whatever happened to its file."""

from __future__ import annotations

import dataclasses
import multiprocessing
from pathlib import Path

import pytest

from autocomp.devices.local import LocalDevice
from autocomp.errors import UsageError
from autocomp.hardware.profile import load_profile
from autocomp.kernels import templates, weight_only, winograd
from autocomp.tuning.store import KernelRecord, KernelStore

IDENTITY = {"target": "one"}


def record(key: str, seconds: float = 1e-6) -> KernelRecord:
    return KernelRecord(key, "dense", {"rows": 4}, seconds, 1000, 3, (4, 16), (8,))


def test_records_survive_and_the_last_of_a_key_counts(tmp_path: Path) -> None:
    store = KernelStore(tmp_path, IDENTITY)
    store.add(record("a"))
    store.add(record("b"))
    store.add(record("a", 2e-6))
    again = KernelStore(tmp_path, IDENTITY)
    assert len(again) == 2
    assert again.get("a") == record("a", 2e-6)
    assert again.find("dense", (4, 16), (8,)) is not None
    assert again.find("dense", (4, 16), (9,)) is None


def test_a_tile_that_no_compiler_comes_to_an_end_with_is_no_record(tmp_path: Path) -> None:
    store = KernelStore(tmp_path, IDENTITY)
    store.add(dataclasses.replace(record("a"), tile={"rows": 4096, "vectors": 64, "unroll": 4096}))
    again = KernelStore(tmp_path, IDENTITY)
    assert again.corrupt == 1
    assert again.get("a") is None


def test_damaged_lines_are_skipped_and_counted(tmp_path: Path) -> None:
    store = KernelStore(tmp_path, IDENTITY)
    for key in "abc":
        store.add(record(key))
    path = tmp_path / "kernels.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1].replace(b"1e-06", b"9e-06") + lines[2][:20])  # altered, and torn by a kill
    again = KernelStore(tmp_path, IDENTITY)
    assert again.corrupt == 2
    assert again.get("a") == record("a")
    assert again.get("b") is None
    again.add(record("d"))  # after a torn line a new one still reads back
    assert KernelStore(tmp_path, IDENTITY).get("d") == record("d")


@pytest.mark.parametrize("profile_name", ["x86-host", "cortex-a76"])
@pytest.mark.parametrize("template", sorted({*templates.CONTRACTIONS, *weight_only.TEMPLATES, "rowwise"}))
def test_every_tile_that_is_tried_reads_back(template: str, profile_name: str, tmp_path: Path) -> None:
    """A bound that a tile of ours exceeds would have its kernel tuned anew in each search."""
    profile = load_profile(profile_name)
    outer, reduced = ((6, 6, 1), ()) if template == winograd.NAME else ((), (9,))
    anchors = [
        templates.Anchor(template, 1000, (*outer, 14, 14, channels), (channels, *reduced))
        for channels in (1, 6, 16, 48, 1024)
    ]
    tried = {tile for anchor in anchors for tile in [*templates.tiles(anchor, profile), *templates.LAST_RESORT]}
    made = [dataclasses.replace(record(f"k{i}"), tile=tile.to_json()) for i, tile in enumerate(tried)]
    store = KernelStore(tmp_path, IDENTITY)
    for each in made:
        store.add(each)
    again = KernelStore(tmp_path, IDENTITY)
    assert again.corrupt == 0
    assert [again.get(each.key) for each in made] == made


def test_another_target_is_refused(tmp_path: Path) -> None:
    KernelStore(tmp_path, IDENTITY)
    with pytest.raises(UsageError, match="filled for another target"):
        KernelStore(tmp_path, {"target": "two"})


def _write(folder: str, start: int) -> None:
    store = KernelStore(Path(folder), IDENTITY)
    for index in range(start, start + 25):
        store.add(record(f"k{index}"))


def test_two_processes_append_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_write, args=(str(tmp_path), start)) for start in (0, 25)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    store = KernelStore(tmp_path, IDENTITY)
    assert len(store) == 50
    assert store.corrupt == 0


def test_a_device_keeps_the_empty_store_it_is_given(tmp_path: Path) -> None:
    profile = load_profile("x86-64-v3")
    store = KernelStore.open(profile, tmp_path)
    assert not len(store)
    device = LocalDevice(profile, store)  # which measures its peaks
    assert device.store is device.tuner.store is store
    assert len(store)


@pytest.mark.parametrize("tile", [{"rows": 5, "vectors": 3, "unroll": 7, "matrix": True}, {"bytes": 64}])
def test_a_record_that_fits_no_kernel_is_tuned_anew(tile: dict[str, int], tmp_path: Path) -> None:
    """Whole and with its checksum, as a store of others' may have it."""
    import torch

    from autocomp.compiler.build import build
    from autocomp.tuning.tune import Tuner

    profile = load_profile("x86-host")
    model, x = torch.nn.Sequential(torch.nn.Linear(24, 40)).eval(), torch.randn(4, 24)
    store = KernelStore(tmp_path, IDENTITY)
    build(model, (x,), profile, Tuner(profile, store, budget=1))
    bad = [dataclasses.replace(one, tile=tile) for one in store.records() if one.spatial]
    assert bad
    for one in bad:
        store.add(one)
    again = KernelStore(tmp_path, IDENTITY)
    compiled = build(model, (x,), profile, Tuner(profile, again, budget=1))
    with torch.no_grad():
        torch.testing.assert_close(compiled.run(x), model(x), rtol=1e-4, atol=1e-5)
    kept = {one.key: one.tile for one in KernelStore(tmp_path, IDENTITY).records()}
    assert all(kept[one.key] != tile for one in bad)
