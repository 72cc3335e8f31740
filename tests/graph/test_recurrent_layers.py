"""Recurrent layers as layers: what is computed, which units go together, 8-bit loops, and the files that are delivered."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from autocomp.compiler.verify import compare
from autocomp.compress.scales import activation_parameters, quantised
from autocomp.database.calibrate import collect_from
from autocomp.database.database import LayerDatabase
from autocomp.database.stitch import stitch
from autocomp.devices.latency import layer_work
from autocomp.export.onnx import export_onnx, onnx_session, run_session
from autocomp.graph.analyse import analyse
from autocomp.graph.canonical import canonical
from autocomp.graph.exporting import exported
from autocomp.graph.graph import balanced
from autocomp.graph.removal import masked, removed, swapped
from autocomp.graph.shapes import resized
from autocomp.hardware.profile import load_profile
from autocomp.kernels import recurrent_int8
from autocomp.kernels.intrinsics import dot_product
from autocomp.kernels.recurrent_int8 import LstmSpec
from autocomp.layers.recurrent import Recurrence, lstm_w8a8, weights_of
from autocomp.layers.w8a8 import QuantLinear
from autocomp.records.candidate import Method
from autocomp.space.build import build_space
from autocomp.space.file import Rule, SpaceFile

torch.set_num_threads(1)

KINDS = {"LSTM": {}, "GRU": {}, "RNN": {}, "RNN relu": {"nonlinearity": "relu"}}


class Tagger(nn.Module):
    """A recurrent layer between two linear ones. Input [N, T, 6] or [T, N, 6]; its last states are read too where ``last``."""

    def __init__(self, kind: str, width: int = 8, last: bool = False, **options: Any) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 10)
        self.rnn = getattr(nn, kind.split()[0])(10, width, **KINDS[kind], **options)
        self.head = nn.Linear(width * (2 if self.rnn.bidirectional else 1), 5)
        self.score = nn.Linear(width, 3) if last else None

    def forward(self, x: Tensor, *states: Tensor) -> Any:
        y, ends = self.rnn(self.stem(x).relu(), None if not states else states if len(states) > 1 else states[0])
        if self.score is None:
            return self.head(y)
        h = ends[0] if isinstance(ends, tuple) else ends
        return self.head(y), self.score(h[-1])


shapes = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(list(KINDS)),
        "num_layers": st.integers(1, 3),
        "bidirectional": st.booleans(),
        "batch_first": st.booleans(),
        "bias": st.booleans(),
        "last": st.booleans(),
    }
)


def sample(batch: int, steps: int, batch_first: bool) -> Tensor:
    return torch.randn((batch, steps, 6) if batch_first else (steps, batch, 6))


def tensors(output: Any) -> list[Tensor]:
    return list(torch.utils._pytree.tree_leaves(output))


@settings(max_examples=7, deadline=None)
@given(options=shapes, steps=st.integers(1, 6), seed=st.integers(0, 2**31))
def test_values_and_gradients_are_those_of_torch(options: dict[str, Any], steps: int, seed: int) -> None:
    torch.manual_seed(seed)
    model = Tagger(**options).eval()
    form = canonical(model, (sample(3, steps, options["batch_first"]),))
    assert any(isinstance(module, Recurrence) for module in form.modules())
    x = sample(4, steps, options["batch_first"])  # another batch than that of the example
    torch.testing.assert_close(tensors(form(x)), tensors(model(x)), rtol=1e-4, atol=1e-5)
    for made in (form, model):
        sum(value.square().sum() for value in tensors(made(x))).backward()
    for place in ("l0", "l0_reverse")[: 1 + options["bidirectional"]]:
        for ours, theirs in ((f"ih_{place}", f"weight_ih_{place}"), (f"hh_{place}.hidden", f"weight_hh_{place}")):
            expected = getattr(model.rnn, theirs).grad
            actual = form.get_submodule(f"rnn.{ours}").weight.grad
            torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)


@settings(max_examples=5, deadline=None)
@given(options=shapes, steps=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_units_that_are_ignored_can_be_removed(options: dict[str, Any], steps: int, seed: int) -> None:
    """Every hidden width is a group; without some units the model computes what it does when nothing reads them."""
    torch.manual_seed(seed)
    model = Tagger(**options)
    inputs = (sample(2, steps, options["batch_first"]),)
    graph = analyse(model, inputs)
    form = canonical(model, inputs)
    loops = {name: module for name, module in form.named_modules() if isinstance(module, Recurrence)}
    assert len(loops) == options["num_layers"] * (1 + options["bidirectional"])
    for name, loop in loops.items():
        layer = graph.layers[f"{name}.hidden"]
        group = graph.groups[layer.out_group or ""]
        assert group.prunable, group.reason
        assert layer.in_group == layer.out_group == graph.layers[loop.projection].out_group
        kept = balanced(group, 3, torch.Generator().manual_seed(seed))
        with torch.no_grad():
            with swapped(form, masked(form, group, kept)):
                expected = tensors(form(*inputs))
            with swapped(form, removed(form, group, kept)):
                assert form.get_submodule(f"{name}.hidden").in_features < 8
                actual = tensors(form(*inputs))
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_the_last_layers_state_does_not_tie_the_layers() -> None:
    graph = analyse(Tagger("GRU", num_layers=3, last=True), (sample(2, 4, False),))
    assert [name for name in graph.groups if name.startswith("rnn")] == [f"rnn.ih_l{i}" for i in range(3)]


def test_states_from_outside_keep_their_width() -> None:
    model = Tagger("LSTM", batch_first=True)
    graph = analyse(model, (sample(2, 4, True), torch.randn(1, 2, 8), torch.randn(1, 2, 8)))
    group = graph.groups["rnn.ih_l0"]
    assert not group.prunable
    assert "states" in group.reason


def test_a_learned_first_state_goes_with_its_units() -> None:
    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.GRU(6, 8, batch_first=True), nn.Linear(8, 2)
            self.first = nn.Parameter(torch.randn(1, 1, 8))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x, self.first.expand(-1, x.shape[0], -1))[0])

    graph = analyse(Learned(), (sample(2, 4, True),))
    group = graph.groups["rnn.ih_l0"]
    assert group.prunable, group.reason
    assert [slab.path for slab in group.slabs] == ["first"]


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
def test_a_cell_is_two_linear_layers(kind: str) -> None:
    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = getattr(nn, kind)(6, 8)

        def forward(self, x: Tensor, *states: Tensor) -> Any:
            return self.cell(x, states if len(states) > 1 else states[0])

    inputs = (torch.randn(3, 6), *(torch.randn(3, 8) for _ in range(2 if kind == "LSTMCell" else 1)))
    model = Step().eval()
    assert set(analyse(model, inputs).layers) == {"cell.ih", "cell.hh"}
    torch.testing.assert_close(tensors(canonical(model, inputs)(*inputs)), tensors(model(*inputs)))


def test_exporting_does_not_follow_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    before, calls = FakeTensorMode._dispatch_impl, []

    def counted(self: Any, func: Any, *rest: Any) -> Any:
        calls.append(func)
        return before(self, func, *rest)

    monkeypatch.setattr(FakeTensorMode, "_dispatch_impl", counted)
    kernels = dict(torch.ops.aten.lstm.input.py_kernels)
    model = Tagger("LSTM", num_layers=2, bidirectional=True).eval()
    for free in (None, [{1: torch.export.Dim.AUTO}]):
        program = exported(model, (sample(2, 200, False),), free)
        assert any(node.target is torch.ops.aten.lstm.input for node in program.graph.nodes)
    assert 0 < len(calls) < 400
    assert torch.ops.aten.lstm.input.py_kernels == kernels


# --- eight bits -----------------------------------------------------------------------------------------------------------------------


def test_eight_bits_stay_near_and_other_forms_are_decoded() -> None:
    from autocomp.layers.fp16 import HalfLinear

    torch.manual_seed(0)
    loop = Recurrence("lstm", 24, True, False, True)
    gates = torch.randn(3, 9, 96)
    with torch.no_grad():
        exact = loop(gates)[0]
        layer = loop.hidden
        assert isinstance(layer, nn.Linear)
        assert layer.bias is not None
        loop.hidden = quantised(layer, *activation_parameters(-1.0, 1.0))
        near = loop(gates)[0]
        loop.hidden = HalfLinear(layer.weight.detach().half(), layer.bias.detach())
        half = loop(gates)[0]
    assert 0 < float((near - exact).abs().max()) < 0.02
    assert 0 < float((half - exact).abs().max()) < 1e-3
    with pytest.raises(TypeError, match="Identity"):
        weights_of(nn.Identity())


@pytest.mark.parametrize(("hidden", "reverse", "batch_first"), [(24, False, True), (17, True, False), (64, True, True)])
@pytest.mark.parametrize("profile", ["x86-host", "x86-64-v3"])
def test_the_8_bit_kernel_is_the_specification(hidden: int, reverse: bool, batch_first: bool, profile: str) -> None:
    import tvm

    torch.manual_seed(1)
    target, batch, steps = load_profile(profile), 3, 5
    dot = dot_product(target)
    layer = quantised(nn.Linear(hidden, 4 * hidden), *activation_parameters(-0.7, 0.9))
    gates = torch.randn((batch, steps, 4 * hidden) if batch_first else (steps, batch, 4 * hidden))
    h, c = torch.rand(batch, hidden) - 0.5, torch.randn(batch, hidden)
    expected = lstm_w8a8(
        gates, h, c, layer.weight, layer.scale, layer.bias, layer.inv_xs, layer.zp, reverse, batch_first
    )
    spec = LstmSpec.of(steps, batch, hidden, batch_first, reverse, dot, target.vector_registers)
    zero_point = layer.zp - dot.offset
    function = recurrent_int8.lstm(spec, layer.inv_xs, zero_point).with_attr("global_symbol", "main")
    compiled = tvm.compile(tvm.IRModule({"main": function}), tvm.target.Target(dict(target.target)))["main"]
    weight = layer.weight.numpy()
    begin = (-weight.astype("int64").sum(1) * zero_point).astype("int32")
    split = (gates + layer.bias).numpy().reshape(*gates.shape[:2], 4, hidden)
    padded = np.pad(split, [(0, 0), (0, 0), (0, 0), (0, spec.padded - hidden)]).reshape(*gates.shape[:2], -1)
    arguments = [
        padded, spec.pack(weight), spec.by_block(begin), spec.by_block(layer.scale.numpy()), h.numpy(), c.numpy(),
        *(np.zeros_like(value.numpy()) for value in expected),
    ]  # fmt: skip
    run = [tvm.runtime.tensor(np.ascontiguousarray(argument)) for argument in arguments]
    compiled(*run)
    for actual, wanted in zip(run[-3:], expected, strict=True):
        np.testing.assert_allclose(actual.numpy(), wanted.numpy(), atol=2e-6)


# --- what is delivered ----------------------------------------------------------------------------------------------------------------

ONNX_CASES = {
    "lstm": ("LSTM", {"bidirectional": True, "num_layers": 2, "batch_first": True}, 0),
    "lstm with states": ("LSTM", {"bias": False, "last": True}, 2),
    "gru": ("GRU", {"last": True}, 1),
    "plain": ("RNN relu", {"batch_first": True}, 0),
}


@pytest.mark.parametrize("case", ONNX_CASES)
def test_onnx_has_one_node_for_a_layer_and_direction(case: str, tmp_path: Path) -> None:
    kind, options, states = ONNX_CASES[case]
    model = Tagger(kind, **options).eval()
    count = model.rnn.num_layers * (2 if model.rnn.bidirectional else 1)
    batch_first = options.get("batch_first", False)
    inputs = (sample(2, 5, batch_first), *(torch.randn(count, 2, 8) for _ in range(states)))
    form = canonical(model, inputs)
    path = export_onnx(form, inputs, tmp_path / "model.onnx")
    nodes = [node.op_type for node in onnx.load(path).graph.node]
    assert nodes.count(kind.split()[0]) == count
    assert sum(nodes.count(name) for name in ("MatMul", "Gemm")) == (
        3 if model.score else 2
    )  # those of linear layers alone
    session = onnx_session(path, exact=True)
    compare(model, lambda *arguments: run_session(session, *arguments), [inputs], "model.onnx")


@pytest.mark.parametrize(("name", "node"), [("rnn.ih_l0", "LSTM"), ("rnn.hh_l0.hidden", "Scan")])
def test_what_is_quantised_stays_so_in_onnx(name: str, node: str, tmp_path: Path) -> None:
    inputs = (sample(2, 5, True),)
    form = copy.deepcopy(canonical(Tagger("LSTM", batch_first=True), inputs))
    layer = form.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    form.set_submodule(name, quantised(layer, *activation_parameters(-1.0, 4.0)))
    path = export_onnx(form, inputs, tmp_path / "model.onnx")
    graph = onnx.load(path).graph
    assert [n.op_type for n in graph.node].count(node) == 1
    inner = [n.op_type for n in graph.node for a in n.attribute for n in a.g.node]
    assert [*(n.op_type for n in graph.node), *inner].count("QuantizeLinear") == 1
    session = onnx_session(path, exact=True)
    assert (
        compare(form, lambda *arguments: run_session(session, *arguments), [inputs], "model.onnx").errors.worst < 1e-3
    )


def test_a_candidate_of_the_database_compiles_and_survives_a_file(device: Any, tmp_path: Path) -> None:
    """Half the units, all weights in 8 bits: calibrated, stitched, compiled, written, loaded and exported as torch computes it."""
    torch.manual_seed(0)
    inputs = (sample(1, 7, True),)
    form = canonical(Tagger("LSTM", 32, batch_first=True, bidirectional=True), inputs)
    graph = analyse(form, inputs)
    statistics = collect_from(form, [(sample(16, 7, True),) for _ in range(2)], graph)
    rules = SpaceFile(
        format_version=1, ends="any", rules=[Rule(layers="*", keep=[1.0, 0.5], precisions=["fp32", "w8a8"])]
    )
    space = build_space(graph, rules, device.profile)
    candidate = space.uniform(0.5, "w8a8")
    model = stitch(form, graph, LayerDatabase(tmp_path, form, graph, space, statistics), candidate)
    hidden = model.get_submodule("rnn.hh_l0_reverse.hidden")
    assert isinstance(hidden, QuantLinear)
    assert tuple(hidden.weight.shape) == (64, 16)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    loaded = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    with torch.no_grad():
        torch.testing.assert_close(loaded(*inputs), model(*inputs))
    compiled = device.compile(model, [inputs])  # which compares with torch
    assert sum(kernel.operator == "loop_int8" for kernel in compiled.kernels) == 2
    work = layer_work(resized(graph.layers["rnn.hh_l0.hidden"], 16, 64), Method("w8a8"), device.profile)
    records = {(r.operator, r.spatial, r.reduction) for r in device.store.records()}
    assert [(w.template, w.spatial, w.reduction) in records for w in work] == [
        True
    ]  # predicted and measured are one kind
    session = onnx_session(export_onnx(model, inputs, tmp_path / "model.onnx"))
    compare(model, lambda *arguments: run_session(session, *arguments), [inputs], "model.onnx")


def test_what_a_loop_is_offered(device: Any) -> None:
    rule = Rule(layers="*", keep=[1.0], ranks=[0.25], precisions=["fp32", "w8a8", "w8"])
    for kind, eight in (("LSTM", True), ("GRU", False)):
        graph = analyse(Tagger(kind, 64), (sample(2, 4, False),))
        space = build_space(graph, SpaceFile(format_version=1, ends="any", rules=[rule]), device.profile)
        offered = {str(method) for method in space.methods["rnn.hh_l0.hidden"]}
        assert offered == {"fp32", "w8", *(["w8a8"] if eight else [])}
        refused = {r.option: r.reason for r in space.refused if r.subject == "rnn.hh_l0.hidden"}
        assert "whole weight" in refused["rank 0.25"]
