"""The whole board path on a Cortex-A76, emulated: cross-compiled modules of every precision against torch, and a search.

Run with ``pytest -m board``. Nothing here asserts a time: under emulation times mean nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import boards
import pytest
import tiny_task
import torch
import yaml
from boards import Servers
from emulated_board import MissingPiece, assemble, runtime_library
from torch import nn

import autocomp
from autocomp.cli.main import main
from autocomp.compiler.verify import output_error, reference_outputs, tolerance
from autocomp.compress.scales import activation_parameters, quantised
from autocomp.config.shipped import shipped_files
from autocomp.devices.boards import Limits
from autocomp.devices.features import read_board
from autocomp.devices.open import open_device
from autocomp.devices.rpc import RpcDevice, on_a_board
from autocomp.graph.canonical import canonical
from autocomp.graph.fold import fold_batchnorm
from autocomp.hardware.profile import Profile, load_profile
from autocomp.layers.fp16 import halved
from autocomp.tuning.store import KernelStore
from autocomp.tuning.tune import Tuner

pytestmark = [pytest.mark.board]

ARM64 = 183  # EM_AARCH64, the machine that an ELF file's header names
LIMITS = Limits(trial=60, module=120, wait=60)  # emulated, everything takes some thirty times as long


@pytest.fixture(scope="module", autouse=True)
def short_tuning() -> Iterator[None]:
    """Two tiles a kernel: emulated times say nothing about which is better."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(Tuner.__init__.__kwdefaults__, "budget", 2)
        yield


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """A board of key ``a76``, and one of key ``a72``, which has neither 16-bit arithmetic nor the byte dot product."""
    try:
        board = assemble()
    except MissingPiece as error:
        pytest.fail(str(error))
    python = (str(board / "python"),)
    with boards.tracked(tmp_path_factory.mktemp("boards"), 9800) as made:
        made.start("a76", 9900, python, runtime_library(board))
        made.wait("a76", 1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("BOARD_CPU", "cortex-a72")
            made.start("a72", 9902, python, runtime_library(board))
        yield made


def profile_file(servers: Servers, key: str) -> Path:
    """The shipped profile of the Cortex-A76, reached as a board, in a file of the user's own."""
    text = yaml.safe_load(shipped_files("hardware_profiles")["cortex-a76"].read_text())
    text |= {"reach": "rpc", "rpc": {"tracker": servers.tracker, "key": key}}
    path = servers.logs / f"{key}.yaml"
    path.write_text(yaml.safe_dump(text))
    return path


@pytest.fixture(scope="module")
def device(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> RpcDevice:
    profile = load_profile(profile_file(servers, "a76"))
    opened = open_device(profile, KernelStore.open(profile, tmp_path_factory.mktemp("store")))
    assert isinstance(opened, RpcDevice)
    return opened


def in_fp32(model: nn.Module, _inputs: torch.Tensor) -> nn.Module:
    return model


def in_fp16(model: nn.Module, _inputs: torch.Tensor) -> nn.Module:
    """Every layer but the first in 16 bits."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}
    for name in list(layers)[1:]:
        model.set_submodule(name, halved(layers[name]))
    return model


def in_w8a8(model: nn.Module, inputs: torch.Tensor) -> nn.Module:
    """Every layer but the first in 8 bits, with ranges as these inputs show them."""
    seen: dict[str, tuple[float, float]] = {}
    handles = []
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}
    for name, layer in layers.items():

        def note(_layer: nn.Module, arguments: tuple[torch.Tensor, ...], name: str = name) -> None:
            seen[name] = (float(arguments[0].min()), float(arguments[0].max()))

        handles.append(layer.register_forward_pre_hook(note))
    with torch.no_grad():
        model(inputs)
    for handle in handles:
        handle.remove()
    for name in list(layers)[1:]:
        model.set_submodule(name, quantised(layers[name], *activation_parameters(*seen[name])))
    return model


@pytest.mark.parametrize("convert", [in_fp32, in_fp16, in_w8a8], ids=lambda convert: str(convert.__name__))
def test_modules_compute_what_torch_computes(
    device: RpcDevice, convert: Callable[[nn.Module, torch.Tensor], nn.Module]
) -> None:
    samples = tiny_task.data(4, seed=5)[0]
    model = convert(fold_batchnorm(canonical(tiny_task.model(), (samples[:1],))), samples).eval()
    inputs = [(sample[None],) for sample in samples]
    compiled = device.compile(model, inputs)  # MismatchError if the board differs from torch
    answers = compiled.run_each(inputs)
    errors = [
        output_error(answer, reference_outputs(model, given)) for answer, given in zip(answers, inputs, strict=True)
    ]
    assert max(errors) <= 5 * tolerance(model)
    assert int.from_bytes(compiled.library[18:20], "little") == ARM64, "the code that ran is the board's"
    own = {in_fp32: "", in_fp16: "fp16", in_w8a8: "int8"}[convert]
    assert any(kernel.operator.startswith("conv2d") and kernel.operator.endswith(own) for kernel in compiled.kernels)


def test_the_board_tells_what_it_is(servers: Servers, device: RpcDevice) -> None:
    rpc = device.profile.rpc
    assert rpc is not None
    facts = on_a_board(rpc, lambda session: read_board(session, device.profile), LIMITS)
    assert facts.features == {"fullfp16", "dotprod"}
    assert device.notes == ()
    assert device.profile.precisions == ("fp32", "fp16", "w8a8", "w8", "w4")


def test_probing(servers: Servers, capsys: pytest.CaptureFixture[str]) -> None:
    """Every precision that the profile offers has a kernel that runs, and a figure (which means nothing, emulated)."""
    assert main(["device", "probe", "--profile", str(profile_file(servers, "a76")), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (set(found["peaks"]), found["notes"]) == ({"fp32", "fp16", "int8"}, [])
    assert all(rate > 0 for rate in (*found["peaks"].values(), found["bandwidth"]))
    assert found["facts"]["features"] == ["dotprod", "fullfp16"]


def test_what_an_older_core_lacks_is_withdrawn(servers: Servers) -> None:
    servers.wait("a72", 1)
    profile: Profile = load_profile(profile_file(servers, "a72"))
    older = open_device(profile)
    assert isinstance(older, RpcDevice)
    assert older.profile.precisions == ("fp32", "w8", "w4")
    assert [word in " ".join(older.notes) for word in ("fp16 is withdrawn", "w8a8 is withdrawn")] == [True, True]
    # and what is compiled for it runs there: an instruction it lacks would end the process
    inputs = [(tiny_task.data(1, seed=5)[0],)]
    assert older.compile(tiny_task.model(), inputs).kernels


def test_a_search_through_an_rpc_profile(servers: Servers, tmp_path: Path) -> None:
    space = tmp_path / "space.yaml"
    rules = [{"layers": "*", "keep": [1.0], "ranks": [0.25], "precisions": ["fp32", "w8a8"]}]
    space.write_text(yaml.safe_dump({"format_version": 1, "rules": rules}))
    result = autocomp.search(
        tiny_task.task(),
        profiles=[str(profile_file(servers, "a76"))],
        trials=6,
        measurements=1,
        out=tmp_path / "run",
        space=str(space),
        calibration_samples=32,
        references=False,
    )
    front = json.loads((result.folder / "front.json").read_text())
    assert front["front"]
    for point in result.front:
        (latency,) = point.latency.values()
        assert latency.how == "measured"
        assert "at 127.0.0.1:9900" in latency.device


def test_an_estimated_front_is_measured_where_a_board_is_there(servers: Servers, tmp_path: Path) -> None:
    facts = yaml.safe_load(shipped_files("hardware_profiles")["cortex-a76"].read_text())
    path = tmp_path / "a76-with-board.yaml"
    path.write_text(yaml.safe_dump({**facts, "rpc": {"tracker": servers.tracker, "key": "a76"}}))
    space = tmp_path / "space.yaml"
    rules = [{"layers": "*", "keep": [1.0], "ranks": [], "precisions": ["fp32", "w8a8"]}]
    space.write_text(yaml.safe_dump({"format_version": 1, "rules": rules}))
    result = autocomp.search(
        tiny_task.task(), profiles=[str(path)], trials=4, measurements=1, out=tmp_path / "run", space=str(space),
        calibration_samples=32, references=False,
    )  # fmt: skip
    front = json.loads((result.folder / "front.json").read_text())
    for point in [front["dense"], *front["front"]]:
        evaluation = point["evaluation"]
        (latency,) = evaluation["latency"].values()
        assert latency["how"] == "measured"
        assert "at 127.0.0.1:9900" in latency["device"]
        (estimate,) = evaluation["predicted"].values()
        assert estimate > 0
