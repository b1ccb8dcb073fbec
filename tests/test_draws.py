"""What is random by position: balanced labels, latents, moves; the same however many processes share them."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dfkd.draws import Moves, augment, draw_labels, draw_latents, jitter
from dfkd.runtime import Shard

CPU = torch.device("cpu")
SEED = 5


@pytest.mark.parametrize("repeats", [1, 2])
@pytest.mark.parametrize("classes", [2, 3, 10, 100])
@pytest.mark.parametrize("batch", [4, 8, 30, 256])
def test_labels_are_balanced_over_the_global_batch(batch: int, classes: int, repeats: int) -> None:
    drawn = set()
    for step in range(20):
        shards = [draw_labels(Shard(CPU, rank, 2), batch, classes, "p", step, repeats=repeats) for rank in (0, 1)]
        labels = torch.cat(shards)
        assert torch.equal(labels, draw_labels(Shard(CPU), 2 * batch, classes, "p", step, repeats=repeats))
        assert labels.dtype == torch.int64
        counts = labels.bincount(minlength=classes)
        present = min(classes, 2 * batch // repeats)
        assert len(counts) == classes
        assert (counts > 0).sum() == present
        assert counts.max() - counts[counts > 0].min() <= repeats
        if repeats == 2:
            assert torch.equal(labels[0::2], labels[1::2])  # every pair: mode seeking counts the others as zero
        drawn.add(tuple(labels.tolist()))
    assert len(drawn) > 1
    seen = {label for labels in drawn for label in labels}
    assert len(seen) > 0.9 * classes if present * 20 > 3 * classes else len(seen) > present


def test_latents_are_standard_normal_and_two_shards_draw_those_of_one() -> None:
    whole = draw_latents(Shard(CPU), 4000, 5, 3, "synthesis", 1)
    assert whole.mean(0).abs().max() < 4 / 4000**0.5
    assert (whole.var(0) - 1).abs().max() < 4 * (2 / 4000) ** 0.5
    assert (torch.corrcoef(whole.T) - torch.eye(5)).abs().max() < 4 / 4000**0.5
    parts = [draw_latents(Shard(CPU, rank, 2), 2000, 5, 3, "synthesis", 1) for rank in (0, 1)]
    assert torch.equal(torch.cat(parts), whole)
    for other in ((3, "synthesis", 2), (4, "synthesis", 1), (3, "stream", 1)):
        assert not torch.equal(draw_latents(Shard(CPU), 4000, 5, *other), whole)


def moved(image: Tensor, moves: Moves) -> Iterator[Tensor]:
    """Every place an image [C, H, W] can be moved to, by torch's own padding; and these flipped."""
    height, width = image.shape[-2:]
    padded = F.pad(image[None], (moves.shift,) * 4, mode="constant" if moves.black else "replicate")[0]
    for y in range(2 * moves.shift + 1):
        for x in range(2 * moves.shift + 1):
            crop = padded[:, y : y + height, x : x + width]
            yield crop
            if moves.flip:
                yield crop.flip(2)


@pytest.mark.parametrize("black", [False, True])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shift", [0, 1, 2])
def test_each_image_is_moved_and_its_gradient_back(shift: int, flip: bool, black: bool) -> None:
    moves = Moves(shift, flip, black)
    images = torch.rand(600, 2, 6, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):  # which must not round the pixels
        result = augment(images, Shard(CPU), moves, 1, "stream", 0)
    chosen, counts = [], torch.zeros((2 * shift + 1) ** 2 * (1 + flip))
    for image, found in zip(images, result):
        places = list(moved(image, moves))
        (hit,) = [k for k, candidate in enumerate(places) if torch.equal(candidate, found)]
        counts[hit] += 1
        chosen.append(places[hit])
    expected = 600 / len(counts)
    assert (counts - expected).abs().max() < 4.5 * expected**0.5 + (len(counts) == 1)
    weights = torch.rand(result.shape, generator=torch.Generator().manual_seed(1))
    (wanted,) = torch.autograd.grad((torch.stack(chosen) * weights).sum(), images)
    for _ in range(2):  # several teachers look at the same images
        (found,) = torch.autograd.grad((result * weights).sum(), images, retain_graph=True)
        assert torch.allclose(found, wanted, rtol=1e-6, atol=1e-6)
    assert torch.equal(result, augment(images, Shard(CPU), moves, 1, "stream", 0))
    if len(counts) > 1:
        assert not torch.equal(result, augment(images, Shard(CPU), moves, 1, "stream", 1))
    else:
        assert result is images
    halves = [Shard(CPU, rank, 2) for rank in (0, 1)]
    parts = [augment(half.take(images), half, moves, 1, "stream", 0) for half in halves]
    assert torch.equal(torch.cat(parts), result)


def test_a_moved_image_of_one_channel_has_plain_strides() -> None:
    result = augment(torch.rand(4, 1, 6, 5), Shard(CPU), Moves(1, True, True), 1, "stream", 0)
    assert result.stride() == (30, 30, 5, 1)


def test_jitter_rolls_the_whole_batch_by_every_offset_and_flips_half_the_time() -> None:
    images = torch.rand(3, 2, 7, 9, generator=torch.Generator().manual_seed(0))
    moved: dict[tuple[int, int, bool], Tensor] = {}
    for down in range(-1, 2):
        for across in range(-1, 2):
            rows, columns = (torch.arange(7) - down) % 7, (torch.arange(9) - across) % 9
            rolled = images[:, :, rows][:, :, :, columns]
            moved |= {(down, across, False): rolled, (down, across, True): rolled[..., range(8, -1, -1)]}
    seen = []
    for step in range(400):
        found = jitter(images, 1, True, SEED, step)
        (which,) = [key for key, value in moved.items() if torch.equal(found, value)]
        seen.append(which)
    counts = {key: seen.count(key) for key in moved}
    assert all(abs(count - 400 / 18) < 5 * (400 / 18) ** 0.5 for count in counts.values()), counts
    assert 150 < sum(flipped for *_, flipped in seen) < 250
    assert torch.equal(jitter(images, 1, True, SEED, 3), jitter(images, 1, True, SEED, 3))
    unflipped = {key: value for key, value in moved.items() if not key[2]}
    for step in range(20):
        assert any(torch.equal(jitter(images, 1, False, SEED, step), value) for value in unflipped.values())
        assert any(torch.equal(jitter(images, 0, True, SEED, step), moved[0, 0, flip]) for flip in (False, True))


def test_the_gradient_of_jitter_goes_back_to_where_pixels_came_from() -> None:
    images = torch.rand(2, 1, 6, 6).requires_grad_()
    weights = torch.rand(2, 1, 6, 6)
    (jitter(images, 2, True, 1, 4) * weights).sum().backward()
    assert not torch.equal(images.grad, weights)  # type: ignore[arg-type]
    assert torch.equal(jitter(images.grad, 2, True, 1, 4), weights)  # type: ignore[arg-type]
    still = torch.rand(1, 1, 2, 2)
    assert jitter(still, 0, False, 1) is still
