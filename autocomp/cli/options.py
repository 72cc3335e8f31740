"""What commands share: options, what is made of them, progress, and help with a mistyped name."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import click

from autocomp.config.limits import ALL, one_drop, one_energy, one_latency, one_size
from autocomp.config.settings import Settings, load_settings
from autocomp.errors import UsageError, shown, suggest
from autocomp.processes.chatter import said_aside, said_plainly
from autocomp.progress import Progress
from autocomp.run.replay import with_replay

F = TypeVar("F", bound=Callable[..., Any])


class Commands(click.Group):
    """A group that names the nearest command to one it does not have."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            known = ", ".join(self.commands)
            ctx.fail(f"there is no command {args[0]!r}.{suggest(args[0], self.commands)} Commands: {known}")
        return super().resolve_command(ctx, args)


def common_options(command: F) -> F:
    """Options every command has: ``--json`` (passed as ``as_json``) and ``--debug``."""
    as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on standard output.")
    debug = click.option(
        "--debug", is_flag=True, expose_value=False, callback=_remember_debug, help="Show the traceback of an error."
    )

    @functools.wraps(command)
    def quiet(**options: Any) -> Any:
        # whatever a task prints goes to standard error, where standard output is for the JSON
        with said_aside() if options["as_json"] else nullcontext():
            return command(**options)

    return as_json(debug(quiet))  # type: ignore[return-value]


def print_json(text: str) -> None:
    """Print a command's JSON on standard output, and nothing else."""
    with said_plainly():
        click.echo(text, nl=not text.endswith("\n"))


def _remember_debug(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value:
        ctx.find_root().ensure_object(dict)["debug"] = True


class Finite(click.FloatRange):
    """A number within a range, which not-a-number is not, though it is neither above nor below one."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        found = super().convert(value, param, ctx)
        if math.isnan(found):
            self.fail(f"{value} is no number.", param, ctx)
        return found


class LimitType(click.ParamType):  # type: ignore[type-arg] # generic in click 8.3 alone
    """A limit for all (``1%``), or for one metric or profile (``accuracy/noisy=1%``); read as (name, limit)."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name, self.parse = name, parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        name, _, text = value.rpartition("=")
        try:
            return name or ALL, self.parse(text)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def together(limits: tuple[tuple[str, Any], ...]) -> Any:
    """The limits of an option that may be repeated, as a setting holds them; None for none. UsageError if one is given twice."""
    names = [name for name, _ in limits]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"a limit is given twice{'' if name == ALL else f' for {shown(name)}'}: give it once")
    if names == [ALL]:
        return limits[0][1]
    return dict(limits) or None


class Quantity(click.ParamType):  # type: ignore[type-arg] # generic in click 8.3 alone
    """A number with its unit."""

    def __init__(self, name: str, parse: Callable[[str], float | str]) -> None:
        self.name = name
        self.parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return self.parse(value) if isinstance(value, str) else value
        except ValueError as error:
            self.fail(str(error), param, ctx)


def settings_options(command: F) -> F:
    """Options that say what to search, shared by `search` and `check`."""
    options = [
        click.argument("task_name", metavar="[TASK]", required=False),
        click.option("--config", type=click.Path(path_type=Path), help="YAML or TOML file of settings."),
        click.option("--task", "task_option", help="Built-in task, or package.module:function (same as TASK)."),
        click.option(
            "--profile", "profiles", multiple=True, help="Hardware profile or its YAML file; may be repeated."
        ),
        click.option("--space", help="Search space or its YAML file."),
        click.option("--seed", type=int, help="Seed of calibration and search."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def goal_options(command: F) -> F:
    """Options that limit what is accepted, shared by `search` and `plan`."""
    options = [
        click.option(
            "--max-drop",
            multiple=True,
            type=LimitType("drop", one_drop),
            help="Largest loss of the objective: in its units, in points (0.5pt) or of its value (1%); NAME=LIMIT for a metric or slice.",
        ),
        click.option(
            "--max-latency",
            multiple=True,
            type=LimitType("duration", one_latency),
            help="Largest latency, such as 0.5ms, or how many times faster, such as 2x; PROFILE=LIMIT for one profile.",
        ),
        click.option(
            "--max-energy",
            multiple=True,
            type=LimitType("energy", one_energy),
            help="Most energy of one inference, such as 5mJ, or how many times less, such as 2x; PROFILE=LIMIT for one profile. Known where "
            "profiles state their power.",
        ),
        click.option(
            "--max-size",
            type=Quantity("size", one_size),
            help="Largest size, such as 500KB, or how many times smaller, such as 5x.",
        ),
        click.option(
            "--max-memory",
            type=Quantity("size", one_size),
            help="Most memory that the compiled model may need, such as 2MB, or how many times less, such as 3x.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def goals_together(options: dict[str, Any]) -> dict[str, Any]:
    """The options with limits that may be repeated as one setting each."""
    return options | {name: together(options[name]) for name in ("max_drop", "max_latency", "max_energy")}


def resolve(task_name: str | None, task_option: str | None, config: Path | None, options: dict[str, Any]) -> Settings:
    """Settings from flags, variables and the config file; a task must be among them."""
    if task_name and task_option and task_name != task_option:
        raise UsageError(f"two tasks are given, {task_name!r} and --task {task_option!r}: name one")
    overrides = {**options, "task": task_name or task_option, "profiles": list(options.get("profiles") or ()) or None}
    overrides |= {"points": list(options.get("points") or ()) or None}
    settings = load_settings(config, *with_replay(overrides))
    if settings.task is None:
        raise UsageError("no task is given: name one (autocomp search digits), or give a file with --config")
    if config is not None and ":" in settings.task:  # the user's module often lies beside the config
        sys.path.append(str(config.parent.absolute()))
    return settings


def progress_shown() -> Progress:
    from rich.console import Console

    return Progress(Console(stderr=True))
