"""`autocomp recover` and `autocomp recipes`: training what a search compressed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import click

from autocomp.cli import tables as terminal
from autocomp.cli.options import Finite, common_options, print_json
from autocomp.config.shipped import shipped_files
from autocomp.errors import UsageError, cut
from autocomp.progress import Progress
from autocomp.records.run import FRONT


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--point",
    "points",
    multiple=True,
    help="Id of a measured candidate; may be repeated. Unless given, the front as it was before any training.",
)
@click.option("--minutes", type=Finite(min=0.0, min_open=True), help="How long; 10 unless given.")
@click.option("--length", help="The same of each point in steps or epochs, such as 500steps or 5epochs.")
@click.option(
    "--recipe", default="default", show_default=True, help="A recipe or its YAML file: see `autocomp recipes`."
)
@common_options
def recover(
    run: Path, points: tuple[str, ...], minutes: float | None, length: str | None, recipe: str, as_json: bool
) -> None:
    """Train the points of the run folder RUN, and write what is better: models, front and report.

    Points get their share of the time each; one that is no better on validation stays as it was. Stopped and started again with the same
    options it goes on.
    """
    if not os.path.isdir(run):
        raise UsageError(f"there is no run folder {cut(str(run))}")
    from rich.console import Console

    from autocomp import api

    result = api.recover(
        run, None, recipe, minutes, length=length, points=points, progress=Progress(Console(stderr=True))
    )
    assert isinstance(result, api.SearchResult)
    if as_json:
        print_json((result.folder / FRONT).read_text(encoding="utf-8"))
    else:
        terminal.show_front(result.run)
        click.echo(f"\nreport: {result.report}")


@click.command()
@common_options
def recipes(as_json: bool) -> None:
    """List the recipes, and what each does in its stages."""
    from autocomp.recovery.recipe import FOLDER, load_recipe

    read = {name: load_recipe(name) for name in shipped_files(FOLDER)}
    if as_json:
        print_json(json.dumps([recipe.model_dump() for recipe in read.values()]))
        return
    rows = [
        [name, recipe.description, ", ".join(f"{stage.name} {stage.share:.0%}" for stage in recipe.stages)]
        for name, recipe in read.items()
    ]
    terminal.show_table(["recipe", "description", "stages"], rows)
