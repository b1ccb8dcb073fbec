"""Learned rounding: against formulas in float64, against the best of all roundings, and on what it leaves behind."""

import copy
import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dfkd.compress.prepare import prepare
from dfkd.compress.quantizers import activation_quantizers, quantized_layers
from dfkd.compress.reconstruct import (
    Learner,
    SoftRounding,
    fisher_weights,
    float_copy,
    pieces,
    reconstruct,
    squared_error,
    undecided,
)
from dfkd.compress.units import extract, units
from dfkd.errors import UserError
from dfkd.models import build_model
from dfkd.runtime import rng


def draws(*shape: int, position: int = 0) -> Tensor:
    return torch.randn(shape, generator=rng("cpu", "test_reconstruct", position))


def images(count: int, side: int = 8, position: int = 0) -> Tensor:
    """Smooth images: neighbouring pixels go together, as in photographs."""
    return F.interpolate(draws(count, 3, 2, 2, position=position), side, mode="bilinear")


class Functional(nn.Module):
    """A residual block whose ReLUs are functions and whose input is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = (nn.Conv2d(i, 8, 3, padding=1) for i in (3, 8, 8))
        self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.norm(self.second(F.relu(self.first(x)))) + x)
        return self.head(x.mean((2, 3)))


class TwoHeads(Functional):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x = F.relu(self.stem(x))
        return self.first(x), self.second(x)


def network(kind: type[nn.Module] = Functional, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind().eval()


def prepared(model: nn.Module, bits: tuple[int, int] = (2, 4), count: int = 64, **options: Any) -> fx.GraphModule:
    return prepare(model, bits, [images(count)], folded=True, per_channel=True, **options)


@pytest.fixture(scope="module")
def rounded() -> fx.GraphModule:
    """Functional in 2 and 4 bits, its rounding learned; do not change it."""
    graph = prepared(network())
    reconstruct(graph, images(64), steps=30)
    return graph


def test_soft_rounding_and_its_regulariser_are_the_papers() -> None:
    layer: Any = quantized_layers(prepared(network(), (3, 8)))["first"]
    soft = SoftRounding(layer)
    scale = layer.quantizer.scale.detach().double().view(-1, 1, 1, 1)
    weight = layer.weight.detach().double()
    # At the start h is the fractional part: the float weight comes out, clipped to the range of 3 bits.
    torch.testing.assert_close(soft(layer.weight).double(), weight.clamp(-4 * scale, 3 * scale), rtol=1e-5, atol=1e-6)
    soft.alpha.data = draws(*weight.shape) * 3
    h = [min(max(1.2 / (1 + math.exp(-a)) - 0.1, 0.0), 1.0) for a in soft.alpha.flatten().tolist()]
    expected = torch.tensor(h, dtype=torch.float64).view_as(weight)
    assert expected.min() == 0
    assert expected.max() == 1
    torch.testing.assert_close(soft.h().double(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        soft(layer.weight).double(), scale * ((weight / scale).floor() + expected).clamp(-4, 3), rtol=1e-5, atol=1e-6
    )
    for beta in (20.0, 2.0, 5.5):
        by_hand = sum(1 - abs(2 * each - 1) ** beta for each in h)
        assert undecided(soft.h(), beta).item() == pytest.approx(by_hand, rel=1e-5)


def test_error_is_summed_over_channels_and_averaged_over_the_rest() -> None:
    out, target, weight = draws(3, 4, 2, 2), draws(3, 4, 2, 2, position=1), draws(3, 4, 2, 2, position=2).abs()
    by_hand = sum(
        weight[n, c, i, j].item() * (out[n, c, i, j] - target[n, c, i, j]).item() ** 2
        for n, c, i, j in itertools.product(range(3), range(4), range(2), range(2))
    )
    assert squared_error(out, target, weight).item() == pytest.approx(by_hand / 12, rel=1e-5)
    assert squared_error(out, out).item() == 0


def test_rounding_comes_close_to_the_best_of_all() -> None:
    inputs, outputs = 10, 12
    x = draws(256, 3) @ draws(3, inputs, position=1) + 0.3 * draws(256, inputs, position=2)
    model = nn.Sequential(nn.Linear(inputs, outputs))
    model[0].weight.data = draws(outputs, inputs, position=3)
    graph = prepare(model, (3, 8), [x], folded=True, per_channel=True, ends=(3, 8))
    layer: Any = quantized_layers(graph)["0"]
    weight, scale = layer.weight.detach().double(), layer.quantizer.scale.detach().double()[:, None]
    quantised = next(iter(activation_quantizers(graph).values()))(x).detach().double()
    reconstruct(graph, x, steps=500, lam=0.1, batch_size=128, drop=0.0, lr_scale=0.0)

    def error(roundings: Tensor) -> Tensor:
        """Mean squared error [12, R] of roundings [12, R, 10]."""
        wanted = (x.double() @ weight.T)[..., None]
        return (torch.einsum("ni,ori->nor", quantised, roundings) - wanted).square().mean(0)

    up = torch.tensor(list(itertools.product((0, 1), repeat=inputs)), dtype=torch.float64)  # [1024, 10]
    every = ((weight / scale).floor()[:, None] + up).clamp(-4, 3) * scale[:, None]
    best = error(every).amin(1).sum()
    nearest = error(((weight / scale).round().clamp(-4, 3) * scale)[:, None]).sum()
    found = error(layer.weight.detach().double()[:, None]).sum()
    assert best * (1 - 1e-6) <= found < nearest
    assert (nearest - found) / (nearest - best) > 0.7


def test_weights_end_on_the_grid_next_to_where_they_were() -> None:
    graph = prepared(network())
    before = {name: (layer.weight.clone(), layer.quantizer.scale.clone()) for name, layer in layers(graph)}
    reconstruct(graph, images(64), steps=30, lr_scale=0.0)
    moved = 0
    for name, layer in layers(graph):
        weight, scale = before[name]
        assert torch.equal(layer.quantizer.scale, scale)
        steps = layer.weight / layer.quantizer.step(layer.weight)
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-5)
        inside = (weight / layer.quantizer.step(weight)).clamp(layer.quantizer.low, layer.quantizer.high)
        assert (steps - inside).abs().max() < 1 + 1e-5
        moved += int((steps.round() != inside.round()).sum())
    assert moved > 0, "nothing was rounded otherwise than to nearest"


def layers(graph: fx.GraphModule) -> list[tuple[str, Any]]:
    return list(quantized_layers(graph).items())


def test_the_plain_quantiser_gives_the_learned_weights(rounded: fx.GraphModule) -> None:
    for _, layer in layers(rounded):
        assert torch.equal(layer.quantizer(layer.weight), layer.weight)
        assert torch.equal(layer.quantizer.codes(layer.weight) * layer.quantizer.step(layer.weight), layer.weight)


def test_graph_is_left_as_it_was_found(rounded: fx.GraphModule) -> None:
    fresh = prepared(network())
    assert rounded.code == fresh.code
    assert list(rounded.state_dict()) == list(fresh.state_dict())
    assert [type(m).__name__ for m in rounded.modules()] == [type(m).__name__ for m in fresh.modules()]
    assert all(quantizer.keep == 0 and quantizer.enabled for quantizer in activation_quantizers(rounded).values())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in rounded.parameters())
    assert [m.training for m in rounded.modules()] == [m.training for m in fresh.modules()]


@pytest.mark.parametrize("unit", ["block", "layer"])
@pytest.mark.parametrize("model", ["functional", "tiny_residual"])
def test_output_comes_closer_on_images_not_seen(unit: str, model: str) -> None:
    if model == "functional":
        plain = network()
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            plain = build_model("dfkd:tiny_residual", classes=4, channels=3, kwargs={"width": 4, "depth": 1}).eval()
    graph = prepared(plain)
    nearest, unseen = copy.deepcopy(graph), images(128, position=5)
    told: list[tuple[int, int]] = []
    figures = reconstruct(graph, images(64), unit=unit, steps=80, log=lambda done, of: told.append((done, of)))
    assert told == [(k + 1, len(told)) for k in range(len(told))] != []
    quantised, names = [name for name, _ in layers(graph)], [each["unit"] for each in figures]
    assert names == quantised if unit == "layer" else len(names) < len(quantised)
    with torch.no_grad():
        wanted = plain(unseen)
        before, after = ((net(unseen) - wanted).square().mean() for net in (nearest, graph))
    assert after < 0.75 * before
    assert figures[-1]["error_after"] < figures[-1]["error_before"]


@pytest.mark.parametrize("options", [{"steps": 0}, {"batch_size": 0}])
def test_a_reconstruction_of_nothing_is_refused(options: dict[str, int]) -> None:
    with pytest.raises(UserError, match=r"steps=.* and batch_size=.* are not allowed"):
        reconstruct(prepared(network()), images(64), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 2.5}, "steps=2.5 and batch_size=32 are not allowed; reconstruction takes whole numbers"),
        ({"warmup": 1.0}, "warmup from 0 to below 1, drop from 0 to 1, got 0.05, 0.001, 0.01, 1.0 and 0.5"),
        ({"drop": 2}, "0.2 and 2$"),
        ({"lr": -1}, "got -1, 0.001"),
        ({"lr_scale": -1}, "got 0.05, -1"),
        ({"lr": math.nan}, "got nan"),
        ({"beta": ("20", 2)}, r"beta=\('20', 2\) is"),
        ({"beta": 20}, "beta=20 is not allowed; give two exponents"),
    ],
)
def test_numbers_that_nothing_can_be_learned_with_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Learner(**options)


def test_figures_are_errors_against_the_float_network() -> None:
    plain, x = network(), images(64)
    graph = prepared(plain)
    figures = reconstruct(graph, x, steps=20)
    assert [each["unit"] for each in figures] == ["stem", "first to second", "head"]
    with torch.no_grad():
        wanted = plain(x).double()
        error = (graph(x).double() - wanted).square().sum() / wanted.square().sum()
    assert figures[-1]["error_after"] == pytest.approx(error.sqrt().item(), rel=1e-4)


def test_a_unit_that_gives_nothing_has_errors_that_are_numbers() -> None:
    plain = network()
    with torch.no_grad():
        for module in plain.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.bias.fill_(-100.0)  # nothing passes the ReLU
    figures = reconstruct(prepared(plain), images(64), steps=2)
    errors = [each[key] for each in figures if "skipped" not in each for key in ("error_before", "error_after")]
    assert errors
    assert all(math.isfinite(error) for error in errors)


def test_same_seed_same_bits_and_global_random_state_untouched() -> None:
    results = []
    for seed in (0, 0, 1):
        graph, state = prepared(network()), torch.get_rng_state()
        reconstruct(graph, images(64), steps=10, lr=0.1, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        results.append(torch.cat([p.detach().flatten() for p in graph.parameters()]))
        torch.rand(7)  # another state for the next one
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("keep", [0.5, 0.2])
def test_qdrop_leaves_that_share_of_the_values_float(keep: float) -> None:
    quantizer = next(iter(activation_quantizers(prepared(network())).values()))
    x = draws(40, 3, 16, 16)
    quantised = quantizer(x)
    quantizer.keep = keep
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mixed = quantizer(x)
    assert bool(((mixed == x) | (mixed == quantised)).all())
    share = (mixed == x)[x != quantised].double().mean().item()
    assert share == pytest.approx(keep, abs=5 * math.sqrt(keep * (1 - keep) / x.numel()))


def test_fisher_weights_are_those_of_autograd_on_the_rest_of_the_network() -> None:
    plain, x = network(), images(20)
    graph = prepared(plain)
    reference = float_copy(graph)
    node = next(node for node in reference.graph.nodes if node.name == "relu")  # behind the stem
    net: Any = copy.deepcopy(plain).double()
    with torch.no_grad():
        value = F.relu(net.stem(x.double())) + 0.3 * draws(20, 8, 8, 8).double()
        p = net(x.double()).softmax(1)
    value.requires_grad_()
    inner = F.relu(net.norm(net.second(F.relu(net.first(value)))) + value)
    q = net.head(inner.mean((2, 3))).softmax(1)
    g = torch.autograd.grad((p * (p.log() - q.log())).sum(), value)[0].abs()
    expected = (1 + g / g.mean()) ** 2
    expected /= expected.mean()
    found = fisher_weights(reference, x, node, value.detach().float())
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)
    assert expected.std() > 0.3


def test_fisher_weighting_changes_the_result_and_still_helps() -> None:
    plain, graph, x = network(), prepared(network()), images(64)
    nearest = copy.deepcopy(graph)
    reconstruct(graph, x, steps=30, fisher=True)
    with torch.no_grad():
        before, after = ((net(x) - plain(x)).square().mean() for net in (nearest, graph))
    assert after < 0.7 * before


def test_layers_to_ignore_keep_their_weights() -> None:
    plain: Any = network()
    graph = prepared(plain, ignore=["first", "head"])
    figures = reconstruct(graph, images(64), steps=10, lr=0.1)
    assert [each["unit"] for each in figures] == ["stem", "first to second"]
    for name in ("first", "head"):
        assert torch.equal(graph.get_submodule(name).weight, plain.get_submodule(name).weight)  # type: ignore[arg-type]


@pytest.mark.parametrize("unit", ["block", "layer"])
def test_layers_that_no_unit_holds_are_named_and_left(unit: str) -> None:
    graph = prepared(network(TwoHeads))
    before = {name: layer.weight.clone() for name, layer in layers(graph)}
    figures = reconstruct(graph, images(64), steps=10, lr=0.1, unit=unit)
    skipped = {each["unit"] for each in figures if "skipped" in each}
    assert skipped == {"first", "second"}
    assert all(torch.equal(layer.weight, before[name]) for name, layer in layers(graph) if name in skipped)


def test_autocast_reaches_the_convolutions() -> None:
    graph, seen = prepared(network()), set()
    convolution: Any = graph.get_submodule("first")
    handle = convolution.register_forward_hook(lambda module, given, out: seen.add(out.dtype))
    reconstruct(graph, images(64), steps=2, autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    handle.remove()
    assert torch.bfloat16 in seen
    assert all(parameter.dtype == torch.float32 for parameter in graph.parameters())


def test_too_few_images_name_both_numbers() -> None:
    with pytest.raises(UserError, match=r"10 images do not fill a batch of 32"):
        reconstruct(prepared(network()), images(10))


def test_unknown_unit_names_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"unknown unit 'net'; choose from \['block', 'layer'\]"):
        reconstruct(prepared(network()), images(64), unit="net")


def test_a_loss_that_is_not_finite_names_the_unit_and_leaves_it() -> None:
    graph = prepared(network())
    before = {name: layer.weight.clone() for name, layer in layers(graph)}
    x = images(64)
    x[:, 0, 0, 0] = math.nan
    with pytest.raises(UserError, match=r"stem: the reconstruction loss became nan"):
        reconstruct(graph, x, steps=3)
    assert all(torch.equal(layer.weight, before[name]) for name, layer in layers(graph))
    assert all(quantizer.keep == 0 for quantizer in activation_quantizers(graph).values())


def learned(x_float: Tensor, x: Tensor, **options: Any) -> tuple[fx.GraphModule, list[Tensor]]:
    """The residual block of Functional in 2 and 4 bits, learned for what it never gave; what it was shown."""
    graph, seen = prepared(network()), []
    (block,) = [unit for unit in units(graph) if unit.name == "first to second"]
    part, _, _ = extract(graph, block.nodes, block.name)
    part.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    target = draws(64, 8, position=3)  # of the means behind it
    Learner(batch_size=16, **options).learn(part, block.name, x_float, x, target, None)
    return part, seen


@pytest.mark.parametrize(("drop", "share"), [(0.0, 0.0), (0.2, 0.2), (1.0, 1.0)])
def test_qdrop_takes_that_share_of_a_units_input_from_the_float_network(drop: float, share: float) -> None:
    _, seen = learned(torch.ones(64, 8, 8, 8), torch.zeros(64, 8, 8, 8), steps=2, drop=drop)
    assert float(torch.stack(seen).mean()) == pytest.approx(share, abs=0.02)


def test_every_step_learns_on_other_images() -> None:
    x = torch.arange(64.0).view(64, 1, 1, 1).expand(64, 8, 8, 8)
    _, seen = learned(x, x, steps=30, drop=0.0)
    rows = torch.stack([each[:, 0, 0, 0] for each in seen]).long()
    assert all(len(set(each.tolist())) == 16 for each in rows)
    assert len(rows.unique()) == 64


def test_a_step_moves_a_scale_by_a_share_of_its_size() -> None:
    """Adam's first step is its rate."""
    before = prepared(network())
    part, _ = learned(*[draws(64, 8, 8, 8).relu()] * 2, steps=1, drop=0.0, lr_scale=1e-2)
    for kinds in (activation_quantizers, quantized_layers):
        for name, each in kinds(part).items():
            was = kinds(before)[name]
            now, was = (getattr(one, "quantizer", one).scale for one in (each, was))
            torch.testing.assert_close((now / was - 1).abs(), torch.full_like(now, 1e-2), rtol=1e-3, atol=0)


def test_a_piece_is_a_layer_with_its_quantiser_its_norm_and_its_relu() -> None:
    graph = prepared(network())
    (block,) = [unit for unit in units(graph) if unit.name == "first to second"]
    found = [
        [str(node.target) if node.op == "call_module" else node.name for node in piece.nodes]
        for piece in pieces(graph, block)
    ]
    assert [names[-1] for names in found] == ["relu_1", "second"]


def test_a_loss_that_is_not_finite_leaves_every_step() -> None:
    graph = prepared(network())
    (block,) = [unit for unit in units(graph) if unit.name == "first to second"]
    part, _, _ = extract(graph, block.nodes, block.name)
    before = {name: value.clone() for name, value in part.state_dict().items()}
    x = draws(64, 8, 8, 8).relu()
    with pytest.raises(UserError, match="the reconstruction loss became nan"):
        Learner(batch_size=16, steps=3).learn(part, block.name, x, x, draws(64, 8) * torch.nan, None)
    assert len(activation_quantizers(part)) > 1
    assert all(torch.equal(value, before[name]) for name, value in part.state_dict().items())


def test_what_is_zero_is_not_rounded_up() -> None:
    layer: Any = quantized_layers(prepared(network()))["first"]
    layer.weight.data[0] = 0
    soft = SoftRounding(layer)
    soft.alpha.data.fill_(5.0)  # up
    soft.harden(layer)
    assert not layer.weight[0].any()
    assert layer.weight[1:].any()
