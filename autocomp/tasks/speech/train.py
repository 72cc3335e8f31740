"""The model of ``speech``, trained anew, scored, and written beside this file.

    python -m autocomp.tasks.speech.train --out FOLDER

On one core 4,000 steps take about 25 minutes. Who has fetched the recordings (`fetch`) trains on people too. What was stopped goes on
where it was if the same command is given again.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from autocomp.cache import write_atomically
from autocomp.errors import AutocompError
from autocomp.progress import Progress
from autocomp.tasks.speech.batches import SpeechBatches
from autocomp.tasks.speech.corpus import COUNTS, HeldOut, held_out
from autocomp.tasks.speech.decoding import DECODERS, Decode, greedy
from autocomp.tasks.speech.metrics import ctc_loss, error_rates
from autocomp.tasks.speech.recordings import banks
from autocomp.tasks.speech.trained import FOLDER, load, new_model, save
from autocomp.tasks.speech.words import WORDS
from autocomp.tasks.training import one_thread

CHECKPOINT = "unfinished.pt"
EVERY = 200  # steps


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


def train(
    recipe: Recipe,
    batches: SpeechBatches,
    progress: Progress,
    folder: Path | None = None,
    network: Callable[[], nn.Module] = new_model,
) -> nn.Module:
    """Train with AdamW under a one-cycle learning rate (Smith & Topin 2018, arXiv:1708.07120), one step for each batch.

    What has been trained so far is kept in a ``folder``, and gone on from where it is of the same recipe.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = network().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=recipe.steps, pct_start=recipe.warm_up
    )
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    done = _resumed(recipe, parts, batches, folder / CHECKPOINT) if folder is not None else 0
    mean = 0.0
    with one_thread(), progress.stage("train speech", recipe.steps - done) as stage:
        for step, (inputs, target) in enumerate(islice(batches, recipe.steps - done)):
            loss = ctc_loss(model(*inputs), target)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.step()
            schedule.step()
            mean += (loss.item() - mean) / min(step + 1, 50)
            stage.advance(note=f"loss {mean:.3f}")
            if folder is not None and (done + step + 1) % EVERY == 0:
                _keep(recipe, parts, batches, done + step + 1, folder / CHECKPOINT)
    return model.eval()


def _keep(recipe: Recipe, parts: dict[str, Any], batches: SpeechBatches, step: int, path: Path) -> None:
    file = io.BytesIO()
    states = {name: part.state_dict() for name, part in parts.items()}
    torch.save({"recipe": asdict(recipe), "step": step, "batches": batches.state(), **states}, file)
    write_atomically(path, file.getvalue())


def _resumed(recipe: Recipe, parts: dict[str, Any], batches: SpeechBatches, path: Path) -> int:
    """Take up what is kept of the same recipe; return its steps, 0 where there is none."""
    if not path.exists():
        return 0
    kept = torch.load(path, weights_only=True)
    if kept["recipe"] != asdict(recipe):
        return 0
    for name, part in parts.items():
        part.load_state_dict(kept[name])
    batches.restored(kept["batches"])
    return int(kept["step"])


def scored(model: nn.Module, split: HeldOut, decode: Decode = greedy) -> dict[str, dict[str, float]]:
    """Return each error rate in percent, its standard error, and the number of utterances."""
    found = {}
    for name, rates in error_rates(model, split, decode).items():
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
        write(train(recipe, batches, progress, out), recipe, splits, out)
        (out / CHECKPOINT).unlink(missing_ok=True)
    except AutocompError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def write(model: nn.Module, recipe: Recipe, splits: dict[str, HeldOut], folder: Path) -> None:
    """Write the model, and what the one that is read back scores."""
    speakers = {name: sum(map(len, bank.values())) for name, bank in banks().items() if set(bank) <= set(WORDS)}
    facts = {"recipe": asdict(recipe), "recordings": speakers}
    save(model, facts, folder)
    again = load(folder)
    by = {
        decoder: {name: scored(again, split, decode) for name, split in splits.items()}
        for decoder, decode in DECODERS.items()
    }
    save(model, facts | {"scores": by.pop("greedy"), "decoded": by}, folder)


if __name__ == "__main__":
    main()
