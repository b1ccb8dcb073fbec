"""What the tasks of a run are given, a model and images, and what is refused before anything is trained."""

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dfkd import assemble
from dfkd.assemble import Parts
from dfkd.classifier import Classifier, check_logits
from dfkd.compress.closed_form import check_closed_form
from dfkd.compress.files import load_compressed
from dfkd.compress.graph import network_input, network_of, wrapped_as
from dfkd.compress.prepare import layer_bits
from dfkd.compress.prune import PROBE, check_prunable, dependency_graph
from dfkd.compress.qat import as_teacher
from dfkd.compress.tracing import trace
from dfkd.errors import UserError
from dfkd.export import require_onnx
from dfkd.models.checkpoints import read_description
from dfkd.runtime import rng
from dfkd.schema import FewBits, Recipe
from dfkd.stream import Source, from_generator, from_images
from dfkd.zoo import describe, made_from, teacher_about

COMPRESSIONS = ("ptq", "qat", "prune", "udfc")  # the tasks that make a smaller model of their input
QUANTISED = "give the float model it was made from"


def check_tasks(recipe: Recipe) -> None:
    """Raise UserError where a task's input is no earlier task and no folder, its keys will not do, or a package or the
    images for it are missing."""
    earlier: list[str] = ["main"]
    for task in (task for task in recipe.tasks if task != "generator"):
        keys = settings(recipe, task)
        name = keys.input
        if name is not None and name not in earlier and not _is_folder(recipe, name):
            raise UserError(
                f"{task}.input={name} is no earlier task and no folder of a model; give a folder such as "
                f"runs/NAME/student, or of what is there before {task}: {', '.join(earlier)}"
            )
        if getattr(keys, "source", None) == "real" and recipe.data.dataset == "none":
            raise UserError(f"{task}.source=real needs real images: set data.dataset, or {task}.source=noise")
        if getattr(keys, "source", None) == "real":
            assemble.check_control(recipe)
        earlier += ["distill", "student"] if task == "distill" else [task]
        if task in COMPRESSIONS:
            _check_task(recipe, task)
    files = ["tasks", "none", *(name for name in earlier if name not in ("main", "distill"))]
    if recipe.export.input not in files:
        raise UserError(
            f"export.input={recipe.export.input} is nothing that this run writes; choose from {', '.join(files)}"
        )
    if recipe.export.input == "student":
        require_onnx()
    if "distill" in recipe.tasks and recipe.distill.input is not None:
        origin(recipe, "distill", recipe.distill.input)


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


def origin(recipe: Recipe, task: str, name: str) -> str:
    """Where the layers of a task's input come from: `main`, `student` (fresh of student.model) or a folder; what a task
    makes has the layers of what it was given. Raises UserError where the input is quantised by then."""
    given = name
    while name in recipe.tasks or name == "student":
        if name in ("qat", "ptq"):
            raise UserError(f"{task}.input={given} is quantised by then; {QUANTISED}")
        if name in COMPRESSIONS:
            name = settings(recipe, name).input
        elif "distill" in recipe.tasks and recipe.distill.input is not None:
            name = recipe.distill.input
        else:
            return "student"
    return name


def check_layers(parts: Parts) -> None:
    """Raise UserError where a task's input does not make the run's classes of its images, is quantised already, cannot
    be traced, has no layer that a name pattern of the task means, or nothing that the task could take out; before
    anything is trained."""
    recipe = parts.recipe
    shape = (PROBE, recipe.image.channels, recipe.image.size, recipe.image.size)
    images = torch.rand(shape, generator=rng("cpu", "check")).to(parts.shard.device)
    for task in (task for task in recipe.tasks if task != "generator"):
        given = settings(recipe, task).input
        if given is None:
            continue  # a fresh student, which was checked when it was made
        name = origin(recipe, task, given)
        try:
            fresh = parts.student if name == "student" and "distill" in recipe.tasks else None
            model = task_input(parts, name)[0] if fresh is None else fresh
            check_logits(model, images, recipe.classes, "it", "name a model of such images")
        except UserError as error:
            raise UserError(f"{task}.input={given}: {error}") from None
        try:
            if task in COMPRESSIONS:
                _check_layers(recipe, task, model, images)
        except UserError as error:
            raise UserError(f"{task}: {error}") from None


def _check_layers(recipe: Recipe, task: str, model: Classifier, images: torch.Tensor) -> None:
    keys, inputs = settings(recipe, task), network_input(model, images)
    graph = trace(network_of(model), inputs)
    if task in ("qat", "ptq"):
        layer_bits(graph, (keys.weights, keys.activations), **bits_by_layer(keys))
    if task == "prune":
        options = {"kind": keys.kind, "repair": keys.repair, "ignore": keys.ignore, "inner_only": keys.inner_only}
        check_prunable(model, images, keys.ratio, **options)
    if task == "udfc":
        check_closed_form(model, keys.ratio, keys.bits, keys.ignore, images[:1])


def settings(recipe: Recipe, task: str) -> Any:
    """The group of keys of a task that takes an input."""
    return getattr(recipe, task)


def input_folder(recipe: Recipe, name: str) -> Path | None:
    """Where an input is on the disk; None for the main teacher, which may not be."""
    if name == "main":
        return None
    made = {"distill": "student", "student": "student", **{task: task for task in COMPRESSIONS}}
    if name == "student" or name in recipe.tasks:
        return Path(recipe.folder) / made[name]
    return Path(os.path.expanduser(name))


def task_input(parts: Parts, name: str) -> tuple[Classifier, dict[str, Any]]:
    """The model that a task's `input` names, on the device, and its description."""
    folder = input_folder(parts.recipe, name)
    if folder is None:
        teacher = assemble.main_teachers(parts.recipe, parts.zoo)[0]
        spec = parts.recipe.teachers[teacher.name]
        about = describe(parts.recipe, spec.model, spec.kwargs, teacher)
        opened = made_from(teacher_about(parts.recipe, teacher.name))
        about |= {"opened": opened, "moves": list(teacher.moves)}
        # A copy: the zoo's own may have to leave the device, and is not to be changed.
        return as_teacher(teacher, copy.deepcopy(teacher.model)), about
    about = read_description(folder)
    if "quantized" in about.get("structure", {}):
        raise UserError(f"{folder} is quantised already; {QUANTISED}")
    model = load_compressed(folder, parts.recipe.trust_code).to(parts.shard.device)
    if parts.recipe.runtime.channels_last:
        model.to(memory_format=torch.channels_last)
    return model, about


def given_student(parts: Parts, name: str) -> tuple[Classifier, dict[str, Any]]:
    """The student that distill.input names, and its description."""
    model, about = task_input(parts, name)
    about.pop("selected", None)  # it has been trained since
    student = wrapped_as(model, model.model)  # a Teacher would stay in eval mode
    student.name = "student"
    return student, about


def distilled(parts: Parts) -> Parts:
    """The parts with the student that the task distill trains, where distill.input names one that is there already."""
    recipe = parts.recipe
    name = recipe.distill.input if "distill" in recipe.tasks else None
    if name is None or not (name == "main" or _is_folder(recipe, name)):
        return parts
    here = copy.copy(parts)
    here.student, here.student_about = given_student(parts, name)
    return here


def _generated(parts: Parts, model: Classifier) -> Source:
    return from_generator(parts.generator)


def _noise(parts: Parts, model: Classifier) -> Source:
    return assemble.noise_like(parts.recipe, [model])


def _real(parts: Parts, model: Classifier) -> Source:
    real = assemble.control_images(parts.recipe)
    return from_images(real.images, real.labels)


SOURCES: dict[str, Callable[[Parts, Classifier], Source]] = {"generator": _generated, "noise": _noise, "real": _real}


def task_source(parts: Parts, source: str, model: Classifier) -> Source:
    """Where a task's images come from, which are for a model: one of SOURCES."""
    return SOURCES[source](parts, model)


def bits_by_layer(keys: FewBits) -> dict[str, Any]:
    """Which layers have other bits than the rest."""
    return {"ends": keys.ends, "overrides": keys.overrides, "ignore": keys.ignore}
