"""What a student learns of a teacher's layers besides its logits: which are paired, how they are compared."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dfkd.classifier import Classifier
from dfkd.compress.graph import watch
from dfkd.errors import UserError
from dfkd.losses import attention, hints, map_error
from dfkd.models.selection import last_blocks
from dfkd.runtime import eval_mode


class MapProjector(nn.ModuleList):
    """1x1 convolutions, one for each of a student's maps: what they give is compared with the teacher's."""

    def __init__(self, widths: Sequence[tuple[int, int]]) -> None:
        super().__init__(nn.utils.skip_init(nn.Conv2d, own, its, 1, bias=False) for own, its in widths)
        self.narrowest = min(its for _, its in widths)

    def forward(self, *maps: Tensor) -> list[Tensor]:
        """The projected maps."""
        return [layer(x) for layer, x in zip(self, maps)]


@dataclass
class Hints:
    """Layers whose outputs a student learns besides the logits: pairs of names, the student's and the teacher's, one of
    losses.py's functions of the two lists of tensors, and where the student's are not compared as they are, what is
    trained to make the teacher's of them."""

    student: nn.Module
    teacher: nn.Module
    pairs: Sequence[tuple[str, str]]
    weight: float
    loss: Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor] = hints
    projector: MapProjector | None = None

    @property
    def layers(self) -> list[str]:
        """The teacher's layers, as the network that it wraps names them."""
        return [name.removeprefix("model.") for _, name in self.pairs]

    def watch_student(self) -> AbstractContextManager[list[Tensor]]:
        """Collect what the student's layers give in a forward within its scope, pair by pair."""
        return collected(self.student, [name for name, _ in self.pairs])

    def watch_teacher(self) -> AbstractContextManager[list[Tensor]]:
        """Collect what the teacher's layers give in a forward within its scope, pair by pair."""
        return collected(self.teacher, [name for _, name in self.pairs])

    def term(self, ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
        """The weighted loss of what was collected from the student and from the teacher, a float32 scalar."""
        return self.weight * self.loss(ours, theirs)


class _First(torch.autograd.Function):
    """The first rows of a batch; its gradient lies in memory as the batch does, a slice's would be contiguous."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: int) -> Tensor:
        last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
        ctx.like = x.shape, torch.channels_last if last else torch.contiguous_format
        return x[:rows]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        shape, layout = ctx.like
        whole = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=layout).zero_()
        whole[: len(grad)] = grad
        return whole, None


def first_rows(x: Tensor, rows: int) -> Tensor:
    """The first rows of a batch, as a slice, but for the layout of the gradient in memory."""
    return _First.apply(x, rows) if rows < len(x) else x


@contextmanager
def collected(network: nn.Module, names: Sequence[str]) -> Iterator[list[Tensor]]:
    """Collect as `watch` does, into a list in the order of the names, which is filled as the scope ends."""
    found: list[Tensor] = []
    with watch(network, names) as seen:
        yield found
    if missing := [name for name in names if name not in seen]:
        raise UserError(
            f"{missing[0]} was not called in training, though it is otherwise; set distill.maps, distill.hints and "
            "distill.attention to 0, in Python hints=None"
        )
    found += [seen[name] for name in names]


Maps = dict[tuple[int, int], tuple[str, int]]  # by size: a module's name and its channels
# Whose outputs are no stages of a network: some may be as square as a map (attention), or larger than the last.
NO_MAPS = (nn.Identity, nn.Dropout, nn.Softmax, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)


@torch.no_grad()
def last_maps(model: nn.Module, image: Tensor) -> Maps:
    """Per size (H, W) above 1 the module that is last to give a map of it for one image [1, C, H, W], and its channels.

    A block that strides belongs to the size it ends with, and nothing in it is looked at that has the size it begins
    with: of a ResNet these are the stages. Modules that hold maps of three sizes or more, and nn.Sequential, are no
    such blocks. None where what the network hands on is tokens [B, N, C] or [B, H, W, C], as a transformer does: what
    maps it has are of its stem.
    """
    with eval_mode(model), watch(model, [name for name, _ in model.named_modules() if name]) as seen:
        model(image)
    outputs = {  # in order of execution
        name: x
        for name, x in seen.items()
        if isinstance(x, Tensor) and x.dim() > 2 and not isinstance(model.get_submodule(name), NO_MAPS)
    }
    sizes = {  # of maps, which have the image's proportions
        name: (x.shape[2], x.shape[3])
        for name, x in outputs.items()
        if x.dim() == 4 and (x.shape[2] * image.shape[3] == x.shape[3] * image.shape[2] or x[0, 0].numel() == 1)
    }
    within = {name: {sizes[each] for each in sizes if each.startswith(f"{name}.")} for name in sizes}
    blocks = [
        name
        for name in sizes
        if not isinstance(model.get_submodule(name), nn.Sequential) and len(within[name] - {(1, 1)}) < 3
    ]
    found = {}
    for name, x in outputs.items():
        around = [block for block in blocks if name.startswith(f"{block}.")]
        if name not in sizes and not around:
            return {}
        if name in sizes and min(sizes[name]) > 1 and all(sizes[block] == sizes[name] for block in around):
            found[sizes[name]] = name, x.shape[1]
    return found


def pairs_of(ours: Maps, theirs: Maps) -> dict[tuple[str, str], tuple[int, int]]:
    """The modules (student's, teacher's) whose `last_maps` are of one size, with their channels."""
    return {(name, theirs[size][0]): (width, theirs[size][1]) for size, (name, width) in ours.items() if size in theirs}


def attention_hints(student: nn.Module, teacher: nn.Module, image: Tensor, weight: float) -> Hints:
    """Attention transfer, with a weight, where both networks have maps of one size for an image [1, C, H, W]. Raises
    UserError where there are none."""
    ours, theirs = last_maps(student, image), last_maps(teacher, image)
    if not (pairs := pairs_of(ours, theirs)):
        sizes = [", ".join("x".join(map(str, size)) for size in maps) or "none" for maps in (ours, theirs)]
        raise UserError(
            f"attention needs feature maps of one size in both networks, the student has {sizes[0]} and the teacher "
            f"{sizes[1]}; set distill.attention=0"
        )
    return Hints(student, teacher, list(pairs), weight, attention)


def projected_hints(student: nn.Module, teacher: nn.Module, image: Tensor, weight: float) -> Hints | None:
    """Hints, with a weight, of the maps that both networks have of one size for an image [1, C, H, W], whatever their
    channels: a 1x1 convolution of each of the student's, dropped afterwards, is to tell images and places apart as the
    teacher's map does.

    None where the weight is 0, where there are none, where one network has maps of one size alone (it has no stages)
    and where they resize images to other sizes: a size would then be of another depth. FitNets (Romero et al. 2015) eq.
    3 with a regressor of one layer, of several maps at once.
    """
    resized = [network.input_size if isinstance(network, Classifier) else None for network in (student, teacher)]
    if not weight or len({size or image.shape[-1] for size in resized}) > 1:
        return None
    ours, theirs = last_maps(student, image), last_maps(teacher, image)
    pairs = pairs_of(ours, theirs)
    if not pairs or min(len(ours), len(theirs)) < 2:
        return None
    return Hints(student, teacher, list(pairs), weight, map_error, MapProjector(list(pairs.values())))


@torch.no_grad()
def stage_pairs(student: nn.Module, teacher: nn.Module, image: Tensor) -> list[tuple[str, str]]:
    """The blocks (student's, teacher's) whose outputs a student that has weights of its teacher is to give too: the
    last of every row of blocks, where both give the image [1, C, H, W] an output of one shape."""
    pairs = last_blocks(student, teacher)
    seen = []
    for k, network in enumerate((student, teacher)):
        with eval_mode(network), watch(network, [pair[k] for pair in pairs]) as outputs:
            network(image)
        seen.append({name: x.shape for name, x in outputs.items() if isinstance(x, Tensor)})
    return [(ours, theirs) for ours, theirs in pairs if ours in seen[0] and seen[0][ours] == seen[1].get(theirs)]


def stage_hints(student: nn.Module, teacher: nn.Module, image: Tensor, weight: float) -> Hints | None:
    """Hints between `stage_pairs`, with a weight; None where it is 0 or there are none."""
    pairs = stage_pairs(student, teacher, image) if weight else []
    return Hints(student, teacher, pairs, weight) if pairs else None
