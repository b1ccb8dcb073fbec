"""The command that says how good images are: those of a generator or a folder, or noise and real images as controls."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.utils import make_grid, save_image

from dfkd import assemble
from dfkd.data import load_folder, opened, sample
from dfkd.errors import UserError
from dfkd.folder import QUALITY
from dfkd.metrics import enlarged
from dfkd.quality import NEAR, quality
from dfkd.recipe import Loaded
from dfkd.report import columns
from dfkd.results import describe_device, versions
from dfkd.runtime import Shard, make_accelerator, say, shut_down, to_float
from dfkd.schema import Recipe
from dfkd.stream import Source, SyntheticStream, from_generator, materialize
from dfkd.tasks import HELD_OUT, HELD_OUT_BATCH, HELD_OUT_EPOCH, pool_images
from dfkd.teachers import Teacher
from dfkd.training import GRID_COLUMNS
from dfkd.whole import whole
from dfkd.zoo import load_recipe_zoo, training_images
from generators import PoolGenerator

FEWEST = 16  # images: of fewer no figure means anything
GRID_ROWS = 100  # classes
IMAGES = HELD_OUT
USAGE = f"""\
--quality=SOURCE [--images=N]  how good images are in the eyes of the recipe's teachers; trains no generator
    SOURCE is a generator's folder (with generator.json), a folder of images or of a folder of images per class, or
    noise or real (the recipe's real images) as controls; N: how many images, {FEWEST} or more ({IMAGES:,})
"""


class Sample(NamedTuple):
    """Images [N, C, H, W], uint8 or float in [0, 1], their labels [N] if they have any, and what they are in words."""

    images: Tensor
    labels: Tensor | None
    about: str


def judge(loaded: Loaded, source: str, count: int, command: str) -> None:
    """Measure `count` images of a source, print the figures, write OUTPUT/quality/NAME/{quality.json,grid.png}.

    Teachers without weights are trained first, as a run does. The main process measures, the others wait for it.
    """
    opener, before = _opener(source), len(opened())
    recipe = loaded.recipe
    accelerator, shard = make_accelerator(recipe.runtime.precision)
    zoo = load_recipe_zoo(recipe, shard.device, say, train=False)
    found = opener(recipe, source, count, zoo)  # on every process: all say what is wrong, before a teacher is trained
    zoo = []  # the one that was checked must not be in memory beside the one that is used
    zoo = load_recipe_zoo(recipe, shard.device, say)
    if accelerator.is_main_process:
        name = assemble.main_teachers(recipe, zoo)[0].name
        figures, classes = quality(found.images, found.labels, zoo, features=name)
        about = {"source": source, "about": found.about, "command": command, "seed": recipe.seed}
        machine = {"device": describe_device(shard), "versions": versions()}
        ledger = [entry for entry in opened()[before:] if entry["purpose"] != "train teacher"]
        figures = {**about, **machine, **figures, "opened": training_images(recipe) + ledger}
        _write(Path(recipe.folder) / QUALITY / slug(source), figures, grid(found.images, classes, recipe.classes))
    shut_down(accelerator)


def _write(folder: Path, figures: dict[str, Any], picture: Tensor) -> None:
    """Leave the figures and the picture in a folder, and say so."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with whole(folder / "quality.json") as draft:
            draft.write_text(json.dumps(figures, indent=2) + "\n")
        save_image(picture, folder / "grid.png")
    except OSError as error:
        raise UserError(f"could not write in {folder}: {error}; give another output=...") from None
    print(table(figures))
    print(f"{folder}: quality.json holds the figures, grid.png the images, one class a row")


def _opener(source: str) -> Callable[[Recipe, str, int, list[Teacher]], Sample]:
    """What opens a source."""
    if source in CONTROLS:
        return CONTROLS[source]
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"--quality={source} is no folder; give a generator's (such as runs/NAME/generator), a folder of images, "
            f"or {' or '.join(CONTROLS)}"
        )
    return _generated if (folder / "generator.json").exists() else _folder


def _streamed(recipe: Recipe, source: Source, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The first images of a stream that nothing trains on, in float32."""
    stream = SyntheticStream(
        source, batch_size=HELD_OUT_BATCH, seed=recipe.seed, shard=Shard(device), epoch=HELD_OUT_EPOCH
    )
    images, labels = materialize(stream, count).tensors
    return images, labels


def _generated(recipe: Recipe, source: str, count: int, zoo: list[Teacher]) -> Sample:
    device = zoo[0].mean.device
    given = dataclasses.replace(recipe, generator=dataclasses.replace(recipe.generator, checkpoint=source))
    generator = assemble.make_generator(given, zoo, device)
    if isinstance(generator, PoolGenerator):
        images, labels = (each.cpu() for each in pool_images(generator, count))
    else:
        images, labels = _streamed(recipe, from_generator(generator), count, device)
    return _sample(source, images, labels if generator.conditional else None, f"images of the generator in {source}")


def _sample(source: str, images: Tensor, labels: Tensor | None, about: str) -> Sample:
    """A sample that is large enough."""
    if len(images) < FEWEST:
        raise UserError(f"--quality={source}: there are {len(images)} images; {FEWEST} or more say something")
    return Sample(images, labels, about)


def _folder(recipe: Recipe, source: str, count: int, zoo: list[Teacher]) -> Sample:
    image = recipe.image
    images, labels = load_folder(source, channels=image.channels, size=image.size, classes=recipe.classes, limit=count)
    return _sample(source, images, labels, f"images of the folder {source}")


def _noise(recipe: Recipe, source: str, count: int, zoo: list[Teacher]) -> Sample:
    noise = assemble.noise_like(recipe, zoo)
    return _sample(source, *_streamed(recipe, noise, count, zoo[0].mean.device), "images of noise, labels at random")


def _real(recipe: Recipe, source: str, count: int, zoo: list[Teacher]) -> Sample:
    real = sample(assemble.control_images(recipe), count)
    return _sample(source, real.images, real.labels, f"real images of {real.source}")


CONTROLS = {"noise": _noise, "real": _real}


def slug(source: str) -> str:
    """A source as the name of a folder."""
    name = re.sub(r"[^a-z0-9]+", "-", source.lower()).strip("-") or Path(source).resolve().name
    return name[-100:]


def grid(images: Tensor, classes: Tensor, count: int) -> Tensor:
    """Images [N, C, H, W] of classes [N] as a picture, one class a row, the first GRID_ROWS; white where none is left,
    pixels enlarged where images are small."""
    rows = min(count, GRID_ROWS)
    cells = torch.ones(rows, GRID_COLUMNS, *images.shape[1:])
    for row in range(rows):
        found = to_float(images[classes == row][:GRID_COLUMNS])
        cells[row, : len(found)] = found
    return make_grid(enlarged(cells.flatten(0, 1)), nrow=GRID_COLUMNS)


def table(figures: dict[str, Any]) -> str:
    """The figures as plain text: teachers, what they come to, diversity, what was opened."""
    features, accuracy = figures["features"], figures["accuracy"]
    teachers = [["teacher", "accuracy %", "95 % interval", "confidence %", "class balance", "BN loss", "BN KL"]]
    for name, each in figures["teachers"].items():
        interval = "-" if each["interval"] is None else "{:.2f} to {:.2f}".format(*each["interval"])
        forms = {"accuracy": ".2f", "confidence": ".2f", "class_balance": ".4f", "bn_l2": ".4g", "bn_kl": ".4g"}
        cells = [_figure(each[key], form) for key, form in forms.items()]
        teachers.append([name, cells[0], interval, *cells[1:]])
    lines = [
        f"{figures['images']:,} {figures['about']}; seed {figures['seed']}, {figures['device']}",
        "",
        *columns(teachers),
    ]
    if accuracy is not None:
        lines.append(
            f"accuracy over the teachers: mean {accuracy['mean']:.2f} %, standard deviation {accuracy['std']:.2f}, "
            f"{accuracy['min']:.2f} to {accuracy['max']:.2f}; class balance of labels {figures['class_balance']:.4f}"
        )
    keys = ("ratio", "mean_distance", "mean_within", "nearest", "near_duplicates", "mean_cosine", "mean_cosine_within")
    heads = ("within/between", "distance", "in class", "nearest", "near-duplicates %", "cosine", "in class")
    kinds = [
        [f"{kind}s", *(_figure(each.get(key), ".4g") for key in keys)] for kind, each in figures["diversity"].items()
    ]
    lines += [
        "",
        *columns([["diversity", *heads], *kinds]),
        f"features: the {features['layer']} of teacher {features['teacher']} ({features['size']} values) stand in "
        f"for an Inception network's; classes: {figures['classes']}",
        f"near-duplicates: a neighbour nearer than {NEAR:.0%} of the mean distance; exact duplicates: "
        f"{figures['exact_duplicates']:.2f} %",
    ]
    entries = [f"{e['n']:,} of {e['source']} ({e['split']}) for {e['purpose']!r}" for e in figures["opened"]]
    lines.append(f"images opened: {'; '.join(dict.fromkeys(entries)) or 'none'}")
    return "\n".join(lines)


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
