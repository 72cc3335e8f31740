"""Commands that look and change nothing: what there is, what a search would do, and what a model costs."""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from autocomp.cli import tables as terminal
from autocomp.cli.options import (
    common_options,
    goal_options,
    goals_together,
    print_json,
    progress_shown,
    resolve,
    settings_options,
)
from autocomp.config.files import read_mapping
from autocomp.config.settings import settings_schema
from autocomp.config.shipped import shipped_files
from autocomp.errors import ModelWarning, UsageError, cut, shown
from autocomp.hardware.profile import profile_schema


@click.command()
@click.argument("model", metavar="TASK_OR_PT2")
@click.option("--profile", "profiles", multiple=True, default=["x86-host"], help="Hardware profile; may be repeated.")
@click.option("--kernels", type=click.IntRange(min=0), default=10, show_default=True, help="Dearest kernels to show.")
@common_options
def measure(model: str, profiles: tuple[str, ...], kernels: int, as_json: bool) -> None:
    """Compile a model, tune its kernels and time it.

    The model is that of a built-in task (digits, digits-mobile, speech, tokens), of package.module:function, or a torch.export file (.pt2).
    """
    from autocomp.hardware.profile import load_profile
    from autocomp.records.latency import latency_to_json

    for name in profiles:  # an unknown one is told before a model is trained or loaded
        load_profile(name)
    module, example_inputs = _load_model(model)

    from autocomp import api

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ModelWarning)
        latencies = {name: api.measure(module, example_inputs, profile=name) for name in profiles}
    for text in dict.fromkeys(str(one.message) for one in caught if issubclass(one.category, ModelWarning)):
        click.echo(f"warning: {text}", err=True)
    if as_json:
        print_json(json.dumps({name: latency_to_json(latency) for name, latency in latencies.items()}))
        return
    for latency in latencies.values():
        terminal.show_latency(latency, kernels)


@click.command()
@common_options
def profiles(as_json: bool) -> None:
    """List the hardware profiles, resolved on this machine."""
    described = terminal.describe_profiles()
    if as_json:
        print_json(json.dumps(described))
    else:
        terminal.show_profiles(described)


@click.command()
@common_options
def spaces(as_json: bool) -> None:
    """List the search spaces."""
    described = [
        {"name": name, "description": str(read_mapping(path).get("description", "")), "path": str(path)}
        for name, path in shipped_files("search_spaces").items()
    ]
    if as_json:
        print_json(json.dumps(described))
    else:
        rows = [[space["name"], space["description"], space["path"]] for space in described]
        terminal.show_table(["space", "description", "file"], rows)


@click.command()
@settings_options
@common_options
def check(task_name: str | None, config: Path | None, task_option: str | None, as_json: bool, **options: Any) -> None:
    """Say what a search of TASK would choose from, and why other options are not offered."""
    settings = resolve(task_name, task_option, config, options)

    from autocomp import api

    found = api.check(settings, progress_shown())
    if as_json:
        print_json(json.dumps(found))
    else:
        terminal.show_check(found)


@click.command()
@settings_options
@click.option("--trials", type=int, help="Candidates that would be told.")
@goal_options
@common_options
def plan(task_name: str | None, config: Path | None, task_option: str | None, as_json: bool, **options: Any) -> None:
    """Say what a search of TASK is expected to find and to take: a predicted front, which layers decide it, what is kept."""
    settings = resolve(task_name, task_option, config, goals_together(options))

    from autocomp import api

    found = api.plan(settings, progress_shown())
    if as_json:
        print_json(json.dumps(found.to_json()))
    else:
        terminal.show_plan(found)


@click.command()
@settings_options
@click.option("--out", type=click.Path(path_type=Path), help="HTML page to write; sensitivity-TASK.html unless given.")
@click.option(
    "--masks", "masked", is_flag=True, help="Study masks of single weights too: accuracy and size, no speed; slow."
)
@common_options
def sensitivity(
    task_name: str | None,
    config: Path | None,
    task_option: str | None,
    as_json: bool,
    out: Path | None,
    masked: bool,
    **options: Any,
) -> None:
    """Say what fewer channels, lower ranks and fewer bits cost each layer of TASK alone, and draw the curves."""
    settings = resolve(task_name, task_option, config, options)

    from autocomp import api

    page = out or Path(f"sensitivity-{(settings.task or 'task').replace(':', '-')}.html")
    name, rows = api.sensitivity(settings, page, progress_shown(), masked)
    if as_json:
        print_json(json.dumps({"task": name, "page": str(page), "rows": [asdict(row) for row in rows]}))
    else:
        terminal.show_sensitivity(rows)
        click.echo(f"\npage: {page}")


@click.command()
@click.argument("kind", type=click.Choice(["config", "profile", "recipe", "space"]), default="config")
@common_options
def schema(kind: str, as_json: bool) -> None:
    """Print the JSON schema of a config file, a hardware profile, a recipe or a search space."""
    from autocomp.recovery.recipe import Recipe
    from autocomp.space.file import SpaceFile

    schemas = {
        "config": settings_schema,
        "profile": profile_schema,
        "recipe": Recipe.model_json_schema,
        "space": SpaceFile.model_json_schema,
    }
    print_json(json.dumps(schemas[kind](), indent=None if as_json else 2))


def _load_model(name: str) -> tuple[Any, tuple[Any, ...]]:
    """The model and example inputs of a task or a torch.export file."""
    if not name.endswith(".pt2"):
        from autocomp.tasks.task import load_task

        task = load_task(name, progress_shown())
        return task.model, task.example_inputs
    if not os.path.isfile(name):
        raise UsageError(f"there is no file {cut(name)}")
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch reads its own files by a way it deprecates
            program = torch.export.load(name)
    except Exception as error:  # a file of another kind makes torch raise whatever its reader meets first
        raise UsageError(f"{name} is not a torch.export file: {type(error).__name__}: {shown(error)}") from error
    if program.example_inputs is None:
        raise UsageError(
            f"{name} holds no example inputs: save it as torch.export.export(model, example_inputs) gave it"
        )
    positional, keywords = program.example_inputs
    if keywords:
        raise UsageError(f"{name} takes keyword inputs ({', '.join(keywords)}): export it with positional ones")
    return program.module(), tuple(positional)
