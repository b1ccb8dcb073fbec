"""Compressed models in files: a folder that holds all it takes to build the network again, whatever was done to it."""

import os
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dfkd.classifier import Classifier
from dfkd.compress.channels import remember, remembered, resize
from dfkd.compress.graph import fold, network_of
from dfkd.compress.prepare import insert
from dfkd.compress.quantizers import Quantizer, activation_quantizers, quantized_layers
from dfkd.compress.tracing import thawed, trace
from dfkd.errors import UserError, in_a_line
from dfkd.models import build_model, read_checkpoint, save_tensors
from dfkd.models.checkpoints import own_names, read_description


def save_compressed(folder: str | os.PathLike[str], model: nn.Module, description: Mapping[str, Any]) -> None:
    """Write model.safetensors and model.json; quantised weights as int8 codes with their scales.

    description is that of dfkd.models.save_model, with `structure`: {"channels": ...} of a pruned network,
    {"quantized": {"bits", "zeros", "input"}} of a quantised one, both or neither (see Compressed.structure). What it
    does not say of normalisation and input size is the model's, where it is a Classifier.
    """
    network = network_of(model)
    structure = description.get("structure") or {}
    for key, made in (("quantized", quantized_layers(network)), ("channels", remembered(network))):
        if made and key not in structure:
            raise UserError(
                f"the network is {'quantised' if key == 'quantized' else 'pruned'}, which its description does not "
                f"say, so that the folder would not load; give it 'structure': that of what quantize or prune returned"
            )
    if isinstance(model, Classifier):
        mean, std = model.normalisation
        description = {"mean": mean, "std": std, "input_size": model.input_size, **description}
    # model.json says what the quantisers' own state does.
    held = {f"{name}._extra_state" for name, each in network.named_modules() if isinstance(each, Quantizer)}
    tensors = {key: value.detach() for key, value in network.state_dict().items() if key not in held}
    for name, layer in quantized_layers(network).items():
        tensors[f"{name}.weight"] = layer.quantizer.codes(layer.weight)
    save_tensors(folder, tensors, description)


def load_compressed(folder: str | os.PathLike[str], trust_code: bool = False, model: str = "") -> Classifier:
    """A model of save_compressed (or a student, or a cached teacher) from its folder alone, in eval mode.

    One whose model string is `python:` or `hub:` runs that code, with trust_code; `model` is another string in its
    place, where the code has moved. Raises UserError where the folder is torn or does not fit the network it names.
    """
    about = read_description(folder)
    network = build_model(
        model or about["model"],
        classes=about["classes"],
        channels=about["channels"],
        kwargs=about.get("kwargs"),
        trust_code=trust_code,
    )
    tensors, quantized = read_checkpoint(folder), None
    try:
        structure = about.get("structure", {})
        if channels := structure.get("channels"):
            network = thawed(network)  # as what was pruned
            resize(network, channels)
            remember(network, channels)
        if quantized := structure.get("quantized"):
            size = quantized.get("input")  # of an image
            network = fold(trace(network, torch.zeros(1, *size) if size else None))
            insert(network, quantized["bits"], per_channel=True)
        own: Any = network.state_dict()
        state: Any = OrderedDict((key, each) for key, each in own.items() if key.endswith("num_batches_tracked"))
        state.update(_decoded(network, own_names(network, tensors)))
        state._metadata = own._metadata  # torchvision's MNASNet refuses one without
        network.load_state_dict(state)
        if quantized:
            _take_up_zeros(network, quantized)
    except (RuntimeError, LookupError, AttributeError, TypeError, ValueError) as error:  # a description that is wrong
        reason = in_a_line(error)
        kind = "" if isinstance(error, RuntimeError | UserError) else f"{type(error).__name__}: "
        remedy = "; an older dfkd may have made it: quantise the float model again" if quantized else ""
        raise UserError(f"{os.fspath(folder)} does not fit {about['model']}: {kind}{reason}{remedy}") from None
    return Classifier(
        network,
        name=os.path.basename(os.path.normpath(folder)),
        mean=about.get("mean", []),
        std=about.get("std", []),
        input_size=about.get("input_size"),
    ).eval()


def _take_up_zeros(network: nn.Module, quantized: Mapping[str, Any]) -> None:
    for name, quantizer in activation_quantizers(network).items():
        if "zeros" in quantized:
            quantizer.zero = quantized["zeros"].get(name, 0)
        elif name in quantized["signed"]:  # a folder from before tensors had zero points
            quantizer.zero = 2 ** (quantizer.bits - 1)


def _decoded(network: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights that int8 codes and their scales stand for; the layers' own scales take the file's shapes."""
    tensors = dict(tensors)
    for name, layer in quantized_layers(network).items():
        scale, codes = tensors[f"{name}.quantizer.scale"], tensors[f"{name}.weight"]
        layer.quantizer.scale = nn.Parameter(torch.ones_like(scale))
        tensors[f"{name}.weight"] = codes * scale.view(-1, *[1] * (codes.dim() - 1))
    return tensors
