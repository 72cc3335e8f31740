"""The vocabulary of ``speech``: the radio alphabet and the digits, and text as classes of characters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from autocomp.errors import UsageError, shown

# Annex 10 of the Convention on International Civil Aviation has the alphabet; spelt here as English has it (alpha, juliet, xray).
LETTERS = (
    "alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india", "juliet", "kilo",
    "lima", "mike", "november", "oscar", "papa", "quebec", "romeo", "sierra", "tango", "uniform", "victor",
    "whiskey", "xray", "yankee", "zulu",
)  # fmt: skip
DIGITS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine",
)  # fmt: skip
WORDS = LETTERS + DIGITS
# What sounds like the word where letters are read one by one, as Spanish, Italian, Polish or Finnish do. Others are spelt so already.
AS_HEARD = {
    "alpha": "alfa", "charlie": "charli", "echo": "eko", "foxtrot": "fokstrot", "mike": "maik", "quebec": "kebek", "sierra": "siera",
    "uniform": "iuniform", "victor": "viktor", "whiskey": "uiski", "xray": "eksrei", "yankee": "ianki", "zero": "siro", "one": "uan",
    "two": "tu", "three": "tri", "four": "for", "five": "faiv", "six": "siks", "seven": "seven", "eight": "eit", "nine": "nain",
}  # fmt: skip
LONGEST = 5  # words in an utterance

BLANK = 0  # the class of no character, which CTC needs (Graves et al. 2006)
CHARACTERS = " abcdefghijklmnopqrstuvwxyz"  # classes from 1 on
CLASSES = 1 + len(CHARACTERS)


def encoded(text: str) -> list[int]:
    """Return the classes of a transcript's characters.

    Raises:
        UsageError: It holds characters outside the vocabulary; they are named.

    Examples:
        >>> encoded("a z")
        [2, 1, 27]
        >>> encoded("Zürich 9")
        Traceback (most recent call last):
        autocomp.errors.UsageError: a transcript may hold a to z and blanks alone; 'Zürich 9' has '9', 'Z', 'ü': ...
    """
    if unknown := sorted(set(text) - set(CHARACTERS)):
        raise UsageError(
            f"a transcript may hold a to z and blanks alone; {shown(text)} has {', '.join(map(repr, unknown))}: "
            "write it in small letters, digits as words (nine)"
        )
    return [1 + CHARACTERS.index(character) for character in text]


def decoded(classes: Iterable[int], characters: str = CHARACTERS) -> str:
    """Return the text of the best class of each frame: repeats are one, blanks are none (greedy decoding).

    Examples:
        >>> decoded([0, 2, 2, 0, 2, 1, 1, 27])
        'aa z'
    """
    text, last = [], BLANK
    for found in classes:
        if found not in (last, BLANK):
            text.append(characters[found - 1])
        last = found
    return "".join(text)


def as_heard(text: str) -> str:
    """Return a transcript spelt so that a voice of another language says it, with its accent.

    Examples:
        >>> as_heard("quebec nine")
        'kebek nain'
    """
    return " ".join(AS_HEARD.get(word, word) for word in text.split())


def frames_needed(classes: Sequence[int]) -> int:
    """Return the fewest frames that CTC can write these classes in: a blank must part equal neighbours."""
    return len(classes) + sum(one == other for one, other in pairwise(classes))
