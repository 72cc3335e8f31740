"""A cache that cannot be written is called the cache, and not the run folder."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from autocomp.errors import UsageError

pytestmark = pytest.mark.usefixtures("short_tuning", "without_exports")


def test_a_disk_that_is_full_for_a_while_leaves_no_files_of_two_runs(
    small: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One file of a point cannot be written, and the disk has room again: the run ends there, and goes on as if it had not."""
    from autocomp.export import files
    from autocomp.run import finish
    from autocomp.run.points import write_points

    monkeypatch.setattr(finish, "write_points", write_points)
    real = files._weights

    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device", "model.safetensors")

    monkeypatch.setattr(files, "_weights", full)
    with pytest.raises(UsageError, match=r"cannot be written: .*full.*--resume"):
        small()
    monkeypatch.setattr(files, "_weights", real)
    assert small(resume=True).run.front


@pytest.mark.parametrize(("options", "reason"), [("size=2m,ro", "read-only"), ("size=64k", "full")])
def test_a_cache_that_cannot_be_written_is_named(
    options: str,
    reason: str,
    mounted: Callable[..., Path],
    small: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("AUTOCOMP_CACHE", str(mounted(options)))
    with pytest.raises(UsageError, match=rf"the cache .*{reason}") as caught:
        small()
    assert "AUTOCOMP_CACHE" in str(caught.value)
    assert not (tmp_path / "run").exists()
