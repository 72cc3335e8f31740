"""What a run hands over: ``front.json`` and ``evaluations.csv``, written and read back; the report is made from them alone."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from autocomp.cache import write_atomically
from autocomp.config.files import RECORDS_BYTES, read_json, read_text
from autocomp.errors import CorruptError, UsageError, shown
from autocomp.records.candidate import Candidate
from autocomp.records.evaluation import (
    Evaluation,
    Reference,
    Sensitivity,
    evaluation_from_json,
    evaluation_to_json,
    reference_from_json,
    reference_to_json,
)
from autocomp.records.latency import Latency
from autocomp.records.recovery import (
    RecoverySummary,
    recovery_from_json,
    recovery_summary_from_json,
    recovery_summary_to_json,
    recovery_to_json,
)

FORMAT_VERSION = 1
FRONT = "front.json"
EVALUATIONS = "evaluations.csv"
OURS = "dense, tuned"  # how the reference begins that is our own dense module, called as the other runtimes are


@dataclass(frozen=True)
class TaskInfo:
    """What was compressed: ``objective`` names the first metric, ``bytes`` counts the dense weights."""

    name: str
    description: str
    objective: str
    higher_is_better: bool
    parameters: int
    bytes: int
    unit: str = ""  # of the objective; ``%``: a share between 0 and 1


@dataclass(frozen=True)
class LayerInfo:
    """A layer as the report shows it: ``out_group`` (None: never narrowed) says whose width it keeps."""

    name: str
    kind: str
    out_group: str | None
    out_channels: int


@dataclass(frozen=True)
class Verified:
    """Whether an exported file, loaded again, computes what was searched (``max_error``, relative), and its seconds.

    ``note`` says why it failed, or why it was allowed a larger error than usual; ``wrong`` that it was read back and computes something else.
    """

    ok: bool
    max_error: float | None = None
    seconds: float | None = None
    note: str = ""
    wrong: bool = False


@dataclass(frozen=True)
class FrontPoint:
    """One point of the measured front: metrics on the held-out split, checks by kind of file (``so``, ``onnx``), files.

    ``files`` are paths relative to the run folder by kind (``so``, ``onnx``, ``manifest``, ``weights``). ``test_errors`` and
    ``test_drop_errors`` are standard errors, as an `Evaluation` has them of the validation split.
    """

    evaluation: Evaluation
    test_metrics: Mapping[str, float] = field(default_factory=dict)
    verified: Mapping[str, Verified] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    test_errors: Mapping[str, float] = field(default_factory=dict)
    test_drop_errors: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Summary:
    """Counts of trials, seconds by stage, and Spearman's rank correlation of each accuracy proxy with the objective."""

    told: int
    measured: int
    failed: int
    seconds: Mapping[str, float] = field(default_factory=dict)
    spearman: Mapping[str, float] = field(default_factory=dict)
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Run:
    """Everything in ``front.json``. ``profiles`` maps names to a line each; metrics are of the validation split unless said.

    ``dense`` and ``baselines`` (uniform compression) are measured like the ``front``; ``references`` come from other runtimes
    and carry validation metrics too. ``hypervolume`` has a value in [0, 1] for every told trial. ``recovery`` is there where candidates were
    trained.
    """

    task: TaskInfo
    profiles: Mapping[str, str]
    dense: FrontPoint
    front: tuple[FrontPoint, ...]
    baselines: tuple[Evaluation, ...] = ()
    references: tuple[Reference, ...] = ()
    hypervolume: tuple[float, ...] = ()
    summary: Summary = Summary(0, 0, 0)
    layers: tuple[LayerInfo, ...] = ()
    warnings: tuple[str, ...] = ()
    sensitivity: tuple[Sensitivity, ...] = ()
    recovery: RecoverySummary | None = None


def speedup(evaluation: Evaluation, dense: Evaluation, profile: str) -> float:
    """How many times faster than the dense model, by times taken at one moment.

    What is on the front was timed again beside dense, in turn with it; the others were timed while searching, as dense was then.
    """
    again = profile in evaluation.earlier or evaluation.trial == dense.trial
    yardstick = dense.latency[profile] if again else dense.earlier.get(profile, dense.latency[profile])
    return yardstick.seconds / evaluation.latency[profile].seconds


def comparable(evaluation: Evaluation, dense: Evaluation, profile: str) -> float:
    """Seconds of an evaluation as they would be at the moment the dense model was last timed: those of it over `speedup`."""
    if profile not in dense.latency:
        return evaluation.latency[profile].seconds
    return dense.latency[profile].seconds / speedup(evaluation, dense, profile)


def comparable_reference(reference: Reference, run: Run) -> float:
    """Seconds of a reference as they would be at the moment the dense model was last timed, our dense module being timed in turn with it."""
    there = run.dense.evaluation.latency.get(reference.latency.profile)
    own = next(
        (r for r in run.references if r.name.startswith(OURS) and r.latency.profile == reference.latency.profile), None
    )
    if there is None or own is None:
        return reference.latency.seconds
    return reference.latency.seconds * there.seconds / own.latency.seconds


def write_front(folder: Path, run: Run) -> Path:
    """Write ``front.json`` into a run folder, whole or not at all; numbers that are not finite become null."""
    data = {
        "format_version": FORMAT_VERSION,
        "task": {key: value for key, value in asdict(run.task).items() if key != "unit" or value},
        "profiles": dict(run.profiles),
        "dense": _point_to_json(run.dense),
        "front": [_point_to_json(point) for point in run.front],
        "baselines": [evaluation_to_json(evaluation) for evaluation in run.baselines],
        "references": [reference_to_json(reference) for reference in run.references],
        "hypervolume": list(run.hypervolume),
        "summary": {
            **asdict(run.summary),
            "seconds": dict(run.summary.seconds),
            "spearman": dict(run.summary.spearman),
        },
        "layers": [asdict(layer) for layer in run.layers],
        "warnings": list(run.warnings),
    }
    if run.sensitivity:  # a later addition: runs without it are written as they always were
        data["sensitivity"] = [asdict(row) for row in run.sensitivity]
    if run.recovery is not None:
        data["recovery"] = recovery_summary_to_json(run.recovery)
    path = folder / FRONT
    write_atomically(path, (json.dumps(finite(data), indent=1, allow_nan=False) + "\n").encode())
    return path


def read_run(folder: Path) -> Run:
    """Read ``front.json`` of a run folder.

    UsageError if it is missing or was written by a newer autocomp, CorruptError if it does not read as one.
    """
    path = folder / FRONT
    try:
        data = read_json(path)
    except FileNotFoundError as error:
        raise UsageError(
            f"{folder} holds no {FRONT}: it is no run folder, or its search has not finished (--resume)"
        ) from error
    except UsageError as error:
        raise CorruptError(f"{error}; write it again with `autocomp search --resume`") from error
    version = data.get("format_version") if isinstance(data, dict) else None
    check_version(version, path)
    try:
        return Run(
            task=TaskInfo(**data["task"]),
            profiles=data["profiles"],
            dense=_point_from_json(data["dense"]),
            front=tuple(_point_from_json(point) for point in data["front"]),
            baselines=tuple(evaluation_from_json(evaluation) for evaluation in data["baselines"]),
            references=tuple(reference_from_json(reference) for reference in data["references"]),
            hypervolume=tuple(data["hypervolume"]),
            summary=Summary(**data["summary"]),
            layers=tuple(LayerInfo(**layer) for layer in data["layers"]),
            warnings=tuple(data["warnings"]),
            sensitivity=tuple(Sensitivity(**row) for row in data.get("sensitivity", ())),
            recovery=recovery_summary_from_json(data["recovery"]) if data.get("recovery") else None,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptError(
            f"{path} has format_version {version} but not its content ({type(error).__name__}: {shown(error)}): "
            "write it again with `autocomp search --resume`"
        ) from error


def check_version(version: object, path: Path) -> None:
    """Refuse a file of a newer format, saying what to do; CorruptError where there is no version at all."""
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise CorruptError(f"{path} carries no format_version (found {shown(version)}): it was not written by autocomp")
    if version > FORMAT_VERSION:
        raise UsageError(
            f"{path} has format_version {shown(version)}, and this autocomp reads up to {FORMAT_VERSION}: a newer one wrote it; "
            "upgrade (pip install --upgrade autocomp), or open the report.html beside it, which needs no autocomp"
        )


def write_evaluations(folder: Path, evaluations: Sequence[Evaluation]) -> Path:
    """Write ``evaluations.csv``: a row for every told trial, columns per metric and profile; latencies in milliseconds."""
    import pandas as pd

    rows = [_row(evaluation) for evaluation in evaluations]
    columns = list(dict.fromkeys(name for row in rows for name in row)) or ["id", "trial"]
    grouped = sorted(columns, key=lambda name: _COLUMN_ORDER.index(name.partition(":")[0]))
    path = folder / EVALUATIONS
    write_atomically(path, pd.DataFrame(rows, columns=grouped).to_csv(index=False).encode())
    return path


def read_evaluations(folder: Path) -> list[Evaluation]:
    """Read ``evaluations.csv`` back; kernels, raw samples and devices of latencies and curves of trainings are not in it.

    Errors as ``read_run``.
    """
    import pandas as pd

    path = folder / EVALUATIONS
    try:
        text = read_text(path, RECORDS_BYTES)
    except UsageError as error:
        raise CorruptError(str(error)) from error
    except FileNotFoundError as error:
        raise UsageError(
            f"{folder} holds no {EVALUATIONS}: it is no run folder, or its search has not finished"
        ) from error
    try:
        table = pd.read_csv(io.StringIO(text), dtype={"id": str, "failure": str, "recovered": str})
        for version in table.get("format_version", pd.Series(dtype=int)).unique():
            check_version(int(version), path)
        return [_evaluation({str(k): v for k, v in row.items() if not _missing(v)}) for row in table.to_dict("records")]
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CorruptError(f"{path} does not read as a table of evaluations: {shown(error)}") from error


def finite(value: Any) -> Any:
    """The same JSON value with None for what is infinite or not a number: neither is JSON."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


_COLUMN_ORDER = [
    "id",
    "trial",
    "source",
    "state",
    "tier",
    "error",
    "kl",
    "metric",
    "metric_error",
    "drop_error",
    "recovered",
    "predicted_ms",
    "latency_ms",
    "latency_how",
    "latency_spread",
    "latency_error",
    "earlier_ms",
    "bytes",
    "seconds_spent",
    "failure",
    "widths",
    "methods",
    "format_version",
]


_CURVES = ("losses", "readings")  # left out of the table


def _row(evaluation: Evaluation) -> dict[str, Any]:
    candidate = evaluation.candidate.to_json()
    row: dict[str, Any] = {
        "id": evaluation.candidate.id,
        "trial": evaluation.trial,
        "source": evaluation.source,
        "state": evaluation.state,
        "tier": evaluation.tier,
        "error": evaluation.error,
        "kl": evaluation.kl,
        **{f"metric:{name}": value for name, value in evaluation.metrics.items()},
        **{f"metric_error:{name}": value for name, value in evaluation.errors.items()},
        **{f"drop_error:{name}": value for name, value in evaluation.drop_errors.items()},
        **{f"predicted_ms:{profile}": _milliseconds(seconds) for profile, seconds in evaluation.predicted.items()},
    }
    for profile, latency in evaluation.latency.items():
        row[f"latency_ms:{profile}"] = _milliseconds(latency.seconds)
        row[f"latency_how:{profile}"] = latency.how
        row[f"latency_spread:{profile}"] = latency.spread
        row[f"latency_error:{profile}"] = latency.error
    row |= {f"earlier_ms:{profile}": _milliseconds(latency.seconds) for profile, latency in evaluation.earlier.items()}
    if evaluation.recovered is not None:
        brief = {key: value for key, value in recovery_to_json(evaluation.recovered).items() if key not in _CURVES}
        row["recovered"] = json.dumps(brief, separators=(",", ":"))
    row |= {
        "bytes": evaluation.bytes,
        "seconds_spent": evaluation.seconds_spent,
        "failure": evaluation.failure,
        "widths": json.dumps(candidate["widths"], separators=(",", ":")),
        "methods": json.dumps(candidate["methods"], separators=(",", ":")),
        "format_version": FORMAT_VERSION,
    }
    return row


def _evaluation(row: Mapping[str, Any]) -> Evaluation:
    def part(prefix: str) -> dict[str, Any]:
        return {name.partition(":")[2]: value for name, value in row.items() if name.startswith(prefix + ":")}

    how, spread, error = part("latency_how"), part("latency_spread"), part("latency_error")
    latency = {
        profile: Latency(ms * 1e-3, spread.get(profile, 0.0), how[profile], profile, error=error.get(profile))
        for profile, ms in part("latency_ms").items()
    }
    earlier = {profile: Latency(ms * 1e-3, 0.0, how[profile], profile) for profile, ms in part("earlier_ms").items()}
    choice = {"widths": json.loads(row["widths"]), "methods": json.loads(row["methods"])}
    return Evaluation(
        trial=int(row["trial"]),
        candidate=Candidate.from_json(choice),
        source=row["source"],
        state=row["state"],
        error=float(row.get("error", math.nan)),
        bytes=int(row["bytes"]),
        predicted={profile: ms * 1e-3 for profile, ms in part("predicted_ms").items()},
        kl=float(row["kl"]) if "kl" in row else None,
        metrics=part("metric"),
        errors=part("metric_error"),
        drop_errors=part("drop_error"),
        latency=latency,
        earlier=earlier,
        failure=row.get("failure"),
        seconds_spent=float(row.get("seconds_spent", 0.0)),
        recovered=recovery_from_json(json.loads(row["recovered"])) if "recovered" in row else None,
    )


def _milliseconds(seconds: float) -> float:
    return float(f"{seconds * 1e3:.12g}")  # without the last bits, so that reading and writing again changes nothing


def _missing(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _point_to_json(point: FrontPoint) -> dict[str, Any]:
    later = {"test_errors": dict(point.test_errors), "test_drop_errors": dict(point.test_drop_errors)}
    return {
        "evaluation": evaluation_to_json(point.evaluation),
        "test_metrics": dict(point.test_metrics),
        "verified": {kind: _check_to_json(check) for kind, check in point.verified.items()},
        "files": dict(point.files),
        **{name: values for name, values in later.items() if values},
    }


def _check_to_json(check: Verified) -> dict[str, Any]:
    fields = asdict(check)
    if not check.wrong:  # of which files of before know nothing
        del fields["wrong"]
    return fields


def _point_from_json(data: Mapping[str, Any]) -> FrontPoint:
    verified = {kind: Verified(**check) for kind, check in data["verified"].items()}
    errors = data.get("test_errors", {}), data.get("test_drop_errors", {})
    return FrontPoint(evaluation_from_json(data["evaluation"]), data["test_metrics"], verified, data["files"], *errors)
