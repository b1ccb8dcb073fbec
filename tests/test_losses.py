"""Every loss against a formula written out here in float64, and what it promises at its edges."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from kornia.filters import gaussian_blur2d
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from dfkd import losses as L

BATCH, CLASSES = 6, 5


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(seed: int = 0, classes: int = CLASSES, batch: int = BATCH) -> Tensor:
    return torch.randint(classes, (batch,), generator=torch.Generator().manual_seed(seed))


def moments(seed: int) -> list[tuple[Tensor, Tensor]]:
    """Mean and variance of three layers of 2, 3 and 7 channels."""
    return [(draw(c, seed=seed + c), draw(c, seed=seed + 9 * c).exp()) for c in (2, 3, 7)]


def close(value: Tensor, wanted: float | Tensor, rel: float = 1e-5) -> None:
    assert value.dim() == 0
    assert float(value) == pytest.approx(float(wanted), rel=rel)


def softmax(logits: list[float], temperature: float = 1.0) -> list[float]:
    top = max(logits)
    powers = [math.exp((x - top) / temperature) for x in logits]
    return [power / sum(powers) for power in powers]


def cosine(x: list[float], y: list[float]) -> float:
    """Cosine of two vectors."""
    return sum(a * b for a, b in zip(x, y)) / math.sqrt(sum(a * a for a in x) * sum(b * b for b in y))


def test_mixed_ce_is_cross_entropy_to_the_mixed_target() -> None:
    logits, own, other = draw(BATCH, CLASSES, scale=3), labels(1), labels(2)
    beta = torch.tensor([0.0, 1.0, 0.5, 0.25, 0.125, 0.9], dtype=torch.float64)
    assert (own != other).any()
    soft = torch.zeros(BATCH, CLASSES, dtype=torch.float64)
    for row in range(BATCH):
        soft[row, own[row]] += 1 - beta[row]
        soft[row, other[row]] += beta[row]
    close(L.mixed_ce(logits, own, other, beta), F.cross_entropy(logits, soft))
    close(L.mixed_ce(logits, own, other, torch.zeros(BATCH)), F.cross_entropy(logits, own))


def test_bn_l2_is_the_sum_of_distances_over_layers() -> None:
    batch, stored = moments(1), moments(2)
    wanted = 0.0
    for pair, other in zip(batch, stored):
        for x, y in zip(pair, other):
            wanted += math.sqrt(sum((a - b) ** 2 for a, b in zip(x.tolist(), y.tolist())))
    close(L.bn_l2(batch, stored), wanted)


def test_bn_l2_at_the_minimum_is_zero_with_a_finite_gradient() -> None:
    stored = moments(1)
    batch = [(mean.clone().requires_grad_(), var.clone().requires_grad_()) for mean, var in stored]
    value = L.bn_l2(batch, stored)
    value.backward()
    assert float(value.detach()) == 0
    assert all(x.grad is not None and x.grad.isfinite().all() for pair in batch for x in pair)


def test_bn_kl_is_the_divergence_of_two_normals_per_channel() -> None:
    batch, stored = moments(1), moments(2)
    wanted = sum(
        kl_divergence(Normal(mean, var.sqrt()), Normal(mu, sigma2.sqrt())).sum()
        for (mean, var), (mu, sigma2) in zip(batch, stored)
    )
    close(L.bn_kl(batch, stored, eps=0.0), wanted)
    assert float(L.bn_kl(stored, stored)) == pytest.approx(0, abs=1e-12)
    assert float(L.bn_kl(batch, stored)) != pytest.approx(float(L.bn_kl(stored, batch)), rel=0.01)


def test_bn_kl_stays_finite_where_a_channel_is_dead() -> None:
    zero, one = torch.zeros(3), torch.ones(3)
    assert L.bn_kl([(zero, zero)], [(one, one)]).isfinite()
    assert L.bn_kl([(one, one)], [(zero, zero)]).isfinite()


def test_bn_square_is_the_sum_of_squared_errors_of_means_and_deviations() -> None:
    batch, stored = moments(1), moments(2)
    wanted = 0.0
    for (mean, var), (mu, sigma2) in zip(batch, stored):
        wanted += sum((a - b) ** 2 for a, b in zip(mean.tolist(), mu.tolist()))
        wanted += sum((math.sqrt(a) - math.sqrt(b)) ** 2 for a, b in zip(var.tolist(), sigma2.tolist()))
    close(L.bn_square(batch, stored), wanted, rel=1e-4)
    assert L.BN_DISTANCES["square"](stored, stored) == 0


def test_bn_mse_is_the_mean_over_layers_of_mean_squared_errors() -> None:
    batch, stored = moments(1), moments(2)
    errors = [F.mse_loss(mean, mu) + F.mse_loss(var, sigma2) for (mean, var), (mu, sigma2) in zip(batch, stored)]
    close(L.bn_mse(batch, stored), sum(map(float, errors)) / len(errors))
    assert L.BN_DISTANCES["mse"](stored, stored) == 0


def test_bn_square_has_a_finite_gradient_where_a_channel_is_dead() -> None:
    mean, var = (torch.zeros(3, requires_grad=True) for _ in range(2))
    L.bn_square([(mean, var)], [(torch.ones(3), torch.tensor([1.0, 4.0, 0.0]))]).backward()
    assert mean.grad is not None
    assert var.grad is not None
    assert mean.grad.tolist() == [-2, -2, -2]
    assert var.grad.isfinite().all()
    assert (var.grad < 0).tolist() == [True, True, False]


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_kd_kl_is_hintons(temperature: float) -> None:
    student, teacher = draw(BATCH, CLASSES, seed=1, scale=3), draw(BATCH, CLASSES, seed=2, scale=3)
    divergence = torch.nn.KLDivLoss(reduction="batchmean")
    wanted = divergence((student / temperature).log_softmax(1), (teacher / temperature).softmax(1)) * temperature**2
    close(L.kd_kl(student, teacher, temperature), wanted)
    each = L.kd_kl(student, teacher, temperature, reduction="none")
    for row, value in enumerate(each.tolist()):
        p = softmax(teacher[row].tolist(), temperature)
        q = softmax(student[row].tolist(), temperature)
        assert value == pytest.approx(temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q)), rel=1e-4)


def test_kd_kl_stays_finite_for_certain_teachers() -> None:
    student, teacher = torch.tensor([[0.0, 0, 500]], requires_grad=True), torch.tensor([[500.0, 0, 0]])
    value = L.kd_kl(student, teacher)
    value.backward()
    assert float(value.detach()) == pytest.approx(500)
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_kd_l1_is_the_distance_of_centred_logits_in_units_of_the_teachers_spread() -> None:
    student, teacher = draw(BATCH, CLASSES, seed=1, scale=3), draw(BATCH, CLASSES, seed=2, scale=2)
    rows = [(s.tolist(), t.tolist()) for s, t in zip(student, teacher)]
    centred = [([x - sum(s) / CLASSES for x in s], [x - sum(t) / CLASSES for x in t]) for s, t in rows]
    spread = math.sqrt(sum(x * x for _, t in centred for x in t) / (BATCH * CLASSES))
    wanted = [sum(abs(a - b) for a, b in zip(s, t)) / CLASSES / spread for s, t in centred]
    close(L.kd_l1(student, teacher), sum(wanted) / BATCH)
    assert L.kd_l1(student, teacher, reduction="none").tolist() == pytest.approx(wanted, rel=1e-5)


def test_kd_l1_is_free_of_scale_and_offset() -> None:
    student, teacher = draw(BATCH, CLASSES, seed=1), draw(BATCH, CLASSES, seed=2)
    value = L.kd_l1(student, teacher)
    close(L.kd_l1(1000 * student, 1000 * teacher), value)
    close(L.kd_l1(student + 7, teacher - draw(BATCH, 1, seed=3, scale=5)), value)
    assert float(L.kd_l1(2 * student, teacher)) != pytest.approx(float(value), rel=0.05)
    assert float(L.kd_l1(teacher + 3, teacher)) == pytest.approx(0, abs=1e-5)


def test_kd_mae_is_the_mean_distance_of_logits_as_they_are() -> None:
    student, teacher = draw(BATCH, CLASSES, seed=1, scale=3), draw(BATCH, CLASSES, seed=2, scale=2)
    close(L.kd_mae(student, teacher), np.abs(student.numpy() - teacher.numpy()).mean())
    close(L.kd_mae(student, teacher, 7.0), F.l1_loss(student, teacher))
    each = L.kd_mae(student, teacher, reduction="none")
    assert each.tolist() == pytest.approx(np.abs(student.numpy() - teacher.numpy()).mean(1).tolist())
    close(L.kd_mae(teacher + 3, teacher), 3)  # an offset counts, unlike in kd_l1
    assert L.STUDENT_LOSSES["mae"] is L.kd_mae


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_js_is_the_mean_divergence_from_the_middle(temperature: float) -> None:
    student, teacher = draw(BATCH, CLASSES, seed=1, scale=3), draw(BATCH, CLASSES, seed=2, scale=3)
    wanted = []
    for s, t in zip(student.tolist(), teacher.tolist()):
        p, q = softmax(s, temperature), softmax(t, temperature)
        middle = [(a + b) / 2 for a, b in zip(p, q)]
        wanted.append(sum(a * math.log(a / m) + b * math.log(b / m) for a, b, m in zip(p, q, middle)) / 2)
    close(L.js(student, teacher, temperature), sum(wanted) / BATCH)
    assert L.js(student, teacher, temperature, reduction="none").tolist() == pytest.approx(wanted, rel=1e-5)
    close(L.js(teacher, student, temperature), L.js(student, teacher, temperature))


def test_js_is_taken_at_temperature_3_and_lies_between_0_and_log_2() -> None:
    student, teacher = draw(BATCH, CLASSES, seed=1, scale=3), draw(BATCH, CLASSES, seed=2, scale=3)
    close(L.ADVERSARIES["js"](student, teacher), L.js(student, teacher, 3.0))
    assert float(L.js(teacher, teacher)) == pytest.approx(0, abs=1e-12)
    certain = torch.tensor([[900.0, 0, 0]], requires_grad=True)  # the other probabilities are exactly 0
    value = L.js(certain, torch.tensor([[0.0, 900, 0]]))
    value.backward()
    close(value.detach(), math.log(2))
    assert certain.grad is not None
    assert certain.grad.isfinite().all()


def test_hints_are_errors_relative_to_the_teachers_power_averaged_over_layers() -> None:
    shapes = [(BATCH, 2, 3, 3), (BATCH, 7), (BATCH, 1, 4, 2)]
    student = [draw(*shape, seed=k) for k, shape in enumerate(shapes)]
    teacher = [10.0**k * draw(*shape, seed=9 + k) for k, shape in enumerate(shapes)]
    wanted = 0.0
    for ours, theirs in zip(student, teacher):
        pairs = list(zip(ours.flatten().tolist(), theirs.flatten().tolist()))
        wanted += sum((s - t) ** 2 for s, t in pairs) / sum(t * t for _, t in pairs) / 3
    close(L.hints(student, teacher), wanted)
    close(L.hints([1000 * x for x in student], [1000 * x for x in teacher]), wanted)
    assert float(L.hints(teacher, teacher)) == 0


def test_hints_have_a_finite_gradient_where_the_teacher_is_silent() -> None:
    student = [torch.zeros(2, 3, requires_grad=True), torch.ones(2, 3, requires_grad=True)]
    L.hints(student, [torch.zeros(2, 3), torch.zeros(2, 3)]).backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in student)
    half = torch.full((2, 3), 300.0, dtype=torch.float16)  # whose square is infinite in float16
    close(L.hints([half], [2 * half]), 0.25)


@pytest.mark.parametrize("places", [(), (2, 3)])
def test_what_is_unexplained_is_in_units_of_the_teachers_spread_between_images_and_places(
    places: tuple[int, ...],
) -> None:
    student = [draw(BATCH, width, *places, seed=width) for width in (5, 2)]
    teacher = [3 + 0.2 * draw(BATCH, 5, *places, seed=1), 100 * draw(BATCH, 2, *places, seed=2)]
    errors, spreads = [], []
    for own, its in zip(student, teacher):
        ours, rows = (np.moveaxis(x.numpy(), 1, -1).reshape(-1, x.shape[1]) for x in (own, its))
        spreads.append(math.sqrt(((rows - rows.mean(0)) ** 2).mean()))
        rest = ours - rows / spreads[-1]
        errors.append(((rest - rest.mean(0)) ** 2).mean())
    for found, error in zip(L.unexplained(student, teacher), errors, strict=True):
        close(found, error)
    close(L.map_error(student, teacher), sum(errors) / 2)
    close(L.map_error([x + 7 for x in student], [1000 * x - 5 for x in teacher]), sum(errors) / 2)
    close(L.map_error([torch.ones_like(x) for x in student], teacher), 1)
    same = [x / spread for x, spread in zip(teacher, spreads)]
    assert float(L.map_error(same, teacher)) == pytest.approx(0, abs=1e-12)


def test_what_is_unexplained_is_finite_where_a_teacher_tells_no_images_apart_and_in_float16() -> None:
    student = draw(BATCH, 5)
    assert L.map_error([student], [torch.full_like(student, 1e4)]).isfinite()
    half = torch.full((2, 5), 300.0, dtype=torch.float16)  # whose square is infinite in float16
    assert L.map_error([half], [half * torch.tensor([[1.0], [0.5]], dtype=torch.float16)]).isfinite()


def attended(maps: Tensor) -> np.ndarray:
    """Attention of maps [B, C, H, W] as rows [B, H W] of length 1."""
    rows = (maps.numpy() ** 2).mean(1).reshape(len(maps), -1)
    return rows / np.sqrt((rows**2).sum(1, keepdims=True))


def test_attention_compares_where_feature_maps_are_large() -> None:
    student = [draw(BATCH, c, h, w, seed=c) for c, h, w in ((2, 4, 4), (7, 3, 2))]
    teacher = [draw(BATCH, c, h, w, seed=c) for c, h, w in ((5, 4, 4), (3, 3, 2))]
    wanted = sum(((attended(s) - attended(t)) ** 2).mean() for s, t in zip(student, teacher))
    assert wanted > 0.01
    close(L.attention(student, teacher), wanted)
    close(L.attention([-9 * x for x in student], teacher), wanted)
    more_channels = [torch.cat([x, x], 1) for x in teacher]
    assert float(L.attention(more_channels, teacher)) == pytest.approx(0, abs=1e-12)


def test_attention_is_taken_in_full_precision_and_of_silent_maps_too() -> None:
    half = torch.full((2, 3, 4, 4), 300.0, dtype=torch.float16)  # whose square is infinite in float16
    half[:, :, 0] = 0
    value = L.attention([half], [half.float()])
    assert value.dtype == torch.float32
    assert value == 0
    silent = torch.zeros(2, 3, 4, 4, requires_grad=True)
    L.attention([silent], [torch.ones(2, 3, 4, 4)]).backward()
    assert silent.grad is not None
    assert silent.grad.isfinite().all()


@pytest.mark.parametrize("kind", sorted(L.ADVERSARIES))
def test_the_divergence_counts_only_where_both_agree(kind: str) -> None:
    teacher = draw(BATCH, CLASSES, seed=2, scale=3)
    student = teacher + draw(BATCH, CLASSES, seed=1, scale=1.5)
    agree = [int(s.argmax()) == int(t.argmax()) for s, t in zip(student, teacher)]
    assert any(agree)
    assert not all(agree)
    each = L.ADVERSARIES[kind](student, teacher, reduction="none").tolist()
    student.requires_grad_()
    value = L.masked_divergence(student, teacher, kind)
    value.backward()
    close(value.detach(), sum(x for x, same in zip(each, agree) if same) / BATCH)
    assert student.grad is not None
    assert student.grad.any(1).tolist() == agree
    close(L.masked_divergence(student.detach(), teacher, kind, masked=False), sum(each) / BATCH)


def test_total_variation_is_the_mean_step_between_neighbours() -> None:
    images = draw(2, 3, 4, 6)
    values = images.tolist()
    across = [abs(row[x + 1] - row[x]) for image in values for plane in image for row in plane for x in range(5)]
    down = [
        abs(plane[y + 1][x] - plane[y][x]) for image in values for plane in image for y in range(3) for x in range(6)
    ]
    close(L.total_variation(images), sum(across) / len(across) + sum(down) / len(down))
    assert L.total_variation(torch.full((2, 1, 4, 4), 0.3)) == 0


def test_pixel_l2_is_the_mean_square_of_normalised_pixels() -> None:
    images, mean, std = draw(2, 3, 4, 6), [0.1, 0.2, 0.3], [0.5, 1.0, 2.0]
    wanted = [
        ((x - mean[c]) / std[c]) ** 2 for image in images.tolist() for c in range(3) for row in image[c] for x in row
    ]
    shape = (1, 3, 1, 1)
    close(L.pixel_l2(images, torch.tensor(mean).view(shape), torch.tensor(std).view(shape)), sum(wanted) / len(wanted))


@pytest.mark.parametrize("sigma", [0.5, 1.0])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 1, 2, 2)])
def test_smooth_is_the_distance_to_kornias_blur(shape: tuple[int, ...], sigma: float) -> None:
    images = draw(*shape)
    blurred = gaussian_blur2d(images, (3, 3), (sigma, sigma), border_type="reflect")
    close(L.smooth(images, sigma), F.mse_loss(blurred, images))


def test_smooth_asks_nothing_of_flat_images_and_most_of_a_chessboard() -> None:
    assert float(L.smooth(torch.full((2, 1, 4, 4), 0.3))) == pytest.approx(0, abs=1e-12)
    rows = torch.arange(8)
    board = ((rows.view(-1, 1) + rows) % 2).float().expand(1, 1, 8, 8)
    stripes = (rows // 4).float().expand(1, 1, 8, 8)
    assert float(L.smooth(board)) > 5 * float(L.smooth(stripes)) > 0


def test_smooth_is_not_rounded_by_autocast() -> None:
    images = draw(2, 3, 8, 8).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = L.smooth(images)
    assert value.dtype == torch.float32
    assert value == L.smooth(images)


@pytest.mark.parametrize("batch", [8, 11])
def test_spread_is_the_change_of_the_answer_per_change_of_the_image(batch: int) -> None:
    images, probabilities = draw(batch, 2, 3, 3), draw(batch, CLASSES, seed=1).softmax(1)
    x, p = images.numpy().reshape(batch, -1), probabilities.numpy()
    one, two = [0, 1, 4, 5], [3, 2, 7, 6]
    wanted = np.linalg.norm(p[one] - p[two]) / np.linalg.norm(x[one] - x[two])
    close(L.spread(images, probabilities), wanted)
    close(L.spread(2 * images, probabilities), wanted / 2)


def test_spread_pulls_images_of_different_answers_apart() -> None:
    images = (0.01 * draw(4, 1, 3, 3)).requires_grad_()
    L.spread(images, draw(4, 3, seed=1).softmax(1)).backward()
    assert images.grad is not None
    moved = images.detach() - 1e-7 * images.grad
    assert all((moved[k] - moved[3 - k]).norm() > (images[k] - images[3 - k]).norm() for k in (0, 1))


def test_spread_has_a_finite_gradient_where_images_or_answers_are_the_same() -> None:
    for same, other in ((torch.ones(4, 1, 2, 2), draw(4, 3).float()), (draw(4, 1, 2, 2).float(), torch.ones(4, 3))):
        images, answers = same.clone().requires_grad_(), other.clone().requires_grad_()
        L.spread(images, answers).backward()
        assert all(x.grad is not None and x.grad.isfinite().all() for x in (images, answers))


def nce(queries: Tensor, keys: Tensor, negatives: Tensor, temperature: float, usable: np.ndarray) -> float:
    """InfoNCE query by query, `usable` [B, N]."""
    total = 0.0
    for q, k, row in zip(queries.tolist(), keys.tolist(), usable):
        own = math.exp(cosine(q, k) / temperature)
        others = [math.exp(cosine(q, n) / temperature) for n, use in zip(negatives.tolist(), row) if use]
        total -= math.log(own / (own + sum(others))) / len(queries)
    return total


def test_info_nce_is_minus_the_log_share_of_the_own_key() -> None:
    queries, keys, negatives = draw(BATCH, 4), draw(BATCH, 4, seed=1), 7 * draw(9, 4, seed=2)
    every = np.ones((BATCH, 9), dtype=bool)
    per_row, per_pair = draw(9, seed=3) > 0, draw(BATCH, 9, seed=3) > 0
    close(L.info_nce(queries, keys, negatives, 0.5), nce(queries, keys, negatives, 0.5, every))
    for usable in (per_row, per_pair):
        assert 0 < int(usable.sum()) < usable.numel()
        wanted = nce(queries, keys, negatives, 0.5, every & usable.numpy())
        close(L.info_nce(queries, keys, negatives, 0.5, usable), wanted)
    assert L.info_nce(queries, keys, negatives, 0.5, torch.zeros(9, dtype=torch.bool)) == 0
    assert L.info_nce(queries, keys, negatives[:0], 0.5) == 0


def test_info_nce_over_the_other_images_keys_is_cross_entropy() -> None:
    queries, keys = draw(BATCH, 4), draw(BATCH, 4, seed=1)
    alike = F.cosine_similarity(queries.unsqueeze(1), keys.unsqueeze(0), dim=2)
    value = L.info_nce(queries, keys, keys, 0.1, ~torch.eye(BATCH, dtype=torch.bool))
    close(value, F.cross_entropy(alike / 0.1, torch.arange(BATCH)))


def test_likeness_is_not_rounded_by_autocast() -> None:
    maps, labels = torch.randn(8, 3, 5, 5, generator=torch.Generator().manual_seed(0)), torch.zeros(8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = L.likeness(maps, labels)
    torch.testing.assert_close(found, L.likeness(maps, labels), rtol=1e-6, atol=0)


def test_info_nce_is_not_rounded_by_autocast_and_ignores_what_it_should() -> None:
    queries, keys, negatives = (draw(n, 4, seed=n).float().requires_grad_() for n in (3, 3, 5))
    usable = torch.tensor([True, False, True, True, False])
    value = L.info_nce(queries, keys, negatives, 0.07, usable)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert L.info_nce(queries, keys, negatives, 0.07, usable) == value
    value.backward()
    assert value.dtype == torch.float32
    assert negatives.grad is not None
    assert negatives.grad.any(1).tolist() == usable.tolist()
    coarse = L.info_nce(*(x.detach().bfloat16() for x in (queries, keys, negatives)), 0.07, usable)
    assert coarse.dtype == torch.float32
    assert float(coarse) == pytest.approx(float(value.detach()), rel=0.2)


@pytest.mark.parametrize("batch", [6, 7])
def test_mode_seeking_goes_over_pairs_of_one_class(batch: int) -> None:
    images, latents = draw(batch, 2, 3, 3), draw(batch, 4, seed=1)
    names = torch.tensor([1, 1, 0, 2, 2, 2, 2])[:batch]  # the second pair is of two classes
    wanted = []
    for k in (0, 2, 4):
        dx = float((images[k] - images[k + 1]).abs().mean())
        dz = float((latents[k] - latents[k + 1]).abs().mean())
        wanted.append(1 / (0.01 + dx / dz) if names[k] == names[k + 1] else 0.0)
    assert wanted[1] == 0
    close(L.mode_seeking(images, latents, names), sum(wanted) / 3)


def test_mode_seeking_pushes_equal_images_of_one_class_apart() -> None:
    images = (0.01 * draw(2, 1, 3, 3)).requires_grad_()
    L.mode_seeking(images, draw(2, 4, seed=1), torch.tensor([1, 1])).backward()
    assert images.grad is not None
    moved = images.detach() - 1e-4 * images.grad
    assert (moved[0] - moved[1]).abs().mean() > (images[0] - images[1]).abs().mean()
    same = torch.full((2, 1, 3, 3), 0.5)
    close(L.mode_seeking(same, draw(2, 4, seed=1), torch.tensor([1, 1])), 100)


@pytest.mark.parametrize("batch", [6, 7])
def test_likeness_goes_over_pairs_of_one_class(batch: int) -> None:
    maps = draw(batch, 2, 3, 4)
    names = torch.tensor([1, 1, 0, 2, 2, 2, 2])[:batch]  # the second pair is of two classes
    rows = []
    for image in maps.tolist():
        planes = [[x for row in plane for x in row] for plane in image]
        rows.append([x - sum(plane) / len(plane) for plane in planes for x in plane])
    wanted = [cosine(rows[k], rows[k + 1]) ** 2 for k in (0, 4)]
    assert min(wanted) > 1e-4
    close(L.likeness(maps, names), sum(wanted) / 3, rel=1e-4)


def test_likeness_takes_no_notice_of_colour_and_contrast() -> None:
    image = draw(1, 3, 4, 4)
    tinted = 0.3 * image + torch.tensor([0.5, -1.0, 2.0]).view(1, 3, 1, 1)
    names = torch.tensor([1, 1])
    for other in (image, tinted, -image):
        close(L.likeness(torch.cat([image, other]), names), 1.0, rel=1e-3)
    shifted = torch.cat([image, image.roll(1, 3)])
    assert float(L.likeness(shifted, names)) < 0.5


def test_likeness_of_flat_maps_is_zero_and_has_a_finite_gradient() -> None:
    maps = torch.full((2, 3, 4, 4), 0.7).requires_grad_()
    value = L.likeness(maps, torch.tensor([1, 1]))
    value.backward()
    close(value.detach(), 0.0)
    assert maps.grad is not None
    assert maps.grad.abs().max() < 1


def test_likeness_pushes_structures_of_one_class_apart() -> None:
    base = draw(1, 2, 4, 4)
    maps = (base + 0.1 * draw(2, 2, 4, 4, seed=1)).requires_grad_()
    before = L.likeness(maps, torch.tensor([1, 1]))
    before.backward()
    assert maps.grad is not None
    assert L.likeness(maps.detach() - maps.grad, torch.tensor([1, 1])) < before


def test_one_hot_is_minus_the_log_of_the_largest_probability() -> None:
    logits = draw(BATCH, CLASSES, scale=2)
    close(L.one_hot(logits), sum(-math.log(max(softmax(row))) for row in logits.tolist()) / BATCH)


def test_activation_is_minus_the_mean_size_of_features() -> None:
    features = draw(BATCH, 4)
    close(L.activation(features), -sum(abs(x) for row in features.tolist() for x in row) / (4 * BATCH))


def test_information_is_lowest_where_classes_are_balanced() -> None:
    p = [0.5, 0.25, 0.125, 0.125]
    close(L.information(torch.tensor(p)), sum(x * math.log(x) for x in p))
    close(L.information(torch.full((8,), 1 / 8)), -math.log(8))
    assert float(L.information(torch.tensor([0.0, 1.0, 0.0]))) == pytest.approx(0, abs=1e-6)


def test_information_has_a_gradient_where_a_class_is_never_predicted() -> None:
    logits = torch.tensor([[0.0, 0.0, -300.0]] * 4, requires_grad=True)  # the third probability is exactly 0
    assert logits.softmax(1)[:, 2].eq(0).all()
    L.information(logits.softmax(1).mean(0)).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


GRADIENTS = {
    "mixed_ce": lambda x, y: L.mixed_ce(x, labels(1), labels(2), torch.linspace(0, 1, BATCH, dtype=torch.float64)),
    "bn_l2": lambda x, y: L.bn_l2([(x[0], x[1].exp())], [(y[0], y[1].exp())]),
    "bn_square": lambda x, y: L.bn_square([(x[0], x[1].exp())], [(y[0], y[1].exp())]),
    "bn_mse": lambda x, y: L.bn_mse(
        [(x[0], x[1].exp()), (x[2:5, 0], x[2:5, 1])], [(y[0], y[1].exp()), (y[2:5, 0], y[2:5, 1])]
    ),
    "kd_mae": lambda x, y: L.kd_mae(x, y),
    "js": lambda x, y: L.js(x, y),
    "map_error": lambda x, y: L.map_error([x, x.view(2, 3, 1, CLASSES).square()], [y, y.view(2, 3, 1, CLASSES)]),
    "attention": lambda x, y: L.attention([x.view(2, 3, 1, CLASSES)], [y.view(2, 3, 1, CLASSES)]),
    "masked_divergence": lambda x, y: L.masked_divergence(x, y + draw(BATCH, CLASSES, seed=1), "js"),
    "smooth": lambda x, y: L.smooth(x.view(1, 1, BATCH, CLASSES)),
    "spread": lambda x, y: L.spread(x.view(BATCH, 1, 1, CLASSES), (x + y).softmax(1)),
    "info_nce": lambda x, y: L.info_nce(x, x.exp() + y, y.square() + x, 0.2, draw(BATCH, seed=4) > 0),
    "bn_kl": lambda x, y: L.bn_kl([(x[0], x[1].exp())], [(y[0], y[1].exp())]),
    "mode_seeking": lambda x, y: L.mode_seeking(x.view(BATCH, 1, 1, CLASSES), y, torch.zeros(BATCH)),
    "likeness": lambda x, y: L.likeness(x.view(2, 1, -1, CLASSES), torch.zeros(2)),
    "total_variation": lambda x, y: L.total_variation(x.view(1, 1, BATCH, CLASSES)),
    "hints": lambda x, y: L.hints([x, x.square()], [y, y.exp()]),
    "one_hot": lambda x, y: L.one_hot(x),
    "information": lambda x, y: L.information(x.softmax(1).mean(0)),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    x, y = draw(BATCH, CLASSES, seed=1).requires_grad_(), draw(BATCH, CLASSES, seed=2)
    assert torch.autograd.gradcheck(lambda x: GRADIENTS[name](x, y), (x,))


@pytest.mark.parametrize("kind", L.ADVERSARIES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_divergences_of_logits_in_half_precision_are_computed_in_float32(kind: str, reduction: str) -> None:
    rng = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(64, 10, generator=rng).bfloat16() for _ in range(2))
    found = L.ADVERSARIES[kind](student, teacher, reduction=reduction)
    assert found.dtype == torch.float32
    wanted = L.ADVERSARIES[kind](student.double(), teacher.double(), reduction=reduction)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)
