"""The reference pages are what the parsers say, and leave out nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pytest

from autocomp.cli.document import commands_page, keys_page
from autocomp.cli.main import cli
from autocomp.config.settings import Settings
from autocomp.hardware.profile import ProfileFile
from autocomp.space.file import Rule, SpaceFile

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {"commands": ("command-line.md", commands_page), "keys": ("keys.md", keys_page)}


@pytest.mark.parametrize("name", PAGES)
def test_the_page_is_current(name: str) -> None:
    file, page = PAGES[name]
    assert (DOCS / file).read_text() == page(), f"run: python -m autocomp.cli.document {name} > docs/{file}"


def commands(group: click.Group, name: str) -> list[tuple[str, click.Command]]:
    found = []
    for inner, command in group.commands.items():
        if isinstance(command, click.Group):
            found += commands(command, f"{name} {inner}")
        else:
            found.append((f"{name} {inner}", command))
    return found


@pytest.mark.parametrize(("name", "command"), commands(cli, "autocomp"))
def test_every_command_with_its_options_is_there(name: str, command: click.Command) -> None:
    section = commands_page().partition(f"## {name}\n")[2].partition("\n## ")[0]
    assert section
    options = {option for one in command.params if isinstance(one, click.Option) for option in one.opts}
    assert {option for option in options - {"--json", "--debug"} if f"`{option}" not in section} == set()


@pytest.mark.parametrize("model", [Settings, ProfileFile, SpaceFile, Rule])
def test_every_key_is_there_and_explained(model: type) -> None:
    rows = [line for line in keys_page().splitlines() if line.startswith("| `")]
    for name, field in model.model_fields.items():
        assert any(row.startswith((f"| `{name}`", f"| `rules[].{name}`")) for row in rows)
        assert field.description or name == "format_version", f"{model.__name__}.{name} has no description"


def test_run_without_a_page_it_says_which_there_are() -> None:
    done = subprocess.run([sys.executable, "-m", "autocomp.cli.document"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "commands | keys" in done.stderr
