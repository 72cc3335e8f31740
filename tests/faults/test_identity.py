"""A run that goes on is the run that began: the same model and data, the same study, the same machine, one process."""

from __future__ import annotations

import json
import shutil
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_task
import torch
import yaml
from places import ROOT

import autocomp
from autocomp.cli.main import main
from autocomp.config.addresses import masked
from autocomp.database.database import read_checked
from autocomp.errors import AutocompError, CorruptError, Interrupted, UsageError
from autocomp.graph.analyse import analyse
from autocomp.hardware.profile import load_profile
from autocomp.records.run import speedup
from autocomp.records.table import read_evaluations
from autocomp.run import folder as folder_module
from autocomp.run import found as found_module
from autocomp.run import judged as judged_module
from autocomp.run.identity import first_widths, identity_of, source_of
from autocomp.space.build import build_space
from autocomp.space.file import SpaceFile
from autocomp.study.storage import Claim, Recorded, open_storage, read_study
from autocomp.study.study import Choices, open_search

pytestmark = pytest.mark.usefixtures("short_tuning", "without_exports")
OPTIONS = {"trials": 4, "measurements": 1, "references": False}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, spaces: dict[str, str], short_tuning: None) -> Path:
    """A run folder that is done; to be copied, not changed."""
    out = tmp_path_factory.mktemp("finished") / "run"
    autocomp.search(task=tiny_task.task(), out=out, space=spaces["full"], **OPTIONS)
    return out


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def resume(run: Path, spaces: dict[str, str]) -> Callable[..., autocomp.SearchResult]:
    def again(task: autocomp.Task | None = None, **options: Any) -> autocomp.SearchResult:
        given = {"out": run, "space": spaces["full"], **OPTIONS, **options}
        return autocomp.search(task=task or tiny_task.task(), resume=True, **given)

    return again


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a run but its lock."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def other_weights() -> autocomp.Task:
    net = tiny_task.model()
    with torch.no_grad():
        net.head.weight.add_(0.01)
    return replace(tiny_task.task(), model=net)


def other_graph() -> autocomp.Task:
    class Scaled(tiny_task.TinyNet):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    net = Scaled()
    net.load_state_dict(tiny_task.weights())
    return replace(tiny_task.task(), model=net.eval())


def other_calibration() -> autocomp.Task:
    return replace(tiny_task.task(), calibration=[(tiny_task.data(64, seed=9)[0],)])


def other_examples() -> autocomp.Task:
    return replace(tiny_task.task(), example_inputs=(tiny_task.data(2, seed=2)[0],))


def other_metric() -> autocomp.Task:
    return replace(tiny_task.task(), evaluate=lambda model: {"accuracy": 0.5})


def other_objective() -> autocomp.Task:
    return replace(tiny_task.task(), objective="accuracy/upright")


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (other_weights, "the model's weights"),
        (other_graph, "the model's graph"),
        (other_calibration, "the calibration data"),
        (other_examples, "the example inputs"),
        (other_metric, "the source of evaluate"),
        (other_objective, "the objective"),
    ],
)
def test_another_task_is_refused_and_touches_nothing(
    make: Callable[[], autocomp.Task], named: str, run: Path, resume: Callable[..., Any]
) -> None:
    before = contents(run)
    with pytest.raises(UsageError, match=named) as caught:
        resume(make(), trials=6)
    assert "another --out" in str(caught.value)
    after = contents(run)
    config = {"config.yaml"}  # the budgets that were asked for
    assert {
        k: v
        for k, v in after.items()
        if k not in config and not k.startswith(("study.journal", ".study.journal")) and k != "log.txt"
    } == {
        k: v
        for k, v in before.items()
        if k not in config and not k.startswith(("study.journal", ".study.journal")) and k != "log.txt"
    }


@pytest.fixture(scope="module")
def of_a_file(tmp_path_factory: pytest.TempPathFactory, spaces: dict[str, str], short_tuning: None) -> Path:
    """A run that is done, of the search space in ``space.yaml`` beside it."""
    folder = tmp_path_factory.mktemp("of_a_file")
    shutil.copy(spaces["full"], folder / "space.yaml")
    autocomp.search(task=tiny_task.task(), out=folder / "run", space=str(folder / "space.yaml"), **OPTIONS)
    return folder


@pytest.mark.parametrize("change", ["equalise: true", "observer: minmax", "rotate: true"])
def test_compressing_in_another_way_is_refused(change: str, of_a_file: Path, spaces: dict[str, str]) -> None:
    """The weights of candidates that were judged would be others: a run once published 0.80 for files that gave 0.56."""
    space = of_a_file / "space.yaml"
    space.write_text(Path(spaces["full"]).read_text() + f"\n{change}\n")
    given = {**OPTIONS, "out": of_a_file / "run", "space": str(space), "trials": 6}
    with pytest.raises(UsageError, match="how layers are compressed"):
        autocomp.search(task=tiny_task.task(), resume=True, **given)


def test_other_widths_to_begin_with_are_refused(tmp_path: Path) -> None:
    """All widths that a run may come to are the same; but channels are put in order by the first ones, so that others would be kept."""
    space = tmp_path / "space.yaml"

    def refined(*keep: float) -> None:
        rule = {"layers": "*", "keep": [1.0, *keep]}
        space.write_text(yaml.safe_dump({"format_version": 1, "refine": True, "step": 4, "rules": [rule]}))

    given = {**OPTIONS, "out": tmp_path / "run", "space": str(space)}
    refined(0.5)
    autocomp.search(task=tiny_task.task(), **given)
    refined(0.75, 0.5)
    with pytest.raises(UsageError, match="widths of conv1, stem that it offers first"):
        autocomp.search(task=tiny_task.task(), resume=True, **given)
    refined(0.5)
    autocomp.search(task=tiny_task.task(), resume=True, **given)


def test_the_channels_of_each_part_are_among_the_first_widths() -> None:
    """Of two concatenated branches the same width may keep other channels, where the space's step changed."""

    class Joined(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = torch.nn.Linear(8, 24), torch.nn.Linear(8, 40)
            self.head = torch.nn.Linear(64, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.cat([self.one(x), self.two(x)], 1).relu())

    graph = analyse(Joined().eval(), (torch.randn(1, 8),))
    rule = {"layers": "*", "keep": [1.0, 0.5]}
    fine, coarse = (
        build_space(
            graph,
            SpaceFile.model_validate({"format_version": 1, "step": step, "rules": [rule]}),
            load_profile("x86-64-v3"),
        )
        for step in (4, 16)
    )
    assert fine.widths == coarse.widths
    assert first_widths(fine) != first_widths(coarse)


def test_settings_edited_in_the_run_folder_are_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    config |= {"calibration_samples": 16, "task": "tiny_task:task"}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["search", "--resume", "--out", str(run), "--trials", "6"]) == 2
    assert "how layers are compressed" in capsys.readouterr().err


class Shifting:
    """A metric whose data change between two starts of a run, though its source does not."""

    shift = 0.0

    def __init__(self, inner: Callable[..., Any]) -> None:
        self.inner = inner

    def __call__(self, model: torch.nn.Module) -> dict[str, float]:
        return {name: value - self.shift for name, value in self.inner(model).items()}


def shifting() -> autocomp.Task:
    task = tiny_task.task()
    assert task.test is not None
    task.evaluate, task.test = Shifting(task.evaluate), Shifting(task.test)
    return task


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory, spaces: dict[str, str], short_tuning: None) -> Path:
    """A run that is done, of a task whose data can change."""
    out = tmp_path_factory.mktemp("judged") / "run"
    autocomp.search(task=shifting(), out=out, space=spaces["full"], **OPTIONS)
    return out


@pytest.mark.slow
def test_data_that_changed_are_told_now_and_ever_after(
    judged: Path, spaces: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"out": shutil.copytree(judged, tmp_path / "run"), "space": spaces["full"], "resume": True, **OPTIONS}
    before = autocomp.SearchResult(judged)
    monkeypatch.setattr(Shifting, "shift", 0.125)
    again = autocomp.search(task=shifting(), **{**given, "trials": 5})
    for who in ("Task.evaluate", "Task.test"):
        assert any(f"{who} judges the uncompressed model otherwise" in text for text in again.run.warnings)
    old = {p.candidate.id: p.test_metrics for p in (before.dense, *before.front)}
    known = [p for p in (again.dense, *again.front) if p.candidate.id in old]
    assert known
    for point in known:  # of the data there are now, all of them
        was = old[point.candidate.id]
        assert point.test_metrics == pytest.approx({name: value - 0.125 for name, value in was.items()})
    monkeypatch.setattr(Shifting, "shift", 0.0)
    last = autocomp.search(task=shifting(), **{**given, "trials": 6})
    assert any("Task.evaluate judges" in text for text in last.run.warnings), "what was mixed stays so"
    stages = (run.run.summary.seconds["measuring baselines"] for run in (before, again, last))
    first, second, third = stages
    assert first < second < third, "times are those of all starts"


def test_validation_data_that_changed_are_told_where_the_layers_were_lost(
    judged: Path, spaces: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(judged, tmp_path / "run")
    shutil.rmtree(out / "layers")
    monkeypatch.setattr(Shifting, "shift", 0.125)
    again = autocomp.search(task=shifting(), out=out, space=spaces["full"], resume=True, **{**OPTIONS, "trials": 5})
    assert any("Task.evaluate judges the uncompressed model otherwise" in text for text in again.run.warnings)


class Against:
    """A metric that compares with the uncompressed model: of that itself it says the same on any data."""

    seed = 11

    def __call__(self, model: torch.nn.Module) -> dict[str, float]:
        inputs = tiny_task.data(64, seed=self.seed)[0]
        with torch.no_grad():
            return {"distance": float((model(inputs) - tiny_task.model()(inputs)).square().mean())}


@pytest.mark.slow
def test_data_that_say_nothing_of_dense_are_asked_of_another_model(
    spaces: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def task() -> autocomp.Task:
        return replace(tiny_task.task(), evaluate=Against(), test=Against(), higher_is_better=False)

    # a goal on size is met by what a noisy clock may find slower than dense, which is the best by this metric
    given = {"task": task(), "out": tmp_path / "run", "space": spaces["full"], "max_size": "1.1x", **OPTIONS}
    autocomp.search(**given)
    assert not any("judges" in text for text in autocomp.search(**given, resume=True).run.warnings)
    monkeypatch.setattr(Against, "seed", 12)
    again = autocomp.search(**given, resume=True)
    for who in ("Task.evaluate", "Task.test"):
        assert any(f"{who} judges candidate" in text for text in again.run.warnings)


@pytest.mark.slow
def test_a_judge_that_ignores_its_model_is_doubted(
    spaces: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judged_module, "DOUBT", 1e-6)  # the tiny model's candidates are hardly apart
    task = tiny_task.task()
    judge, model = task.evaluate, tiny_task.model()
    task.evaluate = lambda _: judge(model)
    result = autocomp.search(
        task=task, out=tmp_path / "run", space=spaces["full"], **{**OPTIONS, "trials": 8, "measurements": 4}
    )
    assert any("does it judge the model that it is given" in text for text in result.run.warnings)


@pytest.mark.parametrize("change", ["another's", "flipped"])
def test_a_model_that_is_not_the_runs_is_not_loaded(change: str, run: Path) -> None:
    point = autocomp.SearchResult(run).front[0]
    file = run / "models" / point.candidate.id / "model.safetensors"
    content = bytearray(file.read_bytes() or b"nothing was exported here")
    content[-2] ^= 255
    file.write_bytes(content if change == "flipped" else bytes(content) + b"more")
    with pytest.raises(UsageError, match="is not the file that the run wrote"):
        point.load()


def test_a_model_of_a_front_that_was_not_written_any_more_is_not_loaded(run: Path) -> None:
    """Stopped at its end, a run that trained a point has its new files, and the front with what it was before."""
    point = autocomp.SearchResult(run).front[0]
    file = run / "models" / point.candidate.id / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["metrics"]["accuracy"] += 0.01
    file.write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match=r"other metrics than front\.json says"):
        point.load()


@pytest.mark.slow
def test_what_another_compiler_measured_is_measured_again(
    run: Path, resume: Callable[..., autocomp.SearchResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(found_module, "version", lambda name: "99.0")
    again = resume().run
    assert any("compiled by another TVM" in text for text in again.warnings)
    assert any("was begun with torch" in text for text in again.warnings)


def test_deleted_trials_are_noticed(tmp_path: Path) -> None:
    url, space = f"sqlite:///{tmp_path / 'study.db'}", Choices({"g": (4, 3, 2, 1)}, {})
    search = open_search(url, "run", space)
    for _ in range(3):
        search.ask()
    search.close()
    with sqlite3.connect(tmp_path / "study.db") as database:
        database.execute("delete from trials where number = 1")
    with pytest.raises(UsageError, match="trials were deleted from the study"):
        open_search(url, "run", space, resume=True)


def test_files_of_points_that_left_the_front_go(
    run: Path, resume: Callable[..., autocomp.SearchResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {e.candidate.id for e in read_evaluations(run)}
    shown = {p.candidate.id for p in autocomp.SearchResult(run).front}
    gone = run / "models" / sorted(told - shown)[0]
    gone.mkdir()
    (gone / "model.onnx").write_bytes(b"of an earlier front")

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("autocomp.run.finish.write_front", stopped)
        with pytest.raises(Interrupted):
            resume()
    assert gone.exists()  # the front that is there may have it
    again = resume()
    assert gone.exists() == (gone.name in {p.candidate.id for p in (*again.front, again.dense)})


def test_manifests_and_tables_have_the_times_of_the_front(finished: Path) -> None:
    result = autocomp.SearchResult(finished)
    rows = {e.candidate.id: e for e in read_evaluations(finished)}
    for point in result.front:
        manifest = json.loads((finished / "models" / point.candidate.id / "manifest.json").read_text())
        for profile, latency in point.latency.items():
            assert manifest["latency"][profile]["seconds"] == latency.seconds
            row = rows[point.candidate.id]
            assert row.latency[profile].seconds == pytest.approx(latency.seconds)
            assert row.earlier[profile].seconds == pytest.approx(point.record.evaluation.earlier[profile].seconds)
            dense = result.dense.record.evaluation
            assert speedup(row, dense, profile) == pytest.approx(speedup(point.record.evaluation, dense, profile))


@pytest.mark.slow
def test_power_that_is_stated_anew_counts_for_all(tmp_path: Path, spaces: dict[str, str]) -> None:
    profile = tmp_path / "mine.yaml"

    def search(watts: float, **options: Any) -> autocomp.SearchResult:
        profile.write_text(
            (ROOT / "hardware_profiles/x86-host.yaml").read_text().replace("name: x86-host", "name: mine")
            + f"power: {{idle: 1.0, load: {1.0 + watts}}}\n"
        )
        given = {**OPTIONS, "profiles": [str(profile)], "space": spaces["full"], "max_energy": 1.0, **options}
        return autocomp.search(task=tiny_task.task(), out=tmp_path / "run", **given)

    search(2.0)
    result = search(20.0, trials=12, measurements=3, resume=True)
    evaluations = [result.dense.record.evaluation, *(p.record.evaluation for p in result.front)]
    assert {latency.watts for e in evaluations for latency in (*e.latency.values(), *e.earlier.values())} == {20.0}


def test_a_caller_s_random_numbers_go_on(tmp_path: Path, spaces: dict[str, str], without_exports: None) -> None:
    task = tiny_task.task()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    autocomp.search(task=task, out=tmp_path / "run", space=spaces["full"], seed=3, **OPTIONS)
    assert torch.equal(torch.rand(3), expected)


def test_a_second_search_in_the_same_process_is_refused(tmp_path: Path, spaces: dict[str, str]) -> None:
    inner: list[str] = []
    task = tiny_task.task()
    judge = task.evaluate

    def evaluate(model: torch.nn.Module) -> Any:
        if not inner:
            inner.append("")
            with pytest.raises(UsageError, match="a search from within") as caught:
                autocomp.search(task=tiny_task.task(), out=tmp_path / "inner", space=spaces["full"], **OPTIONS)
            inner[0] = str(caught.value)
        return judge(model)

    task.evaluate = evaluate
    autocomp.search(task=task, out=tmp_path / "outer", space=spaces["full"], **OPTIONS)
    assert inner[0]
    assert not (tmp_path / "inner").exists()


def test_a_time_limit_off_the_main_thread_is_refused(tmp_path: Path) -> None:
    said: list[str] = []

    def work() -> None:
        try:
            autocomp.search(task=tiny_task.task(), out=tmp_path / "run", evaluate_timeout=2.0, **OPTIONS)
        except UsageError as error:
            said.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert said
    assert "main thread alone" in said[0]


def test_a_folder_that_was_moved_meanwhile_is_told(tmp_path: Path, spaces: dict[str, str]) -> None:
    task, out = tiny_task.task(), tmp_path / "run"
    judge = task.evaluate

    def evaluate(model: torch.nn.Module) -> Any:
        if (out / "study.journal").exists() and not (tmp_path / "moved").exists():
            out.rename(tmp_path / "moved")
        return judge(model)

    task.evaluate = evaluate
    with pytest.raises(AutocompError, match="is not there any more"):
        autocomp.search(task=task, out=out, space=spaces["full"], **OPTIONS)
    assert not (out / "front.json").exists()


def test_identity_is_the_same_in_another_process() -> None:
    code = "import tiny_task, json; from autocomp.run.identity import identity_of; print(json.dumps(identity_of(tiny_task.task())))"
    tests = Path(tiny_task.__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=tests, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == identity_of(tiny_task.task())


def test_source_is_what_a_function_does_and_not_how_it_is_written(tmp_path: Path) -> None:
    def of(text: str) -> str:
        path = tmp_path / "module.py"
        path.write_text(text)
        names: dict[str, Any] = {}
        exec(compile(text, str(path), "exec"), names)
        return source_of(names["judge"])

    first = of("def judge(model):\n    return {'a': 1.0}\n")
    assert of("# judged\ndef judge(model):  # so\n\n    return {'a':1.0}\n") == first
    assert of("def judge(model):\n    return {'a': 2.0}\n") != first
    made = [eval(text) for text in ("lambda m: {'a': 1.0}", "lambda m: {'a': 1.0}", "lambda m: {'a': 2.0}")]  # no file
    assert source_of(made[0]) == source_of(made[1]) != source_of(made[2])
    assert source_of(None) == "none"


@pytest.mark.parametrize("damage", ["missing", "empty", "text", "cut"])
def test_a_lost_study_is_not_begun_anew_over_its_results(damage: str, run: Path, resume: Callable[..., Any]) -> None:
    database = run / "study.journal"
    content = database.read_bytes()
    if damage == "missing":
        database.unlink()
    else:
        kept = {"empty": b"", "text": b"no database at all" * 100, "cut": content[: len(content) // 2]}
        database.write_bytes(kept[damage])
    for part in run.glob(".study.journal*"):
        part.unlink()
    before = contents(run)
    with pytest.raises(UsageError, match=r"another --out|cannot be read") as caught:
        resume()
    assert len(str(caught.value).splitlines()) == 1
    assert {k: v for k, v in contents(run).items() if not k.startswith(".study.journal")} == before
    database.write_bytes(content)
    assert len(resume().front) > 0


def test_results_without_their_settings_are_not_written_over(run: Path, spaces: dict[str, str]) -> None:
    (run / "config.yaml").unlink()
    before = contents(run)
    with pytest.raises(UsageError, match=r"holds parts of a run .*front\.json"):
        autocomp.search(task=tiny_task.task(), out=run, space=spaces["full"], **OPTIONS)
    assert contents(run) == before


@pytest.mark.slow
def test_two_runs_of_one_name_share_a_database(tmp_path: Path, spaces: dict[str, str]) -> None:
    storage = f"sqlite:///{tmp_path / 'shared.db'}"

    def search(folder: str, resume: bool = False) -> autocomp.SearchResult:
        out = tmp_path / folder / "run"
        return autocomp.search(
            task=tiny_task.task(), out=out, space=spaces["full"], storage=storage, resume=resume, **OPTIONS
        )

    found = [search(folder) for folder in ("a", "b")]
    names = {study.study_name for study in open_storage(storage).get_all_studies()}
    assert len(names) == 2
    assert all(name.startswith("run-") for name in names)
    assert [result.run.summary.told for result in found] == [4, 4]
    shutil.move(tmp_path / "a", tmp_path / "c")  # a folder that moved is the same run
    assert search("c", resume=True).run.summary.told == 4
    # a copy is not: it has files of its own, and one study with the other
    shutil.copytree(tmp_path / "c", tmp_path / "d")
    with pytest.raises(UsageError, match=r"is a copy: its study .* still there\. Go on in that folder"):
        search("d", resume=True)
    (tmp_path / "c" / "run" / "run.json").unlink()
    with pytest.raises(UsageError, match=r"run\.json"):
        search("c", resume=True)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A study that another process searches in, and that process."""
    url = f"sqlite:///{tmp_path / 'held.db'}"
    open_search(url, "run", Choices({"g": (2, 1)}, {})).close()
    code = (
        "import time; from autocomp.study.storage import Claim, open_storage\n"
        f"storage = open_storage({url!r}); claim = Claim(storage, storage.get_study_id_from_name('run'), {url!r})\n"
        "print('held', flush=True); time.sleep(600)"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    yield url, child
    child.kill()
    child.communicate()


def test_a_study_at_work_is_refused_until_its_process_is_gone(holder: tuple[str, subprocess.Popen[str]]) -> None:
    url, child = holder
    space = Choices({"g": (2, 1)}, {})
    for attempt in (lambda: read_study(url, "run"), lambda: open_search(url, "run", space, resume=True)):
        with pytest.raises(UsageError, match=f"another process \\({child.pid} on .*wait for it"):
            attempt()
    child.kill()
    child.wait()
    search = open_search(url, "run", space, resume=True)
    asked = search.ask()
    assert asked is not None
    search.close()


def test_of_two_that_find_a_study_free_at_once_one_is_refused(tmp_path: Path) -> None:
    """The second has read that nobody holds it before the first says so, and says so itself after the first has looked."""
    url = f"sqlite:///{tmp_path / 'both.db'}"
    open_search(url, "run", Choices({"g": (2, 1)}, {})).close()
    code = (
        "import sys, time\n"
        "from autocomp.errors import UsageError\n"
        "from autocomp.study.storage import Claim, open_storage\n"
        f"storage = open_storage({url!r})\n"
        "study, say = storage.get_study_id_from_name('run'), storage.set_study_user_attr\n"
        "print('ready', flush=True), sys.stdin.readline()\n"
        "storage.set_study_user_attr = lambda *given: (time.sleep(float(sys.argv[1])), say(*given))\n"
        "try:\n"
        f"    Claim(storage, study, {url!r})\n"
        "    print('held', flush=True), sys.stdin.readline()\n"
        "except UsageError as error:\n"
        "    print(str(error)[:15], flush=True)\n"
    )
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([sys.executable, "-c", code, delay], **pipes) for delay in ("0", "0.4")]
    try:
        assert [child.stdout.readline() for child in both if child.stdout] == ["ready\n"] * 2
        for child in both:
            assert child.stdin is not None
            child.stdin.write("go\n")
            child.stdin.flush()
        assert sorted(child.stdout.readline() for child in both if child.stdout) == ["another process\n", "held\n"]
    finally:
        for child in both:
            child.kill()
            child.communicate()


def test_a_process_of_another_machine_counts_as_gone_after_a_while(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'far.db'}"
    open_search(url, "run", Choices({"g": (2, 1)}, {})).close()
    storage = open_storage(url)
    study = storage.get_study_id_from_name("run")
    far = {"token": "t", "host": "elsewhere ? ?", "pid": 1, "started": "1"}
    storage.set_study_user_attr(study, "owner", {**far, "seen": time.time()})
    with pytest.raises(UsageError, match="1 on elsewhere"):
        Claim(storage, study, url)
    storage.set_study_user_attr(study, "owner", {**far, "seen": time.time() - 7200})
    Claim(storage, study, url).release()


@pytest.mark.slow
def test_what_another_machine_measured_is_measured_again(run: Path, resume: Callable[..., Any]) -> None:
    url = f"journal:///{run / 'study.journal'}"
    storage = open_storage(url)
    study = storage.get_study_id_from_name("autocomp")
    storage.set_study_user_attr(study, "targets", {"x86-host": "another"})
    before = times(run)
    result = resume()
    assert any("another machine" in text for text in result.run.warnings)
    after = times(run)
    assert len(after) == len(before) > 1
    assert not after & before


def times(run: Path) -> set[float]:
    """Seconds of all that a run has measured."""
    told = read_evaluations(run)
    return {evaluation.latency["x86-host"].seconds for evaluation in told if evaluation.state == "measured"}


def test_changed_judgement_is_said(run: Path, resume: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    data = tiny_task.data

    def relabelled(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, labels = data(count, seed)
        return inputs, (labels + (seed == 3)) % tiny_task.CLASSES

    monkeypatch.setattr(tiny_task, "data", relabelled)
    result = resume()
    assert any("judges the uncompressed model otherwise" in text for text in result.run.warnings)


def test_passwords_are_masked_and_their_file_is_private(tmp_path: Path, spaces: dict[str, str]) -> None:
    assert masked("postgresql://me:secret@host/db") == "postgresql://me:***@host/db"
    for url in (
        "postgresql://me@srv:secret@host/db", "postgresql://me:sec:ret@host/db", "mysql+pymysql://host/db?user=me&password=secret",
        "sqlite:///file:/tmp/q.db?uri=true&Password=secret", "postgresql://me:s@secret@host/db",
    ):  # fmt: skip
        assert "secret" not in masked(url), url
        assert "ret@" not in masked(url), url
    for url in ("sqlite:///runs/q.db", "postgresql://me@host:5432/db", "--storage=sqlite:///a@b.db"):
        assert masked(url) == url
    out = tmp_path / "run"
    storage = f"sqlite://user:secret@/{tmp_path / 'x.db'}"
    with pytest.raises(UsageError) as caught:
        autocomp.search(task=tiny_task.task(), out=out, space=spaces["full"], storage=storage, **OPTIONS)
    assert "secret" not in str(caught.value)
    from autocomp.config.settings import load_settings
    from autocomp.run.folder import open_run_folder

    open_run_folder(load_settings(None, {"task": "digits", "out": str(out), "storage": storage}), resume=False)
    assert stat.S_IMODE((out / "config.yaml").stat().st_mode) == 0o600


def test_a_layer_of_another_name_is_not_taken(run: Path, resume: Callable[..., autocomp.SearchResult]) -> None:
    """Files of equal shapes, swapped: each checks by itself."""
    files = sorted((run / "layers").glob("layer-*.bin"))
    first, second = files[0].read_bytes(), files[1].read_bytes()
    before = {p.candidate.id: dict(p.metrics) for p in autocomp.SearchResult(run).front}
    files[0].write_bytes(second)
    files[1].write_bytes(first)
    with pytest.raises(CorruptError, match="or another's content"):
        read_checked(files[0])
    again = resume()
    assert {p.candidate.id: dict(p.metrics) for p in again.front}.items() >= before.items()


@pytest.mark.slow
def test_an_evaluate_that_writes_to_its_own_data_is_told(tmp_path: Path, spaces: dict[str, str]) -> None:
    task = tiny_task.task()
    inputs, labels = tiny_task.data(64, 3)
    inputs = inputs + 1.0

    def drifting(model: torch.nn.Module) -> dict[str, float]:
        inputs.sub_(inputs.mean() * 0.5)
        return {"accuracy": float((model(inputs).argmax(1) == labels).float().mean()) + float(inputs.mean())}

    task.evaluate = drifting
    result = autocomp.search(task=task, out=tmp_path / "run", space=spaces["full"], **OPTIONS)
    assert any("judges the same model otherwise when it is asked again" in text for text in result.run.warnings)


@pytest.mark.slow
def test_a_task_may_change_the_working_folder(
    tmp_path: Path, spaces: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "moving_task.py").write_text(
        f"import os, tiny_task\ndef task():\n    os.chdir({str(tmp_path)!r})\n    return tiny_task.task()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path / "here")
    result = autocomp.search(task="moving_task:task", out="runs/x", space=spaces["full"], **OPTIONS)
    assert result.folder == tmp_path / "here" / "runs" / "x"
    assert result.report.exists()


def test_a_study_of_an_earlier_time_is_refused(run: Path, resume: Callable[..., Any]) -> None:
    study = run / "study.journal"
    lines = study.read_bytes().splitlines(keepends=True)
    study.write_bytes(b"".join(lines[: len(lines) * 2 // 3]))
    with pytest.raises(UsageError, match=r"it was cut, or is a copy of an earlier time"):
        resume()


def test_a_database_put_back_from_before_the_last_results_is_refused(run: Path) -> None:
    provenance = json.loads((run / "provenance.json").read_text())
    assert provenance["results_written"] == 1
    found = Recorded({folder_module.WRITTEN: 1}, finished=1000)
    folder_module._refuse_older(found, run)
    (run / "provenance.json").write_text(
        json.dumps({**provenance, "results_written": 2})
    )  # a training told no new trial
    with pytest.raises(UsageError, match=r"it was cut, or is a copy of an earlier time"):
        folder_module._refuse_older(found, run)


@pytest.mark.parametrize("lines", [1, 12, -1])
def test_settings_whose_end_is_missing_are_refused(lines: int, run: Path, resume: Callable[..., Any]) -> None:
    config = run / "config.yaml"
    config.write_text("".join(config.read_text().splitlines(keepends=True)[:lines]))
    before = contents(run)
    with pytest.raises(UsageError, match=r"config\.yaml is not whole: its last line"):
        resume()
    assert contents(run) == before
