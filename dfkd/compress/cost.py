"""What a network costs: parameters, multiply-accumulates, zeros, bytes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dfkd.compress.graph import network_of
from dfkd.compress.quantizers import activation_quantizers, quantized_layers
from dfkd.runtime import eval_mode, frozen

# What these layers come down to. Attention and other products come as other calls on every device.
LAYERS = (torch.ops.aten.convolution, torch.ops.aten.mm, torch.ops.aten.addmm)


@torch.no_grad()
def cost(model: nn.Module, image: torch.Tensor) -> dict[str, Any]:
    """Figures of a model for one image [1, C, H, W].

    parameters: numbers in weights, biases and batch norms (quantiser scales left out); macs: multiply-accumulates of
    convolutions and linear layers, half of what torch's FlopCounterMode counts of these; sparsity: percent of zeros
    among their weights; bytes: of all these numbers, a quantised weight at its bits, everything else at 4 bytes, zeros
    included.
    """
    network = network_of(model)
    # Frozen, or the counter stumbles over views of parameters.
    with frozen(model), eval_mode(model), _every_product_apart(), FlopCounterMode(display=False) as counter:
        model(image)
    counts = counter.get_flop_counts()
    # Of maps that are views a linear layer comes as a product of batches, as attention does everywhere.
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    outer = [name for name in linear if not any(name.startswith(f"{other}.") for other in linear)]
    calls = [counts.get(f"{type(model).__name__}.{name}".rstrip("."), {}) for name in outer]
    flops = sum(counts.get("Global", {}).get(call, 0) for call in LAYERS)  # of no layers none
    flops += sum(each.get(torch.ops.aten.bmm, 0) for each in calls)
    layers = [module for module in network.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    weights = sum(layer.weight.numel() for layer in layers)
    few = {id(layer.weight): layer.quantizer.bits for layer in quantized_layers(network).values()}
    scales = [layer.quantizer.scale for layer in quantized_layers(network).values()]
    scales += [quantizer.scale for quantizer in activation_quantizers(network).values()]
    numbers = {id(p): p for p in network.parameters()} | {id(b): b for b in network.buffers() if b.is_floating_point()}
    held = {id(scale) for scale in scales}
    return {
        "parameters": sum(p.numel() for p in network.parameters() if id(p) not in held),
        "macs": flops // 2,
        "sparsity": 100 * sum(_zeros(layer) for layer in layers) / weights if weights else 0.0,
        "bytes": round(sum(number.numel() * few.get(key, 32) / 8 for key, number in numbers.items())),
    }


@contextmanager
def _every_product_apart() -> Iterator[None]:
    """Let torch's own attention call its linear layers one by one, which its fast path makes one call with the rest."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _zeros(layer: nn.Module) -> int:
    weight: torch.Tensor = layer.weight  # type: ignore[assignment]
    codes = layer.quantizer.codes(weight) if hasattr(layer, "quantizer") else weight  # type: ignore[operator, union-attr]
    return int((codes == 0).sum())
