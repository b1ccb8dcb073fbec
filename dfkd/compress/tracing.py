"""A network traced into a graph that computes the same, of plain layers and out of place, or refused."""

import copy
import inspect
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import timm.layers
import torch
import torch.nn.functional as F
from timm.layers.norm_act import BatchNormAct2d, FrozenBatchNormAct2d
from torch import Tensor, fx, nn
from torch._dynamo import OptimizedModule
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._pytree import tree_leaves
from torchvision.ops import FrozenBatchNorm2d

from dfkd.compress.quantizers import quantized_layers
from dfkd.errors import UserError, in_a_line
from dfkd.models.checkpoints import not_finite
from dfkd.runtime import eval_mode


class Mark(nn.Identity):
    """A place in a graph where what goes by can be watched by name. Quantisers stand as if it were not there."""


class _Tracer(fx.Tracer):
    """torch.nn's layers are leaves, and marks; so is timm's that computes the same. A forward that branches on sizes,
    but not on how many images there are, goes where it goes for one of the images and for two."""

    def __init__(self, images: Tensor | None = None) -> None:  # without them too: a pickled graph is traced anew so
        super().__init__()
        self.batches = [] if images is None else [images[:1], images[:1].repeat(2, 1, 1, 1)]
        self.runs: list[fx.Interpreter] = []  # of what is traced so far, a batch each
        self.asked: set[fx.Node] = set()
        self.running = False  # what the runs call is not traced

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        as_it_is = type(m) in (timm.layers.Linear, Mark) or _computes_as_its_base(m)
        return as_it_is or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return forward(*args, **kwargs) if self.running else super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        return attr_val if self.running else super().getattr(attr, attr_val, parameter_proxy_cache)

    def to_bool(self, obj: fx.Proxy) -> bool:
        self._run()
        if not self.runs or not self._is_of_sizes(obj.node):
            return super().to_bool(obj)  # raises
        self.asked.add(obj.node)
        return bool(self.runs[0].env[obj.node])

    def _is_of_sizes(self, node: fx.Node) -> bool:
        """Whether a node is made of what tensors tell of themselves, and of numbers that are alike for all batches."""
        values = [run.env[node] for run in self.runs]
        if isinstance(values[0], Tensor) or (isinstance(values[0], bool | int | float) and values[0] != values[1]):
            return False
        told = node.target is getattr or (node.op == "call_method" and node.target in ("size", "dim", "numel"))
        return told or all(self._is_of_sizes(each) for each in node.all_input_nodes)

    @torch.no_grad()
    def _run(self) -> None:
        """Compute what is traced so far, for each of the batches."""
        if not self.runs:
            self.runs = [fx.Interpreter(self.root, False, self.graph) for _ in self.batches]
            for run, images in zip(self.runs, self.batches):
                run.env[next(iter(self.graph.nodes))] = images
        self.running = True
        try:
            for run in self.runs:
                for each in self.graph.nodes:
                    if each not in run.env:
                        run.env[each] = run.run_node(each)
        finally:
            self.running = False

    def forget_conditions(self) -> None:
        """Take numbers that were asked for alone out of the graph: a reader of a layer's output keeps norms from being
        folded into it."""
        for node in reversed(list(self.graph.nodes) if self.asked else []):
            if node in self.asked and not node.users and not isinstance(self.runs[0].env[node], Tensor):
                self.asked.update(node.all_input_nodes)
                self.graph.erase_node(node)


def _computes_as_its_base(module: nn.Module) -> bool:
    """Whether a layer is of a class derived from one of torch's that only sets it up otherwise."""
    for base in (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.BatchNorm1d):
        if isinstance(module, base) and not is_parametrized(module) and "forward" not in vars(module):
            calls = ("forward", "_conv_forward", "_check_input_dim")
            return all(getattr(type(module), each, None) is getattr(base, each, None) for each in calls)
    return False


def trace(network: nn.Module, images: Tensor | None = None) -> fx.GraphModule:
    """A copy of a network as a graph, in eval mode, its layers under their own names.

    Frozen batch norms become plain ones, timm's joint batch norm and activation are taken apart, activations and
    arithmetic no longer work in place; a forward that branches on sizes goes where it goes for images, its inputs.
    Raises UserError where it branches on values (without images: or sizes), a layer with weights is used twice or a
    weight is no parameter, and where of the images the graph makes something else than the network.
    """
    check_weights(network)
    given, network, in_place = network, thawed(network).eval(), set()
    for name, module in list(network.named_modules()):
        if isinstance(module, BatchNormAct2d):
            network.set_submodule(name, _taken_apart(module))
        elif _not_in_place(module):
            in_place.add(name)
    _with_one_input(network)
    tracer = _Tracer(images)
    try:
        graph = tracer.trace(network)
    except Exception as error:  # whatever a stranger's forward may do with a symbolic value
        reason = in_a_line(error)
        values = "values" if images is not None else "values or sizes"
        known = "" if images is not None else " (which image=, where it is taken, tells)"
        raise UserError(
            f"{type(network).__name__} cannot be traced into a graph: {reason}; its forward must not branch on "
            f"{values}, nor loop over sizes or shape constants by them{known}"
        ) from None
    tracer.forget_conditions()
    _out_of_place(graph, in_place)
    _input_first(graph)
    traced = fx.GraphModule(tracer.root, graph).eval()
    # Once more, since what no longer works in place is called otherwise then: files know quantisers by these names.
    traced = fx.GraphModule(traced, _Tracer(None).trace(traced)).eval()
    _refuse_shared(traced)
    if images is not None:
        _compare(given, traced, images)
    return traced


def heads(network: nn.Module, images: Tensor) -> list[Tensor]:
    """The tensors of numbers that a network gives: it may have several heads, and None in the place of one."""
    return [x for x in tree_leaves(network(images)) if isinstance(x, Tensor) and x.is_floating_point()]


@torch.no_grad()
def _compare(network: nn.Module, traced: fx.GraphModule, images: Tensor) -> None:
    """Raise UserError where a graph does not compute what its network does."""
    with eval_mode(network):
        pairs = zip(heads(network, images), heads(traced, images))
    if any((given - expected).norm() > 1e-3 * expected.norm() for expected, given in pairs):
        raise UserError(
            f"{type(network).__name__} computes something else once it is traced, as where its forward works in place "
            "on a view of a tensor that it reads again (y[:, :2].mul_(2), y *= 2); let it make new tensors"
        )


def check_can_change() -> None:
    """Raise UserError where what is made of weights now could not be trained later."""
    if torch.is_inference_mode_enabled():
        raise UserError("weights cannot be changed within torch.inference_mode(); call this outside of it")


def check_weights(network: nn.Module) -> None:
    """Raise UserError where a network is quantised already or holds NaN or infinity, and where the weight of a layer is
    no parameter, as a rule since it is computed of others before each forward (weight norm, spectral norm, torch's
    pruning masks): what is written into it would be gone at the next."""
    if isinstance(network, torch.jit.ScriptModule | OptimizedModule):
        kind = "scripted" if isinstance(network, torch.jit.ScriptModule) else "compiled"
        raise UserError(f"the network is {kind} and has no forward to be traced; give the one it was made from")
    if quantized_layers(network):
        raise UserError("the network is quantised already; give the float one that it was made from")
    if broken := not_finite(network):
        raise UserError(
            f"{broken[0]} of the network holds NaN or infinity; load its checkpoint anew; a mask is no parameter"
        )
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and "weight" not in dict(module.named_parameters(recurse=False)):
            raise UserError(
                f"the weight of {name} is no parameter; if it is computed of others (weight or spectral norm, a mask) "
                "make it plain before: torch.nn.utils.parametrize.remove_parametrizations, remove_weight_norm, "
                "remove_spectral_norm or prune.remove"
            )


def _refuse_shared(traced: fx.GraphModule) -> None:
    remedy = "layers that share their weights cannot be compressed; give each place its own copy"
    calls = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    for name, module in traced.named_modules():
        if calls.count(name) > 1 and module.state_dict():
            raise UserError(
                f"{name} ({type(module).__name__}) is used {calls.count(name)} times in one forward: {remedy}"
            )
    owner: dict[nn.Parameter, str] = {}
    for name, parameter in traced.named_parameters(remove_duplicate=False):
        if owner.setdefault(parameter, name) != name:
            raise UserError(f"{owner[parameter]} and {name} are one tensor: {remedy}")


def _with_one_input(network: nn.Module) -> None:
    """Let forward's further arguments take their defaults: what is traced takes images alone."""
    own: Any = type(network)
    if len(inspect.signature(own.forward).parameters) > 2:
        network.__class__ = type(own.__name__, (own,), {"forward": lambda self, x: own.forward(self, x)})


def thawed(network: nn.Module) -> nn.Module:
    """A copy of a network with a batch norm in the place of each of torchvision's and timm's frozen ones, which are no
    layers to what folds batch norms, cuts their channels or repairs them, but arithmetic with four buffers. Frozen they
    are no longer, where the copy is trained."""
    copied = copy.deepcopy(network)
    frozen: Any
    for name, frozen in list(copied.named_modules()):
        joint = type(frozen) is FrozenBatchNormAct2d
        if not joint and type(frozen) is not FrozenBatchNorm2d:  # derived ones may compute otherwise
            continue
        made: Any = partial(BatchNormAct2d, apply_act=False) if joint else nn.BatchNorm2d
        plain = _with_state(made(len(frozen.running_var), frozen.eps), frozen).requires_grad_(False)
        if joint:
            plain.drop, plain.act = frozen.drop, frozen.act
        copied.set_submodule(name, plain)
    return copied


def _with_state(plain: nn.BatchNorm2d, norm: nn.Module) -> nn.BatchNorm2d:
    state = norm.state_dict()
    plain.to(next(iter(state.values()), torch.empty(0))).load_state_dict(state, strict=False)
    return plain.eval()


def _taken_apart(norm: BatchNormAct2d) -> nn.Sequential:
    tracked = norm.running_var is not None
    plain = nn.BatchNorm2d(norm.num_features, norm.eps, norm.momentum, norm.affine, tracked)
    _not_in_place(norm.act)
    return nn.Sequential(_with_state(plain, norm), norm.drop, norm.act).eval()


def _not_in_place(module: Any) -> bool:
    """Let a module work in place no longer; whether it did."""
    did = bool(getattr(module, "inplace", False))
    if did:
        module.inplace = False
    return did


def _out_of_place(graph: fx.Graph, modules: Iterable[str]) -> None:
    """Let what worked in place, these modules and functions and methods, make a tensor of its own, which all that comes
    after reads: else a quantiser would be calibrated on a tensor that was overwritten behind it."""
    place = {node: k for k, node in enumerate(graph.nodes)}
    for node in list(place):
        if node.target in modules if node.op == "call_module" else _call_not_in_place(node):
            given = node.all_input_nodes[0]
            given.replace_all_uses_with(node, delete_user_cb=lambda user: place[user] > place[node])  # noqa: B023


def _input_first(graph: fx.Graph) -> None:
    """Give what a call names `input` without its name: layer(input=x), torch.squeeze(input=x)."""
    for node in graph.nodes:
        if not node.args and "input" in node.kwargs:
            node.args, node.kwargs = (node.kwargs["input"],), {k: v for k, v in node.kwargs.items() if k != "input"}


def _call_not_in_place(node: fx.Node) -> bool:
    """Let a call of a function or method work in place no longer; whether it did."""
    if node.op not in ("call_function", "call_method"):
        return False
    target: Any = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    if name.endswith("_") and not name.endswith("__"):  # add_, torch.relu_; requires_grad_ has no such twin
        owners = [Tensor] if isinstance(target, str) else [torch, F]
        plain = next((found for owner in owners if callable(found := getattr(owner, name[:-1], None))), None)
        if plain is not None:
            node.target = name[:-1] if isinstance(target, str) else plain
        return plain is not None
    call = None if isinstance(target, str) else _arguments(target, node)
    if call is None or not call.arguments.get("inplace"):  # F.relu(x, inplace=True)
        return False
    call.arguments["inplace"] = False
    node.args, node.kwargs = call.args, call.kwargs
    return True


def _arguments(function: Callable[..., Any], node: fx.Node) -> inspect.BoundArguments | None:
    """The arguments of a function's call by name; None where it is built in and does not tell them."""
    try:
        return inspect.signature(function).bind(*node.args, **node.kwargs)
    except (TypeError, ValueError):
        return None
