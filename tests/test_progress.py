"""Progress: silent by default, lines in a log, bars in a terminal; warnings once."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from autocomp.progress import Progress


def console(terminal: bool) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, force_terminal=terminal, width=100, color_system=None), stream


def test_silent_keeps_seconds_and_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress()
    for _ in range(2):
        with progress.stage("tune", 2) as stage:
            stage.advance(note="conv [1, 2]")
            stage.warn("odd")
    assert list(progress.seconds) == ["tune"]
    assert progress.warnings == ["odd"]
    assert capsys.readouterr() == ("", "")


def test_log_has_one_line_a_stage_and_plain_brackets() -> None:
    target, stream = console(terminal=False)
    progress = Progress(target)
    with progress.stage("search", 3) as outer:
        with progress.stage("tune"):
            pass
        outer.advance(3, note="front [4]")
        outer.warn("layer [x] rebuilt")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "warning: layer [x] rebuilt"
    assert lines[1].startswith("search: 3/3 in ")
    assert lines[1].endswith("front [4]")
    assert len(lines) == 2


def test_stages_end_where_they_fail() -> None:
    target, stream = console(terminal=False)
    progress = Progress(target)

    def diverge() -> None:
        with progress.stage("train", 5) as stage:
            stage.advance()
            raise ValueError("diverged")

    with pytest.raises(ValueError, match="diverged"):
        diverge()
    assert "train: 1/5 in" in stream.getvalue()
    assert "(stopped)" in stream.getvalue()
    with progress.stage("next"):  # the failed one is not thought to run still
        pass
    assert "next: in " in stream.getvalue()


def test_bars_show_nested_stages_and_leave_the_outermost() -> None:
    target, stream = console(terminal=True)
    progress = Progress(target)
    with progress.stage("search [a]", 2) as outer, progress.stage("tune", 2) as inner:
        inner.advance(2)
        outer.advance()
        progress.warn("slow")
    text = stream.getvalue()
    assert "search [a]" in text
    assert "warning: slow" in text
