"""What is looked at in a generator while it trains, and at its end."""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from dfkd.teachers import Teacher
from dfkd.training import GRID_COLUMNS, GRID_ROWS, LOOKED_AT, look, look_at_all
from generators import ImageGenerator

CLASSES = 50


class Knows(ImageGenerator):
    """Draws the classes below `known` as asked, and class 0 for all others; a pixel in row k // 10, column k % 10."""

    keys = ("classes",)
    latent, classes, channels, conditional = 2, CLASSES, 1, True

    def __init__(self, known: int) -> None:
        super().__init__()
        self.known = known
        self.register_buffer("one", torch.ones(()))

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        drawn = torch.where(labels < self.known, labels, 0)
        return F.one_hot(drawn, 100).float().view(-1, 1, 10, 10)


class Reads(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :CLASSES]


def test_classes_that_the_generator_does_not_draw_are_noticed_wherever_they_are() -> None:
    zoo, accelerator = [Teacher(Reads(), name="t")], Accelerator(cpu=True)
    figures, grid = look(Knows(CLASSES), zoo, accelerator)
    assert (figures["class_agreement_t"], round(figures["predicted_balance_t"], 5)) == (100.0, 1.0)
    classes = grid.flatten(1).argmax(1).view(GRID_ROWS, GRID_COLUMNS)
    assert (classes == classes[:, :1]).all()  # a row is a class
    assert classes[:, 0].unique().numel() == GRID_ROWS
    # Of 20 classes, spread evenly, the first 8 are below 20; of all 50 it is 20.
    figures, _ = look(Knows(20), zoo, accelerator)
    assert figures["class_agreement_t"] == 100 * 8 / LOOKED_AT
    figures = look_at_all(Knows(20), zoo, accelerator, 6)
    assert figures["class_agreement_t"] == 100 * 20 / CLASSES
    share = torch.tensor([31 / CLASSES] + 19 * [1 / CLASSES])
    torch.testing.assert_close(
        torch.tensor(figures["predicted_balance_t"]),
        torch.distributions.Categorical(share).entropy() / torch.tensor(CLASSES).log(),
    )
