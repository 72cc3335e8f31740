"""The model of ``speech``, trained anew, scored, and written beside this file.

    python -m autocomp.tasks.speech.train --out FOLDER

On one core 4,000 steps take about 25 minutes. Who has fetched the recordings (`fetch`) trains on people too.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch
from torch import Tensor, nn

from autocomp.errors import AutocompError
from autocomp.progress import Progress
from autocomp.tasks.speech.batches import SpeechBatches
from autocomp.tasks.speech.corpus import COUNTS, HeldOut, held_out
from autocomp.tasks.speech.metrics import ctc_loss, error_rates
from autocomp.tasks.speech.recordings import banks
from autocomp.tasks.speech.trained import FOLDER, load, new_model, save
from autocomp.tasks.speech.words import WORDS
from autocomp.tasks.training import one_thread


@dataclass(frozen=True)
class Recipe:
    """All that decides the weights, beside the voices."""

    steps: int = 4000
    batch: int = 32
    utterances: int = 5000
    gentle: int = 600  # steps over which noise and masks come in
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.02
    clip: float = 1.0  # norm of the gradient
    warm_up: float = 0.05  # share of the steps
    seed: int = 0


def train(recipe: Recipe, batches: Iterable[tuple[tuple[Tensor, ...], Tensor]], progress: Progress) -> nn.Module:
    """Train with AdamW under a one-cycle learning rate (Smith & Topin 2018, arXiv:1708.07120), one step for each batch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = new_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=recipe.steps, pct_start=recipe.warm_up
    )
    mean = 0.0
    with one_thread(), progress.stage("train speech", recipe.steps) as stage:
        for step, (inputs, target) in enumerate(batches):
            loss = ctc_loss(model(*inputs), target)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.step()
            schedule.step()
            mean += (loss.item() - mean) / min(step + 1, 50)
            stage.advance(note=f"loss {mean:.3f}")
    return model.eval()


def scored(model: nn.Module, split: HeldOut) -> dict[str, dict[str, float]]:
    """Return each error rate in percent, its standard error, and the number of utterances."""
    found = {}
    for name, rates in error_rates(model, split).items():
        error = float(rates.std()) / len(rates) ** 0.5
        found[name] = {
            "percent": round(100 * float(rates.mean()), 2),
            "error": round(100 * error, 2),
            "utterances": len(rates),
        }
    return found


@click.command(help=__doc__)
@click.option("--out", type=click.Path(path_type=Path), default=FOLDER, show_default="beside this file")
@click.option("--steps", type=click.IntRange(50), default=Recipe.steps, show_default=True)
@click.option("--seed", type=int, default=Recipe.seed, show_default=True)
def main(out: Path, steps: int, seed: int) -> None:
    recipe, progress = Recipe(steps=steps, seed=seed), Progress()
    try:
        splits = {name: held_out(name, COUNTS, progress) for name in ("validation", "test")}
        batches = SpeechBatches(recipe.utterances, recipe.batch, recipe.steps, recipe.seed, gentle=recipe.gentle)
        write(train(recipe, batches, progress), recipe, splits, out)
    except AutocompError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def write(model: nn.Module, recipe: Recipe, splits: dict[str, HeldOut], folder: Path) -> None:
    """Write the model, and what the one that is read back scores."""
    speakers = {name: sum(map(len, bank.values())) for name, bank in banks().items() if set(bank) <= set(WORDS)}
    facts = {"recipe": asdict(recipe), "recordings": speakers}
    save(model, facts, folder)
    scores = {name: scored(load(folder), split) for name, split in splits.items()}
    save(model, facts | {"scores": scores}, folder)


if __name__ == "__main__":
    main()
