"""CUDA graphs: what every step calls in the same shapes is recorded once, and replayed with one launch."""

import gc
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dfkd.errors import in_a_line
from dfkd.runtime import Shard, say

Outputs = tuple[Tensor, ...]
Function = Callable[..., Outputs]
ROOM = 0.5  # share of the GPU's memory that must be free: a graph keeps what a call would give back
WARMUPS = 3  # calls before recording, as torch.cuda.make_graphed_callables has them


class Calls:
    """How the steps call what may be recorded: as it is."""

    def call(self, key: tuple[str, ...], network: nn.Module | None, function: Function, *inputs: Tensor) -> Outputs:
        """function(*inputs), differentiable."""
        return function(*inputs)

    def learn(self, key: tuple[str, ...], network: nn.Module, function: Function, *inputs: Tensor) -> Outputs:
        """function(*inputs), detached, of which the first is a loss; leaves its gradients in the network's parameters,
        in place of any that were there."""
        return _learn(network, function, inputs)

    def forget(self) -> None:
        """Give back what was recorded: the steps are over."""


def _learn(network: nn.Module, function: Function, inputs: Sequence[Tensor]) -> Outputs:
    for parameter in network.parameters():
        parameter.grad = None
    outputs = function(*inputs)
    outputs[0].backward()
    return tuple(output.detach() for output in outputs)


DIRECT = Calls()


class _Recorded(nn.Module):
    """A function together with the network whose parameters take gradients."""

    def __init__(self, function: Function, network: nn.Module) -> None:
        super().__init__()
        self.function, self.network = function, network

    def forward(self, *inputs: Tensor) -> Outputs:
        return self.function(*inputs)


class Graphs(Calls):
    """Calls functions as CUDA graphs, recorded at the first call of their key: forward, and backward if any.

    Small networks ask a GPU for thousands of short kernels a step, and launching them takes longer than they do. A
    function takes tensors and returns a tuple of them. It must depend on these and on memory that stays where it is,
    and do nothing else: Python in it runs a few times, while it is recorded, and not again. `network` is the one whose
    parameters take its gradients (None: there is none); buffers that its forwards update are put back after recording.
    A key names a function for good: what owns the functions has Graphs of its own. Keys that begin alike may share
    memory, so their forwards and backwards must take turns. What cannot be recorded, or would leave less than ROOM of
    the GPU's memory, is called as it is from then on, and that is said.
    """

    def __init__(self) -> None:
        self.recorded: dict[Hashable, Function | None] = {}  # None: called as it is
        self.pools: dict[str, Any] = {}

    def call(self, key: tuple[str, ...], network: nn.Module | None, function: Function, *inputs: Tensor) -> Outputs:
        def record(samples: tuple[Tensor, ...], pool: Any) -> Function:
            whole = function if network is None else _Recorded(function, network)
            return torch.cuda.make_graphed_callables(whole, samples, allow_unused_input=True, pool=pool)  # type: ignore

        return self._replayed(key, network, function, record, inputs)

    def learn(self, key: tuple[str, ...], network: nn.Module, function: Function, *inputs: Tensor) -> Outputs:
        def record(samples: tuple[Tensor, ...], pool: Any) -> Function:
            return _record_learning(network, function, samples, pool)

        return self._replayed(key, network, lambda *inputs: _learn(network, function, inputs), record, inputs)

    def _replayed(
        self,
        key: tuple[str, ...],
        network: nn.Module | None,
        plain: Function,
        record: Callable[[tuple[Tensor, ...], Any], Function],
        inputs: tuple[Tensor, ...],
    ) -> Outputs:
        layout = tuple((x.shape, x.stride(), x.dtype, x.requires_grad) for x in inputs)
        place = (key, network is not None and network.training, torch.is_grad_enabled(), layout)
        if place not in self.recorded:
            self.recorded[place] = self._record(key, network, record, inputs)
        if (replay := self.recorded[place]) is None:
            return plain(*inputs)
        # Copies, since the next replay, also of one that shares the memory, overwrites what this one left.
        return tuple(output.clone() for output in replay(*inputs))

    def forget(self) -> None:
        self.recorded.clear()
        self.pools.clear()
        gc.collect()  # torch's graphed callables refer to themselves: their memory would stay

    def _record(
        self,
        key: tuple[str, ...],
        network: nn.Module | None,
        record: Callable[[tuple[Tensor, ...], Any], Function],
        inputs: tuple[Tensor, ...],
    ) -> Function | None:
        device = inputs[0].device
        free, total = torch.cuda.mem_get_info(device)
        if free < ROOM * total:
            say(f"{' '.join(key)} goes without a CUDA graph, which is slower: {free / 1e9:.1f} GB of the GPU are free")
            return None
        pool = self.pools.setdefault(key[0], torch.cuda.graph_pool_handle())
        samples = tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in inputs)
        buffers = list(network.buffers()) if network is not None else []
        kept, random = [buffer.clone() for buffer in buffers], torch.cuda.get_rng_state(device)
        collects = gc.isenabled()
        gc.disable()  # an older graph that is collected meanwhile would spoil the recording
        try:
            with torch.cuda.stream(torch.cuda.current_stream(device)):  # a recording that fails may leave another one
                return record(samples, pool)
        except RuntimeError as error:  # it waits for the host, say
            reason = in_a_line(error)
            say(f"{' '.join(key)} could not be recorded as a CUDA graph ({reason}) and goes without: it is slower")
            return None
        finally:
            if collects:
                gc.enable()
            with torch.no_grad():
                for buffer, value in zip(buffers, kept):
                    buffer.copy_(value)
            torch.cuda.set_rng_state(random, device)


def _record_learning(network: nn.Module, function: Function, samples: tuple[Tensor, ...], pool: Any) -> Function:
    """One graph of forward and backward: unlike make_graphed_callables' it spares autograd a visit per parameter."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARMUPS):
            _learn(network, function, samples)
    torch.cuda.current_stream().wait_stream(side)
    for parameter in network.parameters():
        parameter.grad = None  # so that they are made in the graph's memory
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        outputs = _learn(network, function, samples)
    gradients = [(parameter, parameter.grad) for parameter in network.parameters()]

    def replay(*inputs: Tensor) -> Outputs:
        for sample, given in zip(samples, inputs):
            sample.copy_(given)
        graph.replay()
        for parameter, gradient in gradients:
            parameter.grad = gradient
        return outputs

    return replay


def recorder(wanted: bool, shard: Shard) -> Calls:
    """Graphs where they are wanted and serve, on a GPU and with one process; else DIRECT."""
    return Graphs() if wanted and shard.device.type == "cuda" and shard.world == 1 else DIRECT
