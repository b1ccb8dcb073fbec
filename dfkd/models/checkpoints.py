"""Weights in files: read without running anything, loaded strictly, written whole or not at all."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import safetensors.torch
import torch
from torch import Tensor, nn

from dfkd.errors import UserError, in_a_line
from dfkd.whole import whole

WEIGHTS, DESCRIPTION = "model.safetensors", "model.json"
_REQUIRED = ("model", "classes", "channels")  # without these a folder cannot be rebuilt
_WRAPPERS = ("state_dict", "model", "model_state_dict", "network", "net")  # a checkpoint's keys for its network
_LISTED = 5  # names an error line shows of each kind


def _load_pickled(path: Path) -> Any:
    return torch.load(path, weights_only=True, map_location="cpu")


_READERS: dict[str, Callable[[Path], Any]] = {
    ".safetensors": safetensors.torch.load_file,
    ".pt": _load_pickled,
    ".pth": _load_pickled,
    ".th": _load_pickled,
}


def read_checkpoint(path_or_url: str | os.PathLike[str]) -> dict[str, Tensor]:
    """State dict on the CPU from a file, a URL or a folder of `save_model`; no wrapper keys or prefixes.

    Raises UserError where there is no file, or it is torn, holds more than tensors, or is of another kind.
    """
    given = os.fspath(path_or_url)
    is_url = "://" in given
    path = Path(urlsplit(given).path if is_url else given).expanduser()
    if not is_url:
        path = _resolve(path, given)
    if path.suffix not in _READERS:
        raise UserError(f"checkpoint {given!r} has suffix {path.suffix!r}; readable: {', '.join(_READERS)}")
    if not is_url:
        return _state_dict(_read(path, given), given)
    path = _download(given)
    try:
        return _state_dict(_read(path, given), given)
    except UserError:
        path.unlink(missing_ok=True)  # a torn download would be found again by every later run
        raise


def _resolve(path: Path, given: str) -> Path:
    """The file meant by a local path: itself, or the weights in a folder of `save_model`."""
    if path.is_dir():
        if not all((path / name).is_file() for name in (WEIGHTS, DESCRIPTION)):
            raise UserError(f"checkpoint {given!r} is a folder without {WEIGHTS} and {DESCRIPTION}; name a file in it")
        return path / WEIGHTS
    if not path.is_file():
        raise UserError(f"checkpoint {given!r} does not exist")
    return path


def _download(url: str) -> Path:
    """Local copy of a URL in torch's cache, named by the whole URL: two sites may both have a model.pth."""
    name = f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{PurePosixPath(urlsplit(url).path).name}"
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file():
            torch.hub.download_url_to_file(url, str(path), progress=False)
    except (OSError, ValueError) as error:  # ValueError: a scheme urllib does not know
        raise UserError(f"checkpoint {url!r} cannot be fetched: {error}") from error
    return path


def _read(path: Path, given: str) -> Any:
    """Content of a checkpoint file; whatever its reader raises becomes one line."""
    try:
        return _READERS[path.suffix](path)
    except Exception as error:
        foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
        if foreign:
            why = f"holds Python objects ({foreign[1]}), which could run code; save model.state_dict() instead"
        else:
            first_sentence = in_a_line(error).split(". ")[0]
            why = f"is torn or not a checkpoint: {first_sentence}"
        raise UserError(f"checkpoint {given!r} {why}") from error


def _state_dict(content: Any, given: str) -> dict[str, Tensor]:
    """Name to tensor from what a file held, seen through the keys of _WRAPPERS and prefixes."""
    while isinstance(content, Mapping):
        inner = [content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)]
        if not inner:
            break
        content = inner[0]
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"checkpoint {given!r} holds no tensors by name but a {type(content).__name__}")
    odd = [str(key) for key, value in content.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if odd:
        raise UserError(f"checkpoint {given!r} is no state dict: {_listing(odd)} not tensors; save model.state_dict()")
    return {bare: content[key] for bare, key in _bare_names(content).items()}


def _bare_names(keys: Iterable[str]) -> dict[str, str]:
    """Name without the prefixes of torch.compile and DataParallel, to name as given."""
    names = {key.replace("_orig_mod.", ""): key for key in keys}
    while names and all(name.startswith("module.") for name in names):
        names = {name.removeprefix("module."): key for name, key in names.items()}
    return names


def _below(given: dict[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors under the model's names, where what was saved had the model in one attribute (Lightning's `net.`)."""
    if given.keys() & names.keys() or len({key.partition(".")[0] for key in given}) != 1:
        return given
    inner = {key.partition(".")[2]: tensor for key, tensor in given.items()}
    below = {bare: inner[key] for bare, key in _bare_names(inner).items()}
    return below if below.keys() <= names.keys() else given


def _listing(items: list[str]) -> str:
    rest = len(items) - _LISTED
    return ", ".join(items[:_LISTED]) + (f" and {rest} more" if rest > 0 else "")


def load_weights(model: nn.Module, path_or_url: str | os.PathLike[str]) -> None:
    """Load a checkpoint in place, every key and shape matching (also where all keys have one prefix more, as of a
    module that holds the model); only `num_batches_tracked` may be absent.

    Raises UserError listing what does not match, or naming a tensor that holds nan or inf.
    """
    own = model.state_dict()
    names = _bare_names(own)
    given = _below(read_checkpoint(path_or_url), names)
    optional = {bare for bare in names if bare.endswith("num_batches_tracked")}
    shapes = {bare: tuple(own[key].shape) for bare, key in names.items()}
    differing = [
        f"{key} {tuple(tensor.shape)} in the file, {shapes[key]} in the model"
        for key, tensor in given.items()
        if key in shapes and tuple(tensor.shape) != shapes[key]
    ]
    misfits = {
        "missing": [key for key in names if key not in given and key not in optional],
        "unexpected": [key for key in given if key not in names],
        "of another shape": differing,
    }
    if any(misfits.values()):
        lines = [f"{len(items)} {kind}: {_listing(items)}" for kind, items in misfits.items() if items]
        raise UserError(f"checkpoint {str(path_or_url)!r} does not fit {type(model).__name__}; {'; '.join(lines)}")
    numbers = learned(model)
    for key, tensor in given.items():
        if names[key] in numbers and not torch.isfinite(tensor).all():
            raise UserError(f"checkpoint {str(path_or_url)!r} holds nan or inf in {key}")
    for bare, tensor in given.items():
        own[names[bare]] = tensor  # `own` keeps its metadata: torchvision's MNASNet refuses a dict without
    model.load_state_dict(own)


def learned(model: nn.Module) -> dict[str, Tensor]:
    """A network's weights and the buffers of its layers with running statistics, by name; other buffers may hold
    infinities (a mask)."""
    found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    for path, module in model.named_modules():
        if isinstance(getattr(module, "running_var", None), Tensor):
            found |= {
                f"{path}.{name}" if path else name: buffer for name, buffer in module.named_buffers(recurse=False)
            }
    return found


def not_finite(model: nn.Module) -> list[str]:
    """Which of them hold NaN or infinity."""
    return [name for name, tensor in learned(model).items() if not torch.isfinite(tensor).all()]


def own_names(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a file of save_model under the names that they have in a model, with its wrappers' prefixes."""
    names = _bare_names(model.state_dict())
    return {names.get(bare, bare): tensor for bare, tensor in tensors.items()}


def save_model(folder: str | os.PathLike[str], model: nn.Module, description: Mapping[str, Any]) -> None:
    """Write model.safetensors and model.json, each atomically; dfkd.compress.files.load_compressed needs nothing else.

    `description` holds at least model (the model string), classes and channels; kwargs, mean, std, input_size, size (of
    the images it was made for), moves and whatever else a reader should know.
    """
    state = model.state_dict()
    save_tensors(folder, {bare: state[key] for bare, key in _bare_names(state).items()}, description)


def save_tensors(folder: str | os.PathLike[str], tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """What save_model does, for tensors by name."""
    absent = [key for key in _REQUIRED if key not in description]
    if absent:
        raise UserError(f"a model's description needs {', '.join(_REQUIRED)}; absent: {', '.join(absent)}")
    # clones, since safetensors refuses tensors that share memory and the file shall load strictly anywhere
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    text = json.dumps(dict(description), indent=2) + "\n"
    _write(Path(folder) / WEIGHTS, safetensors.torch.save(tensors, metadata={"format": "pt"}))
    _write(Path(folder) / DESCRIPTION, text.encode())


def read_description(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What model.json of a folder of `save_model` says; its input_size, where it names none, is the size of the images
    it was made for (`size`). UserError where it is absent, torn or incomplete."""
    path = Path(folder).expanduser() / DESCRIPTION
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{str(folder)!r} is no model folder: {DESCRIPTION}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{str(path)!r} is torn or not JSON: {error}") from error
    absent = [key for key in _REQUIRED if not isinstance(description, dict) or key not in description]
    if absent:
        raise UserError(f"{str(path)!r} lacks {', '.join(absent)}")
    # Images of another size than those it was trained on it would see at another scale.
    return {**description, "input_size": description.get("input_size") or description.get("size")}


def folder_about(weights: str | os.PathLike[str]) -> dict[str, Any]:
    """What model.json says of weights that are a folder of `save_model`; empty of all others."""
    made = weights and (Path(weights).expanduser() / DESCRIPTION).exists()
    return read_description(weights) if made else {}


def _write(path: Path, content: bytes) -> None:
    """Replace a file in one step, on the disk before it has its name."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as draft:
            draft.write_bytes(content)
    except OSError as error:
        raise UserError(f"cannot write {str(path)!r}: {error.strerror}") from error
