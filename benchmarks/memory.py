"""Peak memory of a generator step that asks m' teachers, against a step that asks the hungriest of them alone.

    python benchmarks/memory.py [--batch 128]

On a GPU what torch's allocator held at most; on a CPU the running sum of its allocations, by the profiler (the scratch
memory of oneDNN is not in it). What was held before the step (weights, optimiser) is left out. Weights are random.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from contenders import Case, Ours
from torch.profiler import ProfilerActivity, profile

from dfkd.runtime import Shard, make_accelerator

CASE = Case(
    [("dfkd:resnet20", {}), ("dfkd:resnet56", {}), ("dfkd:wrn_16_1", {}), ("dfkd:vgg11", {})], ("dfkd:resnet20", {})
)
STEPS = 4  # of other samples of teachers


def peak(call: Callable[[], object], device: torch.device) -> float:
    """The most MB that a call held beyond what was there before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    events = found.profiler.kineto_results.events()  # type: ignore[union-attr]
    held = most = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most / 1e6


def step_peak(case: Case, sample: int, shard: Shard) -> float:
    """The most MB that a generator step takes, over STEPS samples of teachers; the first is not like the others."""
    ours = Ours(case, 0, shard, sample=sample)
    ours.generator_step(0)
    return max(peak(partial(ours.generator_step, step), shard.device) for step in range(1, 1 + STEPS))


def main() -> None:
    """Measure every teacher alone and m' = 1 to 4 of them, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--batch", type=int, default=CASE.batch)
    case = replace(CASE, batch=parser.parse_args().batch)
    _, shard = make_accelerator("fp32")
    print(f"device {shard.device}, fp32, batch {case.batch}, torch {torch.__version__}, seed 0")
    alone = {teacher[0]: step_peak(replace(case, teachers=[teacher]), 1, shard) for teacher in case.teachers}
    for name, megabytes in alone.items():
        print(f"{name} alone: {megabytes:,.0f} MB", flush=True)
    for sample in range(1, len(case.teachers) + 1):
        megabytes = step_peak(case, sample, shard)
        print(
            f"m' = {sample}: {megabytes:,.0f} MB, {megabytes / max(alone.values()):.2f} of the largest alone",
            flush=True,
        )


if __name__ == "__main__":
    main()
