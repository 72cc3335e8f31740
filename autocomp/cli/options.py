"""What every command has: its common options, and help with a mistyped name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from autocomp.config.limits import ALL
from autocomp.errors import UsageError, shown, suggest

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
