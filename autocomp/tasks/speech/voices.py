"""Who speaks in which split of ``speech``. Nobody is in two, and neither are variants of one name (steph, steph2)."""

from __future__ import annotations

from typing import Literal

Split = Literal["training", "validation", "test"]

# espeak-ng's variants. Training has all that are not named here.
HELD_OUT: dict[Split, tuple[str, ...]] = {
    "validation": ("f2", "m4", "linda", "john", "Denis", "Hugo", "norbert", "travis", "sandro", "quincy"),
    "test": ("f5", "m7", "Lee", "Alicia", "paul", "michel", "shelby", "boris", "Andrea", "victor"),
}
BABBLE: dict[Split, tuple[str, ...]] = {  # who speaks in the background; of training, also in front
    "training": ("f1", "m3", "adam", "Annie"),
    "validation": ("f3", "m1", "belinda", "max"),
    "test": ("f4", "m8", "caleb", "aunty"),
}
ODD = (  # no voices of people
    "whisper", "whisperf", "croak", "Demonic", "UniRobot", "anikaRobot", "robosoft", "robosoft2", "robosoft3",
    "robosoft4", "robosoft5", "robosoft6", "robosoft7", "robosoft8",
)  # fmt: skip

# espeak-ng's accents of English; the slice "accent" is of held-out variants with accents that are not trained on.
ACCENTS = ("gmw/en", "gmw/en-US", "gmw/en-GB-x-rp", "gmw/en-GB-x-gbclan")
HELD_OUT_ACCENTS: dict[Split, tuple[str, ...]] = {
    "validation": ("gmw/en-GB-x-gbcwmd", "gmw/en-US-nyc"),
    "test": ("gmw/en-GB-scotland", "gmw/en-029"),
}

# Voices of other languages read English words spelt as they are heard (`words.as_heard`): a foreign accent. Training alone has them.
FOREIGN_ACCENTS = ("roa/es", "roa/es-419", "roa/it", "roa/pt-BR", "roa/ro", "zlw/pl", "gmw/de", "urj/fi")

# Those of whom there are recordings of single words (`fetch`). flite's voices are synthetic, made of recordings of people.
PEOPLE: dict[Split, tuple[str, ...]] = {
    "training": ("menardi", "russian", "armelle"),
    "validation": ("june",),
    "test": ("allison",),
}
FLITE: dict[Split, tuple[str, ...]] = {"training": ("kal16", "awb", "rms"), "validation": (), "test": ("slt",)}


def variants(split: Split) -> tuple[str, ...]:
    """Return the variants that speak in a split; UsageError where espeakng-loader is not installed."""
    if split != "training":
        return HELD_OUT[split]
    from autocomp.tasks.speech.espeak import data_folder

    held_out = (HELD_OUT["validation"], HELD_OUT["test"], BABBLE["validation"], BABBLE["test"])
    others = {*ODD, *(name for names in held_out for name in names)}
    return tuple(sorted(path.name for path in (data_folder() / "voices" / "!v").iterdir() if path.name not in others))
