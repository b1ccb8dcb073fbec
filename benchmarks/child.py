"""What equal_time.py runs in processes of its own: each prints what it came to as its last line, as JSON."""

import json
import resource
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from bookkeeping import Keys, trained_keys
from equal_time import CHEAPEST, Cost, Work, work_of

from dfkd.cli import main as command_line
from dfkd.phases import plans
from dfkd.recipe import load_recipe
from dfkd.run import build, carry_out
from dfkd.runtime import Shard, make_accelerator, shut_down
from dfkd.schema import Recipe
from dfkd.zoo import load_recipe_zoo

FIRST_PROBE = 10  # updates
LEAST = 0.5  # share of a run's seconds, beyond what all have in common, that its updates must have taken
AGAIN = 3  # times that a probe is made
PROBE_ROUNDS = 2  # of a probe at the least


def train_teachers(arguments: Sequence[str], seconds: float) -> Keys:
    """Train the teachers of a recipe that have no weights, or find them; their keys."""
    recipe = load_recipe(arguments).recipe
    accelerator, shard = make_accelerator(recipe.runtime.precision)
    load_recipe_zoo(recipe, shard.device, print)
    shut_down(accelerator)
    return trained_keys(recipe)


def measure_cost(arguments: Sequence[str], seconds: float) -> dict[str, Any]:
    """Seconds per update of generator and student, from runs that grow until their updates take `seconds`.

    Each is made AGAIN times and the shortest counts: what else the machine does can only lengthen it.
    """
    recipe = load_recipe(arguments).recipe
    accelerator, shard = make_accelerator(recipe.runtime.precision)
    own = work_of(recipe)
    trials: list[tuple[Work, float]] = []
    for probe in (generator_probe, student_probe) if own.rounds else (student_probe,):
        spend(recipe, probe(own, FIRST_PROBE), accelerator, shard)  # warms up, not counted

        def timed(size: int, probe: Callable[[Work, int], Work] = probe) -> float:
            return min(spend(recipe, probe(own, size), accelerator, shard) for _ in range(AGAIN))

        trials += [(probe(own, size), took) for size, took in grown(timed, seconds)]
    shut_down(accelerator)
    return {**fit_cost(trials)._asdict(), "trials": trials}


def grown(timed: Callable[[int], float], seconds: float) -> list[tuple[int, float]]:
    """Sizes of runs, and what they took: until one takes `seconds` longer than the first. That one's are for the most
    part what all runs have in common: CUDA graphs are recorded, a checkpoint is written."""
    runs = [(FIRST_PROBE, timed(FIRST_PROBE))]
    while len(runs) < 2 or runs[-1][1] - runs[0][1] < seconds:
        size, took = runs[-1]
        more = took - runs[0][1]
        each = more / (size - FIRST_PROBE) if more > 0 else took / size
        size = round(min(8 * size, max(2 * size, FIRST_PROBE + 1.3 * seconds / each)))
        runs.append((size, timed(size)))
    return runs


def fit_cost(trials: Sequence[tuple[Work, float]]) -> Cost:
    """What an update costs, and what all runs have in common, out of runs and their seconds: least squares.

    A machine that was slower during the shorter runs makes updates look free: none costs less than LEAST of what one
    took on average in the run where that was the least, without what all runs have in common unless that cannot be.
    """
    rows = torch.tensor([[1.0, work.generator, work.student] for work, _ in trials], dtype=torch.float64)
    seconds = torch.tensor([seconds for _, seconds in trials], dtype=torch.float64)
    found = torch.linalg.lstsq(rows, seconds.unsqueeze(1), driver="gelsd").solution.flatten()
    used = rows[:, 1:].any(0)
    common = found[0].clamp_min(0) if (found[1:] > 0)[used].all() else 0.0
    least = LEAST * ((seconds - common).clamp_min(0) / rows[:, 1:].sum(1)).min() * used
    found[1:] = found[1:].maximum(least)
    run, generator, student = found.clamp_min(CHEAPEST).tolist()
    return Cost(generator, student, run)


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
    # In so few rounds its ramps are too coarse: what has them is priced a little high.
    synthesis = replace(synthesis, warmup=0.0, fade=0.0)
    with tempfile.TemporaryDirectory() as folder:
        distill = replace(recipe.distill, steps=work.frozen)
        runtime = replace(recipe.runtime, evaluations=0)  # measuring the student does not count
        probed = replace(recipe, synthesis=synthesis, distill=distill, runtime=runtime, output=folder)
        parts = build(probed, accelerator, shard)
        spent: dict[str, float] = {}
        carry_out(parts, plans(parts.recipe), spent)
    return sum(spent.values())


def train(arguments: Sequence[str], seconds: float) -> dict[str, Any]:
    """A run as from the command line, or what is left of it; the seconds and the peak memory of this process."""
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


if __name__ == "__main__":
    name, seconds, *arguments = sys.argv[1:]
    print(json.dumps(CHILDREN[name](arguments, float(seconds))))
