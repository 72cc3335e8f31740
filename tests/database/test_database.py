"""The layer database: content, resuming, damage."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pipeline import pipeline

from autocomp.compress.prune import spread
from autocomp.database.database import read_checked
from autocomp.errors import AutocompError, CorruptError
from autocomp.progress import Progress
from autocomp.records.candidate import Method

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    database = pipeline().database(tmp_path_factory.mktemp("layers"))
    progress = Progress()
    database.build(progress)
    assert "layer database" in progress.seconds
    return database


def test_every_offered_entry_is_there(built):
    for name, methods in built.space.methods.items():
        layer = built.graph.layers[name]
        for width in built.widths_in(name):
            for method in methods:
                effective = built.space.effective(name, built.space.columns(name, width), layer.out_channels, method)
                entry = built.entry(name, width, effective)
                assert entry.error.shape == (layer.out_channels,)
                assert bool((entry.error >= 0).all())
    with pytest.raises(KeyError, match="does not offer"):
        built.entry("head", built.widths_in("head")[0], Method("fp32", (3,)))


def test_tables_are_zero_when_dense_and_grow_with_compression(built):
    for table in built.tables():
        assert table.error.shape == (len(table.widths_in), len(table.widths_out), len(table.methods))
        assert table.error[0, 0, 0] == 0.0
        assert np.isfinite(table.error).all()
        assert (np.diff(table.error[:, 0, 0]) >= 0).all()
        assert (np.diff(table.error[-1, :, 0]) <= 1e-12).all()
        assert (np.diff(table.bytes[:, 0, 0]) < 0).all()
        quantised = table.methods.index(Method("w8a8"))
        assert (table.bytes[..., quantised] < table.bytes[..., 0]).all()


def test_bytes_are_those_of_the_stored_tensors(built):
    for table in built.tables():
        layer = built.graph.layers[table.layer]
        original = built.model.get_submodule(table.layer)
        for i, width in enumerate(table.widths_in):
            for m, method in enumerate(table.methods):
                columns = built.space.columns(table.layer, width)
                effective = built.space.effective(table.layer, columns, layer.out_channels, method)
                module = built.entry(table.layer, width, effective).module(layer, original)
                size = sum(t.nbytes for t in module.state_dict().values())
                folded_bias = 4 * layer.out_channels if layer.norm and effective.precision == "fp32" else 0
                assert table.bytes[i, 0, m] == size + folded_bias


def test_errors_are_what_the_entries_do_to_the_data(built):
    """The table's error is the Fisher-weighted variance of the output difference, checked on the rows kept."""
    name = "block2.conv2"
    layer, seen = built.graph.layers[name], built.statistics.layers[name]
    width = built.widths_in(name)[-1]
    kept = built.kept(layer.in_group, width)
    columns = spread(kept, 9)
    original = built.model.get_submodule(name).weight.detach().double().flatten(1)
    for method in built.space.methods[name]:
        if method.ranks or method.precision != "fp32":
            continue
        entry = built.entry(name, width, method)
        difference = original.clone()
        difference[:, columns] -= entry.parts[0].weight.double().flatten(1)
        expected = torch.einsum("ok,kl,ol->o", difference, seen.covariance, difference) * seen.fisher
        torch.testing.assert_close(entry.error, expected, rtol=1e-4, atol=1e-12)


def test_a_second_build_reads_what_the_first_wrote(built):
    before = {path: path.stat().st_mtime_ns for path in built.folder.iterdir()}
    again = pipeline().database(built.folder)
    again.build()
    assert {path: path.stat().st_mtime_ns for path in again.folder.iterdir()} == before
    assert again.warnings == []
    for mine, theirs in zip(built.tables(), again.tables(), strict=True):
        np.testing.assert_array_equal(mine.error, theirs.error)


@pytest.mark.parametrize("damage", [b"", b"autocomp-layers", b"autocomp-layers 9 x\nnothing", None])
def test_a_damaged_file_is_rebuilt_and_said_so(tmp_path, damage):
    database = pipeline("flat").database(tmp_path)
    database.build()
    expected = database.tables()
    for path in tmp_path.iterdir():
        content = path.read_bytes()
        path.write_bytes(content[:-7] if damage is None else damage)
    progress = Progress()
    again = pipeline("flat").database(tmp_path)
    again.build(progress)
    assert len(again.warnings) == len(list(tmp_path.iterdir()))
    assert all("rebuilt" in text and ".bin" in text for text in again.warnings)
    assert progress.warnings == again.warnings
    for mine, theirs in zip(expected, again.tables(), strict=True):
        np.testing.assert_array_equal(mine.error, theirs.error)
    assert pipeline("flat").database(tmp_path).tables() is not None
    read_checked(next(tmp_path.iterdir()))


def test_a_newer_or_foreign_file_is_corrupt(tmp_path):
    (tmp_path / "layer-x.bin").write_bytes(b"something else")
    with pytest.raises(CorruptError, match=r"layer-x\.bin"):
        read_checked(tmp_path / "layer-x.bin")


def test_a_killed_build_leaves_whole_files_only(tmp_path, monkeypatch):
    """Stop in mid-build: what is there is complete, and the next build computes the rest alone."""
    database = pipeline("flat").database(tmp_path)
    from autocomp.database import database as module

    calls = []
    real = module.compress_layer

    def stop_at_third(*arguments):
        calls.append(arguments[1].name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(module, "compress_layer", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        database.build()
    done = len(list(tmp_path.iterdir()))
    assert done == 3
    for path in tmp_path.iterdir():
        read_checked(path)
    again = pipeline("flat").database(tmp_path)
    again.build()
    work = sum(len(again.widths_in(name)) for name in again.graph.layers)
    assert len(calls) == 3 + work - 2
    assert again.warnings == []


def test_an_unwritable_folder_is_one_message(tmp_path):
    (tmp_path / "file").write_text("")
    database = pipeline("flat").database(tmp_path / "file" / "layers")
    with pytest.raises(AutocompError, match="layer database cannot"):
        database.build()
