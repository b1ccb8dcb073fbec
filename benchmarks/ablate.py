"""What each default is worth: one key changed at a time, at equal training time; for docs/ablations.md.

python benchmarks/ablate.py [--seconds 30] [--seeds 0,1] [--variants "no replay,synthesis.lr=1e-3"] [KEY=VALUE ...]

- Equal time, teachers, folders and resuming are those of equal_time.py: the seconds of an update are measured per
  variant, and its steps follow; all seeds have the same teachers.
- --updates instead: steps are the recipe's own, whatever time they take.
- Variants that change nothing of what an update does (a rate, a temperature) take the defaults' measured cost.
- `gain` is the mean over seeds of a variant's accuracy minus the defaults' on the same seed, with its sample standard
  deviation: what a variant changes, less what the seed alone does.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

from bookkeeping import (
    OWN,
    Keys,
    absent,
    asked,
    count,
    exit_code,
    given_keys,
    keep_settings,
    numbers,
    with_deviation,
    written,
)
from equal_time import Method, add_length, check_judged, compare, settings_of
from methods import cells, describe

from dfkd.curves import whole_lines
from dfkd.errors import UserError
from dfkd.recipe import load_recipe

DEFAULTS = "defaults"
VARIANTS: dict[str, Keys] = {
    DEFAULTS: {},
    "no adversary": {"synthesis.losses.adversary": "0"},
    "adversary l1": {"synthesis.adversary_loss": "l1"},
    "adversary unmasked": {"synthesis.adversary_mask": "false"},
    "adversary 1": {"synthesis.losses.adversary": "1"},
    "adversary 10": {"synthesis.losses.adversary": "10"},
    "adversary from the start": {"synthesis.warmup": "0"},
    "adversary to the end": {"synthesis.fade": "0"},
    "fade 0.1": {"synthesis.fade": "0.1"},
    "not equalised": {"synthesis.equalise": "false", "synthesis.losses.bn": "1"},
    "bn 10": {"synthesis.losses.bn": "10"},
    "bn 160": {"synthesis.losses.bn": "160"},
    "ce 0.3": {"synthesis.losses.ce": "0.3"},
    "ce 3": {"synthesis.losses.ce": "3"},
    "no replay": {"distill.replay": "0"},
    "replay 50": {"distill.replay": "50"},
    "replay 1000": {"distill.replay": "1000"},
    "fresh 1/4": {"distill.fresh": "0.25"},
    "fresh 1/8": {"distill.fresh": "0.125"},
    "student l1": {"distill.loss": "l1"},
    "student T 4": {"distill.temperature": "4"},
    "student T 1": {"distill.temperature": "1"},
    "student lr 0.05": {"distill.lr": "0.05"},
    "student lr 0.2": {"distill.lr": "0.2"},
    "student lr 0.4": {"distill.lr": "0.4"},
    "2 student steps": {"synthesis.student_steps": "2"},
    "8 student steps": {"synthesis.student_steps": "8"},
    "redraw 2": {"synthesis.redraw": "2"},
    "redraw 6": {"synthesis.redraw": "6"},
    "no diversity": {"synthesis.losses.diversity": "0"},
    "diversity 0.3": {"synthesis.losses.diversity": "0.3"},
    "diversity 3": {"synthesis.losses.diversity": "3"},
    "Data Mixing": {"synthesis.mix.probability": "0.5"},
    "Data Mixing and one code": {"synthesis.mix.probability": "0.5", "generator.prototypes": "1"},
    "one code a class": {"generator.prototypes": "1"},
    "32 codes a class": {"generator.prototypes": "32"},
    "norms of the class": {"generator.norms": "class"},
    "teachers see images as drawn": {"synthesis.as_trained": "false"},
    "logits alone": {"distill.features": "0", "distill.maps": "0"},
    "no maps": {"distill.maps": "0"},
    "maps 10": {"distill.maps": "10"},
    "student batches not mixed": {"distill.mix": "0"},
    "all student batches mixed": {"distill.mix": "1"},
    "no shift": {"distill.shift": "0"},
    # For recipes of 600 times 4 updates, as digits and cifar10_16px are.
    "half of the student's updates after the generator's": {"synthesis.student_steps": "2", "distill.steps": "1200"},
    "generator width 16": {"generator.width": "16"},
    "generator width 64": {"generator.width": "64"},
    "generator lr 1e-3": {"synthesis.lr": "1e-3"},
    "m' = 1": {"zoo.sample": "1"},
    "m' = 3": {"zoo.sample": "3"},
    "batch 64": {"synthesis.batch_size": "64", "distill.batch_size": "64", "distill.lr": "0.07"},
    "batch 256": {"synthesis.batch_size": "256", "distill.batch_size": "256", "distill.lr": "0.14"},
}
# Last words of keys that change nothing of what an update does; GRADED: where they were above 0 and stay so.
FREE = ("lr", "temperature", "redraw")
GRADED = ("warmup", "fade", "replay", "bn", "ce", "diversity", "adversary", "maps")


def make_variant(name: str, given: Keys) -> Method:
    """A variant of the recipe and keys given, as a row of the table."""
    if name not in VARIANTS and "=" not in name:
        raise UserError(f"unknown variant {name!r}; give KEY=VALUE, or choose from {', '.join(VARIANTS)}")
    changed = VARIANTS[name] if name in VARIANTS else given_keys([name], "variants")
    keys = {**given, **changed}
    folder = "".join(letter if letter.isalnum() else "-" for letter in name)
    base, recipe = (load_recipe(written(each)).recipe for each in (given, keys))
    costs = [key for key in changed if key.rpartition(".")[2] not in FREE]
    free = all(key.rpartition(".")[2] in GRADED and attrgetter(key)(base) and attrgetter(key)(recipe) for key in costs)
    return Method(name, folder, keys, recipe, DEFAULTS if free else "")


def parted(text: str) -> list[str]:
    """Variants with commas between; those within brackets are a value's own."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def gains(lines: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Per variant what it has over the defaults, in points, seed by seed where both are there."""
    of = {(line["method"], line["seed"]): line["accuracy"] for line in lines}
    found: dict[str, list[float]] = {}
    for (name, seed), accuracy in of.items():
        if (DEFAULTS, seed) in of:
            found.setdefault(name, []).append(accuracy - of[DEFAULTS, seed])
    return found


def table(lines: Sequence[Mapping[str, Any]], budget: float) -> str:
    """Markdown: a row per variant, the largest gain first, last those that have no seed in common with the defaults."""
    rows = [
        "| variant | gain, points (seeds) | student % (seeds) | seconds | generator updates | student updates "
        "| class agreement % | note |",
        "|---" * 8 + "|",
    ]
    found = {**{line["method"]: [] for line in lines}, **gains(lines)}
    for name in sorted(found, key=lambda name: -statistics.fmean(found[name] or [-math.inf])):
        own = [line for line in lines if line["method"] == name]
        accuracy, seconds, _, generator, student, agreement, note = cells(own, budget)
        gain = "" if name == DEFAULTS else f"{with_deviation(found[name], '+.2f')} ({len(found[name])})"
        rows.append(f"| {name} | {gain} | {accuracy} | {seconds} | {generator} | {student} | {agreement} | {note} |")
    return "\n".join(rows)


def main(given: Sequence[str] | None = None) -> int:
    """Measure what is missing and print the table; the exit code: 1 where a run failed, 2 for a wrong argument."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/ablate"))
    parser.add_argument(
        "--variants", help=f"names or KEY=VALUE, with commas between; all that the recipe allows: {', '.join(VARIANTS)}"
    )
    parser.add_argument("--seeds", type=numbers, default="0,1")
    add_length(parser, 30.0)
    parser.add_argument("--lanes", type=count, default=2, help="runs at once, each with its share of the cores")
    options, arguments = parser.parse_known_args(given)
    return exit_code(lambda: tabulate(options, arguments))


def tabulate(options: argparse.Namespace, arguments: Sequence[str]) -> bool:
    """All that main does for its options and the KEY=VALUE arguments; whether no run is missing."""
    keys = {"recipe": "digits", **given_keys(arguments, "all variants", own=set(OWN) - {"recipe"})}
    variants = [make_variant(DEFAULTS, keys)]
    names = dict.fromkeys(parted(options.variants) if options.variants else VARIANTS)
    names.pop(DEFAULTS, None)  # always there
    for name in names:
        try:
            variant = make_variant(name, keys)
            if variant.recipe == variants[0].recipe:  # it would be measured against itself
                print(f"left out: {name}: this recipe has that already", flush=True)
            else:
                variants.append(variant)
        except UserError as error:  # three teachers of a zoo of two, say
            if options.variants:
                raise
            print(f"left out: {name}: {error}", flush=True)
    check_judged(variants)
    settings = settings_of(options, keys)
    keep_settings(options.out / "settings.json", settings)
    complete = compare(variants, options.seeds, options.out, settings)
    called = [variant.name for variant in variants]
    if lines := asked(whole_lines(options.out / "figures.jsonl"), called, options.seeds):
        print(f"\n{describe(lines, settings)}\n\n{table(lines, options.seconds)}{absent(lines, called, options.seeds)}")
    return complete


if __name__ == "__main__":
    sys.exit(main())
