"""How good a model of ``speech`` is, CER and WER utterance by utterance, and the loss it is trained with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from autocomp.tasks.speech.corpus import CONDITIONS, KINDS, HeldOut
from autocomp.tasks.speech.decoding import Decode, greedy
from autocomp.tasks.speech.words import BLANK

AT_ONCE = 64


def error_rates(model: nn.Module, split: HeldOut, decode: Decode = greedy) -> dict[str, Tensor]:
    """Return the error rate of each utterance: of characters, then of words; over all conditions, then by slice.

    CER and WER are edits over the length of what was said, for every utterance by itself: so each is a sample, its mean has a standard
    error, and a short utterance weighs as much as a long one. (The rate of a whole corpus, a ratio of sums, weighs by length.)
    ``cer`` is the mean over conditions; kinds of speakers are read without noise, conditions over all kinds. The model's mode stays.
    """
    import jiwer

    heard = {condition: transcribed(model, frames, decode) for condition, frames in split.frames.items()}
    rates: dict[str, Tensor] = {}
    for name, rate in (("cer", jiwer.cer), ("wer", jiwer.wer)):
        by = {condition: each_rate(rate, split.texts, texts) for condition, texts in heard.items()}
        rates[name] = torch.stack(list(by.values())).mean(0)
        for kind in KINDS:
            if kind in split.kinds:
                rates[f"{name}/{kind}"] = by["clean"][torch.tensor([one == kind for one in split.kinds])]
        rates |= {f"{name}/{condition}": by[condition] for condition, noise in CONDITIONS.items() if noise is not None}
    return rates


def each_rate(rate: Callable[[str, str], object], said: Sequence[str], heard: Sequence[str]) -> Tensor:
    """Return an error rate (jiwer's) of each of several utterances."""
    return torch.tensor([rate(one, other) for one, other in zip(said, heard, strict=True)], dtype=torch.float64)


def transcribed(model: nn.Module, frames: Tensor, decode: Decode = greedy) -> list[str]:
    """Return what a model hears in each window ``[N, 200, 40]``."""
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        logits = torch.cat([model(part) for part in frames.split(AT_ONCE)])
    model.train(was_training)
    return [decode(row) for row in logits]


def ctc_loss(output: Tensor, target: Tensor) -> Tensor:
    """Return the mean CTC loss (Graves et al. 2006) of logits ``[N, L, classes]`` and classes ``[N, longest]`` filled up with blanks."""
    lengths = (target != BLANK).sum(1)
    steps = torch.full((len(output),), output.shape[1])
    log_probabilities = output.log_softmax(-1).transpose(0, 1)
    return functional.ctc_loss(log_probabilities, target, steps, lengths, blank=BLANK, zero_infinity=True)
