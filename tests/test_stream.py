"""The stream: batches by position, replay, augmentation, controls, and its ways out to other tools."""

import copy
from collections import deque
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import pil_to_tensor

from dfkd.errors import UserError
from dfkd.runtime import Shard, to_float
from dfkd.stream import (
    CalibrationReader,
    Replay,
    SyntheticStream,
    as_dataloader,
    from_generator,
    from_images,
    from_noise,
    materialize,
)
from dfkd.teachers import Teacher, zoo_logits
from generators import ConvGenerator, PoolGenerator

CPU = Shard(torch.device("cpu"))
Batch = tuple[Tensor, Tensor]
MakeStream = Callable[..., SyntheticStream]


@pytest.fixture
def make_stream(make_generator: Callable[..., ConvGenerator]) -> MakeStream:
    def make(batch_size: int = 8, **options: object) -> SyntheticStream:
        return SyntheticStream(make_generator().eval(), batch_size=batch_size, shard=CPU, **options)  # type: ignore[arg-type]

    return make


def same(a: Batch, b: Batch) -> bool:
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def alike(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) > 0 and all(same(x, y) for x, y in zip(a, b))


def numbered(count: int, start: int = 0, channels: int = 1, size: int = 4) -> Tensor:
    """Images of random pixels that are whole 255ths, all different."""
    rng = torch.Generator().manual_seed(start + 1)
    return torch.randint(256, (count, channels, size, size), generator=rng).float() / 255


# --- by position ---


def test_a_batch_is_images_in_range_with_labels_or_logits(
    make_stream: MakeStream, make_teacher: Callable[..., Teacher]
) -> None:
    images, labels = make_stream().batch(0)
    assert images.shape == (8, 1, 8, 8)
    assert images.dtype == torch.float32
    assert images.min() >= 0
    assert images.max() <= 1
    assert not images.requires_grad
    assert sorted(labels.bincount(minlength=3).tolist()) == [2, 3, 3]
    teacher = make_teacher()
    again, logits = make_stream(teacher=teacher).batch(0)
    assert torch.equal(images, again)
    assert torch.equal(logits, teacher(images))


def test_batches_depend_on_seed_epoch_and_index_alone(
    make_stream: MakeStream, make_teacher: Callable[..., Teacher]
) -> None:
    options = {"num_batches": 4, "seed": 3, "shift": 0.2, "flip": True, "mix": 0.5, "teacher": make_teacher()}
    stream = make_stream(**options)
    torch.manual_seed(1)
    first = list(stream)
    torch.manual_seed(2)
    assert alike(first, list(stream))  # iterated again
    assert alike(first, list(make_stream(**options)))
    assert alike(first, [stream.batch(k) for k in (0, 1, 2, 3)])
    assert same(first[2], stream.batch(2))  # out of order
    others = [*first[1:], make_stream(**options | {"seed": 4}).batch(0), stream.batch(0, epoch=1)]
    assert not any(torch.equal(first[0][0], images) for images, _ in others)


def test_mixed_images_without_a_teacher_have_no_folder(make_stream: MakeStream, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="mixed images have no one label; give the stream a teacher"):
        materialize(make_stream(mix=1.0), 8, tmp_path / "images")


def test_epochs_differ_and_come_back(make_stream: MakeStream) -> None:
    stream = make_stream(num_batches=3)
    first = list(stream)
    stream.set_epoch(1)
    second = list(stream)
    assert not any(same(a, b) for a, b in zip(first, second))
    assert same(second[1], stream.batch(1, epoch=1))
    stream.set_epoch(0)
    assert alike(first, list(stream))


def test_two_iterators_do_not_disturb_each_other(make_stream: MakeStream) -> None:
    stream = make_stream(num_batches=4)
    alone = list(stream)
    one, two = iter(stream), iter(stream)
    seen: dict[str, list[Batch]] = {"one": [next(one)], "two": []}
    for _ in range(4):
        seen["two"].append(next(two))
        seen["one"].extend(islice(one, 1))
    assert alike(seen["one"], alone)
    assert alike(seen["two"], alone)


@pytest.mark.parametrize(("replay", "fresh"), [(0, 0.5), (3, 0.5), (3, 0.25), (3, 0.75)])
def test_two_shards_draw_the_images_of_their_global_batch(
    make_generator: Callable[..., ConvGenerator], make_teacher: Callable[..., Teacher], replay: int, fresh: float
) -> None:
    def draw(rank: int, world: int) -> list[Batch]:
        shard = Shard(CPU.device, rank, world)
        stream = SyntheticStream(
            make_generator().eval(),
            batch_size=32 // world,
            num_batches=5,
            teacher=make_teacher(),
            replay=replay,
            fresh=fresh,
            shift=0.25,
            flip=True,
            mix=1.0,
            shard=shard,
        )
        return list(stream)

    def rows(batch: Batch) -> Tensor:
        table = torch.cat([batch[0].flatten(1), batch[1]], dim=1)
        key = torch.randn(table.shape[1], generator=torch.Generator().manual_seed(0))
        return table[(table @ key).argsort()]

    for whole, one, two in zip(draw(0, 1), draw(0, 2), draw(1, 2)):
        parts = torch.cat([one[0], two[0]]), torch.cat([one[1], two[1]])
        assert torch.allclose(rows(whole), rows(parts), atol=1e-5)


def test_a_counted_stream_ends_and_says_so(make_stream: MakeStream) -> None:
    stream = make_stream(num_batches=2)
    assert len(stream) == len(list(stream)) == 2
    with pytest.raises(UserError, match=r"batch 2 is past the end of a stream of 2; give a larger num_batches"):
        stream.batch(2)
    with pytest.raises(UserError, match="past the end"):
        materialize(stream, 17)
    endless = make_stream()
    assert len(list(islice(endless, 5))) == 5
    with pytest.raises(TypeError, match="endless; give num_batches"):
        len(endless)


@pytest.mark.parametrize("key", ["batch_size", "num_batches", "replay", "seed", "epoch"])
def test_what_is_counted_is_a_whole_number(make_stream: MakeStream, key: str) -> None:
    for value in (2.5, 64.0, "64"):
        with pytest.raises(UserError, match=rf"a stream's {key} is a whole number, got {value!r}"):
            make_stream(**{key: value})
    assert make_stream(**{key: np.int64(4)}).batch(0)


@pytest.mark.parametrize(
    ("batch_size", "num_batches", "said"), [(1, 5, "batch_size >= 2, got 1"), (8, 0, "num_batches >= 1, got 0")]
)
def test_an_empty_stream_is_refused(make_stream: MakeStream, batch_size: int, num_batches: int, said: str) -> None:
    with pytest.raises(UserError, match=said):
        make_stream(batch_size, num_batches=num_batches)


def test_channels_last_changes_the_layout_alone(make_generator: Callable[..., ConvGenerator]) -> None:
    generator = make_generator(channels=3).eval()
    plain, last = (
        SyntheticStream(generator, batch_size=8, channels_last=flag, shard=CPU).batch(0)[0] for flag in (False, True)
    )
    assert plain.is_contiguous()
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(plain, last)


# --- replay ---


def test_the_ring_holds_the_latest_batches() -> None:
    ring, kept = Replay(3), deque[Batch](maxlen=3)
    found = set()
    for step in range(8):
        images, labels = numbered(4, start=step), torch.full((4,), step)
        ring.push(images, labels)
        kept.append((images, labels))
        for draw in range(20):
            drawn, names = ring.draw(CPU, 4, step, draw)
            for row in range(4):
                source = [k for k, (_, one) in enumerate(kept) if int(one[row]) == int(names[row])]
                assert len(source) == 1, "not one of the latest batches"
                assert torch.equal(drawn[row], kept[source[0]][0][row])
                found.add((step, int(names[row])))
    assert found == {(step, old) for step in range(8) for old in range(max(0, step - 2), step + 1)}


def test_the_ring_rounds_to_the_nearest_level() -> None:
    ring, images = Replay(1), torch.rand(64, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    images[0, 0, 0, :2] = torch.tensor([0.0, 1.0])
    ring.push(images, torch.zeros(64, dtype=torch.int64))
    drawn, _ = ring.draw(CPU, 64, 0)
    assert ring.images.dtype == torch.uint8
    assert (drawn - images).abs().max() <= 0.5 / 255 + 1e-6
    assert torch.equal(drawn[0, 0, 0, :2], torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize("pushed", [2, 3, 5])
def test_a_ring_taken_up_again_goes_on_as_if_never_stopped(tmp_path: Path, pushed: int) -> None:
    ring, other = Replay(3), Replay(3)
    for step in range(pushed):
        ring.push(numbered(4, step), torch.full((4,), step))
    torch.save(ring.state_dict(), tmp_path / "ring.pt")
    other.load_state_dict(torch.load(tmp_path / "ring.pt"))
    for step in range(pushed, pushed + 5):
        for each in (ring, other):
            each.push(numbered(4, step), torch.full((4,), step))
        assert same(ring.draw(CPU, 6, step), other.draw(CPU, 6, step))


def test_an_empty_ring_can_be_taken_up() -> None:
    ring = Replay(2)
    ring.load_state_dict(Replay(2).state_dict())
    ring.push(numbered(4), torch.arange(4))
    assert torch.equal(ring.draw(CPU, 4, 0)[1], torch.arange(4))


def test_a_ring_that_is_not_full_is_saved_without_what_is_not_in_it(tmp_path: Path) -> None:
    ring, images = Replay(100), numbered(4)
    ring.push(images, torch.arange(4))
    torch.save(ring.state_dict(), tmp_path / "ring.pt")
    assert images.numel() < (tmp_path / "ring.pt").stat().st_size < images.numel() + 4096 < 100 * images.numel()
    kept = torch.load(tmp_path / "ring.pt")
    again = Replay(100)
    again.load_state_dict(kept)
    assert torch.equal(again.draw(CPU, 8, 0)[0], ring.draw(CPU, 8, 0)[0])


@pytest.mark.parametrize("batch_size", [8, 9])
def test_half_of_a_replayed_batch_is_fresh(make_stream: MakeStream, batch_size: int) -> None:
    stream, seen = make_stream(batch_size, replay=4), []
    for index in range(6):
        images, labels = stream.batch(index)
        assert len(images) == len(labels) == batch_size
        half = batch_size // 2
        fresh, old = images[: batch_size - half], images[batch_size - half :]
        seen.append(fresh)
        distances = torch.stack([(torch.cat(seen) - image).abs().flatten(1).amax(1).min() for image in old])
        assert distances.max() <= 0.5 / 255 + 1e-6
    again = make_stream(batch_size, replay=4)
    assert torch.equal(images, [again.batch(index)[0] for index in range(6)][-1])


@pytest.mark.parametrize("replay", [0, 2])
def test_a_batch_size_that_is_set_later_is_honoured(make_stream: MakeStream, replay: int) -> None:
    stream, wanted = make_stream(8, num_batches=3, replay=replay), make_stream(6, num_batches=3, replay=replay)
    stream.batch_size = 6
    for (images, labels), (others, their_labels) in zip(stream, wanted, strict=True):
        assert torch.equal(images, others)
        assert torch.equal(labels, their_labels)


@pytest.mark.parametrize(("fresh", "rows"), [(0.125, 1), (0.5, 4), (0.7, 6), (1.0, 8)])
def test_teacher_and_generator_are_asked_only_for_what_is_fresh(
    make_generator: Callable[..., ConvGenerator], make_teacher: Callable[..., Teacher], fresh: float, rows: int
) -> None:
    teacher, asked = make_teacher(), []
    generator = make_generator().eval()
    stream = SyntheticStream(
        generator, batch_size=8, teacher=teacher, replay=3, fresh=fresh, shift=0.25, flip=True, shard=CPU
    )
    for network in (teacher, generator):
        network.register_forward_hook(lambda module, inputs, output: asked.append(len(output)))
    for index in range(3):
        images, logits = stream.batch(index)
        assert images.shape == (8, 1, 8, 8)
        assert logits.shape == (8, 3)
    assert asked == [rows] * 6


def test_every_row_of_the_ring_is_drawn_in_time() -> None:
    ring = Replay(1)
    ring.push(numbered(8), torch.arange(8))
    for count, wanted in ((3, 8), (8, 8), (20, 8)):
        seen = {int(name) for step in range(60) for name in ring.draw(CPU, count, step)[1]}
        assert len(seen) == wanted


@pytest.mark.parametrize("fresh", [0.0, -1.0, 1.5])
def test_a_share_that_is_none_is_refused(make_stream: MakeStream, fresh: float) -> None:
    with pytest.raises(UserError, match=f"fresh above 0 and at most 1, .* got {fresh}"):
        make_stream(replay=2, fresh=fresh)


# --- augmentation ---


def test_targets_are_the_teachers_on_the_augmented_images(
    make_stream: MakeStream, make_teacher: Callable[..., Teacher]
) -> None:
    teacher = make_teacher()
    stream = make_stream(teacher=teacher, shift=0.25, flip=True, mix=1.0, replay=2)
    for index in range(3):
        images, logits = stream.batch(index)
        assert torch.allclose(logits, teacher(images), atol=1e-6)


# --- features ---


def penultimate(teacher: Teacher, images: Tensor) -> Tensor:
    """What a network is given before its last layer: its own forward, with that layer taken out."""
    network = copy.deepcopy(teacher.model)
    network.linear = nn.Identity()  # type: ignore[assignment]
    return network((images - teacher.mean) / teacher.std)


@pytest.mark.parametrize("replay", [0, 3])
def test_features_stand_behind_the_logits(
    make_stream: MakeStream, make_teacher: Callable[..., Teacher], replay: int
) -> None:
    zoo = [make_teacher("one", seed=1, mean=[0.4], std=[0.2]), make_teacher("two", "dfkd:tiny_residual", seed=2)]
    stream = make_stream(teacher=zoo, replay=replay, fresh=0.25, shift=0.125, features=True)
    widths = [teacher.model.linear.in_features for teacher in zoo]
    assert stream.widths == widths
    for index in range(4):
        images, targets = stream.batch(index)
        logits, *features = targets.split([3, *widths], 1)
        if not replay:  # the mean of a zoo depends on the batch
            assert torch.allclose(logits, zoo_logits(zoo, images), atol=1e-5)
        for teacher, seen in zip(zoo, features):
            assert torch.allclose(seen, penultimate(teacher, images), atol=1e-5)
            assert not seen.requires_grad


def test_features_are_refused_where_a_teacher_has_none(
    make_stream: MakeStream, make_teacher: Callable[..., Teacher]
) -> None:
    convolutional = Teacher(nn.Sequential(nn.Conv2d(1, 3, 8), nn.Flatten()), name="pooled")
    with pytest.raises(UserError, match="linear layer, got 2, of which 1 do not; give features=False"):
        make_stream(teacher=[make_teacher("one"), convolutional], features=True)
    with pytest.raises(UserError, match="got 0"):
        make_stream(features=True)


# --- controls ---


def test_noise_is_clamped_normal_with_balanced_labels() -> None:
    stream = SyntheticStream(from_noise(2, 5, 4, mean=0.4, std=0.05), batch_size=800, shard=CPU)
    images, labels = stream.batch(0)
    assert images.shape == (800, 2, 5, 5)
    assert float(images.mean()) == pytest.approx(0.4, abs=0.002)
    assert float(images.std()) == pytest.approx(0.05, abs=0.002)
    assert labels.bincount().tolist() == [200] * 4
    wide = SyntheticStream(from_noise(2, 5, 4, std=5.0), batch_size=8, shard=CPU).batch(0)[0]
    assert wide.min() == 0
    assert wide.max() == 1
    assert same(stream.batch(3), stream.batch(3))
    assert not torch.equal(images, stream.batch(1)[0])


def test_an_iteration_with_replay_comes_back(make_stream: MakeStream) -> None:
    stream = make_stream(replay=3, num_batches=6, seed=4)
    first = list(stream)
    assert alike(first, list(stream))
    assert not same(first[5], make_stream(replay=1, num_batches=6, seed=4).batch(5))  # older batches are in it


def test_given_images_may_be_of_any_float_and_are_tensors(make_teacher: Callable[..., Teacher]) -> None:
    labels = torch.arange(6) % 3
    for dtype in (torch.float64, torch.float16):
        stream = SyntheticStream(
            from_images(torch.rand(6, 1, 8, 8).to(dtype), labels), batch_size=4, teacher=make_teacher(), shard=CPU
        )
        assert [x.dtype for x in stream.batch(0)] == [torch.float32] * 2
    with pytest.raises(UserError, match=r"takes tensors, got a list and a Tensor; torch\.as_tensor makes one"):
        from_images([[0.5]], labels)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_given_images_come_with_their_own_labels(dtype: torch.dtype) -> None:
    images, labels = numbered(20), torch.arange(20) % 7
    given = (images * 255).round().to(torch.uint8) if dtype == torch.uint8 else images
    stream = SyntheticStream(from_images(given, labels), batch_size=16, num_batches=20, shard=CPU)
    seen = set()
    for drawn, names in stream:
        for image, name in zip(drawn, names):
            rows = [k for k in range(20) if torch.equal(images[k], image)]
            assert len(rows) == 1
            assert labels[rows[0]] == name
            seen.add(rows[0])
    assert seen == set(range(20))
    assert alike(list(stream), list(stream))
    halves = [from_images(given, labels)(Shard(CPU.device, rank, 2), 8, (0, "stream", 0, 0)) for rank in (0, 1)]
    assert same((torch.cat([h[0] for h in halves]), torch.cat([h[1] for h in halves])), stream.batch(0))


def test_bytes_become_images_in_range() -> None:
    assert torch.equal(to_float(torch.tensor([0, 51, 255], dtype=torch.uint8)), torch.tensor([0.0, 0.2, 1.0]))
    assert torch.equal(to_float(torch.tensor([0.25], dtype=torch.float64)), torch.tensor([0.25]))


# --- ways out ---


def test_a_loader_keeps_the_stream_also_when_prepared(make_stream: MakeStream, accelerator: Accelerator) -> None:
    stream = make_stream(num_batches=3)
    own = list(stream)
    loader = as_dataloader(stream)
    assert isinstance(loader, DataLoader)
    assert len(loader) == 3
    prepared = accelerator.prepare(loader)
    for each in (loader, prepared):
        assert alike([tuple(batch) for batch in each], own)
    stream.set_epoch(2)
    assert same(next(iter(prepared)), stream.batch(0, epoch=2))


def test_calibration_reads_the_first_batches_once_until_rewound(make_stream: MakeStream) -> None:
    """What ONNX Runtime's quantize_static asks of a reader: get_next gives feeds by input name, then None."""
    stream = make_stream()
    reader = CalibrationReader(stream, "images", batches=3)
    for _ in range(2):
        feeds = list(iter(reader.get_next, None))
        assert len(feeds) == 3
        for index, feed in enumerate(feeds):
            assert list(feed) == ["images"]
            assert feed["images"].dtype == np.float32
            assert np.array_equal(feed["images"], stream.batch(index)[0].numpy())
        assert reader.get_next() is None
        reader.rewind()


def test_a_stream_is_kept_as_tensors(make_stream: MakeStream, make_teacher: Callable[..., Teacher]) -> None:
    stream = make_stream(teacher=make_teacher(), num_batches=3)
    images, logits = materialize(stream, 20).tensors
    own = list(stream)
    assert torch.equal(images, torch.cat([batch for batch, _ in own])[:20])
    assert torch.equal(logits, torch.cat([target for _, target in own])[:20])


def test_what_is_kept_or_calibrated_with_is_of_the_streams_epoch(make_stream: MakeStream) -> None:
    stream = make_stream(num_batches=2)
    stream.set_epoch(3)
    wanted = torch.cat([images for images, _ in stream])
    assert torch.equal(materialize(stream, 16).tensors[0], wanted)
    feed = CalibrationReader(stream, "x", 1).get_next()
    assert feed is not None
    assert np.array_equal(feed["x"], wanted[:8].numpy())


@pytest.mark.parametrize("classes", [3, 12])
@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_folder_reads_back_the_same_images_and_labels(
    make_generator: Callable[..., ConvGenerator], tmp_path: Path, channels: int, classes: int
) -> None:
    generator = make_generator(channels=channels, classes=classes).eval()
    data = materialize(SyntheticStream(generator, batch_size=24, shard=CPU), 30, tmp_path / "images")
    folder = ImageFolder(str(tmp_path / "images"))
    assert len(folder) == len(data) == 30
    found = {Path(path).stem: (path, label) for path, label in folder.samples}
    for number, (image, label) in enumerate(data):
        path, read_label = found[f"{number:05d}"]
        assert read_label == int(label)
        pixels = pil_to_tensor(folder.loader(path)).float() / 255
        assert (pixels - image).abs().max() <= 0.5 / 255 + 1e-6  # a grey image is read as three equal channels


@pytest.mark.parametrize("features", [False, True])
def test_an_image_folder_of_logits_goes_by_their_argmax(
    make_stream: MakeStream, make_teacher: Callable[..., Teacher], tmp_path: Path, features: bool
) -> None:
    data = materialize(make_stream(teacher=make_teacher(), features=features), 10, tmp_path)
    for number, (_, targets) in enumerate(data):
        (path,) = tmp_path.rglob(f"{number:05d}.png")
        assert int(path.parent.name) == int(targets[:3].argmax())


@pytest.mark.parametrize("strided", [False, True])
def test_onnx_runtime_calibrates_on_a_stream(tmp_path: Path, make_generator: Callable, strided: bool) -> None:
    import onnx
    from onnx import TensorProto, helper, numpy_helper
    from onnxruntime import InferenceSession
    from onnxruntime.quantization import QuantFormat, quantize_static

    generator = make_generator().eval()
    channels, size = generator.channels, generator.size
    kernel = np.random.default_rng(0).normal(size=(4, channels, 3, 3)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Conv", ["images", "kernel"], ["maps"], pads=[1, 1, 1, 1])],
        "conv",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", channels, size, size])],
        [helper.make_tensor_value_info("maps", TensorProto.FLOAT, ["batch", 4, size, size])],
        [numpy_helper.from_array(kernel, "kernel")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, tmp_path / "float.onnx")
    stream = SyntheticStream(generator, batch_size=16)
    reader = CalibrationReader(stream, "images", batches=4)
    options = {"CalibStridedMinMax": 2} if strided else {}  # two batches at a time
    quantize_static(
        tmp_path / "float.onnx", tmp_path / "int8.onnx", reader, quant_format=QuantFormat.QDQ, extra_options=options
    )
    assert reader.get_next() is None

    images = stream.batch(9)[0]
    got = InferenceSession(tmp_path / "int8.onnx").run(None, {"images": images.numpy()})[0]
    want = torch.nn.functional.conv2d(images, torch.from_numpy(kernel), padding=1).numpy()
    assert np.abs(got - want).mean() < 0.03 * want.std()  # 8 bits, with ranges that were seen on the stream


def test_images_without_labels_make_no_class_folders(tmp_path: Path) -> None:
    pool = PoolGenerator(classes=3, channels=1, size=4, capacity=8, conditional=False)
    pool.push(torch.rand(8, 1, 4, 4), torch.zeros(8, dtype=torch.int64))
    stream = SyntheticStream(pool, batch_size=4, num_batches=2)
    assert len(materialize(stream, 8)) == 8
    with pytest.raises(UserError, match="draws no class on request"):
        materialize(stream, 8, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more than there may be cores
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_of_a_loader_share_the_batches(make_stream: MakeStream, workers: int) -> None:
    stream = make_stream(num_batches=4)
    loaded = list(DataLoader(stream, batch_size=None, num_workers=workers))
    assert alike(loaded, list(stream))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_ring_is_not_shared_by_workers(make_stream: MakeStream, make_teacher: Callable[..., Teacher]) -> None:
    stream = make_stream(replay=2, teacher=make_teacher())
    loader = DataLoader(stream, batch_size=None, num_workers=1)  # torch waits 5 s for each that failed
    with pytest.raises(UserError, match="num_workers=0"):
        next(iter(loader))


def test_images_go_into_a_folder_of_their_own(make_stream: MakeStream, tmp_path: Path) -> None:
    materialize(make_stream(), 5, tmp_path / "images")
    with pytest.raises(UserError, match="is no empty folder; give one for these images alone"):
        materialize(make_stream(seed=1), 3, tmp_path / "images")
    assert len(list((tmp_path / "images").rglob("*.png"))) == 5
    with pytest.raises(UserError, match="a count of 1 image or more, got 0"):
        materialize(make_stream(), 0)


def test_what_no_stream_can_be_made_of_is_refused(make_stream: MakeStream) -> None:
    with pytest.raises(UserError, match=r"Teacher\(network, mean=\.\.\., std=\.\.\.\)"):
        make_stream(teacher=nn.Linear(2, 2))
    for source in ("runs/digits/generator", nn.Linear(2, 2)):
        with pytest.raises(UserError, match=rf"load_generator\(FOLDER\).* got a {type(source).__name__}"):
            SyntheticStream(source, batch_size=4)  # type: ignore[arg-type]
    coloured = Teacher(nn.Flatten(), name="coloured", mean=[0.5] * 3, std=[0.2] * 3)
    with pytest.raises(UserError, match="teacher coloured has a mean of 3 channels, the images have 1"):
        make_stream(teacher=coloured)
    with pytest.raises(UserError, match="batch -1 is before the first"):
        make_stream(num_batches=4).batch(-1)
    with pytest.raises(UserError, match="100 images go past the end of a stream of 32"):
        materialize(make_stream(num_batches=4), 100)
    with pytest.raises(UserError, match="replay >= 0"):
        make_stream(replay=-1)
    for name in ("shift", "mix", "fresh"):
        with pytest.raises(UserError, match=f"a stream's {name} is a number, got None"):
            make_stream(**{name: None})
    for wrong in (3, nn.ModuleList()):
        with pytest.raises(UserError, match=rf"got a {type(wrong).__name__}; give Teacher\(network"):
            make_stream(teacher=wrong)
    with pytest.raises(UserError, match=r"epoch is a whole number, got 1\.5"):
        make_stream().set_epoch(1.5)  # type: ignore[arg-type]
    for call in (as_dataloader, lambda given: materialize(given, 1), lambda given: CalibrationReader(given, "x", 1)):
        with pytest.raises(UserError, match="a Linear is no stream"):
            call(nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"1 image or more, got 2\.5"):
        materialize(make_stream(), 2.5)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"by number.* give replay=0"):
        CalibrationReader(make_stream(replay=2), "x", 1)
    for batches in (2.5, -1, 0, 5):
        with pytest.raises(UserError, match=f"a calibration reader.*got {batches}"):
            CalibrationReader(make_stream(num_batches=4), "x", batches)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"epoch is a whole number, got 1\.5"):
        make_stream().batch(0, epoch=1.5)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"a mean and a std of pixels, finite numbers, got None and 0\.25"):
        from_noise(1, 8, 3, mean=None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"from_generator takes a generator .* got a int"):
        from_generator(3)  # type: ignore[arg-type]
    for size in (0, 6.5):
        with pytest.raises(UserError, match=rf"batch_size.* got {size}"):
            make_stream().batch_size = size  # type: ignore[assignment]
    for counts in ((0, 8, 3), (1, -8, 3), (1, 8, "3")):
        with pytest.raises(UserError, match="from_noise takes whole numbers"):
            from_noise(*counts)  # type: ignore[arg-type]


def test_teachers_may_be_given_as_anything_that_holds_them(
    make_stream: MakeStream, make_teacher: Callable[..., Teacher]
) -> None:
    zoo = {name: make_teacher(name) for name in ("one", "other")}
    assert make_stream(teacher=zoo.values()).teachers == list(zoo.values())


def test_another_batch_size_may_be_set_while_batches_are_drawn(make_stream: MakeStream) -> None:
    stream = make_stream(replay=3, fresh=0.5)
    sizes = []
    for index, (images, labels) in zip(range(4), stream):
        sizes.append((len(images), len(labels)))
        stream.batch_size = 8 if index == 2 else 6
    assert sizes == [(8, 8), (6, 6), (6, 6), (8, 8)]


def test_what_is_materialized_is_an_iteration(make_stream: MakeStream) -> None:
    stream = make_stream(num_batches=4, replay=2)
    wanted = torch.cat([images for images, _ in stream])
    for _ in range(2):  # whatever the ring holds of what came before
        assert torch.equal(materialize(stream, 30).tensors[0], wanted[:30])


def test_calibration_ends_with_its_batches_whatever_range_is_asked_for(make_stream: MakeStream) -> None:
    reader = CalibrationReader(make_stream(), "x", batches=3)
    for begin, end, count in ((0, 2, 2), (2, 4, 1), (1, 99, 2)):
        reader.set_range(begin, end)
        assert len(list(iter(reader.get_next, None))) == count


def test_a_stream_computes_in_the_precision_it_is_given(
    make_stream: MakeStream, make_teacher: Callable[..., Teacher]
) -> None:
    teacher, found = make_teacher(), []
    teacher.model.linear.register_forward_hook(lambda module, given, out: found.append(out.dtype))
    stream = make_stream(teacher=teacher, autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    images, logits = stream.batch(0)
    assert found == [torch.bfloat16]
    assert images.dtype == logits.dtype == torch.float32


@pytest.mark.parametrize("options", [{}, {"shift": 0.2}, {"shift": 0.2, "mix": 0.5}, {"shift": 0.2, "replay": 2}])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_laid_out_as_asked_so_that_a_network_may_view_their_maps(
    options: dict[str, Any], channels: int
) -> None:
    """Of one channel torch takes any strides for either layout, and its convolutions go by them."""
    torch.manual_seed(0)
    convolution, images = torch.nn.Conv2d(channels, 4, 3), torch.rand(20, 9, 9, channels).permute(0, 3, 1, 2)
    stream = SyntheticStream(
        from_images(images, torch.zeros(20, dtype=torch.int64)), batch_size=8, shard=CPU, **options
    )
    for index in range(4):
        assert convolution(stream.batch(index)[0]).view(8, -1).shape == (8, 196)


def test_a_shift_is_the_nearest_number_of_pixels() -> None:
    point = torch.zeros(1, 1, 9, 9)
    point[..., 4, 4] = 1
    stream = SyntheticStream(
        from_images(point, torch.zeros(1, dtype=torch.int64)), batch_size=400, shift=0.2, shard=CPU
    )
    images, _ = stream.batch(0)  # 1.8 pixels
    assert {tuple(place) for place in images[:, 0].nonzero()[:, 1:].tolist()} == {
        (y, x) for y in range(2, 7) for x in range(2, 7)
    }


def test_an_epoch_replays_other_images() -> None:
    def source(shard: Shard, count: int, position: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        return torch.full((count, 1, 2, 2), position[-1] / 255), torch.zeros(count, dtype=torch.int64)

    seen = []
    for epoch in (0, 1, 0):
        stream = SyntheticStream(source, batch_size=8, replay=6, num_batches=6, epoch=epoch, shard=CPU)
        seen.append(torch.cat([images[:, 0, 0, 0] for images, _ in stream]))
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], seen[1])
