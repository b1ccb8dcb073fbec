"""What the tests of the student loop share: a small student, batches for it, its losses written out."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dfkd.compress.fit import Batches
from dfkd.teachers import Teacher

MakeTeacher = Callable[..., Teacher]


def network(seed: int = 7) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3)
    )


def written_out(kind: str, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    if kind == "kl":
        divergence = nn.KLDivLoss(reduction="batchmean", log_target=True)
        student, teacher = (student / temperature).log_softmax(1), (teacher / temperature).log_softmax(1)
        return divergence(student, teacher) * temperature**2
    if kind == "mae":
        return (student - teacher).abs().mean()
    student, teacher = (x - x.mean(1, keepdim=True) for x in (student, teacher))
    return (student - teacher).abs().mean() / teacher.square().mean().sqrt()


def batches(count: int = 3, **teacher: Any) -> Batches:
    """`count` batches of 8 images as a stream of (images, labels)."""
    rng = torch.Generator().manual_seed(5)
    stream = Batches([(torch.rand(8, 1, 8, 8, generator=rng), torch.zeros(8)) for _ in range(count)])
    stream.teachers = [Teacher(network(seed=3), **teacher)]
    return stream
