"""The trained model of ``speech``: a file beside this one, with its checksum and what it scores in another."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import nn

from autocomp.errors import CorruptError
from autocomp.tasks.speech.conformer import Conformer
from autocomp.tasks.speech.features import BANDS, FRAMES
from autocomp.tasks.speech.words import CLASSES

FOLDER = Path(__file__).parent
WEIGHTS = "model.safetensors"
SCORES = "scores.json"


def new_model(frames: int = FRAMES, characters: int = CLASSES) -> Conformer:
    """Return the untrained network: 1.32 million parameters, 61 million multiply-accumulates for two seconds."""
    return Conformer(
        bands=BANDS,
        frames=frames,
        characters=characters,
        channels=32,
        width=128,
        heads=4,
        hidden=384,
        depth=4,
        kernel=15,
    )


def load(folder: Path = FOLDER, frames: int = FRAMES) -> nn.Module:
    """Return the trained network in evaluation mode, for windows of any length: no weight depends on it.

    CorruptError if the file is not the one that was scored.
    """
    from safetensors.torch import load as tensors

    content = (folder / WEIGHTS).read_bytes()
    stored: dict[str, Any] = json.loads((folder / SCORES).read_text())
    if hashlib.sha256(content).hexdigest() != stored["sha256"]:
        raise CorruptError(
            f"{folder / WEIGHTS} is not the model that {SCORES} tells of: its checksum differs; install autocomp again"
        )
    model = new_model(frames)
    model.load_state_dict(
        {name: tensor.to(model.state_dict()[name].dtype) for name, tensor in tensors(content).items()}
    )
    return model.eval()


def save(model: nn.Module, facts: dict[str, Any], folder: Path) -> None:
    """Write weights in 16 bits, which halves the file, and what is known of them."""
    from safetensors.torch import save as tensors

    state = {
        name: (value.half() if value.is_floating_point() else value).contiguous()
        for name, value in model.state_dict().items()
    }
    content = tensors(state)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WEIGHTS).write_bytes(content)
    stored = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content), **facts}
    (folder / SCORES).write_text(json.dumps(stored, indent=2) + "\n")
