"""Images per second, messages and bytes of the steps on several processes, each with a batch of its own.

    OMP_NUM_THREADS=1 ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 benchmarks/scale.py
    OMP_NUM_THREADS=1 ACCELERATE_USE_CPU=true accelerate launch --num_processes 1 benchmarks/scale.py

On GPUs leave out ACCELERATE_USE_CPU and OMP_NUM_THREADS. Messages are all-reduces: of batch statistics, counted as they
are made, and of gradients, which DDP sends in buckets of 25 MB. Weights are random.
"""

import argparse
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from contenders import CASES, Ours
from step import WARMUP, seconds_of
from torch import nn

from dfkd.runtime import make_accelerator, resolve_precision, say, shut_down

BUCKET = 25 * 2**20  # bytes, of DDP


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Count dfkd's own all-reduces in its scope, and their bytes."""
    seen, plain = Counter[str](), dist.all_reduce

    def counting(tensor: torch.Tensor, *given: Any, **options: Any) -> Any:
        seen.update(messages=1, bytes=tensor.numel() * tensor.element_size())
        return plain(tensor, *given, **options)

    dist.all_reduce = counting
    try:
        yield seen
    finally:
        dist.all_reduce = plain


def gradients(network: nn.Module) -> tuple[int, int]:
    """Messages and bytes in which DDP averages a network's gradients."""
    size = sum(p.numel() * p.element_size() for p in network.parameters())
    return math.ceil(size / BUCKET), size


def main() -> None:
    """Measure on as many processes as were launched, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--case", choices=CASES, default="digits")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    given = parser.parse_args()
    accelerator, shard = make_accelerator(given.precision)
    case = CASES[given.case]
    ours = Ours(case, 0, shard, accelerator)
    say(
        f"{given.case}: {shard.world} process(es) on {shard.device}, {torch.get_num_threads()} thread(s) each, "
        f"{resolve_precision(given.precision, shard.device)}, batch {case.batch} each, seed 0"
    )
    learners: dict[str, list[nn.Module]] = {"generator": [ours.networks.generator]}
    learners["student"] = list(ours.fit.learners)  # each a DDP of its own
    for kind, networks in learners.items():
        call, seconds = getattr(ours, f"{kind}_step"), []
        for step in range(WARMUP + given.repeats):
            accelerator.wait_for_everyone()
            with counted() as seen:
                seconds.append(seconds_of(call, step, shard.device))
        sent = [gradients(network) for network in networks] if shard.world > 1 else []
        messages, size = sum(count for count, _ in sent), sum(each for _, each in sent)
        taken = median(seconds[WARMUP:])
        say(
            f"  {kind}: {shard.world * case.batch / taken:,.0f} images/s, {1000 * taken:.1f} ms; messages: "
            f"{seen['messages']} of statistics ({seen['bytes'] / 1000:.1f} kB), {messages} of gradients "
            f"({size / 1e6:.2f} MB)"
        )
    shut_down(accelerator)


if __name__ == "__main__":
    main()
