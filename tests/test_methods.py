import json
import shutil
import statistics
from argparse import Namespace
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
from runs_fixture import Runs

from dfkd.contradictions import check
from dfkd.errors import UserError
from dfkd.recipe import load_recipe

NOISE = """
base: tiny
generator: {arch: pixels}
synthesis: {steps: 0, redraw: 0}
distill: {steps: 40}
"""
FROZEN = """
base: tiny
synthesis: {student_steps: 0, losses: {adversary: 0}}
distill: {steps: 40}
"""
ROUNDS = """
base: tiny
synthesis: {steps: 8, inner: 3, student_steps: 4}
distill: {steps: 0, replay: 0}
"""
NO_IMAGES = ["data.dataset=none", *(f"teachers.{name}.weights=x.pt" for name in ("plain", "residual"))]


@pytest.fixture
def bench(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("methods")


@pytest.fixture
def equal(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("equal_time")


@pytest.fixture
def books(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("bookkeeping")


@pytest.fixture
def child(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("child")


@pytest.fixture
def here(children: list[tuple[str, dict[str, str]]], runs: Runs) -> list[tuple[str, dict[str, str]]]:
    """Four methods in the working directory, and the calls of children, which are called in this process."""
    for name, text in {"live": "base: tiny\n", "frozen": FROZEN, "rounds": ROUNDS, "noise": NOISE}.items():
        Path(f"{name}.yaml").write_text(text)
    return children


def line(method: str = "a", seed: int = 0, **given: Any) -> dict[str, Any]:
    usual = {
        **{"method": method, "seed": seed, "accuracy": 90.0, "n": 540, "agreement": 91.0, "seconds": 60.0},
        **{"class_agreement": {"t": 80.0}, "teachers": {"t": 98.5}, "student": "dfkd:x", "note": "", "peak_mb": 500.0},
        **{"memory": "process", "generator_updates": 1200, "student_updates": 4800, "device": "cpu, 1 threads"},
        **{"precision": "bf16", "versions": {"torch": "2"}, "curve": [[15.0, 50.0], [60.0, 90.0]]},
    }
    return {**usual, **given}


def rows(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()]


# --- arithmetic ---


def test_keys_read_as_written(books: ModuleType) -> None:
    keys = {"a": "1", "teachers.x.kwargs": "{k: 'v=w'}"}
    assert books.given_keys(books.written(keys), "all") == keys


@pytest.mark.parametrize(
    ("values", "form", "said"),
    [([], ".2f", "-"), ([3.14159], ".1f", "3.1"), ([1.0, 3.0], "+.2f", "+2.00 ± 1.41"), ([-1.0], "+.1f", "-1.0")],
)
def test_mean_and_deviation_in_words(books: ModuleType, values: list[float], form: str, said: str) -> None:
    assert books.with_deviation(values, form) == said


@pytest.mark.parametrize("budget", [7.0, 60.0, 3600.0])
def test_scaled_work_takes_the_budget_and_keeps_its_proportions(equal: ModuleType, budget: float) -> None:
    work, cost = equal.Work(600, 1, 4, 1200), equal.Cost(0.02, 0.005, run=1.0)
    scaled, note = equal.scale(work, cost, budget)
    seconds = 1.0 + scaled.rounds * (0.02 + 4 * 0.005) + scaled.frozen * 0.005
    assert seconds == pytest.approx(budget, abs=0.005)
    assert scaled.frozen / scaled.rounds == pytest.approx(2, rel=0.05)
    assert (scaled.inner, scaled.per, note) == (1, 4, "")


def test_what_a_run_costs_whatever_its_length_leaves_half_of_the_budget(equal: ModuleType) -> None:
    cost = equal.Cost(0.02, 0.005, run=100.0)  # a round takes 0.04 s
    assert equal.scale(equal.Work(600, 1, 4, 0), cost, 10.0) == (equal.Work(125, 1, 4, 0), "")


def test_noise_alone_is_scaled_too(equal: ModuleType) -> None:
    assert equal.scale(equal.Work(0, 1, 4, 2400), equal.Cost(9.0, 0.01), 30.0) == (equal.Work(0, 1, 4, 3000), "")


def test_rounds_stay_whole(equal: ModuleType) -> None:
    cost = equal.Cost(0.02, 0.01)  # a round takes 4 + 2 s
    assert equal.scale(equal.Work(10, 200, 200, 0), cost, 28.0) == (equal.Work(5, 200, 200, 0), "")
    scaled, note = equal.scale(equal.Work(10, 200, 200, 600), cost, 31.0)  # 6.6 s with the share of those afterwards
    assert (scaled, note) == (equal.Work(4, 200, 200, 700), "")
    assert cost.of(scaled) == pytest.approx(31.0)


@pytest.mark.parametrize("frozen", [0, 600])
def test_a_round_that_is_too_long_is_shortened_and_said_so(equal: ModuleType, frozen: int) -> None:
    cost = equal.Cost(0.02, 0.01)
    scaled, note = equal.scale(equal.Work(3, 1000, 500, frozen), cost, 10.0)
    assert scaled.rounds == 1
    assert scaled.inner / scaled.per == pytest.approx(2, rel=0.01)
    assert cost.of(scaled) == pytest.approx(10.0, rel=0.01)
    assert note == f"inner 1000 → {scaled.inner}, student_steps 500 → {scaled.per}"
    assert bool(scaled.frozen) == bool(frozen)


def test_the_cost_is_that_of_the_trials(equal: ModuleType, child: ModuleType) -> None:
    works = [equal.Work(10, 3, 1, 0), equal.Work(40, 3, 1, 0), equal.Work(1, 2, 1, 10), equal.Work(1, 2, 1, 300)]
    trials = [(work, 0.5 + 0.03 * work.rounds * work.inner + 0.002 * work.student) for work in works]
    assert child.fit_cost(trials) == pytest.approx((0.03, 0.002, 0.5))
    noise = [(equal.Work(0, 1, 0, size), 0.25 + 0.01 * size) for size in (10, 100)]
    assert child.fit_cost(noise) == pytest.approx((0, 0.01, 0.25), abs=2e-6)


@pytest.mark.parametrize(("common", "each"), [(0.0, 0.5), (3.0, 0.0047), (4.0, 0.0148), (0.2, 0.02)])
def test_probes_grow_until_their_updates_take_long_enough(
    equal: ModuleType, child: ModuleType, common: float, each: float
) -> None:
    """On a GPU what all runs have in common takes as long as hundreds of updates, which must not be priced by it."""
    runs = child.grown(lambda size: common + each * size, 2.5)
    assert [took for _, took in runs] == [common + each * size for size, _ in runs]
    beyond = [took - runs[0][1] for _, took in runs]
    assert beyond[-2] < 2.5 <= beyond[-1] < max(2.5 * 2.6, 11 * each)
    trials = [(equal.Work(0, 1, 0, size), took) for size, took in runs]
    assert child.fit_cost(trials).student == pytest.approx(each, rel=1e-3)


def test_no_update_looks_free_where_the_shorter_trial_was_disturbed(equal: ModuleType, child: ModuleType) -> None:
    disturbed = [(equal.Work(0, 1, 0, 10), 2.0), (equal.Work(0, 1, 0, 100), 1.0)]
    assert child.fit_cost(disturbed).student == pytest.approx(0.005)  # half of a hundredth of a second


def test_a_cost_is_the_one_that_was_measured_be_it_now_or_before(
    equal: ModuleType, books: ModuleType, bench: ModuleType, here: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    known, fresh = {"generator": 0.5, "student": 0.25, "run": 3.0}, {"generator": 0.7, "student": 0.1, "run": 2.0}
    books.add(Path("costs.jsonl"), {"method": "live", **known})
    monkeypatch.setattr(equal, "launch", lambda *_: {**fresh, "trials": []})
    methods = [bench.make_method(f"./{name}.yaml", {}, "plain") for name in ("live", "frozen")]
    alike = methods[0]._replace(name="live, another rate", priced="live")
    wanted = {"live": equal.Cost(**known), "frozen": equal.Cost(**fresh), "live, another rate": equal.Cost(**known)}
    for _ in range(2):
        with ThreadPoolExecutor(1) as lanes:
            assert equal.price([*methods, alike], Path(), {"seconds": 1.0, "threads": 1}, lanes) == wanted
    assert len(Path("costs.jsonl").read_text().splitlines()) == 2


def test_runs_at_once_share_the_cores(equal: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equal, "cores", lambda: 5)
    threads = [equal.settings_of(Namespace(seconds=0.0, lanes=lanes), {})["threads"] for lanes in (1, 2, 9)]
    assert threads == [5, 2, 1]


@pytest.mark.parametrize(("tasks", "before"), [("[distill]", 0), ("[generator,distill]", 40)])
def test_the_time_of_a_student_begins_with_the_training_before_it(
    equal: ModuleType, runs: Runs, tasks: str, before: int
) -> None:
    """Measuring, start-up and the teachers count nowhere."""
    recipe = load_recipe(runs.arguments("x", f"tasks={tasks}")).recipe
    seconds = {"before": 3.0, "teachers": 100.0, "generator": 40.0, "distill": 20.0, "measuring the student": 70.0}
    student = {"accuracy": 91.0, "n": 540, "agreement": {"percent": 93.0}, "last_quarter": None, "model": "dfkd:x"}
    results = {"student": student, "generator": {"class_agreement": {"plain": 80.0}}, "diversity": {}}
    results |= {"teachers": {"plain": {"accuracy": 98.0}}, "device": "cpu", "precision": "no", "versions": {}}
    runs.folder.joinpath("results.json").write_text(json.dumps({**results, "seconds": {**seconds, "total": 250.0}}))
    entries = [
        {"phase": phase, "step": k, "seconds": 150.0 + k, "trained": 5.0 * k, "accuracy": 40.0 + k}
        for phase in ("evaluation", "student")
        for k in (2, 4)
    ]
    runs.folder.joinpath("metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    method = equal.Method("a", "a", {}, recipe)
    line = equal.figures(method, 7, equal.Work(9, 2, 4, 5), "note", runs.folder, {"peak_mb": 5.0})
    assert line["seconds"] == before + 20
    assert line["curve"] == [(before + 10, 42.0), (before + 20, 44.0)]
    assert (line["seed"], line["generator_updates"], line["student_updates"]) == (7, 18, 41)
    assert (line["accuracy"], line["agreement"], line["class_agreement"]) == (91, 93, {"plain": 80})


def test_work_is_what_a_recipe_asks_for_and_changes_lead_to_it(
    bench: ModuleType, equal: ModuleType, books: ModuleType, here: list[tuple[str, dict[str, str]]]
) -> None:
    expected = {"live": (20, 1, 1, 10), "frozen": (20, 1, 0, 40), "rounds": (8, 3, 4, 0)}
    for name, of in expected.items():
        method = bench.make_method(f"./{name}.yaml", {}, "plain")
        assert equal.work_of(method.recipe) == of
        wanted = equal.Work(5, 1 if of[1] == 1 else 2, of[2], 7)
        keys = equal.changes(equal.Work(*of), wanted)
        assert set(keys) <= {"synthesis.steps", "synthesis.inner", "distill.steps"}
        assert equal.work_of(load_recipe(books.written({**method.keys, **keys})).recipe) == wanted
    assert equal.changes(equal.Work(1, 2, 3, 4), equal.Work(1, 2, 3, 4)) == {}


@pytest.mark.parametrize("name", ["live", "frozen", "rounds", "noise"])
def test_probes_are_runs_that_a_method_allows(
    bench: ModuleType, equal: ModuleType, child: ModuleType, here: list[Any], name: str
) -> None:
    recipe = bench.make_method(f"./{name}.yaml", {}, "plain").recipe
    own = equal.work_of(recipe)
    assert own.generator == {"live": 20, "frozen": 20, "rounds": 24, "noise": 0}[name]
    for probe in (child.generator_probe, child.student_probe) if own.rounds else (child.student_probe,):
        for size in (2, 10, 99):
            work = probe(own, size)
            synthesis = replace(recipe.synthesis, steps=work.rounds, inner=work.inner, student_steps=work.per)
            asked = replace(recipe, synthesis=synthesis, distill=replace(recipe.distill, steps=work.frozen))
            check(asked)
            found = equal.work_of(asked)
            assert (found.generator, found.student) == (work.generator, work.student)
            assert size * 0.6 <= (work.generator if probe is child.generator_probe else work.student) <= size + 1


# --- the table ---


def test_table_has_means_and_deviations_and_the_best_first(bench: ModuleType) -> None:
    accuracies = {"a": [90.0, 91.5, 94.0], "b": [95.0, 94.0, 98.5], "noise": [40.0]}
    lines = [
        line(name, seed, accuracy=value, seconds=58.0 + seed, peak_mb=500.0 + seed, class_agreement={"t": 80.0 + seed})
        for name, values in accuracies.items()
        for seed, value in enumerate(values)
    ]
    for each in lines:
        each["student_updates"] += 100 * each["seed"]
    lines[-1] |= {"class_agreement": None, "note": "inner 9 → 3", "seconds": 75.0}
    _, _, teacher, *found = rows(bench.table(lines, 60.0))
    assert teacher[:2] == ["teacher t", "98.50"]
    assert len({len(row) for row in rows(bench.table(lines, 60.0))}) == 1
    assert [row[0] for row in found] == ["b", "a", "noise"]
    for row in found[:2]:
        values = accuracies[row[0]]
        assert row[1] == f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f} (3)"
        assert row[2:] == ["59.0", "502", "1,200", "4,900", "81.0", ""]
    assert found[2] == [
        "noise",
        "40.00 (1)",
        "75.0",
        "500",
        "1,200",
        "4,800",
        "-",
        "took 75.0 s, not 60; inner 9 → 3",
    ]


@pytest.mark.parametrize(("seconds", "flagged"), [(47.9, True), (48.1, False), (71.9, False), (72.1, True)])
def test_time_that_is_off_by_a_fifth_is_flagged(bench: ModuleType, seconds: float, flagged: bool) -> None:
    note = bench.cells([line(seconds=60.0), line(seed=1, seconds=seconds)], 60.0)[-1]
    assert note == (f"took {seconds} s, not 60" if flagged else "")


# --- the same teacher and student ---


def test_every_method_of_the_project_has_the_same_teacher_and_student(bench: ModuleType, equal: ModuleType) -> None:
    names = bench.default_methods()
    assert len(names) > 10
    methods = [bench.make_method(name, {}, None) for name in names]
    bench.check_alike(methods)
    assert {len(method.recipe.zoo_specs) for method in methods if "zoo" not in method.name} == {1}
    assert [len(method.recipe.zoo_specs) for method in methods if "zoo" in method.name] == [3, 3]
    assert all(equal.work_of(method.recipe).student for method in methods)


def test_methods_that_are_no_match_are_refused(bench: ModuleType, here: list[tuple[str, dict[str, str]]]) -> None:
    Path("wide.yaml").write_text("base: tiny\nstudent: {kwargs: {width: 9}}\n")
    methods = [bench.make_method(f"./{name}.yaml", {}, "plain") for name in ("live", "wide")]
    with pytest.raises(UserError, match="wide and live are no match: they differ in student"):
        bench.check_alike(methods)
    other = [bench.make_method("./live.yaml", {}, teacher) for teacher in ("plain", "residual")]
    with pytest.raises(UserError, match="differ in zoo_specs"):
        bench.check_alike(other)
    bench.check_alike([bench.make_method(name, {}, "plain") for name in ("./live.yaml:zoo", "./live.yaml")])


# --- the whole ---


def test_methods_run_for_the_seconds_given_and_go_on_where_they_stopped(
    bench: ModuleType,
    here: list[tuple[str, dict[str, str]]],
    runs: Runs,
    capfd: pytest.CaptureFixture[str],
) -> None:
    common = ["--seconds", "0.3", "--out", "out", f"training.cache={runs.cache}"]
    assert bench.main(["--methods", "./frozen.yaml,./rounds.yaml", "--seeds", "3", *common]) == 0
    lines = [json.loads(text) for text in Path("out/figures.jsonl").read_text().splitlines()]
    assert {(each["method"], each["seed"]) for each in lines} == {("frozen", 3), ("rounds", 3)}
    for each in lines:
        results = json.loads(Path(f"out/{each['method']}-3/results.json").read_text())
        assert results["seed"] == 3
        assert each["accuracy"] == results["student"]["accuracy"]
        assert each["seconds"] == sum(results["seconds"].get(name, 0) for name in ("generator", "distill"))
        assert list(each["teachers"]) == ["residual"]
        assert 0 < each["seconds"] < 3  # of 0.3, on a machine that may be busy
        assert each["peak_mb"] > 50
    rounds = next(each for each in lines if each["method"] == "rounds")
    whole = rounds["student_updates"] == rounds["generator_updates"] / 3 * 4
    assert whole or "inner 3 → 2" in rounds["note"]  # a machine may be so busy that no round fits
    keys = [keys for name, keys in here if name == "run"]
    assert len({key["teachers.residual.weights"] for key in keys}) == 1
    out = capfd.readouterr().out
    assert "| teacher residual |" in out
    here.clear()
    assert bench.main(["--methods", "./frozen.yaml,./rounds.yaml", "--seeds", "3", *common]) == 0
    assert here == []
    assert capfd.readouterr().out.splitlines()[-5:] == out.splitlines()[-5:]
    assert bench.main(["--methods", "./frozen.yaml", "--seeds", "3", *common[2:], "--seconds", "9"]) == 2
    assert "(seconds: 0.3 there, 9.0 here)" in capfd.readouterr().err  # nothing else has changed


def test_steps_may_be_the_recipes_own(
    bench: ModuleType, here: list[tuple[str, dict[str, str]]], runs: Runs, capfd: pytest.CaptureFixture[str]
) -> None:
    given = ["--methods", "./frozen.yaml", "--seeds", "3", "--out", "out", f"training.cache={runs.cache}"]
    assert bench.main(["--updates", *given, "synthesis.steps=3", "distill.steps=7"]) == 0
    assert [name for name, _ in here] == ["teachers", "run"]  # nothing is measured
    (found,) = (json.loads(text) for text in Path("out/figures.jsonl").read_text().splitlines())
    assert (found["generator_updates"], found["student_updates"], found["note"]) == (3, 7, "")
    out = capfd.readouterr().out
    assert "the recipes' own updates each" in out
    assert "took" not in out
    with pytest.raises(SystemExit):
        bench.main(["--updates", "--seconds", "3", *given])


def test_what_fails_is_reported_and_the_rest_runs(
    bench: ModuleType,
    equal: ModuleType,
    here: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def launch(name: str, keys: dict[str, str], seconds: float, log: Path, threads: int) -> dict[str, Any]:
        if name == "run" and "frozen" in keys["recipe"]:
            raise UserError("out of memory")
        return {"teachers": {}, "cost": equal.Cost(1.0, 1.0)._asdict(), "run": {"peak_mb": 1, "cpu_seconds": 1}}[name]

    def figures(method: Any, seed: int, *rest: Any) -> dict[str, Any]:
        return line(method.name, seed)

    monkeypatch.setattr(equal, "launch", launch)
    monkeypatch.setattr(equal, "figures", figures)
    assert bench.main(["--methods", "./frozen.yaml,./live.yaml", "--seeds", "0,1", "--out", "out"]) == 1
    out = capfd.readouterr().out
    assert "frozen-0 failed: out of memory" in out
    *_, found, in_time, missing = map(rows, out.split("\n\n"))
    assert missing == [["Not there: frozen (seed 0, 1)"]]
    assert [row[0] for row in found][2:] == ["teacher t", "live"]
    assert in_time[0] == ["student % after", "10%", "25%", "50%", "75%", "100%"]
    assert in_time[2:] == [["live", "-", "50.00", "50.00", "50.00", "90.00"]]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["seed=1"], "'seed=1' is not for all methods"),
        (["--nonsense"], "'--nonsense' is not for all methods"),
        (
            ["--methods", "./live.yaml", "--teacher", "plane"],
            "./live.yaml: --teacher plane is no enabled teacher; choose from plain, residual",
        ),
        (["--methods", "./live.yaml,./other/live.yaml"], "names two files live.yaml, which would be one row"),
        (["--methods", "./live.yaml", *NO_IMAGES], "nothing to judge the student on"),
    ],
)
def test_a_mistake_is_one_line(
    bench: ModuleType, here: list[Any], arguments: list[str], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(".", "other", ignore=shutil.ignore_patterns("teachers*"))
    assert bench.main([*arguments, "--out", "out"]) == 2
    (error,) = capfd.readouterr().err.splitlines()
    assert said in error
    assert not Path("out").exists()


def test_a_process_of_its_own_tells_its_peak_memory(equal: ModuleType, runs: Runs) -> None:
    arguments = dict(argument.partition("=")[::2] for argument in runs.arguments("one", "synthesis.steps=2"))
    found = equal.launch("run", arguments, 0, Path("logs/one.txt"), 1)
    assert (runs.folder / "one" / "results.json").exists()
    assert found["memory"] == "process"
    assert 100 < found["peak_mb"] < 20_000
    assert "student" in Path("logs/one.txt").read_text()


def test_a_process_that_fails_is_quoted(equal: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "child.py").write_text("import sys; print('begun'); sys.exit('\\n'.join(sys.argv[1:]))")
    monkeypatch.setattr(equal, "CHILD", tmp_path / "child.py")
    log = tmp_path / "logs" / "one.txt"
    with pytest.raises(UserError, match=r"logs/one\.txt ends in: a=1"):
        equal.launch("run", {"b": "2", "a": "1"}, 0, log, 1)
    assert log.read_text().splitlines() == ["begun", "run", "0", "b=2", "a=1"]


def test_peak_memory_is_no_less_than_what_is_held(child: ModuleType) -> None:
    held = bytearray(b"x" * 200_000_000)
    now = psutil.Process().memory_info().rss
    assert child.peak_resident() >= 0.99 * now > 200_000_000
    del held
    assert child.peak_resident() >= 0.99 * now
