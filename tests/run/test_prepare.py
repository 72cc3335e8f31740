"""A task is prepared once, in one way, for whatever looks at it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_task
import torch

from autocomp.api import SearchResult, sensitivity
from autocomp.config.settings import load_settings
from autocomp.hardware.profile import load_profile
from autocomp.run.prepare_task import prepare_task
from autocomp.space.file import load_space


@pytest.mark.slow
@pytest.mark.usefixtures("short_tuning", "without_exports")
def test_a_study_of_sensitivity_sees_the_model_that_a_search_compresses(
    small: Callable[..., SearchResult], spaces: dict[str, str]
) -> None:
    searched = small().run.sensitivity
    _, rows = sensitivity(load_settings(None, {"task": "tiny_task:task", "space": spaces["full"]}))
    alone = {(row.subject, row.kind, row.option): row.error for row in rows}
    assert searched
    for row in searched:
        assert alone[row.subject, row.kind, row.option] == pytest.approx(row.error, rel=1e-6)


def test_what_is_prepared_computes_what_the_model_did(spaces: dict[str, str]) -> None:
    task, more = tiny_task.task(), tiny_task.data(5, seed=7)[0]
    prepared = prepare_task(task, load_space(Path(spaces["full"])), [load_profile("x86-host")], 64)
    assert prepared.task.model is not task.model
    assert [x.shape for (x,) in prepared.inputs] == [task.example_inputs[0].shape] * len(prepared.inputs)
    with torch.no_grad():
        torch.testing.assert_close(prepared.task.model(more), task.model(more), rtol=1e-4, atol=1e-5)
