"""Runs of equal training time, each a process of its own, that go on where they stopped; for methods.py, ablate.py and
pairs.py.

The seconds of an update of generator and student are measured first (OUT/costs.jsonl); then synthesis.steps and
distill.steps are scaled by one factor such that training takes what it may; with --updates neither. Each finished run
is a line of OUT/figures.jsonl, and OUT/NAME-SEED/ its folder.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from subprocess import PIPE
from typing import Any, NamedTuple

from bookkeeping import ENDING, Keys, add, keep_recipes, machine, positive, written

from dfkd.curves import entries, whole_lines
from dfkd.errors import UserError
from dfkd.phases import plans
from dfkd.runtime import cores
from dfkd.schema import Recipe

CHILD = Path(__file__).parent / "child.py"
CHEAPEST = 1e-6  # seconds per update, below which a measurement is noise
PROBE = 1 / 12  # share of the budget that a measurement of the seconds per update takes at least


class Work(NamedTuple):
    """The updates of a run: `rounds` of `inner` generator updates and `per` student updates, then `frozen` student
    updates."""

    rounds: int
    inner: int
    per: int
    frozen: int

    @property
    def generator(self) -> int:
        """Generator updates in all."""
        return self.rounds * self.inner

    @property
    def student(self) -> int:
        """Student updates in all."""
        return self.rounds * self.per + self.frozen


class Cost(NamedTuple):
    """Seconds per update, and per run whatever its length."""

    generator: float
    student: float
    run: float = 0.0

    def of(self, work: Work) -> float:
        """Seconds of the updates of a run."""
        return work.generator * self.generator + work.student * self.student


class Method(NamedTuple):
    """A row of the table: how it is called, the name of its folders, what it is run with and what that comes to; and
    the name of the method whose updates cost what its own do, where there is one."""

    name: str
    folder: str
    keys: Keys
    recipe: Recipe
    priced: str = ""


def work_of(recipe: Recipe) -> Work:
    """The updates that a recipe asks for."""
    phases = plans(recipe)
    per = next((plan.per for plan in phases if plan.synthesis), recipe.synthesis.student_steps)
    rounds, frozen = sum(plan.synthesis for plan in phases), sum(plan.frozen for plan in phases)
    return Work(rounds, recipe.synthesis.inner, per, frozen)


def changes(before: Work, after: Work) -> Keys:
    """The keys that make one into the other."""
    names = ("synthesis.steps", "synthesis.inner", "synthesis.student_steps", "distill.steps")
    return {name: str(new) for name, old, new in zip(names, before, after) if new != old}


def scale(work: Work, cost: Cost, budget: float) -> tuple[Work, str]:
    """The same work, longer or shorter, such that it takes `budget` seconds; and in words what had to give.

    Rounds and the student updates after them keep their proportion, but for what rounding to whole rounds leaves or
    takes, which goes to the student updates after all rounds where there are any.
    """
    note, budget = "", max(budget - cost.run, budget / 2)
    rounds = work.rounds * budget / max(cost.of(work), CHEAPEST)
    scaled = work._replace(rounds=max(min(1, work.rounds), int(rounds) if work.frozen else round(rounds)))
    if work.inner > 1 and 0 < rounds < 1:
        scaled = Work(1, max(2, int(work.inner * rounds)), round(work.per * rounds), 0)
        shortened = {"inner": (work.inner, scaled.inner), "student_steps": (work.per, scaled.per)}
        note = ", ".join(f"{name} {old} → {new}" for name, (old, new) in shortened.items() if old != new)
    left = budget - cost.of(scaled._replace(frozen=0))
    frozen = max(1, round(left / max(cost.student, CHEAPEST))) if work.frozen else 0
    return scaled._replace(frozen=frozen), note


def launch(child: str, keys: Keys, seconds: float, log: Path, threads: int) -> dict[str, Any]:
    """One of child.py's CHILDREN in a process of its own. Raises UserError with its last words where it fails."""
    command = [sys.executable, str(CHILD), child, str(seconds), *written(keys)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    if ENDING.is_set():
        raise UserError(f"{log}: not begun, since SIGTERM came")
    # Not subprocess.run, which kills the process where SIGTERM comes: this waits for its checkpoint.
    with subprocess.Popen(command, stdout=PIPE, stderr=PIPE, text=True, env=environment) as process:
        out, errors = process.communicate()
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(out + errors)
    if process.returncode:
        said = (errors or out).strip().splitlines()
        raise UserError(f"{log} ends in: {said[-1] if said else f'exit code {process.returncode}'}")
    return json.loads(out.splitlines()[-1])


def piece(keys: Keys, log: Path, threads: int) -> dict[str, Any]:
    """Begin a run or go on with it: what its pieces that ended by themselves took, and the most memory of any."""
    path = log.with_suffix(".jsonl")
    figures = launch("run", keys, 0, log, threads)
    path.parent.mkdir(parents=True, exist_ok=True)
    add(path, figures)
    pieces = whole_lines(path)
    seconds, memory = sum(one["cpu_seconds"] for one in pieces), max(one["peak_mb"] for one in pieces)
    return {**figures, "cpu_seconds": seconds, "peak_mb": memory}


def with_teachers(methods: Sequence[Method], out: Path, threads: int) -> list[Method]:
    """The methods with the folders of the teachers trained here, so that all seeds have the same."""
    zoos = {tuple(method.recipe.zoo_specs): method.keys for method in reversed(methods)}
    weights: Keys = {}
    for names, keys in zoos.items():
        weights |= launch("teachers", keys, 0, out / "logs" / f"teachers-{'-'.join(names)}.txt", threads)
    mine = [[key for key in weights if key.split(".")[1] in method.recipe.zoo_specs] for method in methods]
    return [method._replace(keys={**method.keys, **{k: weights[k] for k in own}}) for method, own in zip(methods, mine)]


def figures(
    method: Method, seed: int, work: Work, note: str, folder: Path, memory: Mapping[str, Any]
) -> dict[str, Any]:
    """The line of a finished run."""
    results = json.loads((folder / "results.json").read_text())
    student = results["student"]
    return {
        "method": method.name,
        "seed": seed,
        "accuracy": student["accuracy"],
        "n": student["n"],
        "agreement": student["agreement"]["percent"],
        "class_agreement": results["generator"]["class_agreement"],
        "feature_ratio": results["diversity"].get("feature_ratio"),
        "last_quarter": student["last_quarter"],
        "curve": curve(
            folder, sum(results["seconds"][plan.name] for plan in plans(method.recipe) if plan.name != "distill")
        ),
        "teachers": {name: teacher["accuracy"] for name, teacher in results["teachers"].items()},
        "student": student["model"],
        "seconds": sum(results["seconds"][plan.name] for plan in plans(method.recipe)),
        "seconds_total": results["seconds"]["total"],
        "generator_updates": work.generator,
        "student_updates": work.student,
        **memory,
        "note": note,
        "device": results["device"],
        "precision": results["precision"],
        "versions": results["versions"],
    }


def curve(folder: Path, before: float) -> list[tuple[float, float]]:
    """Seconds of training (`before` the student's began, and since) and accuracy of the student then, over a run."""
    found = [entry for entry in entries(folder / "metrics.jsonl") if entry["phase"] == "evaluation"]
    return [(before + entry["trained"], entry["accuracy"]) for entry in found]


def finished(futures: Mapping[Future[dict[str, Any]], str]) -> Iterator[tuple[Future[dict[str, Any]], dict[str, Any]]]:
    """What processes come to, as they end; one that fails is reported and left out."""
    for future in as_completed(futures):
        try:
            yield future, future.result()
        except UserError as error:
            print(f"{futures[future]} failed: {error}", flush=True)


def check_judged(methods: Sequence[Method]) -> None:
    """Raise UserError where a method trains no student, or there are no images to measure it on."""
    for method in methods:
        if "distill" not in method.recipe.tasks or method.recipe.data.dataset == "none":
            raise UserError(
                f"{method.name} has no task distill, or data.dataset is none: nothing to judge the student on"
            )


def compare(methods: Sequence[Method], seeds: Sequence[int], out: Path, settings: Mapping[str, Any]) -> bool:
    """Run what is missing in OUT/figures.jsonl; whether all is there then."""
    path = out / "figures.jsonl"
    keep_recipes(out, {method.name: method.recipe for method in methods})
    done = {(line["method"], line["seed"]) for line in whole_lines(path)}
    missing = [(method, seed) for seed in seeds for method in methods if (method.name, seed) not in done]
    if missing:
        ready = {method.name: method for method in with_teachers(methods, out, settings["threads"] * settings["lanes"])}
        lanes = ThreadPoolExecutor(settings["lanes"])
        try:
            wanted = [ready[name] for name in {method.name: 0 for method, _ in missing}]
            costs: Mapping[str, Cost | None] = (
                price(wanted, out, settings, lanes) if settings["seconds"] else dict.fromkeys(ready)
            )
            runs = [(ready[method.name], seed) for method, seed in missing if method.name in costs]
            for line in carry_through(runs, costs, out, settings, lanes):
                add(path, line)
                done.add((line["method"], line["seed"]))
                print(f"{line['method']} {line['seed']}: {line['accuracy']:.2f} %, {line['seconds']:.1f} s", flush=True)
        finally:
            lanes.shutdown(cancel_futures=True)  # with Ctrl-C the processes end, and what is queued must not begin
    return all((method.name, seed) in done for method in methods for seed in seeds)


def price(
    methods: Sequence[Method], out: Path, settings: Mapping[str, Any], lanes: ThreadPoolExecutor
) -> dict[str, Cost]:
    """The cost of each method, out of OUT/costs.jsonl or measured."""
    path = out / "costs.jsonl"
    costs = {line["method"]: Cost(line["generator"], line["student"], line["run"]) for line in whole_lines(path)}
    probes: dict[Future[dict[str, Any]], str] = {}
    for method in methods:
        name = method.priced or method.name
        if name not in costs and name not in probes.values():
            log, seconds = out / "logs" / f"{method.folder}-cost.txt", settings["seconds"] * PROBE
            probes[lanes.submit(launch, "cost", method.keys, seconds, log, settings["threads"])] = name
    if probes:
        print(f"measuring the updates of {', '.join(probes.values())}; logs are in {out / 'logs'}", flush=True)
    for future, measured in finished(probes):
        cost = Cost(measured["generator"], measured["student"], measured["run"])
        add(path, {"method": probes[future], **measured})
        costs[probes[future]] = cost
        words = f"{1000 * cost.generator:.2f} ms a generator update, {1000 * cost.student:.2f} ms a student update"
        print(f"{probes[future]}: {words}", flush=True)
    names = {method.name: method.priced or method.name for method in methods}
    return {name: costs[priced] for name, priced in names.items() if priced in costs}


def add_length(parser: argparse.ArgumentParser, seconds: float) -> None:
    """Give a benchmark the options of how long its runs train; with --updates `seconds` is 0."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--seconds", type=positive, default=seconds, help="of training")
    group.add_argument(
        "--updates", dest="seconds", action="store_const", const=0.0, help="as the recipes say, not equal"
    )


def settings_of(options: argparse.Namespace, keys: Keys) -> dict[str, Any]:
    """What all rows of a table have in common: equal time is that of one machine, the recipes' own updates are alike on
    all."""
    return {
        "seconds": options.seconds,
        "lanes": options.lanes,
        "threads": max(1, cores() // options.lanes),
        "keys": keys,
        "machine": machine() if options.seconds else "any",
    }


def length(settings: Mapping[str, Any]) -> str:
    """How long the runs train, in words."""
    return f"{settings['seconds']:g} s of training" if settings["seconds"] else "the recipes' own updates"


def carry_through(
    runs: Sequence[tuple[Method, int]],
    costs: Mapping[str, Cost | None],
    out: Path,
    settings: Mapping[str, Any],
    lanes: ThreadPoolExecutor,
) -> Iterator[dict[str, Any]]:
    """Run methods with seeds; the line of each as it ends."""
    begun: dict[Future[dict[str, Any]], Callable[[dict[str, Any]], dict[str, Any]]] = {}
    names = {}
    for method, seed in runs:
        own, name = work_of(method.recipe), f"{method.folder}-{seed}"
        cost = costs[method.name]
        work, note = (own, "") if cost is None else scale(own, cost, settings["seconds"])
        keys = {**method.keys, **changes(own, work), "seed": str(seed), "output": str(out / name)}
        future = lanes.submit(piece, keys, out / "logs" / f"{name}.txt", settings["threads"])
        begun[future], names[future] = partial(figures, method, seed, work, note, out / name), name
    print(f"{len(runs)} runs of {length(settings)} each; logs are in {out / 'logs'}", flush=True)
    for future, memory in finished(names):
        yield begun[future](memory)
