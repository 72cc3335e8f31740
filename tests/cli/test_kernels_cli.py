"""`autocomp kernels`, and the store under writers that are killed, run at once, or come from another machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from places import TESTS

from autocomp.cli.main import main
from autocomp.errors import UsageError
from autocomp.hardware.profile import load_profile
from autocomp.tuning import exchange, roofline
from autocomp.tuning.store import KernelRecord, KernelStore, identity_of, read_lines

GOLDEN = TESTS / "golden" / "kernels_v1.json"
IDENTITY = {
    "format_version": 1,
    "target": {"kind": "llvm", "mcpu": "x86-64-v4", "num-cores": 1},
    "fingerprint": "0123456789",
    "tvm": "0.27.0.post1",
}
RECORDS = (
    KernelRecord("peak-fp32-v1", "dense", {"rows": 8, "vectors": 2}, 1e-5, 2_000_000, 10),
    KernelRecord("peak-int8-v1", "dense_int8", {"rows": 8, "vectors": 2}, 2.5e-6, 2_000_000, 10),
    KernelRecord("peak-memory-v1", "stream", {"bytes": 67_108_864}, 2e-3, 0, 1),
    KernelRecord("conv2d-a-v1", "conv2d", {"rows": 7, "vectors": 4}, 1.5e-3, 231_211_008, 6, (1, 56, 56, 64), (3, 3, 64)),
    KernelRecord("dense-b-v1", "dense", {"rows": 1, "vectors": 8, "channels_outer": True}, 2.5e-4, 8_388_608, 4, (1, 1024), (4096,)),
    KernelRecord("rowwise-c-v1", "rowwise", {"rows": 1}, 3e-6, 0, 1),
)  # fmt: skip

Run = Callable[..., tuple[int, str, str]]


def record(key: str, seconds: float = 1e-6) -> KernelRecord:
    return KernelRecord(key, "dense", {"rows": 4}, seconds, 1000, 3, (4, 16), (8,))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Run a command with an empty cache: (exit code, standard output, standard error)."""
    monkeypatch.setenv("AUTOCOMP_CACHE", str(tmp_path / "cache"))

    def call(*arguments: str) -> tuple[int, str, str]:
        code = main(("kernels", *arguments))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def filled(profile: str = "x86-host") -> KernelStore:
    store = KernelStore.open(load_profile(profile))
    store.merge(RECORDS)
    return store


def by_key(records: Iterable[KernelRecord]) -> list[KernelRecord]:
    return sorted(records, key=lambda found: found.key)


def damage(store: KernelStore) -> None:
    path = store.folder / "kernels.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[3] = lines[3].replace(b"0.0015", b"0.0001")
    path.write_bytes(b"".join(lines) + b"0123 torn")


# --- the commands ---


def test_list_names_every_store(run: Run) -> None:
    code, out, _ = run("list")
    assert code == 0
    assert "no kernel stores" in out
    filled()
    store = filled("x86-64-v3")
    code, out, _ = run("list")
    assert code == 0
    assert len(out.splitlines()) == 3
    assert "x86-64-v3, 1 thread" in out
    code, out, _ = run("list", "--json")
    summaries = json.loads(out)
    assert [summary["kernels"] for summary in summaries] == [3, 3]
    assert store.folder.name in {summary["store"] for summary in summaries}


def test_list_of_a_profile_shows_the_roofline(run: Run) -> None:
    filled()
    code, out, err = run("list", "--profile", "x86-host")
    assert (code, err) == (0, "")
    limits, headings, *rows = [line.split() for line in out.splitlines()]
    assert " ".join(limits) == "measured limits: fp32 200 Gop/s, int8 800 Gop/s, main memory 34 GB/s"
    assert headings[:3] == ["operator", "loops", "tile"]
    assert rows[0][:6] == ["conv2d", "1x56x56x64", "over", "3x3x64", "rows=7", "vectors=4"]
    assert rows[0][6:] == ["1500.0", "154.1", "77%", "131.9", "arithmetic"]
    assert rows[1] == ["dense", "1x1024", "over", "4096", "vectors=8", "250.0", "33.6", "17%", "0.5", "memory"]
    assert rows[2] == ["rowwise", "3.0"]
    code, out, _ = run("list", "--profile", "x86-host", "--json")
    found = json.loads(out)
    assert found["roofline"] == {
        "fp32": pytest.approx(2e11), "fp16": None, "bf16": None, "int8": pytest.approx(8e11), "bandwidth": pytest.approx(67_108_864 / 2e-3),
    }  # fmt: skip
    assert found["kernels"][1]["bound"] == "memory"


def test_list_of_a_profile_without_a_store_makes_none(run: Run, tmp_path: Path) -> None:
    assert run("list", "--profile", "x86-host")[0] == 0
    assert run("list", "--profile", "x86-host", "--json")[0] == 0
    for command in (("export", str(tmp_path / "out.json")), ("verify", "--profile", "x86-host"), ("compact",)):
        code, _, err = run(*command)
        assert code == 2
        assert "there is no kernel store for profile 'x86-host'" in err
    assert not (tmp_path / "cache" / "kernels").exists()


def test_exported_kernels_merge_into_an_empty_store(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled()
    path = tmp_path / "kernels.json"
    code, out, _ = run("export", str(path))
    assert (code, out) == (0, f"{path}: 6 records\n")
    monkeypatch.setenv("AUTOCOMP_CACHE", str(tmp_path / "elsewhere"))
    code, out, _ = run("merge", str(path))
    assert (code, out) == (0, f"{path}: 6 new, 0 faster than before, 0 left out\n")
    assert by_key(KernelStore.open(load_profile("x86-host")).records()) == by_key(RECORDS)
    code, out, _ = run("merge", str(path), "--json")
    assert json.loads(out) == [{"file": str(path), "new": 0, "faster": 0, "left_out": 6}]


def test_kernels_of_another_target_are_refused(run: Run, tmp_path: Path) -> None:
    filled()
    path = tmp_path / "kernels.json"
    run("export", str(path))
    code, _, err = run("merge", str(path), "--profile", "x86-64-v3")
    assert code == 2
    assert "target.mcpu is " in err
    assert "x86-64-v3 here" in err
    assert len(exchange.list_stores()) == 1, "no store is made for kernels that are refused"


def test_kernels_of_another_compiler_are_refused(run: Run, tmp_path: Path) -> None:
    store = filled()
    store.identity["tvm"] = "0.26.0"
    exchange.export_store(store, tmp_path / "old.json")
    code, _, err = run("merge", str(tmp_path / "old.json"))
    assert code == 2
    assert "tvm is 0.26.0 in the file" in err


def test_verify_names_damaged_lines_and_compact_drops_them(run: Run) -> None:
    store = filled()
    store.add(replace(RECORDS[4], seconds=2e-4))
    assert run("verify")[:2] == (0, f"{store.folder.name}: 6 records, 1 superseded\n")
    damage(store)
    code, out, err = run("verify")
    assert code == 1
    assert out == f"{store.folder.name}: 5 records, 1 superseded, damaged: 2 lines (4, 8)\n"
    assert "tuned again" in err
    code, out, _ = run("verify", "--profile", "x86-host", "--json")
    assert code == 1
    assert json.loads(out)[0]["damaged"] == [4, 8]
    assert run("compact")[:2] == (0, "5 records kept; dropped: 2 damaged, 1 superseded\n")
    assert run("verify")[0] == 0
    again = KernelStore.open(load_profile("x86-host"))
    assert again.get("dense-b-v1") == replace(RECORDS[4], seconds=2e-4)
    assert again.get("conv2d-a-v1") is None


def test_a_damaged_target_file_is_told_and_repaired(run: Run) -> None:
    store = filled()
    (store.folder / "target.json").write_text("{")
    code, out, _ = run("verify")
    assert code == 1
    assert "target.json does not read back" in out
    assert "unknown (target.json is damaged)" in run("list")[1]
    assert KernelStore.open(load_profile("x86-host")).corrupt == 1
    assert run("verify")[0] == 0


def test_a_mistyped_command_is_told_the_nearest(run: Run) -> None:
    code, _, err = run("marge")
    assert code == 2
    assert "Did you mean 'merge'?" in err


# --- files ---


def test_golden_export_reads_back_and_is_what_we_write(tmp_path: Path) -> None:
    exported = exchange.read_export(GOLDEN)
    assert exported.identity == IDENTITY
    assert by_key(exported.records) == by_key(RECORDS)
    store = KernelStore(tmp_path / "store", IDENTITY)
    store.merge(exported.records)
    exchange.export_store(store, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == GOLDEN.read_text()


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda text: text[: len(text) // 2], "does not read as JSON"),
        (lambda text: "[]", "states no format_version"),
        (lambda text: text.replace('"format_version": 1,\n "identity"', '"format_version": 2,\n "identity"'), "a newer one wrote it"),
        (lambda text: text.replace('"seconds": 0.0015', '"seconds": 0.0014'), "do not match its checksum"),
        (lambda text: text.replace('"seconds": 0.0015', '"seconds": -1'), r"records\.0\.seconds: .* got -1"),
        (lambda text: text.replace('"seconds": 0.0015', '"seconds": "1"'), r"records\.0\.seconds"),
    ],
)  # fmt: skip
def test_wrong_files_are_refused(tmp_path: Path, edit: Callable[[str], str], words: str) -> None:
    path = tmp_path / "kernels.json"
    path.write_text(edit(GOLDEN.read_text()))
    with pytest.raises(UsageError, match=words):
        exchange.read_export(path)


def test_absent_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no file"):
        exchange.read_export(tmp_path / "absent.json")
    with pytest.raises(UsageError, match="is a folder"):
        exchange.read_export(tmp_path)


def test_nothing_is_read_if_one_of_several_files_is_for_another_target(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"tvm is 0\.27\.0\.post1 in the file, 1 here"):
        exchange.read_exports([GOLDEN], {**IDENTITY, "tvm": "1"})
    assert list(exchange.read_exports([GOLDEN], IDENTITY)) == [GOLDEN]


# --- merging ---


def test_merge_keeps_the_faster_of_a_key(tmp_path: Path) -> None:
    store = KernelStore(tmp_path, IDENTITY)
    store.add(record("a", 2e-6))
    store.add(record("b", 2e-6))
    merged = store.merge(
        [record("a", 1e-6), record("b", 3e-6), record("c", 5e-6), record("c", 4e-6), record("c", 6e-6)]
    )
    assert (merged.new, merged.faster, merged.left_out) == (1, 1, 2)
    for seen in (store, KernelStore(tmp_path, IDENTITY)):
        assert [seen.get(key).seconds for key in "abc"] == [1e-6, 2e-6, 4e-6]


def test_merge_sees_what_another_process_appended(tmp_path: Path) -> None:
    store, other = KernelStore(tmp_path, IDENTITY), KernelStore(tmp_path, IDENTITY)
    other.add(record("a", 1e-6))
    assert store.merge([record("a", 2e-6)]).left_out == 1
    assert store.get("a") == record("a", 1e-6)
    assert KernelStore(tmp_path, IDENTITY).get("a") == record("a", 1e-6)


# --- other processes ---

_PRELUDE = """
import sys
from pathlib import Path
from autocomp.tuning import store as module
from autocomp.tuning.store import KernelRecord, KernelStore
IDENTITY = {identity!r}
def record(key, seconds=1e-6):
    return KernelRecord(key, "dense", {{"rows": 4}}, seconds, 1000, 3, (4, 16), (8,))
store = KernelStore(Path({folder!r}), IDENTITY)
"""

_APPENDS = """
for index in range({start}, {stop}):
    store.add(record(f"k{{index}}"))
    print(index, flush=True)
"""

_STOPS_IN_MID_APPEND = """
import time
whole = module._encode
module._encode = lambda record: whole(record)[:40]
def hang(descriptor):
    print("written", flush=True)
    time.sleep(60)
module.os.fsync = hang
store.add(record("torn"))
"""


def start(folder: Path, code: str, **values: int) -> subprocess.Popen[str]:
    text = _PRELUDE.format(identity=IDENTITY, folder=str(folder)) + code.format(**values)
    return subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, text=True, env=dict(os.environ))


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_a_writer_killed_in_mid_append_costs_its_own_line_only(tmp_path: Path) -> None:
    KernelStore(tmp_path, IDENTITY).add(record("before"))
    with start(tmp_path, _STOPS_IN_MID_APPEND) as process:
        assert line(process) == "written"  # half a line is in the file, and the writer holds the lock
        process.send_signal(signal.SIGKILL)
    store = KernelStore(tmp_path, IDENTITY)  # the lock died with its holder
    assert store.corrupt == 1
    assert [found.key for found in store.records()] == ["before"]
    store.add(record("after"))
    again = read_lines(tmp_path / "kernels.jsonl")
    assert sorted(again.latest) == ["after", "before"]
    assert again.damaged == (2,)
    store.compact()
    assert read_lines(tmp_path / "kernels.jsonl").damaged == ()


def test_what_a_killed_writer_said_it_wrote_is_there(tmp_path: Path) -> None:
    with start(tmp_path, _APPENDS, start=0, stop=100_000) as process:
        while int(line(process)) < 20:
            pass
        process.send_signal(signal.SIGKILL)
        assert process.stdout is not None
        told = [int(text) for text in process.stdout.read().split()]
    found = KernelStore(tmp_path, IDENTITY)
    assert all(found.get(f"k{index}") for index in range(max(told, default=20) + 1))


def test_writers_and_merges_at_once_lose_nothing(tmp_path: Path) -> None:
    writers = [start(tmp_path, _APPENDS, start=first, stop=first + 30) for first in (0, 100)]
    store = KernelStore(tmp_path, IDENTITY)
    merged, until = 0, time.monotonic() + 60
    while any(writer.poll() is None for writer in writers) and time.monotonic() < until:
        store.merge([record(f"m{merged}"), record("k5", 1e-7), record("k105", 1e-3)])
        if merged % 3 == 0:
            store.compact()
        merged += 1
    assert [writer.wait() for writer in writers] == [0, 0]
    for writer in writers:
        assert writer.stdout is not None
        writer.stdout.close()
    store.merge([record("k5", 1e-7)])
    lines = read_lines(tmp_path / "kernels.jsonl")
    assert lines.damaged == ()
    expected = {f"k{i}" for i in (*range(30), *range(100, 130))} | {f"m{i}" for i in range(merged)}
    assert set(lines.latest) == expected
    assert lines.latest["k5"].seconds == 1e-7


# --- roofline ---

PEAKS = {"fp32": 1_000_000, "fp16": 2_000_000, "int8": 4_000_000}


@pytest.mark.parametrize(
    ("operator", "spatial", "reduction", "expected"),
    [
        ("dense", (8, 64), (32,), 4 * (8 * 32 + 32 * 64 + 8 * 64)),
        ("dense_int8", (8, 64), (8, 4), 8 * 32 + 32 * 64 + 4 * 8 * 64),
        ("dense_int8", (8, 64), (16, 2), 2 * (8 * 32 + 32 * 64) + 4 * 8 * 64),
        ("dense_fp16", (8, 64), (32,), 2 * (8 * 32 + 32 * 64 + 8 * 64)),
        ("depthwise_fp16", (1, 5, 7, 16), (3, 3), 2 * (35 * 16 + 9 * 16 + 35 * 16)),
        ("dense_w4", (8, 64), (2, 32), 4 * 8 * 64 + 64 * 64 // 2 + 4 * 2 * 64 + 4 * 8 * 64),
        ("gemv_w8", (2, 4, 64), (32,), 4 * 2 * 128 + 64 * (128 + 4 * 4) + 4 * 2 * 64),
        ("gemv_w4", (2, 4, 64), (4, 8), 4 * 2 * 128 + 64 * (64 + 4 * 4) + 4 * 2 * 64),
        ("batch_matmul", (3, 8, 64), (32,), 3 * 4 * (8 * 32 + 32 * 64 + 8 * 64)),
        ("conv2d", (1, 5, 7, 16), (3, 3, 8), 4 * (35 * 8 + 72 * 16 + 35 * 16)),
        ("depthwise", (1, 5, 7, 16), (3, 3), 4 * (35 * 16 + 9 * 16 + 35 * 16)),
        ("softmax", (4, 4), (4,), None),
        ("dense", (), (), None),
    ],
)
def test_traffic_counts_inputs_weights_and_outputs_once(
    operator: str, spatial: tuple[int, ...], reduction: tuple[int, ...], expected: int | None
) -> None:
    made = KernelRecord("k", operator, {}, 1e-6, 1000, 1, spatial, reduction)
    assert roofline.traffic(made) == expected


def test_roofline_takes_the_newest_peak_and_leaves_out_what_it_does_not_know() -> None:
    newer = KernelRecord("peak-fp32-v12", "dense", {}, 1e-5, 3_000_000, 1)
    limits = roofline.roofline([newer, *RECORDS[:2]])
    assert (limits.peak("dense"), limits.peak("dense_int8"), limits.bandwidth) == (
        pytest.approx(3e11),
        pytest.approx(8e11),
        None,
    )
    place = roofline.position(RECORDS[3], limits)
    assert place.bound is None
    assert place.peak_fraction == pytest.approx(231_211_008 / 1.5e-3 / 3e11)
    assert roofline.position(RECORDS[5], limits) == roofline.Position()


def test_a_kernel_is_held_against_the_peak_of_its_own_arithmetic() -> None:
    peaks = [KernelRecord(f"peak-{kind}-v1", f"dense_{kind}", {}, 1e-5, flops, 1) for kind, flops in PEAKS.items()]
    limits = roofline.roofline(peaks)
    for kind, flops in PEAKS.items():
        operator = "conv2d" if kind == "fp32" else f"conv2d_{kind}"
        place = roofline.position(KernelRecord("k", operator, {}, 2e-5, flops, 1), limits)
        assert place.peak_fraction == pytest.approx(0.5)


def test_bandwidth_is_measured_once(tmp_path: Path) -> None:
    profile = replace(load_profile("x86-host"), caches={}, memory_bytes=1 << 27)  # a small array: only the path matters
    store = KernelStore(tmp_path, identity_of(profile))
    first = roofline.measure_bandwidth(profile, store)
    assert 1e8 < first < 1e13
    assert roofline.measure_bandwidth(profile, store) == first
    assert roofline.roofline(store.records()).to_json()["bandwidth"] == first
