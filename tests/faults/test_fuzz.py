"""The readers of YAML, JSON and TOML on whatever bytes: what was meant, or one UsageError; never anything else, in bounded time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autocomp.config.files import read_mapping
from autocomp.config.settings import Goals, Settings, dump_settings, load_settings, read_settings
from autocomp.errors import AutocompError
from autocomp.hardware.profile import load_profile
from autocomp.records.run import read_run
from autocomp.records.table import read_evaluations
from autocomp.run.folder import open_run_folder
from autocomp.space.file import load_space
from autocomp.tuning.exchange import read_export
from autocomp.tuning.store import read_lines

# Files in the shape of what is read, so that the fuzzing reaches past the first key.
KEYS = st.sampled_from(
    [*Settings.model_fields, *Goals.model_fields, "format_version", "rules", "layers", "keep", "ranks", "precisions", "name", "target", "kind",
     "mcpu", "records", "identity", "sha256", "front", "dense", "task", "x"]
)  # fmt: skip
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.sampled_from(["digits", "*", "fp32", "1e400KB", "llvm"])
)  # fmt: skip
TREES = st.recursive(
    LEAVES, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(KEYS, inner, max_size=6)), max_leaves=12
)  # fmt: skip
SOUP = st.text(alphabet=list("[]{}&*!|>%@`'\",:-#? \n\t\\0aé\u2028\ud800x1.e"), max_size=80)
BYTES = st.one_of(
    st.binary(max_size=200),
    SOUP.map(lambda text: text.encode(errors="surrogatepass")),
    TREES.map(lambda tree: yaml.safe_dump(tree).encode(errors="surrogatepass")),
    TREES.map(lambda tree: json.dumps(tree).encode()),
)
FUZZ = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    derandomize=True,
)


def refusal(reader: Callable[[Path], object], path: Path) -> str:
    """What a reader says of a file that it does not take; empty for one that it takes. Whatever else it raises is the test's."""
    try:
        reader(path)
    except AutocompError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", ["x.yaml", "x.yml", "x.toml", "x.json"])
@FUZZ
@given(content=BYTES)
def test_any_bytes_are_read_or_refused(name: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    readers: list[Any] = [read_mapping, load_settings, read_settings, read_export]
    if name.endswith("yaml"):
        readers += [load_space, load_profile]
    for reader in readers:
        said = refusal(reader, path)
        assert len(said) < 5000
        assert len(said.splitlines()) <= 10


@FUZZ
@given(content=BYTES)
def test_any_store_is_read(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "kernels.jsonl"
    path.write_bytes(content)
    lines = read_lines(path)
    assert not lines.records
    assert len(lines.damaged) == sum(bool(line.strip()) for line in content.split(b"\n"))


@FUZZ
@given(
    content=BYTES,
    name=st.sampled_from(["front.json", "evaluations.csv", "config.yaml", "run.json", "study.db", "study.journal"]),
)
def test_any_run_folder_is_read_or_refused(content: bytes, name: str, tmp_path: Path) -> None:
    for file in tmp_path.iterdir():
        if file.is_file():
            file.unlink()
    chosen = load_settings(None, {"task": "digits", "out": str(tmp_path)})
    (tmp_path / "config.yaml").write_text(dump_settings(chosen))
    (tmp_path / name).write_bytes(content)
    for reader in (read_run, read_evaluations, lambda folder: open_run_folder(chosen, resume=True)):
        assert len(refusal(reader, tmp_path)) < 5000
