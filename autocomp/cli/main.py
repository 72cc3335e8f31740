"""The command line. Results go to standard output, progress and errors to standard error."""

from __future__ import annotations

import io
import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from autocomp.cache import unwritable_reason
from autocomp.cli import tables as terminal
from autocomp.cli.device import device
from autocomp.cli.fuse import fuse
from autocomp.cli.kernels import kernels
from autocomp.cli.look import check, measure, plan, profiles, schema, sensitivity, spaces
from autocomp.cli.options import (
    Commands,
    Quantity,
    common_options,
    goal_options,
    goals_together,
    print_json,
    progress_shown,
    resolve,
    settings_options,
)
from autocomp.cli.recover import recipes, recover
from autocomp.cli.verdict import gate
from autocomp.config.quantities import parse_seconds
from autocomp.errors import AutocompError, UsageError, cut
from autocomp.processes import interrupt
from autocomp.records.run import FRONT
from autocomp.run.folder import CONFIG, as_begun, check_run_folder, no_run

MESSAGE_LINES = 10
INTERRUPTED = 130  # 128 + SIGINT, as shells report it


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="autocomp")
def cli() -> None:
    """Search how to compress a PyTorch model, measured on its target's own autotuned kernels."""


@cli.command()
@settings_options
@click.option("--trials", type=int, help="Candidates told to the study.")
@click.option("--measurements", type=int, help="Candidates compiled and timed as whole modules.")
@click.option("--measure", type=int, hidden=True)  # its name of version 0.2 and before
@click.option("--minutes", type=float, help="Minutes of the whole run, the files of its end included.")
@click.option(
    "--auto",
    is_flag=True,
    default=None,
    help="Choose trials, measurements, calibration samples, space and recovery where they are not stated; said with the reason of each.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be searched with which settings, and end there.")
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
@goal_options
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
    task_name: str | None,
    config: Path | None,
    task_option: str | None,
    resume: bool,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Search the compressions of TASK and write the measured front into a run folder.

    TASK is a built-in task (digits, digits-mobile, speech, tokens), or package.module:function that returns an autocomp.Task.
    """
    if resume and config is None and task_name is None and task_option is None:
        stored = Path(options["out"] or "") / CONFIG
        if options["out"] and not stored.exists():
            raise no_run(Path(options["out"]))
        config = stored if options["out"] else None
    settings = resolve(task_name, task_option, config, goals_together(options))
    if resume:
        settings = as_begun(settings, Path(settings.out))
    folder = check_run_folder(settings, resume)  # before torch is even imported

    from autocomp import api

    if dry_run:
        found = api.resolve(settings, progress=progress_shown())
        if as_json:
            print_json(json.dumps(found.to_json()))
        else:
            terminal.show_resolved(found, settings)
        return
    result = api.search(settings=settings, task=None, resume=resume, progress=progress_shown())
    place = folder if (folder / FRONT).exists() else result.folder  # a task may have changed the working folder
    if as_json:
        print_json((place / FRONT).read_text(encoding="utf-8"))
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
    if as_json:
        print_json(json.dumps({"report": str(page)}))
    else:
        click.echo(f"report: {page}")


for command in (measure, profiles, spaces, check, plan, sensitivity, schema):
    cli.add_command(command)
cli.add_command(kernels)
cli.add_command(device)
cli.add_command(gate)
cli.add_command(recover)
cli.add_command(fuse)
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
