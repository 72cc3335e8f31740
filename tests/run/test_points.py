"""What is published of a point: its size counted from its tensors, percentiles that check its latency, no secrets of the command line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny_task
import torch
from torch import Tensor, nn

import autocomp
from autocomp.graph.canonical import canonical
from autocomp.graph.fold import folded_bytes
from autocomp.records.evaluation import Evaluation
from autocomp.records.latency import Latency
from autocomp.run.found import Found
from autocomp.run.points import with_tail
from autocomp.tasks.task import Task

torch.set_num_threads(1)
pytestmark = pytest.mark.slow
MEASURED = Latency(1e-3, 0.02, "measured", "x86-host")


@pytest.mark.parametrize(
    ("p50", "kept", "noisy"), [(1e-3, True, False), (1.1e-3, True, False), (0.5e-3, True, True), (1.5e-3, False, False)]
)
def test_single_inferences_check_the_averages(p50: float, kept: bool, noisy: bool) -> None:
    tail = {"p50": p50, "p95": 2 * p50, "p99": 3 * p50}
    found = with_tail(MEASURED, tail)
    assert (bool(found.tail), found.noisy) == (kept, noisy)
    assert with_tail(MEASURED, {}) == MEASURED


class LateNorm(nn.Module):
    """BatchNorm after an activation, which folds into nothing, and PReLU: tensors of no layer that shrink with one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.second, self.act, self.last = nn.Conv2d(32, 48, 3, padding=1), nn.PReLU(48), nn.BatchNorm2d(48)
        self.head = nn.Linear(48, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x).relu())
        return self.head(self.last(self.act(self.second(x))).mean((2, 3)))


def test_a_published_size_is_that_of_the_tensors(tmp_path: Path, spaces: dict[str, str], short_tuning: None) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 1, 8, 8)
    model = LateNorm().eval()
    wanted = model(x).argmax(1)
    task = Task(
        model=model, example_inputs=(x[:1],), calibration=[(x,)],
        evaluate=lambda m: {"accuracy": (m(x).argmax(1) == wanted).float()},
    )  # fmt: skip
    result = autocomp.search(
        task, out=tmp_path / "run", space=spaces["wide"], trials=8, measurements=3, references=False
    )
    assert {point.bytes for point in result.front} == {folded_bytes(point.load()) for point in result.front}
    narrow = min(result.front, key=lambda point: point.bytes)
    assert narrow.bytes < result.dense.bytes
    for point in result.front:
        tensors = {t.data_ptr(): t.nbytes for t in (*point.load().parameters(), *point.load().buffers())}
        assert point.bytes <= sum(tensors.values()) + 4 * (32 + 48)


def test_a_point_that_the_uncompressed_model_beats_in_turn_leaves_the_front(
    tmp_path: Path, spaces: dict[str, str], short_tuning: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drifted(prepared: object, found: Found, dense: Evaluation, points: list[Evaluation]) -> list[Evaluation]:
        slow = replace(dense.latency["x86-host"], seconds=2 * dense.latency["x86-host"].seconds)
        again = [dense, *(e if e.trial == dense.trial else replace(e, latency={"x86-host": slow}) for e in points)]
        return [replace(e, earlier=dict(dense.latency)) for e in again]

    monkeypatch.setattr("autocomp.run.finish.timed_in_turn", drifted)
    result = autocomp.search(
        tiny_task.task(), out=tmp_path / "run", space=spaces["wide"], trials=8, measurements=3, references=False
    )
    dense = result.dense
    point = next(point for point in result.front if point.candidate == dense.candidate)
    assert all(p.metrics["accuracy"] > dense.metrics["accuracy"] for p in result.front if p is not point)
    assert sorted(path.name for path in (tmp_path / "run" / "models").iterdir()) == sorted(
        p.candidate.id for p in result
    )
    assert float(tiny_task.task().evaluate(point.load())["accuracy"]) == pytest.approx(dense.metrics["accuracy"])


def test_shared_tensors_and_norms_that_fold_are_counted_as_they_are_stored() -> None:
    model = canonical(
        nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()).eval(), (torch.randn(2, 1, 8, 8),)
    )
    assert folded_bytes(model) == 4 * (8 * 9 + 8), "weights, and the bias that folding makes"


def test_a_password_on_the_command_line_is_not_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, spaces: dict[str, str], short_tuning: None
) -> None:
    monkeypatch.setattr("sys.argv", ["autocomp", "search", "x", "--storage", "postgresql://me:hunter2secret@db/x"])
    autocomp.search(
        "tiny_task:task", out=tmp_path / "run", space=spaces["full"], trials=4, measurements=1, references=False
    )
    for file in ("provenance.json", "report.html", "front.json"):
        assert "hunter2secret" not in (tmp_path / "run" / file).read_text()
    assert "postgresql://me:***@db/x" in (tmp_path / "run" / "provenance.json").read_text()
