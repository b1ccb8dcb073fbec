"""What every generator of the table is to the rest of the project."""

from typing import Any

from torch import Tensor, nn


class ImageGenerator(nn.Module):
    """latents [B, latent] and labels [B] int64 -> images [B, channels, size, size] in [0, 1].

    description holds what generator.json says, once loaded. Convolutions and linear layers before a batch norm have no
    bias: its gradient is rounding noise, which Adam would blow up to full steps.
    """

    latent: int
    classes: int
    description: dict[str, Any]

    def first_layers(self) -> list[nn.Module]:
        """The layers that decide what is drawn for which latent and label: drawn anew by `synthesis.redraw`."""
        raise TypeError(
            f"{type(self).__name__} names no first layers; give it first_layers() or set synthesis.redraw=0"
        )

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        """Draw images."""
        raise TypeError(f"{type(self).__name__} has no forward")
