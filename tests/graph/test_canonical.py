"""However a model is written, its canonical form computes the same, in plain layers, and says no to what it cannot hold."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass

import pytest
import torch
from places import ROOT
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.utils import _pytree

from autocomp.errors import ExportError, UsageError
from autocomp.graph.analyse import analyse
from autocomp.graph.canonical import canonical
from autocomp.graph.fold import fold_batchnorm
from autocomp.graph.program import CanonicalModel

torch.set_num_threads(1)


class Activated(nn.BatchNorm2d):
    """A BatchNorm that does more than its class says."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class Standardised(nn.Conv2d):
    """A convolution whose weight is standardised when it is called."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias)


class Turned(nn.Module):
    """A linear layer that keeps its weight the other way round, as GPT-2's does."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


class Functional(nn.Module):
    """A layer that is a function of a parameter, in a module that also holds a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.inner = nn.Parameter(torch.randn(16, 8)), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(functional.linear(x, self.weight).relu())


class OverLength(nn.Module):
    """A BatchNorm over [N, L, C] normalises L, also where L and C are alike."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 32), nn.BatchNorm1d(32)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x))


class Renamed(nn.Module):
    """torch's other names for its operations."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.swapaxes(torch.swapaxes(torch.multiply(self.first(x), 2.0), 1, 2), -1, -2)
        y = torch.subtract(torch.true_divide(y, 3.0), torch.negative(torch.clip(torch.special.expit(y), 0.1, 0.9)))
        return self.last(torch.concat([torch.absolute(y), torch.tile(y, (1, 1, 1))], -1))


class LaidOut(nn.Module):
    """Views of what was laid out anew, of a constant and of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.last = nn.Parameter(torch.randn(4, 4)), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        windows = x.transpose(1, 2).contiguous().as_strided((x.shape[0], 4, 4), (16, 4, 1))
        return self.last((windows + self.table.t().contiguous().view(2, 2, 4).reshape(4, 4)).view(-1, 16))


def picture() -> Tensor:
    return torch.randn(2, 3, 8, 8)


def convolutions(*middle: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *middle, nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(144, 5))


def normed(conv: nn.Module) -> nn.Module:
    return nn.Sequential(conv, nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1))


# model, input, number of layers
WRITTEN = {
    "a norm that activates": (lambda: convolutions(Activated(8)), picture, 3),
    "standardised weights": (lambda: normed(Standardised(3, 8, 3)), picture, 2),
    "weight norm": (lambda: normed(parametrizations.weight_norm(nn.Conv2d(3, 8, 3))), picture, 2),
    "spectral norm": (lambda: normed(parametrizations.spectral_norm(nn.Conv2d(3, 8, 3))), picture, 2),
    "same padding, even kernel": (lambda: normed(nn.Conv2d(3, 8, 4, padding="same")), picture, 2),
    "circular padding": (lambda: normed(nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular")), picture, 2),
    "turned weights": (lambda: nn.Sequential(Turned(8, 16), nn.ReLU(), Turned(16, 4)), lambda: torch.randn(2, 5, 8), 2),
    "functions of parameters": (Functional, lambda: torch.randn(2, 8), 2),
    "a norm over the length": (OverLength, lambda: torch.randn(2, 32, 8), 1),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(3, 8, 2, 2), nn.BatchNorm2d(8)), picture, 1),
    "three axes": (lambda: nn.Sequential(nn.Conv3d(1, 4, 2), nn.BatchNorm3d(4)), lambda: torch.randn(2, 1, 4, 4, 4), 1),
    "other names": (Renamed, lambda: torch.randn(2, 5, 8), 2),
    "laid out anew": (LaidOut, lambda: torch.randn(2, 4, 4), 1),
    "torch's attention": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), lambda: torch.randn(2, 5, 8), 4),
}  # fmt: skip


def settled(model: nn.Module) -> nn.Module:
    """In evaluation mode, with norms as training leaves them."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.weight.data.normal_()
    return model.eval()


@pytest.mark.parametrize("name", WRITTEN)
def test_however_it_is_written(name):
    torch.manual_seed(0)
    make, inputs, layers = WRITTEN[name]
    model, x = settled(make()), inputs()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    form = canonical(model, (x,))
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)
    assert sum(type(module) in kinds for module in form.modules()) == layers
    copies = (form, copy.deepcopy(form), pickle.loads(pickle.dumps(form)), fold_batchnorm(form))
    with torch.no_grad():
        for copied in copies:
            torch.testing.assert_close(copied(x), model(x), rtol=1e-4, atol=1e-4)
        bigger = torch.cat([x, x.flip(0), x])
        torch.testing.assert_close(form(bigger), model(bigger), rtol=1e-4, atol=1e-4)
        for parameter in form.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), "the model given changed"


def test_other_names_are_followed():
    form = canonical(Renamed().eval(), (torch.randn(2, 5, 8),))
    (group,) = [group for group in analyse(form, (torch.randn(2, 5, 8),)).groups.values() if not group.reason]
    assert (group.producers, group.width) == (("first",), 16)


def test_a_norm_that_activates_folds_and_still_activates():
    form = canonical(settled(convolutions(Activated(8))), (picture(),))
    folded = fold_batchnorm(form)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert "relu" in form.code.source


class Stateful(nn.Module):
    """Writes a buffer, as a cache of a stream or a counter of calls does."""

    def __init__(self) -> None:
        super().__init__()
        self.past: Tensor
        self.register_buffer("past", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.past
        self.past.copy_(x[0])
        return y


class Assigning(Stateful):
    def forward(self, x: Tensor) -> Tensor:
        self.past = self.past + 1
        return x * self.past


@pytest.mark.parametrize("kind", [Stateful, Assigning])
def test_a_written_buffer_is_refused_by_name_and_kept(kind):
    model = kind().eval()
    with pytest.raises(ExportError, match="writes its buffer 'past'"):
        canonical(model, (torch.randn(2, 4),))
    assert torch.equal(model.past, torch.zeros(4))


def test_an_input_that_is_written_stays_the_callers():
    class Centred(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sub_(1).relu_()

    x = torch.randn(2, 4)
    kept = x.clone()
    form = canonical(Centred(), (x,))
    assert torch.equal(form(x), (kept - 1).relu())
    assert torch.equal(x, kept)


def test_chance_is_refused():
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.randn_like(x)

    with pytest.raises(ExportError, match="the model is random"):
        canonical(Noisy(), (torch.randn(2, 4),))


class Gathered(nn.Module):
    """Samples along the first axis of one input; the second is a table."""

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        return x @ table


class Pooled(nn.Module):
    """Samples along the second axis of a sequence, and the first of what is added to its mean: one of either broadcasts over the other."""

    def __init__(self) -> None:
        super().__init__()
        self.frames, self.whole = nn.Linear(4, 3), nn.Linear(6, 3)

    def forward(self, frames: Tensor, whole: Tensor) -> Tensor:
        return self.frames(frames).relu().mean(0) + self.whole(whole)


@pytest.mark.parametrize("more", [(), ((torch.randn(5, 8, 4), torch.randn(8, 6)),)])
def test_one_sample_that_fits_any_number_is_no_table(more):
    model = Pooled()
    form = canonical(model, (torch.randn(5, 1, 4), torch.randn(1, 6)), more)
    assert form.code.batch.inputs == (1, 0)
    given = torch.randn(5, 7, 4), torch.randn(7, 6)
    torch.testing.assert_close(form(*given), model(*given))


@pytest.mark.parametrize(
    ("model", "inputs", "axes"),
    [
        (nn.Linear(4, 3), (torch.randn(1, 4),), (0,)),
        (Gathered(), (torch.randn(3, 4), torch.randn(4, 6)), (0, None)),
        (nn.LSTM(4, 3), (torch.randn(5, 1, 4),), (1,)),
        (nn.TransformerEncoderLayer(8, 2, 16), (torch.randn(5, 1, 8),), (1,)),
    ],
)
def test_the_batch_axis_is_found(model, inputs, axes):
    form = canonical(model.eval(), inputs)
    assert form.code.batch.inputs == axes
    assert form.code.batch.fixed == 0
    more = [t if axis is None else torch.cat([t, t, t], axis) for t, axis in zip(inputs, axes, strict=True)]
    with torch.no_grad():
        for ours, its in zip(
            torch.utils._pytree.tree_leaves(form(*more)), torch.utils._pytree.tree_leaves(model(*more)), strict=True
        ):
            torch.testing.assert_close(ours, its, rtol=1e-4, atol=1e-5)


def test_lengths_that_vary_in_the_calibration_stay_free():
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 3)).eval()
    batches = [(torch.randint(0, 10, (2, length)),) for length in (5, 7)]
    form = canonical(model, (torch.randint(0, 10, (1, 6)),), batches)
    for length in (4, 9):
        x = torch.randint(0, 10, (3, length))
        torch.testing.assert_close(form(x), model(x))


def test_a_model_of_one_batch_size_runs_piece_by_piece():
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([self.linear(row) for row in x])  # a loop over the samples

    model = Fixed().eval()
    form = canonical(model, (torch.randn(2, 4),))
    x = torch.randn(5, 4)
    torch.testing.assert_close(form(x), model(x))


@dataclass
class Answer:
    logits: Tensor
    cache: object


torch.utils._pytree.register_dataclass(Answer)


class Answering(nn.Module):
    """Returns what transformers' models do: a dataclass that holds more than tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Answer:
        return Answer(self.linear(x), object())


def test_dataclasses_come_back_without_what_is_no_tensor():
    model, x = Answering().eval(), torch.randn(2, 4)
    form = canonical(model, (x,))
    for each in (form, pickle.loads(pickle.dumps(form))):
        answer = each(x=x)
        assert isinstance(answer, Answer)
        assert answer.cache is None
        torch.testing.assert_close(answer.logits, model(x).logits)


def test_inputs_of_other_names_are_refused():
    form = canonical(nn.Linear(4, 3), (torch.randn(2, 4),))
    with pytest.raises(UsageError, match="takes the inputs input"):
        form(torch.randn(2, 4), mask=torch.ones(2))
    with pytest.raises(AttributeError, match="exported model"):
        _ = form.in_features


def test_a_rotary_position_leaves_the_heads_free():
    class Rotary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))
            self.scale = nn.Parameter(torch.rand(4) + 0.5)
            self.register_buffer("angle", torch.outer(torch.arange(6.0), torch.tensor([1.0, 0.1, 1.0, 0.1])))

        def turned(self, x: Tensor) -> Tensor:
            x = functional.rms_norm(x, (4,), self.scale)  # within every head
            half = torch.cat([-x[..., 2:], x[..., :2]], -1)
            return x * self.angle.cos() + half * self.angle.sin()

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (f(x).view(x.shape[0], 6, 4, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
            y = functional.scaled_dot_product_attention(self.turned(q), self.turned(k), v)
            return self.out(y.transpose(1, 2).reshape(x.shape[0], 6, 16))

    group = analyse(Rotary().eval(), (torch.randn(2, 6, 16),)).groups["q"]
    assert group.prunable, group.reason
    assert group.width == 4
    assert not group.slabs


def test_group_norms_lose_whole_groups():
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), nn.Conv2d(16, 4, 1))
    group = analyse(settled(model), (picture(),)).groups["0"]
    assert group.prunable, group.reason
    assert group.width == 4
    assert [count.value for count in group.counts] == [4]


def test_a_canonical_model_is_returned_as_it_is():
    form = canonical(nn.Linear(4, 3), (torch.randn(2, 4),))
    assert canonical(form, (torch.randn(2, 4),)) is form
    assert isinstance(canonical(pickle.loads(pickle.dumps(form)), (torch.randn(2, 4),)), CanonicalModel)


def test_the_page_of_what_can_be_compressed_is_up_to_date():

    from autocomp.space.document import page

    written = ROOT / "docs" / "compressible.md"
    assert written.read_text() == page(), "run: python -m autocomp.space.document > docs/compressible.md"


class Output(dict[str, object]):
    """Without what is None, as the outputs of transformers are."""


_pytree.register_pytree_node(
    Output,
    lambda output: (
        [value for value in output.values() if value is not None],
        [k for k, v in output.items() if v is not None],
    ),
    lambda values, keys: Output(zip(keys, values, strict=True)),
    serialized_type_name="tests.Output",
)


class Cached(nn.Module):
    """Returns a cache beside its answer, as decoders do: an object that is no tensor and holds some."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Output:
        y = self.up(x)
        return Output(logits=y, cache=Cache(y))


@dataclass
class Cache:
    seen: Tensor


def test_objects_among_the_outputs_are_left_out_at_every_size() -> None:
    model = Cached().eval()
    found = canonical(model, (torch.randn(2, 5, 6),), [(torch.randn(8, 5, 6),), (torch.randn(4, 9, 6),)])
    x = torch.randn(3, 7, 6)
    (answer,) = _pytree.tree_leaves(found(x))
    assert torch.allclose(answer, model(x)["logits"])


def test_inputs_by_place_alone_have_their_names() -> None:
    class Placed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, a: Tensor, /, b: Tensor) -> Tensor:
            return self.inner(a) - b

    model, a, b = Placed().eval(), torch.randn(2, 4), torch.randn(2, 4)
    found = canonical(model, (a, b))
    assert found.code.parameters == ("a", "b")
    with torch.no_grad():
        torch.testing.assert_close(found(a, b=b), model(a, b=b))
