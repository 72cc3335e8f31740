"""What every compressed convolution has: strides, padding, dilation and groups, the size they give, and one dimension run as two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

Geometry = tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]  # stride, padding, dilation, groups


class Convolution(nn.Module):
    """A two-dimensional convolution of ``tensors``, registered in this order; ``weight`` and ``bias`` have the outputs first."""

    weight: Tensor
    bias: Tensor

    def __init__(self, tensors: Mapping[str, Tensor], geometry: Geometry) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self.stride, self.padding, self.dilation, self.groups = geometry

    @property
    def geometry(self) -> Geometry:
        """As the second argument of the constructor."""
        return self.stride, self.padding, self.dilation, self.groups

    def sizes(self, kernel: Sequence[int]) -> str:
        """Sizes in words for ``extra_repr``; ``kernel`` is (inputs of a group, height, width)."""
        i, h, w = kernel
        return f"{i * self.groups}, {len(self.weight)}, kernel={h, w}, stride={self.stride}, groups={self.groups}"


class OneRow(nn.Module):
    """Before a two-dimensional convolution among a class's bases: takes ``[N, C, L]``, as pictures one row high."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = super().forward(x.unsqueeze(2)).squeeze(2)
        return result


def empty_result(
    x: Tensor, w: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """Return a tensor of the shape of NCHW ``x`` convolved with OIHW ``w``, in the type of ``x``, its values unset."""
    size = [
        (x.shape[2 + axis] + 2 * padding[axis] - dilation[axis] * (w.shape[2 + axis] - 1) - 1) // stride[axis] + 1
        for axis in (0, 1)
    ]
    return x.new_empty((x.shape[0], w.shape[0], *size))
