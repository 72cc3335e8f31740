"""Files of a training: written whole, and read back only as they were written."""

from __future__ import annotations

import hashlib
import io
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autocomp.cache import sealed, unsealed, write_atomically
from autocomp.errors import CorruptError
from autocomp.recovery.forms.whole import converted, trainable

HEADER = b"autocomp training 1 "
FORM = "form"  # the key of the weights
DIGITS = 12  # of the digest in a name
_BY_CONTENT = re.compile(rf"-([0-9a-f]{{{DIGITS}}})\.pt$")


def write(path: Path, data: dict[str, Any]) -> None:
    """Write what ``torch.save`` can hold; OSError where the disk does not take it."""
    write_atomically(path, sealed(HEADER, _saved(data)))


def write_by_content(folder: Path, name: str, weights: dict[str, Any]) -> str:
    """Write weights into ``NAME-DIGEST.pt``, and return that name: whoever keeps it knows which weights it means. OSError as `write`."""
    payload = _saved({FORM: weights})
    file = f"{name}-{hashlib.sha256(payload).hexdigest()[:DIGITS]}.pt"
    write_atomically(folder / file, sealed(HEADER, payload))
    return file


def _saved(data: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(data, buffer)
    return buffer.getvalue()


def read(path: Path) -> dict[str, Any]:
    """Read it again. FileNotFoundError if there is none, CorruptError if it is not what was written under its name; nothing in it is run."""
    payload = unsealed(HEADER, path.read_bytes())
    if payload is None:
        raise CorruptError(f"{path} is damaged, or no file of a training")
    named = _BY_CONTENT.search(path.name)
    if named is not None and not hashlib.sha256(payload).hexdigest().startswith(named[1]):
        raise CorruptError(f"{path} holds what another training learnt")
    data: dict[str, Any] = torch.load(io.BytesIO(payload), weights_only=True)
    return data


def restored(model: nn.Module, path: Path) -> nn.Module:
    """The model that was trained from ``model``, a freshly stitched candidate, with the weights of a file. Errors as `read`."""
    form = trainable(model)
    try:
        form.load_state_dict(read(path)[FORM])
    except (KeyError, RuntimeError) as error:
        raise CorruptError(f"{path} holds the weights of another candidate: {str(error).splitlines()[0]}") from error
    return converted(form)
