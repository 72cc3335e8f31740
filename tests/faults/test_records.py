"""Records that are whole and not ours: set aside and said, never a traceback; and what killed writers leave is swept."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from autocomp.cache import sweep, write_atomically
from autocomp.kernels.tile import Tile
from autocomp.records.candidate import Candidate, Method
from autocomp.records.evaluation import Evaluation, evaluation_to_json
from autocomp.study.storage import open_storage
from autocomp.study.study import Choices, open_search
from autocomp.tuning.store import KernelRecord, KernelStore, RecordFields, read_lines

RECORD: dict[str, Any] = {
    "key": "k", "operator": "dense", "tile": {"rows": 4}, "seconds": 1e-6, "flops": 10, "trials": 1, "spatial": [4], "reduction": [8],
}  # fmt: skip


def line(fields: Any) -> bytes:
    body = json.dumps(fields)
    return f"{hashlib.sha256(body.encode()).hexdigest()[:12]} {body}\n".encode()


@pytest.mark.parametrize("fields", [
    {**RECORD, "more": 1}, {name: value for name, value in RECORD.items() if name != "tile"}, {**RECORD, "seconds": -1.0},
    {**RECORD, "seconds": "fast"}, {**RECORD, "tile": {"rows": -3}}, {**RECORD, "tile": {"lanes": 8}}, {**RECORD, "tile": None},
    {**RECORD, "spatial": None}, [], "k", None, 3,
])  # fmt: skip
def test_a_kernel_record_of_another_kind_is_set_aside(fields: Any, tmp_path: Path) -> None:
    store = KernelStore(tmp_path, {"target": "t"})
    store.add(KernelRecord("good", "dense", {"rows": 4}, 1e-6, 10, 1))
    path = tmp_path / "kernels.jsonl"
    path.write_bytes(path.read_bytes() + line(fields))
    again = KernelStore(tmp_path, {"target": "t"})
    assert (len(again), again.corrupt) == (1, 1)
    assert read_lines(path).damaged == (2,)
    again.compact()
    assert KernelStore(tmp_path, {"target": "t"}).corrupt == 0


def test_a_record_may_have_all_that_a_tile_has() -> None:
    """Else a tile that is given one more field would be set aside as soon as it is stored."""
    tile = {field.name: field.default for field in dataclasses.fields(Tile)}
    assert (
        RecordFields.model_validate_json(json.dumps({**RECORD, "tile": tile})).tile.model_dump(exclude={"bytes"})
        == tile
    )


SPACE = Choices({"g": (4, 2)}, {"a": (Method(), Method("w8a8"))})


def change(evaluation: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {**evaluation, **fields}


CHANGES: dict[str, Any] = {
    "extra": lambda e: change(e, mood="good"),
    "missing": lambda e: {name: value for name, value in e.items() if name != "bytes"},
    "negative bytes": lambda e: change(e, bytes=-1),
    "text for a number": lambda e: change(e, error="small"),
    "another trial": lambda e: change(e, trial=7),
    "another candidate": lambda e: change(e, candidate={"widths": {"g": 2}, "methods": {"a": "w8a8"}}),
    "outside the space": lambda e: change(e, candidate={"widths": {"g": 3}, "methods": {"a": "fp32"}}),
    "an unknown method": lambda e: change(e, candidate={"widths": {"g": 4}, "methods": {"a": "magic"}}),
    "latency of no time": lambda e: change(e, state="measured", latency={"x86-host": {"seconds": 0}}),
    "measured without a time": lambda e: change(e, state="measured"),
    "an unknown state": lambda e: change(e, state="dreamt"),
    "nothing": lambda _: {},
    "a list": lambda _: [1, 2],
    "a text": lambda _: "evaluation",
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_trial_of_another_kind_is_left_out(name: str, tmp_path: Path) -> None:
    url = f"journal:///{tmp_path / 'study.journal'}"
    search = open_search(url, "run", SPACE)
    for _ in range(2):
        asked = search.ask()
        assert asked is not None
        search.tell(asked.trial, Evaluation(asked.trial, asked.candidate, asked.source, "told", 0.1, 100, kl=0.1))
    first = search.told[0]
    search.close()
    storage = open_storage(url)
    study = storage.get_study_id_from_name("run")
    storage.set_study_user_attr(study, f"evaluation:{first.trial}", CHANGES[name](evaluation_to_json(first)))
    again = open_search(url, "run", SPACE, resume=True)
    assert [e.trial for e in again.told] == [1]
    assert again.unreadable == 1
    asked = again.ask()
    assert asked is not None
    again.close()


def test_what_killed_writers_left_is_swept(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)  # a process number that nobody has now
    ours, gone = f".x.{os.getpid()}.0a1b2c3d", f".x.{child}.0a1b2c3d"
    for name in (ours, gone, ".lock", ".x.note", "x.1.0a1b2c3d"):
        (tmp_path / name).write_text("")
    write_atomically(tmp_path / "kept", b"1")
    sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {ours, ".lock", ".x.note", "x.1.0a1b2c3d", "kept"}


def test_candidates_are_what_their_records_say() -> None:
    candidate = Candidate({"g": 4}, {"a": Method()})
    assert Candidate.from_json(json.loads(json.dumps(candidate.to_json()))) == candidate
