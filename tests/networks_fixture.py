"""Networks for the tests of models and compression: untrained, with batch norms that differ by channel."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd.errors import UserError
from dfkd.models import build_model
from dfkd.teachers import batch_norms
from generators import ImageGenerator


def vary(network: nn.Module, seed: int = 0, low: float = 0.5) -> nn.Module:
    """Give batch norms random statistics, shifts, and scales from `low` to `low` + 1; in eval mode."""
    rng = torch.Generator().manual_seed(seed)
    for norm in batch_norms(network).values():
        for tensor, least in (
            (norm.running_mean, -0.5),
            (norm.running_var, 0.5),
            (norm.weight, low),
            (norm.bias, -0.5),
        ):
            tensor.detach().copy_(torch.rand(tensor.shape, generator=rng) + least)
    return network.eval()


def named(spec: str, channels: int = 1, classes: int = 3, low: float = 0.5, **kwargs: Any) -> nn.Module:
    """The network of a model string, the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return vary(build_model(spec, classes=classes, channels=channels, kwargs=kwargs), low=low)


def images(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform in [0, 1]."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Functional(nn.Module):
    """What users write: functional activations and pools, sizes read from tensors, an argument with a default."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv3, self.norm3 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.head = nn.Linear(6 * 4, 3)

    def forward(self, x: Tensor, features: bool = False) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm1(self.conv1(x))), 2)
        x = torch.relu(self.norm2(self.conv2(x)))
        x = torch.add(self.norm3(self.conv3(x)), x).relu()
        x = F.max_pool2d(x, 2)
        x = x.view(x.size(0), -1)
        return x if features else self.head(x)


def functional() -> nn.Module:
    """A Functional for images [B, 1, 8, 8], the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return vary(Functional())


def error_line(function: Callable[..., object], *arguments: Any, **options: Any) -> str:
    """The one line of the error that a call ends in."""
    with pytest.raises(UserError) as caught:
        function(*arguments, **options)
    line = str(caught.value)
    assert "\n" not in line
    return line


def same(found: Tensor, wanted: Tensor) -> None:
    assert wanted.abs().max() > 1e-3
    assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-10)


class Small(nn.Module):
    """Layers by name, and a forward given as a function of them."""

    def __init__(self, forward: Any, **layers: nn.Module) -> None:
        super().__init__()
        self.run = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


KNOWN_CLASSES = 50


class Knows(ImageGenerator):
    """Draws the classes below `known` as asked, and class 0 for all others; a pixel in row k // 10, column k % 10."""

    keys = ("classes",)
    latent, classes, channels, conditional = 2, KNOWN_CLASSES, 1, True

    def __init__(self, known: int) -> None:
        super().__init__()
        self.known = known
        self.register_buffer("one", torch.ones(()))

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        drawn = torch.where(labels < self.known, labels, 0)
        return F.one_hot(drawn, 100).float().view(-1, 1, 10, 10)


class Says(nn.Module):
    """Names the class of an image's white pixel, or the `turn`-th one after it."""

    def __init__(self, turn: int = 0) -> None:
        super().__init__()
        self.turn = turn

    def forward(self, images: Tensor) -> Tensor:
        return 10 * images.flatten(1)[:, :KNOWN_CLASSES].roll(self.turn, 1)
