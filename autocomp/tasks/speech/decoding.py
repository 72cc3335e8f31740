"""From the logits of a window to text: the best class of each frame, or a search over prefixes, which may hold to the vocabulary."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from functools import cache, partial

from torch import Tensor

from autocomp.tasks.speech.words import BLANK, CHARACTERS, WORDS, decoded

Decode = Callable[[Tensor], str]
Beam = dict[str, tuple[float, float]]  # by prefix, the logarithms of: it ends in a blank; it ends in its last character

WIDTH = 16  # prefixes that are kept
LEAST = math.log(1e-6)  # a class less probable than that in a frame is not gone on with
NEVER = -math.inf


def greedy(logits: Tensor, characters: str = CHARACTERS) -> str:
    """Return the text of logits ``[L, classes]``: the best class of each frame, repeats as one, without blanks."""
    return " ".join(decoded(logits.argmax(-1).tolist(), characters).split())


def beam(logits: Tensor, width: int = WIDTH, words: Collection[str] | None = None) -> str:
    """Return the most probable text of logits ``[L, classes]`` that a prefix beam search finds (Hannun et al. 2014, arXiv:1408.2873).

    Unlike `greedy` it adds up all ways in which frames can come to a text. With ``words`` the text is made of these alone.

    Examples:
        >>> import torch
        >>> probabilities = torch.zeros(2, 28)
        >>> probabilities[:, 0], probabilities[:, 2] = 0.6, 0.4  # twice: blank, or a
        >>> greedy(probabilities.log()), beam(probabilities.log())
        ('', 'a')
    """
    beams: Beam = {"": (0.0, NEVER)}
    for row in logits.log_softmax(-1).tolist():
        best = max(row)
        likely = [(found, p) for found, p in enumerate(row) if p >= LEAST or p == best]
        beams = _kept(_extended(beams, likely, words), width)
    if words is not None:
        whole = {text: p for text, p in beams.items() if _last(text) in ("", *words)}
        beams = whole or {text.removesuffix(_last(text)): p for text, p in beams.items()}
    text = max(beams, key=lambda prefix: _sum(*beams[prefix]))
    return " ".join(text.split())


def _last(text: str) -> str:
    return text.rpartition(" ")[2]


def _extended(beams: Beam, likely: list[tuple[int, float]], words: Collection[str] | None) -> Beam:
    """Go on from each prefix with each class of a frame."""
    found: Beam = {}

    def add(prefix: str, blank: float, character: float) -> None:
        one, other = found.get(prefix, (NEVER, NEVER))
        found[prefix] = _sum(one, blank), _sum(other, character)

    for prefix, (blank, character) in beams.items():
        for kind, p in likely:
            if kind == BLANK:
                add(prefix, _sum(blank, character) + p, NEVER)
                continue
            letter = CHARACTERS[kind - 1]
            if prefix.endswith(letter):  # the same sound goes on; a blank between makes it two
                add(prefix, NEVER, character + p)
                before = blank
            else:
                before = _sum(blank, character)
            if before > NEVER and (words is None or _goes_on(prefix, letter, frozenset(words))):
                add(prefix + letter, NEVER, before + p)
    return found


def _kept(beams: Beam, width: int) -> Beam:
    return dict(sorted(beams.items(), key=lambda item: -_sum(*item[1]))[:width])


def _goes_on(prefix: str, letter: str, words: frozenset[str]) -> bool:
    """Say whether words can begin with this: blanks stand after whole words alone, but may be the first and the last."""
    last = _last(prefix)
    return not last or last in words if letter == " " else last + letter in _beginnings(words)


@cache
def _beginnings(words: frozenset[str]) -> frozenset[str]:
    return frozenset(word[:length] for word in words for length in range(1, len(word) + 1))


def _sum(one: float, other: float) -> float:
    """Return the logarithm of the sum of what two are the logarithms of."""
    high, low = (one, other) if one >= other else (other, one)
    return high if low == NEVER else high + math.log1p(math.exp(low - high))


DECODERS: dict[str, Decode] = {"greedy": greedy, "beam": beam, "words": partial(beam, words=frozenset(WORDS))}
