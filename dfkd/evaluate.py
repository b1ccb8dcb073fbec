"""Figures: accuracy on real images, agreement with the teacher without them, diversity of the stream."""

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dfkd.data import RealImages
from dfkd.errors import UserError
from dfkd.losses import kd_kl
from dfkd.runtime import Autocast, eval_mode

Z_95 = 1.959963984540054  # 97.5 % quantile of the standard normal distribution


@dataclass(frozen=True)
class Accuracy:
    """Top-1 accuracy on n real images, with its Wilson 95 % interval; everything in percent."""

    percent: float
    n: int
    interval: tuple[float, float]


def wilson(successes: int, n: int) -> tuple[float, float]:
    """95 % interval of a share, in percent, n > 0 (Wilson 1927); it never leaves [0, 100]."""
    share, z2 = successes / n, Z_95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, 100 * (centre - half)), min(100.0, 100 * (centre + half))


def accuracy(
    model: nn.Module,
    data: RealImages,
    *,
    device: torch.device | str,
    batch_size: int = 512,
    autocast: Autocast = nullcontext,
) -> Accuracy:
    """Top-1 accuracy of `model`, float images [B, C, H, W] in [0, 1] to logits [B, K], in evaluation mode.

    Raises UserError where there is no image, K is not the data's, or a logit is NaN or infinite.
    """
    return score(guesses(model, data, device=device, batch_size=batch_size, autocast=autocast), data)


def score(named: Tensor, data: RealImages) -> Accuracy:
    """The accuracy of the classes [N] that a model named for images."""
    hits, n = int((named == data.labels).sum()), len(data)
    return Accuracy(100 * hits / n, n, wilson(hits, n))


@torch.no_grad()
def guesses(
    model: nn.Module,
    data: RealImages,
    *,
    device: torch.device | str,
    batch_size: int = 512,
    autocast: Autocast = nullcontext,
) -> Tensor:
    """The classes [N] int64 that a model names for images, on the host; for the rest as `accuracy`."""
    if not len(data):
        raise UserError(f"{data.source} holds no image to evaluate on")
    named, broken = [], []
    with eval_mode(model):
        for images in data.images.split(batch_size):
            with autocast():
                logits = model(images.to(device).float() / 255)  # [B, K]
            if logits.shape[1] != len(data.class_names):
                raise UserError(
                    f"the model gives {logits.shape[1]} logits but {data.source} has "
                    f"{len(data.class_names)} classes; give both the same classes"
                )
            named.append(logits.argmax(1))
            broken.append(~logits.isfinite().all(1))
    refuse_broken(broken, "the model's")
    return torch.cat(named).cpu()


@torch.no_grad()
def agreement(
    model: nn.Module,
    teacher: Callable[[Tensor], Tensor],
    images: Iterable[Tensor],
    *,
    autocast: Autocast = nullcontext,
) -> dict[str, float | int | list[float]]:
    """How often model and teacher name the same class on held-out synthetic images; this is no accuracy.

    `images` gives float batches [B, C, H, W] in [0, 1], on the models' device, and must end. Returns percent,
    its Wilson 95 % interval, n, and kl: mean KL(teacher || model) at temperature 1, nats per image.
    `teacher` may be a plain function of images, such as the mean of a zoo of frozen teachers.
    Raises UserError where there is no image, the class counts differ, or a logit is NaN or infinite.
    """
    same, divergence, broken_model, broken_teacher = [], [], [], []
    with eval_mode(*[each for each in (model, teacher) if isinstance(each, nn.Module)]):
        for batch in images:
            with autocast():
                ours, theirs = model(batch), teacher(batch)  # [B, K]
            if ours.shape != theirs.shape:
                raise UserError(
                    f"the model gives {ours.shape[1]} logits, its teacher {theirs.shape[1]}; give both the same classes"
                )
            same.append(ours.argmax(1) == theirs.argmax(1))
            divergence.append(kd_kl(ours, theirs, reduction="none"))
            broken_model.append(~ours.isfinite().all(1))
            broken_teacher.append(~theirs.isfinite().all(1))
    if not same:
        raise UserError("no synthetic image to measure agreement on: the stream gave no batch")
    refuse_broken(broken_model, "the model's")
    refuse_broken(broken_teacher, "the teacher's")
    hits, n = int(torch.cat(same).sum()), sum(map(len, same))
    kl = torch.cat(divergence).cpu().double().mean().item()
    return {"percent": 100 * hits / n, "kl": kl, "n": n, "interval": list(wilson(hits, n))}


def diversity(images: Tensor, features: Tensor, labels: Tensor, *, classes: int) -> dict[str, Tensor]:
    """Spread within classes against spread between them, as 0-dim float32 tensors (no host sync).

    images [N, C, H, W], features [N, D] (a teacher's), labels int64 [N] in [0, classes). Spreads are
    variances per pixel or feature, classes weighted by their share, so within + between = total variance.
    A ratio near 0 is one image per class.
    """
    member = labels[:, None] == torch.arange(classes, device=labels.device)  # [N, K]
    figures: dict[str, Tensor] = {}
    for name, points in (("pixel", images.flatten(1)), ("feature", features.flatten(1))):
        within, between = _spread(points, member)
        figures |= {f"{name}_within": within, f"{name}_between": between}
        figures[f"{name}_ratio"] = within / between.clamp_min(1e-12)  # finite where all classes look the same
    return figures


def _spread(points: Tensor, member: Tensor) -> tuple[Tensor, Tensor]:
    """Variance within and between classes, per coordinate, of points [N, D]; member bool [N, K]."""
    with torch.autocast(points.device.type, enabled=False):  # differences of means do not survive bf16
        points = points.detach().float()
        points = points - points.mean(0)
        one_hot = member.float()
        counts = one_hot.sum(0)  # [K]
        means = one_hot.T @ points / counts.clamp_min(1)[:, None]  # [K, D]
        within = (points - one_hot @ means).square().mean()
        between = ((counts / counts.sum()) @ means.square()).mean()
    return within, between


def refuse_broken(broken: list[Tensor], whose: str) -> None:
    """Raise UserError where logits were NaN or infinite: their argmax would still count as a guess."""
    rows = torch.cat(broken)
    if count := int(rows.sum()):
        raise UserError(
            f"{whose} logits are NaN or infinite for {count} of {len(rows)} images; check its weights and normalisation"
        )
