"""`autocomp gate`: a verdict on a delivered model, for people and build servers."""

from __future__ import annotations

import json
import os
from pathlib import Path

import click

from autocomp.cli import tables as terminal
from autocomp.cli.options import Finite, common_options, print_json
from autocomp.errors import UsageError, cut
from autocomp.progress import Progress
from autocomp.run.verdict import SLOWER


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--point", help="Id of a front point; the one that meets the run's goals best unless given.")
@click.option("--baseline", type=click.Path(path_type=Path), help="JSON of an earlier gate, to hold speed-ups to.")
@click.option(
    "--slower",
    type=Finite(0.0, 1.0, max_open=True),
    default=SLOWER,
    show_default=True,
    help="Share of the speed-up that may be lost.",
)
@common_options
def gate(run: Path, point: str | None, baseline: Path | None, slower: float, as_json: bool) -> None:
    """Check a delivered point of the run folder RUN again on this machine: files, outputs, metric, size, latency.

    Exit codes: 0 ACCEPT, 4 REGRESSION, 5 INCONCLUSIVE (the machine is too noisy to tell), 6 CANNOT RUN.
    """
    if not os.path.isdir(run):
        raise UsageError(f"there is no run folder {cut(str(run))}")
    from rich.console import Console

    from autocomp import api

    found = api.gate(run, point, baseline, slower, progress=Progress(Console(stderr=True)))
    if as_json:
        print_json(json.dumps(found.to_json(), indent=2))
    else:
        terminal.show_table(
            ["check", "verdict", "what was seen"], [(c.name, c.verdict.value, c.said) for c in found.checks]
        )
        click.echo(f"\n{found.verdict.value}: point {found.point}")
    click.get_current_context().exit(found.verdict.exit_code)
