"""The compression tasks of a run: from an input model and the stream to a smaller model, its files and its figures."""

import copy
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dfkd import assemble
from dfkd.assemble import Parts
from dfkd.checkpoints import write_atomically
from dfkd.classifier import Classifier
from dfkd.compress.closed_form import closed_form
from dfkd.compress.cost import cost
from dfkd.compress.files import load_compressed, save_compressed
from dfkd.compress.fit import Fit, hold_zeros, stage_hints
from dfkd.compress.graph import images_of, network_of, trace, with_network
from dfkd.compress.prune import dependency_graph, prune
from dfkd.compress.qat import Training, as_teacher, quantize
from dfkd.compress.quantize import layer_bits, layer_names, matching
from dfkd.compress.result import Compressed
from dfkd.data import opened
from dfkd.errors import UserError
from dfkd.evaluate import Accuracy, accuracy, agreement
from dfkd.export import export_onnx, require_onnx
from dfkd.models.checkpoints import read_description
from dfkd.runtime import Shard, autocast_of, say
from dfkd.schema import FewBits, Recipe
from dfkd.stream import Source, SyntheticStream, from_generator, from_images, from_noise
from dfkd.teachers import Teacher, have_features
from dfkd.verify import verify
from generators import ImageGenerator

HELD_OUT_EPOCH = 1_000_003  # an epoch that nothing ever trains on
HELD_OUT, HELD_OUT_BATCH = 2048, 256  # images
CALIBRATION_EPOCH = 1_000_004  # nor is it trained on: it sets ranges and repairs
CALIBRATION_BATCH = 128
QUANTISED = "give the float model it was made from"
TRAINED = ("qat", "prune")  # tasks that train a network whole, in the loop with checkpoints
DONE = "task.json"  # written last: with it a task is finished


def check_tasks(recipe: Recipe) -> None:
    """Raise UserError where a task's input is no earlier task and no folder, its keys will not do, or a package or the
    images for it are missing."""
    earlier: list[str] = ["main"]
    for task in (task for task in recipe.tasks if task != "generator"):
        keys = settings(recipe, task)
        name = keys.input
        if name is not None and name not in earlier and not _is_folder(recipe, name):
            raise UserError(
                f"{task}.input={name} is no earlier task and no folder of a model; before {task} there are "
                f"{', '.join(earlier)}"
            )
        if getattr(keys, "source", None) == "real" and recipe.data.dataset == "none":
            raise UserError(f"{task}.source=real needs real images: set data.dataset, or {task}.source=noise")
        if getattr(keys, "source", None) == "real":
            assemble.check_control(recipe)
        earlier += ["distill", "student"] if task == "distill" else [task]
        if task in TASKS:
            _check_task(recipe, task)
    files = ["tasks", "none", *(name for name in earlier if name not in ("main", "distill"))]
    if recipe.export.input not in files:
        raise UserError(f"export.input={recipe.export.input} is no task of this run; choose from {', '.join(files)}")
    if recipe.export.input == "student":
        require_onnx()
    if "distill" in recipe.tasks and recipe.distill.input is not None:
        source(recipe, "distill", recipe.distill.input)


def _is_folder(recipe: Recipe, name: str) -> bool:
    """Whether a name is a folder that this run does not make itself."""
    made = name in recipe.tasks or (name == "student" and ("distill" in recipe.tasks or recipe.overwrite))
    folder = None if made else input_folder(recipe, name)
    return folder is not None and folder.is_dir()


def _check_task(recipe: Recipe, task: str) -> None:
    keys = settings(recipe, task)
    if task == "prune" and keys.kind == "channels" and not keys.inner_only:
        dependency_graph()
    if task == "udfc" and not keys.ratio and keys.bits is None:
        raise UserError("udfc.ratio=0 and udfc.bits=null leave nothing to do; set one of them")
    if recipe.export.input in ("tasks", task):
        require_onnx()


def source(recipe: Recipe, task: str, name: str) -> str:
    """Where the layers of a task's input come from: `main`, `student` (fresh of student.model) or a folder; what a task
    makes has the layers of what it was given. Raises UserError where the input is quantised by then."""
    given = name
    while name in recipe.tasks or name == "student":
        if name in ("qat", "ptq"):
            raise UserError(f"{task}.input={given} is quantised by then; {QUANTISED}")
        if name in TASKS:
            name = settings(recipe, name).input
        elif "distill" in recipe.tasks and recipe.distill.input is not None:
            name = recipe.distill.input
        else:
            return "student"
    return name


def check_layers(parts: Parts) -> None:
    """Raise UserError where a task's input is quantised already, cannot be traced, or has no layer that a name pattern
    of the task means; before anything is trained."""
    recipe = parts.recipe
    for task in (task for task in recipe.tasks if task in TASKS):
        keys = settings(recipe, task)
        name = source(recipe, task, keys.input)
        fresh = parts.student if name == "student" and "distill" in recipe.tasks else None
        graph = trace(network_of(task_input(parts, name)[0] if fresh is None else fresh))
        if task in ("qat", "ptq"):
            layer_bits(graph, (keys.weights, keys.activations), **_layers(keys))
        for pattern in keys.ignore if task in ("prune", "udfc") else ():
            matching(layer_names(graph), pattern, f"{task}.ignore")


def settings(recipe: Recipe, task: str) -> Any:
    """The group of keys of a task that takes an input."""
    return getattr(recipe, task)


def input_folder(recipe: Recipe, name: str) -> Path | None:
    """Where an input is on the disk; None for the main teacher, which may not be."""
    if name == "main":
        return None
    made = {"distill": "student", "student": "student", **{task: task for task in TASKS}}
    if name == "student" or name in recipe.tasks:
        return Path(recipe.folder) / made[name]
    return Path(name)


def task_input(parts: Parts, name: str) -> tuple[Classifier, dict[str, Any]]:
    """The model that a task's `input` names, on the device, and its description."""
    folder = input_folder(parts.recipe, name)
    if folder is None:
        teacher = assemble.main_teachers(parts.recipe, parts.zoo)[0]
        spec = parts.recipe.teachers[teacher.name]
        about = assemble.describe(parts.recipe, spec.model, spec.kwargs, teacher)
        # A copy: the zoo's own may have to leave the device, and is not to be changed.
        return as_teacher(teacher, copy.deepcopy(teacher.model)), about
    about = read_description(folder)
    if "quantized" in about.get("structure", {}):
        raise UserError(f"input={name} is quantised already; {QUANTISED}")
    return load_compressed(folder, parts.recipe.trust_code).to(parts.shard.device), about


def task_source(parts: Parts, source: str, model: Classifier) -> Source:
    """Where a task's images come from."""
    recipe = parts.recipe
    if source == "noise":
        mean, std = assemble.pixel_statistics([model], recipe.image.channels)
        return from_noise(
            recipe.image.channels, recipe.image.size, recipe.classes, sum(mean) / len(mean), sum(std) / len(std)
        )
    if source == "real":
        real = assemble.control_images(recipe)
        return from_images(real.images, real.labels)
    return from_generator(parts.generator)


def calibration(parts: Parts, source: Source) -> SyntheticStream:
    """Images for ranges and repairs: the same on every process."""
    return SyntheticStream(
        source,
        batch_size=CALIBRATION_BATCH,
        seed=parts.recipe.seed,
        shard=Shard(parts.shard.device),
        epoch=CALIBRATION_EPOCH,
    )


def augmentation(recipe: Recipe) -> dict[str, Any]:
    """How images are moved and mixed before a network learns from them: as a student's."""
    distill = recipe.distill
    return {"shift": distill.shift, "flip": distill.flip, "mix": distill.mix}


def training_stream(
    parts: Parts,
    source: ImageGenerator | Source,
    teacher: Teacher | Sequence[Teacher] | None,
    batch_size: int,
    **options: Any,
) -> SyntheticStream:
    """Images that a student or what is compressed trains on, moved and mixed, this process's share of them, with the
    logits of a teacher or of several; options of SyntheticStream."""
    return SyntheticStream(
        source,
        batch_size=batch_size,
        teacher=teacher,
        seed=parts.recipe.seed,
        shard=parts.shard,
        autocast=autocast_of(parts.accelerator),
        channels_last=parts.recipe.runtime.channels_last,
        **augmentation(parts.recipe),
        **options,
    )


Train = Callable[[Fit], None]  # runs a Fit to its end, with logging and checkpoints


def _layers(keys: FewBits) -> dict[str, Any]:
    """Which layers have other bits than the rest."""
    return {"ends": (keys.ends[0], keys.ends[-1]), "overrides": keys.overrides, "ignore": keys.ignore}


def _ptq(parts: Parts, model: Classifier, source: Source, train: Train) -> Compressed:
    keys = parts.recipe.ptq
    options: dict[str, Any] = {}
    if keys.method != "nearest":
        options = {"unit": keys.method, "steps": keys.steps, "drop": keys.drop, "fisher": keys.fisher}
        options["seed"] = parts.recipe.seed
    return quantize(
        model,
        calibration(parts, source),
        (keys.weights, keys.activations),
        method="nearest" if keys.method == "nearest" else "reconstruct",
        images=keys.images,
        **_layers(keys),
        autocast=autocast_of(parts.accelerator),
        **options,
    )


def _qat(parts: Parts, model: Classifier, source: Source, train: Train) -> Compressed:
    keys = parts.recipe.qat
    training = Training(
        model,
        training_stream(parts, source, None, keys.batch_size, replay=keys.replay),  # Training gives it its teacher
        (keys.weights, keys.activations),
        calibration=calibration(parts, source),
        images=keys.images,
        **_layers(keys),
        warm_start=keys.warm_start,
        seed=parts.recipe.seed,
        steps=keys.steps,
        lr=keys.lr,
        weight_decay=keys.weight_decay,
        temperature=keys.temperature,
        hints=keys.hints,
        accelerator=parts.accelerator,
    )
    train(training.fit)
    return training.result()


def _prune(parts: Parts, model: Classifier, source: Source, train: Train) -> Compressed:
    keys = parts.recipe.prune
    pruned = prune(
        model,
        calibration(parts, source),
        keys.ratio,
        kind=keys.kind,
        repair=keys.repair,
        ignore=keys.ignore,
        images=keys.images,
        inner_only=keys.inner_only,
    )
    if keys.steps:
        hold_zeros(pruned.model.requires_grad_(True))
        teacher = as_teacher(model, copy.deepcopy(model.model))
        image = assemble.blank(parts.recipe, parts.shard.device)
        hints = stage_hints(pruned.model, teacher, image, keys.hints)
        networks = {"the network before": teacher, "what was pruned": pruned.model}
        features = keys.features > 0 and have_features(networks, image, "prune.features")
        say(f"what was pruned learns, of the layers before: {', '.join(hints.layers) if hints else 'none'}")
        train(
            Fit(
                pruned.model,
                training_stream(parts, source, teacher, keys.batch_size, features=features),
                steps=keys.steps,
                lr=keys.lr,
                temperature=keys.temperature,
                hold_norms=True,
                clip=5.0,
                hints=hints,
                features=keys.features,
                accelerator=parts.accelerator,
            )
        )
        pruned.model = with_network(model, network_of(pruned.model))  # Accelerate changed the forward of the other
    return pruned


def _udfc(parts: Parts, model: Classifier, source: Source, train: Train) -> Compressed:
    keys = parts.recipe.udfc
    return closed_form(
        model,
        keys.ratio,
        keys.bits,
        method=keys.method,
        alpha1=keys.alpha1,
        alpha2=keys.alpha2,
        ignore=keys.ignore,
    )


TASKS: dict[str, Callable[[Parts, Classifier, Source, Train], Compressed]] = {
    "ptq": _ptq,
    "qat": _qat,
    "prune": _prune,
    "udfc": _udfc,
}


def finished(recipe: Recipe, task: str) -> bool:
    """Whether a compression task of this run has been done."""
    return (Path(recipe.folder) / task / DONE).is_file()


def task_results(recipe: Recipe, task: str) -> dict[str, Any]:
    """The figures that a finished task wrote."""
    return dict(json.loads((Path(recipe.folder) / task / DONE).read_text()))


def run_task(parts: Parts, task: str, train: Train) -> None:
    """Carry out one compression task: compress, write the model and its exports, measure, write task.json.

    Every process computes the same; the main one writes.
    """
    begun, opened_before = time.perf_counter(), len(opened())
    keys = settings(parts.recipe, task)
    model, about = task_input(parts, keys.input)
    name = getattr(keys, "source", "none")
    source = task_source(parts, name, model)
    done = TASKS[task](parts, model, source, train)
    structure = {**about.get("structure", {}), **done.structure}
    structure["channels"] = {**about.get("structure", {}).get("channels", {}), **done.structure.get("channels", {})}
    folder = parts.folder / task
    figures: dict[str, Any] = {
        "input": keys.input,
        "source": "no data" if name == "none" else name,
        **compare(parts, model, done),
        "layers": done.layers,
        "opened": assemble.made_from(about) + opened()[opened_before:],
    }
    if parts.shard.rank == 0:
        made = dataclasses.asdict(keys) | (augmentation(parts.recipe) if task in TRAINED and keys.steps else {})
        history = {**about.get("compressed_by", {}), task: made}
        description = {**about, "structure": structure, "compressed_by": history, "opened": figures["opened"]}
        save_compressed(folder, done.model, description)
        if parts.recipe.export.input in ("tasks", task):
            figures["export"] = export(parts, folder, model, done.model)
        figures["seconds"] = round(time.perf_counter() - begun, 1)
        write_atomically(folder / DONE, json.dumps(figures, indent=2) + "\n")
    parts.accelerator.wait_for_everyone()


def compare(parts: Parts, before: Classifier, done: Compressed) -> dict[str, Any]:
    """The model before, naively compressed, and after: accuracy, cost, and agreement with the one before."""
    recipe = parts.recipe
    image = assemble.blank(recipe, parts.shard.device)
    models = {"before": before, "naive": done.naive, "after": done.model}
    scores = {name: measure(parts, model) for name, model in models.items()}
    costs = {name: cost(model, image) for name, model in models.items()}
    after = scores["after"]
    return {
        **{name: None if score is None else score.percent for name, score in scores.items()},
        "interval": None if after is None else list(after.interval),
        "intervals": {name: None if score is None else list(score.interval) for name, score in scores.items()},
        "n": None if after is None else after.n,
        "agreement": {name: agreement(models[name], before, held_out(parts)) for name in ("naive", "after")},
        "cost": {name: costs[name] for name in ("before", "after")},
    }


def measure(parts: Parts, model: nn.Module) -> Accuracy | None:
    """Accuracy on the real test images, in float32 whatever the run's precision: a quantised model is exact in it."""
    return None if parts.test is None else accuracy(model, parts.test, device=parts.shard.device)


def held_out(
    parts: Parts, count: int = HELD_OUT, autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> Iterator[Tensor]:
    """Batches of synthetic images, `count` in all, that nothing has trained on."""
    stream = SyntheticStream(
        parts.generator,
        batch_size=HELD_OUT_BATCH,
        seed=parts.recipe.seed,
        shard=Shard(parts.shard.device),
        autocast=autocast,
        epoch=HELD_OUT_EPOCH,
    )
    return images_of(stream, count)


def export(parts: Parts, folder: Path, before: nn.Module, after: nn.Module) -> dict[str, Any]:
    """Write the files to deploy beside the model, with the float model they are compared with, and verify them."""
    keys, recipe = parts.recipe.export, parts.recipe
    example = torch.rand(2, recipe.image.channels, recipe.image.size, recipe.image.size)
    after, before = (copy.deepcopy(model).cpu() for model in (after, before))  # .cpu() would move the zoo's own
    path = export_onnx(after, example, folder / "model.onnx")
    if not keys.verify:
        return {"file": path.name, "bytes": path.stat().st_size}
    float_path = export_onnx(before, example, folder / "before.onnx")
    images = torch.cat([batch.cpu().float() for batch in held_out(parts, keys.images)])
    return {"file": path.name, **verify(path, after, images, float_path=float_path, threads=keys.threads)}
