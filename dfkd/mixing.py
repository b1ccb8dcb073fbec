"""Data Mixing: two synthetic images in one, with both labels and their exact shares of the area."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from kornia.augmentation import MixAugmentationBaseV2, RandomCutMixV2, RandomMixUpV2
from kornia.augmentation.random_generator import RandomGeneratorBase
from torch import Tensor

from dfkd.errors import UserError
from dfkd.runtime import Shard, drawn_at

GROUP = 4  # neighbouring images among which pairs are made, by `partners` and losses.spread


class Mixed(NamedTuple):
    """Mixed images [B, C, H, W], the labels of both parts [B], and the share [B] of the image that `other` labels."""

    images: Tensor
    labels: Tensor
    other: Tensor
    beta: Tensor


def interpolation_matrix(start: Tensor, length: Tensor, size: int, antialias: bool) -> Tensor:
    """Matrices [B, size, size] that resize a line of `size` pixels to pixels start .. start + length - 1.

    start and length [B] float. Rows equal F.interpolate(mode="bilinear", align_corners=False) of the whole line inside
    the box; rows outside it mean nothing. With antialias the triangle filter is widened by the shrinkage.
    """
    pixel = torch.arange(size, dtype=start.dtype, device=start.device)
    ratio = size / length.view(-1, 1)
    source = (pixel - start.view(-1, 1) + 0.5) * ratio - 0.5
    if not antialias:
        return (1 - (source.clamp(0, size - 1).unsqueeze(2) - pixel).abs()).clamp_min(0)
    weights = (1 - ((source.unsqueeze(2) - pixel) / ratio.clamp_min(1).unsqueeze(2)).abs()).clamp_min(0)
    return weights / weights.sum(2, keepdim=True).clamp_min(1e-6)


def paste(x1: Tensor, x2: Tensor, box: Tensor, antialias: bool = False) -> Tensor:
    """(1 - a) x1 + a g(x2): the whole of x2 resized into a box of x1, per image. MixMix eq. 7 and 8.

    x1 and x2 [B, C, H, W]; box [B, 4] as x, y, width, height in pixels. Two batched matrix products: unlike
    F.interpolate's and grid_sample's, their backward is deterministic on every device, and nothing waits for the host.
    """
    height, width = x1.shape[-2:]
    x0, y0, w, h = box.to(torch.promote_types(x2.dtype, torch.float32)).unbind(1)
    rows = interpolation_matrix(y0, h, height, antialias).unsqueeze(1).to(x2.dtype)
    columns = interpolation_matrix(x0, w, width, antialias).unsqueeze(1).to(x2.dtype)
    shrunk = rows @ x2 @ columns.mT
    y, x = torch.arange(height, device=x1.device), torch.arange(width, device=x1.device)
    x0, y0, w, h = box.view(-1, 4, 1).unbind(1)
    inside_y, inside_x = (y >= y0) & (y < y0 + h), (x >= x0) & (x < x0 + w)
    return torch.where((inside_y.unsqueeze(2) & inside_x.unsqueeze(1)).unsqueeze(1), shrunk, x1)


class BoxGenerator(RandomGeneratorBase):
    """Boxes of independent uniform width and height (1 to the image's) at a uniform place, and partners. MixMix 4.2."""

    def make_samplers(self, device: torch.device, dtype: torch.dtype) -> None:
        self.sampler = torch.distributions.Uniform(
            torch.tensor(0.0, device=device, dtype=dtype), torch.tensor(1.0, device=device, dtype=dtype)
        )

    def forward(self, batch_shape: tuple[int, ...], same_on_batch: bool = False) -> dict[str, Tensor]:
        batch, height, width = batch_shape[0], batch_shape[-2], batch_shape[-1]
        u = self.sampler.rsample((1 if same_on_batch else batch, 4)).expand(batch, 4)
        size = u.new_tensor([width, height])
        lengths = (1 + (u[:, :2] * size).floor()).minimum(size)
        starts = (u[:, 2:] * (size - lengths + 1)).floor().minimum(size - lengths)
        return {"mix_pairs": torch.randperm(batch), "box": torch.cat([starts, lengths], 1).long()}


class RandomResizeMix(MixAugmentationBaseV2):
    """Data Mixing of MixMix (eq. 7-9) as a Kornia augmentation.

    With data_keys=["input", "class"]: images [B, C, H, W] and labels [B] -> mixed images and [B, 3] float rows of
    (label, pasted label, beta), beta being the box's share of the area. p is the probability that a batch is mixed.
    """

    def __init__(self, p: float = 1.0, antialias: bool = False, data_keys: list[str] | None = None) -> None:
        super().__init__(p=1.0, p_batch=p, data_keys=data_keys)  # type: ignore[arg-type]
        self._param_generator = BoxGenerator()
        self.antialias = antialias

    def apply_transform(self, input: Tensor, params: dict[str, Tensor], flags: dict[str, object]) -> Tensor:
        partner = input.index_select(0, params["mix_pairs"].to(input.device, non_blocking=True))
        return paste(input, partner, params["box"].to(input.device, non_blocking=True), self.antialias)

    def apply_transform_class(self, input: Tensor, params: dict[str, Tensor], flags: dict[str, object]) -> Tensor:
        height, width = params["forward_input_shape"][-2:].tolist()
        box = params["box"].to(input.device, non_blocking=True)
        pasted = input.index_select(0, params["mix_pairs"].to(input.device, non_blocking=True))
        return torch.stack([input.float(), pasted.float(), (box[:, 2] * box[:, 3]).float() / (height * width)], 1)

    def apply_non_transform_class(self, input: Tensor, params: dict[str, Tensor], flags: dict[str, object]) -> Tensor:
        return torch.stack([input.float(), input.float(), torch.zeros_like(input, dtype=torch.float32)], 1)


MIXES = {
    "resize": lambda p, antialias: RandomResizeMix(p, antialias),
    "cutmix": lambda p, antialias: RandomCutMixV2(p=p, use_correct_lambda=True),
    "mixup": lambda p, antialias: RandomMixUpV2(p=p),
}
# Which axis of each Kornia parameter counts the images of a batch.
BATCH_AXIS = {
    "mix_pairs": -1,
    "mixup_pairs": -1,
    "mixup_lambdas": 0,
    "box": 0,
    "crop_src": 1,
    "batch_prob": 0,
}


def make_mix(kind: str, probability: float = 1.0, antialias: bool = False) -> MixAugmentationBaseV2:
    """The Kornia augmentation of a recipe's `synthesis.mix`. Raises UserError for an unknown kind."""
    if kind not in MIXES:
        raise UserError(f"unknown mix {kind!r}; choose from {sorted(MIXES)}")
    return MIXES[kind](probability, antialias)


def partners(batch: int, device: torch.device | str = "cpu") -> Tensor:
    """Who is mixed with whom [B]: rows two apart, since neighbours are of one class (draws.draw_labels).

    Rows are drawn at random already, so a fixed pairing is a random one; being local, it does not depend on how the
    global batch is split over processes that have whole groups of GROUP each. In other batches the last rows wrap
    around.
    """
    rows = torch.arange(batch, device=device)
    return torch.where((rows ^ 2) < batch, rows ^ 2, (rows + min(2, max(1, batch - 1))) % batch)


def mix_batch(mix: MixAugmentationBaseV2, images: Tensor, labels: Tensor, shard: Shard, *position: int | str) -> Mixed:
    """Mix a batch: images [B, C, H, W] float, labels [B]; the boxes depend on position alone and are this rank's part
    of the global batch's. Gradients reach both images of every pair."""
    params = draw_mix(mix, images.shape, shard, *position)
    for name in ("mix_pairs", "mixup_pairs"):
        if name in params:
            params[name] = partners(len(images)).expand_as(params[name])
    with torch.autocast(images.device.type, enabled=False):
        mixed, rows = mix(images, labels, params=params, data_keys=["input", "class"])
    rows = rows.view(len(images), 3)
    beta = 1 - rows[:, 2] if isinstance(mix, RandomCutMixV2) else rows[:, 2]
    return Mixed(mixed, rows[:, 0].long(), rows[:, 1].long(), beta)


def draw_mix(mix: MixAugmentationBaseV2, shape: Sequence[int], shard: Shard, *position: int | str) -> dict[str, Tensor]:
    """Kornia's parameters of a batch of this shape, on the host, by position alone: this rank's part of the global
    batch's. Whether the batch is mixed is `batch_prob` [1], 1 or 0."""
    batch = shape[0]
    with drawn_at(*position, "mix"):  # from torch's global generator; Kornia's parameters live on the host by design
        params = mix.forward_parameters(torch.Size((batch * shard.world, *shape[1:])))
    for name, axis in BATCH_AXIS.items():
        if name in params:
            params[name] = params[name].narrow(axis, shard.rank * batch, batch)
    # Batches are mixed whole or not at all; given one flag per image, Kornia adds them up one by one in Python.
    params["batch_prob"] = params["batch_prob"][:1]
    return params
