"""A network together with the normalisation and input size it was trained for."""

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd.errors import UserError, in_a_line
from dfkd.runtime import eval_mode, full_precision

HALF = (torch.float16, torch.bfloat16)


class _StridedDepthwise(nn.Conv2d):
    """A strided depthwise convolution, on a CPU under its autocast in float32: oneDNN has no bfloat16 kernel for its
    input gradient and its reference code takes 20 to 100 times as long."""

    def forward(self, input: Tensor) -> Tensor:
        if input.device.type != "cpu":
            return super().forward(input)
        with torch.autocast("cpu", enabled=False):
            output = super().forward(input.float())
        return output.to(torch.get_autocast_dtype("cpu"))


@contextmanager
def _slow_kernels_spared(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Let strided depthwise convolutions be _StridedDepthwise within its scope alone: the network is the user's."""
    swapped = [layer for layer in layers if type(layer) is nn.Conv2d]  # some may have become another since
    for layer in swapped:
        layer.__class__ = _StridedDepthwise
    try:
        yield
    finally:
        for layer in swapped:
            layer.__class__ = nn.Conv2d


def _resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)


@cache
def _resizing(given: int, wanted: int, device: torch.device) -> Tensor:
    """The matrix [wanted, given] by which lines of pixels are resized."""
    return _resized(torch.eye(given)[None, None], (wanted, given))[0, 0].to(device)


def head(network: nn.Module) -> nn.Linear | None:
    """The last linear layer of a network, which makes logits of its features; None where there is none."""
    linear = [module for module in network.modules() if isinstance(module, nn.Linear)]
    return linear[-1] if linear else None


class Classifier(nn.Module):
    """A network that takes images [B, C, H, W] in [0, 1] of any size and gives logits [B, K] in float32.

    It normalises by mean and std (per channel; empty: not at all) and resizes to input_size (None: not at all).
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str = "classifier",
        mean: Sequence[float] = (),
        std: Sequence[float] = (),
        input_size: int | None = None,
    ) -> None:
        super().__init__()
        self.model, self.name, self.input_size = model, name, input_size
        if half := [each for each, weight in model.named_parameters() if weight.dtype in HALF]:
            raise UserError(
                f"{name}: {half[0]} is {model.get_parameter(half[0]).dtype}; call .float() on the network: what is "
                "computed in fewer bits is chosen by autocast (runtime.precision)"
            )
        try:
            ours = [[float(value) for value in each] for each in (mean, std) if not isinstance(each, str)]
        except (TypeError, ValueError):
            ours = []
        if len(ours) < 2:
            raise UserError(f"{name}: mean {mean} and std {std} are lists, of one value per channel each")
        mean, std = ours
        if len(mean) != len(std) or not all(0 < value < math.inf for value in std):
            raise UserError(f"{name}: mean {mean} and std {std} must be one value per channel each, std > 0")
        if not all(0 <= value <= 1 for value in mean):
            raise UserError(
                f"{name}: mean {mean} is none of images in [0, 1]; divide mean and std by 255 where they are of "
                "images in 0 to 255"
            )
        self.slow = [
            module
            for module in model.modules()
            if type(module) is nn.Conv2d and module.groups == module.in_channels > 1 and max(module.stride) > 1
        ]
        self.normalisation = (mean, std)
        device = next(chain(model.parameters(), model.buffers()), torch.empty(0)).device
        self.register_buffer("mean", torch.tensor(self.normalisation[0] or [0.0], device=device).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(self.normalisation[1] or [1.0], device=device).view(1, -1, 1, 1))

    def resized(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] in the size that the network takes."""
        if self.input_size is None or images.shape[-2:] == (self.input_size, self.input_size):
            return images
        if not (torch.is_grad_enabled() and images.requires_grad):
            return _resized(images, (self.input_size, self.input_size))
        # As matrix products: on a GPU interpolate's backward sums in an order that changes from run to run.
        rows, columns = (_resizing(size, self.input_size, images.device) for size in images.shape[-2:])
        wide = full_precision(images)
        with torch.autocast(images.device.type, enabled=False):
            return rows.to(wide) @ wide @ columns.to(wide).mT

    def network_input(self, images: Tensor) -> Tensor:
        """What the network itself is given for images [B, C, H, W] in [0, 1]: of its size, normalised."""
        return (self.resized(images) - self.mean) / self.std

    def forward(self, images: Tensor) -> Tensor:
        slow = self.slow and torch.is_autocast_enabled("cpu")
        with _slow_kernels_spared(self.slow) if slow else nullcontext():
            logits = self.model(self.network_input(images))
        if isinstance(logits, tuple | list | Mapping):
            raise UserError(
                f"{self.name} gives a {type(logits).__name__} where logits [B, K] belong; give a network whose forward "
                "returns them alone"
            )
        return full_precision(logits)


def remedy_for(reason: str, remedy: str) -> str:
    """What to do where a network raises `reason` on images: `remedy`, unless it views what cannot be viewed."""
    views = "view size is not compatible" in reason
    return "let it reshape or flatten where it views, or set runtime.channels_last=false" if views else remedy


@torch.no_grad()
def check_logits(classifier: Classifier, images: Tensor, classes: int, role: str, remedy: str) -> None:
    """Raise UserError where a classifier does not take images [B, C, H, W], `remedy` being what to do then, or makes no
    logits [B, classes] of them; `role` says in the messages what it is."""
    try:
        with eval_mode(classifier):
            logits = classifier(images)
    except UserError:  # which says what it gives instead
        raise
    except Exception as error:  # whatever a stranger's network may raise
        shape, reason = ", ".join(map(str, images.shape[1:])), in_a_line(error)
        raise UserError(f"{role} does not take images [B, {shape}]: {reason}; {remedy_for(reason, remedy)}") from None
    if logits.shape != (len(images), classes):
        raise UserError(f"{role} gives {tuple(logits.shape[1:])} outputs where classes={classes}; make them agree")


@torch.no_grad()
def check_trainable(classifier: Classifier, images: Tensor, role: str) -> None:
    """Raise UserError where a network that is to be trained gives more than its logits in training mode, or has a state
    that no file of weights holds; `role` says in the message what it is."""
    try:
        model = copy.deepcopy(classifier.model).train()
        given = classifier.network_input(images).to(next(model.parameters(), images).device)  # on the host, if paged
        with torch.random.fork_rng(devices=[]):
            answer = model(given)
    except Exception as error:  # whatever a stranger's network may raise
        reason = in_a_line(error)
        raise UserError(f"{role} cannot be trained on {len(images)} images: {reason}; choose another") from None
    if not isinstance(answer, Tensor):
        raise UserError(
            f"{role} gives a {type(answer).__name__} in training mode, where logits belong; leave its auxiliary heads "
            "out (kwargs, e.g. {aux_logits: false}), or choose another"
        )
    if wrong := [name for name, value in model.state_dict().items() if not isinstance(value, Tensor)]:
        raise UserError(f"{role} keeps {wrong[0]} in its state, which is no tensor (get_extra_state); choose another")
