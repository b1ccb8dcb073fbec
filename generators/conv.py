"""The convolutional generator of DAFL's kind, conditional on the class."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from generators.base import ImageGenerator, straight_clamp


class PixelHead(nn.Module):
    """Standardise each channel over the batch, scale and shift it, clamp to [0, 1].

    Standardised outputs learn far better than a sigmoid's (DAFL's generator ends in a batch norm without affine).
    Scale and shift start at the teachers' std and mean and are learned: those need not be the data's own statistics.
    """

    def __init__(self, channels: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.mean, self.std = mean, std
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.shift = nn.Parameter(torch.empty(1, channels, 1, 1))
        self.scale = nn.Parameter(torch.empty(1, channels, 1, 1))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Back to the statistics given."""
        self.shift.copy_(torch.tensor(self.mean).view_as(self.shift))
        self.scale.copy_(torch.tensor(self.std).view_as(self.scale))

    def forward(self, x: Tensor) -> Tensor:
        return straight_clamp(self.norm(x.to(self.shift.dtype)) * self.scale + self.shift)


class ConvGenerator(ImageGenerator):
    """Linear, then stages of upsampling and 3x3 convolution, then a pixel head (DAFL, Chen et al. 2019, section 4).

    forward(latents [B, latent], labels [B] int64) -> images [B, channels, size, size] in [0, 1]; a generator built
    with conditional=False takes no notice of the labels. mean and std are the pixel statistics its head starts from.
    """

    keys = ("latent", "classes", "channels", "size", "width", "conditional", "mean", "std")

    def __init__(
        self,
        *,
        latent: int,
        classes: int,
        channels: int,
        size: int,
        width: int = 64,
        conditional: bool = True,
        mean: Sequence[float] = (),
        std: Sequence[float] = (),
    ) -> None:
        super().__init__()
        self.latent, self.classes, self.channels, self.size = latent, classes, channels, size
        self.conditional = conditional
        stages = max(2, math.ceil(math.log2(size / 8)))
        self.sizes = [math.ceil(size / 2**k) for k in reversed(range(stages + 1))]
        wide = 2 * width
        self.start = (wide, self.sizes[0], self.sizes[0])
        self.embed = nn.Embedding(classes, latent) if conditional else None
        self.project = nn.Linear(latent * (2 if conditional else 1), math.prod(self.start), bias=False)
        self.project_norm = nn.BatchNorm2d(wide)
        widths = [wide] * stages + [width]
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(widths[k], widths[k + 1], 3, padding=1, bias=False),
                nn.BatchNorm2d(widths[k + 1]),
                nn.LeakyReLU(0.2),
            )
            for k in range(stages)
        )
        self.to_pixels = nn.Conv2d(width, channels, 3, padding=1, bias=False)
        self.head = PixelHead(channels, mean or [0.5] * channels, std or [0.25] * channels)

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        if self.embed is not None:
            code = F.normalize(self.embed(labels), dim=1) * math.sqrt(self.latent)
            latents = torch.cat([latents, code], dim=1)
        x = self.project(latents).view(-1, *self.start)
        x = self.project_norm(x)
        for size, stage in zip(self.sizes[1:], self.stages):
            x = stage(F.interpolate(x, size=(size, size), mode="nearest"))
        return self.head(self.to_pixels(x))

    def first_layers(self) -> list[nn.Module]:
        """Embedding, projection and its norm."""
        return [module for module in (self.embed, self.project, self.project_norm) if module is not None]
