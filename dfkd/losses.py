"""Losses as pure functions on tensors; every one is a float32 scalar, a mean over the batch."""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dfkd.collectives import all_reduce_mean, global_moments
from dfkd.norms import Moments, batch_moments
from dfkd.runtime import full_precision


def mixed_ce(logits: Tensor, labels: Tensor, other: Tensor, beta: Tensor) -> Tensor:
    """(1 - beta) CE(logits, labels) + beta CE(logits, other), nats per image. MixMix eq. 9.

    logits [B, K]; labels and other [B] int64; beta [B] in [0, 1], the share of the image that `other` labels.
    """
    own = F.cross_entropy(logits, labels, reduction="none")
    pasted = F.cross_entropy(logits, other, reduction="none")
    return ((1 - beta) * own + beta * pasted).mean()


def bn_l2(batch: Sequence[Moments], stored: Sequence[Moments]) -> Tensor:
    """Sum over layers of ||mu - mu^||_2 + ||var - var^||_2; moments [C] per layer. MixMix eq. 2."""
    seen, wanted = ([x for moments in each for x in moments] for each in (batch, stored))
    return _Norms.apply(torch.cat(seen) - torch.cat(wanted), tuple(map(len, seen))).sum()


class _Norms(torch.autograd.Function):
    """The norms [n] of the pieces of a vector, of these lengths; their slope at zero is zero. As many kernels
    are launched as for one piece: a deep network has more than a hundred."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lengths: tuple[int, ...]) -> Tensor:
        norms = torch.stack(torch._foreach_norm(x.split(lengths)))
        ctx.save_for_backward(x, norms)
        ctx.lengths = lengths
        return norms

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        x, norms = ctx.saved_tensors
        slopes = (grad / norms).masked_fill(norms == 0, 0)
        return x * slopes[_pieces(ctx.lengths, x.device)], None


@cache
def _pieces(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Which piece each element is of."""
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).to(device)


@cache
def _shares(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """What each element counts in the mean over pieces of their means."""
    return (1 / (len(lengths) * torch.tensor(lengths))).repeat_interleave(torch.tensor(lengths)).to(device)


def _joined(batch: Sequence[Moments], stored: Sequence[Moments]) -> list[Tensor]:
    """Means and variances of the batch, then those stored, of all layers one behind the other: few kernels serve."""
    return [torch.cat([moments[k] for moments in each]) for each in (batch, stored) for k in (0, 1)]


def bn_kl(batch: Sequence[Moments], stored: Sequence[Moments], eps: float = 1e-5) -> Tensor:
    """Sum over layers and channels of KL(N(mu^, var^) || N(mu, var)), nats. The Knowledge Within, section 3.2."""
    mean, var, mu, sigma2 = _joined(batch, stored)
    var, sigma2 = var + eps, sigma2 + eps
    return (0.5 * (torch.log(sigma2 / var) + (var + (mu - mean).square()) / sigma2 - 1)).sum()


def bn_square(batch: Sequence[Moments], stored: Sequence[Moments], eps: float = 1e-6) -> Tensor:
    """Sum over layers of ||mu - mu^||_2^2 + ||sigma - sigma^||_2^2, sigma = sqrt(var + eps); moments [C] per layer.

    ZeroQ (Cai et al. 2020) eq. 3, eps as in its code: the slope of sqrt stays finite where a channel is dead. The
    moments are the batch's, where that code takes each image's own.
    """
    mean, var, mu, sigma2 = _joined(batch, stored)
    return (mean - mu).square().sum() + ((var + eps).sqrt() - (sigma2 + eps).sqrt()).square().sum()


def bn_mse(batch: Sequence[Moments], stored: Sequence[Moments]) -> Tensor:
    """Mean over layers of mean (mu - mu^)^2 + mean (var - var^)^2; moments [C] per layer. GDFQ (Xu et al. 2020), as in
    its code, where eq. 3 sums."""
    mean, var, mu, sigma2 = _joined(batch, stored)
    errors = (mean - mu).square() + (var - sigma2).square()
    return (errors * _shares(tuple(len(mean) for mean, _ in batch), errors.device)).sum()


BN_DISTANCES = {"l2": bn_l2, "kl": bn_kl, "square": bn_square, "mse": bn_mse}


def kd_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0, reduction: str = "mean") -> Tensor:
    """T^2 KL(teacher || student) at temperature T, nats; logits [B, K]. Hinton et al. 2015, section 2.

    reduction `mean` gives the mean over images, `none` one value per image [B].
    """
    p = F.log_softmax(full_precision(teacher) / temperature, dim=1)
    q = F.log_softmax(full_precision(student) / temperature, dim=1)
    each = (p.exp() * (p - q)).sum(1) * temperature**2
    return each.mean() if reduction == "mean" else each


def kd_l1(student: Tensor, teacher: Tensor, temperature: float = 1.0, reduction: str = "mean") -> Tensor:
    """Mean |student - teacher| over centred logits [B, K], in units of the teacher's spread over the global
    batch. DFAD eq. 3 made free of scale and offset; `temperature` plays no part. reduction as in kd_kl."""
    student, teacher = full_precision(student), full_precision(teacher)
    teacher = teacher - teacher.mean(1, keepdim=True)
    student = student - student.mean(1, keepdim=True)
    spread = all_reduce_mean(teacher.detach().square().mean()).sqrt()
    each = (student - teacher).abs().mean(1) / spread.clamp_min(1e-6)
    return each.mean() if reduction == "mean" else each


def kd_mae(student: Tensor, teacher: Tensor, temperature: float = 1.0, reduction: str = "mean") -> Tensor:
    """Mean |student - teacher| over logits [B, K] as they are; `temperature` plays no part, reduction as in kd_kl.

    DFAD (Fang et al. 2019) eq. 3.
    """
    each = (full_precision(student) - full_precision(teacher)).abs().mean(1)
    return each.mean() if reduction == "mean" else each


def js(student: Tensor, teacher: Tensor, temperature: float = 3.0, reduction: str = "mean") -> Tensor:
    """Jensen-Shannon divergence of student and teacher at temperature T, 0 to log 2 nats; logits [B, K].

    Adaptive DeepInversion (Yin et al. 2020) eq. 8, of whose 1 - JS the 1 has no gradient; its code takes the two KL
    terms the other way round, of probabilities clamped to [0.01, 0.99]. reduction as in kd_kl.
    """
    p = F.log_softmax(full_precision(teacher) / temperature, dim=1)
    q = F.log_softmax(full_precision(student) / temperature, dim=1)
    middle = torch.logaddexp(p, q) - math.log(2)
    each = 0.5 * (p.exp() * (p - middle) + q.exp() * (q - middle)).sum(1)
    return each.mean() if reduction == "mean" else each


STUDENT_LOSSES = {"kl": kd_kl, "l1": kd_l1, "mae": kd_mae}
ADVERSARIES = {**STUDENT_LOSSES, "js": js}


def hints(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean over layers of mean |student - teacher|^2 / mean |teacher|^2, features [B, ...]. The Knowledge Within
    (Haroush et al. 2020), section 4.2; dividing by the teacher's power over the global batch, so that no layer counts
    more, is ours."""
    ours, theirs = ([full_precision(x) for x in features] for features in (student, teacher))
    powers = all_reduce_mean(torch.stack([x.square().mean() for x in theirs])).clamp_min(1e-12)
    return (torch.stack([(own - its).square().mean() for own, its in zip(ours, theirs)]) / powers).mean()


def unexplained(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Per pair of features or maps [B, C, ...] the variance over the global batch (and the pixels) of student - teacher
    / s, mean over channels, [n]; s^2 is the teacher's own mean variance: 1 where the student is constant, 0 where it
    tells images (and places) apart as the teacher.

    FitNets (Romero et al. 2015) eq. 3. Centred, since after a ReLU what all images have in common is larger than what
    tells them apart, and in units of the latter: both are ours.
    """
    rests = []
    for ours, its, (mean, variance) in zip(student, teacher, global_moments([batch_moments(x) for x in teacher])):
        # As precise as the finer of both: maps are large, and their moments are summed in float32 whatever they are.
        # What all have in common goes first, lest it round off what does not.
        wide = torch.promote_types(ours.dtype, its.dtype)
        centred = its.to(wide) - mean.to(wide).view(-1, *[1] * (its.dim() - 2))
        rests.append(torch.addcmul(ours.to(wide), centred, variance.mean().clamp_min(1e-6).rsqrt().to(wide), value=-1))
    return torch.stack([variance.mean() for _, variance in global_moments([batch_moments(x) for x in rests])])


def map_error(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """The mean over maps of what is unexplained."""
    return unexplained(student, teacher).mean()


def attention(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Sum over layers of the mean squared difference of attention maps, of feature maps [B, C, H, W] whose channels may
    differ in number: an image's attention is its mean square over channels [H W], divided by its norm.

    Zagoruyko and Komodakis 2017, eq. 2, with the mean over H W of ZSKT's code (Micaelli and Storkey 2019, eq. 2).
    """

    def attended(maps: Tensor) -> Tensor:
        return F.normalize(full_precision(maps).square().mean(1).flatten(1))

    terms = [(attended(ours) - attended(theirs)).square().mean() for ours, theirs in zip(student, teacher)]
    return torch.stack(terms).sum()


def masked_divergence(student: Tensor, teacher: Tensor, kind: str, masked: bool = True) -> Tensor:
    """Student-teacher divergence by its name in ADVERSARIES, per image of the whole batch; where masked, the images
    count on which both name the same class.

    Maximised by the generator: where they disagree already there is nothing to gain. CMI (Fang et al. 2021) eq. 8.
    """
    each = ADVERSARIES[kind](student, teacher, reduction="none")
    if masked:
        each = each * (student.argmax(1) == teacher.argmax(1))
    return each.mean()


def total_variation(images: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring pixels of images [B, C, H, W]. DeepInversion eq. 3."""
    across = (images[..., 1:] - images[..., :-1]).abs().mean()
    down = (images[..., 1:, :] - images[..., :-1, :]).abs().mean()
    return across + down


def pixel_l2(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Mean square of normalised pixels; images [B, C, H, W], mean and std [1, C, 1, 1]. DeepInversion eq. 3."""
    return ((images - mean) / std).square().mean()


def smooth(images: Tensor, sigma: float = 1.0) -> Tensor:
    """Mean squared difference of images [B, C, H, W], H and W at least 2, and themselves blurred by a Gaussian of 3x3
    pixels, deviation sigma in pixels, edges reflected.

    The smoothness prior of The Knowledge Within (Haroush et al. 2020), section 3; size and sigma are ours.
    """
    side = math.exp(-0.5 / sigma**2)
    blurred = full_precision(images)
    # Slices, not a convolution and a padding: autocast leaves them in float32, and their backward is deterministic on
    # every device, which that of a reflecting padding is not.
    for axis in (2, 3):
        size = blurred.shape[axis]
        padded = torch.cat([blurred.narrow(axis, 1, 1), blurred, blurred.narrow(axis, size - 2, 1)], axis)
        neighbours = padded.narrow(axis, 0, size) + padded.narrow(axis, 2, size)
        blurred = (blurred + side * neighbours) / (1 + 2 * side)
    return (images - blurred).square().mean()


def spread(images: Tensor, probabilities: Tensor) -> Tensor:
    """||p1 - p2||_F / ||x1 - x2||_F over all pairs of the global batch: low where images that differ get like answers.

    images [B, C, H, W], a teacher's probabilities [B, K]. RDSKD's (Han et al. 2021) diversity-seeking loss, as in its
    code. Of four rows the outer and the inner two are a pair: rows are drawn at random, but neighbours are of one class
    (draws.draw_labels) and rows two apart are mixed (mixing.partners). Rows left over do not count.
    """
    changes = []
    for x in (probabilities, images):
        blocks = full_precision(x[: len(x) // 4 * 4]).flatten(1).unflatten(0, (len(x) // 4, 4))
        changes.append((blocks[:, :2] - blocks[:, 2:].flip(1)).square().sum())
    # The root of a zero would have an infinite slope.
    moved, apart = all_reduce_mean(torch.stack(changes)).clamp_min(1e-12).sqrt().unbind()
    return moved / apart


def info_nce(
    queries: Tensor, keys: Tensor, negatives: Tensor, temperature: float, usable: Tensor | None = None
) -> Tensor:
    """Mean of -log softmax of a query's own key among it and the negatives, by cosine / temperature, nats per image.

    queries and keys [B, D], row by row a pair; negatives [N, D], N may be 0, of which those count that `usable`, bool
    [N] or [B, N], says (None: all). CMI (Fang et al. 2021) eq. 5 and 6, the positive in the denominator as in its code.
    """
    queries, keys, negatives = (F.normalize(full_precision(x), dim=1) for x in (queries, keys, negatives))
    positive = (queries * keys).sum(1, keepdim=True) / temperature
    with torch.autocast(queries.device.type, enabled=False):  # a low temperature magnifies bfloat16's rounding
        against = queries @ negatives.mT / temperature
    if usable is not None:
        against = against.masked_fill(~usable, -math.inf)
    return (torch.cat([positive, against], 1).logsumexp(1) - positive.squeeze(1)).mean()


def mode_seeking(images: Tensor, latents: Tensor, labels: Tensor, eps: float = 0.01) -> Tensor:
    """Mean of 1 / (eps + mean|x1 - x2| / mean|z1 - z2|) over pairs of images of one class. MSGAN eq. 3.

    images [B, C, H, W], latents [B, Z], labels [B]; rows 2k and 2k + 1 are a pair where their labels agree (as
    draws.draw_labels has them), else they count as zero.
    """
    even = images.shape[0] // 2 * 2
    dx = (images[0:even:2] - images[1:even:2]).abs().flatten(1).mean(1)
    dz = (latents[0:even:2] - latents[1:even:2]).abs().mean(1)
    same = labels[0:even:2] == labels[1:even:2]
    return (same / (eps + dx / dz)).mean()


def likeness(maps: Tensor, labels: Tensor, eps: float = 1e-6) -> Tensor:
    """Mean squared correlation of the feature maps of two images of one class, 0 to 1: how alike their structure is.

    maps [B, C, ...], labels [B]; pairs as in mode_seeking. Every channel of every image is centred over its pixels, so
    that colour, lighting and contrast change nothing; flat maps count as zero. Two real CIFAR-10 images of a class
    correlate by 0.05 to 0.2 in nearly all layers of a ResNet-20. Our own, after MSGAN's distance in pixels.
    """
    even = maps.shape[0] // 2 * 2
    maps = full_precision(maps[:even]).flatten(2)
    centred = (maps - maps.mean(2, keepdim=True)).flatten(1)
    one, two = centred[0::2], centred[1::2]
    # No linalg.vecdot: autocast would round it to bfloat16.
    both, first, second = ((a * b).sum(1) for a, b in ((one, two), (one, one), (two, two)))
    same = labels[0:even:2] == labels[1:even:2]
    return (same * both.square() / (first * second + eps)).mean()


def one_hot(logits: Tensor) -> Tensor:
    """Cross-entropy of logits [B, K] to their own argmax, nats. DAFL eq. 2."""
    return F.cross_entropy(logits, logits.argmax(1))


def activation(features: Tensor) -> Tensor:
    """Minus the mean absolute feature [B, D]. DAFL eq. 3."""
    return -features.abs().mean()


def information(mean_probability: Tensor) -> Tensor:
    """Sum of p log p over the mean prediction [K] of the global batch, nats; -log K when balanced. DAFL eq. 4."""
    # A class whose probability underflows to 0 has an infinite slope there.
    return torch.special.entr(mean_probability.clamp_min(torch.finfo(torch.float32).tiny)).sum().neg()
