"""A candidate made without the database: the whole model compressed directly."""

from __future__ import annotations

import copy

import torch
from torch import nn

from autocomp.graph.removal import removed
from autocomp.graph.shapes import factor_shapes
from autocomp.records.candidate import Method
from autocomp.records.precisions import CODEBOOK, FORMATS, group_of


def by_hand(made, database, candidate):
    """Compress the whole model directly: slice everything, then overwrite the weights by each entry's."""
    model = copy.deepcopy(made.model)
    for group in made.graph.groups.values():
        kept = database.kept(group.name, candidate.widths[group.name])
        if kept is not None:
            removed(model, group, kept).apply(model)
    for name, layer in made.graph.layers.items():
        width = candidate.widths[layer.in_group] if layer.in_group else layer.in_channels
        entry = database.entry(name, width, candidate.methods[name])
        rows = database.rows(name, candidate.widths[layer.out_group])
        rows = slice(None) if rows is None or layer.conv_groups > 1 else rows
        module = model.get_submodule(name)
        if candidate.methods[name] == Method():
            weight = entry.parts[0].weight[rows]
            weight = weight.squeeze(2) if layer.one_d else weight
            assert module.weight.shape == weight.shape
            module.weight = nn.Parameter(weight)
            if entry.parts[0].bias is not None:
                module.bias = nn.Parameter(entry.parts[0].bias[rows])
        else:
            flat = FORMATS[candidate.methods[name].precision].family.flat
            if not flat and not candidate.methods[name].ranks:
                assert module.weight.numel() == entry.parts[0].weight[rows].numel()
            model.set_submodule(name, Direct(layer, candidate.methods[name], entry.parts, rows))
    return model.eval()


def written_out(part, weight, scale, columns):
    """Levels, or indices, of some rows as float64 weights [O, columns], element by element."""
    kind = FORMATS[part.precision]
    result = torch.zeros(len(weight), columns, dtype=torch.float64)
    for n in range(len(weight)):
        for k in range(columns):
            if kind.family is CODEBOOK:
                run, offset = divmod(k, kind.dim)
                value = sum(float(part.codebook[s, int(weight[n, s, run]), offset]) for s in range(kind.stages))
                result[n, k] = value * float(scale[n])
                continue
            level = int(weight[n, k // 2] >> 4 * (k % 2)) & 15 if kind.bits == 4 else int(weight[n, k])
            level = level - 16 if kind.bits == 4 and level > 7 else level
            result[n, k] = level * float(scale[n, k // group_of(part.precision, columns)])
    return result


class Direct(nn.Module):
    """The parts of an entry by torch's functions, in float: an integer layer is dequantised."""

    def __init__(self, layer, method, parts, rows):
        super().__init__()
        self.shapes = factor_shapes(layer, method.ranks) if method.ranks else [layer]
        self.parts, self.rows, self.layer = parts, rows, layer

    def forward(self, x):
        for index, (shape, part) in enumerate(zip(self.shapes, self.parts, strict=True)):
            rows = self.rows if index == len(self.parts) - 1 else slice(None)
            weight, bias = part.weight[rows], None if part.bias is None else part.bias[rows]
            if part.precision == "w8a8":
                x = ((x * part.inv_xs).round() + part.zp).clamp(0, 255) - part.zp
                weight = weight.double() * part.scale[rows].double().view(-1, *([1] * (weight.dim() - 1)))
            elif part.scale is not None:
                weight = written_out(part, weight, part.scale[rows], part.columns)
                weight = weight if shape.kind == "linear" else weight.view(len(weight), -1, *shape.kernel)
            x = x.half() if part.precision == "fp16" else x
            x, weight = x.double(), weight.double()
            bias = None if bias is None else bias.double()
            if shape.kind == "linear":
                x = nn.functional.linear(x, weight, bias).float()
                continue
            if shape.one_d:
                x = x.unsqueeze(2)
            groups = len(weight) * shape.conv_groups // shape.out_channels if shape.conv_groups > 1 else 1
            x = nn.functional.conv2d(x, weight, bias, shape.stride, shape.padding, shape.dilation, groups).float()
            x = x.squeeze(2) if shape.one_d else x
        return x
