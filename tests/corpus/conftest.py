"""The corpus needs the packages its models come from; CI has them, and a machine without them says what to do."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest

MISSING = [name for name in ("torchvision", "timm", "transformers") if find_spec(name) is None]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not MISSING or os.environ.get("CI"):  # there they fail instead
        return
    reason = f"needs {', '.join(MISSING)}: make corpus"
    for item in items:
        if item.get_closest_marker("corpus"):
            item.add_marker(pytest.mark.skip(reason=reason))
