"""Networks as graphs: the same function traced, folded or cut into units; what is found where, on networks known."""

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks_fixture import Small, images, named, same, vary
from torch import Tensor, fx, nn

from dfkd.classifier import Classifier
from dfkd.compress.graph import (
    CARRIERS,
    Chain,
    calibration_inputs,
    chains,
    fold,
    images_of,
    kind,
    network_input,
    norms,
    positive_scales,
    remove_call,
    sizes,
    watch,
    with_network,
)
from dfkd.compress.tracing import trace
from dfkd.compress.units import extract, mark, units
from dfkd.errors import UserError

NETWORKS = {
    "dfkd:tiny_plain": (8, {"width": 4}),
    "dfkd:tiny_residual": (8, {"width": 4}),
    "dfkd:tiny_inverted": (8, {"width": 4}),
    "dfkd:resnet20": (12, {"width": 4}),
    "dfkd:wrn_16_1": (12, {}),
    "dfkd:vgg11": (32, {}),
    "torchvision:resnet18": (32, {}),
    "torchvision:mobilenet_v2": (32, {}),
    "torchvision:shufflenet_v2_x0_5": (32, {}),
    "timm:resnet18": (32, {}),
    "timm:efficientnet_b0": (32, {}),
}


def build(spec: str, low: float = 0.5) -> tuple[nn.Module, Tensor]:
    """A network in float64 and images for it."""
    size, kwargs = NETWORKS[spec]
    return named(spec, 3, low=low, **kwargs).double(), images(2, 3, size, size, dtype=torch.float64)


@pytest.mark.parametrize("spec", NETWORKS)
@torch.no_grad()
def test_a_graph_folded_and_cut_computes_what_the_network_does(spec: str) -> None:
    network, x = build(spec, low=-0.5)  # half of the scales are negative
    before = copy.deepcopy(network.state_dict())
    wanted = network(x)
    graph = trace(network)
    assert torch.equal(graph(x), wanted)
    part = x
    for unit in units(graph):
        module, _, _ = extract(graph, unit.nodes, unit.name)
        part = module(part)
        assert isinstance(part, Tensor)
    assert torch.equal(part, wanted)
    positive_scales(graph)
    same(graph(x), wanted)
    followed = [graph.get_submodule(norm) for norm in norms(graph).values()]
    assert followed
    assert all((norm.weight >= 0).all() for norm in followed)
    assert len(norms(fold(graph))) == 0
    same(graph(x), wanted)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert len(before) == len(network.state_dict())


@pytest.mark.parametrize(
    ("rows", "tokens", "found"),
    [
        (lambda y: y.flatten(1), 36, True),
        (lambda y: y.reshape(y.shape[0], -1), 36, True),
        (lambda y: y.mean((2, 3)), 4, True),
        (lambda y: y.mean(dim=[-1, -2]), 4, True),
        (lambda y: torch.reshape(y, shape=(-1, 36)), 36, True),
        (lambda y: torch.flatten(y, start_dim=1), 36, True),
        (lambda y: F.adaptive_avg_pool2d(y, 1).squeeze(-1).squeeze(-1), 4, True),
        (lambda y: y.mean((2, 3), keepdim=True).squeeze(), 4, True),
        (lambda y: y.flatten(2), 9, False),  # four tokens, as many as the layer gives: which the norm means is not seen
        (lambda y: y.flatten(2).transpose(1, 2), 4, False),
        (lambda y: y.permute(0, 2, 3, 1).flatten(1, 2), 4, False),
        (lambda y: y.reshape(y.shape[0], 4, 9), 9, False),
    ],
)
@torch.no_grad()
def test_a_norm_of_tokens_is_not_taken_into_a_linear_layer(rows: Any, tokens: int, found: bool) -> None:
    many = 9 if tokens == 4 and not found else 4
    network = Small(
        lambda m, x: m.c(m.b(m.a(rows(m.conv(x)))).flatten(1)),
        conv=nn.Conv2d(3, 4, 1),
        a=nn.Linear(tokens, many),
        b=nn.BatchNorm1d(many),
        c=nn.Linear(many if found else many * (4 if tokens == 9 else 9), 2),
    )
    network = vary(network.double(), low=0.5).eval()
    x = images(5, 3, 3, 3, dtype=torch.float64)
    graph = trace(network)
    assert norms(graph) == ({"a": "b"} if found else {})
    same(fold(graph)(x), network(x))


@pytest.mark.parametrize(
    "lines",
    [
        lambda x: x.squeeze(1),
        lambda x: torch.squeeze(input=x, dim=1),
        lambda x: F.adaptive_avg_pool2d(x.transpose(1, 2), (1, 4)).squeeze(2),
    ],
)
@torch.no_grad()
def test_a_norm_of_a_maps_lines_is_not_taken_into_a_linear_layer(lines: Any) -> None:
    """As many lines as features: a squeeze is no mean over pixels."""
    layers = {"a": nn.Linear(4, 4), "b": nn.BatchNorm1d(4), "c": nn.Linear(16, 2)}
    network = vary(Small(lambda m, x: m.c(m.b(m.a(lines(x))).flatten(1)), **layers).double(), low=0.5).eval()
    x = images(5, 1, 4, 4, dtype=torch.float64)
    assert norms(trace(network)) == {}
    same(fold(trace(network))(x), network(x))


@torch.no_grad()
def test_a_batch_norm_without_statistics_or_behind_a_fork_is_left() -> None:
    free = Small(
        lambda m, x: m.b(m.a(x)), a=nn.Conv2d(1, 2, 1), b=nn.BatchNorm2d(2, track_running_stats=False)
    ).double()
    x = images(2, 1, 4, 4, dtype=torch.float64)
    same(fold(trace(free))(x), free.eval()(x))
    forked = vary(Small(lambda m, x: m.b(y := m.a(x)) + y, a=nn.Conv2d(1, 2, 1), b=nn.BatchNorm2d(2))).double()
    assert norms(trace(forked)) == {}
    same(fold(trace(forked))(x), forked(x))


def test_the_blocks_of_a_residual_network_are_units_by_name() -> None:
    graph = trace(named("dfkd:resnet20", width=4))
    found = units(graph)
    blocks = [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in (0, 1, 2)]
    assert [unit.name for unit in found] == ["conv1", *blocks, "linear"]
    convs = [sum(kind(graph, node) is nn.Conv2d for node in unit.nodes) for unit in found]
    assert convs == [1, *[2] * 9, 0]
    assert all(unit.nodes[-1].target.endswith("relu2") for unit in found[1:9])


@pytest.mark.parametrize("spec", ["dfkd:resnet20", "torchvision:shufflenet_v2_x0_5", "timm:efficientnet_b0"])
def test_every_node_is_in_one_unit(spec: str) -> None:
    graph = trace(build(spec)[0])
    nodes = [node for unit in units(graph) for node in unit.nodes]
    assert nodes == [node for node in graph.graph.nodes if node.op not in ("placeholder", "output", "get_attr")]
    names = [unit.name for unit in units(graph)]
    assert len(set(names)) == len(names)


def test_what_has_two_inputs_or_outputs_is_no_unit() -> None:
    graph = trace(named("dfkd:tiny_residual", width=4))
    nodes = list(graph.graph.nodes)
    add = next(node for node in nodes if kind(graph, node) in ("add", torch.add) or "add" in node.name)
    with pytest.raises(UserError, match="the sum has 2 inputs and 1 outputs"):
        extract(graph, [add], "the sum")


def test_the_chains_of_resnet20_lie_inside_its_blocks() -> None:
    blocks = [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in (0, 1, 2)]
    wanted = [Chain(f"{block}.conv1", f"{block}.bn1", True, f"{block}.conv2") for block in blocks]
    assert chains(trace(named("dfkd:resnet20", width=4))) == wanted


def test_the_chains_of_vgg11_go_from_layer_to_layer() -> None:
    places = [0, 4, 8, 11, 15, 18, 22, 25]
    wanted = [Chain(f"features.{a}", f"features.{a + 1}", True, f"features.{b}") for a, b in pairwise(places)]
    assert chains(trace(named("dfkd:vgg11"))) == [*wanted, Chain("features.25", "features.26", True, "classifier")]


def conv(taken: int, made: int, **options: int) -> nn.Conv2d:
    return nn.Conv2d(taken, made, 1, **options)


@pytest.mark.parametrize(
    ("between", "first", "second", "wanted"),
    [
        (lambda y: y, conv(1, 4), conv(4, 2), [Chain("a", None, False, "b")]),
        (lambda y: y.relu(), conv(1, 4), conv(4, 2), [Chain("a", None, True, "b")]),
        (lambda y: y.relu().flatten(1), conv(1, 4), nn.Linear(16, 2), [Chain("a", None, True, "b", 4)]),
        (lambda y: y.view(y.size(0), -1), conv(1, 4), nn.Linear(16, 2), [Chain("a", None, False, "b", 4)]),
        (lambda y: y.mean((2, 3)), conv(1, 4), nn.Linear(4, 2), [Chain("a", None, False, "b")]),
        (lambda y: y.sigmoid(), conv(1, 4), conv(4, 2), []),
        (lambda y: y + 1, conv(1, 4), conv(4, 2), []),
        (lambda y: y, conv(2, 4, groups=2), conv(4, 2), []),
        (lambda y: y, conv(1, 4), conv(4, 4, groups=2), []),
        # a channel shuffle
        (lambda y: y.view(-1, 2, 2, 2, 2).transpose(1, 2).reshape(-1, 4, 2, 2), conv(1, 4), conv(4, 2), []),
        (lambda y: y.transpose(1, 3).flatten(1), conv(1, 4), nn.Linear(16, 2), []),
        (lambda y: y.view(-1, 4, 1, 1), conv(1, 4), conv(4, 2), []),  # pixels become images
        (lambda y: nn.functional.pixel_shuffle(y, 2), conv(1, 4), conv(1, 2), []),
        # layers that take pixels, not channels
        (lambda y: y.flatten(2), conv(1, 4), nn.Linear(4, 2), []),
        (lambda y: y.flatten(1, 2), conv(1, 4), nn.Linear(2, 2), []),
        (lambda y: y.reshape(y.shape[0], 4, -1), conv(1, 4), nn.Linear(4, 2), []),
        (lambda y: y.repeat(1, 1, 2, 2), conv(1, 4), nn.Linear(4, 2), []),
        (lambda y: y, conv(1, 2), nn.Linear(2, 2), []),
        (lambda y: y.mean(1), conv(1, 2), nn.Linear(2, 2), []),
        # the same rows in other words
        (lambda y: torch.flatten(y, start_dim=1), conv(1, 4), nn.Linear(16, 2), [Chain("a", None, False, "b", 4)]),
        (lambda y: torch.reshape(y, shape=(-1, 16)), conv(1, 4), nn.Linear(16, 2), [Chain("a", None, False, "b", 4)]),
        (lambda y: y.mean(dim=(2, 3)), conv(1, 4), nn.Linear(4, 2), [Chain("a", None, False, "b")]),
    ],
)
def test_a_chain_hands_every_channel_on_in_its_place(
    between: Any, first: nn.Module, second: nn.Module, wanted: list[Chain]
) -> None:
    network = Small(lambda m, x: m.b(between(m.a(x))), a=first, b=second)
    network(images(3, first.in_channels, 2, 2))
    graph = trace(network)
    assert chains(graph) == wanted
    x = images(3, first.in_channels, 2, 2)
    for chain in wanted:  # without a channel's columns the second layer is deaf to it, and to no other
        silent = copy.deepcopy(network)
        with torch.no_grad():
            silent.a.weight[1], silent.a.bias[1] = 7.0, 9.0
            columns = slice(chain.spatial, 2 * chain.spatial)
            silent.b.weight[:, columns] = 0
            network.b.weight[:, columns] = 0
        assert torch.equal(silent(x), network(x))


def test_marks_let_every_unit_be_watched_and_come_out_again() -> None:
    network, x = named("dfkd:resnet20", width=4), images(2, 1, 12, 12)
    graph = trace(network)
    code, ends = graph.code, [unit.nodes[-1].target for unit in units(graph)[:9]]  # the tenth ends in a flatten
    names = mark(graph)
    assert len(names) == 10
    with torch.no_grad(), watch(graph, names) as marked, watch(graph, ends) as seen:
        assert torch.equal(graph(x), network(x))
        assert all(torch.equal(marked[name], seen[end]) for name, end in zip(names, ends))
        assert len(marked) == 10
        again = trace(graph)
    assert torch.equal(again(x), network(x))
    for name in names:
        remove_call(graph, name)
    graph.recompile()
    assert graph.code == code
    assert not any(hasattr(graph, name) for name in names)


@torch.no_grad()
def test_a_unit_takes_the_parameters_that_its_forward_names() -> None:
    layers = {"a": nn.Conv2d(1, 4, 1), "head": nn.Linear(256, 3)}
    network = Small(lambda m, x: m.head((m.a(x) * m.gain).relu().flatten(1)), **layers)
    network.gain = nn.Parameter(torch.tensor([1.0, -2.0, 3.0, 0.5]).view(4, 1, 1))
    graph, part = trace(network), images(2, 1, 8, 8)
    wanted = network(part)
    for unit in units(graph):
        part = extract(graph, unit.nodes, unit.name)[0](part)
    assert torch.equal(part, wanted)


@torch.no_grad()
def test_what_a_network_gives_on_its_way_ends_a_unit() -> None:
    layers = {"a": nn.Conv2d(1, 4, 1), "head": nn.Linear(64, 3)}
    network = Small(lambda m, x: (y := m.a(x).relu(), m.head(F.max_pool2d(y, 2).flatten(1))), **layers)
    graph, part = trace(network), images(2, 1, 8, 8)
    wanted = network(part)
    for unit in units(graph):
        part = extract(graph, unit.nodes, unit.name)[0](part)
    assert torch.equal(part, wanted[1])


def test_watch_leaves_no_hook() -> None:
    network = named("dfkd:tiny_plain", width=4)
    with pytest.raises(RuntimeError), watch(network, ["linear"]) as seen:
        network(images(2, 3, 8, 8))
    assert not seen
    with watch(network, ["linear"]) as seen:
        network(images(2, 1, 8, 8))
    assert seen["linear"].shape == (2, 3)
    assert not network.linear._forward_hooks


def test_sizes_are_told_from_tensors() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        return y.reshape(y.shape[0], y.size(1) * 4 + 0) + 1

    graph = trace(Small(forward, a=nn.Conv2d(1, 2, 1)))
    found = {node.name for node in graph.graph.nodes} - {node.name for node in sizes(graph)}
    assert found == {"x", "a", "reshape", "add_1", "output"}


@pytest.mark.parametrize("count", [1, 4, 5, 8])
def test_as_many_images_are_taken_as_asked_for(count: int) -> None:
    whole = images(8, 1, 2, 2)
    pairs = [(whole[:4], torch.zeros(4)), [whole[4:], torch.zeros(4)]]
    for stream in ([whole[:4], whole[4:]], pairs):
        assert torch.equal(torch.cat(list(images_of(stream, count))), whole[:count])
    assert torch.equal(torch.cat(list(images_of(pairs))), whole)
    with_empty_ones = list(images_of([whole[:0], whole[:4], whole[:0], whole[4:]], count))
    assert all(len(batch) for batch in with_empty_ones)
    assert torch.equal(torch.cat(with_empty_ones), whole[:count])


def test_a_stream_too_short_is_refused() -> None:
    with pytest.raises(UserError, match="ended after 8 images where 9 are needed"):
        list(images_of([images(8, 1, 2, 2)], 9))
    with pytest.raises(UserError, match=r"got one tensor \[8, 1, 2, 2\]; put it in a list"):
        list(images_of(images(8, 1, 2, 2)))
    for batch, name in (
        ({"images": images(8, 1, 2, 2)}, "dict"),
        ((images(8, 1, 2, 2).numpy(),), "ndarray"),
        ((), "tuple"),
    ):
        with pytest.raises(UserError, match=rf"a stream's batch is a tensor of images .* got a {name}"):
            list(images_of([batch]))


@pytest.mark.parametrize(("mean", "std"), [(0.3, 0.35), (0.5, 0.5), (0.45, 0.22), (0.1307, 0.3081)])
def test_images_that_were_normalised_already_are_refused_by_what_normalises_them(mean: float, std: float) -> None:
    given = [(torch.arange(256.0).view(4, 1, 8, 8) / 255 - mean) / std]
    network = nn.Conv2d(1, 2, 3)
    with pytest.raises(UserError, match=r"to a model that normalises them itself; give them in \[0, 1\]"):
        calibration_inputs(Classifier(network, mean=[mean], std=[std]), given, 4)
    assert torch.equal(calibration_inputs(network, given, 4)[0], given[0])
    sharpened = [torch.linspace(-3, 252, 256).view(4, 1, 8, 8)]
    with pytest.raises(UserError, match=r"up to 252; .* divide by 255"):
        calibration_inputs(Classifier(network, mean=[mean], std=[std]), sharpened, 4)
    beyond = [sharpened[0] / 255 * 1.2 - 0.1]
    assert len(calibration_inputs(Classifier(network, mean=[mean], std=[std]), beyond, 4)) == 1


def test_a_classifier_keeps_its_normalisation_around_another_network() -> None:
    model = Classifier(nn.Identity(), mean=[0.25], std=[0.5], input_size=4)
    x = images(2, 1, 8, 8)
    other = with_network(model, nn.Flatten())
    assert isinstance(other, Classifier)
    assert torch.equal(other(x), model(x).flatten(1))
    assert torch.equal(network_input(model, x), model(x))
    bare = nn.Flatten()
    assert with_network(nn.Identity(), bare) is bare
    assert network_input(bare, x) is x


def test_what_carries_values_on_commutes_with_rounding() -> None:
    x = 4 * images(2, 4, 4, 4)
    layers = {nn.Flatten: nn.Flatten(), nn.MaxPool2d: nn.MaxPool2d(2), nn.PixelShuffle: nn.PixelShuffle(2)}
    for type_, layer in layers.items():
        assert type_ in CARRIERS
        assert torch.equal(layer(x).round(), layer(x.round()))
    assert isinstance(trace(nn.Sequential(nn.Conv2d(1, 1, 1))), fx.GraphModule)


def test_images_in_double_precision_are_for_networks_in_it_alone() -> None:
    network = nn.Sequential(nn.Conv2d(3, 2, 3))
    for given in (torch.float64, torch.float16):
        assert [x.dtype for x in calibration_inputs(network, [torch.rand(4, 3, 8, 8).to(given)], 4)] == [torch.float32]
    (x,) = calibration_inputs(network.double(), [torch.rand(4, 3, 8, 8).double()], 4)
    assert x.dtype == torch.float64


@torch.no_grad()
def test_a_bias_before_a_norm_changes_sign_with_its_filter() -> None:
    network = vary(nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU()), low=-0.5).double()
    nn.init.normal_(network[0].bias, generator=torch.Generator().manual_seed(0))
    assert (network[1].weight < 0).any()
    graph, x = trace(network), images(2, 1, 5, 5, dtype=torch.float64)
    positive_scales(graph)
    same(graph(x), network(x))
