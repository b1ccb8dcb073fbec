"""Filters taken out and weights rounded without data or training; what is left makes up for it by formula.

`udfc` is our derivation of Bai et al. 2023 (Unified Data-Free Compression), `rectified` a method of our own; both are
derived in docs/closed_form.md. Activations stay float.
"""

import copy
import dataclasses
import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dfkd.compress.channels import changed_shapes, largest_filters, remember, remembered, shapes, shrink
from dfkd.compress.graph import (
    RELUS,
    Chain,
    affine,
    chains,
    ignored_layers,
    is_layer,
    kind,
    network_input,
    network_of,
    norms,
    own_name,
    with_network,
)
from dfkd.compress.prepare import kept_float
from dfkd.compress.quantizers import IN_CACHE, sqnr_db
from dfkd.compress.rectified import regress, renew_norm
from dfkd.compress.result import Compressed
from dfkd.compress.tracing import check_can_change, thawed, trace
from dfkd.errors import UserError

METHODS = ("rectified", "udfc")


@dataclasses.dataclass
class _Plan:
    """What is to be done, by layer name."""

    bits: dict[str, int | None]  # every layer, in the order of the forward
    norms: dict[str, str]  # of layers that a batch norm follows directly
    chains: dict[str, Chain]  # by the layer that makes the channels
    windows: dict[str, tuple[int, ...]]  # places of a channel that the next layer weighs one by one


def closed_form(
    model: nn.Module,
    ratio: float = 0.0,
    bits: int | None = None,
    *,
    method: str = "rectified",
    alpha1: float = 0.01,
    alpha2: float = 0.008,
    ignore: Sequence[str] = (),
    image: Tensor | None = None,
) -> Compressed:
    """A model with the share `ratio` of its inner filters gone, its weights on grids of 2^bits levels, or both.

    model is any network or Classifier and stays as it is. Filters go where batch norm and ReLU follow and one ungrouped
    layer takes them. Convolutions and linear layers are rounded per output channel, first and last to 8 bits, and stay
    float tensors. ignore holds patterns of layer names left alone; alpha1 and alpha2 are those of `udfc`; image
    [1, C, H, W], all zeros say, tells a forward that branches on sizes which way to go. naive is the same without
    compensation. Raises UserError for values out of range, a pattern without a layer, no filter to take.
    """
    check_can_change()
    _check(ratio, bits, method, alpha1, alpha2)
    network = thawed(network_of(model))
    plan = _plan(network, ratio, bits, ignore, None if image is None else network_input(model, image))
    work, naive = copy.deepcopy(network), copy.deepcopy(network)
    layers = _compress(work, network, plan, ratio, method, (alpha1, alpha2))
    _compress(naive, network, plan, ratio, "naive", (alpha1, alpha2))
    structure: dict[str, Any] = {
        "channels": remembered(network_of(model)) | changed_shapes(shapes(network), shapes(work))
    }
    for each in (work, naive):
        remember(each, structure["channels"])
    if bits is not None:
        structure["weight_bits"] = {name: b for name, b in plan.bits.items() if b}
    smaller, plain = (with_network(model, each).train(model.training) for each in (work, naive))
    return Compressed(smaller, plain, layers, structure)


def check_closed_form(
    model: nn.Module, ratio: float, bits: int | None, ignore: Sequence[str], image: Tensor | None = None
) -> None:
    """Raise UserError where `closed_form` would for a model's layers."""
    _plan(network_of(model), ratio, bits, ignore, None if image is None else network_input(model, image))


def _check(ratio: float, bits: int | None, method: str, alpha1: float, alpha2: float) -> None:
    if not isinstance(ratio, Real) or not 0 <= ratio < 1:
        raise UserError(f"ratio is {ratio!r}; give the share of filters to take out, from 0 to below 1")
    if bits is not None and (not isinstance(bits, Integral) or not 2 <= bits <= 8):
        raise UserError(f"bits is {bits!r}; give a whole number from 2 to 8, or None to leave weights unrounded")
    if not ratio and bits is None:
        raise UserError("ratio is 0 and bits is None, so nothing would change; give one of them")
    if method not in METHODS:
        raise UserError(f"unknown method {method!r}; choose from {list(METHODS)}")
    if not (alpha1 >= 0 and alpha2 > 0):
        raise UserError(f"alpha1 is {alpha1} and alpha2 {alpha2}; give alpha1 of 0 or more and alpha2 above 0")


def _plan(network: nn.Module, ratio: float, bits: int | None, ignore: Sequence[str], inputs: Tensor | None) -> _Plan:
    graph = trace(network, inputs)
    nodes = {str(n.target): n for n in graph.graph.nodes if is_layer(graph, n, nn.Conv2d, nn.Linear)}
    if not nodes:
        raise UserError(f"{type(network).__name__} has no convolution or linear layer; give a model that has one")
    own = kept_float(graph, ["*"] if bits is None else ignore)  # which matter where weights are rounded alone
    ignored = ignored_layers([*nodes, *own], ignore)
    plan = _Plan({}, {}, {}, {})
    for name in nodes:
        outer = name in (next(iter(nodes)), next(reversed(nodes)))
        plan.bits[name] = None if bits is None or name in ignored else 8 if outer else int(bits)
    plan.norms.update((name, own_name(network, norm)) for name, norm in norms(graph).items())
    reasons = {}
    for chain in chains(graph):
        if reason := _unusable(graph, chain, ignored):
            reasons[chain.first] = reason
        else:
            plan.windows[chain.first] = _window(graph, chain, nodes[chain.second])
            plan.chains[chain.first] = dataclasses.replace(chain, norm=own_name(network, str(chain.norm)))
    if ratio and not plan.chains:
        why = "; ".join(f"{name} {reason}" for name, reason in reasons.items())
        why = why or "no layer hands its channels through batch norm and ReLU alone to one ungrouped layer"
        fewer = "ignore fewer, or " if ignored else ""
        raise UserError(f"no filter can be taken out: {why}; {fewer}give bits and ratio=0, or another model")
    return plan


def _unusable(graph: fx.GraphModule, chain: Chain, ignored: set[str]) -> str:
    """Why a chain is left alone; empty where it is not."""
    if chain.first in ignored or chain.second in ignored:
        return "or the layer after it is ignored"
    if chain.norm is None:
        return "has no batch norm"
    if graph.get_submodule(chain.norm).running_var is None:
        return "has a batch norm without running statistics"
    return "" if chain.rectified else "has no ReLU"


def _window(graph: fx.GraphModule, chain: Chain, second: fx.Node) -> tuple[int, ...]:
    """The next layer's kernel; a single place where it or what lies in between leaves no other choice."""
    at = second.args[0]
    while isinstance(at, fx.Node) and str(at.target) != chain.first:
        if not is_layer(graph, at, _BatchNorm, nn.Identity, nn.Dropout) and kind(graph, at) not in RELUS:
            return (1, 1)
        at = at.args[0]
    first: Any = graph.get_submodule(chain.first)
    layer: Any = graph.get_submodule(chain.second)
    plain = isinstance(layer, nn.Conv2d) and isinstance(first, nn.Conv2d) and max(first.dilation) == 1
    return layer.kernel_size if plain else (1, 1)


@torch.no_grad()
def _compress(
    work: nn.Module, network: nn.Module, plan: _Plan, ratio: float, method: str, alphas: tuple[float, float]
) -> list[dict[str, Any]]:
    """Round and shorten the layers of work, a copy of network, in the order of the forward: a layer makes up for its
    predecessor before it is rounded itself, so that every weight ends on its grid."""
    lines = []
    for name, bits in plan.bits.items():
        chain, norm_name = plan.chains.get(name), plan.norms.get(name)
        layer: Any = work.get_submodule(name)
        exact, count, noise = layer.weight.double().clone(), len(layer.weight), None
        before = _affine(layer, work.get_submodule(str(chain.norm))) if chain else None
        if bits:
            layer.weight.copy_(rounded(exact, bits))
            noise = sqnr_db(exact, layer.weight.double())
            if norm_name and method == "udfc":
                _scale_norm(layer, work.get_submodule(norm_name), exact, alphas)
            elif norm_name and method == "rectified":
                renew_norm(layer, work.get_submodule(norm_name), exact)
        if chain and before:
            original: Any = network.get_submodule(name)
            keep = largest_filters(original.weight, ratio)
            if method == "udfc":
                _combine(work, chain, exact, before, keep, alphas)
            elif method == "rectified":
                after = work.get_submodule(plan.norms[chain.second]) if chain.second in plan.norms else None
                norm, second = work.get_submodule(str(chain.norm)), work.get_submodule(chain.second)
                regress(layer, norm, second, after, exact, keep, plan.windows[name])
            shrink(work, chain, keep)
        if bits or (chain and ratio):
            lines.append({"layer": name, "kept": len(layer.weight), "of": count, "bits": bits, "sqnr_db": noise})
    return lines


def rounded(weight: Tensor, bits: int) -> Tensor:
    """weight [O, ...] on a grid per output: the nearest of s * {-2^(b-1), ..., 2^(b-1) - 1}, with s of least squared
    error among 60 from 0.3 to 1.2 times the largest magnitude / (2^(b-1) - 1)."""
    some = max(1, IN_CACHE // weight[0].numel())
    if len(weight) > some and weight.device.type == "cpu":  # as in best_step
        return torch.cat([rounded(rows, bits) for rows in weight.split(some)])
    rows, top = weight.flatten(1), 2 ** (bits - 1) - 1
    largest = rows.abs().amax(1, keepdim=True).clamp_min(1e-12) / top
    best, least = rows, torch.full_like(largest, math.inf)
    for factor in torch.linspace(0.3, 1.2, 60).tolist():
        near = (rows / (largest * factor)).round().clamp(-top - 1, top) * (largest * factor)
        error = (near - rows).square().sum(1, keepdim=True)
        best, least = torch.where(error < least, near, best), torch.minimum(error, least)
    return best.view_as(weight)


def own_scale(exact: Tensor, near: Tensor, shift: Tensor, alpha1: float, alpha2: float) -> Tensor:
    """UDFC's factors s [O] for rounded filters: (near . exact + a1 b^2) / (|near|^2 + a1 b^2 + a2).

    exact and near [O, N] have the batch norm's scale in them; shift b [O] is its shift.
    """
    bias = alpha1 * shift.square()
    return ((near * exact).sum(1) + bias) / (near.square().sum(1) + bias + alpha2)


def combination(
    kept: Tensor, kept_shift: Tensor, gone: Tensor, gone_shift: Tensor, alpha1: float, alpha2: float
) -> Tensor:
    """UDFC's s [K', J] with gone_j ~ sum_i s_ij kept_i: (V'V + a1 bb' + a2 I)^-1 (V'v_j + a1 b b_j).

    kept [K', N] and gone [J, N] are filters with the batch norm's scale in them, the shifts [K'] and [J] its shifts.
    """
    gram = kept @ kept.T + alpha1 * kept_shift.outer(kept_shift) + alpha2 * torch.eye(len(kept)).to(kept)
    return torch.linalg.solve(gram, kept @ gone.T + alpha1 * kept_shift.outer(gone_shift))


def _affine(layer: Any, norm: Any) -> tuple[Tensor, Tensor]:
    """Scale and shift of a batch norm in float64, the bias of the layer before it counted in."""
    scale, shift = (x.double() for x in affine(norm))
    return scale, shift if layer.bias is None else shift + scale * layer.bias.double()


def _scale_norm(layer: Any, norm: Any, exact: Tensor, alphas: tuple[float, float]) -> None:
    """UDFC's own factor, into the batch norm's output instead of the next layer: that one stays on its grid, and a
    factor that is not negative passes the ReLU. exact [O, ...] are the weights before rounding."""
    scale, shift = _affine(layer, norm)
    exact, near = (scale[:, None] * w.double().flatten(1) for w in (exact, layer.weight))
    if norm.weight is not None:  # else there is no factor to change
        factor = own_scale(exact, near, shift, *alphas).clamp_min(0)
        norm.weight.mul_(factor)
        if norm.bias is not None:
            norm.bias.mul_(factor)


def _combine(
    work: nn.Module, chain: Chain, exact: Tensor, before: Any, keep: Tensor, alphas: tuple[float, float]
) -> None:
    """UDFC: the next layer takes the channels that go from combinations of those that stay. exact [C, ...] are all
    filters before rounding, `before` the scale and shift of their batch norm then."""
    first: Any = work.get_submodule(chain.first)
    second: Any = work.get_submodule(chain.second)
    gone = torch.ones(len(exact), device=keep.device).index_fill(0, keep, 0).nonzero().flatten()
    (old_scale, old_shift), (scale, shift) = before, _affine(first, work.get_submodule(str(chain.norm)))
    kept = (scale[:, None] * first.weight.double().flatten(1))[keep]
    lost = (old_scale[:, None] * exact.flatten(1))[gone]
    s = combination(kept, shift[keep], lost, old_shift[gone], *alphas)
    weight = second.weight.double().reshape(len(second.weight), len(exact), -1)  # [O, C, places]
    weight[:, keep] += torch.einsum("kj,ojp->okp", s, weight[:, gone])
    second.weight.copy_(weight.view_as(second.weight))
