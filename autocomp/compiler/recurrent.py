"""``autocomp::lstm``, ``autocomp::rnn`` and ``autocomp::lstm_w8a8`` → one loop over time.

``aten.lstm``, ``aten.gru`` and ``aten.rnn_*`` of a model that is read as it is → for each layer and direction one product over all steps and
such a loop; in a canonical model they are these already.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from autocomp.compiler.expressions import shape_of
from autocomp.hardware.profile import Profile
from autocomp.kernels import recurrent, recurrent_int8
from autocomp.kernels.intrinsics import dot_product
from autocomp.kernels.recurrent import RecurrentSpec
from autocomp.kernels.recurrent_int8 import LstmSpec
from autocomp.kernels.templates import stating
from autocomp.records.recurrent import Kind

if TYPE_CHECKING:
    import torch

KINDS: dict[str, Kind] = {
    "lstm.input": "lstm", "gru.input": "gru", "rnn_tanh.input": "rnn_tanh", "rnn_relu.input": "rnn_relu"
}  # fmt: skip


def projected(node: Any) -> bool:
    """Whether an exported recurrent layer projects its states (``proj_size``), for which there is no kernel."""
    parameters, biases, layers, bidirectional = node.args[2], node.args[3], node.args[4], node.args[7]
    result: bool = len(parameters) != layers * (2 if bidirectional else 1) * (4 if biases else 2)
    return result


class _Converter:
    """Weights are parameters of the exported program, or constant expressions of them."""

    def __init__(self, program: torch.export.ExportedProgram, profile: Profile) -> None:
        signature = program.graph_signature
        self.names = {
            **signature.inputs_to_parameters, **signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants
        }  # fmt: skip
        self.state = {**program.state_dict, **program.constants}
        self.profile = profile

    def array(self, node: Any, importer: Any) -> np.ndarray:
        found = importer.folded[node] if node in importer.folded else self.state[self.names[node.name]]
        result: np.ndarray = found.detach().numpy()
        return result

    def loop(
        self, builder: Any, kind: Kind, gates: Any, weight: np.ndarray, bias: np.ndarray | None, states: list[Any],
        reverse: bool, batch_first: bool,
    ) -> list[Any]:  # fmt: skip
        """[outputs, last states...] of one layer in one direction; a state of None is zero."""
        from tvm import relax

        first, second, _ = shape_of(gates) or ()
        batch, steps = (first, second) if batch_first else (second, first)
        width = weight.shape[1]
        lanes, registers = self.profile.lanes, self.profile.vector_registers
        spec = RecurrentSpec.of(kind, steps, batch, width, batch_first, reverse, lanes, registers)
        arguments = [relax.const(spec.pack(weight))]
        added = np.zeros(len(weight), "float32") if bias is None else bias.copy()
        if kind == "lstm":
            function = recurrent.lstm(spec)
        else:
            function = recurrent.simple(spec)
            inner = np.zeros(spec.padded, "float32")
            if kind == "gru":  # the reset gate multiplies this part of the bias
                inner[:width] = added[2 * width :]
                added[2 * width :] = 0
            arguments.append(relax.const(inner))
        return self._call(builder, kind, function, gates, added, spec.padded, width, arguments, states, batch)

    def loop_int8(
        self, builder: Any, gates: Any, weight: np.ndarray, scale: np.ndarray, bias: np.ndarray, inv_xs: float, zero_point: int,
        states: list[Any], reverse: bool, batch_first: bool,
    ) -> list[Any]:  # fmt: skip
        """As `loop`, of an LSTM whose recurrent weight is in 8-bit integers."""
        from tvm import relax

        dot = dot_product(self.profile)
        first, second, _ = shape_of(gates) or ()
        batch, steps = (first, second) if batch_first else (second, first)
        width, registers = weight.shape[1], self.profile.vector_registers
        spec = LstmSpec.of(steps, batch, width, batch_first, reverse, dot, registers)
        stored = zero_point - dot.offset  # of the integers as they are stored
        begin = (-weight.astype("int64").sum(1) * stored).astype("int32")
        packed = [spec.pack(weight), spec.by_block(begin), spec.by_block(scale)]
        arguments = [relax.const(np.ascontiguousarray(value)) for value in packed]
        function = recurrent_int8.lstm(spec, inv_xs, stored)
        return self._call(builder, "lstm_int8", function, gates, bias, spec.padded, width, arguments, states, batch)

    def _call(
        self, builder: Any, name: str, function: Any, gates: Any, bias: np.ndarray, padded: int, width: int, arguments: list[Any],
        states: list[Any], batch: int,
    ) -> list[Any]:  # fmt: skip
        from tvm import relax

        first, second, wide = shape_of(gates) or ()
        if bias.any():
            gates = builder.emit(relax.op.add(gates, relax.const(bias)))
        if padded > width:
            count = wide // width
            split = builder.emit(relax.op.reshape(gates, [first, second, count, width]))
            split = builder.emit(relax.op.nn.pad(split, [0, 0, 0, 0, 0, 0, 0, padded - width]))
            gates = builder.emit(relax.op.reshape(split, [first, second, count * padded]))
        begin = [relax.const(np.zeros((batch, width), "float32")) if state is None else state for state in states]
        # so that a latency model is fitted to loops by their sizes
        steps, template = first * second // batch, "loop_int8" if "int8" in name else "loop"
        function = stating(function, template, (steps, batch, wide // width * padded), (width,))
        called = builder.add_func(function.without_attr("global_symbol"), name)
        shapes = [(first, second, width), *((batch, width) for _ in begin)]
        results = builder.emit(
            relax.call_tir(
                called, [gates, *arguments, *begin], out_ty=[relax.TensorType(shape, "float32") for shape in shapes]
            )
        )
        return [builder.emit(relax.TupleGetItem(results, index)) for index in range(len(shapes))]


class LoopConverter(_Converter):
    """Emit ``autocomp::lstm``, ``autocomp::rnn`` and ``autocomp::lstm_w8a8``."""

    def __call__(self, node: Any, importer: Any) -> Any:
        from tvm import relax

        name, args = str(node.target).removeprefix("autocomp.").partition(".")[0], list(node.args)
        gates, states = importer.env[args[0]], args[1:2] if name == "rnn" else args[1:3]
        begin = [None if state is None else importer.env[state] for state in states]
        rest = args[1 + len(states) :]
        reverse, batch_first = (bool(value) for value in rest[-2:])
        builder = importer.block_builder
        if name == "lstm_w8a8":
            weight, scale, bias = (self.array(value, importer) for value in rest[:3])
            inv_xs, zero_point = float(rest[3]), int(rest[4])
            return relax.Tuple(
                self.loop_int8(builder, gates, weight, scale, bias, inv_xs, zero_point, begin, reverse, batch_first)
            )
        weight = self.array(rest[0], importer)
        added = None if rest[1] is None else self.array(rest[1], importer)
        kind: Kind = "lstm" if name == "lstm" else rest[2]
        return relax.Tuple(self.loop(builder, kind, gates, weight, added, begin, reverse, batch_first))


class RecurrentConverter(_Converter):
    """Emit one kind of recurrent layer, all its layers and directions."""

    def __init__(self, program: torch.export.ExportedProgram, profile: Profile, kind: Kind) -> None:
        super().__init__(program, profile)
        self.kind = kind

    def __call__(self, node: Any, importer: Any) -> Any:
        from tvm import relax

        builder = importer.block_builder
        _, _, parameters, biases, layers, _, _, bidirectional, batch_first = node.args
        arrays = [self.array(parameter, importer) for parameter in parameters]
        value = importer.env[node.args[0]]
        states = node.args[1] if self.kind == "lstm" else [node.args[1]]
        given = [importer.env[state] for state in states]
        each, directions = (4 if biases else 2), (2 if bidirectional else 1)
        last: list[list[Any]] = [[] for _ in given]
        for layer in range(layers):
            outputs = []
            for direction in range(directions):
                index = layer * directions + direction
                own = arrays[index * each : (index + 1) * each]
                gates = builder.emit(relax.op.matmul(value, relax.const(np.ascontiguousarray(own[0].T))))
                if biases:
                    gates = builder.emit(relax.op.add(gates, relax.const(own[2])))
                begin = [self._state(builder, state, index) for state in given]
                layout = direction == 1, bool(batch_first)
                output, *ends = self.loop(builder, self.kind, gates, own[1], own[3] if biases else None, begin, *layout)
                outputs.append(output)
                for kept, end in zip(last, ends, strict=True):
                    kept.append(end)
            value = outputs[0] if directions == 1 else builder.emit(relax.op.concat(outputs, axis=2))
        stacked = [builder.emit(relax.op.stack(ends, axis=0)) for ends in last]
        return relax.Tuple([value, *stacked])

    def _state(self, builder: Any, state: Any, index: int) -> Any:
        """The initial state ``[N, H]`` of one layer and direction."""
        from tvm import relax

        count, batch, hidden = shape_of(state) or ()
        if count > 1:
            state = builder.emit(relax.op.strided_slice(state, [0], [index], [index + 1]))
        return builder.emit(relax.op.reshape(state, [batch, hidden]))
