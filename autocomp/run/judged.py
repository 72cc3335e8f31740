"""Whether the task's own functions judge as they did: data may change, or a function ignore its model, and no source shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from autocomp.records.evaluation import Evaluation
from autocomp.tasks.reading import otherwise

Metrics = Mapping[str, float]

# Compressed models that answer so far from the uncompressed one (nats), and are judged exactly as it is: they make one doubt the judge. Chosen
# by hand, not measured.
ENOUGH_TO_DOUBT, DOUBT = 2, 0.05


def judged_otherwise(
    told: Sequence[Evaluation],
    dense: Evaluation,
    before: Callable[[Evaluation], Metrics | None],
    now: Callable[[Evaluation], Metrics],
) -> str:
    """Which model is judged otherwise ``now`` than ``before`` (None: it was not), and by what; empty if none is.

    Two are asked: the uncompressed one, and of the measured ones that were judged the one that answers least like it, since a metric against
    the uncompressed model says the same of that on any data.
    """
    for name, evaluation in _witnesses(told, dense, before):
        then, found = before(evaluation), now(evaluation)
        assert then is not None
        if said := otherwise(then, found):
            return f"{name} otherwise ({said})"
    return ""


def ignores_its_model(told: Sequence[Evaluation], dense: Evaluation) -> int:
    """How many compressed models answer otherwise and are all judged exactly as the uncompressed one; 0 where that proves nothing."""
    others = [e for e in told if e.state == "measured" and (e.kl or 0.0) > DOUBT]
    alike = all(dict(e.metrics) == dict(dense.metrics) for e in others)
    return len(others) if alike and len(others) >= ENOUGH_TO_DOUBT else 0


def of_other_samples(told: Sequence[Evaluation], dense: Evaluation) -> list[str]:
    """The metrics that were read of more samples of some model than of the uncompressed one, or of fewer: they choose them by the model."""
    measured = [e for e in told if e.state == "measured" and e.source != "dense"]
    return [name for name in dense.errors if any(name in e.errors and name not in e.drop_errors for e in measured)]


def _witnesses(
    told: Sequence[Evaluation], dense: Evaluation, before: Callable[[Evaluation], Metrics | None]
) -> Iterator[tuple[str, Evaluation]]:
    if before(dense) is not None:
        yield "the uncompressed model", dense
    farthest_first = sorted((e for e in told if e.state == "measured" and e.kl), key=lambda e: -(e.kl or 0.0))
    other = next((e for e in farthest_first if before(e) is not None), None)
    if other is not None:
        yield f"candidate {other.candidate.id}", other
