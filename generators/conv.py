"""The convolutional generator of DAFL's kind, conditional on the class."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from generators.base import ImageGenerator, inward_clamp, per_channel

NORMS = ("class", "code")  # what the scale and shift of a norm belong to


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
        return inward_clamp(self.norm(x.to(self.shift.dtype)) * self.scale + self.shift)


class ClassNorm(nn.Module):
    """Batch norm whose scale and shift belong to the class, or to the code (de Vries et al. 2017, section 2.2).

    forward(x [B, C, H, W], labels [B] int64 in [0, classes)) -> the same shape.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.affine = nn.Parameter(torch.empty(classes, 2 * channels))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Nearly the plain batch norm, and a little different for every one of them."""
        self.affine.normal_(0, 0.02)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        normed = self.norm(x)
        # In the maps' own dtype, to which float32 operands would otherwise not yield: bfloat16 maps became float32.
        scale, shift = self.affine[labels, :, None, None].to(normed.dtype).chunk(2, dim=1)
        return normed * (1 + scale) + shift


class Stage(nn.Module):
    """3x3 convolution, norm of the class or the code, leaky ReLU."""

    def __init__(self, channels: int, out_channels: int, classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels, 3, padding=1, bias=False)
        self.norm = ClassNorm(out_channels, classes)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.leaky_relu(self.norm(self.conv(x), labels), 0.2)


class ConvGenerator(ImageGenerator):
    """Linear, then stages of upsampling and 3x3 convolution, then a pixel head (DAFL, Chen et al. 2019, section 4).

    forward(latents [B, latent], labels [B] int64) -> images [B, channels, size, size] in [0, 1]; a generator built
    with conditional=False takes no notice of the labels. mean and std are the pixel statistics its head starts from.

    A class has `prototypes` codes, of which the first latent chooses one: a single code draws one structure in varying
    light. The code enters twice: beside the latents, where it sets where things are, and as scale and shift of every
    norm, which keep the class exact and set its colours. With norms "class" the codes of a class share those.
    """

    keys = ("latent", "classes", "channels", "size", "width", "conditional", "prototypes", "norms", "mean", "std")
    older: ClassVar[dict[str, Any]] = {"norms": "class"}

    def __init__(
        self,
        *,
        latent: int,
        classes: int,
        channels: int,
        size: int,
        width: int = 32,
        conditional: bool = True,
        prototypes: int = 8,
        norms: str = "code",
        mean: Sequence[float] = (),
        std: Sequence[float] = (),
    ) -> None:
        super().__init__()
        if norms not in NORMS:
            raise ValueError(f"norms={norms!r} of a generator is unknown; choose from {NORMS}")
        self.latent, self.classes, self.channels, self.size = latent, classes, channels, size
        self.conditional, self.prototypes, self.norms = conditional, prototypes, norms
        stages = max(2, math.ceil(math.log2(size / 8)))
        # From 2 x 2 on: batch norms cannot learn of one image's single pixel.
        self.sizes = [min(size, max(2, math.ceil(size / 2**k))) for k in reversed(range(stages + 1))]
        wide = 2 * width
        self.start = (wide, self.sizes[0], self.sizes[0])
        self.embed = nn.Embedding(classes * prototypes, latent) if conditional else None
        self.project = nn.Linear(latent * (2 if conditional else 1), math.prod(self.start), bias=False)
        self.project_norm = nn.BatchNorm2d(wide)
        widths = [wide] * stages + [width]
        kinds = classes * (prototypes if norms == "code" else 1) if conditional else 1
        self.stages = nn.ModuleList(Stage(widths[k], widths[k + 1], kinds) for k in range(stages))
        self.to_pixels = nn.Conv2d(width, channels, 3, padding=1, bias=False)
        self.head = PixelHead(channels, per_channel(mean, 0.5, channels), per_channel(std, 0.25, channels))

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        if self.embed is None:
            labels = torch.zeros_like(labels)
        else:
            share = 0.5 + 0.5 * torch.erf(latents[:, 0] / math.sqrt(2))  # uniform in [0, 1]
            chosen = (share * self.prototypes).long().clamp_max(self.prototypes - 1)
            codes = labels * self.prototypes + chosen
            code = F.normalize(self.embed(codes), dim=1) * math.sqrt(self.latent)
            latents = torch.cat([latents, code], dim=1)
            labels = codes if self.norms == "code" else labels
        x = self.project(latents).view(-1, *self.start)
        x = self.project_norm(x)
        for size, stage in zip(self.sizes[1:], self.stages):
            with torch.autocast(x.device.type, enabled=False):  # on a GPU it would copy float32, and the gradients too
                x = F.interpolate(x, size=(size, size), mode="nearest")
            x = stage(x, labels)
        return self.head(self.to_pixels(x))

    def first_layers(self) -> list[nn.Module]:
        """Embedding, projection and its norm."""
        return [module for module in (self.embed, self.project, self.project_norm) if module is not None]
