"""``evaluations.csv``: a row for every told trial, for whoever works with tables; written, and read back for the report."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from autocomp.cache import write_atomically
from autocomp.config.files import RECORDS_BYTES, read_text
from autocomp.config.versions import check_version
from autocomp.errors import CorruptError, UsageError, shown
from autocomp.records.candidate import Candidate
from autocomp.records.evaluation import FORMAT_VERSION, Evaluation
from autocomp.records.latency import Latency
from autocomp.records.recovery import recovery_from_json, recovery_to_json
from autocomp.records.run import EVALUATIONS


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
            check_version(int(version), path, FORMAT_VERSION)
        return [_evaluation({str(k): v for k, v in row.items() if not _missing(v)}) for row in table.to_dict("records")]
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CorruptError(
            f"{path} does not read as a table of evaluations ({shown(error)}): put it back, or let `autocomp search --resume --out {folder}` "
            "write it again"
        ) from error


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
