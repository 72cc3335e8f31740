"""What a search found, read from its run folder: the points of the front, and the models they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autocomp.config.files import validated
from autocomp.config.quantities import parse_factor
from autocomp.config.settings import Goals
from autocomp.errors import UsageError, shown, suggest
from autocomp.front.goals import Judge, check_drops, family
from autocomp.records.candidate import Candidate
from autocomp.records.evaluation import Evaluation
from autocomp.records.latency import Latency
from autocomp.records.recovery import Recovery
from autocomp.records.run import FrontPoint, Run, read_run, speedup

if TYPE_CHECKING:
    import pandas as pd
    import torch


@dataclass(frozen=True)
class Point:
    """A point of the front: what was chosen, how it does, and where its files are.

    ``record`` is its entry of ``front.json``, ``folder`` the run folder, in which ``models/ID`` has its files.
    """

    record: FrontPoint
    folder: Path

    @property
    def candidate(self) -> Candidate:
        """The widths and methods chosen; its ``id`` is the name of the point."""
        return self.record.evaluation.candidate

    @property
    def metrics(self) -> Mapping[str, float]:
        """The task's metrics on the validation split, which the search read; the objective first."""
        return self.record.evaluation.metrics

    @property
    def test_metrics(self) -> Mapping[str, float]:
        """The same on the test split, read once at the end; empty where the task has none."""
        return self.record.test_metrics

    @property
    def latency(self) -> Mapping[str, Latency]:
        """The latency of the whole compiled module by profile."""
        return self.record.evaluation.latency

    @property
    def bytes(self) -> int:
        """Size of the stored weights."""
        return self.record.evaluation.bytes

    @property
    def recovered(self) -> Recovery | None:
        """How it was trained after it was compressed, with its metrics before; None where it was not."""
        return self.record.evaluation.recovered

    def load(self) -> torch.nn.Module:
        """The compressed torch model, in evaluation mode; nothing in its file is run.

        Raises:
            UsageError: It is not there, not readable, or not the file that the run wrote of this point.
        """
        from autocomp.export.files import load_model, refuse_foreign

        place = self.folder / "models" / self.candidate.id
        refuse_foreign(place, self.metrics)
        return load_model(place)


class SearchResult:
    """What a search found, read from its run folder: ``front`` (fast to slow), ``dense`` for comparison, ``run`` with all else.

    It can be iterated, and has a length: the points of the front.

    Raises:
        UsageError: The folder holds no finished run, or one that a newer autocomp wrote.
        CorruptError: A record does not read back as it was written.

    Examples:
        >>> result = SearchResult("runs/digits")  # doctest: +SKIP
        >>> [point.latency["x86-host"].seconds for point in result]  # doctest: +SKIP
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).absolute()  # wherever the caller goes
        self.run: Run = read_run(self.folder)
        self.front: list[Point] = [Point(record, self.folder) for record in self.run.front]
        self.dense = Point(self.run.dense, self.folder)

    @property
    def report(self) -> Path:
        """The path of the HTML page."""
        return self.folder / "report.html"

    def __iter__(self) -> Iterator[Point]:
        return iter(self.front)

    def __len__(self) -> int:
        return len(self.front)

    def to_frame(self) -> pd.DataFrame:
        """One row for each front point, fast to slow: metrics, seconds and speed-up by profile, bytes, drop of the objective
        and its standard error.

        A metric whose name another column has is called ``metric:NAME``.
        """
        import pandas as pd

        rows = []
        for point in self.front:
            row: dict[str, Any] = {"id": point.candidate.id}
            row |= {f"metric:{name}" if _is_column(name) else name: value for name, value in point.metrics.items()}
            row |= {f"test:{name}": value for name, value in point.test_metrics.items()}
            for profile, latency in point.latency.items():
                row[f"seconds:{profile}"] = latency.seconds
                row[f"how:{profile}"] = latency.how
                if latency.energy is not None:
                    row[f"joules:{profile}"] = latency.energy
                row[f"speedup:{profile}"] = speedup(point.record.evaluation, self.run.dense.evaluation, profile)
            row["bytes"] = point.bytes
            row["drop"] = Judge.of(self.run, Goals()).drop(point.record.evaluation)
            row["drop_error"] = point.record.evaluation.drop_errors.get(self.run.task.objective)
            rows.append(row)
        return pd.DataFrame(rows)

    def best(
        self,
        max_drop: float | str | Mapping[str, float | str] | None = None,
        max_latency: float | str | Mapping[str, float | str] | None = None,
        max_size: int | str | None = None,
        max_memory: int | str | None = None,
        max_energy: float | str | Mapping[str, float | str] | None = None,
    ) -> Point:
        """The point to take: the fastest within ``max_drop``, else the most accurate within the other limits.

        ``max_drop`` in units of the objective, or text (``1%`` of the uncompressed model's value, ``0.5pt``), or by metric; ``max_latency`` in
        seconds, or text (``0.5ms``, ``2x`` as fast), or by profile; ``max_size`` of stored weights, or text (``500KB``, ``5x`` smaller);
        ``max_memory`` that the compiled module needs, likewise; ``max_energy`` of one inference in joules, or text (``5mJ``, ``2x`` less), or by
        profile, where profiles state their power.
        Without any, the knee of the front. A point whose latency is noisy is taken only where all are.

        Raises:
            InfeasibleError: No point meets the limits; it says what the nearest one misses.
        """
        given = {
            "max_drop": max_drop, "max_latency": max_latency, "max_size": max_size, "max_memory": max_memory,
            "max_energy": max_energy,
        }  # fmt: skip
        return self.best_of(validated(Goals, given, ""))

    def best_of(self, goals: Goals) -> Point:
        """The point to take for these goals, as `best`."""
        return self._point(self._judge(goals).best(self._evaluations()))

    def family(
        self, *speedups: str, max_drop: float | str | Mapping[str, float | str] | None = None
    ) -> dict[str, Point]:
        """The most accurate point of each speed-up (``2x``, ``4x``), within ``max_drop``; one that no point reaches is left out.

        Where the run was on several profiles, the names are like ``2x on cortex-a76``.

        Raises:
            UsageError: A speed-up is not written so, or the limit is of a metric that the run does not have.
        """
        judge = self._judge(validated(Goals, {"max_drop": max_drop}, ""))
        try:
            factors = [parse_factor(str(text)) for text in speedups]
        except ValueError as error:
            raise UsageError(f"speed-ups: {error}") from None
        found = family(judge, self._evaluations(), factors, list(self.run.profiles))
        return {name: self._point(member) for name, member in found.items() if member is not None}

    def _judge(self, goals: Goals) -> Judge:
        """What points are held against. UsageError if a limit is of a metric or profile that the run does not have."""
        run = self.run
        check_drops(goals, run.task.objective, run.dense.evaluation.metrics, "the run has")
        for goal, name in goals.profiles_named():
            if name not in run.profiles:
                raise UsageError(
                    f"{goal} names {shown(name)}; the run has {', '.join(run.profiles)}.{suggest(name, run.profiles)}"
                )
        return Judge.of(run, goals)

    def _evaluations(self) -> list[Evaluation]:
        return [point.record.evaluation for point in self.front]

    def _point(self, evaluation: Evaluation) -> Point:
        return next(point for point in self.front if point.candidate == evaluation.candidate)


def _is_column(metric: str) -> bool:
    """Whether a column of `SearchResult.to_frame` has the name of a metric already."""
    return metric in ("id", "bytes", "drop", "drop_error") or metric.partition(":")[0] in (
        "seconds",
        "how",
        "joules",
        "speedup",
        "test",
        "metric",
    )
