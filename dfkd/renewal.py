"""Layers drawn by position: which of a generator's are drawn anew while it trains, when, and how layers are drawn."""

from collections.abc import Callable, Iterable
from copy import deepcopy

from torch import nn

from dfkd.runtime import drawn_at
from generators import ImageGenerator


def every_layer(network: nn.Module) -> list[nn.Module]:
    """The layers of a network that hold weights."""
    return [module for module in network.modules() if hasattr(module, "reset_parameters")]


RENEWED: dict[str, Callable[[ImageGenerator], list[nn.Module]]] = {
    "none": lambda generator: [],
    "first": lambda generator: generator.first_layers(),
    "all": every_layer,
}


def redraw_steps(steps: int, times: int) -> set[int]:
    """The steps at which the first layers are drawn anew: evenly over the first 80 % of training, never step 0."""
    return {round(0.8 * steps * k / times) for k in range(1, times + 1)} - {0} if times else set()


def draw_anew(modules: Iterable[nn.Module], *position: int | str) -> None:
    """Give layers that can reset their parameters new ones, by position: the same on every device."""
    with drawn_at(*position):
        for module in modules:
            fresh = deepcopy(module).cpu()
            fresh.reset_parameters()  # type: ignore[operator]
            module.load_state_dict(fresh.state_dict())  # in place: a CUDA graph reads this memory
