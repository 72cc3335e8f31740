"""Goals: what misses them and by what, and which evaluation is taken."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autocomp.config.settings import Goals
from autocomp.errors import InfeasibleError
from autocomp.front.goals import Judge, choose_front, delivered, family
from autocomp.records.candidate import Candidate
from autocomp.records.evaluation import Evaluation
from autocomp.records.latency import Latency


def evaluation(
    trial: int, accuracy: float | None, ms: float | None, size: int = 100_000, failed: bool = False
) -> Evaluation:
    latency = {} if ms is None else {"x86-host": Latency(ms * 1e-3, 0.01, "measured", "x86-host")}
    return Evaluation(
        trial, Candidate({"g": 64 - trial}, {}), "solver", "failed" if failed else "measured", 0.1, size,
        metrics={} if accuracy is None else {"accuracy": accuracy}, latency=latency,
        failure="outputs differ at conv1" if failed else None,
    )  # fmt: skip


DENSE = evaluation(0, 0.98, 1.0, 400_000)
RUN = [DENSE, evaluation(1, 0.975, 0.5), evaluation(2, 0.97, 0.4, 90_000), evaluation(3, 0.90, 0.2, 50_000)]


@pytest.mark.parametrize(
    ("goals", "trial"),
    [
        (Goals(max_drop=0.01), 2),  # the fastest that keeps the accuracy; the drop is exactly the limit
        (Goals(max_drop=0.006), 1),
        (Goals(max_latency=0.45e-3), 2),  # the most accurate that is fast enough
        (Goals(max_size=60_000), 3),
        (Goals(max_drop=0.1, max_latency=0.5e-3), 3),
        (Goals(), 2),  # the knee
    ],
)
def test_best(goals: Goals, trial: int) -> None:
    assert Judge(DENSE, goals, "accuracy").best(RUN).trial == trial


def test_the_knee_allows_for_standard_errors() -> None:
    sure = [replace(e, drop_errors={"accuracy": 0.001}) for e in RUN]
    unsure = [replace(e, drop_errors={"accuracy": 0.08}) for e in RUN]
    assert Judge(DENSE, Goals(), "accuracy").best(sure).trial == 2
    assert Judge(DENSE, Goals(), "accuracy").best(unsure).trial == 3


def test_a_front_has_no_point_that_is_better_by_its_last_digit() -> None:
    same = [evaluation(1, 0.9491666666666666, 0.2), evaluation(2, 0.9491666666666667, 0.3)]
    assert [e.trial for e in choose_front(same, "accuracy", True)] == [1]


def test_goals_that_are_lost_are_named() -> None:
    judge = Judge(DENSE, Goals(max_drop={"accuracy/noisy": 0.1}), "accuracy")
    judge = replace(judge, dense=replace(DENSE, metrics={"accuracy": 0.98, "accuracy/noisy": 0.9}))
    before = replace(RUN[1], metrics={"accuracy": 0.95, "accuracy/noisy": 0.85})
    after = replace(RUN[1], metrics={"accuracy": 0.97, "accuracy/noisy": 0.7})
    assert len(judge.lost(before, after)) == 1
    assert "accuracy/noisy" in judge.lost(before, after)[0]
    assert judge.lost(after, before) == judge.lost(before, before) == judge.lost(after, after) == []


def test_lower_may_be_better() -> None:
    assert Judge(DENSE, Goals(max_latency=0.45e-3), "accuracy", higher_is_better=False).best(RUN).trial == 3


def test_violations_say_by_what() -> None:
    goals = Goals(max_drop=0.01, max_latency=0.1e-3, max_size=10_000)
    assert Judge(DENSE, goals, "accuracy").violations(RUN[3]) == [
        "accuracy drops by 0.08, more than max_drop 0.01",
        "0.2 ms on x86-host, more than max_latency 0.1 ms",
        "50 kB, more than max_size 10 kB",
    ]
    assert Judge(DENSE, Goals(max_drop=0.01), "accuracy").feasible(RUN[2])


def test_a_violation_is_never_written_as_if_it_were_within_its_limit() -> None:
    missed = Judge(DENSE, Goals(max_latency=0.1999e-3, max_size=49_960), "accuracy").violations(RUN[3])
    assert missed == ["0.2 ms on x86-host, more than max_latency 0.1999 ms", "50 kB, more than max_size 49.96 kB"]


@pytest.mark.parametrize("unit", [1e-12, 1e-6, 1.0, 1e9])
def test_a_goal_means_the_same_in_any_unit(unit: float) -> None:
    dense = replace(DENSE, metrics={"accuracy": 0.9 * unit})
    judge = Judge(dense, Goals(max_drop="1%"), "accuracy", higher_is_better=False)
    assert judge.that_allow_nothing() == []
    assert judge.violations(replace(RUN[1], metrics={"accuracy": 0.909 * unit})) == []
    assert len(judge.violations(replace(RUN[1], metrics={"accuracy": 0.92 * unit}))) == 1


def test_what_was_not_measured_or_failed_is_not_feasible() -> None:
    assert Judge(DENSE, Goals(max_latency=1.0), "accuracy").violations(evaluation(4, 0.98, None))
    assert Judge(DENSE, Goals(max_drop=0.01), "accuracy").violations(evaluation(4, None, 0.1))
    assert Judge(DENSE, Goals(), "accuracy").violations(evaluation(4, 0.98, 0.1, failed=True)) == [
        "it failed: outputs differ at conv1"
    ]


def test_nothing_feasible_names_the_nearest() -> None:
    message = r"none of 4 .* the nearest, trial 3: 0\.2 ms on x86-host.*relax"
    with pytest.raises(InfeasibleError, match=message) as caught:
        Judge(DENSE, Goals(max_latency=0.1e-3), "accuracy").best(RUN)
    assert caught.value.exit_code == 3
    with pytest.raises(InfeasibleError, match="no candidate was measured"):
        Judge(DENSE, Goals(), "accuracy").best([])


def noisy(one: Evaluation) -> Evaluation:
    return replace(one, latency={name: replace(latency, noisy=True) for name, latency in one.latency.items()})


@pytest.mark.parametrize("goals", [Goals(max_drop=0.01), Goals()])
def test_a_noisy_one_is_taken_only_where_all_are(goals: Goals) -> None:
    assert Judge(DENSE, goals, "accuracy").best([noisy(e) if e.trial == 2 else e for e in RUN]).trial == 1
    assert Judge(DENSE, goals, "accuracy").best([noisy(e) for e in RUN]).trial == 2


@pytest.mark.parametrize(
    ("goals", "trial"),
    [
        (Goals(max_drop="1.5%"), 2),  # of 0.98: 0.0147
        (Goals(max_drop="0.6%"), 1),
        (Goals(max_latency="2.5x"), 2),
        (Goals(max_latency={"x86-host": "4x"}), 3),
        (Goals(max_latency={"*": 0.5e-3}), 1),
        (Goals(max_size="6x"), 3),
    ],
)
def test_goals_against_the_uncompressed_model(goals: Goals, trial: int) -> None:
    assert Judge(DENSE, goals, "accuracy").best(RUN).trial == trial


def test_a_slice_may_not_be_left_behind() -> None:
    def with_slice(one: Evaluation, value: float) -> Evaluation:
        return replace(one, metrics={**one.metrics, "accuracy/noisy": value})

    dense, good, bad = with_slice(RUN[0], 0.9), with_slice(RUN[1], 0.89), with_slice(RUN[2], 0.7)
    judge = Judge(dense, Goals(max_drop={"*": 0.02, "accuracy/noisy": 0.05}), "accuracy")
    assert judge.best([dense, good, bad]) == good
    assert judge.violations(bad) == ["accuracy/noisy drops by 0.2, more than max_drop 0.05"]
    assert not judge.feasible(RUN[1]), "a slice that was not read is a miss"


def test_goals_that_ask_for_nothing_are_named() -> None:
    goals = Goals(max_latency=2e-3, max_size="1x", max_drop=0.01)
    assert Judge(DENSE, goals, "accuracy").met_by_dense() == ["max_latency (1 ms on x86-host)", "max_size (400 kB)"]
    assert not Judge(DENSE, Goals(max_latency="2x"), "accuracy").met_by_dense()


def test_a_share_of_nothing_is_named() -> None:
    dense = replace(DENSE, metrics={"accuracy": 0.9, "error": 0.0})
    goals = Goals(max_drop={"accuracy": "1%", "error": "2%"})
    assert Judge(dense, goals, "accuracy").that_allow_nothing() == ["max_drop 2% of error"]
    assert not Judge(dense, Goals(max_drop={"error": 0.01}), "accuracy").that_allow_nothing()
    assert not Judge(dense, Goals(max_drop={"error": "0%"}), "accuracy").that_allow_nothing()


def test_a_family_has_the_most_accurate_of_each_speedup() -> None:
    found = family(Judge(DENSE, Goals(), "accuracy"), RUN, [2.0, 2.2, 9.0], ["x86-host"])
    assert {name: e and e.trial for name, e in found.items()} == {"2x": 1, "2.2x": 2, "9x": None}
    within = family(Judge(DENSE, Goals(max_drop=0.001), "accuracy"), RUN, [2.0], ["x86-host", "board"])
    assert within == {"2x on x86-host": None, "2x on board": None}


def test_what_the_goals_ask_for_is_delivered_though_it_is_beaten() -> None:
    """A front knows the objective and latencies; sizes and slices it does not."""
    fast = evaluation(1, 0.98, 0.5, 400_000)
    small = evaluation(2, 0.975, 0.6, 70_000)
    poor = evaluation(3, 0.70, 0.2, 40_000)
    found = delivered([DENSE, fast, small, poor], Judge(DENSE, Goals(max_size="5x"), "accuracy"), [], ["x86-host"])
    assert small in found
    assert Judge(DENSE, Goals(max_size="5x"), "accuracy").best(found) == small
    plain = delivered([DENSE, fast, small, poor], Judge(DENSE, Goals(), "accuracy"), [], ["x86-host"])
    assert small not in plain
    assert [e.trial for e in plain] == [3, 1], "fast to slow"


def test_a_name_wins_over_the_rest() -> None:
    for goals in ({"accuracy": 0.05, "*": 0.01}, {"*": 0.01, "accuracy": 0.05}):
        assert Goals(max_drop=goals).drops("accuracy") == {"accuracy": 0.05}


def test_energy_is_a_goal_where_a_profile_states_its_power() -> None:
    def drawing(e: Evaluation, watts: float) -> Evaluation:
        return replace(e, latency={name: replace(latency, watts=watts) for name, latency in e.latency.items()})

    dense, small, slow = (drawing(e, 2.0) for e in (DENSE, evaluation(1, 0.97, 0.25), evaluation(2, 0.975, 0.9)))
    seconds = dense.latency["x86-host"].seconds
    for limit in (seconds, "2x", {"x86-host": "2x"}):  # half of what dense takes: 2 W for its seconds
        judge = Judge(dense, Goals(max_energy=limit), "accuracy")
        assert judge.max_seconds("x86-host") == pytest.approx(seconds / 2)
        assert judge.best([dense, small, slow]) == small
        (missed,) = judge.violations(slow)
        assert f"on x86-host, more than max_energy {seconds * 1e3:.3g} mJ" in missed
    assert Judge(dense, Goals(max_energy="2x", max_latency="4x"), "accuracy").max_seconds("x86-host") == seconds / 4
    assert (
        "its energy on x86-host is not known" in Judge(DENSE, Goals(max_energy="2x"), "accuracy").violations(DENSE)[0]
    )
    both = replace(dense, latency={**dense.latency, "board": DENSE.latency["x86-host"]})  # one of two states its power
    assert not Judge(both, Goals(max_energy={"x86-host": 10.0}), "accuracy").violations(both)
    for limit in ({"board": 10.0}, 10.0):
        assert (
            "its energy on board is not known" in Judge(both, Goals(max_energy=limit), "accuracy").violations(both)[0]
        )
    assert Judge(dense, Goals(max_energy=1.0), "accuracy").met_by_dense()


def test_memory_is_a_goal_on_every_profile() -> None:
    def with_memory(e: Evaluation, memory: int) -> Evaluation:
        return replace(e, latency={name: replace(latency, memory=memory) for name, latency in e.latency.items()})

    dense, small = with_memory(DENSE, 900_000), with_memory(evaluation(1, 0.97, 0.9), 300_000)
    large = with_memory(evaluation(2, 0.975, 0.3), 500_000)
    for limit in (400_000, "2.5x"):
        judge = Judge(dense, Goals(max_memory=limit), "accuracy")
        assert judge.best([dense, small, large]) == small
        assert delivered([dense, small, large], judge, [], ["x86-host"]).count(small) == 1, "dominated, yet asked for"
    assert judge.violations(large) == ["500 kB of memory on x86-host, more than max_memory 360 kB"]
    assert judge.violations(evaluation(3, 0.9, 0.1)) == ["its memory on x86-host is not known"]
    assert Judge(dense, Goals(max_memory=10**6), "accuracy").met_by_dense() == ["max_memory (900 kB on x86-host)"]
