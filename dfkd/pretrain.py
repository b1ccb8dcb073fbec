"""Training of a teacher from real images, the way the owner of the data would have done it."""

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dfkd.checkpoints import save_state
from dfkd.classifier import Classifier
from dfkd.cuda_graphs import DIRECT, Calls
from dfkd.draws import STILL, Moves, augment
from dfkd.errors import UserError, in_a_line
from dfkd.runtime import Deadline, Shard, reseed, rng, to_float


def one_cycle(progress: float, warmup: float = 0.2) -> float:
    """Learning-rate factor at a progress in [0, 1]: linear up over `warmup`, then cosine down to 0."""
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def train_teacher(
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    batch_size: int = 128,
    lr: float = 0.1,
    weight_decay: float = 5e-4,
    moves: Moves = STILL,
    seed: int = 0,
    device: torch.device | str = "cpu",
    bf16: bool = False,
    channels_last: bool = True,
    log: Callable[[int, float], None] = lambda epoch, loss: None,
    checkpoint: Path | None = None,
    deadline: Deadline | None = None,
    graphs: Calls = DIRECT,
) -> bool:
    """Train a classifier on images [N, C, H, W] uint8 and labels [N] with SGD, moved at random; in place.

    With a checkpoint (a file) it goes on from the epoch it was left at. Returns whether all epochs are done: False
    where the deadline would come before the next one's end; at least one is done. Raises UserError where it diverges.
    """
    device = torch.device(device)
    shard = Shard(device)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    classifier.to(device).to(memory_format=memory_format).train()
    optimizer = torch.optim.SGD(
        classifier.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=weight_decay, fused=True
    )

    def examined(x: Tensor, labels: Tensor) -> tuple[Tensor]:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
            return (F.cross_entropy(classifier(x), labels),)

    images, labels = images.to(device), labels.to(device)
    batch_size = min(batch_size, len(images))
    batches = len(images) // batch_size
    first = 0
    if checkpoint is not None and checkpoint.exists():
        try:
            state = torch.load(checkpoint, map_location="cpu", weights_only=True)
            classifier.load_state_dict(state["classifier"])
            optimizer.load_state_dict(state["optimizer"])
            first = state["epochs"]
        except Exception as error:  # whatever a torn file, or a network that has changed, leads to
            raise UserError(
                f"teacher {classifier.name} cannot go on from {checkpoint} ({in_a_line(error)}); remove it and run "
                "the same command again: this teacher begins anew"
            ) from None
    for epoch in range(first, epochs):
        begun = time.perf_counter()
        reseed(device, seed, "dropout", epoch)
        order = torch.randperm(len(images), generator=rng("cpu", seed, "epoch", epoch)).to(device)
        for k, rows in enumerate(order[: batches * batch_size].view(batches, batch_size)):
            for group in optimizer.param_groups:
                group["lr"] = lr * one_cycle((epoch * batches + k) / (epochs * batches))
            x = augment(to_float(images[rows]), shard, moves, seed, epoch, k)
            x = x.contiguous(memory_format=memory_format)
            (loss,) = graphs.learn(("teacher",), classifier, examined, x, labels[rows])
            optimizer.step()
        last = float(loss)
        log(epoch, last)
        if not math.isfinite(last):
            raise UserError(f"teacher {classifier.name}: its loss is {last} after epoch {epoch + 1}; lower training.lr")
        if checkpoint is not None:
            state = {"classifier": classifier.state_dict(), "optimizer": optimizer.state_dict(), "epochs": epoch + 1}
            save_state(state, checkpoint)
        if deadline is not None and epoch + 1 < epochs and deadline.within(time.perf_counter() - begun):
            return False
    classifier.eval()
    return True
