"""Networks traced into graphs: the same function of plain layers and out of place, or refused in one line."""

import operator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from networks_fixture import Small, functional, images, named, same, vary
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.nn import functional as F

from dfkd.compress.files import load_compressed, save_compressed
from dfkd.compress.graph import Chain, chains, fold, norms, watch
from dfkd.compress.prepare import layer_names
from dfkd.compress.prune import prune
from dfkd.compress.quantize import quantize
from dfkd.compress.tracing import trace
from dfkd.compress.units import extract, units
from dfkd.errors import UserError


def discarded(call: Any) -> Any:
    """What works in place, its result taken from the tensor that it was given."""

    def act(x: Tensor, *arguments: Any) -> Tensor:
        call(x, *arguments)
        return x

    return act


@pytest.mark.parametrize(
    "act",
    [
        lambda m, x: F.relu(x, inplace=True),
        lambda m, x: F.hardtanh(x, -0.1, 0.2, True),
        lambda m, x: torch.relu_(x),
        lambda m, x: x.relu_(),
        lambda m, x: m.act(x),
        lambda m, x: discarded(m.act)(x),
        lambda m, x: discarded(F.leaky_relu_)(x, 0.2),
        lambda m, x: discarded(lambda y: y.add_(m.other(y)))(x),
        lambda m, x: x.add_(m.other(x)).mul_(2),
    ],
)
@torch.no_grad()
def test_what_works_in_place_overwrites_nothing_in_a_graph(act: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        made = m.conv(x)
        changed = act(m, made)
        return m.last(changed) + m.short(made)  # which sees what has been made of it

    torch.manual_seed(0)
    layers = {name: nn.Conv2d(4, 4, 1) for name in ("other", "last", "short")}
    network = Small(forward, conv=nn.Conv2d(3, 4, 3), act=nn.ReLU(inplace=True), **layers).double().eval()
    x = images(5, 3, 6, 6, dtype=torch.float64)
    graph, wanted = trace(network), network(x)
    assert (wanted - network.last(network.conv(x)) - network.short(network.conv(x))).abs().max() > 0.1
    with watch(graph, ["conv"]) as seen:
        same(graph(x), wanted)
    same(seen["conv"], network.conv(x))  # what a quantiser would be calibrated on


@pytest.mark.parametrize(
    "act",
    [
        lambda y: discarded(lambda v: v.relu_())(y.flatten(1)),
        lambda y: y.chunk(2, 1)[0].relu_(),
        lambda y: y[:, :2].mul_(2),
        lambda y: operator.iadd(y, 1),
        lambda y: F.relu(y.view(-1), inplace=True),
    ],
)
@torch.no_grad()
def test_what_a_graph_would_compute_otherwise_is_refused(act: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        made = m.conv(x)
        act(made)  # changes what is read again
        return m.last(made).mean((2, 3))

    torch.manual_seed(0)
    network = Small(forward, conv=nn.Conv2d(3, 4, 3), last=nn.Conv2d(4, 4, 1)).eval()
    x = images(5, 3, 6, 6)
    trace(network)  # without images nothing tells
    for run in (lambda: trace(network, x), lambda: quantize(network, [x], 8, method="nearest", images=5)):
        with pytest.raises(UserError, match="Small computes something else once it is traced"):
            run()


def test_a_forward_may_ask_for_gradients() -> None:
    network = Small(lambda m, x: m.head(x.requires_grad_().flatten(1)), head=nn.Linear(108, 2)).eval()
    x = images(5, 3, 6, 6)
    assert torch.equal(trace(network, x)(x), network(x))


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize("computed", ["weight_norm", "spectral_norm", "parametrizations", "mask"])
def test_weights_that_are_computed_are_refused(computed: str) -> None:
    make = {
        "weight_norm": nn.utils.weight_norm,
        "spectral_norm": nn.utils.spectral_norm,
        "parametrizations": nn.utils.parametrizations.weight_norm,
        "mask": lambda layer: nn.utils.prune.l1_unstructured(layer, "weight", 0.5),
    }[computed]
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), make(nn.Conv2d(4, 4, 3)), nn.Flatten(), nn.Linear(64, 2))
    network(images(2, 3, 8, 8))
    for act in (trace, lambda given: prune(given, [images(4, 3, 8, 8)], kind="weights", images=4)):
        with pytest.raises(UserError, match="the weight of 2 is no parameter; if it is computed of others"):
            act(network)


def test_functional_networks_are_traced_with_arguments_at_their_defaults() -> None:
    network, x = functional().double(), images(3, 1, 8, 8, dtype=torch.float64)
    graph = trace(network)
    assert torch.equal(graph(x), network(x))
    assert len(norms(graph)) == 3
    same(fold(graph)(x), network(x))
    part = x
    for unit in units(graph):
        part = extract(graph, unit.nodes, unit.name)[0](part)
    same(part, network(x))
    assert chains(trace(network)) == [Chain("conv1", "norm1", True, "conv2")]
    assert type(network).__name__ == "Functional"
    assert network(x, features=True).shape == (3, 24)


def test_the_graph_is_in_eval_mode_and_works_on_nothing_in_place() -> None:
    network = named("dfkd:resnet20", width=4).train()
    graph = trace(network)
    assert not any(module.training for module in graph.modules())
    assert not any(getattr(module, "inplace", False) for module in graph.modules())
    assert all(module.training for module in network.modules())
    assert network.relu.inplace
    with torch.no_grad():
        graph.conv1.weight.zero_()
    assert network.conv1.weight.any()


def test_layers_that_share_weights_are_refused_by_name() -> None:
    twice = Small(lambda m, x: m.one(m.one(x)), one=nn.Conv2d(2, 2, 1))
    with pytest.raises(UserError, match=r"^one \(Conv2d\) is used 2 times.*its own copy$"):
        trace(twice)
    plain_norm = nn.BatchNorm2d(2, affine=False)  # no parameters, but statistics
    with pytest.raises(UserError, match=r"bn .* 2 times"):
        trace(Small(lambda m, x: m.bn(m.b(m.bn(m.a(x)))), a=nn.Conv2d(2, 2, 1), b=nn.Conv2d(2, 2, 1), bn=plain_norm))
    tied = Small(lambda m, x: m.b(m.a(x)), a=nn.Conv2d(2, 2, 1), b=nn.Conv2d(2, 2, 1))
    tied.b.weight = tied.a.weight
    with pytest.raises(UserError, match=r"^a.weight and b.weight are one tensor"):
        trace(tied)
    relu = Small(lambda m, x: m.relu(m.a(m.relu(x))), a=nn.Conv2d(2, 2, 1), relu=nn.ReLU())
    assert trace(relu)(images(1, 2, 3, 3)).shape == (1, 2, 3, 3)


def test_a_forward_that_depends_on_values_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match=r"Small cannot be traced.*must not branch on values") as error:
        trace(Small(lambda m, x: m.a(x) if x.sum() > 0 else x, a=nn.Conv2d(2, 2, 1)))
    assert "\n" not in str(error.value)


def test_timms_linear_layers_are_layers() -> None:
    network = nn.Sequential(nn.Flatten(), timm.layers.Linear(12, 4))
    assert layer_names(trace(network)) == ["1"]


def branching(classes: int = 2) -> nn.Module:
    """A network that shrinks large maps, asking the size of what its convolution gave."""

    def forward(m: Any, x: Tensor) -> Tensor:
        made = m.conv(x)
        y = m.norm(made).relu_()
        if made.shape[-1] > 4 and max(made.shape[-2], 2) == made.shape[-2]:
            y = F.avg_pool2d(y, 2)
        return m.head(y.mean((2, 3)))

    layers = {"conv": nn.Conv2d(3, 4, 3), "norm": nn.BatchNorm2d(4), "head": nn.Linear(4, classes)}
    return Small(forward, **layers).eval()


@pytest.mark.parametrize(("size", "pools"), [(5, 0), (8, 1)])
def test_a_forward_that_branches_on_sizes_goes_where_it_goes_for_the_images(size: int, pools: int) -> None:
    network, x = branching().double(), images(3, 3, size, size, dtype=torch.float64)
    graph = trace(network, x[:1])  # one image must do
    assert sum(node.target is F.avg_pool2d for node in graph.graph.nodes) == pools
    assert [node.target for node in graph.graph.nodes if node.target in (getattr, operator.gt)] == []
    assert norms(graph) == {"conv": "norm"}  # which a reader of the convolution's size would keep from being folded
    same(fold(graph)(x), network(x))
    with pytest.raises(
        UserError,
        match=r"symbolically.*must not branch on values or sizes, nor loop over sizes .* \(which image=, .* tells\)$",
    ):
        trace(network)


@pytest.mark.parametrize(
    "branch",
    [
        lambda m, x: m.a(x) if x.sum() > 0 else x,
        lambda m, x: m.a(x) if x.mean().item() < 1 else x,
        lambda m, x: m.a(x) if torch.equal(x, x.abs()) else x,
        lambda m, x: m.a(x) if x.shape[0] > 1 else x,
        lambda m, x: m.a(x) if x.size(0) > 2 else x,
    ],
)
def test_a_forward_that_branches_on_values_or_the_number_of_images_is_refused(branch: Any) -> None:
    with pytest.raises(UserError, match="Small cannot be traced into a graph: symbolically traced"):
        trace(Small(branch, a=nn.Conv2d(3, 3, 1)), images(2, 3, 4, 4))


@pytest.mark.parametrize("method", ["nearest", "train"])
def test_what_branches_on_sizes_and_works_in_place_is_loaded_again(method: Any, tmp_path: Path) -> None:
    """Its graph is traced once for one method and twice for the other; files know quantisers by the nodes' names."""
    x, steps = images(32, 3, 8, 8), {} if method == "nearest" else {"steps": 1, "warm_start": 0, "warmup": 0}
    done = quantize(branching(), [x], 8, method=method, images=32, **steps)
    (tmp_path / "nets.py").write_text("from test_tracing import branching\n")
    about = {"model": f"python:{tmp_path}/nets.py:branching", "classes": 2, "channels": 3, "structure": done.structure}
    save_compressed(tmp_path / "made", done.model, about)
    assert torch.equal(load_compressed(tmp_path / "made", trust_code=True)(x), done.model(x))


@torch.no_grad()
def test_joint_norms_keep_their_eps_when_taken_apart() -> None:
    network = vary(nn.Sequential(nn.Conv2d(1, 6, 3), BatchNormAct2d(6, eps=0.5))).double()
    x = images(2, 1, 5, 5, dtype=torch.float64)
    same(trace(network)(x), network(x))
