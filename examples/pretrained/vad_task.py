"""silero-vad: is this speech? One step of 32 ms with the state it hands on, judged on espeak-ng's speech in noise.

autocomp check vad_task:task
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from packages import folder
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from utterances import RATE, SENTENCES, Utterance, spoken, variants

import autocomp

STEP, CONTEXT = 512, 64  # samples of a step, and those before it that the network also reads
SPLITS = {"calibration": (8, 1), "validation": (40, 2), "test": (120, 3)}  # recordings, seed
STEPS = 188  # six seconds
COLLAR = 3  # steps beside a change that are not judged: where speech begins is a matter of taste
State = tuple[Tensor, Tensor]


class SileroVAD(nn.Module):
    """The 16 kHz network of silero-vad 6: the weights' names and shapes are those of its safetensors file."""

    def __init__(self) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 258, 256, stride=128, bias=False)  # cosines, then sines
        self.conv1 = nn.Conv1d(129, 128, 3, padding=1)
        self.conv2 = nn.Conv1d(128, 64, 3, stride=2, padding=1)
        self.conv3 = nn.Conv1d(64, 64, 3, stride=2, padding=1)
        self.conv4 = nn.Conv1d(64, 128, 3, padding=1)
        self.lstm_cell = nn.LSTMCell(128, 128)
        self.final_conv = nn.Conv1d(128, 1, 1)

    def forward(self, sound: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sound [N, 576] and the state [N, 128] each to the probability of speech [N, 1] and the next state."""
        waves = self.stft_conv(functional.pad(sound, (0, 64), mode="reflect").unsqueeze(1))  # [N, 258, 4]
        x = (waves[:, :129].square() + waves[:, 129:].square()).sqrt()
        for layer in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = layer(x).relu()
        hidden, cell = self.lstm_cell(x.squeeze(-1), (hidden, cell))
        return self.final_conv(hidden.relu().unsqueeze(-1)).sigmoid().squeeze(-1), hidden, cell


def pretrained() -> nn.Module:
    model = SileroVAD()
    model.load_state_dict(load_file(folder("silero_vad") / "data" / "silero_vad_16k.safetensors"))
    return model.eval()


@cache
def data(split: str) -> tuple[Tensor, np.ndarray]:
    """Steps of recordings [N, 188, 576], and for each step 1 for speech, 0 for none, -1 if it is not judged [N, 188]."""
    count, seed = SPLITS[split]
    random = np.random.default_rng(seed)
    names = variants()
    said = [
        Utterance(str(random.choice(SENTENCES)), f"en+{random.choice(names)}", int(random.integers(140, 200)))
        for _ in range(2 * count)
    ]
    sounds = iter(spoken(said))
    recordings, labels = zip(*(_recording(next(sounds), next(sounds), random) for _ in range(count)), strict=True)
    heard = functional.pad(torch.tensor(np.stack(recordings)), (CONTEXT, 0))
    return heard.unfold(1, STEP + CONTEXT, STEP).contiguous(), np.stack(labels)


def listen(model: nn.Module, steps: Tensor) -> tuple[Tensor, list[State]]:
    """Probabilities of speech [N, steps], and the state before each step."""
    state = (torch.zeros(len(steps), 128), torch.zeros(len(steps), 128))
    states, answers = [], []
    with torch.inference_mode():
        for step in steps.unbind(1):
            states.append(state)
            answer, *state = model(step, *state)
            answers.append(answer)
    return torch.cat(answers, 1), states


def outcomes(model: nn.Module, split: str) -> np.ndarray:
    """One row a recording: steps of speech found, steps of speech, other steps found to be none, other steps."""
    steps, labels = data(split)
    found = listen(model, steps)[0].numpy() > 0.5
    speech, other = labels == 1, labels == 0
    return np.stack([(found & speech).sum(1), speech.sum(1), (~found & other).sum(1), other.sum(1)], 1).astype(float)


def metric(rows: np.ndarray, chosen: Any = slice(None)) -> float:
    """Balanced accuracy: the mean of the shares of speech, and of all else, that are told."""
    found, speech, silent, other = rows[chosen].sum(0)
    return float(found / speech + silent / other) / 2


def task() -> autocomp.Task:
    model = pretrained()
    steps, _ = data("calibration")
    _, states = listen(model, steps)
    chosen = range(8, STEPS, 6)
    batches = [tuple(part.clone() for part in (steps[:, at], *states[at])) for at in chosen]
    return autocomp.Task(
        model=model,
        example_inputs=tuple(part[:1] for part in batches[0]),
        calibration=batches,
        evaluate=lambda model: {"balanced accuracy": metric(outcomes(model, "validation"))},
        test=lambda model: {"balanced accuracy": metric(outcomes(model, "test"))},
        outputs=("binary-probabilities", "regression", "regression"),  # the state is handed on
        unit="%",
        name="silero-vad",
        description="Speech or not, one step of 32 ms",
    )


def _recording(first: np.ndarray, second: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two utterances with pauses in noise: samples [188 * 512], and a label for each step."""
    clean = np.zeros(STEPS * STEP)
    at = int(random.uniform(0.3, 0.9) * RATE)
    for sound in (first, second):
        sound = sound[: max(0, len(clean) - at)] * random.uniform(0.05, 0.3) / max(np.abs(sound).max(), 1e-9)
        clean[at : at + len(sound)] += sound
        at += len(sound) + int(random.uniform(0.6, 1.2) * RATE)
    noise = random.standard_normal(len(clean))
    if random.random() < 0.5:
        noise = np.cumsum(noise)
        noise -= np.convolve(noise, np.ones(400) / 400, "same")
    loud = np.sqrt((clean[clean != 0] ** 2).mean())
    noisy = clean + noise * loud * 10 ** (-random.uniform(0, 20) / 20) / noise.std()
    level = np.sqrt((clean.reshape(STEPS, STEP) ** 2).mean(1))
    speech = level > 0.1 * loud
    change = np.flatnonzero(np.diff(speech.astype(int)))
    near = (np.abs(np.arange(STEPS)[:, None] - change[None] - 0.5) < COLLAR).any(1)
    return noisy.astype(np.float32), np.where(near, -1, speech)
