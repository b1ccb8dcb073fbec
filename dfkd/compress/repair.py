"""What pruning broke, put right from images alone: least squares layer by layer, or batch norms' paired moments."""

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dfkd.compress.graph import ADDS, affine, is_layer, kind, norms, own_name, sizes, watch
from dfkd.compress.tracing import trace
from dfkd.compress.units import extract, units
from dfkd.errors import UserError

LARGEST = 8192  # inputs of a filter: above, the normal equations alone take more than half a gigabyte
BATCH = 64  # images whose patches are held at once
POSITIONS = 256  # patches of an image that are used: neighbours say much the same

Kept = Mapping[str, Tensor]  # layer name -> indices of the outputs that are left; a layer not named keeps all
Values = Callable[[set[str]], Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]]


class _Values(fx.Interpreter):
    """Runs a graph and keeps the values of some nodes as they were when made: later ones may work on them in place."""

    def __init__(self, graph: fx.GraphModule, wanted: set[str]) -> None:
        super().__init__(graph)
        self.wanted, self.seen = wanted, dict[str, Tensor]()

    def run_node(self, n: fx.Node) -> Any:
        """The node's value, kept where it is wanted."""
        value = super().run_node(n)
        if n.name in self.wanted:
            self.seen[n.name] = value.clone()
        return value


def _lockstep(
    teacher: fx.GraphModule, pruned: fx.GraphModule, inputs: Tensor
) -> Iterator[tuple[fx.GraphModule, list[fx.Node], Values]]:
    """Both networks unit by unit: the pruned unit, its nodes, and the values of named nodes of both, batch by batch.

    A unit's inputs are kept, so that each pass runs that unit alone; what is changed in a unit of `pruned` while it is
    the current one is seen by all that come after.
    """
    batches = [(each, each) for each in inputs.split(BATCH)]
    for whole, cut in zip(units(teacher), units(pruned)):
        if not cut.read:
            continue
        parts = [extract(graph, unit.nodes, unit.name)[0] for graph, unit in ((teacher, whole), (pruned, cut))]

        def values(
            wanted: set[str], parts: list[fx.GraphModule] = parts, batches: list[tuple[Tensor, Tensor]] = batches
        ) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
            for pair in batches:
                runs = [_Values(part, wanted) for part in parts]
                for run, x in zip(runs, pair):
                    run.run(x.clone())
                yield runs[0].seen, runs[1].seen

        nodes = [node for node in parts[1].graph.nodes if node.op not in ("output", "get_attr")]
        yield parts[1], nodes, values
        batches = [(parts[0](a.clone()), parts[1](b.clone())) for a, b in batches]


@torch.no_grad()
def least_squares(
    teacher: nn.Module,
    pruned: nn.Module,
    inputs: Tensor,
    kept: Kept,
    *,
    supports: Mapping[str, Tensor] | None = None,
    ridge: float = 1e-2,
) -> None:
    """Solve the layers of `pruned` anew, in place and in forward order, for the teacher's outputs on inputs [N, ...].

    W' = W + (P'P + ridge * mean diag P'P)^-1 P'(Z - PW), P the patches that the layer sees in the pruned network
    repaired so far and a column of ones, Z the teacher's output before its batch norm. He et al. 2017, section 3.1; the
    ridge draws towards W instead of 0, so what the images do not excite stays. The intercept goes to the bias or else
    to the batch norm behind. The last layer of a residual branch also makes up for what the shortcut lacks (section
    3.2). supports: masks of the weights that may differ from 0; a layer not named keeps its own. Grouped convolutions
    are solved group by group; layers with more than 8192 inputs to a filter stay as they are.
    Raises UserError where a network cannot be traced or a solution is not finite.
    """
    source, target = trace(teacher, inputs[:2]), trace(pruned, inputs[:2])
    behind = norms(target)
    for part, nodes, values in _lockstep(source, target, inputs):
        for node in nodes:
            if not is_layer(part, node, nn.Conv2d, nn.Linear):
                continue
            name = str(node.target)
            layer: Any = part.get_submodule(name)
            norm: Any = target.get_submodule(behind[name]) if name in behind else None
            if layer.weight[0].numel() > LARGEST:
                continue
            equations = _equations(layer, norm, kept.get(name), values, node, _other_branch(part, nodes, node, norm))
            if not equations[1].any():
                continue  # nothing before it has changed, nor has it: it stays to the last bit
            support = None if supports is None else supports.get(name)
            change = _solution(*equations, support, layer.weight[0].numel(), ridge)
            _put(layer, norm, change, name)
            _hand_over(layer, pruned.get_submodule(name))
            if norm is not None:
                _hand_over(norm, pruned.get_submodule(own_name(pruned, behind[name])))


def _equations(
    layer: Any, norm: Any, keep: Tensor | None, values: Values, node: fx.Node, other: fx.Node | None
) -> tuple[Tensor, Tensor]:
    """P'P [groups, D, D] and P'(Z - PW) [groups, D, K / groups] in float64, summed over the images."""
    given = node.all_input_nodes[0].name
    ones = layer.bias is not None or norm is not None
    gram: Any = 0.0
    cross: Any = 0.0
    for whole, cut in values({node.name, given} | ({other.name} if other else set())):
        lack = _lack(layer, whole[node.name], cut[node.name], keep)
        if other is not None and whole[other.name].shape == whole[node.name].shape:  # not one number for a whole map
            lack = lack + _lack(layer, whole[other.name], cut[other.name], keep) / _scale(norm, lack)
        places: Any = slice(None)
        if isinstance(layer, nn.Conv2d):
            places = torch.randperm(lack[0, ..., 0].numel(), generator=torch.Generator().manual_seed(0))[:POSITIONS]
            lack = lack.flatten(1, 2)[:, places]
        patches = _patches(layer, cut[given], places, ones)  # [groups, N, D]
        lack = lack.reshape(patches.shape[1], len(patches), -1).transpose(0, 1)
        gram = gram + _double(patches.transpose(1, 2) @ patches)
        cross = cross + _double(patches.transpose(1, 2) @ lack)
    return gram, cross


def _lack(layer: Any, whole: Tensor, cut: Tensor, keep: Tensor | None) -> Tensor:
    """How far the outputs that are left are from the teacher's, [B, ..., K]: channels last."""
    if isinstance(layer, nn.Conv2d):
        whole, cut = whole.movedim(1, -1), cut.movedim(1, -1)
    return (whole if keep is None else whole[..., keep.to(whole.device)]) - cut


def _double(x: Tensor) -> Tensor:
    """In float64, on the CPU where an Apple GPU has none."""
    return x.cpu().double() if x.device.type == "mps" else x.double()


def _patches(layer: Any, x: Tensor, places: Any, ones: bool) -> Tensor:
    """What a layer's outputs at some places see of its input, [groups, N, D]; with a last column of ones if asked."""
    if isinstance(layer, nn.Linear):
        rows = x.reshape(1, -1, x.shape[-1])
    else:
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
        rows = F.unfold(x, layer.kernel_size, layer.dilation, 0, layer.stride)[:, :, places]  # [B, C * k * k, L]
        rows = rows.view(len(x), layer.groups, -1, rows.shape[-1]).permute(1, 0, 3, 2).flatten(1, 2)
    return F.pad(rows, (0, 1), value=1.0) if ones else rows


def _other_branch(part: fx.GraphModule, nodes: list[fx.Node], node: fx.Node, norm: Any) -> fx.Node | None:
    """What a layer's output is added to, where no later layer has a say in it."""
    at = node if norm is None else next(iter(node.users))
    user = next(iter(at.users)) if len(at.users) == 1 else None
    if user is None or kind(part, user) not in ADDS or len(user.all_input_nodes) != 2 or "alpha" in user.kwargs:
        return None  # with alpha one of the two counts otherwise
    other = next(each for each in user.all_input_nodes if each is not at)
    before, later = [other], nodes[nodes.index(node) :]
    for each in before:
        before += [source for source in each.all_input_nodes if source not in before]
    late = any(each in later and is_layer(part, each, nn.Conv2d, nn.Linear) for each in before)
    return None if late or other.op == "get_attr" or other in sizes(part) else other


def _scale(norm: Any, output: Tensor) -> Tensor:
    """What the batch norm multiplies a layer's output by, [K]: infinite where it all but silences a channel, since that
    cannot make up for anything."""
    if norm is None:
        return output.new_ones(output.shape[-1])
    scale = affine(norm)[0]
    return scale.masked_fill(scale.abs() <= 1e-2 * scale.abs().max(), float("inf"))


def _solution(gram: Tensor, cross: Tensor, support: Tensor | None, size: int, ridge: float) -> Tensor:
    """The change of a layer's weights (the first `size` rows) and intercepts, [groups, D, K / groups] in float64."""
    ones = gram.shape[-1] - size
    mean = gram.diagonal(dim1=1, dim2=2)[:, :size].mean(1, keepdim=True)
    # An intercept costs next to nothing.
    damping = F.pad(ridge * mean.expand(-1, size), (0, ones), value=1e-6).clamp_min(1e-12)
    damped = gram + torch.diag_embed(damping)
    if support is None:
        return torch.linalg.solve_ex(damped, cross).result
    free = support.to(gram.device).reshape(len(gram), -1, size).transpose(1, 2)
    free = F.pad(free, (0, 0, 0, ones), value=True)
    change = torch.zeros_like(cross)
    for g in range(len(gram)):
        for k in range(cross.shape[2]):
            at = free[g, :, k].nonzero()[:, 0]
            change[g, at, k] = torch.linalg.solve_ex(damped[g][at][:, at], cross[g, at, k]).result
    return change


def _put(layer: Any, norm: Any, change: Tensor, name: str) -> None:
    """Change a layer's weights, and by the intercept its bias or the batch norm behind it. Raises UserError."""
    if not change.isfinite().all():
        raise UserError(
            f"least squares found no finite weights for {name}: what the networks compute on these images is not "
            "finite; check the stream and the model, or pass repair='batch_norm' or 'none'"
        )
    size = layer.weight[0].numel()
    layer.weight.add_(change[:, :size].transpose(1, 2).reshape(layer.weight.shape).to(layer.weight))
    if change.shape[1] > size:
        intercept = change[:, size].flatten().to(layer.weight)
        if layer.bias is not None:
            layer.bias.add_(intercept)
        else:
            norm.running_mean.sub_(intercept)


def _hand_over(solved: nn.Module, own: nn.Module) -> None:
    """Take over the values of a graph's layer."""
    for key, value in own.state_dict().items():
        value.copy_(solved.state_dict()[key])


def check_batch_norms(network: nn.Module) -> None:
    """Raise UserError where a network has no batch norm whose moments could be paired."""
    if not any(_has_moments(module) for module in network.modules()):
        raise UserError(
            f"repair='batch_norm' needs batch norms with running statistics and {type(network).__name__} has none; use "
            "'least_squares' or 'none'"
        )


def _has_moments(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.running_var is not None


@torch.no_grad()
def paired_batch_norm(teacher: nn.Module, pruned: nn.Module, inputs: Tensor, kept: Kept) -> None:
    """Correct the batch norms of `pruned`, in place and in forward order, by how its moments differ from the teacher's.

    On the same inputs [N, C, H, W], var *= var_pruned / var_teacher, and the mean moves such that the teacher's mean
    value comes out at the pruned mean. Whatever the images, a network that nothing was taken from stays as it is;
    plainly re-estimated, it would take on their moments.
    Raises UserError where there is no batch norm or the network cannot be traced.
    """
    check_batch_norms(pruned)
    names = {module: name for name, module in pruned.named_modules()}
    source, target = trace(teacher, inputs[:2]), trace(pruned, inputs[:2])
    for part, nodes, values in _lockstep(source, target, inputs):
        for node in nodes:
            if not is_layer(part, node, _BatchNorm) or not _has_moments(part.get_submodule(str(node.target))):
                continue
            name, before = str(node.target), node.all_input_nodes[0].name
            own = pruned.get_submodule(own_name(pruned, name))
            left = kept.get(names[own])
            sums: Any = [0.0, 0.0]
            for pair in values({before}):
                for k, (seen, keep) in enumerate(zip(pair, (left, None))):
                    x = _double(seen[before].transpose(0, 1).flatten(1))
                    x = x if keep is None else x[keep.to(x.device)]
                    sums[k] = sums[k] + torch.stack([x.sum(1), x.square().sum(1), torch.full_like(x[:, 0], x.shape[1])])
            means = [total / count for total, _, count in sums]
            variances = [(square / count - mean**2).clamp_min(1e-12) for (_, square, count), mean in zip(sums, means)]
            norm: Any = part.get_submodule(name)
            _rescale(norm, means, variances)
            _hand_over(norm, own)


def _rescale(norm: Any, means: list[Tensor], variances: list[Tensor]) -> None:
    """Let a batch norm make of the pruned moments [C] (second) what it made of the teacher's (first)."""
    mean, var = _double(norm.running_mean), _double(norm.running_var)
    new_var = var * (variances[1] / variances[0])
    factor = ((new_var + norm.eps) / (var + norm.eps)).sqrt()
    norm.running_mean.copy_(mean + (means[1] - means[0]) + (factor - 1) * (mean - means[0]))
    norm.running_var.copy_(new_var)


@torch.no_grad()
def output_errors(
    teacher: nn.Module, pruned: nn.Module, inputs: Tensor, kept: Kept, names: list[str]
) -> dict[str, float]:
    """Norm of the difference of layers' outputs that are left, relative to the teacher's, on inputs [N, ...]."""
    sums = {name: [0.0, 0.0] for name in names}
    both = [_out_of_place(each) for each in (teacher, pruned)]
    for batch in inputs.split(BATCH):
        with watch(both[0], names) as whole, watch(both[1], names) as cut:
            both[0](batch), both[1](batch)
        for name in names:
            layer = both[1].get_submodule(name)
            difference = _lack(layer, whole[name], cut[name], kept.get(name))
            expected = _lack(layer, whole[name], torch.zeros_like(cut[name]), kept.get(name))
            sums[name][0] += float(difference.square().sum())
            sums[name][1] += float(expected.square().sum())
    return {name: (difference / max(norm, 1e-12)) ** 0.5 for name, (difference, norm) in sums.items()}


def _out_of_place(network: nn.Module) -> nn.Module:
    """A copy whose activations leave what they are given, so that layers' outputs can be kept."""
    network = copy.deepcopy(network)
    module: Any
    for module in network.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
    return network
