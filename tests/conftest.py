"""Every test run has a cache of its own: what the user has tuned or trained is neither read nor changed."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    before = os.environ.get("AUTOCOMP_CACHE")
    os.environ["AUTOCOMP_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["AUTOCOMP_CACHE"]
    else:
        os.environ["AUTOCOMP_CACHE"] = before
