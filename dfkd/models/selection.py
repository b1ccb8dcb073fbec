"""Weight selection: a network begins with layers and channels of a larger one of its kind."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dfkd.errors import UserError

LEAST = 0.5  # share of a student that must come of its teacher: less is no head start, and an accident of names


@torch.no_grad()
def select_weights(student: nn.Module, teacher: nn.Module) -> float:
    """Overwrite a student's parameters and buffers with a selection of its teacher's; the share of its numbers, 0 to
    1, that has been overwritten. What the teacher has not, or smaller, stays as it is.

    Xu et al. 2024 (Initializing Models with Larger Ones), section 3: layers by their names, channels evenly spaced. Of
    a row of blocks they take the first; here they are spread from the first to the last, which is better
    (docs/results.md). Raises UserError where less than LEAST suits, and where the student would be the teacher.
    """
    written = 0
    for own, theirs in _counterparts(student, teacher):
        sources = dict(_tensors(theirs))
        for name, tensor in _tensors(own):
            source = sources.get(name)
            if source is None or not _holds(source, tensor):
                continue
            for axis, (few, many) in enumerate(zip(tensor.shape, source.shape)):
                source = source.index_select(axis, torch.arange(few, device=source.device) * many // few)
            tensor.copy_(source)
            written += tensor.numel()
    size, whole = (sum(x.numel() for x in (*each.parameters(), *each.buffers())) for each in (student, teacher))
    if written < LEAST * size:
        raise UserError(
            f"{written / size:.0%} of the student is in its teacher too, by the same names and no smaller; choose a "
            "smaller network of the teacher's kind as student.model, or leave student.weights empty"
        )
    if written == size == whole:
        raise UserError(
            "the student would be its teacher, with the same layers in the same sizes; choose a smaller student.model, "
            "or leave student.weights empty"
        )
    return written / size


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters and buffers of a module's own, without its children's, by name."""
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def _holds(large: Tensor, small: Tensor) -> bool:
    """Whether a tensor has as many axes as another, none shorter; the kernels of convolutions must be of one size."""
    longer = all(many >= few for many, few in zip(large.shape, small.shape))
    return large.dim() == small.dim() and longer and (large.dim() < 4 or large.shape[2:] == small.shape[2:])


def _counterparts(student: nn.Module, teacher: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """The modules of a student, each with the teacher's that stands for it: of the same name, or in a row of blocks of
    which the teacher has more, as far from its ends."""
    yield student, teacher
    own, theirs = dict(student.named_children()), dict(teacher.named_children())
    names = {name: name for name in own}
    if len(own) < len(theirs) and _is_row(student) and _is_row(teacher):
        row, last = list(theirs), max(1, len(own) - 1)
        names = {name: row[round(k * (len(row) - 1) / last)] for k, name in enumerate(own)}
    for name, child in own.items():
        if names[name] in theirs:
            yield from _counterparts(child, theirs[names[name]])


def _is_row(module: nn.Module) -> bool:
    """Whether a module is a row of blocks of one kind, which have layers of their own."""
    blocks = list(module.children())
    return len({type(block) for block in blocks}) == 1 and any(True for _ in blocks[0].children())
