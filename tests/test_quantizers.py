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
    best_grid,
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
    ("bits", "zero", "wanted"),
    [(8, 128, (-128, 127)), (8, 0, (0, 255)), (2, 2, (-2, 1)), (2, 0, (0, 3)), (4, 1, (-1, 14)), (3, 7, (-7, 0))],
)
def test_limits_are_those_of_unsigned_integers_less_their_zero(bits: int, zero: int, wanted: tuple[int, int]) -> None:
    assert limits(bits, zero) == wanted


def loss_of(values: np.ndarray, step: float, bits: int, zero: int) -> float:
    """The mean |error|^2.4 on the grid of unsigned codes with a zero, as ONNX's QuantizeLinear defines it."""
    codes = np.clip(np.rint(values / step) + zero, 0, 2**bits - 1)
    return float((np.abs((codes - zero) * step - values) ** 2.4).mean())


def searched(values: np.ndarray, bits: int, zero: int) -> float:
    """The least of it over many steps."""
    top = np.abs(values).max() / max(1, 2 ** (bits - 1) - 1 if zero else 2**bits - 1)
    return min(loss_of(values, step, bits, zero) for step in top * np.geomspace(0.01, 1, 1000))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_best_step_is_that_of_a_finer_search(bits: int) -> None:
    rng = np.random.default_rng(bits)
    rows = np.stack([rng.normal(size=500), 100 * rng.laplace(size=500), 1e-3 * rng.uniform(-1, 2, size=500)])
    steps = best_step(torch.tensor(rows), bits)
    assert steps.shape == (3,)
    for values, step in zip(rows, steps.tolist()):
        assert loss_of(values, step, bits, 2 ** (bits - 1)) <= 1.2 * searched(values, bits, 2 ** (bits - 1))


def test_rows_that_one_step_fits_are_kept_exactly() -> None:
    exact = 0.25 * torch.tensor([[-8.0, -3, 0, 2, 7], [0, 0, 0, 0, 0], [-8, 7, 1, 1, 1]])
    steps = best_step(exact, 4)
    assert steps.tolist() == [0.25, 1.0, 0.25]
    assert torch.equal(learned_step(exact, steps[:, None], -8, 7), exact)
    assert best_step(torch.tensor([[-2.0, -2.0]]), 2).tolist() == [1.0]


SHAPES = {
    "relu": lambda x: np.maximum(x, 0),
    "normal": lambda x: x,
    "silu": lambda x: 3 * x / (1 + np.exp(-3 * x)),
    "below zero": lambda x: -100 * np.abs(x),
    "far above": lambda x: np.where(np.arange(len(x)) % 100, 1e-3 * x, 1e-3 * x + 0.02),
    "far below": lambda x: np.where(np.arange(len(x)) % 100, x, x - 20),
}


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_best_grid_is_that_of_every_step_and_zero(bits: int, shape: str) -> None:
    values = SHAPES[shape](np.random.default_rng(bits).normal(size=400))
    step, zero = best_grid(torch.tensor(values), bits)
    assert 0 <= zero < 2**bits
    ends = max(0.0, values.max()) - min(0.0, values.min())
    steps = ends / (2**bits - 1) * np.geomspace(0.05, 1.05, 150)
    zeros = range(0, 2**bits, 1 if bits < 8 else 3)
    least = min(loss_of(values, each, bits, below) for each in steps for below in zeros)
    assert loss_of(values, float(step), bits, zero) <= 1.2 * least  # in 8 bits a few values fit some steps by chance


def test_a_grid_without_values_on_one_side_or_at_all() -> None:
    exact = 0.25 * torch.tensor([0.0, 3, 15])
    assert [float(step) for step, zero in (best_grid(exact, 4), best_grid(-exact, 4))] == [0.25, 0.25]
    assert [best_grid(x, 4)[1] for x in (exact, -exact)] == [0, 15]
    assert best_grid(torch.zeros(3), 4) == (torch.tensor(1.0), 0)


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


@pytest.mark.parametrize("zero", [0, 3, 8, 15])
def test_a_tensors_step_learns_at_a_rate_free_of_the_batch_size(zero: int) -> None:
    x = 2 * images(5, 3, 4, 4, dtype=torch.float64) - zero / 8
    low, high = -zero, 15 - zero

    def gradient(x: Tensor) -> float:
        quantizer = ActivationQuantizer(4, zero)
        quantizer.scale.data = torch.tensor(0.071, dtype=torch.float64)
        quantizer(x).flatten(1).sum(1).mean().backward()
        assert quantizer.scale.grad is not None
        return float(quantizer.scale.grad)

    slope = sum(lsq(v, 0.071, low, high)[1] for v in x.flatten().tolist()) / 5
    assert gradient(x) == pytest.approx(slope / math.sqrt(48 * max(zero, high)), rel=1e-9)
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
