"""Channels taken out of a network for good: which to keep, smaller layers for larger, their shapes for files."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dfkd.compress.graph import Chain
from dfkd.errors import UserError

Shapes = dict[str, list[int]]  # layer name -> outputs and inputs
KNOWN = "dfkd_channels"  # the attribute of a network that tells the layers of other sizes than it was built with


def largest_filters(weight: Tensor, ratio: float) -> Tensor:
    """Indices [K'] in order of the filters of weight [K, ...] that stay when the share `ratio` with the smallest L1
    norms goes; at least one stays. Li et al. 2017, section 3.1."""
    keep = max(1, weight.shape[0] - round(ratio * weight.shape[0]))
    return weight.detach().flatten(1).abs().sum(1).topk(keep).indices.sort().values


@torch.no_grad()
def shrink(network: nn.Module, chain: Chain, keep: Tensor) -> None:
    """Leave the channels keep [K'] alone between the two layers of a chain, in place."""
    outputs(network.get_submodule(chain.first), keep)
    if chain.norm is not None:
        outputs(network.get_submodule(chain.norm), keep)
    columns = keep[:, None] * chain.spatial + torch.arange(chain.spatial, device=keep.device)
    inputs(network.get_submodule(chain.second), columns.flatten())


def outputs(layer: Any, keep: Tensor) -> None:
    """Leave the outputs keep [K'] of a convolution, linear layer or batch norm alone, in place."""
    for name in ("weight", "bias", "running_mean", "running_var"):
        _index(layer, name, keep, 0)
    _tell_size(layer)


def inputs(layer: Any, keep: Tensor) -> None:
    """Leave the inputs keep [C'] of an ungrouped convolution or a linear layer alone, in place."""
    _index(layer, "weight", keep, 1)
    _tell_size(layer)


def _index(layer: Any, name: str, keep: Tensor, dim: int) -> None:
    old = getattr(layer, name, None)
    if old is None:
        return
    new = old.detach().index_select(dim, keep.to(old.device))
    setattr(layer, name, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)


def _tell_size(layer: Any) -> None:
    """Let a layer's own figures say what its weights are."""
    if hasattr(layer, "num_features"):
        layer.num_features = next(len(x) for x in (layer.weight, layer.running_mean) if x is not None)
    elif hasattr(layer, "in_features"):
        layer.out_features, layer.in_features = layer.weight.shape
    else:
        layer.out_channels, layer.in_channels = layer.weight.shape[0], layer.weight.shape[1] * layer.groups


def shapes(network: nn.Module) -> Shapes:
    """Outputs and inputs of every convolution, linear layer and batch norm (its channels twice), by name."""
    found = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            found[name] = [module.out_channels, module.in_channels]
        elif isinstance(module, nn.Linear):
            found[name] = [module.out_features, module.in_features]
        elif isinstance(module, _BatchNorm):
            found[name] = [module.num_features, module.num_features]
    return found


def changed_shapes(before: Mapping[str, Sequence[int]], after: Shapes) -> Shapes:
    """Those of the layers that have become smaller."""
    return {name: shape for name, shape in after.items() if list(shape) != list(before[name])}


def remember(network: nn.Module, changed: Mapping[str, Sequence[int]]) -> None:
    """Let a network know which of its layers have other sizes than its model string gives them: a later compression of
    it then tells of them too."""
    setattr(network, KNOWN, dict(changed))


def remembered(network: nn.Module) -> dict[str, Any]:
    """The sizes by layer that a network has been told to remember."""
    return dict(getattr(network, KNOWN, {}))


def resize(network: nn.Module, wanted: Mapping[str, Sequence[int]]) -> None:
    """Give the named layers their sizes from a file, in place; their weights are then to be loaded.

    Raises UserError where there is no such layer. A depthwise convolution keeps one group per channel.
    """
    for name, (rows, columns) in wanted.items():
        try:
            layer: Any = network.get_submodule(name)
        except AttributeError:
            raise UserError(
                f"{type(network).__name__} has no layer {name} to make smaller; is it another model?"
            ) from None
        if isinstance(layer, nn.Conv2d) and layer.groups > 1:
            layer.groups = layer.groups * columns // layer.in_channels
            columns //= layer.groups
        outputs(layer, torch.arange(rows))
        if not isinstance(layer, _BatchNorm):
            inputs(layer, torch.arange(columns))
