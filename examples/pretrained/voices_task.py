"""resemblyzer: an LSTM's embedding of a voice, judged by its equal error rate over espeak-ng's voices.

autocomp check voices_task:task
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from packages import part
from scipy.signal import stft
from torch import Tensor, nn
from utterances import RATE, SENTENCES, Utterance, spoken, variants

import autocomp

FRAMES = 160  # of 10 ms, what the package takes at a time
SPLITS = {"calibration": slice(0, 20), "validation": slice(20, 62), "test": slice(62, 104)}  # voices
SENTENCES_SAID = 8  # by each voice


def pretrained() -> nn.Module:
    model: nn.Module = part("resemblyzer", "voice_encoder", audio=None).VoiceEncoder("cpu", verbose=False)
    return model.eval()


@cache
def data(split: str) -> Tensor:
    """Mel spectrograms [voices, sentences, 160, 40]: 1.6 s of every sentence said by every voice of a split."""
    names = variants()
    order = np.random.default_rng(0).permutation(len(names))[SPLITS[split]]
    random = np.random.default_rng(1)
    said = [
        Utterance(SENTENCES[number], f"en+{names[index]}", int(random.integers(150, 190)), int(random.integers(45, 56)))
        for index in order
        for number in random.permutation(len(SENTENCES))[:SENTENCES_SAID]
    ]
    mels = torch.tensor(np.stack([_mel(sound) for sound in spoken(said)]))
    return mels.reshape(len(order), SENTENCES_SAID, FRAMES, 40)


def outcomes(model: nn.Module, split: str) -> np.ndarray:
    """One row a voice: its similarity [sentences, sentences, voices] of each of its sentences to each of all voices."""
    mels = data(split)
    voices, sentences = mels.shape[:2]
    with torch.inference_mode():
        embeddings = torch.cat([model(batch) for batch in mels.flatten(0, 1).split(64)])
    similarity = (embeddings @ embeddings.T).reshape(voices, sentences, voices, sentences)
    return similarity.numpy()


def metric(similarity: np.ndarray, chosen: np.ndarray | None = None) -> float:
    """One minus the equal error rate: where as many pairs of one voice are refused as pairs of two are taken for one."""
    voices, sentences = similarity.shape[:2]
    rows = np.arange(voices) if chosen is None else chosen
    different = ~np.eye(sentences, dtype=bool)
    same = np.concatenate([similarity[row, :, row, :][different] for row in rows])
    others = np.concatenate([similarity[row, :, np.arange(voices) != row, :].ravel() for row in rows])
    thresholds = np.unique(same)
    refused = np.searchsorted(np.sort(same), thresholds) / len(same)
    taken = 1 - np.searchsorted(np.sort(others), thresholds) / len(others)
    crossing = int(np.argmin(np.abs(refused - taken)))
    return 1 - float(refused[crossing] + taken[crossing]) / 2


def task() -> autocomp.Task:
    mels = data("calibration").flatten(0, 1)
    return autocomp.Task(
        model=pretrained(),
        example_inputs=(mels[:1],),
        calibration=[(batch,) for batch in mels.split(40)],
        evaluate=lambda model: {"1 - EER": metric(outcomes(model, "validation"))},
        test=lambda model: {"1 - EER": metric(outcomes(model, "test"))},
        outputs="embedding@1",
        unit="%",
        name="resemblyzer",
        description="Embedding of 1.6 s of a voice",
    )


@cache
def _filters() -> np.ndarray:
    """40 mel bands [40, 201] as librosa makes them; torchfcpe ships the function."""
    filters: np.ndarray = part("torchfcpe", "mel_fn_librosa").mel(sr=RATE, n_fft=400, n_mels=40)
    return filters


def _mel(sound: np.ndarray) -> np.ndarray:
    """Mel power spectrogram [160, 40] of the middle of a sound, at the package's volume (-30 dB)."""
    level = np.sqrt((sound**2).mean())
    sound = sound * (10 ** (-30 / 20) / level)
    length = FRAMES * 160
    start = max(0, (len(sound) - length) // 2)
    sound = np.pad(sound[start : start + length], (0, max(0, length - len(sound))))
    _, _, spectrum = stft(sound, RATE, "hann", 400, 240, boundary="even", padded=True, scaling="spectrum")
    power = np.abs(spectrum * 200) ** 2  # scipy divides by the window's sum, which is 200
    return (_filters() @ power[:, :FRAMES]).T.astype(np.float32)
