"""Quantisers with learned step sizes (LSQ): of weights, of tensors, of the layers that have them."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd.errors import UserError
from dfkd.runtime import full_precision


class _LearnedStep(torch.autograd.Function):
    """s * round(clip(v / s, low, high)), straight through for v; LSQ's gradient for s."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, step: Tensor, low: int, high: int, factor: float) -> Tensor:
        ctx.save_for_backward(v, step)
        ctx.limits, ctx.factor = (low, high), factor
        return (v / step).clamp_(low, high).round_().mul_(step)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # type: ignore[override]
        v, step = ctx.saved_tensors
        low, high = ctx.limits
        x = v / step
        inside = (x > low) & (x < high)
        slope = x.clamp(low, high).round_().sub_(x * inside)
        return grad * inside, (grad * slope).sum_to_size(step.shape).mul_(ctx.factor), None, None, None


def learned_step(v: Tensor, step: Tensor, low: int, high: int, factor: float = 1.0) -> Tensor:
    """v on the grid step * {low, ..., high}; step broadcasts over v. Esser et al. 2020, eq. 1 to 3.

    The gradient of v is 1 inside the range and 0 outside, that of step is scaled by `factor` (their section 2.2).
    """
    return _LearnedStep.apply(full_precision(v), step, low, high, factor)


def limits(bits: int, zero: int) -> tuple[int, int]:
    """The least and the largest number of steps of a grid of 2^bits levels, `zero` of which lie below zero."""
    return -zero, 2**bits - 1 - zero


IN_CACHE = 2**17  # numbers in a CPU's cache
POWER, CANDIDATES = 2.4, 80  # LAPQ (Nahshan et al. 2021) and BRECQ have the same exponent
SHARES = [1 - 0.9 * k / CANDIDATES for k in range(CANDIDATES)]  # of a range that a grid is tried on


def _error(values: Tensor, step: Tensor, bits: int, zero: int) -> Tensor:
    """The mean |error|^POWER [R] of rows of values [R, N] on grids of steps [R, 1]."""
    error = (learned_step(values, step, *limits(bits, zero)) - values).abs_().clamp_min_(1e-30)
    return error.log_().mul_(POWER).exp_().mean(1)  # torch's pow takes twice as long


def best_step(values: Tensor, bits: int) -> Tensor:
    """The step [R] per row of values [R, N] with the least mean |error|^POWER, of a symmetric grid: of CANDIDATES
    between a tenth of the step that reaches the largest value and that itself. A row of zeros gets step 1."""
    rows = max(1, IN_CACHE // values.shape[1])
    if len(values) > rows and values.device.type == "cpu":  # what all candidates read stays near: half the time
        return torch.cat([best_step(some, bits) for some in values.split(rows)])
    low, high = limits(bits, 2 ** (bits - 1))
    values = full_precision(values)
    largest = torch.maximum(values.amax(1) / high, values.amin(1) / low)
    largest = torch.where(largest > 0, largest, torch.ones_like(largest))
    best, least = largest, torch.full_like(largest, math.inf)
    for share in SHARES:
        error = _error(values, (step := largest * share)[:, None], bits, -low)
        best, least = torch.where(error < least, step, best), torch.minimum(error, least)
    return best


def best_grid(values: Tensor, bits: int) -> tuple[Tensor, int]:
    """The step, a scalar tensor, and the zero (see limits) with the least mean |error|^POWER of values [N].

    The grid reaches over a share of the range, alike at both ends; then each end is tried anew with every fourth share,
    the other where it was found. What has a sign for a small part alone, as SiLU and GELU give it, so has hardly a
    level too many below zero. Zeros get step 1.
    """
    values = full_precision(values)[None]
    whole = [min(0.0, float(values.min())), max(0.0, float(values.max()))]
    best, step, zero, ends = math.inf, torch.ones_like(values[0, 0]), 0, whole
    for tried in ((0, 1), (0,), (1,)) if all(whole) else ((0, 1),):
        start = ends
        for share in SHARES if len(tried) == 2 else SHARES[::4]:
            low, high = (whole[k] * share if k in tried else start[k] for k in (0, 1))
            if not high > low:
                break
            width = torch.full_like(step, (high - low) / (2**bits - 1))
            below = round(-low / (high - low) * (2**bits - 1))
            error = float(_error(values, width, bits, below))
            if error < best:
                best, step, zero, ends = error, width, below, [low, high]
    return step, zero


def sqnr_db(exact: Tensor, near: Tensor) -> float:
    """Power of a tensor over that of what is near it lacks, in dB."""
    power, noise = (x.square().mean().clamp_min(1e-20) for x in (exact, near - exact))
    return float(10 * torch.log10(power / noise))


class Quantizer(nn.Module):
    """What a scale means is part of its state: the limits are taken up with it, those of other bits are refused."""

    bits: int
    zero: int  # levels below zero

    def get_extra_state(self) -> Tensor:
        """The bits, and the limits."""
        return torch.tensor([self.bits, *limits(self.bits, self.zero)])

    def set_extra_state(self, state: Tensor) -> None:
        """Take up the limits; raise UserError where a state is that of other bits."""
        bits, least, *_ = state.tolist()
        if bits != self.bits:
            raise UserError(
                f"a quantiser of the state has {bits} bits, that of the network {self.bits}: its scales would mean "
                "others; load it into a network quantised with the same bits, or use save_compressed and "
                "load_compressed"
            )
        older = len(state) == 2  # the second number was whether there are values below zero
        self.zero = least * 2 ** (bits - 1) if older else -least

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *given: Any) -> None:
        super()._load_from_state_dict(state, prefix, *given)
        absent, key = given[2], prefix + "_extra_state"
        if key in absent:  # a state that was saved without: of symmetric grids
            absent.remove(key)
            self.zero = 2 ** (self.bits - 1) if self.zero else 0


class WeightQuantizer(Quantizer):
    """Signed weights in `bits` bits; scale [1] for the layer or [K] for its outputs, ones until it is calibrated."""

    def __init__(self, bits: int, scales: int) -> None:
        super().__init__()
        self.bits, self.zero = bits, 2 ** (bits - 1)
        self.low, self.high = limits(bits, self.zero)
        self.scale = nn.Parameter(torch.ones(scales))

    def calibrate(self, weight: Tensor) -> None:
        """Take the steps that suit the weights (see best_step)."""
        self.scale.data = best_step(weight.detach().reshape(len(self.scale), -1), self.bits)

    def step(self, weight: Tensor) -> Tensor:
        """The scale, shaped to broadcast over the weights."""
        return self.scale.view(-1, *[1] * (weight.dim() - 1))

    def forward(self, weight: Tensor) -> Tensor:
        factor = (weight.numel() / len(self.scale) * self.high) ** -0.5
        return learned_step(weight, self.step(weight), self.low, self.high, factor)

    @torch.no_grad()
    def codes(self, weight: Tensor) -> Tensor:
        """The integers that stand for the weights, int8."""
        return (full_precision(weight) / self.step(weight)).clamp(self.low, self.high).round().to(torch.int8)


class ActivationQuantizer(Quantizer):
    """A tensor in `bits` bits with one scale, on a grid with `zero` levels below zero, as many as calibration found
    best: LSQ+ (Bhalgat et al. 2020) eq. 2, whose offset is a whole number of steps here, as in files, and not learned.

    keep is the share of values left unquantised at random (QDrop, Wei et al. 2022), 0 outside reconstruction.
    """

    def __init__(self, bits: int, zero: int = 0) -> None:
        super().__init__()
        self.bits, self.zero, self.enabled, self.keep = bits, zero, True, 0.0
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled or not x.numel():  # tokens of a kind that a network has none of
            return x
        low, high = limits(self.bits, self.zero)
        factor = (x.shape[1:].numel() * max(-low, high)) ** -0.5  # per sample: whatever the batch size
        quantised = learned_step(x, self.scale, low, high, factor)
        if not self.keep:
            return quantised
        kept = (torch.rand_like(quantised) < self.keep).to(quantised.dtype)
        return torch.lerp(quantised, x.to(quantised.dtype), kept)  # many times as fast as torch.where on a CPU


class QuantizedConv2d(nn.Conv2d):
    """A convolution whose weights go through `quantizer`."""

    quantizer: WeightQuantizer

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.quantizer(self.weight), self.bias)


class QuantizedLinear(nn.Linear):
    """A linear layer whose weights go through `quantizer`."""

    quantizer: WeightQuantizer

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.quantizer(self.weight), self.bias)


QUANTIZED = (QuantizedConv2d, QuantizedLinear)


def quantized_layers(network: nn.Module) -> dict[str, Any]:
    """The quantised convolutions and linear layers by name."""
    return {name: module for name, module in network.named_modules() if isinstance(module, QUANTIZED)}


def activation_quantizers(network: nn.Module) -> dict[str, ActivationQuantizer]:
    """The quantisers of tensors by name."""
    return {name: module for name, module in network.named_modules() if isinstance(module, ActivationQuantizer)}


@contextmanager
def without_quantizers(graph: nn.Module) -> Iterator[None]:
    """Let tensors pass unquantised in its scope."""
    quantizers = activation_quantizers(graph).values()
    for quantizer in quantizers:
        quantizer.enabled = False
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.enabled = True
