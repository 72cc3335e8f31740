"""The built-in task ``tokens``: what each token of Python source is (a call, an argument, prose, ...); a Transformer encoder.

The text ships with Python itself: its standard library, by files, eight tenths training, one validation (the search reads it), one
test (read once, by the last report). Slices: tokens of prose (comments, docstrings), of code, and the names among these.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from autocomp.progress import Progress
from autocomp.tasks.encoder import Encoder
from autocomp.tasks.stdlib_text import LENGTH, NAMES, PROSE, ROLES, VOCABULARY, Text, load_text
from autocomp.tasks.task import Task
from autocomp.tasks.training import Recipe, trained

HELD_OUT = 768  # windows, 49,152 tokens, in each of the validation and the test split
CALIBRATION_BATCH = 64
CALIBRATION_BATCHES = 16
EPOCH = 80  # batches that make an epoch: there are 23,000 windows, and a minute is enough for 18,000

# Seven epochs take about 55 s of one core and end at 92 % of the validation tokens.
RECIPE = Recipe(
    task="tokens", version=1, epochs=7, batch=32, learning_rate=4e-3, weight_decay=0.05, label_smoothing=0.0
)


def load_tokens_task(
    epochs: int | None = None, cache: bool = True, seed: int = 0, progress: Progress | None = None
) -> Task:
    """Return the task, training its model first (about a minute) unless it is in the user's cache.

    ``epochs`` other than the default is for tests: fewer epochs give a worse model sooner. UsageError as ``load_text``.
    """
    training, validation, test, digest = load_text()
    recipe = replace(RECIPE.with_(epochs=epochs, seed=seed), data=digest)
    train = TokenBatches(training, recipe.batch, seed)
    model = trained(new_model, recipe, train, cache=cache, progress=progress or Progress())
    calibration = calibration_batches(training, seed)
    return Task(
        model=model,
        example_inputs=(calibration[0][0][:1].clone(),),
        calibration=calibration,
        evaluate=partial(accuracy, windows=held_out(validation)),
        test=partial(accuracy, windows=held_out(test)),
        train=train,
        loss=tagging_loss,
        objective="accuracy",
        unit="%",
        name="tokens",
        description=(
            f"Python's standard library: which of {len(ROLES)} roles each of {LENGTH} tokens of source has, told by a "
            "Transformer encoder; slices: prose (comments, docstrings), code, names (in code)"
        ),
    )


def new_model() -> Encoder:
    """Return the untrained network: 0.55 million parameters, a fifth of them embeddings; 29 million multiply-accumulates."""
    return Encoder(VOCABULARY, LENGTH, width=96, heads=6, hidden=384, depth=4, classes=len(ROLES))


def held_out(text: Text) -> tuple[Tensor, Tensor]:
    """Return the windows of a held-out split, tokens and roles ``[768, 64]``: the same every time, from all its files."""
    order = torch.randperm(len(text.starts), generator=torch.Generator().manual_seed(0))
    return text.windows(text.starts[order[:HELD_OUT]])


def accuracy(model: nn.Module, windows: tuple[Tensor, Tensor]) -> dict[str, Tensor | float]:
    """Return the share of tokens whose role is told right, for each window, then by slice; the model's mode is left as it was.

    Tokens of one window stand or fall together, so it is the windows that are samples; slices go through them, and are plain numbers.
    """
    was_training = model.training
    model.eval()
    tokens, roles = windows
    with torch.inference_mode():
        right = torch.cat([model(part).argmax(-1) for part in tokens.split(128)]) == roles
    model.train(was_training)
    prose, names = (torch.isin(roles, torch.tensor([ROLES.index(role) for role in some])) for some in (PROSE, NAMES))
    slices = {"prose": right[prose], "code": right[~prose], "names": right[names]}
    by_slice = {f"accuracy/{name}": float(share.float().mean()) for name, share in slices.items()}
    return {"accuracy": right.double().mean(1), **by_slice}


def tagging_loss(output: Tensor, target: Tensor) -> Tensor:
    """Return the mean cross-entropy over all tokens: logits ``[N, 64, roles]``, roles ``[N, 64]``."""
    return functional.cross_entropy(output.flatten(0, -2), target.flatten())


def calibration_batches(training: Text, seed: int) -> list[tuple[Tensor, ...]]:
    """Return batches of training windows from all files, mixed."""
    order = torch.randperm(len(training.starts), generator=torch.Generator().manual_seed(seed))
    tokens, _ = training.windows(training.starts[order[: CALIBRATION_BATCH * CALIBRATION_BATCHES]])
    return [(batch,) for batch in tokens.split(CALIBRATION_BATCH) if len(batch) == CALIBRATION_BATCH]


class TokenBatches:
    """Training batches ``((tokens,), roles)``: windows from anywhere in the files.

    Passes differ from each other, but a fresh object of the same seed gives the same passes again.
    """

    def __init__(self, text: Text, batch: int, seed: int) -> None:
        self.text = text
        self.batch = batch
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return EPOCH

    def __iter__(self) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
        shift = int(
            torch.randint(LENGTH, (1,), generator=self.generator)
        )  # windows do not always break at the same places
        order = torch.randperm(len(self.text.starts) - 1, generator=self.generator)
        while len(order) < self.batch * EPOCH:
            order = torch.cat([order, order])
        for index in order[: self.batch * EPOCH].split(self.batch):
            tokens, roles = self.text.windows(self.text.starts[index] + shift)
            yield (tokens,), roles
