"""easyocr's English reader (VGG, two LSTMs in both directions, CTC) on rendered lines: the share of characters read right.

autocomp check ocr_task:task
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from packages import folder, part
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor, nn
from utterances import SENTENCES

import autocomp

HEIGHT, WIDTH = 64, 320
SPLITS = {"calibration": (32, 1), "validation": (80, 2), "test": (300, 3)}  # lines, seed
SIGNS = "0123456789!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~ €ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
WORDS = sorted({word.strip(".,").lower() for sentence in SENTENCES for word in sentence.split()})


class Reader(nn.Module):
    """The package's network without the second input that it does not read."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Images [N, 1, 64, 320] to scores [N, 79, 97], class 0 the blank."""
        scores: Tensor = self.network(images, None)
        return scores


def pretrained() -> nn.Module:
    network = part("easyocr", "model.vgg_model", absent=("torchvision", "torchvision.models")).Model(1, 256, 256, 97)
    weights = torch.load(folder("easyocr_en_models") / "models" / "english_g2.pth", map_location="cpu")
    network.load_state_dict({name.removeprefix("module."): value for name, value in weights.items()})
    return Reader(network).eval()


@cache
def data(split: str) -> tuple[Tensor, list[str]]:
    """Images [N, 1, 64, 320] within ±1, and what they say."""
    count, seed = SPLITS[split]
    random = np.random.default_rng(seed)
    texts = [_text(random) for _ in range(count)]
    images = np.stack([_draw(text, random) for text in texts])
    return torch.tensor(images, dtype=torch.float32)[:, None] / 127.5 - 1, texts


def outcomes(model: nn.Module, split: str) -> np.ndarray:
    """One row a line: letters to change, add or leave out to get the right text, and its length."""
    images, texts = data(split)
    with torch.inference_mode():
        best = torch.cat([model(batch).argmax(2) for batch in images.split(8)])
    return np.array([(edits(_read(row), text), len(text)) for row, text in zip(best, texts, strict=True)], dtype=float)


def metric(rows: np.ndarray, chosen: Any = slice(None)) -> float:
    """One minus the character error rate."""
    wrong, length = rows[chosen].sum(0)
    return 1 - float(wrong / length)


def task() -> autocomp.Task:
    images, _ = data("calibration")
    return autocomp.Task(
        model=pretrained(),
        example_inputs=(images[:1],),
        calibration=[(batch,) for batch in images.split(8)],
        evaluate=lambda model: {"1 - CER": metric(outcomes(model, "validation"))},
        test=lambda model: {"1 - CER": metric(outcomes(model, "test"))},
        unit="%",
        name="easyocr",
        description="Text of one line, 64 x 320",
    )


def edits(read: str, text: str) -> int:
    """Levenshtein distance."""
    row = list(range(len(text) + 1))
    for index, sign in enumerate(read, 1):
        above, row[0] = row[0], index
        for place, wanted in enumerate(text, 1):
            above, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, above + (sign != wanted))
    return row[-1]


def _read(classes: Tensor) -> str:
    """The best class of each place, repetitions as one and blanks left out."""
    kept = torch.unique_consecutive(classes).tolist()
    return "".join(SIGNS[index - 1] for index in kept if index)


def _text(random: np.random.Generator) -> str:
    """Words and numbers, up to 12 signs."""
    text = ""
    while len(text) < 5:
        word = str(random.choice(WORDS)) if random.random() < 0.7 else str(random.integers(10, 9999))
        word = [str.lower, str.capitalize, str.upper][random.integers(3)](word)
        text = f"{text} {word}".strip()
    return text[:12].strip()


def _draw(text: str, random: np.random.Generator) -> np.ndarray:
    """Grey values [64, 320] of a line in Pillow's own font: size, weight, slope, contrast, blur and noise vary."""
    size, bold = int(random.integers(26, 44)), int(random.random() < 0.3)
    font = ImageFont.load_default(size)
    left, top, right, bottom = font.getbbox(text, stroke_width=bold)
    canvas = Image.new("L", (int(right - left) + 24, HEIGHT), 0)
    place = (12 - left, (HEIGHT - (bottom - top)) / 2 - top)
    ImageDraw.Draw(canvas).text(place, text, 255, font, stroke_width=bold)
    slope = random.uniform(-0.15, 0.3)
    canvas = canvas.transform(
        canvas.size, Image.Transform.AFFINE, (1, slope, -slope * HEIGHT / 2, 0, 1, 0), Image.Resampling.BILINEAR
    )
    canvas = canvas.resize((min(WIDTH, canvas.width), HEIGHT)).filter(ImageFilter.GaussianBlur(random.uniform(0, 1.2)))
    ink = np.zeros((HEIGHT, WIDTH))
    ink[:, : canvas.width] = np.asarray(canvas) / 255
    paper, difference = random.uniform(150, 250), random.uniform(60, 140)
    grey = paper - difference * ink + random.normal(0, random.uniform(1, 15), ink.shape)
    if random.random() < 0.3:  # light on dark
        grey = 255 - grey
    return np.clip(grey, 0, 255)
