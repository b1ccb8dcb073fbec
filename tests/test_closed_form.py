"""Closed forms: moments against quadrature, regressions against numpy's on samples, exact where exactness is due."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import randomise
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn

from dfkd.classifier import Classifier
from dfkd.compress.channels import resize
from dfkd.compress.closed_form import METHODS, closed_form, combination, own_scale, rounded
from dfkd.compress.prune import prune
from dfkd.compress.quantizers import sqnr_db
from dfkd.compress.rectified import (
    by_position,
    correlations,
    input_means,
    rectified_covariance,
    rectified_mean,
    regress,
    renew_norm,
)
from dfkd.errors import UserError
from dfkd.models import build_model

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture
def no_grad() -> Any:
    with torch.no_grad():
        yield


def tiny(spec: str = "dfkd:tiny_plain", **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    network = build_model(spec, classes=3, channels=1, kwargs={"width": 6, "depth": 2, **kwargs})
    return randomise(network, seed=1).eval()


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# Moments of rectified normals


def by_quadrature(mean: list[float], spread: list[float], rho: float) -> float:
    """E[ReLU(a) ReLU(b)] as the mean over a of ReLU(a) E[ReLU(b) | a], trapezoids."""
    z = np.linspace(-12, 12, 200_001)
    a = np.maximum(mean[0] + spread[0] * z, 0)
    m, s = mean[1] + spread[1] * rho * z, spread[1] * math.sqrt(1 - rho**2)
    normal = np.vectorize(lambda t: 0.5 * math.erfc(-t / math.sqrt(2)))
    inner = m * normal(m / s) + s * np.exp(-((m / s) ** 2) / 2) / math.sqrt(2 * math.pi)
    return float(np.trapezoid(a * inner * np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi), z))


@pytest.mark.parametrize("rho", [-0.98, -0.4, 0.0, 0.3, 0.95])
def test_rectified_covariance_is_that_of_quadrature(rho: float) -> None:
    mean, spread = torch.tensor([0.4, -0.9]).double(), torch.tensor([1.3, 0.6]).double()
    first = rectified_mean(mean, spread)
    exact = by_quadrature(mean.tolist(), spread.tolist(), rho) - float(first.prod())
    found = rectified_covariance(torch.tensor([[1.0, rho], [rho, 1.0]]), mean, spread)
    assert float(found[0, 1]) == pytest.approx(exact, abs=1e-7)
    torch.testing.assert_close(found, found.T, atol=1e-15, rtol=0)


def test_rectified_mean_and_variance_are_the_textbooks() -> None:
    mean, spread = torch.tensor([0.7, -1.1, 0.0, 9.0, -9.0]).double(), torch.tensor([0.5, 2.0, 1.0, 0.1, 0.1]).double()
    normal = torch.distributions.Normal(0.0, 1.0)
    t = mean / spread
    first = mean * normal.cdf(t) + spread * normal.log_prob(t).exp()
    second = (mean**2 + spread**2) * normal.cdf(t) + mean * spread * normal.log_prob(t).exp()
    torch.testing.assert_close(rectified_mean(mean, spread), first)
    found = rectified_covariance(torch.eye(5), mean, spread).diagonal()
    torch.testing.assert_close(found, second - first**2, atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize(("stride", "size"), [((1, 1), (3, 3)), ((2, 1), (3, 2)), ((1, 2), (1, 1))])
def test_correlations_by_position_are_those_of_the_convolution_as_a_matrix(
    stride: tuple[int, int], size: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    filters = torch.randn(4, 2, 3, 3).double()
    pixels = torch.eye(2 * 11 * 11).double().view(-1, 2, 11, 11)  # one image per input pixel
    maps = F.conv2d(pixels, filters, stride=stride)[:, :, 1 : 1 + size[0], 1 : 1 + size[1]].flatten(1)
    exact = maps.T @ maps
    exact = exact / (exact.diag()[:, None] * exact.diag()[None]).sqrt()
    torch.testing.assert_close(by_position(correlations(filters, size, stride), size), exact)


# Regression of the next layer


def chain_of_noise(stride: int, dilation: int) -> tuple[nn.Conv2d, nn.BatchNorm2d, nn.Conv2d, Tensor]:
    """conv, its batch norm with the statistics that white noise gives, next conv; the map after the ReLU."""
    torch.manual_seed(3)
    first, norm, second = (
        nn.Conv2d(2, 5, 3, stride, bias=False),
        nn.BatchNorm2d(5, eps=0.0),
        nn.Conv2d(5, 4, 2, dilation=dilation),
    )
    norm.weight.copy_(torch.tensor([1.0, -0.7, 0.5, 1.2, 0.9]))
    norm.bias.copy_(torch.tensor([0.3, 0.1, -0.4, 0.0, 0.6]))
    norm.running_var.copy_(first.weight.flatten(1).square().sum(1))
    return first, norm.eval(), second, norm(first(torch.randn(60, 2, 40 * stride, 40 * stride))).relu()


@pytest.mark.parametrize(
    ("intercept", "stride", "dilation"), [("norm", 1, 1), ("bias", 1, 1), ("", 1, 1), ("norm", 2, 1), ("norm", 1, 2)]
)
def test_regression_is_numpys_on_many_samples_of_the_model(intercept: str, stride: int, dilation: int) -> None:
    first, norm, second, maps = chain_of_noise(stride, dilation)
    before = None if second.bias is None else second.bias.double()
    if intercept != "bias":
        second.bias = None
    keep = torch.tensor([0, 2, 3])
    patches = F.unfold(maps, 2, dilation).transpose(1, 2).flatten(0, 1).double()  # [N, 5 * 4]
    kept = patches.view(-1, 5, 4)[:, keep].flatten(1)
    target = patches @ second.weight.double().flatten(1).T
    design = torch.cat([kept, torch.ones(len(kept), 1)], 1) if intercept else kept
    exact = torch.from_numpy(np.linalg.lstsq(design.numpy(), target.numpy(), rcond=None)[0])
    after = nn.BatchNorm2d(4) if intercept == "norm" else None
    regress(first, norm, second, after, first.weight.double(), keep, (2, 2))
    found = second.weight[:, keep].flatten(1).double()
    torch.testing.assert_close(found, exact[:12].T, atol=0.02, rtol=0.02)
    if second.bias is not None and before is not None:
        torch.testing.assert_close(second.bias.double() - before, exact[12], atol=0.02, rtol=0.02)
    if after is not None:
        torch.testing.assert_close(after.running_mean.double(), -exact[12], atol=0.02, rtol=0.02)
        variances = (kept @ exact[:12]).var(0) / target.var(0)
        torch.testing.assert_close(after.running_var.double(), variances, atol=0.02, rtol=0.02)


@pytest.mark.parametrize(("ratio", "bits"), [(0.3, None), (0.0, 3)])
def test_channels_that_died_are_not_taken_for_live_ones(ratio: float, bits: int | None) -> None:
    """Weight decay leaves filters whose outputs vary less than a batch norm's eps: |gamma| is not their deviation. The
    first row fails with |gamma| for it, the second with the right one and no floor for the variances."""
    torch.manual_seed(1)

    def block(channels: int) -> list[nn.Module]:
        return [nn.Conv2d(channels, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16, momentum=None), nn.ReLU()]

    network = nn.Sequential(*block(3), *block(16), *block(16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))
    network[3].weight[:6] *= 1e-4
    images = torch.randn(128, 3, 14, 14)
    network.train()(images)
    expected = network.eval()(images)
    result = closed_form(network, ratio, bits)
    ours, naive = ((model(images) - expected).norm() for model in (result.model, result.naive))
    assert ours < 0.7 * naive


def heads() -> dict[str, nn.Module]:
    """What may follow five channels of 6x6."""
    return {
        "conv_bn": nn.Sequential(nn.Conv2d(5, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten()),
        "dilated_conv": nn.Sequential(nn.Conv2d(5, 4, (3, 1), 2, dilation=2), nn.Flatten()),
        "pooled_conv_bn": nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(5, 4, 3), nn.BatchNorm2d(4), nn.Flatten()),
        "flattened": nn.Sequential(nn.Flatten(), nn.Linear(180, 4)),
        "averaged": nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4)),
    }


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("head", sorted(heads()))
def test_a_channel_that_is_another_one_times_a_factor_is_not_missed(head: str, method: str) -> None:
    torch.manual_seed(5)
    conv, norm = nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5)
    network = nn.Sequential(conv, norm, nn.ReLU(), heads()[head]).eval()
    randomise(network, seed=2)
    with torch.no_grad():  # channel 3 becomes 0.6 times channel 1, and the one with the smallest filter
        conv.weight[3], conv.bias[3] = 0.1 * conv.weight[1], 0.1 * conv.bias[1]
        norm.running_mean[3] = 0.1 * norm.running_mean[1]
        norm.running_var[3] = 0.01 * (norm.running_var[1] + norm.eps) - norm.eps
        norm.weight[3], norm.bias[3] = 0.6 * norm.weight[1], 0.6 * norm.bias[1]
    images = torch.rand(8, 2, 8, 8)
    result = closed_form(network, 0.2, method=method, alpha1=1e-9, alpha2=1e-9)
    assert [line["kept"] for line in result.layers] == [4]
    torch.testing.assert_close(result.model(images), network(images), atol=1e-4, rtol=1e-4)
    assert (result.naive(images) - network(images)).abs().max() > 1e-2


def test_udfc_combination_is_the_least_squares_of_the_augmented_system() -> None:
    kept, gone, b, bj = (torch.from_numpy(rng(k).normal(size=s)) for k, s in enumerate([(4, 9), (3, 9), 4, 3]))
    a1, a2 = 0.3, 0.05
    design = np.concatenate([kept.numpy().T, math.sqrt(a1) * b.numpy()[None], math.sqrt(a2) * np.eye(4)])
    for j in range(3):
        goal = np.concatenate([gone[j].numpy(), [math.sqrt(a1) * float(bj[j])], np.zeros(4)])
        exact = np.linalg.lstsq(design, goal, rcond=None)[0]
        np.testing.assert_allclose(combination(kept, b, gone, bj, a1, a2)[:, j].numpy(), exact, rtol=1e-9)


def test_udfc_own_factor_is_the_least_squares_of_the_augmented_column() -> None:
    exact, near, b = (torch.from_numpy(rng(k).normal(size=s)) for k, s in enumerate([(3, 9), (3, 9), 3]))
    found = own_scale(exact, near, b, 0.3, 0.05)
    for j in range(3):
        column = np.array([*near[j], math.sqrt(0.3) * b[j], math.sqrt(0.05)])[:, None]
        goal = np.array([*exact[j], math.sqrt(0.3) * b[j], 0.0])
        assert float(found[j]) == pytest.approx(np.linalg.lstsq(column, goal, rcond=None)[0][0])


def test_udfc_on_a_rounded_and_pruned_layer_is_the_formula_by_hand() -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU()]
    layers += [nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 2, 3)]
    network = randomise(nn.Sequential(*layers), seed=1).eval()
    found = closed_form(network, 0.4, 2, method="udfc", ignore=["0"]).model
    layer, norm, last = network[3], network[4], network[6]
    sigma = (norm.running_var + norm.eps).sqrt().double()
    a, near = norm.weight / sigma, rounded(layer.weight.double(), 2).flatten(1)
    b = norm.bias + a * (layer.bias - norm.running_mean)
    exact, near = a[:, None] * layer.weight.double().flatten(1), a[:, None] * near
    s = ((near * exact).sum(1) + 0.01 * b**2) / (near.square().sum(1) + 0.01 * b**2 + 0.008)
    keep = layer.weight.flatten(1).abs().sum(1).argsort()[2:].sort().values
    gone = torch.tensor([k for k in range(5) if k not in keep])
    torch.testing.assert_close(found[4].weight, (s * norm.weight)[keep].float())
    torch.testing.assert_close(found[4].bias, (s * norm.bias)[keep].float())
    v, shift = (s[:, None] * near)[keep], (s * b)[keep]
    gram = v @ v.T + 0.01 * shift.outer(shift) + 0.008 * torch.eye(3).double()
    mix = torch.linalg.inv(gram) @ (v @ exact[gone].T + 0.01 * shift.outer(b[gone]))
    weight = last.weight.double()
    expected = weight[:, keep] + torch.stack([(mix[k, :, None, None] * weight[:, gone]).sum(1) for k in range(3)], 1)
    torch.testing.assert_close(found[6].weight, rounded(expected.float(), 8), atol=1e-6, rtol=1e-5)


# Rounding


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_rounded_weights_are_the_best_of_a_search_written_out(bits: int) -> None:
    weight = torch.from_numpy(rng().normal(size=(3, 2, 3, 3)))
    top = 2 ** (bits - 1) - 1
    found = rounded(weight, bits)
    for row, near in zip(weight.flatten(1).tolist(), found.flatten(1).tolist()):
        options = []
        for factor in np.linspace(0.3, 1.2, 60):
            s = max(map(abs, row)) / top * factor
            options.append([s * min(max(round(w / s), -top - 1), top) for w in row])
        best = min(options, key=lambda option: sum((w - o) ** 2 for w, o in zip(row, option)))
        np.testing.assert_allclose(near, best, rtol=1e-5)


def test_sqnr_of_a_tenth_is_20_db() -> None:
    assert sqnr_db(torch.ones(4), torch.tensor([1.1, 0.9, 1.1, 0.9])) == pytest.approx(20, abs=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ratio", [0.0, 0.4])
def test_every_weight_lies_on_its_grid(ratio: float, method: str) -> None:
    result = closed_form(tiny().double(), ratio, 3, method=method)
    single = closed_form(tiny(), ratio, 3, method=method)
    assert all(line["sqnr_db"] < 60 for line in result.layers)
    for wide, narrow in zip(result.model.parameters(), single.model.parameters()):
        torch.testing.assert_close(wide.float(), narrow, atol=2e-4, rtol=1e-3)
    layers = {n: m for n, m in result.model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    wanted = {name: 8 if name in (next(iter(layers)), "linear") else 3 for name in layers}
    assert result.structure["weight_bits"] == wanted
    assert {line["layer"]: line["bits"] for line in result.layers} == wanted
    for name, layer in layers.items():
        for row in layer.weight.flatten(1).double():
            levels = row.unique()
            assert len(levels) <= 2 ** wanted[name]
            if wanted[name] == 3:
                steps = levels.diff() / levels.diff().min()
                torch.testing.assert_close(steps, steps.round(), atol=1e-4, rtol=0)


def test_naive_is_pruning_and_rounding_alone() -> None:
    network = tiny()
    result = closed_form(network, 0.5, 4)
    keep = network.features[3].weight.flatten(1).abs().sum(1).argsort(descending=True)[:3].sort().values
    before = network.features[0].weight.flatten(1).abs().sum(1).argsort(descending=True)[:3].sort().values
    expected = rounded(network.features[3].weight[:, before], 4)[keep]
    torch.testing.assert_close(result.naive.features[3].weight, expected)
    torch.testing.assert_close(result.naive.features[4].running_mean, network.features[4].running_mean[keep])


def test_batch_norm_learns_what_rounding_did_to_its_inputs() -> None:
    torch.manual_seed(0)
    layer, norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, eps=0.0)
    noise = torch.randn(20, 3, 40, 40) + torch.tensor([0.5, 1.0, 2.0]).view(1, 3, 1, 1)
    maps = layer(noise)
    norm.running_mean.copy_(maps.mean((0, 2, 3)))
    norm.running_var.copy_(maps.var((0, 2, 3)))
    exact = layer.weight.double()
    layer.weight.copy_(rounded(exact, 2))
    renew_norm(layer, norm, exact)
    maps = layer(noise)
    torch.testing.assert_close(norm.running_mean, maps.mean((0, 2, 3)), atol=0.02, rtol=0.02)
    torch.testing.assert_close(norm.running_var, maps.var((0, 2, 3)), atol=0.01, rtol=0.02)


def test_means_of_inputs_come_out_of_the_outputs_means() -> None:
    sums, means = torch.from_numpy(rng().normal(size=(40, 5))), torch.tensor([0.1, 0.9, 0.4, 0.0, 2.0]).double()
    torch.testing.assert_close(input_means(sums, sums @ means), means, atol=0.01, rtol=0.01)


# The whole


@pytest.mark.parametrize("spec", ["dfkd:tiny_plain", "dfkd:tiny_residual", "dfkd:resnet20", "dfkd:wrn_16_1"])
@pytest.mark.parametrize("method", METHODS)
def test_a_smaller_network_is_rebuilt_from_its_structure(spec: str, method: str) -> None:
    kwargs = {"width": 4} if "tiny" in spec else {}
    network = randomise(build_model(spec, classes=3, channels=1, kwargs=kwargs), seed=1)
    given = copy.deepcopy(network.state_dict())
    with torch.enable_grad():
        result = closed_form(Classifier(network, mean=[0.5], std=[0.2]).eval(), 0.5, 4, method=method)
    assert isinstance(result.model, Classifier)
    assert result.model.normalisation == ([0.5], [0.2])
    assert not result.model.training
    images = torch.rand(2, 1, 16, 16)
    for each in (result.model, result.naive):
        rebuilt = build_model(spec, classes=3, channels=1, kwargs=kwargs)
        resize(rebuilt, result.structure["channels"])
        rebuilt.load_state_dict(each.model.state_dict(), strict=True)
        torch.testing.assert_close(rebuilt.eval()((images - 0.5) / 0.2), each(images))
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, given[name]), name
    pruned = {line["layer"] for line in result.layers if line["kept"] < line["of"]}
    assert pruned <= set(result.structure["channels"])
    assert pruned


def test_joint_batch_norms_of_timm_are_understood() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 3, 3), nn.Flatten())
    joint = nn.Sequential(plain[0], BatchNormAct2d(6), *plain[3:]).eval()
    randomise(plain, seed=1)
    joint[1].load_state_dict(plain[1].state_dict())
    images = torch.rand(2, 1, 8, 8)
    first, second = (closed_form(network, 0.5, 4) for network in (plain.eval(), joint))
    torch.testing.assert_close(first.model(images), second.model(images))
    assert second.structure["channels"] == {"0": [3, 1], "1": [3, 3], "2": [3, 3]}


def test_ignored_layers_stay() -> None:
    network = tiny()
    result = closed_form(network, 0.5, 4, ignore=["features.0", "lin*"])
    assert torch.equal(result.model.features[0].weight, network.features[0].weight)
    assert result.model.linear.weight.shape == network.linear.weight.shape
    names = {line["layer"] for line in result.layers}
    assert names
    assert not names & {"features.0", "linear"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 1.0}, "ratio is 1.0; give the share"),
        ({"ratio": math.nan}, "ratio is nan"),
        ({"bits": 1}, "bits is 1; give a whole number from 2 to 8"),
        ({"bits": True}, "bits is True"),
        ({}, "nothing would change"),
        ({"ratio": 0.5, "method": "merge"}, "unknown method 'merge'; choose from"),
        ({"ratio": 0.5, "alpha2": 0.0}, "alpha2 0.0; give"),
        (
            {"ratio": 0.5, "ignore": ["conv9"]},
            "the ignore pattern 'conv9' matches no layer; the layers are features.0, ",
        ),
        ({"ratio": 0.5, "ignore": ["*"]}, "no filter can be taken out: features.0 or the layer after it is ignored"),
    ],
)
def test_bad_values_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message.replace("*", r"\*")):
        closed_form(tiny(), **options)


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


class Asks(nn.Sequential):
    """Goes on only with images of a side that it takes, as timm's VGG does."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] < 8:
            raise ValueError("too small")
        return super().forward(x)


def test_an_image_tells_sizes_to_a_forward_that_asks_for_them() -> None:
    parts = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.Flatten(), nn.Linear(32, 3)]
    asks, plain, x = Asks(*parts).eval(), nn.Sequential(*parts).eval(), torch.rand(5, 1, 8, 8)
    with pytest.raises(UserError, match=r"branch on values or sizes.*image="):
        closed_form(asks, 0.5, bits=4)
    wrapped = Classifier(asks, mean=[0.5], std=[0.5], input_size=8).eval()
    done = closed_form(wrapped, 0.5, bits=4, image=torch.zeros(1, 1, 4, 4))
    torch.testing.assert_close(done.model.model(x), closed_form(plain, 0.5, bits=4).model(x))


def test_a_layer_that_cannot_be_rounded_is_named_and_not_passed_over() -> None:
    network = nn.Sequential(Standardised(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).eval()
    with pytest.raises(UserError, match=r"^0 calls conv2d itself, is no nn\.Conv2d"):
        closed_form(network, bits=4)
    assert [line["layer"] for line in closed_form(network, bits=4, ignore=["0"]).layers] == ["4"]
    with pytest.raises(UserError, match="no filter can be taken out"):  # not that there is no layer 0
        closed_form(network, 0.3, ignore=["0"])


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)), "0 has no batch norm"),
        (
            nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 2, 3)),
            "no layer hands its channels through batch norm and ReLU alone to one ungrouped layer; give bits",
        ),
        (nn.Sequential(nn.Flatten(), nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), "1 has no ReLU"),
        (
            nn.Sequential(
                *(nn.Flatten(), nn.Linear(2, 4), nn.BatchNorm1d(4, track_running_stats=False)),
                *(nn.ReLU(), nn.Linear(4, 2)),
            ),
            "run",
        ),
        (nn.Sequential(nn.ReLU()), "has no convolution or linear layer"),
        (nn.Sequential(nn.Linear(2, 4)), "no layer hands its channels"),
    ],
)
def test_networks_without_a_filter_to_take_are_told_why(network: nn.Module, message: str) -> None:
    with pytest.raises(UserError, match=message):
        closed_form(network, 0.5)


def test_what_is_compressed_after_a_closed_form_tells_of_both() -> None:
    network = build_model("dfkd:tiny_plain", classes=5, channels=3, kwargs={"width": 8}).eval()
    first = closed_form(network, 0.3)
    assert first.structure["channels"]
    for each in (first.model, first.naive):
        done = prune(each, [torch.rand(16, 3, 8, 8)], 0.3, kind="weights", repair="none", images=16)
        assert done.structure == {"channels": first.structure["channels"]}
