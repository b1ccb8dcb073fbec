"""Objects from a recipe: the zoo (teachers without a checkpoint are trained and cached), generator, student."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from torch import Tensor, nn

from dfkd.classifier import Classifier, check_trainable
from dfkd.collectives import agreed
from dfkd.cuda_graphs import recorder
from dfkd.data import RealImages, image_folder, load_images, opened
from dfkd.draws import STILL, Moves
from dfkd.errors import Paused, UserError, in_a_line
from dfkd.models import build_model, save_model
from dfkd.models.checkpoints import read_description
from dfkd.models.selection import select_weights
from dfkd.pretrain import train_teacher
from dfkd.runtime import Deadline, Shard, eval_mode, resolve_precision, rng
from dfkd.schema import SELECTED, Recipe, StudentSpec, TeacherSpec
from dfkd.stream import Source, from_noise
from dfkd.teachers import SPEC, Teacher, load_zoo
from generators import GENERATORS, ImageGenerator, PoolGenerator, build_generator, load_generator

TRAINABLE = tuple(name for name, kind in GENERATORS.items() if kind is not PoolGenerator)
Say = Callable[[str], None]
Network = TypeVar("Network", bound=nn.Module)


@dataclass
class Parts:
    """What a recipe builds; networks are checked and on the device."""

    recipe: Recipe
    accelerator: Accelerator
    shard: Shard
    zoo: list[Teacher]
    generator: ImageGenerator
    description: dict[str, Any]
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


def seeded(recipe: Recipe, purpose: str, build: Callable[[], Network]) -> Network:
    """Build a module whose random weights depend on the recipe's seed and a purpose alone."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(rng("cpu", recipe.seed, purpose).initial_seed())
        return build()


def build_network(recipe: Recipe, spec: TeacherSpec | StudentSpec) -> nn.Module:
    """The network of a teacher's or the student's spec."""
    return build_model(
        spec.model,
        classes=recipe.classes,
        channels=recipe.image.channels,
        weights=spec.weights,
        kwargs=spec.kwargs,
        trust_code=recipe.trust_code,
    )


def real_images(recipe: Recipe, *, train: bool, purpose: str) -> RealImages:
    """The recipe's real images."""
    data = recipe.data
    return load_images(
        data.dataset,
        train=train,
        root=data.root,
        train_root=data.train_root,
        channels=recipe.image.channels,
        size=recipe.image.size,
        classes=recipe.classes,
        purpose=purpose,
    )


def control_images(recipe: Recipe) -> RealImages:
    """Real images in place of synthetic ones, as a control: training images, or test images where there are no others.
    Raises UserError where the recipe has no real images."""
    with PartialState().local_main_process_first():  # the first one downloads
        return real_images(recipe, train=_has_training_images(recipe), purpose="control")


def check_control(recipe: Recipe) -> None:
    """Raise UserError where the folder of control_images is none: before anything is trained."""
    data = recipe.data
    if data.dataset == "imagefolder":
        image_folder(_has_training_images(recipe), data.root, data.train_root)


def _has_training_images(recipe: Recipe) -> bool:
    return recipe.data.dataset != "imagefolder" or recipe.data.train_root is not None


def load_recipe_zoo(
    recipe: Recipe, device: torch.device, say: Say, *, train: bool = True, deadline: Deadline | None = None
) -> list[Teacher]:
    """The enabled teachers, checked, on the device; those without weights are trained first, or with train=False left
    as they are built. Raises Paused where the deadline comes first."""
    specs = {
        name: {key: value for key, value in dataclasses.asdict(spec).items() if key in SPEC}
        | {"moves": training_moves(recipe, spec)}
        for name, spec in recipe.zoo_specs.items()
    }
    for name, spec in recipe.zoo_specs.items():
        about = folder_about(spec.weights)
        specs[name] |= {
            key: about[key] for key in ("mean", "std", "input_size") if not specs[name][key] and key in about
        }
        if train and not spec.weights:
            specs[name]["weights"] = str(trained_teacher(recipe, name, spec, device, say, deadline))
    return load_zoo(
        specs,
        classes=recipe.classes,
        channels=recipe.image.channels,
        size=recipe.image.size,
        device=device,
        channels_last=recipe.runtime.channels_last,
        trust_code=recipe.trust_code,
        memory_gb=recipe.zoo.memory_gb,
    )


def train_zoo(parts: Parts, say: Say, deadline: Deadline | None = None) -> None:
    """Put the zoo that is used, its teachers trained where they must be, in the place of the one that was checked.
    Raises Paused where the deadline comes first."""
    parts.zoo = []  # the two must not be in memory side by side
    parts.zoo = load_recipe_zoo(parts.recipe, parts.shard.device, say, deadline=deadline)


def folder_about(weights: str) -> dict[str, Any]:
    """The description of weights that are a folder which a run made; empty of all others."""
    made = weights and (Path(weights).expanduser() / "model.json").exists()
    return read_description(weights) if made else {}


def training_moves(recipe: Recipe, spec: TeacherSpec) -> Moves:
    """How a teacher's training moved images at random: as `training` says where it is trained here, as its folder says
    where it was trained here before, not at all as far as is known of others; but as its spec says."""
    moves = STILL
    if not spec.weights:
        moves = Moves(round(recipe.training.shift * recipe.image.size), recipe.training.flip)
    else:
        moves = Moves(*folder_about(spec.weights).get("moves", STILL))
    if spec.pad is not None:
        moves = moves._replace(shift=spec.pad, black=spec.pad > 0)
    return moves if spec.flip is None else moves._replace(flip=spec.flip)


def teacher_folder(recipe: Recipe, name: str, spec: TeacherSpec) -> Path:
    """Where a teacher trained from real images is kept: its name, and a digest of all that it was trained from."""
    trained_from = {
        "data": dataclasses.asdict(recipe.data),
        "image": dataclasses.asdict(recipe.image),
        "classes": recipe.classes,
        "training": {k: v for k, v in dataclasses.asdict(recipe.training).items() if k != "cache"},
        "teacher": {k: v for k, v in dataclasses.asdict(spec).items() if k not in ("weight", "enabled")},
        "seed": recipe.seed,
        "name": name,
        "channels_last": recipe.runtime.channels_last,
        "precision": resolve_precision(recipe.runtime.precision, PartialState().device),
    }
    digest = hashlib.sha256(json.dumps(trained_from, sort_keys=True).encode()).hexdigest()[:12]
    return Path(recipe.training.cache) / f"{name}-{digest}"


def training_images(recipe: Recipe) -> list[dict[str, Any]]:
    """What real images the teachers were trained on here, each once: in this run, the one that cached them or those
    that made their folders."""
    found: list[dict[str, Any]] = []
    for name in recipe.zoo_specs:
        found += [entry for entry in made_from(teacher_about(recipe, name)) if entry not in found]
    return found


def teacher_about(recipe: Recipe, name: str) -> dict[str, Any]:
    """The description of the folder that a teacher was given by or trained into; empty where there is none (yet)."""
    spec = recipe.teachers[name]
    return folder_about(spec.weights or str(teacher_folder(recipe, name, spec)))


def trained_teacher(
    recipe: Recipe, name: str, spec: TeacherSpec, device: torch.device, say: Say, deadline: Deadline | None = None
) -> Path:
    """The folder of a teacher trained from real images by the main process, or found trained alike before. Raises
    Paused, on every process, where the deadline comes first."""
    folder = teacher_folder(recipe, name, spec)
    state = PartialState()
    if state.is_main_process and not (folder / "model.json").exists():
        _train(recipe, name, spec, device, folder, say, deadline)
    state.wait_for_everyone()
    if not agreed((folder / "model.json").exists(), device):
        raise Paused(f"teacher {name} is not trained yet")
    return folder


def _train(
    recipe: Recipe,
    name: str,
    spec: TeacherSpec,
    device: torch.device,
    folder: Path,
    say: Say,
    deadline: Deadline | None,
) -> None:
    training, moves = recipe.training, training_moves(recipe, spec)
    real = real_images(recipe, train=True, purpose="train teacher")
    say(f"teacher {name} ({spec.model}) has no checkpoint: training it on {len(real)} images of {real.source}")
    model = seeded(recipe, f"teacher {name}", lambda: build_network(recipe, spec))
    classifier = Classifier(model, name=name, mean=spec.mean, std=spec.std, input_size=spec.input_size)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "training.pt"
    finished = train_teacher(
        classifier,
        real.images,
        real.labels,
        epochs=training.epochs,
        batch_size=training.batch_size,
        lr=training.lr,
        weight_decay=training.weight_decay,
        moves=moves,
        seed=recipe.seed,
        device=device,
        bf16=resolve_precision(recipe.runtime.precision, device) == "bf16",
        log=lambda epoch, loss: (
            say(f"teacher {name}: epoch {epoch + 1}/{training.epochs}, loss {loss:.3f}")
            if (epoch + 1) % max(1, training.epochs // 4) == 0
            else None
        ),
        channels_last=recipe.runtime.channels_last,
        checkpoint=checkpoint,
        deadline=deadline,
        graphs=recorder(recipe.runtime.cuda_graphs, Shard(device, world=PartialState().num_processes)),
    )
    if finished:
        about = {
            **describe(recipe, spec.model, spec.kwargs, classifier),
            "moves": list(moves),
            "trained_on": opened()[-1],
        }
        save_model(folder, classifier.model, about)
        checkpoint.unlink(missing_ok=True)  # another run may have trained the same teacher


def describe(recipe: Recipe, model: str, kwargs: dict[str, Any], classifier: Classifier) -> dict[str, Any]:
    """What model.json says of a network: all that builds it again."""
    mean, std = classifier.normalisation
    return {
        "model": model,
        "kwargs": dict(kwargs),
        "classes": recipe.classes,
        "channels": recipe.image.channels,
        "mean": mean,
        "std": std,
        "input_size": classifier.input_size,
    }


def made_from(about: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The real images that a model of this description was trained on here, itself or what it started from."""
    opened_by_then, own = about.get("opened", []), about.get("trained_on")  # which a copy of the description keeps
    return opened_by_then if own is None or own in opened_by_then else [*opened_by_then, own]


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
    student = Classifier(model, name="student", mean=made.get("mean", mean), std=made.get("std", std)).to(device)
    if recipe.runtime.channels_last:
        student.to(memory_format=torch.channels_last)
    about = describe(recipe, spec.model, spec.kwargs, student) | {"opened": made_from(made)}
    if selects:
        about["selected"] = {"teacher": like.name, "share": select_weights(model, like.model)}
        about["opened"] = made_from(teacher_about(recipe, like.name))
    size = recipe.image.size
    images = torch.rand(8, recipe.image.channels, size, size, generator=rng(device, "check"), device=device)
    try:
        with torch.no_grad():
            logits = student.eval()(images)
    except Exception as error:  # whatever a stranger's network may raise
        raise UserError(
            f"the student {spec.model} does not take images [B, {recipe.image.channels}, {size}, {size}]: "
            f"{in_a_line(error)}; choose another student.model"
        ) from None
    if logits.shape != (len(images), recipe.classes):
        raise UserError(
            f"the student gives {tuple(logits.shape[1:])} outputs where classes={recipe.classes}; make them agree"
        )
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
    known: list[Tensor] = [torch.tensor(t.normalisation) for t in zoo if t.normalisation[0]]
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


def make_generator(recipe: Recipe, zoo: list[Teacher], device: torch.device) -> tuple[ImageGenerator, dict[str, Any]]:
    """The generator and its description: new, or out of generator.checkpoint (frozen, and checked to suit the run)."""
    spec = recipe.generator
    if spec.checkpoint is not None:
        generator = reload_generator(recipe, spec.checkpoint, device)
        description = generator.description
        for key, wanted in {
            "classes": recipe.classes,
            "channels": recipe.image.channels,
            "size": recipe.image.size,
        }.items():
            if description[key] != wanted:
                raise UserError(f"the generator in {spec.checkpoint} has {key}={description[key]}, the recipe {wanted}")
        return generator, description
    if spec.arch not in TRAINABLE:
        raise UserError(f"generator.arch={spec.arch!r} is unknown; choose from {list(TRAINABLE)}")
    mean, std = pixel_statistics(zoo, recipe.image.channels)
    specs = recipe.zoo_specs
    known = {
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
        "conditional": spec.conditional,
        **{key: value for key, value in known.items() if key in GENERATORS[spec.arch].keys},
        "teachers": {
            t.name: {"model": specs[t.name].model, "weights": specs[t.name].weights, "moves": list(t.moves)}
            for t in zoo
        },
        "seed": recipe.seed,
        "recipe": recipe.name,
    }
    generator = seeded(recipe, "generator", lambda: build_generator(description)).to(device)
    if recipe.runtime.channels_last:
        generator.to(memory_format=torch.channels_last)
    return generator, description


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


def make_pool(recipe: Recipe, description: dict[str, Any], shard: Shard) -> tuple[ImageGenerator, dict[str, Any]]:
    """What is streamed where the generator of a description works in rounds: a pool of the images they leave."""
    synthesis = recipe.synthesis
    made = synthesis.steps * synthesis.batch_size * shard.world
    description = {
        **description,
        "arch": "pool",
        "made_by": description["arch"],
        "inner": synthesis.inner,
        "capacity": min(synthesis.pool, made),
    }
    return build_generator(description).to(shard.device), description
