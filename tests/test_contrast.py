"""CMI's contrastive term: its crops against torch's sampling, its value against a sum by hand, its memory bank."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dfkd.contrast import NEGATIVES, SMALLEST, Contrast, crop
from dfkd.runtime import Shard
from dfkd.teachers import Teacher

ALONE = Shard(torch.device("cpu"))
BATCH, BANK = 4, 10
MakeTeacher = Callable[..., Teacher]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def teacher(make_teacher: MakeTeacher) -> Teacher:
    return make_teacher(seed=1, mean=[0.4], std=[0.3])


def features(teacher: Teacher, images: Tensor) -> Tensor:
    """Means over pixels of what every batch norm is given [B, D], through hooks of our own."""
    found: list[Tensor] = []
    norms = [module for module in teacher.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    handles = [norm.register_forward_hook(lambda m, x, y: found.append(x[0].mean((2, 3)))) for norm in norms]
    teacher(images)
    for handle in handles:
        handle.remove()
    return torch.cat(found, 1)


def make(teacher: Teacher, shard: Shard = ALONE, size: int = BANK, **options: Any) -> Contrast:
    return Contrast(features(teacher, random(1, 1, 8, 8)).shape[1], shard, size=size, **options)


def ask(contrast: Contrast, teacher: Teacher, images: Tensor) -> Tensor:
    """The term as the synthesizer asks for it."""
    with teacher.tap_means() as means:
        teacher(images)
    return contrast(teacher, images, means, 3, "x")


def test_a_batch_norm_behind_the_pixels_is_one_of_the_features() -> None:
    norms = [torch.nn.BatchNorm2d(3), torch.nn.BatchNorm1d(3)]
    pooled = torch.nn.Sequential(torch.nn.Conv2d(1, 3, 3), norms[0], torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    teacher = Teacher(torch.nn.Sequential(pooled, norms[1], torch.nn.Linear(3, 2)))
    with teacher.tap_means() as means:
        teacher(images := random(4, 1, 8, 8))
    torch.testing.assert_close(means[0], pooled[0](images).mean((2, 3)))
    torch.testing.assert_close(means[1], pooled(images))


# --- crops ---


@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 12)])
def test_a_crop_is_what_grid_sample_sees(height: int, width: int) -> None:
    images, boxes = random(6, 3, height, width, seed=1).double(), random(6, 4, seed=2).double()
    side = 0.2 + 0.8 * boxes[:, 2:]
    start = boxes[:, :2] * (1 - side)
    box = torch.cat([start, side], 1)
    flip = torch.tensor([True, False, True, False, True, True])
    # Of a grid over [-1, 1] from edge to edge, as align_corners=False has it: centre and half the length of the box.
    theta = torch.zeros(6, 2, 3, dtype=torch.float64)
    theta[:, 0, 0] = side[:, 0] * torch.where(flip, -1, 1)
    theta[:, 1, 1] = side[:, 1]
    theta[:, :, 2] = 2 * (start + side / 2) - 1
    grid = F.affine_grid(theta, [6, 3, height, width], align_corners=False)
    wanted = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    torch.testing.assert_close(crop(images, box, flip), wanted, rtol=1e-9, atol=1e-9)


def test_a_crop_of_whole_pixels_is_an_interpolated_slice() -> None:
    images = random(2, 1, 8, 8)
    box = torch.tensor([[2, 1, 4, 6], [0, 0, 8, 8]]) / 8
    found = crop(images, box, torch.tensor([False, True]))
    inside = F.interpolate(images[:1, :, 1:7, 2:6], size=(8, 8), mode="bilinear", align_corners=False)
    # Away from the edges: there a crop reads the pixels around the box, a slice has none.
    torch.testing.assert_close(found[:1, :, 1:-1, 1:-1], inside[:, :, 1:-1, 1:-1])
    torch.testing.assert_close(found[1:], images[1:].flip(3))


def test_views_are_of_a_quarter_to_the_whole_anywhere_and_mirrored_half_the_time(
    teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[Tensor, Tensor]] = []
    monkeypatch.setattr("dfkd.contrast.crop", lambda images, box, flip: given.append((box, flip)) or images)
    make(teacher)._view(torch.zeros(3000, 1, 2, 2), 1)
    box, flip = given[0]
    area = box[:, 2] * box[:, 3]
    assert float(area.min()) >= SMALLEST == 0.25
    assert float(area.max()) <= 1
    assert area.mean() == pytest.approx(0.625, abs=0.02)  # uniform
    assert float(box[:, :2].min()) >= 0
    assert float((box[:, :2] + box[:, 2:]).max()) <= 1 + 1e-6
    place = (box[:, :2] / (1 - box[:, 2:]))[area < 0.9]
    assert place.mean(0).tolist() == pytest.approx([0.5, 0.5], abs=0.03)
    assert np.corrcoef(place.T.numpy())[0, 1] == pytest.approx(0, abs=0.07)
    assert flip.float().mean() == pytest.approx(0.5, abs=0.05)


def test_two_processes_see_the_views_of_one(teacher: Teacher) -> None:
    images = random(BATCH, 1, 8, 8)
    whole = make(teacher)._view(images, 7, "a")
    parts = [
        make(teacher, Shard(ALONE.device, rank, 2))._view(images[2 * rank : 2 * rank + 2], 7, "a") for rank in (0, 1)
    ]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(make(teacher)._view(images, 8, "a"), whole)


# --- the term ---


def by_hand(queries: np.ndarray, keys: np.ndarray, bank: np.ndarray, temperature: float) -> float:
    """Mean over images of -log of the own key's share of exp(cosine / temperature), among all keys and the bank's."""

    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    queries, keys, bank = unit(queries), unit(keys), unit(bank)
    total = 0.0
    for k, query in enumerate(queries):
        own = np.exp(query @ keys[k] / temperature)
        others = sum(np.exp(query @ keys[j] / temperature) for j in range(len(keys)) if j != k)
        others += sum(np.exp(query @ each / temperature) for each in bank)
        total -= np.log(own / (own + others))
    return total / len(queries)


@pytest.mark.parametrize("earlier", [0, 4, 12])
@pytest.mark.parametrize("temperature", [0.1, 0.7])
def test_the_term_is_the_formula_over_the_batch_and_the_filled_bank(
    teacher: Teacher, earlier: int, temperature: float
) -> None:
    contrast = make(teacher, temperature=temperature)
    before = random(max(earlier, 1), 1, 8, 8, seed=5)[:earlier]
    for part in before.split(4) if earlier else ():
        contrast.remember(teacher, part)
    images = random(BATCH, 1, 8, 8, seed=6)
    first, _, second = contrast.head.double()

    def project(x: Tensor) -> np.ndarray:
        hidden = np.maximum(
            features(teacher, x).double().numpy() @ first.weight.detach().numpy().T + first.bias.detach().numpy(), 0
        )
        return hidden @ second.weight.detach().numpy().T + second.bias.detach().numpy()

    view = contrast._view(images, 3, "x")
    bank = project(before[-BANK:]) if earlier else np.zeros((0, 256))
    wanted = by_hand(project(view), project(images), bank, temperature)
    contrast.head.float()
    assert float(ask(contrast, teacher, images).detach()) == pytest.approx(wanted, rel=1e-4)
    assert wanted > 0.05


def test_an_own_key_is_no_negative(teacher: Teacher) -> None:
    """One image and an empty bank: there is nothing to tell it from, so the term is 0."""
    contrast = make(teacher)
    assert float(ask(contrast, teacher, random(1, 1, 8, 8)).detach()) == pytest.approx(0, abs=1e-6)
    contrast.remember(teacher, random(1, 1, 8, 8, seed=1))
    assert float(ask(contrast, teacher, random(1, 1, 8, 8)).detach()) > 0.1


def test_gradients_reach_images_and_head_and_neither_teacher_nor_bank(teacher: Teacher) -> None:
    contrast, images = make(teacher), random(BATCH, 1, 8, 8).requires_grad_()
    contrast.remember(teacher, random(BATCH, 1, 8, 8, seed=2))
    ask(contrast, teacher, images).backward()
    assert images.grad is not None
    assert (images.grad.flatten(1).abs().sum(1) > 0).all()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in contrast.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not contrast.bank.requires_grad
    assert not any(module._forward_pre_hooks for module in teacher.modules())


def test_following_its_gradient_makes_the_term_smaller(teacher: Teacher) -> None:
    contrast, images = make(teacher), random(BATCH, 1, 8, 8).requires_grad_()
    contrast.remember(teacher, random(BATCH, 1, 8, 8, seed=2))
    start = ask(contrast, teacher, images)
    (gradient,) = torch.autograd.grad(start, images)
    moved = images.detach() - 1e-2 * gradient / gradient.norm()
    assert ask(contrast, teacher, moved).item() < start.item()  # though the keys, which have no gradient, move too


# --- the memory bank ---


def test_the_oldest_features_make_way(teacher: Teacher) -> None:
    contrast, seen = make(teacher), []
    assert contrast.filled == 0
    for seed, count in enumerate((4, 4, 4, 3, 14, 2)):
        images = random(count, 1, 8, 8, seed=10 + seed)
        contrast.remember(teacher, images)
        seen += list(features(teacher, images))
        assert contrast.filled == min(len(seen), BANK)
        wanted = torch.stack(seen[-BANK:])
        found = contrast.bank[: contrast.filled]
        order = [int((found - row).abs().sum(1).argmin()) for row in wanted]
        assert sorted(order) == list(range(contrast.filled))
        torch.testing.assert_close(found[order], wanted)
    assert not contrast.bank.requires_grad


def test_a_state_dict_carries_head_bank_and_how_far_it_is_filled(teacher: Teacher) -> None:
    contrast, other = make(teacher, seed=1), make(teacher, seed=2)
    for seed, count in enumerate((4, 3)):
        contrast.remember(teacher, random(count, 1, 8, 8, seed=seed))
    images = random(BATCH, 1, 8, 8, seed=9)
    assert not torch.equal(ask(contrast, teacher, images), ask(other, teacher, images))
    other.load_state_dict(contrast.state_dict())
    for _ in range(2):
        assert torch.equal(ask(contrast, teacher, images), ask(other, teacher, images))
        for each in (contrast, other):
            each.remember(teacher, images)
    assert torch.equal(contrast.bank, other.bank)


def test_the_head_depends_on_the_seed_alone(teacher: Teacher) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, again, other = (make(teacher, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.head[0].weight, again.head[0].weight)
    assert not torch.equal(one.head[0].weight, other.head[0].weight)


def test_a_large_bank_is_contrasted_with_some_of_its_rows() -> None:
    contrast = Contrast(2, Shard(torch.device("cpu")), size=NEGATIVES + 100)
    contrast.bank[:, 0] = torch.arange(NEGATIVES + 100)
    contrast.filled = NEGATIVES
    assert torch.equal(contrast._earlier(0, "x"), contrast.bank[:NEGATIVES])
    contrast.filled = NEGATIVES + 50
    rows = contrast._earlier(0, "x")[:, 0]
    assert rows.shape == (NEGATIVES,)
    assert rows.max() < NEGATIVES + 50
    assert abs(rows.mean() - (NEGATIVES + 49) / 2) < 5 * NEGATIVES / (12 * NEGATIVES) ** 0.5
    assert torch.equal(rows, contrast._earlier(0, "x")[:, 0])
    assert not torch.equal(rows, contrast._earlier(1, "x")[:, 0])


def test_keys_take_no_gradient(teacher: Teacher) -> None:
    """As in CMI's code: queries are pulled towards their keys, not keys towards their queries."""
    contrast, images = make(teacher), random(BATCH, 1, 8, 8).requires_grad_()
    with teacher.tap_means() as means:
        teacher(images)
    keys = [each.detach().requires_grad_() for each in means]
    contrast(teacher, images, keys, 3, "x").backward()
    assert all(each.grad is None for each in keys)
    assert images.grad is not None
    assert images.grad.any()


def test_autocast_rounds_no_pixel_of_a_view(teacher: Teacher) -> None:
    images = random(BATCH, 1, 8, 8)
    exact = make(teacher)._view(images, 7, "a")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(make(teacher)._view(images, 7, "a"), exact)


def test_means_over_pixels_are_taken_in_float32(teacher: Teacher) -> None:
    inputs: list[Tensor] = []
    norms = [module for module in teacher.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.register_forward_hook(lambda module, given, out: inputs.append(given[0]))
    with torch.autocast("cpu", torch.bfloat16), teacher.tap_means() as means:
        teacher(random(BATCH, 1, 8, 8))
    assert {each.dtype for each in inputs} == {torch.bfloat16}
    for mean, given in zip(means, inputs, strict=True):
        torch.testing.assert_close(mean, given.float().mean((2, 3)), rtol=1e-5, atol=1e-6)


def test_head_and_temperature_are_cmis_unless_asked_for_otherwise(teacher: Teacher) -> None:
    contrast = make(teacher)
    assert contrast.temperature == 0.1
    assert [layer.out_features for layer in (contrast.head[0], contrast.head[2])] == [256, 256]
