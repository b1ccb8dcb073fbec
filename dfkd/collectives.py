"""Sums over all processes that gradients pass through, and a batch norm that rests on them (on any device)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dfkd.errors import UserError
from dfkd.norms import PLAIN, Moments, batch_moments, learning_norm

TORCHS_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def world_size() -> int:
    """The number of processes; 1 outside a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def agreed(answer: bool, device: torch.device) -> bool:
    """What the main process answers, for all: clocks differ."""
    return bool(broadcast(torch.tensor(int(answer), device=device)).item())


def largest(number: int, device: torch.device) -> int:
    """The largest of what the processes give."""
    if world_size() == 1:
        return number
    shared = torch.tensor(number, device=device)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return int(shared)


class _AllReduceMean(torch.autograd.Function):
    """Mean over processes. Backward sums what the processes' losses ask and divides by their number, so that the
    mean of gradients that DDP takes afterwards is the gradient of the global loss."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x)
        return x / world_size()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:  # type: ignore[override]
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad / world_size()


def all_reduce_mean(x: Tensor) -> Tensor:
    """The mean of x over processes, differentiable; x itself where there is one process."""
    return _AllReduceMean.apply(x) if world_size() > 1 else x


def global_moments(moments: list[Moments]) -> list[Moments]:
    """The moments of the global batch from those of each process (equal batch sizes), in one message for all layers."""
    if world_size() == 1:
        return moments
    # In float64, where a variance survives as the difference of two squares; joined, since few kernels then serve all.
    mean, var = (torch.cat([each[k] for each in moments]) for k in (0, 1))
    dtype, mean, var = mean.dtype, mean.double(), var.double()
    mean, second = all_reduce_mean(torch.cat([mean, var + mean.square()])).chunk(2)
    lengths = [len(each) for each, _ in moments]
    return list(zip(mean.to(dtype).split(lengths), (second - mean.square()).to(dtype).split(lengths)))


class SyncBatchNorm(_BatchNorm):
    """Batch norm over all processes' batches; unlike torch's it also runs on a CPU."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected an input [B, C, ...], got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        if world_size() == 1:
            return learning_norm(self, input)
        ((mean, var),) = global_moments([batch_moments(input)])
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            count = input.numel() // input.shape[1] * world_size()
            self.num_batches_tracked.add_(1)
            rate = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean.detach().to(self.running_mean.dtype), rate)
            unbiased = var.detach() * (count / (count - 1))
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), rate)
        weight = torch.rsqrt(var + self.eps)
        if self.weight is not None:
            weight = weight * self.weight
        shape = (1, -1, *[1] * (input.dim() - 2))
        out = (input.to(mean.dtype) - mean.view(shape)) * weight.view(shape)
        return (out if self.bias is None else out + self.bias.view(shape)).to(input.dtype)


PLAIN.add(SyncBatchNorm)


def sync_batchnorm(module: nn.Module) -> nn.Module:
    """Turn every torch batch norm of a module into one over all processes, in place; parameters stay the same ones."""
    check_synchronisable(module)
    for child in module.modules():
        if type(child) in TORCHS_NORMS:
            child.__class__ = SyncBatchNorm
    return module


def check_synchronisable(module: nn.Module) -> None:
    """Raise UserError where a module has batch norms of another kind and there are several processes."""
    for child in module.modules() if world_size() > 1 else ():
        if isinstance(child, _BatchNorm) and type(child) not in (*TORCHS_NORMS, SyncBatchNorm):
            raise UserError(
                f"{type(child).__name__} cannot be synchronised over processes; give a generator torch's own batch "
                "norms, a student those or runtime.sync_batchnorm=false"
            )


def mean_over_processes(tensors: list[Tensor]) -> None:
    """Replace tensors by their mean over processes, in place, in one message; nothing where there is one process."""
    if world_size() == 1 or not tensors:
        return
    flat = torch.cat([tensor.detach().double().reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, value in zip(tensors, (flat / world_size()).split([t.numel() for t in tensors])):
        tensor.copy_(value.view_as(tensor))


@contextmanager
def averaged(tensors: list[Tensor]) -> Iterator[None]:
    """Tensors as their mean over processes in this scope, after which each process has its own again."""
    own = [tensor.clone() for tensor in tensors]
    mean_over_processes(tensors)
    try:
        yield
    finally:
        for tensor, before in zip(tensors, own):
            tensor.copy_(before)


def all_gather(x: Tensor) -> Tensor:
    """The rows of every process's x [B, ...] in the order of ranks [world * B, ...], without gradient."""
    if world_size() == 1:
        return x.detach()
    pieces = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(pieces, x.detach().contiguous())
    return torch.cat(pieces)


def float_buffers(module: nn.Module) -> list[Tensor]:
    """The floating-point buffers of a module, with the running means and variances that differ between processes."""
    return [buffer for buffer in module.buffers() if buffer.is_floating_point()]
