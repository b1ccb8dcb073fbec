"""What every generator of the table is to the rest of the project."""

from collections.abc import Sequence
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class ImageGenerator(nn.Module):
    """latents [B, latent] and labels [B] int64 -> images [B, channels, size, size] in [0, 1].

    description is what built it, or generator.json where it was loaded; `keys` are those of it that build the generator
    again, `older` what files from before a key existed had of it.
    Convolutions and linear layers before a batch norm have no bias: its gradient is rounding noise, which Adam would
    blow up to full steps.
    """

    keys: ClassVar[tuple[str, ...]]
    older: ClassVar[dict[str, Any]] = {}
    latent: int
    classes: int
    channels: int
    conditional: bool  # whether it draws the class that is asked for
    description: dict[str, Any]

    @property
    def device(self) -> torch.device:
        """Where its weights or images are."""
        return next(chain(self.parameters(), self.buffers())).device

    def first_layers(self) -> list[nn.Module]:
        """The layers that decide what is drawn for which latent and label: drawn anew by `synthesis.redraw`."""
        raise TypeError(
            f"{type(self).__name__} names no first layers; give it first_layers() or set synthesis.redraw=0"
        )

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        """Draw images."""
        raise TypeError(f"{type(self).__name__} has no forward")


def per_channel(values: Sequence[float], default: float, channels: int) -> list[float]:
    """One value for each channel, the default where none is given. Raises ValueError for another number of them."""
    if values and len(values) != channels:
        raise ValueError(f"mean and std of a generator are one value a channel, of {channels}; got {list(values)}")
    return list(values) or [default] * channels


class _InwardClamp(torch.autograd.Function):
    """Clamp to [0, 1]. A value outside takes the gradient that leads it back, so that saturated pixels can return, and
    none that leads further out: there it would grow without any effect, and the head's scale with it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        outward = ((x > 1) & (grad < 0)) | ((x < 0) & (grad > 0))  # descent goes against the gradient
        return grad.masked_fill(outward, 0)


def inward_clamp(x: Tensor) -> Tensor:
    """x clamped to [0, 1]; beyond it only the gradient passes that leads back."""
    return _InwardClamp.apply(x)
