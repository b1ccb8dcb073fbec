"""CMI's contrastive term: two views of an image are alike, and unlike those of a memory bank on the device."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dfkd.collectives import all_gather
from dfkd.losses import info_nce
from dfkd.norms import frozen_norms
from dfkd.runtime import Shard, drawn_at, rng
from dfkd.teachers import Teacher, batch_norms

NEGATIVES = 4096  # rows of the bank that an update is contrasted with, as in CMI
SMALLEST = 0.25  # share of the area of a crop, as in CMI's code (RandomResizedCrop)


def crop(images: Tensor, box: Tensor, flip: Tensor) -> Tensor:
    """The part `box` of every image [B, C, H, W], resized to the whole bilinearly, mirrored where flip [B] is true.

    box [B, 4] as x, y, width, height in shares of the image. Two batched matrix products, like mixing.paste.
    """

    def weights(start: Tensor, length: Tensor, size: int, mirrored: Tensor | None = None) -> Tensor:
        pixel = torch.arange(size, dtype=start.dtype, device=start.device)
        source = start.view(-1, 1) * size + (pixel + 0.5) * length.view(-1, 1) - 0.5
        if mirrored is not None:
            source = torch.where(mirrored.view(-1, 1), source.flip(1), source)
        return (1 - (source.clamp(0, size - 1).unsqueeze(2) - pixel).abs()).clamp_min(0).unsqueeze(1).to(images.dtype)

    x, y, width, height = box.unbind(1)
    rows = weights(y, height, images.shape[-2])
    columns = weights(x, width, images.shape[-1], flip)
    return rows @ images @ columns.mT


class Contrast(nn.Module):
    """The projection head and the memory bank of CMI (Fang et al. 2021, section 3.2, eq. 5), of one teacher.

    An image's features are the means over pixels of what each batch norm of the teacher is given; a head of two layers
    projects them. The query is a random crop of an image, its key the image, the negatives the keys of the global
    batch's other images and of up to NEGATIVES of the bank's `size` earlier ones, projected by the head as it is now.
    """

    bank: Tensor

    def __init__(
        self, dim: int, shard: Shard, *, size: int, width: int = 256, temperature: float = 0.1, seed: int = 0
    ) -> None:
        super().__init__()
        with drawn_at(seed, "contrast"):
            self.head = nn.Sequential(nn.Linear(dim, width), nn.ReLU(), nn.Linear(width, width))
        self.register_buffer("bank", torch.zeros(size, dim))
        self.filled = self.next = 0
        self.shard, self.temperature = shard, temperature
        self.to(shard.device)

    def forward(self, teacher: Teacher, images: Tensor, means: Sequence[Tensor], *position: int | str) -> Tensor:
        """The term, nats per image; images [B, C, H, W] in [0, 1], means what Teacher.tap_means saw of them."""
        keys = self.head(torch.cat(list(means), 1))
        with frozen_norms(batch_norms(teacher.model).values()), teacher.tap_means() as seen:
            teacher(self._view(images, *position))
        queries = self.head(torch.cat(seen, 1))
        with torch.no_grad():  # as in CMI's code, keys are not pulled towards their queries
            everyone = all_gather(keys)
            negatives = torch.cat([everyone, self.head(self._earlier(*position))])
            own = torch.arange(len(keys), device=keys.device) + self.shard.rank * len(keys)
            usable = own.unsqueeze(1) != torch.arange(len(negatives), device=keys.device)
        return info_nce(queries, keys.detach(), negatives, self.temperature, usable)

    def _earlier(self, *position: int | str) -> Tensor:
        """Rows of the bank: all, or NEGATIVES at random where there are more."""
        if self.filled <= NEGATIVES:
            return self.bank[: self.filled]
        generator = rng(self.bank.device, *position, "bank")
        return self.bank[torch.randint(self.filled, (NEGATIVES,), generator=generator, device=self.bank.device)]

    def _view(self, images: Tensor, *position: int | str) -> Tensor:
        """A crop of a quarter to the whole of every image, of any place, mirrored half the time."""
        generator = rng(images.device, *position, "view")
        u = torch.rand(len(images) * self.shard.world, 4, generator=generator, device=images.device)
        u = self.shard.take(u)
        side = (SMALLEST + (1 - SMALLEST) * u[:, 0]).sqrt()
        box = torch.stack([u[:, 1] * (1 - side), u[:, 2] * (1 - side), side, side], 1)
        with torch.autocast(images.device.type, enabled=False):
            return crop(images, box, u[:, 3] < 0.5)

    @torch.no_grad()
    def remember(self, teacher: Teacher, images: Tensor) -> None:
        """Put the features of the global batch's images into the bank, in place of the oldest."""
        with teacher.tap_means() as means:
            teacher(images)
        features = all_gather(torch.cat(means, 1))[-len(self.bank) :]
        rows = (self.next + torch.arange(len(features), device=features.device)) % len(self.bank)
        self.bank[rows] = features
        self.filled = min(self.filled + len(features), len(self.bank))
        self.next = (self.next + len(features)) % len(self.bank)

    def get_extra_state(self) -> dict[str, Any]:
        """How far the bank is filled: part of the state_dict."""
        return {"filled": self.filled, "next": self.next}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take up get_extra_state's."""
        self.filled, self.next = state["filled"], state["next"]
