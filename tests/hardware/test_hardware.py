"""Profiles: shipped ones, users' files, and what is read off processors that are not this one."""

from __future__ import annotations

from pathlib import Path

import pytest

from autocomp.config.shipped import shipped_files
from autocomp.errors import UsageError
from autocomp.hardware import host
from autocomp.hardware.profile import Profile, list_profiles, load_profile, profile_schema

BASE = "fpu lm cx16 lahf_lm popcnt pni sse4_1 sse4_2 ssse3"
AVX2 = f"{BASE} avx avx2 bmi1 bmi2 f16c fma abm movbe xsave"
AVX512 = f"{AVX2} avx512f avx512bw avx512cd avx512dq avx512vl"


def cpu(flags: str, model: str = "Test CPU") -> host.Cpu:
    return host.parse_cpuinfo(f"processor\t: 0\nmodel name\t: {model}\nflags\t\t: {flags}\n\nprocessor\t: 1\n")


@pytest.mark.parametrize(
    ("flags", "level", "lanes", "registers", "int8"),
    [
        (f"{AVX512} avx512_vnni avx_vnni", "x86-64-v4", 16, 32, "vnni512"),  # Zen 5, Sapphire Rapids
        (AVX512, "x86-64-v4", 16, 32, "none"),  # Skylake-X
        (f"{AVX2} avx_vnni", "x86-64-v3", 8, 16, "vnni256"),  # Alder Lake
        (AVX2, "x86-64-v3", 8, 16, "none"),  # Haswell, Zen 2
        (f"{AVX2} avx512f", "x86-64-v3", 8, 16, "none"),  # Knights Landing: no 256-bit AVX-512
        (BASE, "x86-64-v2", 4, 16, "none"),
        ("lm", "x86-64", 4, 16, "none"),
    ],
)
def test_what_flags_mean(flags: str, level: str, lanes: int, registers: int, int8: str) -> None:
    found = cpu(flags)
    assert (found.level, found.lanes, found.vector_registers, found.int8) == (level, lanes, registers, int8)
    assert found.model == "Test CPU"


def test_other_architectures_are_refused() -> None:
    with pytest.raises(UsageError, match="x86-64 family"):
        host.parse_cpuinfo("processor : 0\nFeatures : fp asimd\n")


def test_generic_target_states_sets_beyond_the_level() -> None:
    assert host.generic_target(cpu(AVX2)) == {"kind": "llvm", "mcpu": "x86-64-v3"}
    with_vnni = host.generic_target(cpu(f"{AVX512} avx512_vnni"))
    assert with_vnni == {"kind": "llvm", "mcpu": "x86-64-v4", "mattr": ["+avx512vnni"]}
    assert host.generic_target(cpu(f"{AVX2} avx512f avx_vnni"))["mattr"] == ["+avxvnni"]


def test_generic_targets_ask_for_nothing_that_is_missing() -> None:
    for flags in (AVX512 + " avx512_vnni gfni", AVX2, BASE):
        assert host.missing(host.generic_target(cpu(flags)), cpu(flags)) == []


def test_masked_instruction_sets_are_noticed() -> None:
    """A virtual machine on a Zen 5 may hide AVX-512 while its processor is still named znver5."""
    assert "avx512f" in host.missing({"kind": "llvm", "mcpu": "znver4"}, cpu(AVX2))


def test_detected_target_falls_back_where_the_name_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "this_cpu", lambda: cpu(AVX2))
    monkeypatch.setattr("tvm.target.codegen.llvm_get_system_cpu", lambda: "znver5")
    host.detect_target.cache_clear()
    try:
        assert host.detect_target() == {"kind": "llvm", "mcpu": "x86-64-v3"}
        host.detect_target.cache_clear()
        monkeypatch.setattr("tvm.target.codegen.llvm_get_system_cpu", lambda: "haswell")
        assert host.detect_target() == {"kind": "llvm", "mcpu": "haswell"}
    finally:
        host.detect_target.cache_clear()


def test_every_shipped_profile_loads() -> None:
    names = list_profiles()
    assert {"x86-host", "x86-64-v3", "cortex-a76", "rk3588"} <= set(names)
    profiles = [load_profile(name) for name in names]
    assert [profile.name for profile in profiles] == names
    assert len({profile.fingerprint for profile in profiles}) == len(names)


def test_host_profile_runs_what_it_says() -> None:
    profile = load_profile("x86-host")
    assert profile.reach == "local"
    assert host.missing({k: v for k, v in profile.target.items() if k != "num-cores"}, host.this_cpu()) == []
    assert profile.lanes == host.this_cpu().lanes
    assert profile.target["num-cores"] == 1


STATED = """
format_version: 1
name: mine
reach: estimate
core: cortex-a76
target: {kind: llvm, mcpu: haswell}
lanes: 8
vector_registers: 16
precisions: [fp32]
int8: none
clock_hz: 3.0e+9
caches: {l1d: 32768, l2: 262144}
cache_ways: {l1d: 8}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


def test_own_file(tmp_path: Path) -> None:
    profile = load_profile(write(tmp_path, STATED))
    assert isinstance(profile, Profile)
    assert profile.precisions == ("fp32",)
    assert profile.device == ""
    renamed = load_profile(write(tmp_path, STATED.replace("mine", "other")))
    assert renamed.fingerprint == profile.fingerprint
    assert profile.cache_ways == {"l1d": 8}
    assert (profile.memory_bandwidth, profile.power, profile.rpc) == ({}, {}, None)
    wider = load_profile(write(tmp_path, STATED.replace("lanes: 8", "lanes: 4")))
    assert wider.fingerprint != profile.fingerprint
    faster = load_profile(write(tmp_path, STATED.replace("3.0e+9", "3.5e+9")))
    assert faster.fingerprint != profile.fingerprint, "an estimate depends on the clock"


def test_what_an_inference_draws(tmp_path: Path) -> None:
    def watts(text: str) -> float | None:
        return load_profile(write(tmp_path, STATED + text)).watts

    assert watts("") is None
    assert watts("power: {load: 8.5}\n") is None
    assert watts("power: {idle: 2.5, load: 8.5}\n") == 6.0
    assert watts("power: {idle: 2.5, load: 8.5, cores: 4}\n") == 1.5
    assert watts("power: {idle: 9.0, load: 8.5}\n") == 0.0
    assert load_profile("cortex-a76").watts == pytest.approx(6.1 / 4)


def test_boards(tmp_path: Path) -> None:
    text = STATED.replace("reach: estimate", 'reach: rpc\nrpc: {tracker: "10.0.0.2:9190", key: pi5}')
    profile = load_profile(write(tmp_path, text + "memory_bandwidth: {copy: 5.27e+9}\npower: {load: 8.5}\n"))
    assert profile.rpc is not None
    assert (profile.rpc.address, profile.rpc.key) == (("10.0.0.2", 9190), "pi5")
    assert (profile.memory_bandwidth, profile.power) == ({"copy": 5.27e9}, {"load": 8.5})
    moved = load_profile(write(tmp_path, text.replace("10.0.0.2", "10.0.0.3")))
    assert moved.fingerprint == profile.fingerprint, "the same boards behind another tracker"
    others = load_profile(write(tmp_path, text.replace("pi5", "rk3588")))
    assert others.fingerprint != profile.fingerprint
    both = load_profile(write(tmp_path, text.replace("reach: rpc", "reach: estimate")))
    assert both.rpc == profile.rpc
    assert both.fingerprint != profile.fingerprint, "estimates and measurements are never mixed"


@pytest.mark.parametrize("name", ["cortex-a76", "rk3588"])
def test_cortex_a76(name: str) -> None:
    profile = load_profile(name)
    assert (profile.reach, profile.core, profile.lanes, profile.vector_registers) == ("estimate", "cortex-a76", 4, 32)
    assert profile.precisions == ("fp32", "fp16", "w8a8", "w8", "w4")
    assert profile.int8 == "sdot"
    assert host.has_feature(profile.target, "dotprod")
    assert profile.clock_hz
    assert 2e9 < profile.clock_hz <= 2.4e9
    assert {level: size // 2**10 for level, size in profile.caches.items() if level != "l3"} == {
        "l1d": 64,
        "l1i": 64,
        "l2": 512,
    }
    assert set(profile.memory_bandwidth) == {"read", "copy"}
    # what the file states beside each figure: where it comes from
    text = shipped_files("hardware_profiles")[name].read_text()
    for key in ("lanes", "precisions", "clock_hz", "caches", "memory_bytes", "memory_bandwidth", "power"):
        before = text[: text.index(f"\n{key}:")].splitlines()
        assert "https://" in before[-1] or "https://" in before[-2], key


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("lanes: 8", "lanse: 8"), ["lanse: there is no such key", "'lanes'"]),
        (("lanes: 8\n", ""), ["must state lanes"]),
        (("lanes: 8", "lanes: '8'"), ["lanes: must be a number"]),
        (("[fp32]", "[fp64]"), ["precisions[0]", "'fp64'"]),
        (("int8: none", "int8: vnni"), ["int8", "'vnni'"]),
        (("format_version: 1", "format_version: 2"), ["format_version"]),
        (("reach: estimate", "reach: guess"), ["reach", "'guess'"]),
        (("{kind: llvm, mcpu: haswell}", "llvm"), ["target: must be `detect`"]),
        (("{kind: llvm, mcpu: haswell}", "detect"), ["reach: local"]),
        (("mcpu: haswell", "mcpu: hazwell"), ["no processor 'hazwell'"]),
        (("core: cortex-a76\n", ""), ["must state core where reach is estimate"]),
        (("clock_hz: 3.0e+9", "clock_hz: 3.0"), ["clock_hz: must be greater than or equal to 1000000, got 3.0"]),
        (("clock_hz: 3.0e+9\n", ""), ["must state clock_hz where reach is estimate"]),
        ((", l2: 262144", ""), ["must state caches.l2 where reach is estimate"]),
        (("l2: 262144", "l2: 1000"), ["caches: must be bytes, whole lines of 64: l2 is 1000"]),
        (("l2: 262144", "l4: 262144"), ["caches.l4"]),
        (("{l1d: 8}", "{l1d: 3}"), ["cache_ways.l1d that divides its 512 lines, got 3"]),
        (("{l1d: 8}", "{l3: 8}"), ["must state caches.l3 where cache_ways.l3 is stated"]),
        (("lanes: 8", "lanes: 6"), ["lanes: must be a power of two, got 6"]),
        (("reach: estimate", "reach: rpc"), ["must state rpc"]),
        (
            ("reach: estimate", "reach: local\nrpc: {tracker: 'a:1', key: b}"),
            ["must leave out rpc where reach is local"],
        ),
        (
            ("reach: estimate", "reach: rpc\nrpc: {tracker: board, key: b}"),
            ["rpc.tracker: must be host:port", "'board'"],
        ),
        (("reach: estimate", "reach: rpc\nrpc: {tracker: 'a:99999', key: b}"), ["rpc.tracker: must be host:port"]),
        (("reach: estimate", "reach: rpc\nrpc: {tracker: 'a:9190'}"), ["rpc.key: this key must be given"]),
        (("reach: estimate", "reach: estimate\npower: {idle: -1.0}"), ["power.idle: must be greater than 0, got -1.0"]),
        (
            ("reach: estimate", "reach: estimate\nmemory_bandwidth: {rad: 1.0e+9}"),
            ["memory_bandwidth.rad: there is no"],
        ),
        (("int8: none", "int8: sdot"), ["int8: sdot needs the instruction set dotprod", "'haswell'"]),
        (("[fp32]", "[fp32, fp16]"), ["precisions: fp16 needs the instruction set avx512fp16"]),
    ],
)
def test_files_that_cannot_work(tmp_path: Path, change: tuple[str, str], words: list[str]) -> None:
    path = write(tmp_path, STATED.replace(*change))
    with pytest.raises(UsageError) as caught:
        load_profile(path)
    for word in [str(path), *words]:
        assert word in str(caught.value)


def test_detect_leaves_no_room_for_statements(tmp_path: Path) -> None:
    text = "format_version: 1\nname: x\nhow: local\ntarget: detect\nlanes: 8\n"
    with pytest.raises(UsageError, match="must leave out lanes"):
        load_profile(write(tmp_path, text))


def test_local_profile_for_another_processor_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "this_cpu", lambda: cpu(BASE, "Old CPU"))
    with pytest.raises(UsageError, match=r"'x86-64-v3'.*\(Old CPU\) lacks .*avx2"):
        load_profile("x86-64-v3")


def test_unknown_names_suggest_near_ones() -> None:
    with pytest.raises(UsageError, match=r"unknown hardware profile 'x86-hots'\. Did you mean 'x86-host'\?"):
        load_profile("x86-hots")
    with pytest.raises(UsageError, match=r"there is no file nowhere\.yaml"):
        load_profile("nowhere.yaml")


def test_caches_are_read_in_bytes(tmp_path: Path) -> None:
    for index, values in enumerate([("1", "Data", "48K"), ("1", "Instruction", "32K"), ("3", "Unified", "32M")]):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        for name, value in zip(("level", "type", "size"), values, strict=True):
            (folder / name).write_text(value + "\n")
    (tmp_path / "index9").mkdir()  # a level the system tells nothing of
    assert host.cache_sizes(tmp_path) == {"l1d": 48 * 1024, "l1i": 32 * 1024, "l3": 32 * 1024**2}


def test_schema_is_closed() -> None:
    assert profile_schema()["additionalProperties"] is False


def test_the_old_name_of_reach_is_still_read(tmp_path: Path) -> None:
    old = write(tmp_path, STATED.replace("reach: estimate", "how: estimate"))
    assert load_profile(old).reach == "estimate"
