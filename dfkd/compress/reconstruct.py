"""Rounding learned block by block, so that a quantised network computes what the float one does: AdaRound, BRECQ."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dfkd.compress.graph import CARRIERS, RELUS, is_layer, kind
from dfkd.compress.quantizers import QUANTIZED, ActivationQuantizer, activation_quantizers, quantized_layers
from dfkd.compress.units import Unit, extract, units
from dfkd.errors import UserError
from dfkd.runtime import Autocast, forked, full_precision, reseed

CHUNK = 128  # images per forward outside of learning


class SoftRounding(nn.Module):
    """In a WeightQuantizer's place while rounding is learned: step * clip(floor(w / step) + h(alpha), low, high).

    h = clip(1.2 sigmoid(alpha) - 0.1, 0, 1) starts at the fractional part of w / step; Nagel et al. 2020, eq. 22 and
    23. The steps are learned as factors around 1, one per step of the WeightQuantizer; Genie, Jeon et al. 2023.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.low, self.high = layer.quantizer.low, layer.quantizer.high
        self.step = layer.quantizer.step(layer.weight).detach().clone()
        scaled = layer.weight.detach() / self.step
        self.floor = scaled.floor()
        self.alpha = nn.Parameter(-torch.log(1.2 / (scaled - self.floor + 0.1) - 1))
        self.factor = nn.Parameter(torch.ones_like(self.step))

    def h(self) -> Tensor:
        """The share of a step that each weight is moved up by, in [0, 1]."""
        return (1.2 * self.alpha.sigmoid() - 0.1).clamp(0, 1)

    def forward(self, weight: Tensor) -> Tensor:
        return self.step * self.factor * (self.floor + self.h()).clamp(self.low, self.high)

    @torch.no_grad()
    def harden(self, layer: Any) -> None:
        """Give the layer's quantiser the learned steps and the layer weights on their grid: up where h > 1/2."""
        step = self.step * self.factor
        layer.quantizer.scale.copy_(step.view(-1))
        pruned = layer.weight == 0  # what is zero stays zero
        rounded = (self.floor + (self.alpha > 0)).clamp(self.low, self.high) * step
        layer.weight.copy_(torch.where(pruned, 0.0, rounded))


def undecided(h: Tensor, beta: float) -> Tensor:
    """sum 1 - |2h - 1|^beta, 0 where every weight is rounded up or down; Nagel et al. 2020, eq. 24."""
    return (1 - (2 * h - 1).abs().pow(beta)).sum()


def squared_error(out: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Squared error of outputs [N, C, ...], (weighted) sum over channels, mean over the rest; BRECQ, eq. 10."""
    error = (full_precision(out) - full_precision(target)).square()
    return (error if weight is None else error * weight).sum(1).mean()


def float_copy(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy of a quantised graph that computes with the layers' `weight` itself and no quantisers, and takes no
    gradients."""
    reference = copy.deepcopy(graph)
    for layer in quantized_layers(reference).values():
        layer.quantizer = nn.Identity()
    for quantizer in activation_quantizers(reference).values():
        quantizer.enabled = False
    return reference.requires_grad_(False)


@torch.no_grad()
def values(graph: fx.GraphModule, nodes: Sequence[fx.Node], start: fx.Node, given: Tensor, wanted: fx.Node) -> Tensor:
    """What `wanted`, one of `nodes`, computes where `start`, their only input, is `given` [N, ...]; float32, on the
    device of `given`."""
    if wanted is start:
        return given
    device = next(graph.parameters()).device
    needed = [node for node in graph.graph.nodes if node.op == "get_attr"] + [*nodes[: nodes.index(wanted) + 1]]
    run = fx.Interpreter(graph, garbage_collect_values=False)
    found = []
    for chunk in given.split(CHUNK):
        run.env = {start: chunk.to(device)}
        for node in needed:
            run.env[node] = run.run_node(node)
        found.append(full_precision(run.env[wanted]).to(given.device))
    return torch.cat(found)


@torch.enable_grad()
def fisher_weights(reference: fx.GraphModule, images: Tensor, node: fx.Node, given: Tensor) -> Tensor:
    """(1 + |g| / mean |g|)^2 over its mean, [N, ...]: g is the gradient, for the value of `node`, of KL(float || float
    network with `given` at that node).

    BRECQ's diagonal Fisher matrix (Li et al. 2021, eq. 10). Their code adds 1 to |g| as it is, which hides gradients
    that are small in all; here the mean is 1 first.
    """
    device = next(reference.parameters()).device
    found = []
    for chunk, value in zip(images.split(CHUNK), given.split(CHUNK)):
        chunk, value = chunk.to(device), value.to(device).requires_grad_()
        log_p = full_precision(reference(chunk)).log_softmax(1)
        logits = fx.Interpreter(reference).run(chunk, initial_env={node: value})
        divergence = F.kl_div(full_precision(logits).log_softmax(1), log_p, log_target=True, reduction="sum")
        found.append(torch.autograd.grad(divergence, value)[0].abs().to(given.device))
    g = torch.cat(found)
    weights = (1 + g / g.mean().clamp(min=torch.finfo(g.dtype).tiny)).square()
    return weights / weights.mean()


def pieces(graph: fx.GraphModule, block: Unit) -> list[Unit]:
    """A block's quantised layers one by one, each with the quantiser before it, unless other layers take that too, and
    with the batch norm and ReLU behind it."""
    found = []
    for node in block.nodes:
        if not is_layer(graph, node, *QUANTIZED):
            continue
        own = [node]
        while (before := own[0].all_input_nodes[0]) in block.nodes and len(before.users) == 1:
            carries = is_layer(graph, before, ActivationQuantizer) or kind(graph, before) in CARRIERS
            if not carries or len(before.all_input_nodes) > 1:  # a view takes sizes too
                break
            own.insert(0, before)
        while len(own[-1].users) == 1 and (after := next(iter(own[-1].users))) in block.nodes:
            if not is_layer(graph, after, _BatchNorm) and kind(graph, after) not in RELUS:
                break
            own.append(after)
        found.append(Unit(str(node.target), own))
    return found


@contextmanager
def softened(part: fx.GraphModule, drop: float) -> Iterator[list[SoftRounding]]:
    """The SoftRounding of every layer, which computes with it in this scope, as do tensors' quantisers with QDrop."""
    quantizers = activation_quantizers(part).values()
    found = [(layer, layer.quantizer, SoftRounding(layer)) for layer in quantized_layers(part).values()]
    try:
        for quantizer in quantizers:
            quantizer.keep = drop
        for layer, _, soft in found:
            layer.quantizer = soft
        yield [soft for _, _, soft in found]
    finally:
        for quantizer in quantizers:
            quantizer.keep, quantizer.scale.grad = 0.0, None
        for layer, nearest, _ in found:
            layer.quantizer = nearest


@dataclass(frozen=True)
class Learner:
    """How the rounding and the scales of a unit are learned: by Adam, in far fewer steps than the papers' 20000 and so
    at 50 times their lr.

    lr is for the rounding; a scale moves by a share lr_scale of its size per step, on a cosine. lam weights AdaRound's
    pull to 0 or 1, whose exponent goes from beta[0] to beta[1] after a share `warmup` of the steps. A share `drop` of
    the values stays float (QDrop, Wei et al. 2022).
    """

    steps: int = 1000
    batch_size: int = 32
    lr: float = 5e-2
    lr_scale: float = 1e-3
    lam: float = 0.01
    beta: tuple[float, float] = (20, 2)
    warmup: float = 0.2
    drop: float = 0.5
    seed: int = 0
    autocast: Autocast = nullcontext

    def __post_init__(self) -> None:
        whole = [isinstance(x, Integral) and not isinstance(x, bool) and x >= 1 for x in (self.steps, self.batch_size)]
        if not all(whole):
            raise UserError(
                f"steps={self.steps} and batch_size={self.batch_size} are not allowed; reconstruction takes whole "
                "numbers, 1 or more"
            )
        rates = all(rate >= 0 for rate in (self.lr, self.lr_scale, self.lam))  # NaN is none
        if not (rates and 0 <= self.warmup < 1 and 0 <= self.drop <= 1):
            raise UserError(
                "reconstruction takes lr, lr_scale and lam of 0 or more, warmup from 0 to below 1, drop from 0 to 1, "
                f"got {self.lr}, {self.lr_scale}, {self.lam}, {self.warmup} and {self.drop}"
            )
        pair = isinstance(self.beta, tuple | list) and len(self.beta) == 2
        if not (pair and all(isinstance(x, Real) for x in self.beta)):
            raise UserError(f"beta={self.beta!r} is not allowed; give two exponents, such as (20, 2)")

    def learn(self, part: fx.GraphModule, name: str, x_float: Tensor, x: Tensor, target: Tensor, weight: Any) -> None:
        """Round a unit's weights, in place, such that it comes close to target [N, C, ...]; weight [N, C, ...] or None
        weights the errors. Its inputs come from the quantised network, at random values from the float one.

        Raises UserError where the loss is not finite; the unit is then as it was.
        """
        device = next(part.parameters()).device
        scales = [quantizer.scale for quantizer in activation_quantizers(part).values()]
        before = [scale.detach().clone() for scale in scales]
        with softened(part, self.drop) as soft, torch.enable_grad(), forked(device):
            learned = [each.alpha for each in soft] + [each.factor for each in soft] + scales
            rates = [self.lr for _ in soft] + [self.lr_scale for _ in soft] + [self.lr_scale * s.item() for s in scales]
            optimizer = torch.optim.Adam([{"params": [each], "lr": rate} for each, rate in zip(learned, rates)])
            for step in range(self.steps):
                # One position gives all draws of a step; ActivationQuantizer's come from torch's global generator.
                reseed(device, self.seed, "reconstruct", name, step)
                index = torch.randperm(len(target))[: self.batch_size].to(x.device)
                given, wanted = x[index], target[index].to(device)
                if self.drop:
                    # torch.where takes four times as long on a CPU: branches on a random mask cannot be foretold.
                    dropped = torch.rand(given.shape, device=given.device) < self.drop
                    given = torch.lerp(given, x_float[index], dropped.to(given))
                with self.autocast():
                    out = part(given.to(device))
                loss = squared_error(out, wanted, None if weight is None else weight[index].to(device))
                share = (step / self.steps - self.warmup) / (1 - self.warmup)
                if share > 0:
                    beta = self.beta[0] + (self.beta[1] - self.beta[0]) * share
                    loss = loss + self.lam * torch.stack([undecided(each.h(), beta) for each in soft]).sum()
                for group, rate in [*zip(optimizer.param_groups, rates)][len(soft) :]:
                    group["lr"] = rate * (0.5 + 0.5 * math.cos(math.pi * step / self.steps))
                optimizer.zero_grad()
                loss.backward(inputs=learned)
                optimizer.step()
        if not torch.isfinite(loss):
            for scale, value in zip(scales, before):
                scale.data = value
            reason = f"{name}: the reconstruction loss became {loss.item()}"
            raise UserError(f"{reason}; check that the images are finite or lower lr, now {self.lr:g}")
        for each, layer in zip(soft, quantized_layers(part).values()):
            each.harden(layer)


def reconstruct(
    graph: fx.GraphModule,
    images: Sequence[Tensor] | Tensor,
    *,
    unit: str = "block",
    fisher: bool = False,
    log: Callable[[int, int], None] = lambda done, of: None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Learn a quantised network's rounding and scales unit by unit, in place, from (normalised) images [N, C, H, W];
    options are those of Learner.

    graph is what `prepare(..., folded=True)` returns. Every unit (`block`: what one tensor enters and one leaves, or
    `layer`) is to give the float network's output on what the quantised units before it give: BRECQ, Li et al. 2021.
    log is told after each block how many are done, of how many.

    Returns per unit its name and the norms of its error before and after, relative to the float output's; for a layer
    that no unit holds the reason under `skipped`. The images, and a unit's inputs and outputs for all of them, stay on
    the device of the images. Raises UserError for steps or batch_size below 1, fewer images than
    batch_size, an unknown unit, a loss that is not finite.
    """
    learner = Learner(**options)
    images = images if isinstance(images, Tensor) else torch.cat(list(images))
    if unit not in ("block", "layer"):
        raise UserError(f"unknown unit {unit!r}; choose from ['block', 'layer']")
    if len(images) < learner.batch_size:
        raise UserError(f"{len(images)} images do not fill a batch of {learner.batch_size}; give more or lower it")
    reference = float_copy(graph)
    twin = dict(zip(graph.graph.nodes, reference.graph.nodes))
    figures: list[dict[str, Any]] = []
    left = dict.fromkeys(quantized_layers(graph), "in no unit with one input and one output")
    x_float, x, one = images, images, images[:1]
    blocks = [block for block in units(graph) if block.read]
    for done, block in enumerate(blocks, 1):
        try:
            _, source, sink = extract(graph, block.nodes, block.name)
        except UserError as error:  # nothing behind it has inputs then
            left |= dict.fromkeys(left, str(error))
            break
        float_nodes = [twin[node] for node in block.nodes]
        for piece in pieces(graph, block) if unit == "layer" else [block]:
            part, start, end = extract(graph, piece.nodes, piece.name)
            if not quantized_layers(part):
                continue
            start_float = values(reference, float_nodes, twin[source], x_float, twin[start])
            start_x = values(graph, block.nodes, source, x, start)
            target = values(reference, float_nodes, twin[source], x_float, twin[end])
            rows = [len(values(graph, block.nodes, source, one, node)) for node in (start, end)]
            if rows != [1, 1]:  # of one image: tokens first, or its parts
                left |= dict.fromkeys(quantized_layers(part), "its first axis is not that of the images")
                continue
            nearest = values(graph, piece.nodes, start, start_x, end)
            weight = fisher_weights(reference, images, twin[end], nearest) if fisher else None
            learner.learn(part, piece.name, start_float, start_x, target, weight)
            learned = values(graph, piece.nodes, start, start_x, end)
            before, after = ((out - target).norm() / target.norm().clamp_min(1e-12) for out in (nearest, learned))
            figures.append({"unit": piece.name, "error_before": before.item(), "error_after": after.item()})
            for name in quantized_layers(part):
                left.pop(name)
        x_float = values(reference, float_nodes, twin[source], x_float, twin[sink])
        x = values(graph, block.nodes, source, x, sink)
        one = values(graph, block.nodes, source, one, sink)
        log(done, len(blocks))
        if len(one) != 1:
            left |= dict.fromkeys(left, f"the first axis of what {block.name} gives is not that of the images")
            break
    return figures + [{"unit": name, "skipped": reason} for name, reason in left.items()]
