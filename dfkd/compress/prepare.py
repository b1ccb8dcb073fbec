"""Networks that compute with few bits: where the quantisers stand, and their calibration."""

import operator
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dfkd.compress.graph import (
    ADDS,
    CARRIERS,
    GATES,
    MEANS,
    MULS,
    POOLS,
    RELUS,
    averages_maps,
    fold,
    ignored_layers,
    is_layer,
    kind,
    matching,
    positive_scales,
    sizes,
    watch,
)
from dfkd.compress.quantizers import (
    QUANTIZED,
    ActivationQuantizer,
    QuantizedConv2d,
    QuantizedLinear,
    WeightQuantizer,
    activation_quantizers,
    best_grid,
    quantized_layers,
    without_quantizers,
)
from dfkd.compress.tracing import Mark, trace
from dfkd.errors import UserError
from dfkd.runtime import full_precision

Bits = tuple[int, int]  # of weights and of the layer's input
GivenBits = int | Sequence[int]  # the same for both, or each
# Additions and the like take 8 bits whatever the layers have: a residual stream in 4 bits loses much and saves nothing.
JOINT_BITS = 8
JOINTS: set[object] = {*ADDS, *MULS, *POOLS, *MEANS, torch.cat, nn.AvgPool2d, F.avg_pool2d}
AVERAGED = ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")  # by F.avg_pool2d


def layer_names(graph: fx.GraphModule) -> list[str]:
    """The convolutions and linear layers in the order of their use."""
    return [str(node.target) for node in graph.graph.nodes if is_layer(graph, node, nn.Conv2d, nn.Linear)]


def _pair(bits: GivenBits, name: str) -> Bits:
    """Bits of a layer's weights and input, where both or the same for both were given."""
    each: list[Any] = [*bits] if isinstance(bits, list | tuple) else [bits]
    if len(each) not in (1, 2) or not all(isinstance(b, Integral) and 2 <= int(b) <= 8 for b in each):
        raise UserError(f"{name}: bits {bits} are not allowed; weights and activations take 2 to 8, both or each")
    return int(each[0]), int(each[-1])  # of numpy's numbers too


def layer_bits(
    graph: fx.GraphModule,
    bits: GivenBits,
    ends: GivenBits = (8, 8),
    overrides: Mapping[str, GivenBits] | None = None,
    ignore: Sequence[str] = (),
) -> dict[str, Bits]:
    """Bits of weights and input by layer: `bits`, the first and the last layer `ends`, then overrides by name pattern
    (the last that matches); what `ignore` names stays float. Raises UserError for bits outside 2..8."""
    if overrides is not None and not isinstance(overrides, Mapping):
        raise UserError(f"overrides={overrides!r} is not allowed; give bits by name pattern: {{'layer1.*': (8, 4)}}")
    names = [*layer_names(graph), *kept_float(graph, ignore)]
    if not names:
        raise UserError("the network has no convolution or linear layer to quantise")
    chosen = {name: (ends if name in (names[0], names[-1]) else bits) for name in names}
    for pattern, own in (overrides or {}).items():
        chosen |= dict.fromkeys(matching(names, pattern, "the override"), own)
    for name in ignored_layers(names, ignore):
        chosen.pop(name, None)
    if not chosen:
        raise UserError(f"ignore={list(ignore)} leaves no layer to quantise; the layers are {', '.join(names)}")
    return {name: _pair(given, name) for name, given in chosen.items()}


def kept_float(graph: fx.GraphModule, ignore: Sequence[str]) -> list[str]:
    """Layers that are none of torch's and cannot be quantised. Raises UserError for one that `ignore` does not name."""
    names, calls = list[str](), dict[str, str]()
    for node in graph.graph.nodes:
        weight = node.kwargs.get("weight", node.args[1] if len(node.args) > 1 else None)
        if node.target in (F.conv2d, F.linear) and isinstance(weight, fx.Node):
            names.append(_owner(weight) or node.name)
            calls[names[-1]] = node.target.__name__
    if asked := [name for name in names if not any(fnmatchcase(name, pattern) for pattern in ignore)]:
        rest = f" (all of them: {', '.join(asked)})" if len(asked) > 1 else ""
        raise UserError(
            f"{asked[0]} calls {calls[asked[0]]} itself, is no nn.Conv2d or nn.Linear, and cannot be quantised; "
            f"replace it, or name it in ignore to keep it float{rest}"
        )
    return names


def _owner(node: fx.Node) -> str:
    """The layer whose weight a node is or is computed of; empty where it is none's."""
    while node.op != "get_attr" and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return str(node.target).rpartition(".")[0] if node.op == "get_attr" else ""


def insert(graph: fx.GraphModule, chosen: Mapping[str, Sequence[int]], *, per_channel: bool) -> fx.GraphModule:
    """Put quantisers, yet to be calibrated, into a graph, in place; graph.meta["bits"] then tells the layers' bits.

    With the bits of its layer: each chosen layer's weights, and its input. With JOINT_BITS: what goes into an addition,
    a concatenation, an average or a gate's product, and what a convolution gives to something that is computed in float
    (GELU, a layer norm), as an integer kernel gives integers. One tensor has one quantiser per number of bits.
    """
    graph.meta["bits"] = dict(chosen)
    _gates_apart(graph)
    for name, (bits, _) in chosen.items():
        layer: Any = graph.get_submodule(name)
        layer.__class__ = QuantizedConv2d if isinstance(layer, nn.Conv2d) else QuantizedLinear
        layer.quantizer = WeightQuantizer(bits, len(layer.weight) if per_channel else 1)
    wanted: dict[tuple[fx.Node, fx.Node], int] = {}
    numbers, settled = sizes(graph), set()  # settled: what carries on a tensor that is quantised already
    for node in graph.graph.nodes:
        if node in numbers:
            continue
        if kind(graph, node) in CARRIERS and any((i, node) in wanted or i in settled for i in node.all_input_nodes):
            settled.add(node)
            continue
        for user in node.users:
            asked = _asked(graph, user, chosen)
            if len(asked) == 1 and (bits := next(iter(asked))):
                wanted[node, user] = bits
            elif asked in ({0}, {0, JOINT_BITS}) and user not in numbers and _leaves(graph, node, user, chosen):
                wanted[node, user] = JOINT_BITS
    order = {node: k for k, node in enumerate(graph.graph.nodes)}
    for node, bits in dict.fromkeys((node, bits) for (node, _), bits in wanted.items()):
        users = sorted((user for user in node.users if wanted.get((node, user)) == bits), key=order.__getitem__)
        name = _name(node, bits)
        graph.add_submodule(name, ActivationQuantizer(bits))
        with graph.graph.inserting_before(users[0]):
            quantised = graph.graph.call_module(name, (node,))
        for user in users:
            user.replace_input_with(node, quantised)
    graph.recompile()
    return graph


def _gates_apart(graph: fx.GraphModule) -> None:
    """Make every SiLU the product that it is, in place: sigmoid and product have integer kernels, SiLU has none."""
    for node in list(graph.graph.nodes):
        if kind(graph, node) in (nn.SiLU, F.silu):
            given = node.all_input_nodes[0]
            with graph.graph.inserting_before(node):
                gate = graph.graph.call_function(torch.sigmoid, (given,))
                node.replace_all_uses_with(graph.graph.call_function(operator.mul, (given, gate)))
            graph.graph.erase_node(node)


def _name(node: fx.Node, bits: int) -> str:
    return f"quantizers.{node.name}_{bits}"


def name_quantizers(graph: fx.GraphModule) -> None:
    """Name every quantiser anew, in place, as insert() names one at the tensor where it stands: folding and taking
    layers out changes which node makes that tensor, and files know quantisers by name."""
    calls = [node for node in graph.graph.nodes if is_layer(graph, node, ActivationQuantizer)]
    modules: list[Any] = [graph.get_submodule(str(node.target)) for node in calls]
    for node in calls:  # not the whole of `quantizers`: the network may have layers of its own there
        graph.delete_submodule(str(node.target))
    for node, module in zip(calls, modules):
        node.target = _name(node.all_input_nodes[0], module.bits)
        graph.add_submodule(node.target, module)
    graph.recompile()


def _asked(graph: fx.GraphModule, user: fx.Node, chosen: Mapping[str, Sequence[int]]) -> set[int]:
    """The bits that a user of a tensor asks for (0: none), seen through what only carries it on."""
    what = kind(graph, user)
    if what in CARRIERS:
        return set().union(*(_asked(graph, each, chosen) for each in user.users))
    if user.op == "call_module" and user.target in chosen:
        return {chosen[str(user.target)][1]}
    return {JOINT_BITS if what in JOINTS and _joins(graph, user) else 0}


def _leaves(graph: fx.GraphModule, node: fx.Node, user: fx.Node, chosen: Mapping[str, Sequence[int]]) -> bool:
    """Whether what a chosen convolution gives, with a norm and ReLU behind it where they are, goes from a node into
    what is computed for itself, in float."""
    while kind(graph, node) in RELUS or is_layer(graph, node, _BatchNorm, Mark):
        node = node.all_input_nodes[0]
    return is_layer(graph, node, nn.Conv2d) and node.target in chosen and not _ends(graph, user)


def _ends(graph: fx.GraphModule, user: fx.Node) -> bool:
    """Whether a convolution's reader is computed with it (norm, ReLU), is to stay float or is the network's output."""
    if kind(graph, user) in CARRIERS:
        return any(_ends(graph, each) for each in user.users)
    kept = is_layer(graph, user, _BatchNorm, nn.Conv2d, nn.Linear) or _reaches_beyond(graph, user)
    return kept or user.op == "output" or kind(graph, user) in RELUS


def _joins(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether one of JOINTS joins tensors, gates one or averages maps, on integers as it does in float: an addition of
    a constant and a mean of channels belong to a formula (a layer norm's, whose variance is no number of steps)."""
    what, given = kind(graph, node), [each for each in (*node.args, *node.kwargs.values()) if isinstance(each, fx.Node)]
    if what in MULS:
        return len(given) == 2 and any(kind(graph, each) in GATES for each in given)
    if what in ADDS:
        return len(given) == 2
    if what in MEANS:
        return averages_maps(graph, node)
    return not _reaches_beyond(graph, node)


def _reaches_beyond(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a pooling averages what lies beyond the padding, which ONNX Runtime's average of integers divides by."""
    if kind(graph, node) not in (nn.AvgPool2d, F.avg_pool2d):
        return False
    pool = vars(graph.get_submodule(str(node.target))) if node.op == "call_module" else {}
    pool = pool or dict(zip(AVERAGED, node.args)) | node.kwargs
    return bool(pool.get("ceil_mode")) and bool(pool.get("count_include_pad", True))


@torch.no_grad()
def calibrate(graph: nn.Module, images: Iterable[Tensor], sample: int = 2**16) -> None:
    """Set every quantiser's scale: of weights by themselves (see best_step); of tensors, and their zero (see
    best_grid), by what the float network gives on the images, of which `sample` values a batch at most. Raises
    UserError where nothing finite came."""
    for layer in quantized_layers(graph).values():
        layer.quantizer.calibrate(layer.weight)
    quantizers = activation_quantizers(graph)
    kept: dict[str, list[Tensor]] = {name: [] for name in quantizers}
    with without_quantizers(graph), watch(graph, quantizers) as seen:
        for batch in images:
            graph(batch)
            for name, x in seen.items():
                flat = full_precision(x).flatten()
                every = -(-len(flat) // sample) | 1  # odd, or it would always meet the same columns of a map
                extremes = [torch.stack(flat.aminmax())] if len(flat) else []
                kept[name].append(torch.cat([flat[::every], *extremes]))
    for name, quantizer in quantizers.items():
        values = torch.cat(kept[name]) if kept[name] else torch.empty(0)
        if kept[name] and not len(values):  # it is never anything
            continue
        if not len(values) or not torch.isfinite(values).all():
            raise UserError(f"{name}: no finite value to calibrate on; check the images and the model's normalisation")
        quantizer.scale.data, quantizer.zero = best_grid(values, quantizer.bits)


@torch.no_grad()
def round_biases(graph: fx.GraphModule) -> None:
    """Round the biases of quantised layers to whole steps of input times weights (in 8 bits, see dfkd.export), in
    place: an integer kernel holds them so (int32), and a file then computes what the network here does. A filter of
    zeros keeps its bias."""
    for node in graph.graph.nodes:
        if not is_layer(graph, node, *QUANTIZED):
            continue
        layer: Any = graph.get_submodule(str(node.target))
        source = node.args[0]
        while kind(graph, source) in CARRIERS:
            source = source.args[0]
        if layer.bias is not None and is_layer(graph, source, ActivationQuantizer):
            step: Tensor = graph.get_submodule(str(source.target)).scale  # type: ignore[assignment]
            unit = (step * layer.quantizer.scale).double() / 2 ** (8 - layer.quantizer.bits)
            whole = (layer.bias / unit).round()
            idle = (layer.quantizer.codes(layer.weight).flatten(1) == 0).all(1)
            held = (whole.abs() < 2**31) & ~idle
            layer.bias.copy_(torch.where(held, whole * unit, layer.bias.double()))


def prepare(
    network: nn.Module,
    chosen_bits: GivenBits,
    images: Sequence[Tensor],
    *,
    folded: bool,
    per_channel: bool,
    ends: GivenBits = (8, 8),
    overrides: Mapping[str, GivenBits] | None = None,
    ignore: Sequence[str] = (),
) -> fx.GraphModule:
    """A quantised copy of a network, rounded to nearest and calibrated on batches of (normalised) images.

    folded takes the batch norms into the weights; without it they stay (in eval mode, scales made positive), and
    fold() takes them in later, exactly, as scales per channel.
    """
    graph = trace(network, images[0][:2])
    if folded:
        fold(graph)
    else:
        positive_scales(graph)
    insert(graph, layer_bits(graph, chosen_bits, ends, overrides, ignore), per_channel=per_channel)
    graph.to(images[0].device)
    calibrate(graph, images)
    return graph
