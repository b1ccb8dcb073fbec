"""The zoo of a recipe: its teachers loaded, or trained from real images first and kept."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from torch import nn

from dfkd.classifier import Classifier
from dfkd.collectives import agreed
from dfkd.cuda_graphs import recorder
from dfkd.data import RealImages, check_folder, load_images, opened
from dfkd.draws import Moves
from dfkd.errors import Paused, UserError
from dfkd.models import build_model, save_model
from dfkd.models.checkpoints import folder_about
from dfkd.pretrain import train_teacher
from dfkd.runtime import Deadline, Shard, drawn_at, resolve_precision
from dfkd.schema import Recipe, StudentSpec, TeacherSpec
from dfkd.teachers import SPEC, Teacher, kept_moves, load_zoo
from dfkd.whole import check_writable, place

Say = Callable[[str], None]
Network = TypeVar("Network", bound=nn.Module)


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
        if not (train or spec.weights):
            check_training(recipe, name, spec)
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
        untrained=not train,
    )


def check_training(recipe: Recipe, name: str, spec: TeacherSpec) -> None:
    """Raise UserError where a teacher without weights, not trained yet, has no folder of images to be trained on, or
    cannot be kept."""
    data, kept = recipe.data, teacher_folder(recipe, name, spec)
    place("training.cache", kept.parent)
    if (kept / "model.json").exists():
        return
    check_writable("training.cache", kept.parent)
    if data.dataset == "imagefolder":
        try:
            check_folder(True, data.root, data.train_root, recipe.classes)
        except UserError as error:
            raise UserError(
                f"teacher {name} has no weights and is to be trained first: {error}; or give teachers.{name}.weights"
            ) from None


def training_moves(recipe: Recipe, spec: TeacherSpec) -> Moves:
    """How a teacher's training moved images at random: as `training` says where it is trained here, as its folder says
    where it was trained here before, not at all as far as is known of others; but as its spec says."""
    if not spec.weights:
        moves = Moves(round(recipe.training.shift * recipe.image.size), recipe.training.flip)
    else:
        moves = kept_moves(folder_about(spec.weights), recipe.image.size)
    if spec.pad is not None:
        moves = moves._replace(shift=spec.pad, black=spec.pad > 0)
    return moves if spec.flip is None else moves._replace(flip=spec.flip)


def made_from(about: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The real images that a model of this description was trained on here, itself or what it started from."""
    opened_by_then, own = about.get("opened", []), about.get("trained_on")  # which a copy of the description keeps
    return opened_by_then if own is None or own in opened_by_then else [*opened_by_then, own]


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
        "size": recipe.image.size,
    }


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
    return Path(recipe.training.cache).expanduser() / f"{name}-{digest}"


def teacher_about(recipe: Recipe, name: str) -> dict[str, Any]:
    """The description of the folder that a teacher was given by or trained into; empty where there is none (yet)."""
    spec = recipe.teachers[name]
    return folder_about(spec.weights or str(teacher_folder(recipe, name, spec)))


def training_images(recipe: Recipe) -> list[dict[str, Any]]:
    """What real images the teachers were trained on here, each once: in this run, the one that cached them or those
    that made their folders."""
    found: list[dict[str, Any]] = []
    for name in recipe.zoo_specs:
        found += [entry for entry in made_from(teacher_about(recipe, name)) if entry not in found]
    return found


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


def seeded(recipe: Recipe, purpose: str, build: Callable[[], Network]) -> Network:
    """Build a module whose random weights depend on the recipe's seed and a purpose alone."""
    with drawn_at(recipe.seed, purpose):
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
