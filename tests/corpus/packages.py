"""The packages the models come from, imported when a model is built."""

from __future__ import annotations

import sys
import types
from typing import Any


def torchvision() -> Any:
    """torchvision beside CPU torch: its compiled operators are CUDA's and do not load, and only detection's last step needs them.

    Its import asks for one of them all the same, in the module that is left out here.
    """
    sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))
    import torchvision

    return torchvision


def timm() -> Any:
    torchvision()  # timm imports it
    import timm

    return timm


def transformers() -> Any:
    torchvision()  # so does transformers, for image processors
    import transformers

    return transformers
