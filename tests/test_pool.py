"""The pool: images drawn again by class, each as often as any other, the oldest pushed out first."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from generators import PoolGenerator, load_generator, save_generator

SIZES: dict[str, Any] = {"classes": 4, "channels": 1, "size": 2}


def pool(capacity: int, **options: Any) -> PoolGenerator:
    return PoolGenerator(capacity=capacity, **{**SIZES, **options})


def numbered(first: int, count: int) -> Tensor:
    """Images whose grey level, in 255ths, is their number."""
    return torch.arange(first, first + count).view(-1, 1, 1, 1).expand(-1, 1, 2, 2) / 255


def latents(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, 1, generator=torch.Generator().manual_seed(seed))


def numbers(generator: PoolGenerator, labels: Tensor, seed: int = 1) -> Tensor:
    """The numbers of the images that are drawn for labels."""
    drawn = generator(latents(len(labels), seed), labels) * 255
    assert torch.equal(drawn, drawn[:, :, :1, :1].expand_as(drawn))
    return drawn[:, 0, 0, 0].round().long()


def kept(generator: PoolGenerator) -> set[int]:
    """The numbers of the images that can be drawn at all."""
    return set(numbers(generator, torch.arange(4000) % generator.classes).tolist())


def test_only_images_of_the_asked_class_are_drawn_and_all_alike_often() -> None:
    generator, labels = pool(50), torch.tensor([0, 2, 2, 1, 3, 2, 0, 3, 2, 1, 2])
    generator.push(numbered(0, 7), labels[:7])
    generator.push(numbered(7, 4), labels[7:])
    for label in range(4):
        wanted, count = (labels == label).nonzero().flatten(), 4000
        counts = numbers(generator, torch.full((count,), label), seed=label).bincount(minlength=11)
        assert counts[labels != label].sum() == 0
        expected = count / len(wanted)
        chi_square = float(((counts[wanted] - expected) ** 2 / expected).sum())
        assert chi_square < len(wanted) + 4 * (2 * len(wanted)) ** 0.5, counts  # mean n - 1, deviation sqrt(2 n - 2)
        assert len(wanted) == 1 or chi_square > 0  # drawn at random


def test_a_draw_of_many_classes_is_that_of_each() -> None:
    generator = pool(50)
    generator.push(numbered(0, 40), torch.arange(40) % 4)
    asked = torch.randint(4, (500,), generator=torch.Generator().manual_seed(2))
    assert torch.equal(numbers(generator, asked) % 4, asked)


@pytest.mark.parametrize("conditional", [True, False])
def test_any_image_stands_in_for_a_class_that_is_absent_or_not_asked_for(conditional: bool) -> None:
    generator = pool(20, conditional=conditional)
    generator.push(numbered(0, 9), torch.tensor([0] * 6 + [3] * 3))
    absent = numbers(generator, torch.full((4500,), 1)).bincount(minlength=20)
    assert absent[9:].sum() == 0  # not of the rows that hold nothing yet
    assert ((absent[:9] - 500).abs() < 5 * 500**0.5).all(), absent
    present = set(numbers(generator, torch.full((1000,), 3)).tolist())
    assert present == ({6, 7, 8} if conditional else set(range(9)))


def test_an_unfilled_pool_draws_black() -> None:
    for conditional in (True, False):
        generator = pool(5, conditional=conditional)
        images = generator(latents(8), torch.arange(8) % 4)
        assert images.shape == (8, 1, 2, 2)
        assert not images.any()


def test_the_ends_of_the_normal_distribution_draw_the_first_and_the_last() -> None:
    generator = pool(10)
    generator.push(numbered(0, 6), torch.tensor([0, 1, 1, 1, 2, 2]))
    drawn = generator(torch.tensor([[-40.0], [40.0]]), torch.tensor([1, 1]))
    assert (drawn[:, 0, 0, 0] * 255).round().tolist() == [1, 3]


def test_the_oldest_make_way_in_the_order_they_came() -> None:
    generator = pool(5)
    held: list[int] = []
    for first, count in ((0, 3), (3, 1), (4, 3), (7, 5), (12, 2), (14, 4)):
        generator.push(numbered(first, count), torch.arange(first, first + count) % 4)
        held = [*held, *range(first, first + count)][-5:]
        assert kept(generator) == set(held)
        asked = torch.arange(100) % 4
        found = numbers(generator, asked)
        served = [label in {number % 4 for number in held} for label in asked.tolist()]
        assert all(number % 4 == label for number, label, ok in zip(found.tolist(), asked.tolist(), served) if ok)


def test_of_a_push_beyond_its_capacity_the_newest_stay() -> None:
    generator = pool(4)
    generator.push(numbered(0, 3), torch.zeros(3, dtype=torch.int64))
    generator.push(numbered(3, 11), torch.arange(11) % 4)
    assert kept(generator) == {10, 11, 12, 13}
    generator.push(numbered(14, 1), torch.zeros(1, dtype=torch.int64))
    assert kept(generator) == {11, 12, 13, 14}


def test_images_are_kept_to_half_a_grey_level() -> None:
    generator, images = pool(30, channels=3, size=16), torch.rand(30, 3, 16, 16)
    generator.push(images, torch.zeros(30, dtype=torch.int64))
    assert generator.images.dtype == torch.uint8
    stored = generator.images.float() / 255
    error = (stored - images).abs().max()
    assert 0.45 / 255 < error < 0.5001 / 255
    drawn = generator(latents(200), torch.zeros(200, dtype=torch.int64))
    assert all((image == stored).flatten(1).all(1).any() for image in drawn)


def test_a_saved_pool_draws_the_same_and_goes_on_where_it_was(tmp_path: Path) -> None:
    generator = pool(6)
    generator.push(numbered(0, 8), torch.tensor([3, 3, 0, 2, 2, 0, 1, 1]))
    save_generator(tmp_path, generator, {"arch": "pool", **SIZES, "capacity": 6, "conditional": True})
    loaded = load_generator(tmp_path)
    asked = torch.arange(200) % 4
    assert len(set(numbers(generator, asked).tolist())) == 6
    assert torch.equal(numbers(loaded, asked), numbers(generator, asked))
    for each in (generator, loaded):
        each.push(numbered(8, 3), torch.tensor([3, 3, 3]))  # type: ignore[operator]
    assert torch.equal(numbers(loaded, asked), numbers(generator, asked))
    assert kept(loaded) == {5, 6, 7, 8, 9, 10}  # type: ignore[arg-type]


def test_drawing_and_pushing_wait_for_no_value(no_host_read: Any) -> None:
    generator, images, labels = pool(6), numbered(0, 4).clone(), torch.arange(4)
    noise = latents(9)
    with no_host_read(images, labels, noise, *generator.buffers()):
        generator.push(images, labels)
        drawn = generator(noise, torch.arange(9) % 4)
    assert drawn.shape == (9, 1, 2, 2)


def test_a_copy_and_a_pickle_draw_what_they_are_given() -> None:
    given, labels = pool(8), torch.tensor([0, 0, 1, 1])
    given.push(numbered(0, 4), labels)
    for other in (copy.deepcopy(pool(8)), pickle.loads(pickle.dumps(pool(8)))):
        other.load_state_dict(given.state_dict())
        assert torch.equal(numbers(other, labels), numbers(given, labels))
    assert torch.equal(numbers(pickle.loads(pickle.dumps(given)), labels), numbers(given, labels))
