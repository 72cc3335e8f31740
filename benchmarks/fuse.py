"""Related models in one against each compressed by itself: bytes and time of serving all, at the same accuracy.

    python benchmarks/fuse.py [--pair digits tokens] [--smaller 1.6 2] [--minutes 5] [--trials 200] [--measurements 16] [--quick]

``digits``: the built-in task, and the same pictures turned by a quarter; ``tokens``: the built-in task, and the role of the token that follows.
Each second model is trained from scratch by the recipe of the first, with another seed. Then each side is compressed by the same searches (no
training after them): the two models apart, and the fused one. Of what was measured the smallest is taken that loses at most a point of the mean
accuracy against the two models as given (validation split); of the two apart the pair that does so together.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from common import earlier, publish
from torch import Tensor
from torch.nn import functional

import autocomp
from autocomp.config.quantities import format_bytes
from autocomp.hardware.profile import load_profile
from autocomp.progress import Progress
from autocomp.records.evaluation import Evaluation
from autocomp.records.run import comparable
from autocomp.records.table import read_evaluations
from autocomp.tasks import digits, tokens
from autocomp.tasks.stdlib_text import Text, load_text
from autocomp.tasks.task import Task
from autocomp.tasks.training import trained

DROP = 0.01
PROFILE = "x86-host"


def turned_digits(seed: int = 1) -> Task:
    """The built-in digits, turned by a quarter: training, calibration, validation and test."""
    training, validation, test = (
        digits.Split(split.images.rot90(1, (2, 3)).contiguous(), split.targets) for split in digits.load_splits()
    )
    recipe = replace(digits.RECIPE.with_(epochs=None, seed=seed), task="digits-turned")
    train = digits.AugmentedBatches(training, recipe.batch, seed)
    return Task(
        model=trained(digits.new_model, recipe, train, cache=True, progress=Progress()),
        example_inputs=(training.images[:1].clone(),),
        calibration=digits.calibration_batches(training, seed),
        evaluate=partial(digits.accuracy, slices=digits.slices(validation, seed=1)),
        test=partial(digits.accuracy, slices=digits.slices(test, seed=2)),
        train=train,
        loss=functional.cross_entropy,
        objective="accuracy",
        unit="%",
        name=recipe.task,
    )


class Following:
    """A text of tokens whose roles are those of the tokens that follow."""

    def __init__(self, text: Text) -> None:
        self.text, self.starts = text, text.starts[:-2]

    def windows(self, starts: Tensor) -> tuple[Tensor, Tensor]:
        return self.text.windows(starts)[0], self.text.windows(starts + 1)[1]


def following_tokens(seed: int = 1) -> Task:
    """The built-in tokens, with the role of the next token."""
    *texts, digest = load_text()
    training, validation, test = map(Following, texts)
    recipe = replace(tokens.RECIPE.with_(epochs=None, seed=seed), task="tokens-following", data=digest)
    train = tokens.TokenBatches(training, recipe.batch, seed)
    calibration = tokens.calibration_batches(training, seed)
    return Task(
        model=trained(tokens.new_model, recipe, train, cache=True, progress=Progress()),
        example_inputs=(calibration[0][0][:1].clone(),),
        calibration=calibration,
        evaluate=partial(tokens.accuracy, windows=tokens.held_out(validation)),
        test=partial(tokens.accuracy, windows=tokens.held_out(test)),
        train=train,
        loss=tokens.tagging_loss,
        objective="accuracy",
        unit="%",
        name=recipe.task,
    )


SECOND = {"digits": turned_digits, "tokens": following_tokens}


def measured(task: Task, out: Path, options: argparse.Namespace) -> tuple[Evaluation, list[Evaluation]]:
    """The uncompressed model and what a search measured."""
    with suppress(autocomp.InfeasibleError):  # it is measured all the same
        autocomp.search(
            task=task,
            out=out,
            trials=options.trials,
            measurements=options.measurements,
            references=False,
            max_drop=DROP,
        )
    return autocomp.SearchResult(out).run.dense.evaluation, [e for e in read_evaluations(out) if e.state == "measured"]


def seconds(evaluations: Sequence[Evaluation], dense: Sequence[Evaluation]) -> float:
    return sum(comparable(one, whole, PROFILE) for one, whole in zip(evaluations, dense, strict=True))


def compared(name: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What serving both takes, apart and fused, before and after compressing."""
    tasks = [autocomp.load_task(name), SECOND[name]()]
    searches = [measured(task, folder / f"{name}-{k}", options) for k, task in enumerate(tasks)]
    dense = [one for one, _ in searches]
    given = sum(one.metrics["accuracy"] for one in dense) / 2
    pairs = [
        pair for pair in itertools.product(*(found for _, found in searches))
        if sum(one.metrics["accuracy"] for one in pair) / 2 >= given - DROP
    ]  # fmt: skip
    apart = min([tuple(dense), *pairs], key=lambda pair: sum(one.bytes for one in pair))
    found: dict[str, Any] = {
        "given": given,
        "apart": {
            "bytes": sum(one.bytes for one in dense), "seconds": seconds(dense, dense),
            "compressed": sum(one.bytes for one in apart), "compressed_seconds": seconds(apart, dense),
            "accuracy": sum(one.metrics["accuracy"] for one in apart) / 2,
        },
    }  # fmt: skip
    for smaller in options.smaller:
        fused = autocomp.fuse(tasks, smaller=smaller, minutes=options.minutes)
        whole, evaluations = measured(fused.task, folder / f"{name}-fused-{smaller}", options)
        good = [one for one in evaluations if one.metrics["accuracy"] >= given - DROP]
        best = min(good, key=lambda one: one.bytes, default=whole)
        found[f"fused {smaller:g}x"] = {
            "bytes": whole.bytes, "seconds": seconds([whole], [whole]), "compressed": best.bytes,
            "compressed_seconds": seconds([best], [whole]), "accuracy": best.metrics["accuracy"],
            "metrics": {which: metrics["accuracy"] for which, metrics in fused.metrics.items()},
            "error": fused.metrics["fused"].errors().get("accuracy"), "ways": dict(fused.ways),
        }  # fmt: skip
    return found


def row(pair: str, which: str, found: dict[str, Any]) -> list[str]:
    side, apart = found[which], found["apart"]
    metrics = side.get("metrics", {})
    untrained = (
        f"{metrics['averaged']:.1%}, {metrics['shared']:.1%}, {metrics['fused']:.1%}"
        if metrics
        else f"{found['given']:.1%}"
    )
    return [
        pair, which, format_bytes(side["bytes"]), untrained, f"{1e3 * side['seconds']:.3f}", format_bytes(side["compressed"]),
        f"{apart['compressed'] / side['compressed']:.2f}", f"{side['accuracy']:.1%}", f"{1e3 * side['compressed_seconds']:.3f}",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", nargs="+", choices=list(SECOND), default=list(SECOND))
    parser.add_argument("--smaller", nargs="+", type=float, default=[1.6, 2.0])
    parser.add_argument("--minutes", type=float, default=5.0, help="of training the fused model")
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--measurements", type=int, default=16)
    parser.add_argument("--quick", action="store_true", help="a smoke test: nothing is written")
    options = parser.parse_args()
    if options.quick:
        options.pair, options.smaller, options.minutes, options.trials, options.measurements = (
            ["digits"],
            [1.6],
            0.5,
            20,
            3,
        )
    found = earlier("fuse", "pairs") if not options.quick else {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.pair:
            found[name] = compared(name, options, Path(folder))
    rows = [row(pair, which, by) for pair, by in found.items() for which in by if which != "given"]
    headings = [
        "pair", "models", ">weights", ">accuracy: averaged, shared, trained", ">ms", ">compressed", ">times smaller than apart", ">accuracy",
        ">ms, compressed",
    ]  # fmt: skip
    notes = [
        f"Accuracy is the mean of both tasks, validation split; compressed: the smallest that was measured within {DROP:.0%} of the models as "
        f"given. {options.trials} told and {options.measurements} measured in each search; the fused model trained for {options.minutes:g} "
        "minutes. ms: serving both once, one after the other where they are apart."
    ]
    publish("fuse", headings, rows, {"pairs": found}, load_profile(PROFILE), notes, not options.quick, "pairs")


if __name__ == "__main__":
    main()
