"""The runner of the corpus: whatever a stage does, its row says so, and the others go on; what is known is not run again."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import model_coverage
import pytest
import torch
from model_coverage_table import compiled, good, row, searched, shares, summary
from torch import Tensor, nn

from autocomp.errors import MismatchError, UsageError
from corpus import CORPUS, LIBRARIES
from corpus.entry import Entry, image, mask, tokens
from corpus.stages import Budget, agrees
from corpus.weights import build, spread_between


def test_a_hundred_models_of_every_library_and_kind() -> None:
    assert len(CORPUS) >= 100
    assert {entry.library for entry in CORPUS.values()} == set(LIBRARIES)
    counts = [sum(entry.library == library for entry in CORPUS.values()) for library in LIBRARIES]
    assert min(counts) >= 20
    kinds = {"classifier", "segmentation", "detector", "dense", "encoder", "decoder", "cache", "speech", "video"}
    assert {entry.kind for entry in CORPUS.values()} == kinds


def test_inputs_are_the_same_for_a_seed_and_differ_between_samples() -> None:
    entry = Entry("x/x", "encoder", nn.Identity, (*image(16), tokens(), mask()))
    first, again, other = entry.inputs(1, 4), entry.inputs(1, 4), entry.inputs(2, 4)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert [tuple(x.shape) for x in first] == [(4, 3, 16, 16), (4, 16), (4, 16)]
    assert set(first[2].unique().tolist()) <= {0, 1}
    assert bool((first[2][:, 0] == 1).all()), "every sample has a token"


class Dead(nn.Module):
    """As many models start: a branch scaled by 1e-6, a gain of zero, outputs a thousandth of what they should be."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.scale = (
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.Parameter(torch.full((8, 1, 1), 1e-6)),
        )
        self.head = nn.Linear(8, 5)
        nn.init.zeros_(self.norm.weight)
        nn.init.normal_(self.head.weight, std=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head((self.norm(self.conv(x)).relu() * self.scale).mean((2, 3)))
        return y


def test_weights_are_brought_to_life() -> None:
    entry = Entry("x/dead", "classifier", Dead, image(16))
    model = build(entry)
    with torch.no_grad():
        outputs = model(*entry.inputs(5, 64))
    assert 0.1 < float(outputs.std(0).mean()) < 10
    assert spread_between(model, entry) > 0.05
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), build(entry).state_dict().values(), strict=True)
    )


@pytest.mark.parametrize(
    ("change", "equal"),
    [
        (lambda y: y, True),
        (lambda y: y * (1 + 1e-5), True),
        (lambda y: y.relu(), False),
        (lambda y: torch.cat([y[:, :-1], y[:, -1:] * 1.05], 1), False),
        (lambda y: y * float("nan"), False),
        (lambda y: y[:, :-1], False),
    ],
)
def test_agrees_sees_what_differs(change: Callable[[Tensor], Tensor], equal: bool) -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 4)
    assert agrees(model, lambda x: change(model(x)), [(torch.randn(3, 6),)])["equal"] == equal


def test_agrees_sees_state_between_calls() -> None:
    model, calls = nn.Linear(6, 4), []

    def run(x: Tensor) -> Tensor:
        calls.append(1)
        return model(x) + 0.1 * (len(calls) > 1)

    batch = (torch.randn(3, 6),)
    assert not agrees(model, run, [batch, batch])["equal"]


def _refuse(*_: Any) -> Any:
    raise UsageError("no such operation: spin")


def _mismatch(*_: Any) -> Any:
    raise MismatchError("differs by 3")


def _raise(*_: Any) -> Any:
    raise KeyError("lost")


def _segfault(*_: Any) -> Any:
    os.kill(os.getpid(), signal.SIGSEGV)


def _hang(*_: Any) -> Any:
    time.sleep(60)


ENDS: dict[str, tuple[Callable[..., Any], str, str]] = {
    "fine": (lambda *_: {"equal": True}, "ok", ""),
    "unequal": (lambda *_: {"equal": False, "why": "half"}, "ok", ""),
    "refused": (_refuse, "refused", "no such operation: spin"),
    "wrong": (_mismatch, "wrong", "differs by 3"),
    "crash": (_raise, "crash", "lost"),
    "segfault": (_segfault, "crash", "SIGSEGV"),
    "hang": (_hang, "timeout", "not done"),
}


@pytest.fixture
def covered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A corpus of one model for each way a stage can end, run once."""
    entries = [Entry(f"x/{name}", "classifier", nn.Identity, image(8)) for name in ENDS]
    done: list[str] = []

    def stage(entry: Entry, *_: Any) -> Any:
        return ENDS[entry.name.removeprefix("x/")][0]()

    monkeypatch.setattr(model_coverage, "STAGES", {"build": stage, "analyse": lambda *_: done.append("") or {}})
    monkeypatch.setattr(model_coverage, "LIMITS", {"build": 2, "analyse": 2})
    results = model_coverage.Results(tmp_path)
    model_coverage.cover(entries, ["build", "analyse"], results, Budget(), 2)
    return {"entries": entries, "results": results}


def test_every_end_is_a_row(covered: dict[str, Any]) -> None:
    for entry in covered["entries"]:
        _, status, message = ENDS[entry.name.removeprefix("x/")]
        found = covered["results"].of(entry)
        assert found["build"]["status"] == status
        assert message in found["build"].get("message", "")
        assert ("analyse" in found) == (entry.name == "x/fine"), "what needs a failed stage is not run"
        assert len(row(entry.name, entry.kind, {**found, "build": {"status": "crash", "seconds": 1}})) == len(
            model_coverage.HEADINGS
        )


def test_what_is_known_is_not_run_again(covered: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    model_coverage.cover(covered["entries"], ["build", "analyse"], covered["results"], Budget(), 2)
    assert capsys.readouterr().out == ""


BUILT = {"status": "ok", "seconds": 1.0, "weights": 200, "activations": 7, "spread": 1.0}
CHECKED = {"status": "ok", "seconds": 1.0, "macs": 190, "prunable": 150, "quantisable": 190}
REFUSED = {"status": "refused", "seconds": 1.0, "message": "no spin"}
EQUAL = {"status": "ok", "seconds": 1.0, "equal": True, "error": 1e-6}
UNEQUAL = {"status": "ok", "seconds": 1.0, "equal": False, "error": 0.5, "why": "differs"}
SEARCHED = {"status": "ok", "seconds": 50.0, "points": 3}
BACK = {"status": "ok", "seconds": 5.0, "ok": 2, "silently_wrong": 1, "points": {}}


def test_summary_counts_what_the_goals_are_about() -> None:
    models: list[dict[str, Any]] = [
        {"build": BUILT, "analyse": CHECKED, "compile": EQUAL, "search": SEARCHED, "reload": BACK},
        {"build": BUILT, "analyse": CHECKED, "compile": UNEQUAL, "search": {"status": "crash", "seconds": 1.0}},
        {"build": BUILT, "analyse": REFUSED, "compile": REFUSED},
        {"build": BUILT, "analyse": CHECKED, "compile": REFUSED},
        {"build": {"status": "crash", "seconds": 1.0}},
    ]
    figures = summary(models)
    assert (figures["models"], figures["compiled"], figures["compile_and_equal"]) == (5, 4, 0.25)
    assert figures["silently_wrong"] == 2, "one whole model, and one point of a search"
    assert figures["refused_late"] == 1
    assert (figures["searches"], figures["searches_finished"]) == (2, 0.5)
    assert (figures["points"], figures["points_verified"]) == (3, 2)
    assert figures["median_prunable"] == 0.75
    assert compiled(models[2]).startswith("refused by check")
    assert compiled(models[3]).startswith("refused by the compiler, not by check")
    assert searched(models[0]) == "2 of 3 points verified, 1 SILENTLY WRONG"
    assert shares(models[4]) is None
    assert not good(UNEQUAL)
