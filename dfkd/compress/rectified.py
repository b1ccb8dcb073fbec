"""Rectified least squares: what ReLU(BN(conv)) gives, as moments in closed form from filters and batch norms alone, and
the regression of a network on less of it. A method of our own, derived in docs/closed_form.md."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dfkd.compress.quantizers import IN_CACHE

RIDGE = 1e-6  # of the mean variance: two kept channels may be the same
DEAD = 1e-3  # of it: a variance below counts as this much, lest weights grow beside which the others are rounded away
NODES, WEIGHTS = (x.tolist() for x in np.polynomial.legendre.leggauss(32))


def correlations(filters: Tensor, size: Sequence[int], steps: Sequence[int]) -> Tensor:
    """Correlations [C, C, n] of output i at a place and output j at offset * steps pixels from it, where the input is
    white noise: the cross-correlation of filters [C, I, kh, kw] or [C, I]; size is (h, w).

    The offsets are the first n = ((2h-1)(2w-1)+1)/2 of (1-h, 1-w) to (h-1, w-1), row by row, which ends with (0, 0): of
    i and j behind it they are those of j and i before.
    """
    kernels = filters if filters.dim() == 4 else filters[:, :, None, None]
    kernels = kernels / kernels.flatten(1).norm(dim=1).clamp_min(1e-30).view(-1, 1, 1, 1)
    high, wide = kernels.shape[2:]
    offsets = [(down, right) for down in range(1 - size[0], size[0]) for right in range(1 - size[1], size[1])]
    found = []
    for down, right in offsets[: len(offsets) // 2 + 1]:
        up, left = -down * steps[0], -right * steps[1]  # what the two have in common, as a product of matrices
        mine = kernels[:, :, : max(0, high - up), max(0, -left) : max(0, wide - left)]
        its = kernels[:, :, up:, max(0, left) : max(0, wide + left)]
        found.append(mine.flatten(1) @ its.flatten(1).T)
    return torch.stack(found, 2)


def rectified_mean(mean: Tensor, spread: Tensor) -> Tensor:
    """E[ReLU(u)] of normal u with this mean and standard deviation above 0, any shape."""
    t = mean / spread
    return mean * torch.special.ndtr(t) + spread * torch.exp(-t.square() / 2) / math.sqrt(2 * math.pi)


def rectified_covariance(rho: Tensor, mean: Tensor, spread: Tensor) -> Tensor:
    """cov(ReLU(u_i), ReLU(u_j)) for normal u with correlations rho [C, C, ...], means and deviations [C]; float64.

    By Price's theorem its slope in rho is g_i g_j P(u_i, u_j > 0), and the slope of that is a normal density:
    cov / (g_i g_j) = rho P(u_i > 0) P(u_j > 0) + integral_0^arcsin(rho) (rho - sin x) exp(-q / 2) dx / (2 pi) with
    q = (t_i^2 + t_j^2 - 2 t_i t_j sin x) / cos^2 x and t = mean / spread. 32 Gauss-Legendre nodes.
    """
    rho = rho.double().clamp(-1, 1)
    offsets = [1] * (rho.dim() - 2)
    t = (mean / spread).double().clamp(-37, 37)  # beyond it a ReLU is the identity or 0
    ti, tj = t.view(-1, 1, *offsets), t.view(1, -1, *offsets)
    rows = len(rho)
    if rho.device.type == "cpu":  # a third of the time: all nodes would wait for the memory
        rows = max(1, IN_CACHE // rho[0].numel())
    total = torch.cat([_standardised(some, t_some, tj) for some, t_some in zip(rho.split(rows), ti.split(rows))])
    return total * spread.view(-1, 1, *offsets) * spread.view(1, -1, *offsets)


def _standardised(rho: Tensor, ti: Tensor, tj: Tensor) -> Tensor:
    """cov / (g_i g_j) of rectified_covariance."""
    total = rho * torch.special.ndtr(ti) * torch.special.ndtr(tj)
    half = rho.asin() / 2
    squares, product = ti.square() + tj.square(), 2 * ti * tj
    for node, weight in zip(NODES, WEIGHTS):
        sine = (half * (node + 1)).sin()
        q = (squares - product * sine) / (1 - sine.square())
        total += weight / (2 * math.pi) * half * (rho - sine) * torch.exp(-q / 2)
    return total


def by_position(cov: Tensor, size: Sequence[int]) -> Tensor:
    """Covariance [C*h*w, C*h*w] of all channels at all places of a window, from that by offset [C, C, n], the offsets
    those of `correlations`."""
    cov = torch.cat([cov, cov[:, :, :-1].transpose(0, 1).flip(2)], 2).unflatten(2, [2 * side - 1 for side in size])
    rows, columns = (torch.arange(side, device=cov.device) for side in size)
    down = rows[None] - rows[:, None] + size[0] - 1
    right = columns[None] - columns[:, None] + size[1] - 1
    table = cov[:, :, down][:, :, :, :, right]  # [C, C, h, h, w, w]
    return table.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(0, 2)


def input_means(sums: Tensor, means: Tensor) -> Tensor:
    """Means m [I] of a layer's inputs from those of its outputs [O]: ridge regression of sums @ m = means.

    sums [O, I] are the weights summed over the kernel; means is what a batch norm remembers of the data.
    """
    gram = sums.T @ sums
    ridge = 1e-3 * gram.diagonal().mean().clamp_min(1e-30)
    return torch.linalg.solve(gram + ridge * torch.eye(len(gram)).to(gram), sums.T @ means)


def renew_norm(layer: Any, norm: Any, exact: Tensor) -> None:
    """Give a batch norm the statistics of the rounded layer: the variance in proportion to the filter's energy, the
    mean by the inputs' means. exact [O, I, ...] are the weights before rounding."""
    near = layer.weight.double()
    energy = near.flatten(1).square().sum(1) / exact.flatten(1).square().sum(1).clamp_min(1e-30)
    bias = 0 if layer.bias is None else layer.bias
    if getattr(layer, "groups", 1) == 1:
        old, new = (w.flatten(1).view(*w.shape[:2], -1).sum(2) for w in (exact, near))
        inputs = input_means(old, (norm.running_mean - bias).double())
        norm.running_mean.add_((new - old) @ inputs)
    norm.running_var.mul_(torch.where(energy > 0, energy, 1))


def regress(
    first: Any, norm: Any, second: Any, after: Any, exact: Tensor, keep: Tensor, window: tuple[int, ...]
) -> None:
    """Let `second` make of the channels keep [K'] what it made of all, in place.

    first, norm and a ReLU make the channels; exact [C, ...] are all filters of first as they were before rounding. The
    batch norm `after` takes the intercept and the loss of variance; without one (None) the bias of second takes the
    intercept, and without a bias the regression has none, so that the network's state dict keeps its names.
    window is the kernel of second where each of its places is a variable of its own, else (1, 1).
    """
    if len(keep) == len(exact) and torch.equal(first.weight.double(), exact):
        return
    taps = math.prod(window)
    covariance, mean, now = map_moments(norm, first, second, exact, keep, window)
    centred = after is not None or second.bias is not None
    gram = covariance if centred else covariance + mean.outer(mean)
    then = slice(len(exact) * taps)
    weight = second.weight.double().reshape(len(second.weight), len(exact), -1)  # [O, C, places]
    # [O, C * places], or [O * places, C] where one regression serves all places
    separate = weight.shape[2] != taps
    old = (weight.transpose(1, 2).flatten(0, 1) if separate else weight.flatten(1)).clone()
    inner = gram[now][:, now]
    own, usual = inner.diagonal(), inner.diagonal().mean()
    damped = inner + torch.diag(RIDGE * usual + (DEAD * usual - own).clamp_min(0))
    new = torch.linalg.solve(damped, gram[now, then] @ old.T).T
    rows = new.view(len(weight), -1, len(keep)).transpose(1, 2) if separate else new.view(len(weight), len(keep), taps)
    weight[:, keep] = rows
    second.weight.copy_(weight.view_as(second.weight))
    moved = (new @ mean[now] - old @ mean[then]).view(len(weight), -1).sum(1)
    if after is not None:
        kept, was = (((w @ g) * w).view(len(weight), -1).sum(1) for w, g in ((new, inner), (old, gram[then, then])))
        after.running_mean.add_(moved)
        after.running_var.mul_(torch.where((kept > 0) & (was > 0), kept / was, 1))
    elif second.bias is not None:
        second.bias.sub_(moved)


def map_moments(
    norm: Any, first: Any, second: Any, exact: Tensor, keep: Tensor, window: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Covariance and mean of what follows the ReLU, channels and places of a window flattened together, and where in
    them stand the channels keep [K'] with the filters that first has now.

    The C channels with the filters exact [C, ...] come first; where first has changed, those kept follow.
    """
    ones = torch.ones_like(norm.running_var, dtype=torch.float64)
    shift = 0 * ones if norm.bias is None else norm.bias.double()
    scale = ones if norm.weight is None else norm.weight.double()
    var = norm.running_var.double()
    alive = (var / (var + norm.eps).clamp_min(1e-30)).sqrt()  # of a dead channel the norm gives less than |gamma| says
    spread = (scale.abs() * alive).clamp_min(1e-12)
    every, filters, at = torch.arange(len(exact), device=keep.device), exact, keep
    if not torch.equal(first.weight.double(), exact):
        every, filters = torch.cat([every, keep]), torch.cat([exact, first.weight.double()[keep]])
        at = torch.arange(len(exact), len(every), device=keep.device)
    sign = torch.where(scale < 0, -1.0, 1.0)[every]
    filters = filters * sign.view(-1, *[1] * (exact.dim() - 1))
    steps = [1, 1] if window == (1, 1) else [a * b for a, b in zip(first.stride, second.dilation)]
    rho = correlations(filters, window, steps)
    covariance = by_position(rectified_covariance(rho, shift[every], spread[every]), window)
    taps = math.prod(window)
    now = (at[:, None] * taps + torch.arange(taps, device=keep.device)).flatten()
    return covariance, rectified_mean(shift, spread)[every].repeat_interleave(taps), now
