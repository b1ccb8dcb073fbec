"""A network as a graph of operations: batch norms next to their convolutions, channels that one layer owns."""

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dfkd.classifier import Classifier
from dfkd.compress.quantizers import ActivationQuantizer
from dfkd.compress.tracing import Mark, check_can_change, check_weights
from dfkd.errors import UserError, in_a_line
from dfkd.runtime import eval_mode, to_float

# A traced graph has none that work in place (see tracing.py).
ADDS: set[object] = {operator.add, torch.add, "add"}
MULS: set[object] = {operator.mul, torch.mul, "mul"}
GATES: set[object] = {nn.Sigmoid, nn.Hardsigmoid, F.sigmoid, F.hardsigmoid, torch.sigmoid, "sigmoid"}
RELUS: set[object] = {nn.ReLU, nn.ReLU6, F.relu, F.relu6, torch.relu, "relu"}
# What hands on the values it is given, or some of them, at other places: quantised before or after is the same.
CARRIERS: set[object] = {
    *(Mark, nn.Identity, nn.Flatten, nn.MaxPool2d, nn.Dropout, nn.Dropout2d, nn.PixelShuffle, nn.PixelUnshuffle),
    *(torch.flatten, F.max_pool2d, F.dropout, torch.reshape, torch.permute, torch.transpose, torch.squeeze),
    *("flatten", "view", "reshape", "permute", "transpose", "contiguous", "squeeze"),
}
# Of these, what may put channels at other places.
MOVES: set[object] = {torch.permute, torch.transpose, "permute", "transpose"}
# What may make a row of every image's map (see _makes_rows).
FLATTENS: set[object] = {nn.Flatten, torch.flatten, "flatten"}
RESHAPES: set[object] = {torch.reshape, "view", "reshape"}
MEANS: set[object] = {torch.mean, "mean"}
SQUEEZES: set[object] = {torch.squeeze, "squeeze"}
ROWS: set[object] = {*FLATTENS, *RESHAPES, *MEANS, *SQUEEZES}
POOLS: set[object] = {nn.AdaptiveAvgPool2d, F.adaptive_avg_pool2d}


def images_of(stream: Iterable[Any], count: int | None = None) -> Iterator[Tensor]:
    """The images of a stream, batch by batch: of `images` or of `(images, targets, ...)`; `count` images in all. Empty
    batches are left out.

    Raises UserError where the stream is one tensor, gives something else, or ends before `count`.
    """
    if isinstance(stream, Tensor):
        raise UserError(
            f"a stream is an iterable of batches [B, C, H, W], got one tensor {list(stream.shape)}; put it in a list"
        )
    if count is not None and not (isinstance(count, Integral) and count >= 1):
        raise UserError(f"images={count!r} is not allowed; give a whole number of images of the stream, 1 or more")
    seen = 0
    for batch in stream:
        images = batch[0] if isinstance(batch, tuple | list) and batch else batch
        if not isinstance(images, Tensor):
            raise UserError(
                f"a stream's batch is a tensor of images [B, C, H, W] or a tuple that begins with one, got a "
                f"{type(images).__name__}"
            )
        images = images if count is None else images[: count - seen]
        seen += len(images)
        if len(images):
            yield images
        if seen == count:
            return
    if count is not None and seen < count:
        raise UserError(f"the stream ended after {seen} images where {count} are needed; give a longer one")


def network_of(model: nn.Module) -> nn.Module:
    """The network itself: what a Classifier wraps, else the model."""
    return model.model if isinstance(model, Classifier) else model


def network_input(model: nn.Module, images: Tensor) -> Tensor:
    """What the network is given for the model's images: normalised by a Classifier, else the images themselves."""
    return model.network_input(images) if isinstance(model, Classifier) else images


def as_floats(model: nn.Module, images: Tensor) -> Tensor:
    """Images of a stream in float32 (uint8: 255ths), but those in float64 for a network in it."""
    double = images.dtype == torch.float64 and any(each.dtype == torch.float64 for each in model.parameters())
    return images if double else to_float(images)


@torch.no_grad()
def calibration_inputs(model: nn.Module, stream: Iterable[Any], images: int) -> list[Tensor]:
    """The network's inputs for the first images of a stream (uint8: 255ths), in batches. Raises UserError where the
    stream is too short, one is NaN or infinite, of other whole numbers, or beyond [0, 1] for a model that normalises,
    or the network does not take them, and in torch.inference_mode."""
    check_can_change()
    check_weights(network_of(model))
    device = next(model.parameters(), torch.empty(0)).device
    inputs = []
    for batch in images_of(stream, images):  # one by one: it may give the same memory filled anew
        _check_range(model, batch)
        inputs.append(network_input(model, as_floats(model, batch.to(device))))
    inputs = [batch.clone() if batch.is_inference() else batch for batch in inputs]
    if not all(torch.isfinite(batch).all() for batch in inputs):
        raise UserError("the stream gave images that hold NaN or infinity; look at where it takes them from")
    check_takes(network_of(model), inputs[0][:2])
    return inputs


def _check_range(model: nn.Module, images: Tensor) -> None:
    # What sharpens or resizes goes a little beyond [0, 1]; what mean and std have normalised does not reach 20.
    normalises, whole = isinstance(model, Classifier) and model.normalisation[0], not images.is_floating_point()
    if not (normalises or whole) or not images.numel() or images.dtype == torch.uint8:
        return
    least, most = (x.item() for x in torch.aminmax(images))
    if whole or (normalises and 20 < most < math.inf):
        wanted = "in [0, 1]" if isinstance(model, Classifier) else "what the network takes"
        raise UserError(
            f"the stream gave images in {images.dtype} up to {most:g}; give uint8 ones, or float ones {wanted}: divide "
            "by 255"
        )
    if normalises and (least < -0.3 or most > 2) and math.isfinite(least) and math.isfinite(most):
        raise UserError(
            f"the stream gave images from {least:g} to {most:g} to a model that normalises them itself; give them in "
            "[0, 1], as they are before mean and std, or give the network without its normalisation"
        )


def joined(inputs: Sequence[Tensor]) -> Tensor:
    """Batches of images as one, [N, C, H, W]. Raises UserError where they differ in size."""
    if len(sizes := {tuple(batch.shape[1:]) for batch in inputs}) > 1:
        raise UserError(f"the stream gave images of several sizes, {sorted(sizes)}; give images of one")
    return torch.cat(list(inputs))


def matching(names: Sequence[str], pattern: str, what: str) -> list[str]:
    """The layers that a pattern such as `layer1.*` names, `what` it is called; UserError where it names none."""
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        raise UserError(f"{what} {pattern!r} matches no layer; the layers are {', '.join(names)}")
    return found


def ignored_layers(names: Sequence[str], patterns: Iterable[str]) -> set[str]:
    """The layers that an `ignore` names by its patterns; UserError where one names none, or it is one text."""
    if isinstance(patterns, str):
        raise UserError(f"ignore={patterns!r} is one text; give a list of patterns, [{patterns!r}]")
    return {name for pattern in patterns for name in matching(names, pattern, "the ignore pattern")}


def check_takes(network: nn.Module, images: Tensor) -> None:
    """Raise UserError where a network does not take images, its inputs: what follows would blame something else."""
    try:
        with eval_mode(network):
            network(images)
    except Exception as error:  # whatever a stranger's network may raise
        reason = in_a_line(error)
        raise UserError(
            f"{type(network).__name__} does not take images {list(images.shape)} in {images.dtype}: {reason}; give a "
            "stream of its own size, and the network in float32"
        ) from None


def with_network(model: nn.Module, network: nn.Module) -> nn.Module:
    """The model with another network in it: a Classifier keeps its normalisation and input size."""
    return wrapped_as(model, network) if isinstance(model, Classifier) else network


def wrapped_as(model: Classifier, network: nn.Module) -> Classifier:
    """A plain Classifier, in eval mode, of a network, with the name, normalisation and input size of another."""
    mean, std = model.normalisation
    wrapped = Classifier(network, name=model.name, mean=mean, std=std, input_size=model.input_size)
    return wrapped.to(model.mean.device).eval()


def own_name(network: nn.Module, name: str) -> str:
    """A layer's name in the network by its name in the graph, where a timm BatchNormAct2d has it one level down."""
    return name if name in dict(network.named_modules()) else name.rpartition(".")[0]


def kind(graph: fx.GraphModule, node: fx.Node) -> object:
    """What a node computes: the class of its module, or the function or method's name."""
    if node.op == "call_module":
        return type(graph.get_submodule(str(node.target)))
    return node.target if node.op in ("call_function", "call_method") else node.op


def is_layer(graph: fx.GraphModule, node: fx.Node, *types: type[nn.Module]) -> bool:
    """Whether a node calls a module of (a subclass of) these types."""
    return node.op == "call_module" and isinstance(graph.get_submodule(str(node.target)), types)


def sizes(graph: fx.GraphModule) -> set[fx.Node]:
    """The nodes that stand for sizes and what is computed from them alone, not for tensors."""
    found: set[fx.Node] = set()
    for node in graph.graph.nodes:
        what = kind(graph, node)
        reads = what in ("size", "dim", "numel") or (what is getattr and node.args[1] in ("shape", "ndim"))
        counts = node.op == "call_function" and getattr(what, "__module__", "") in ("_operator", "math", "builtins")
        if reads or (counts and node.all_input_nodes and found.issuperset(node.all_input_nodes)):
            found.add(node)
    return found


def norms(graph: fx.GraphModule) -> dict[str, str]:
    """Names of the batch norms that follow a convolution or linear layer alone, by that layer's name."""
    found = {}
    for node in graph.graph.nodes:
        if is_layer(graph, node, nn.Conv2d, nn.Linear) and len(node.users) == 1:
            user = next(iter(node.users))
            if _is_norm_of(graph, user, node) and graph.get_submodule(str(user.target)).running_var is not None:
                found[str(node.target)] = str(user.target)
    return found


def _is_norm_of(graph: fx.GraphModule, node: fx.Node, layer: fx.Node) -> bool:
    """Whether a node is a batch norm of what a convolution or linear layer before it gives."""
    if not is_layer(graph, node, _BatchNorm) or (is_layer(graph, layer, nn.Linear) and not _takes_rows(graph, layer)):
        return False
    norm: Any = graph.get_submodule(str(node.target))
    made: Any = graph.get_submodule(str(layer.target))
    return bool(norm.num_features == made.weight.shape[0])


def _takes_rows(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a linear layer is known to be given one vector an image, [B, D], not tokens, [B, T, D]: behind what makes
    rows, with nothing but other such layers, batch norms, ReLUs, dropout and quantisers between."""
    passed = (nn.Linear, _BatchNorm, nn.Dropout, nn.Identity, ActivationQuantizer)
    while node.all_input_nodes:
        node = node.all_input_nodes[0]
        what = kind(graph, node)
        if what in ROWS:
            return _makes_rows(graph, node)
        if what not in RELUS and not is_layer(graph, node, *passed):
            return False
    return False


def _makes_rows(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether one of ROWS makes of maps [B, C, H, W] one row an image, [B, D], each channel's pixels side by side."""
    what, given = kind(graph, node), list(node.args[1:])
    if node.op == "call_module":
        layer: Any = graph.get_submodule(str(node.target))
        return (layer.start_dim, layer.end_dim) == (1, -1)
    if what in FLATTENS:
        axes = {"start_dim": 0, "end_dim": -1} | dict(zip(("start_dim", "end_dim"), given)) | dict(node.kwargs)
        return (axes["start_dim"], axes["end_dim"]) == (1, -1)
    named = next((node.kwargs[name] for name in ("shape", "size", "dim") if name in node.kwargs), ())
    numbers = named or (given[0] if given and isinstance(given[0], tuple | list) else given)
    if what in RESHAPES:
        return isinstance(numbers, tuple | list) and len(numbers) == 2
    if what in MEANS:
        return averages_maps(graph, node)
    before: Any = node.args[0]  # of a squeeze
    while is_layer(graph, before, ActivationQuantizer, Mark):
        before = before.args[0]
    again = kind(graph, before) in SQUEEZES and _makes_rows(graph, before)
    return again or averages_maps(graph, before)


def averages_maps(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node is the mean of maps [B, C, H, W] over all of their pixels."""
    what, given = kind(graph, node), node.args[1] if len(node.args) > 1 else None
    if what is nn.AdaptiveAvgPool2d:
        return graph.get_submodule(str(node.target)).output_size in (1, (1, 1))
    if what is F.adaptive_avg_pool2d:
        return node.kwargs.get("output_size", given) in (1, (1, 1), [1, 1])
    axes = node.kwargs.get("dim", given)
    return what in MEANS and isinstance(axes, tuple | list) and {*axes} in ({2, 3}, {-2, -1})


@torch.no_grad()
def fold(graph: fx.GraphModule) -> fx.GraphModule:
    """Take every batch norm that follows a convolution or linear layer into its weights and bias, in place."""
    for layer_name, norm_name in norms(graph).items():
        layer: Any = graph.get_submodule(layer_name)
        norm: Any = graph.get_submodule(norm_name)
        scale, shift = affine(norm)
        layer.weight.mul_(scale.view(-1, *[1] * (layer.weight.dim() - 1)))
        if hasattr(layer, "quantizer"):  # weights and steps grow together: the integers stay
            layer.quantizer.scale = nn.Parameter(layer.quantizer.scale * torch.where(scale == 0, 1.0, scale))
        bias = shift if layer.bias is None else layer.bias * scale + shift
        layer.bias = nn.Parameter(bias.detach().clone())
        remove_call(graph, norm_name)
    graph.recompile()
    return graph


def affine(norm: Any) -> tuple[Tensor, Tensor]:
    """A batch norm in eval mode as x -> scale * x + shift, each [C]."""
    inverse = (norm.running_var + norm.eps).rsqrt()
    scale = inverse if norm.weight is None else norm.weight * inverse
    return scale, (0 if norm.bias is None else norm.bias) - norm.running_mean * scale


@torch.no_grad()
def positive_scales(graph: fx.GraphModule) -> None:
    """Make the scale of every batch norm behind a convolution positive, in place and without changing what the network
    computes: filter, running mean and scale change sign together. Folding multiplies a quantised weight's step by that
    scale, and the files' steps are to be positive."""
    for layer_name, norm_name in norms(graph).items():
        layer: Any = graph.get_submodule(layer_name)
        norm: Any = graph.get_submodule(norm_name)
        if norm.weight is not None:
            sign = torch.where(norm.weight < 0, -1.0, 1.0).to(norm.weight)
            layer.weight.mul_(sign.view(-1, *[1] * (layer.weight.dim() - 1)))
            if layer.bias is not None:
                layer.bias.mul_(sign)
            norm.weight.mul_(sign)
            norm.running_mean.mul_(sign)


def remove_call(graph: fx.GraphModule, name: str) -> None:
    """Take a module with one input out of the graph; its input goes on in its place."""
    for node in list(graph.graph.nodes):
        if node.op == "call_module" and node.target == name:
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    graph.delete_submodule(name)


@dataclass(frozen=True)
class Chain:
    """Channels that one layer makes and one layer takes: what prunes without touching anything else.

    first makes them, norm (or None) scales them, rectified says whether a ReLU follows, `second` takes them; spatial is
    the number of inputs of `second` per channel (above 1 where a flattened map meets a linear layer).
    """

    first: str
    norm: str | None
    rectified: bool
    second: str
    spatial: int = 1


def chains(graph: fx.GraphModule) -> list[Chain]:
    """All pairs of ungrouped layers with nothing but batch norm, ReLU, pooling and the like between them."""
    found, numbers = [], sizes(graph)
    for node in graph.graph.nodes:
        if not is_layer(graph, node, nn.Conv2d, nn.Linear):
            continue
        norm, rectified, at = None, False, node
        joined = is_layer(graph, node, nn.Linear)  # what a linear layer makes lies where the next one takes it
        while len(users := [user for user in at.users if user not in numbers]) == 1:
            at = users[0]
            what = kind(graph, at)
            if (joined and is_layer(graph, at, nn.Linear)) or is_layer(graph, at, nn.Conv2d):
                first: Any = graph.get_submodule(str(node.target))
                second: Any = graph.get_submodule(str(at.target))
                if getattr(first, "groups", 1) == getattr(second, "groups", 1) == 1:
                    made = first.weight.shape[0]
                    taken = second.weight.shape[1]
                    if taken % made == 0:
                        found.append(Chain(str(node.target), norm, rectified, str(at.target), taken // made))
                break
            if _is_norm_of(graph, at, node) and norm is None and not rectified:
                norm = str(at.target)
            elif what in RELUS:
                rectified = True
            elif what in ROWS:
                if not _makes_rows(graph, at) or (is_layer(graph, node, nn.Linear) and not _takes_rows(graph, node)):
                    break
                joined = True
            elif what not in CARRIERS - MOVES and what not in (
                nn.AvgPool2d,
                nn.AdaptiveAvgPool2d,
                F.adaptive_avg_pool2d,
            ):
                break
    return found


@contextmanager
def watch(network: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Collect the outputs of named modules in the forwards of its scope: the newest, by name, in order of execution."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            seen.pop(name, None)  # of a module that is called again the newest comes last
            seen[name] = output

        return hook

    handles = [network.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
