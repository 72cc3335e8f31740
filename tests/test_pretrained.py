"""What `make pretrained` is made of, without its packages: imports of parts, generated data, metrics and their standard errors."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples" / "pretrained"


@pytest.fixture(autouse=True)
def _examples_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))


def test_a_part_is_imported_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from packages import part

    package = tmp_path / "boxed"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('it needs what is not installed')\n")
    (package / "network.py").write_text(
        "import boxed\nfrom nowhere import thing\nfrom nowhere.deep import other\nSIZE = boxed.SIZE + 1\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    found = part("boxed", "network", absent=("nowhere", "nowhere.deep"), SIZE=3)
    assert found.SIZE == 4
    assert "nowhere" not in sys.modules


def test_a_package_that_is_not_installed_is_named_with_the_command() -> None:
    from packages import folder

    with pytest.raises(ImportError, match=r"'not_there_at_all' is not installed: pip install --no-deps"):
        folder("not_there_at_all")


def test_tones_have_the_pitch_they_say() -> None:
    from tones import RATE, tones, within

    sounds, pitch = tones(6, RATE, seed=5, signal_to_noise=(60.0, 60.0), low=200.0, high=400.0)
    again, _ = tones(6, RATE, seed=5, signal_to_noise=(60.0, 60.0), low=200.0, high=400.0)
    assert np.array_equal(sounds, again)
    lags = range(RATE // 450, RATE // 180)
    for sound, heard in zip(sounds, pitch, strict=True):
        best = max(lags, key=lambda lag: float(np.dot(sound[:-lag], sound[lag:])))  # the period repeats itself
        assert within(np.array([RATE / best]), np.array([heard.mean()]), cents=60).all()


def test_edits_are_the_levenshtein_distance() -> None:
    pytest.importorskip("PIL", reason="Pillow draws the lines of text; it comes with the packages of make pretrained")
    from ocr_task import edits

    assert edits("kitten", "sitting") == 3
    assert edits("", "abc") == edits("abc", "") == 3
    assert edits("same", "same") == 0


def test_the_equal_error_rate_of_known_scores() -> None:
    from voices_task import metric

    apart = np.full((3, 2, 3, 2), 0.1)
    for voice in range(3):
        apart[voice, :, voice, :] = 0.9
    assert metric(apart) == 1.0
    mixed = np.random.default_rng(0).random((8, 6, 8, 6))  # scores that know nothing of the voice
    assert metric((mixed + mixed.transpose(2, 3, 0, 1)) / 2) == pytest.approx(0.5, abs=0.08)


def test_what_was_lost_has_the_error_of_pairs() -> None:
    from pretrained import judge

    random = np.random.default_rng(1)
    dense = (random.random((400, 1)) < 0.9).astype(float)
    best = dense.copy()
    best[:4] = 0  # nearly the same samples right: each has an error of 1.5 points, their difference a much smaller one
    module = SimpleNamespace(
        outcomes=lambda model, split: model, metric=lambda rows, chosen: float(rows[chosen].mean())
    )
    found = judge(module, dense, best)
    assert found["lost"] == pytest.approx(dense[:4].sum() / 400)
    assert found["standard_error"]["dense"] == pytest.approx(np.sqrt(0.9 * 0.1 / 400), rel=0.25)
    assert found["lost_standard_error"] < found["standard_error"]["dense"] / 2
