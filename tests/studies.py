"""What a run's study was told, read from outside."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any


def told(folder: Path) -> dict[int, dict[str, Any]]:
    """Evaluations of a run's study as they were told, by trial, read from its file while it may be in use."""
    if not (folder / "study.db").exists():
        return {}
    query = (
        """select number, value_json from trials join trial_user_attributes using (trial_id) where key = 'evaluation'"""
    )
    try:
        with closing(sqlite3.connect(f"file:{folder / 'study.db'}?mode=ro", uri=True, timeout=10)) as connection:
            rows = connection.execute(query).fetchall()
    except sqlite3.OperationalError:  # the tables are being made
        return {}
    return {number: json.loads(text) for number, text in rows}
