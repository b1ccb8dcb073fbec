"""Recipes: YAML files and `key=value` arguments become one typed, checked `Recipe`; a mistake is one line."""

import difflib
import json
import math
import os.path
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NamedTuple, cast, get_args, get_origin, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from dfkd.contradictions import check
from dfkd.errors import UserError, nearest, shown
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
        """The resolved recipe as YAML, which loads to the same recipe, but for what each command is asked anew."""
        asked = replace(self.recipe, overwrite=False, trust_code=False)
        return OmegaConf.to_yaml(OmegaConf.structured(asked))


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


def print_config(loaded: Loaded) -> str:
    """Every key and value as YAML, with its source as a trailing comment."""
    lines: dict[Keys, str] = {}
    for keys, value, _, _ in _leaves(loaded.recipe):
        names = [_quoted(key) for key in keys]
        for depth, name in enumerate(names[:-1]):
            lines.setdefault(keys[: depth + 1], f"{'  ' * depth}{name}:")
        line = f"{'  ' * (len(keys) - 1)}{names[-1]}: {shown(value)}"
        lines[keys] = f"{line:<56}  # {loaded.sources['.'.join(keys)]}"
    return "\n".join(lines.values()) + "\n"


def _quoted(key: str) -> str:
    """A key as YAML reads it back: a pattern of layers may look like an alias, a name like a truth value."""
    try:
        return key if yaml.safe_load(key) == key else json.dumps(key)
    except yaml.YAMLError:
        return json.dumps(key)


def help_text() -> str:
    """Usage, then every key with its default, what it allows and its help."""
    lines = [USAGE]
    for keys, default, hint, metadata in _schema():
        lines.append(f"{'.'.join(keys)}={shown(default)}  ({_allowed(hint, metadata)})")
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
            raise UserError(f"{source}: {'.'.join(keys)}={shown(value)} is not a group of keys{remedy}")

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
            raise UserError(f"{source}: {key}={shown(value)}: {_reason(error)}") from error

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
    if places and name.endswith(".yaml"):
        raise UserError(
            f"{source}: no recipe {name!r}, no file {places[0].resolve()}; the project's are named without .yaml"
        )
    names = _names()
    guess = nearest(name, names)
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
        raise UserError(f"{_label(path)}: base={shown(bases)} is not allowed; it takes one or a list of recipes")
    found = [_find(name, path.parent, f"{_label(path)}: base") for name in bases]
    methods, given = FOLDER / "methods", base
    if base is not None and all(file.parent != methods for file in found):
        found, base = [_find(base, Path(), f"{COMMAND_LINE}: base")], None
    layers: dict[Path, dict[Any, Any]] = {}
    for file in found:
        layers |= _layers(file, (*trail, path), base)  # a file that is there already keeps its place
    others = [file for file in layers if file.parent == methods]
    if base != given and path.parent == methods and others:
        raise UserError(
            f"{COMMAND_LINE}: base={given} builds on {_label(others[-1])}, whose terms {_label(path)} would have "
            "besides its own; give a base that is no method, such as digits_pair"
        )
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
        return f"mapping of names to {_allowed(get_args(hint)[1], metadata)}"
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
    near = next((nearest(str(item), choices) for item in given if item not in choices), "")
    allowed = _allowed(leaf.hint, leaf.metadata)
    return f"{source}: {'.'.join(leaf.keys)}={shown(leaf.value)} is not allowed; it takes {allowed}{near}"


def _reason(error: Exception) -> str:
    return getattr(error, "problem", None) or str(error).partition("\n")[0]
