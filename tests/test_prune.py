"""Pruning: what goes and what stays, networks of every make, and refusals."""

import copy
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from conftest import randomise
from networks_fixture import Small
from timm.layers import Conv2dSame, ScaledStdConv2d
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn

from dfkd.classifier import Classifier
from dfkd.compress.channels import inputs, largest_filters, outputs, resize
from dfkd.compress.prune import prune
from dfkd.errors import UserError
from dfkd.models import build_model
from dfkd.teachers import Teacher

IMAGES = torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def network(model: str, **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    return randomise(build_model(model, classes=4, kwargs=kwargs), 0).eval()


def tiny() -> nn.Module:
    return network("dfkd:tiny_plain", width=8, depth=1)


def test_exactly_the_smallest_weights_of_the_whole_network_go() -> None:
    model = tiny()
    before = copy.deepcopy(model.state_dict())
    result = prune(model, [IMAGES], 0.3, kind="weights", repair="none", images=16)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    old = torch.cat([model.get_submodule(name).weight.flatten() for name in names]).abs()
    new = torch.cat([result.model.get_submodule(name).weight.flatten() for name in names])
    gone = new == 0
    assert gone.sum() == round(0.3 * len(old))
    assert old[gone].max() <= old[~gone].min()
    assert list(result.model.state_dict()) == list(before)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert result.structure == {}
    assert sum(line["of"] - line["kept"] for line in result.layers) == gone.sum()


@pytest.mark.parametrize("inner_only", [None, True])
def test_the_filters_with_the_largest_norms_stay(inner_only: bool | None) -> None:
    model: Any = tiny()
    result: Any = prune(model, [IMAGES], 0.25, repair="none", images=16, inner_only=inner_only)
    first = model.features[0].weight
    largest = sorted(sorted(range(8), key=lambda k: -float(first[k].detach().abs().sum()))[:6])
    assert torch.equal(result.model.features[0].weight, first[largest])
    assert torch.equal(result.model.features[1].running_var, model.features[1].running_var[largest])
    assert result.model.linear.out_features == 4
    assert result.layers[0] | {"error_before": 0, "error_after": 0} == {
        "layer": "features.0", "kept": 6, "of": 8, "sparsity": 25, "error_before": 0, "error_after": 0,
    }  # fmt: skip


@pytest.mark.parametrize(("ratio", "kept"), [(0.0, 8), (0.3, 6), (0.45, 4), (0.55, 4), (0.95, 1), (1.0, 1)])
def test_the_share_that_goes_is_rounded_to_filters_and_one_stays(ratio: float, kept: int) -> None:
    weight = torch.randn(8, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    norms = np.abs(weight.numpy()).reshape(8, -1).sum(1)
    assert largest_filters(weight, ratio).tolist() == sorted(norms.argsort()[8 - kept :])


def test_a_frozen_layer_that_loses_channels_stays_frozen() -> None:
    layer = nn.Conv2d(3, 4, 3)
    layer.weight.requires_grad_(False)
    outputs(layer, torch.tensor([0, 2]))
    inputs(layer, torch.tensor([1]))
    assert (layer.weight.requires_grad, layer.bias.requires_grad) == (False, True)


SMALL = {
    "resnet20": lambda: network("dfkd:resnet20", width=4),
    "wrn": lambda: network("dfkd:wrn_16_1"),
    "plain": tiny,
    "residual": lambda: network("dfkd:tiny_residual", width=8),
    "inverted": lambda: network("dfkd:tiny_inverted", width=8, depth=1),
    "resnet18": lambda: torchvision.models.resnet18(num_classes=4),
    "mobilenet_v2": lambda: torchvision.models.mobilenet_v2(num_classes=4, width_mult=0.25),
    "shufflenet": lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=4),
}


@pytest.mark.parametrize("name", SMALL)
def test_a_smaller_network_of_the_same_class_is_rebuilt_from_its_shapes(name: str) -> None:
    model = SMALL[name]().eval()
    result = prune(model, [IMAGES.repeat(1, 1, 2, 2)], 0.3, repair="none", images=16)
    assert type(result.model) is type(model)
    assert sum(p.numel() for p in result.model.parameters()) < sum(p.numel() for p in model.parameters())
    rebuilt = SMALL[name]().eval()
    resize(rebuilt, result.structure["channels"])
    rebuilt.load_state_dict(result.model.state_dict(), strict=True)
    assert torch.equal(rebuilt(IMAGES), result.model(IMAGES))


def test_a_vgg_with_flattened_maps_is_pruned_and_repaired() -> None:
    class Vgg(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Sequential(
                nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(True), nn.MaxPool2d(4), nn.Conv2d(8, 6, 3)
            )
            self.head = nn.Sequential(nn.Linear(24, 12), nn.ReLU(True), nn.Dropout(), nn.Linear(12, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.flatten(self.features(x), 1))

    torch.manual_seed(0)
    result: Any = prune(Vgg(), [torch.rand(64, 3, 16, 16)], 0.5, images=64)
    assert result.structure["channels"] == {
        "features.0": [4, 3], "features.3": [3, 4], "head.0": [6, 12], "head.3": [4, 6],
    }  # fmt: skip
    assert result.layers[-1]["error_after"] < result.layers[-1]["error_before"]


def test_coupled_channels_go_where_they_can_and_inner_ones_alone_where_not() -> None:
    inner: Any = prune(SMALL["resnet20"](), [IMAGES], 0.25, repair="none", images=16).structure["channels"]
    assert inner["layer1.0.conv1"] == [3, 4]
    assert inner["layer1.0.conv2"] == [4, 3]
    assert "conv1" not in inner  # the stem ends in an option-A shortcut
    coupled: Any = prune(SMALL["residual"](), [IMAGES], 0.25, repair="none", images=16).structure["channels"]
    assert coupled["features.0"] == [6, 3]
    with pytest.raises(UserError, match=r"conv1.* go together but cannot be taken out"):
        prune(SMALL["resnet20"](), [IMAGES], 0.25, repair="none", images=16, inner_only=False)


@pytest.mark.parametrize("kind", ["channels", "weights"])
@pytest.mark.parametrize("repair", ["least_squares", "batch_norm"])
def test_a_repair_brings_the_network_nearer_and_leaves_the_model_alone(kind: str, repair: str) -> None:
    teacher = Teacher(SMALL["residual"](), mean=[0.5] * 3, std=[0.25] * 3)
    before = copy.deepcopy(teacher.state_dict())
    images = torch.rand(128, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    result = prune(teacher, [(images, None)], 0.4, kind=kind, repair=repair, images=128)
    assert isinstance(result.model, Classifier)
    fresh = torch.rand(64, 3, 16, 16)
    error = [float((each(fresh) - teacher(fresh)).norm()) for each in (result.naive, result.model)]
    assert error[1] < 0.7 * error[0]
    assert all(torch.equal(teacher.state_dict()[key], value) for key, value in before.items())
    assert all(line["layer"].startswith(("features.", "linear")) for line in result.layers)
    if kind == "weights":
        for name, value in result.naive.named_parameters():
            assert (dict(result.model.named_parameters())[name][value == 0] == 0).all()


def test_ignored_layers_keep_their_filters() -> None:
    result = prune(tiny(), [IMAGES], 0.5, repair="none", images=16, ignore=["features.0"])
    assert "features.0" not in result.structure["channels"]
    result = prune(tiny(), [IMAGES], 0.5, kind="weights", repair="none", images=16, ignore=["features.*"])
    assert [line["layer"] for line in result.layers] == ["linear"]


def without_torch_pruning(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(sys.modules, "torch_pruning", None)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"ratio": 0.0}, "above 0 and below 1, not 0.0"),
    ({"ratio": "0.4"}, "above 0 and below 1, not '0.4'"),
    ({"ratio": 1.0}, "above 0 and below 1, not 1.0"),
    ({"kind": "blocks"}, "unknown kind 'blocks'.*channels"),
    ({"repair": "magic"}, "unknown repair 'magic'.*batch_norm"),
    ({"ignore": ["nothing.*"]}, r"the ignore pattern 'nothing\.\*' matches no layer; the layers are features\.0"),
    ({"images": 17}, "ended after 16 images where 17"),
    ({"ridge": 0.0}, "ridge > 0"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prune(tiny(), [IMAGES], **{"images": 16, **options})


def test_a_network_without_channels_to_take_is_refused() -> None:
    alone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for inner_only in (None, True):
        with pytest.raises(UserError, match="Sequential has no channels that can be taken out"):
            prune(alone, [IMAGES], 0.5, images=16, inner_only=inner_only)


def test_images_that_the_network_does_not_take_are_told_as_such() -> None:
    for given, images in ((tiny(), IMAGES[:, :2]), (tiny().double(), IMAGES)):
        with pytest.raises(UserError, match=r"Sequential does not take images \[.*give a stream of its own size"):
            prune(given, [images], images=16)


def test_bytes_are_255ths_of_an_image() -> None:
    whole = (IMAGES.clamp(0, 1) * 255).round().to(torch.uint8)
    pruned = [prune(tiny(), [images], images=16).model(IMAGES) for images in (whole, whole.float() / 255)]
    assert torch.equal(*pruned)


def test_without_torch_pruning_inner_channels_can_still_go(monkeypatch: pytest.MonkeyPatch) -> None:
    without_torch_pruning(monkeypatch)
    with pytest.raises(UserError, match=r"pip install 'dfkd\[prune\]'"):
        prune(tiny(), [IMAGES], images=16)
    assert prune(tiny(), [IMAGES], repair="none", images=16, inner_only=True).structure["channels"]


class Shuffled(nn.Module):
    """Channels of a convolution in another order: what torch-pruning would take for a plain reshape."""

    def __init__(self, order: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.order = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), order
        self.third, self.head = nn.Conv2d(8, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.order(self.first(x).relu())).relu()
        return self.head(self.third(x).relu().mean((2, 3)))


ORDERS = {
    "flip": lambda x: x.flip(1),
    "shuffle": lambda x: x.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2),
    "slices": lambda x: torch.cat([x[:, 4:], x[:, :4]], 1),
}


@pytest.mark.parametrize("order", ORDERS)
def test_channels_that_the_forward_counts_are_left(order: str) -> None:
    torch.manual_seed(0)
    model = Shuffled(ORDERS[order])
    changed = prune(model, [IMAGES], 0.5, repair="none", images=16).structure["channels"]
    assert "first" not in changed
    assert changed["second"] == [4, 8]


def test_channels_that_a_pixel_shuffle_makes_pixels_of_are_left() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.PixelUnshuffle(2), nn.Conv2d(64, 24, 1), nn.BatchNorm2d(24)]
    layers += [nn.PixelShuffle(2), nn.Conv2d(6, 12, 3), nn.ReLU(), nn.Conv2d(12, 8, 1), nn.ReLU()]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    changed = prune(network, [IMAGES], 0.5, repair="none", images=16).structure["channels"]
    assert "3" not in changed
    assert changed["6"] == [6, 6]


@pytest.mark.parametrize("repair", ["least_squares", "batch_norm"])
def test_timms_joint_batch_norms_are_repaired_under_their_own_names(repair: str) -> None:
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 8, 3, bias=False), BatchNormAct2d(8), nn.Conv2d(8, 8, 3, bias=False), BatchNormAct2d(8)]
    model = randomise(nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)), 0)
    result: Any = prune(model, [IMAGES], 0.25, repair=repair, images=16)
    assert result.structure["channels"]["1"] == [6, 6]
    assert not torch.equal(result.model[3].running_mean, result.naive[3].running_mean)


def context(m: Any, x: Tensor) -> Tensor:
    """What the whole image says is added everywhere (GCNet)."""
    x = m.a(x).relu()
    x = x + m.g2(m.g1(x.mean((2, 3), keepdim=True)).relu()) + x.shape[-1] / 100
    return m.head(m.b(x).relu().mean((2, 3)))


def two_heads(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    x = m.b(m.a(x).relu()).relu().mean((2, 3))
    return m.head(x), m.g1(x[..., None, None])


def aside(m: Any, x: Tensor) -> Any:
    """A head for training alone, and a layer that torch's attention does not call."""
    x = m.b(m.a(x).relu())
    y = x.flatten(2).transpose(1, 2)
    y = m.head((y + m.attention(y, y, y)[0]).mean(1))
    return (y, m.g1(x)) if m.training else y


@pytest.mark.parametrize("kind", ["channels", "weights"])
@pytest.mark.parametrize("forward", [context, two_heads, aside])
def test_sums_of_maps_and_numbers_several_heads_and_layers_that_are_not_called(forward: Any, kind: str) -> None:
    torch.manual_seed(0)
    layers: dict[str, nn.Module] = (
        {"attention": nn.MultiheadAttention(8, 2, batch_first=True)} if forward is aside else {}
    )
    layers |= {"g2": nn.Conv2d(4, 8, 1)} if forward is context else {}
    layers |= {"a": nn.Conv2d(3, 8, 3), "b": nn.Conv2d(8, 8, 3), "g1": nn.Conv2d(8, 4, 1), "head": nn.Linear(8, 3)}
    network, images = Small(forward, **layers).eval(), torch.rand(64, 3, 8, 8)
    done = prune(network, [images], 0.3, kind=kind, images=64)
    errors = [(line["error_before"], line["error_after"]) for line in done.layers]
    assert sum(after for _, after in errors) < sum(before for before, _ in errors)
    names = {line["layer"] for line in done.layers}
    called = {
        "context": {"a", "b", "g1", "g2", "head"},
        "two_heads": {"a", "b", "g1", "head"},
        "aside": {"a", "b", "head"},
    }
    assert names <= called[forward.__name__]
    assert "a" in names


def test_zeros_are_taken_only_where_a_layer_computes_with_its_weight() -> None:
    layers = [ScaledStdConv2d(3, 4, 3), nn.Conv2d(4, 4, 3, groups=2), Conv2dSame(4, 4, 3, stride=2), nn.Flatten()]
    network = nn.Sequential(*layers, nn.Linear(4 * 49, 3)).eval()
    with pytest.raises(UserError, match=r"^0 \(ScaledStdConv2d\) computes with .* name in ignore 0$"):
        prune(network, [IMAGES], 0.5, kind="weights", images=16)
    done = prune(network, [IMAGES], 0.5, kind="weights", repair="none", images=16, ignore=["0"])
    assert [float((done.model[k].weight == 0).float().mean()) > 0 for k in (0, 1, 2, 4)] == [False, True, True, True]
    assert torch.equal(done.model[0].weight, network[0].weight)


def test_channels_that_are_followed_in_circles_are_left_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dfkd.compress.prune.MOST_FOLLOWED", 5000)  # where they go round they have no end
    coatnet = timm.create_model("test_coatnet", img_size=64, num_classes=4).eval()
    with pytest.raises(UserError, match="torch-pruning cannot read all of MaxxVit"):
        prune(coatnet, [torch.rand(16, 3, 64, 64)], 0.3, images=16, inner_only=False)


def test_a_group_that_torch_pruning_cannot_follow_leaves_the_others() -> None:
    edgenext = timm.create_model("edgenext_xx_small", num_classes=4).eval()
    given = [torch.rand(16, 3, 64, 64)]
    done = prune(edgenext, given, 0.3, images=16, repair="none", ignore=["stages.[123].*"])
    assert sum(p.numel() for p in done.model.parameters()) < sum(p.numel() for p in edgenext.parameters())
    assert done.model(given[0]).shape == (16, 4)
    with pytest.raises(UserError, match="torch-pruning cannot read all of EdgeNeXt"):
        prune(edgenext, given, 0.3, images=16, inner_only=False)


def test_a_group_whose_channels_torch_pruning_guesses_wrong_leaves_the_others() -> None:
    def block(given: int, made: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(given, made, 3, padding=1, bias=False), nn.BatchNorm2d(made), nn.ReLU())

    def forward(self: Any, x: Tensor) -> Tensor:  # a stage of CSPNet (Wang et al. 2020)
        passed, worked = self.widen(self.stem(x)).chunk(2, 1)
        worked = self.end(worked + self.second(self.first(worked)))
        return self.head(self.join(torch.cat([passed, worked], 1)).mean((2, 3)))

    parts = {name: block(8, 8) for name in ("first", "second", "end")}
    parts |= {"stem": block(3, 8), "widen": block(8, 16), "join": block(16, 16), "head": nn.Linear(16, 4)}
    csp = randomise(Small(forward, **parts), 0).eval()
    done = prune(csp, [IMAGES], 0.5, images=16, repair="none")
    widths = {name: len(done.model.get_submodule(f"{name}.0").weight) for name in parts if name != "head"}
    assert [widths[name] for name in ("stem", "first", "join")] == [4, 4, 8]
    assert done.model(IMAGES).shape == (16, 4)


class Apart(nn.Linear):
    """A linear layer whose forward takes two tensors."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return super().forward(x + y)


def test_zeros_are_taken_of_layers_with_a_forward_or_a_bias_of_their_own() -> None:
    network = Small(lambda self, x: self.b(self.a(x.mean((2, 3)), x.amax((2, 3)))), a=Apart(3, 8), b=nn.Linear(8, 4))
    network.b.bias.data.fill_(5000.0)
    done = prune(network.eval(), [IMAGES], 0.5, kind="weights", repair="none", images=16)
    assert [int((done.model.get_submodule(name).weight == 0).sum()) > 0 for name in "ab"] == [True, True]


def test_a_ridge_draws_towards_the_weights_that_are_left() -> None:
    images = [torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))]
    moved = []
    for ridge in (1e-2, 1e9):
        done = prune(tiny(), images, 0.3, images=16, ridge=ridge)
        pairs = zip(done.model.parameters(), done.naive.parameters())
        moved.append(max(float((a - b).detach().abs().max()) for a, b in pairs if a.dim() > 1))
    assert moved[0] > 1e-2 > 1e-4 > moved[1]


@pytest.mark.parametrize("repair", ["least_squares", "batch_norm"])
def test_every_image_has_a_say_in_a_repair(repair: str) -> None:
    images = torch.rand(80, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    other = torch.cat([images[:64], images[64:] ** 3])  # the last ones are no more than a second batch
    done = [prune(tiny(), [x], 0.3, repair=repair, images=80).model.state_dict() for x in (images, other)]
    changed = [name for name, value in done[0].items() if not torch.equal(value, done[1][name])]
    assert changed
