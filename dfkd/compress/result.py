"""What every compression hands back."""

from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass
class Compressed:
    """A smaller model, the naive baseline of its method, and what was done to it.

    model and naive take what the given model takes (a Classifier stays one), and so does repaired: the model before it
    was trained further, where it was. layers has a line per layer for the
    report, and per unit of several that was reconstructed as one. structure is what rebuilds the network besides its
    model string: see dfkd.compress.files.
    """

    model: nn.Module
    naive: nn.Module
    layers: list[dict[str, Any]] = field(default_factory=list)
    structure: dict[str, Any] = field(default_factory=dict)
    repaired: nn.Module | None = None
