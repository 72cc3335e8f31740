"""What every command has: its common options, and help with a mistyped name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from autocomp.errors import suggest

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
    return as_json(debug(command))


def _remember_debug(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value:
        ctx.find_root().ensure_object(dict)["debug"] = True
