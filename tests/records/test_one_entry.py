"""A precision is one entry: what the table names is there, and nothing but that knows a precision by its name or its modules."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from autocomp.records import precisions
from autocomp.records.precisions import ARITHMETICS, FAMILIES, FORMATS, PRECISIONS, Family, load

PACKAGE = Path(precisions.__file__).parent.parent
TABLE = "autocomp.records.precisions"
WORD = re.compile(rf"(?<![a-zA-Z0-9])(?:{'|'.join(map(re.escape, PRECISIONS))})(?![a-zA-Z0-9])")
# Where a name of the table stands by right: not to choose by, or in the one place that no entry of a precision can hold.
NAMES = {
    "autocomp.hardware.host": "Linux's names of instruction sets",
    "autocomp.measurement.references": "files for another runtime",
    "autocomp.layers.recurrent": "the op of a loop over time in 8 bits, whose layer is of two precisions at once",
    "autocomp.compiler.recurrent": "its lowering",
    "autocomp.recovery.recipe": "what torch's autocast is told, of a whole training and no layer",
    "autocomp.recovery.autocast": "the same",
}
MODULES = {
    "autocomp.layers.recurrent": "a loop over time computes with the integers of its hidden layer",
    "autocomp.export.onnx_recurrent": "the same loop in ONNX",
    "autocomp.compress.scales": "whole models in one precision, for tests and comparisons with other recipes",
}


def references(family: Family) -> dict[str, str]:
    """What an entry names, by field."""
    named = {name: value for name, value in vars(family).items() if isinstance(value, str) and ":" in value}
    return named | {"product": family.arithmetic.product}


OWN = {reference.partition(":")[0] for family in FAMILIES for reference in references(family).values()}
KINDS = {form.kind.__name__ for family in FAMILIES if family.forms for form in load(family.forms)}


@cache
def sources() -> dict[str, ast.Module]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(("autocomp", *path.relative_to(PACKAGE).with_suffix("").parts))
        found[name.removesuffix(".__init__")] = ast.parse(path.read_text())
    return found


def words(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """String constants that a program can decide by: neither documentation nor sentences."""
    said = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        text = node.value if isinstance(node, ast.Constant) and id(node) not in said else None
        if isinstance(text, str) and not re.search(r"\s", text):
            yield node.lineno, text


def imported(tree: ast.Module, module: str) -> set[str]:
    return {
        name.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == module
        for name in node.names
    }


def test_everything_that_the_table_names_is_there() -> None:
    for family in FAMILIES:
        for field, reference in references(family).items():
            made = load(reference)
            assert isinstance(made, tuple) if field == "forms" else callable(made), reference
    assert {form.family for form in FORMATS.values()} == set(FAMILIES)
    assert {family.arithmetic for family in FAMILIES} == set(ARITHMETICS.values())


def test_a_stage_needs_nothing_that_another_has_imported(tmp_path: Path) -> None:
    """ONNX's translations name the ops of every family, also where no module of it was ever made."""
    code = (
        "import sys, pathlib, torch; from autocomp.export.onnx import export_onnx; "
        "export_onnx(torch.nn.Linear(3, 2), (torch.ones(1, 3),), pathlib.Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.onnx")], check=True)
    assert (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize("module", sorted(sources().keys() - OWN - {TABLE} - NAMES.keys()))
def test_no_other_module_names_a_precision(module: str) -> None:
    named = [f"line {line}: {text!r}" for line, text in words(sources()[module]) if WORD.search(text)]
    assert not named, f"{module} knows a precision by its name; ask its entry in {TABLE} instead: {', '.join(named)}"


def test_no_other_module_knows_families_or_their_modules() -> None:
    families = {name for name, value in vars(precisions).items() if isinstance(value, Family)}
    for module, tree in sources().items():
        if module in OWN or module == TABLE:
            continue
        assert not imported(tree, TABLE) & families, (
            f"{module} asks which family a precision is of; ask what its entry says"
        )
        if module not in MODULES:
            known = {name for own in OWN for name in imported(tree, own)} & KINDS
            assert not known, f"{module} knows {', '.join(known)}; ask a layer's family instead (layers.part.Stored)"


def test_what_is_allowed_is_needed() -> None:
    for module in NAMES:
        assert any(WORD.search(text) for _, text in words(sources()[module])), module
    for module in MODULES:
        assert any(imported(sources()[module], own) & KINDS for own in OWN), module
