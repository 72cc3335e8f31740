"""The report: records that read back as written, and a page made from the files alone that loads nothing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from fake_run import make_run, write_fake_run
from places import TESTS

from autocomp.errors import CorruptError, UsageError
from autocomp.records.evaluation import Reference, Sensitivity
from autocomp.records.latency import Latency
from autocomp.records.run import OURS, Run, comparable, comparable_reference, read_run, speedup, write_front
from autocomp.records.table import read_evaluations, write_evaluations
from autocomp.report.build import build_report, render, render_sensitivity
from autocomp.report.curves import sensitivity_figures
from autocomp.report.figures import Metric, front_figure, milliseconds
from autocomp.run.result import SearchResult

GOLDEN = TESTS / "golden"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fake_run(tmp_path_factory.mktemp("run"))


class Page(HTMLParser):
    """Text outside scripts and styles, ids, and every address an element would load or link."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.ids, self.loads, self.links, self.skip = "", [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.skip = tag if tag in ("script", "style") else self.skip
        if values.get("id"):
            self.ids.append(values["id"])
        self.loads += [values["src"]] if "src" in values else []
        if "href" in values:
            (self.loads if tag == "link" else self.links).append(values["href"])

    def handle_endtag(self, tag: str) -> None:
        self.skip = "" if tag == self.skip else self.skip

    def handle_data(self, data: str) -> None:
        self.text += "" if self.skip else data


def page(run: Run, *more: Any) -> Page:
    return Page(render(run, *more))


def test_records_round_trip(tmp_path: Path) -> None:
    run, told = make_run()
    write_front(tmp_path, run)
    write_evaluations(tmp_path, told)
    assert read_run(tmp_path) == run
    back = read_evaluations(tmp_path)
    assert len(back) == len(told)
    for ours, theirs in zip(told, back, strict=True):
        assert theirs.candidate == ours.candidate
        assert (theirs.trial, theirs.source, theirs.state, theirs.tier) == (
            ours.trial,
            ours.source,
            ours.state,
            ours.tier,
        )
        assert theirs.metrics == ours.metrics
        assert theirs.failure == ours.failure
        assert theirs.kl == pytest.approx(ours.kl)
        for profile, latency in ours.latency.items():
            assert theirs.latency[profile].seconds == pytest.approx(latency.seconds)
            assert (theirs.latency[profile].how, theirs.latency[profile].spread) == (latency.how, latency.spread)


def test_csv_is_a_plain_table(folder: Path) -> None:
    import pandas as pd

    table = pd.read_csv(folder / "evaluations.csv")
    assert list(table.columns[:7]) == ["id", "trial", "source", "state", "tier", "error", "kl"]
    assert {"metric:accuracy/noisy", "predicted_ms:x86-host", "latency_ms:x86-host", "latency_how:x86-host"} <= set(
        table
    )
    assert table["id"].is_unique
    assert json.loads(table["methods"][0])["stem"] == "fp32"
    assert set(table.loc[table["latency_ms:x86-host"].notna(), "latency_how:x86-host"]) == {"measured"}


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    run, told = make_run()
    strange = replace(told[5], error=float("inf"), kl=float("nan"), failure="nan, it says", state="failed")
    write_front(tmp_path, replace(run, hypervolume=(0.1, float("nan"))))
    assert "NaN" not in (tmp_path / "front.json").read_text()
    write_evaluations(tmp_path, [strange])
    assert read_evaluations(tmp_path)[0].failure == "nan, it says"
    write_evaluations(tmp_path, [])
    assert read_evaluations(tmp_path) == []


def test_files_of_the_first_format_still_read(tmp_path: Path) -> None:
    """``golden/run_v1`` lies as the first format wrote it; it must read, and be written back the same."""
    run = read_run(GOLDEN / "run_v1")
    assert run.task.objective == "accuracy"
    assert [point.evaluation.candidate.id for point in run.front] == ["e13b14005a", "24392c2d1f"]
    assert run.front[0].verified["so"].ok
    write_front(tmp_path, run)
    again = json.loads((tmp_path / "front.json").read_text())
    del again["checksum"]  # a later addition
    assert again == json.loads((GOLDEN / "run_v1/front.json").read_text())
    evaluations = read_evaluations(GOLDEN / "run_v1")
    write_evaluations(tmp_path, evaluations)
    assert (tmp_path / "evaluations.csv").read_text() == (GOLDEN / "run_v1/evaluations.csv").read_text()
    assert "accuracy" in page(run, evaluations).text


@pytest.mark.parametrize("file", ["front.json", "evaluations.csv", "provenance.json", "config.yaml"])
def test_a_newer_format_is_refused_with_what_to_do(tmp_path: Path, file: str) -> None:
    write_fake_run(tmp_path)
    path = tmp_path / file
    text = path.read_text()
    if file == "evaluations.csv":
        text = re.sub(r",1$", ",2", text, flags=re.MULTILINE)
    else:
        text = re.sub(r'("?format_version"?: )1', r"\g<1>2", text, count=1)
    path.write_text(text)
    message = rf"{file} has format_version 2, and this autocomp reads up to 1: .*pip install --upgrade autocomp"
    with pytest.raises(UsageError, match=message):
        build_report(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "kind", "message"),
    [
        ("front.json", "{", CorruptError, "does not read as JSON"),
        ("front.json", "[]", CorruptError, "must hold a mapping"),
        ("front.json", '{"format_version": 1}', CorruptError, "format_version 1 but not its content .KeyError: 'task'"),
        ("evaluations.csv", "id,trial\nx,one\n", CorruptError, "does not read as a table of evaluations"),
        ("provenance.json", "[1]", CorruptError, "must hold a mapping"),
        ("config.yaml", "a: [", CorruptError, "not valid YAML"),
        ("front.json", None, UsageError, "holds no front.json: it is no run folder"),
        ("evaluations.csv", None, UsageError, "holds no evaluations.csv"),
    ],
)
def test_broken_folders_are_named(
    tmp_path: Path, file: str, content: str | None, kind: type[Exception], message: str
) -> None:
    write_fake_run(tmp_path)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_text(content)
    with pytest.raises(kind, match=message):
        build_report(tmp_path)


def test_rebuild_needs_neither_torch_nor_tvm(tmp_path: Path) -> None:
    write_fake_run(tmp_path)
    code = (
        "import sys; from pathlib import Path; from autocomp.report.build import build_report; "
        "build_report(Path(sys.argv[1])); print(*sorted(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert not {"torch", "tvm", "optuna", "onnxruntime", "sklearn"} & set(done.stdout.split())
    assert 1_500_000 < (tmp_path / "report.html").stat().st_size < 2_500_000  # plotly's script is in it, deflated


def test_page_loads_nothing_and_links_only_what_exists(folder: Path) -> None:
    found = Page(build_report(folder).read_text(encoding="utf-8"))
    assert all(address.startswith("data:") for address in found.loads)
    assert len(found.ids) == len(set(found.ids))
    for link in found.links:
        if link.startswith("#"):
            assert link[1:] in found.ids
        else:
            assert (folder / link).exists(), link


def test_files_of_a_point_as_it_was_trained_since_are_not_linked(tmp_path: Path) -> None:
    folder = write_fake_run(tmp_path)
    point = next(p for p in read_run(folder).front if "manifest" in p.files)
    place = folder / point.files["manifest"]
    manifest = {"metrics": dict(point.evaluation.metrics)}
    place.write_text(json.dumps(manifest))
    assert point.files["manifest"] in Page(build_report(folder).read_text(encoding="utf-8")).links
    name, value = next(iter(manifest["metrics"].items()))
    place.write_text(json.dumps({"metrics": {**manifest["metrics"], name: value + 0.01}}))
    page = Page(build_report(folder).read_text(encoding="utf-8"))
    assert not any(point.evaluation.candidate.id in link for link in page.links if not link.startswith("#"))
    assert "as it was trained since" in page.text


def test_a_table_of_another_run_is_refused(tmp_path: Path) -> None:
    folder = write_fake_run(tmp_path)
    assert build_report(folder)
    table = folder / "evaluations.csv"
    table.write_text("\n".join(table.read_text().splitlines()[:-2]) + "\n")
    with pytest.raises(CorruptError, match="is not the table that front"):
        build_report(folder)


def test_goals_are_those_of_the_front_not_of_an_edited_config(tmp_path: Path) -> None:
    folder = write_fake_run(tmp_path)
    run, told = read_run(folder), read_evaluations(folder)
    write_evaluations(folder, told)
    write_front(folder, replace(run, goals={"max_size": "1.5x"}, family=("2x",)))
    assert read_run(folder).goals == {"max_size": "1.5x"}
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("max_size: null", "max_size: 100x").replace("99x", "77x"))
    text = " ".join(Page(build_report(folder).read_text(encoding="utf-8")).text.split())
    assert "77x" not in text
    assert "size of the weights" in text


def test_page_says_what_was_found(folder: Path) -> None:
    text = Page(build_report(folder).read_text(encoding="utf-8")).text
    run = read_run(folder)
    for point in run.front:
        assert point.evaluation.candidate.id in text
    for expected in (
        "ONNX Runtime int8",
        "knee",
        "goals met",
        "LLVM ran out of registers",
        "AMD EPYC",
        "Read this first",
    ):
        assert expected in text
    assert "Every latency on this front was measured" in " ".join(text.split())


def test_figures_are_valid_plotly(folder: Path) -> None:
    import plotly.graph_objects as go

    html = build_report(folder).read_text(encoding="utf-8")
    match = re.search(r'id="figures">(.*?)</script>', html, re.DOTALL)
    assert match is not None
    style = (Path(build_report.__code__.co_filename).parent / "report.css").read_text()
    for name in set(re.findall(r'"@([a-z]+)"', match[1])):
        assert style.count(f"--{name}:") == 3  # light, dark by the system, dark by the button
    figures = json.loads(re.sub(r'"@[a-z]+"', '"#123456"', match[1]))
    drawn = {"front-0", "hypervolume", "proxy-error", "proxy-kl", "prediction-0"}
    assert set(figures) == drawn | {"sensitivity-width", "sensitivity-precision"}
    for figure in figures.values():
        go.Figure(figure)  # raises for a property plotly does not know


def test_estimates_say_so() -> None:
    run, told = make_run()

    def estimated(latency: Latency) -> Latency:
        return replace(latency, how="estimated", error=0.08, spread=0.0)

    def change(e: Any) -> Any:
        return replace(e, latency={name: estimated(latency) for name, latency in e.latency.items()})

    front = tuple(replace(point, evaluation=change(point.evaluation)) for point in run.front)
    text = " ".join(page(replace(run, front=front), told).text.split())
    assert "estimated ± 8.0 %" in text
    assert "Some points here are estimated" in text
    figure = front_figure(replace(run, front=front), told, "x86-host", None, {})
    assert "estimated or measured" in figure["layout"]["xaxis"]["title"]["text"]


def test_texts_are_escaped() -> None:
    run, told = make_run()
    evil = "<img src=x onerror=alert(1)></script><script>"
    run = replace(
        run,
        task=replace(run.task, name=evil, description=evil),
        warnings=(evil,),
        references=tuple(replace(reference, name=evil) for reference in run.references),
    )
    told[-1] = replace(told[-1], state="failed", failure=evil)
    html = render(run, told, {"task": evil}, {"command": evil})
    assert evil not in html
    assert "<img" not in html.replace("plotly", "").split("<script>")[0]


def test_two_profiles_and_lower_is_better() -> None:
    run, told = make_run(profiles=("x86-host", "x86-64-v3"))
    found = page(run, told)
    assert {"front-0", "front-1", "prediction-1"} <= set(found.ids)

    def inverted(metrics: Any) -> dict[str, float]:
        return {"loss": 3.0 * (1.1 - metrics["accuracy"])}

    front = tuple(
        replace(p, evaluation=replace(p.evaluation, metrics=inverted(p.evaluation.metrics)), test_metrics={})
        for p in run.front
    )
    dense = replace(
        run.dense,
        evaluation=replace(run.dense.evaluation, metrics=inverted(run.dense.evaluation.metrics)),
        test_metrics={},
    )
    task = replace(run.task, objective="loss", higher_is_better=False, unit="")
    text = page(replace(run, task=task, front=front, dense=dense, baselines=(), references=()), told).text
    assert "validation" in text
    assert "%)" not in re.sub(r"\s+", "", text.split("Points of the front")[1].split("Where the time goes")[0])


def test_dense_or_uniform_on_the_front_appear_once() -> None:
    run, told = make_run()
    uniform = replace(run.front[0], evaluation=run.baselines[0])
    found = page(replace(run, front=(*run.front, run.dense, uniform)), told)
    assert len(found.ids) == len(set(found.ids))
    assert f"p-{run.baselines[0].candidate.id}" in found.ids


def test_nothing_measured_still_makes_a_page() -> None:
    run, told = make_run()
    dense = replace(run.dense, evaluation=replace(run.dense.evaluation, latency={}, metrics={}), test_metrics={})
    empty = replace(run, dense=dense, front=(), baselines=(), references=(), hypervolume=(), layers=(), warnings=())
    assert "No point was measured" in page(empty, []).text
    assert "No point was measured" in page(empty, [replace(told[3], latency={}, metrics={})]).text


def test_goals_that_nothing_meets_are_admitted() -> None:
    run, told = make_run()
    goals = {"goals": {"max_drop": None, "max_latency": 1e-9, "max_size": None}}
    text = page(run, told, goals).text
    assert "No delivered candidate meets the goals" in text
    assert "is the knee" in text


def test_units() -> None:
    run, _ = make_run()
    metric = Metric(run)
    assert (metric.text(0.9742), metric.bare(0.9742), metric.text(None)) == ("97.4 %", "97.4", "–")
    assert (metric.change(0.97, 0.98), metric.change(0.98, 0.98), metric.change(0.99, 0.98)) == (
        "−1.0 pt",
        "±0 pt",
        "+1.0 pt",
    )
    plain = Metric(replace(run, task=replace(run.task, unit="")))
    assert (plain.text(0.12345), plain.change(0.5, 0.25)) == ("0.1235", "+0.25")
    other = Metric(replace(run, task=replace(run.task, unit="dB")))
    assert (other.title, other.text(12.3456), other.bare(12.3456)) == ("accuracy (dB)", "12.35 dB", "12.35")
    assert [milliseconds(s) for s in (5.484e-6, 2.344e-5)] == [
        "0.00548 ms",
        "0.0234 ms",
    ]  # small models take microseconds
    assert [milliseconds(s) for s in (1.234e-4, 1.234e-3, 0.01234, 1.234)] == [
        "0.123 ms",
        "1.23 ms",
        "12.3 ms",
        "1234 ms",
    ]


def test_a_password_is_not_on_the_page(tmp_path: Path) -> None:
    folder = write_fake_run(tmp_path)
    with (folder / "config.yaml").open("a") as file:
        file.write("storage: postgresql://me:s3cret@host/db\n")
    page = build_report(folder).read_text(encoding="utf-8")
    assert "s3cret" not in page
    assert "postgresql://me:***@host/db" in page


def test_what_ours_compiled_is_not_corrected_for_calls_from_python() -> None:
    run, _ = make_run()
    dense = run.dense.evaluation.latency["x86-host"]
    own, runtime, classic = (
        Reference(name, {}, replace(dense, seconds=dense.seconds * slower), 1, kind=kind)
        for name, slower, kind in (
            (f"{OURS}", 1.25, "runtime"),
            ("ONNX Runtime fp32", 2.5, "runtime"),
            ("uniform L1", 0.5, "classic"),
        )
    )
    run = replace(run, references=(own, runtime, classic))
    assert comparable_reference(runtime, run) == pytest.approx(2 * dense.seconds)
    assert comparable_reference(classic, run) == pytest.approx(0.5 * dense.seconds)


def test_classic_recipes_are_told_from_other_runtimes() -> None:
    run, told = make_run()
    figure = front_figure(run, told, next(iter(run.profiles)), None, {})
    drawn = {trace["name"]: trace["marker"] for trace in figure["data"]}
    classic, runtime = drawn["uniform L1, 50% kept"], drawn["ONNX Runtime int8"]
    assert classic["symbol"] != runtime["symbol"]
    assert classic["color"] != runtime["color"]
    # The headline compares with the fastest other runtime: a classic recipe is not one, however fast.
    html = page(run, told).text
    assert "faster than ONNX Runtime int8" in html
    assert "faster than uniform L1" not in html


def test_curves_of_sensitivity_stand_in_the_report_and_on_a_page_of_their_own() -> None:
    run, told = make_run()
    html = page(run, told).text
    assert "Which layers are sensitive" in html
    assert "Lower rank" not in html  # no row of this run is of a rank
    assert "Which layers are sensitive" not in page(replace(run, sensitivity=()), told).text
    drawn = sensitivity_figures(run.sensitivity)
    assert set(drawn) == {"sensitivity-width", "sensitivity-precision"}
    traces = drawn["sensitivity-width"]["data"]
    assert [trace["name"] for trace in traces if trace["showlegend"]] == [f"block{k}" for k in range(3, 9)]
    own = render_sensitivity("<task>", [*run.sensitivity, Sensitivity("free", "width", "8", 0.0, 0.5)])
    assert "&lt;task&gt;" in own
    assert "<task>" not in own
    masked = sensitivity_figures(
        [Sensitivity("stem", "mask", "2:4", 0.1, 0.5), Sensitivity("stem", "mask", "50%", 0.05, 0.6)]
    )
    assert masked["sensitivity-mask"]["data"][0]["mode"] == "markers"
    assert "free" in own  # in the table: a logarithm has no place for it
    assert json.loads(re.search(r'id="figures">(.*?)</script>', own)[1]).keys() == drawn.keys()


def test_points_timed_at_another_moment_are_shown_at_dense_s(tmp_path: Path) -> None:
    """Dense was twice as fast at the end: what was timed while searching alone is drawn, and compared, as if it had been as well."""
    run, told = make_run()
    profile = next(iter(run.profiles))
    dense = run.dense.evaluation
    slow = dense.latency[profile]
    fast = replace(slow, seconds=slow.seconds / 2)
    dense = replace(dense, latency={profile: fast}, earlier={profile: slow})
    again = replace(
        told[3],
        latency={profile: replace(slow, seconds=slow.seconds / 8)},
        earlier={profile: replace(slow, seconds=slow.seconds / 4)},
    )
    once = replace(told[4], latency={profile: replace(slow, seconds=slow.seconds / 4)}, earlier={})
    write_evaluations(tmp_path, [dense, again, once])
    for e in (*(again, once), *read_evaluations(tmp_path)[1:]):
        assert speedup(e, dense, profile) == pytest.approx(4)
        assert comparable(e, dense, profile) == pytest.approx(slow.seconds / 8)


@pytest.mark.parametrize("asked", ["2", "0x", "-2x", "nanx", 2])
def test_a_speed_up_that_is_none_is_bad_input(asked: Any) -> None:
    with pytest.raises(UsageError, match="speed-ups: must be"):
        SearchResult(TESTS / "golden" / "run_v1").family(asked)
