"""`autocomp kernels`: look into the stores of tuned kernels, and carry them from one machine to another."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from autocomp.cli import tables as terminal
from autocomp.cli.options import Commands, common_options, print_json
from autocomp.errors import CorruptError, UsageError
from autocomp.hardware.profile import load_profile
from autocomp.tuning import exchange
from autocomp.tuning import roofline as limits
from autocomp.tuning.store import KernelRecord, KernelStore, folder_name, identity_of, stores_folder

_PROFILE = click.option(
    "--profile", default="x86-host", show_default=True, help="Hardware profile whose store is meant, or its YAML file."
)
_ONE_OR_ALL = click.option("--profile", help="Only the store of this hardware profile (else every store in the cache).")


@click.group(cls=Commands)
def kernels() -> None:
    """Look into the stores of tuned kernels; export, merge and check them."""


@kernels.command("list")
@_ONE_OR_ALL
@common_options
def list_kernels(profile: str | None, as_json: bool) -> None:
    """List the stores in the cache or, with --profile, the kernels of one and how near the machine's limits they run.

    With --profile, the memory bandwidth is measured once (under a second) where the store does not know it yet.
    """
    if profile is not None:
        _list_records(profile, as_json)
        return
    stores = exchange.list_stores()
    if as_json:
        print_json(json.dumps([_summary(store) for store in stores]))
    elif not stores:
        click.echo(f"no kernel stores in {stores_folder()}: `autocomp measure` or `autocomp search` fills one")
    else:
        rows = []
        for store in stores:
            summary = _summary(store)
            rows.append(
                [
                    summary["store"],
                    store.target,
                    store.tvm,
                    str(summary["kernels"]),
                    str(len(store.lines.damaged) or ""),
                ]
            )
        terminal.show_table(["store", "target", "TVM", ">kernels", ">damaged lines"], rows)


@kernels.command()
@click.argument("file", type=click.Path(path_type=Path))
@_PROFILE
@common_options
def export(file: Path, profile: str, as_json: bool) -> None:
    """Write every kernel of a profile's store into FILE, which `merge` takes in elsewhere."""
    store = _open(profile)
    count = exchange.export_store(store, file)
    if as_json:
        print_json(json.dumps({"file": str(file), "records": count}))
    else:
        click.echo(f"{file}: {_count(count, 'record')}")


@kernels.command()
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@_PROFILE
@common_options
def merge(files: tuple[Path, ...], profile: str, as_json: bool) -> None:
    """Take the kernels of exported FILEs into a profile's store, of each kernel the faster one.

    Files of another target or compiler version are refused.
    """
    found = load_profile(profile)
    exports = exchange.read_exports(files, identity_of(found))
    store = KernelStore.open(found)
    merged = {path: store.merge(exported.records) for path, exported in exports.items()}
    if as_json:
        print_json(json.dumps([{"file": str(path), **asdict(counts)} for path, counts in merged.items()]))
        return
    for path, counts in merged.items():
        click.echo(f"{path}: {counts.new} new, {counts.faster} faster than before, {counts.left_out} left out")


@kernels.command()
@_ONE_OR_ALL
@common_options
def verify(profile: str | None, as_json: bool) -> None:
    """Read stores again and check every line; exit code 1 if one is damaged. Nothing is rebuilt or changed."""
    stores = exchange.list_stores() if profile is None else [exchange.read_store(_existing(profile))]
    if as_json:
        print_json(json.dumps([_summary(store) for store in stores]))
    else:
        for store in stores:
            lines, name = store.lines, store.folder.name
            text = f"{name}: {_count(len(lines.latest), 'record')}, {lines.superseded} superseded"
            if lines.damaged:
                text += f", damaged: {_count(len(lines.damaged), 'line')} ({', '.join(map(str, lines.damaged))})"
            click.echo(text if store.identity is not None else f"{text}, target.json does not read back")
    damaged = [store.folder.name for store in stores if store.lines.damaged or store.identity is None]
    if damaged:
        raise CorruptError(
            f"damaged: {', '.join(damaged)}. The kernels of damaged lines are tuned again when next needed; "
            "`autocomp kernels compact` drops the lines"
        )


@kernels.command()
@_PROFILE
@common_options
def compact(profile: str, as_json: bool) -> None:
    """Drop the damaged and superseded lines of a profile's store."""
    before = _open(profile).compact()
    counts = {"kept": len(before.latest), "damaged": len(before.damaged), "superseded": before.superseded}
    if as_json:
        print_json(json.dumps(counts))
    else:
        click.echo(
            f"{_count(counts['kept'], 'record')} kept; dropped: {counts['damaged']} damaged, {counts['superseded']} superseded"
        )


def _list_records(name: str, as_json: bool) -> None:
    profile = load_profile(name)
    folder = _folder(name)
    if not (folder / "target.json").exists():
        if as_json:
            print_json(json.dumps({"store": folder.name, "roofline": limits.Roofline().to_json(), "kernels": []}))
        else:
            click.echo(f"no kernels are tuned for {name} yet: `autocomp measure` or `autocomp search` does")
        return
    store = KernelStore.open(profile)
    if profile.reach == "local" and any(not limits.is_peak(record) for record in store.records()):
        limits.measure_bandwidth(profile, store)
    ceiling = limits.roofline(store.records())
    records = sorted(
        (record for record in store.records() if not limits.is_peak(record)),
        key=lambda record: (record.operator, -record.flops, record.key),
    )
    if as_json:
        rows = [{**asdict(record), **asdict(limits.position(record, ceiling))} for record in records]
        print_json(json.dumps({"store": folder.name, "roofline": ceiling.to_json(), "kernels": rows}))
        return
    terminal.output().print(_ceiling_line(ceiling), markup=False)
    headings = ["operator", "loops", "tile", ">µs", ">Gop/s", ">of peak", ">op/byte", "bound by"]
    terminal.show_table(headings, [_row(record, ceiling) for record in records])


def _row(record: KernelRecord, ceiling: limits.Roofline) -> Sequence[str]:
    place = limits.position(record, ceiling)
    return [
        record.operator,
        _loops(record),
        _tile(record.tile),
        f"{record.seconds * 1e6:.1f}",
        "" if place.rate is None else f"{place.rate / 1e9:.1f}",
        "" if place.peak_fraction is None else f"{place.peak_fraction:.0%}",
        "" if place.intensity is None else f"{place.intensity:.1f}",
        {"compute": "arithmetic", "memory": "memory"}.get(place.bound or "", ""),
    ]


def _loops(record: KernelRecord) -> str:
    if not record.spatial:
        return ""
    return " over ".join("x".join(map(str, extents)) for extents in (record.spatial, record.reduction) if extents)


def _tile(tile: Mapping[str, Any]) -> str:
    """What of a tile is chosen: factors of 1 and loops in their usual order say nothing."""
    chosen = [f"{name}={value}" for name, value in tile.items() if name != "matrix" and value != 1]
    return " ".join([*chosen, "in matrix registers"] if tile.get("matrix") else chosen)


def _ceiling_line(ceiling: limits.Roofline) -> str:
    parts = [
        f"{name} {value / 1e9:.0f} {unit}"
        for name, value, unit in (
            *((arithmetic, peak, "Gop/s") for arithmetic, peak in ceiling.peaks.items()),
            ("main memory", ceiling.bandwidth, "GB/s"),
        )
        if value
    ]
    return f"measured limits: {', '.join(parts)}" if parts else "measured limits: none yet"


def _summary(store: exchange.StoreAtRest) -> dict[str, Any]:
    lines = store.lines
    return {
        "store": store.folder.name,
        "identity": store.identity,
        "kernels": sum(not limits.is_peak(record) for record in lines.latest.values()),
        "records": len(lines.latest),
        "superseded": lines.superseded,
        "damaged": list(lines.damaged),
    }


def _folder(profile: str) -> Path:
    return stores_folder() / folder_name(identity_of(load_profile(profile)))


def _existing(profile: str) -> Path:
    """The folder of a profile's store. UsageError if there is none yet: commands that read a store make none."""
    folder = _folder(profile)
    if not (folder / "target.json").exists():
        raise UsageError(
            f"there is no kernel store for profile {profile!r} and this TVM in {stores_folder()}: `autocomp measure` fills one"
        )
    return folder


def _open(profile: str) -> KernelStore:
    _existing(profile)
    return KernelStore.open(load_profile(profile))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
