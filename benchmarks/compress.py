"""Accuracy after every compression, from synthetic images, noise and real ones: the table of docs/compression.md.

python benchmarks/compress.py --out runs/compress recipe=cifar10_resnet20 generator.checkpoint=DIR [KEY=VALUE ...]

Goes on where it stopped: each finished figure is a line of OUT/figures.jsonl. --cases and --sources choose some, with
commas between. `seed=1` and so on measures a case once more, on the same network: teachers.NAME.weights names it, from
the first call on.
"""

import argparse
import copy
import dataclasses
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from bookkeeping import add, exit_code, keep_recipes, keep_settings, picked, trained_keys, with_deviation

from dfkd.assemble import train_zoo
from dfkd.compress.fit import Fit
from dfkd.curves import whole_lines
from dfkd.errors import UserError
from dfkd.inputs import SOURCES, task_input, task_source
from dfkd.phases import plans
from dfkd.recipe import load_recipe
from dfkd.results import describe_device
from dfkd.run import build
from dfkd.runtime import make_accelerator
from dfkd.tasks import TASKS, compare

Cases = dict[str, tuple[str, dict[str, Any]]]  # task and keys by name
PTQ = {f"W{w}A{a} PTQ": ("ptq", {"weights": w, "activations": a}) for w, a in ((8, 8), (4, 4), (2, 4))}
QAT = {f"W{w}A{a} QAT": ("qat", {"weights": w, "activations": a}) for w, a in ((8, 8), (4, 4), (2, 4))}
WEIGHTS = {f"{100 * r:.0f} % weights": ("prune", {"kind": "weights", "ratio": r}) for r in (0.5, 0.8)}
CHANNELS = {f"{100 * r:.0f} % channels": ("prune", {"kind": "channels", "ratio": r}) for r in (0.2, 0.5)}
CLOSED = {
    f"{100 * r:.0f} % channels by {method}": ("udfc", {"ratio": r, "method": method})
    for r in (0.2, 0.5)
    for method in ("udfc", "rectified")
}
CASES: Cases = {**PTQ, **QAT, **WEIGHTS, **CHANNELS, **CLOSED}


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/compress"))
    parser.add_argument("--cases", default=",".join(CASES), help="; ".join(CASES).replace("%", "%%"))
    parser.add_argument("--sources", default=",".join(SOURCES), help="; ".join(SOURCES))
    options, arguments = parser.parse_known_args()
    return exit_code(
        lambda: measure(options.out, picked(CASES, options.cases), picked(SOURCES, options.sources), arguments)
    )


def measure(out: Path, cases: Cases, sources: Collection[str], arguments: Sequence[str]) -> bool:
    """Measure what is missing and print the table; whether all could be measured."""
    recipe = load_recipe([*arguments, f"output={out}", "tasks=[ptq]"]).recipe  # tasks: which does not matter
    if recipe.data.dataset == "none" or not cases or not sources:
        raise UserError(
            "accuracies of --cases with --sources are what is measured: name one each, and set data.dataset to real "
            "test images"
        )
    plans(recipe)  # refuses a recipe without a generator
    accelerator, shard = make_accelerator(recipe.runtime.precision)
    # Teachers that a run trains are others with every seed, in folders of other names.
    given = sorted(key for key in arguments if not key.startswith("seed="))
    own = {"trained teachers": trained} if (trained := trained_keys(recipe)) else {}
    keep_settings(out / "settings.json", {"keys": given, **own})
    keep_recipes(out, {"": dataclasses.replace(recipe, seed=0)})
    parts = build(recipe, accelerator, shard)
    train_zoo(parts, print)
    path = out / "figures.jsonl"
    lines = whole_lines(path)
    found, absent = {(line["case"], line["source"], line["seed"]) for line in lines}, []
    for case, (task, keys) in cases.items():
        for source in sources if task != "udfc" else ["no data"]:
            if (case, source, recipe.seed) in found:
                continue
            here = copy.copy(parts)
            here.recipe = dataclasses.replace(recipe, **{task: dataclasses.replace(getattr(recipe, task), **keys)})
            model, _ = task_input(here, "main")
            begun = time.perf_counter()
            try:
                images = task_source(here, "generator" if task == "udfc" else source, model)
                done = TASKS[task](here, model, images, Fit.run)
            except UserError as error:
                print(f"{case} from {source} not done: {error}", flush=True)
                absent.append(f"{case} from {source} (seed {recipe.seed})")
                continue
            figures = {"case": case, "source": source, "seed": recipe.seed, **compare(here, model, done)}
            figures |= {"seconds": time.perf_counter() - begun, "device": describe_device(shard)}
            lines.append(figures)
            add(path, figures)
            print(case, source, figures["before"], figures["naive"], figures["after"], flush=True)
    wanted = [line for line in lines if line["case"] in cases and line["source"] in (*sources, "no data")]
    print(table(wanted) if wanted else "nothing could be measured")
    if absent:
        print(f"\nNot there: {'; '.join(absent)}")
    return not absent


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: a row per case, the accuracies after for each source: mean, sample standard deviation and count of
    seeds."""
    sources = [name for name in (*SOURCES, "no data") if any(line["source"] == name for line in lines)]
    rows = ["| case | naive | " + " | ".join(sources) + " |", "|---" * (2 + len(sources)) + "|"]
    for case in dict.fromkeys(line["case"] for line in lines):
        own = [line for line in lines if line["case"] == case]
        found = [[line["naive"] for line in own if line["source"] in ("generator", "no data")]]
        found += [[line["after"] for line in own if line["source"] == source] for source in sources]
        cells = [f"{with_deviation(values)} ({len(values)})" if values else "-" for values in found]
        rows.append(f"| {case} | " + " | ".join(cells) + " |")
    seeds = ", ".join(map(str, sorted({line["seed"] for line in lines})))
    about = f"before: {lines[0]['before']:.2f} % of {lines[0]['n']} images; seeds {seeds}: mean ± sample standard "
    return about + "deviation (seeds)\n\n" + "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
