"""The benchmarks of pairs and of variants: what they run, that they go on where they stopped, their tables."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from runs_fixture import ROOT, Runs, reset_accelerate

from dfkd.recipe import load_recipe


@pytest.fixture
def ablate(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("ablate")


@pytest.fixture
def bookkeeping(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("bookkeeping")


@pytest.fixture
def pairs(
    benchmark: Callable[[str], ModuleType], children: list[Any], runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> ModuleType:
    """The script with the tiny recipe as its pair, and its children called in this process."""
    module = benchmark("pairs")
    monkeypatch.setattr(module, "PRICED_WITH", 1.0)
    monkeypatch.setattr(module, "PAIRS", {"tiny": "./tiny.yaml"})
    return module


def rows(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines() if row.startswith("|")]


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_pair_has_its_recipe(benchmark: Callable[[str], ModuleType]) -> None:
    for name, recipe in benchmark("pairs").PAIRS.items():
        found = load_recipe([f"recipe={recipe}"]).recipe
        teacher, student = name.split("_")[0], found.student.model.removeprefix("dfkd:")
        assert name.endswith(f"_{student}"), name
        assert any(spec.model.startswith(f"dfkd:{teacher}") for spec in found.zoo_specs.values()), name


def test_a_pair_goes_on_where_it_stopped(
    pairs: ModuleType, runs: Runs, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def call(minutes: str) -> int:
        reset_accelerate()
        common = ["--budget", "0.01", "--seeds", "0,1", "--out", "out", f"training.cache={tmp_path / 'own'}"]
        return pairs.main(["tiny", "--minutes", minutes, *common, "zoo.main=plain", "distill.batch_size=8"])

    assert call("1e-4") == 1
    assert "stopped after 0.0001 minutes: teacher plain is not trained yet; the same call" in capfd.readouterr().out
    whole = pairs.piece
    hasty = {"runtime.minutes": "1e-4", "runtime.log_every": "1"}
    monkeypatch.setattr(pairs, "piece", lambda keys, *rest: whole({**keys, **hasty}, *rest))
    assert call("0") == 1
    assert "seed 0 is not finished" in capfd.readouterr().out
    monkeypatch.setattr(pairs, "piece", whole)
    assert call("0") == 0
    lines = read_lines(Path("out/figures.jsonl"))
    assert [line["seed"] for line in lines] == [0, 1]
    pieces = [read_lines(Path(f"out/tiny/logs/{seed}.jsonl")) for seed in (0, 1)]
    assert [len(own) for own in pieces] == [2, 1]
    for line, own in zip(lines, pieces):
        assert line["cpu_seconds"] == pytest.approx(sum(each["cpu_seconds"] for each in own))
        assert line["peak_mb"] == max(each["peak_mb"] for each in own)
    cells = rows(capfd.readouterr().out)[2]
    assert cells[0] == "tiny"
    mean = sum(line["accuracy"] for line in lines) / 2
    assert cells[2].startswith(f"{mean:.2f} ± ")
    for line in lines:
        results = json.loads(Path(f"out/tiny/{line['seed']}/results.json").read_text())
        assert line["accuracy"] == results["student"]["accuracy"]
        assert results["seed"] == line["seed"]
        assert line["teacher"] == results["teachers"]["plain"]["accuracy"]
        images = 16 * line["generator_updates"] + 8 * line["student_updates"]
        assert line["images_per_second"] == pytest.approx(images / results["seconds"]["distill"])
    assert len({line["generator_updates"] for line in lines}) == 1  # all seeds do the same
    assert call("0") == 0  # and nothing is run again
    assert len(Path("out/figures.jsonl").read_text().splitlines()) == 2
    with Path("out/figures.jsonl").open("a") as file:
        file.write(json.dumps({**lines[0], "seed": 7, "accuracy": 0.0}) + "\n")
    capfd.readouterr()
    assert call("0") == 0
    assert rows(capfd.readouterr().out)[2] == cells  # of the seeds that are asked for
    Path("out/figures.jsonl").unlink()  # an update has a price before there is a figure
    tiny = Path("tiny.yaml")
    tiny.write_text(tiny.read_text().replace("lr: 0.05", "lr: 0.06"))
    assert call("0") == 2
    assert "figures of tiny by another recipe, which differs in distill.lr;" in capfd.readouterr().err


def test_a_mistake_is_one_line(pairs: ModuleType, ablate: ModuleType, capfd: pytest.CaptureFixture[str]) -> None:
    for given, said in ((["tiny", "seed=1"], "'seed=1'"), (["tiny", "--nonsense"], "'--nonsense'")):
        assert pairs.main([*given, "--out", "out"]) == 2
        assert said in capfd.readouterr().err
    for given, said in (
        (["output=x"], "'output=x'"),
        (["--variants", "none"], "unknown variant 'none'"),
        (["--variants", "seed=7"], "'seed=7' is not for variants"),
    ):
        assert ablate.main([*given, "--out", "out"]) == 2
        (error,) = capfd.readouterr().err.splitlines()
        assert said in error
    assert not Path("out").exists()


def test_every_variant_is_a_recipe_of_its_own_and_measured_where_its_updates_cost_another(ablate: ModuleType) -> None:
    made = {name: ablate.make_variant(name, {"recipe": "digits"}) for name in ablate.VARIANTS}
    assert len({method.folder for method in made.values()}) == len(made)
    defaults = made["defaults"].recipe
    assert [name for name, method in made.items() if method.recipe == defaults] == ["defaults"]
    own = {name for name, method in made.items() if not method.priced}
    assert {"no adversary", "no replay", "m' = 1", "generator width 16", "batch 64", "no shift", "Data Mixing"} <= own
    assert not {"student T 4", "student lr 0.05", "redraw 2", "bn 160", "replay 50", "adversary 1"} & own
    without = {"recipe": "digits", "distill.replay": "0", "synthesis.losses.adversary": "0"}
    for name in ("replay 50", "adversary 1"):  # what such a run does not do at all has its own cost
        assert not ablate.make_variant(name, without).priced


def test_commas_in_brackets_part_no_variants(ablate: ModuleType) -> None:
    assert ablate.parted("a=[1,2],no replay,b={x: [3, 4], y: 5}") == ["a=[1,2]", "no replay", "b={x: [3, 4], y: 5}"]


def test_a_variant_may_be_any_key_and_is_left_out_where_it_changes_nothing(
    ablate: ModuleType, monkeypatch: pytest.MonkeyPatch, runs: Runs, capfd: pytest.CaptureFixture[str]
) -> None:
    measured: list[Any] = []
    monkeypatch.setattr(ablate, "compare", lambda variants, *rest: measured.extend(variants) or True)
    given = ["--out", "out", "--variants", "synthesis.betas=[0.5,0.9],synthesis.losses.bn=7,distill.replay=0,no replay"]
    assert ablate.main([*given, f"recipe={runs.recipe}", "distill.replay=0"]) == 0
    assert [each.name for each in measured] == ["defaults", "synthesis.betas=[0.5,0.9]", "synthesis.losses.bn=7"]
    assert (measured[1].recipe.synthesis.betas, measured[2].recipe.synthesis.losses.bn) == ([0.5, 0.9], 7)
    said = capfd.readouterr().out.splitlines()
    assert said == [f"left out: {name}: this recipe has that already" for name in ("distill.replay=0", "no replay")]


def test_a_table_is_of_the_methods_and_seeds_that_were_asked_for(bookkeeping: ModuleType) -> None:
    lines = [{"method": name, "seed": seed} for name in ("a", "b") for seed in (0, 1, 5)]
    shown = bookkeeping.asked(lines, ["b"], [5, 0, 7])
    assert shown == [{"method": "b", "seed": 0}, {"method": "b", "seed": 5}]
    assert bookkeeping.absent(shown, ["b", "c"], [5, 0, 7]) == "\n\nNot there: b (seed 7); c (seed 5, 0, 7)"
    assert bookkeeping.absent(shown, ["b"], [0]) == ""


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (KeyboardInterrupt(), 128 + signal.SIGINT, "stopped for SIGINT; the same call goes on"),
        (PermissionError(13, "Permission denied", "out"), 2, "error: [Errno 13] Permission denied: 'out'"),
    ],
)
def test_a_benchmark_ends_in_a_line(
    bookkeeping: ModuleType, raised: BaseException, code: int, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    def work() -> None:
        raise raised

    assert bookkeeping.exit_code(work) == code
    assert capfd.readouterr().err == f"{said}\n"


RUN = """
import signal, sys, time
path = sys.argv[3].partition("=")[2]
def tell(word):
    with open(path, "a") as file:
        print(word, file=file)
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(1), tell("saved"), sys.exit()))
tell("listens")
time.sleep(600)
"""
BENCHMARK = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import equal_time
from bookkeeping import exit_code
equal_time.CHILD = Path("run.py")
def launch():
    return equal_time.launch("run", {"file": "said"}, 0, Path("log"), 1)
def in_lanes():
    lanes = ThreadPoolExecutor(1)
    try:
        [each.result() for each in [lanes.submit(launch) for _ in range(3)]]
    finally:
        lanes.shutdown(cancel_futures=True)
exit_code(launch if sys.argv[1] == "alone" else in_lanes)
"""


def test_a_benchmark_that_is_terminated_ends_its_runs_which_save_first(tmp_path: Path) -> None:
    path, begun = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])}, []
    for where in ("alone", "lanes"):
        (tmp_path / where).mkdir()
        (tmp_path / where / "run.py").write_text(RUN)
        command = [sys.executable, "-c", BENCHMARK, where]
        environment, said = {**os.environ, **path}, open(tmp_path / where / "err", "w")  # noqa: SIM115
        begun.append((subprocess.Popen(command, cwd=tmp_path / where, env=environment, stderr=said), tmp_path / where))
    for started, folder in begun:
        said, deadline = folder / "said", time.monotonic() + 60
        while not (said.exists() and said.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        started.terminate()
    for started, folder in begun:
        assert started.wait(60) == 128 + signal.SIGTERM
        assert (folder / "said").read_text().split() == ["listens", "saved"]
        assert "stopped for SIGTERM; the same call goes on" in (folder / "err").read_text().splitlines()


def test_a_pair_that_was_not_measured_on_the_way_has_no_last_quarter(pairs: ModuleType) -> None:
    line = {"method": "p", "teacher": 90.0, "accuracy": 88.0, "seconds": 60.0, "images_per_second": 5.0, "peak_mb": 9.0}
    row = rows(pairs.table([{**line, "n": 100, "last_quarter": None, "note": "inner 9 → 3"}]))[2]
    assert (row[4], row[9]) == ("-", "inner 9 → 3")


def test_the_table_of_pairs_has_its_means_losses_and_lowest(pairs: ModuleType) -> None:
    usual = {"method": "p", "teacher": 94.0, "images_per_second": 1000.0, "n": 10000, "note": ""}
    lines = [
        {**usual, "accuracy": accuracy, "seconds": seconds, "peak_mb": peak, "last_quarter": quarter}
        for accuracy, seconds, peak, quarter in (
            (92.0, 1140.0, 900.0, {"mean": 91.5, "deviation": 0.2, "lowest": 90.0}),
            (91.0, 1260.0, 950.0, {"mean": 90.5, "deviation": 0.4, "lowest": 85.0}),
        )
    ]
    deviation = (2 * 0.5**2) ** 0.5  # of 92 and 91, over n - 1
    assert rows(pairs.table(lines))[2] == [
        "p",
        "94.00",
        f"91.50 ± {deviation:.2f} (2)",
        f"2.50 ± {deviation:.2f}",
        "91.00 ± 0.30 (85.00)",
        "20.0",
        "1,000",
        "950",
        "10,000",
        "",
    ]


def test_gains_are_paired_by_seed(ablate: ModuleType) -> None:
    accuracy = {("defaults", 0): 90.0, ("defaults", 1): 94.0, ("a", 0): 91.0, ("a", 1): 97.0, ("b", 2): 99.0}
    lines = [{"method": name, "seed": seed, "accuracy": value} for (name, seed), value in accuracy.items()]
    assert ablate.gains(lines) == {"defaults": [0, 0], "a": [1, 3]}  # b has no seed in common
    usual = {"seconds": 60.0, "peak_mb": 1.0, "generator_updates": 9, "student_updates": 9, "note": ""}
    table = ablate.table([{**usual, "class_agreement": {"t": 80.0}, **line} for line in lines], 60.0)
    assert [row[:2] for row in rows(table)[2:]] == [["a", "+2.00 ± 1.41 (2)"], ["defaults", ""], ["b", "- (0)"]]
    late = ablate.table([{**usual, "class_agreement": {"t": 80.0}, **lines[0], "seconds": 130.0}], 60.0)
    assert rows(late)[2][3:] == ["130.0", "9", "9", "80.0", "took 130.0 s, not 60"]
