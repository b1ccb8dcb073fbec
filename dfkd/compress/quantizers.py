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


def limits(bits: int, signed: bool) -> tuple[int, int]:
    """Smallest and largest integer of a type."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


IN_CACHE = 2**17  # numbers in a CPU's cache
POWER, CANDIDATES = 2.4, 80  # LAPQ (Nahshan et al. 2021) and BRECQ have the same exponent


def best_step(values: Tensor, bits: int, signed: bool) -> Tensor:
    """The step [R] per row of values [R, N] with the least mean |error|^POWER, of CANDIDATES between a tenth of the
    step that reaches the largest value and that itself. A row of zeros gets step 1."""
    rows = max(1, IN_CACHE // values.shape[1])
    if len(values) > rows and values.device.type == "cpu":  # what all candidates read stays near: half the time
        return torch.cat([best_step(some, bits, signed) for some in values.split(rows)])
    low, high = limits(bits, signed)
    values = full_precision(values)
    largest = torch.maximum(values.amax(1) / high, values.amin(1) / low if signed else values.amax(1) / high)
    largest = torch.where(largest > 0, largest, torch.ones_like(largest))
    best, least = largest, torch.full_like(largest, math.inf)
    for k in range(CANDIDATES):
        step = largest * (1 - 0.9 * k / CANDIDATES)
        error = (learned_step(values, step[:, None], low, high) - values).abs_().clamp_min_(1e-30)
        error = error.log_().mul_(POWER).exp_().mean(1)  # torch's pow takes twice as long
        best, least = torch.where(error < least, step, best), torch.minimum(error, least)
    return best


def sqnr_db(exact: Tensor, near: Tensor) -> float:
    """Power of a tensor over that of what is near it lacks, in dB."""
    power, noise = (x.square().mean().clamp_min(1e-20) for x in (exact, near - exact))
    return float(10 * torch.log10(power / noise))


class Quantizer(nn.Module):
    """What a scale means, the bits and the sign, is part of its state: that of another quantiser is refused."""

    bits: int
    signed: bool

    def get_extra_state(self) -> Tensor:
        """The bits, and 1 where there are values below zero."""
        return torch.tensor([self.bits, int(self.signed)])

    def set_extra_state(self, state: Tensor) -> None:
        """Raise UserError where a state is that of other bits or of another sign."""
        own = self.get_extra_state()
        if not torch.equal(state.cpu(), own):
            of = [f"{bits} bits, {'signed' if sign else 'unsigned'}" for bits, sign in (state.tolist(), own.tolist())]
            raise UserError(
                f"a quantiser of the state has {of[0]}, that of the network {of[1]}: its scales would mean others; "
                "load it into a network quantised with the same bits and images, or use save_compressed and "
                "load_compressed"
            )

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *given: Any) -> None:
        super()._load_from_state_dict(state, prefix, *given)
        absent, key = given[2], prefix + "_extra_state"
        if key in absent:  # a state that was saved without
            absent.remove(key)


class WeightQuantizer(Quantizer):
    """Signed weights in `bits` bits; scale [1] for the layer or [K] for its outputs, ones until it is calibrated."""

    def __init__(self, bits: int, scales: int) -> None:
        super().__init__()
        self.bits, self.signed = bits, True
        self.low, self.high = limits(bits, signed=True)
        self.scale = nn.Parameter(torch.ones(scales))

    def calibrate(self, weight: Tensor) -> None:
        """Take the steps that suit the weights (see best_step)."""
        self.scale.data = best_step(weight.detach().reshape(len(self.scale), -1), self.bits, signed=True)

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
    """A tensor in `bits` bits with one scale; unsigned where calibration saw nothing below zero.

    keep is the share of values left unquantised at random (QDrop, Wei et al. 2022), 0 outside reconstruction.
    """

    def __init__(self, bits: int, signed: bool = False) -> None:
        super().__init__()
        self.bits, self.signed, self.enabled, self.keep = bits, signed, True, 0.0
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled or not x.numel():  # tokens of a kind that a network has none of
            return x
        low, high = limits(self.bits, self.signed)
        factor = (x.shape[1:].numel() * high) ** -0.5  # per sample: whatever the batch size
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
