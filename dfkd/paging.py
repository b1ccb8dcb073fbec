"""Networks that take turns on a device which does not hold them all."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from itertools import chain
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from dfkd.errors import UserError


class Paged(Protocol):
    """What takes part: a network, and who brings it; None where it is on the device for good."""

    model: nn.Module
    pager: Pager | None


T = TypeVar("T", bound=Paged)


class Pager:
    """Keeps frozen networks in the host's memory, and on the device as many as `budget` bytes hold, the last used.

    A network is brought by `fetch`, at the cost of the one used longest ago. It must not leave between its forward and
    its backward, which needs its weights, so the network fetched last always stays.
    """

    def __init__(self, device: torch.device, budget: float) -> None:
        self.device, self.budget = device, budget
        self.home: dict[nn.Module, list[Tensor]] = {}  # what is in the host's memory
        self.present: OrderedDict[nn.Module, torch.cuda.Event | None] = OrderedDict()  # the last used last
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def add(self, network: nn.Module, name: str) -> None:
        """Take in a network, which is on the host. Raises UserError where it exceeds the budget by itself."""
        tensors = _tensors(network)
        # The copy engine reads pinned memory while the device computes.
        self.home[network] = [t.data.pin_memory() if self.stream else t.data for t in tensors]
        if (size := self.size(network)) > self.budget:
            raise UserError(
                f"teacher {name} takes {size / 1e9:.3g} GB of the device where zoo.memory_gb={self.budget / 1e9:g}; "
                "set it to that or more, or to 0 for no limit"
            )
        self._leave(network)

    def size(self, network: nn.Module) -> int:
        """Bytes of a network that was taken in."""
        return sum(t.numel() * t.element_size() for t in self.home[network])

    def fetch(self, network: nn.Module, following: nn.Module | None = None) -> None:
        """Have a network on the device before whatever is queued there next, and begin to bring the following one,
        where both fit, while the device computes."""
        self._bring(network)
        self.present.move_to_end(network)
        if (arrived := self.present[network]) is not None:
            torch.cuda.current_stream(self.device).wait_event(arrived)
        if following is not None and self.size(network) + self.size(following) <= self.budget:
            self._bring(following)
            self.present.move_to_end(network)

    def _bring(self, network: nn.Module) -> None:
        """Begin to copy a network to the device, where it is not; those used longest ago make room."""
        if network in self.present:
            return
        used = sum(map(self.size, self.present))
        while used + self.size(network) > self.budget:
            oldest, arrived = self.present.popitem(last=False)
            used -= self.size(oldest)
            if arrived is not None:  # it may be on its way still: its memory must not be reused under the copy
                torch.cuda.current_stream(self.device).wait_event(arrived)
            self._leave(oldest)
        # Allocated and freed in the order of the stream that computes, so that no kernel still reads what is reused.
        copies = [torch.empty_like(t, device=self.device) for t in self.home[network]]
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream) if self.stream is not None else nullcontext():
            for there, here in zip(copies, self.home[network]):
                there.copy_(here, non_blocking=True)
            self.present[network] = self.stream.record_event() if self.stream is not None else None
        for tensor, there in zip(_tensors(network), copies):
            tensor.data = there

    def _leave(self, network: nn.Module) -> None:
        for tensor, here in zip(_tensors(network), self.home[network]):
            tensor.data = here


def _tensors(network: nn.Module) -> list[Tensor]:
    return list(chain(network.parameters(), network.buffers()))


def in_turn(zoo: Iterable[T], after: T | None = None) -> Iterator[T]:
    """Networks one by one, each on the device while it is its turn; the next one, at last `after`, is on its way."""
    members = list(zoo)
    for one, following in zip(members, [*members[1:], after]):
        if one.pager is not None:
            one.pager.fetch(one.model, following.model if following is not None else None)
        yield one
