"""What a run hands over: ``front.json``, written and read back; the report is made from it and the table of evaluations alone."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from autocomp.cache import write_atomically
from autocomp.config.files import read_json
from autocomp.config.versions import current
from autocomp.errors import CorruptError, UsageError, shown
from autocomp.records.evaluation import (
    Evaluation,
    Reference,
    Sensitivity,
    evaluation_from_json,
    evaluation_to_json,
    reference_from_json,
    reference_to_json,
    sound,
)
from autocomp.records.expected import Expected, expected_from_json, expected_to_json
from autocomp.records.recovery import (
    RecoverySummary,
    recovery_summary_from_json,
    recovery_summary_to_json,
)

FORMAT_VERSION = 1
FRONT = "front.json"
EVALUATIONS = "evaluations.csv"
_CHECKSUM = "checksum"
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
class Decider:
    """How much of what told a search's candidates apart lay in one layer: its shares of the variance of the divergence and of the seconds.

    Both are of the additive model as it was fitted at the end; over all layers each sums to 1 (a layer that works against the others has a
    share below 0).
    """

    layer: str
    divergence: float
    seconds: float


@dataclass(frozen=True)
class Kept:
    """What is not offered, why, and how much of the dense model's predicted time that leaves untouched."""

    subject: str
    option: str
    reason: str
    share: float


@dataclass(frozen=True)
class LayerInfo:
    """A layer as the report shows it: ``out_group`` (None: never narrowed) says whose width it keeps, ``in_group`` whose it reads."""

    name: str
    kind: str
    out_group: str | None
    out_channels: int
    in_group: str | None = None


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
class Deployed:
    """The validation metrics of a point as a ``file`` of it computes them, or why they were not read (``note``).

    ``errors`` has standard errors of the differences from torch, sample by sample, of metrics that differ and are means over samples;
    ``differs`` names those that differ by more than noise.
    """

    file: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)
    differs: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class FrontPoint:
    """One point of the measured front: metrics on the held-out split, checks by kind of file (``so``, ``onnx``), files.

    ``files`` are paths relative to the run folder by kind (``so``, ``onnx``, ``manifest``, ``weights``). ``test_errors`` and
    ``test_drop_errors`` are standard errors, as an `Evaluation` has them of the validation split. ``deployed`` has by profile what the metric
    is of what was written for it.
    """

    evaluation: Evaluation
    test_metrics: Mapping[str, float] = field(default_factory=dict)
    verified: Mapping[str, Verified] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    test_errors: Mapping[str, float] = field(default_factory=dict)
    test_drop_errors: Mapping[str, float] = field(default_factory=dict)
    deployed: Mapping[str, Deployed] = field(default_factory=dict)


def is_of_others(manifest: Mapping[str, Any], metrics: Mapping[str, float]) -> bool:
    """Whether a point's manifest is of other weights than have these metrics: it was trained, and the run stopped before it wrote its front."""
    return bool(manifest.get("metrics", dict(metrics)) != dict(metrics))


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
    and carry validation metrics too. ``hypervolume`` has a value in [0, 1] for every told trial. ``identity`` has digests of what the numbers
    belong to, by what a message calls them: the model's weights, the calibration data, each profile. ``recovery`` is there where
    candidates were trained, ``expected`` where the run kept what was expected of it.
    ``goals`` and ``family`` are the settings of these names; None where a version wrote it that left them to the config. ``recipes`` has what
    recipes say that points were trained by, by their names. ``table`` is a digest of the table of evaluations beside it.
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
    identity: Mapping[str, str] = field(default_factory=dict)
    deciders: tuple[Decider, ...] = ()
    kept: tuple[Kept, ...] = ()
    recovery: RecoverySummary | None = None
    expected: Expected | None = None
    goals: Mapping[str, Any] | None = None
    family: tuple[str, ...] = ()
    recipes: Mapping[str, Any] = field(default_factory=dict)
    table: str = field(default="", compare=False)


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
    """Seconds of a reference as they would be at the moment the dense model was last timed, our dense module being timed in turn with it.

    Other runtimes are called from Python, and so was our dense module beside them; what ours compiled is timed as the front is, by itself.
    """
    if reference.kind == "classic":
        return reference.latency.seconds
    there = run.dense.evaluation.latency.get(reference.latency.profile)
    own = next(
        (r for r in run.references if r.name.startswith(OURS) and r.latency.profile == reference.latency.profile), None
    )
    if there is None or own is None:
        return reference.latency.seconds
    return reference.latency.seconds * there.seconds / own.latency.seconds


def _layer_to_json(layer: LayerInfo) -> dict[str, Any]:
    """A later addition: layers that read no group are written as they always were."""
    return {name: value for name, value in asdict(layer).items() if name != "in_group" or value is not None}


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
        "layers": [_layer_to_json(layer) for layer in run.layers],
        "warnings": list(run.warnings),
    }
    for name in (
        "sensitivity",
        "deciders",
        "kept",
    ):  # later additions: runs without them are written as they always were
        if rows := getattr(run, name):
            data[name] = [asdict(row) for row in rows]
    if run.identity:
        data["identity"] = dict(run.identity)
    if run.recovery is not None:
        data["recovery"] = recovery_summary_to_json(run.recovery)
    if run.expected is not None:
        data["expected"] = expected_to_json(run.expected)
    if run.goals is not None:
        data |= {"goals": dict(run.goals), "family": list(run.family)}
    if run.recipes:
        data["recipes"] = dict(run.recipes)
    if (table := folder / EVALUATIONS).exists():
        data["table"] = _digest(table)
    path, said = folder / FRONT, finite(data)
    said[_CHECKSUM] = _checksum(said)
    write_atomically(path, (json.dumps(said, indent=1, allow_nan=False) + "\n").encode())
    return path


def _checksum(data: Mapping[str, Any]) -> str:
    """Of everything that ``front.json`` says but this."""
    text = json.dumps({name: value for name, value in data.items() if name != _CHECKSUM}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def refuse_other_table(folder: Path, run: Run) -> None:
    """CorruptError if the table of evaluations in a run folder is not the one that its ``front.json`` was written with."""
    table = folder / EVALUATIONS
    if run.table and table.exists() and _digest(table) != run.table:
        raise CorruptError(
            f"{table} is not the table that {FRONT} was written with: it was edited, or is another run's. Put it back, or write both again with "
            "`autocomp search --resume`"
        )


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
    written, data = data, current(data, path, FORMAT_VERSION)
    checksum = _checksum(written)
    if written.get(_CHECKSUM, checksum) != checksum:  # earlier versions wrote none
        raise CorruptError(
            f"{path} is not as autocomp wrote it: it was edited, or damaged. Put it back, or write it again with `autocomp search --resume`"
        )
    try:
        return Run(
            task=TaskInfo(**data["task"]),
            profiles=_texts(data["profiles"]),
            dense=_point_from_json(data["dense"]),
            front=tuple(_point_from_json(point) for point in data["front"]),
            baselines=tuple(_measured(evaluation) for evaluation in data["baselines"]),
            references=tuple(reference_from_json(reference) for reference in data["references"]),
            hypervolume=tuple(data["hypervolume"]),
            summary=Summary(**data["summary"]),
            layers=tuple(LayerInfo(**layer) for layer in data["layers"]),
            warnings=tuple(str(warning) for warning in data["warnings"]),
            sensitivity=tuple(Sensitivity(**row) for row in data.get("sensitivity", ())),
            identity=_texts(data.get("identity", {})),
            deciders=tuple(Decider(**row) for row in data.get("deciders", ())),
            kept=tuple(Kept(**row) for row in data.get("kept", ())),
            recovery=recovery_summary_from_json(data["recovery"]) if data.get("recovery") else None,
            expected=expected_from_json(data["expected"]) if data.get("expected") else None,
            goals=data.get("goals"),
            family=tuple(str(member) for member in data.get("family", ())),
            recipes=dict(data.get("recipes", {})),
            table=str(data.get("table", "")),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptError(
            f"{path} has format_version {FORMAT_VERSION} but not its content ({type(error).__name__}: {shown(error)}): "
            "write it again with `autocomp search --resume`"
        ) from error


def finite(value: Any) -> Any:
    """The same JSON value with None for what is infinite or not a number: neither is JSON."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _point_to_json(point: FrontPoint) -> dict[str, Any]:
    later: dict[str, Any] = {"test_errors": dict(point.test_errors), "test_drop_errors": dict(point.test_drop_errors)}
    later["deployed"] = {profile: asdict(read) for profile, read in point.deployed.items()}
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
    read = {profile: _deployed(found) for profile, found in data.get("deployed", {}).items()}
    return FrontPoint(
        _measured(data["evaluation"]), data["test_metrics"], verified, _texts(data["files"]), *errors, read
    )


def _deployed(data: Mapping[str, Any]) -> Deployed:
    return Deployed(**{**data, "differs": tuple(data["differs"])})


def _measured(data: Mapping[str, Any]) -> Evaluation:
    """A measured evaluation, of values that a search may have written; ValueError for others."""
    evaluation = evaluation_from_json(data)
    unread: dict[str, Any] = (
        {"error": 0.0} if evaluation.error is None else {}
    )  # written as null where it is not a number
    metrics = {name: 0.0 if value is None else value for name, value in evaluation.metrics.items()}
    sound(replace(evaluation, metrics=metrics, **unread), evaluation.trial, evaluation.candidate)
    if evaluation.state != "measured":
        raise ValueError(f"trial {evaluation.trial} is {shown(evaluation.state)}, not measured")
    return evaluation


def _texts(data: Any) -> dict[str, str]:
    """A mapping of texts, as it is; TypeError for anything else."""
    if not isinstance(data, dict) or not all(isinstance(value, str) for value in data.values()):
        raise TypeError(f"a mapping of texts is due, found {shown(data)}")
    return data
