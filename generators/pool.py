"""The generator that remembers: images that were optimised in rounds, drawn again by class."""

import torch
from torch import Tensor, nn

from generators.base import ImageGenerator


def _sort(pool: "PoolGenerator", keys: object) -> None:
    pool.sort()


class PoolGenerator(ImageGenerator):
    """Up to `capacity` images in uint8, drawn with replacement: latents [B, 1] standard normal say which.

    conditional: the drawn image is one of the asked class, or of any class where the pool has none of it; else the
    labels change nothing. It needs no host sync to draw, and draws the same for the same pool on every process.
    """

    keys = ("classes", "channels", "size", "capacity", "conditional")
    images: Tensor
    labels: Tensor
    place: Tensor
    order: Tensor
    starts: Tensor

    def __init__(self, *, classes: int, channels: int, size: int, capacity: int, conditional: bool = True) -> None:
        super().__init__()
        self.latent, self.classes, self.channels = 1, classes, channels
        self.capacity, self.conditional = capacity, conditional
        self.register_buffer("images", torch.zeros(capacity, channels, size, size, dtype=torch.uint8))
        # A row without an image yet has the label `classes`, which sorts behind all others.
        self.register_buffer("labels", torch.full((capacity,), classes))
        self.register_buffer("place", torch.zeros((), dtype=torch.int64))
        self.register_buffer("order", torch.arange(capacity), persistent=False)
        self.register_buffer("starts", torch.zeros(classes + 1, dtype=torch.int64), persistent=False)
        self.register_load_state_dict_post_hook(_sort)

    def first_layers(self) -> list[nn.Module]:
        """None: nothing here is drawn at random."""
        return []

    @torch.no_grad()
    def push(self, images: Tensor, labels: Tensor) -> None:
        """Take in images [B, C, H, W], uint8 or in [0, 1], of labels [B], in place of the oldest once it is full."""
        images, labels = images[-self.capacity :], labels[-self.capacity :]
        rows = (self.place + torch.arange(len(labels), device=labels.device)) % self.capacity
        self.images[rows] = images if images.dtype == torch.uint8 else (images * 255).round().to(torch.uint8)
        self.labels[rows] = labels
        self.place.copy_((self.place + len(labels)) % self.capacity)
        self.sort()

    def kept(self) -> tuple[Tensor, Tensor]:
        """The images that it holds [N, C, H, W], uint8, and their labels [N]."""
        there = self.labels < self.classes
        return self.images[there], self.labels[there]

    def sort(self) -> None:
        """Where each class starts among the rows in the order of their labels."""
        ordered, order = torch.sort(self.labels, stable=True)
        self.order.copy_(order)
        classes = torch.arange(self.classes + 1, device=ordered.device)
        self.starts.copy_(torch.searchsorted(ordered, classes))

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        share = torch.special.ndtr(latents[:, 0].double())  # uniform in [0, 1]
        start, count = torch.zeros_like(labels), self.starts[-1].expand_as(labels)
        if self.conditional:
            first, behind = self.starts[labels], self.starts[labels + 1]
            there = behind > first
            start, count = torch.where(there, first, start), torch.where(there, behind - first, count)
        row = torch.minimum((share * count).long(), count - 1).clamp_min(0)
        return self.images[self.order[start + row]].float() / 255
