import json
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from runs_fixture import Runs, reset_accelerate
from torch import nn

from dfkd.curves import whole_lines
from dfkd.errors import UserError
from dfkd.recipe import load_recipe
from dfkd.runtime import Shard
from generators import build_generator, save_generator

FOLDER = Path(__file__).parent.parent / "benchmarks"
CPU = torch.device("cpu")


@pytest.fixture
def bench(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("contenders")


def contender(bench: ModuleType, name: str) -> Any:
    return getattr(bench, name)(replace(bench.CASES["digits"], batch=16), 0, Shard(CPU))


def trained(*modules: nn.Module) -> list[bool]:
    return [p.grad is not None for module in modules for p in module.parameters()]


@pytest.mark.parametrize("step", [4, 5])  # of other teachers, and the mask leaves something to compare
def test_naive_generator_step_computes_our_terms_and_gradients(bench: ModuleType, step: int) -> None:
    ours, naive, first = (contender(bench, name) for name in ("Ours", "Naive", "Ours"))
    first.generator_step(0)
    torch.testing.assert_close(first.synthesizer.bn_start, naive.start, rtol=1e-5, atol=0)
    ours.synthesizer.bn_start = first.synthesizer.bn_start  # of a run's first step, which is not this one
    terms = ours.generator_step(step)
    assert set(terms) == {"ce", "bn", "adversary", "diversity"}
    assert terms["adversary"] != 0
    expected = {name: value.detach() for name, value in naive.generator_step(step).items()}
    # The adversary, 2e-4 here, is a small divergence of logits of about 1, which float32 rounds by 1e-7.
    torch.testing.assert_close(terms, expected, rtol=1e-5, atol=1e-7)
    for (name, mine), its in zip(ours.networks.generator.named_parameters(), naive.networks.generator.parameters()):
        # Not element by element: a unit that is zero but for rounding is on or off as the CPU's kernels have it.
        assert (mine.grad - its.grad).norm() < 1e-3 * its.grad.norm(), name


def test_naive_student_step_computes_our_loss_with_its_hooks_on(bench: ModuleType) -> None:
    ours, naive = contender(bench, "Ours"), contender(bench, "Naive")
    hooks = [hook for of_one in naive.hooks.values() for hook in of_one]
    before = [hook.loss for hook in hooks]
    expected = naive.student_step(0)["loss"]
    torch.testing.assert_close(ours.student_step(0)["loss"], expected, rtol=1e-3, atol=1e-5)
    assert not any(hook.loss is loss for hook, loss in zip(hooks, before))


def test_gradients_are_computed_where_each_way_says(bench: ModuleType) -> None:
    ways = {name: contender(bench, name) for name in ("Ours", "Naive", "Floor")}
    for name, way in ways.items():
        generator, zoo, student = way.networks
        way.generator_step(1)
        assert all(trained(generator))
        assert any(trained(*zoo)) == (name == "Naive")
        assert all(trained(student)) == any(trained(student)) == (name == "Naive")
        way.student_step(1)
        assert all(trained(student))


@pytest.mark.parametrize("burst", [1, 2])
def test_contenders_take_turns_and_warm_up_is_not_counted(
    benchmark: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, burst: int
) -> None:
    step, calls = benchmark("step"), []
    monkeypatch.setattr(step.time, "perf_counter", lambda: float(len(calls)))  # a call takes a second

    class Idle:
        def __init__(self, name: str) -> None:
            self.name = name

        def generator_step(self, step: int) -> None:
            calls.append(f"{self.name}{step}")

        student_step = stream_step = generator_step

    seconds = step.measure({name: Idle(name) for name in "ab"}, 4, CPU, burst)
    assert seconds == {kind: {"a": [1.0] * 4, "b": [1.0] * 4} for kind in ("generator", "student", "stream")}
    turns = [calls[k : k + burst] for k in range(0, len(calls), 3 * burst)]
    numbers = [[burst * k + j for j in range(burst)] for k in (0, 0, 1, 1)]
    assert turns[:4] == [[f"{name}{n}" for n in each] for name, each in zip("abba", numbers)]
    assert len(calls) == 6 * burst * (4 + step.WARMUP)


def test_row_gives_images_per_second_and_paired_ratios(benchmark: Callable[[str], ModuleType]) -> None:
    seconds = {"floor": [0.5, 1.0, 2.0], "ours": [1.0, 1.0, 2.0], "naive": [4.0, 2.0, 2.0]}
    line = benchmark("step").row("x", 100, seconds).split()
    assert line[:4] == ["x", "100", "100", "50"]
    assert "".join(line[4:]) == "1.00[1.00,1.50]2.00[1.50,3.00]"


def test_a_round_is_a_generator_step_and_the_student_steps_after_it(
    bench: ModuleType, benchmark: Callable[[str], ModuleType]
) -> None:
    step, names = benchmark("step"), ("floor", "ours", "naive")
    taken = {"generator": 2.0, "student": 0.5, "stream": 0.25}
    seconds = {kind: {name: [each] * 3 for name in names} for kind, each in taken.items()}
    lines = step.table("x", replace(bench.CASES["digits"], batch=450), seconds).splitlines()
    assert [line[22:31].strip() for line in lines] == ["225", "900", "600", "1,800"]  # 6 * 450 images in 2 + 5 * 0.5 s


def test_the_profilers_milliseconds_are_of_one_step(
    benchmark: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    step, calls = benchmark("step"), []
    events = [SimpleNamespace(key="aten::mm", self_cpu_time_total=6000.0)]  # microseconds
    found = nullcontext(SimpleNamespace(key_averages=lambda: events))
    monkeypatch.setattr(step, "profile", lambda activities: found)
    assert step.operators(calls.append, 4, CPU) == {"aten::mm": 1.5}
    assert len(calls) == 4


def test_a_step_that_asks_more_teachers_holds_no_more_memory(
    bench: ModuleType, benchmark: Callable[[str], ModuleType]
) -> None:
    memory = benchmark("memory")
    case = replace(bench.CASES["digits"], batch=16)
    alone = max(memory.step_peak(replace(case, teachers=[teacher]), 1, Shard(CPU)) for teacher in case.teachers)
    activations = 4 * 16 * 16 * 16 * 16 / 1e6  # of one 16-channel layer, MB
    assert alone > 5 * activations
    assert memory.step_peak(case, 3, Shard(CPU)) < 1.1 * alone


def test_the_configuration_for_several_machines_is_one_that_accelerate_takes() -> None:
    config = load_config_from_file(str(FOLDER.parent / "docs" / "multi_node.yaml"))
    assert isinstance(config, ClusterConfig)
    assert (config.num_machines, config.num_processes) == (2, 16)


@pytest.mark.parametrize(("cases", "given"), [({}, []), ({"all": ("udfc", {})}, ["data.dataset=none"])])
def test_compression_is_measured_on_real_images_or_not_at_all(
    benchmark: Callable[[str], ModuleType], tmp_path: Path, cases: dict[str, Any], given: list[str]
) -> None:
    teachers = [f"teachers.{name}.weights=w.pt" for name in ("plain", "residual", "inverted")]
    with pytest.raises(UserError, match=r"set data\.dataset"):
        benchmark("compress").measure(tmp_path, cases, ["generator"], ["recipe=digits", *teachers, *given])


def test_compression_of_one_network_with_several_seeds(
    benchmark: Callable[[str], ModuleType],
    runs: Runs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    about = {"arch": "conv", "latent": 4, "width": 4, "classes": 10, "channels": 1, "size": 8, "conditional": True}
    save_generator("gen", build_generator({**about, "prototypes": 1, "norms": "code", "mean": [0.3], "std": [0.3]}))
    compress = benchmark("compress")
    cases = {
        "W2A4": ("ptq", {"weights": 2, "activations": 4, "method": "nearest", "images": 16}),
        "none": ("ptq", {"overrides": {"nothing": [4, 4]}, "method": "nearest", "images": 16}),
        "cut": ("udfc", {"ratio": 0.5}),
    }
    given = [f"recipe={runs.recipe}", f"training.cache={runs.cache}", "generator.checkpoint=gen", "zoo.main=residual"]

    def measured(out: str, names: str, sources: list[str], *keys: str) -> tuple[bool, str]:
        reset_accelerate()
        done = compress.measure(Path(out), {name: cases[name] for name in names.split(",")}, sources, [*given, *keys])
        return done, capfd.readouterr().out

    complete, said = measured("out", "W2A4,none,cut", ["noise"])
    assert not complete
    assert "none from noise not done: " in said
    assert said.endswith("\nNot there: none from noise (seed 0)\n")
    assert "| cut | " in said
    with pytest.raises(UserError, match=r"trained teachers: .*; choose another --out"):
        measured("out", "W2A4", ["noise"], "seed=1")
    books = benchmark("bookkeeping")
    given += books.written(books.trained_keys(load_recipe(given).recipe))
    for seed in (0, 1):
        complete, said = measured("two", "W2A4", ["noise", "generator"], f"seed={seed}")
        assert complete
    after = [line["after"] for line in whole_lines(Path("two/figures.jsonl")) if line["source"] == "noise"]
    cell = f"{statistics.mean(after):.2f} ± {statistics.stdev(after):.2f} (2)"
    assert " images; seeds 0, 1: mean" in said
    assert f" | {cell} |" in said
    _, said = measured("two", "W2A4", ["noise"])  # all is there; what was not asked for is not shown
    assert f"| case | naive | noise |\n|---|---|---|\n| W2A4 | - | {cell} |\n" in said
    settings = json.loads(Path("two/settings.json").read_text())  # as a folder has it that an older call wrote
    assert settings.keys() == {"keys"}
    monkeypatch.setattr(compress, "load_recipe", lambda words: load_recipe([*words, "ptq.drop=0.25"]))
    with pytest.raises(UserError, match=r"by another recipe, which differs in ptq\.drop;"):
        measured("two", "W2A4", ["noise"])


def test_settings_bind_what_has_figures(benchmark: Callable[[str], ModuleType], tmp_path: Path) -> None:
    books = benchmark("bookkeeping")
    books.keep_settings(tmp_path / "settings.json", {"seconds": 5})
    books.keep_settings(tmp_path / "settings.json", {"seconds": 6})  # nothing has been measured yet
    books.add(tmp_path / "figures.jsonl", {"method": "a"})
    books.keep_settings(tmp_path / "settings.json", {"seconds": 6})
    with pytest.raises(UserError, match="seconds: 6 there, 5 here"):
        books.keep_settings(tmp_path / "settings.json", {"seconds": 5})
    assert books.numbers("3,1,3") == [3, 1]


def test_a_row_that_was_cut_off_is_none(benchmark: Callable[[str], ModuleType], tmp_path: Path) -> None:
    path = tmp_path / "figures.jsonl"
    for line in ({"method": "a"}, {"method": "b"}):
        benchmark("bookkeeping").add(path, line)
    path.write_text(path.read_text()[:-4])
    benchmark("bookkeeping").add(path, {"method": "c"})
    assert whole_lines(path) == [{"method": "a"}, {"method": "c"}]


def test_a_row_is_of_one_recipe(benchmark: Callable[[str], ModuleType], tmp_path: Path) -> None:
    books = benchmark("bookkeeping")
    first, second = (load_recipe(["recipe=digits", key]).recipe for key in ("classes=10", "synthesis.losses.ce=5"))
    books.keep_recipes(tmp_path, {"a": first})
    books.keep_recipes(tmp_path, {"a": second})  # nothing has been measured yet
    books.add(tmp_path / "figures.jsonl", {"method": "a"})
    books.keep_recipes(tmp_path, {"a": second, "b": first})
    with pytest.raises(UserError, match=r"figures of a by another recipe, which differs in synthesis\.losses\.ce;"):
        books.keep_recipes(tmp_path, {"a": first})
    fewer = replace(second, teachers={name: spec for name, spec in second.teachers.items() if name != "plain"})
    with pytest.raises(UserError, match=r"differs in teachers\.plain\.\w+, "):  # keys that are gone
        books.keep_recipes(tmp_path, {"a": fewer})
