"""Keys and figures of the benchmarks whose runs are many: read, kept as lines of a file, put in words."""

import dataclasses
import json
import math
import platform
import signal
import statistics
import sys
import threading
from argparse import ArgumentTypeError
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.utils import parse_flag_from_env

from dfkd.curves import whole_lines
from dfkd.errors import UserError
from dfkd.folder import comparable
from dfkd.recipe import Recipe
from dfkd.whole import whole
from dfkd.zoo import teacher_folder
from generators import GeneratorError

OWN = ("recipe", "output", "seed", "overwrite")  # keys that are not for the command line here
Keys = dict[str, str]
ENDING = threading.Event()  # SIGTERM came: no process is begun any more


def given_keys(arguments: Sequence[str], what: str, own: Collection[str] = OWN) -> Keys:
    """The KEY=VALUE arguments for all runs, which `what` names; raises UserError for others and for keys of `own`."""
    if wrong := [word for word in arguments if "=" not in word or word.partition("=")[0] in own]:
        raise UserError(f"{wrong[0]!r} is not for {what}; give keys as KEY=VALUE, and see --help for the rest")
    return dict(word.partition("=")[::2] for word in arguments)


def written(keys: Keys) -> list[str]:
    """Keys as arguments of the command line."""
    return [f"{key}={value}" for key, value in keys.items()]


def trained_keys(recipe: Recipe) -> Keys:
    """The keys that name the teachers which a recipe has trained itself: all that takes them has the same ones."""
    own = {name: spec for name, spec in recipe.zoo_specs.items() if not spec.weights}
    return {f"teachers.{name}.weights": str(teacher_folder(recipe, name, spec)) for name, spec in own.items()}


def exit_code(work: Callable[[], bool | None]) -> int:
    """0 where all work is done, 1 where some is left (it gives False), 2 where it cannot be done, which is said.

    SIGTERM ends the processes of the runs too, which write their checkpoints first: one that went on would disturb what
    is measured next. Ctrl-C reaches them by itself.
    """
    before = signal.signal(signal.SIGTERM, _end)
    try:
        return 1 if work() is False else 0
    except (UserError, GeneratorError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped for SIGINT; the same call goes on", file=sys.stderr)
        return 128 + signal.SIGINT
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(number: int, frame: object) -> None:
    ENDING.set()
    print("stopped for SIGTERM; the same call goes on", file=sys.stderr, flush=True)
    for child in psutil.Process().children():
        child.terminate()
    sys.exit(128 + number)


def on_gpu() -> bool:
    """Whether runs take a GPU here."""
    return torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")


def machine() -> str:
    """The device and the torch by which updates are priced, and figures at equal time are alike."""
    if on_gpu():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, torch {torch.__version__}"


def measured_on(lines: Sequence[Mapping[str, Any]]) -> str:
    """The devices, precisions and versions of torch of some lines."""
    machines = {f"{line['device']}, {line['precision']}, torch {line['versions']['torch']}": 0 for line in lines}
    return ", ".join(machines)


def asked(lines: Sequence[dict[str, Any]], methods: Sequence[str], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """The lines of these methods and seeds: a mean over others beside them would be no comparison."""
    return [line for line in lines if line["method"] in methods and line["seed"] in seeds]


def absent(lines: Sequence[dict[str, Any]], methods: Sequence[str], seeds: Sequence[int]) -> str:
    """What was asked for and is not among the lines, as what a table ends in; empty where all is there."""
    there = {(line["method"], line["seed"]) for line in lines}
    missing = {name: [str(seed) for seed in seeds if (name, seed) not in there] for name in methods}
    said = [f"{name} (seed {', '.join(lacking)})" for name, lacking in missing.items() if lacking]
    return f"\n\nNot there: {'; '.join(said)}" if said else ""


def add(path: Path, line: Mapping[str, Any]) -> None:
    """Write one more line, apart from one that was cut off."""
    torn = path.exists() and not path.read_bytes().endswith(b"\n")
    with path.open("a") as file:
        file.write("\n" * torn + json.dumps(line) + "\n")


def keep_settings(path: Path, settings: dict[str, Any]) -> None:
    """Write down what all rows have in common. Raises UserError where the folder holds rows of another kind."""
    holds = path.exists() and any((path.parent / name).exists() for name in ("figures.jsonl", "costs.jsonl"))
    before = json.loads(path.read_text()) if holds else settings
    changed = [key for key, value in settings.items() if before.get(key) != value]
    if changed:
        words = "; ".join(f"{key}: {before.get(key)} there, {settings[key]} here" for key in changed)
        raise UserError(f"{path.parent} holds figures of other settings ({words}); choose another --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as draft:
        draft.write_text(json.dumps(settings) + "\n")


def keep_recipes(out: Path, recipes: Mapping[str, Any]) -> None:
    """Write down the recipe (a dataclass) of each row, "" of all where rows are of no method. Raises UserError where a
    row has figures by another one."""
    path = out / "recipes.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    now = {name: json.loads(json.dumps(comparable(dataclasses.asdict(recipe)))) for name, recipe in recipes.items()}
    rows = {line.get("method", "") for name in ("figures.jsonl", "costs.jsonl") for line in whole_lines(out / name)}
    for name, recipe in now.items():
        if name in rows and kept.get(name, recipe) != recipe:
            keys = kept[name].keys() | recipe.keys()
            changed = ", ".join(sorted(key for key in keys if kept[name].get(key) != recipe.get(key)))
            raise UserError(
                f"{out} holds figures{name and f' of {name}'} by another recipe, which differs in {changed}; choose "
                "another --out"
            )
    with whole(path) as draft:
        draft.write_text(json.dumps(kept | now) + "\n")


def positive(text: str) -> float:
    """A number above 0 from the command line, for argparse."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise ArgumentTypeError(f"{text!r} is not allowed; give a number above 0")
    return number


def count(text: str) -> int:
    """A number of things from the command line, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is not allowed; give a whole number from 1")
    return int(text)


def numbers(text: str) -> list[int]:
    """Different seeds with commas between, for argparse."""
    if not all(each.strip().isdecimal() for each in text.split(",")):
        raise ArgumentTypeError(f"{text!r} is not allowed; give whole numbers from 0 with commas between")
    return list(dict.fromkeys(map(int, text.split(","))))


def picked(table: Mapping[str, Any], names: str) -> dict[str, Any]:
    """The entries of a table that names with commas between choose. Raises UserError where one is not in it."""
    chosen = list(filter(None, names.split(",")))
    if unknown := sorted(set(chosen) - set(table)):
        raise UserError(f"unknown {unknown[0]!r}; choose from {', '.join(table)}")
    return {name: table[name] for name in chosen}


def with_deviation(values: Sequence[float], form: str = ".2f") -> str:
    """Mean and, of several values, sample standard deviation; a dash of none."""
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):{form.removeprefix('+')}}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{form}}{deviation}"
