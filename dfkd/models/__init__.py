"""Networks by model string: small-image networks of our own, timm, torchvision, torch.hub, the user's own."""

import difflib
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import timm
import torch
import torchvision
from torch import nn
from torch.nn.parameter import UninitializedParameter

from dfkd.errors import UserError, in_a_line, nearest
from dfkd.models.checkpoints import load_weights, read_checkpoint, save_model, save_tensors
from dfkd.models.small import SMALL, Factory, initialise
from dfkd.models.stems import STEMS

__all__ = [
    "MODELS",
    "build_model",
    "list_models",
    "load_weights",
    "read_checkpoint",
    "save_model",
    "save_tensors",
]

MODELS: dict[str, Factory] = {**SMALL, **STEMS}

_TORCHVISION = torchvision.models.list_models(module=torchvision.models)  # classifiers only
_TIMM_SOURCES = ("hf-hub:", "hf_hub:", "local-dir:", "local_dir:")  # timm looks these names up elsewhere


@dataclass(frozen=True)
class _Request:
    spec: str
    name: str  # the spec without its scheme
    classes: int
    channels: int
    pretrained: bool
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class _Scheme:
    build: Callable[[_Request], nn.Module]
    form: str
    runs_code: bool = False
    has_pretrained: bool = True


def list_models() -> list[str]:
    """Names of this project's small-image networks, each usable as `dfkd:NAME`."""
    return sorted(MODELS)


def build_model(
    spec: str,
    *,
    classes: int,
    channels: int = 3,
    weights: str = "",
    kwargs: Mapping[str, Any] | None = None,
    trust_code: bool = False,
) -> nn.Module:
    """Network of a model string, from images [B, channels, H, W] to logits [B, classes], in training mode.

    `weights` is empty (random), `pretrained` (the scheme's own), a path or a URL. A `hub:` entry gets kwargs
    alone, a `python:` factory also the classes and channels that its signature names.
    Raises UserError for whatever the user can put right.
    """
    prefix, _, name = spec.partition(":")
    if prefix not in _SCHEMES or not name:
        forms = ", ".join(scheme.form for scheme in _SCHEMES.values())
        raise UserError(f"unknown model {spec!r}; write one of {forms}{_guess(prefix, name)}")
    scheme = _SCHEMES[prefix]
    if min(classes, channels) < 1:
        raise UserError(f"model {spec!r} needs classes and channels above 0, not {classes} and {channels}")
    if scheme.runs_code and not trust_code:
        raise UserError(
            f"model {spec!r} runs other people's code; to trust it add `trust_code=true` on the command line, in "
            "Python trust_code=True"
        )
    if weights == "pretrained" and not scheme.has_pretrained:
        raise UserError(f"model {spec!r} has no pretrained weights; give a path or URL as weights, or leave them empty")
    model = scheme.build(_Request(spec, name, classes, channels, weights == "pretrained", dict(kwargs or {})))
    if not isinstance(model, nn.Module):
        raise UserError(f"model {spec!r} must be a torch.nn.Module, not {type(model).__name__}")
    if any(isinstance(parameter, UninitializedParameter) for parameter in model.parameters()):
        raise UserError(f"model {spec!r} has lazy layers, whose sizes the first images tell; give them their sizes")
    if weights not in ("", "pretrained"):
        load_weights(model, weights)
    return model


def _guess(prefix: str, name: str) -> str:
    """What a string of no known scheme may have meant: a scheme misspelt, or a name without its scheme."""
    near = difflib.get_close_matches(prefix, _SCHEMES, n=1)
    if name and near:
        return f"; did you mean '{near[0]}:{name}'?"
    known = {bare: f"torchvision:{bare}" for bare in _TORCHVISION} | {bare: f"dfkd:{bare}" for bare in MODELS}
    match = difflib.get_close_matches(name or prefix, known, n=1)
    return f"; did you mean {known[match[0]]!r}?" if match else ""


def _unknown(request: _Request, allowed: Iterable[str], where: str) -> UserError:
    """The error for a name its scheme does not have; `where` says what it has."""
    scheme = request.spec.partition(":")[0]
    near = nearest(request.spec, (f"{scheme}:{name}" for name in allowed))
    return UserError(f"unknown model {request.spec!r}; {where}{near}")


@contextmanager
def _in_one_line(request: _Request) -> Iterator[None]:
    """Turn whatever a builder raises into one line naming the model and its arguments."""
    try:
        yield
    except Exception as error:
        reason = in_a_line(error)
        given = f" with kwargs {dict(request.kwargs)}" if request.kwargs else ""
        pretrained = " with pretrained weights" if request.pretrained else ""
        raise UserError(f"model {request.spec!r} cannot be built{pretrained}{given}: {reason}") from error


def _check_sizes(request: _Request, names: Iterable[str]) -> None:
    """Raise UserError where kwargs give again what classes and channels give already."""
    if twice := [name for name in names if name in request.kwargs]:
        raise UserError(
            f"model {request.spec!r} takes no argument {twice[0]!r} from kwargs: set classes, or image.channels, in "
            "Python classes= and channels="
        )


def _from_timm(request: _Request) -> nn.Module:
    if not request.name.startswith(_TIMM_SOURCES) and not timm.is_model(request.name):
        raise _unknown(request, timm.list_models(), "timm.list_models() names those of timm")
    sizes: dict[str, Any] = {"num_classes": request.classes, "in_chans": request.channels}
    _check_sizes(request, ("num_classes", "in_chans"))
    with _in_one_line(request):
        model: Any = timm.create_model(request.name, pretrained=request.pretrained, **sizes, **request.kwargs)
    trained = model.pretrained_cfg.get("num_classes")
    if request.pretrained and trained != request.classes:  # timm would put a random head on, in silence
        raise UserError(f"model {request.spec!r}: its pretrained weights have {trained} classes, not {request.classes}")
    return model


def _from_torchvision(request: _Request) -> nn.Module:
    if request.name not in _TORCHVISION:
        raise _unknown(request, _TORCHVISION, "torchvision.models.list_models() names those of torchvision")
    if request.pretrained and request.channels != 3:
        raise UserError(f"model {request.spec!r}: its pretrained weights take 3 channels, not {request.channels}")
    _check_sizes(request, ("num_classes",))
    weights = "DEFAULT" if request.pretrained else None
    with _in_one_line(request):
        model = torchvision.models.get_model(
            request.name, weights=weights, num_classes=request.classes, **request.kwargs
        )
    if request.channels != 3:
        # the first convolution is, in every classifier of torchvision, the one that sees the image
        first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
        first.in_channels = request.channels
        first.weight = nn.Parameter(first.weight.new_empty(first.out_channels, request.channels, *first.kernel_size))
        initialise(first)
    return model


def _from_table(request: _Request) -> nn.Module:
    if request.name not in MODELS:
        raise _unknown(request, MODELS, f"dfkd has {', '.join(list_models())}")
    factory = MODELS[request.name]
    arguments = _arguments(request, factory)
    with _in_one_line(request):
        return factory(**arguments)


def _from_hub(request: _Request) -> nn.Module:
    repository, _, entry = request.name.rpartition(":")
    if repository.count("/") != 1 or not entry:
        raise UserError(f"model {request.spec!r} must read {_SCHEMES['hub'].form}")
    pretrained = {"pretrained": True} if request.pretrained else {}
    with _in_one_line(request):
        return torch.hub.load(repository, entry, trust_repo=True, verbose=False, **pretrained, **request.kwargs)


def _from_python(request: _Request) -> nn.Module:
    source, _, entry = request.name.rpartition(":")
    if not source or not entry:
        raise UserError(f"model {request.spec!r} must read {_SCHEMES['python'].form}")
    module = _import(source, request.spec)
    factory = getattr(module, entry, None)
    if not callable(factory):
        near = nearest(entry, (name for name, value in vars(module).items() if callable(value)))
        raise UserError(f"model {request.spec!r}: {source!r} has no function or class {entry!r}{near}")
    return factory(**_arguments(request, factory))  # an error inside is the author's to see in full


def _import(source: str, spec: str) -> ModuleType:
    """Module by dotted name or from a .py file, from the working directory; a file's neighbours can be imported."""
    path = Path(source).expanduser().resolve()
    is_file = source.endswith(".py")
    if is_file and not path.is_file():
        raise UserError(
            f"model {spec!r}: no file {str(path)!r}; paths are those of the working directory (load_compressed takes "
            "model='python:PATH:NAME' where the file has moved)"
        )
    if not is_file and not all(part.isidentifier() for part in source.split(".")):
        raise UserError(f"model {spec!r}: {source!r} is neither a dotted module name nor a .py file")
    beside = str(path.parent if is_file else Path.cwd())
    if beside not in sys.path:
        sys.path.append(beside)  # for good: what it imports may be imported late; last: it hides no package
    try:
        return _run_file(path) if is_file else importlib.import_module(source)
    except (ImportError, SyntaxError) as error:
        raise UserError(f"model {spec!r}: {source!r} cannot be imported: {in_a_line(error)}") from error


def _run_file(path: Path) -> ModuleType:
    name = re.sub(r"\W", "_", str(path))
    found = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(found)  # type: ignore[arg-type]  # None only for unknown suffixes
    sys.modules[name] = module  # dataclasses and pickle look their module up there
    found.loader.exec_module(module)  # type: ignore[union-attr]
    return module


def _arguments(request: _Request, factory: Callable[..., Any]) -> dict[str, Any]:
    """Arguments of a factory: kwargs, and classes and channels under the names its signature has."""
    sizes = {"classes": request.classes, "num_classes": request.classes}
    sizes |= {"channels": request.channels, "in_chans": request.channels}
    signature = inspect.signature(factory)
    parameters = signature.parameters.values()
    takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters)
    named = [each.name for each in parameters if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)]
    free = [name for name in named if name not in sizes]
    for name in request.kwargs:
        if name not in free and (name in named or not takes_any):
            allowed = f"allowed: {', '.join(free) or 'none'}{nearest(name, free)}"
            raise UserError(f"model {request.spec!r} takes no argument {name!r} from kwargs; {allowed}")
    arguments = {name: value for name, value in sizes.items() if name in named} | dict(request.kwargs)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise UserError(f"model {request.spec!r}: {error}") from error
    return arguments


_SCHEMES: dict[str, _Scheme] = {
    "dfkd": _Scheme(_from_table, "dfkd:NAME", has_pretrained=False),
    "timm": _Scheme(_from_timm, "timm:NAME"),
    "torchvision": _Scheme(_from_torchvision, "torchvision:NAME"),
    "hub": _Scheme(_from_hub, "hub:OWNER/REPO:ENTRY", runs_code=True),
    "python": _Scheme(
        _from_python,
        "python:module:factory or python:path/file.py:factory",
        runs_code=True,
        has_pretrained=False,
    ),
}
