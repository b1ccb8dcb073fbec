"""Teachers: frozen, with their own normalisation; what their batch norms see; the zoo and who is sampled from it."""

import copy
import itertools
import math
import pickle
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from dfkd import losses as L
from dfkd.classifier import Classifier, check_trainable
from dfkd.compress.files import load_compressed
from dfkd.draws import Moves
from dfkd.errors import UserError
from dfkd.models import build_model, save_model
from dfkd.pretrain import train_teacher
from dfkd.runtime import compiled, eval_mode, frozen
from dfkd.teachers import (
    Teacher,
    batch_norms,
    check_teacher,
    load_zoo,
    map_layers,
    sample_teachers,
    tap_features,
    zoo_logits,
)

MakeTeacher = Callable[..., Teacher]

NETWORKS = {
    "plain": ("dfkd:tiny_plain", 1, 8, {"width": 4}),
    "pre-activation": ("dfkd:wrn_16_1", 1, 8, {}),
    "timm, BatchNormAct2d": ("timm:test_efficientnet", 3, 32, {}),
    "torchvision": ("torchvision:resnet18", 3, 32, {}),
}


def images(batch: int = 6, channels: int = 1, size: int = 8, seed: int = 1) -> Tensor:
    return torch.rand(batch, channels, size, size, generator=torch.Generator().manual_seed(seed))


def hooks(model: nn.Module) -> int:
    """Hooks, and norms whose forward is not their own."""
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) + ("forward" in vars(module))
        for module in model.modules()
    )


class Fixed(nn.Module):
    """Gives the same logits for every image."""

    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.register_buffer("logits", torch.tensor(logits))

    def forward(self, x: Tensor) -> Tensor:
        return self.logits.expand(len(x), -1) + 0 * x.mean()


# --- the tap on batch norms ---


@pytest.mark.parametrize("case", NETWORKS)
def test_the_tap_sees_mean_and_biased_variance_of_every_batch_norms_input(make_teacher: MakeTeacher, case: str) -> None:
    spec, channels, size, kwargs = NETWORKS[case]
    teacher = make_teacher("t", spec, channels=channels, kwargs=kwargs)
    seen: list[tuple[nn.modules.batchnorm._BatchNorm, Tensor]] = []
    norms = [module for module in teacher.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) > 3
    handles = [
        norm.register_forward_hook(lambda m, x, y: seen.append((m, x[0].detach().double().clone()))) for norm in norms
    ]
    with teacher.tap() as statistics:
        teacher(images(6, channels, size))
    for handle in handles:
        handle.remove()
    assert len(statistics.batch) == len(statistics.stored) == len(norms)
    for (mean, var), (mu, sigma2), (norm, x) in zip(statistics.gather(), statistics.stored, seen):
        assert mean.dtype == var.dtype == torch.float32
        assert torch.allclose(mean.double(), x.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
        assert torch.allclose(var.double(), x.var((0, 2, 3), unbiased=False), rtol=1e-5, atol=1e-7)
        assert torch.equal(mu, norm.running_mean)
        assert torch.equal(sigma2, norm.running_var)


def test_tapping_changes_neither_logits_nor_buffers_and_leaves_no_hook(make_teacher: MakeTeacher) -> None:
    teacher = make_teacher()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    plain = teacher(images())
    with teacher.tap() as statistics, tap_features(teacher) as features:
        assert hooks(teacher) > 0
        tapped = teacher(images())
    assert torch.equal(plain, tapped)
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert hooks(teacher) == 0
    layers = len(statistics.batch)
    teacher(images())
    assert len(statistics.batch) == layers
    assert len(features) == 1


def test_no_hook_outlives_an_error(make_teacher: MakeTeacher) -> None:
    teacher = make_teacher()
    with pytest.raises(RuntimeError), teacher.tap(), tap_features(teacher):  # noqa: PT012
        assert hooks(teacher) > 0
        teacher(images(channels=5))
    assert hooks(teacher) == 0


def test_features_are_what_the_last_linear_layer_reads(make_teacher: MakeTeacher) -> None:
    teacher = make_teacher()
    with tap_features(teacher) as features:
        logits = teacher(images())
    weight, bias = teacher.model.linear.weight, teacher.model.linear.bias
    assert torch.allclose(features[0] @ weight.T + bias, logits, atol=1e-6)


def test_maps_are_the_inputs_of_layers_spread_over_the_depth(make_teacher: MakeTeacher) -> None:
    deep = nn.Sequential(*[nn.BatchNorm2d(3) for _ in range(20)], nn.Flatten(), nn.Linear(48, 2))
    assert [list(deep).index(layer) for layer in map_layers(deep)] == [1, 5, 8, 11, 15, 18]
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.Flatten())
    assert map_layers(plain) == [plain[0], plain[2]]
    assert map_layers(nn.Sequential(nn.Linear(2, 2))) == []
    teacher = make_teacher()
    with teacher.tap() as statistics, teacher.tap_maps(lambda maps: maps.mean((0, 2, 3))) as means:
        teacher(images())
    assert hooks(teacher) == 0
    assert len(means) == len(map_layers(teacher.model))
    seen = [mean for mean, _ in statistics.batch]
    assert all(any(torch.allclose(m, s, atol=1e-6) for s in seen if s.shape == m.shape) for m in means)


def test_compiled_a_teacher_has_hooks_that_come_and_go_and_is_itself_again(
    make_teacher: MakeTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=graphs))
    teacher, x = make_teacher(), images()
    wanted = teacher(x)
    with torch.no_grad():
        with compiled([teacher.model]):
            teacher(x)
            assert graphs.frame_count == 0  # outside the steps
            with torch.compiler.set_stance("default"):
                for asked in (True, False, True, False):
                    with teacher.tap_means() if asked else nullcontext([]) as means:
                        torch.testing.assert_close(teacher(x), wanted)
                    assert len(means) == (len(batch_norms(teacher.model)) if asked else 0)
            assert graphs.frame_count == 2
        teacher(x[:3])
        assert graphs.frame_count == 2


def test_a_network_that_cannot_be_compiled_is_named_in_one_line(
    make_teacher: MakeTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unable(*_: object) -> None:
        raise NotImplementedError("no such kernel")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=unable))
    teacher = make_teacher()
    with (
        pytest.raises(
            UserError, match=r"a network could not be compiled \(.*no such kernel.*; set runtime.compile=false"
        ),
        compiled([teacher.model]),
        torch.compiler.set_stance("default"),
    ):
        teacher(images())
    assert teacher(images()).shape == (6, 3)


def test_gradient_reaches_images_and_no_weight(make_teacher: MakeTeacher) -> None:
    teacher = make_teacher()
    x = images().requires_grad_()
    with teacher.tap() as statistics:
        logits = teacher(x)
    (logits.square().sum() + sum(mean.sum() + var.sum() for mean, var in statistics.gather())).backward()
    assert x.grad is not None
    assert x.grad.flatten(1).any(1).all()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.parameters())


# --- frozen, normalised, resized ---


def test_a_teacher_stays_in_eval_mode_also_inside_a_training_module(make_teacher: MakeTeacher) -> None:
    teacher = make_teacher()
    nn.ModuleList([teacher]).train()
    teacher.train()
    assert not any(module.training for module in teacher.modules())


def test_borrowed_modes_and_gradients_are_given_back_also_after_an_error() -> None:
    model = nn.Sequential(nn.BatchNorm2d(2), nn.Sequential(nn.Conv2d(2, 2, 1)))
    model[0].eval()
    model[1][0].weight.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    assert len(set(modes)) == len(set(wanted)) == 2
    with pytest.raises(ZeroDivisionError), eval_mode(model), frozen(model):  # noqa: PT012
        assert not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
        raise ZeroDivisionError
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted


def test_images_are_resized_and_normalised_for_the_network() -> None:
    taken: list[Tensor] = []
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 5 * 5, 4))
    network.register_forward_pre_hook(lambda module, inputs: taken.append(inputs[0]))
    mean, std = [0.1, 0.2, 0.3], [0.5, 1.0, 2.0]
    x = images(2, 3, 12)
    logits = Teacher(network, mean=mean, std=std, input_size=5)(x)
    small = F.interpolate(x, size=(5, 5), mode="bilinear", align_corners=False, antialias=True)
    for channel in range(3):
        assert torch.allclose(taken[0][:, channel], (small[:, channel] - mean[channel]) / std[channel], atol=1e-6)
    assert logits.dtype == torch.float32
    Teacher(network, input_size=5)(x[:, :, :5, :5])
    assert torch.equal(taken[1], x[:, :, :5, :5])


@pytest.mark.parametrize("size", [5, 12, 17])
def test_resized_images_and_their_gradient_are_those_of_interpolate(size: int) -> None:
    classifier, x = Teacher(nn.Identity(), input_size=size), images(2, 3, 12)[:, :, :, :9]
    slope = images(2, 3, size)
    ours, theirs = (each.clone().double().requires_grad_() for each in (x, x))
    wanted = F.interpolate(theirs, size=(size, size), mode="bilinear", align_corners=False, antialias=True)
    found = classifier.resized(ours)
    assert torch.allclose(found, wanted, atol=1e-6)
    (found * slope).sum().backward()
    (wanted * slope).sum().backward()
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(classifier.resized(x.clone().requires_grad_()).double(), wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("mean", "std"), [([0.5], []), ([0.5, 0.5], [1.0]), ([0.5], [0.0]), ([0.5], [-1.0]), ([0.5], [math.nan])]
)
def test_a_bad_normalisation_is_refused(mean: list[float], std: list[float]) -> None:
    with pytest.raises(UserError, match=r"teacher digits: mean .* and std .* must be one value per channel"):
        Teacher(nn.Identity(), name="digits", mean=mean, std=std)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_network_in_half_precision_is_refused(dtype: torch.dtype) -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 3)).to(dtype)
    with pytest.raises(UserError, match=rf"teacher digits: 0\.weight is {dtype}; call \.float\(\) on the network"):
        Teacher(network, name="digits")


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
def test_programs_without_layers_to_look_into_are_refused() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 3)).eval()
    example = torch.rand(2, 1, 8, 8)
    for program in (
        torch.jit.trace(network, example),
        torch.jit.script(network),
        torch.export.export(network, (example,)).module(),
    ):
        with pytest.raises(UserError, match=r"digits is a compiled or exported program, .* give the Python module"):
            Teacher(program, name="digits")


def test_the_normalisation_is_where_the_network_is() -> None:
    teacher = Teacher(nn.Conv2d(1, 2, 3).to("meta"), mean=[0.5], std=[0.2])
    assert teacher.mean.device == teacher.std.device == torch.device("meta")
    assert teacher(torch.rand(2, 1, 8, 8, device="meta")).shape == (2, 2, 6, 6)


def test_a_teacher_is_trained_as_torchs_sgd_trains_it() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    twin = copy.deepcopy(network).double()
    images, labels = torch.randint(256, (32, 1, 8, 8), dtype=torch.uint8), torch.arange(32) % 3
    classifier = Classifier(network, mean=[0.4], std=[0.3])
    assert train_teacher(classifier, images, labels, epochs=5, batch_size=32, lr=0.1, weight_decay=0.01)
    sgd = torch.optim.SGD(twin.parameters(), lr=0.0, momentum=0.9, nesterov=True, weight_decay=0.01)
    for progress in (0.0, 0.2, 0.4, 0.6, 0.8):  # up over the first fifth, then a cosine
        rate = progress / 0.2 if progress < 0.2 else (1 + math.cos(math.pi * (progress - 0.2) / 0.8)) / 2
        sgd.param_groups[0]["lr"] = 0.1 * rate
        sgd.zero_grad()
        F.cross_entropy(twin((images.double() / 255 - 0.4) / 0.3), labels).backward()
        sgd.step()
    for ours, exact in zip(network.parameters(), twin.parameters()):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-5)


def test_teachers_without_any_weight_are_refused(make_teacher: Callable[..., Teacher]) -> None:
    zoo = [make_teacher(name, weight=0.0) for name in ("a", "b")]
    with pytest.raises(UserError, match="the weights of a, b sum to 0; give one a weight above 0"):
        zoo_logits(zoo, torch.rand(2, 1, 8, 8))


def test_a_mean_of_images_in_0_to_255_is_refused() -> None:
    with pytest.raises(UserError, match=r"teacher digits: mean \[123\.7\] is none .* divide mean and std by 255"):
        Teacher(nn.Identity(), name="digits", mean=[123.7], std=[58.4])


def test_batch_norms_are_found_by_their_statistics() -> None:
    model = nn.Sequential(
        *(nn.BatchNorm1d(2), nn.SyncBatchNorm(2), nn.BatchNorm2d(2, track_running_stats=False), nn.GroupNorm(1, 2)),
        nn.InstanceNorm2d(2, track_running_stats=True),  # its variance is that within an image
    )
    assert list(batch_norms(model)) == ["0", "1"]


class OwnNorm(nn.BatchNorm2d):
    """The same batch norm as a stranger may write it: its statistics in the shape of maps."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.running_mean = torch.linspace(-1, 1, channels).view(1, -1, 1, 1)
        self.running_var = torch.linspace(0.5, 2, channels).view(1, -1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.running_mean) / (self.running_var + self.eps).sqrt()
        return x * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


@pytest.mark.parametrize("distance", L.BN_DISTANCES)
def test_statistics_of_any_shape_are_a_number_a_channel(distance: str) -> None:
    own, plain = OwnNorm(4), nn.BatchNorm2d(4)
    plain.running_mean, plain.running_var = own.running_mean.flatten(), own.running_var.flatten()
    conv, x = nn.Conv2d(1, 4, 3), images()
    losses = []
    for norm in (own, plain):
        teacher = Teacher(nn.Sequential(conv, norm, nn.Flatten(), nn.Linear(144, 3)))
        with teacher.tap() as statistics:
            teacher(x)
        losses.append(L.BN_DISTANCES[distance](statistics.gather(), statistics.stored))
    torch.testing.assert_close(*losses)


# --- what is refused ---


def nan_weight() -> nn.Module:
    model = build_model("dfkd:tiny_plain", classes=3, channels=1, kwargs={"width": 4, "depth": 1})
    with torch.no_grad():
        model.features[1].running_var[1] = float("nan")
    return model


class Viewing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.linear = nn.Conv2d(1, 4, 3), nn.Linear(144, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.convolution(x).view(len(x), -1))


class InPair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.flatten(1)[:, :3], x


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "NaN": (nan_weight, r"teacher t: features\.1\.running_var holds NaN or infinity; give a sound checkpoint"),
    "size": (
        lambda: nn.Linear(5, 3),
        r"teacher t does not take images \[B, 1, 8, 8\]: .*; set teachers\.t\.input_size",
    ),
    "channels": (lambda: nn.Conv2d(3, 3, 8), r"teacher t does not take images \[B, 1, 8, 8\]"),
    "assertion inside": (
        lambda: build_model("timm:test_vit", classes=3, channels=1),
        r"teacher t does not take images \[B, 1, 8, 8\]: .*Input height",
    ),
    "a view of maps": (
        lambda: Viewing().to(memory_format=torch.channels_last),
        r"teacher t does not take images .*: view size is not compatible .*; let it reshape or flatten",
    ),
    "several outputs": (InPair, r"teacher t gives a tuple where logits \[B, 3\] belong; give a model whose forward"),
    "classes": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 5)),
        r"teacher t gives \(5,\) outputs where classes=3; make them agree",
    ),
    "map of outputs": (lambda: nn.Conv2d(1, 3, 3), r"teacher t gives \(3, 6, 6\) outputs where classes=3"),
    "softmax": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.Softmax(1)),
        r"teacher t ends in a softmax \(its outputs sum to one\); give the network without it",
    ),
}


class Auxiliary(nn.Module):
    """A network with a second head in training, as GoogLeNet's."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Any:
        logits = self.linear(x.flatten(1))
        return (logits, logits) if self.training else logits


class Remembers(nn.Sequential):
    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        pass


def test_what_cannot_be_trained_or_written_is_refused_in_one_line() -> None:
    x = images()
    plain = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Dropout(), nn.Linear(64, 3))
    before, state = copy.deepcopy(plain.state_dict()), torch.get_rng_state()
    check_trainable(Classifier(plain), x, "the student")
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(UserError, match="the student gives a tuple in training mode, where logits belong"):
        check_trainable(Classifier(Auxiliary()), x, "the student")
    with pytest.raises(UserError, match="teacher t keeps _extra_state in its state, which is no tensor"):
        check_trainable(Classifier(Remembers(*plain)), x, "teacher t")
    check_teacher(Teacher(Remembers(*plain)), classes=3, channels=1, size=8)  # it only answers


@pytest.mark.parametrize("case", REFUSED)
def test_an_unfit_teacher_is_refused_in_one_line(case: str) -> None:
    build, message = REFUSED[case]
    teacher = Teacher(build(), name="t")
    with pytest.raises(UserError, match=message) as caught:
        check_teacher(teacher, classes=3, channels=1, size=8)
    assert "\n" not in str(caught.value)


def test_sound_teachers_pass(make_teacher: MakeTeacher) -> None:
    check_teacher(make_teacher(), classes=3, channels=1, size=8)
    plain = Teacher(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)))
    check_teacher(plain, classes=3, channels=1, size=8)


# --- the zoo ---


def test_a_zoo_is_built_from_its_description(tmp_path: Path) -> None:
    trained = build_model("dfkd:tiny_plain", classes=4, channels=1, kwargs={"width": 2})
    save_file(trained.state_dict(), tmp_path / "plain.safetensors")
    plain = {
        "model": "dfkd:tiny_plain",
        "weights": str(tmp_path / "plain.safetensors"),
        "kwargs": {"width": 2},
        "mean": [0.4],
        "std": [0.3],
    }
    residual = {
        "model": "dfkd:tiny_residual",
        "kwargs": {"width": 2},
        "input_size": 16,
        "weight": 2.0,
        "moves": Moves(3),
    }
    with pytest.raises(UserError, match=r"teachers\.b has no weights; give a path"):
        load_zoo({"a": plain, "b": residual}, classes=4, channels=1, size=8)
    zoo = load_zoo({"a": plain, "b": residual}, classes=4, channels=1, size=8, untrained=True)
    assert [(t.name, t.weight, t.input_size) for t in zoo] == [("a", 1.0, None), ("b", 2.0, 16)]
    assert [t.moves for t in zoo] == [Moves(), Moves(3)]
    x = images()
    assert torch.allclose(zoo[0](x), trained.eval()((x - 0.4) / 0.3), atol=1e-5)
    assert zoo[1](x).shape == (6, 4)
    with pytest.raises(UserError, match="unknown model 'dfkd:tiny_plane'"):
        load_zoo({"a": plain | {"model": "dfkd:tiny_plane"}}, classes=4, channels=1, size=8)
    with pytest.raises(UserError, match=r"teachers\.b has unknown keys \['flip', 'pad'\]; allowed are .*moves"):
        load_zoo({"b": plain | {"pad": 4, "flip": True}}, classes=4, channels=1, size=8)
    with pytest.raises(UserError, match=r"teachers\.b has no model"):
        load_zoo({"b": {}}, classes=4, channels=1, size=8)
    for given, kind in (("torchvision:resnet18", "str"), ({"model": trained}, "Sequential")):
        with pytest.raises(UserError, match=rf"teachers\.b is given as a {kind}; give a mapping .* Teacher\(module"):
            load_zoo({"b": given}, classes=4, channels=1, size=8)  # type: ignore[dict-item]


def test_the_folder_of_a_trained_model_says_how_it_is_given_images(tmp_path: Path) -> None:
    trained = build_model("dfkd:tiny_plain", classes=4, channels=1, kwargs={"width": 2})
    kept = {"mean": [0.4], "std": [0.3], "input_size": 12, "moves": [2, True, False]}
    about = {"model": "dfkd:tiny_plain", "classes": 4, "channels": 1, "kwargs": {"width": 2}}
    save_model(tmp_path, trained, about | kept)
    spec = {"model": "dfkd:tiny_plain", "weights": str(tmp_path), "kwargs": {"width": 2}}

    def loaded(**own: Any) -> tuple[Any, ...]:
        (teacher,) = load_zoo({"a": spec | own}, classes=4, channels=1, size=8)
        return teacher.normalisation, teacher.input_size, teacher.moves

    assert loaded() == (([0.4], [0.3]), 12, Moves(2, True))
    assert loaded(mean=[], std=[], input_size=None) == loaded()
    own = {"mean": [0.1], "std": [0.2], "input_size": 16, "moves": Moves(1)}
    assert loaded(**own) == (([0.1], [0.2]), 16, Moves(1))
    assert loaded(mean=np.full(1, 0.5), std=np.full(1, 0.25))[0] == ([0.5], [0.25])
    with pytest.raises(UserError, match=r"mean 0\.4 and std \[0\.3\] are lists, of one value per channel each"):
        loaded(mean=0.4)
    # Trained on images of 4 pixels, it sees those of 8 at half their size, and its moves are as wide a share of them.
    save_model(tmp_path, trained, about | kept | {"input_size": None, "size": 4})
    assert loaded()[1:] == (4, Moves(4, True))
    assert load_compressed(tmp_path).input_size == 4
    save_model(tmp_path, trained, about | kept | {"input_size": None, "size": 8})
    assert loaded()[1:] == (None, Moves(2, True))  # so that synthesis.coarse shows it smaller ones


def test_a_networks_layers_are_its_own_and_slow_ones_compute_in_float() -> None:
    """Strided depthwise convolutions, under a CPU's bfloat16 and in a forward alone: the network stays the user's."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(4, 4, 3, 2, groups=4), nn.Flatten(), nn.Linear(36, 3))
    teacher, x = Teacher(network, input_size=8), torch.rand(2, 4, 8, 8)
    seen: list[Tensor] = []
    handle = network[0].register_forward_hook(lambda layer, given, output: seen.append(output))
    with torch.autocast("cpu", torch.bfloat16):
        teacher(x)
    handle.remove()
    assert torch.equal(seen[0], F.conv2d(x, network[0].weight, network[0].bias, 2, groups=4).bfloat16())  # type: ignore[arg-type]
    assert type(network[0]) is nn.Conv2d
    assert torch.fx.symbolic_trace(network)(x).shape == (2, 3)
    assert b"dfkd" not in pickle.dumps(network)


@pytest.mark.parametrize("black", [False, True])
def test_a_teacher_is_trained_on_shifted_images_or_on_crops_of_padded_ones(black: bool) -> None:
    seen: list[Tensor] = []
    classifier = Classifier(build_model("dfkd:tiny_plain", classes=2, channels=1, kwargs={"width": 2}))
    classifier.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    grey = torch.full((64, 1, 8, 8), 102, dtype=torch.uint8)
    assert train_teacher(classifier, grey, torch.arange(64) % 2, epochs=2, batch_size=32, moves=Moves(2, black=black))
    shown = torch.cat(seen)
    assert shown.shape == (128, 1, 8, 8)
    found = (shown == 0).flatten(1).sum(1)
    corners = {8 * 8 - (8 - down) * (8 - across) for down in range(3) for across in range(3)}
    assert set(found.tolist()) == (corners if black else {0})
    assert torch.allclose(shown[shown != 0], torch.tensor(0.4))


def test_a_teacher_whose_training_diverges_is_not_trained_on(tmp_path: Path) -> None:
    model = build_model("dfkd:tiny_plain", classes=2, channels=1, kwargs={"width": 2})
    next(model.parameters()).data.fill_(torch.nan)
    grey, checkpoint = torch.full((64, 1, 8, 8), 102, dtype=torch.uint8), tmp_path / "training.pt"
    with pytest.raises(UserError, match=r"teacher odd: its loss is nan after epoch 1; lower training\.lr"):
        train_teacher(Classifier(model, name="odd"), grey, torch.arange(64) % 2, epochs=9, checkpoint=checkpoint)
    assert not checkpoint.exists()


def test_a_torn_file_of_a_teachers_training_is_named(tmp_path: Path) -> None:
    grey, checkpoint = torch.full((64, 1, 8, 8), 102, dtype=torch.uint8), tmp_path / "training.pt"

    def train() -> None:
        model = build_model("dfkd:tiny_plain", classes=2, channels=1, kwargs={"width": 2})
        train_teacher(Classifier(model, name="odd"), grey, torch.arange(64) % 2, epochs=1, checkpoint=checkpoint)

    train()
    for content in (checkpoint.read_bytes()[:-50], b""):
        checkpoint.write_bytes(content)
        with pytest.raises(UserError, match=r"teacher odd cannot go on from .*training\.pt .* remove it and run"):
            train()


def test_the_same_teachers_are_sampled_at_one_step_and_all_subsets_in_time() -> None:
    zoo = [Teacher(nn.Identity(), name=str(k)) for k in range(4)]
    chosen = [tuple(t.name for t in sample_teachers(zoo, 2, 7, step)) for step in range(600)]
    assert chosen == [tuple(t.name for t in sample_teachers(zoo, 2, 7, step)) for step in range(600)]
    assert chosen != [tuple(t.name for t in sample_teachers(zoo, 2, 8, step)) for step in range(600)]
    counts = Counter(chosen)
    assert set(counts) == set(itertools.combinations("0123", 2))
    assert min(counts.values()) > 65  # 100 expected, standard deviation 9
    assert max(counts.values()) < 135
    assert sample_teachers(zoo, 4, 0, 0) == sample_teachers(zoo, 9, 0, 0) == zoo


def test_the_zoos_logits_are_weighted_means() -> None:
    rows = [[1.5, -0.5, 0.5, -1.5], [-0.3, 0.2, 1.1, 0.4]]
    a, b = (((x := torch.tensor(row)) - x.mean()) / x.std() for row in rows)  # unit spread each
    x = images(3)
    for first, second in ((1.0, 1.0), (3.0, 1.0), (0.25, 0.5)):
        zoo = [Teacher(Fixed(a.tolist()), weight=first), Teacher(Fixed(b.tolist()), weight=second)]
        wanted = (first * a + second * b) / (first + second)
        assert torch.allclose(zoo_logits(zoo, x), wanted.expand(3, -1), atol=1e-5)
    assert torch.equal(zoo_logits(zoo[:1], x), zoo[0](x))
    few = Teacher(nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 2)), name="few")
    with pytest.raises(UserError, match=r"teachers of other numbers of classes have no mean logits: .*, few 2"):
        zoo_logits([zoo[0], few], x)


def test_a_loud_teacher_counts_no_more_than_a_quiet_one() -> None:
    a, b = torch.tensor([2.0, 0.0, -1.0]), torch.tensor([0.0, 3.0, 1.0])

    def direction(loudness: float) -> Tensor:
        zoo = [Teacher(Fixed(a.tolist())), Teacher(Fixed((loudness * b).tolist()))]
        return F.normalize(zoo_logits(zoo, images(3)), dim=1)

    assert torch.allclose(direction(1), direction(50), atol=1e-5)


def test_a_teacher_of_weight_zero_has_no_say() -> None:
    loud, mute = Teacher(Fixed([1.0, 0.0, -1.0])), Teacher(Fixed([9.0, 9.0, 0.0]), weight=0.0)
    assert torch.allclose(zoo_logits([loud, mute], images(2)), loud(images(2)), atol=1e-6)


def test_logits_are_float32_also_under_autocast(make_teacher: MakeTeacher) -> None:
    teacher = make_teacher()
    with torch.autocast("cpu", torch.bfloat16):
        assert teacher(images()).dtype == torch.float32
        assert teacher.model.linear(torch.rand(1, teacher.model.linear.in_features)).dtype == torch.bfloat16


def test_epochs_of_several_batches_are_torchs_sgd_on_shuffled_images_at_a_rate_by_the_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    twin = copy.deepcopy(network).double()
    pixels, labels = (torch.arange(24) * 10).to(torch.uint8).view(24, 1, 1, 1).expand(-1, 1, 2, 2), torch.arange(24) % 3
    seen: list[Tensor] = []
    network.register_forward_pre_hook(lambda module, given: seen.append(given[0].detach().clone()))
    moved: list[tuple[Any, ...]] = []
    monkeypatch.setattr("dfkd.pretrain.augment", lambda x, shard, moves, *at: moved.append((moves, *at)) or x)
    options: dict[str, Any] = {"epochs": 3, "batch_size": 6, "lr": 0.1, "weight_decay": 0.01, "seed": 4}
    assert train_teacher(Classifier(network), pixels, labels, moves=Moves(1), **options)
    assert moved == [(Moves(1), 4, epoch, k) for epoch in range(3) for k in range(4)]
    rows = [(x[:, 0, 0, 0] * 25.5).round().long() for x in seen]
    orders = [torch.cat(rows[4 * epoch :][:4]).tolist() for epoch in range(3)]
    assert all(sorted(order) == list(range(24)) for order in orders)
    assert len({tuple(order) for order in [*orders, list(range(24))]}) == 4  # anew in every epoch
    sgd = torch.optim.SGD(twin.parameters(), lr=0.0, momentum=0.9, nesterov=True, weight_decay=0.01)
    for update, chosen in enumerate(rows):
        done = update / 12
        rate = done / 0.2 if done < 0.2 else (1 + math.cos(math.pi * (done - 0.2) / 0.8)) / 2
        sgd.param_groups[0]["lr"] = 0.1 * rate
        sgd.zero_grad()
        F.cross_entropy(twin(pixels[chosen].double() / 255), labels[chosen]).backward()
        sgd.step()
    for ours, exact in zip(network.parameters(), twin.parameters()):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-5)


class Always:
    """A deadline that comes after every epoch."""

    def within(self, seconds: float) -> bool:
        return True


def test_a_teacher_trained_in_pieces_is_the_one_trained_at_once(tmp_path: Path) -> None:
    def train(seed: int, **options: Any) -> tuple[nn.Module, bool]:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
        torch.manual_seed(seed)  # what is drawn otherwise is by position
        pixels = torch.arange(24 * 64).remainder(251).to(torch.uint8).view(24, 1, 8, 8)
        given: dict[str, Any] = {"epochs": 3, "batch_size": 6, "moves": Moves(1), **options}
        return network, train_teacher(Classifier(network), pixels, torch.arange(24) % 3, **given)

    whole, finished = train(1)
    assert finished
    for seed, ends in ((2, False), (3, False), (4, True)):
        pieces, finished = train(seed, checkpoint=tmp_path / "training.pt", deadline=Always())
        assert finished == ends
    for name, value in whole.state_dict().items():
        assert torch.equal(pieces.state_dict()[name], value), name
