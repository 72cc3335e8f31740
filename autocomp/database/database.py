"""The layer database: every layer at every input width by every method, compressed once and kept on disk.

A file holds the entries of one layer at one input width, finer ones apart. Its name is the hash of everything they depend on, so a file
that is there is right, whatever run wrote it, and a killed build continues where it stopped. Every file begins with the
hash of its content: one that does not read back is rebuilt, and a warning says so.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from autocomp.cache import sealed, unsealed, write_atomically
from autocomp.compress.prune import DAMPING, keep
from autocomp.database.entry import Entry, compress_layer, pack, unpack
from autocomp.database.orders import STEPS, l1_orders, order_groups
from autocomp.database.parts import stored_bytes
from autocomp.errors import CorruptError, UsageError
from autocomp.layers.w8a8 import Observer
from autocomp.processes.pool import map_in_processes
from autocomp.progress import Progress
from autocomp.records.candidate import Method
from autocomp.space.space import same_kernels

if TYPE_CHECKING:
    from autocomp.database.calibrate import Statistics
    from autocomp.graph.graph import Graph
    from autocomp.space.space import Space, Target

FORMAT_VERSION = 2  # 2: the checksum holds a file to its name, too
REVISION = 5  # of the methods: raise it when the same inputs come to give other entries
HEADER = b"autocomp-layers 2 "
MEMORY = 512 * 2**20  # bytes of entries kept in memory; the rest is read again


class File(NamedTuple):
    """What one file holds: a layer at an input width by the methods that are offered from the start, or by the finer ones."""

    layer: str
    width: int
    finer: bool = False


@dataclass(frozen=True)
class LayerTable:
    """One layer's tables for the solver, [len(widths_in), len(widths_out), len(methods)]; see ``study.solver.Factor``.

    ``error`` in nats a sample, ``bytes`` of stored weights. Methods whose ranks are no use at a shape have the values
    of the full-rank method that takes their place. A layer whose two sides are one group is read on the diagonal.
    """

    layer: str
    in_group: str | None
    out_group: str | None
    widths_in: tuple[int, ...]
    widths_out: tuple[int, ...]
    methods: tuple[Method, ...]
    error: npt.NDArray[np.float64]
    bytes: npt.NDArray[np.float64]


class LayerDatabase:
    """Entries by (layer, input width, method), and the order in which channels of each group are kept.

    ``folder`` holds the files; ``warnings`` says of every file that had to be rebuilt. UsageError if the folder
    cannot be written. ``classic`` prunes as the classic recipe does, to be compared with: by L1 norms, and without the
    least-squares update of what stays.
    """

    def __init__(
        self,
        folder: str | Path,
        model: nn.Module,
        graph: Graph,
        space: Space,
        statistics: Statistics,
        observer: Observer | None = None,
        classic: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.model, self.graph, self.space, self.statistics = model, graph, space, statistics
        self.observer: Observer = observer or space.observer
        self.classic = classic
        self.warnings: list[str] = []
        self._loaded: OrderedDict[File, tuple[int, dict[Method, Entry]]] = OrderedDict()
        self._held = 0
        self._orders: dict[str, tuple[Tensor, str]] | None = None

    def build(
        self,
        progress: Progress | None = None,
        workers: int = 1,
        told: Callable[[float, float], None] = lambda share, seconds: None,
    ) -> None:
        """Compute what is missing; what is there is checked. A killed build loses at most one layer at one width and worker.

        With several ``workers``, so many processes compute the missing files, where processes can be forked; this one then reads them.
        ``told`` is called as the work goes on, with about what share of it is done and how many seconds that took.
        """
        progress = progress or Progress()
        work = self.files()
        with progress.stage("layer database", len(work) + 1) as stage:
            self.orders(workers)
            stage.advance()
            if workers > 1:
                self.fill(work, workers, told)
            for file in work:
                self._entries(file)
                stage.advance(note=f"{file.layer} at {file.width}")
            for text in self.warnings:
                stage.warn(text)

    def files(self, space: Space | None = None) -> list[File]:
        """The files that there are; of what ``space`` offers, if one is given."""
        found = [File(name, width) for name in self.graph.layers for width in self.widths_in(name, space)]
        refined = {name for name, m in (space or self.space).methods.items() if not {*m} <= {*self.space.methods[name]}}
        finer = [File(file.layer, file.width, True) for file in found if file.layer in refined]
        return found + [file for file in finer if self._methods(file)]

    def fill(
        self,
        work: Sequence[File],
        workers: int,
        told: Callable[[float, float], None] = lambda share, seconds: None,
    ) -> None:
        """Compute those of these files that are missing, in so many processes."""
        missing = [file for file in work if not self._entries_path(file).exists()]
        layers = self.graph.layers

        def columns(file: File) -> int:
            return self.space.columns(file.layer, file.width) * math.prod(layers[file.layer].kernel)

        missing.sort(key=lambda item: -columns(item))  # the dearest first
        whole, done, start = sum(columns(item) ** 2 for item in missing), 0, time.monotonic()

        def compute(file: File) -> None:
            self.compute(file)

        for item, _ in zip(missing, map_in_processes(compute, missing, workers), strict=True):
            done += columns(item) ** 2
            told(done / whole, time.monotonic() - start)

    def orders(self, workers: int = 1) -> Mapping[str, tuple[Tensor, str]]:
        """Return each group's units, best first, and the ordering that won (one of `orders.ORDERINGS`)."""
        if self._orders is None:
            widths = {name: list(widths) for name, widths in self.space.widths.items()}
            members = {name: [list(group.rows), list(group.columns)] for name, group in self.graph.groups.items()}
            kept = {name: list(counts) for name, counts in self.space.counts.items()}
            path = self._path("orders", [widths, members, kept])
            data = self._read(path)
            if data is None:
                if self.classic:
                    made = l1_orders(self.model, self.graph, self.space)
                else:
                    made = order_groups(self.model, self.graph, self.statistics, self.space, workers)
                data = {name: {"order": order, "by": by} for name, (order, by) in made.items()}
                self._write(path, data)
            self._orders = {name: (fields["order"], fields["by"]) for name, fields in data.items()}
        return self._orders

    def kept(self, group: str | None, width: int) -> Tensor | None:
        """Return the units of a group kept at a width, ascending; None if all are."""
        if group is None or width == self.graph.groups[group].width:
            return None
        return keep(self.orders()[group][0], width)

    def rows(self, layer: str, width: int) -> Tensor | None:
        """Return the output channels a layer keeps when its output group keeps ``width`` units; None if all."""
        group = self.graph.layers[layer].out_group
        kept = self.kept(group, width)
        return None if kept is None or group is None else self.graph.groups[group].rows_kept(layer, kept)

    def columns(self, layer: str, width: int) -> Tensor | None:
        """Return the input columns a layer keeps when its input group keeps ``width`` units; None if all."""
        group = self.graph.layers[layer].in_group
        kept = self.kept(group, width)
        return None if kept is None or group is None else self.graph.groups[group].columns_kept(layer, kept)

    def widths_in(self, layer: str, space: Space | None = None) -> tuple[int, ...]:
        """Return the input widths a layer is compressed at: those of its group, in units."""
        described = self.graph.layers[layer]
        if described.in_group is None:
            return (described.in_channels,)
        return (space or self.space).widths[described.in_group]

    def entry(self, layer: str, in_width: int, method: Method) -> Entry:
        """Return one entry, computed now if it must be. KeyError if the space does not offer it."""
        finer = method not in self.space.methods[layer] and method in self.space.finer.methods.get(layer, ())
        entries = self._entries(File(layer, in_width, finer))
        if method not in entries:
            raise KeyError(f"{layer} at {in_width} by {method}: the search space does not offer it")
        return entries[method]

    def tables(self, space: Space | None = None) -> list[LayerTable]:
        """Return the tables of all layers, in the order of execution; of what ``space`` offers, if one is given."""
        return [self._table(name, space or self.space) for name in self.graph.layers]

    def dominated(self, profiles: Sequence[Target]) -> dict[str, dict[Method, Method]]:
        """Return, of each layer, the methods that another beats, with that other: no less accurate, no larger and as fast, at every width.

        Only methods that run the same kernels on every profile are as fast for certain. The dense method stays, and a precision at full
        rank stays as long as one of its ranks does, because at narrow widths these come to it.
        """
        return {table.layer: self._dominated(table, profiles) for table in self.tables()}

    def _dominated(self, table: LayerTable, profiles: Sequence[Target]) -> dict[Method, Method]:
        layer, methods = self.graph.layers[table.layer], table.methods
        dropped: dict[Method, Method] = {}
        # Ranks first: whether full rank may go depends on them.
        for m in sorted(range(1, len(methods)), key=lambda m: not methods[m].ranks):
            method = methods[m]
            needed = [other for other in methods if other.ranks and other.precision == method.precision]
            if not method.ranks and any(other not in dropped for other in needed):
                continue
            for b, better in enumerate(methods):
                if b == m or better in dropped or not same_kernels(layer, method, better, profiles):
                    continue
                # infinite where a precision does not hold the weights: compared, not subtracted
                one, other = table.error[..., b], table.error[..., m]
                size = table.bytes[..., b] - table.bytes[..., m]
                if (one <= other).all() and (size <= 0).all() and ((one < other).any() or (size < 0).any() or b < m):
                    dropped[method] = better
                    break
        return dropped

    def _table(self, name: str, space: Space) -> LayerTable:
        layer, methods = self.graph.layers[name], space.methods[name]
        inputs = self.widths_in(name, space)
        outputs = (layer.out_channels,) if layer.out_group is None else space.widths[layer.out_group]
        through = layer.conv_groups > 1 and layer.in_group is not None
        error = np.zeros((len(inputs), len(outputs), len(methods)))
        size = np.zeros_like(error)
        for i, width in enumerate(inputs):
            columns = self.space.columns(name, width)
            for o, out in enumerate(outputs):
                # Off the diagonal the table of a grouped convolution says what the diagonal says: nothing reads it.
                rows = None if through else self.rows(name, out)
                shape = (columns, self.space.rows(name, width if through else out))
                dense = shape == (layer.in_channels, layer.out_channels)
                for m, method in enumerate(methods):
                    effective = self.space.effective(name, *shape, method)
                    values = self.entry(name, width, effective).error
                    error[i, o, m] = float((values if rows is None else values[rows]).sum())
                    changed = not dense or effective != Method()
                    size[i, o, m] = stored_bytes(layer, *shape, effective, changed)
        return LayerTable(name, layer.in_group, layer.out_group, inputs, outputs, methods, error, size)

    def _entries(self, file: File) -> dict[Method, Entry]:
        if file in self._loaded:
            self._loaded.move_to_end(file)
            return self._loaded[file][1]
        path = self._entries_path(file)
        data = self._read(path)
        entries = None
        if data is not None:
            try:
                entries = unpack(file.layer, file.width, data)
            except (KeyError, TypeError, ValueError, AttributeError):
                # written whole, by an autocomp with other entries
                self.warnings.append(f"layer database: {path.name} holds no entries of this autocomp; it was rebuilt")
        if entries is None:
            entries = self.compute(file)
        self._hold(file, entries)
        return entries

    def compute(self, file: File) -> dict[Method, Entry]:
        """Compress one layer at one width and write its file; nothing is kept in memory."""
        name, width = file.layer, file.width
        layer = self.graph.layers[name]
        rows = self.rows(name, width) if layer.conv_groups > 1 and layer.in_group is not None else None
        module, seen = self.model.get_submodule(name), self.statistics.layers[name]
        methods, update = self._methods(file), not self.classic
        entries = compress_layer(
            module, layer, seen, self.columns(name, width), width, methods, self.observer, rows, update
        )
        self._write(self._entries_path(file), pack(entries))
        return entries

    def _entries_path(self, file: File) -> Path:
        columns = self.columns(file.layer, file.width)
        chosen = None if columns is None else columns.tolist()
        methods = [str(method) for method in self._methods(file)]
        return self._path("layer", [file.layer, file.width, methods, self.observer, chosen])

    def _methods(self, file: File) -> list[Method]:
        name, columns = file.layer, self.space.columns(file.layer, file.width)
        methods = self.space.methods[name]
        if file.finer:
            methods = tuple(method for method in self.space.finer.methods[name] if method not in methods)
        return [method for method in methods if self._possible(method, name, columns)]

    def _possible(self, method: Method, layer: str, columns: int) -> bool:
        """Whether ranks are of use at this input width and any output width at all: all rows cost the most."""
        return self.space.effective(layer, columns, self.graph.layers[layer].out_channels, method) == method

    def _hold(self, file: File, entries: dict[Method, Entry]) -> None:
        size = sum(part.nbytes for entry in entries.values() for part in entry.parts)
        self._loaded[file] = (size, entries)
        self._held += size
        while self._held > MEMORY and len(self._loaded) > 1:
            _, (gone, _) = self._loaded.popitem(last=False)
            self._held -= gone

    def _path(self, kind: str, content: Any) -> Path:
        identity = [FORMAT_VERSION, REVISION, DAMPING, STEPS, self.statistics.fingerprint, kind, content]
        identity += ["classic"] if self.classic else []
        name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:20]
        return self.folder / f"{kind}-{name}.bin"

    def _read(self, path: Path) -> dict[str, Any] | None:
        """Return a file's content; None if it is not there, or does not read back as it was written (a warning)."""
        try:
            return read_checked(path)
        except FileNotFoundError:
            return None
        except CorruptError as error:
            self.warnings.append(f"{error}; it was rebuilt")
            return None

    def _write(self, path: Path, data: Mapping[str, Any]) -> None:
        buffer = io.BytesIO()
        torch.save(dict(data), buffer)
        try:
            write_atomically(path, sealed(HEADER, buffer.getvalue(), _named(path)))
        except OSError as error:
            reason = error.strerror or error
            raise UsageError(
                f"the layer database cannot write {path}: {reason}; free space or choose another folder"
            ) from error


def _named(path: Path) -> bytes:
    """What a checksum is of beside the content: the file's name, which says of which layer at which width it is."""
    return path.name.encode() + b"\n"


def read_checked(path: Path) -> dict[str, Any]:
    """Read a database file. FileNotFoundError if there is none, CorruptError if it is not what was written."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CorruptError(f"layer database: {path.name} cannot be read ({error.strerror or error})") from error
    payload = unsealed(HEADER, content, _named(path))
    if payload is None:
        raise CorruptError(f"layer database: {path.name} is damaged, or another's content")
    data: dict[str, Any] = torch.load(io.BytesIO(payload), weights_only=True)
    return data
