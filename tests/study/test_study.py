"""The study: what is told stays told, through updates, resumes and kills; proposals are new and good."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from places import TESTS
from problems import random_problem
from sqlalchemy import event
from sqlalchemy.engine import Engine as SqlEngine

from autocomp.errors import UsageError
from autocomp.front.pareto import hypervolume
from autocomp.records.candidate import Candidate, Method
from autocomp.records.evaluation import Evaluation, evaluation_to_json
from autocomp.records.latency import Latency
from autocomp.study.propose import quiet_optuna
from autocomp.study.solver import Problem, make_problem, solve_front
from autocomp.study.storage import close_storage, open_storage
from autocomp.study.study import Choices, Engine, Search, open_search

PROBLEM = random_problem(1, layers=8)
SPACE = Choices(dict(zip(PROBLEM.groups, PROBLEM.widths, strict=True)), {f.layer: f.methods for f in PROBLEM.factors})
DENSE = PROBLEM.decode(np.zeros(len(PROBLEM.sizes), dtype=int))


def url(folder: Path, kind: str = "journal") -> str:
    return f"journal:///{folder / 'study.journal'}" if kind == "journal" else f"sqlite:///{folder / 'study.db'}"


def evaluate(candidate: Candidate, source: str = "solver") -> Evaluation:
    """KL grows faster than the additive error, and some layers matter more than the tables say."""
    cost = PROBLEM.cost(candidate)
    extra = sum(0.3 * (method.precision == "w8a8") for method in candidate.methods.values()) ** 2
    kl = 0.02 * (cost.error + extra) ** 1.3
    return Evaluation(-1, candidate, source, "told", cost.error, cost.bytes, {"x86-host": cost.seconds}, kl)


def start(folder: Path, resume: bool = False, kind: str = "journal", sampler: str = "autocomp") -> Search:
    return open_search(url(folder, kind), "run", SPACE, Engine(sampler, problem=lambda: PROBLEM), resume=resume)


def step(search: Search) -> Evaluation:
    asked = search.ask()
    assert asked is not None
    evaluation = evaluate(asked.candidate, asked.source)
    search.tell(asked.trial, evaluation)
    return evaluation


@pytest.mark.parametrize("kind", ["journal", "database"])
def test_ask_tell_and_read_again(tmp_path: Path, kind: str) -> None:
    search = start(tmp_path, kind=kind)
    assert search.enqueue(DENSE, "dense")
    assert not search.enqueue(DENSE, "uniform")  # seen
    seeds = [candidate for candidate in solve_front(PROBLEM, 5) if candidate != DENSE]
    for candidate in seeds:
        search.enqueue(candidate, "solver")
    for _ in range(12):
        step(search)
    assert [e.trial for e in search.told] == list(range(12))
    assert search.told[0].candidate == DENSE
    assert [e.source for e in search.told][: 1 + len(seeds)] == ["dense"] + ["solver"] * len(seeds)
    assert {e.source for e in search.told[1 + len(seeds) :]} == {"mutation"}
    assert len({e.candidate for e in search.told}) == 12
    before = search.told
    search.close()
    assert start(tmp_path, resume=True, kind=kind).told == before


def test_update_replaces_and_survives(tmp_path: Path) -> None:
    search = start(tmp_path)
    step(search)
    told = search.told[0]
    latency = Latency(1e-3, 0.01, "measured", "x86-host", samples=(1e-3, 1.1e-3))
    search.update(0, replace(told, state="measured", metrics={"accuracy": 0.9}, latency={"x86-host": latency}))
    assert search.told[0].state == "measured"
    search.set_attr("spearman", {"kl": -0.9})
    search.close()
    again = start(tmp_path, resume=True)
    assert again.told[0].latency["x86-host"] == latency
    assert again.told[0].tier == 2
    assert again.get_attr("spearman") == {"kl": -0.9}
    assert again.get_attr("nothing", 7) == 7
    with pytest.raises(KeyError):
        again.update(5, told)
    with pytest.raises(KeyError):
        again.tell(0, told)


def test_failed_trials_are_told_but_no_parents(tmp_path: Path) -> None:
    search = start(tmp_path)
    search.enqueue(DENSE, "dense")
    step(search)
    asked = search.ask()
    assert asked is not None
    failure = replace(evaluate(asked.candidate), state="failed", failure="outputs differ", error=0.0, kl=None)
    search.tell(asked.trial, failure)
    for _ in range(5):
        step(search)
    assert len(search.told) == 7
    assert np.isnan(search.values()[asked.trial]).all()
    assert asked.trial not in {e.trial for e in search.front()}


def test_hypervolume_rises_and_proposals_beat_chance(tmp_path: Path) -> None:
    """On this made-up truth the proposals find more than the same number of random candidates."""
    search = start(tmp_path)
    search.enqueue(DENSE, "dense")
    seeds = solve_front(PROBLEM, 15)
    for candidate in seeds:
        search.enqueue(candidate, "solver")
    while len(search.told) < 60:
        step(search)
    history = search.hypervolume()
    assert (np.diff(history) >= 0).all()
    assert 0 < history[14] < history[-1] < 1
    rng = np.random.default_rng(0)
    dense = PROBLEM.cost(DENSE).seconds
    chance = [evaluate(PROBLEM.decode(rng.integers(PROBLEM.sizes))) for _ in range(44)]
    points = [(e.kl, e.predicted["x86-host"] / dense) for e in chance] + search.values()[:16].tolist()
    assert history[-1] > hypervolume(points, (1.0, 1.0))


def test_no_solver_problem_is_needed(tmp_path: Path) -> None:
    search = open_search(url(tmp_path), "run", SPACE)
    for _ in range(25):
        step(search)
    assert len({e.candidate for e in search.told}) == 25


def test_a_small_space_is_exhausted_not_repeated(tmp_path: Path) -> None:
    space = Choices({"g": (32, 16)}, {"a": (Method(), Method("w8a8"))})
    search = open_search(url(tmp_path), "run", space)
    told = 0
    while (asked := search.ask()) is not None:
        search.tell(asked.trial, Evaluation(-1, asked.candidate, asked.source, "told", told, 1, {"p": 1.0}, 0.1))
        told += 1
    assert told == 4


def test_normalised_candidates_are_what_is_asked(tmp_path: Path) -> None:
    space = Choices({}, {"a": (Method(), Method("fp32", (32,)), Method("w8a8"))})

    def normalise(candidate: Candidate) -> Candidate:  # a rank above break-even falls back to the full one
        return Candidate({}, {"a": Method(candidate.methods["a"].precision)})

    search = open_search(url(tmp_path), "run", space, Engine(normalise=normalise))
    seen = []
    while (asked := search.ask()) is not None:
        seen.append(str(asked.candidate.methods["a"]))
    assert sorted(seen) == ["fp32", "w8a8"]


def test_mistakes_are_named(tmp_path: Path) -> None:
    search = start(tmp_path)
    with pytest.raises(ValueError, match="outside the search space"):
        search.enqueue(Candidate({**DENSE.widths, "s0": 63}, DENSE.methods), "uniform")
    search.close()
    with pytest.raises(UsageError, match=r"holds a study 'run' already: continue it with --resume"):
        start(tmp_path)
    other = Choices({**SPACE.widths, "s0": (64, 32)}, SPACE.methods)
    with pytest.raises(UsageError, match=r"of another search space \(it differs in s0\)"):
        open_search(url(tmp_path), "run", other, resume=True)
    (tmp_path / "text.db").write_text("this is not a database, and long enough to be taken for one " * 20)
    with pytest.raises(UsageError, match="cannot be opened: file is not a database"):
        open_search(f"sqlite:///{tmp_path / 'text.db'}", "run", SPACE)
    with pytest.raises(UsageError, match="cannot be opened: unable to open database file"):
        open_search(f"sqlite:///{tmp_path / 'no' / 'folder.db'}", "run", SPACE)
    with pytest.raises(UsageError, match="cannot be opened"):
        open_search("nonsense", "run", SPACE)


@pytest.mark.parametrize("kind", ["journal", "database"])
@pytest.mark.filterwarnings("ignore:PedAnova")
def test_a_study_is_one_that_optuna_reads(tmp_path: Path, kind: str) -> None:
    """Its own classes, none of ours: parameters by name, values, constraints, the front, importances; and it goes on with it."""
    import optuna

    engine = Engine(problem=lambda: PROBLEM, constraints=lambda e: {"max_size": e.bytes / 1000 - 1})
    search = open_search(url(tmp_path, kind), "run", SPACE, engine)
    search.enqueue(DENSE, "dense")
    told = [step(search) for _ in range(12)]
    search.close()
    assert not list(tmp_path.glob("study.db-*"))  # the write-ahead log was folded in
    storage: Any = url(tmp_path, kind)
    if kind == "journal":
        storage = optuna.storages.JournalStorage(
            optuna.storages.journal.JournalFileBackend(str(tmp_path / "study.journal"))
        )
    study = optuna.load_study(study_name="run", storage=storage)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 12
    assert study.trials[0].values[1] == pytest.approx(1.0)
    for trial, evaluation in zip(study.trials, told, strict=True):
        widths, methods = evaluation.candidate.widths, evaluation.candidate.methods
        named = {f"width/{g}": w for g, w in widths.items()} | {f"method/{m}": str(how) for m, how in methods.items()}
        assert trial.params == {name: named[name] for name in trial.params}
        assert len(trial.params) == sum(len(options) > 1 for options in SPACE.options)
        assert trial.constraints == {"max_size": pytest.approx(evaluation.bytes / 1000 - 1)}
        assert trial.user_attrs["source"] == evaluation.source
    assert {trial.number for trial in study.best_trials} <= set(range(12))
    assert study.metric_names == ["divergence", "target: seconds / dense"]
    importance = optuna.importance.get_param_importances(study, target=lambda trial: trial.values[1])
    assert set(importance) == set(study.trials[0].params)
    study.enqueue_trial(study.trials[0].params)
    assert study.ask().number == 12


def test_half_a_line_that_a_kill_left_is_taken_away(tmp_path: Path) -> None:
    search = start(tmp_path)
    for _ in range(4):
        step(search)
    before = search.told
    search.close()
    file = tmp_path / "study.journal"
    whole = file.read_bytes()
    file.write_bytes(whole + whole.splitlines()[-1][:20])
    again = start(tmp_path, resume=True)
    assert again.told == before
    step(again)
    again.close()
    assert file.read_bytes().startswith(whole)
    assert len(start(tmp_path, resume=True).told) == 5
    lines = whole.splitlines(keepends=True)
    file.write_bytes(b"".join([*lines[:3], lines[3][:9] + b"\n", *lines[4:]]))
    with pytest.raises(UsageError, match=r"a line of study\.journal is damaged"):
        start(tmp_path, resume=True)


@pytest.mark.parametrize("sampler", ["tpe", "nsgaii", "nsgaiii", "random"])
def test_any_sampler_of_optuna_runs_the_same_loop(sampler: str, tmp_path: Path) -> None:
    search = start(tmp_path, sampler=sampler)
    search.enqueue(DENSE, "dense")
    for _ in range(15):
        step(search)
    search.close()
    again = start(tmp_path, resume=True, sampler=sampler)
    for _ in range(15):
        step(again)
    assert len({e.candidate for e in again.told}) == 30
    assert {e.source for e in again.told} == {"dense", "optuna"}


def test_a_study_of_version_one_goes_on(tmp_path: Path) -> None:
    """Its trials had no parameters, and one relative latency for all profiles."""
    import optuna

    storage = open_storage(url(tmp_path, "database"))
    with quiet_optuna():
        optuna.create_study(storage=storage, study_name="run", directions=["minimize", "minimize"])
    for candidate in (DENSE, solve_front(PROBLEM, 3)[-1]):
        template = optuna.trial.create_trial(
            state=optuna.trial.TrialState.RUNNING,
            user_attrs={"asked": {"candidate": candidate.to_json(), "source": "dense"}},
        )
        row = storage.create_new_trial(1, template)
        evaluation = replace(evaluate(candidate, "dense"), trial=storage.get_trial_number_from_id(row))
        storage.set_trial_user_attr(row, "evaluation", evaluation_to_json(evaluation))
        storage.set_trial_state_values(row, optuna.trial.TrialState.COMPLETE, (evaluation.kl, 0.5))
    close_storage(storage)
    search = open_search(url(tmp_path, "database"), "run", SPACE, resume=True, profiles=["a", "b"])
    assert [e.candidate for e in search.told] == [DENSE, solve_front(PROBLEM, 3)[-1]]
    step(search)
    assert search.values().shape == (3, 2)


CHILD = """
    import sys, time
    sys.path[:0] = sys.argv[2:4]
    from pathlib import Path
    from test_study import DENSE, PROBLEM, solve_front, start, step

    search = start(Path(sys.argv[1]), resume=True)
    search.enqueue(DENSE, "dense")
    for candidate in solve_front(PROBLEM, 20):
        search.enqueue(candidate, "solver")
    while len(search.told) < 60:
        evaluation = step(search)
        print(evaluation.candidate.id, flush=True)  # only now does anyone count on it
"""


def test_kill_minus_nine_loses_nothing(tmp_path: Path) -> None:
    """Killed again and again in mid-search, the study ends with all told trials, none lost and none twice."""
    reported: list[str] = []
    command = [sys.executable, "-c", textwrap.dedent(CHILD), str(tmp_path), str(TESTS), str(Path(__file__).parent)]
    rng = np.random.default_rng(0)
    kills = 0
    while True:
        stop_after = int(rng.integers(8, 20)) if kills < 4 else 1000
        lines = 0
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            while line := child.stdout.readline():
                lines += 1
                reported.append(line.strip())
                if lines >= stop_after:
                    time.sleep(float(rng.uniform(0, 0.03)))  # anywhere within a trial
                    os.kill(child.pid, signal.SIGKILL)
                    reported += child.stdout.read().split()
                    break
        if child.returncode == 0:
            break
        kills += 1
        assert child.returncode == -signal.SIGKILL
    assert kills >= 3
    told = start(tmp_path, resume=True).told
    ids = [evaluation.candidate.id for evaluation in told]
    assert len(ids) == len(set(ids)) == 60
    assert set(reported) <= set(ids)
    seeds = {DENSE.id, *(candidate.id for candidate in solve_front(PROBLEM, 20))}
    assert seeds <= set(ids)
    assert sum(evaluation.source in ("dense", "solver") for evaluation in told) == len(seeds)


def test_a_kill_between_evaluation_and_state_is_finished_on_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = start(tmp_path)
    search.enqueue(DENSE, "dense")
    step(search)
    asked = search.ask()
    assert asked is not None

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(search._rows, "finish", die)
    with pytest.raises(KeyboardInterrupt):
        search.tell(asked.trial, evaluate(asked.candidate))
    search.close()
    again = start(tmp_path, resume=True)
    assert [e.trial for e in again.told] == [0, asked.trial]
    again.close()
    assert len(start(tmp_path, resume=True).told) == 2


def test_what_was_only_asked_is_asked_again_first(tmp_path: Path) -> None:
    search = start(tmp_path)
    for candidate in solve_front(PROBLEM, 4):
        search.enqueue(candidate, "solver")
    asked = search.ask()
    assert asked is not None
    search.close()
    for _ in range(3):  # however often it happens
        search = start(tmp_path, resume=True)
        again = search.ask()
        assert again is not None
        assert again.candidate == asked.candidate
        assert again.source == "solver"
        search.close()


def test_the_work_of_a_trial_does_not_grow_with_those_before(tmp_path: Path) -> None:
    """Asking and telling reads what is new: the database answers the last hundred with as few statements as those before."""
    search = start(tmp_path, kind="database")
    search.enqueue(DENSE, "dense")
    for candidate in solve_front(PROBLEM, 40):
        search.enqueue(candidate, "solver")
    statements = 0

    def count(*_: object) -> None:
        nonlocal statements
        statements += 1

    asked = []
    event.listen(SqlEngine, "before_cursor_execute", count)
    try:
        for _ in range(3):
            before = statements
            for _ in range(100):
                step(search)
            asked.append(statements - before)
    finally:
        event.remove(SqlEngine, "before_cursor_execute", count)
    assert 0 < asked[2] < 1.2 * asked[1]


def test_the_sampler_forgets_a_space_that_changed() -> None:
    """A study of Optuna's own, whose parameters come and go."""
    import optuna

    from autocomp.study.sampler import AutocompSampler

    def cost(trial: optuna.Trial) -> tuple[float, float]:
        width = trial.suggest_int("width", 16, 64, step=16)
        extra = trial.suggest_categorical("more", [1, 2, 3]) if trial.number % 3 else 1
        return 1 / width / extra, float(width * extra)

    with quiet_optuna():
        study = optuna.create_study(directions=["minimize", "minimize"], sampler=AutocompSampler(seed=0))
        study.optimize(cost, n_trials=20)
    assert len(study.trials) == 20


def test_only_what_is_offered_is_proposed(tmp_path: Path) -> None:
    coarse = Choices({group: widths[::2] for group, widths in SPACE.widths.items()}, SPACE.methods)
    problem = sub_problem(coarse)
    search = open_search(url(tmp_path), "run", SPACE, Engine(problem=lambda: problem, offered=coarse))
    search.enqueue(DENSE, "dense")
    before = [step(search).candidate for _ in range(30)]
    assert all(c.widths[group] in widths for c in before for group, widths in coarse.widths.items())
    problem = PROBLEM
    search.offer(SPACE)
    after = [step(search).candidate for _ in range(30)]
    assert any(c.widths[group] not in widths for c in after for group, widths in coarse.widths.items())
    search.close()
    again = open_search(url(tmp_path), "run", SPACE, Engine(problem=lambda: problem, offered=SPACE), resume=True)
    assert [e.candidate for e in again.told] == before + after


def sub_problem(space: Choices) -> Problem:
    """The problem of fewer widths."""
    factors = []
    for factor in PROBLEM.factors:
        sides = [
            np.array([0]) if group is None else np.array([widths.index(w) for w in space.widths[group]])
            for group, widths in ((factor.in_group, factor.widths_in), (factor.out_group, factor.widths_out))
        ]
        tables = {name: getattr(factor, name)[np.ix_(*sides)] for name in ("error", "seconds", "bytes")}
        widths = [
            tuple(np.array(w)[side].tolist())
            for w, side in zip((factor.widths_in, factor.widths_out), sides, strict=True)
        ]
        factors.append(replace(factor, widths_in=widths[0], widths_out=widths[1], **tables))
    return make_problem(factors, space.widths, PROBLEM.fixed_seconds, PROBLEM.fixed_bytes)
