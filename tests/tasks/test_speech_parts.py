"""The parts of the built-in task ``speech``: text, audio that comes in, front end, voices, noises, recordings."""

from __future__ import annotations

import ctypes
from pathlib import Path

import espeakng_loader
import numpy as np
import pytest
import torch
from scipy.io import wavfile

from autocomp.errors import AutocompError, CorruptError, UsageError
from autocomp.tasks.speech import espeak, fetch, gsm, noise, recordings, voices, words
from autocomp.tasks.speech.audio import RATE, WINDOW, checked, in_window, read_wav, resampled, trimmed
from autocomp.tasks.speech.espeak import Order, synthesised
from autocomp.tasks.speech.features import BANDS, FRAMES, STEPS, log_mel, mel_filters

torch.set_num_threads(1)


def tone(hertz: float, seconds: float = 0.5) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * RATE)) / RATE)).astype(np.float32)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AUTOCOMP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# Text


def test_what_is_encoded_is_decoded_where_blanks_part_equal_characters() -> None:
    for text in (*words.WORDS, "three seven", "quebec xray zulu"):
        with_blanks = [found for one in words.encoded(text) for found in (one, one, words.BLANK)]
        assert words.decoded(with_blanks) == text


def test_repeats_need_a_frame_more() -> None:
    assert words.frames_needed(words.encoded("one")) == 3
    assert words.frames_needed(words.encoded("three")) == 6


@pytest.mark.parametrize(("text", "named"), [("Alpha", "'A'"), ("nine-9", "'-', '9'"), ("naïve", "'ï'")])
def test_characters_outside_the_vocabulary_are_named(text: str, named: str) -> None:
    with pytest.raises(UsageError, match=rf"a to z and blanks alone; '{text}' has {named}: write it in small letters"):
        words.encoded(text)


# Audio that comes in


@pytest.mark.parametrize(
    ("samples", "rate", "said"),
    [
        (tone(300), 16_000, r"must have 8000 samples a second, here has 16000: `resampled` converts it"),
        (np.stack([tone(300)] * 2, 1), RATE, r"must be mono, here has the shape \(4000, 2\): take one channel"),
        (np.zeros(0, np.float32), RATE, r"must hold samples, here is empty"),
        (np.zeros(100, np.int16), RATE, r"must hold sound, here is silent: all 100 samples are 0"),
        (np.array([0.1, np.nan, np.inf], np.float32), RATE, r"must be finite, here has 2 value\(s\).*of 3"),
        (np.sign(tone(300)), RATE, r"must not be clipped, more than 1% of here"),
        (np.full(100, 200, np.uint8), RATE, r"must be of 16 bits or floats between -1 and 1, here is uint8"),
    ],
)
def test_audio_that_cannot_be_used_is_refused_in_one_message(samples: np.ndarray, rate: int, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        checked(samples, rate, "here")


def test_audio_too_long_for_the_window_is_refused() -> None:
    with pytest.raises(UsageError, match=r"must fit a window of 2 s, here is 2.50 s long: cut it"):
        in_window(tone(300, 2.5), "here")


def test_wav_files_are_read_or_refused(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.wav", tmp_path / "bad.wav"
    wavfile.write(good, RATE, np.round(32767 * tone(300)).astype(np.int16))
    np.testing.assert_allclose(read_wav(good), tone(300), atol=1e-4)
    bad.write_bytes(b"no RIFF at all")
    with pytest.raises(UsageError, match=r"bad\.wav is no WAV file that can be read"):
        read_wav(bad)
    with pytest.raises(UsageError, match=r"none\.wav cannot be read: No such file"):
        read_wav(tmp_path / "none.wav")


def test_silence_around_speech_is_cut() -> None:
    x = np.concatenate([np.zeros(4000), tone(300), np.zeros(4000)]).astype(np.float32)
    assert 4000 <= len(trimmed(x)) <= 4000 + 8 * RATE // 100


def test_resampling_keeps_a_tone_and_drops_what_would_fold_back() -> None:
    high = np.sin(2 * np.pi * 7000 * np.arange(16_000) / 16_000).astype(np.float32)
    low = np.sin(2 * np.pi * 500 * np.arange(16_000) / 16_000).astype(np.float32)
    assert len(resampled(low, 16_000)) == RATE
    assert np.abs(resampled(high, 16_000)[100:-100]).max() < 0.02 < 0.9 < np.abs(resampled(low, 16_000)).max()


def test_other_rates_are_converted_only_where_that_is_asked_for_and_down(tmp_path: Path) -> None:
    high, low = tmp_path / "high.wav", tmp_path / "low.wav"
    wavfile.write(high, 16_000, (0.3 * np.sin(2 * np.pi * 500 * np.arange(16_000) / 16_000)).astype(np.float32))
    wavfile.write(low, 4000, tone(300))
    assert len(read_wav(high, any_rate=True)) == RATE
    with pytest.raises(UsageError, match=r"must have 8000 samples a second, .*low\.wav has 4000"):
        read_wav(low, any_rate=True)


# Front end


def test_frames_do_not_depend_on_loudness_and_silence_is_the_least() -> None:
    window = torch.from_numpy(in_window(tone(1000), "a tone", 4000))[None]
    frames = log_mel(window)
    assert frames.shape == (1, FRAMES, BANDS)
    assert STEPS * 4 == FRAMES
    torch.testing.assert_close(frames, log_mel(0.01 * window), atol=1e-4, rtol=0)
    assert float(frames.max()) == 1
    assert float(frames[0, :40].max()) == float(frames.min()) == -1
    assert torch.isfinite(log_mel(torch.zeros(1, WINDOW))).all()


def test_a_tone_is_loudest_in_its_band() -> None:
    centres = mel_filters().argmax(0) * (RATE / 2) / (len(mel_filters()) - 1)  # Hz of each band
    for hertz in (300, 1000, 3000):
        loudest = int(log_mel(torch.from_numpy(in_window(tone(hertz, 2.0), "a tone"))[None])[0, 100].argmax())
        assert abs(float(centres[loudest]) - hertz) < 0.1 * hertz


def test_filters_warp_up_and_down_and_leave_the_top() -> None:
    plain = mel_filters().argmax(0)
    for warp in (0.88, 1.12):
        warped = mel_filters(warp).argmax(0)
        ratio = float((warped[15:35] / plain[15:35]).mean())
        assert ratio == pytest.approx(warp, abs=0.02)
        assert abs(int(warped[-1] - plain[-1])) <= 5
        assert (mel_filters(warp).sum(0) > 0).all()


def test_each_window_may_have_filters_of_its_own() -> None:
    windows = torch.from_numpy(np.stack([in_window(tone(700), "a tone")] * 2))
    filters = torch.stack([mel_filters(), mel_filters(1.12)])
    found = log_mel(windows, filters=filters)
    torch.testing.assert_close(found[:1], log_mel(windows[:1]))
    assert int(found[1, 20].argmax()) < int(found[0, 20].argmax())


# Voices


def test_nobody_speaks_in_two_splits() -> None:
    by_split = {split: set(voices.variants(split)) | set(voices.BABBLE[split]) for split in voices.HELD_OUT}
    by_split["training"] = set(voices.variants("training")) | set(voices.BABBLE["training"])
    for one, other in (("training", "validation"), ("training", "test"), ("validation", "test")):
        assert not by_split[one] & by_split[other]
        assert not set(voices.PEOPLE[one]) & set(voices.PEOPLE[other])
    accents = [
        *voices.ACCENTS,
        *voices.FOREIGN_ACCENTS,
        *voices.HELD_OUT_ACCENTS["validation"],
        *voices.HELD_OUT_ACCENTS["test"],
    ]
    assert len(set(accents)) == len(accents)
    known = {path.name for path in (espeak.data_folder() / "voices" / "!v").iterdir()}
    assert by_split["validation"] | by_split["test"] | set(voices.ODD) <= known
    assert len(by_split["training"]) > 50


def test_the_same_orders_are_said_the_same_way_in_another_process(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    orders = [Order("gmw/en-US+f3", "alpha bravo", 200, 60), Order("gmw/en+klatt3", "zero")]
    first = synthesised(orders)
    assert all(1000 < len(said) < 2 * RATE for said in first)
    monkeypatch.setenv("AUTOCOMP_CACHE", str(cache / "other"))
    for one, other in zip(first, synthesised(orders), strict=True):
        np.testing.assert_array_equal(one, other)


def test_what_was_said_is_kept_and_made_again_where_it_is_cut(cache: Path) -> None:
    orders = [Order("gmw/en+f3", "nine")]
    first = np.array(synthesised(orders)[0])
    (kept,) = (cache / "tasks" / "speech").glob("said-*.npy")
    written = kept.stat().st_mtime_ns
    synthesised(orders)
    assert kept.stat().st_mtime_ns == written
    kept.write_bytes(kept.read_bytes()[:-100])
    np.testing.assert_array_equal(synthesised(orders)[0], first)


def test_voices_of_other_languages_are_given_words_as_they_are_heard(cache: Path) -> None:
    said = synthesised([Order("roa/it+f3", "nine"), Order("roa/it+f3", "nain"), Order("gmw/en+f3", "nine")])
    assert len(said[0]) == len(said[1]) != len(said[2])
    assert set(words.AS_HEARD) <= set(words.WORDS)


def test_a_voice_that_is_not_there_is_named(cache: Path) -> None:
    with pytest.raises(AutocompError, match=r"espeak-ng failed with exit code 1: .*no voice 'gmw/xx'"):
        synthesised([Order("gmw/xx", "nine")])


def test_without_the_packages_one_message_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(espeak, "find_spec", lambda name: None)
    with pytest.raises(
        UsageError, match=r"not installed, espeakng-loader .*, jiwer .*: pip install 'autocomp\[speech\]'"
    ) as raised:
        synthesised([Order("gmw/en", "nine")])
    assert raised.value.exit_code == 2


def test_without_espeak_itself_one_message_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(espeakng_loader, "get_library_path", lambda: "/nowhere/libespeak-ng.so")
    with pytest.raises(UsageError, match=r"espeak-ng is not there.*/nowhere/libespeak-ng\.so: pip install"):
        synthesised([Order("gmw/en", "nine")])


# Noise


def test_noise_has_the_ratio_asked_for() -> None:
    random = np.random.default_rng(0)
    speech = in_window(tone(500), "a tone", 3000)
    for decibels in (20.0, 0.0):
        added = noise.noisy(speech, random.standard_normal(WINDOW), decibels) - speech
        ratio = 10 * np.log10(noise.power(tone(500)) / noise.power(added))
        assert ratio == pytest.approx(decibels, abs=0.1)


def test_every_kind_of_noise_is_there_and_differs_each_time(cache: Path) -> None:
    clip = np.round(3000 * np.hanning(900)).astype(np.int16)
    noises = noise.Noises("validation", {"keys": [clip]})
    assert len(noises.kinds) == 3
    for number in range(3):
        one, other = (noises.drawn(np.random.default_rng(seed), number) for seed in (0, 1))
        assert one.shape == (WINDOW,)
        assert np.isfinite(one).all()
        assert not np.array_equal(one, other)
        np.testing.assert_array_equal(one, noises.drawn(np.random.default_rng(0), number))
    assert len(noise.Noises("validation", None).kinds) == 2


# Recordings


class Gsm:
    """Stands in for libgsm: a frame decodes to its first byte, again and again; one that begins with 0 is none."""

    class Create:
        restype: object = None

        def __call__(self) -> int:
            return 1

    gsm_create, gsm_destroy = Create(), staticmethod(lambda state: None)

    def __init__(self, _: str) -> None: ...

    @staticmethod
    def gsm_decode(_: object, frame: bytes, where: object) -> int:
        samples = ctypes.cast(where, ctypes.POINTER(ctypes.c_int16))
        for n in range(gsm.SAMPLES):
            samples[n] = frame[0]
        return 0 if frame[0] else -1


def test_gsm_is_decoded_frame_by_frame_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gsm.ctypes, "CDLL", Gsm)
    frames = bytes([7] * gsm.FRAME + [9] * gsm.FRAME)
    samples = gsm.decoded(frames, Path("libgsm.so.1"))
    assert samples.tolist() == [7] * gsm.SAMPLES + [9] * gsm.SAMPLES
    for bad in (frames[:-1], bytes(gsm.FRAME)):
        with pytest.raises(AutocompError, match="not in GSM"):
            gsm.decoded(bad, Path("libgsm.so.1"))


def test_recordings_are_read_back_or_refused(cache: Path) -> None:
    assert recordings.banks() == {}
    clips = {"menardi/alpha": [np.arange(5, dtype=np.int16)], "noise-test/keys": [np.ones(3, np.int16)] * 2}
    recordings.write(clips)
    found = recordings.banks()
    np.testing.assert_array_equal(found["menardi"]["alpha"][0], np.arange(5))
    assert len(found["noise-test"]["keys"]) == 2
    recordings.write(clips)
    recordings.path().write_bytes(recordings.path().read_bytes()[:-1])
    with pytest.raises(CorruptError, match=f"make them again with `{recordings.SET_UP}`"):
        recordings.banks()


def test_what_cannot_be_fetched_is_said_and_the_rest_is_kept(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Packages of one person and of noises come, all others fail as `apt-get download` does."""

    def run(command: list[str], cwd: Path, **_: object) -> object:
        package = command[2].partition("_")[0]
        if command[0] == "apt-get" and package not in ("asterisk-core-sounds-ru-wav", "sound-icons"):
            return type("Done", (), {"returncode": 100, "stderr": f"E: Unable to locate package {package}"})
        if command[0] == "apt-get":
            (cwd / f"{package}_1_all.deb").touch()
        else:
            files = (
                fetch.SOURCES[1].files if "ru" in package else [f"{fetch.NOISES[package]}/{n}.wav" for n in range(8)]
            )
            for name in files:
                (cwd / name).parent.mkdir(parents=True, exist_ok=True)
                wavfile.write(cwd / name, RATE, np.round(9000 * tone(400)).astype(np.int16))
        return type("Done", (), {"returncode": 0, "stderr": ""})

    monkeypatch.setattr(fetch.subprocess, "run", run)
    monkeypatch.setattr(fetch.shutil, "which", lambda name: name)
    assert fetch.main() == 0
    printed = capsys.readouterr()
    assert "flite cannot be had, what it holds is left out: E: Unable to locate package flite" in printed.err
    assert "30 recordings" in printed.out
    found = recordings.banks()
    assert len(found["russian"]) == 22
    assert {name: len(found[name]["sound-icons"]) for name in found if "noise" in name} == {
        "noise-training": 4, "noise-validation": 2, "noise-test": 2,
    }  # fmt: skip


def test_without_debians_tools_the_set_up_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch.shutil, "which", lambda name: None)
    with pytest.raises(UsageError, match=r"apt-get and dpkg-deb is not there: run this on Debian.*no slice 'human'"):
        fetch.main()


def test_every_word_of_the_alphabet_is_said_by_someone_in_each_split() -> None:
    said = {source.speaker: set(source.files.values()) for source in fetch.SOURCES[:5]}
    assert said["june"] == said["menardi"] == said["armelle"] == set(words.LETTERS)
    assert said["allison"] == set(words.WORDS)
    assert len(said["russian"]) == 22
    assert len(fetch.SOURCES[5].files) == 17
