"""Every method at equal training time on the same teacher and student: accuracy, seconds, memory; for docs/results.md.

python benchmarks/methods.py [--seconds 60] [--seeds 0,1,2] [--methods dafl,cmi] [--lanes 2] [base=NAME] [KEY=VALUE ...]

- Methods are recipes/methods/NAME.yaml, or files with --methods path/x.yaml; KEY=VALUE go to all of them. Without
  base=NAME it is digits on a CPU, and ResNet-56 to ResNet-20 on CIFAR-10 where there is a GPU.
- Same teacher: of the zoo one is left, --teacher, for all methods and seeds; NAME:zoo is the method with its whole zoo.
- Equal time: the seconds of an update of generator and student are measured first, then synthesis.steps and
  distill.steps are scaled by one factor such that training takes --seconds. Start-up, training of teachers and
  evaluation do not count. Where one round (synthesis.inner) is too long, it is shortened, and the row says so.
- Memory: the peak of the process, or on a GPU that of its tensors. Every run is a process of its own, --lanes at once.

Goes on where it stopped: each finished run is a line of OUT/figures.jsonl, and OUT/NAME-SEED/ its folder.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env

from dfkd.assemble import load_recipe_zoo, teacher_folder
from dfkd.cli import main as command_line
from dfkd.curves import entries
from dfkd.errors import UserError
from dfkd.phases import plans
from dfkd.recipe import FOLDER, load_recipe
from dfkd.run import build, carry_out
from dfkd.runtime import Shard, make_accelerator, shut_down
from dfkd.schema import Recipe

ON_GPU = {"base": "cifar10_zoo"}  # ResNet-56, the main one of that zoo, and its student ResNet-20
PREFERRED = "residual"  # the teacher that is left where the zoo has no main one
ZOO = ":zoo"
OWN = ("recipe", "output", "seed", "overwrite")  # keys that are not for the command line here
TOLERATED = 0.2  # share by which a run's seconds may miss the budget before its row says so
PROBE = 1 / 12  # share of the budget that a measurement of the seconds per update takes at least
FIRST_PROBE, CHEAPEST = 10, 1e-6  # updates; seconds per update, below which a measurement is noise
LEAST = 0.5  # share of a run's seconds that its updates must have taken
AGAIN = 3  # times that a probe is made
PROBE_ROUNDS = 2  # of a probe at the least
ROUNDED = 0.1  # seconds to which a line rounds those of its training
SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)  # of the training, at which the table against time looks

Keys = dict[str, str]


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


# --- arithmetic ---


def cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def given_keys(arguments: Sequence[str], what: str, own: Collection[str] = OWN) -> Keys:
    """The KEY=VALUE arguments for all runs, which `what` names; raises UserError for others and for keys of `own`."""
    if wrong := [word for word in arguments if "=" not in word or word.partition("=")[0] in own]:
        raise UserError(f"{wrong[0]!r} is not for {what}; give other keys as KEY=VALUE, and --seeds and --out")
    return dict(word.partition("=")[::2] for word in arguments)


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


def fit_cost(trials: Sequence[tuple[Work, float]]) -> Cost:
    """What an update costs, and what all runs have in common, out of runs and their seconds: least squares.

    A machine that was slower during the shorter runs makes updates look free: none costs less than LEAST of what one
    took on average in the run where that was the least.
    """
    rows = torch.tensor([[1.0, work.generator, work.student] for work, _ in trials], dtype=torch.float64)
    seconds = torch.tensor([seconds for _, seconds in trials], dtype=torch.float64)
    found = torch.linalg.lstsq(rows, seconds.unsqueeze(1), driver="gelsd").solution.flatten()
    least = LEAST * (seconds / rows[:, 1:].sum(1)).min() * rows[:, 1:].any(0)
    found[1:] = found[1:].maximum(least)
    run, generator, student = found.clamp_min(CHEAPEST).tolist()
    return Cost(generator, student, run)


# --- in processes of their own; each returns what its last line says ---


def train_teachers(arguments: Sequence[str], seconds: float) -> dict[str, Any]:
    """Train the teachers of a recipe that have no weights, or find them; the folder of each by name."""
    recipe = load_recipe(arguments).recipe
    accelerator, shard = make_accelerator(recipe.runtime.precision)
    load_recipe_zoo(recipe, shard.device, print)
    shut_down(accelerator)
    found = {name: spec for name, spec in recipe.zoo_specs.items() if not spec.weights}
    return {name: str(teacher_folder(recipe, name, spec)) for name, spec in found.items()}


def measure_cost(arguments: Sequence[str], seconds: float) -> dict[str, Any]:
    """Seconds per update of generator and student, from runs that grow until they take `seconds`.

    Each is made AGAIN times and the shortest counts: what else the machine does can only lengthen it.
    """
    recipe = load_recipe(arguments).recipe
    accelerator, shard = make_accelerator(recipe.runtime.precision)
    own = work_of(recipe)
    trials: list[tuple[Work, float]] = []
    for probe in (generator_probe, student_probe) if own.rounds else (student_probe,):
        spend(recipe, probe(own, FIRST_PROBE), accelerator, shard)  # warms up, not counted
        size, took, tried = FIRST_PROBE, 0.0, 0
        while took < seconds or tried < 2:
            took, tried = min(spend(recipe, probe(own, size), accelerator, shard) for _ in range(AGAIN)), tried + 1
            trials.append((probe(own, size), took))
            size = round(size * min(8.0, max(2.0, 1.3 * seconds / took)))
    shut_down(accelerator)
    return {**fit_cost(trials)._asdict(), "trials": trials}


def generator_probe(own: Work, size: int) -> Work:
    """About `size` generator updates, and as few student updates as the method can be run with."""
    inner = min(own.inner, max(2, size // PROBE_ROUNDS)) if own.inner > 1 else 1
    return Work(max(1, size // inner), inner, min(1, own.per), min(1, own.frozen))


def student_probe(own: Work, size: int) -> Work:
    """`size` student updates, and as few generator updates as the method can be run with."""
    return Work(min(1, own.rounds), min(2, own.inner), min(1, own.per), size)


def spend(recipe: Recipe, work: Work, accelerator: Accelerator, shard: Shard) -> float:
    """Seconds of training of a recipe with this much work, in a folder that is removed again."""
    synthesis = replace(recipe.synthesis, steps=work.rounds, inner=work.inner, student_steps=work.per)
    synthesis = replace(synthesis, warmup=0.0, fade=0.0)  # in so few rounds its ramps are too coarse
    with tempfile.TemporaryDirectory() as folder:
        distill = replace(recipe.distill, steps=work.frozen)
        runtime = replace(recipe.runtime, evaluations=0)  # measuring the student does not count
        probed = replace(recipe, synthesis=synthesis, distill=distill, runtime=runtime, output=folder)
        parts = build(probed, accelerator, shard)
        spent: dict[str, float] = {}
        carry_out(parts, plans(parts.recipe), spent)
    return sum(spent.values())


def train(arguments: Sequence[str], seconds: float) -> dict[str, Any]:
    """A run as from the command line; its peak memory."""
    if code := command_line(arguments):
        sys.exit(code)
    used = resource.getrusage(resource.RUSAGE_SELF)
    figures = {"cpu_seconds": used.ru_utime + used.ru_stime}  # less than the clock's where others had the cores
    if torch.cuda.is_initialized():
        return {**figures, "peak_mb": torch.cuda.max_memory_allocated() / 1e6, "memory": "tensors on the GPU"}
    return {**figures, "peak_mb": peak_resident() / 1e6, "memory": "process"}


def peak_resident() -> float:
    """The most memory, in bytes, that this process has had resident."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss may be that of the process which started this one
        return 1024 * int(status.read_text().partition("VmHWM:")[2].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


CHILDREN: dict[str, Callable[[Sequence[str], float], dict[str, Any]]] = {
    "teachers": train_teachers,
    "cost": measure_cost,
    "run": train,
}


def launch(child: str, keys: Keys, seconds: float, log: Path, threads: int) -> dict[str, Any]:
    """One of CHILDREN in a process of its own. Raises UserError with the last thing it said, where it fails."""
    command = [sys.executable, __file__, "--child", child, "--seconds", str(seconds), *written(keys)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(done.stdout + done.stderr)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise UserError(f"{log} ends in: {said[-1] if said else f'exit code {done.returncode}'}")
    return json.loads(done.stdout.splitlines()[-1])


def written(keys: Keys) -> list[str]:
    """Keys as arguments of the command line."""
    return [f"{key}={value}" for key, value in keys.items()]


# --- methods ---


def default_methods() -> list[str]:
    """Every method of recipes/methods, and those that mix teachers once more with their zoo."""
    names = sorted(path.stem for path in (FOLDER / "methods").glob("*.yaml"))
    return names + [name + ZOO for name in names if name in ("dfkd", "mixmix")]


def make_method(name: str, given: Keys, teacher: str | None) -> Method:
    """A method by the name of its recipe or by its file, with one teacher, or with the zoo that NAME:zoo leaves."""
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
        raise UserError(f"--teacher {left} is no enabled teacher of {label}; choose from {', '.join(names)}")
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
        if method.recipe.data.dataset == "none":
            raise UserError("data.dataset is none: nothing to judge the student on")


def with_teachers(methods: Sequence[Method], out: Path, threads: int) -> list[Method]:
    """The methods with the folders of the teachers trained here, so that all seeds have the same."""
    zoos = {tuple(method.recipe.zoo_specs): method.keys for method in reversed(methods)}
    weights: Keys = {}
    for names, keys in zoos.items():
        found = launch("teachers", keys, 0, out / "logs" / f"teachers-{'-'.join(names)}.txt", threads)
        weights |= {f"teachers.{name}.weights": folder for name, folder in found.items()}
    mine = [[key for key in weights if key.split(".")[1] in method.recipe.zoo_specs] for method in methods]
    return [method._replace(keys={**method.keys, **{k: weights[k] for k in own}}) for method, own in zip(methods, mine)]


# --- figures ---


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


def with_deviation(values: Sequence[float], sign: str = "") -> str:
    """Mean and, of several, sample standard deviation."""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{sign}.2f}{deviation}"


def cells(lines: Sequence[Mapping[str, Any]], budget: float) -> list[str]:
    """The cells of a method out of its lines, one per seed."""
    accuracy = [line["accuracy"] for line in lines]
    seconds = statistics.fmean(line["seconds"] for line in lines)
    updates = [statistics.fmean(line[f"{who}_updates"] for line in lines) for who in ("generator", "student")]
    agreements = [statistics.fmean(line["class_agreement"].values()) for line in lines if line["class_agreement"]]
    off = [f"{line['seconds']:.1f}" for line in lines if abs(line["seconds"] / budget - 1) > TOLERATED]
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
        f"{settings['seconds']:g} s of training each, {settings['lanes']} at once with {settings['threads']} thread(s) "
        f"each; {first['device']}, {first['precision']}, torch {first['versions']['torch']}; "
        f"student {first['student']}; {first['n']} test images; seeds {', '.join(map(str, seeds))}: "
        f"mean ± sample standard deviation (seeds); peak memory: {first['memory']}"
    )


# --- the whole ---


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file that may not exist yet."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def add(path: Path, line: Mapping[str, Any]) -> None:
    """Write one more line."""
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def keep_settings(path: Path, settings: dict[str, Any]) -> None:
    """Write down what all rows have in common. Raises UserError where the folder holds rows of another kind."""
    before = json.loads(path.read_text()) if path.exists() else settings
    changed = [key for key, value in settings.items() if before.get(key) != value]
    if changed:
        words = "; ".join(f"{key}: {before.get(key)} there, {settings[key]} here" for key in changed)
        raise UserError(f"{path.parent} holds figures of other settings ({words}); choose another --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings) + "\n")


def finished(futures: Mapping[Future[dict[str, Any]], str]) -> Iterator[tuple[Future[dict[str, Any]], dict[str, Any]]]:
    """What processes come to, as they end; one that fails is reported and left out."""
    for future in as_completed(futures):
        try:
            yield future, future.result()
        except UserError as error:
            print(f"{futures[future]} failed: {error}", flush=True)


def compare(methods: Sequence[Method], seeds: Sequence[int], out: Path, settings: Mapping[str, Any]) -> bool:
    """Run what is missing in OUT/figures.jsonl; whether all is there then."""
    path = out / "figures.jsonl"
    done = {(line["method"], line["seed"]) for line in read(path)}
    missing = [(method, seed) for seed in seeds for method in methods if (method.name, seed) not in done]
    if missing:
        ready = {method.name: method for method in with_teachers(methods, out, settings["threads"] * settings["lanes"])}
        with ThreadPoolExecutor(settings["lanes"]) as lanes:
            costs = price([ready[name] for name in {method.name: 0 for method, _ in missing}], out, settings, lanes)
            runs = [(ready[method.name], seed) for method, seed in missing if method.name in costs]
            for line in carry_through(runs, costs, out, settings, lanes):
                add(path, line)
                done.add((line["method"], line["seed"]))
                print(f"{line['method']} {line['seed']}: {line['accuracy']:.2f} %, {line['seconds']:.1f} s", flush=True)
    return all((method.name, seed) in done for method in methods for seed in seeds)


def price(
    methods: Sequence[Method], out: Path, settings: Mapping[str, Any], lanes: ThreadPoolExecutor
) -> dict[str, Cost]:
    """The cost of each method, out of OUT/costs.jsonl or measured."""
    path = out / "costs.jsonl"
    costs = {line["method"]: Cost(line["generator"], line["student"], line["run"]) for line in read(path)}
    probes: dict[Future[dict[str, Any]], str] = {}
    for method in methods:
        name = method.priced or method.name
        if name not in costs and name not in probes.values():
            log, seconds = out / "logs" / f"{method.folder}-cost.txt", settings["seconds"] * PROBE
            probes[lanes.submit(launch, "cost", method.keys, seconds, log, settings["threads"])] = name
    for future, measured in finished(probes):
        cost = Cost(measured["generator"], measured["student"], measured["run"])
        add(path, {"method": probes[future], **measured})
        costs[probes[future]] = cost
        words = f"{1000 * cost.generator:.2f} ms a generator update, {1000 * cost.student:.2f} ms a student update"
        print(f"{probes[future]}: {words}", flush=True)
    names = {method.name: method.priced or method.name for method in methods}
    return {name: costs[priced] for name, priced in names.items() if priced in costs}


def carry_through(
    runs: Sequence[tuple[Method, int]],
    costs: Mapping[str, Cost],
    out: Path,
    settings: Mapping[str, Any],
    lanes: ThreadPoolExecutor,
) -> Iterator[dict[str, Any]]:
    """Run methods with seeds; the line of each as it ends."""
    begun: dict[Future[dict[str, Any]], Callable[[dict[str, Any]], dict[str, Any]]] = {}
    names = {}
    for method, seed in runs:
        own, name = work_of(method.recipe), f"{method.folder}-{seed}"
        work, note = scale(own, costs[method.name], settings["seconds"])
        keys = {**method.keys, **changes(own, work), "seed": str(seed), "output": str(out / name)}
        future = lanes.submit(launch, "run", keys, 0, out / "logs" / f"{name}.txt", settings["threads"])
        begun[future], names[future] = partial(figures, method, seed, work, note, out / name), name
    for future, memory in finished(names):
        yield begun[future](memory)


def main(given: Sequence[str] | None = None) -> int:
    """Measure what is missing and print the table; the exit code: 1 where a run failed, 2 for a wrong argument."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/methods"))
    parser.add_argument("--methods", default=",".join(default_methods()), help="names or files, with commas between")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--seconds", type=float, default=60.0, help="of training")
    parser.add_argument("--lanes", type=int, default=1, help="runs at once, each with its share of the cores")
    parser.add_argument("--teacher", help="the one that is left; otherwise zoo.main, or residual, or the first")
    parser.add_argument("--child", choices=sorted(CHILDREN), help=argparse.SUPPRESS)
    options, arguments = parser.parse_known_args(given)
    if options.child:
        print(json.dumps(CHILDREN[options.child](arguments, options.seconds)))
        return 0
    try:
        return 0 if tabulate(options, arguments) else 1
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def tabulate(options: argparse.Namespace, arguments: Sequence[str]) -> bool:
    """All that main does for its options and the KEY=VALUE arguments; whether no run is missing."""
    keys = given_keys(arguments, "all methods")
    if torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU"):
        keys = {**ON_GPU, **keys}
    names = [name for name in options.methods.split(",") if name]
    if not names:
        raise UserError(f"no method in {FOLDER / 'methods'}; give --methods path/x.yaml")
    threads = max(1, cores() // options.lanes)
    settings = {"seconds": options.seconds, "lanes": options.lanes, "threads": threads, "keys": keys}
    methods = [make_method(name, keys, options.teacher) for name in names]
    check_alike(methods)
    keep_settings(options.out / "settings.json", {**settings, "teacher": options.teacher})
    complete = compare(methods, [int(seed) for seed in options.seeds.split(",")], options.out, settings)
    if lines := read(options.out / "figures.jsonl"):
        print(f"\n{describe(lines, settings)}\n\n{table(lines, options.seconds)}\n\n{against_time(lines)}")
    return complete


if __name__ == "__main__":
    sys.exit(main())
