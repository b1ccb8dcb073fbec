"""Images per second of a generator step, of a student step and of the stream, between the bare floor and a naive form.

    python benchmarks/step.py --case wrn --repeats 15 [--where] [--compile] [--triton] [--eager] [--burst 1]

What is compared stands in contenders.py. The three take turns, so that a ratio compares neighbours in time. On a GPU a
turn is a burst of steps, as in a run, where the host draws for the next step while the GPU works on this one; with
--burst 1 every step is timed from an empty queue to an empty queue, so that the host counts in full. With --compile
ours is as runtime.compile=true has it, once it is compiled, with --triton on a GPU as runtime.triton=true has it; with
--eager nothing is recorded as CUDA graphs. --where profiles ours and the floor afterwards, and says in which operators
what is beyond the floor goes.
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median, quantiles

import torch
from contenders import CASES, Case, Contender, Floor, Naive, Ours
from torch.profiler import ProfilerActivity, profile

from dfkd.norms import check_triton, triton_norms
from dfkd.runtime import compiled, make_accelerator, resolve_precision

WARMUP = 3  # rounds before the clock starts
SHOWN = 10  # operators that --where names
STUDENT_STEPS = 5  # per generator step in the combined row; the default recipe has 4
BURST = 10  # steps of a turn on a GPU
KINDS = ("generator", "student", "stream")

Seconds = dict[str, list[float]]  # contender -> seconds of each repetition


def seconds_of(call: Callable[[int], object], step: int, device: torch.device, burst: int = 1) -> float:
    """Wall-clock time per call of a burst of calls, the step-th; the device's queue is empty before and after it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for k in range(burst):
        call(step * burst + k)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / burst


def measure(
    contenders: Mapping[str, Contender], repeats: int, device: torch.device, burst: int = 1
) -> dict[str, Seconds]:
    """Seconds per kind of step; contenders take turns of `burst` steps, and another one begins at every repetition."""
    names = list(contenders)
    seconds: dict[str, Seconds] = {kind: {name: [] for name in names} for kind in KINDS}
    for step in range(WARMUP + repeats):
        first = step % len(names)
        for name in names[first:] + names[:first]:
            contender = contenders[name]
            for kind in KINDS:
                taken = seconds_of(getattr(contender, f"{kind}_step"), step, device, burst)
                if step >= WARMUP:
                    seconds[kind][name].append(taken)
    return seconds


def per_round(seconds: Mapping[str, Seconds]) -> Seconds:
    """Seconds of a generator step and the student steps that follow it in the usual run."""
    generator, student = seconds["generator"], seconds["student"]
    return {name: [g + STUDENT_STEPS * s for g, s in zip(generator[name], student[name])] for name in generator}


def with_quartiles(values: Sequence[float]) -> str:
    """Median and quartiles of a list of ratios."""
    low, _, high = quantiles(values, n=4, method="inclusive")
    return f"{median(values):.2f} [{low:.2f}, {high:.2f}]"


def row(label: str, images: int, seconds: Seconds) -> str:
    """A line of the table: images/s at the median time, ratios of times repetition by repetition."""
    speeds = [f"{images / median(seconds[name]):>9,.0f}" for name in ("floor", "ours", "naive")]
    over = with_quartiles([ours / floor for ours, floor in zip(seconds["ours"], seconds["floor"])])
    faster = with_quartiles([naive / ours for naive, ours in zip(seconds["naive"], seconds["ours"])])
    return f"{label:<22}{''.join(speeds)}   {over:<19}{faster}"


def table(name: str, case: Case, seconds: Mapping[str, Seconds]) -> str:
    """The lines of a case."""
    rounds = 1 + STUDENT_STEPS
    return "\n".join(
        [
            row(f"{name} generator", case.batch, seconds["generator"]),
            row(f"{name} student", case.batch, seconds["student"]),
            row(f"{name} 1 gen + {STUDENT_STEPS} stu", rounds * case.batch, per_round(seconds)),
            row(f"{name} stream", case.batch, seconds["stream"]),
        ]
    )


def operators(call: Callable[[int], object], repeats: int, device: torch.device) -> dict[str, float]:
    """Milliseconds per call in each operator itself, by the profiler; on a GPU of its kernels."""
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=kinds) as found:
        for step in range(repeats):
            call(WARMUP + step)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    time_of = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return {event.key: getattr(event, time_of) / 1000 / repeats for event in found.key_averages()}


def where(contenders: Mapping[str, Contender], repeats: int, device: torch.device) -> str:
    """Where ours spends what it takes beyond the floor: the operators that differ most, in ms a step."""
    lines = []
    for kind in KINDS:
        ours, floor = (operators(getattr(contenders[k], f"{kind}_step"), repeats, device) for k in ("ours", "floor"))
        beyond = {name: ours.get(name, 0) - floor.get(name, 0) for name in {*ours, *floor}}
        total = sum(beyond.values())
        lines.append(f"{kind}: {total:+.2f} ms beyond the floor's {sum(floor.values()):.2f}")
        most = sorted(beyond, key=lambda name: -abs(beyond[name]))[:SHOWN]
        lines += [f"  {beyond[name]:+8.2f}  {name}" for name in most]
        lines.append(f"  {total - sum(beyond[name] for name in most):+8.2f}  all others")
    return "\n".join(lines)


def header(given: argparse.Namespace, device: torch.device, precision: str, burst: int) -> str:
    """Under which circumstances the table was made, and what its columns are."""
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    threads = torch.get_num_threads()
    ours = ", ours compiled" if given.compile else ""
    ours += ", Triton norms" if given.triton else ""
    ours += ", CUDA graphs" if device.type == "cuda" and not given.eager else ""
    return (
        f"device {hardware}, {threads} threads, {precision} channels_last{ours} (naive: fp32 contiguous), "
        f"torch {torch.__version__}, seed {given.seed}, {given.repeats} turns of {burst}: medians, [quartiles]\n"
        f"{'images/s':<22}{'floor':>9}{'ours':>9}{'naive':>9}   {'time ours/floor':<19}time naive/ours"
    )


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--case", choices=[*CASES, "all"], default="all")
    parser.add_argument("--repeats", type=int, default=15, help="timed turns of each kind, at least 2")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="of ours and the floor")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's choice unless given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="ours compiled; the others stay eager")
    parser.add_argument("--triton", action="store_true", help="on a GPU: ours with Triton's batch norms")
    parser.add_argument("--eager", action="store_true", help="on a GPU: ours and the floor without CUDA graphs")
    parser.add_argument("--burst", type=int, help=f"steps of a turn; 1 on a CPU, {BURST} on a GPU unless given")
    parser.add_argument("--where", action="store_true", help="profile what is beyond the floor")
    given = parser.parse_args()
    if given.repeats < 2:
        parser.error("--repeats must be at least 2: the spread needs two values")
    if given.burst is not None and given.burst < 1:
        parser.error("--burst must be at least 1: the steps of a turn")
    return given


def main() -> None:
    """Measure the cases asked for and print the table."""
    given = arguments()
    if given.threads:
        torch.set_num_threads(given.threads)
    accelerator, shard = make_accelerator(given.precision)
    precision = resolve_precision(given.precision, shard.device)
    burst = given.burst or (BURST if shard.device.type == "cuda" else 1)
    given.triton &= shard.device.type == "cuda"
    if given.triton:
        check_triton(shard.device)
    print(header(given, shard.device, precision, burst))
    for name in CASES if given.case == "all" else [given.case]:
        case = CASES[name]
        ours = Ours(case, given.seed, shard, accelerator, graphs=not given.eager)
        generator, zoo, student = ours.networks
        networks = [generator, student.model, *(teacher.model for teacher in zoo)]
        stance = torch.compiler.set_stance("default")
        with compiled(networks if given.compile else []), stance, triton_norms(given.triton):
            contenders: dict[str, Contender] = {
                "floor": Floor(case, given.seed, shard, accelerator, not given.eager),
                "ours": ours,
                "naive": Naive(case, given.seed, shard),
            }
            print(table(name, case, measure(contenders, given.repeats, shard.device, burst)), flush=True)
            if given.where:
                print(where(contenders, given.repeats, shard.device), flush=True)


if __name__ == "__main__":
    main()
