"""Triton kernels of norms.py for maps whose channels lie side by side: few launches, each at the memory's speed.

torch's eval-mode batch norm takes three kernels a call on a GPU (a copy of the mean, the inverse deviation, the norm),
its statistics four, of which the first reads a small network's maps at a tenth of what the memory gives.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

Moments = tuple[Tensor, Tensor]

VALUES = 4096  # of a tile: rows times channels
WIDEST = 64  # channels of a tile
PROGRAMS = 256  # that share the rows: enough for any GPU, few enough for one program to join what they found
JOINED = 16  # channels of such a program


@triton.jit
def _place(row, rows, channel, channels):  # type: ignore[no-untyped-def]
    """Where values of these rows and channels lie in a matrix [rows, channels], and which of them are inside it."""
    inside = (row < rows)[:, None] & (channel < channels)[None, :]
    return row[:, None] * channels + channel[None, :], inside


@triton.jit
def _scale(weight, var, channel, exists, eps, AFFINE: tl.constexpr):  # type: ignore[no-untyped-def]
    """What a norm multiplies each channel by."""
    scale = tl.rsqrt(tl.load(var + channel, mask=exists, other=1.0).to(tl.float32) + eps)
    if AFFINE:
        scale *= tl.load(weight + channel, mask=exists, other=0.0).to(tl.float32)
    return scale


@triton.jit(do_not_specialize=["rows", "tiles"])
def _normalise(  # type: ignore[no-untyped-def]
    x, y, weight, bias, mean, var, found, rows, channels, tiles, eps,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, AFFINE: tl.constexpr, NORM: tl.constexpr, MOMENTS: tl.constexpr,
) -> None:  # fmt: skip
    """With NORM y = the norm of x [rows, channels]; with MOMENTS the mean, and the sum of squared distances from it,
    over this program's rows, tile by tile (Chan et al. 1979, eq. 2.1): no large number is taken from another."""
    channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    exists = channel < channels
    if NORM:
        scale = _scale(weight, var, channel, exists, eps, AFFINE)
        middle = tl.load(mean + channel, mask=exists, other=0.0).to(tl.float32)
        shift = tl.zeros([COLUMNS], tl.float32)
        if AFFINE:
            shift = tl.load(bias + channel, mask=exists, other=0.0).to(tl.float32)
    count = 0.0
    centre = tl.zeros([COLUMNS], tl.float32)
    spread = tl.zeros([COLUMNS], tl.float32)
    first = tl.program_id(0).to(tl.int64) * tiles * ROWS
    for tile in range(tiles):
        place, inside = _place(first + tile * ROWS + tl.arange(0, ROWS), rows, channel, channels)
        value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            normed = (value - middle[None, :]) * scale[None, :] + shift[None, :]
            tl.store(y + place, normed.to(y.dtype.element_ty), mask=inside)
        if MOMENTS:
            new = tl.minimum(tl.maximum(rows - (first + tile * ROWS), 0), ROWS).to(tl.float32)
            own = tl.sum(value, axis=0) / tl.maximum(new, 1.0)
            distance = tl.where(inside, value - own[None, :], 0.0)
            apart = own - centre
            share = new / tl.maximum(count + new, 1.0)
            spread += tl.sum(distance * distance, axis=0) + apart * apart * count * share
            centre += apart * share
            count += new
    if MOMENTS:
        own = found + tl.program_id(0) * 2 * channels + channel
        tl.store(own, centre, mask=exists)
        tl.store(own + channels, spread, mask=exists)


@triton.jit(do_not_specialize=["rows", "programs", "each"])
def _join(  # type: ignore[no-untyped-def]
    found, mean, var, running_mean, running_var, momentum, rows, channels, programs, each,
    PROGRAMS: tl.constexpr, COLUMNS: tl.constexpr, RUNNING: tl.constexpr,
) -> None:  # fmt: skip
    """mean and biased var [channels] of all rows from what each program found about its `each` rows; with RUNNING the
    running statistics follow them."""
    channel = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    program = tl.arange(0, PROGRAMS)
    place, inside = _place(program * 2, programs * 2, channel, channels)
    centre = tl.load(found + place, mask=inside, other=0.0)
    spread = tl.load(found + place + channels, mask=inside, other=0.0)
    count = tl.minimum(tl.maximum(rows - program.to(tl.int64) * each, 0), each).to(tl.float32)[:, None]
    whole = tl.sum(centre * count, axis=0) / rows
    distance = tl.where(inside, centre - whole[None, :], 0.0)
    total = tl.sum(spread + distance * distance * count, axis=0)
    exists = channel < channels
    tl.store(mean + channel, whole, mask=exists)
    tl.store(var + channel, total / rows, mask=exists)
    if RUNNING:
        old = tl.load(running_mean + channel, mask=exists, other=0.0).to(tl.float32)
        tl.store(running_mean + channel, old + momentum * (whole - old), mask=exists)
        old = tl.load(running_var + channel, mask=exists, other=0.0).to(tl.float32)
        tl.store(running_var + channel, old + momentum * (total / (rows - 1) - old), mask=exists)


@triton.jit(do_not_specialize=["rows", "tiles"])
def _gradient(  # type: ignore[no-untyped-def]
    grad, x, out, weight, var, mean, grad_mean, grad_var, rows, channels, tiles, eps,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, AFFINE: tl.constexpr, MOMENTS: tl.constexpr,
) -> None:  # fmt: skip
    """out = grad times the norm's scale; with MOMENTS and what reaches x [rows, channels] through its moments."""
    channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    exists = channel < channels
    scale = _scale(weight, var, channel, exists, eps, AFFINE)
    if MOMENTS:
        slope = tl.load(grad_var + channel, mask=exists, other=0.0) * 2 / rows
        offset = tl.load(grad_mean + channel, mask=exists, other=0.0) / rows
        middle = tl.load(mean + channel, mask=exists, other=0.0)
    first = tl.program_id(0).to(tl.int64) * tiles * ROWS
    for tile in range(tiles):
        place, inside = _place(first + tile * ROWS + tl.arange(0, ROWS), rows, channel, channels)
        value = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32) * scale[None, :]
        if MOMENTS:
            distance = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) - middle[None, :]
            value += distance * slope[None, :] + offset[None, :]
        tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "tiles"])
def _sums(  # type: ignore[no-untyped-def]
    grad, x, mean, found, rows, channels, tiles,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    """The sums over this program's rows of grad, and of grad times the distance of x from its mean."""
    channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    exists = channel < channels
    centre = tl.load(mean + channel, mask=exists, other=0.0)
    plain = tl.zeros([COLUMNS], tl.float32)
    along = tl.zeros([COLUMNS], tl.float32)
    first = tl.program_id(0).to(tl.int64) * tiles * ROWS
    for tile in range(tiles):
        place, inside = _place(first + tile * ROWS + tl.arange(0, ROWS), rows, channel, channels)
        value = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        plain += tl.sum(value, axis=0)
        along += tl.sum(value * (tl.load(x + place, mask=inside, other=0.0).to(tl.float32) - centre[None, :]), axis=0)
    own = found + tl.program_id(0) * 2 * channels + channel
    tl.store(own, plain, mask=exists)
    tl.store(own + channels, along, mask=exists)


@triton.jit(do_not_specialize=["programs"])
def _join_sums(  # type: ignore[no-untyped-def]
    found, weight, var, grads, channels, programs, eps,
    PROGRAMS: tl.constexpr, COLUMNS: tl.constexpr, AFFINE: tl.constexpr,
) -> None:  # fmt: skip
    """grads [4, channels]: of the weight and of the bias, and of the mean and of the variance of what is normed."""
    channel = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    exists = channel < channels
    program = tl.arange(0, PROGRAMS)
    place, inside = _place(program * 2, programs * 2, channel, channels)
    inverse = tl.rsqrt(tl.load(var + channel, mask=exists, other=1.0) + eps)
    of_bias = tl.sum(tl.load(found + place, mask=inside, other=0.0), axis=0)
    of_weight = tl.sum(tl.load(found + place + channels, mask=inside, other=0.0), axis=0) * inverse
    scale = inverse
    if AFFINE:
        scale *= tl.load(weight + channel, mask=exists, other=0.0).to(tl.float32)
    tl.store(grads + channel, of_weight, mask=exists)
    tl.store(grads + channels + channel, of_bias, mask=exists)
    tl.store(grads + 2 * channels + channel, -scale * of_bias, mask=exists)
    tl.store(grads + 3 * channels + channel, -scale * inverse * of_weight / 2, mask=exists)


def fits(x: Tensor, norm: Any) -> bool:
    """Whether x [B, C] or [B, C, H, W] is stored row by row of channels, in a dtype of at most 32 bits, and norm is a
    batch norm of C channels with running statistics."""
    narrow = x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    stored = norm.running_mean is not None and norm.running_mean.shape == x.shape[1:2]
    whole = (norm.weight is None) == (norm.bias is None)
    by_row = x.dim() in (2, 4) and x.numel() > 0 and x.is_contiguous(memory_format=_layout(x))
    return by_row and narrow and stored and whole


def _layout(x: Tensor) -> torch.memory_format:
    return torch.channels_last if x.dim() == 4 else torch.contiguous_format


def _by_row(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=_layout(x))


def normalise(x: Tensor, norm: Any, moments: bool) -> tuple[Tensor, Moments | None]:
    """A fixed batch norm of x (see fits), and with moments the mean and biased variance [C] of x in float32."""
    rows = _Rows(x)
    found = rows.room() if moments else None
    y = rows.normed(x, norm, norm.running_mean, norm.running_var, found)
    return y, None if found is None else rows.moments(found)


def gradient(grad: Tensor, norm: Any, x: Tensor | None = None, *of_moments: Tensor) -> Tensor:
    """The input gradient of a fixed batch norm from its output's; of x with its moments too, of_moments being x's mean
    and the gradients of its mean and of its variance, each [C] in float32."""
    return _Rows(grad).input_gradient(grad, norm, norm.running_var, x, *(each.contiguous() for each in of_moments))


def learn(x: Tensor, norm: Any) -> tuple[Tensor, Tensor, Tensor]:
    """A batch norm of x in training, whose running statistics follow: its output, x's mean and biased variance."""
    rows = _Rows(x)
    found = rows.room()
    nothing = dict.fromkeys(("y", "weight", "bias", "mean", "var"))
    rows.start(_normalise, x=x, found=found, **nothing, eps=0.0, AFFINE=False, NORM=False, MOMENTS=True)
    mean, var = rows.moments(found, norm)
    return rows.normed(x, norm, mean, var), mean, var


def learn_gradients(grad: Tensor, x: Tensor, norm: Any, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the gradient of learn's output gives x, the norm's weight and its bias."""
    rows, grad = _Rows(grad), _by_row(grad)
    found, grads = rows.room(), x.new_empty((4, rows.channels), dtype=torch.float32)
    rows.start(_sums, grad=grad, x=x, mean=mean, found=found)
    given = {"found": found, "weight": norm.weight, "var": var, "grads": grads}
    sizes = {"channels": rows.channels, "programs": rows.programs}
    rows.join(_join_sums, **given, **sizes, eps=norm.eps, AFFINE=norm.weight is not None)
    of_weight, of_bias, of_mean, of_var = grads
    return rows.input_gradient(grad, norm, var, x, mean, of_mean, of_var), of_weight, of_bias


class _Rows:
    """Maps as rows of channels, and how they are divided: programs of `tiles` tiles each."""

    def __init__(self, maps: Tensor) -> None:
        self.device, self.channels = maps.device, maps.shape[1]
        self.rows = maps.numel() // self.channels
        columns = min(WIDEST, triton.next_power_of_2(self.channels))
        height = VALUES // columns
        self.tiles = triton.cdiv(self.rows, height * PROGRAMS)
        self.each = self.tiles * height
        self.programs = triton.cdiv(self.rows, self.each)
        self.sizes = {"rows": self.rows, "channels": self.channels, "tiles": self.tiles}
        self.sizes |= {"ROWS": height, "COLUMNS": columns}
        self.grid = (self.programs, triton.cdiv(self.channels, columns))

    def start(self, kernel: Any, **given: Any) -> None:
        """Run a kernel over all rows."""
        kernel[self.grid](**given, **self.sizes)

    def join(self, kernel: Any, **given: Any) -> None:
        """Run a kernel over the channels that joins what the programs found."""
        kernel[(triton.cdiv(self.channels, JOINED),)](**given, PROGRAMS=PROGRAMS, COLUMNS=JOINED)

    def room(self) -> Tensor:
        """Two numbers a channel for what each program finds."""
        return torch.empty((self.programs, 2, self.channels), dtype=torch.float32, device=self.device)

    def normed(self, x: Tensor, norm: Any, mean: Tensor, var: Tensor, found: Tensor | None = None) -> Tensor:
        """The norm of x with these statistics; with room for it, what x's moments are joined from."""
        y = torch.empty_like(x)
        given = {"x": x, "y": y, "weight": norm.weight, "bias": norm.bias, "mean": mean, "var": var, "found": found}
        flags = {"AFFINE": norm.weight is not None, "NORM": True, "MOMENTS": found is not None}
        self.start(_normalise, **given, eps=norm.eps, **flags)
        return y

    def moments(self, found: Tensor, norm: Any = None) -> Moments:
        """Mean and biased variance [C]; the running statistics of a norm that learns follow them."""
        mean, var = torch.empty((2, self.channels), dtype=torch.float32, device=self.device)
        running = ("running_mean", "running_var", "momentum")
        given = {name: getattr(norm, name) for name in running} if norm is not None else dict.fromkeys(running)
        sizes = {"rows": self.rows, "channels": self.channels, "programs": self.programs, "each": self.each}
        self.join(_join, found=found, mean=mean, var=var, **given, **sizes, RUNNING=norm is not None)
        return mean, var

    def input_gradient(self, grad: Tensor, norm: Any, var: Tensor, x: Tensor | None, *of_moments: Tensor) -> Tensor:
        """What reaches the norm's input from the gradient of its output, and through the input's moments."""
        grad = _by_row(grad)
        out = torch.empty_like(grad)
        given = {"grad": grad, "x": x, "out": out, "weight": norm.weight, "var": var}
        given |= dict(zip(("mean", "grad_mean", "grad_var"), of_moments or [None] * 3))
        self.start(_gradient, **given, eps=norm.eps, AFFINE=norm.weight is not None, MOMENTS=bool(of_moments))
        return out
