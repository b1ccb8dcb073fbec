"""The generator without a network: its latents are the pixels."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from generators.base import ImageGenerator, inward_clamp, per_channel


class PixelGenerator(ImageGenerator):
    """latents [B, channels * size * size], normalised pixels -> images; the labels change nothing.

    Where the latents are learned this is image inversion (DeepInversion, Yin et al. 2020); where they are not, Gaussian
    noise of the given mean and std per channel, clamped: the control.
    """

    keys = ("classes", "channels", "size", "mean", "std")
    conditional = False
    mean: Tensor
    std: Tensor

    def __init__(
        self, *, classes: int, channels: int, size: int, mean: Sequence[float] = (), std: Sequence[float] = ()
    ) -> None:
        super().__init__()
        self.classes, self.channels, self.shape = classes, channels, (channels, size, size)
        self.latent = math.prod(self.shape)
        self.register_buffer("mean", torch.tensor(per_channel(mean, 0.5, channels)).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(per_channel(std, 0.25, channels)).view(1, -1, 1, 1))

    def first_layers(self) -> list[nn.Module]:
        """None: there is nothing but the latents."""
        return []

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        return inward_clamp(latents.view(-1, *self.shape) * self.std + self.mean)

    @torch.no_grad()
    def project_(self, latents: Tensor) -> None:
        """Clip latents in place to what gives pixels in [0, 1] (DeepInversion's clipping, MixMix algorithm 1)."""
        pixels = latents.view(-1, *self.shape)
        pixels.clamp_(min=-self.mean / self.std, max=(1 - self.mean) / self.std)
