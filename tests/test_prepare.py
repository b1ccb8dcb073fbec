"""Where quantisers stand on networks worked out by hand, and their calibration."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from networks_fixture import Small, functional, images, named, same, vary
from test_quantizers import loss_of, searched
from torch import Tensor, fx, nn
from torch.nn import functional as F

from dfkd.compress.graph import fold
from dfkd.compress.prepare import calibrate, insert, layer_bits, name_quantizers, prepare
from dfkd.compress.quantizers import (
    ActivationQuantizer,
    QuantizedConv2d,
    QuantizedLinear,
    activation_quantizers,
    quantized_layers,
    without_quantizers,
)
from dfkd.compress.tracing import trace
from dfkd.errors import UserError


def bits_of(network: nn.Module, bits: tuple[int, int], **options: Any) -> dict[str, tuple[int, int]]:
    return layer_bits(trace(network), bits, **options)


def test_bits_go_to_layers_by_place_and_pattern() -> None:
    network = named("dfkd:tiny_plain", width=4)
    names = [f"features.{k}" for k in (0, 3, 7, 10, 14, 17)]
    inner = dict.fromkeys(names[1:], (4, 3))
    assert bits_of(network, (4, 3)) == {names[0]: (8, 8), **inner, "linear": (8, 8)}
    assert bits_of(network, (4, 3), ends=(5, 6)) == {names[0]: (5, 6), **inner, "linear": (5, 6)}
    last_wins = {"features.*": (2, 5), "features.1?": [3, 6], "features.17": [7]}
    wanted = {**dict.fromkeys(names[:3], (2, 5)), names[3]: (3, 6), names[4]: (3, 6), names[5]: (7, 7)}
    assert bits_of(network, (4, 3), overrides=last_wins) == {**wanted, "linear": (8, 8)}
    turned = dict(reversed(last_wins.items()))
    assert bits_of(network, (4, 3), overrides=turned)[names[5]] == (2, 5)
    left = bits_of(network, (4, 3), ignore=["linear", "features.1*"], overrides={"linear": [2, 2]})
    assert list(left) == names[:3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overrides": {"layer9.*": [4, 4]}}, r"the override 'layer9.\*' matches no layer; the layers are features.0"),
        ({"ignore": ["fc"]}, "the ignore pattern 'fc' matches no layer"),
        ({"ignore": ["*"]}, r"ignore=\['\*'\] leaves no layer to quantise; the layers are features.0, "),
        ({"overrides": {"linear": [8, 9]}}, r"linear: bits \[8, 9\] are not allowed.* 2 to 8"),
        ({"overrides": {"linear": [1, 8]}}, r"linear: bits \[1, 8\]"),
        ({"overrides": {"linear": [4.0, 8]}}, r"linear: bits \[4.0, 8\]"),
        ({"ends": (16, 16)}, r"features.0: bits \(16, 16\)"),
    ],
)
def test_bits_that_cannot_be_are_refused_by_layer(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        bits_of(named("dfkd:tiny_plain", width=4), (4, 4), **options)


class CosineHead(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.normalize(x), nn.functional.normalize(self.weight))


def test_a_layer_that_computes_its_weight_is_named_and_can_stay_float() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), CosineHead(144, 3, bias=False))
    with pytest.raises(UserError, match="3 calls linear itself, is no"):
        bits_of(network, (4, 4))
    assert bits_of(network, (4, 4), ignore=["3"]) == {"0": (8, 8)}


def test_a_network_without_layers_is_refused() -> None:
    with pytest.raises(UserError, match="no convolution or linear layer"):
        bits_of(nn.Sequential(nn.ReLU()), (4, 4))


def inserted(network: nn.Module, bits: tuple[int, int], **options: Any) -> fx.GraphModule:
    graph = fold(trace(network))
    return insert(graph, layer_bits(graph, bits, **options), per_channel=True)


def standing(graph: fx.GraphModule) -> set[tuple[str, int, tuple[str, ...]]]:
    """Every quantiser as (the node it quantises, its bits, the nodes it serves)."""
    found = set()
    for node in graph.graph.nodes:
        if node.op == "call_module" and isinstance(graph.get_submodule(str(node.target)), ActivationQuantizer):
            bits: Any = graph.get_submodule(str(node.target)).bits
            found.add((node.args[0].name, bits, tuple(user.name for user in node.users)))
    return found


def test_resnet20_in_four_bits_has_its_ends_and_its_stream_in_eight() -> None:
    wanted = {("images", 8, ("conv1",)), ("pool", 8, ("flatten",)), ("layer3_2_relu2", 8, ("pool",))}
    entry, adds = "relu", ["add", *(f"add_{k}" for k in range(1, 9))]
    for stage in (1, 2, 3):
        for block in (0, 1, 2):
            name, add = f"layer{stage}_{block}", adds.pop(0)
            wanted |= {(entry, 4, (f"{name}_conv1",)), (f"{name}_relu1", 4, (f"{name}_conv2",))}
            wanted.add((f"{name}_conv2", 8, (add,)))
            padded = stage > 1 and block == 0
            wanted.add((f"pad{'_1' * (stage - 2)}", 8, (add,)) if padded else (entry, 8, (f"{name}_shortcut",)))
            entry = f"{name}_relu2"
    graph = inserted(named("dfkd:resnet20", width=4), (4, 4))
    assert standing(graph) == wanted
    assert {layer.quantizer.bits for layer in quantized_layers(graph).values()} == {4, 8}
    assert graph.meta["bits"]["conv1"] == graph.meta["bits"]["linear"] == (8, 8)
    assert len(quantized_layers(graph)) == 20
    assert all(name == f"quantizers.{at}_{bits}" for name, (at, bits) in places(graph).items())


def places(graph: fx.GraphModule) -> dict[str, tuple[str, int]]:
    targets = {node.target: node.args[0].name for node in graph.graph.nodes if "quantizers" in str(node.target)}
    return {name: (targets[name], each.bits) for name, each in activation_quantizers(graph).items()}


def test_in_eight_bits_one_quantiser_serves_a_block_and_its_shortcut() -> None:
    found = standing(inserted(named("dfkd:resnet20", width=4), (8, 8)))
    assert ("relu", 8, ("layer1_0_conv1", "layer1_0_shortcut")) in found  # the identity
    assert len(found) == len({at for at, _, _ in found})
    # the input, the stem, in each block two tensors and its output, two padded shortcuts, the pooled
    assert len(found) == 1 + 1 + 9 * 3 + 2 + 1


class Two(nn.Module):
    """conv a -> `between` -> layer b."""

    def __init__(self, between: Callable[[Any, Tensor], Tensor], b: nn.Module) -> None:
        super().__init__()
        self.a, self.bn, self.between, self.b = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), between, b
        self.pool, self.flat, self.drop, self.c = nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self, x))


@pytest.mark.parametrize(
    ("between", "b", "wanted"),
    [
        (lambda m, x: F.relu(m.bn(m.a(x))), nn.Conv2d(4, 2, 1), {("relu", 4, ("b",))}),
        (lambda m, x: m.pool(m.a(x).relu()), nn.Conv2d(4, 2, 1), {("relu", 4, ("pool",))}),
        (lambda m, x: m.flat(m.pool(m.a(x).relu())), nn.Linear(16, 2), {("relu", 4, ("pool",))}),
        (lambda m, x: m.drop(m.flat(m.pool(m.a(x)))), nn.Linear(16, 2), {("a", 4, ("pool",))}),
        (lambda m, x: (y := m.a(x)).view(y.size(0), y.shape[1] * 16), nn.Linear(64, 2), {("a", 4, ("view",))}),
        (lambda m, x: m.a(x) + x, nn.Conv2d(4, 2, 1), {("x", 8, ("a", "add")), ("a", 8, ("add",)), ("add", 4, ("b",))}),
        (
            lambda m, x: torch.add(m.a(x), m.a.bias.view(1, 4, 1, 1)).relu(),
            nn.Conv2d(4, 2, 1),
            {("a", 8, ("add",)), ("relu", 4, ("b",))},
        ),
        (
            lambda m, x: torch.cat([y := m.pool(m.a(x)), m.c(y)], 1),
            nn.Conv2d(8, 2, 1),
            {("pool", 8, ("cat",)), ("pool", 4, ("c",)), ("c", 8, ("cat",)), ("cat", 4, ("b",))},
        ),
        (
            lambda m, x: F.adaptive_avg_pool2d(m.a(x), 1).flatten(1),
            nn.Linear(4, 2),
            {("a", 8, ("adaptive_avg_pool2d",)), ("adaptive_avg_pool2d", 4, ("flatten",))},
        ),
        (lambda m, x: m.a(x).mean((2, 3)), nn.Linear(4, 2), {("a", 8, ("mean",)), ("mean", 4, ("b",))}),
        (lambda m, x: m.a(x).mean(1, True) * x, nn.Conv2d(1, 2, 1), {("a", 8, ("mean",)), ("mul", 4, ("b",))}),
        (lambda m, x: m.a(x) + 1, nn.Conv2d(4, 2, 1), {("a", 8, ("add",)), ("add", 4, ("b",))}),
        (lambda m, x: F.gelu(m.bn(m.a(x))), nn.Conv2d(4, 2, 1), {("a", 8, ("gelu",)), ("gelu", 4, ("b",))}),
        (
            lambda m, x: F.silu(m.drop(m.bn(m.a(x)))),
            nn.Conv2d(4, 2, 1),
            {("a", 8, ("drop",)), ("sigmoid", 8, ("mul",)), ("mul", 4, ("b",))},
        ),
        (
            lambda m, x: (y := m.pool(m.a(x).relu())) * m.c(y).sigmoid(),
            nn.Conv2d(4, 2, 1),
            {("pool", 4, ("c",)), ("pool", 8, ("mul",)), ("c", 8, ("sigmoid",))}
            | {("sigmoid", 8, ("mul",)), ("mul", 4, ("b",))},
        ),
        (
            lambda m, x: F.gelu((y := m.a(x)).flatten(1)[:, : y.shape[1]]),
            nn.Linear(4, 2),
            {("a", 8, ("flatten",)), ("gelu", 4, ("b",))},
        ),
    ],
)
def test_quantisers_stand_where_a_tensor_meets_a_layer_or_another(
    between: Any, b: nn.Module, wanted: set[tuple[str, int, tuple[str, ...]]]
) -> None:
    graph = inserted(Two(between, b).eval(), (4, 4), ends=(4, 8), overrides={"b": [4, 4]})
    found = standing(graph)
    wanted = wanted if ("x", 8, ("a", "add")) in wanted else wanted | {("x", 8, ("a",))}
    get_attr = {each for each in found if each[0].endswith(("bias", "view"))}  # a constant may be rounded too
    assert found - get_attr == wanted
    calibrate(graph, [images(4, 1, 4, 4)])
    assert graph(images(4, 1, 4, 4)).isfinite().all()


@pytest.mark.parametrize("act", [nn.SiLU(inplace=True), F.silu, lambda x: F.silu(x, inplace=True)])
@torch.no_grad()
def test_silu_is_a_gates_product_and_computes_the_same(act: Any) -> None:
    layers = {"a": nn.Conv2d(1, 4, 3)} | ({"act": act} if isinstance(act, nn.Module) else {})
    network = Small(lambda m, x: getattr(m, "act", act)(m.a(x)).mean((2, 3)), **layers).double().eval()
    x = images(5, 1, 6, 6, dtype=torch.float64)
    graph = inserted(network, (8, 8))
    assert {at for at, _, _ in standing(graph)} == {"x", "a", "sigmoid", "mul"}
    graph.a.quantizer = nn.Identity()
    with without_quantizers(graph):
        same(graph(x), network(x))


@torch.no_grad()
def test_a_layer_norm_by_hand_keeps_its_variance() -> None:
    """In 8 bits that of a place that is nearly flat would be zero."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        deviation = x - x.mean(1, keepdim=True)
        return m.b(deviation / (deviation.square().mean(1, keepdim=True) + 1e-6).sqrt()).mean((2, 3))

    torch.manual_seed(0)
    network = Small(forward, a=nn.Conv2d(3, 16, 1, bias=False), b=nn.Conv2d(16, 4, 1)).eval()
    x = images(16, 3, 4, 4) * torch.logspace(0, -1, 16).view(16, 1, 1, 1)
    graph = prepare(network, (8, 8), [x], folded=True, per_channel=True)
    assert (graph(x) - network(x)).norm() < 0.04 * network(x).norm()


@torch.no_grad()
def test_numbers_and_weights_given_by_name_are_taken() -> None:
    """A weight of a sum (BiFPN's) is a tensor without axes."""

    def forward(m: Any, x: Tensor) -> Tensor:
        share = m.share.weight.flatten().softmax(0)
        x = m.norm(input=m.a(input=x))
        return m.b((share[0] + m.b.bias.sum()) * x + (share[1] + share[0])).mean((2, 3))

    layers = {"a": nn.Conv2d(1, 4, 3), "norm": nn.BatchNorm2d(4), "b": nn.Conv2d(4, 2, 1), "share": nn.Conv2d(1, 2, 1)}
    network, x = vary(Small(forward, **layers), low=0.5).eval(), images(8, 1, 6, 6)
    graph = prepare(network, (8, 8), [x], folded=True, per_channel=True)
    assert (graph(x) - network(x)).norm() < 0.05 * network(x).norm()


def test_layers_left_float_ask_for_no_quantiser() -> None:
    network = named("dfkd:tiny_plain", width=4)
    graph = inserted(network, (4, 4), ignore=["features.3", "linear"])
    assert type(graph.features.get_submodule("3")) is nn.Conv2d
    assert type(graph.linear) is nn.Linear
    assert isinstance(graph.features.get_submodule("0"), QuantizedConv2d)
    users = {user for _, _, served in standing(graph) for user in served}
    assert users == {"features_0", "features_6", "features_10", "features_13", "features_17", "pool"}


def test_quantisers_are_named_anew_where_the_tensors_makers_change() -> None:
    graph = trace(named("dfkd:resnet20", width=4))
    x = images(2, 1, 12, 12)
    insert(graph, layer_bits(graph, (4, 4)), per_channel=False)
    assert "quantizers.layer1_0_bn2_8" in activation_quantizers(graph)
    calibrate(graph, [x])
    fold(graph)
    out = graph(x)
    name_quantizers(graph)
    assert torch.equal(graph(x), out)
    other = inserted(named("dfkd:resnet20", width=4), (4, 4))
    assert set(activation_quantizers(graph)) == set(activation_quantizers(other))
    assert standing(graph) == standing(other)


def calibrated(network: nn.Module, x: Tensor, **options: Any) -> fx.GraphModule:
    settings = {"folded": True, "per_channel": True, **options}
    return prepare(network, (4, 4), [x[:8], x[8:]], **settings)


def test_calibration_finds_zero_and_step_of_every_tensor() -> None:
    x = images(16, 1, 8, 8) - 0.3
    graph = calibrated(functional(), x)
    inputs: dict[str, list[np.ndarray]] = {}
    handles = [
        each.register_forward_pre_hook(lambda _, given, name=name: inputs.setdefault(name, []).append(given[0].numpy()))
        for name, each in activation_quantizers(graph).items()
    ]
    with torch.no_grad(), without_quantizers(graph):
        graph(x)
    for handle in handles:
        handle.remove()
    assert len(inputs) == len(activation_quantizers(graph)) == 6
    zeros = set()
    for name, each in activation_quantizers(graph).items():
        values = np.concatenate([part.ravel() for part in inputs[name]]).astype(np.float64)
        assert (each.zero > 0) == bool(values.min() < 0)
        assert loss_of(values, each.scale.item(), each.bits, each.zero) <= 1.05 * searched(values, each.bits, each.zero)
        zeros.add(each.zero)
    assert len(zeros) > 2  # nothing below zero, as much as above, and between


def test_calibration_on_a_sample_meets_every_column_of_a_map() -> None:
    quantizer = nn.Sequential(ActivationQuantizer(4))
    x = torch.zeros(256, 1, 16, 16)
    # every sixteenth value is zero, and the rest has a long tail
    x[..., 1:] = -images(256, 1, 16, 15).clamp_min(1e-6).log()
    calibrate(quantizer, [x], sample=4096)
    whole = nn.Sequential(ActivationQuantizer(4))
    calibrate(whole, [x])
    assert quantizer[0].scale.item() == pytest.approx(whole[0].scale.item(), rel=0.25)
    assert whole[0].scale.item() < 0.65 * float(x.max()) / 15


class WithoutTokens(nn.Sequential):
    """Sets aside the tokens of a class, of which there are none, as timm's ViTs with rotary embeddings do."""

    def forward(self, x: Tensor) -> Tensor:
        x = self[0](x)
        return self[1](torch.cat([x[:, :0], x], dim=1))


def test_a_tensor_without_numbers_needs_no_range() -> None:
    network, x = WithoutTokens(nn.Linear(6, 8), nn.Linear(8, 3)).eval(), images(32, 6)
    graph = prepare(network, 8, [x], folded=True, per_channel=True)
    assert min(float(each.scale.detach()) for each in activation_quantizers(graph).values()) > 0
    torch.testing.assert_close(graph(x), network(x), rtol=0, atol=0.02)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_cannot_be_calibrated_on(bad: float) -> None:
    x = images(4, 1, 8, 8)
    x[2, 0, 3, 3] = bad
    with pytest.raises(UserError, match=r"^quantizers.*: no finite value to calibrate on"):
        calibrated(functional(), torch.cat([x, x, x]))
    with pytest.raises(UserError, match="no finite value"):
        calibrate(nn.Sequential(ActivationQuantizer(4)), [])


@pytest.mark.parametrize("per_channel", [False, True])
def test_layers_compute_with_as_many_levels_as_bits_allow(per_channel: bool) -> None:
    graph = calibrated(functional(), images(16, 1, 8, 8), per_channel=per_channel, overrides={"conv2": [2, 4]})
    seen = {}
    for name, layer in quantized_layers(graph).items():
        scale = layer.quantizer.scale.detach().double()
        codes = layer.quantizer.codes(layer.weight)
        assert codes.dtype == torch.int8
        assert len(scale) == (len(layer.weight) if per_channel else 1)
        grid = codes.double() * scale.view(-1, *[1] * (codes.dim() - 1))
        assert (layer.weight.double() - grid).abs().div(scale.view(-1, *[1] * (codes.dim() - 1))).median() <= 0.5
        seen[name] = len(codes.unique())
        x = images(2, layer.weight.shape[1], *[5] * (codes.dim() - 2), dtype=torch.float64)
        if isinstance(layer, QuantizedLinear):
            wanted = x @ grid.T + layer.bias.double()
        else:
            wanted = F.conv2d(x, grid, layer.bias.double(), padding=1)
        assert torch.allclose(layer(x.float()).double(), wanted, atol=1e-5)
    assert seen["conv2"] <= 4 < seen["conv3"] <= 16 < seen["head"]


def test_a_network_kept_unfolded_folds_to_the_same_with_positive_scales() -> None:
    x = images(16, 1, 8, 8)
    graph = calibrated(functional(), x, folded=False, per_channel=False)
    with torch.no_grad():
        graph.norm1.weight[0] = 0
        graph.norm2.weight[1] *= -1  # as training may
        out = graph(x)
        codes = {name: layer.quantizer.codes(layer.weight) for name, layer in quantized_layers(graph).items()}
        fold(graph)
        assert torch.allclose(graph(x), out, atol=1e-5)
    for name, layer in quantized_layers(graph).items():
        kept = layer.weight.detach().flatten(1).any(1)
        assert torch.equal(layer.quantizer.codes(layer.weight)[kept], codes[name][kept])
    assert not bool(graph.conv1.weight[0].any())
    assert len(graph.conv1.quantizer.scale) == 4
    assert len(graph.head.quantizer.scale) == 1
