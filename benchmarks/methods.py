"""Every method at equal training time on the same teacher and student: accuracy, seconds, memory; for docs/results.md.

python benchmarks/methods.py [--seconds 60] [--seeds 0,1,2] [--methods dafl,cmi] [--lanes 2] [base=NAME] [KEY=VALUE ...]

- Methods are recipes/methods/NAME.yaml, or files with --methods path/x.yaml; KEY=VALUE go to all of them. Without
  base=NAME it is digits on a CPU, and ResNet-56 to ResNet-20 on CIFAR-10 where there is a GPU.
- Same teacher: of the zoo one is left, --teacher, for all methods and seeds; NAME:zoo is the method with its whole zoo.
- Equal time: the seconds of an update of generator and student are measured first, then synthesis.steps and
  distill.steps are scaled by one factor such that training takes --seconds. Start-up, training of teachers and
  evaluation do not count. Where one round (synthesis.inner) is too long, it is shortened, and the row says so.
- --updates instead: steps are the recipes' own, whatever time they take; KEY=VALUE sets a paper's schedule.
- Memory: the peak of the process, or on a GPU that of its tensors. Every run is a process of its own, --lanes at once.

Goes on where it stopped: each finished run is a line of OUT/figures.jsonl, and OUT/NAME-SEED/ its folder.
"""

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bookkeeping import (
    Keys,
    absent,
    asked,
    count,
    exit_code,
    given_keys,
    keep_settings,
    measured_on,
    numbers,
    on_gpu,
    with_deviation,
    written,
)
from equal_time import Method, add_length, check_judged, compare, length, settings_of

from dfkd.curves import whole_lines
from dfkd.errors import UserError
from dfkd.recipe import FOLDER, load_recipe

# ResNet-56, the main one of that zoo, and its student ResNet-20, which begins at random with every method.
ON_GPU = {"base": "cifar10_zoo", "student.weights": "", "distill.lr": "0.3"}
PREFERRED = "residual"  # the teacher that is left where the zoo has no main one
ZOO = ":zoo"
TOLERATED = 0.2  # share by which a run's seconds may miss the budget before its row says so
ROUNDED = 0.1  # seconds to which a line rounds those of its training
SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)  # of the training, at which the table against time looks


def default_methods() -> list[str]:
    """Every method of recipes/methods, and those that mix teachers once more with their zoo."""
    names = sorted(path.stem for path in (FOLDER / "methods").glob("*.yaml"))
    return names + [name + ZOO for name in names if name in ("dfkd", "mixmix")]


def make_method(name: str, given: Keys, teacher: str | None) -> Method:
    """A method by the name of its recipe or by its file, with one teacher, or with the zoo that NAME:zoo leaves."""
    try:
        return _made(name, given, teacher)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def _made(name: str, given: Keys, teacher: str | None) -> Method:
    path, whole = name.removesuffix(ZOO), name.endswith(ZOO)
    keys = {"recipe": path if "/" in path or path.endswith(".yaml") else f"methods/{path}", **given}
    label = Path(path).stem
    if whole:
        recipe = load_recipe(written(keys)).recipe
        return Method(f"{label}, zoo of {len(recipe.zoo_specs)}", f"{label}-zoo", keys, recipe)
    keys["zoo.sample"] = "1"
    recipe = load_recipe(written(keys)).recipe
    names = list(recipe.zoo_specs)
    left = teacher or recipe.zoo.main or (PREFERRED if PREFERRED in names else names[0])
    if left not in names:
        raise UserError(f"--teacher {left} is no enabled teacher; choose from {', '.join(names)}")
    keys |= {"zoo.main": left, **{f"teachers.{other}.enabled": "false" for other in names if other != left}}
    return Method(label, label, keys, load_recipe(written(keys)).recipe)


def check_alike(methods: Sequence[Method]) -> None:
    """Raise UserError where two methods would not have the same images, student or (unless a zoo) teacher."""
    like = min(methods, key=lambda method: len(method.recipe.zoo_specs))
    for method in methods:
        for key in ("classes", "image", "data", "training", "student", "zoo_specs"):
            mine, other = getattr(method.recipe, key), getattr(like.recipe, key)
            if mine != other and (key != "zoo_specs" or len(mine) == len(other)):
                raise UserError(f"{method.name} and {like.name} are no match: they differ in {key}")


def table(lines: Sequence[Mapping[str, Any]], budget: float) -> str:
    """Markdown: the teacher, then a row per method, the best mean accuracy first."""
    rows = [
        "| method | student % | seconds | peak MB | generator updates | student updates | class agreement % | note |",
        "|---" * 8 + "|",
    ]
    teachers = {name: value for line in lines if len(line["teachers"]) == 1 for name, value in line["teachers"].items()}
    rows += [f"| teacher {name} | {value:.2f}" + " | " * 6 + "|" for name, value in teachers.items()]
    of = {name: [line for line in lines if line["method"] == name] for name in {line["method"]: 0 for line in lines}}
    for name in sorted(of, key=lambda name: -statistics.fmean(line["accuracy"] for line in of[name])):
        rows.append(f"| {name} | " + " | ".join(cells(of[name], budget)) + " |")
    return "\n".join(rows)


def against_time(lines: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: the mean accuracy that the students of a method had after shares of their training, the best first."""
    rows = ["| student % after | " + " | ".join(f"{share:.0%}" for share in SHARES) + " |"]
    rows.append("|---" * (1 + len(SHARES)) + "|")
    of = {name: [line for line in lines if line["method"] == name] for name in {line["method"]: 0 for line in lines}}
    for name in sorted(of, key=lambda name: -statistics.fmean(line["accuracy"] for line in of[name])):
        cells = []
        for share in SHARES:
            reached = [[at for at in line["curve"] if at[0] <= share * line["seconds"] + ROUNDED] for line in of[name]]
            cells.append(f"{statistics.fmean(each[-1][1] for each in reached):.2f}" if all(reached) else "-")
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def cells(lines: Sequence[Mapping[str, Any]], budget: float) -> list[str]:
    """The cells of a method out of its lines, one per seed."""
    accuracy = [line["accuracy"] for line in lines]
    seconds = statistics.fmean(line["seconds"] for line in lines)
    updates = [statistics.fmean(line[f"{who}_updates"] for line in lines) for who in ("generator", "student")]
    agreements = [statistics.fmean(line["class_agreement"].values()) for line in lines if line["class_agreement"]]
    off = [f"{line['seconds']:.1f}" for line in lines if budget and abs(line["seconds"] / budget - 1) > TOLERATED]
    notes = [f"took {', '.join(off)} s, not {budget:g}"] if off else []
    notes += list(dict.fromkeys(line["note"] for line in lines if line["note"]))
    return [
        f"{with_deviation(accuracy)} ({len(lines)})",
        f"{seconds:.1f}",
        f"{max(line['peak_mb'] for line in lines):,.0f}",
        *(f"{count:,.0f}" for count in updates),
        f"{statistics.fmean(agreements):.1f}" if agreements else "-",
        "; ".join(notes),
    ]


def describe(lines: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> str:
    """What the table says of all rows, in one line."""
    first = lines[0]
    seeds = sorted({line["seed"] for line in lines})
    return (
        f"{length(settings)} each, {settings['lanes']} at once with {settings['threads']} thread(s) "
        f"each; {measured_on(lines)}; "
        f"student {first['student']}; {first['n']} test images; seeds {', '.join(map(str, seeds))}: "
        f"mean ± sample standard deviation (seeds); peak memory: {first['memory']}"
    )


def main(given: Sequence[str] | None = None) -> int:
    """Measure what is missing and print the table; the exit code: 1 where a run failed, 2 for a wrong argument."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/methods"))
    parser.add_argument("--methods", default=",".join(default_methods()), help="names or files, with commas between")
    parser.add_argument("--seeds", type=numbers, default="0,1,2")
    add_length(parser, 60.0)
    parser.add_argument("--lanes", type=count, default=1, help="runs at once, each with its share of the cores")
    parser.add_argument("--teacher", help="the one that is left; otherwise zoo.main, or residual, or the first")
    options, arguments = parser.parse_known_args(given)
    return exit_code(lambda: tabulate(options, arguments))


def tabulate(options: argparse.Namespace, arguments: Sequence[str]) -> bool:
    """All that main does for its options and the KEY=VALUE arguments; whether no run is missing."""
    keys = given_keys(arguments, "all methods")
    if on_gpu():
        keys = keys if "base" in keys else {**ON_GPU, **keys}
    names = [name for name in dict.fromkeys(options.methods.split(",")) if name]
    if not names:
        raise UserError(f"no method in {FOLDER / 'methods'}; give --methods path/x.yaml")
    settings = settings_of(options, keys)
    methods = [make_method(name, keys, options.teacher) for name in names]
    called = [method.name for method in methods]
    if twice := [name for name in called if called.count(name) > 1]:
        raise UserError(f"--methods names two files {twice[0]}.yaml, which would be one row; rename one")
    check_alike(methods)
    check_judged(methods)
    keep_settings(options.out / "settings.json", {**settings, "teacher": options.teacher})
    complete = compare(methods, options.seeds, options.out, settings)
    if lines := asked(whole_lines(options.out / "figures.jsonl"), called, options.seeds):
        tables = f"{table(lines, options.seconds)}\n\n{against_time(lines)}"
        print(f"\n{describe(lines, settings)}\n\n{tables}{absent(lines, called, options.seeds)}")
    return complete


if __name__ == "__main__":
    sys.exit(main())
