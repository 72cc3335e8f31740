"""Which operations are compiled, and how one that is not is told to the user: its name, its module, the line of the model, what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

# what can be said of operations that no compiler of fixed shapes can have, and of the more usual others
ADVICE = {
    "nonzero": "how many elements it finds depends on their values: keep all of them and mask with torch.where",
    "masked_select": "how many elements it finds depends on their values: keep all of them and mask with torch.where",
    "unique": "how many elements it finds depends on their values: keep it outside the compressed model",
    "_unique2": "how many elements it finds depends on their values: keep it outside the compressed model",
    "_local_scalar_dense": "a Python number made of a tensor's value: keep it a tensor",
    "rand": "random numbers differ from call to call: make them an input of the model",
    "randn": "random numbers differ from call to call: make them an input of the model",
    "nms": "how many boxes it keeps depends on their values: compress the model up to its raw boxes",
}
_ELSE = "write it with other operations (docs/operations.md lists those that are compiled), or keep it outside the compressed model"
_RANDOM = "random numbers differ from call to call: make them an input of the model"


def origin(node: Any) -> str:
    """Where in the model an exported operation comes from: its module, and the line of its source where that is known."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next((name for name, _ in reversed(list(stack.values())) if name), "")
    line = source_line(node)
    return (f"module {path!r}" if path else f"node {node.name!r}") + (f" ({line})" if line else "")


def source_line(node: Any) -> str:
    """``file.py:12, `code` `` of the model's own line that an operation comes from; empty where it is not known."""
    own = str(Path(torch.__file__).parent)
    lines = str(node.meta.get("stack_trace") or "").splitlines()
    frames = [
        (line.strip(), lines[index + 1].strip() if index + 1 < len(lines) else "")
        for index, line in enumerate(lines) if line.strip().startswith("File ")
    ]  # fmt: skip
    for frame, code in reversed(frames):
        path, _, rest = frame.removeprefix("File ").partition(", line ")
        path = path.strip('"')
        if not path.startswith(own):
            return f"{Path(path).name}:{rest.partition(',')[0]}" + (f", `{code}`" if code else "")
    return ""


def describe(node: Any) -> str:
    """An operation, and where it comes from."""
    name = str(node.target) if not callable(node.target) or hasattr(node.target, "_schema") else node.target.__name__
    return f"operation {name} in {origin(node)}"


def advice(node: Any) -> str:
    """What to do about an operation that is not compiled."""
    name = node.target._schema.name.rpartition("::")[2] if hasattr(node.target, "_schema") else str(node.target)
    if name in ADVICE:
        return ADVICE[name]
    random = hasattr(node.target, "tags") and torch.Tag.nondeterministic_seeded in node.target.tags
    return _RANDOM if random else _ELSE
