"""The command line. Results go to standard output, progress and errors to standard error."""

from __future__ import annotations

import io
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from autocomp.cache import unwritable_reason
from autocomp.cli import tables as terminal
from autocomp.cli.device import device
from autocomp.cli.kernels import kernels
from autocomp.cli.options import Commands, F, LimitType, common_options, together
from autocomp.cli.recover import recipes, recover
from autocomp.cli.verdict import gate
from autocomp.config.files import read_mapping
from autocomp.config.limits import one_drop, one_latency, one_size
from autocomp.config.quantities import parse_seconds
from autocomp.config.settings import Settings, load_settings, settings_schema
from autocomp.config.shipped import shipped_files
from autocomp.errors import AutocompError, ModelWarning, UsageError, cut, shown
from autocomp.hardware.profile import profile_schema
from autocomp.processes import interrupt
from autocomp.progress import Progress
from autocomp.records.run import FRONT
from autocomp.run.folder import CONFIG, check_run_folder, no_run
from autocomp.run.replay import with_replay

MESSAGE_LINES = 10
INTERRUPTED = 130  # 128 + SIGINT, as shells report it


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


def _settings_options(command: F) -> F:
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


def _goal_options(command: F) -> F:
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


def _goals_together(options: dict[str, Any]) -> dict[str, Any]:
    """The options with limits that may be repeated as one setting each."""
    return options | {name: together(options[name]) for name in ("max_drop", "max_latency")}


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="autocomp")
def cli() -> None:
    """Search how to compress a PyTorch model, measured on its target's own autotuned kernels."""


@cli.command()
@_settings_options
@click.option("--trials", type=int, help="Candidates told to the study.")
@click.option("--measurements", type=int, help="Candidates compiled and timed as whole modules.")
@click.option("--measure", type=int, hidden=True)  # its name of version 0.2 and before
@click.option("--minutes", type=float, help="Minutes of the whole run, the files of its end included.")
@click.option(
    "--recover", help="How long to train compressed models beyond the front: 10min, 500steps, 5epochs; 0: none."
)
@click.option("--recipe", help="How they are trained; a recipe or its YAML file.")
@click.option(
    "--replay", help="A finished run whose points are made again for TASK's weights, in the place of a search."
)
@click.option(
    "--point", "points", multiple=True, help="Id of such a point; may be repeated. The whole front unless given."
)
@click.option("--out", help="Run folder; runs/NAME OF THE TASK unless given.")
@click.option("--resume", is_flag=True, help="Continue the run in the run folder.")
@click.option(
    "--evaluate-timeout",
    type=Quantity("duration", parse_seconds),
    help="Longest that evaluate and test may take for one model, such as 90s.",
)
@click.option(
    "--deterministic", is_flag=True, default=None, help="Same seed, settings and stored kernel times: same trials."
)
@_goal_options
@click.option("--sampler", help="What proposes candidates: autocomp, tpe, nsgaii, nsgaiii, gp or random.")
@click.option(
    "--storage",
    help="Optuna storage of the study, such as sqlite:///runs.db; study.journal in the run folder unless given.",
)
@click.option("--family", help="Speed-ups of which each gets a model of its own, such as 2x,3x,4x.")
@click.option(
    "--stop-when-met", is_flag=True, default=None, help="End once the goals are met, and the family is there."
)
@common_options
def search(
    task_name: str | None, config: Path | None, task_option: str | None, resume: bool, as_json: bool, **options: Any
) -> None:
    """Search the compressions of TASK and write the measured front into a run folder.

    TASK is a built-in task (digits, digits-mobile, speech, tokens), or package.module:function that returns an autocomp.Task.
    """
    if resume and config is None and task_name is None and task_option is None:
        stored = Path(options["out"] or "") / CONFIG
        if options["out"] and not stored.exists():
            raise no_run(Path(options["out"]))
        config = stored if options["out"] else None
    settings = _resolve(task_name, task_option, config, _goals_together(options))
    folder = check_run_folder(settings, resume)  # before torch is even imported

    from autocomp import api

    result = api.search(settings=settings, task=None, resume=resume, progress=_progress())
    place = folder if (folder / FRONT).exists() else result.folder  # a task may have changed the working folder
    if as_json:
        click.echo((place / FRONT).read_text(encoding="utf-8"), nl=False)
    else:
        terminal.show_front(result.run)
        if settings.family:
            terminal.show_family(result.run, settings)
        click.echo(f"\nreport: {place / 'report.html'}")


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@common_options
def report(run: Path, as_json: bool) -> None:
    """Build the report of the run folder RUN again from its files."""
    if not os.path.isdir(run):  # unlike Path's, false for a name that no file system takes
        raise UsageError(f"there is no run folder {cut(str(run))}")
    from autocomp import api

    page = api.rebuild_report(run)
    click.echo(json.dumps({"report": str(page)}) if as_json else f"report: {page}")


@cli.command()
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
        click.echo(json.dumps({name: latency_to_json(latency) for name, latency in latencies.items()}))
        return
    for latency in latencies.values():
        terminal.show_latency(latency, kernels)


@cli.command()
@common_options
def profiles(as_json: bool) -> None:
    """List the hardware profiles, resolved on this machine."""
    described = terminal.describe_profiles()
    if as_json:
        click.echo(json.dumps(described))
    else:
        terminal.show_profiles(described)


@cli.command()
@common_options
def spaces(as_json: bool) -> None:
    """List the search spaces."""
    described = [
        {"name": name, "description": str(read_mapping(path).get("description", "")), "path": str(path)}
        for name, path in shipped_files("search_spaces").items()
    ]
    if as_json:
        click.echo(json.dumps(described))
    else:
        rows = [[space["name"], space["description"], space["path"]] for space in described]
        terminal.show_table(["space", "description", "file"], rows)


@cli.command()
@_settings_options
@common_options
def check(task_name: str | None, config: Path | None, task_option: str | None, as_json: bool, **options: Any) -> None:
    """Say what a search of TASK would choose from, and why other options are not offered."""
    settings = _resolve(task_name, task_option, config, options)

    from autocomp import api

    found = api.check(settings, _progress())
    if as_json:
        click.echo(json.dumps(found))
    else:
        terminal.show_check(found)


@cli.command()
@_settings_options
@click.option("--trials", type=int, help="Candidates that would be told.")
@_goal_options
@common_options
def plan(task_name: str | None, config: Path | None, task_option: str | None, as_json: bool, **options: Any) -> None:
    """Say what a search of TASK is expected to find and to take: a predicted front, which layers decide it, what is kept."""
    settings = _resolve(task_name, task_option, config, _goals_together(options))

    from autocomp import api

    found = api.plan(settings, _progress())
    if as_json:
        click.echo(json.dumps(found.to_json()))
    else:
        terminal.show_plan(found)


@cli.command()
@_settings_options
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
    settings = _resolve(task_name, task_option, config, options)

    from autocomp import api

    page = out or Path(f"sensitivity-{(settings.task or 'task').replace(':', '-')}.html")
    name, rows = api.sensitivity(settings, page, _progress(), masked)
    if as_json:
        click.echo(json.dumps({"task": name, "page": str(page), "rows": [asdict(row) for row in rows]}))
    else:
        terminal.show_sensitivity(rows)
        click.echo(f"\npage: {page}")


@cli.command()
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
    click.echo(json.dumps(schemas[kind](), indent=None if as_json else 2))


cli.add_command(kernels)
cli.add_command(device)
cli.add_command(gate)
cli.add_command(recover)
cli.add_command(recipes)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 ok, 1 failure, 2 usage, 3 nothing feasible, 130 interrupted."""
    state: dict[str, bool] = {}
    _open_what_is_closed()
    try:
        with interrupt.remembered():
            given = None if argv is None else list(argv)
            # what a command returns; or, where it asks click to exit, the code that it asked for
            code = cli.main(args=given, prog_name="autocomp", standalone_mode=False, obj=state)
    except click.ClickException as error:
        said = io.StringIO()
        error.show(file=said)
        click.echo(_in_bounds(said.getvalue().rstrip("\n")), err=True)
        return error.exit_code
    except (click.Abort, KeyboardInterrupt) as error:  # click makes the one of the other
        return _fail("interrupted", getattr(error.__cause__ or error, "exit_code", INTERRUPTED), state)
    except AutocompError as error:
        return _fail(str(error), error.exit_code, state)
    except BrokenPipeError:  # the reader of our output left; Python would complain again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        reason = unwritable_reason(error)
        if reason is None:
            return _fail(_unexpected(error), 1, state)
        return _fail(f"{error.filename or 'a file'} cannot be written: {reason}", UsageError.exit_code, state)
    except Exception as error:
        return _fail(_unexpected(error), 1, state)
    return code if isinstance(code, int) else 0


def _open_what_is_closed() -> None:
    """Give a process that was started without one of its standard streams an empty one: else the next file opened would take its number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 # as long as the process
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115


def _resolve(task_name: str | None, task_option: str | None, config: Path | None, options: dict[str, Any]) -> Settings:
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


def _load_model(name: str) -> tuple[Any, tuple[Any, ...]]:
    """The model and example inputs of a task or a torch.export file."""
    if not name.endswith(".pt2"):
        from autocomp.tasks.task import load_task

        task = load_task(name, _progress())
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


def _progress() -> Progress:
    from rich.console import Console

    return Progress(Console(stderr=True))


def _unexpected(error: BaseException) -> str:
    return f"{type(error).__name__}: {error} (run again with --debug for the traceback)"


def _fail(message: str, code: int, state: dict[str, bool]) -> int:
    if state.get("debug"):
        traceback.print_exc()
    click.echo(f"error: {_in_bounds(message)}", err=True)
    return code


def _in_bounds(message: str) -> str:
    """A message of at most ten lines, of which none is a page long or steers the terminal: much of it may be what others wrote."""
    lines = ["".join(c if c.isprintable() else repr(c)[1:-1] for c in line) for line in message.split("\n")]
    lines = [line if len(line) <= 2000 else f"{line[:1000]}…{line[-500:]}" for line in lines]
    if len(lines) > MESSAGE_LINES:
        lines = [*lines[: MESSAGE_LINES - 1], f"… ({len(lines) - MESSAGE_LINES + 1} more lines)"]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
