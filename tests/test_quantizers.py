"""Learned steps against LSQ written out per value in float64, and steps against a search in numpy."""

import math

import numpy as np
import pytest
import torch
from networks_fixture import images
from torch import Tensor

from dfkd.compress.quantizers import (
    ActivationQuantizer,
    WeightQuantizer,
    best_step,
    learned_step,
    limits,
)

RANGES = {"u2": (0, 3), "s2": (-2, 1), "u4": (0, 15), "s4": (-8, 7), "s8": (-128, 127)}


def lsq(v: float, s: float, low: int, high: int) -> tuple[float, float, float]:
    """Esser et al. 2020: value (eq. 1 and 2), its slope in s (eq. 3) and in v (eq. 5), with Q_N = -low, Q_P = high."""
    if v / s <= low:
        return low * s, low, 0.0
    if v / s >= high:
        return high * s, high, 0.0
    nearest = math.floor(v / s + 0.5)
    return nearest * s, -v / s + nearest, 1.0


def spread(low: int, high: int, rows: int = 3) -> tuple[Tensor, Tensor]:
    """Values [R, 40] below, in and above the ranges of steps [R, 1], away from where rounding and clipping switch."""
    steps = torch.tensor([[0.3], [1.7], [0.011]], dtype=torch.float64)[:rows]
    integers = torch.linspace(low - 3, high + 3, 40, dtype=torch.float64).round()
    inner = 0.8 * images(rows, 40, seed=5, dtype=torch.float64) - 0.4
    return steps * (integers + inner + 0.05), steps


@pytest.mark.parametrize(("low", "high"), RANGES.values(), ids=RANGES)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("factor", [1.0, 0.125])
def test_a_learned_step_is_lsqs(low: int, high: int, rows: int, factor: float) -> None:
    v, s = spread(low, high, rows)
    assert (v / s < low).any()
    assert (v / s > high).any()
    weight = images(rows, 40, seed=6, dtype=torch.float64) - 0.5
    v.requires_grad_()
    s.requires_grad_()
    out = learned_step(v, s, low, high, factor)
    (weight * out).sum().backward()
    assert v.grad is not None
    assert s.grad is not None
    for row in range(rows):
        slope = 0.0
        for k in range(40):
            value, in_s, in_v = lsq(v[row, k].item(), s[row, 0].item(), low, high)
            assert out[row, k].item() == pytest.approx(value, rel=1e-12, abs=1e-15)
            assert float(v.grad[row, k]) == pytest.approx(float(weight[row, k]) * in_v, rel=1e-12)
            slope += float(weight[row, k]) * in_s
        assert float(s.grad[row, 0]) == pytest.approx(factor * slope, rel=1e-9)


def test_the_gradients_are_finite_differences_with_the_rounding_error_held() -> None:
    low, high = -8, 7
    v, s = spread(low, high, 1)
    error = (v / s).clamp(low, high).round() - (v / s).clamp(low, high)

    def smooth(v: Tensor, s: Tensor) -> Tensor:
        return s * ((v / s).clamp(low, high) + error)

    h = 1e-6
    in_s = (smooth(v, s + h) - smooth(v, s - h)).sum() / (2 * h)
    in_v = (smooth(v + h, s) - smooth(v - h, s)) / (2 * h)
    v.requires_grad_()
    s.requires_grad_()
    learned_step(v, s, low, high).sum().backward()
    assert v.grad is not None
    assert s.grad is not None
    assert float(s.grad) == pytest.approx(float(in_s), rel=1e-6)
    assert torch.allclose(v.grad, in_v, atol=1e-6)


def test_rounding_happens_in_float32_under_autocast() -> None:
    v, s = images(4, 4), torch.tensor(0.013)
    assert learned_step(v.bfloat16(), s, 0, 255).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(learned_step(v, s, 0, 255), learned_step(v, s, 0, 255).float())


@pytest.mark.parametrize(
    ("bits", "signed", "wanted"),
    [(8, True, (-128, 127)), (8, False, (0, 255)), (2, True, (-2, 1)), (2, False, (0, 3)), (4, True, (-8, 7))],
)
def test_limits_are_those_of_the_integer_types(bits: int, signed: bool, wanted: tuple[int, int]) -> None:
    assert limits(bits, signed) == wanted


def searched(values: np.ndarray, bits: int, signed: bool) -> float:
    """The least mean |error|^2.4 over a fine grid of steps."""
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    top = max(values.max() / high, values.min() / low if signed else 0)
    grid = top * np.linspace(0.1, 1, 2000)[:, None]
    return float((np.abs(np.clip(np.rint(values / grid), low, high) * grid - values) ** 2.4).mean(1).min())


def loss_of(values: np.ndarray, step: float, bits: int, signed: bool) -> float:
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    return float((np.abs(np.clip(np.rint(values / step), low, high) * step - values) ** 2.4).mean())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("signed", [False, True])
def test_the_best_step_is_that_of_a_finer_search(bits: int, signed: bool) -> None:
    rng = np.random.default_rng(bits)
    rows = np.stack([rng.normal(size=500), 100 * rng.laplace(size=500), 1e-3 * rng.uniform(-1, 2, size=500)])
    rows = rows if signed else np.maximum(rows, 0)
    steps = best_step(torch.tensor(rows), bits, signed)
    assert steps.shape == (3,)
    for values, step in zip(rows, steps.tolist()):
        assert loss_of(values, step, bits, signed) <= 1.2 * searched(values, bits, signed)


def test_rows_that_one_step_fits_are_kept_exactly() -> None:
    exact = 0.25 * torch.tensor([[-8.0, -3, 0, 2, 7], [0, 0, 0, 0, 0], [-8, 7, 1, 1, 1]])
    steps = best_step(exact, 4, signed=True)
    assert steps.tolist() == [0.25, 1.0, 0.25]
    assert torch.equal(learned_step(exact, steps[:, None], -8, 7), exact)
    assert best_step(torch.tensor([[-2.0, -2.0]]), 2, signed=True).tolist() == [1.0]


@pytest.mark.parametrize("per_channel", [False, True])
def test_a_weights_step_learns_at_lsqs_rate(per_channel: bool) -> None:
    weight = images(3, 2, 2, 2, dtype=torch.float64) - 0.5
    quantizer = WeightQuantizer(4, 3 if per_channel else 1)
    quantizer.calibrate(weight)
    quantizer.scale.data *= 0.97  # the largest weight then lies beyond the limit, not on it
    quantizer(weight).sum().backward()
    rows = weight.view(3, -1) if per_channel else weight.view(1, -1)
    assert quantizer.scale.grad is not None
    for row, step, grad in zip(rows, quantizer.scale.tolist(), quantizer.scale.grad.tolist()):
        slope = sum(lsq(v, step, -8, 7)[1] for v in row.tolist())
        assert grad == pytest.approx(slope / math.sqrt(len(row) * 7), rel=1e-6)


@pytest.mark.parametrize("signed", [False, True])
def test_a_tensors_step_learns_at_a_rate_free_of_the_batch_size(signed: bool) -> None:
    x = 2 * images(5, 3, 4, 4, dtype=torch.float64) - (1 if signed else 0)
    low, high = (-8, 7) if signed else (0, 15)

    def gradient(x: Tensor) -> float:
        quantizer = ActivationQuantizer(4, signed)
        quantizer.scale.data = torch.tensor(0.071, dtype=torch.float64)
        quantizer(x).flatten(1).sum(1).mean().backward()
        assert quantizer.scale.grad is not None
        return float(quantizer.scale.grad)

    slope = sum(lsq(v, 0.071, low, high)[1] for v in x.flatten().tolist()) / 5
    assert gradient(x) == pytest.approx(slope / math.sqrt(48 * high), rel=1e-9)
    assert gradient(x.repeat(4, 1, 1, 1)) == pytest.approx(gradient(x), rel=1e-9)


def test_a_share_of_values_stays_unquantised_where_asked() -> None:
    quantizer, x = ActivationQuantizer(2), images(64, 64)
    quantizer.scale.data.fill_(0.31)
    assert torch.equal(quantizer(x), learned_step(x, torch.tensor(0.31), 0, 3))
    quantizer.keep = 0.25
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        share = float((quantizer(x) == x).float().mean())
    assert share == pytest.approx(0.25, abs=0.03)
