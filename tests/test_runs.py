"""Whole runs through the command line: their files, what is trained and what is not, teachers of all kinds."""

import ast
import json
import os
import shutil
import signal
import subprocess
from functools import partial
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from runs_fixture import STEPS, Runs, reset_accelerate
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx import symbolic_trace
from torch.fx.passes.shape_prop import ShapeProp

from dfkd.cli import main
from dfkd.compress.files import load_compressed
from dfkd.data import opened
from dfkd.dry_run import estimated_memory
from dfkd.losses import STUDENT_LOSSES
from dfkd.models import build_model, save_model
from dfkd.phases import make_fit, make_synthesizer, plans
from dfkd.recipe import load_recipe
from dfkd.results import commit, versions
from dfkd.run import build, say_groups
from dfkd.runtime import make_accelerator
from dfkd.terms import Manner
from generators import ConvGenerator, load_generator

SHORT = ("synthesis.steps=3", "distill.steps=2", "runtime.log_every=1")


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def teacher_file(
    path: Path, classes: int = 10, model: str = "dfkd:tiny_plain", channels: int = 1, **kwargs: Any
) -> str:
    """A checkpoint of an untrained teacher."""
    torch.manual_seed(0)
    kwargs = {"width": 4, "depth": 1} | kwargs
    save_file(build_model(model, classes=classes, channels=channels, kwargs=kwargs).state_dict(), path)
    return str(path)


@pytest.fixture
def no_data(runs: Runs) -> tuple[str, ...]:
    """Arguments of a run that has two teachers' files and not one real image."""
    plain = teacher_file(runs.folder / "plain.safetensors")
    residual = teacher_file(runs.folder / "residual.safetensors", model="dfkd:tiny_residual")
    weights = (f"teachers.plain.weights={plain}", f"teachers.residual.weights={residual}")
    return ("data.dataset=none", *weights, "teachers.residual.kwargs={width: 4, depth: 1}", *SHORT)


def test_a_run_leaves_its_files(runs: Runs) -> None:
    called = runs.run("first")
    assert (called.code, called.err) == (0, "")
    folder = runs.folder / "first"
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    expected = {"config.yaml", "metrics.jsonl", "results.json", "report.html", "tensorboard", "checkpoints/latest"}
    expected |= {"generator/model.safetensors", "generator/generator.json"}
    assert expected | {"student/model.safetensors", "student/model.json", "images/generator-000010.png"} <= found
    assert not [name for name in found if "partial" in name or "tmp" in name]
    assert (folder / "checkpoints" / "latest").resolve().name == f"step-{STEPS:08d}"
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["synthesis"]["steps"] == 20
    assert config["teachers"]["residual"]["model"] == "dfkd:tiny_residual"
    for phase, last in (("generator", 20), ("student", STEPS)):
        assert [line["step"] for line in lines(folder) if line["phase"] == phase] == list(range(2, last + 1, 2))
    assert {"bn_plain", "bn_residual"} <= {name for line in lines(folder) for name in line}
    images = [line for line in lines(folder) if line["phase"] == "images"]
    assert {"pixel_within", "pixel_between", "class_agreement_plain"} <= set(images[0])
    report = (folder / "report.html").read_text()
    assert "http://" not in report.replace("http://www.w3.org", "")
    assert "<script src" not in report
    for word in ("teacher plain", "student", "95 % interval", "report.html"):  # of the closing table
        assert word in called.out
    # both come back from their folders alone
    generator, student = load_generator(folder / "generator"), load_compressed(folder / "student")
    images_, labels = generator(torch.randn(4, 8), torch.arange(4)), torch.arange(4)
    assert images_.shape == (4, 1, 8, 8)
    assert student(images_).shape == (len(labels), 10)
    assert student.normalisation == ([0.3], [0.33])
    about = json.loads((folder / "generator" / "generator.json").read_text())
    assert about["teachers"].keys() == {"plain", "residual"}
    assert about["bn_loss"]["plain"]["end"] != about["bn_loss"]["plain"]["start"]


def test_the_adversary_fades_when_the_recipe_says(runs: Runs) -> None:
    assert runs.run("fades", "synthesis.warmup=0", "synthesis.fade=0.5").code == 0
    seen = {line["step"]: "adversary" in line for line in lines(runs.folder / "fades") if line["phase"] == "generator"}
    assert seen == {step: step <= 10 for step in range(2, 21, 2)}  # of 20 updates it counts in half


def test_what_is_not_installed_has_no_version_and_costs_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "dfkd":
            raise PackageNotFoundError(name)
        return f"{name} 1"

    monkeypatch.setattr("dfkd.results.version", version)
    found = versions()
    assert (found["dfkd"], found["torch"]) == ("not installed", "torch 1")


@pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")
def test_the_commit_is_that_of_the_checkout_and_says_where_files_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert commit(tmp_path) is None
    for key in [key for key in os.environ if key.startswith("GIT_")]:  # of a hook that runs the tests
        monkeypatch.delenv(key)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "code.py").write_text("1")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], check=True)
    head = subprocess.run([*git, "log", "-1", "--format=%H"], capture_output=True, text=True, check=True).stdout
    assert commit(tmp_path) == head[:12]
    (tmp_path / "code.py").write_text("2")
    assert commit(tmp_path) == head[:12] + "+"


def test_what_a_recipe_says_of_training_is_what_trains(runs: Runs) -> None:
    given = (
        *("distill.lr=0.03", "distill.weight_decay=0.007", "distill.warmup=3", "distill.loss=mae"),
        *(
            "distill.temperature=7",
            "distill.clip=1.5",
            "distill.batch_size=12",
            "distill.replay=5",
            "distill.fresh=0.25",
        ),
        *("distill.shift=0.25", "distill.flip=true", "distill.features=2"),
        *("synthesis.lr=0.004", "synthesis.betas=[0.4,0.9]", "synthesis.clip=2", "synthesis.bn_distance=kl"),
        *("synthesis.equalise=false", "synthesis.adversary_loss=js", "synthesis.adversary_mask=false"),
        *("synthesis.cosine=true", "synthesis.as_trained=false", "synthesis.jitter=3", "synthesis.flip=true"),
        *("synthesis.penalise=true", "synthesis.learn_weights=false", "synthesis.warmup=0.2", "synthesis.fade=0.1"),
        *("seed=3", "synthesis.redraw=4", "synthesis.mix.probability=0.3", "synthesis.mix.antialias=true"),
    )
    recipe = load_recipe(runs.arguments("x", *given)).recipe
    try:
        parts = build(recipe, *make_accelerator("fp32"))
        fit, synthesizer = make_fit(parts, plans(recipe)[0]), make_synthesizer(parts)
    finally:
        reset_accelerate()
    decay = fit.optimizer.param_groups[0]["weight_decay"]
    assert (fit.rates[0], decay, fit.warmup, fit.temperature, fit.clip) == (0.03, 0.007, 3, 7, 1.5)
    assert fit.loss is STUDENT_LOSSES["mae"]
    assert float(fit.weights.sum()) == pytest.approx(2)
    stream = fit.stream
    assert (stream.batch_size, stream.replay.slots, stream.fresh, stream.shift, stream.flip) == (12, 5, 3, 0.25, True)
    assert synthesizer.manner == Manner("kl", "js", False)
    assert (synthesizer.lr, synthesizer.betas, synthesizer.clip) == (0.004, (0.4, 0.9), 2)
    assert (synthesizer.equalise, synthesizer.penalise, synthesizer.log_variance) == (False, True, {})
    assert (synthesizer.cosine, synthesizer.as_trained, synthesizer.jitter, synthesizer.flip) == (True, False, 3, True)
    assert (synthesizer.rise, synthesizer.fall) == (0.2 * synthesizer.steps, 0.1 * synthesizer.steps)
    assert (synthesizer.seed, stream.seed, synthesizer.sample) == (3, 3, 1)
    assert synthesizer.redraws == {4, 8, 12, 16}
    assert synthesizer.mix is not None
    assert (synthesizer.mix.p_batch, synthesizer.mix.antialias) == (0.3, True)


def test_what_a_recipe_says_of_rounds_is_what_they_do(runs: Runs) -> None:
    given = ("synthesis.inner=6", "synthesis.latent_lr=0.2", "synthesis.renew=first", "synthesis.coarse=0.5")
    given += ("synthesis.losses.contrastive=1", "synthesis.bank=70", "synthesis.pool=50", "distill.replay=0")
    given += ("teachers.residual.enabled=false",)
    recipe = load_recipe(runs.arguments("x", *given)).recipe
    try:
        parts = build(recipe, *make_accelerator("fp32"))
        rounds = make_synthesizer(parts)
    finally:
        reset_accelerate()
    assert (rounds.inner, rounds.latent_lr, rounds.renew, rounds.coarse) == (6, 0.2, "first", 0.5)
    assert rounds.contrast is not None
    assert len(rounds.contrast.bank) == 70
    assert rounds.pool is parts.generator
    assert len(rounds.pool.images) == 50


def test_results_hold_every_figure_of_the_contract(runs: Runs) -> None:
    assert runs.run("figures", *SHORT).code == 0
    found = results(runs.folder / "figures")
    for name in ("teachers", "student", "tasks", "verdict", "seconds", "data_free", "versions", "device", "seed"):
        assert name in found
    assert "recipe=" in found["command"]
    for measured in (*found["teachers"].values(), found["student"]):
        assert 0 <= measured["interval"][0] <= measured["accuracy"] <= measured["interval"][1] <= 100
        assert measured["n"] == 540
    assert found["student"]["parameters"] < found["teachers"]["plain"]["parameters"]
    assert 0 <= found["student"]["agreement"]["percent"] <= 100
    assert {"total", "teachers", "distill", "evaluation"} <= found["seconds"].keys()
    purposes = [entry["purpose"] for entry in found["data_free"]]
    assert (purposes.count("evaluate"), {*purposes} <= {"evaluate", "train teacher"}) == (1, True)
    assert found["verdict"].keys() == {"ok", "notes", "warnings"}


def test_without_real_images_accuracies_are_null(runs: Runs, no_data: tuple[str, ...]) -> None:
    before = len(opened())
    assert runs.run("dark", *no_data).code == 0
    found = results(runs.folder / "dark")
    for measured in (*found["teachers"].values(), found["student"]):
        assert [measured[key] for key in ("accuracy", "n", "interval")] == [None, None, None]
    assert found["student"]["agreement"]["n"] == 2048
    assert not found["teachers"]["plain"]["trained_here"]
    assert len(opened()) == before  # the ledger is the process's


def test_a_finished_run_says_so_and_stops(runs: Runs) -> None:
    assert runs.run("done", *SHORT).code == 0
    before = files(runs.folder / "done")
    called = runs.run("done", *SHORT)
    assert called.code == 0
    assert "is finished; overwrite=true starts it over" in called.out
    assert "student" in called.out  # its table again
    assert files(runs.folder / "done") == before
    # keys that change how it runs but not what comes out are free
    assert "is finished" in runs.run("done", *SHORT, "runtime.checkpoint_every=9").out
    assert "holds a run with other keys (seed: 0 there, 1 here)" in runs.run("done", *SHORT, "seed=1").refused()
    assert files(runs.folder / "done") == before
    called = runs.run("done", *SHORT, "seed=1", "overwrite=true")
    assert "is finished" not in called.out
    assert results(runs.folder / "done")["seed"] == 1


def test_a_generator_is_reused_without_one_update(runs: Runs) -> None:
    assert runs.run("first", *SHORT).code == 0
    source = runs.folder / "first" / "generator"
    before = files(source)
    reuse = (f"generator.checkpoint={source}", "distill.steps=4", "runtime.log_every=1")
    called = runs.run("second", *reuse, "student.kwargs={width: 3, depth: 1}")
    assert called.code == 0, called.err
    folder = runs.folder / "second"
    assert files(source) == before
    assert not (folder / "generator" / "model.safetensors").exists()
    assert (folder / "student" / "model.safetensors").exists()
    assert [line["step"] for line in lines(folder) if line["phase"] == "student"] == [1, 2, 3, 4]
    assert not [line for line in lines(folder) if line["phase"] == "generator"]
    assert set(torch.load(folder / "checkpoints" / "latest" / "rank0.pt")) == {
        "phase",
        "done",
        "spent",
        "usual",
        "best",
        "fit",
    }


def test_noise_is_streamed_without_one_update(runs: Runs) -> None:
    """The control: Gaussian noise of the teachers' mean and std, drawn again wherever the folder goes."""
    given = ("generator.arch=pixels", "synthesis.steps=0", "distill.steps=4", "runtime.log_every=1")
    called = runs.run("noise", *given)
    assert (called.code, called.err) == (0, "")
    folder = runs.folder / "noise"
    assert {line["phase"] for line in lines(folder)} == {"student", "images", "evaluation"}
    assert [line["step"] for line in lines(folder) if line["phase"] == "student"] == [1, 2, 3, 4]
    assert results(folder)["student"]["n"] == 540
    generator = load_generator(folder / "generator")
    assert {"arch": "pixels", "steps": 0, "mean": [pytest.approx(0.3)]}.items() <= generator.description.items()
    images = generator(torch.randn(500, 64), torch.zeros(500, dtype=torch.int64))
    inside = images[(images > 0) & (images < 1)]
    assert images.shape == (500, 1, 8, 8)
    assert float((images == 0).float().mean()) == pytest.approx(0.182, abs=0.01)  # normal, 0.3 / 0.33 below its mean
    assert float(inside.median()) == pytest.approx(0.369, abs=0.01)  # halfway in probability from 0 to 1
    reused = (f"generator.checkpoint={folder / 'generator'}", "distill.steps=4", "runtime.log_every=1")
    assert runs.run("again", *reused).code == 0
    assert files(runs.folder / "again" / "student") == files(folder / "student")


def test_noise_serves_a_task_without_a_student(runs: Runs) -> None:
    noise = ("generator.arch=pixels", "synthesis.steps=0", "export.input=none")
    called = runs.run("noise", *noise, "tasks=[generator,ptq]", "ptq.method=nearest", "ptq.images=32")
    assert (called.code, called.err) == (0, "")
    assert "ptq" in results(runs.folder / "noise")["tasks"]
    assert load_generator(runs.folder / "noise" / "generator").description["arch"] == "pixels"


def test_every_round_is_a_line(runs: Runs) -> None:
    rounds = ("synthesis.inner=2", "synthesis.latent_lr=0.1", "distill.replay=0", "synthesis.losses.adversary=0")
    assert runs.run("lines", *rounds, "tasks=[generator]", "synthesis.steps=3", "runtime.log_every=50").code == 0
    assert [line["step"] for line in lines(runs.folder / "lines") if line["phase"] == "generator"] == [1, 2, 3]


def test_a_grid_is_due_with_the_first_line_after_so_many_steps(runs: Runs) -> None:
    rounds = ("synthesis.inner=2", "synthesis.latent_lr=0.1", "distill.replay=0", "synthesis.losses.adversary=0")
    for name, keys, wanted in (
        ("rounds", (*rounds, "tasks=[generator]", "synthesis.steps=7", "runtime.grid_every=3"), [3, 6, 7]),
        ("measured", ("runtime.grid_every=7", "runtime.log_every=4", "runtime.evaluations=3"), [8, 16, 20, 24, 28, 30]),
    ):
        assert runs.run(name, *keys).code == 0
        grids = [line["step"] for line in lines(runs.folder / name) if line["phase"] == "images"]
        assert grids == wanted


def test_a_pool_goes_on_to_serve_other_tasks_and_other_runs(runs: Runs) -> None:
    rounds = ("synthesis.inner=2", "synthesis.latent_lr=0.1", "distill.replay=0", "synthesis.pool=40", *SHORT)
    called = runs.run(
        "made", *rounds, "tasks=[distill,ptq]", "ptq.method=nearest", "ptq.images=32", "export.input=none"
    )
    assert (called.code, called.err) == (0, "")
    folder = runs.folder / "made"
    pool = load_generator(folder / "generator")
    assert {"arch": "pool", "made_by": "conv", "capacity": 40, "steps": 3}.items() <= pool.description.items()
    assert pool.description["bn_loss"].keys() == {"plain", "residual"}
    assert (pool.labels < 10).all()  # 3 rounds of 16 images
    assert "ptq" in results(folder)["tasks"]
    assert runs.run("served", f"generator.checkpoint={folder / 'generator'}", "distill.steps=4").code == 0
    assert results(runs.folder / "served")["student"]["n"] == 540


def test_a_generator_alone_and_then_a_student(runs: Runs) -> None:
    assert runs.run("alone", *SHORT, "tasks=[generator]").code == 0
    alone = runs.folder / "alone"
    assert (alone / "generator" / "model.safetensors").exists()
    assert not (alone / "student").exists()
    assert results(alone)["student"] is None
    assert runs.run("both", *SHORT, "tasks=[generator,distill]").code == 0
    both = runs.folder / "both"
    measured = [line["step"] for line in lines(both) if line["phase"] == "evaluation"]
    assert measured == [4, 5]  # after the three steps of the generator
    assert results(both)["student"]["last_quarter"]["evaluations"] == 1
    # the throw-away student of the adversary leaves nothing behind: the task after starts from a fresh one
    assert files(both / "generator") == files(alone / "generator")
    assert [line["step"] for line in lines(both) if line["phase"] == "student"] == [1, 2, 3, 4, 5]
    reused = f"generator.checkpoint={alone / 'generator'}"
    assert runs.run("later", *SHORT, reused).code == 0
    assert files(runs.folder / "later" / "student") == files(both / "student")


def test_a_dry_run_trains_and_writes_nothing(runs: Runs) -> None:
    before = sorted(runs.folder.rglob("*"))
    called = runs.run("dry", "--dry-run", "teachers.plain.kwargs={width: 5}", f"training.cache={runs.folder / 'cache'}")
    assert called.code == 2  # a key given twice
    called = runs.call(f"recipe={runs.recipe}", "output=dry", "training.cache=cache", "--dry-run")
    assert (called.code, called.err) == (0, "")
    assert sorted(runs.folder.rglob("*")) == before
    for words in ("teacher plain: dfkd:tiny_plain, 1,702 parameters, to be trained on digits", "generator: conv"):
        assert words in called.out
    for words in ("20 generator updates, 30 student updates", "estimated memory", "nothing was trained (--dry-run)"):
        assert words in called.out


def test_the_memory_estimated_grows_with_what_a_run_holds(runs: Runs) -> None:
    def estimated(*given: str) -> float:
        plain = ["distill.features=0"] if not any("features" in key for key in given) else []
        recipe = load_recipe(runs.arguments("x", "distill.fresh=0.25", *plain, *given)).recipe
        try:
            return estimated_memory(recipe, build(recipe, *make_accelerator("fp32")))
        finally:
            reset_accelerate()

    networks = [
        build_model(f"dfkd:tiny_{name}", classes=10, channels=1, kwargs=kwargs)
        for name, kwargs in (("plain", {"width": 4, "depth": 1}), ("residual", {"width": 8}))
    ]
    usual = estimated()
    ring = 4 * (8 * 8 + 4 * 10)  # a quarter of a batch: uint8 images of 64 pixels, float32 logits
    longer = estimated("distill.replay=1004")
    assert longer - usual == pytest.approx(1000 * ring)
    wide = estimated("student.kwargs={width: 40, depth: 1}")
    found = [build_model("dfkd:tiny_plain", classes=10, channels=1, kwargs={"width": w, "depth": 1}) for w in (2, 40)]
    small, large = (sum(p.numel() for p in network.parameters()) for network in found)
    assert wide - usual > 3 * 4 * (large - small)  # weights, gradients and momenta in float32, besides activations
    generators = [ConvGenerator(latent=8, classes=10, channels=1, size=8, width=width) for width in (4, 16)]
    small, large = (sum(p.numel() for p in network.parameters()) for network in generators)
    widths = sum(network.linear.in_features for network in networks)
    counts = []
    for network in networks:
        graph = symbolic_trace(network.eval())
        ShapeProp(graph).propagate(torch.zeros(1, 1, 8, 8))
        layers = [node for node in graph.graph.nodes if node.op == "call_module"]
        counts.append(sum(node.meta["tensor_meta"].shape.numel() for node in layers))
    zoo = 4 * sum(p.numel() for network in networks for p in network.parameters())
    room = 0.95 * zoo  # and no less than the larger one, with its statistics, takes
    more = {
        "generator.width=16": 4 * 4 * (large - small),  # and two moments of Adam
        "synthesis.batch_size=26": 4 * 2 * 10 * max(counts),
        "distill.features=1": 4 * (4 * 16 // 4 + 3 * found[0].linear.in_features) * widths,  # in the ring, a projector
        f"zoo.memory_gb={room / 1e9}": room - zoo,
    }
    assert estimated(*more) - usual == pytest.approx(sum(more.values()))
    pool = estimated("synthesis.inner=2", "synthesis.pool=40", "distill.replay=0")
    assert pool - usual == pytest.approx(40 * 64 - 4 * ring)  # in uint8, where the ring was
    channels = sum(norm.num_features for norm in networks[0].modules() if isinstance(norm, nn.BatchNorm2d))
    contrast = ("teachers.residual.enabled=false", "synthesis.losses.contrastive=1.0")
    banks = [estimated(*contrast, f"synthesis.bank={rows}") for rows in (100, 1100)]
    assert banks[1] - banks[0] == pytest.approx(4 * 1000 * channels)


def test_flags_that_only_print(runs: Runs) -> None:
    listed = runs.call("--list")
    assert listed.code == 0
    assert all(word in listed.out for word in ("digits", "tiny_inverted", "generator.arch="))
    shown = runs.call("--help")
    assert shown.code == 0
    assert all(word in shown.out for word in ("recipe=digits", "synthesis.losses.bn=", "zoo.sample="))
    printed = runs.call(f"recipe={runs.recipe}", "seed=5", "--print-config")
    assert printed.code == 0
    config = yaml.safe_load(printed.out)
    assert (config["seed"], config["synthesis"]["redraw"]) == (5, 2)
    assert sorted(path.name for path in runs.folder.iterdir()) == ["tiny.yaml"]


FACTORY = '''
import torch
from torch import nn

def odd(classes, channels, hidden=6):
    """Nobody's architecture."""
    return nn.Sequential(
        nn.Conv2d(channels, hidden, 5, 2), nn.BatchNorm2d(hidden), nn.SiLU(), nn.Conv2d(hidden, hidden, 3),
        nn.BatchNorm2d(hidden), nn.SiLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * hidden, classes),
    )
'''


CONVOLUTIONAL = """
from torch import nn

def pooled(classes, channels):
    layers = nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, classes, 6)
    return nn.Sequential(*layers, nn.Flatten())
"""


def test_a_student_learns_features_where_it_has_a_linear_layer(runs: Runs, no_data: tuple[str, ...]) -> None:
    (runs.folder / "theirs.py").write_text(CONVOLUTIONAL)
    model = ("student.model=python:theirs.py:pooled", "student.kwargs={}", "trust_code=true")
    told = "student has no features: no linear layer at its end"
    for name, given, said in (
        ("pooled", model, True),
        ("asked for none", (*model, "distill.features=0"), False),
        ("linear", (), False),
    ):
        called = runs.run(name, *no_data, *given)
        assert (called.code, called.err) == (0, "")
        assert (told in called.out) == said
    # What is learned besides shows in the loss from the first update on.
    runs.run("logits", *no_data, "distill.features=0")
    losses = [next(x["loss"] for x in lines(runs.folder / n) if x["phase"] == "student") for n in ("linear", "logits")]
    assert losses[0] > losses[1] + 0.5


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((), "plain, through 1x1 convolutions: features.2, features.6, features"),
        (
            ("teachers.residual.weight=2",),
            "residual, through 1x1 convolutions: features.3, features.4, features",
        ),
        (
            ("zoo.main=residual",),
            "residual, through 1x1 convolutions: features.3, features.4, features",
        ),
        (  # with half the channels of every layer: there is none to learn as it is
            ("student.weights=teacher",),
            "plain, through 1x1 convolutions: features.2, features.6, features",
        ),
        (("distill.maps=0",), None),
        (("teachers.plain.input_size=16",), None),
    ],
    ids=str,
)
def test_a_student_learns_the_stages_of_the_teacher_that_counts_most(
    runs: Runs, no_data: tuple[str, ...], given: tuple[str, ...], said: str | None
) -> None:
    called = runs.run("dry", "--dry-run", *no_data, *given)
    assert (called.code, called.err) == (0, "")
    assert f"the student learns {f'layers of {said}' if said else 'no layers of a teacher'}" in called.out


def image_folder(folder: Path, classes: int, each: int, size: int) -> None:
    for label in range(classes):
        (folder / f"kind-{label}").mkdir(parents=True)
        for number in range(each):
            grey = torch.randint(0, 256, (size, size), dtype=torch.uint8)
            Image.fromarray(grey.numpy()).save(folder / f"kind-{label}" / f"{number}.png")


def test_anyones_teachers_of_other_sizes_and_normalisations(runs: Runs) -> None:
    """28x28 grey images of five classes, architectures and checkpoints from elsewhere, one teacher at 20x20."""
    (runs.folder / "theirs.py").write_text(FACTORY)
    space: dict[str, Any] = {}
    exec(compile(ast.parse(FACTORY), "theirs", "exec"), space)
    for name, hidden in (("big", 6), ("small", 4)):
        torch.manual_seed(hidden)
        network: nn.Module = space["odd"](5, 1, hidden)
        torch.save({"state_dict": {f"module.{k}": v for k, v in network.state_dict().items()}}, f"{name}.pth")
    image_folder(runs.folder / "images", 5, 3, 28)
    given = ["classes=5", "image.size=28", "data.dataset=imagefolder", "data.root=images", *SHORT, "zoo.sample=2"]
    for name in ("plain", "residual"):
        given += [f"teachers.{name}.enabled=false"]
    for name, hidden in (("big", 6), ("small", 4)):
        given += [f"teachers.{name}.model=python:theirs.py:odd", f"teachers.{name}.weights={name}.pth"]
        given += [f"teachers.{name}.kwargs={{hidden: {hidden}}}"]
    given += ["teachers.small.input_size=20", "teachers.small.mean=[0.1]", "teachers.small.std=[0.5]"]
    assert "trust_code=true" in runs.run("theirs", *given).refused()
    assert not (runs.folder / "theirs").exists()
    called = runs.run("theirs", *given, "trust_code=true")
    assert (called.code, called.err) == (0, "")
    found = results(runs.folder / "theirs")
    assert found["teachers"].keys() == {"big", "small"}
    assert found["student"]["n"] == 15
    assert load_generator(runs.folder / "theirs" / "generator")(torch.randn(2, 8), torch.arange(2)).shape[-1] == 28


@pytest.mark.parametrize(
    "variant",
    [
        ("zoo.main=plain", "teachers.residual.enabled=false"),  # a zoo of one, zoo.sample=1
        ("distill.loss=kl", "distill.temperature=4", "synthesis.adversary_loss=kl", "synthesis.bn_distance=kl"),
        ("synthesis.learn_weights=false", "synthesis.mix.kind=cutmix", "synthesis.equalise=false"),
        (
            "synthesis.mix.kind=mixup",
            "zoo.sample=2",
            "generator.conditional=false",
            "synthesis.losses.diversity=0",
            "synthesis.losses.ce=0",
        ),
        ("synthesis.mix.antialias=true", "synthesis.mix.probability=1", "distill.replay=0", "distill.mix=0"),
        ("synthesis.losses.tv=0.1", "synthesis.losses.l2=0.1", "synthesis.losses.one_hot=0.1"),
        ("synthesis.losses.activation=0.1", "synthesis.losses.information=1", "runtime.channels_last=false"),
        ("synthesis.student_steps=2", "synthesis.redraw=0", "synthesis.warmup=0", "synthesis.clip=0"),
        ("synthesis.mix.probability=0", "runtime.sync_batchnorm=false", "synthesis.losses.adversary=0"),
    ],
)
def test_variants_run(runs: Runs, no_data: tuple[str, ...], variant: tuple[str, ...]) -> None:
    given = [argument for argument in no_data if argument.partition("=")[0] not in str(variant)]
    called = runs.run("variant", *given, *variant)
    assert (called.code, called.err) == (0, "")
    weights = load_file(runs.folder / "variant" / "student" / "model.safetensors")
    assert all(torch.isfinite(value).all() for value in weights.values())
    assert results(runs.folder / "variant")["student"]["agreement"]["percent"] is not None


def test_a_run_whose_teachers_take_turns_on_the_device_is_the_same_run(runs: Runs) -> None:
    given = (
        "zoo.sample=2",
        "tasks=[distill, prune]",
        "prune.images=32",
        "prune.steps=2",
        "export.input=none",
        *SHORT,
    )  # what is pruned is one of the zoo
    for name, room in (("free", "0"), ("paged", "81e-6")):  # the teachers take 80,656 and 7,056 bytes
        called = runs.run(name, *given, f"zoo.memory_gb={room}")
        assert (called.code, called.err) == (0, "")
    for folder in ("generator", "student", "prune"):
        torch.testing.assert_close(
            *(load_file(runs.folder / name / folder / "model.safetensors") for name in ("free", "paged")),
            rtol=0,
            atol=0,
        )
    refused = runs.run("little", *given, "zoo.memory_gb=80e-6").refused()
    assert (
        "teacher residual takes 8.07e-05 GB of the device where zoo.memory_gb=8e-05; set it to that or more" in refused
    )


def test_compiled_networks_take_the_same_steps_and_nothing_else_is_compiled(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = (
        "export.input=none",
        "synthesis.steps=2",
        "synthesis.warmup=0",
        "distill.steps=0",
        "teachers.residual.enabled=false",
    )
    graphs = CompileCounterWithBackend("aot_eager")  # the default one takes minutes
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=graphs))
    assert runs.run("eager", *given).code == 0
    assert graphs.frame_count == 0
    called = runs.run("compiled", *given, "runtime.compile=true")
    assert called.code == 0  # torch may say something of its own
    # The try of check_compile; the generator as it learns and as it streams; the teacher tapped and not; the student as
    # it learns and as adversary.
    assert graphs.frame_count == (15 if torch.__version__ < "2.12" else 7)  # 2.11 breaks off at each tapped norm
    for folder in ("generator", "student"):
        files = (load_file(runs.folder / name / folder / "model.safetensors") for name in ("compiled", "eager"))
        torch.testing.assert_close(*files, rtol=1e-3, atol=1e-3)


def test_where_nothing_can_be_compiled_a_run_says_what_to_do(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise RuntimeError("no g++")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=missing))
    refused = runs.run("compiled", *SHORT, "runtime.compile=true").refused()
    assert "runtime.compile=true, but torch.compile does not work here" in refused
    assert "install a C++ compiler, or on a GPU Triton, or set runtime.compile=false" in refused
    assert not (runs.folder / "compiled").exists()


def test_three_channels_and_a_saved_teacher_folder(runs: Runs) -> None:
    """Colour, another size, a teacher given as a folder of this project; its class count from the file."""
    torch.manual_seed(0)
    network = build_model("dfkd:tiny_inverted", classes=100, channels=3, kwargs={"width": 4, "depth": 1})
    about = {"model": "dfkd:tiny_inverted", "kwargs": {"width": 4, "depth": 1}, "classes": 100, "channels": 3}
    save_model(runs.folder / "given", network, about)
    given = ["teachers.plain.enabled=false", "teachers.residual.enabled=false", "data.dataset=none", *SHORT]
    given += ["teachers.mine.model=dfkd:tiny_inverted", "teachers.mine.weights=given", "image.size=13", "classes=100"]
    given += ["teachers.mine.kwargs={width: 4, depth: 1}", "teachers.mine.pad=2", "image.channels=3"]
    called = runs.run("colour", *given)
    assert (called.code, called.err) == (0, "")
    about = json.loads((runs.folder / "colour/generator/generator.json").read_text())
    assert about["teachers"]["mine"]["moves"] == [2, False, True]


def test_a_reader_that_leaves_early_costs_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe:
        monkeypatch.setattr("sys.stdout", pipe)
        assert main(["--list"]) == 128 + signal.SIGPIPE  # as of any program in `... | head`


def test_the_module_is_the_same_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train.py", "--list"])
    assert main() == 0
    assert "recipe=" in capsys.readouterr().out


def test_the_student_is_measured_while_it_trains(runs: Runs) -> None:
    assert runs.run("measured", "runtime.evaluations=8", "runtime.log_every=30").code == 0
    student = results(runs.folder / "measured")["student"]
    entries = [line for line in lines(runs.folder / "measured") if line["phase"] == "evaluation"]
    assert [entry["step"] for entry in entries] == [4, 8, 12, 15, 19, 23, 27, 30]  # evenly over 30, and the last
    assert {entry["images"] for entry in entries} == {540}
    assert entries[-1]["accuracy"] == student["accuracy"]
    last = [entries[-2]["accuracy"], entries[-1]["accuracy"]]
    assert student["last_quarter"]["mean"] == pytest.approx(sum(last) / 2)
    assert student["last_quarter"]["lowest"] == min(last)


def test_measuring_changes_nothing_and_without_images_it_is_agreement(runs: Runs, no_data: tuple[str, ...]) -> None:
    assert runs.run("often", *no_data, "runtime.evaluations=5").code == 0
    assert runs.run("never", *no_data, "runtime.evaluations=0").code == 0
    often, never = (files(runs.folder / name) for name in ("often", "never"))
    for name in ("generator/model.safetensors", "student/model.safetensors"):
        assert often[name] == never[name]
    assert results(runs.folder / "never")["student"]["last_quarter"] is None
    found = results(runs.folder / "often")["student"]
    assert found["last_quarter"]["of"] == "agreement"
    assert 0 <= found["last_quarter"]["mean"] <= 100


def test_what_goes_wrong_is_told_while_it_trains_and_in_the_verdict(runs: Runs) -> None:
    # A weight so large that it drowns all others, and no class is asked for.
    keys = ("synthesis.losses={ce: 0, bn: 0, adversary: 0, diversity: 0, one_hot: 1, tv: 100}", "synthesis.steps=60")
    called = runs.run("wrong", *keys, "synthesis.learn_weights=false", "synthesis.lr=0.05")
    assert called.code == 0, called.err
    found = results(runs.folder / "wrong")["verdict"]
    assert not found["ok"]
    warned = [line for line in lines(runs.folder / "wrong") if line["phase"] == "warning"]
    assert [{"step": line["step"], "text": line["text"]} for line in warned] == found["warnings"]
    assert any("synthesis.losses" in line["text"] for line in warned)
    assert f"warning at step {warned[0]['step']}: {warned[0]['text']}" in called.out
    assert "While it trained" in (runs.folder / "wrong" / "report.html").read_text()


def test_a_teacher_given_other_images_than_it_learned_is_told_before_it_costs_a_run(runs: Runs) -> None:
    text = "of 540 test images, no more than by chance: check its weights, its mean and std"
    assert text not in runs.run("sound", *SHORT).out
    like = {"kwargs": {"width": 4, "depth": 1}, "classes": 10, "channels": 1, "mean": [0.3]}.items()
    trained = [path for path in runs.cache.glob("plain-*/model.json") if like <= json.loads(path.read_text()).items()]
    wrong = ("teachers.plain.mean=[1]", "teachers.plain.std=[1000]", f"teachers.plain.weights={trained[0].parent}")
    called = runs.run("wrong", *SHORT, *wrong)
    found = results(runs.folder / "wrong")
    told = f"teacher plain has {found['teachers']['plain']['accuracy']:.1f} % {text}"
    assert f"warning at step 0: {told}" in called.out
    assert any(note.startswith(told) for note in found["verdict"]["notes"])


def test_batches_that_several_processes_pair_otherwise_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    given = [
        "recipe=digits",
        "tasks=[distill,qat]",
        "distill.batch_size=20",
        "qat.batch_size=18",
    ]
    say_groups(load_recipe(given).recipe, 1)
    assert not capsys.readouterr().out
    say_groups(load_recipe(given).recipe, 2)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" are ")[0] for line in lines] == [
        "10 images a process and update of distill.batch_size",
        "18 images a process and update of qat.batch_size",
    ]
    say_groups(load_recipe([*given, "distill.mix=0", "synthesis.batch_size=66"]).recipe, 2)
    assert not capsys.readouterr().out
    say_groups(load_recipe([*given, "distill.mix=0", "synthesis.batch_size=66", "synthesis.losses.spread=1"]).recipe, 2)
    assert capsys.readouterr().out.startswith("66 images a process and update of synthesis.batch_size")
    say_groups(load_recipe(["recipe=digits", "tasks=[generator]", "distill.batch_size=20"]).recipe, 2)  # its adversary
    assert capsys.readouterr().out.startswith("10 images a process and update of distill.batch_size")
