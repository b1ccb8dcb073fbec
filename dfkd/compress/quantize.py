"""Quantisation from a stream: by rounding, by reconstruction, or by training with learned steps."""

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from dfkd.compress.graph import calibration_inputs, joined, network_of, with_network
from dfkd.compress.prepare import GivenBits, prepare
from dfkd.compress.qat import Training, check_logits
from dfkd.compress.reconstruct import Learner, reconstruct
from dfkd.compress.result import Compressed, quantized
from dfkd.errors import UserError, nearest

# What the options of a method are for.
METHODS: dict[str, tuple[Callable[..., Any], ...]] = {
    "nearest": (),
    "reconstruct": (Learner, reconstruct),
    "train": (Training,),
}


def quantize(
    model: nn.Module,
    stream: Iterable[Any],
    bits: GivenBits = 8,
    *,
    method: str = "reconstruct",
    images: int = 512,
    ends: GivenBits = (8, 8),
    overrides: Mapping[str, GivenBits] | None = None,
    ignore: Sequence[str] = (),
    **options: Any,
) -> Compressed:
    """A model with weights and activations in few bits, from a stream of its input images [B, C, H, W] (uint8: 255ths).

    bits: 2 to 8, or a pair (weights, activations); `ends` those of the first and last layer; overrides maps name
    patterns to bits, ignore names layers left float. method: `nearest` rounds to nearest with ranges calibrated on
    `images` images; `reconstruct` then learns the rounding (options: those of dfkd.compress.reconstruct); `train`
    trains weights and steps against the float model on the stream (options: steps, lr, temperature, hints, ...: those
    of Training). The given model is not changed. Raises UserError where network, pattern or stream will not do.
    """
    if method not in METHODS:
        given = f"method={method!r} is unknown; choose from {', '.join(METHODS)}"
        raise UserError(given + (f", here 'reconstruct' with unit={method!r}" if method in ("layer", "block") else ""))
    signatures = [inspect.signature(each).parameters.values() for each in METHODS[method]]
    known = [each.name for parameters in signatures for each in parameters if each.default is not each.empty]
    if unknown := [name for name in options if name not in known]:
        raise UserError(f"method={method!r} takes no {', '.join(unknown)}{nearest(unknown[0], known)}")
    if method == "train":
        training = Training(
            model, stream, bits, images=images, ends=ends, overrides=overrides, ignore=ignore, **options
        )
        training.fit.run()
        return training.result()
    inputs = calibration_inputs(model, stream, images)
    network = network_of(model)
    if options.get("fisher"):
        check_logits(network, inputs[0][:1])
    graph = prepare(network, bits, inputs, folded=True, per_channel=True, ends=ends, overrides=overrides, ignore=ignore)
    naive = with_network(model, copy.deepcopy(graph))
    learned: list[dict[str, Any]] = []
    if method == "reconstruct":
        learned = reconstruct(graph, joined(inputs), **options)
    return quantized(model, with_network(model, graph), naive, inputs, learned)
