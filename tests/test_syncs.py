"""No operator of a step waits for a figure to reach the host: on a GPU the queue would run dry.

Seen on a CPU: whatever reads one value or makes a size of values. Not seen: .tolist(), .cpu() and copies, which are no
operators there; `torch.cuda.set_sync_debug_mode("error")` would see those on a GPU.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dfkd.compress.fit import Fit
from dfkd.runtime import Shard
from dfkd.stream import SyntheticStream
from dfkd.synthesis import Synthesizer
from dfkd.teachers import Teacher
from generators import ConvGenerator

# Operators that hand a value, or a size that depends on values, to the host.
WAITING = ("_local_scalar_dense", "is_nonzero", "item", "equal", "nonzero", "masked_select", "_unique2", "bincount")


class Watch(TorchDispatchMode):
    """Counts the operators that wait."""

    def __init__(self) -> None:
        super().__init__()
        self.waited: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put_") and any(x is not None and x.dtype == torch.bool for x in args[1])
        if name in WAITING or masks:
            self.waited[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("losses", [{"ce": 1.0, "bn": 1.0, "adversary": 1.0, "diversity": 1.0, "tv": 0.1, "l2": 0.1}])
def test_generator_and_student_steps_wait_for_nothing(
    make_generator: Callable[..., ConvGenerator], make_teacher: Callable[..., Teacher], losses: dict[str, float]
) -> None:
    generator, zoo = make_generator(prototypes=4), [make_teacher(name) for name in ("a", "b", "c")]
    student = make_teacher("student").requires_grad_(True)
    shard = Shard(torch.device("cpu"))
    synthesizer = Synthesizer(
        generator, zoo, losses=losses, steps=4, batch_size=8, sample=2, student=student, warmup=0.0, shard=shard
    )
    stream = SyntheticStream(generator, batch_size=8, teacher=zoo, replay=3, shift=0.25, flip=True, shard=shard)
    fit = Fit(student, stream, steps=4)
    synthesizer.step(0)
    fit.step(0)
    with Watch() as watch:
        for step in range(1, 4):
            synthesizer.step(step)
            fit.step(step)
    assert not watch.waited


def test_the_watch_sees_what_waits() -> None:
    x = torch.arange(4.0)
    with Watch() as watch:
        float(x.sum())
        bool((x > 0).any())
        x[x > 1]
        x.nonzero()
        x[torch.tensor([0, 1])]
    assert watch.waited == {"_local_scalar_dense": 2, "index": 1, "nonzero": 1}
