"""Tables the command line shows on standard output."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from decimal import Decimal  # candidates outnumber what a float holds
from typing import TYPE_CHECKING, Any

from autocomp.config.quantities import format_bytes, format_milliseconds
from autocomp.config.settings import Goals, Settings
from autocomp.errors import UsageError
from autocomp.front.goals import Judge, family
from autocomp.hardware.profile import list_profiles, load_profile
from autocomp.records.evaluation import Sensitivity
from autocomp.records.latency import Latency
from autocomp.records.run import FrontPoint, Run, speedup

if TYPE_CHECKING:
    from rich.console import Console

    from autocomp.run.automatic import Resolved
    from autocomp.run.forecast import Plan

# Wide enough for a table where no terminal says how wide it is (a file, a pipe).
FILE_WIDTH = 140
WIDEST = 10_000  # wider than any table
SMALL_SHARE = 0.01  # of the time: what is kept of less is not worth a line


def output() -> Console:
    """Return a console on standard output."""
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=FILE_WIDTH)


def show_table(headings: Sequence[str], rows: Iterable[Sequence[str]], title: str = "") -> None:
    """Print a table; headings that start with ``>`` are aligned to the right."""
    from rich.markup import escape
    from rich.table import Table

    table, rows = (
        Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold"),
        list(rows),
    )
    for index, heading in enumerate(headings):
        right = heading.startswith(">")
        heading = heading.removeprefix(">")
        whole = right or not index  # the first column says what a row is of
        longest = max(map(len, (heading.strip(), *(row[index] for row in rows)))) if whole else None
        table.add_column(heading, justify="right" if right else "left", no_wrap=whole, min_width=longest)
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    console = output()
    least = console.measure(table, options=console.options.update(width=WIDEST)).minimum
    console.width = max(console.width, least)  # else columns that may not be wrapped take the room of those that may
    console.print(table)


def _figure(value: float, sign: str = "") -> str:
    """Four places of a value about 1, as many digits of one that is very large or small."""
    return f"{value:{sign}.4f}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:{sign}.4g}"


def _error(error: float | None) -> str:
    """A standard error behind a value; nothing where it is not known."""
    return "" if error is None else f" ± {error:.2g}"


def show_plan(plan: Plan) -> None:
    """Print a plan: the predicted front, the layers that decide it, what is kept, and what a search takes."""
    profiles = list(plan.errors)
    rows = [
        [
            *(f"{point.speedup[profile]:.2f}x" for profile in profiles),
            f"{point.smaller:.1f}x",
            f"{point.divergence:.3g}",
            "" if point.read is None else f"{point.read:.3g}" if point.read or not point.divergence else "≈ 0",
            "" if point.meets else "misses the goals",
        ]
        for point in plan.points
    ]
    headings = [*(f">faster on {profile}" for profile in profiles), ">smaller", ">divergence (nats)", ">as read", ""]
    show_table(headings, rows, "predicted front, estimated")
    layers = [[row.layer, f"{row.share:.0%}", f"{row.saves:.0%}", f"{row.divergence:.3g}"] for row in plan.layers]
    show_table(["layer", ">share of time", ">its cheapest option saves", ">nats"], layers, "\nwhat decides it")
    if kept := [row for row in plan.kept if row.share >= SMALL_SHARE]:
        rows = [[row.subject, row.option, f"{row.share:.0%}", row.reason] for row in kept]
        show_table(["kept", "not offered", ">share of time", "because"], rows, "\nwhat is not offered")
    show_table(["", ">seconds"], [[name, f"{value:.3g}"] for name, value in plan.seconds.items()], "\nwhat it takes")
    for note in plan.notes:
        output().print(f"[dim]{note}[/dim]", soft_wrap=True)


def show_resolved(resolved: Resolved, given: Settings) -> None:
    """Print the settings of a search that is not begun, those that were chosen with the reason of each, and what would be searched."""
    settings, searched = resolved.settings, resolved.searched
    chosen = settings.auto if isinstance(settings.auto, dict) else {}
    rows = []
    for name, value in settings.model_dump(exclude={"auto", "goals"}).items():
        why = f"chosen: {chosen[name]}" if name in chosen else "stated" if name in given.model_fields_set else ""
        shown = ", ".join(value) if isinstance(value, list) else "" if value is None else str(value)
        rows.append([name, shown, why])
    rows.append(["goals", str(settings.goals), ""])
    show_table(["setting", "value", ""], rows)
    output().print(
        f"\n{searched['task']}: {searched['layers']} layers, {searched['parameters']} parameters to choose, about "
        f"{Decimal(searched['candidates']):.1e} candidates. Nothing was searched (--dry-run).",
        markup=False,
    )


def show_family(run: Run, settings: Settings) -> None:
    """Print the member of each speed-up that was asked for, and which have none."""
    judge, objective = Judge.of(run, settings.goals), run.task.objective
    rows, within = [], " within the goals" if settings.goals != Goals() else ""
    for name, member in family(judge, [p.evaluation for p in run.front], settings.speedups, list(run.profiles)).items():
        if member is None:
            rows.append([name, f"no point of the front reaches it{within}", "", ""])
        else:
            value, lost = member.metrics[objective], judge.drop(member)
            rows.append([name, member.candidate.id, _figure(value), _figure(lost, "+")])
    show_table(["\nfamily", "point", f">{objective}", ">drop"], rows)


def show_front(run: Run) -> None:
    """Print the front of a run, dense first: the validation split's objective, latency by profile, and which files did not come out well."""
    objective = run.task.objective
    headings = ["point", f">{objective}", ">drop"]
    for profile in run.profiles:
        suffix = f" ({profile})" if len(run.profiles) > 1 else ""
        headings += [f">latency{suffix}", ">speed-up"]
    dense = run.dense.evaluation
    sign = 1 if run.task.higher_is_better else -1
    rows: list[list[str]] = []
    for point in (run.dense, *run.front):
        evaluation = point.evaluation
        is_dense = evaluation.candidate == dense.candidate
        drop = sign * (dense.metrics[objective] - evaluation.metrics[objective])
        row = [
            "dense" if is_dense else evaluation.candidate.id,
            _figure(evaluation.metrics[objective]),
            "" if is_dense else _figure(drop, "+") + _error(evaluation.drop_errors.get(objective)),
        ]
        for profile in run.profiles:
            latency = evaluation.latency[profile]
            row += [format_latency(latency), f"{speedup(evaluation, dense, profile):.2f}x"]
        if not is_dense or not rows:  # the front may hold dense itself
            rows.append([*row, format_bytes(evaluation.bytes), _files(point)])
    show_table([*headings, ">size", "files"], rows)
    failed = dict.fromkeys(
        f"{kind}: {check.note or 'differs from torch'}"
        for point in run.front
        for kind, check in point.verified.items()
        if not check.ok
    )
    if failed:
        lines = "\n".join(f"  {line}" for line in failed)
        output().print(f"\nfiles that could not be made, or failed their check:\n{lines}", markup=False)


def _files(point: FrontPoint) -> str:
    """``so, onnx`` where each kind was read back and equals torch; one that is missing or wrong is named as that."""
    words = []
    for kind, check in point.verified.items():
        words.append(kind if check.ok else f"{kind} FAILED" if kind in point.files else f"{kind} MISSING")
    return ", ".join(words)


def show_check(found: Mapping[str, Any]) -> None:
    """Print what a search would choose from and what it would not, from what `autocomp.api.check` returns."""
    outputs = [
        [row["output"], "x".join(map(str, row["shape"])), row["compared"], row["why"]] for row in found["outputs"]
    ]
    show_table(["output", "shape", "compared as", "why"], outputs)
    output().print()
    # Each part's own reasons stand in the last table: most parts have several.
    groups = [
        [
            group["group"] + ("*" if group["approximate"] else ""), str(group["width"]),
            ", ".join(map(str, group["offered"])) + ("+" if group["finer"] else ""), ", ".join(group["layers"]),
        ]
        for group in found["groups"]
    ]  # fmt: skip
    show_table(["group of channels", ">width", "widths offered", "layers tied by it"], groups)
    for group in found["groups"]:
        if group["approximate"] and len(group["offered"]) > 1:
            output().print(
                f"* approximate: {group['approximate']} is computed over the channels of {group['group']} that are left"
            )
    if any(group["finer"] for group in found["groups"]):
        output().print("+: widths between these are offered later, next to the best ones")
    if any(branch["offered"] for branch in found["branches"]):
        output().print("0: the branch that ends there is left out whole, a constant in its place")
    layers = [
        [layer["layer"], layer["kind"], f"{layer['macs'] / 1e6:.3g}", ", ".join(layer["methods"])]
        for layer in found["layers"]
    ]
    output().print()
    show_table(["layer", "kind", ">MMAC", "methods offered"], layers)
    if found["refused"]:
        output().print()
        refused = [[refusal["subject"], str(refusal["option"]), refusal["reason"]] for refusal in found["refused"]]
        show_table(["not offered for", "option", "why"], refused)
    for note in found["converted"]:
        output().print(f"\n{note}", markup=False)
    profiles = ", ".join(found["profiles"])
    output().print(
        f"\n{found['task']} on {profiles}: about {Decimal(found['candidates']):.1e} candidates", markup=False
    )


def show_sensitivity(rows: Sequence[Sensitivity]) -> None:
    """Print a line for each layer or group and kind of compression: its options, mild to strong, with the error of each."""
    lines: dict[tuple[str, str], list[Sensitivity]] = {}
    for row in rows:
        lines.setdefault((row.subject, row.kind), []).append(row)
    cells = [
        [
            subject,
            kind,
            f"{max(row.error for row in found):.2g}",
            "  ".join(f"{row.option}: {row.error:.2g}" for row in found),
        ]
        for (subject, kind), found in sorted(lines.items(), key=lambda item: -max(row.error for row in item[1]))
    ]
    show_table(["layer or group", "kind", ">worst", "error of each option alone (nats a sample)"], cells)


def format_latency(latency: Latency) -> str:
    """Write a measured latency with its spread, an estimated one with the known error of the model, and say so."""
    return _around(latency) if latency.how == "measured" else f"{_around(latency)} (estimated)"


def _around(latency: Latency) -> str:
    seconds = format_milliseconds(latency.seconds)
    if latency.how == "measured":
        return f"{seconds} ± {latency.spread / 2:.1%}" + (" (noisy)" if latency.noisy else "")
    return seconds if latency.error is None else f"{seconds} ± {latency.error:.0%}"


def show_latency(latency: Latency, kernels: int) -> None:
    """Print a latency and its dearest kernels."""
    where = f" {'on' if latency.how == 'measured' else 'by the'} {latency.device}" if latency.device else ""
    output().print(f"{latency.profile}: {_around(latency)}, {latency.how}{where}", markup=False)
    total = sum(kernel.seconds for kernel in latency.kernels) or 1.0
    dearest = sorted(latency.kernels, key=lambda kernel: kernel.seconds, reverse=True)[:kernels]
    rows = []
    for kernel in dearest:
        peak = "" if kernel.peak_fraction is None else f"{kernel.peak_fraction:.0%}"
        rate = f"{kernel.flops / kernel.seconds / 1e9:.1f}" if kernel.flops and kernel.seconds else ""
        share = f"{kernel.seconds / total:.1%}"
        rows.append([kernel.operator, kernel.name, format_milliseconds(kernel.seconds), share, rate, peak, kernel.how])
    if rows:
        show_table(["operator", "kernel", ">time alone", ">share", ">Gop/s", ">of peak", "how"], rows)


def describe_profiles() -> list[dict[str, Any]]:
    """Return what is known of every shipped profile; one this machine cannot run says why under ``unavailable``."""
    described: list[dict[str, Any]] = []
    for name in list_profiles():
        try:
            profile = load_profile(name)
        except UsageError as error:
            described.append({"name": name, "unavailable": str(error)})
        else:
            described.append({**asdict(profile), "fingerprint": profile.fingerprint})
    return described


def show_profiles(described: Iterable[Mapping[str, Any]]) -> None:
    """Print what `describe_profiles` returns as a table."""
    rows = []
    for profile in described:
        if "unavailable" in profile:
            rows.append([profile["name"], "not here", "", "", "", profile["unavailable"]])
            continue
        target = profile["target"]
        rows.append(
            [
                profile["name"],
                profile["reach"],
                str(target.get("mcpu", target.get("kind"))),
                f"{profile['lanes']} lanes, int8 {profile['int8']}",
                ", ".join(profile["precisions"]),
                profile["description"],
            ]
        )
    show_table(["profile", "reached", "processor", "vectors", "precisions", "description"], rows)


def show_fused(said: Mapping[str, Any]) -> None:
    """Print how each layer is shared, and what the models do apart, averaged, shared and trained."""
    show_table(["layer", "shared"], list(said["ways"].items()), "layers")
    told = {
        "apart": "as given",
        "averaged": "all weights averaged, channels in one order",
        "shared": "shared, not trained",
        "fused": "fused",
    }
    names = list(said["metrics"]["apart"])
    rows = [
        [
            told[which],
            *(f"{_figure(metrics[name])}{_error(said['errors'][which].get(name))}" for name in names),
            format_bytes(said["bytes"][which]) if which in said["bytes"] else "",
        ]
        for which, metrics in said["metrics"].items()
    ]
    show_table(["", *(f">{name}" for name in names), ">weights"], rows, "\nmodels")
    for note in said["notes"]:
        output().print(note, markup=False)
