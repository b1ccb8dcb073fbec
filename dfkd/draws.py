"""What is random by position: labels, latents, and how images are moved; on any number of processes the same."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dfkd.runtime import Shard, rng, to_device


def draw_labels(shard: Shard, batch: int, classes: int, *position: int | str, repeats: int = 1) -> Tensor:
    """Labels [batch] int64 of this rank, balanced over the global batch, as equal neighbours where repeats is 2.

    Every class appears equally often (to one) where the global batch holds all of them `repeats` times; else as many
    classes as fit are picked at random.
    """
    total = batch * shard.world
    generator = rng("cpu", *position, "labels")  # so small that on a GPU every line would cost more than the copy
    chosen = torch.randperm(classes, generator=generator)[: max(1, total // repeats)]
    labels = chosen[torch.arange(total).mul(len(chosen)).div(total, rounding_mode="floor")]
    blocks = total // repeats
    order = torch.randperm(blocks, generator=generator)
    shuffled = labels[: blocks * repeats].view(blocks, repeats)[order].reshape(-1)
    return to_device(shard.take(torch.cat([shuffled, labels[blocks * repeats :]])), shard.device)


def draw_latents(shard: Shard, batch: int, latent: int, *position: int | str) -> Tensor:
    """Standard normal latents [batch, latent] of this rank, its part of the global batch's."""
    generator = rng(shard.device, *position, "latents")
    # A copy: the slice alone would keep the whole batch's in memory.
    return shard.take(torch.randn(batch * shard.world, latent, generator=generator, device=shard.device)).clone()


def draw_moves(shard: Shard, batch: int, *position: int | str) -> Tensor:
    """Three uniform numbers in [0, 1) for each image of this rank, on the host: [batch, 3]."""
    return shard.take(torch.rand(batch * shard.world, 3, generator=rng("cpu", *position, "augment")))


def augment(images: Tensor, shard: Shard, shift: int, flip: bool, *position: int | str) -> Tensor:
    """Shift images [B, C, H, W] by up to `shift` pixels each way, edges repeated, and flip half of them if asked."""
    if not shift and not flip:
        return images
    return moved(images, to_device(draw_moves(shard, len(images), *position), images.device), shift, flip)


def moved(images: Tensor, u: Tensor, shift: int, flip: bool) -> Tensor:
    """Images [B, C, H, W] shifted down and across by what u [B, 3] says, and flipped where asked (see augment)."""
    batch, _, height, width = images.shape
    offset = (u[:, :2] * (2 * shift + 1)).floor().long() - shift
    rows = (torch.arange(height, device=images.device) + offset[:, :1]).clamp(0, height - 1)
    columns = (torch.arange(width, device=images.device) + offset[:, 1:]).clamp(0, width - 1)
    if flip:
        columns = torch.where(u[:, 2:] < 0.5, columns.flip(1), columns)
    each = torch.arange(batch, device=images.device)
    return images.permute(0, 2, 3, 1)[each.view(-1, 1, 1), rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)


def crops(images: Tensor, pad: int, shard: Shard, *position: int | str) -> Tensor:
    """A random crop of each of images [B, C, H, W], of its size, out of it with `pad` black pixels around: what
    networks for CIFAR are mostly trained on (He et al. 2016, section 4.2)."""
    if not pad:
        return images
    u = draw_moves(shard, len(images), *position, "crops")
    return _Crops.apply(images, to_device((u[:, :2] * (2 * pad + 1)).floor().long() - pad, images.device))


class _Crops(torch.autograd.Function):
    """The gradient goes back the way the pixels came, by one read: torch's of an index adds up, for which it sorts."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, offset: Tensor) -> Tensor:
        ctx.offset = offset
        return _window(images, offset)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _window(grad, -ctx.offset), None


def _window(images: Tensor, offset: Tensor) -> Tensor:
    """What is seen of images [B, C, H, W] through windows that lie offset [B, 2] down and across; outside is black."""
    batch, _, height, width = images.shape
    rows = torch.arange(height, device=images.device) + offset[:, :1]
    columns = torch.arange(width, device=images.device) + offset[:, 1:]
    each = torch.arange(batch, device=images.device).view(-1, 1, 1)
    there = (rows.clamp(0, height - 1).unsqueeze(2), columns.clamp(0, width - 1).unsqueeze(1))
    outside = ((rows < 0) | (rows >= height)).unsqueeze(2) | ((columns < 0) | (columns >= width)).unsqueeze(1)
    return images.permute(0, 2, 3, 1)[each, *there].masked_fill_(outside.unsqueeze(3), 0).permute(0, 3, 1, 2)


def jitter(images: Tensor, pixels: int, flip: bool, *position: int | str) -> Tensor:
    """All images [B, C, H, W] rolled by one random offset of up to `pixels` each way, and mirrored half the time if
    asked (DeepInversion, Yin et al. 2020, appendix A)."""
    if not pixels and not flip:
        return images
    # Host values, so that roll needs no sync; by position, so that every process moves its images alike.
    u = torch.rand(3, generator=rng("cpu", *position, "jitter")).tolist()
    down, across = (int(x * (2 * pixels + 1)) - pixels for x in u[:2])
    images = images.roll((down, across), (2, 3)) if pixels else images
    return images.flip(3) if flip and u[2] < 0.5 else images
