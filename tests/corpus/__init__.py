"""Models that others wrote (torchvision, timm, transformers), built from their own packages with random weights: what autocomp is held to."""

from __future__ import annotations

from corpus.entry import Entry
from corpus.from_timm import TIMM
from corpus.from_torchvision import TORCHVISION
from corpus.from_transformers import TRANSFORMERS
from corpus.sequences import SEQUENCES

CORPUS: dict[str, Entry] = {entry.name: entry for entry in (*TORCHVISION, *TIMM, *TRANSFORMERS, *SEQUENCES)}
assert len(CORPUS) == len(TORCHVISION) + len(TIMM) + len(TRANSFORMERS) + len(SEQUENCES), "two models have one name"

LIBRARIES = ("torchvision", "timm", "transformers")
