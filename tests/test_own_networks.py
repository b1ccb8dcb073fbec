"""Networks as users write them: what is not torch's own class, not used, not finite, not of one size."""

import copy
import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.layers.norm_act import BatchNormAct2d, freeze_batch_norm_2d
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FrozenBatchNorm2d

from dfkd.classifier import Classifier
from dfkd.compress.closed_form import closed_form
from dfkd.compress.cost import cost
from dfkd.compress.files import load_compressed, save_compressed
from dfkd.compress.prune import prune
from dfkd.compress.quantize import quantize
from dfkd.compress.tracing import trace
from dfkd.errors import UserError
from dfkd.models import build_model

Layers = Callable[..., nn.Module]
STREAM = list(torch.randn(4, 16, 3, 12, 12, generator=torch.Generator().manual_seed(0)))


class OwnConv(nn.Conv2d):
    """A convolution that is set up otherwise, and computes as torch's does."""

    def __init__(self, taken: int, given: int) -> None:
        super().__init__(taken, given, 3)


class OwnNorm(nn.BatchNorm2d):
    """As torch's."""


def network(conv: Layers = nn.Conv2d, norm: Layers = nn.BatchNorm2d) -> nn.Sequential:
    torch.manual_seed(0)
    size = () if conv is OwnConv else (3,)
    layers = [conv(3, 8, *size), norm(8), nn.ReLU(), conv(8, 8, *size), norm(8), nn.ReLU()]
    made = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    made.train()(STREAM[0])
    return made.eval()


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(STREAM[1])


Act = Callable[[nn.Module], nn.Module]
ACTS: list[Act] = [
    lambda net: prune(net, STREAM, 0.3, repair="batch_norm", images=64).model,
    lambda net: prune(net, STREAM, 0.5, kind="weights", images=64).model,
    lambda net: prune(net, STREAM, 0.5, images=64).model,
    lambda net: quantize(net, STREAM, (4, 8), images=32, steps=3).model,
    lambda net: closed_form(net, 0.3).model,
]


@pytest.mark.parametrize("act", ACTS)
def test_layers_of_derived_classes_are_compressed_as_torchs_are(act: Act) -> None:
    assert torch.equal(outputs(act(network(OwnConv, OwnNorm))), outputs(act(network())))


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, partial(BatchNormAct2d, apply_act=False)])
def test_frozen_batch_norms_are_compressed_as_those_they_were(norm: Layers, act: Act) -> None:
    plain = network(norm=norm)
    frozen = freeze_batch_norm_2d(copy.deepcopy(plain))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in frozen.modules())
    torch.testing.assert_close(outputs(act(frozen)), outputs(act(plain)), rtol=1e-4, atol=1e-4)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in frozen.modules())  # the user's own stays


def test_a_layer_that_computes_otherwise_is_not_taken_for_one_of_torchs() -> None:
    class Doubled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    with pytest.raises(UserError, match="0 calls conv2d itself"):
        quantize(network(lambda *given: Doubled(*given)), STREAM, method="nearest", images=16)


def test_a_frozen_batch_norm_that_computes_otherwise_stays_what_it_is() -> None:
    class Doubled(FrozenBatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x) + 1

    net = nn.Sequential(nn.Conv2d(3, 8, 3), Doubled(8), nn.Flatten(), nn.Linear(800, 5)).eval()
    torch.testing.assert_close(outputs(closed_form(net, bits=8).model), outputs(net), rtol=0, atol=0.05)


def test_a_student_of_frozen_batch_norms_is_loaded_as_it_was(tmp_path: Path) -> None:
    code = "from timm.layers import freeze_batch_norm_2d\nfrom torch import nn\n"
    code += "def make(classes, channels):\n    layers = nn.Conv2d(channels, 8, 3), nn.BatchNorm2d(8), nn.ReLU()\n"
    code += "    tail = nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes)\n"
    (tmp_path / "net.py").write_text(code + "    return freeze_batch_norm_2d(nn.Sequential(*layers, *tail))\n")
    about = {"model": f"python:{tmp_path / 'net.py'}:make", "classes": 5, "channels": 3}
    model = build_model(str(about["model"]), classes=5, channels=3, trust_code=True).eval()
    save_compressed(tmp_path / "student", model, about)
    loaded: Any = load_compressed(tmp_path / "student", trust_code=True)
    assert isinstance(loaded.model[1], FrozenBatchNorm2d)
    assert torch.equal(outputs(loaded), outputs(model))
    for kind in ("channels", "weights"):
        done = prune(model, STREAM, 0.5, kind=kind, images=64)
        save_compressed(tmp_path / kind, done.model, about | {"structure": done.structure})
        torch.testing.assert_close(outputs(load_compressed(tmp_path / kind, trust_code=True)), outputs(done.model))


GRAPH = """
from torch import fx, nn

def make(classes, channels):
    layers = nn.Conv2d(channels, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
    tail = nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes)
    return fx.symbolic_trace(nn.Sequential(*layers, *tail))
"""


@pytest.mark.parametrize("graph", [False, True])
def test_what_is_compressed_again_is_saved_whole(tmp_path: Path, graph: bool) -> None:
    (tmp_path / "net.py").write_text(GRAPH)
    spec = f"python:{tmp_path / 'net.py'}:make" if graph else "dfkd:tiny_plain"
    about = {"model": spec, "classes": 5, "channels": 3, "kwargs": {} if graph else {"width": 8}}
    model = build_model(spec, classes=5, channels=3, kwargs=about["kwargs"], trust_code=True).eval()
    first = prune(model, STREAM, 0.3, images=64, inner_only=True)
    steps: dict[str, Act] = {
        "channels": lambda net: prune(net, STREAM, 0.3, images=64, inner_only=True),
        "weights": lambda net: prune(net, STREAM, 0.3, kind="weights", images=64),
        "closed": lambda net: closed_form(net, 0.2),
        "rounded": lambda net: closed_form(net, bits=8),
        "bits": lambda net: quantize(net, STREAM, 8, method="nearest", images=32),
    }
    for name, step in steps.items():
        done: Any = step(first.model)
        save_compressed(tmp_path / name, done.model, about | {"structure": done.structure})
        loaded = load_compressed(tmp_path / name, trust_code=True)
        torch.testing.assert_close(outputs(loaded), outputs(done.model), msg=name)
        if name == "channels":
            again: Any = prune(loaded, STREAM, 0.3, images=64, inner_only=True)
            assert again.structure["channels"].keys() >= first.structure["channels"].keys()


@pytest.mark.parametrize("affine", [True, False])
def test_a_joint_norm_without_statistics_is_traced_as_it_is(affine: bool) -> None:
    joint = partial(BatchNormAct2d, affine=affine, track_running_stats=False)
    assert torch.equal(trace(network(norm=joint), STREAM[0])(STREAM[1]), outputs(network(norm=joint)))


class Auxiliary(nn.Module):
    """A head for training alone, computed always."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.aux, self.b, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 5), nn.Conv2d(8, 8, 3), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.a(x))
        aux = self.aux(x.mean((2, 3)))
        x = self.fc(F.relu(self.b(x)).mean((2, 3)))
        return (x, aux) if self.training else x


@pytest.mark.parametrize("bits", [8, (4, 8), 4])
def test_what_is_behind_a_head_that_nobody_reads_is_reconstructed(bits: Any) -> None:
    torch.manual_seed(0)
    lines = quantize(Auxiliary().eval(), STREAM, bits, images=32, steps=2).layers
    assert {line["layer"] for line in lines if "note" in line} <= {"aux"}
    assert {"a", "b", "fc"} <= {line["layer"] for line in lines if "error_after" in line}


class Several(nn.Module):
    """Logits, and what a caller asks for beside them."""

    def __init__(self, give: Callable[[Tensor, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.give = give
        self.a, self.b, self.c, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Any:
        early = F.relu(self.a(x))
        features = F.relu(self.c(F.relu(self.b(early)))).mean((2, 3))
        return self.give(self.fc(features), early, features)


@pytest.mark.parametrize(
    "give", [lambda logits, early, features: (logits, early), lambda logits, early, features: (logits, features)]
)
def test_what_is_behind_a_tensor_that_is_given_too_is_repaired(give: Callable[..., Any]) -> None:
    def made(give: Callable[..., Any]) -> nn.Module:
        torch.manual_seed(0)
        return Several(give).eval()

    alone = made(lambda logits, early, features: logits)
    pruned = [prune(net, STREAM, 0.5, kind="weights", images=64).model for net in (made(give), alone)]
    torch.testing.assert_close(outputs(pruned[0])[0], outputs(pruned[1]))
    lines = quantize(made(give), STREAM, 4, images=32, steps=2).layers
    assert [line["layer"] for line in lines if "error_after" in line] == ["a", "b", "c", "fc"]
    assert not any("note" in line for line in lines)


class Excited(nn.Module):
    """Squeeze and excitation with a view that takes the size of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.squeeze, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        gate = self.squeeze(F.adaptive_avg_pool2d(x, 1).view(x.size(0), x.size(1))).sigmoid()
        return self.fc((x * gate[:, :, None, None]).mean((2, 3)))


@pytest.mark.parametrize("unit", ["block", "layer"])
def test_layers_behind_a_view_of_sizes_are_reconstructed(unit: str) -> None:
    torch.manual_seed(0)
    lines = quantize(Excited().eval(), STREAM, 4, images=32, steps=2, unit=unit).layers
    assert not any("note" in line for line in lines)
    assert sum("error_after" in line for line in lines) == 3


def test_a_quantised_network_is_pickled_and_read_again() -> None:
    model = quantize(network(), STREAM, 8, method="nearest", images=32).model
    torch.save(model, file := io.BytesIO())
    file.seek(0)
    assert torch.equal(outputs(torch.load(file, weights_only=False)), outputs(model))


class Position(nn.Module):
    """A part of a parameter is added."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.place, self.fc = nn.Conv2d(3, 8, 3), nn.Parameter(torch.randn(8)), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc((self.conv(x) + self.place[:, None, None]).mean((2, 3)))


def test_the_cost_of_a_network_that_adds_views_of_parameters() -> None:
    model = Position().eval()
    quantised = quantize(model, STREAM, 8, method="nearest", images=32).model
    for each in (model, quantised):
        assert cost(each, STREAM[0][:1])["macs"] == 8 * 27 * 100 + 40
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_batch_norms_without_statistics_or_without_a_bias() -> None:
    bare = network(norm=lambda c: nn.BatchNorm2d(c, track_running_stats=False))
    with pytest.raises(UserError, match="needs batch norms with running statistics and Sequential has none"):
        prune(bare, STREAM, 0.3, repair="batch_norm", images=64)
    assert prune(bare, STREAM, 0.3, images=64).model[1].num_features == 6
    # A bias of zeros is one that is not there.
    without, zeros = (network(norm=norm) for norm in (lambda c: nn.BatchNorm2d(c, bias=False), nn.BatchNorm2d))
    for method in ("rectified", "udfc"):
        done = [outputs(closed_form(each, 0.3, bits=4, method=method).model) for each in (without, zeros)]
        assert torch.equal(*done)


def test_layers_of_its_own_called_quantizers_are_left_where_they_are() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.quantizers = nn.ModuleList([nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)])
            self.fc = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.quantizers:
                x = F.relu(layer(x))
            return self.fc(x.mean((2, 3)))

    done = quantize(Named().eval(), STREAM, method="train", steps=1, warm_start=1, images=32)
    assert outputs(done.model).shape == (16, 5)


def test_sums_that_weigh_one_part_are_repaired_as_if_it_were_written_out() -> None:
    class Sum(nn.Module):
        def __init__(self, alpha: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
            self.fc, self.alpha = nn.Linear(8, 5), alpha

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            z = self.c(F.relu(self.b(x)))
            return self.fc((torch.add(x, z, alpha=-1) if self.alpha else x + -1 * z).mean((2, 3)))

    done = [prune(Sum(alpha).eval(), STREAM, 0.5, images=64).model for alpha in (True, False)]
    assert torch.allclose(outputs(done[0]), outputs(done[1]), atol=1e-5)


def infer(call: Callable[[], object]) -> Callable[[], object]:
    return torch.inference_mode()(call)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (
            lambda: prune(network(), [*STREAM[:1], torch.randn(16, 3, 16, 16)], images=32),
            r"several sizes, \[\(3, 12, 12",
        ),
        (lambda: quantize(network(), [*STREAM[:1], torch.randn(16, 3, 9, 9)], images=32, steps=2), "of several sizes"),
        (
            lambda: quantize(network(), [torch.full((16, 3, 12, 12), 200)], images=16, method="nearest"),
            r"images in torch\.int64 up to 200; give uint8 ones, or float ones what the network takes: divide by 255",
        ),
        (
            lambda: prune(
                Classifier(network(), mean=[0.5] * 3, std=[0.2] * 3), [torch.full((64, 3, 12, 12), 200.0)], images=64
            ),
            r"images in torch\.float32 up to 200; give uint8 ones, or float ones in \[0, 1\]: divide by 255",
        ),
        (infer(lambda: prune(network(), STREAM, images=16)), r"within torch\.inference_mode"),
        (infer(lambda: quantize(network(), STREAM, images=16)), r"within torch\.inference_mode"),
        (infer(lambda: closed_form(network(), 0.3)), r"within torch\.inference_mode"),
        (lambda: prune(network(), [STREAM[0] * torch.nan], images=16), "images that hold NaN or infinity"),
        (lambda: prune(torch.jit.script(network()), STREAM, images=16), "the network is scripted"),
        (lambda: quantize(torch.jit.script(network()), STREAM, images=16), "the network is scripted"),
        (lambda: quantize(torch.compile(network()), STREAM, images=16), "the network is compiled"),
        (lambda: quantize(network(), STREAM, images=16, step=3), "takes no step; did you mean 'steps'"),
        (lambda: quantize(network(), STREAM, method="train", images=16, warm=3), "method='train' takes no warm"),
    ],
)
def test_what_will_not_do_is_said_in_a_line(act: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        act()
    assert "\n" not in str(error.value)


def test_numpys_numbers_are_bits() -> None:
    done = quantize(network(), STREAM, (np.int64(4), np.int32(8)), method="nearest", images=16)
    assert {(line["weight_bits"], line["activation_bits"]) for line in done.layers[1:-1]} == {(4, 8)}
