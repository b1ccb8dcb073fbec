"""What every compression hands back."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dfkd.compress.channels import remembered
from dfkd.compress.graph import fold, network_of, watch
from dfkd.compress.prepare import Bits, round_biases
from dfkd.compress.quantizers import activation_quantizers, quantized_layers, sqnr_db
from dfkd.compress.tracing import trace
from dfkd.errors import UserError


@dataclass
class Compressed:
    """A smaller model, the naive baseline of its method, and what was done to it.

    model and naive take what the given model takes (a Classifier stays one), and so does repaired: the model before it
    was trained further, where it was. layers has a line per layer for the report, and per unit of several that was
    reconstructed as one. structure is what rebuilds the network besides its model string: see dfkd.compress.files.
    """

    model: nn.Module
    naive: nn.Module
    layers: list[dict[str, Any]]
    structure: dict[str, Any]
    repaired: nn.Module | None = None


def quantized(
    model: nn.Module,
    smaller: nn.Module,
    naive: nn.Module,
    inputs: Sequence[Tensor],
    learned: Sequence[Mapping[str, Any]] = (),
) -> Compressed:
    """What quantize hands back: figures per layer and per unit that was reconstructed, and what a file needs."""
    network: Any = network_of(smaller)
    round_biases(network)
    signal = signal_to_noise(fold(trace(network_of(model), inputs[0][:2])), network, inputs[0])
    if broken := [name for name, db in signal.items() if not math.isfinite(db)]:
        raise UserError(
            f"{broken[0]} gives NaN or infinity with few bits; raise the bits, or lower lr where it was trained"
        )
    bits: dict[str, Bits] = network.meta["bits"]
    layers: dict[str, dict[str, Any]] = {
        name: {"layer": name, "weight_bits": each[0], "activation_bits": each[1], "sqnr_db": signal[name]}
        for name, each in bits.items()
    }
    for unit in learned:
        figures = {key: unit[key] for key in ("error_before", "error_after") if key in unit}
        figures |= {"note": f"rounded to nearest: {unit['skipped']}"} if "skipped" in unit else {}
        layers[unit["unit"]] = layers.get(unit["unit"], {"layer": unit["unit"]}) | figures
    zeros = {name: quantizer.zero for name, quantizer in activation_quantizers(network).items() if quantizer.zero}
    about = {
        "bits": {name: list(each) for name, each in bits.items()},
        "zeros": zeros,
        "input": list(inputs[0].shape[1:]),
    }
    changed = remembered(network_of(model))
    structure = {"quantized": about} | ({"channels": changed} if changed else {})
    return Compressed(smaller, naive, list(layers.values()), structure)


@torch.no_grad()
def signal_to_noise(reference: nn.Module, network: nn.Module, inputs: Tensor) -> dict[str, float]:
    """Power of each quantised layer's float output over that of its error, in dB, errors of earlier layers included."""
    names = list(quantized_layers(network))
    with watch(reference, names) as wanted, watch(network, names) as found:
        reference(inputs)
        network(inputs)
    return {name: round(sqnr_db(wanted[name], found[name]), 2) for name in names}
