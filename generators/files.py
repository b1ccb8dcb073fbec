"""A generator on disk: model.safetensors, and generator.json with all that is needed to rebuild it."""

import inspect
import json
import os
from numbers import Integral
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from generators.base import ImageGenerator

COUNTS = ("latent", "classes", "channels", "size", "width", "prototypes", "capacity")


class GeneratorError(ValueError):
    """A generator folder or description that cannot be used: which, and why, in one line."""


def build_generator(description: dict[str, Any], about: dict[str, Any] | None = None) -> ImageGenerator:
    """The generator that a description (`arch` and that generator's `keys`, those without a default at least) names,
    with random weights; its attribute `description` is that, whole, and what `about` tells of it besides. Raises
    GeneratorError, also for other keys."""
    kind = _kind(description)
    if unknown := [key for key in description if key not in ("arch", *kind.keys)]:
        raise GeneratorError(
            f"generator {description['arch']} has no {', '.join(map(repr, unknown))}; it takes {list(kind.keys)}"
        )
    defaults = {name: p.default for name, p in inspect.signature(kind).parameters.items() if p.default is not p.empty}
    description = {**defaults, **description, **(about or {})}
    _check_keys(description, kind, "")
    _check_counts(description, kind)
    try:
        generator = kind(**{key: description[key] for key in kind.keys})
    except (TypeError, ValueError, RuntimeError) as error:
        raise GeneratorError(f"generator {description['arch']}: {error}") from None
    generator.description = description
    return generator


def _kind(description: dict[str, Any]) -> type[ImageGenerator]:
    from generators import GENERATORS

    arch = description.get("arch")
    if not isinstance(arch, str) or arch not in GENERATORS:
        raise GeneratorError(f"unknown generator {arch!r}; choose from {sorted(GENERATORS)}")
    return GENERATORS[arch]


def _check_keys(description: dict[str, Any], kind: type[ImageGenerator], remedy: str) -> None:
    if missing := [key for key in kind.keys if key not in description]:
        raise GeneratorError(f"the generator's description lacks {missing}; it must give {list(kind.keys)}{remedy}")


def _check_counts(description: dict[str, Any], kind: type[ImageGenerator]) -> None:
    for key in COUNTS:
        value = description.get(key, 1)
        if key in kind.keys and not (isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1):
            square = "; images are square" if key == "size" else ""
            raise GeneratorError(
                f"generator {description['arch']}: {key}={value!r} is not allowed; give a whole number from 1{square}"
            )


def _check_numbers(weights: dict[str, Tensor], whose: str, remedy: str) -> None:
    if broken := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
        raise GeneratorError(f"{broken[0]} of {whose} holds NaN or infinity; {remedy}")


def save_generator(
    folder: str | os.PathLike[str], generator: ImageGenerator, description: dict[str, Any] | None = None
) -> None:
    """Write a generator and its description (build_generator's keys, and what it was trained on; None: its own keys) to
    a folder. Raises GeneratorError where it has none, or a weight is NaN or infinite."""
    if description is None:
        own = getattr(generator, "description", None)
        if own is None:
            raise GeneratorError("this generator was not made by build_generator; give the description that builds it")
        description = {key: own[key] for key in ("arch", *generator.keys)}
    folder = Path(folder)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in generator.state_dict().items()}
    _check_numbers(weights, "the generator", "train it with a lower rate or loss weight")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        save_file(weights, folder / "model.safetensors.tmp")
    except SafetensorError as error:  # of a full disk too
        raise OSError(" ".join(str(error).split())) from error
    (folder / "generator.json.tmp").write_text(json.dumps(description, indent=2) + "\n")
    for name in ("model.safetensors", "generator.json"):
        with open(folder / f"{name}.tmp", "rb") as file:
            os.fsync(file.fileno())
    for name in ("model.safetensors", "generator.json"):
        os.replace(folder / f"{name}.tmp", folder / name)


def load_generator(folder: str | os.PathLike[str]) -> ImageGenerator:
    """The generator of a folder, frozen and in eval mode; its description is its attribute `description`.

    Raises GeneratorError where a file is missing, torn or does not fit, or a weight is NaN or infinite.
    """
    folder = Path(folder).expanduser()
    try:
        description = json.loads((folder / "generator.json").read_text())
        weights = load_file(folder / "model.safetensors")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise GeneratorError(
            f"no generator in {folder}: {Path(str(error.filename or folder / 'model.safetensors')).name} is missing; "
            "give a folder with model.safetensors and generator.json, such as runs/NAME/generator"
        ) from None
    except OSError as error:
        raise GeneratorError(f"the generator in {folder} cannot be read: {error}; give another folder") from None
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
        raise GeneratorError(f"the generator in {folder} is torn ({error}); train it again or copy it anew") from None
    if not isinstance(description, dict):
        raise GeneratorError(f"{folder}/generator.json holds no description; train the generator again or copy it anew")
    _check_numbers(weights, f"the generator in {folder}", "train it again")
    kind = _kind(description)
    description = {**kind.older, **description}
    _check_keys(description, kind, "; one of an older version must be trained again")
    own = ("arch", *kind.keys)
    about = {key: value for key, value in description.items() if key not in own}
    generator = build_generator({key: description[key] for key in own}, about)
    try:
        generator.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise GeneratorError(f"the weights in {folder} do not fit its generator.json: {reason}") from None
    return generator.eval().requires_grad_(False)
