"""Batch statistics, and batch norms with fixed ones, each in as few passes over memory as torch's kernels allow.

On a GPU they can be Triton kernels of our own, and so can batch norms in training (norm_kernels.py).
"""

import importlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from dfkd.errors import UserError, in_a_line

Moments = tuple[Tensor, Tensor]
TORCHS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)  # whose forward is known to be the norm and nothing else
PLAIN: set[type[nn.Module]] = {*TORCHS}  # likewise in eval mode; collectives.py adds its own, which else synchronises
_active: Any = None  # the module of Triton kernels, within triton_norms


def check_triton(device: torch.device) -> None:
    """Raise UserError where Triton's kernels do not run on a GPU."""
    try:
        with triton_norms(True):
            _active.normalise(torch.ones(2, 2, device=device), nn.BatchNorm1d(2, device=device), moments=True)
    except Exception as error:  # whatever a missing package or compiler, or an old GPU, leads to
        raise UserError(
            "runtime.triton=true, but Triton does not work here "
            f"({type(error).__name__}: {in_a_line(error)}); install triton and a C compiler, or set "
            "runtime.triton=false"
        ) from None


@contextmanager
def triton_norms(wanted: bool) -> Iterator[None]:
    """Where wanted, have frozen_norms, learning_norms and the generator's batch norms take Triton's kernels in its
    scope, for what these take (see norm_kernels.fits)."""
    global _active
    before = _active
    if wanted:
        _active = importlib.import_module("dfkd.norm_kernels")  # here, for Triton is not everywhere
    try:
        yield
    finally:
        _active = before


def _kernels(x: Tensor, norm: nn.Module) -> Any:
    """The module of Triton kernels where they are to be taken and take a norm of x, else None."""
    return _active if _active is not None and _active.fits(x, norm) else None


def per_channel(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """scale * x + shift with scale and shift [C] in float32, x [B, C, ...]; without gradient.

    It is the eval-mode batch norm of mean 0 and variance 1: one kernel that keeps x's dtype and layout, where addcmul
    with operands broadcast over the pixels takes 2 (32 channels) to 11 times (16 channels) as long in bfloat16.
    """
    return torch.native_batch_norm(x, scale, shift, _constant(0, scale), _constant(1, scale), False, 0.0, 0.0)[0]


def _constant(value: float, like: Tensor) -> Tensor:
    return _filled(value, len(like), like.dtype, like.device)


@cache
def _filled(value: float, channels: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Made once: on a GPU filling takes as long as many a computation on so few numbers."""
    return torch.full((channels,), value, dtype=dtype, device=device)


def _moments(x: Tensor) -> Moments:
    dtype = torch.promote_types(x.dtype, torch.float32)
    mean, var = torch.zeros(2, x.shape[1], dtype=dtype, device=x.device)
    # Momentum 1 leaves the batch's own moments in the buffers, in float32 also where x is bfloat16.
    torch.batch_norm_update_stats(x, mean, var, 1.0)
    count = x.numel() // x.shape[1]
    return mean, var * ((count - 1) / count)


def _moments_backward(x: Tensor, mean: Tensor, grad_mean: Tensor, grad_var: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of moments is slope * x + offset: slope and offset [C]."""
    count = x.numel() // x.shape[1]
    slope = grad_var * (2 / count)
    return slope, torch.addcmul(grad_mean / count, slope, mean, value=-1)


class _BatchMoments(torch.autograd.Function):
    """Mean and biased variance per channel in one read of x forward and one fused pass backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Moments:
        mean, var = _moments(x)
        ctx.save_for_backward(x, mean)
        return mean, var

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        return per_channel(x, *_moments_backward(x, mean, *grads))


def batch_moments(x: Tensor) -> Moments:
    """Mean and biased variance [C] (float32 or better) of x [B, C, ...] over all but the channels, of this process.

    Raises ValueError where there is one value per channel: it has no variance.
    """
    _refuse_single(x)
    if torch.compiler.is_compiling():  # which fuses what is written plainly, and could not look into the kernels above
        dims = [d for d in range(x.dim()) if d != 1]
        var, mean = torch.var_mean(x.to(torch.promote_types(x.dtype, torch.float32)), dims, correction=0)
        return mean, var
    return _BatchMoments.apply(x)


def _refuse_single(x: Tensor) -> None:
    if x.numel() <= x.shape[1]:
        raise ValueError(f"batch statistics of {tuple(x.shape)} need more than one value per channel")


def _normalised(x: Tensor, norm: Any) -> Tensor:
    stored = (norm.running_mean, norm.running_var)
    return torch.native_batch_norm(x, norm.weight, norm.bias, *stored, False, 0.0, norm.eps)[0]


def _scaled(grad: Tensor, norm: Any, offset: Tensor | None = None) -> Tensor:
    """A gradient times the scale of a fixed norm, and offset [C] added: that norm about 0."""
    zero = _constant(0, norm.running_var)
    offset = zero if offset is None else offset
    return torch.native_batch_norm(grad, norm.weight, offset, zero, norm.running_var, False, 0.0, norm.eps)[0]


class _FrozenNorm(torch.autograd.Function):
    """A batch norm of fixed statistics and weights. torch's backward also sums what only their gradients need, which
    takes 1.5 to 5 times as long as the scaling that is left, and it keeps x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: nn.Module) -> Tensor:
        ctx.norm, ctx.kernels = norm, _kernels(x, norm)
        return ctx.kernels.normalise(x, norm, moments=False)[0] if ctx.kernels else _normalised(x, norm)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.kernels.gradient(grad, ctx.norm) if ctx.kernels else _scaled(grad, ctx.norm), None


class _TappedNorm(torch.autograd.Function):
    """The same, with the moments of its input, whose gradient shares the passes of the norm's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        ctx.norm, ctx.kernels = norm, _kernels(x, norm)
        if ctx.kernels:
            y, (mean, var) = ctx.kernels.normalise(x, norm, moments=True)
        else:
            (mean, var), y = _moments(x), _normalised(x, norm)
        ctx.save_for_backward(x, mean)
        return y, mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        x, mean = ctx.saved_tensors
        if ctx.kernels:
            return ctx.kernels.gradient(grads[0], ctx.norm, x, mean, *grads[1:]), None
        slope, offset = _moments_backward(x, mean, *grads[1:])
        result = _scaled(grads[0], ctx.norm, offset)
        if x.dtype == slope.dtype:
            return result.addcmul_(x, slope.view(-1, *[1] * (x.dim() - 2))), None
        return result.add_(per_channel(x, slope, _constant(0, slope))), None


class _LearningNorm(torch.autograd.Function):
    """A batch norm in training, in Triton's kernels."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: nn.Module, kernels: Any
    ) -> Tensor:
        ctx.norm, ctx.kernels = norm, kernels
        y, mean, var = kernels.learn(x, norm)
        ctx.save_for_backward(x, mean, var)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, mean, var = ctx.saved_tensors
        of_x, *of_affine = ctx.kernels.learn_gradients(grad, x, ctx.norm, mean, var)
        return of_x, *(of_affine if ctx.norm.weight is not None else (None, None)), None, None


def learning_norm(norm: Any, x: Tensor) -> Tensor:
    """A batch norm's output in training, of this process's x alone; its running statistics are updated."""
    kernels = None if torch.compiler.is_compiling() or norm.momentum is None else _kernels(x, norm)
    if kernels is None:
        return _BatchNorm.forward(norm, x)
    _refuse_single(x)
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    return _LearningNorm.apply(x, norm.weight, norm.bias, norm, kernels)


def _forward(norm: nn.Module, collect: Callable[[nn.Module, Moments], object] | None, x: Tensor) -> Tensor:
    if torch.compiler.is_compiling():  # as in batch_moments
        if collect is not None:
            collect(norm, batch_moments(x))
        return _normalised(x, norm)
    if collect is None:
        return _FrozenNorm.apply(x, norm)
    _refuse_single(x)
    y, *moments = _TappedNorm.apply(x, norm)
    collect(norm, tuple(moments))
    return y


@contextmanager
def frozen_norms(
    norms: Iterable[nn.Module], collect: Callable[[nn.Module, Moments], object] | None = None
) -> Iterator[None]:
    """Have batch norms that are in eval mode and take no gradient run faster in its scope, and collect(norm, (mean,
    var)) see the moments [C] of each one's input. Outputs are the same, up to rounding where torch takes cuDNN.

    A norm that trains, or of a kind that is not known, runs as it is and is looked at by a hook. Nothing outlives it.
    """
    changed: list[nn.Module] = []
    handles = []
    for norm in norms:
        fixed = not norm.training and not any(p.requires_grad for p in norm.parameters())
        if type(norm) in PLAIN and fixed and "forward" not in vars(norm):
            norm.forward = partial(_forward, norm, collect)  # type: ignore[method-assign]
            changed.append(norm)
        elif collect is not None:
            look = lambda norm, inputs: collect(norm, batch_moments(inputs[0]))  # noqa: E731
            handles.append(norm.register_forward_pre_hook(look))
    try:
        yield
    finally:
        for norm in changed:
            del norm.forward
        for handle in handles:
            handle.remove()


@contextmanager
def learning_norms(norms: Iterable[nn.Module]) -> Iterator[None]:
    """Within triton_norms, have torch's batch norms that train take its kernels in this scope. Nothing outlives it."""
    taken = norms if _active is not None else []
    changed = [norm for norm in taken if type(norm) in TORCHS and norm.training and "forward" not in vars(norm)]
    for norm in changed:
        norm.forward = partial(learning_norm, norm)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for norm in changed:
            del norm.forward
