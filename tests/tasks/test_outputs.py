"""What a model's outputs are: what is stated, what is guessed, and how other models are held against them."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from autocomp.errors import UsageError
from autocomp.tasks.divergence import Comparison, compare, total
from autocomp.tasks.guess import describe
from autocomp.tasks.outputs import KINDS, Output, leaves, parse

torch.set_num_threads(1)

Pair = namedtuple("Pair", "scores boxes")


@dataclass
class Answer:
    logits: Tensor
    loss: Tensor | None
    states: tuple[Tensor, ...]


class Gives(nn.Module):
    """A model that answers by a function of its inputs."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def mixed(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def project(x: Tensor, *shape: int) -> Tensor:
    """[N, *shape] that depends on each sample; the middle of each entry of the first axis is its own."""
    rows = x.flatten(1).float()
    count = torch.Size(shape).numel()
    out = (rows @ mixed(rows.shape[1], count) / rows.shape[1] ** 0.5).view(len(x), *shape)
    return out + 2 * mixed(shape[0], *[1] * (len(shape) - 1), seed=1)


IMAGE, TOKENS, FRAMES, TABLE = mixed(20, 3, 8, 8), torch.randint(0, 9, (20, 6)), mixed(20, 40, 12), mixed(20, 10)

GUESSES = {
    "classes": (lambda x: project(x, 7), IMAGE, ["classes@1"]),
    "one column": (lambda x: project(x, 1), IMAGE, ["regression"]),
    "one number": (lambda x: project(x, 1)[:, 0], TABLE, ["regression"]),
    "chance": (lambda x: project(x, 1).sigmoid(), TABLE, ["binary-probabilities"]),
    "chances": (lambda x: project(x, 5).sigmoid(), TABLE, ["binary-probabilities@1"]),
    "softmax": (lambda x: project(x, 5).softmax(1), TABLE, ["probabilities@1"]),
    "log-softmax of pixels": (lambda x: project(x, 5, 8, 8).log_softmax(1), IMAGE, ["classes@1"]),
    "pixels": (lambda x: project(x, 5, 8, 8), IMAGE, ["classes@1"]),
    "pixels, channels last": (lambda x: project(x, 5, 4, 4).movedim(1, -1), IMAGE, ["classes@3"]),
    "1x1 map of classes": (lambda x: project(x, 5, 1, 1), IMAGE, ["classes@1"]),
    "depth": (lambda x: project(x, 1, 8, 8), IMAGE, ["regression"]),
    "depth without an axis": (lambda x: project(x, 8, 8), IMAGE, ["regression"]),
    "mask": (lambda x: project(x, 1, 8, 8).sigmoid(), IMAGE, ["binary-probabilities"]),
    "picture": (lambda x: x * 2 + x.mean((1, 2, 3), keepdim=True), IMAGE, ["regression@1"]),
    "larger picture": (lambda x: nn.functional.interpolate(x, scale_factor=2), IMAGE, ["regression@1"]),
    "tokens": (lambda x: project(x, 6, 11), TOKENS, ["classes@2"]),
    "frames": (lambda x: project(x, 5, 12), FRAMES, ["classes@1"]),
    "voice": (lambda x: project(x, 12).sigmoid(), FRAMES, ["binary-probabilities"]),
    "unit vectors": (lambda x: nn.functional.normalize(project(x, 16), dim=1), IMAGE, ["embedding@1"]),
    "rows side by side": (lambda x: project(x, 6, 11).flatten(0, 1), TOKENS, ["classes@1"]),
    "decision first": (lambda x: (project(x, 7).argmax(1), project(x, 7)), IMAGE, ["ignored", "classes@1"]),
    "decision alone": (lambda x: project(x, 7).argmax(1), IMAGE, ["decisions"]),
    "boxes": (
        lambda x: {"scores": project(x, 9, 6), "boxes": project(x, 9, 4).sigmoid(), "anchors": mixed(9, 4)},
        IMAGE,
        ["classes@2", "regression@2", "ignored"],
    ),
    "constant": (lambda x: (project(x, 4), torch.ones(len(x), 3)), IMAGE, ["classes@1", "ignored"]),
    "inner states": (
        lambda x: {"logits": project(x, 6, 11), "hidden_states": (project(x, 6, 8), project(x, 6, 8))},
        TOKENS,
        ["classes@2", "ignored", "ignored"],
    ),
    "pooled": (
        lambda x: {"last_hidden_state": project(x, 6, 16), "pooler_output": project(x, 16)},
        TOKENS,
        ["embedding@2", "embedding@1"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GUESSES)
def test_what_outputs_are_is_guessed(name):
    function, x, expected = GUESSES[name]
    outputs = describe(Gives(function), [(x,)])
    assert [str(output) for output in outputs] == expected
    assert all(output.why for output in outputs)
    # Whatever it is, the model is nowhere from itself and somewhere from one that answers to other samples.
    with torch.no_grad():
        comparison, rows = compare(outputs, [(function(x), len(x))], len(x))
        assert total(comparison, [(rows[0], comparison.rows(function(x), len(x)))]) < 1e-9
        assert total(comparison, [(rows[0], comparison.rows(function(x.roll(1, 0)), len(x)))]) > 0.01


def test_an_axis_whose_length_varies_is_none_of_classes():
    def sums(x: Tensor) -> Tensor:  # [N, C, T]: places that differ more in their mean than classes do
        return torch.stack([x.sum(1), -x.sum(1), x.mean(1)], 1) + 10 * torch.arange(x.shape[2])

    batches = [(mixed(8, 40, length),) for length in (9, 12)]
    [output] = describe(Gives(sums), batches)
    assert str(output) == "classes@1"


def test_samples_lie_where_inputs_say():
    x, table = mixed(5, 8, 3), mixed(4, 6)  # 8 samples along axis 1, and a table
    model = Gives(lambda x, table: (x @ mixed(3, 7), (x.mean(0) @ mixed(3, 4)) @ table))
    one, two = describe(model, [(x, table)], axes=(1, None))
    assert (str(one), one.samples) == ("classes@2", 1)
    assert (str(two), two.samples) == ("classes@1", 0)
    fixed = Gives(lambda x: x.reshape(1, 12) @ mixed(12, 5))  # takes one sample, and no other number
    [output] = describe(fixed, [(mixed(1, 3, 4),), (mixed(1, 3, 4, seed=2),)][:1])
    assert (str(output), output.samples) == ("classes@1", 0)


def test_names_of_outputs():
    x = torch.ones(2)
    assert [name for name, _ in leaves(x)] == ["output"]
    assert [name for name, _ in leaves((x, [x, None], {"a": x}, 3))] == ["0", "1.0", "2.a"]
    assert [name for name, _ in leaves(Pair(x, x))] == ["scores", "boxes"]
    assert [name for name, _ in leaves(Answer(x, None, (x, x)))] == ["logits", "states.0", "states.1"]


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        (("ignored", "classes@1"), ["ignored", "classes@1"]),
        (("auto", "regression@-1"), ["classes@1", "regression@1"]),
        ({"1": "binary"}, ["ignored", "binary@1"]),
        (("embedding", "regression"), ["embedding@1", "regression@1"]),
    ],
)
def test_what_is_stated_holds(stated, expected):
    model = Gives(lambda x: (project(x, 7), project(x, 3)))
    assert [str(output) for output in describe(model, [(IMAGE,)], stated=parse(stated))] == expected


@pytest.mark.parametrize(
    ("stated", "words"),
    [
        ("clases@1", ["'clases'", "Did you mean 'classes'", *KINDS]),
        ("classes@x", ["classes@x", "as in classes@1"]),
        (3, ["value of type int"]),
        ((), ["empty"]),
        ((None, "classes"), ["None"]),
        ("classes", ["1 output(s)", "returns 2", "'scores' [16, 7]"]),
        ({"score": "classes"}, ["'score'", "Did you mean 'scores'", "'ids' [16]"]),
        ({"scores": "classes@4"}, ["there is no axis 4"]),
        ({"scores": "classes@0"}, ["along axis 0 lie the samples"]),
        ({"scores": "probabilities"}, ["between 0 and 1", "state classes"]),
        ({"scores": "decisions"}, ["integers and booleans", "float32"]),
        ({"ids": "classes"}, ["floats", "int64"]),
        ({"scores": "ignored"}, ["no output of the model is compared"]),
    ],
)
def test_what_cannot_be_is_refused(stated, words):
    model = Gives(lambda x: {"scores": project(x, 7), "ids": project(x, 7).argmax(1)})
    with pytest.raises(UsageError) as caught:
        describe(model, [(IMAGE,)], stated=parse(stated))
    for word in words:
        assert word in str(caught.value)


def test_nothing_to_compare_is_said():
    with pytest.raises(UsageError, match="returns no tensor"):
        describe(Gives(lambda x: None), [(IMAGE,)])
    with pytest.raises(UsageError, match="none of its axes grows"):
        describe(Gives(lambda x: x.mean()), [(IMAGE,)])


def held(kind: str, teacher: Tensor, student: Tensor, axis: int | None = 1) -> float:
    comparison, rows = compare((Output("output", kind, axis),), [(teacher, len(teacher))], len(teacher))
    return total(comparison, [(rows[0], comparison.rows(student, len(student)))])


def test_divergence_of_each_kind():
    a, b = mixed(60, 4), mixed(60, 4, seed=1)
    p, q = a.double().softmax(1), b.double().softmax(1)
    expected = float((p * (p / q).log()).sum(1).mean())
    assert held("classes", a, b) == pytest.approx(expected)
    assert held("classes", a, a + 3.0) == pytest.approx(0.0, abs=1e-9)
    assert held("classes", a.log_softmax(1), b) == pytest.approx(expected, rel=1e-5)
    assert held("probabilities", a.softmax(1), b.softmax(1)) == pytest.approx(expected, rel=1e-4)
    assert held("classes", a, torch.full_like(a, torch.nan)) == float("inf")
    p, q = a.double().sigmoid(), b.double().sigmoid()
    expected = float((p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(1).mean())
    assert held("binary", a, b) == pytest.approx(expected)
    assert held("binary-probabilities", a.sigmoid(), b.sigmoid()) == pytest.approx(expected, rel=1e-4)
    ids = torch.tensor([0, 1, 2, 3])
    assert held("decisions", ids, torch.tensor([0, 1, 2, 2]), None) == pytest.approx(0.25)


@pytest.mark.parametrize("kind", ["regression", "embedding"])
def test_numbers_and_vectors_count_one_where_nothing_is_known(kind):
    """At any scale and offset, of each column: a constant is as far as the variance, and half the error a quarter of that."""
    scale = torch.tensor([1e-3, 1.0, 200.0]) if kind == "regression" else torch.full((3,), 40.0)
    x = mixed(500, 3) * scale
    known = x.mean(0) if kind == "regression" else nn.functional.normalize(x, dim=1).mean(0)
    if kind == "regression":
        assert held(kind, x, known.expand_as(x)) == pytest.approx(1, rel=1e-3)
        assert held(kind, x, x + 0.5 * (known - x)) == pytest.approx(0.25, rel=1e-3)
        assert held(kind, x + 10 * scale, x + 10 * scale + 0.5 * scale * mixed(500, 3, seed=1)) == pytest.approx(
            0.25, rel=0.1
        )
        # Anchors differ by themselves: what counts is what the samples change.
        anchors = 30 * mixed(1, 3, 30, seed=2)
        boxes = mixed(200, 3, 30) + anchors
        assert held(kind, boxes, anchors.expand_as(boxes)) == pytest.approx(1, rel=0.05)
    else:
        assert held(kind, x, x * 7) == pytest.approx(0, abs=1e-9)
        assert held(kind, x, x.roll(1, 0)) == pytest.approx(2, rel=0.1)  # two that know nothing of each other


@pytest.mark.parametrize(
    "kind", ["classes", "probabilities", "binary", "binary-probabilities", "regression", "embedding"]
)
def test_gradients_drawn_estimate_a_small_change(kind):
    """Half the mean square of a draw times a change is the divergence the change makes: what Fisher information is read for."""
    x = mixed(40, 6, 5)
    change = 0.01 * mixed(40, 6, 5, seed=1)
    if kind == "probabilities":
        x = x.softmax(2)
        change = x * (change - (x * change).sum(2, keepdim=True))
    elif kind == "binary-probabilities":
        x = x.sigmoid()
        change *= x * (1 - x)
    comparison, rows = compare((Output("output", kind, 2),), [(x, 40)], 40)
    actual = total(comparison, [(rows[0], comparison.rows(x + change, 40))])
    generator = torch.Generator().manual_seed(0)
    squares = [(comparison.draws(rows[0], generator)[0] * change).sum(2).square().sum() / 2 for _ in range(400)]
    assert float(torch.stack(squares).mean()) / 40 == pytest.approx(actual, rel=0.1)


def test_parts_add_up_and_large_outputs_are_thinned(monkeypatch):
    from autocomp.tasks import divergence

    pixels, far = mixed(8, 5, 30, 30), mixed(8, 5, 30, 30, seed=1)
    outputs = (Output("scores", "classes", 1), Output("width", "regression", None), Output("ids", "ignored"))
    teacher, student = (pixels, pixels[:, 0, 0, 0], None), (far, far[:, 0, 0, 0], None)
    ids = torch.zeros(8)
    comparison, rows = compare(outputs, [((*teacher[:2], ids), 8)], 8)
    whole = total(comparison, [(rows[0], comparison.rows((*student[:2], ids), 8))])
    parts = held("classes", pixels, far) + held("regression", teacher[1], student[1], None)
    assert whole == pytest.approx(parts)
    monkeypatch.setattr(divergence, "KEPT", 8 * 5 * 100)
    comparison, rows = compare(outputs, [((*teacher[:2], ids), 8)], 8)
    assert rows[0][0].shape[0] == 8
    assert rows[0][0].shape[1] <= 100
    assert total(comparison, [(rows[0], comparison.rows((*student[:2], ids), 8))]) == pytest.approx(whole, rel=0.1)
    assert isinstance(comparison, Comparison)
    assert comparison.steps[0] % 2 == 1
