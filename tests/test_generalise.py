import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from runs_fixture import Runs, reset_accelerate
from torch import Tensor, nn

from dfkd.data import load_images
from dfkd.draws import augment
from dfkd.errors import UserError
from dfkd.recipe import load_recipe
from dfkd.runtime import Shard
from dfkd.stream import SyntheticStream
from dfkd.tasks import HELD_OUT_EPOCH
from dfkd.zoo import load_recipe_zoo
from generators import load_generator

FAMILIES = """
base: tiny
teachers:
  inverted: {model: "dfkd:tiny_inverted", mean: [0.3], std: [0.33], kwargs: {width: 4, depth: 1}}
zoo: {sample: 1}
synthesis: {steps: 4, redraw: 0, learn_weights: false}
ptq: {steps: 2, images: 32}
prune: {images: 32, steps: 0}
"""
SOURCES = ["generator plain", "generator m=2", "images m=2 unmixed", "noise", "real"]
IMAGES = 48
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def bench(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("generalise")


@pytest.fixture
def drawn(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("generalise_figures")


def fails(*_: Any) -> float:
    raise UserError("no network for this one")


def call(bench: ModuleType, runs: Runs, *given: str, families: str = FAMILIES) -> int:
    """The study on the families below, in this process."""
    (runs.folder / "families.yaml").write_text(families)
    options = ["--out", "study", "--seeds", "0", "--held-out", "inverted", "--rounds", "2", "--images", str(IMAGES)]
    reset_accelerate()
    try:
        return int(bench.main([*options, "recipe=./families.yaml", f"training.cache={runs.cache}", *given]))
    finally:
        reset_accelerate()


def read(runs: Runs) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (runs.folder / "study/figures.jsonl").read_text().splitlines()]


def figure(lines: list[dict[str, Any]], source: str, case: str, model: str) -> dict[str, Any]:
    found = [line for line in lines if (line["source"], line["case"], line["model"]) == (source, case, model)]
    assert len(found) == 1
    return found[0]


def statistics_seen(model: nn.Module, images: Tensor) -> tuple[float, np.ndarray]:
    """MixMix eq. 2 written anew: what batch norms see of the images, against what they have stored; and the guesses."""
    total = 0.0

    def add(norm: Any, inputs: tuple[Tensor, ...]) -> None:
        nonlocal total
        x = inputs[0].double().numpy()
        for seen, stored in ((x.mean((0, 2, 3)), norm.running_mean), (x.var((0, 2, 3)), norm.running_var)):
            total += float(np.sqrt(((seen - stored.double().numpy()) ** 2).sum()))

    handles = [m.register_forward_pre_hook(add) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        guesses = model(images).argmax(1).numpy()
    for handle in handles:
        handle.remove()
    return total, guesses


def test_a_study_of_five_sources(
    bench: ModuleType, drawn: ModuleType, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call(bench, runs, "--sources", ",".join(SOURCES)) == 0
    lines = read(runs)
    assert len(lines) == len(SOURCES) * (3 + 3)  # three teachers looked at, one held out and compressed in three ways

    # What made the images: the teachers of that zoo, none held out, and no real image.
    for source, teachers in {"generator-plain": {"plain"}, "generator-m=2": {"plain", "residual"}}.items():
        made = runs.folder / f"study/sources/{source}-0"
        assert set(json.loads((made / "generator/generator.json").read_text())["teachers"]) == teachers
        assert "dataset: none" in (made / "config.yaml").read_text()

    # Batch-norm loss and accuracy of the very images, computed anew.
    arguments = ["recipe=./families.yaml", f"training.cache={runs.cache}", "runtime.precision=fp32"]
    zoo = load_recipe_zoo(load_recipe(arguments).recipe, torch.device("cpu"), print)
    for source in ("generator m=2", "images m=2 unmixed", "real"):
        if source == "real":  # each once, evenly out of all
            real = load_images(
                "digits", train=True, root="", train_root=None, channels=1, size=8, classes=10, purpose="control"
            )
            rows = [k * len(real.labels) // IMAGES for k in range(IMAGES)]
            images, labels = real.images[rows].float() / 255, real.labels[rows]
        else:
            made = load_generator(runs.folder / f"study/sources/{source.replace(' ', '-')}-0/generator")
            stream = SyntheticStream(made, batch_size=IMAGES, seed=0, shard=Shard(torch.device("cpu")))
            images, labels = stream.batch(0, HELD_OUT_EPOCH)
            if source.startswith("images"):  # all that it optimised, each once
                images, labels = made.images.float() / 255, made.labels
        for teacher in zoo:
            loss, _ = statistics_seen(teacher, augment(images, Shard(torch.device("cpu")), teacher.moves, "quality"))
            _, guesses = statistics_seen(teacher, images)
            line = figure(lines, source, "images", teacher.name)
            assert line["held_out"] == (teacher.name == "inverted")
            assert line["n"] == len(images)
            np.testing.assert_allclose(line["bn_l2"], loss, rtol=1e-3)
            np.testing.assert_allclose(line["accuracy"], 100 * np.mean(guesses == labels.numpy()), atol=1e-9)

    # A compression is what the same task of a run comes to.
    keys = [*arguments, "tasks=[ptq]", "zoo.main=inverted", "student.model=", "export.input=none", "output=ptq"]
    checkpoint = runs.folder / "study/sources/generator-m=2-0/generator"
    called = runs.call(*keys, f"generator.checkpoint={checkpoint}", "ptq.weights=2", "ptq.activations=4")
    assert called.code == 0, called.err
    expected = json.loads(Path("ptq/results.json").read_text())["tasks"]["ptq"]
    line = figure(lines, "generator m=2", "W2A4 PTQ", "inverted")
    assert {key: line[key] for key in ("before", "naive", "after", "n")} == {
        key: expected[key] for key in ("before", "naive", "after", "n")
    }

    # The table's means and spread, by numpy.
    columns = drawn.columns(lines, "generator m=2")
    accuracies = [figure(lines, "generator m=2", "images", t.name)["accuracy"] for t in zoo]
    relative = {
        t.name: figure(lines, "generator m=2", "images", t.name)["bn_l2"]
        / figure(lines, "real", "images", t.name)["bn_l2"]
        for t in zoo
    }
    np.testing.assert_allclose(columns["accuracy, all"], [np.mean(accuracies)])
    np.testing.assert_allclose(columns["spread"], [np.std(accuracies)])
    np.testing.assert_allclose(columns["bn loss, zoo"], [(relative["plain"] + relative["residual"]) / 2])
    np.testing.assert_allclose(columns["bn loss, held out"], [relative["inverted"]])
    text = (runs.folder / "study/generalise.md").read_text()
    assert [row.split(" | ")[0].strip("| ") for row in text.splitlines()[2:8]] == [*SOURCES, "naive, on real images"]
    assert ElementTree.parse(runs.folder / "study/generalise.svg").getroot().tag == f"{SVG}svg"

    # Again: nothing is added. With a figure lost: that one is measured again, and nothing trained.
    path, log = runs.folder / "study/figures.jsonl", runs.folder / "study/sources/generator-m=2-0.log"
    assert call(bench, runs, "--sources", ",".join(SOURCES)) == 0
    assert read(runs) == lines
    lost = figure(lines, "generator m=2", "50 % channels", "inverted")
    path.write_text("".join(json.dumps(line) + "\n" for line in lines if line != lost))
    assert call(bench, runs, "--sources", ",".join(SOURCES)) == 0
    assert {k: v for k, v in read(runs)[-1].items() if k != "seconds"} == {
        k: v for k, v in lost.items() if k != "seconds"
    }
    assert "finished" in log.read_text()

    # A table is of the cases and seeds that are asked for, and of one recipe; a source that fails ends no study.
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, *({**line, "seed": 7} for line in lines)]))
    runs.capture.readouterr()
    assert call(bench, runs, "--sources", "noise,real", "--cases", "W2A4 PTQ") == 0
    one = runs.capture.readouterr().out
    assert "W2A4 PTQ" in one
    assert "channels" not in one
    assert call(bench, runs, "--sources", "noise,real", "--cases", "W2A4 PTQ", "--seeds", "0,7") == 0
    assert runs.capture.readouterr().out != one
    train_source = bench.train_source
    monkeypatch.setattr(bench, "train_source", fails)
    assert call(bench, runs, "--sources", "noise,generator m=1", "--cases", "W2A4 PTQ") == 1
    assert "Not there: generator m=1 (seed 0)" in runs.capture.readouterr().out
    monkeypatch.setattr(bench, "train_source", train_source)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    changed = FAMILIES.replace("images: 32, steps: 0", "images: 31, steps: 0")
    assert changed != FAMILIES
    assert call(bench, runs, "--sources", "noise", families=changed) == 2
    assert "by another recipe, which differs in prune.images;" in runs.capture.readouterr().err

    # Figures of other settings do not go beside these.
    runs.capture.readouterr()
    assert call(bench, runs, "--sources", "noise", "ptq.steps=3") == 2
    assert "holds figures of other settings" in runs.capture.readouterr().err
    assert read(runs) == lines


def test_sources_have_the_same_image_updates_and_keep_to_their_zoo(bench: ModuleType) -> None:
    sources = bench.all_sources(["a", "b", "c"], 240, 4, {"synthesis.latent_lr": "0.1"})
    assert list(sources)[-2:] == ["noise", "real"]
    assert len(sources) == 2 * (3 + 3 * 2) + 2  # m' = 4 needs four teachers
    updates = {
        int(keys.get("synthesis.steps", 240)) * int(keys.get("synthesis.inner", 1)) for keys in sources.values() if keys
    }
    assert updates == {240}
    assert sources["images b"]["synthesis.latent_lr"] == "0.1"
    assert {key for key, value in sources["generator b"].items() if value == "false"} == {
        "teachers.a.enabled",
        "teachers.c.enabled",
    }
    mixed, unmixed = sources["generator m=2"], sources["generator m=2 unmixed"]
    assert unmixed == {**mixed, "synthesis.mix.probability": "0"}
    assert "synthesis.mix.probability" not in mixed  # the recipe's


def line_of(source: str, seed: int, model: str, case: str = "images", **figures: Any) -> dict[str, Any]:
    return {"source": source, "seed": seed, "model": model, "case": case, "held_out": model == "h", **figures}


def test_deviation_is_over_seeds_after_the_mean_over_models(drawn: ModuleType) -> None:
    after = {0: (60.0, 70.0), 1: (64.0, 80.0), 2: (50.0, 90.0)}
    lines = [
        line_of("generator m=1", seed, model, "W2A4 PTQ", after=value, naive=10.0, before=99.0)
        for seed, values in after.items()
        for model, value in zip("hi", values)
    ]
    lines.append(line_of("generator m=1", 0, "j", "W2A4 PTQ", after=None, why="no"))
    means = np.mean(list(after.values()), axis=1)
    assert drawn.columns(lines, "generator m=1")["W2A4 PTQ"] == pytest.approx(means)
    expected = f"{means.mean():.1f} ± {means.std(ddof=1):.1f}"
    assert f"| {expected} |" in drawn.table(lines)
    assert "Not done: W2A4 PTQ of j: no" in drawn.table(lines)


def test_a_batch_norm_loss_is_in_units_of_the_real_images_of_its_own_model_and_seed(drawn: ModuleType) -> None:
    real = {("h", 0): 2.0, ("i", 0): 4.0, ("h", 1): 5.0, ("i", 1): 8.0}
    usual = {"accuracy": 50.0, "training_seconds": 9.0, "n": 48}
    lines = [line_of("real", seed, model, bn_l2=loss, **usual) for (model, seed), loss in real.items()]
    lines += [line_of("noise", seed, model, bn_l2=40.0, **usual) for model, seed in real]
    columns = drawn.columns(lines, "noise")
    assert (columns["bn loss, held out"], columns["bn loss, zoo"]) == ([20.0, 8.0], [10.0, 5.0])
    assert drawn.columns(lines[4:], "noise")["bn loss, zoo"] == []


def test_the_notes_of_a_study_have_what_is_compared_with(drawn: ModuleType) -> None:
    usual = {"case": "W2A4 PTQ", "before": 98.5, "n": 540}
    lines = [
        line_of(source, seed, "h", **usual, naive=naive + seed, after=80.0)
        for source, naive in (("noise", 20.0), ("real", 30.0))
        for seed in (0, 1)
    ]
    *_, naive, _, note = drawn.table(lines).splitlines()
    assert naive.startswith("| naive, on real images |")
    assert naive.endswith("| 30.5 ± 0.7 | - |")
    assert note == "Held out, before compression: h 98.50 %; 540 test images. Seeds 0, 1."


def test_higher_values_stand_higher_in_the_plot(drawn: ModuleType) -> None:
    values = {1: 20.0, 2: 80.0, 3: 50.0}
    lines = [line_of(f"generator m={m}", 0, "h", "W2A4 PTQ", after=value) for m, value in values.items()]
    root = ElementTree.fromstring(drawn.plot(lines))
    points = [line.get("points", "").split() for line in root.iter(f"{SVG}polyline")]
    (curve,) = (each for each in points if each)
    heights = [float(point.split(",")[1]) for point in curve]
    assert len(curve) == 3
    assert heights[0] > heights[2] > heights[1]
    assert heights[2] == pytest.approx((heights[0] + heights[1]) / 2, abs=0.1)


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        (["--held-out", "x"], ["--held-out x", "x is no enabled teacher", "plain, residual, inverted"]),
        (["--held-out", "plain,residual,inverted"], ["no teacher is left"]),
        (["--rounds", "3"], ["--rounds 3", "synthesis.steps=4"]),
        (["--sources", "generator m=9"], ["unknown 'generator m=9'", "generator m=2"]),
        (["--cases", "W1A1"], ["unknown 'W1A1'", "W2A4 PTQ"]),
        (["synthesis.steps"], ["'synthesis.steps' is not for the study", "KEY=VALUE"]),
    ],
)
def test_wrong_arguments_are_one_line(bench: ModuleType, runs: Runs, given: list[str], parts: list[str]) -> None:
    runs.capture.readouterr()
    assert call(bench, runs, *given) == 2
    (error,) = runs.capture.readouterr().err.strip().splitlines()
    assert all(part in error for part in parts), error
    assert not Path("study").exists()


def test_a_study_needs_real_test_images(bench: ModuleType, runs: Runs, capfd: pytest.CaptureFixture[str]) -> None:
    weights = [f"teachers.{name}.weights=x.pt" for name in ("plain", "residual", "inverted")]
    assert call(bench, runs, "data.dataset=none", *weights) == 2
    assert "set data.dataset" in capfd.readouterr().err
