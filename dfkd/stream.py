"""Batches of synthetic images with their targets, ready on the device, deterministic in (seed, rank, epoch, batch)."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, get_worker_info
from torchvision.utils import save_image

from dfkd.classifier import head
from dfkd.cuda_graphs import DIRECT, Calls
from dfkd.draws import Moves, draw_labels, draw_latents, draw_moves, moved
from dfkd.errors import UserError
from dfkd.mixing import draw_mix, make_mix, partners, paste
from dfkd.runtime import (
    Autocast,
    Shard,
    default_shard,
    full_precision,
    plain_strides,
    rng,
    to_bytes,
    to_device,
    to_float,
)
from dfkd.teachers import Teacher, check_channels, logits_and_features, zoo_logits
from generators import ImageGenerator

FRESH = 0.5  # share of a batch that is drawn anew where past batches are replayed

Source = Callable[[Shard, int, tuple[int | str, ...]], tuple[Tensor, Tensor]]
Watch = Callable[[], AbstractContextManager[Sequence[Tensor]]]  # collects tensors of a forward within its scope


def from_generator(generator: ImageGenerator, graphs: Calls = DIRECT) -> Source:
    """Images of a generator, of balanced classes. Raises UserError for what is none."""
    if not isinstance(generator, ImageGenerator):
        raise UserError(f"from_generator takes a generator (load_generator(FOLDER)), got a {type(generator).__name__}")
    graphs = graphs if any(True for _ in generator.parameters()) else DIRECT  # pixels and pools: nothing to gain
    return partial(_generated, generator, graphs)  # not a closure: workers that are spawned are sent it


def _generated(
    generator: ImageGenerator, graphs: Calls, shard: Shard, count: int, position: tuple[int | str, ...]
) -> tuple[Tensor, Tensor]:
    def images(latents: Tensor, labels: Tensor) -> tuple[Tensor]:
        return (full_precision(generator(latents, labels)),)

    labels = draw_labels(shard, count, generator.classes, *position)
    latents = draw_latents(shard, count, generator.latent, *position)
    return graphs.call(("stream", "generator"), generator, images, latents, labels)[0], labels


def from_noise(channels: int, size: int, classes: int, mean: float = 0.5, std: float = 0.25) -> Source:
    """A control: normal noise clamped to [0, 1], its labels random. Raises UserError for counts below 1 and for what
    is no number."""
    if not all(isinstance(each, Integral) and each >= 1 for each in (channels, size, classes)):
        raise UserError(
            f"from_noise takes whole numbers of channels, pixels a side and classes, got {channels!r}, {size!r} and "
            f"{classes!r}"
        )
    if not all(isinstance(each, Real) and math.isfinite(each) for each in (mean, std)):
        raise UserError(f"from_noise takes a mean and a std of pixels, finite numbers, got {mean!r} and {std!r}")
    return partial(_noise, (channels, size, size), classes, mean, std)


def _noise(
    shape: tuple[int, ...], classes: int, mean: float, std: float, shard: Shard, count: int, position: Any
) -> tuple[Tensor, Tensor]:
    labels = draw_labels(shard, count, classes, *position)
    generator = rng(shard.device, *position, "noise")
    noise = torch.randn((count * shard.world, *shape), generator=generator, device=shard.device)
    return (shard.take(noise) * std + mean).clamp(0, 1), labels


def from_images(images: Tensor, labels: Tensor) -> Source:
    """A control: given images [N, C, H, W], uint8 or float in [0, 1], and labels [N], drawn at random.

    Raises UserError where they are none, are other numbers, or have not one label each.
    """
    if not (isinstance(images, Tensor) and isinstance(labels, Tensor)):
        raise UserError(
            f"from_images takes tensors, got a {type(images).__name__} and a {type(labels).__name__}; torch.as_tensor "
            "makes one of an array or a list"
        )
    shapes = f"{list(images.shape)} {images.dtype} with labels {list(labels.shape)}"
    if images.dim() != 4 or not len(images) or labels.shape != images.shape[:1]:
        raise UserError(f"from_images takes images [N, C, H, W] and a label for each, labels [N]; got {shapes}")
    whole = images.dtype == torch.uint8
    if not whole and not (images.is_floating_point() and images.min() >= 0 and images.max() <= 1):
        raise UserError(f"from_images takes images in uint8, or float ones in [0, 1]; got {shapes}; divide by 255")
    return partial(_given, images, labels)


def _given(
    images: Tensor, labels: Tensor, shard: Shard, count: int, position: tuple[int | str, ...]
) -> tuple[Tensor, Tensor]:
    generator = rng("cpu", *position, "images")
    rows = shard.take(torch.randint(len(images), (count * shard.world,), generator=generator))
    return to_float(to_device(images[rows], shard.device)), to_device(labels[rows], shard.device)


# A stream's numbers by name: whether whole, what is allowed, and how that is said.
NUMBERS: dict[str, tuple[type, Callable[[Any], bool], str]] = {
    "batch_size": (Integral, lambda x: x >= 2, "batch_size >= 2"),
    "num_batches": (Integral, lambda x: x >= 1, "num_batches >= 1"),
    "seed": (Integral, lambda x: True, ""),
    "epoch": (Integral, lambda x: True, ""),
    "batch": (Integral, lambda x: True, ""),
    "replay": (Integral, lambda x: x >= 0, "replay >= 0, past batches that are kept"),
    "fresh": (Real, lambda x: 0 < x <= 1, "fresh above 0 and at most 1, the share of a batch drawn anew"),
    "shift": (Real, lambda x: 0 <= x <= 1, "shift from 0 to 1, a share of the side"),
    "mix": (Real, lambda x: 0 <= x <= 1, "mix from 0 to 1, the share of batches that are mixed"),
}


def _check_number(name: str, value: object) -> None:
    kind, allowed, words = NUMBERS[name]
    if not isinstance(value, kind):
        raise UserError(f"a stream's {name} is a {'whole ' if kind is Integral else ''}number, got {value!r}")
    if not allowed(value):
        raise UserError(f"a stream needs {words}, got {value}")


def _teachers(given: Any) -> list[Teacher]:
    """The teachers that a stream is given: none, one, or several."""
    several = isinstance(given, Iterable) and not isinstance(given, nn.Module)
    teachers: list[Any] = [] if given is None else list(given) if several else [given]
    if not all(isinstance(each, Teacher) for each in teachers):
        kinds = ", ".join(dict.fromkeys(f"a {type(each).__name__}" for each in teachers))
        raise UserError(
            f"a stream's teacher is a Teacher, or several, got {kinds}; give Teacher(network, mean=..., std=...)"
        )
    return teachers


def drawn_anew(batch_size: int, replay: int, fresh: float) -> int:
    """How many images of a batch are drawn anew: all without a replay of past ones, else the share `fresh`."""
    return math.ceil(fresh * batch_size) if replay else batch_size


class Replay:
    """A ring of past batches with their targets on the device, images in uint8: 1 byte a value instead of 4.

    What is drawn takes its row k from a set row, spread over the batch, of a past batch chosen at random: rows are
    random already, so this is as random as any draw, and it is alike on any number of processes where `fresh` leaves
    whole rows.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.clear()

    def clear(self) -> None:
        """Forget all batches."""
        self.filled = self.next = 0
        self.images = self.targets = torch.empty(0)

    def push(self, images: Tensor, targets: Tensor) -> None:
        """Take in a batch [B, C, H, W] in [0, 1] and its targets [B, ...], in place of the oldest once it is full."""
        rows = to_bytes(images).permute(0, 2, 3, 1)  # whole pixels side by side: a draw is in channels_last
        if not self.filled:
            try:
                self.images = rows.new_zeros((self.slots, *rows.shape))
                self.targets = targets.new_zeros((self.slots, *targets.shape))
            except RuntimeError:  # torch's, where memory is short
                size = self.slots * (rows.nbytes + targets.nbytes) / 1e9
                raise UserError(
                    f"replay={self.slots} batches of {len(rows)} images are {size:,.1f} GB, more than there is; lower "
                    "replay (distill.replay), or the batch size"
                ) from None
        self.images[self.next], self.targets[self.next] = rows, targets
        self.filled, self.next = min(self.filled + 1, self.slots), (self.next + 1) % self.slots

    def draw(self, shard: Shard, count: int, *position: int | str) -> tuple[Tensor, Tensor]:
        """`count` past images in [0, 1] and their targets."""
        slots = torch.randint(self.filled, (count * shard.world,), generator=rng("cpu", *position, "replay"))
        # An offset that all share reaches every row in time where fewer are drawn than a batch has.
        (offset,), kept = torch.rand(1, generator=rng("cpu", *position, "rows")).tolist(), self.targets.shape[1]
        rows = ((torch.arange(count, dtype=torch.float64) + offset) * kept / max(1, count)).long().clamp_max(kept - 1)
        chosen = to_device(shard.take(slots) * kept + rows, shard.device)
        images, targets = self.images.flatten(0, 1)[chosen], self.targets.flatten(0, 1)[chosen]
        return to_float(images).permute(0, 3, 1, 2), targets

    def state_dict(self) -> dict[str, Any]:
        """The ring's contents, of this rank; until it is full a copy on the host, for a slice is saved whole."""
        images, targets = self.images, self.targets
        if self.filled < self.slots:
            images, targets = (each[: self.filled].to("cpu", copy=True) for each in (images, targets))
        return {"images": images, "targets": targets, "next": self.next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state_dict."""
        images, targets = state["images"], state["targets"]
        self.filled, self.next = len(images), state["next"]
        if self.filled:
            self.images = images.new_zeros((self.slots, *images.shape[1:]))
            self.targets = targets.new_zeros((self.slots, *targets.shape[1:]))
            self.images[: self.filled], self.targets[: self.filled] = images, targets


class SyntheticStream(IterableDataset):
    """An endless or counted stream of (images [B, C, H, W] in [0, 1], targets), ready on the device.

    source is a generator, or one of from_generator, from_noise and from_images. targets are the logits [B, K] of
    `teacher` (a Teacher, or a zoo of them: its weighted mean), or labels [B] where there is none (of a generator that
    is not conditional they mean nothing, of a mixed image it is one of two). Batch b of epoch e depends on (seed, rank,
    e, b) alone, unless replay is on: then `fresh` of each batch is drawn, augmented and shown to the teacher, in 8
    bits, and stands first; the rest are images of the last `replay` batches as they were, with the targets they had,
    which costs neither network anything; an iteration begins with none, and there is one at a time. With several
    teachers in a process group every rank is to draw a batch: their spreads, by which targets are weighted, are means
    over all ranks.
    A generator in training mode draws as in training, by the statistics of the batch: `.eval()` it first.
    With `features` targets are [B, K + D]: behind the logits what the teachers' last linear layers are given, for Fit.
    In a DataLoader it wants batch_size=None (see as_dataloader), with workers also no replay: they take its batches in
    turn. Raises UserError for a source, teacher or number that is none.
    """

    def __init__(
        self,
        source: ImageGenerator | Source,
        *,
        batch_size: int = 256,
        num_batches: int | None = None,
        teacher: Teacher | Iterable[Teacher] | None = None,
        seed: int = 0,
        replay: int = 0,
        fresh: float = FRESH,
        shift: float = 0.0,
        flip: bool = False,
        mix: float = 0.0,
        shard: Shard | None = None,
        autocast: Autocast = nullcontext,
        channels_last: bool = False,
        epoch: int = 0,
        graphs: Calls = DIRECT,
        features: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(source, ImageGenerator) and (isinstance(source, nn.Module) or not callable(source)):
            raise UserError(
                "a stream's source is a generator (load_generator(FOLDER)), or of dfkd.stream from_images, from_noise; "
                f"got a {type(source).__name__}"
            )
        numbers = {"seed": seed, "replay": replay, "fresh": fresh, "shift": shift, "mix": mix}
        for name, value in {**numbers, **({"num_batches": num_batches} if num_batches is not None else {})}.items():
            _check_number(name, value)
        self.shard = shard or default_shard(source.device if isinstance(source, ImageGenerator) else None)
        self.labelled = not isinstance(source, ImageGenerator) or source.conditional
        self.source = from_generator(source, graphs) if isinstance(source, ImageGenerator) else source
        self.replay = Replay(replay) if replay else None
        self.batch_size, self.num_batches, self.seed = batch_size, num_batches, seed
        self.set_epoch(epoch)
        self.teachers = _teachers(teacher)
        if isinstance(source, ImageGenerator):
            check_channels(self.teachers, source.channels)
        self.widths = feature_widths(self.teachers) if features else []
        self.share = fresh
        self.shift, self.flip, self.autocast = shift, flip, autocast
        # Without a teacher it does not pay; teachers that take turns on the device are not where they were.
        stay = all(teacher.pager is None for teacher in self.teachers)
        self.graphs = graphs if self.teachers and stay else DIRECT
        self.mix = make_mix("resize", mix) if mix else None
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format

    @property
    def batch_size(self) -> int:
        """Images of a batch, 2 or more; to set it forgets what was kept to be replayed."""
        return self._batch_size

    @batch_size.setter
    def batch_size(self, batch_size: int) -> None:
        _check_number("batch_size", batch_size)
        self._batch_size = batch_size
        if self.replay is not None:
            self.replay.clear()

    @property
    def fresh(self) -> int:
        """How many images of a batch are drawn anew."""
        return drawn_anew(self.batch_size, self.replay.slots if self.replay is not None else 0, self.share)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        worker, epoch = get_worker_info(), self.epoch
        if worker is not None and self.replay is not None:
            raise UserError("a stream with replay has one ring of past batches; load it with num_workers=0")
        # A DataLoader with batch_size=None hands out its workers' batches in turn: those of the stream, in order.
        index, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        if self.replay is not None:  # which batches come does not depend on what was drawn before
            self.replay.clear()
        while self.num_batches is None or index < self.num_batches:
            yield self.batch(index, epoch)
            index += step

    def __len__(self) -> int:
        if self.num_batches is None:
            raise TypeError("this stream is endless; give num_batches")
        return self.num_batches

    def set_epoch(self, epoch: int) -> None:
        """Make the next iteration draw other batches. Workers that a DataLoader keeps (persistent_workers) do not hear
        of it."""
        _check_number("epoch", epoch)
        self.epoch: int = epoch

    def batch(self, index: int, epoch: int | None = None) -> tuple[Tensor, Tensor]:
        """Batch `index` of an epoch (None: that of set_epoch): images and targets. Raises UserError where index is
        negative, or past the end of a counted stream."""
        images, targets, *_ = self.watched_batch(index, epoch)
        return images, targets

    @torch.no_grad()
    def watched_batch(self, index: int, epoch: int | None = None, watch: Watch | None = None) -> tuple[Tensor, ...]:
        """`batch`, and behind it what `watch` collects while the teachers look at the fresh images: with CUDA graphs
        that of the first call, so a stream with graphs has one watcher."""
        _check_number("batch", index)
        _check_number("epoch", self.epoch if epoch is None else epoch)
        if index < 0:
            raise UserError(f"batch {index} is before the first, which is batch 0")
        if self.num_batches is not None and index >= self.num_batches:
            raise UserError(
                f"batch {index} is past the end of a stream of {self.num_batches}; give a larger num_batches"
            )
        position = (self.seed, "stream", self.epoch if epoch is None else epoch, index)
        with self.autocast():
            images, labels = self.source(self.shard, self.fresh, position)
            draws = self._random_draws(images, position)
            finish = partial(self._finished, tuple(draws), watch)
            key = ("stream", *draws, *(["watched"] if watch else []))
            images, targets, *seen = self.graphs.call(key, None, finish, images, labels, *draws.values())
        if self.replay is None:
            return images, targets, *seen
        self.replay.push(images, targets)
        old, old_targets = self.replay.draw(self.shard, self.batch_size - self.fresh, *position)
        images = plain_strides(torch.cat([images, old]).contiguous(memory_format=self.memory_format))
        return images, torch.cat([targets, old_targets]), *seen

    def _random_draws(self, images: Tensor, position: tuple[int | str, ...]) -> dict[str, Tensor]:
        """What is drawn for images besides: where they move to, and the boxes of a batch that is mixed."""
        drawn = {}
        if self.shift or self.flip:
            drawn["moves"] = draw_moves(self.shard, len(images), *position)
        if self.mix is not None:
            params = draw_mix(self.mix, images.shape, self.shard, *position)
            if params["batch_prob"].all():
                drawn["boxes"] = params["box"]
        return {name: to_device(x, images.device) for name, x in drawn.items()}

    def _finished(
        self, names: tuple[str, ...], watch: Watch | None, images: Tensor, labels: Tensor, *drawn: Tensor
    ) -> tuple[Tensor, ...]:
        """Images of the source as they are streamed, their targets, and what is watched of the teachers; drawn are
        `_random_draws` of these names."""
        draws = dict(zip(names, drawn))
        if "moves" in draws:
            images = moved(images, draws["moves"], Moves(round(self.shift * images.shape[-1]), self.flip))
        if "boxes" in draws:
            with torch.autocast(images.device.type, enabled=False):
                images = paste(images, images[partners(len(images), images.device)], draws["boxes"])
        if self.replay is not None:
            # As the ring keeps them, so that the targets are of these very images whenever they are drawn.
            images = to_bytes(images).to(images.dtype) / 255
        images = plain_strides(images.contiguous(memory_format=self.memory_format))
        if not self.teachers:
            return images, labels
        with watch() if watch else nullcontext([]) as seen:
            targets = (logits_and_features if self.widths else zoo_logits)(self.teachers, images)
        return images, targets, *seen


def feature_widths(networks: Sequence[nn.Module]) -> list[int]:
    """How many features D each network has. Raises UserError where one has none, or there is no network."""
    heads = [head(network) for network in networks]
    if not heads or None in heads:
        raise UserError(
            f"features=True needs networks that end in a linear layer, got {len(heads)}, of which {heads.count(None)} "
            "do not; give features=False"
        )
    return [last.in_features for last in heads if last is not None]


def as_dataloader(stream: SyntheticStream) -> DataLoader:
    """A DataLoader over a stream's batches; Accelerate's prepare leaves it alone, so each rank keeps its own stream.
    Raises UserError for what is no stream."""
    _check_stream(stream)
    loader = DataLoader(stream, batch_size=None, num_workers=0)
    loader._is_accelerate_prepared = True  # type: ignore[attr-defined]
    return loader


def _check_stream(stream: SyntheticStream) -> None:
    if not isinstance(stream, SyntheticStream):
        raise UserError(f"a {type(stream).__name__} is no stream; give SyntheticStream(generator, ...)")


class CalibrationReader:
    """ONNX Runtime's calibration data reader of a stream without replay: its first `batches` batches of images, by
    input name. Raises UserError for another stream, or one of fewer batches."""

    def __init__(self, stream: SyntheticStream, input_name: str, batches: int) -> None:
        _check_stream(stream)
        if stream.replay is not None:
            raise UserError("a calibration reader takes batches by number, as often as it is asked; give replay=0")
        given: Any = batches
        if not (isinstance(given, Integral) and 1 <= int(given) <= (stream.num_batches or math.inf)):
            raise UserError(
                f"a calibration reader takes 1 batch or more, and no more than its stream has, got {batches} of "
                f"{stream.num_batches or 'an endless one'}"
            )
        self.stream, self.input_name, self.batches = stream, input_name, batches
        self.rewind()

    def __len__(self) -> int:
        return self.batches

    def get_next(self) -> dict[str, Any] | None:
        """The next feed of the session, float32 on the host; None past the last."""
        if self.index >= self.end:
            return None
        images, _ = self.stream.batch(self.index)
        self.index += 1
        return {self.input_name: images.float().cpu().numpy()}

    def rewind(self) -> None:
        """Begin again."""
        self.set_range(0, self.batches)

    def set_range(self, start_index: int, end_index: int) -> None:
        """Go on with batch start_index, and end before end_index: ONNX Runtime's CalibStridedMinMax asks so."""
        self.index, self.end = start_index, min(end_index, self.batches)


def materialize(stream: SyntheticStream, count: int, folder: str | Path | None = None) -> TensorDataset:
    """The first `count` images of a stream with their targets, as a TensorDataset on the host.

    With a folder, new or empty, they are also written there as an image folder, LABEL/NNNNN.png; targets that are
    logits give their argmax as label, and a label that no image has gets no folder (torchvision's ImageFolder counts
    folders, and reads images of one channel as three). It is an iteration: a ring of replayed batches is emptied first.
    Raises UserError for another folder, more images than the stream has, or images that nobody gave a label.
    """
    _check_stream(stream)
    if not isinstance(count, Integral) or count < 1:
        raise UserError(f"materialize takes a count of 1 image or more, got {count!r}")
    if stream.num_batches is not None and count > (held := stream.num_batches * stream.batch_size):
        raise UserError(f"{count} images go past the end of a stream of {held}; give a larger num_batches")
    if folder is not None and Path(folder).exists() and (not Path(folder).is_dir() or any(Path(folder).iterdir())):
        raise UserError(f"{folder} is no empty folder; give one for these images alone")
    if folder is not None and stream.mix is not None and not stream.teachers:
        raise UserError("mixed images have no one label; give the stream a teacher, whose class they get, or mix=0")
    if folder is not None and not (stream.labelled or stream.teachers):
        raise UserError("this generator draws no class on request: its labels mean nothing; give the stream a teacher")
    images: list[Tensor] = []
    targets: list[Tensor] = []
    for batch, target in stream:
        images.append(batch.float().cpu().contiguous())
        targets.append(target.cpu())
        if sum(len(each) for each in images) >= count:
            break
    data = TensorDataset(torch.cat(images)[:count], torch.cat(targets)[:count])
    if folder is not None:
        for number in range(count):
            image, target = data[number]
            label = int(target[: len(target) - sum(stream.widths)].argmax() if target.dim() else target)
            path = Path(folder) / f"{label:05d}" / f"{number:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            save_image(image, path)
    return data
