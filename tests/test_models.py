"""Networks by name and model strings: against published figures, and every error line."""

import socket
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from networks_fixture import error_line
from torch import Tensor, nn

from dfkd.models import MODELS, build_model, list_models
from dfkd.models.small import InvertedResidual, PadShortcut, initialise
from dfkd.models.stems import STEMS

TINY = ["tiny_plain", "tiny_residual", "tiny_inverted"]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Many small layers: on a shared CPU threads wait for each other four times as long as they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def error_of(spec: str, **options) -> str:
    return error_line(build_model, spec, **{"classes": 10, **options})


# --- networks ---


@pytest.mark.parametrize(("channels", "side"), [(1, 28), (3, 32)])
@pytest.mark.parametrize("name", list_models())
def test_every_network_takes_28_and_32_pixels_and_1_and_3_channels(name, channels, side):
    network = build_model(f"dfkd:{name}", classes=7, channels=channels)
    assert network.training
    with torch.inference_mode():
        logits = network.eval()(torch.rand(1, channels, side, side))
    assert logits.shape == (1, 7)
    assert torch.isfinite(logits).all()


def test_list_is_the_table():
    assert list_models() == sorted(MODELS)
    assert len(MODELS) == 24


MILLIONS = {  # He et al. 2016, table 6; Zagoruyko and Komodakis 2016, table 4; 16-2: 2017, table 1
    "resnet20": "0.27",
    "resnet32": "0.46",
    "resnet44": "0.66",
    "resnet56": "0.85",
    "resnet110": "1.7",
    "wrn_16_1": "0.2",
    "wrn_16_2": "0.7",
    "wrn_40_1": "0.6",
    "wrn_40_2": "2.2",
}


@pytest.mark.parametrize("name", MILLIONS)
def test_parameters_as_published(name):
    digits = len(MILLIONS[name].split(".")[1])
    assert f"{count(build_model(f'dfkd:{name}', classes=10)) / 1e6:.{digits}f}" == MILLIONS[name]


@pytest.mark.parametrize(("name", "number"), [("vgg11", 9_231_114), ("vgg13", 9_416_010), ("vgg16", 14_728_266)])
def test_vgg_parameters_are_those_of_kuangliu_pytorch_cifar(name, number):
    assert count(build_model(f"dfkd:{name}", classes=10)) == number


@pytest.mark.parametrize(
    ("name", "original", "features", "was_7x7"),
    [
        ("resnet18", "ResNet18", 512, True),
        ("resnet34", "ResNet34", 512, True),
        ("resnet50", "ResNet50", 2048, True),
        ("densenet121", "DenseNet121", 1024, True),
        ("mobilenetv2", "MobileNet_V2", 1280, False),
        ("shufflenetv2", "ShuffleNet_V2_X1_0", 1024, False),
        ("regnet_x_400mf", "RegNet_X_400MF", 400, False),
        ("mnasnet", "MNASNet1_0", 1280, False),
    ],
)
def test_stem_surgery_changes_the_first_convolution_and_the_head_alone(name, original, features, was_7x7):
    published = torchvision.models.get_model_weights(original.lower()).IMAGENET1K_V1.meta["num_params"]
    expected = published - 990 * (features + 1) - was_7x7 * 64 * 3 * (49 - 9)
    assert count(build_model(f"dfkd:{name}", classes=10)) == expected


@pytest.mark.parametrize("name", sorted(STEMS))
def test_first_and_last_batch_norm_see_the_sides_customary_for_cifar(name):
    network = build_model(f"dfkd:{name}", classes=10).eval()
    sides = []
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(lambda _, inputs: sides.append(inputs[0].shape[-1]))
            assert module.momentum == 0.1
    with torch.inference_mode():
        network(torch.rand(1, 3, 32, 32))
    assert (sides[0], sides[-1]) == (32, 2 if name.startswith("vgg") else 4)


def test_option_a_shortcut_subsamples_and_pads_channels_on_both_sides():
    x = torch.randn(2, 4, 7, 6)
    subsampled = F.max_pool2d(x, kernel_size=1, stride=2)
    zeros = torch.zeros(2, 2, 4, 3)
    assert torch.equal(PadShortcut(4, stride=2)(x), torch.cat([zeros, subsampled, zeros], 1))


def reference_resnet20(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """He et al. 2016, section 4.2, written on the checkpoint's keys alone."""

    def conv_bn(x: Tensor, conv: str, bn: str, stride: int = 1) -> Tensor:
        x = F.conv2d(x, state[f"{conv}.weight"], stride=stride, padding=1)
        named = [state[f"{bn}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *named)

    x = conv_bn(x, "conv1", "bn1").relu()
    for layer in (1, 2, 3):
        for block in range(3):
            at, stride = f"layer{layer}.{block}", 2 if layer > 1 and block == 0 else 1
            y = conv_bn(x, f"{at}.conv1", f"{at}.bn1", stride).relu()
            y = conv_bn(y, f"{at}.conv2", f"{at}.bn2")
            if stride == 2:
                x = F.max_pool2d(x, 1, 2)
                half = torch.zeros_like(x)[:, : x.shape[1] // 2]
                x = torch.cat([half, x, half], 1)
            x = (x + y).relu()
    return F.linear(x.mean((2, 3)), state["linear.weight"], state["linear.bias"])


def shaken(network: nn.Module) -> nn.Module:
    """The network with statistics and scales that tell its batch norms apart."""
    for name, tensor in network.state_dict().items():
        if tensor.ndim == 1 and tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5) if "var" in name or "weight" in name else tensor.normal_(std=0.3)
    return network.eval()


def test_resnet20_computes_what_its_keys_say():
    network = shaken(build_model("dfkd:resnet20", classes=10))
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(network(images), reference_resnet20(network.state_dict(), images))


def test_wide_resnet_has_the_keys_of_published_checkpoints():
    keys = build_model("dfkd:wrn_16_2", classes=10).state_dict().keys()
    wanted = {"conv1.weight", "block1.layer.0.convShortcut.weight", "block3.layer.1.conv2.weight", "fc.bias"}
    assert wanted <= keys
    assert "block1.layer.1.convShortcut.weight" not in keys


def reference_wrn16(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """Zagoruyko and Komodakis 2016, as in their code: a 1x1 shortcut, after bn-relu, at each new width."""

    def bn_relu(x: Tensor, at: str) -> Tensor:
        named = [state[f"{at}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *named).relu()

    x = F.conv2d(x, state["conv1.weight"], padding=1)
    for stage in (1, 2, 3):
        for block in range(2):
            at, stride = f"block{stage}.layer.{block}", 2 if stage > 1 and block == 0 else 1
            activated = bn_relu(x, f"{at}.bn1")
            y = F.conv2d(activated, state[f"{at}.conv1.weight"], stride=stride, padding=1)
            y = F.conv2d(bn_relu(y, f"{at}.bn2"), state[f"{at}.conv2.weight"], padding=1)
            shortcut = state.get(f"{at}.convShortcut.weight")
            x = y + (x if shortcut is None else F.conv2d(activated, shortcut, stride=stride))
    return F.linear(bn_relu(x, "bn1").mean((2, 3)), state["fc.weight"], state["fc.bias"])


@pytest.mark.parametrize("name", ["wrn_16_1", "wrn_16_2"])
def test_wide_resnet_computes_what_its_keys_say(name):
    network = shaken(build_model(f"dfkd:{name}", classes=10))
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(network(images), reference_wrn16(network.state_dict(), images))


def test_an_inverted_residual_adds_its_input_where_shapes_allow():
    x = torch.randn(2, 4, 8, 8)
    for block, expected in (
        (InvertedResidual(4, 4, 1, 2), x),
        (InvertedResidual(4, 8, 1, 2), torch.zeros(2, 8, 8, 8)),
    ):
        nn.init.zeros_(block.body[-1].weight)
        assert torch.equal(block(x), expected)


@pytest.mark.parametrize("name", [*TINY, "resnet20", "wrn_16_1"])
def test_every_parameter_of_own_networks_gets_a_gradient(name):
    network = build_model(f"dfkd:{name}", classes=3)
    F.cross_entropy(network(torch.rand(6, 3, 8, 8)), torch.arange(6) % 3).backward()
    without = [key for key, parameter in network.named_parameters() if parameter.grad is None]
    assert not without


@pytest.mark.parametrize("side", [8, 9, 17])
@pytest.mark.parametrize("name", TINY)
def test_tiny_networks_take_any_side_and_double_their_width(name, side):
    network = build_model(f"dfkd:{name}", classes=5, channels=1, kwargs={"width": 6, "depth": 2}).eval()
    assert network(torch.rand(1, 1, side, side)).shape == (1, 5)
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    assert {6, 12, 24} <= {conv.out_channels for conv in convolutions}
    assert all(conv.bias is None for conv in convolutions)


def test_expansion_widens_inverted_residuals():
    narrow, wide = (build_model("dfkd:tiny_inverted", classes=5, kwargs={"expansion": e}) for e in (1, 6))
    hidden = [max(m.groups for m in network.modules() if isinstance(m, nn.Conv2d)) for network in (narrow, wide)]
    assert hidden == [64, 384]


# --- model strings ---


def test_timm_and_torchvision_take_channels_classes_and_kwargs():
    images = torch.rand(1, 1, 32, 32)
    for spec, kwargs in (
        ("timm:test_resnet", {"drop_rate": 0.5}),
        ("torchvision:squeezenet1_1", {"dropout": 0.25}),
    ):
        network = build_model(spec, classes=4, channels=1, kwargs=kwargs).eval()
        assert network(images).shape == (1, 4)
    assert [m.p for m in network.modules() if isinstance(m, nn.Dropout)] == [0.25]


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("resnet18", ["dfkd:NAME", "timm:NAME", "hub:OWNER/REPO:ENTRY", "did you mean 'dfkd:resnet18'?"]),
        ("vit_b_16", ["did you mean 'torchvision:vit_b_16'?"]),
        ("tim:resnet18", ["did you mean 'timm:resnet18'?"]),
        ("dfkd:", ["dfkd:NAME"]),
        ("dfkd:resnet19", ["'dfkd:resnet19'", "tiny_plain", "did you mean 'dfkd:resnet1"]),
        ("timm:resnet18d_", ["timm.list_models()", "did you mean 'timm:resnet18d'?"]),
        ("torchvision:resnt18", ["torchvision.models.list_models()", "did you mean 'torchvision:resnet18'?"]),
        ("torchvision:fasterrcnn_resnet50_fpn", ["unknown model"]),
        ("hub:someone/nets:resnet20", ["'hub:someone/nets:resnet20'", "trust_code=true", "command line"]),
        ("python:nets:make", ["'python:nets:make'", "trust_code=true", "command line"]),
    ],
)
def test_an_unusable_string_says_what_is_allowed(spec, parts):
    line = error_of(spec)
    for part in parts:
        assert part in line


@pytest.mark.parametrize(
    ("spec", "kwargs", "parts"),
    [
        ("dfkd:tiny_plain", {"widht": 8}, ["'widht'", "width, depth", "did you mean 'width'?"]),
        ("dfkd:tiny_plain", {"width": "8"}, ["width must be a whole number above 0, not '8'"]),
        ("dfkd:tiny_inverted", {"expansion": 0}, ["expansion must be a whole number"]),
        ("dfkd:wrn_16_1", {"width": 8}, ["'width'", "allowed: none"]),
        ("dfkd:resnet18", {"widht": 8}, ["'widht'", "unexpected keyword"]),
        ("dfkd:resnet18", {"classes": 8}, ["'classes'"]),
        ("timm:test_resnet", {"widht": 8}, ["'widht'", "unexpected keyword"]),
        ("timm:resnet18", {"output_stride": 7}, ["'output_stride': 7", "AssertionError"]),
        ("torchvision:resnet18", {"num_classes": 8}, ["num_classes"]),
    ],
)
def test_bad_kwargs_name_the_model_and_the_argument(spec, kwargs, parts):
    line = error_of(spec, kwargs=kwargs)
    for part in [f"'{spec}'", *parts]:
        assert part in line


def test_no_classes_is_an_error():
    assert "above 0, not 0 and 3" in error_of("timm:test_resnet", classes=0)


def test_pretrained_where_there_is_none():
    assert "no pretrained weights" in error_of("dfkd:resnet18", weights="pretrained")
    assert "timm:seresnet18" in error_of("timm:seresnet18", weights="pretrained", classes=1000)
    assert "take 3 channels, not 1" in error_of("torchvision:resnet18", weights="pretrained", channels=1)
    line = error_of("torchvision:resnet18", weights="pretrained")
    assert "1000" in line
    assert "10" in line


def test_pretrained_that_cannot_be_fetched_names_the_model(monkeypatch, tmp_path):
    def no_network(*arguments, **options):
        raise OSError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    line = error_of("torchvision:squeezenet1_1", classes=1000, weights="pretrained")
    assert "'torchvision:squeezenet1_1' cannot be built with pretrained weights" in line
    monkeypatch.setattr(timm, "create_model", no_network)
    line = error_of("timm:resnet18", classes=1000, weights="pretrained")
    assert "'timm:resnet18' cannot be built with pretrained weights: Name or service" in line


def test_timm_pretrained_with_other_classes_is_an_error_not_a_random_head(tmp_path):
    saved = timm.create_model("test_resnet", num_classes=6)
    timm.models.save_for_hf(saved, tmp_path, model_config={"num_classes": 6}, safe_serialization=True)
    spec = f"timm:local-dir:{tmp_path}"
    network = build_model(spec, classes=6, weights="pretrained")
    torch.testing.assert_close(network.state_dict(), saved.state_dict())
    assert "have 6 classes, not 10" in error_of(spec, weights="pretrained")


def test_hub_entries_get_kwargs_and_a_pinned_revision(monkeypatch):
    calls = []

    def load(*arguments, **options):
        calls.append((arguments, options))
        return nn.Linear(2, 2) if arguments[1] == "net" else "no network"

    monkeypatch.setattr(torch.hub, "load", load)
    options = {"trust_code": True, "weights": "pretrained", "kwargs": {"width": 2}}
    assert isinstance(build_model("hub:someone/nets:v1:net", classes=10, **options), nn.Linear)
    assert calls[0][0] == ("someone/nets:v1", "net")
    assert {"trust_repo": True, "pretrained": True, "width": 2}.items() <= calls[0][1].items()
    assert "not str" in error_of("hub:someone/nets:other", trust_code=True)
    assert "hub:OWNER/REPO:ENTRY" in error_of("hub:someone:net", trust_code=True)


NETS = """
from torch import nn

def ours(classes, channels, width=4):
    return nn.Sequential(nn.Conv2d(channels, width, 1), nn.Flatten(), nn.Linear(width, classes))

def theirs(num_classes, *, in_chans):
    return ours(num_classes, in_chans)

def fixed():
    return ours(5, 2)

def any_kwargs(**kwargs):
    return ours(**kwargs)

def wrong():
    return "a name"

class Linear(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.layer = nn.Linear(classes, classes)
"""


@pytest.fixture
def nets(tmp_path: Path) -> str:
    path = tmp_path / "own_nets.py"
    path.write_text(NETS)
    return f"python:{path}"


def shapes(network: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(parameter.shape) for parameter in network.parameters() if parameter.ndim > 1]


@pytest.mark.parametrize(
    ("factory", "kwargs", "expected"),
    [
        ("ours", {"width": 3}, [(3, 2, 1, 1), (5, 3)]),
        ("theirs", {}, [(4, 2, 1, 1), (5, 4)]),
        ("fixed", {}, [(4, 2, 1, 1), (5, 4)]),
        ("any_kwargs", {"classes": 5, "channels": 2}, [(4, 2, 1, 1), (5, 4)]),
        ("Linear", {}, [(5, 5)]),
    ],
)
def test_a_factory_of_the_user_gets_what_its_signature_names(nets, factory, kwargs, expected):
    network = build_model(f"{nets}:{factory}", classes=5, channels=2, kwargs=kwargs, trust_code=True)
    assert shapes(network) == expected


def test_a_factory_by_module_name(nets, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    network = build_model("python:own_nets:fixed", classes=5, trust_code=True)
    assert shapes(network) == [(4, 2, 1, 1), (5, 4)]


def test_a_file_finds_its_neighbours_and_a_module_the_working_directory(nets, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "near").mkdir()
    (tmp_path / "near" / "neighbour_of_nets.py").write_text(NETS)
    (tmp_path / "near" / "nets.py").write_text("from neighbour_of_nets import fixed\n")
    network = build_model(f"python:{tmp_path}/near/nets.py:fixed", classes=5, trust_code=True)
    assert shapes(network) == [(4, 2, 1, 1), (5, 4)]
    monkeypatch.chdir(tmp_path / "near")
    (tmp_path / "near" / "nets_that_are_here.py").write_text(NETS)
    network = build_model("python:nets_that_are_here:fixed", classes=5, trust_code=True)
    assert shapes(network) == [(4, 2, 1, 1), (5, 4)]


def test_errors_of_python_models(nets, tmp_path):
    (tmp_path / "broken.py").write_text("def make(:\n")
    (tmp_path / "needy.py").write_text("import no_such_package\n")
    cases = {
        f"{nets}:ors": "did you mean 'ours'?",
        f"{nets}:wrong": "not str",
        f"{nets}:any_kwargs:": "must read python:module:factory",
        f"python:{tmp_path}/absent.py:make": "no file",
        f"python:{tmp_path}/broken.py:make": "cannot be imported",
        f"python:{tmp_path}/needy.py:make": "no_such_package",
        "python:no_such_package.nets:make": "cannot be imported",
        "python:..nets:make": "neither a dotted module name nor a .py file",
    }
    for spec, part in cases.items():
        assert part in error_of(spec, trust_code=True)
    assert "did you mean 'width'?" in error_of(f"{nets}:ours", kwargs={"widht": 3}, trust_code=True)


def test_convolutions_begin_with_hes_deviation_by_fan_out_also_where_images_have_one_channel():
    torch.manual_seed(0)
    wide = initialise(nn.Sequential(nn.Conv2d(8, 256, 3, bias=True)))[0]
    assert float(wide.weight.detach().std()) == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.03)
    assert not wide.bias.any()
    first = build_model("torchvision:resnet18", classes=5, channels=1).conv1
    assert first.weight.shape == (64, 1, 7, 7)
    assert float(first.weight.detach().std()) == pytest.approx((2 / (49 * 64)) ** 0.5, rel=0.05)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("depth", [1, 3])
def test_tiny_networks_of_any_depth_halve_the_side_twice(name: str, depth: int):
    network = build_model(f"dfkd:{name}", classes=3, channels=1, kwargs={"width": 2, "depth": depth})
    assert network.features(torch.rand(2, 1, 16, 16)).shape[2:] == (4, 4)
