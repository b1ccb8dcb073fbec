"""`quantize` by rounding and by training: what must stay, what must come nearer, what is told of it."""

import copy
import math
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks_fixture import Small, functional, images, named, vary
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dfkd.classifier import Classifier
from dfkd.compress.closed_form import closed_form
from dfkd.compress.graph import fold, network_of
from dfkd.compress.prune import prune
from dfkd.compress.qat import Training
from dfkd.compress.quantize import quantize
from dfkd.compress.quantizers import activation_quantizers, quantized_layers
from dfkd.compress.result import Compressed
from dfkd.compress.tracing import trace
from dfkd.errors import UserError
from dfkd.stream import SyntheticStream, from_noise
from dfkd.teachers import Teacher, batch_norms


def smooth(count: int, seed: int) -> Tensor:
    """Images whose means differ, so that logits do."""
    return nn.functional.interpolate(images(count, 1, 2, 2, seed=seed), 8, mode="bilinear")


STREAM = [smooth(16, seed) for seed in range(6)]
X = smooth(64, 99)


@cache
def learned() -> Classifier:
    """A residual network trained to name the brightest of three corners, with a normalisation."""
    network = named("dfkd:tiny_residual", width=4).train()
    wrapped = Classifier(network, name="tiny", mean=[0.4], std=[0.3], input_size=8).train()
    sgd = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    for step in range(60):
        x = smooth(32, 1000 + step)
        loss = nn.functional.cross_entropy(wrapped(x), brightest(x))
        sgd.zero_grad()
        loss.backward()
        sgd.step()
    sgd.zero_grad()
    return wrapped.eval()


def brightest(x: Tensor) -> Tensor:
    return torch.stack([x[:, 0, 0, 0], x[:, 0, 0, -1], x[:, 0, -1, 0]], 1).argmax(1)


def model(low: float | None = None) -> Classifier:
    """A copy of it; with `low`, batch norms of scales from there on."""
    given = copy.deepcopy(learned())
    if low is not None:
        vary(given, low=low)
    return given


def trained(given: nn.Module, bits: Any = (4, 4), **options: Any) -> Compressed:
    settings = {"steps": 3, "images": 32, "warm_start": 3, "warmup": 0, **options}
    return quantize(given, STREAM, bits, method="train", **settings)


@torch.no_grad()
def distance(found: nn.Module, wanted: nn.Module) -> float:
    """Mean square of the difference of logits over that of the logits, on images not in the stream."""
    logits = wanted(X)
    return float((found(X) - logits).square().mean() / logits.square().mean())


@pytest.mark.parametrize("method", ["nearest", "train"])
def test_the_given_model_stays_bitwise(method: str) -> None:
    given = model().train()
    before, modes = copy.deepcopy(given.state_dict()), [part.training for part in given.modules()]
    options = {"steps": 2, "warm_start": 2} if method == "train" else {}
    quantize(given, STREAM, (4, 4), method=method, images=32, **options)
    assert list(given.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in given.state_dict().items())
    assert [part.training for part in given.modules()] == modes
    assert all(p.requires_grad and p.grad is None for p in given.parameters())


@pytest.mark.parametrize("method", ["nearest", "train"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_what_comes_back_takes_what_was_given(method: str, wrapped: bool) -> None:
    given = model() if wrapped else functional()
    options = {"steps": 1, "warm_start": 2} if method == "train" else {}
    done = quantize(given, STREAM, 8, method=method, images=32, **options)
    for each in (done.model, done.naive):
        assert isinstance(each, Classifier) == wrapped
        assert not each.training
        assert not any(module.training for module in quantized_layers(each).values())
        assert each(X).shape == (64, 3)
        assert distance(each, given) < 0.01
    if wrapped:
        assert done.model.normalisation == ([0.4], [0.3])
        assert done.model.input_size == 8
        assert torch.equal(done.model(images(2, 1, 16, 16)), done.model(done_resized(given, images(2, 1, 16, 16))))


def done_resized(given: nn.Module, x: Tensor) -> Tensor:
    mean, std = 0.4, 0.3
    return given.network_input(x) * std + mean


@pytest.mark.parametrize("low", [0.5, -0.5], ids=["positive scales", "negative scales"])
def test_the_folded_result_is_the_network_that_was_trained(low: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dfkd.compress.result.round_biases", lambda graph: None)  # which flips a code here and there
    training = Training(model(low), STREAM, (4, 4), images=32, steps=3, warmup=0, warm_start=2)
    network: Any = network_of(training.student)
    norm = next(iter(batch_norms(network).values()))
    with torch.no_grad():
        norm.weight[0] = 0  # a channel that is nothing but its shift
    training.fit.run()
    with torch.no_grad():
        norm.weight[0] = 0
        wanted = copy.deepcopy(training.student).eval()(X)
    done = training.result()
    assert torch.allclose(done.model(X), wanted, atol=1e-5)
    assert not batch_norms(network_of(done.model))
    assert not any("hint" in name for name, _ in done.model.named_modules())
    assert distance(done.model, done.naive) > 0


def test_training_comes_nearer_to_the_float_model_than_rounding() -> None:
    given = model()
    training = Training(given, STREAM, (2, 4), images=96, warm_start=0, steps=60, lr=0.01, warmup=0)
    losses = [float(training.fit.step(step)["loss"]) for step in range(60)]
    done = training.result()
    assert sum(losses[-10:]) < 0.4 * sum(losses[:10])
    assert distance(done.model, given) < 0.2 * distance(done.naive, given)
    agree = [float((each(X).argmax(1) == given(X).argmax(1)).float().mean()) for each in (done.model, done.naive)]
    assert agree[0] > agree[1]
    assert math.isfinite(sum(losses))


def test_every_weight_and_step_learns_and_no_statistic_does() -> None:
    training = Training(model(), STREAM, (4, 4), images=32, steps=1, warmup=0, warm_start=2)
    network: Any = network_of(training.student)
    norms = batch_norms(network)
    before = copy.deepcopy(network.state_dict())
    assert len(norms) == 9
    assert not any(norm.training for norm in norms.values())
    training.fit.run()
    for name, norm in norms.items():
        assert torch.equal(norm.running_mean, before[f"{name}.running_mean"])
        assert torch.equal(norm.running_var, before[f"{name}.running_var"])
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        # What stands still has no gradient, or one whose step (1.9e-3 of it, by Nesterov) float32 cannot add.
        lost = 1.9e-3 * parameter.grad.abs() <= torch.finfo(torch.float32).eps * parameter.detach().abs()
        assert not torch.equal(parameter, before[name]) or lost.all(), name
    assert sum(bool(each.scale.grad.any()) for each in activation_quantizers(network).values()) > 8
    decaying, free = training.fit.optimizer.param_groups
    scales = {id(p) for name, p in network.named_parameters() if name.endswith("scale")}
    assert scales <= {id(p) for p in free["params"]}
    assert free["weight_decay"] == 0 < decaying["weight_decay"]


def test_hints_are_what_the_float_networks_units_give() -> None:
    training = Training(model(), STREAM, (4, 4), images=32, steps=1, warm_start=0, hints=0.5)
    hints = training.fit.hints
    assert hints is not None
    assert hints.weight == 0.5
    assert len(hints.pairs) == 4  # the stem and three blocks
    assert all(ours == theirs for ours, theirs in hints.pairs)
    assert Training(model(), STREAM, (4, 4), images=32, steps=1, warm_start=0, hints=0.0).fit.hints is None


@pytest.mark.parametrize("features", [False, True])
def test_a_synthetic_stream_keeps_its_own_teachers(features: bool) -> None:
    """Also one whose targets hold the features of another teacher than what is quantised."""
    teachers = [Teacher(named("dfkd:tiny_residual", width=8))] if features else []
    stream = SyntheticStream(from_noise(1, 8, 3), batch_size=8, num_batches=8, teacher=teachers, features=features)
    done = quantize(model(), stream, (4, 4), method="train", images=16, steps=2, warm_start=2)
    assert stream.teachers == teachers
    assert len(stream.widths) == len(teachers)
    assert done.model(X).isfinite().all()


@pytest.mark.parametrize("per_layer", [(8, 8), (3, 5)])
def test_a_layers_figures_are_those_of_its_own_output(per_layer: tuple[int, int]) -> None:
    given = model()
    done = quantize(given, STREAM, per_layer, method="nearest", images=16, overrides={"features.4.*": [2, 6]})
    names = [name for name, each in given.model.named_modules() if isinstance(each, nn.Conv2d | nn.Linear)]
    assert [line["layer"] for line in done.layers] == names
    assert {line["layer"]: (line["weight_bits"], line["activation_bits"]) for line in done.layers} == {
        name: (8, 8) if name in (names[0], names[-1]) else (2, 6) if "features.4" in name else per_layer
        for name in names
    }
    x = (STREAM[0] - 0.4) / 0.3
    floats, codes = fold(trace(given.model)), network_of(done.model)
    outputs: dict[str, list[Tensor]] = {name: [] for name in names}
    for network in (floats, codes):
        for name in names:
            network.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: outputs[name].append(out))
        with torch.no_grad():
            network(x)
    for line in done.layers:
        wanted, found = (each.double() for each in outputs[line["layer"]])
        ratio = float(wanted.square().sum() / (found - wanted).square().sum())
        assert line["sqnr_db"] == pytest.approx(10 * math.log10(ratio), abs=0.02)
    if per_layer == (8, 8):
        assert done.layers[0]["sqnr_db"] > 30


def test_eight_bits_are_nearly_the_float_model_and_fewer_are_further() -> None:
    given = model()
    far = [distance(quantize(given, STREAM, bits, method="nearest", images=96).model, given) for bits in (8, 4, 2)]
    assert far[0] < 1e-3
    assert far == sorted(far)
    lines = quantize(given, STREAM, 8, method="nearest", images=96).layers
    assert all(line["sqnr_db"] > 25 for line in lines)


def test_bits_may_be_one_number_or_a_pair() -> None:
    def chosen(bits: Any) -> set[tuple[int, int]]:
        done = quantize(model(), STREAM, bits, method="nearest", images=16, ends=bits if bits != 5 else (5, 5))
        return {(line["weight_bits"], line["activation_bits"]) for line in done.layers}

    assert chosen(5) == {(5, 5)}
    assert chosen([3, 6]) == {(3, 6)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "round"}, "method='round' is unknown; choose from nearest, reconstruct, train"),
        ({"bits": 9, "method": "nearest"}, "bits 9 are not allowed"),
        ({"bits": 4.0, "method": "nearest"}, "bits 4.0 are not allowed"),
        ({"bits": (), "method": "nearest"}, r"bits \(\) are not allowed"),
        ({"bits": [8, 4, 2], "method": "nearest"}, r"bits \[8, 4, 2\] are not allowed"),
        ({"ends": 1, "method": "nearest"}, r"features\.0: bits 1 are not allowed"),
        (
            {"images": 0, "method": "nearest"},
            "images=0 is not allowed; give a whole number of images of the stream, 1 or more",
        ),
        ({"bits": 1, "method": "train"}, "bits 1 are not allowed"),
        ({"method": "nearest", "images": 97}, "ended after 96 images where 97 are needed"),
        ({"method": "train", "images": 97}, "ended after 96 images where 97 are needed"),
        ({"method": "train", "steps": 0.5}, "steps=0.5 is not allowed; training takes a whole number of updates"),
        (
            {"method": "train", "lr": -1.0},
            "training takes lr and weight_decay of 0 or more and a temperature above 0, got",
        ),
        ({"method": "train", "weight_decay": -1.0}, "got None, -1.0 and 3.0"),
        ({"method": "train", "temperature": 0.0}, "got None, 0.0001 and 0.0"),
        ({"method": "nearest", "images": 16.5}, "images=16.5 is not allowed; give a whole number"),
        ({"method": "nearest", "overrides": [4, 4]}, r"overrides=\[4, 4\] is not allowed; give bits by name pattern"),
        ({"method": "nearest", "overrides": {"conv9": [4, 4]}}, "the override 'conv9' matches no layer"),
        ({"method": "train", "ignore": ["conv9"]}, "the ignore pattern 'conv9' matches no layer"),
        ({"ignore": "conv9"}, r"ignore='conv9' is one text; give a list of patterns, \['conv9'\]"),
        ({"method": "layer"}, "choose from nearest, reconstruct, train, here 'reconstruct' with unit='layer'"),
        ({"method": "nearest", "steps": 5}, "method='nearest' takes no steps"),
    ],
)
def test_what_cannot_be_done_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        quantize(model(), STREAM, **{"images": 16, **options})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", ["nearest", "train"])
def test_bytes_are_255ths_of_an_image(method: str) -> None:
    torch.manual_seed(0)
    whole = [torch.randint(256, (16, *STREAM[0].shape[1:]), dtype=torch.uint8) for _ in range(2)]
    options = {"steps": 1, "warm_start": 1} if method == "train" else {}
    done = [
        quantize(model(), images, 8, method=method, images=32, **options).model(STREAM[0])
        for images in (whole, [each.float() / 255 for each in whole])
    ]
    assert torch.equal(*done)


def test_networks_that_do_not_take_the_images_or_are_quantised_already_are_refused() -> None:
    with pytest.raises(UserError, match=r"does not take images \[2, .* in torch.float32: .*the network in float32"):
        quantize(model().bfloat16(), STREAM, 8, images=16)
    done = quantize(model(), STREAM, 8, method="nearest", images=16)
    for again in (
        lambda: quantize(done.model, STREAM, 8, images=16),
        lambda: quantize(done.model, STREAM, 8, images=16, method="train", steps=1),
        lambda: prune(done.model, STREAM, images=16),
        lambda: prune(done.model, STREAM, images=16, kind="weights"),
        lambda: closed_form(done.model, 0.5),
    ):
        with pytest.raises(UserError, match="the network is quantised already; give the float one"):
            again()


@pytest.mark.parametrize("compress", [quantize, prune, closed_form])
def test_a_network_that_holds_nan_is_refused_by_all_that_compresses(compress: Any) -> None:
    broken = copy.deepcopy(network_of(model()))
    next(p for p in broken.parameters() if p.dim() == 4).data[0] = math.nan
    given = {quantize: (STREAM, 8), prune: (STREAM, 0.3), closed_form: (0.3,)}[compress]
    with pytest.raises(
        UserError, match=r"^features\.0\.weight of the network holds NaN or infinity; load its checkpoint"
    ):
        compress(broken, *given)


def test_a_network_in_double_precision_is_trained_in_it() -> None:
    torch.manual_seed(0)
    double = [images.double() for images in STREAM]
    done = quantize(network_of(model()).double(), double, 8, method="train", images=16, warm_start=1, steps=1)
    assert done.model(double[0]).dtype == torch.float64


def test_a_stream_that_cannot_be_begun_again_is_refused() -> None:
    with pytest.raises(UserError, match=r"no batch for update 0: .* one that can be gone through again"):
        quantize(model(), iter(STREAM), 8, method="train", images=96, steps=1)


def test_a_result_may_be_taken_while_it_trains() -> None:
    options: dict[str, Any] = {"images": 32, "warm_start": 0, "steps": 4}
    looked, whole = (Training(model(), STREAM, 4, **options) for _ in range(2))
    results: list[Tensor] = []
    for step in range(4):
        looked.fit.step(step)
        results = [looked.result().model(X), *results]
    whole.fit.run()
    assert torch.equal(results[0], whole.result().model(X))
    assert not torch.equal(results[0], results[1])


@pytest.mark.parametrize("warm_start", [-1, 1.5])
def test_a_warm_start_is_a_whole_number(warm_start: Any) -> None:
    with pytest.raises(UserError, match=f"warm_start={warm_start} is not allowed"):
        Training(model(), STREAM, 4, images=32, warm_start=warm_start)


def test_a_state_brings_its_zeros_and_is_of_the_same_bits() -> None:
    given, wider, brighter = (
        quantize(model().model, [x + shift for x in STREAM], bits, method="nearest", images=32).model
        for bits, shift in (((4, 4), 0.0), ((8, 4), 0.0), ((4, 4), 9.0))
    )
    state, wanted = given.state_dict(), given(X)
    with pytest.raises(UserError, match=r"a quantiser of the state has 4 bits, that of the network 8: .* same bits"):
        wider.load_state_dict(state)
    assert not torch.equal(brighter(X), wanted)
    brighter.load_state_dict(state)
    assert torch.equal(brighter(X), wanted)


@pytest.mark.parametrize("told", [True, False], ids=["a sign", "neither"])
def test_a_state_from_before_tensors_had_zeros_loads(told: bool) -> None:
    given, again = (quantize(model().model, STREAM, (4, 4), method="nearest", images=32).model for _ in range(2))
    for each in activation_quantizers(given).values():
        each.zero = 2 ** (each.bits - 1) if each.zero else 0
    state = given.state_dict()
    for key in [key for key in state if key.endswith("_extra_state")]:
        bits, least, _ = state[key].tolist()
        state[key] = torch.tensor([bits, int(least < 0)])
        if not told:
            del state[key]
    again.load_state_dict(state)
    assert torch.equal(again(X), given(X))


def test_an_option_that_training_does_not_have_is_an_error() -> None:
    with pytest.raises(UserError, match="takes no epochs"):
        trained(model(), epochs=3)


def test_biases_are_whole_steps_of_input_times_weights_in_eight_bits() -> None:
    done = quantize(model(0.5), STREAM, (4, 3), method="nearest", images=32)
    network: Any = network_of(done.model)
    steps = {
        str(node.target): network.get_submodule(str(node.args[0].target))
        for node in network.graph.nodes
        if node.op == "call_module"
        and node.target in quantized_layers(network)
        and "quantizers" in str(node.args[0].target)
    }
    assert len(steps) >= 5
    for name, source in steps.items():
        layer: Any = network.get_submodule(name)
        unit = (source.scale * layer.quantizer.scale).detach().double() / 2 ** (8 - layer.quantizer.bits)
        units = layer.bias.detach().double() / unit
        assert (units - units.round()).abs().max() < 1e-2 * max(1.0, float(units.abs().max()) * 1e-4)


def test_a_frozen_teacher_is_trained_too_and_what_was_pruned_stays_so() -> None:
    network = network_of(model(0.5))
    with torch.no_grad():
        first = next(module for module in network.modules() if isinstance(module, nn.Conv2d) and module.in_channels > 1)
        first.weight[first.weight.abs() < first.weight.abs().median()] = 0
    name = next(name for name, module in network.named_modules() if module is first)
    given = Teacher(network)
    training = Training(given, STREAM, (4, 4), images=32, warm_start=3, steps=5, lr=0.01)
    student: Any = network_of(training.student)
    before = {key: value.detach().clone() for key, value in student.named_parameters()}
    training.fit.run()
    moved = {key for key, value in student.named_parameters() if not torch.equal(value, before[key])}
    assert {key for key in moved if key.endswith("weight")} == {key for key in before if key.endswith("weight")}
    assert ((student.get_submodule(name).weight == 0) >= (first.weight == 0)).all()
    assert not any(parameter.requires_grad for parameter in given.parameters())


class Scaled(nn.Module):
    """A network with a number of its own that is called as quantisers call theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.tensor(-1.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).mean((2, 3)) * self.scale)


def test_training_keeps_steps_above_zero_and_lets_a_networks_own_scale_be() -> None:
    torch.manual_seed(0)
    training = Training(Scaled().eval(), STREAM, 4, images=32, warm_start=0, steps=3, lr=1e-5)
    student: Any = network_of(training.student)
    with torch.no_grad():
        student.norm.weight[0] = -0.5  # as a training that goes too far may have it
        student.conv.quantizer.scale.neg_()
    training.fit.run()
    assert student.scale.item() == pytest.approx(-1, abs=0.01)
    assert bool((student.norm.weight >= 0).all())
    folded = network_of(training.result().model)
    assert all(bool((layer.quantizer.scale > 0).all()) for layer in quantized_layers(folded).values())


def test_with_many_bits_the_rate_is_a_tenth() -> None:
    """LSQ, section 3: 0.01 for 2 to 4 bits, 0.001 for 8."""
    for bits, overrides, rate in ((8, {}, 0.001), (8, {"*conv2": (8, 4)}, 0.01), ((2, 8), {}, 0.01), (4, {}, 0.01)):
        training = Training(model(), STREAM, bits, overrides=overrides, steps=3, images=32, warm_start=0)
        assert training.fit.rates == [rate, rate]
    training = Training(model(), STREAM, 8, steps=3, images=32, warm_start=0, lr=0.5)
    assert training.fit.rates == [0.5, 0.5]


def tokens(m: Any, x: Tensor) -> Tensor:
    """Tokens along the first axis, as torch's own attention takes them."""
    return m.head(m.b(m.a(m.conv(x).flatten(2).permute(2, 0, 1)).relu()).mean(0))


def parts_of(m: Any, x: Tensor) -> Tensor:
    """Every part of an image through one network."""
    parts = x.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(-1, 1, 4, 4)
    return m.head(m.b(m.a(m.conv(parts).mean((2, 3))).relu()).view(-1, 16, 4).mean(1))


def checked(m: Any, x: Tensor) -> Tensor:
    """Sizes are looked at between layers, and nothing comes of it."""
    made = m.conv(x)
    _, channels, _, _ = made.shape
    torch._assert(channels == 4, "four")
    return m.head(m.b(m.a(made.mean((2, 3))).relu()))


def gained(m: Any, x: Tensor) -> Tensor:
    """What a layer in few bits takes goes into a product too, which is computed in float."""
    x = m.norm(m.stem(x)).relu()
    return m.head((0.8 * x + m.after(m.conv(x))).relu().mean((2, 3)))


def resized(m: Any, x: Tensor) -> Tensor:
    """... or into an interpolation."""
    x = m.norm(m.stem(x)).relu()
    small = F.interpolate(x, scale_factor=0.5, mode="bilinear", align_corners=False)
    return m.head((small + F.max_pool2d(m.after(m.conv(x)).relu(), 2)).mean((2, 3)))


def normed(m: Any, x: Tensor) -> Tensor:
    """A batch norm behind a linear layer, whose input is quantised behind a mean."""
    x = m.after(m.conv(m.norm(m.stem(x)).relu())).relu()
    return m.head(m.rows(m.wide(x.mean((2, 3)))).relu())


def squeezed(m: Any, x: Tensor) -> Tensor:
    """... or between a pooling and what takes its axes away."""
    x = m.after(m.conv(m.norm(m.stem(x)).relu())).relu()
    return m.head(m.rows(m.wide(F.adaptive_avg_pool2d(x, 1).squeeze(-1).squeeze(-1))).relu())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("forward", [gained, resized, normed, squeezed])
def test_quantisers_stand_where_those_of_rounding_do_and_every_norm_is_folded(forward: Any, bits: int) -> None:
    """With them dfkd.compress.files builds the network again, whichever way it was quantised."""
    layers: dict[str, nn.Module] = {"stem": nn.Conv2d(1, 4, 3, padding=1), "norm": nn.BatchNorm2d(4)}
    layers |= {"conv": nn.Conv2d(4, 4, 3, padding=1, bias=False), "after": nn.BatchNorm2d(4)}
    layers |= {"wide": nn.Linear(4, 4), "rows": nn.BatchNorm1d(4)} if forward in (normed, squeezed) else {}
    network = vary(Small(forward, **layers, head=nn.Linear(4, 3)).eval())
    made = [
        quantize(network, [images(32, 1, 8, 8)], bits, method=method, images=32, **more).model
        for method, more in (("nearest", {}), ("train", {"steps": 2, "warm_start": 2}))
    ]
    rounded, learned = ({name: each.bits for name, each in activation_quantizers(m).items()} for m in made)
    assert rounded == learned
    assert made[0].state_dict().keys() == made[1].state_dict().keys()
    assert not any(isinstance(module, _BatchNorm) for module in made[1].modules())


@pytest.mark.parametrize("method", ["nearest", "reconstruct", "train"])
@pytest.mark.parametrize("forward", [tokens, parts_of, checked])
def test_networks_whose_batch_is_not_the_first_axis_or_that_check_sizes(forward: Any, method: Any) -> None:
    torch.manual_seed(0)
    layers: dict[str, nn.Module] = {"conv": nn.Conv2d(1, 4, 2, 2), "head": nn.Linear(4, 3)}
    network = Small(forward, **layers, a=nn.Linear(4, 4), b=nn.Linear(4, 4)).eval()
    x, more = images(64, 1, 16, 16), {} if method == "nearest" else {"steps": 2}  # as many images as tokens
    done = quantize(network, [x], 8, method=method, images=64, **more)
    with torch.no_grad():
        assert (done.model(x) - network(x)).norm() < 0.05 * network(x).norm()
    left = {line["layer"] for line in done.layers if "note" in line}
    assert left == ({"conv", "a", "b", "head"} if method == "reconstruct" and forward is not checked else set())


@pytest.mark.parametrize("extra", [None, 3, torch.tensor([1])], ids=["none", "number", "integers"])
def test_what_a_network_gives_beside_its_logits_is_let_be(extra: Any) -> None:
    layers = {"a": nn.Conv2d(1, 8, 3), "b": nn.Conv2d(8, 4, 3), "c": nn.Linear(4, 2)}
    network = Small(lambda m, x: {"logits": m.c(m.b(m.a(x).relu()).mean((2, 3))), "extra": extra}, **layers).eval()
    x = images(64, 1, 8, 8)
    done = quantize(network, [x], 8, method="reconstruct", images=64, steps=2)
    smaller = prune(network, [x], ratio=0.5, images=64)
    with torch.no_grad():
        wanted = network(x)["logits"]
        assert (done.model(x)["logits"] - wanted).norm() < 0.05 * wanted.norm()
    assert smaller.model.get_submodule("a").weight.shape == (4, 1, 3, 3)
    units = [line for line in done.layers if "error_after" in line]
    assert units
    assert all(0 < line["error_after"] < 0.1 for line in units)


@pytest.mark.parametrize("options", [{"method": "train"}, {"fisher": True}])
def test_two_heads_have_no_logits_to_compare(options: dict[str, Any]) -> None:
    layers = {"a": nn.Conv2d(1, 4, 3), "b": nn.Linear(4, 2), "c": nn.Linear(4, 3)}
    network = Small(lambda m, x: (m.b(y := m.a(x).mean((2, 3))), m.c(y)), **layers)
    with pytest.raises(UserError, match=r"^Small gives a tuple, not logits.*'reconstruct' without fisher"):
        quantize(network, [images(32, 1, 6, 6)], 8, images=32, **options)
    quantize(network, [images(32, 1, 6, 6)], 8, images=32, steps=1)


def test_a_network_of_one_unit_is_trained_without_what_lies_between_units() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 4), nn.Flatten()).eval()
    done = quantize(net, [torch.rand(8, 3, 4, 4)] * 4, 8, method="train", images=16, steps=2, warm_start=0)
    assert [line["layer"] for line in done.layers] == ["0"]


def test_what_training_is_asked_for_is_what_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(
        "dfkd.compress.qat.reconstruct", lambda graph, images, **options: asked.update(options, images=images)
    )
    given, own = model(), [smooth(16, seed) for seed in (50, 51)]
    options: dict[str, Any] = {"steps": 9, "weight_decay": 0.3, "warmup": 4, "temperature": 7.0, "seed": 11}
    training = Training(
        given, STREAM, 4, calibration=own, images=32, ends=(3, 5), ignore=["features.4.*"], warm_start=6, **options
    )
    fit = training.fit
    assert (fit.steps, fit.warmup, fit.temperature, fit.clip) == (9, 4, 7.0, 5.0)
    assert [group["weight_decay"] for group in fit.optimizer.param_groups] == [0.3, 0.0]
    assert (asked["seed"], asked["steps"]) == (11, 6)
    assert torch.equal(asked["images"], (torch.cat(own) - 0.4) / 0.3)
    larger = images(2, 1, 16, 16)  # which the model resizes
    assert torch.allclose(fit.stream.teachers[0](larger), given(larger), atol=1e-5)
    bits = network_of(training.student).meta["bits"]
    layers = [name for name, each in given.model.named_modules() if isinstance(each, nn.Conv2d | nn.Linear)]
    names = [name for name in layers if not name.startswith("features.4")]
    assert bits == {name: (3, 5) if name in (names[0], "linear") else (4, 4) for name in names}
    assert training.naive.meta["bits"] == bits
    assert all(len(layer.quantizer.scale) == len(layer.weight) for layer in quantized_layers(training.naive).values())


def test_what_is_replayed_has_the_targets_of_what_is_quantised() -> None:
    """Calibration goes through the same stream, whose ring then holds those of its own teacher."""
    given, teacher = model(), Teacher(named("dfkd:tiny_plain", width=4))
    stream = SyntheticStream(from_noise(1, 8, 3), batch_size=8, replay=4, teacher=teacher)
    training = Training(given, stream, 8, images=32, steps=3, warm_start=0)
    for step in range(3):
        shown, targets, *_ = training.fit.stream.watched_batch(step)
        assert torch.allclose(targets, given(shown), atol=1e-4)
