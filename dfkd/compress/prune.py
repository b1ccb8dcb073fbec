"""Pruning from images alone: weights set to zero or channels taken out for good, and the rest made up to match."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import prune as torch_prune

from dfkd.compress import channels
from dfkd.compress.graph import (
    Chain,
    calibration_inputs,
    chains,
    ignored_layers,
    joined,
    network_input,
    network_of,
    own_name,
    watch,
    with_network,
)
from dfkd.compress.repair import check_batch_norms, least_squares, output_errors, paired_batch_norm
from dfkd.compress.result import Compressed
from dfkd.compress.tracing import check_weights, heads, thawed, trace
from dfkd.errors import UserError

KINDS = ("channels", "weights")
REPAIRS = ("least_squares", "batch_norm", "none")
PROBE = 4  # images on which a cut is tried out
MEASURED = 256  # images on which the layers' errors are measured
# How far torch-pruning follows a group of channels: in channels, a look at a dependency being worth LOOKED_AT, as it
# takes about as long. The largest of DenseNet-201 come to 90,000.
LOOKED_AT, MOST_FOLLOWED = 20, 400_000


@dataclass
class Cut:
    """Channels that go together: indices of outputs (of batch norms too) and of inputs that are removed, by layer."""

    outputs: dict[str, set[int]] = field(default_factory=dict)
    inputs: dict[str, set[int]] = field(default_factory=dict)

    def add(self, other: "Cut") -> None:
        """Take in what another cut removes."""
        for mine, theirs in ((self.outputs, other.outputs), (self.inputs, other.inputs)):
            for name, removed in theirs.items():
                mine[name] = mine.get(name, set()) | removed


def prune(
    model: nn.Module,
    stream: Iterable[Any],
    ratio: float = 0.5,
    *,
    kind: str = "channels",
    repair: str = "least_squares",
    ignore: Sequence[str] = (),
    images: int = 1024,
    ridge: float = 1e-2,
    inner_only: bool | None = None,
) -> Compressed:
    """A pruned copy of a model, repaired on images of a stream; the model itself stays as it is.

    ratio, above 0 and below 1, is the share removed: of filters, layer by layer, those with the smallest L1 norms (kind
    "channels": a smaller network of the same class); or of all weights of convolutions and linear layers, the smallest
    of the whole network (kind "weights": the same network with zeros in it). repair: "least_squares" (He et al. 2017),
    "batch_norm" (paired re-estimation) or "none"; on `images` images of the stream, ridge relative to the mean square
    of a layer's inputs. ignore: layer names or patterns (`layer1.*`) whose own filters or weights stay.

    inner_only: True takes only channels between one layer and the next, which needs no torch-pruning; False also those
    coupled by additions and concatenations, and refuses where some cannot be taken; None takes whatever can be.

    Returns the model in eval mode, `naive` without the repair, a line per layer that has shrunk: kept, of, sparsity (%)
    and the relative error of its output before and after the repair; structure["channels"] for dfkd.compress.channels,
    what earlier prunings took included.
    Raises UserError on bad arguments, where nothing can be pruned, and as the repairs do.
    """
    _check(ratio, kind, repair, images, ridge)
    inputs = joined(calibration_inputs(model, stream, images))
    network = thawed(network_of(model)).eval()
    prunable = _prunable(network, inputs[:PROBE], ignore)
    cut, supports = _what_goes(network, inputs[:PROBE], ratio, kind, prunable, inner_only)
    naive = _remove(copy.deepcopy(network), cut)
    _mask(naive, supports or {})
    kept = {name: _left(network, name, removed) for name, removed in cut.outputs.items()}
    repaired = copy.deepcopy(naive)
    if repair == "least_squares":
        least_squares(network, repaired, inputs, kept, supports=supports, ridge=ridge)
    elif repair == "batch_norm":
        paired_batch_norm(network, repaired, inputs, kept)
    changed = channels.remembered(network_of(model))  # here, since a copy of a GraphModule has no attributes of its own
    changed |= channels.changed_shapes(channels.shapes(network), channels.shapes(naive))
    for smaller in (naive, repaired):
        channels.remember(smaller, changed)
    return Compressed(
        with_network(model, repaired),
        with_network(model, naive),
        _lines(network, naive, repaired, inputs[:MEASURED], kept),
        {"channels": changed} if changed else {},
    )


def check_prunable(
    model: nn.Module,
    images: Tensor,
    ratio: float,
    *,
    kind: str,
    repair: str,
    ignore: Sequence[str],
    inner_only: bool | None,
) -> None:
    """Raise UserError where `prune` would whatever a stream holds; images [B, C, H, W] are of the model's size."""
    check_weights(network_of(model))
    network, inputs = thawed(network_of(model)).eval(), network_input(model, images)
    _what_goes(network, inputs, ratio, kind, _prunable(network, inputs, ignore), inner_only)
    if repair == "batch_norm":
        check_batch_norms(network)


def _check(ratio: float, kind: str, repair: str, images: int, ridge: float) -> None:
    if kind not in KINDS:
        raise UserError(f"unknown kind {kind!r} of pruning; choose from {sorted(KINDS)}")
    if repair not in REPAIRS:
        raise UserError(f"unknown repair {repair!r}; choose from {sorted(REPAIRS)}")
    if not isinstance(ratio, Real) or not 0 < ratio < 1:
        raise UserError(f"ratio is the share removed, above 0 and below 1, not {ratio!r}")
    if images < PROBE or ridge <= 0:
        raise UserError(f"pruning needs images >= {PROBE} and ridge > 0, got {images} and {ridge}")


def _what_goes(
    network: nn.Module, probe: Tensor, ratio: float, kind: str, prunable: list[str], inner_only: bool | None
) -> tuple[Cut, dict[str, Tensor] | None]:
    """The channels that are taken out, or masks of the weights that stay."""
    if kind == "channels":
        return _channel_cut(network, probe, ratio, prunable, inner_only), None
    return Cut(), _largest_weights(network, prunable, ratio)


@torch.no_grad()
def _prunable(network: nn.Module, probe: Tensor, ignore: Sequence[str]) -> list[str]:
    """Names of the convolutions and linear layers that are not ignored, and are called in eval mode: not a head for
    training alone, nor what torch's attention computes with itself."""
    names = [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    ignored = ignored_layers(names, ignore)
    with watch(network, names) as called:
        network(probe)
    return [name for name in names if name in called and name not in ignored]


def _largest_weights(network: nn.Module, names: list[str], ratio: float) -> dict[str, Tensor]:
    """Masks of the weights that stay, by layer: the largest of the whole network; Han et al. 2015."""
    scratch = copy.deepcopy(network).to(memory_format=torch.contiguous_format)  # torch flattens weights by view
    layers: dict[str, Any] = {name: scratch.get_submodule(name) for name in names}
    if not layers:
        raise UserError(f"{type(network).__name__} has no convolution or linear layer left to prune; ignore fewer")
    if others := [name for name, layer in layers.items() if not _computes_with_its_weight(layer)]:
        raise UserError(
            f"{others[0]} ({type(layers[others[0]]).__name__}) computes with a weight made of its own, as by "
            f"standardising it: zeros would be none there; name in ignore {', '.join(others)}"
        )
    parameters = [(layer, "weight") for layer in layers.values()]
    torch_prune.global_unstructured(parameters, torch_prune.L1Unstructured, amount=ratio)
    return {name: layer.weight_mask.bool() for name, layer in layers.items()}


@torch.no_grad()
def _computes_with_its_weight(layer: nn.Conv2d | nn.Linear) -> bool:
    """Whether what a layer gives is proportional to its weight, but for its bias; True where a forward of its own takes
    something else than one tensor."""
    if isinstance(layer, nn.Linear):
        shape: tuple[int, ...] = (layer.in_features,)
    else:
        reach = [step * (side - 1) + 1 for step, side in zip(layer.dilation, layer.kernel_size)]
        shape = (layer.in_channels, *reach)
    given = torch.arange(math.prod(shape)).cos().view(1, *shape).to(layer.weight)
    weight, found = layer.weight.clone(), []
    try:
        for factor in (1, 2, 0):
            layer.weight.copy_(factor * weight)
            found.append(layer(given))
    except Exception:  # whatever a stranger's forward may raise
        return True
    finally:
        layer.weight.copy_(weight)
    once, twice, bias = found
    return torch.allclose(twice - bias, 2 * (once - bias), rtol=1e-3, atol=1e-5 * (1 + float(bias.abs().max())))


@torch.no_grad()
def _mask(network: nn.Module, supports: Mapping[str, Tensor]) -> None:
    for name, support in supports.items():
        layer: Any = network.get_submodule(name)
        layer.weight.mul_(support)


def _channel_cut(network: nn.Module, probe: Tensor, ratio: float, prunable: list[str], inner_only: bool | None) -> Cut:
    """What goes: a uniform share of every group of channels whose removal the network provably takes."""
    groups, read = ([], False) if inner_only else _coupled(network, probe, ratio, prunable)
    if not read and inner_only is False:
        raise UserError(
            f"torch-pruning cannot read all of {type(network).__name__}; pass inner_only=None to take what it can, or "
            "True to take inner channels"
        )
    if not read:
        taken = {name for group in groups for name in group.outputs}
        inner = [name for name in prunable if name not in taken]
        with suppress(UserError) if groups else nullcontext():  # of a forward that cannot be traced
            groups += [_inner(network, each, ratio) for each in chains(trace(network, probe)) if each.first in inner]
    whole = _merged(groups)
    if not _takes(network, whole, probe):
        sound = [group for group in groups if _takes(network, group, probe)]
        if inner_only is False and len(sound) < len(groups):
            lost = next(group for group in groups if group not in sound)
            raise UserError(
                f"the channels of {', '.join(lost.outputs)} go together but cannot be taken out (a pad, split or "
                "reshape counts them); pass inner_only=None to leave them, or name one in `ignore`"
            )
        whole = _merged(sound)
    if not whole.outputs:
        unread = "" if read or inner_only else "torch-pruning cannot read all of it, or "
        raise UserError(
            f"{type(network).__name__} has no channels that can be taken out at ratio {ratio}: {unread}they are too "
            "few for it, ignored, counted by its forward, reach its output, or pass a grouped convolution or a norm of "
            "no fixed statistics; change ratio or ignore, or give kind='weights'"
        )
    if not _takes(network, whole, probe):
        raise UserError(
            f"{type(network).__name__} does not run with fewer channels in {', '.join(whole.outputs)}; name some of "
            "them in `ignore`, or pass kind='weights'"
        )
    return whole


def _merged(groups: list[Cut]) -> Cut:
    whole = Cut()
    for group in groups:
        whole.add(group)
    return whole


def _inner(network: nn.Module, chain: Chain, ratio: float) -> Cut:
    """The channels between the two layers of a chain."""
    weight: Any = network.get_submodule(chain.first).weight
    removed = set(range(len(weight))) - set(channels.largest_filters(weight, ratio).tolist())
    columns = {index * chain.spatial + place for index in removed for place in range(chain.spatial)}
    makers = [chain.first] if chain.norm is None else [chain.first, own_name(network, chain.norm)]
    return Cut(dict.fromkeys(makers, removed), {chain.second: columns}) if removed else Cut()


def dependency_graph() -> Any:
    """torch-pruning's DependencyGraph; UserError with the extra to install where the package is missing."""
    try:
        from torch_pruning import DependencyGraph
    except ImportError:
        raise UserError(
            "pruning coupled channels needs torch-pruning: pip install 'dfkd[prune]', or set inner_only=true"
        ) from None
    return DependencyGraph


def _coupled(network: nn.Module, probe: Tensor, ratio: float, prunable: list[str]) -> tuple[list[Cut], bool]:
    """Cuts by torch-pruning's dependency graph (Fang et al. 2023), and whether it could read all of the network."""
    scratch = copy.deepcopy(network).requires_grad_(True)
    names = {module: name for name, module in scratch.named_modules()}
    cuts: list[Cut] = []
    graph = _tolerant(dependency_graph())()
    try:
        with torch.enable_grad():
            graph.build_dependency(scratch, [probe.clone()], verbose=False)
            for dependency in (each for node in graph.module2node.values() for each in node.dependencies):
                dependency.index_mapping = _Counted(dependency.index_mapping, graph.spent)
            for group in graph.get_all_groups():
                try:
                    cut = _group_cut(graph, group, names, ratio, prunable) if group else None
                except (IndexError, RuntimeError):  # of channels that torch-pruning guessed, and a layer has not
                    cut, graph.lost = None, graph.lost + 1
                cuts += [cut] if cut else []
    except Exception:  # whatever torch-pruning runs into on a stranger's forward
        return cuts, False
    return cuts, not graph.lost


def _tolerant(graph_type: Any) -> Any:
    """A DependencyGraph that gives an empty group where it fails on one, and counts those."""

    class Tolerant(graph_type):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.lost, self.spent = 0, [0]

        def get_pruning_group(self, *given: Any) -> Any:
            self.spent[0] = 0
            try:
                return super().get_pruning_group(*given)
            except OverflowError:  # each of the others that meet there would take as long
                raise
            except Exception:
                self.lost += 1
                return []

    return Tolerant


class _Counted(list[Any]):
    """torch-pruning's mappings of channels along a dependency, which count, in `spent`, how often they are looked at
    and the channels that they give, and raise OverflowError beyond MOST_FOLLOWED: where channels are split and joined
    in circles (timm's CoAtNet, ReXNet) it goes round for ever."""

    def __init__(self, mappings: Iterable[Any], spent: list[int]) -> None:
        super().__init__(mappings)
        self.spent = spent

    def __iter__(self) -> Iterator[Any]:
        self._spend(LOOKED_AT)
        return (None if mapping is None else partial(self._mapped, mapping) for mapping in super().__iter__())

    def _mapped(self, mapping: Callable[[Any], Any], indices: Any) -> Any:
        found = mapping(indices)
        self._spend(len(found))
        return found

    def _spend(self, amount: int) -> None:
        self.spent[0] += amount
        if self.spent[0] > MOST_FOLLOWED:
            raise OverflowError


def _group_cut(graph: Any, group: Any, names: Mapping[nn.Module, str], ratio: float, prunable: list[str]) -> Cut | None:
    """A group's channels with the smallest summed L1 norms; None where the group holds what has no smaller form.

    Each layer's norms count relative to their mean, or the layer with the most weights would decide alone.
    """
    root = group[0].dep.target.module
    scores = torch.zeros(len(root.weight), dtype=torch.float64)
    for item in group:
        module = item.dep.target.module
        if (
            module not in names
            or isinstance(module, _BatchNorm)
            or not graph.is_out_channel_pruning_fn(item.dep.handler)
        ):
            continue
        if not isinstance(module, nn.Conv2d | nn.Linear) or names[module] not in prunable:
            return None
        norms = module.weight.detach().flatten(1).abs().sum(1).double().cpu()
        scores.index_add_(0, torch.tensor(item.root_idxs), (norms / norms.mean().clamp_min(1e-12))[item.idxs])
    keep = channels.largest_filters(scores[:, None], ratio)
    removed = sorted(set(range(len(scores))) - set(keep.tolist()))
    if not removed:
        return None
    cut = Cut()
    for item in graph.get_pruning_group(root, group[0].dep.handler, removed):
        module, out = item.dep.target.module, graph.is_out_channel_pruning_fn(item.dep.handler)
        if module not in names:
            continue  # an operation without weights: trying the cut tells whether it counts channels
        depthwise = isinstance(module, nn.Conv2d) and 1 < module.groups == module.in_channels == module.out_channels
        ungrouped = isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
        if not (depthwise or ungrouped or isinstance(module, _BatchNorm)):
            return None
        side = cut.outputs if out or not ungrouped else cut.inputs
        side[names[module]] = side.get(names[module], set()) | {int(index) for index in item.idxs}
    return cut if cut.inputs else None  # channels that no layer takes are the network's output


def _left(network: nn.Module, name: str, removed: set[int], dim: int = 0) -> Tensor:
    layer: Any = network.get_submodule(name)
    of = layer.num_features if isinstance(layer, _BatchNorm) else layer.weight.shape[dim]
    return torch.tensor([index for index in range(of) if index not in removed])


def _remove(network: nn.Module, cut: Cut) -> nn.Module:
    """The network with a cut's channels taken out, in place."""
    for name, removed in cut.outputs.items():
        layer: Any = network.get_submodule(name)
        keep = _left(network, name, removed)
        if isinstance(layer, nn.Conv2d) and layer.groups > 1:
            layer.groups = len(keep)  # depthwise
        channels.outputs(layer, keep)
    for name, removed in cut.inputs.items():
        channels.inputs(network.get_submodule(name), _left(network, name, removed, 1))
    return network


@torch.no_grad()
def _takes(network: nn.Module, cut: Cut, probe: Tensor) -> bool:
    """Whether the network without a cut's channels computes what it does when nobody listens to them.

    Tells whatever counts channels, however it does: option-A pads, slices, shuffles, attention heads, layer norms, the
    network's own output.
    """
    deaf = copy.deepcopy(network)
    try:
        for name, removed in cut.inputs.items():
            layer: Any = deaf.get_submodule(name)
            layer.weight[:, sorted(removed)] = 0
        expected, given = heads(deaf, probe), heads(_remove(copy.deepcopy(network), cut), probe)
    except Exception:  # a stranger's forward with sizes it was not made for, and channels that are counted otherwise
        return False
    pairs = list(zip(given, expected))
    return all(x.shape == y.shape for x, y in pairs) and all((x - y).norm() <= 1e-3 * y.norm() for x, y in pairs)


def _lines(
    network: nn.Module, naive: nn.Module, repaired: nn.Module, inputs: Tensor, kept: Mapping[str, Tensor]
) -> list[dict[str, Any]]:
    """What became of every convolution and linear layer that has lost weights, with its outputs' relative errors."""
    lines = []
    for name, old in network.named_modules():
        if not isinstance(old, nn.Conv2d | nn.Linear):
            continue
        new: Any = naive.get_submodule(name)
        nonzero, same = int(new.weight.count_nonzero()), new.weight.shape == old.weight.shape
        before = int(old.weight.count_nonzero())
        if same and nonzero == before:
            continue
        figures = (
            {"kept": nonzero, "of": old.weight.numel()} if same else {"kept": len(new.weight), "of": len(old.weight)}
        )
        lines.append({"layer": name, **figures, "sparsity": 100 * (1 - nonzero / old.weight.numel())})
    for key, pruned in (("error_before", naive), ("error_after", repaired)):
        errors = output_errors(network, pruned, inputs, kept, [line["layer"] for line in lines])
        for line in lines:
            line[key] = errors[line["layer"]]
    return lines
