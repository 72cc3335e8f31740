"""A cache that cannot be written is called the cache, and not the run folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from autocomp.errors import UsageError

pytestmark = pytest.mark.usefixtures("short_tuning", "without_exports")


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
