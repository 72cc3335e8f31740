"""Options that another beats in everything are dropped; the database is the same however many processes compute it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pipeline import Vectors, pipeline

from autocomp.database.database import LayerDatabase
from autocomp.database.stitch import stitch
from autocomp.errors import UsageError
from autocomp.records.candidate import Method
from autocomp.space.build import build_space
from autocomp.space.file import Rule, SpaceFile

torch.set_num_threads(1)


# At most 32 inputs make one group of any w4; of the codebooks, some are worse than levels of the same size.
MANY = ["fp32", "w8a8", "w8", "w4", "w4g32", "w4g128", "vq4", "rvq4"]
RULE = {"layers": "*", "keep": [1.0, 0.5], "ranks": [0.5], "precisions": MANY}


def database_in(folder):
    made = pipeline("flat")
    space = build_space(made.graph, SpaceFile(format_version=1, ends="any", rules=[Rule(**RULE)]), Vectors())
    return LayerDatabase(folder, made.model, made.graph, space, made.statistics)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    database = database_in(tmp_path_factory.mktemp("layers"))
    database.build()
    return database


def test_what_is_dropped_is_beaten_everywhere_by_what_stays(built):
    dropped = built.dominated([Vectors()])
    assert any(dropped.values())
    tables = {table.layer: table for table in built.tables()}
    for name, pairs in dropped.items():
        table = tables[name]
        for method, better in pairs.items():
            m, b = table.methods.index(method), table.methods.index(better)
            assert better not in pairs
            assert method.ranks == better.ranks
            assert (table.error[..., b] <= table.error[..., m]).all()
            assert (table.bytes[..., b] <= table.bytes[..., m]).all()
    space = built.space.without(dropped)
    assert space.size < built.space.size
    for options in space.methods.values():
        assert options[0] == Method()
        for method in options:  # what ranks come to at narrow widths must be there too
            assert Method(method.precision) in options
    assert sum("no more accurate" in refusal.reason for refusal in space.refused) == sum(map(len, dropped.values()))
    for table in built.tables(space):
        assert table.methods == space.methods[table.layer]
    narrow = space.normalise(space.uniform(0.5, "w8a8"))
    assert stitch(built.model, built.graph, built, narrow)(torch.randn(1, 1, 12, 12)).shape == (1, 5)


def test_the_lowest_error_at_any_size_stays(built):
    dropped = built.dominated([Vectors()])
    for table in built.tables():
        left = [m for m, method in enumerate(table.methods) if method not in dropped[table.layer]]
        for most in table.bytes[0, 0]:
            fits = [m for m in range(len(table.methods)) if table.bytes[0, 0, m] <= most]
            best = min(table.error[0, 0, m] for m in fits)
            assert best == min(table.error[0, 0, m] for m in left if table.bytes[0, 0, m] <= most)


def test_processes_write_what_one_would(built, tmp_path):
    again = database_in(tmp_path)
    again.build(workers=2)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in built.folder.iterdir()}
    assert again.warnings == []
    for mine, theirs in zip(built.tables(), again.tables(), strict=True):
        np.testing.assert_allclose(mine.error, theirs.error, rtol=1e-6)


def test_a_worker_that_cannot_write_says_so(tmp_path, monkeypatch):
    database = pipeline("flat").database(tmp_path)
    database.orders()

    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("autocomp.database.database.write_atomically", full)
    with pytest.raises(UsageError, match="No space left"):
        database.build(workers=2)
