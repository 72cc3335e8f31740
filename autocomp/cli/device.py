"""`autocomp device`: which boards are connected, what they reach, and how to set one up."""

from __future__ import annotations

import json
import socket
import tempfile
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import click

from autocomp.cli import tables as terminal
from autocomp.cli.options import Commands, common_options, print_json
from autocomp.errors import UsageError, shown
from autocomp.hardware.profile import Profile, is_address, is_board_key, load_profile
from autocomp.records.precisions import ARITHMETICS

PORT = 9190  # TVM's usual port of a tracker
_TRACKER = click.option(
    "--tracker", metavar="HOST:PORT", help=f"TVM RPC tracker (else the profile's, or port {PORT} here)."
)


@click.group(cls=Commands)
def device() -> None:
    """Boards over a TVM RPC tracker: list, probe, set up."""


@device.command("list")
@_TRACKER
@click.option("--profile", help="Hardware profile whose tracker is meant, and only boards of its key.")
@common_options
def list_boards(tracker: str | None, profile: str | None, as_json: bool) -> None:
    """List the boards registered at a tracker, and how many of each key are free."""
    from autocomp.devices.boards import registered

    stated = load_profile(profile).rpc if profile else None
    address = _address(tracker or (stated.tracker if stated else f"127.0.0.1:{PORT}"))
    known = registered(address)
    boards = known.of(stated.key) if stated else known.boards
    if as_json:
        keys = sorted({board.key for board in boards})
        free = {key: {"free": known.free.get(key, 0), "waiting": known.waiting.get(key, 0)} for key in keys}
        print_json(json.dumps({"tracker": address, "boards": [asdict(board) for board in boards], "keys": free}))
    elif not boards:
        what = f"no board of key {stated.key!r}" if stated else "no board"
        click.echo(f"{what} is registered at {address}: `autocomp device setup` prints the commands that register one")
    else:
        counts = {key: sum(board.key == key for board in boards) for key in known.free}
        rows = [
            [board.key, board.address, f"{known.free.get(board.key, 0)} of {counts.get(board.key, 1)}"]
            for board in boards
        ]
        terminal.show_table(["key", "board", ">free of its key"], rows)


@device.command()
@click.option("--profile", required=True, help="Hardware profile with `rpc`, or its YAML file.")
@_TRACKER
@click.option("--key", help="Key of the boards, where it is not the profile's.")
@common_options
def probe(profile: str, tracker: str | None, key: str | None, as_json: bool) -> None:
    """Measure a free board's arithmetic peaks and memory bandwidth, and what of the profile it lacks."""
    from autocomp.devices.probe import probe as measure

    stated = _with_rpc(load_profile(profile), tracker, key)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(stated, Path(folder), progress=lambda what: click.echo(f"{what} ...", err=True))
    facts = found.facts
    if as_json:
        data = asdict(found)
        data["facts"]["features"] = None if facts.features is None else sorted(facts.features)
        print_json(json.dumps(data))
        return
    rows = [["board", " ".join(filter(None, [facts.model, f"at {facts.address}"]))]]
    if facts.clock_hz and facts.full_clock_hz:
        rows.append(["clock", f"{facts.clock_hz / 1e9:.2f} of {facts.full_clock_hz / 1e9:.2f} GHz"])
    if facts.celsius:
        rows.append(["temperature", f"{facts.celsius:.0f} °C"])
    rows.append(["precisions", ", ".join(found.precisions)])
    for name, rate in found.peaks.items():
        share = _share(rate, stated, name)
        rows.append([f"{name} peak, one core", f"{rate / 1e9:.1f} Gop/s{share}"])
    if found.bandwidth:
        published = stated.memory_bandwidth.get("read")
        beside = f" (the profile says {published / 1e9:.1f})" if published else ""
        rows.append(["memory, read", f"{found.bandwidth / 1e9:.2f} GB/s{beside}"])
    terminal.show_table(["what", "measured"], rows)
    for note in found.notes:
        click.echo(f"note: {note}")


@device.command()
@_TRACKER
@click.option("--key", default="pi5", show_default=True, help="Name under which boards of this kind register.")
@common_options
def setup(tracker: str | None, key: str, as_json: bool) -> None:
    """Print the commands that set up a board, a tracker, and a profile that uses them."""
    steps = setup_steps(_address(tracker or f"{socket.gethostname()}:{PORT}"), _key(key))
    if as_json:
        print_json(json.dumps(steps))
        return
    for title, lines in steps.items():
        click.echo(f"# {title}")
        click.echo("\n".join(lines) + "\n")


def setup_steps(tracker: str, key: str) -> dict[str, list[str]]:
    """The commands of each place by its title, for a tracker at host:port and boards of one key."""
    port = tracker.rpartition(":")[2]
    pins = [f"{name}=={_version(name)}" for name in ("apache-tvm", "apache-tvm-ffi")]
    venv = "~/autocomp-board"
    library = 'import pathlib, tvm; print(pathlib.Path(tvm.__file__).parent / "lib" / "libtvm_runtime_extra.so")'
    server = f'{venv}/bin/python -m tvm.exec.rpc_server --tracker {tracker} --key {key} --load-library "$library"'
    return {
        "on this machine, once": ["pip install 'autocomp[boards,linker]'"],
        "on this machine, as long as boards are used: the tracker (anyone who reaches its port can use the boards)": [
            f"python -m tvm.exec.rpc_tracker --host 0.0.0.0 --port {port}",
        ],
        "on the board (64-bit Linux), once: the same versions as here; it runs the runtime alone": [
            "sudo apt-get install -y python3-venv",
            f"python3 -m venv {venv}",
            f"{venv}/bin/pip install {' '.join(pins)} psutil cloudpickle",
        ],
        "on the board, after each start: full clock, and a server on one big core that comes back when a kernel crashes it": [
            "echo performance | sudo tee /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor",
            "export TVM_USE_RUNTIME_LIB=1",
            f"library=$({venv}/bin/python -c '{library}')",
            f"while true; do taskset -c $(($(nproc) - 1)) {server}; sleep 1; done",
        ],
        "on this machine: is it there, and what does it reach?": [
            f"autocomp device list --tracker {tracker}",
            f"autocomp device probe --profile cortex-a76 --tracker {tracker} --key {key}",
        ],
        "in a copy of hardware_profiles/cortex-a76.yaml: measure every candidate on the board": [
            "reach: rpc",
            f'rpc: {{tracker: "{tracker}", key: {key}}}',
        ],
    }


def _with_rpc(profile: Profile, tracker: str | None, key: str | None) -> Profile:
    from dataclasses import replace

    from autocomp.hardware.profile import Rpc

    stated = profile.rpc
    if stated is None and (tracker is None or key is None):
        raise UsageError(f"profile {profile.name!r} states no board (rpc): give --tracker HOST:PORT and --key KEY")
    rpc = Rpc(
        _address(tracker) if tracker else stated.tracker if stated else "",
        _key(key) if key else (stated.key if stated else ""),
    )
    return replace(profile, rpc=rpc)


def _address(text: str) -> str:
    if not is_address(text):
        raise UsageError(f"--tracker must be HOST:PORT (192.168.1.10:{PORT}), got {shown(text)}")
    return text


def _key(text: str) -> str:
    if not is_board_key(text):  # it is printed into commands and YAML, and sent to trackers
        raise UsageError(f"--key must be letters, digits and . _ - (pi5), 64 at most, got {shown(text)}")
    return text


def _share(rate: float, profile: Profile, name: str) -> str:
    """Of what the instruction set allows at the stated clock: two vector units of 128 bits, as every Cortex-A76 has."""
    if profile.core != "cortex-a76" or not profile.clock_hz:
        return ""
    most = 2 * 2 * 128 // ARITHMETICS[name].bits * profile.clock_hz  # a multiply-add is two operations
    return f", {rate / most:.0%} of {most / 1e9:.1f}"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        raise UsageError(
            f"{name} is not installed here, so its version is unknown: install autocomp with pip"
        ) from None
