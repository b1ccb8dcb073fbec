"""Where a stream's images come from, and that it gives the same wherever it is: other processes, process groups."""

import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from dfkd.errors import UserError
from dfkd.stream import SyntheticStream, from_images, from_noise
from dfkd.teachers import Teacher
from generators import ConvGenerator


def same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_whole_numbers_of_numpy_are_whole_numbers() -> None:
    stream = SyntheticStream(from_noise(1, 8, 3), seed=3)
    wanted = stream.batch(2, epoch=1)
    assert same(SyntheticStream(from_noise(1, 8, 3), seed=np.int64(3)).batch(np.int32(2), epoch=np.int64(1)), wanted)
    with pytest.raises(UserError, match=r"whole number, got 0\.5"):
        stream.batch(0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["generator", "noise", "images"])
def test_a_stream_can_be_sent_to_another_process(
    make_generator: Callable[..., ConvGenerator], make_teacher: Callable[..., Teacher], kind: str
) -> None:
    sources = {
        "generator": make_generator().eval(),
        "noise": from_noise(1, 8, 3),
        "images": from_images(torch.rand(9, 1, 8, 8), torch.arange(9) % 3),
    }
    stream = SyntheticStream(sources[kind], batch_size=8, teacher=make_teacher(), mix=1.0, replay=2, features=True)
    assert same(pickle.loads(pickle.dumps(stream)).batch(1), stream.batch(1))


def test_a_stream_is_of_its_process_in_a_group_that_accelerate_does_not_know(
    make_generator: Callable[..., ConvGenerator], monkeypatch: pytest.MonkeyPatch
) -> None:
    def shard() -> tuple[int, int]:
        made = [SyntheticStream(source).shard for source in (make_generator(), from_noise(1, 8, 3))]
        assert made[0] == made[1]
        return made[0].rank, made[0].world

    assert shard() == (0, 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one of 2 processes without a process group"):
        shard()
    assert not torch.distributed.is_initialized()
    torch.distributed.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    try:
        assert shard() == (1, 2)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.rand(3, 1, 8, 8), torch.zeros(4), r"a label for each, labels \[N\]; got \[3, 1, 8, 8\]"),
        (torch.rand(0, 1, 8, 8), torch.zeros(0), "takes images"),
        (torch.rand(3, 1, 8, 8) * 255, torch.zeros(3), "divide by 255"),
        (torch.ones(3, 1, 8, 8, dtype=torch.int64), torch.zeros(3), "divide by 255"),
    ],
)
def test_images_that_are_none_are_refused(images: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_images(images, labels)
