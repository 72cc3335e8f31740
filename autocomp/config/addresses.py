"""Addresses of databases, as they may be shown."""

from __future__ import annotations

import re

JOURNAL = "journal:///"


def masked(url: str) -> str:
    """An address without the password in it; a file as its path."""
    if url.startswith(JOURNAL):
        return url.removeprefix(JOURNAL)
    # the password stands between the first colon behind the scheme and the last "@" before a path; or in a query, by whatever name
    url = re.sub(r"(://[^/:?]*):[^/?]*@", r"\1:***@", url)
    return re.sub(r"(?i)([?&][^=&]*(?:pass|pwd|secret|token|key)[^=&]*=)[^&\s]*", r"\1***", url)
