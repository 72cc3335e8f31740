"""What a run was expected to find and to take, beside what it found and took."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from autocomp.front.agreement import median_error, spearman
from autocomp.records.evaluation import Evaluation
from autocomp.records.expected import MEASURING, PREPARING, TELLING, Expected
from autocomp.records.run import Run, speedup

NOTHING = 1e-9  # nats: less is what rounding leaves of 0


def expected_and_found(run: Run, evaluations: Sequence[Evaluation]) -> dict[str, Any] | None:
    """Texts for the section: points of the expected front, how near predictions came, and seconds; None where nothing was kept."""
    if (expected := run.expected) is None:
        return None
    measured = [e for e in evaluations if e.state == "measured" and e.source != "dense"]
    return {
        "points": _points(expected, run, measured),
        "agreement": _agreement(expected, run, measured),
        "parts": _parts(expected, run, sum(e.source != "uniform" for e in measured)),
    }


def _points(expected: Expected, run: Run, measured: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """Each expected point, and by profile the fastest measured model that diverges no more."""
    dense = run.dense.evaluation
    rows = []
    for point in expected.points:
        near = [e for e in measured if e.kl is not None and e.kl <= point.divergence]
        found = []
        for profile in run.profiles:
            times = [speedup(e, dense, profile) for e in near if profile in e.latency and profile in dense.latency]
            fastest = max([1.0, *times])  # dense itself, which diverges by nothing, is there always
            found.append({"expected": _times(point.speedup.get(profile)), "found": _times(fastest)})
        rows.append(
            {
                "divergence": f"{point.divergence:.3g}" if point.divergence > NOTHING else "0",
                "smaller": f"{dense.bytes / point.bytes:.1f}×" if point.bytes else "–",
                "profiles": found,
            }
        )
    return rows


def _agreement(expected: Expected, run: Run, measured: Sequence[Evaluation]) -> list[dict[str, str]]:
    """Of the measured candidates, what was thought of them before against what came: rank correlation and median relative error."""
    dense, rows = run.dense.evaluation, []
    known = [(expected.candidates[e.candidate.id], e) for e in measured if e.candidate.id in expected.candidates]
    for profile in run.profiles:
        pairs = [
            (thought.speedup[profile], speedup(e, dense, profile))
            for thought, e in known
            if profile in thought.speedup and profile in e.latency and profile in dense.latency
        ]
        rows.append(_row(f"speed-up on {profile}", pairs))
    pairs = [(thought.divergence, e.kl) for thought, e in known if e.kl is not None and e.kl > 0]
    return [*rows, _row("divergence", pairs)]


def _row(what: str, pairs: Sequence[tuple[float, float]]) -> dict[str, str]:
    thought, found = [a for a, _ in pairs], [b for _, b in pairs]
    rank, error = spearman(thought, found), median_error(thought, found)
    return {
        "what": what,
        "count": str(len(pairs)),
        "spearman": "–" if rank is None else f"{rank:.2f}".replace("-", "−"),
        "error": "–" if error is None else f"{error * 100:.0f} %",
    }


def _parts(expected: Expected, run: Run, measured: int) -> list[dict[str, str]]:
    """Seconds of the parts of the search, with how much of each was asked for and done."""
    done = {TELLING: f"{run.summary.told} told", MEASURING: f"{measured} measured"}
    asked = {TELLING: f"{expected.trials} trials", MEASURING: f"{expected.measurements} measurements"}
    rows = []
    for part in (PREPARING, TELLING, MEASURING):
        guess = None if part == PREPARING else expected.seconds.get(part)  # what was over by then is no guess
        rows.append(
            {
                "part": asked.get(part, part),
                "expected": _seconds(guess),
                "spent": _seconds(expected.spent.get(part)),
                "done": done.get(part, ""),
            }
        )
    return rows


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f} s"


def _times(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}×"
