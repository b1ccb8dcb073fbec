"""The pairs people judge the field by, in pieces that each end in time; for docs/results.md.

python benchmarks/pairs.py PAIR [--minutes 9] [--budget 20] [--seeds 0,1,2] [--out runs/pairs] [KEY=VALUE ...]

- PAIR is one of PAIRS. KEY=VALUE go to its recipe: `data.dataset=imagefolder data.root=TEST data.train_root=TRAIN` for
  images in folders, `teachers.NAME.weights=PATH` for a teacher that is there already.
- A call stops itself after --minutes, with a whole checkpoint; the same call goes on there, until it exits with 0.
- First the teachers are trained (their time does not count), then the seconds of an update are measured on this device,
  then each seed trains for --budget minutes: what the recipe asks for, longer or shorter.
- The student is its last weights. `last quarter`: mean, deviation and lowest over the evaluations there of its
  training, on up to 2,000 test images: a collapse shows.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bookkeeping import (
    Keys,
    add,
    asked,
    exit_code,
    given_keys,
    keep_recipes,
    keep_settings,
    machine,
    measured_on,
    numbers,
    positive,
    trained_keys,
    with_deviation,
    written,
)
from equal_time import Method, changes, figures, piece, price, scale, work_of

from dfkd.curves import whole_lines
from dfkd.errors import Paused, UserError
from dfkd.recipe import load_recipe
from dfkd.runtime import Deadline, cores, make_accelerator, say, shut_down
from dfkd.zoo import load_recipe_zoo

PAIRS = {  # in the order to run them
    "resnet56_resnet20": "cifar10_zoo",
    "vgg11_vgg11": "cifar10_vgg11",
    "resnet34_resnet18": "cifar10_resnet34_resnet18",
    "wrn_40_2_wrn_16_1": "cifar10_wrn_40_2_wrn_16_1",
    "vgg11_resnet18": "cifar10_vgg11_resnet18",
}
PRICED_WITH = 96.0  # seconds of training, as which the probes of an update's cost are sized at the most
PRICED_SHARE = 0.1  # of a seed's budget: in a short lease the probes must not take what they are to divide
MEASURING, LEFT = 2.0, 0.5  # minutes, below which no measurement and no run is begun


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a row per pair, over its seeds."""
    rows = [
        "| pair | teacher % | student % (seeds) | points lost | last quarter (lowest) | minutes | images/s | MB | n "
        "| note |",
        "|---" * 10 + "|",
    ]
    for name in dict.fromkeys(line["method"] for line in lines):
        own = [line for line in lines if line["method"] == name]
        lost = [line["teacher"] - line["accuracy"] for line in own]
        quarters = [line["last_quarter"] for line in own if line["last_quarter"] is not None]
        lowest = min((quarter["lowest"] for quarter in quarters), default=0.0)
        within = [quarter["deviation"] for quarter in quarters if quarter["deviation"] is not None]
        deviation = f" ± {statistics.fmean(within):.2f}" if within else ""
        cells = [
            f"{own[0]['teacher']:.2f}",
            f"{with_deviation([line['accuracy'] for line in own])} ({len(own)})",
            with_deviation(lost),
            f"{statistics.fmean(quarter['mean'] for quarter in quarters):.2f}{deviation} ({lowest:.2f})"
            if quarters
            else "-",
            f"{statistics.fmean(line['seconds'] for line in own) / 60:.1f}",
            f"{statistics.fmean(line['images_per_second'] for line in own):,.0f}",
            f"{max(line['peak_mb'] for line in own):,.0f}",
            f"{own[0]['n']:,}",
            "; ".join(dict.fromkeys(line["note"] for line in own if line["note"])),
        ]
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main(given: Sequence[str] | None = None) -> int:
    """Go on with a pair; the exit code: 0 once it is finished, 1 where the same call has to go on, 2 for a mistake."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pair", choices=PAIRS)
    parser.add_argument("--out", type=Path, default=Path("runs/pairs"))
    parser.add_argument("--seeds", type=numbers, default="0,1,2")
    parser.add_argument("--minutes", type=float, default=0.0, help="of this call; 0: as long as it takes")
    parser.add_argument("--budget", type=positive, default=20.0, help="minutes of training per seed")
    options, arguments = parser.parse_known_args(given)
    return exit_code(lambda: finish(options, arguments))


def finish(options: argparse.Namespace, arguments: Sequence[str]) -> bool:
    """Do what there is time for, and once all is done print the table; whether it is."""
    try:
        go_on(options, arguments, Deadline(options.minutes))
    except Paused as paused:
        print(f"stopped after {options.minutes:g} minutes: {paused}; the same call goes on")
        return False
    lines = asked(whole_lines(options.out / "figures.jsonl"), list(PAIRS), options.seeds)
    seeds = ", ".join(map(str, options.seeds))
    print(f"\n{measured_on(lines)}; seeds {seeds}: mean ± sample standard deviation (seeds)\n\n{table(lines)}")
    return True


def go_on(options: argparse.Namespace, arguments: Sequence[str], deadline: Deadline) -> None:
    """Do what is left of a pair; raises Paused where the deadline comes first."""
    keys: Keys = {"recipe": PAIRS[options.pair], **given_keys(arguments, "all seeds")}
    folder = options.out / options.pair
    settings = {"budget": options.budget, "keys": keys, "machine": machine()}
    keep_settings(folder / "settings.json", settings)
    keys |= trained(keys, deadline)
    method = Method(options.pair, options.pair, keys, load_recipe(written(keys)).recipe)
    keep_recipes(folder, {method.name: method.recipe})  # where the costs are, which come before any figure
    threads = cores()
    if deadline.left() < min(MEASURING, options.minutes / 2) and not (folder / "costs.jsonl").exists():
        raise Paused("the cost of an update is to be measured next")
    with ThreadPoolExecutor(1) as lane:
        seconds = min(PRICED_WITH, PRICED_SHARE * 60 * options.budget)
        costs = price([method], folder, {"seconds": seconds, "threads": threads}, lane)
    if method.name not in costs:
        raise UserError(f"the cost of an update of {method.name} could not be measured; see {folder}/logs")
    work, note = scale(work_of(method.recipe), costs[method.name], 60 * options.budget)
    for seed in options.seeds:
        done = {(line["method"], line["seed"]) for line in whole_lines(options.out / "figures.jsonl")}
        if (method.name, seed) in done:
            continue
        if deadline.left() < min(LEFT, options.minutes / 2):
            raise Paused(f"seed {seed} is next")
        run = folder / str(seed)
        own = {**keys, **changes(work_of(method.recipe), work), "seed": str(seed), "output": str(run)}
        own |= {"runtime.minutes": f"{deadline.left():.3f}"} if options.minutes else {}
        begun = time.perf_counter()
        memory = piece(own, folder / "logs" / f"{seed}.txt", threads)
        print(f"seed {seed}: {(time.perf_counter() - begun) / 60:.1f} minutes", flush=True)
        if not (run / "results.json").exists():
            raise Paused(f"seed {seed} is not finished")
        line = figures(method, seed, work, note, run, memory)
        teachers, main = line["teachers"], method.recipe.zoo.main
        images = work.generator * method.recipe.synthesis.batch_size + work.student * method.recipe.distill.batch_size
        line |= {
            "teacher": teachers[main] if main else max(teachers.values()),
            "images_per_second": images / line["seconds"],
        }
        add(options.out / "figures.jsonl", line)


def trained(keys: Keys, deadline: Deadline) -> Keys:
    """Train the teachers that have no weights; the keys of what they left."""
    recipe = load_recipe(written(keys)).recipe
    accelerator, shard = make_accelerator(recipe.runtime.precision)
    try:
        load_recipe_zoo(recipe, shard.device, say, deadline=deadline)
    finally:
        shut_down(accelerator)
    return trained_keys(recipe)


if __name__ == "__main__":
    sys.exit(main())
