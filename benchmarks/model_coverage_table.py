"""From what `model_coverage.py` found to its table: a line a model, and the summary against the goals."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Found = Mapping[str, Any]  # of one model: what each stage found, by its name
SLOWER = 1.1  # times as slow as ONNX Runtime: named
HEADINGS = (
    "model", "kind", ">M mult", ">prunable", ">quantisable", ">between activations", "compiled", ">error", ">/ONNX Runtime", "search",
    ">seconds: check", ">compile", ">search",
)  # fmt: skip


def good(stage: Found | None) -> bool:
    """Whether a stage did all it should."""
    return stage is not None and stage["status"] == "ok" and bool(stage.get("equal", True))


@dataclass(frozen=True)
class Shares:
    """Of one model's multiplications by weights: the share in layers that can be narrowed, and in layers that can have 8 bits."""

    prunable: float
    quantisable: float


def shares(found: Found) -> Shares | None:
    """None for a model that was not analysed, or has no multiplication by weights."""
    if not good(found.get("analyse")) or not good(found.get("build")) or not found["build"]["weights"]:
        return None
    total = found["build"]["weights"]
    return Shares(found["analyse"]["prunable"] / total, found["analyse"]["quantisable"] / total)


def compiled(found: Found) -> str:
    """``equal``, or in a few words what else: refused by ``check`` or only later, wrong and noticed, or wrong in silence."""
    stage, check = found.get("compile"), found.get("analyse")
    if stage is None:
        return "" if good(found.get("build")) else f"not built: {_reason(found.get('build'))}"
    if good(stage):
        return "equal"
    if stage["status"] == "ok":
        return f"SILENTLY WRONG: {stage['why']}"
    if stage["status"] == "refused":
        by_check = check is not None and check["status"] == "refused"
        return f"refused by {'check' if by_check else 'the compiler, not by check'}: {_reason(stage)}"
    if stage["status"] == "wrong":
        return f"wrong, and noticed: {_reason(stage)}"
    return f"{stage['status']}: {_reason(stage)}"


def searched(found: Found) -> str:
    """``N points``, all of whose files were read back and agree; or what else."""
    stage, back, check = found.get("search"), found.get("reload"), found.get("analyse")
    if stage is None:
        return "" if good(check) else f"not analysed: {_reason(check)}"
    if not good(stage):
        return f"{stage['status']}: {_reason(stage)}"
    if back is None:
        return f"{stage['points']} points, not read back"
    if not good(back):
        return f"{stage['points']} points; reading them back: {_reason(back)}"
    wrong, kept = back["silently_wrong"], back["ok"]
    text = f"{kept} of {stage['points']} points verified" if kept < stage["points"] else f"{kept} points"
    return text + (f", {wrong} SILENTLY WRONG" if wrong else "")


def row(name: str, kind: str, found: Found) -> list[str]:
    """One line of the table."""
    count, share, ratio = found.get("build", {}), shares(found), _ratio(found)
    error = found.get("compile", {}).get("error")
    million = f"{count['weights'] / 1e6:.1f}" if good(found.get("build")) else ""
    products = f"{count['activations'] / 1e6:.1f}" if good(found.get("build")) else ""
    seconds = [f"{found[stage]['seconds']:.0f}" if stage in found else "" for stage in ("analyse", "compile", "search")]
    return [
        name, kind, million, f"{share.prunable:.0%}" if share else "", f"{share.quantisable:.1%}" if share else "", products,
        compiled(found), f"{error:.0e}" if isinstance(error, float) else "", f"{ratio:.2f}" if ratio else "", searched(found), *seconds,
    ]  # fmt: skip


def summary(all_found: Sequence[Found]) -> dict[str, Any]:
    """The figures that the goals are about. Shares are of the models that were analysed, the others of all that can be built."""
    tried = [found for found in all_found if good(found.get("build")) and "compile" in found]
    searches = [found for found in all_found if "search" in found]  # what check refuses is none: it counts above
    known = [share for share in map(shares, all_found) if share is not None]
    ratios = [ratio for ratio in map(_ratio, all_found) if ratio is not None]
    outcomes = Counter(compiled(found).partition(":")[0] for found in tried)
    return {
        "models": len(all_found),
        "compiled": len(tried),
        "compile_and_equal": outcomes["equal"] / len(tried) if tried else None,
        "outcomes": dict(outcomes),
        "silently_wrong": outcomes["SILENTLY WRONG"]
        + sum(found["reload"]["silently_wrong"] for found in all_found if good(found.get("reload"))),
        "refused_late": outcomes["refused by the compiler, not by check"],
        "searches": len(searches),
        "searches_finished": sum(good(found.get("search")) for found in searches) / len(searches) if searches else None,
        "points": sum(found["search"]["points"] for found in all_found if good(found.get("search"))),
        "points_verified": sum(found["reload"]["ok"] for found in all_found if good(found.get("reload"))),
        "median_prunable": statistics.median(share.prunable for share in known) if known else None,
        "nothing_prunable": sum(share.prunable == 0 for share in known),
        "median_quantisable": statistics.median(share.quantisable for share in known) if known else None,
        "least_quantisable": min((share.quantisable for share in known), default=None),
        "median_ratio": statistics.median(ratios) if ratios else None,
        "seconds": sum(stage["seconds"] for found in all_found for stage in found.values()),
    }


def goals(figures: Mapping[str, Any]) -> list[str]:
    """The summary in words, each figure beside its goal."""

    def percent(value: float | None) -> str:
        return "not known" if value is None else f"{value:.1%}"

    return [
        f"Compile and equal torch: {percent(figures['compile_and_equal'])} of {figures['compiled']} (goal: at least 97 %).",
        f"Silently wrong: {figures['silently_wrong']} (goal: 0). Refused by the compiler though `check` let it pass: "
        f"{figures['refused_late']} (goal: 0).",
        f"Searches that finished: {percent(figures['searches_finished'])} of {figures['searches']} (goal: at least 95 %); "
        f"{figures['points_verified']} of their {figures['points']} points were read back and agree in both files.",
        f"Multiplications by weights in layers that can be pruned: median {percent(figures['median_prunable'])} (goal: at least 90 %), "
        f"models with nothing to prune: {figures['nothing_prunable']} (goal: 0); in layers that can have 8 bits: median "
        f"{percent(figures['median_quantisable'])} (goal: at least 99 %), least {percent(figures['least_quantisable'])}.",
        *([f"Time of ours over ONNX Runtime's, fp32: median {figures['median_ratio']:.2f}."] if figures["median_ratio"] else []),
        f"All stages together took {figures['seconds'] / 60:.0f} minutes of their processes.",
    ]  # fmt: skip


def remaining(by_name: Mapping[str, Found]) -> list[str]:
    """The models that fall behind a goal, and why."""
    notes = []
    for name, found in by_name.items():
        share = shares(found)
        if share is not None and share.prunable == 0:
            reasons = "; ".join(dict.fromkeys(found["analyse"]["frozen"].values()))
            notes.append(f"Nothing to prune in {name}: {reasons}.")
    slow = sorted(
        ((ratio, name) for name, found in by_name.items() if (ratio := _ratio(found)) and ratio > SLOWER), reverse=True
    )
    if slow:
        notes.append(
            f"Over {SLOWER:g} times ONNX Runtime's time: {', '.join(f'{name} {ratio:.2f}' for ratio, name in slow)}."
        )
    without: dict[str, list[str]] = {}
    for name, found in by_name.items():
        if good(found.get("time")) and _ratio(found) is None:
            without.setdefault(found["time"]["no_ratio"], []).append(name)
    notes += [f"No ratio to ONNX Runtime, {reason}: {', '.join(names)}." for reason, names in without.items()]
    return notes


def _ratio(found: Found) -> float | None:
    return found["time"].get("ratio") if good(found.get("time")) else None


def _reason(stage: Found | None) -> str:
    if stage is None:
        return "not run"
    text = " ".join(str(stage.get("message") or stage.get("why") or stage["status"]).split())
    return (text[:117] + "..." if len(text) > 120 else text).replace("|", "/")
