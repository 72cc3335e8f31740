"""Models as plain data: written and read back they are the same, and nothing of a file is run."""

from __future__ import annotations

import json
import pickle
import re
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from families import FAMILIES, samples
from families import make as made
from points import EVALUATION
from safetensors.torch import save_file
from torch import Tensor, nn

from autocomp.errors import UsageError
from autocomp.export.files import export_point, load_model
from autocomp.graph.canonical import canonical
from autocomp.graph.structure import Outputs, describe, rebuild
from autocomp.layers.convolution import Geometry
from autocomp.layers.table import FORMS, make, settings_of

torch.set_num_threads(1)


def again(model: nn.Module, inputs: tuple[Tensor, ...]) -> nn.Module:
    """Through JSON, as a file holds it."""
    structure, tensors = describe(canonical(model, inputs))
    return rebuild(json.loads(json.dumps(structure)), tensors)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_every_family_computes_the_same(name: str) -> None:
    whole, x = made(name), samples(name, 5)
    with torch.no_grad():
        torch.testing.assert_close(again(whole, (x[:2],))(x), whole(x), rtol=0, atol=0)


class Pair(NamedTuple):
    one: Tensor
    two: Tensor


def two_outputs(arrange: Any) -> nn.Module:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Any:
            return arrange(self.a(x), self.b(x))

    return Model().eval()


@pytest.mark.parametrize("arrange", [lambda a, b: (a, [b]), lambda a, b: {"x": a, "y": (b,)}, lambda a, b: Pair(a, b)])
def test_outputs_keep_their_arrangement(arrange: Any) -> None:
    model, x = two_outputs(arrange), torch.randn(2, 4)
    with torch.no_grad():
        expected, actual = model(x), again(model, (x,))(x)
    if isinstance(expected, tuple):
        expected = tuple(expected)
    torch.testing.assert_close(actual, expected)
    assert type(actual) is type(expected)


def test_named_outputs_are_attributes_and_places() -> None:
    outputs = Outputs(logits=torch.ones(1), hidden=None)
    assert outputs.logits is outputs["logits"] is outputs[0]
    with pytest.raises(AttributeError, match="it has logits, hidden"):
        _ = outputs.losses


def test_tied_weights_are_written_once_and_shared_again() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(10, 4)
            self.head = nn.Linear(4, 10, bias=False)
            self.head.weight = self.table.weight

        def forward(self, tokens: Tensor) -> Tensor:
            out: Tensor = self.head(self.table(tokens))
            return out

    model, tokens = Tied().eval(), torch.tensor([[1, 2, 3]])
    structure, tensors = describe(canonical(model, (tokens,)))
    assert sum(t.numel() for t in tensors.values()) == 40
    torch.testing.assert_close(rebuild(structure, tensors)(tokens), model(tokens))


@pytest.mark.parametrize("kind", list(FORMS))
def test_every_kind_of_module_is_made_again(kind: str) -> None:
    form = FORMS[kind]
    module = _example(kind)
    tensors = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
    twin = make(kind, json.loads(json.dumps(settings_of(module))), {n: t.detach() for n, t in tensors.items()})
    assert type(twin) is form.kind
    assert settings_of(twin) == settings_of(module)
    if kind not in ("Recurrence", "Sequential"):
        assert {n: t.dtype for n, t in twin.state_dict().items()} == {
            n: t.dtype for n, t in module.state_dict().items()
        }


def _example(kind: str) -> nn.Module:
    form, plane, row = FORMS[kind], Geometry((1, 1), (0, 0), (1, 1), 1), (1, 1)
    weight = {"Half": torch.ones(4, 8).half(), "Weig": torch.ones(4, 8, dtype=torch.int8)}.get(
        kind[:4], torch.ones(4, 8, dtype=torch.int8)
    )
    tensors = {
        "weight": weight if "Linear" in kind else weight.view(4, 8, *row),
        "bias": torch.zeros(4),
        "scale": torch.ones(4),
        "scales": torch.ones(4, 1),
        "codebook": torch.ones(1, 256, 2),
    }
    settings: dict[str, Any] = {
        "in_features": 8, "out_features": 4, "in_channels": 8, "out_channels": 4, "kernel_size": 1, "num_features": 4,
        "num_embeddings": 5, "embedding_dim": 3, "inv_xs": 1.0, "zp": 3, "geometry": plane, "bits": 8, "group": 8,
        "kernel": (8, 1, 1), "kind": "lstm", "reverse": False, "batch_first": True,
    }  # fmt: skip
    given = {name: settings[name] for name in form.settings if name in settings}
    given |= {name: tensors[name] for name in form.tensors}
    return form.kind(**given, **form.others)


def test_no_file_of_a_point_is_unpickled(device: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval(), torch.randn(1, 3, 8, 8)
    export_point(EVALUATION, model, {"x86-host": device.compile(model, [(x,)])}, [(x,)], tmp_path)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    more = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(load_model(tmp_path)(more), model(more))


def test_what_is_no_model_is_refused_in_one_message(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(UsageError, match="there is no model"):
        load_model(tmp_path)
    (tmp_path / "weights.pt").write_bytes(b"")
    with pytest.raises(UsageError, match="as a pickle"):
        load_model(tmp_path)
    path.write_bytes(b"nothing")
    with pytest.raises(UsageError, match="cannot be read"):
        load_model(tmp_path)
    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(UsageError, match="not the structure of a model"):
        load_model(tmp_path)
    structure, tensors = describe(canonical(nn.Linear(2, 2), (torch.ones(1, 2),)))
    for change, words in (
        ({"format_version": 99}, "a newer one wrote it"),
        (
            {"nodes": [{"name": "x", "op": "call_function", "target": "os.system", "args": [], "kwargs": {}}]},
            "no operation",
        ),
        ({"modules": {"m": {"kind": "Popen", "settings": {}}}}, "no delivered model has a 'Popen'"),
        ({"sizes": None}, "damaged"),
    ):
        save_file(tensors, path, {"autocomp": json.dumps({**structure, **change})})
        with pytest.raises(UsageError, match=words):
            load_model(tmp_path)


class Overlapping(nn.Module):
    """Buffers of one memory: the same, the same in another shape, a part, and none at all."""

    def __init__(self) -> None:
        super().__init__()
        table = torch.arange(12.0)
        self.first = nn.Linear(12, 12)
        self.register_buffer("a", table)
        self.register_buffer("b", table[:])
        self.register_buffer("c", table.reshape(3, 4))
        self.register_buffer("d", table[4:8])
        self.register_buffer("e", table[::3])

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x) * self.a + self.b
        return y.reshape(-1, 3, 4) * self.c + self.d + self.e


def test_tensors_of_one_memory_are_written_and_read_back(tmp_path: Path) -> None:
    from safetensors.torch import load, save

    model = canonical(Overlapping().eval(), (torch.randn(2, 12),))
    model.a, model.b, model.d = (table := torch.arange(12.0)), table[:], table[4:8]  # as folded constants may lie
    structure, tensors = describe(model)
    again = rebuild(json.loads(json.dumps(structure)), load(save(tensors)))
    x = torch.randn(5, 12)
    assert torch.equal(again(x), model(x))
    assert structure["aliases"] == {"b": "a"}, "the same tensor is written once"


@pytest.mark.parametrize(
    "arrange",
    [
        lambda a, b: {1: a, 0: b},
        lambda a, b: {-1: a, 0: b},
        lambda a, b: {"0": a, 0: b},
        lambda a, b: {True: a, 2.5: b},
        lambda a, b: {None: a, "x": b},
        lambda a, b: OrderedDict([(1, a), (0, b)]),
        lambda a, b: OrderedDict([("x", a), ("y", b)]),
        lambda a, b: defaultdict(list, {1: a, 0: b}),
    ],
)
def test_outputs_keep_their_keys(arrange: Any) -> None:
    model, x = two_outputs(arrange), torch.randn(2, 4)
    with torch.no_grad():
        expected, actual = model(x), again(model, (x,))(x)
    assert list(actual) == list(expected)
    for key, value in expected.items():
        assert torch.equal(actual[key], value), key


def test_keys_that_no_file_holds_are_refused() -> None:
    with pytest.raises(TypeError, match=re.escape("the outputs have the key (1, 2)")):
        again(two_outputs(lambda a, b: {(1, 2): a, "x": b}), (torch.randn(2, 4),))
