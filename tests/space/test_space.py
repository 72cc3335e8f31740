"""Search-space files, and the choices they leave on a graph and a profile."""

from __future__ import annotations

from dataclasses import dataclass

import nets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from autocomp.errors import UsageError
from autocomp.graph.analyse import analyse
from autocomp.graph.shapes import factor_shapes
from autocomp.records.candidate import Candidate, Method
from autocomp.space.build import build_space
from autocomp.space.file import Rule, SpaceFile, list_spaces, load_space

torch.set_num_threads(1)


@dataclass(frozen=True)
class Avx512:
    name: str = "test"
    lanes: int = 16
    precisions: tuple[str, ...] = ("fp32", "w8a8")


@pytest.fixture(scope="module")
def graph():
    return analyse(nets.make(width=64), (nets.images(1),))


def rules(*given, protect=()):
    return SpaceFile(format_version=1, rules=[Rule(**rule) for rule in given], protect=list(protect))


EVERYTHING = {"layers": "*", "keep": [1.0, 0.75, 0.5, 0.25], "ranks": [0.75, 0.5, 0.25], "precisions": ["fp32", "w8a8"]}


def test_shipped_spaces_build(graph):
    assert {"default", "prune-only", "quantize-only"} <= set(list_spaces())
    for name in list_spaces():
        space = build_space(graph, name, Avx512())
        assert space.size > 1
        assert space.dense().widths == {name: group.width for name, group in graph.groups.items()}
        assert all(options[0] == Method() for options in space.methods.values())


def test_finer_widths_lie_between_those_of_the_file(graph):
    plain = build_space(graph, rules(EVERYTHING), Avx512(lanes=4))
    space = build_space(graph, rules(EVERYTHING).model_copy(update={"refine": True}), Avx512(lanes=4))
    assert space.widths == plain.widths
    assert space.size == plain.size
    assert space.every_width["stem"] == tuple(range(64, 12, -4)), "whole vectors, none narrower than the file says"
    assert space.every_width["head"] == space.widths["head"]
    assert set(space.counts["stem"]) == set(space.every_width["stem"])
    for width in space.every_width["stem"]:
        assert space.rows("stem", width) == width
    wider = space.offering({"stem": (64, 60, 48)}, {})
    assert wider.widths == {**space.widths, "stem": (64, 60, 48)}
    assert plain.every_width == plain.widths
    assert plain.every_method == plain.methods


def test_finer_ranks_lie_between_those_of_the_file(graph):
    space = build_space(graph, rules(EVERYTHING).model_copy(update={"refine": True}), Avx512(lanes=4))
    plain = build_space(graph, rules(EVERYTHING), Avx512(lanes=4))
    assert space.methods == plain.methods
    assert space.refused == plain.refused, "what lies between is no option of the file's"
    finer = space.every_method["block1.conv1"]
    ranks = [method.ranks for method in finer if method.precision == "fp32"]
    offered = [method.ranks for method in space.methods["block1.conv1"] if method.precision == "fp32"]
    assert finer[0] == Method()
    assert set(offered) < set(ranks)
    assert len(finer) == 2 * len(ranks)
    assert space.offering({}, {"block1.conv1": finer}).methods["block1.conv1"] == finer


def test_what_always_loses_has_nothing_between(graph):
    space = build_space(graph, rules(EVERYTHING).model_copy(update={"refine": True}), Avx512(lanes=4))
    ranked = {m: Method() for m in space.methods["block1.conv1"] if m.ranks and m.precision == "fp32"}
    left = space.without({"block1.conv1": ranked})
    assert all(m.precision == "w8a8" for m in left.every_method["block1.conv1"] if m.ranks)
    assert left.every_method["block1.conv1"][0] == Method()


def test_finer_widths_are_sixteen_at_most():
    wide = analyse(nets.make(width=96), (nets.images(1),))
    space = build_space(wide, rules(EVERYTHING).model_copy(update={"refine": True}), Avx512(lanes=1))
    assert len(space.every_width["stem"]) == 13  # sixteenths from one to a quarter
    assert len(space.widths["stem"]) == 4


def test_widths_are_vectors_and_outputs_stay(graph):
    space = build_space(graph, rules(EVERYTHING), Avx512())
    assert space.widths["stem"] == (64, 48, 32, 16)
    assert space.widths["head"] == (5,)
    assert any(r.subject == "head" and "output" in r.reason for r in space.refused)
    narrow = build_space(analyse(nets.make(width=16), (nets.images(1),)), rules(EVERYTHING), Avx512())
    assert narrow.widths["stem"] == (16,)
    assert any(r.subject == "stem" and "rounds to 16" in r.reason for r in narrow.refused)
    short = build_space(analyse(nets.make(width=16), (nets.images(1),)), rules(EVERYTHING), Avx512(lanes=8))
    assert short.widths["stem"] == (16, 8)


def test_ranks_below_break_even_only(graph):
    space = build_space(graph, rules(EVERYTHING), Avx512())
    for name, methods in space.methods.items():
        layer = graph.layers[name]
        for method in methods:
            if method.ranks:
                factors = factor_shapes(layer, method.ranks)
                assert sum(f.macs for f in factors) <= 0.7 * layer.macs
                assert sum(f.weights for f in factors) <= 0.7 * layer.weights
                assert all(rank % 16 == 0 for rank in method.ranks)
                assert factors[0].in_channels == layer.in_channels
                assert factors[-1].out_channels == layer.out_channels
                assert factors[-1].out_size == layer.out_size
    assert Method("fp32", (32, 32)) in space.methods["block1.conv1"]
    assert any("over 70%" in refusal.reason for refusal in space.refused)
    assert not any(method.ranks for method in space.methods["head"])


def test_normalise_drops_a_rank_that_saves_nothing_after_pruning(graph):
    space = build_space(graph, rules(EVERYTHING), Avx512())
    dense = space.dense()
    methods = {**dense.methods, "block1.conv1": Method("w8a8", (32, 32))}
    assert space.normalise(Candidate(dense.widths, methods)).methods["block1.conv1"] == Method("w8a8", (32, 32))
    small = {**dense.widths, "stem": 16}
    assert space.normalise(Candidate(small, methods)).methods["block1.conv1"] == Method("w8a8")


def test_later_rules_override_key_by_key(graph):
    space = build_space(
        graph, rules(EVERYTHING, {"layers": ["block1.*"], "precisions": ["fp32"]}, protect=["head"]), Avx512()
    )
    assert all(method.precision == "fp32" for method in space.methods["block1.conv1"])
    assert len(space.widths["block1.conv1"]) == 4
    assert space.methods["head"] == (Method(),)
    assert Method("w8a8") in space.methods["stem"]


def test_tied_producers_must_agree(graph):
    space = build_space(graph, rules(EVERYTHING, {"layers": "block1.conv2", "keep": [1.0, 0.5]}), Avx512())
    assert space.widths["stem"] == (64, 32)
    assert any(r.subject == "stem" and "not allowed for all" in r.reason for r in space.refused)


def test_a_profile_without_kernels_limits_precisions(graph):
    space = build_space(graph, rules(EVERYTHING), [Avx512(), Avx512(name="old", lanes=8, precisions=("fp32",))])
    assert all(method.precision == "fp32" for options in space.methods.values() for method in options)
    assert any(r.option == "w8a8" and "profile old" in r.reason for r in space.refused)
    assert space.lanes == 16


def test_uniform(graph):
    space = build_space(graph, rules(EVERYTHING), Avx512())
    half = space.uniform(0.5, "w8a8")
    assert half.widths["stem"] == 32
    assert half.widths["head"] == 5
    assert set(half.methods.values()) == {Method("w8a8")}


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_normalise_is_idempotent_and_shapes_agree(graph, data):
    space = build_space(graph, rules(EVERYTHING), Avx512())
    widths = {name: data.draw(st.sampled_from(options)) for name, options in space.widths.items()}
    methods = {name: data.draw(st.sampled_from(options)) for name, options in space.methods.items()}
    once = space.normalise(Candidate(widths, methods))
    assert space.normalise(once) == once
    for name, layer in graph.layers.items():
        inputs, outputs = space.shape(name, widths)
        assert inputs == (widths[layer.in_group] if layer.in_group else layer.in_channels)
        assert outputs == widths[layer.out_group]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("format_version: 2\nrules: []\n", "newer"),
        ("format_version: 1\nrules: [{layers: '*', keeps: [0.5]}]\n", "unknown key 'rules.0.keeps'.*'keep'"),
        ("format_version: 1\nrules: [{layers: '*', keep: ['0.5']}]\n", "'0.5' is a text"),
        ("format_version: 1\nrules: [{layers: '*', keep: [5e-1]}]\n", "'5e-1' is a text"),
        ("format_version: 1\nrules: [{layers: '*', keep: [1.5]}]\n", "less than or equal to 1, got 1.5"),
        ("format_version: 1\nrules: [{layers: '*', precisions: [int4]}]\n", "precisions"),
        ("format_version: 1\n", "rules"),
        ("rules: [\n", "YAML"),
        ("- 1\n", "mapping"),
    ],
)
def test_bad_files_are_refused_with_file_and_key(tmp_path, text, message):
    path = tmp_path / "space.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        load_space(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_names_suggest(graph):
    with pytest.raises(UsageError, match="Did you mean 'default'"):
        load_space("defualt")
    with pytest.raises(UsageError, match="matches no layer"):
        build_space(graph, rules(EVERYTHING, {"layers": "blok1.conv1"}), Avx512())


def test_the_name_of_a_layer_means_that_layer_whatever_stands_in_it() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleDict({"x1": nn.Linear(64, 64), "x[1]": nn.Linear(64, 64), "y": nn.Linear(64, 4)})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers.values():
                x = torch.relu(layer(x))
            return x

    graph = analyse(Odd().eval(), (torch.randn(2, 64),))
    assert "layers.x[1]" in graph.layers
    space = build_space(graph, rules(EVERYTHING, protect=["layers.x[1]"]), Avx512())
    assert len(space.methods["layers.x[1]"]) == 1 < len(space.methods["layers.x1"])
    ruled = build_space(graph, rules({**EVERYTHING, "layers": "layers.x[1]"}), Avx512())
    assert len(ruled.methods["layers.x1"]) == 1 < len(ruled.methods["layers.x[1]"])
