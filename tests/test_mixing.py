"""Data Mixing: exact areas, torch's own resize, exact gradients, boxes by position, no wait for the device."""

import pytest
import torch
import torch.nn.functional as F
from kornia.augmentation import AugmentationSequential
from torch import Tensor

from dfkd.errors import UserError
from dfkd.mixing import MIXES, Mixed, RandomResizeMix, make_mix, mix_batch, partners, paste
from dfkd.runtime import Shard

CPU = Shard(torch.device("cpu"))


def boxes(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Boxes [count, 4] drawn here: the smallest and the whole image first, then any."""
    rng = torch.Generator().manual_seed(seed)
    drawn = [[width - 1, height - 1, 1, 1], [0, 0, width, height]]
    while len(drawn) < count:
        w, h = (int(torch.randint(1, side + 1, (), generator=rng)) for side in (width, height))
        x, y = (int(torch.randint(0, side - size + 1, (), generator=rng)) for side, size in ((width, w), (height, h)))
        drawn.append([x, y, w, h])
    return torch.tensor(drawn[:count])


def images(
    batch: int, height: int = 7, width: int = 10, channels: int = 2, dtype: torch.dtype = torch.float32
) -> Tensor:
    return torch.rand(batch, channels, height, width, generator=torch.Generator().manual_seed(5), dtype=dtype)


def labels(batch: int) -> Tensor:
    return torch.randint(100, (batch,), generator=torch.Generator().manual_seed(6))


def reference(x1: Tensor, x2: Tensor, box: Tensor, antialias: bool) -> Tensor:
    """Image by image: F.interpolate of the whole second image, copied into the box of the first."""
    mixed = []
    for one, two, (x, y, w, h) in zip(x1, x2, box.tolist()):
        small = two[None]
        # With antialias first the height, then the width: torch 2.15 on a CPU errs in one go to a width of 1.
        for size in [(h, two.shape[2]), (h, w)] if antialias else [(h, w)]:
            small = F.interpolate(small, size=size, mode="bilinear", align_corners=False, antialias=antialias)
        whole = one.clone()
        whole[:, y : y + h, x : x + w] = small[0]
        mixed.append(whole)
    return torch.stack(mixed)


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 2e-6), (torch.float64, 1e-12)])
def test_the_whole_second_image_is_resized_as_torch_does(antialias: bool, dtype: torch.dtype, error: float) -> None:
    x1, x2 = images(200, 11, 16, dtype=dtype), images(200, 11, 16, dtype=dtype).flip(0)
    box = boxes(200, 11, 16)
    mixed = paste(x1, x2, box, antialias)
    assert mixed.dtype == dtype
    assert (mixed - reference(x1, x2, box, antialias)).abs().max() < error


@pytest.mark.parametrize("antialias", [False, True])
def test_gradients_are_exact_for_both_images(antialias: bool) -> None:
    x1, x2 = (images(3, 5, 6, 1, torch.float64).flip(k).requires_grad_() for k in (0, 3))
    box = boxes(3, 5, 6)
    assert torch.autograd.gradcheck(lambda a, b: paste(a, b, box, antialias), (x1, x2))


@pytest.mark.parametrize("kind", ["resize", "cutmix"])
@pytest.mark.parametrize("step", range(5))
def test_the_pasted_area_is_exactly_beta(kind: str, step: int) -> None:
    rows = torch.arange(64)
    ones = (rows & 2).bool()  # paired with zeros
    x = ones.float().view(-1, 1, 1, 1).expand(-1, 1, 7, 10)
    mixed = mix_batch(make_mix(kind), x, ones.long(), CPU, step)
    pasted = (mixed.images[:, 0] > 0.5) != ones.view(-1, 1, 1)
    error = 0 if kind == "resize" else 1e-7  # Kornia gives 1 - beta, rounded
    assert ((pasted.sum((1, 2)).float() / 70 - mixed.beta).abs() <= error).all()
    assert torch.equal(mixed.other, 1 - mixed.labels)
    assert mixed.beta.unique().numel() > 10


def test_mixup_shares_are_those_of_its_labels() -> None:
    ones = (torch.arange(64) & 2).bool()
    mixed = mix_batch(make_mix("mixup"), ones.float().view(-1, 1, 1, 1).expand(-1, 1, 4, 4), ones.long(), CPU, 0)
    share = torch.where(ones, 1 - mixed.images[:, 0, 0, 0], mixed.images[:, 0, 0, 0])
    assert torch.allclose(share, mixed.beta)
    assert torch.equal(mixed.other, 1 - mixed.labels)


def test_a_batch_is_mixed_with_its_partners_in_the_drawn_boxes() -> None:
    mix, x, y = make_mix("resize"), images(16), labels(16)
    mixed = mix_batch(mix, x, y, CPU, 3)
    box, partner = mix._params["box"], partners(16)
    assert torch.allclose(mixed.images, reference(x, x[partner], box, False), atol=2e-6)
    assert torch.equal(mixed.labels, y)
    assert torch.equal(mixed.other, y[partner])
    assert torch.equal(mixed.beta, (box[:, 2] * box[:, 3]).float() / 70)


def test_gradient_reaches_both_images_of_a_pair_and_no_other() -> None:
    x = images(8).requires_grad_()
    mixed = mix_batch(make_mix("resize"), x, labels(8), CPU, 4)
    partner = partners(8)
    inside = ((mixed.beta > 0) & (mixed.beta < 1)).nonzero().flatten().tolist()
    assert inside
    for row in inside:
        (grad,) = torch.autograd.grad(mixed.images[row].sum(), x, retain_graph=True)
        assert set(grad.flatten(1).any(1).nonzero().flatten().tolist()) == {row, int(partner[row])}


@pytest.mark.parametrize("batch", [2, 3, 4, 5, 6, 7, 8, 64, 100])
def test_partners_are_others_two_apart(batch: int) -> None:
    rows, partner = torch.arange(batch), partners(batch)
    assert (partner != rows).all()
    assert ((partner >= 0) & (partner < batch)).all()
    whole = batch // 4 * 4
    assert torch.equal(partner[partner][:whole], rows[:whole])
    assert ((partner - rows)[:whole].abs() == 2).all()


def test_width_and_height_are_independent_and_uniform() -> None:
    count, height, width = 40_000, 12, 18
    torch.manual_seed(0)
    box = RandomResizeMix().forward_parameters(torch.Size((count, 1, height, width)))["box"]
    x, y, w, h = box.unbind(1)
    assert ((x >= 0) & (y >= 0) & (w >= 1) & (h >= 1) & (x + w <= width) & (y + h <= height)).all()

    def surprise(values: Tensor, cells: int) -> float:
        """Standard deviations by which chi-squared exceeds its mean if all cells are equally likely."""
        expected = len(values) / cells
        chi2 = float(((values.bincount(minlength=cells) - expected) ** 2 / expected).sum())
        return (chi2 - (cells - 1)) / (2 * (cells - 1)) ** 0.5

    assert surprise(w - 1, width) < 4
    assert surprise(h - 1, height) < 4
    assert surprise((w - 1) * height + h - 1, width * height) < 4  # jointly: independent
    assert abs(float(torch.corrcoef(torch.stack([w, h]).double())[0, 1])) < 4 / count**0.5
    for size in (1, 5, 12, 17):  # places are uniform, whatever the width
        assert surprise(x[w == size], width - size + 1) < 4
    assert surprise(y[h == 4], height - 3) < 4


@pytest.mark.parametrize("kind", sorted(MIXES))
def test_no_mixing_at_probability_zero(kind: str) -> None:
    x, y = images(8), labels(8)
    mixed = mix_batch(make_mix(kind, probability=0), x, y, CPU, 1)
    assert torch.equal(mixed.images, x)
    assert torch.equal(mixed.labels, y)
    assert torch.equal(mixed.other, y)


def test_a_share_of_batches_is_mixed() -> None:
    mix, x, y = make_mix("resize", probability=0.3), images(4), labels(4)
    mixed = [not torch.equal(mix_batch(mix, x, y, CPU, step).images, x) for step in range(300)]
    assert 0.2 < sum(mixed) / 300 < 0.4


@pytest.mark.parametrize("kind", sorted(MIXES))
def test_a_batch_depends_on_its_position_alone(kind: str) -> None:
    x, y = images(8), labels(8)

    def mixed(*position: int | str) -> Mixed:
        return mix_batch(make_mix(kind), x, y, CPU, *position)

    torch.manual_seed(1)
    first = mixed(7, "synthesis", 2)
    torch.manual_seed(2)
    again = mixed(7, "synthesis", 2)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    for other in ((7, "synthesis", 3), (8, "synthesis", 2), (7, "stream", 2)):
        assert not torch.equal(first.images, mixed(*other).images)


@pytest.mark.parametrize("kind", sorted(MIXES))
def test_two_shards_are_mixed_as_their_global_batch(kind: str) -> None:
    x, y = images(16), labels(16)
    whole = mix_batch(make_mix(kind), x, y, CPU, 0)
    parts = []
    for rank in (0, 1):
        shard = Shard(CPU.device, rank, 2)
        parts.append(mix_batch(make_mix(kind), shard.take(x), shard.take(y), shard, 0))
    for name in Mixed._fields:
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name)), name


@pytest.mark.parametrize("kind", sorted(MIXES))
def test_the_global_generators_stay_as_they_were(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    torch.default_generator.manual_seed(3)
    state = torch.get_rng_state()
    mix_batch(make_mix(kind), images(8), labels(8), CPU, 0)
    assert torch.equal(torch.get_rng_state(), state)
    assert not seeded, "the generators of the accelerators were seeded anew"


@pytest.mark.parametrize(("dtype", "error"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_half_precision_images_are_resized_to_their_precision(dtype: torch.dtype, error: float) -> None:
    x = images(50, 48, 64).to(dtype)  # places such as 47.5 pixels need more digits than bfloat16 has
    box = boxes(50, 48, 64)
    mixed = paste(x, x.flip(0), box)
    assert mixed.dtype == dtype
    assert (mixed.float() - reference(x.float(), x.float().flip(0), box, False)).abs().max() < error


def test_autocast_leaves_places_and_values_exact() -> None:
    x, y = images(8, 31, 33), labels(8)
    with torch.autocast("cpu", torch.bfloat16):
        cast = mix_batch(make_mix("resize"), x, y, CPU, 0)
    assert all(torch.equal(a, b) for a, b in zip(cast, mix_batch(make_mix("resize"), x, y, CPU, 0)))


def test_forward_and_backward_are_deterministic() -> None:
    def once() -> tuple[Tensor, Tensor]:
        x = images(16, 16, 16).requires_grad_()
        mixed = mix_batch(make_mix("resize", antialias=True), x, labels(16), CPU, 0).images
        (mixed * images(16, 16, 16).flip(0)).sum().backward()
        assert x.grad is not None
        return mixed.detach(), x.grad

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        first, second = once(), once()
    finally:
        torch.use_deterministic_algorithms(before)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("antialias", [False, True])
def test_nothing_waits_for_the_device(antialias: bool) -> None:
    """On the meta device tensors have no values: whatever asks for one fails, forward or backward."""
    x = images(8).to("meta").requires_grad_()
    mix = RandomResizeMix(antialias=antialias, data_keys=["input", "class"])
    params = mix.forward_parameters(x.shape)
    assert params["box"].device.type == "cpu"
    mixed, rows = mix(x, labels(8).to("meta"), params=params)
    mixed.square().sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert rows.device.type == "meta"
    for read in (lambda t: float(t.sum()), lambda t: t.tolist(), lambda t: t[t > 0.5]):
        with pytest.raises((RuntimeError, NotImplementedError)):
            read(mixed.detach())


def test_mixing_a_batch_reads_no_value_of_it(no_host_read: type) -> None:
    x, y = images(8).requires_grad_(), labels(8)
    with no_host_read(x, y):
        mixed = mix_batch(make_mix("resize"), x, y, CPU, 0)
        (mixed.images.square().mean() + mixed.beta.sum()).backward()
    assert x.grad is not None
    for read in (lambda t: float(t.sum()), lambda t: bool(t.sum() > 0), lambda t: t.tolist(), lambda t: t[t > 0.5]):
        with pytest.raises(AssertionError, match="waits for the device"), no_host_read(x):
            read(x * 2)


def test_it_is_a_kornia_augmentation() -> None:
    x, y = images(6), labels(6)
    mix = RandomResizeMix(data_keys=["input", "class"])
    torch.manual_seed(0)
    mixed, rows = mix(x, y)
    box, pair = mix._params["box"], mix._params["mix_pairs"]
    assert torch.allclose(mixed, reference(x, x[pair], box, False), atol=2e-6)
    wanted = [[a, b, w * h / 70] for a, b, (_, _, w, h) in zip(y.tolist(), y[pair].tolist(), box.tolist())]
    assert torch.allclose(rows, torch.tensor(wanted, dtype=torch.float32))
    torch.manual_seed(0)
    assert torch.equal(RandomResizeMix()(x), mixed)  # images alone
    chain = AugmentationSequential(RandomResizeMix(), data_keys=["input"])  # Kornia's has no mixed labels yet
    chained = chain(x)
    drawn = chain._params[0].data
    assert torch.allclose(chained, reference(x, x[drawn["mix_pairs"]], drawn["box"], False), atol=2e-6)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(UserError, match=r"unknown mix 'cutout'; choose from \['cutmix', 'mixup', 'resize'\]"):
        make_mix("cutout")


@pytest.mark.parametrize("antialias", [False, True])
def test_images_are_low_passed_where_it_is_asked_for(antialias: bool) -> None:
    mix, x = make_mix("resize", antialias=antialias), images(16)
    mixed = mix_batch(mix, x, labels(16), CPU, 3)
    box, pasted = mix._params["box"], x[partners(16)]
    assert torch.allclose(mixed.images, reference(x, pasted, box, antialias), atol=2e-6)
    assert not torch.allclose(mixed.images, reference(x, pasted, box, not antialias), atol=1e-2)
