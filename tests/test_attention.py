"""torch's attention written out: the same outputs, heads that can go, and a reason where it is left as it is."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline import EVERYTHING
from torch import Tensor, nn

from autocomp.accuracy.calibrate import collect_from
from autocomp.attention import Attention, kept_because, unpacked
from autocomp.compress.apply import stitch
from autocomp.compress.database import LayerDatabase
from autocomp.graph import analyse
from autocomp.space import build_space
from autocomp.task import Task

torch.set_num_threads(1)
WIDTH, HEADS, LENGTH = 32, 4, 7


def task_of(model: nn.Module, *inputs: Tensor) -> Task:
    return Task(model, inputs, [inputs], lambda model: {"accuracy": 1.0})


def settle(model: nn.Module, seed: int = 0) -> nn.Module:
    """Biases and factors that torch starts at zero or one get values, or nothing would show that they are forgotten."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@settings(max_examples=150, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**31))
def test_equals_torchs_module_whatever_it_is_asked(data, seed):
    def flag(name):
        return data.draw(st.booleans(), name)

    torch.manual_seed(seed)
    heads = data.draw(st.sampled_from([1, 2, 4]), "heads")
    first, batched, batch, others = flag("batch_first"), flag("batched"), data.draw(st.integers(1, 3)), LENGTH
    sizes = {"kdim": 12, "vdim": 20} if flag("sizes of their own") else {}
    own = nn.MultiheadAttention(WIDTH, heads, dropout=0.5, bias=flag("bias"), batch_first=first, **sizes)
    settle(own, seed)
    if crossed := flag("crossed") or bool(sizes):
        others = LENGTH + 2

    def drawn(length: int, width: int) -> Tensor:
        shape = (length, width) if not batched else (batch, length, width) if first else (length, batch, width)
        return torch.randn(shape)

    query = drawn(LENGTH, WIDTH)
    key = drawn(others, sizes.get("kdim", WIDTH)) if crossed else query
    value = drawn(others, sizes.get("vdim", WIDTH)) if crossed else query
    options = {"need_weights": flag("need_weights"), "average_attn_weights": flag("average")}
    kind = data.draw(st.sampled_from(["none", "of all", "of heads"]), "mask")
    if kind != "none":
        size = (LENGTH, others) if kind == "of all" else ((batch if batched else 1) * heads, LENGTH, others)
        forbidden = torch.rand(size) < 0.4
        forbidden[..., 0] = False
        options["attn_mask"] = forbidden if flag("true or false") else torch.randn(size)
    if flag("padded"):
        padded = torch.arange(others) > torch.randint(2, others, (batch if batched else 1, 1))
        padded = padded if batched else padded[0]
        # torch warns of masks of two kinds
        numbers = kind != "none" and options["attn_mask"].dtype != torch.bool
        options["key_padding_mask"] = torch.zeros(padded.shape).masked_fill(padded, -torch.inf) if numbers else padded
    with torch.no_grad():
        expected, weights = own(query, key, value, **options)
        actual, shown = unpacked(own)(query, key, value, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert (shown is None) == (weights is None)
    if weights is not None:
        torch.testing.assert_close(shown, weights, rtol=1e-5, atol=1e-6)


class Classifier(nn.Module):
    """``nn.TransformerEncoder`` over [N, LENGTH, WIDTH], a token classified; causal, and with padding, on request."""

    def __init__(self, causal: bool = False, **options) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 64, batch_first=True, **options)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not causal)
        self.head, self.causal = nn.Linear(WIDTH, 5), causal
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH))

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        mask = self.mask if self.causal else None
        return self.head(self.encoder(x, mask, padding, is_causal=self.causal)[:, 1])


class Block(nn.Module):
    """A vision transformer's encoder block as torchvision has it."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH, 1e-6), nn.LayerNorm(WIDTH, 1e-6)
        self.self_attention = nn.MultiheadAttention(WIDTH, HEADS, 0.1, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, WIDTH))

    def forward(self, given: Tensor) -> Tensor:
        x = self.ln_1(given)
        x, _ = self.self_attention(x, x, x, need_weights=False)
        x = x + given
        return x + self.mlp(self.ln_2(x))


class Vision(nn.Module):
    """Patches of [N, 1, 12, 12] pictures, a class token, two blocks, its token classified."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.blocks = nn.Conv2d(1, WIDTH, 4, 4), nn.Sequential(Block(), Block())
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, WIDTH)), nn.Parameter(torch.randn(1, 10, WIDTH))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


def made(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    nets = {"vision": Vision, "causal": lambda: Classifier(True, norm_first=True)}
    x = torch.randn(3, 1, 12, 12) if name == "vision" else torch.randn(3, LENGTH, WIDTH)
    padding = torch.arange(LENGTH) >= torch.tensor([[4], [5], [7]])
    return settle(nets.get(name, Classifier)()), ((x, padding) if name == "padded" else (x,))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", ["encoder", "causal", "padded", "vision"])
def test_a_task_holds_a_copy_that_computes_the_same(name):
    """With padding, torch drops what is padded by nested tensors: what it does not drop is the same."""
    model, inputs = made(name)
    before = copy.deepcopy(model.state_dict())
    task = task_of(model, *inputs)
    assert not any(isinstance(module, nn.MultiheadAttention) for module in task.model.modules())
    assert sum(isinstance(module, Attention) for module in task.model.modules()) == 2
    assert sum(p.numel() for p in task.model.parameters()) == sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(task.model(*inputs), model(*inputs), rtol=1e-5, atol=1e-5)
        for parameter in task.model.parameters():
            parameter.zero_()
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_a_decoder_attends_to_what_was_encoded():
    torch.manual_seed(0)
    model = settle(nn.Transformer(WIDTH, HEADS, 1, 1, 64))
    source, target = torch.randn(5, 2, WIDTH), torch.randn(LENGTH, 2, WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(unpacked(model)(source, target), model(source, target), rtol=1e-5, atol=1e-5)
    graph = analyse(unpacked(model), (source, target))
    assert graph.groups["decoder.layers.0.multihead_attn.q_proj"].width == HEADS
    assert graph.groups["decoder.layers.0.multihead_attn.q_proj"].prunable


def test_models_without_it_and_models_that_cannot_be_copied_are_handed_through():
    class Stubborn(nn.MultiheadAttention):
        def __deepcopy__(self, memo):
            raise RuntimeError("no")

    for model in (nn.Linear(3, 2), nn.Sequential(Stubborn(8, 2))):
        assert unpacked(model) is model


def test_a_module_in_two_places_stays_one():
    shared = nn.MultiheadAttention(WIDTH, HEADS)
    model = unpacked(nn.ModuleList([shared, shared]))
    assert isinstance(model[0], Attention)
    assert model[0] is model[1]


def test_training_goes_on_as_it_was():
    model = nn.MultiheadAttention(WIDTH, HEADS, 0.5, batch_first=True).requires_grad_(False).train()
    model.in_proj_weight.requires_grad_(True)
    with torch.no_grad():
        own = unpacked(model)
    x = torch.randn(2, LENGTH, WIDTH)
    assert own.training
    assert not torch.equal(own(x, x, x)[0], own(x, x, x)[0])  # dropout
    learning = {name for name, parameter in own.named_parameters() if parameter.requires_grad}
    assert learning == {"q_proj.weight", "k_proj.weight", "v_proj.weight"}
    with pytest.raises(ValueError, match="give the mask too"):
        own(x, x, x, is_causal=True)


def refused() -> dict[str, nn.Module]:
    class Subclass(nn.MultiheadAttention):
        pass

    found = {
        "Subclass is not": Subclass(WIDTH, HEADS),
        "add_bias_kv": nn.MultiheadAttention(WIDTH, HEADS, add_bias_kv=True),
        "add_zero_attn": nn.MultiheadAttention(WIDTH, HEADS, add_zero_attn=True),
    }
    found["has hooks"] = hooked = nn.MultiheadAttention(WIDTH, HEADS)
    hooked.register_forward_hook(lambda *_: None)
    found["exchanged for Identity"] = exchanged = nn.MultiheadAttention(WIDTH, HEADS)
    exchanged.out_proj = nn.Identity()
    found["has the same weights"] = nn.ModuleList(nn.MultiheadAttention(WIDTH, HEADS) for _ in range(2))
    found["has the same weights"][1].in_proj_weight = found["has the same weights"][0].in_proj_weight
    return found


@pytest.mark.parametrize("why", refused())
def test_what_cannot_be_written_out_is_left_with_a_reason(why):
    model = nn.Sequential(refused()[why])
    kept = [module for module in unpacked(model).modules() if isinstance(module, nn.MultiheadAttention)]
    assert kept
    assert all(why in kept_because(module, model) for module in model.modules() if isinstance(module, type(kept[0])))


class Reading(nn.Module):
    """Attention whose weights, which torch returns by default, are part of the output, or are not read."""

    def __init__(self, read: bool) -> None:
        super().__init__()
        self.attention, self.head, self.read = (
            nn.MultiheadAttention(WIDTH, HEADS, batch_first=True),
            nn.Linear(WIDTH, 5),
            read,
        )

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y, weights = self.attention(x, x, x)
        return (self.head(y), weights) if self.read else self.head(y)


def test_weights_that_nobody_reads_keep_no_head():
    x = torch.randn(2, LENGTH, WIDTH)
    free, held = (analyse(unpacked(Reading(read).eval()), (x,)).groups for read in (False, True))
    assert free["attention.q_proj"].prunable
    assert free["attention.q_proj"].width == HEADS
    assert len(free["attention.q_proj"].attention) == 2  # scores and what is mixed by them, not the scores again
    assert "summed up at mean" in held["attention.q_proj"].reason


def test_weights_that_are_read_compile_too(device):
    x = torch.randn(1, LENGTH, WIDTH)
    device.compile(task_of(settle(Reading(True)), x).model, [(x,)])  # compares with torch


def test_a_layer_that_nobody_reads_still_follows_its_input():
    """It runs, in torch: without its columns the narrowed model would fail."""

    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.idle, self.last = nn.Linear(8, 16), nn.Linear(16, 4), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.first(x))
            self.idle(x).softmax(-1)
            return self.last(x)

    graph = analyse(Idle().eval(), (torch.randn(2, 8),))
    assert graph.groups["first"].prunable
    assert set(graph.groups["first"].consumers) == {"idle", "last"}


@pytest.mark.slow  # kernels of four models are tuned and compiled
@pytest.mark.parametrize("name", ["encoder", "causal", "padded", "vision"])
def test_candidates_without_some_heads_compile_to_what_torch_computes(name, tmp_path, device):
    model, given = made(name)
    inputs = tuple(tensor[:1] for tensor in given)
    model = task_of(model, *inputs).model
    graph = analyse(model, inputs)
    space = build_space(graph, EVERYTHING, device.profile)
    batch = (torch.randn(16, *given[0].shape[1:]), *(tensor[:1].expand(16, -1) for tensor in given[1:]))
    database = LayerDatabase(tmp_path / "layers", model, graph, space, collect_from(model, [batch], graph, 16))
    projection = {"vision": "blocks.0.self_attention.q_proj"}.get(name, "encoder.layers.0.self_attn.q_proj")
    for candidate in (space.uniform(0.5), space.uniform(0.5, "w8a8")):
        assert candidate.widths[projection] == HEADS // 2
        small = stitch(model, graph, database, candidate)
        device.compile(small, [inputs])  # compares with torch
