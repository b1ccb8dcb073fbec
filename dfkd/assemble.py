"""Objects from a recipe: generator, student, controls, and all parts of a run together (zoo.py: its teachers)."""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from torch import Tensor, nn

from dfkd.classifier import Classifier, check_logits, check_trainable
from dfkd.data import RealImages, check_folder
from dfkd.errors import UserError, in_a_line
from dfkd.models.checkpoints import folder_about
from dfkd.models.selection import select_weights
from dfkd.runtime import Deadline, Shard, eval_mode, rng
from dfkd.schema import SELECTED, Recipe
from dfkd.stream import Source, from_noise
from dfkd.teachers import Teacher
from dfkd.zoo import (
    Say,
    build_network,
    describe,
    load_recipe_zoo,
    made_from,
    real_images,
    seeded,
    teacher_about,
)
from generators import GENERATORS, ImageGenerator, PoolGenerator, build_generator, load_generator

TRAINABLE = tuple(name for name, kind in GENERATORS.items() if kind is not PoolGenerator)


@dataclass
class Parts:
    """What a recipe builds; networks are checked and on the device."""

    recipe: Recipe
    accelerator: Accelerator
    shard: Shard
    zoo: list[Teacher]
    generator: ImageGenerator
    student: Classifier | None
    student_about: dict[str, Any]
    test: RealImages | None
    worker: ImageGenerator | None = None  # what works in rounds for the pool that `generator` then is
    bn: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return Path(self.recipe.folder)


def parameters(module: nn.Module) -> int:
    """The number of parameters of a module."""
    return sum(p.numel() for p in module.parameters())


def control_images(recipe: Recipe) -> RealImages:
    """Real images in place of synthetic ones, as a control: training images, or test images where there are no others.
    Raises UserError where the recipe has no real images."""
    with PartialState().local_main_process_first():  # the first one downloads
        return real_images(recipe, train=_has_training_images(recipe), purpose="control")


def check_control(recipe: Recipe) -> None:
    """Raise UserError where control_images have no folder, or not one for each class, before anything is trained.

    Whether each can be read shows when they are.
    """
    data = recipe.data
    if data.dataset == "imagefolder":
        check_folder(_has_training_images(recipe), data.root, data.train_root, recipe.classes)


def _has_training_images(recipe: Recipe) -> bool:
    return recipe.data.dataset != "imagefolder" or recipe.data.train_root is not None


def train_zoo(parts: Parts, say: Say, deadline: Deadline | None = None) -> None:
    """Put the zoo that is used, its teachers trained where they must be, in the place of the one that was checked.
    Raises Paused where the deadline comes first."""
    if all(spec.weights for spec in parts.recipe.zoo_specs.values()):  # it is the one that was checked
        return
    parts.zoo = []  # the two must not be in memory side by side
    parts.zoo = load_recipe_zoo(parts.recipe, parts.shard.device, say, deadline=deadline)


def blank(recipe: Recipe, device: torch.device, count: int = 1) -> torch.Tensor:
    """Black images [count, C, H, W] of a recipe's, to see what a network makes of their shape."""
    image = recipe.image
    return torch.zeros(count, image.channels, image.size, image.size, device=device)


def main_teachers(recipe: Recipe, zoo: list[Teacher]) -> list[Teacher]:
    """The teachers that the student learns: `zoo.main` alone, or all."""
    return [teacher for teacher in zoo if recipe.zoo.main in (None, teacher.name)]


def make_student(recipe: Recipe, zoo: list[Teacher], device: torch.device) -> tuple[Classifier, dict[str, Any]]:
    """The student and its description, with the normalisation of its (main or first) teacher, and maybe a selection of
    its weights, or with that of the folder it begins with; checked on an image of the recipe's size."""
    spec, like = recipe.student, main_teachers(recipe, zoo)[0]
    if selects := spec.weights == SELECTED:
        spec = dataclasses.replace(spec, weights="")
    try:
        model = seeded(recipe, "student", lambda: build_network(recipe, spec))
    except UserError as error:
        raise UserError(f"student: {error}") from error
    mean, std = like.normalisation
    made = folder_about(spec.weights)
    input_size = like.input_size if selects else made.get("input_size")
    own = {"mean": made.get("mean", mean), "std": made.get("std", std)}
    own["input_size"] = None if input_size == recipe.image.size else input_size
    student = Classifier(model, name="student", **own).to(device)
    if recipe.runtime.channels_last:
        student.to(memory_format=torch.channels_last)
    about = describe(recipe, spec.model, spec.kwargs, student) | {"opened": made_from(made)}
    if selects:
        about["selected"] = {"teacher": like.name, "share": select_weights(model, like.model)}
        about["opened"] = made_from(teacher_about(recipe, like.name))
    size = recipe.image.size
    images = torch.rand(8, recipe.image.channels, size, size, generator=rng(device, "check"), device=device)
    try:
        check_logits(
            student.eval(), images, recipe.classes, student.name, f"choose another student.model than {spec.model}"
        )
    except UserError as error:
        raise UserError(f"the {error}") from None
    check_trainable(student, images, f"the student {spec.model}")
    return student, about


def noise_like(recipe: Recipe, models: Sequence[Classifier]) -> Source:
    """The control without a network: noise of the mean and spread that these models' normalisations tell of."""
    image = recipe.image
    mean, std = (sum(each) / len(each) for each in pixel_statistics(models, image.channels))
    return from_noise(image.channels, image.size, recipe.classes, mean, std)


def pixel_statistics(zoo: Sequence[Classifier], channels: int) -> tuple[list[float], list[float]]:
    """Mean and std per channel that the generator's head starts from: the zoo's average, over the teachers that have
    any; 0.5 and 0.25 where none has."""
    known: list[Tensor] = [torch.tensor(t.normalisation).expand(2, channels) for t in zoo if t.normalisation[0]]
    if not known:
        return [0.5] * channels, [0.25] * channels
    mean, std = torch.stack(known).mean(0).tolist()
    return mean, std


def reload_generator(recipe: Recipe, folder: str | os.PathLike[str], device: torch.device) -> ImageGenerator:
    """A trained generator on the device, frozen, in the recipe's memory format."""
    generator = load_generator(folder).to(device)
    if recipe.runtime.channels_last:
        generator.to(memory_format=torch.channels_last)
    return generator


def make_generator(recipe: Recipe, zoo: list[Teacher], device: torch.device) -> ImageGenerator:
    """The generator of a recipe: new, or out of generator.checkpoint (frozen, and checked to suit the run)."""
    spec = recipe.generator
    if spec.checkpoint is not None:
        generator = reload_generator(recipe, spec.checkpoint, device)
        image = recipe.image
        for key, wanted in {"classes": recipe.classes, "channels": image.channels, "size": image.size}.items():
            if (found := generator.description[key]) != wanted:
                raise UserError(f"the generator in {spec.checkpoint} has {key}={found}, the recipe {wanted}")
        return generator
    if spec.arch not in TRAINABLE:
        raise UserError(f"generator.arch={spec.arch!r} is unknown; choose from {list(TRAINABLE)}")
    mean, std = pixel_statistics(zoo, recipe.image.channels)
    specs = recipe.zoo_specs
    known = {
        "conditional": spec.conditional,
        "latent": spec.latent,
        "classes": recipe.classes,
        "channels": recipe.image.channels,
        "size": recipe.image.size,
        "width": spec.width,
        "prototypes": spec.prototypes,
        "norms": spec.norms,
        "mean": mean,
        "std": std,
    }
    description = {
        "arch": spec.arch,
        **{key: value for key, value in known.items() if key in GENERATORS[spec.arch].keys},
    }
    teachers = {
        t.name: {"model": specs[t.name].model, "weights": specs[t.name].weights, "moves": list(t.moves)} for t in zoo
    }
    about = {"conditional": spec.conditional, "teachers": teachers, "seed": recipe.seed, "recipe": recipe.name}
    generator = seeded(recipe, "generator", lambda: build_generator(description, about)).to(device)
    if recipe.runtime.channels_last:
        generator.to(memory_format=torch.channels_last)
    return generator


def check_coarse(recipe: Recipe, networks: Sequence[Classifier]) -> None:
    """Raise UserError where synthesis.coarse asks for images that a network does not take at half their size."""
    half = recipe.image.size // 2
    images = torch.zeros(2, recipe.image.channels, half, half, device=networks[0].mean.device)
    for network in networks if recipe.synthesis.coarse else []:
        try:
            with torch.no_grad(), eval_mode(network):
                network(images)
        except Exception as error:  # whatever a stranger's network may raise
            raise UserError(
                f"{network.name} does not take images [B, {recipe.image.channels}, {half}, {half}], as "
                f"synthesis.coarse={recipe.synthesis.coarse} shows it ({in_a_line(error)}); set it "
                "to 0, or give the teacher its input_size"
            ) from None


def make_pool(recipe: Recipe, worker: ImageGenerator, shard: Shard) -> ImageGenerator:
    """What is streamed where a generator works in rounds: a pool of the images they leave."""
    synthesis = recipe.synthesis
    made = synthesis.steps * synthesis.batch_size * shard.world
    whole = {**worker.description, "arch": "pool", "capacity": min(synthesis.pool, made)}
    description = {key: whole.pop(key) for key in ("arch", *PoolGenerator.keys)}
    about = {**whole, "made_by": worker.description["arch"], "inner": synthesis.inner}
    return build_generator(description, about).to(shard.device)
