"""Recipes: YAML files and `key=value` arguments become one typed, checked `Recipe`; a mistake is one line."""

import difflib
import json
import math
import os.path
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NamedTuple, cast, get_args, get_origin, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from dfkd.errors import UserError
from dfkd.schema import Recipe, TeacherSpec

COMMAND_LINE = "command line"
USAGE = """\
accelerate launch train.py recipe=digits             run a recipe; the same command again resumes it
accelerate launch train.py recipe=digits KEY=VALUE   change keys of it; also lists [a, b], {a: 1}, null
python train.py --list                               recipes, models, generators
python train.py --help                               this page
python train.py recipe=NAME --print-config           every key, its value and where that comes from
python train.py recipe=NAME --dry-run                build and check everything, train nothing

recipe=NAME is recipes/NAME.yaml, recipe=path/x.yaml a file. A recipe extends others with `base: NAME`;
base=NAME on the command line stands in for that: recipe=methods/dafl base=cifar10_zoo.
"""
WORDS = {int: "integer", float: "number", bool: "true or false", str: "text", NoneType: "null", Any: "any"}

# A wheel carries the recipes inside the package; a checkout (or an editable install) has them beside it.
_PACKAGE = Path(__file__).resolve().parent
FOLDER = (_PACKAGE if (_PACKAGE / "recipes").is_dir() else _PACKAGE.parent) / "recipes"

Keys = tuple[str, ...]


class Leaf(NamedTuple):
    """One key of a recipe that is no group: its path, value, type and field metadata."""

    keys: Keys
    value: Any
    hint: Any
    metadata: Mapping[str, Any]


@dataclass(frozen=True)
class Loaded:
    """A checked recipe; for each dotted key the recipe file it came from, `command line` or `default`."""

    recipe: Recipe
    sources: dict[str, str]

    def yaml(self) -> str:
        """The resolved recipe as YAML, which loads to the same recipe."""
        return OmegaConf.to_yaml(OmegaConf.structured(self.recipe))


def load_recipe(arguments: Sequence[str]) -> Loaded:
    """The recipe of `recipe=NAME_OR_PATH` and `key=value` arguments: bases, then the file, then those.

    Raises:
        UserError: an argument, file, key or value is wrong, or the keys contradict each other.
    """
    overrides = _split(arguments)
    name = overrides.pop("recipe", "")
    if not name:
        raise UserError(f"no recipe given: add recipe=NAME; the recipes are {', '.join(_names())}")
    path = _find(name, Path() if "/" in name or name.endswith(".yaml") else None, COMMAND_LINE)
    base = overrides.pop("base", None)
    builder = _Builder()
    builder.set(("name",), path.stem if base is None else f"{path.stem}-{Path(base).stem}", _label(path))
    for file, layer in _layers(path, base=base).items():
        if file != path:  # two recipes on one base must not share its name, hence its output folder
            layer = {key: value for key, value in layer.items() if key not in ("name", "description")}
        builder.set((), layer, _label(file))
    for key, value in overrides.items():
        builder.set(tuple(key.split(".")), _parse(key, value), COMMAND_LINE)
    loaded = builder.build()
    source = loaded.sources["trust_code"]
    if loaded.recipe.trust_code and source != COMMAND_LINE:
        raise UserError(f"{source}: trust_code=true is not allowed in a recipe; give it on the command line")
    check(loaded.recipe)
    return loaded


def check(recipe: Recipe) -> None:
    """Keys that are right alone must also fit together.

    Raises:
        UserError: the first contradiction, with the keys it is about.
    """
    for problem in (*_teacher_problems(recipe), *_run_problems(recipe)):
        raise UserError(problem)


def print_config(loaded: Loaded) -> str:
    """Every key and value as YAML, with its source as a trailing comment."""
    lines: dict[Keys, str] = {}
    for keys, value, _, _ in _leaves(loaded.recipe):
        for depth, key in enumerate(keys[:-1]):
            lines.setdefault(keys[: depth + 1], f"{'  ' * depth}{key}:")
        line = f"{'  ' * (len(keys) - 1)}{keys[-1]}: {_show(value)}"
        lines[keys] = f"{line:<56}  # {loaded.sources['.'.join(keys)]}"
    return "\n".join(lines.values()) + "\n"


def help_text() -> str:
    """Usage, then every key with its default, what it allows and its help."""
    lines = [USAGE]
    for keys, default, hint, metadata in _schema():
        lines.append(f"{'.'.join(keys)}={_show(default)}  ({_allowed(hint, metadata)})")
        lines.append(f"    {metadata['help']}")
    return "\n".join(lines) + "\n"


def list_text(models: Sequence[str], generators: Sequence[str]) -> str:
    """The recipes with their descriptions, then the given names of models and generators."""
    described = ((name, _read(FOLDER / f"{name}.yaml").get("description", "")) for name in _names())
    recipes = [f"{name:<28} {description}".rstrip() for name, description in described]
    groups = (
        ("recipe=", *recipes),
        ("teachers.NAME.model=, student.model=", *models),
        ("generator.arch=", *generators),
    )
    return "\n\n".join("\n  ".join(group) for group in groups) + "\n"


class _Builder:
    """Takes values layer by layer, the later over the earlier, and remembers where each came from."""

    def __init__(self) -> None:
        self.config = OmegaConf.structured(Recipe)
        self.sources: dict[Keys, str] = {}

    def set(self, keys: Keys, value: Any, source: str) -> None:
        """Merges `value` at `keys`: groups and teachers key by key, anything else (kwargs too) as a whole."""
        hint, metadata = _lookup(keys, source)
        self._enter(keys, source)
        if not _is_group(hint):
            self.sources[keys] = source
            self._assign(Leaf(keys, value, hint, metadata), source)
        elif isinstance(value, Mapping):
            for key, item in value.items():
                self.set((*keys, str(key)), item, source)
        else:
            remedy = "; enabled: false leaves a teacher out" if keys[0] == "teachers" else ""
            raise UserError(f"{source}: {'.'.join(keys)}={_show(value)} is not a group of keys{remedy}")

    def _enter(self, keys: Keys, source: str) -> None:
        """Adds the teacher on the way to `keys` that no layer has named yet."""
        for path in (keys[:length] for length in range(1, len(keys) + 1)):
            hint, _ = _lookup(path, source)
            if is_dataclass(hint) and OmegaConf.select(self.config, ".".join(path)) is None:
                OmegaConf.update(self.config, ".".join(path), hint)

    def _assign(self, leaf: Leaf, source: str) -> None:
        key, value = ".".join(leaf.keys), leaf.value
        # OmegaConf would read `name: no` of a file as the text "False".
        if isinstance(value, bool) and leaf.hint in (str, str | None):
            raise UserError(_refusal(leaf, source))
        try:
            if leaf.hint is Any:  # an entry of kwargs: set with the others, since what ${...} names is shared
                key, _, name = key.rpartition(".")
                entries = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.select(self.config, key)))
                value = {**entries, name: _scalar(value)}
            OmegaConf.update(self.config, key, value, merge=False)
        except ValidationError as error:
            raise UserError(_refusal(leaf, source)) from error
        except OmegaConfBaseException as error:
            raise UserError(f"{source}: {key}={_show(value)}: {_reason(error)}") from error

    def build(self) -> Loaded:
        """Resolves the interpolations and checks every number against its range."""
        try:
            recipe = cast(Recipe, OmegaConf.to_object(self.config))
        except OmegaConfBaseException as error:
            key = (error.full_key or "").partition("[")[0]
            raise UserError(f"{self._source(tuple(key.split('.')))}: {key}: {_reason(error)}") from error
        sources = {}
        for leaf in _leaves(recipe):
            sources[".".join(leaf.keys)] = source = self._source(leaf.keys)
            if not _in_range(leaf):
                raise UserError(_refusal(leaf, source))
        return Loaded(recipe, sources)

    def _source(self, keys: Keys) -> str:
        prefixes = (keys[:length] for length in range(len(keys), 0, -1))
        return next((self.sources[prefix] for prefix in prefixes if prefix in self.sources), "default")


def _split(arguments: Sequence[str]) -> dict[str, str]:
    values: dict[str, str] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or not key:
            raise UserError(f"{COMMAND_LINE}: {argument!r} is not key=value; --help lists the keys")
        if key in values:
            raise UserError(f"{COMMAND_LINE}: {key} is given twice: {values[key]!r} and {value!r}")
        values[key] = value
    return values


def _parse(key: str, value: str) -> Any:
    """Text stays text (the schema types it), since YAML reads `no` as false and `007` as 7."""
    if not value.startswith(("[", "{")):
        return None if value == "null" else value
    try:
        return OmegaConf.to_container(OmegaConf.create(value))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{COMMAND_LINE}: {key}={value!r} is not YAML: {_reason(error)}") from error


def _scalar(value: Any) -> Any:
    """An entry of kwargs has no type in the schema: text that reads as a truth value or a number is one."""
    if value in ("true", "false"):
        return value == "true"
    for kind in (int, float) if isinstance(value, str) else ():
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def _find(name: str, near: Path | None, source: str) -> Path:
    """The file of a recipe: below the folder `near`, then by name among the recipes of the project."""
    places = [] if near is None else [near / name, near / f"{name}.yaml"]
    for path in (*places, FOLDER / f"{name.removesuffix('.yaml')}.yaml"):
        if path.is_file():
            return path.resolve()
    names = _names()
    guess = _nearest(name, names)
    raise UserError(f"{source}: no recipe {name!r}{guess}; the recipes are {', '.join(names)}")


def _names() -> list[str]:
    return sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("*.yaml"))


def _label(path: Path) -> str:
    if path.is_relative_to(FOLDER):
        return f"recipes/{path.relative_to(FOLDER).as_posix()}"
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def _layers(path: Path, trail: tuple[Path, ...] = (), base: str | None = None) -> dict[Path, dict[Any, Any]]:
    """The contents of a recipe by file, bases first; what two bases share comes once, before both. A base given here
    stands in for the recipe's own, or for that of the method it builds on."""
    if path in trail:
        circle = " -> ".join(map(_label, (*trail[trail.index(path) :], path)))
        raise UserError(f"base goes in a circle: {circle}")
    layer = _read(path)
    bases = layer.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(name, str) for name in bases):
        raise UserError(f"{_label(path)}: base={_show(bases)} is not allowed; it takes one or a list of recipes")
    found = [_find(name, path.parent, f"{_label(path)}: base") for name in bases]
    if base is not None and all(file.parent != FOLDER / "methods" for file in found):
        found, base = [_find(base, Path(), f"{COMMAND_LINE}: base")], None
    layers: dict[Path, dict[Any, Any]] = {}
    for file in found:
        layers |= _layers(file, (*trail, path), base)  # a file that is there already keeps its place
    return {**layers, path: layer}


def _read(path: Path) -> dict[Any, Any]:
    try:
        layer = OmegaConf.to_container(OmegaConf.load(path))
    except (yaml.YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{_label(path)}{line}: not a readable recipe: {_reason(error)}") from error
    if not isinstance(layer, dict):
        raise UserError(f"{_label(path)}: not a readable recipe: a list where keys and values belong")
    return layer


def _is_group(hint: Any) -> bool:
    return is_dataclass(hint) or (get_origin(hint) is dict and is_dataclass(get_args(hint)[1]))


def _lookup(keys: Keys, source: str) -> tuple[Any, Mapping[str, Any]]:
    """Type and field metadata of a key; refuses a key that the schema does not have."""
    hint: Any = Recipe
    metadata: Mapping[str, Any] = {}
    for depth, key in enumerate(keys):
        parent = ".".join(keys[:depth])
        if is_dataclass(hint):
            members = {field.name: field for field in fields(hint)}
            if key not in members:
                raise UserError(f"{source}: unknown key {_unknown(parent, key, members)}")
            hint, metadata = get_type_hints(hint)[key], members[key].metadata
        elif get_origin(hint) is not dict:
            raise UserError(f"{source}: unknown key {'.'.join(keys)!r}: {parent} is no group of keys")
        elif not re.fullmatch(r"[\w-]+", key):
            raise UserError(f"{source}: {key!r} is no name below {parent}: only letters, digits, _ and -")
        else:
            hint, metadata = get_args(hint)[1], {}
    return hint, metadata


def _unknown(parent: str, key: str, members: Iterable[str]) -> str:
    prefix = f"{parent}." if parent else ""
    guesses = [f"{prefix}{guess}" for guess in difflib.get_close_matches(key, members, n=1)]
    # A key without its group, such as `lr`, is named somewhere else in the schema.
    last = key.rpartition(".")[2]
    guesses = guesses or [".".join(leaf.keys) for leaf in _schema() if leaf.keys[-1] == last]
    hint = f"; did you mean {' or '.join(guesses)}?" if guesses else ""
    return f"{prefix + key!r}{hint} ({parent or 'a recipe'} takes {', '.join(members)})"


def _leaves(value: Any, hint: Any = Recipe, keys: Keys = (), metadata: Any = None) -> Iterator[Leaf]:
    """Every key of a recipe that is no group, entries of kwargs included; an empty mapping is a value."""
    if is_dataclass(value):
        hints = get_type_hints(hint)
        for field in fields(value):
            name = field.name
            yield from _leaves(getattr(value, name), hints[name], (*keys, name), field.metadata)
    elif get_origin(hint) is dict and value:
        for key, entry in value.items():
            yield from _leaves(entry, get_args(hint)[1], (*keys, key))
    else:
        yield Leaf(keys, value, hint, metadata or {})


def _schema() -> Iterator[Leaf]:
    return _leaves(Recipe(teachers={"NAME": TeacherSpec()}))


def _in_range(leaf: Leaf) -> bool:
    given = leaf.value if isinstance(leaf.value, list) else [leaf.value]
    numbers = [number for number in given if isinstance(number, (int, float)) and leaf.hint is not Any]
    low, high = leaf.metadata.get("low"), leaf.metadata.get("high")
    low, high = -math.inf if low is None else low, math.inf if high is None else high
    return all(math.isfinite(number) and low <= number <= high for number in numbers)


def _allowed(hint: Any, metadata: Mapping[str, Any]) -> str:
    """What a key takes, in words."""
    if get_origin(hint) is Literal:
        return " | ".join(map(str, get_args(hint)))
    if get_origin(hint) is list:
        return f"list of {_allowed(get_args(hint)[0], metadata)}"
    if get_origin(hint) is dict:
        return "mapping"
    if hint in (int, float):
        ends = ((word, metadata.get(end)) for word, end in (("from", "low"), ("to", "high")))
        return WORDS[hint] + "".join(f" {word} {end}" for word, end in ends if end is not None)
    return WORDS.get(hint) or " or ".join(_allowed(option, metadata) for option in get_args(hint))


def _choices(hint: Any) -> list[str]:
    if get_origin(hint) is Literal:
        return [str(choice) for choice in get_args(hint)]
    return [choice for part in get_args(hint) for choice in _choices(part)]


def _refusal(leaf: Leaf, source: str) -> str:
    given = leaf.value if isinstance(leaf.value, list) else [leaf.value]
    choices = _choices(leaf.hint)
    near = next((_nearest(str(item), choices) for item in given if item not in choices), "")
    allowed = _allowed(leaf.hint, leaf.metadata)
    return f"{source}: {'.'.join(leaf.keys)}={_show(leaf.value)} is not allowed; it takes {allowed}{near}"


def _nearest(word: str, options: Iterable[str]) -> str:
    return "".join(f"; did you mean {match!r}?" for match in difflib.get_close_matches(word, options, n=1))


def _show(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _reason(error: Exception) -> str:
    return getattr(error, "problem", None) or str(error).partition("\n")[0]


def _teacher_problems(recipe: Recipe) -> Iterator[str]:
    zoo, channels = recipe.zoo_specs, recipe.image.channels
    known = [name for name, spec in recipe.teachers.items() if spec.model]
    for name, spec in recipe.teachers.items():
        if not spec.model:  # also where a mistyped name made a new teacher
            yield f"teachers.{name}.model is empty{_nearest(name, known)}; --list names the models"
    if not any(spec.weight for spec in zoo.values()):
        yield "teachers: none is enabled with a weight above 0; give teachers.NAME.model"
    for name, spec in zoo.items():
        for key, numbers in (("mean", spec.mean), ("std", spec.std)):
            if len(numbers) not in (0, channels):
                yield f"teachers.{name}.{key}={numbers}: image.channels={channels} needs as many, or []"
        if min(spec.std, default=1) <= 0:
            yield f"teachers.{name}.std={spec.std} is not allowed; it takes numbers above 0"
        if not spec.weights and recipe.data.dataset == "none":
            yield f"teachers.{name}.weights is empty and data.dataset is none: nothing to train it on"
    main, sample, names = recipe.zoo.main, recipe.zoo.sample, ", ".join(zoo)
    if main is not None and main not in zoo:
        yield f"zoo.main={_show(main)} is no enabled teacher{_nearest(main, zoo)}; those are {names}"
    if sample > len(zoo):
        yield f"zoo.sample={sample} is not allowed; it takes 1 to {len(zoo)}, the enabled ones are {names}"


def _run_problems(recipe: Recipe) -> Iterator[str]:
    tasks, checkpoint, betas = recipe.tasks, recipe.generator.checkpoint, recipe.synthesis.betas
    if not tasks or len(set(tasks)) < len(tasks):
        yield f"tasks={_show(tasks)} is not allowed; it takes one or more tasks, each once"
    if "distill" in tasks and not recipe.student.model and recipe.distill.input is None:
        yield "student.model is empty, and tasks has distill; --list names the models"
    if "generator" in tasks and checkpoint:
        yield f"tasks has generator, and generator.checkpoint={_show(checkpoint)} is frozen; leave one out"
    if "generator" in tasks and tasks[0] != "generator":
        yield f"tasks={_show(tasks)} is not allowed: the generator comes first, tasks=[generator, distill, ...]"
    if not recipe.synthesis.steps and not checkpoint and recipe.generator.arch != "pixels":
        yield "synthesis.steps=0 leaves the generator untrained; set it above 0, or give generator.checkpoint"
    yield from _synthesis_problems(recipe)
    for task in ("qat", "ptq"):
        keys = getattr(recipe, task)
        for name, pair in {
            "ends": keys.ends,
            **{f"overrides.{key}": pair for key, pair in keys.overrides.items()},
        }.items():
            if len(pair) not in (1, 2):
                yield f"{task}.{name}={pair} is not allowed; it takes [weights, input], or [both]"
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        yield f"synthesis.betas={betas} is not allowed; it takes two numbers from 0 to below 1"


def _synthesis_problems(recipe: Recipe) -> Iterator[str]:
    synthesis, weights = recipe.synthesis, recipe.synthesis.losses
    if recipe.generator.checkpoint or not synthesis.steps:
        return
    if not recipe.generator.conditional and weights.ce + weights.diversity + weights.likeness > 0:
        yield (
            "generator.conditional=false draws no class on request; set synthesis.losses.ce, .diversity and .likeness "
            "to 0, and give synthesis.losses.one_hot and .information some weight (DAFL)"
        )
    if synthesis.penalise and not weights.ce + weights.one_hot + weights.information:
        yield (
            "synthesis.penalise=true weighs ce, one_hot and information, and none has weight; give one of "
            "synthesis.losses.{ce,one_hot,information} some"
        )
    if synthesis.penalise and synthesis.learn_weights:
        yield "synthesis.penalise and synthesis.learn_weights both change the weight of ce; set one of them to false"
    if weights.adversary and 2 * (synthesis.warmup + synthesis.fade) > 1:
        yield (
            f"synthesis.warmup={synthesis.warmup} and synthesis.fade={synthesis.fade}: the adversary never has its "
            "whole weight; keep their sum at 0.5 or below"
        )
    rounds = synthesis.inner > 1
    for key, given in (
        ("latent_lr", synthesis.latent_lr),
        ("renew", synthesis.renew != "none"),
        ("coarse", synthesis.coarse),
    ):
        if given and not rounds:
            yield f"synthesis.{key}={getattr(synthesis, key)} is about rounds; set synthesis.inner above 1 too"
    if rounds and "distill" in recipe.tasks and recipe.distill.replay:
        yield (
            f"distill.replay={recipe.distill.replay} and synthesis.inner={synthesis.inner}: rounds keep their images "
            "in a pool already; set distill.replay=0"
        )
    if recipe.generator.arch == "pixels":
        if not rounds or not synthesis.latent_lr:
            yield (
                "generator.arch=pixels has no network to train; set synthesis.inner above 1 and synthesis.latent_lr "
                "above 0 (image inversion), or synthesis.steps=0 (noise)"
            )
        for key, idle in (("redraw", 0), ("renew", "none")):
            if (given := getattr(synthesis, key)) != idle:
                yield f"synthesis.{key}={given} and generator.arch=pixels: it has no layers; set it to {idle}"
