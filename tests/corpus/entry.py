"""A model of the corpus: where it is from, how it is built, and what it reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor, nn

Kind = Literal["classifier", "segmentation", "detector", "dense", "encoder", "decoder", "cache", "speech", "video"]
What = Literal["signal", "tokens", "mask", "positive"]


@dataclass(frozen=True)
class Input:
    """One input tensor of a model; ``shape`` is of one sample, without the batch axis.

    ``signal``: noise, smooth along its last axes as pictures and sound are. ``tokens``: int64 below ``high``. ``mask``: int64 ones of which the
    last few of some samples are zero, as padding leaves them. ``positive``: uniform in [0, 1).
    """

    shape: tuple[int, ...]
    what: What = "signal"
    high: int = 100


def image(size: int, channels: int = 3) -> tuple[Input, ...]:
    return (Input((channels, size, size)),)


def tokens(length: int = 16, high: int = 100) -> Input:
    return Input((length,), "tokens", high)


def mask(length: int = 16) -> Input:
    return Input((length,), "mask")


@dataclass(frozen=True)
class Entry:
    """``make`` returns the module as its package makes it; what `corpus.weights.build` does to its weights comes after.

    ``name`` is ``library/model``. ``calls`` are its positional inputs.
    """

    name: str
    kind: Kind
    make: Callable[[], nn.Module]
    calls: tuple[Input, ...]

    @property
    def library(self) -> str:
        return self.name.partition("/")[0]

    def inputs(self, seed: int, batch: int = 1) -> tuple[Tensor, ...]:
        """Random inputs [batch, ...], the same for the same seed."""
        import torch

        generator = torch.Generator().manual_seed(seed)
        return tuple(_draw(given, batch, generator) for given in self.calls)


def _draw(given: Input, batch: int, generator: object) -> Tensor:
    import torch
    from torch.nn import functional

    assert isinstance(generator, torch.Generator)
    shape = (batch, *given.shape)
    if given.what == "tokens":
        return torch.randint(0, given.high, shape, generator=generator)
    if given.what == "mask":
        lengths = torch.randint(given.shape[-1] * 3 // 4, given.shape[-1] + 1, (batch, 1), generator=generator)
        return (torch.arange(given.shape[-1]) < lengths).expand(shape).to(torch.int64).contiguous()
    if given.what == "positive":
        return torch.rand(shape, generator=generator)
    noise = torch.randn(shape, generator=generator)
    if min(given.shape[-2:]) < 8 or len(given.shape) < 2:
        return noise
    coarse = functional.avg_pool2d(noise.reshape(-1, 1, *shape[-2:]), 5, 1, 2, count_include_pad=False)
    level = torch.randn((batch, *given.shape[:-2], 1, 1), generator=generator)  # samples differ in more than noise
    return 3 * coarse.reshape(shape) + 0.3 * noise + level
