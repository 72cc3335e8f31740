"""Models that compute in complex numbers have a canonical form without any, which computes the same."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autocomp.errors import ExportError
from autocomp.graph.analyse import analyse
from autocomp.graph.canonical import canonical

torch.set_num_threads(1)


class Computes(nn.Module):
    """A function with a layer before and behind it, which sees as many values as there are."""

    def __init__(self, function: Callable[..., Tensor], inputs: tuple[int, ...]) -> None:
        super().__init__()
        self.function, self.before = function, nn.Linear(inputs[-1], inputs[-1])
        self.register_buffer("turns", torch.polar(torch.rand(inputs[-1]) + 0.5, torch.rand(inputs[-1])))
        self.register_buffer("window", torch.hann_window(24))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, self.before(x))


def turned(m: Any, x: Tensor) -> Tensor:
    """Rotary positions as Llama's authors wrote them."""
    angles = torch.outer(torch.arange(x.shape[1]), 1.0 / 100 ** (torch.arange(0, x.shape[2], 2) / x.shape[2]))
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(2)


def filtered(m: Any, x: Tensor) -> Tensor:
    """A global filter: a product in the spectrum of both axes."""
    found = torch.fft.rfft2(x, dim=(1, 2), norm="ortho")
    return torch.fft.irfft2(found * (0.5 - 0.25j), s=x.shape[1:], dim=(1, 2), norm="ortho")


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "mixed by two transforms": lambda m, x: torch.fft.fft(torch.fft.fft(x, dim=-1), dim=-2).real,
    "two axes": lambda m, x: torch.fft.fft2(x).imag,
    "all axes but the first, cut and filled up": lambda m, x: torch.fft.fftn(x, s=(10, 9), dim=(1, 2)).abs(),
    "there and back": lambda m, x: torch.fft.ifft(torch.fft.fft(x, norm="forward") * m.turns, norm="forward").real,
    "real there and back": lambda m, x: torch.fft.irfft(torch.fft.rfft(x), n=x.shape[-1]),
    "odd length": lambda m, x: torch.fft.irfft(torch.fft.rfft(x, n=7), n=7),
    "without its length": lambda m, x: torch.fft.irfft(torch.fft.rfft(x) * 1j),
    "several axes, real": lambda m, x: torch.fft.irfftn(torch.fft.rfftn(x, dim=(1, 2)) / (1 + 2j), dim=(1, 2)),
    "inverse of two axes": lambda m, x: torch.fft.ifft2(torch.complex(x, x.flip(1))).angle().cos(),
    "filtered": filtered,
    "turned": turned,
    "stft": lambda m, x: torch.stft(x.flatten(1), 32, 8, 24, m.window, return_complex=True).abs().square(),
    "stft, normalised": lambda m, x: torch.view_as_real(
        torch.stft(x.flatten(1), 16, window=torch.ones(16), center=False, normalized=True, onesided=False, return_complex=True)
    ),
    "arithmetic": lambda m, x: (
        ((x * m.turns - 2.0) / (m.turns + 3) + 1j * x).conj() ** 2 - (1 - torch.complex(x, -x)).square()
    ).real,
    "quotients": lambda m, x: (1 / torch.complex(x, torch.ones_like(x)) + x / torch.complex(x.abs() + 1, x)).imag,
    "exponential": lambda m, x: (torch.exp(1j * x) * torch.exp(torch.complex(-x.abs(), x))).real,
    "products": lambda m, x: (torch.complex(x, -x) @ torch.complex(x, x).transpose(1, 2).to(torch.complex64)).real,
    "linear": lambda m, x: nn.functional.linear(torch.complex(x, -x), m.turns[None] + 0.5j, m.turns[:1]).real,
    "einsum": lambda m, x: torch.einsum("ntc,nsc->nts", torch.complex(x, -x), torch.complex(x, x)).imag,
    "moved about": lambda m, x: torch.cat(
        [torch.complex(x, 2 * x)[:, 1:].permute(0, 2, 1), (x * m.turns).mT[:, :, :3]], 2
    ).sum(1).unsqueeze(1).expand(-1, 2, -1).reshape(len(x), -1).imag,
    "picked": lambda m, x: torch.complex(x, -x).index_select(2, torch.tensor([3, 1, 1]))[:, torch.tensor([0, 2])].imag,
    "chosen": lambda m, x: torch.where(x > 0, torch.complex(x, 2 * x), 0.5).imag,
    "filled up": lambda m, x: nn.functional.pad(torch.complex(x, -x), (1, 2), value=3.0).abs(),
    "gathered": lambda m, x: torch.complex(x, -x).gather(2, x.argsort(2)).repeat_interleave(2, 1).imag,
    "real beside complex": lambda m, x: torch.stack([torch.complex(x, x), x.to(torch.complex64)]).mean(0).imag,
    "parts": lambda m, x: torch.stack([part.real for part in (x * m.turns).unbind(1)], 1),
}  # fmt: skip


@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_the_canonical_form_is_real_and_computes_the_same(name: str) -> None:
    torch.manual_seed(0)
    model, x = Computes(FUNCTIONS[name], (8, 12)).eval(), torch.randn(3, 8, 12)
    found = canonical(model, (x[:1],))
    assert not any(tensor.is_complex() for tensor in (*found.parameters(), *found.buffers()))
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(found(x), expected, rtol=1e-4, atol=2e-5 * float(expected.abs().max()))


def test_layers_around_are_found() -> None:
    graph = analyse(Computes(FUNCTIONS["filtered"], (8, 12)).eval(), (torch.randn(1, 8, 12),))
    assert set(graph.layers) == {"before"}


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda m, x: x * m.turns, "an output of the model is complex"),
        (lambda m, x: torch.complex(x, x).log().real, "aten.log.default has no form in real numbers"),
        (lambda m, x: (torch.complex(x, x) ** 0.5).real, "complex powers are compiled where they are whole numbers"),
    ],
)
def test_what_has_no_such_form_is_refused(function: Callable[..., Tensor], said: str) -> None:
    with pytest.raises(ExportError, match=re.escape(said)):
        canonical(Computes(function, (8, 12)).eval(), (torch.randn(2, 8, 12),))
