"""Boards over RPC, with a real tracker and real servers on this machine, and everything that can go wrong with them."""

from __future__ import annotations

import json
import multiprocessing
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import boards
import numpy as np
import pytest
import tiny_task
import torch
from boards import Servers

from autocomp.cli.main import main
from autocomp.devices.boards import Limits, Session, boards_of, registered
from autocomp.devices.features import BoardFacts, fit_to_board
from autocomp.devices.open import open_device
from autocomp.devices.rpc import RemoteModel, RpcDevice, RpcTimer, _describe, _Timed, board_of, on_a_board
from autocomp.errors import AutocompError, BoardError, MismatchError, UsageError
from autocomp.hardware.profile import Profile, Rpc, load_profile
from autocomp.processes.shared import attempt_shared
from autocomp.tuning.store import KernelStore
from autocomp.tuning.timers import Job, Timer
from autocomp.tuning.tune import Tuner

LIMITS = Limits(trial=20, module=30, wait=20)
IMPATIENT = Limits(trial=1, module=1, wait=20)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """Two boards of one key, one that tests may hurt, and two that start meanwhile, of which one will be killed."""
    with boards.tracked(tmp_path_factory.mktemp("boards"), 9600) as made:
        for key, port in (("hut", 9700), ("hut", 9702), ("frail", 9704)):
            made.start(key, port)
        made.wait("hut", 2)
        made.wait("frail", 1)
        for port in (9706, 9708):
            made.start("doomed", port)
        yield made


@pytest.fixture(scope="module")
def profile(servers: Servers) -> Profile:
    return boards.this_machine(servers.logs, servers.tracker, "hut")


@pytest.fixture(scope="module")
def device(profile: Profile, tmp_path_factory: pytest.TempPathFactory) -> RpcDevice:
    device = open_device(profile, KernelStore.open(profile, tmp_path_factory.mktemp("store")))
    assert isinstance(device, RpcDevice)
    device.limits = LIMITS
    return device


@pytest.fixture
def frail(servers: Servers) -> Profile:
    """A board that is started anew where the test before has brought it down."""
    if servers.processes[9704].poll() is not None:
        servers.kill(9704)
        servers.start("frail", 9704)
    servers.wait("frail", 1)
    return boards.this_machine(servers.logs, servers.tracker, "frail")


def calling(name: str, *arguments: Any) -> Any:
    """A PrimFunc of one output that calls a function of the C library."""
    from tvm import te, tirx

    made = te.compute((1,), lambda _: tirx.call_extern("int32", name, *arguments), name="answer")
    return te.create_prim_func([made])


def time_each(timer: Timer, functions: list[Any]) -> list[tuple[float | None, str]]:
    return timer.attempt([Job(function, partial(as_it_is, function)) for function in functions])


def as_it_is(function: Any) -> Any:
    return function


def test_a_module_is_checked_and_timed_on_the_board(servers: Servers, device: RpcDevice) -> None:
    model, inputs = tiny_task.model(), [(tiny_task.data(1, seed)[0],) for seed in range(3)]
    compiled = device.compile(model, inputs)
    assert device.tuner.trials > 0
    assert device.tuner.timer.how == "measured"
    latency = device.time(compiled, inputs[0])
    assert latency.how == "measured"
    assert latency.seconds > 0
    assert len(latency.samples) == 20
    assert "at 127.0.0.1:97" in latency.device
    assert {kernel.how for kernel in latency.kernels} == {"measured"}
    path = compiled.save(device.store.folder / "model.so")
    outputs = RemoteModel.load(path, device.profile, LIMITS).run(*inputs[0])
    assert isinstance(outputs, torch.Tensor)
    assert torch.allclose(outputs, model(*inputs[0]), atol=1e-3)
    end = time.monotonic() + 10
    while registered(servers.tracker).free["hut"] < 2:
        assert time.monotonic() < end, "a session was left open"
        time.sleep(0.05)


def test_boards_work_side_by_side(profile: Profile) -> None:
    """Each of two jobs waits for the other while it holds a board: one after the other, neither would end."""
    meeting = multiprocessing.get_context("fork").Barrier(2)

    def job(_item: int) -> str:
        assert profile.rpc is not None
        session = Session(profile.rpc, 30, 20)
        meeting.wait(20)
        return session.address

    answers = attempt_shared([0, 1], job, 2, 40)
    assert [failure for _, failure in answers] == ["", ""]
    assert len({address for address, _ in answers}) == 2


def test_more_kernels_than_boards(profile: Profile) -> None:
    assert all(seconds for seconds, _ in time_each(RpcTimer(profile, LIMITS), [calling("getpid")] * 5))


def test_no_tracker() -> None:
    with pytest.raises(UsageError, match=r"no TVM RPC tracker answers at 127\.0\.0\.1:9599 .*rpc_tracker --host"):
        boards_of(Rpc("127.0.0.1:9599", "hut"))


def test_something_else_than_a_tracker() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:

        def greet() -> None:
            connection, _ = other.accept()
            with connection:
                connection.recv(4)
                connection.sendall(b"HTTP/1.0 400\r\n\r\n")

        threading.Thread(target=greet, daemon=True).start()
        with pytest.raises(UsageError, match="what answers there is no tracker"):
            boards_of(Rpc(f"127.0.0.1:{other.getsockname()[1]}", "hut"))


def test_wrong_key(profile: Profile) -> None:
    assert profile.rpc is not None
    wrong = replace(profile, rpc=Rpc(profile.rpc.tracker, "hutt"))
    with pytest.raises(UsageError, match=r"no board of key 'hutt' .*Did you mean 'hut'\? .*hut \(2\)"):
        open_device(wrong)


def test_no_board_stated() -> None:
    assert board_of(load_profile("cortex-a76")) is None
    with pytest.raises(UsageError, match="'cortex-a76' states no board"):
        RpcDevice(load_profile("cortex-a76"))


def test_what_does_not_build_fails_alone(profile: Profile) -> None:
    def refused() -> Any:
        raise ValueError("no such tile")

    function = calling("getpid")
    good, bad = Job(function, partial(as_it_is, function)), Job(function, refused)
    answers = RpcTimer(profile, LIMITS).attempt([good, bad, good])
    assert [failure for _, failure in answers] == ["", "no such tile", ""]
    assert answers[0][0] is not None
    assert answers[2][0] is not None


def test_a_kernel_that_hangs(servers: Servers, frail: Profile) -> None:
    """Its trial fails after two tries; the server ends the session, and the board serves the next kernel."""
    answers = time_each(RpcTimer(frail, IMPATIENT), [calling("pause"), calling("getpid")])
    assert answers[0][0] is None
    assert answers[0][1]
    assert answers[1][0], answers


def test_a_kernel_that_crashes(servers: Servers, frail: Profile) -> None:
    """A crash ends TVM's server too; the trial fails, and what comes after says that the board is gone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("autocomp.devices.boards._RESTART", 0.5)
        answers = time_each(RpcTimer(frail, LIMITS), [calling("abort"), calling("getpid")])
    assert [seconds for seconds, _ in answers] == [None, None]
    assert "on board 127.0.0.1:9704" in answers[0][1] or "no board of key 'frail'" in answers[0][1]
    assert "no board of key 'frail' (rpc.key) is registered" in answers[1][1]


def test_a_server_killed_in_mid_measurement(servers: Servers, tmp_path: Path) -> None:
    """The job is done again on the other board of the key."""
    servers.wait("doomed", 2)
    address = tmp_path / "address"

    def job(session: Session) -> str:
        first = not address.exists()
        address.write_text(session.address)
        if first:
            usleep = calling("usleep", 4_000_000)
            load(session, usleep)["main"](session.array(np.zeros(1, "int32")))
        return session.address

    def kill() -> None:
        while not address.exists() or not address.read_text():
            time.sleep(0.02)
        time.sleep(0.3)
        servers.kill(int(address.read_text().rpartition(":")[2]))

    killer = threading.Thread(target=kill)
    killer.start()
    served_by = on_a_board(Rpc(servers.tracker, "doomed"), job, LIMITS)
    killer.join()
    (left,) = [port for port in (9706, 9708) if port in servers.processes]
    assert served_by == f"127.0.0.1:{left}"


def load(session: Session, function: Any) -> Any:
    import tvm

    from autocomp.devices.boards import temporary_library
    from autocomp.hardware import host

    module = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
    target = host.detect_target()
    return session.load(temporary_library(tvm.compile(module, tvm.target.Target(target)), target))


def test_a_board_that_is_gone_before_a_module_runs(servers: Servers) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("autocomp.devices.boards._RESTART", 0.2)
        with pytest.raises(BoardError, match="no board of key 'nobody'"):
            on_a_board(Rpc(servers.tracker, "nobody"), lambda session: session.address, LIMITS)


def test_wrong_results_are_an_error_that_names_the_layer(device: RpcDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    from autocomp.compiler import build

    right: Callable[..., Any] = build.schedule

    def wrong(model: torch.nn.Module, *arguments: Any) -> Any:
        import copy

        broken = copy.deepcopy(model)
        with torch.no_grad():
            broken.get_submodule("model.conv2" if hasattr(broken, "model") else "conv2").weight[0] *= 1.5
        return right(broken, *arguments)

    monkeypatch.setattr(build, "schedule", wrong)
    with pytest.raises(MismatchError, match="the first layer that differs is 'conv2'"):
        device.compile(tiny_task.model(), [(tiny_task.data(1, 0)[0],)])


def test_a_damaged_module_is_the_boards_error(profile: Profile, tmp_path: Path) -> None:
    path = tmp_path / "model.so"
    path.write_bytes(b"not a library")
    with pytest.raises(BoardError, match=r"on board 127\.0\.0\.1:"):
        RemoteModel.load(path, profile, LIMITS).run(torch.zeros(1))
    with pytest.raises(UsageError, match="No such file"):
        RemoteModel.load(tmp_path / "none.so", profile)


def test_a_board_that_slows_down_says_so() -> None:
    profile = replace(load_profile("cortex-a76"), reach="rpc", rpc=Rpc("a:1", "pi5"))
    cool = _describe(profile, _Timed((1.0,), "10.0.0.2:9090", 2.4e9, 2.4e9))
    assert cool == "cortex-a76 at 10.0.0.2:9090, 1 thread"
    hot = _describe(profile, _Timed((1.0,), "10.0.0.2:9090", 1.5e9, 2.4e9))
    assert "slowed down to 1.50 of 2.40 GHz" in hot


@pytest.mark.parametrize(
    ("features", "precisions", "int8", "notes"),
    [
        ({"fullfp16", "dotprod"}, ("fp32", "fp16", "w8a8", "w8", "w4"), "sdot", 0),
        ({"dotprod"}, ("fp32", "w8a8", "w8", "w4"), "sdot", 1),
        ({"fullfp16"}, ("fp32", "fp16", "w8", "w4"), "none", 1),
        (set(), ("fp32", "w8", "w4"), "none", 2),
    ],
)
def test_what_a_board_lacks_is_withdrawn(
    features: set[str], precisions: tuple[str, ...], int8: str, notes: int
) -> None:
    profile = load_profile("cortex-a76")
    fitted, said = fit_to_board(profile, BoardFacts("pi:9090", features=frozenset(features)))
    assert (fitted.precisions, fitted.int8, len(said)) == (precisions, int8, notes)
    assert all("pi:9090" in note and "withdrawn" in note for note in said)
    from autocomp.hardware import host

    for feature in ("fullfp16", "dotprod"):
        assert host.has_feature(fitted.target, feature) == (feature in features)
    assert (fitted == profile) == (not said)


def test_listing(servers: Servers, profile: Profile, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["device", "list", "--tracker", servers.tracker]) == 0
    assert "127.0.0.1:9700" in capsys.readouterr().out
    own = str(servers.logs / "hut.yaml")
    assert main(["device", "list", "--profile", own, "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [board["key"] for board in listed["boards"]] == ["hut", "hut"]
    assert listed["keys"]["hut"]["waiting"] == 0
    assert main(["device", "list", "--tracker", "127.0.0.1:9599"]) == 2
    assert "no TVM RPC tracker answers" in capsys.readouterr().err
    assert main(["device", "list", "--tracker", "board"]) == 2
    assert "--tracker must be HOST:PORT" in capsys.readouterr().err


def test_probing(servers: Servers, profile: Profile, capsys: pytest.CaptureFixture[str]) -> None:
    own = str(servers.logs / "hut.yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(Tuner.__init__.__kwdefaults__, "budget", 2)
        assert main(["device", "probe", "--profile", own, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["peaks"]) >= {"fp32"}
    assert min(found["peaks"].values()) > 1e9, "operations a second"
    assert found["bandwidth"] > 1e8, "bytes a second"
    assert found["notes"] == []
    assert main(["device", "probe", "--profile", "cortex-a76"]) == 2
    assert "states no board (rpc): give --tracker HOST:PORT and --key KEY" in capsys.readouterr().err


def test_setting_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["device", "setup", "--tracker", "10.0.0.5:9191", "--key", "shed"]) == 0
    printed = capsys.readouterr().out
    for words in (f"apache-tvm-ffi=={version('apache-tvm-ffi')}", "--load-library", "--key shed", "--port 9191"):
        assert words in printed
    assert main(["device", "setup", "--json"]) == 0
    for line in (line for lines in json.loads(capsys.readouterr().out).values() for line in lines):
        if not line.startswith(("how:", "rpc:")):
            assert subprocess.run(["bash", "-n", "-c", line], capture_output=True, check=False).returncode == 0, line


def test_errors_are_of_this_project() -> None:
    assert issubclass(BoardError, AutocompError)
    assert BoardError.exit_code == 1
