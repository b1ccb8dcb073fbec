"""Imports go one way, and only those who may open real images can reach them (README, "Files")."""

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Who may import whom; a room that is not here may not exist. The command line's rooms stand above all others.
CORE: dict[str, set[str]] = {
    "generators": set(),
    "errors": set(),
    "schema": set(),
    "whole": {"errors"},
    "norm_kernels": set(),
    "norms": {"errors", "norm_kernels"},
    "collectives": {"errors", "norms"},
    "curves": set(),
    "runtime": {"errors"},
    "classifier": {"errors", "runtime"},
    "models": {"errors", "whole"},
    "mixing": {"errors", "runtime"},
    "losses": {"collectives", "norms", "runtime"},
    "data": {"errors", "runtime"},
    "report": {"curves", "errors", "whole"},
    "contradictions": {"errors", "schema"},
    "recipe": {"contradictions", "errors", "schema"},
    "evaluate": {"data", "errors", "losses", "runtime"},
    "paging": {"errors"},
    "cuda_graphs": {"errors", "runtime"},
    "draws": {"runtime"},
    "renewal": {"generators", "runtime"},
    "teachers": {"classifier", "collectives", "draws", "errors", "models", "norms", "paging", "runtime"},
    "contrast": {"collectives", "losses", "norms", "runtime", "teachers"},
    "terms": {"collectives", "contrast", "errors", "generators", "losses", "mixing", "norms", "runtime", "teachers"},
    "synthesis": {
        *("collectives", "contrast", "cuda_graphs", "draws", "errors", "generators", "losses", "mixing", "models"),
        *("norms", "paging", "renewal", "runtime", "teachers", "terms"),
    },
    "stream": {"classifier", "cuda_graphs", "draws", "errors", "generators", "mixing", "runtime", "teachers"},
    "pretrain": {"checkpoints", "classifier", "cuda_graphs", "draws", "errors", "runtime"},
    "compress": {
        *("classifier", "collectives", "cuda_graphs", "errors", "losses", "models", "norms", "renewal", "runtime"),
        *("stream", "teachers"),
    },
    "export": {"classifier", "compress", "errors", "whole"},
    "quality": {"draws", "errors", "evaluate", "losses", "norms", "runtime", "teachers"},
    "verify": {"classifier", "compress", "errors", "export", "runtime"},
    "verdict": {"evaluate", "generators"},
    "checkpoints": {"errors", "runtime", "whole"},
    "metrics": {"collectives", "errors", "runtime", "whole"},
    "training": {
        *("checkpoints", "collectives", "compress", "draws", "errors", "evaluate", "generators", "metrics", "models"),
        *("paging", "runtime", "stream", "synthesis", "teachers", "verdict"),
    },
}
COMMAND_LINE = {"run", "phases", "dry_run", "assemble", "cli", "tasks", "results", "folder", "judge", "inputs", "zoo"}
PUBLIC = {
    "classifier",
    "compress",
    "errors",
    "recipe",
    "schema",
    "stream",
    "synthesis",
    "teachers",
}  # handed out by dfkd
READS_RECIPES = COMMAND_LINE | {"recipe", "contradictions", "dfkd"}
OPENS_IMAGES = {"assemble", "evaluate", "judge", "phases", "results", "tasks", "zoo"}
IMAGE_FILES = {"PIL", "sklearn", "torchvision.datasets", "torchvision.io"}  # what real images are read with


def imported(source: str, room: str = "room") -> Iterator[str]:
    """Every module that a source imports or names, wherever in it: `a.b`, also for `from a import b` and `a.b.c`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = f"dfkd.{room}" if node.level == 1 else "dfkd"
            module = (f"{base}.{node.module}" if node.module else base) if node.level else str(node.module)
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield f"{node.value.id}.{node.attr}"


def sources(package: str) -> Iterator[tuple[str, Path]]:
    """Room and path of every source file of a package; a folder is one room."""
    for path in sorted((ROOT / package).rglob("*.py")):
        first = path.relative_to(ROOT / package).parts[0].removesuffix(".py")
        yield ("generators" if package == "generators" else "dfkd" if first == "__init__" else first), path


def rooms_of(names: Iterator[str]) -> set[str]:
    """The rooms of this project among imported names."""
    names_ = list(names)
    rooms = {name.split(".")[1] for name in names_ if name.startswith("dfkd.")}
    return {room for room in rooms if room in CORE or room in COMMAND_LINE or (ROOT / "dfkd" / room).exists()} | {
        "generators" for name in names_ if name.split(".")[0] == "generators"
    }


FILES = [*sources("dfkd"), *sources("generators")]


def test_the_reader_of_imports_sees_every_form() -> None:
    source = (
        "import dfkd.data\n"
        "from dfkd import losses as L\n"
        "from dfkd.stream import Replay\n"
        "def f():\n    from ..teachers import Teacher\n    from .fit import Fit\n    import generators.conv\n"
        "torchvision.datasets.ImageFolder\n"
    )
    names = set(imported(source, "compress"))
    assert {"dfkd.data", "dfkd.losses", "dfkd.stream", "dfkd.teachers", "dfkd.compress.fit"} <= names
    assert {"generators.conv", "torchvision.datasets"} <= names
    assert rooms_of(iter(names)) == {"data", "losses", "stream", "teachers", "compress", "generators"}


def test_the_table_has_no_cycle() -> None:
    order = list(TopologicalSorter(CORE).static_order())
    assert set(order) == set(CORE)


@pytest.mark.parametrize(("room", "path"), FILES, ids=[str(path.relative_to(ROOT)) for _, path in FILES])
def test_a_room_imports_what_stands_below_it(room: str, path: Path) -> None:
    above = set(CORE) | COMMAND_LINE
    allowed = CORE.get(room, PUBLIC if room == "dfkd" else above if room in COMMAND_LINE else None)
    assert allowed is not None, f"{room} is a new room: give it a line in CORE or COMMAND_LINE, and in the README"
    assert rooms_of(imported(path.read_text(), room)) - {room} <= allowed


def test_generators_need_torch_and_safetensors_alone() -> None:
    paths = [path for room, path in FILES if room == "generators"]
    assert len(paths) >= 2
    for path in paths:
        names = {node.split(".")[0] for node in imported_modules(path)}
        assert names <= {"torch", "safetensors", "generators", *sys.stdlib_module_names}, path


def imported_modules(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "generators" if node.level else str(node.module)


def test_only_evaluation_and_some_of_the_command_line_reach_real_images() -> None:
    importers = {room for room, path in FILES if "data" in rooms_of(imported(path.read_text(), room))} - {"data"}
    assert importers == OPENS_IMAGES


def test_only_data_reads_image_files() -> None:
    def reads(path: Path) -> bool:
        return any(name in IMAGE_FILES or name.split(".")[0] in IMAGE_FILES for name in imported(path.read_text()))

    assert {room for room, path in FILES if reads(path)} == {"data"}


def test_only_the_command_line_reads_recipes() -> None:
    readers = {
        room for room, path in FILES if rooms_of(imported(path.read_text(), room)) & {"recipe", "schema"} - {room}
    }
    assert "recipe" in readers
    assert readers <= READS_RECIPES


def test_no_room_is_a_drawer_for_everything() -> None:
    names = {part.removesuffix(".py") for _, path in FILES for part in path.relative_to(ROOT).parts}
    assert not names & {"utils", "util", "helpers", "common", "misc"}


def test_train_py_only_calls_the_command_line() -> None:
    assert rooms_of(imported((ROOT / "train.py").read_text())) == {"cli"}
