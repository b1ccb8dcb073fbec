"""What is random by position: labels, latents, and how images are moved; on any number of processes the same."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dfkd.runtime import Shard, plain_strides, rng, to_device


def draw_labels(shard: Shard, batch: int, classes: int, *position: int | str, repeats: int = 1) -> Tensor:
    """Labels [batch] int64 of this rank, balanced over the global batch, as equal neighbours where repeats is 2.

    Every class appears equally often (to `repeats`) where the global batch holds all of them `repeats` times; else as
    many classes as fit are picked at random. A batch that `repeats` does not divide ends in a part of a row of them.
    """
    total = batch * shard.world
    generator = rng("cpu", *position, "labels")  # so small that on a GPU every line would cost more than the copy
    blocks = -(-total // repeats)
    chosen = torch.randperm(classes, generator=generator)[: max(1, total // repeats)]
    labels = chosen[torch.arange(blocks) * len(chosen) // blocks]
    labels = labels[torch.randperm(blocks, generator=generator)].repeat_interleave(repeats)[:total]
    return to_device(shard.take(labels), shard.device)


def draw_latents(shard: Shard, batch: int, latent: int, *position: int | str) -> Tensor:
    """Standard normal latents [batch, latent] of this rank, its part of the global batch's."""
    generator = rng(shard.device, *position, "latents")
    # A copy: the slice alone would keep the whole batch's in memory.
    return shard.take(torch.randn(batch * shard.world, latent, generator=generator, device=shard.device)).clone()


def draw_moves(shard: Shard, batch: int, *position: int | str) -> Tensor:
    """Three uniform numbers in [0, 1) for each image of this rank, on the host: [batch, 3]."""
    return shard.take(torch.rand(batch * shard.world, 3, generator=rng("cpu", *position, "augment")))


class Moves(NamedTuple):
    """How images are moved at random: by up to `shift` pixels each way, what comes in being black or the edge repeated,
    and half of them mirrored if `flip`."""

    shift: int = 0
    flip: bool = False
    black: bool = False

    @property
    def still(self) -> bool:
        """Whether nothing moves."""
        return not (self.shift or self.flip)


STILL = Moves()


def augment(images: Tensor, shard: Shard, moves: Moves, *position: int | str) -> Tensor:
    """Images [B, C, H, W], each moved at random; differentiable."""
    if moves.still:
        return images
    return moved(images, to_device(draw_moves(shard, len(images), *position), images.device), moves)


def moved(images: Tensor, u: Tensor, moves: Moves) -> Tensor:
    """Images [B, C, H, W], each moved as u [B, 3] in [0, 1) says; differentiable."""
    rows, columns = (_sources(u[:, k], size, moves) for k, size in enumerate(images.shape[2:]))
    if moves.flip:
        columns = torch.where(u[:, 2:] < 0.5, columns.flip(1), columns)
    return _Moved.apply(images, rows, columns, moves.black)


def _sources(u: Tensor, size: int, moves: Moves) -> Tensor:
    """Which of `size` lines each line of a moved image is, [B, size] of u [B]; -1: none, it is black."""
    offset = (u * (2 * moves.shift + 1)).floor().long() - moves.shift
    lines = torch.arange(size, device=u.device) + offset.unsqueeze(1)
    inside = lines.clamp(0, size - 1)
    return torch.where(lines == inside, lines, -1) if moves.black else inside


class _Moved(torch.autograd.Function):
    """Pixels are taken by index, and gradients go back as products with a 1 a line: an index's own gradient adds up
    what repeated edges share, takes five times as long on a CPU and sorts on a GPU."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, rows: Tensor, columns: Tensor, black: bool) -> Tensor:
        ctx.lines = rows, columns
        each = torch.arange(len(images), device=images.device).view(-1, 1, 1)
        there = (rows.clamp_min(0).unsqueeze(2), columns.clamp_min(0).unsqueeze(1))
        taken = images.permute(0, 2, 3, 1)[each, *there]
        if black:
            taken.masked_fill_(((rows < 0).unsqueeze(2) | (columns < 0).unsqueeze(1)).unsqueeze(3), 0)
        return plain_strides(taken.permute(0, 3, 1, 2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        rows, columns = (
            (lines.unsqueeze(2) == torch.arange(lines.shape[1], device=grad.device)).to(grad.dtype).unsqueeze(1)
            for lines in ctx.lines
        )
        with torch.autocast(grad.device.type, enabled=False):
            return rows.mT @ grad @ columns, None, None, None


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
