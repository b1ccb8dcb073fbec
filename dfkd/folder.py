"""The folder of a run: whether a run may be begun, taken up or removed there."""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from omegaconf import OmegaConf

from dfkd.collectives import agreed
from dfkd.errors import UserError, in_a_line
from dfkd.inputs import COMPRESSIONS
from dfkd.recipe import Loaded
from dfkd.runtime import say
from dfkd.schema import SELECTED, Recipe
from dfkd.whole import check_writable, place, whole
from dfkd.zoo import teacher_folder

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None  # type: ignore[assignment]

# Keys that change how a run goes, not what comes out: they may differ when it is resumed.
FREE_KEYS = ("overwrite", "output", "trust_code", "description", "zoo.memory_gb")
FREE_RUNTIME_KEYS = ("checkpoint_every", "log_every", "grid_every", "evaluations", "minutes", "cuda_graphs")
CONFIG = "config.yaml"
LOCK = ".lock"
QUALITY = "quality"  # what --quality makes there, of a run or of none
# All that a run makes in its folder, which overwrite=true removes: last what tells that it is a run's.
MADE = (
    *("results.json", "report.html", "metrics.jsonl", "checkpoints", "generator", "student", *COMPRESSIONS),
    *("images", "tensorboard", QUALITY, CONFIG),
)
GROUPS = {"data", "image", "teachers", "zoo", "synthesis", "distill", "runtime"}  # a run's config.yaml has them all


def may_run(loaded: Loaded, folder: Path) -> bool:
    """False where the folder holds this very run, finished. Raises UserError where it holds another one, or no run."""
    config = folder / CONFIG
    place("output", folder)
    if loaded.recipe.overwrite:
        _may_remove(loaded.recipe, folder)
    elif config.exists():
        changed = _differences(loaded.recipe, _read(config))
        if changed:
            raise UserError(
                f"{folder} holds a run with other keys ({'; '.join(changed[:3])}); choose output=... for a new run, "
                "or overwrite=true to start this one over"
            )
        if all((folder / name).exists() for name in ("results.json", "report.html")):  # the last two that are written
            say(f"the run in {folder} is finished; overwrite=true starts it over")
            return False
    check_writable("output", folder)
    return True


def _may_remove(recipe: Recipe, folder: Path) -> None:
    """Raise UserError where overwrite=true would remove what no run made, or what this run needs."""
    if (folder / CONFIG).exists():
        _read(folder / CONFIG)
    elif any((folder / name).exists() for name in MADE if name != QUALITY):
        raise UserError(f"{folder} holds no run (no {CONFIG}) and is not removed; choose another output=...")
    models = (recipe.student.model, *(spec.model for spec in recipe.teachers.values()))
    code = [model.removeprefix("python:").rpartition(":")[0] for model in models]
    needed = [*_given(recipe), recipe.data.root, recipe.data.train_root, recipe.training.cache, *code]
    # By name, since of a link only the link goes, and by where it is, however it was reached.
    made = [base / name for base in (Path(os.path.abspath(folder)), folder.resolve()) for name in MADE]
    for name in filter(None, needed):
        path = Path(os.path.expanduser(name))
        places = (Path(os.path.abspath(path)), path.resolve())
        if path.exists() and any(place.is_relative_to(one) for place in places for one in made):
            raise UserError(f"overwrite=true would remove {name}, which this run needs; choose another output=...")


def _given(recipe: Recipe) -> list[str]:
    """The files and folders that networks are read from, as the recipe names them (of weights also what is no path)."""
    weights = {recipe.student.weights, *(spec.weights for spec in recipe.zoo_specs.values())} - {SELECTED}
    inputs = [recipe.distill.input, *(getattr(recipe, task).input for task in COMPRESSIONS)]
    folders = {name for name in inputs if name not in ("main", "student", *recipe.tasks)}
    return sorted(filter(None, {*weights, *folders, recipe.generator.checkpoint}))


@contextmanager
def open_folder(loaded: Loaded, folder: Path, accelerator: Accelerator) -> Iterator[None]:
    """Make the run's folder, without what a run made there where the recipe says overwrite, or take it up; hold it for
    this command as long as the scope lasts (collective). Raises UserError where another command holds it."""
    accelerator.wait_for_everyone()  # all have looked into it
    with ExitStack() as stack:
        ours = True
        if accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            ours = stack.enter_context(_held(folder))
        if not agreed(ours, accelerator.device):
            raise UserError(
                f"another command is at work in {folder}; wait for it, stop it, or choose another output=..."
            )
        if accelerator.is_main_process:
            if (folder / CONFIG).exists() and loaded.recipe.overwrite:
                for name in MADE:
                    shutil.rmtree(folder / name, ignore_errors=True)
                    (folder / name).unlink(missing_ok=True)
                for draft in folder.glob(".*.partial"):  # what a kill left
                    draft.unlink()
            with whole(folder / CONFIG) as draft:
                draft.write_text(loaded.yaml())
        accelerator.wait_for_everyone()
        yield


@contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Hold a folder against other commands, each of which would remove what the others write; False where another one
    holds it. The end of the process gives it free too. Nothing is held on Windows, and where there are no locks."""
    if fcntl is None:
        yield True
        return
    with open(folder / LOCK, "a") as file:
        ours = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            ours = False
        except OSError:  # a file system without locks
            pass
        yield ours


def comparable(config: dict[str, Any]) -> dict[str, Any]:
    """A resolved recipe without the keys that may change, as flat dotted keys."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                walk(f"{prefix}{key}.", inner)
        else:
            flat[prefix[:-1]] = value

    walk("", config)
    free = {*FREE_KEYS, *(f"runtime.{key}" for key in FREE_RUNTIME_KEYS)}
    return {key: value for key, value in flat.items() if key not in free}


def _read(config: Path) -> dict[str, Any]:
    """What the config.yaml of a run says. Raises UserError where it is none that a run wrote."""
    try:
        found: Any = OmegaConf.to_container(OmegaConf.load(config))
        reason = "" if found.keys() >= GROUPS else "is something else's"
    except Exception as error:
        reason = f"cannot be read: {in_a_line(error)}"
    if reason:
        raise UserError(f"{config.parent} holds no run: its config.yaml {reason}; choose another output=...")
    return dict(found)


def _differences(recipe: Recipe, config: dict[str, Any]) -> list[str]:
    before, now = comparable(config), comparable(dataclasses.asdict(recipe))
    keys = sorted(set(before) | set(now))
    changed = [(key, before.get(key), now.get(key)) for key in keys if before.get(key) != now.get(key)]
    return [f"{key}: {'empty' if a == '' else a} there, {'empty' if b == '' else b} here" for key, a, b in changed]


def owner(recipe: Recipe, precision: str, world: int) -> str:
    """What a checkpoint belongs to: the recipe, less the keys that may change, the contents of the files of networks
    that it names and of its trained teachers, the precision (runtime.precision=auto is another one on another machine),
    the number of processes."""
    paths = {name: Path(name).expanduser() for name in _given(recipe) if name != "pretrained"}
    paths |= {
        f"teachers.{n}": teacher_folder(recipe, n, spec) for n, spec in recipe.zoo_specs.items() if not spec.weights
    }
    networks = {name: _content(path) for name, path in paths.items()}
    text = json.dumps([comparable(dataclasses.asdict(recipe)), networks, precision, world], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _content(path: Path) -> list[str]:
    """Digests of a file, or of the weights and descriptions in a folder; none of what is no path."""
    digests = []
    for file in (path, path / "model.safetensors", path / "model.json", path / "generator.json"):
        if not file.is_file():
            continue
        with file.open("rb") as opened:
            digests.append(hashlib.file_digest(opened, "sha256").hexdigest())
    return digests
