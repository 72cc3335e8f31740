"""What a run's study was told, read from outside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from autocomp.config.addresses import JOURNAL
from autocomp.run.folder import STUDY
from autocomp.study.storage import open_storage


def told(folder: Path) -> dict[int, dict[str, Any]]:
    """Evaluations of a run's study as they were told, by trial, read from its file while it may be in use."""
    if not (folder / STUDY).exists():
        return {}
    storage = open_storage(f"{JOURNAL}{folder / STUDY}")
    found = [trial for study in storage.get_all_studies() for trial in storage.get_all_trials(study._study_id)]
    return {trial.number: trial.user_attrs["evaluation"] for trial in found if "evaluation" in trial.user_attrs}
