"""Weight selection: a network begins with layers and channels of a larger one of its kind."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dfkd.errors import UserError

LEAST = 0.5  # share of a student that must come of its teacher: less is no head start, and an accident of names


@torch.no_grad()
def select_weights(student: nn.Module, teacher: nn.Module) -> float:
    """Overwrite a student's weights and statistics with a selection of its teacher's; the share of its numbers, 0 to 1,
    that has been overwritten. What the teacher lacks, or has smaller, stays as it was.

    Xu et al. 2024 (Initializing Models with Larger Ones), section 3: layers by their names, channels evenly spaced. Of
    a row of blocks they take the first; here they are spread from the first to the last, which is better
    (docs/results.md). Channels correspond in residual networks, and in plain ones of as many layers (others, as VGGs,
    number them through: those of one number are of different places), but not behind a concatenation (DenseNet), nor,
    where there are fewer, behind a flattening or between attention heads. Raises UserError, and changes nothing, where
    less than LEAST of the numbers, or of the layers, suits, and where the student would be the teacher.
    """
    own, theirs, counterparts = student.state_dict(), teacher.state_dict(), dict(_counterparts(student, teacher))
    wanted = {name: tensor for name, tensor in own.items() if tensor.is_floating_point()}  # others are counts, indices
    chosen = []
    for name, tensor in wanted.items():
        path, _, leaf = name.rpartition(".")
        other = counterparts.get(path)
        if other is None or not _alike(student.get_submodule(path), teacher.get_submodule(other)):
            continue
        source = theirs.get(_below(other, leaf))
        if source is None or not _holds(source, tensor):
            continue
        for axis, (few, many) in enumerate(zip(tensor.shape, source.shape)):
            source = source.index_select(axis, torch.arange(few, device=source.device) * many // few)
        chosen.append((tensor, source))
    numbers, layers = sum(x.numel() for x in wanted.values()), sum(x.dim() > 1 for x in wanted.values())
    share, of_layers = sum(x.numel() for x, _ in chosen) / max(1, numbers), sum(x.dim() > 1 for x, _ in chosen)
    if share < LEAST or of_layers < LEAST * layers:
        raise UserError(
            f"{of_layers} of the student's {layers} layers, {share:.0%} of its numbers, are in its teacher too, by the "
            "same names and no smaller; choose a smaller network of the teacher's kind as student.model, or leave "
            "student.weights empty"
        )
    if [(name, x.shape) for name, x in own.items()] == [(name, x.shape) for name, x in theirs.items()]:
        raise UserError(
            "the student would be its teacher, with the same layers in the same sizes; choose a smaller student.model, "
            "or leave student.weights empty"
        )
    for tensor, source in chosen:
        tensor.copy_(source)
    return share


def last_blocks(student: nn.Module, teacher: nn.Module) -> list[tuple[str, str]]:
    """The last blocks (student's, teacher's) of the rows of blocks that both networks have, the teacher's of several;
    of rows within rows the inner ones."""
    ends = {}
    for path, other in _counterparts(student, teacher):
        row, like = student.get_submodule(path), teacher.get_submodule(other)
        if _is_row(row) and _is_row(like) and len(theirs := dict(like.named_children())) > 1:
            ends[path] = _below(path, list(dict(row.named_children()))[-1]), _below(other, list(theirs)[-1])
    return [pair for path, pair in ends.items() if not any(each != path and _within(each, path) for each in ends)]


def _below(path: str, name: str) -> str:
    """The name of what a module calls by a name; the network's own path is empty."""
    return f"{path}.{name}" if path else name


def _within(path: str, other: str) -> bool:
    """Whether the module of one name lies within that of another."""
    return not other or path.startswith(f"{other}.")


def _alike(one: nn.Module, other: nn.Module) -> bool:
    """Whether two layers are of one class, or one's is made of the other's."""
    return isinstance(one, type(other)) or isinstance(other, type(one))


def _holds(large: Tensor, small: Tensor) -> bool:
    """Whether a tensor has as many axes as another, none shorter; the kernels of convolutions must be of one size."""
    longer = all(many >= few for many, few in zip(large.shape, small.shape))
    return large.dim() == small.dim() and longer and (large.dim() < 4 or large.shape[2:] == small.shape[2:])


def _counterparts(student: nn.Module, teacher: nn.Module, path: str = "", other: str = "") -> Iterator[tuple[str, str]]:
    """The names of a student's modules, each with that of the teacher's that stands for it: of the same name, or in a
    row of blocks of which the teacher has more, as far from its ends."""
    yield path, other
    own, theirs = dict(student.named_children()), dict(teacher.named_children())
    stands_in = {name: name for name in own}
    if len(own) < len(theirs) and _is_row(student) and _is_row(teacher):
        row, last = list(theirs), max(1, len(own) - 1)
        stands_in = {name: row[round(k * (len(row) - 1) / last)] for k, name in enumerate(own)}
    for name, child in own.items():
        if (its := stands_in[name]) in theirs:
            yield from _counterparts(child, theirs[its], _below(path, name), _below(other, its))


def _is_row(module: nn.Module) -> bool:
    """Whether a module is a row of blocks of one kind, which have layers of their own."""
    blocks = list(module.children())
    containers = isinstance(blocks[0], nn.Sequential | nn.ModuleList) if blocks else True
    return len({type(block) for block in blocks}) == 1 and not containers and any(True for _ in blocks[0].children())
