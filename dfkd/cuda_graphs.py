"""CUDA graphs: what every step calls in the same shapes is recorded once, and replayed with one launch."""

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from dfkd.runtime import Shard, say

Outputs = tuple[Tensor, ...]
Function = Callable[..., Outputs]
Call = Callable[..., Outputs]  # with the arguments of plain


def plain(key: tuple[str, ...], network: nn.Module | None, function: Function, *inputs: Tensor) -> Outputs:
    """function(*inputs) as it is: what Graphs does, where there is nothing to record."""
    return function(*inputs)


class _Recorded(nn.Module):
    """A function together with the network whose parameters take gradients."""

    def __init__(self, function: Function, network: nn.Module) -> None:
        super().__init__()
        self.function, self.network = function, network

    def forward(self, *inputs: Tensor) -> Outputs:
        return self.function(*inputs)


class Graphs:
    """Calls a function of tensors, forward and backward, as CUDA graphs recorded at the first call of its key.

    Small networks ask a GPU for thousands of short kernels a step, and launching them takes longer than they do. A
    function takes tensors and returns a tuple of them. It must depend on these and on memory that stays where it is,
    and do nothing else: Python in it runs once. `network` is the one whose parameters take its gradients (None: there
    is none); buffers that its forwards update are put back after recording. Keys that begin alike share memory, so
    their forwards and backwards must take turns. What cannot be recorded is called as it is from then on, and that is
    said once.
    """

    def __init__(self) -> None:
        self.known: dict[Hashable, Function] = {}
        self.pools: dict[str, Any] = {}

    def __call__(self, key: tuple[str, ...], network: nn.Module | None, function: Function, *inputs: Tensor) -> Outputs:
        shapes = tuple((x.shape, x.dtype, x.requires_grad) for x in inputs)
        full = (key, network is not None and network.training, torch.is_grad_enabled(), shapes)
        if full not in self.known:
            self.known[full] = self._recorded(key, network, function, inputs)
        return self.known[full](*inputs)

    def _recorded(
        self, key: tuple[str, ...], network: nn.Module | None, function: Function, inputs: tuple[Tensor, ...]
    ) -> Function:
        device = inputs[0].device
        pool = self.pools.setdefault(key[0], torch.cuda.graph_pool_handle())
        samples = tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in inputs)
        buffers = list(network.buffers()) if network is not None else []
        kept, random = [buffer.clone() for buffer in buffers], torch.cuda.get_rng_state(device)
        whole = function if network is None else _Recorded(function, network)
        try:
            graphed = torch.cuda.make_graphed_callables(whole, samples, allow_unused_input=True, pool=pool)
        except RuntimeError as error:  # it waits for the host, say
            reason = " ".join(str(error).split())[:200]
            say(f"{' '.join(key)} could not be recorded as a CUDA graph ({reason}) and goes without: it is slower")
            return function
        finally:
            with torch.no_grad():
                for buffer, value in zip(buffers, kept):
                    buffer.copy_(value)
            torch.cuda.set_rng_state(random, device)

        def replay(*inputs: Tensor) -> Outputs:
            # Copies, since the next replay, also of one that shares the memory, overwrites what this one left.
            return tuple(output.clone() for output in graphed(*inputs))  # type: ignore[union-attr]

        return replay


def recorder(wanted: bool, shard: Shard) -> Call:
    """Graphs where they are wanted and serve, on a GPU and with one process; else `plain`."""
    return Graphs() if wanted and shard.device.type == "cuda" and shard.world == 1 else plain
