"""`autocomp fuse`: related models in one."""

from __future__ import annotations

import json
from pathlib import Path

import click

from autocomp.cli import tables as terminal
from autocomp.cli.options import Finite, common_options, print_json
from autocomp.progress import Progress


@click.command()
@click.argument("tasks", nargs=-1, required=True)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder to write the fused model into; it becomes a task.",
)
@click.option("--smaller", default="1.6x", show_default=True, help="How many times less room the models take together.")
@click.option("--minutes", type=Finite(min=0.0), help="How long to train; 10 unless given, 0: not at all.")
@click.option("--length", help="The same in steps, such as 2000steps.")
@click.option(
    "--same-inputs", is_flag=True, help="All models answer about the same inputs; what they share first is run once."
)
@click.option(
    "--recipe", default="default", show_default=True, help="A recipe or its YAML file: see `autocomp recipes`."
)
@common_options
def fuse(
    tasks: tuple[str, ...],
    out: Path,
    smaller: str,
    minutes: float | None,
    length: str | None,
    same_inputs: bool,
    recipe: str,
    as_json: bool,
) -> None:
    """Make one model of the models of related TASKS, of one architecture each.

    What it holds once, all of them use; each layer is shared in the way that costs least. `autocomp search OUT` then compresses it.
    """
    from rich.console import Console

    from autocomp import api
    from autocomp.fusion.stored import described

    train = minutes != 0.0
    fused = api.fuse(
        tasks, out, smaller, minutes if train else None, recipe, length=length, train=train,
        same_inputs=same_inputs, progress=Progress(Console(stderr=True)),
    )  # fmt: skip
    said = described(fused, tasks)
    if as_json:
        print_json(json.dumps(said))
        return
    terminal.show_fused(said)
    click.echo(f"\n{out} is a task now: autocomp search {out}")
