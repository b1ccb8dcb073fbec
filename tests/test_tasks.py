"""Compression tasks in a run: pipelines, files that rebuild, exact resume, two processes, early refusals."""

import gc
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime
import pytest
import torch
from runs_fixture import Runs, reset_accelerate, start, wait_for
from torch import nn

from dfkd import tasks
from dfkd.compress.files import load_compressed
from dfkd.compress.fit import Fit
from dfkd.compress.graph import network_of
from dfkd.compress.quantizers import quantized_layers
from dfkd.compress.result import Compressed
from dfkd.data import load_images
from dfkd.errors import UserError
from dfkd.models import build_model
from dfkd.models.checkpoints import read_description
from dfkd.recipe import load_recipe
from dfkd.run import build, prepare_student
from dfkd.runtime import make_accelerator
from dfkd.stream import from_generator, from_images
from dfkd.synthesis import Synthesizer
from dfkd.tasks import TASKS, TRAINED, run_task
from dfkd.teachers import Teacher
from dfkd.training import Plan
from generators import PoolGenerator

SHORT = (
    "synthesis.steps=4",
    "distill.steps=4",
    "qat.images=32",
    "ptq.images=32",
    "prune.images=64",
    "export.images=64",
)
SHORT += ("ptq.steps=4", "qat.steps=8", "qat.batch_size=16", "qat.warm_start=2", "prune.batch_size=16", "prune.steps=4")
FIGURES = {
    "before",
    "naive",
    "repaired",
    "after",
    "not_loaded",
    "interval",
    "intervals",
    "n",
    "source",
    "input",
    "cost",
    "agreement",
    "layers",
}


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def accuracy_of(folder: Path) -> float:
    """Percent of digits that the model in a folder names, on images loaded here."""
    test = load_images(
        "digits", train=False, root="data", train_root=None, channels=1, size=8, classes=10, purpose="evaluate"
    )
    with torch.no_grad():
        guesses = load_compressed(folder)(test.images.float() / 255).argmax(1)
    return 100 * (guesses == test.labels).double().mean().item()


def in_both(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of random images by a folder's ONNX file and by its weights."""
    images = torch.rand(20, 1, 8, 8)
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    given = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    return given, load_compressed(folder)(images).detach()


def test_every_task_in_one_run_each_with_its_figures_files_and_input(runs: Runs) -> None:
    chosen = "tasks=[distill,prune,qat,ptq,udfc]"
    pipeline = ("qat.input=prune", "ptq.input=student", "udfc.bits=4")
    done = runs.run("all", chosen, *pipeline, *SHORT)
    assert done.code == 0
    assert "qat trains with a peak learning rate of 0.01\n" in done.out  # 4 bits
    found = results(runs.folder / "all")["tasks"]
    assert list(found) == ["prune", "qat", "ptq", "udfc"]
    for name, task in found.items():
        folder = runs.folder / "all" / name
        assert set(task) >= FIGURES
        assert task["after"] == pytest.approx(accuracy_of(folder), abs=1e-9)
        assert (folder / "model.onnx").stat().st_size == task["export"]["size_bytes"]
        assert task["export"]["agreement"] == 100
        assert task["interval"] == task["intervals"]["after"]
        assert task["interval"][0] <= task["after"] <= task["interval"][1]
        given, expected = in_both(folder)
        assert (given - expected).norm() < 0.02 * expected.norm()
    assert found["qat"]["before"] == found["prune"]["after"]
    assert found["qat"]["cost"]["before"] == found["prune"]["cost"]["after"]
    assert found["ptq"]["before"] == results(runs.folder / "all")["student"]["accuracy"]
    assert found["prune"]["cost"]["after"]["macs"] < found["prune"]["cost"]["before"]["macs"]
    assert found["qat"]["cost"]["after"]["bytes"] < found["qat"]["cost"]["before"]["bytes"] / 3
    assert found["udfc"]["source"] == "no data"
    made = {name: read_description(runs.folder / "all" / name)["compressed_by"] for name in ("qat", "ptq")}
    assert list(made["qat"]) == ["prune", "qat"]
    assert all(each["mix"] == 0.5 and each["flip"] for each in made["qat"].values())
    assert made["qat"]["prune"]["ratio"] == 0.5
    assert "mix" not in made["ptq"]["ptq"]
    steps = [json.loads(line)["step"] for line in (runs.folder / "all" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)  # of distill, prune and qat one after the other
    assert steps[-1] == 8 + 4 + 8
    page = (runs.folder / "all" / "report.html").read_text()
    assert "Compression" in page
    assert "sqnr_db" in page


def test_the_main_teacher_alone_is_learned_compressed_and_compared_with(runs: Runs) -> None:
    short = [*(key for key in SHORT if not key.startswith("prune.steps")), "prune.steps=0"]
    assert runs.run("made", "tasks=[generator]", *short).code == 0
    given = (f"generator.checkpoint={runs.folder / 'made' / 'generator'}", "tasks=[distill,prune]", *short)
    assert runs.run("both", "zoo.main=residual", "export.input=student", *given).code == 0
    assert runs.run("alone", "teachers.plain.enabled=false", "export.input=none", *given).code == 0
    both, alone = (runs.folder / name for name in ("both", "alone"))
    for name in ("student", "prune"):
        weights = [(folder / name / "model.safetensors").read_bytes() for folder in (both, alone)]
        assert weights[0] == weights[1]
    found, teacher = results(both), results(both)["teachers"]["residual"]
    assert read_description(both / "prune")["model"] == "dfkd:tiny_residual"
    assert found["tasks"]["prune"]["before"] == pytest.approx(teacher["accuracy"])
    student = found["student"]
    assert student["agreement"] == results(alone)["student"]["agreement"]
    assert student["ratio"] == pytest.approx(student["parameters"] / teacher["parameters"])
    torch.testing.assert_close(*in_both(both / "student"), rtol=1e-3, atol=1e-3)
    assert student["export"]["agreement"] == 100


def test_images_to_train_on_to_calibrate_by_and_to_judge_by_are_others(runs: Runs) -> None:
    recipe = load_recipe(runs.arguments("x", "tasks=[generator]", *SHORT)).recipe
    try:
        parts = build(recipe, *make_accelerator("fp32"))
        seen: list[set[tuple[float, ...]]] = []

        def latents(draw: Callable[[], object]) -> set[tuple[float, ...]]:
            rows: set[tuple[float, ...]] = set()
            hook = parts.generator.register_forward_pre_hook(
                lambda module, given: rows.update(map(tuple, given[0].tolist()))
            )
            draw()
            hook.remove()
            return rows

        training = tasks.training_stream(parts, parts.generator, parts.zoo, 16)
        seen.append(latents(lambda: [training.batch(k) for k in range(20)]))
        seen.append(latents(lambda: list(tasks.held_out(parts))))
        seen.append(latents(lambda: tasks.calibration(parts, from_generator(parts.generator)).batch(0)))
    finally:
        reset_accelerate()
    assert [len(rows) for rows in seen] == [320, tasks.HELD_OUT, tasks.CALIBRATION_BATCH]
    assert len(set.union(*seen)) == sum(map(len, seen))


def test_prune_then_distil_then_quantise(runs: Runs) -> None:
    chosen = ("tasks=[generator,prune,distill,qat]", "distill.input=prune", "qat.input=student", "export.input=none")
    assert runs.run("pipe", *chosen, *SHORT).code == 0
    folder = runs.folder / "pipe"
    pruned, student, final = (network_of(load_compressed(folder / name)) for name in ("prune", "student", "qat"))
    shapes = [{name: p.shape for name, p in network.named_parameters() if p.dim() > 1} for network in (pruned, student)]
    assert shapes[0] == shapes[1]
    assert any((a != b).any() for a, b in zip(pruned.parameters(), student.parameters()))
    assert {name: layer.weight.shape for name, layer in quantized_layers(final).items()} == {
        name.removesuffix(".weight"): shape for name, shape in shapes[0].items()
    }


def test_zeros_stay_zeros_through_fine_tuning(runs: Runs) -> None:
    chosen = ("tasks=[generator,prune]", "prune.kind=weights", "prune.ratio=0.6")
    assert runs.run("zeros", *chosen, *SHORT).code == 0
    found = results(runs.folder / "zeros")["tasks"]["prune"]
    assert found["cost"]["after"]["sparsity"] == pytest.approx(60, abs=0.5)
    assert found["cost"]["before"]["sparsity"] == 0


@pytest.fixture
def compressed(runs: Runs) -> Iterator[Callable[..., tuple[Compressed, list[Fit]]]]:
    """A ResNet-20, or another network, after a task whose updates are left out, and what would have trained it."""
    images = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    def call(task: str, *keys: str, network: nn.Module | None = None) -> tuple[Compressed, list[Fit]]:
        torch.manual_seed(0)
        network = network or build_model("dfkd:resnet20", classes=10, channels=1)
        model = Teacher(network.eval(), mean=[0.3], std=[0.33])
        reset_accelerate()
        named = ("prune.steps", *(key.partition("=")[0] for key in keys))
        given = [key for key in SHORT if key.partition("=")[0] not in named]
        recipe = load_recipe(runs.arguments("here", "tasks=[generator]", *given, *keys)).recipe
        parts = build(recipe, *make_accelerator("fp32"))
        fits: list[Fit] = []
        done = TASKS[task](parts, model, from_images(images, torch.zeros(64, dtype=torch.long)), fits.append)
        return done, fits

    yield call
    reset_accelerate()


def test_a_model_that_cannot_be_exported_costs_nothing_else(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> Path:
        raise UserError("this operator does not export")

    monkeypatch.setattr(tasks, "export_onnx", refuse)
    done = runs.run("unexported", "tasks=[distill,ptq]", "ptq.method=nearest", *SHORT)
    assert done.code == 0
    assert "ptq is not exported: this operator does not export" in done.out
    found = results(runs.folder / "unexported")
    assert found["tasks"]["ptq"]["export"] == {"error": "this operator does not export"}
    assert found["verdict"]["notes"].count("task ptq is not exported: this operator does not export") == 1
    assert accuracy_of(runs.folder / "unexported" / "ptq") == pytest.approx(found["tasks"]["ptq"]["after"], abs=1e-9)


def test_a_folder_that_does_not_give_the_model_back_is_told(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    def another(folder: Path, trust_code: bool) -> nn.Module:
        loaded = load_compressed(folder, trust_code)
        loaded.model.linear.bias.data[3] += 1
        return loaded

    monkeypatch.setattr(tasks, "load_compressed", another)
    nearest = ("ptq.method=nearest", "export.input=none", *SHORT)
    done = runs.run("other", "tasks=[distill,ptq]", *nearest)
    assert done.code == 0
    assert (
        "- task ptq cannot be loaded again: what is loaded gives other logits than what was saved; report" in done.out
    )
    torn = read_description(runs.folder / "other" / "ptq") | {"kwargs": {"width": 3}}
    (runs.folder / "other/ptq/model.json").write_text(json.dumps(torn))
    monkeypatch.undo()
    recipe = load_recipe(runs.arguments("other", "tasks=[distill,ptq]", *nearest)).recipe
    why = tasks.not_loaded(recipe, runs.folder / "other" / "ptq", nn.Identity())
    assert why is not None
    assert "does not fit dfkd:tiny_plain" in why


@pytest.mark.parametrize("task", ["prune", "qat"])
def test_compressed_networks_learn_from_images_moved_and_mixed_as_a_students(compressed: Any, task: str) -> None:
    for shift, flip, mix in ((0.25, False, 1.0), (0.0, True, 0.0)):
        keys = (f"distill.shift={shift}", f"distill.flip={flip}", f"distill.mix={mix}", "prune.repair=none")
        _, (fit,) = compressed(task, *keys)
        stream = fit.stream
        assert (stream.shift, stream.flip) == (shift, flip)
        assert stream.mix is None if mix == 0 else stream.mix.p_batch == mix


def test_what_was_pruned_is_repaired_on_images_as_they_are(compressed: Any) -> None:
    still, moved = (
        compressed("prune", "prune.steps=0", f"distill.shift={shift}", f"distill.mix={mix}")
        for shift, mix in ((0, 0), (0.25, 1))
    )
    assert still[1] == moved[1] == []
    assert all((a == b).all() for a, b in zip(still[0].model.parameters(), moved[0].model.parameters(), strict=True))


def test_what_was_pruned_learns_features_and_the_blocks_that_keep_their_channels(compressed: Any, capfd: Any) -> None:
    keys = ("prune.lr=0.02", "prune.temperature=5", "prune.steps=9", "prune.batch_size=24")
    done, (fit,) = compressed("prune", "prune.hints=0.3", "prune.features=7", "prune.repair=none", *keys)
    assert (fit.rates[0], fit.temperature, fit.steps, fit.stream.batch_size) == (0.02, 5, 9, 24)
    held = {parameter.data_ptr() for parameter in done.model.parameters()}  # which are about to be trained
    assert not held & {parameter.data_ptr() for parameter in done.repaired.parameters()}
    ends = [f"model.layer{k}.2" for k in (1, 2, 3)]
    assert fit.hints.pairs == list(zip(ends, ends))
    assert fit.hints.weight == 0.3
    assert "of the layers before: layer1.2, layer2.2, layer3.2\n" in capfd.readouterr().out
    assert fit.projectors["features"].weight.shape == (64, 64)
    assert float(fit.weights.sum()) == pytest.approx(7)
    assert not fit.student.training  # its batch norms hold
    assert fit.clip == 5
    _, (fit,) = compressed("prune", "prune.hints=0", "prune.features=0", "prune.repair=none")
    assert fit.hints is None
    assert fit.projectors == {}
    assert "of the layers before: none" in capfd.readouterr().out
    headless = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 10, 6), nn.Flatten())
    assert compressed("prune", "prune.repair=none", network=headless)[1][0].projectors == {}
    assert "the network before has no features" in capfd.readouterr().out


def test_what_a_recipe_says_of_a_task_is_what_it_is_made_with(compressed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def noted(name: str) -> None:
        monkeypatch.setattr(tasks, name, lambda model, *given, **options: {"given": given, **options})

    noted("quantize")
    few = ("weights=3", "activations=5", "ends=[6,7]", "overrides={'layer1.*': [4, 6]}", "ignore=[linear]")
    own = ("ptq.method=layer", "ptq.images=48", "ptq.steps=7", "ptq.drop=0.2", "ptq.fisher=true", "seed=9")
    done, _ = compressed("ptq", *(f"ptq.{key}" for key in few), *own)
    bits = {"ends": [6, 7], "overrides": {"layer1.*": [4, 6]}, "ignore": ["linear"]}
    wanted = {
        "method": "reconstruct",
        "unit": "layer",
        "images": 48,
        "steps": 7,
        "drop": 0.2,
        "fisher": True,
        "seed": 9,
    }
    assert done["given"][1] == (3, 5)
    assert done.items() >= (wanted | bits).items()

    noted("prune")
    own = ("prune.kind=channels", "prune.ratio=0.3", "prune.repair=batch_norm", "prune.inner_only=true")
    done, fits = compressed("prune", "prune.steps=0", "prune.images=48", "prune.ignore=[layer1.*]", *own)
    wanted = {"kind": "channels", "repair": "batch_norm", "inner_only": True, "images": 48, "ignore": ["layer1.*"]}
    assert done["given"][1] == 0.3
    assert done.items() >= wanted.items()
    assert fits == []

    noted("closed_form")
    own = ("udfc.method=udfc", "udfc.ratio=0.3", "udfc.bits=5", "udfc.alpha1=0.03", "udfc.alpha2=0.04")
    done, _ = compressed("udfc", "udfc.ignore=[layer2.*]", *own)
    wanted = {"method": "udfc", "alpha1": 0.03, "alpha2": 0.04, "ignore": ["layer2.*"]}
    assert tuple(done.pop("image").shape) == (1, 1, 8, 8)
    assert done == {"given": (0.3, 5), **wanted}

    def training(model: nn.Module, stream: Any, bits: Any, **options: Any) -> SimpleNamespace:
        found = {"stream": stream, "bits": bits, **options}
        return SimpleNamespace(fit=SimpleNamespace(rates=[0.1]), result=lambda: found)

    monkeypatch.setattr(tasks, "Training", training)
    own = ("qat.images=48", "qat.warm_start=3", "qat.steps=7", "qat.lr=0.02", "qat.weight_decay=0.004", "seed=9")
    own += ("qat.temperature=5", "qat.hints=0.6", "qat.replay=6", "qat.batch_size=24")
    done, _ = compressed("qat", *(f"qat.{key}" for key in few), *own)
    wanted = {"images": 48, "warm_start": 3, "steps": 7, "lr": 0.02, "weight_decay": 0.004, "seed": 9, "bits": (3, 5)}
    assert done.items() >= (wanted | {"temperature": 5, "hints": 0.6} | bits).items()
    assert (done["stream"].batch_size, done["stream"].replay.slots, done["stream"].seed) == (24, 6, 9)


def test_what_was_pruned_of_weights_stays_so_where_a_student_goes_on_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with torch.no_grad():
        network[1].weight[:, ::2] = 0
    monkeypatch.setattr("dfkd.run.given_student", lambda parts, name: (network.requires_grad_(False), {"of": name}))
    recipe = SimpleNamespace(distill=SimpleNamespace(input="prune"), runtime=SimpleNamespace(sync_batchnorm=False))
    parts: Any = SimpleNamespace(recipe=recipe)
    prepare_student(parts, Plan("distill", 0, 0, 4))
    assert parts.student_about == {"of": "prune"}
    parts.student(torch.rand(4, 1, 8, 8)).square().sum().backward()
    gradient = network[1].weight.grad
    assert gradient is not None
    assert (gradient[:, ::2] == 0).all()
    assert (gradient[:, 1::2] != 0).all()


def test_a_file_is_verified_as_the_recipe_says_beside_the_float_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(model: nn.Module, example: torch.Tensor, path: Path) -> Path:
        path.write_text(type(model).__name__)
        return path

    monkeypatch.setattr(tasks, "export_onnx", write)
    monkeypatch.setattr(tasks, "verify", lambda path, model, images, **options: {"n": len(images), **options})
    monkeypatch.setattr(tasks, "held_out", lambda parts, count: torch.rand(count, 1, 8, 8).split(5))
    keys = SimpleNamespace(verify=True, images=12, threads=3)
    recipe = SimpleNamespace(export=keys, image=SimpleNamespace(channels=1, size=8))
    parts: Any = SimpleNamespace(recipe=recipe)
    found = tasks.export(parts, tmp_path, nn.Identity(), nn.Flatten())
    assert found == {"file": "model.onnx", "n": 12, "threads": 3, "float_path": tmp_path / "before.onnx"}
    assert [(tmp_path / f"{name}.onnx").read_text() for name in ("before", "model")] == ["Identity", "Flatten"]


@pytest.mark.parametrize("count", [4, 6, 99])
def test_of_a_pool_images_of_all_its_rounds_judge_each_once(count: int) -> None:
    pool = PoolGenerator(capacity=12, classes=2, channels=1, size=2)
    pool.push(torch.arange(8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2) / 255, torch.arange(8) % 2)  # of 12 places, 8
    parts: Any = SimpleNamespace(generator=pool)
    batches = torch.cat(list(tasks.held_out(parts, count)))
    numbers = (255 * batches[:, 0, 0, 0]).round().int().tolist()
    assert numbers == {4: [0, 2, 4, 6], 6: [0, 1, 2, 4, 5, 6], 99: list(range(8))}[count]


def test_a_generator_is_used_again_and_controls_stand_in_for_it(runs: Runs) -> None:
    assert runs.run("made", "tasks=[generator]", *SHORT).code == 0
    generator = runs.folder / "made" / "generator" / "model.safetensors"
    before = hashlib.sha256(generator.read_bytes()).hexdigest()
    for source in ("generator", "noise", "real"):
        given = ("tasks=[ptq]", f"generator.checkpoint={generator.parent}", f"ptq.source={source}", "export.input=none")
        assert runs.run(source, *given, *SHORT).code == 0
        found = results(runs.folder / source)
        assert found["tasks"]["ptq"]["source"] == source
        purposes = {entry["purpose"] for entry in found["data_free"]}
        assert purposes == {"train teacher", "evaluate"} | ({"control"} if source == "real" else set())
    assert hashlib.sha256(generator.read_bytes()).hexdigest() == before


CONTROL = {"source": "digits", "split": "train", "purpose": "control", "n": 1257}


def controls(folder: Path) -> list[dict]:
    """What a run says it opened as a control."""
    return [entry for entry in results(folder)["data_free"] if entry["purpose"] == "control"]


@pytest.mark.parametrize("source", ["noise", "real"])
def test_a_student_is_trained_on_a_control_beside_a_generator(runs: Runs, source: str) -> None:
    assert runs.run("made", "tasks=[generator]", f"distill.source={source}", *SHORT).code == 0
    assert controls(runs.folder / "made") == []  # whose student is the adversary, on the generator's own images
    chosen = (f"generator.checkpoint={runs.folder / 'made' / 'generator'}", "distill.flip=false", "distill.mix=0")
    assert f", a control on {source}" in runs.run(source, *chosen, f"distill.source={source}", *SHORT, "--dry-run").out
    called = runs.run(source, *chosen, f"distill.source={source}", "distill.shift=0", *SHORT)
    assert f"the student is a control, trained on {'real images' if source == 'real' else 'noise'}" in called.out
    folder = runs.folder / source
    about = json.loads((folder / "student" / "model.json").read_text())
    assert results(folder)["student"]["source"] == about["source"] == source
    assert controls(folder) == about["opened"] == [CONTROL] * (source == "real")
    ring = torch.load(folder / "checkpoints" / "latest" / "rank0.pt")["fit"]["replay"]["images"]
    real = load_images(
        "digits", train=True, root="data", train_root=None, channels=1, size=8, classes=10, purpose="control"
    )
    known = {image.numpy().tobytes() for image in real.images}
    images = ring.flatten(0, 1).permute(0, 3, 1, 2)
    assert all((image.contiguous().numpy().tobytes() in known) == (source == "real") for image in images)


def test_the_generator_beside_a_control_is_the_one_without(runs: Runs) -> None:
    made = set()
    for source in ("generator", "noise", "real"):
        assert runs.run(source, "tasks=[generator,distill]", f"distill.source={source}", *SHORT).code == 0
        made.add((runs.folder / source / "generator" / "model.safetensors").read_bytes())
    assert len(made) == 1


def test_what_a_control_opened_stays_with_the_model(runs: Runs) -> None:
    chosen = ("tasks=[generator,distill,qat]", "distill.source=real", "qat.input=student", *SHORT)
    assert runs.run("first", "export.input=none", *chosen).code == 0
    first = runs.folder / "first"
    assert controls(first) == [CONTROL]
    assert json.loads((first / "qat" / "model.json").read_text())["opened"] == [CONTROL]
    (first / "results.json").unlink()
    (first / "qat" / "task.json").unlink()
    assert "resuming" in runs.run("first", "export.input=none", *chosen).out  # in qat: distill opens nothing again
    assert controls(first) == [CONTROL]
    again = (f"generator.checkpoint={first / 'generator'}", "export.input=none", *SHORT)
    assert runs.run("second", *again, "tasks=[distill]", f"distill.input={first / 'student'}").code == 0
    assert controls(runs.folder / "second") == [CONTROL]
    assert runs.run("third", *again, "tasks=[prune]", "prune.source=real").code == 0
    assert runs.run("fourth", *again, "tasks=[distill]", f"distill.input={runs.folder / 'third' / 'prune'}").code == 0
    assert controls(runs.folder / "third") == controls(runs.folder / "fourth") == [CONTROL]


def test_a_teacher_that_was_trained_here_says_so_of_what_is_made_of_it(runs: Runs) -> None:
    assert runs.run("made", "tasks=[generator]", *SHORT).code == 0
    found = [(path.parent, json.loads(path.read_text())) for path in runs.cache.glob("plain-*/model.json")]
    trained = next(
        folder for folder, about in found if (about["classes"], about["kwargs"]) == (10, {"width": 4, "depth": 1})
    )
    given = (f"generator.checkpoint={runs.folder / 'made' / 'generator'}", "tasks=[prune]", f"prune.input={trained}")
    assert runs.run("pruned", *given, "export.input=none", *SHORT).code == 0
    (entry,) = json.loads((runs.folder / "pruned" / "prune" / "model.json").read_text())["opened"]
    assert (entry["purpose"], entry["split"]) == ("train teacher", "train")
    again = (*given[:2], f"prune.input={runs.folder / 'pruned' / 'prune'}", "export.input=none", *SHORT)
    assert runs.run("again", *again).code == 0
    assert json.loads((runs.folder / "again" / "prune" / "model.json").read_text())["opened"] == [entry]
    assert runs.run("main", *given[:2], "export.input=none", *SHORT).code == 0  # by default of the main teacher
    about = json.loads((runs.folder / "main" / "prune" / "model.json").read_text())
    moves = json.loads((trained / "model.json").read_text())["moves"]
    assert (about["opened"], about["moves"]) == ([entry], moves)
    assert any(moves)
    # A student that goes on from it has seen other images since, moved as distill's keys say.
    assert runs.run("taught", given[0], "tasks=[distill]", "distill.input=main", *SHORT).code == 0
    student, teacher = (load_compressed(each).state_dict() for each in (runs.folder / "taught" / "student", trained))
    moved = {name for name, value in student.items() if not torch.equal(value, teacher[name])}
    assert {name.rpartition(".")[2] for name in moved} >= {"weight", "bias", "running_mean", "running_var"}
    about = json.loads((runs.folder / "taught" / "student" / "model.json").read_text())
    assert about["opened"] == [entry]
    assert about["moves"] == [1, True, False]
    assert about["moves"] != moves


def test_a_generator_draws_alike_in_the_run_that_trained_it_and_from_its_file(runs: Runs) -> None:
    given = ("runtime.precision=bf16", "ptq.method=nearest", "export.input=none", *SHORT)
    assert runs.run("live", "tasks=[generator,ptq]", *given).code == 0
    reused = f"generator.checkpoint={runs.folder / 'live' / 'generator'}"
    assert runs.run("again", "tasks=[ptq]", reused, *given).code == 0
    files = [(runs.folder / name / "ptq" / "model.safetensors").read_bytes() for name in ("live", "again")]
    figures = [results(runs.folder / name)["tasks"]["ptq"]["agreement"] for name in ("live", "again")]
    assert files[0] == files[1]
    assert figures[0] == figures[1]


def test_tasks_in_pieces_end_with_the_same_bits_in_mixed_precision(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    spent: list[tuple[str, float]] = []  # by earlier calls, in the training of a task

    def noted(parts: Any, task: str, train: Any, trained: float) -> None:
        spent.append((task, trained))
        gc.collect()
        assert not [each for each in gc.get_objects() if isinstance(each, Fit | Synthesizer)]  # of tasks before
        run_task(parts, task, train, trained + 100)

    given = (
        "tasks=[distill,qat,prune,ptq]",
        "runtime.precision=bf16",
        "runtime.log_every=4",
        "export.input=none",
        *SHORT,
    )
    assert runs.run("whole", *given).code == 0
    monkeypatch.setattr("dfkd.run.run_task", noted)
    said = ""
    for _ in range(20):
        called = runs.run("pieces", *given, "runtime.minutes=1e-6")
        assert called.code == 0, called.err
        said += called.out
        if (runs.folder / "pieces" / "results.json").exists():
            break
    assert "task qat is next" in said
    assert "task prune is next" in said
    assert "task ptq is next" in said
    for name in ("generator", "student", "qat", "prune", "ptq"):
        whole, pieces = ((runs.folder / run / name / "model.safetensors").read_bytes() for run in ("whole", "pieces"))
        assert whole == pieces, name
    figures = [results(runs.folder / run) for run in ("whole", "pieces")]
    assert figures[0]["student"] == figures[1]["student"]
    assert figures[0]["seconds"].keys() == figures[1]["seconds"].keys()  # of all calls, whatever came last
    before = [seconds for task, seconds in spent if task == "qat"]
    assert before == sorted({*before})  # each call knows of the one before
    assert (before[0], len(before) > 1) == (0.0, True)
    assert figures[1]["seconds"]["qat"] == figures[1]["tasks"]["qat"]["seconds"] > 100 + before[-1]


def test_a_run_without_checkpoints_in_pieces_writes_its_first_lines_once(runs: Runs) -> None:
    assert runs.run("first", "tasks=[generator]", *SHORT).code == 0
    given = ("tasks=[ptq,udfc]", f"generator.checkpoint={runs.folder / 'first' / 'generator'}", "ptq.method=nearest")
    calls = [runs.run("pieces", *given, "export.input=none", *SHORT, "runtime.minutes=1e-6") for _ in range(2)]
    assert ["task udfc is next" in called.out for called in calls] == [True, False]
    lines = (runs.folder / "pieces" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["phase"] for line in lines].count("images") == 1


@pytest.mark.parametrize("trained", TRAINED)
def test_a_run_killed_while_what_it_compresses_trains_goes_on_exactly(runs: Runs, trained: str) -> None:
    chosen = (f"tasks=[generator,ptq,{trained}]", "export.input=none", *SHORT[:5], "ptq.steps=2")
    chosen += (f"{trained}.steps=60", f"{trained}.batch_size=16", "qat.warm_start=2")
    assert runs.run("whole", *chosen).code == 0
    log, folder = runs.folder / "killed.log", runs.folder / "killed"
    job = start(runs.arguments("killed", *chosen), log)
    latest = folder / "checkpoints" / "latest"
    assert wait_for((folder / "ptq" / "task.json").exists, job.alive)
    before = os.readlink(latest)
    assert wait_for(lambda: os.readlink(latest) != before, job.alive)
    assert job.kill()
    assert not (folder / trained / "task.json").exists()
    done_before = (folder / "ptq" / "task.json").stat().st_mtime_ns
    assert "resuming" in runs.run("killed", *chosen).out
    assert (folder / "ptq" / "task.json").stat().st_mtime_ns == done_before
    for task in ("ptq", trained):
        same = [(runs.folder / run / task / "model.safetensors").read_bytes() for run in ("whole", "killed")]
        assert same[0] == same[1]


def test_what_nothing_trains_in_a_run_is_shown_and_what_diverges_is_refused(runs: Runs) -> None:
    assert runs.run("made", "tasks=[generator]", *SHORT).code == 0
    given = (f"generator.checkpoint={runs.folder / 'made' / 'generator'}", "export.input=none", *SHORT)
    assert runs.run("shown", "tasks=[ptq]", "ptq.method=nearest", *given).code == 0
    assert [path.name for path in (runs.folder / "shown" / "images").iterdir()] == ["frozen-generator-000000.png"]
    assert "grid of synthetic images" in (runs.folder / "shown" / "report.html").read_text()
    line = runs.run("broken", "tasks=[qat]", "qat.lr=1e9", *given).refused()
    assert "NaN or infin" in line
    assert "lower" in line


# Quantised weights may differ by one level where rounding of sums falls on the other side.
@pytest.mark.parametrize(("task", "within"), [("qat", 2e-3), ("prune", 1e-6)])
def test_two_processes_train_what_they_compress_as_one(runs: Runs, task: str, within: float) -> None:
    assert runs.run("made", "tasks=[generator]", *SHORT).code == 0
    given = (f"tasks=[{task}]", f"generator.checkpoint={runs.folder / 'made' / 'generator'}", "export.input=none")
    given += (f"{task}.steps=8", f"{task}.images=32", "qat.warm_start=2")
    log = runs.folder / "two.log"
    assert start(runs.arguments("two", *given, f"{task}.batch_size=8"), log, world=2).join() == [0, 0], log.read_text()
    assert runs.run("one", *given, f"{task}.batch_size=16").code == 0
    one, two = (network_of(load_compressed(runs.folder / name / task)) for name in ("one", "two"))
    for (name, a), b in zip(one.state_dict().items(), two.state_dict().values()):
        a, b = a.double(), b.double()
        assert (a - b).abs().mean() < within * max(1.0, float(a.abs().mean())), name
