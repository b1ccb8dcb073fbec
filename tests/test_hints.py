"""What a student learns of its teacher's layers: which are paired, and the terms of hints and attention."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fit_fixture import MakeTeacher, batches, network, written_out
from torch import Tensor, nn

from dfkd.compress.fit import Fit
from dfkd.compress.hints import Hints, attention_hints, last_maps, pairs_of, projected_hints, stage_hints, stage_pairs
from dfkd.compress.prune import prune
from dfkd.errors import UserError
from dfkd.losses import attention
from dfkd.models import build_model
from dfkd.stream import SyntheticStream
from dfkd.teachers import Teacher


def test_hints_add_the_layers_errors_to_the_loss_and_the_gradient() -> None:
    stream, student = batches(1), network()
    reference = stream.teachers[0].model
    pairs = [("1", "1"), ("4", "4")]
    twin, wanted = copy.deepcopy(student).double().train(), copy.deepcopy(reference).double()
    training = Fit(student, stream, steps=1, lr=0.0, hold_norms=True, hints=Hints(student, reference, pairs, 0.3))
    terms = training.step(0)
    x = stream.images[0][0].double()  # type: ignore[index]
    twin[1].eval()
    term = 0.0
    for depth in (2, 5):
        ours, theirs = twin[:depth](x), wanted[:depth](x)
        term = term + (ours - theirs).pow(2).sum() / theirs.pow(2).sum() / 2
    loss = written_out("kl", twin(x), wanted(x), 20.0) + 0.3 * term
    loss.backward()
    assert float(terms["loss"]) == pytest.approx(float(loss.detach()), rel=1e-4)
    for (name, ours), theirs in zip(student.named_parameters(), twin.parameters()):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert torch.allclose(ours.grad.double(), theirs.grad, rtol=1e-3, atol=1e-6), name
    assert not student[1]._forward_hooks
    assert not reference[1]._forward_hooks


def tiny(model: str, **kwargs: int) -> nn.Module:
    """One of the project's tiny networks for grey images and three classes, in training mode."""
    return build_model(f"dfkd:{model}", classes=3, channels=1, kwargs={"width": 8, "depth": 1, **kwargs}).train()


def test_maps_are_paired_at_the_ends_of_stages() -> None:
    student, teacher = tiny("tiny_plain", depth=2), tiny("tiny_residual")
    image = torch.zeros(1, 1, 16, 16)
    before = copy.deepcopy(teacher.state_dict())
    assert pairs_of(last_maps(student, image), last_maps(teacher, image)) == {
        ("features.5", "features.3"): (8, 8),  # 16x16: two conv-bn-relu; a stem and a block
        ("features.12", "features.4"): (16, 16),
        ("features", "features"): (32, 32),  # to whose end both go on
    }
    assert all(module.training for module in (*student.modules(), *teacher.modules()))
    assert not any(module._forward_hooks for module in (*student.modules(), *teacher.modules()))
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


@pytest.mark.parametrize(
    ("model", "ends"),
    [
        ("dfkd:wrn_40_2", {32: ("block1", 32), 16: ("block2", 64), 8: ("relu", 128)}),
        ("dfkd:vgg11", {32: ("features.2", 64), 16: ("features.6", 128), 8: ("features.13", 256)}),
        ("timm:resnet50", {16: ("act1", 64), 8: ("layer1", 256), 4: ("layer2", 512), 2: ("layer3", 1024)}),
        ("timm:convnext_atto", {8: ("stages.0", 40), 4: ("stages.1", 80), 2: ("stages.2", 160)}),
        ("timm:mobilenetv2_100", {16: ("blocks.0", 16), 8: ("blocks.1", 24), 4: ("blocks.2", 32), 2: ("blocks.4", 96)}),
        ("timm:densenet121", {8: ("features.transition1.conv", 128), 2: ("features.transition3.conv", 512)}),
        ("torchvision:vgg11_bn", {16: ("features.6", 128), 2: ("features.27", 512)}),  # not the pool, which makes 7x7
        ("timm:swin_tiny_patch4_window7_224", {}),  # tokens behind a stem
        ("torchvision:swin_t", {}),
        ("timm:levit_128s", {}),
        ("timm:vit_tiny_patch16_224", {}),
    ],
)
def test_a_stage_ends_where_the_next_block_strides(model: str, ends: dict[int, tuple[str, int]]) -> None:
    """A bottleneck's first layers are of the size before, its stage's are not."""
    size = 32 if ends else 224
    found = last_maps(build_model(model, classes=3), torch.zeros(1, 3, size, size))
    assert ends.items() <= {height: end for (height, _), end in found.items()}.items()
    assert bool(found) == bool(ends)
    assert (7, 7) not in found


class Trunk(nn.Module):
    """All of a network but its head, of no container's class."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def test_a_trunk_is_no_block_that_strides() -> None:
    network, image = tiny("tiny_plain"), torch.zeros(1, 1, 16, 16)
    plain = last_maps(network, image)
    network.features = Trunk(network.features)
    assert list(last_maps(network, image)) == list(plain) == [(16, 16), (8, 8), (4, 4)]
    assert last_maps(network, image)[16, 16] == ("features.layers.2", 8)


def test_one_size_is_no_stage_though_attention_may_be_asked_for() -> None:
    one_size = nn.Sequential(nn.Conv2d(1, 4, 2, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    image = torch.zeros(1, 1, 8, 8)
    assert projected_hints(one_size, tiny("tiny_plain"), image, 1.0) is None
    assert attention_hints(one_size, tiny("tiny_plain"), image, 1.0).pairs == [("2", "features.6")]


def test_attention_matrices_are_no_maps_and_a_module_called_twice_comes_last() -> None:
    patches = build_model("timm:vit_tiny_patch16_224", classes=3)
    for block in patches.blocks:  # the attention [B, heads, N, N] goes through a dropout then
        block.attn.fused_attn = False
    assert last_maps(patches, torch.zeros(1, 3, 224, 224)) == {}

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(1, 4, 3, 2, 1), nn.Conv2d(4, 8, 3, 2, 1)
            self.relu, self.head = nn.ReLU(), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.relu(self.second(self.relu(self.first(x)))).mean((2, 3)))

    assert last_maps(Twice(), torch.zeros(1, 1, 8, 8)) == {(4, 4): ("first", 4), (2, 2): ("relu", 8)}


def test_a_layer_that_training_leaves_out_is_named(
    make_teacher: MakeTeacher, make_stream: Callable[..., SyntheticStream]
) -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.extra, self.head = tiny("tiny_plain").features, nn.ReLU(), nn.Linear(32, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.body(x)
            return self.head((x if self.training else self.extra(x)).mean((2, 3)))

    teacher, student = make_teacher(), Skips()
    hints = projected_hints(student, teacher, torch.zeros(1, 1, 8, 8), 1.0)
    training = Fit(student, make_stream(teacher=teacher), steps=1, hints=hints)
    with pytest.raises(UserError, match=r"extra was not called in training, .* in Python hints=None"):
        training.step(0)


def test_maps_are_paired_by_sizes_without_those_of_one_pixel() -> None:
    student, teacher = tiny("tiny_plain"), tiny("tiny_residual")
    small = attention_hints(student, teacher, torch.zeros(1, 1, 4, 4), 1.0)
    assert small.pairs == [("features.2", "features.3"), ("features.6", "features.4")]  # the third stage's are 1x1
    image = torch.zeros(1, 1, 8, 8)
    resized = Teacher(teacher, input_size=4)
    assert [ours for ours, _ in attention_hints(student, resized, image, 1.0).pairs] == ["features.6", "features"]


def test_maps_are_not_learned_of_a_teacher_whose_sizes_are_of_other_depths() -> None:
    student, image = tiny("tiny_plain"), torch.zeros(1, 1, 8, 8)
    for size, learned in ((None, True), (8, True), (16, False), (4, False)):
        hints = projected_hints(student, Teacher(tiny("tiny_residual"), input_size=size), image, 1.0)
        assert (hints is not None) == learned, size
    assert projected_hints(student, tiny("tiny_residual"), image, 0.0) is None


def test_networks_without_a_common_size_are_refused_with_a_remedy() -> None:
    teacher = Teacher(tiny("tiny_residual"), input_size=18)
    with pytest.raises(
        UserError, match=r"student has 8x8, 4x4, 2x2 and the teacher 18x18, .*; set distill.attention=0"
    ):
        attention_hints(tiny("tiny_plain"), teacher, torch.zeros(1, 1, 8, 8), 1.0)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    with pytest.raises(UserError, match="the student has none and"):
        attention_hints(flat, teacher, torch.zeros(1, 1, 8, 8), 1.0)


def test_stages_are_paired_at_the_last_blocks_of_their_rows() -> None:
    def pairs(student: str, teacher: str) -> list[tuple[str, str]]:
        networks = (build_model(name, classes=3) for name in (student, teacher))
        return stage_pairs(*networks, torch.zeros(1, 3, 32, 32))

    assert pairs("dfkd:resnet20", "dfkd:resnet56") == [(f"layer{k}.2", f"layer{k}.8") for k in (1, 2, 3)]
    assert pairs("dfkd:wrn_16_1", "dfkd:wrn_40_1") == [(f"block{k}.layer.1", f"block{k}.layer.5") for k in (1, 2, 3)]
    assert pairs("dfkd:wrn_16_1", "dfkd:wrn_40_2") == []  # half as many channels
    bottlenecks = [
        ("layer1.1", "layer1.2"),
        ("layer2.1", "layer2.3"),
        ("layer3.1", "layer3.5"),
        ("layer4.1", "layer4.2"),
    ]
    assert pairs("timm:resnet26", "timm:resnet50") == bottlenecks
    assert pairs("dfkd:vgg11", "dfkd:vgg13") == []  # no blocks
    assert pairs("timm:convnext_atto", "timm:convnext_atto") == [  # not the row of stages besides
        (f"stages.{k}.blocks.{last}", f"stages.{k}.blocks.{last}") for k, last in enumerate((1, 1, 5, 1))
    ]


def test_a_row_of_one_block_is_paired_with_the_end_of_a_longer_one_and_a_wrapper_is_no_row() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(1, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    def wrapped(count: int) -> nn.Module:
        return Teacher(nn.Sequential(nn.Sequential(*(Block() for _ in range(count)))))

    image = torch.zeros(1, 1, 4, 4)
    assert stage_pairs(wrapped(1), wrapped(3), image) == [("model.0.0", "model.0.2")]
    assert stage_pairs(wrapped(1), wrapped(1), image) == []


def test_a_pruned_network_learns_the_blocks_whose_channels_it_keeps() -> None:
    whole = build_model("dfkd:resnet20", classes=3).eval()
    images = torch.rand(16, 3, 32, 32)
    inner = prune(whole, [images], 0.5, repair="none", images=16, inner_only=True).model
    hints = stage_hints(inner, whole, images[:1], 0.3)
    assert hints is not None
    assert hints.pairs == [(f"layer{k}.2", f"layer{k}.2") for k in (1, 2, 3)]
    found: list[list[Tensor]] = []
    for net in (inner.double(), whole.double()):
        maps, x = [], net.bn1(net.conv1(images.double())).relu()
        for stage in (net.layer1, net.layer2, net.layer3):
            maps.append((x := stage(x)).detach())
        found.append(maps)
    term = sum(float((ours - theirs).norm() / theirs.norm()) ** 2 / 3 for ours, theirs in zip(*found))
    with torch.no_grad(), hints.watch_student() as ours, hints.watch_teacher() as theirs:
        inner(images.double())
        whole(images.double())
    assert float(hints.term(ours, theirs)) == pytest.approx(0.3 * term, rel=1e-5)
    assert stage_hints(inner, whole, images[:1], 0.0) is None


def test_blocks_that_lost_channels_are_not_compared() -> None:
    whole = build_model("dfkd:resnet18", classes=3).eval()
    image = torch.rand(16, 3, 8, 8)
    thinner, last_kept = (
        prune(whole, [image], 0.5, repair="none", images=16, ignore=ignore).model for ignore in ([], ["layer4.*"])
    )
    assert stage_pairs(whole, whole, image[:1]) == [(f"layer{k}.1", f"layer{k}.1") for k in (1, 2, 3, 4)]
    assert stage_hints(thinner, whole, image[:1], 1.0) is None
    assert stage_pairs(last_kept, whole, image[:1]) == [("layer4.1", "layer4.1")]


# Behind how many modules of `features` the stages of a tiny network end: conv-bn-relu, pooled between; blocks.
PLAIN, RESIDUAL = (3, 7, 11), (4, 5, 6)


def attended(maps: Tensor) -> Tensor:
    """Attention of maps [B, C, H, W] as rows [B, H W] of length 1."""
    rows = maps.pow(2).mean(1).flatten(1)
    return rows / rows.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("replay", [0, 4])  # a replayed image comes with its logits alone
def test_attention_adds_the_maps_differences_to_the_loss_and_reaches_the_student_alone(
    make_teacher: MakeTeacher, make_stream: Callable[..., SyntheticStream], replay: int
) -> None:
    teacher = make_teacher(model="dfkd:tiny_residual", mean=[0.4], std=[0.3])
    stream, student = make_stream(teacher=teacher, replay=replay), tiny("tiny_plain")
    twin, reference = copy.deepcopy(student).double(), copy.deepcopy(teacher.model).double()
    images, targets = make_stream(teacher=teacher, replay=replay).batch(0)
    shown = len(images) // 2 if replay else len(images)
    hints = attention_hints(student, teacher, images[:1], 300.0)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    value = Fit(student, stream, steps=1, lr=0.0, hints=hints).step(0)["loss"]

    x, y = images.double(), (images.double() - 0.4) / 0.3
    loss, term = written_out("kl", twin(x), targets.double(), 20.0), torch.zeros(())
    for ours, its in zip(PLAIN, RESIDUAL):
        maps = twin.features[:ours](x), reference.features[:its](y)
        term = term + F.mse_loss(*(attended(each)[:shown] for each in maps))
    assert 0.05 < 300 * float(term.detach()) / float(loss.detach()) < 50
    (loss + 300 * term).backward()
    assert float(value) == pytest.approx(float((loss + 300 * term).detach()), rel=1e-4)
    for (name, ours), theirs in zip(student.named_parameters(), twin.parameters()):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert torch.allclose(ours.grad.double(), theirs.grad, rtol=1e-3, atol=1e-5), name
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not any(module._forward_hooks for module in (*student.modules(), *teacher.modules()))


def test_attention_falls_where_it_is_learnt(
    make_teacher: MakeTeacher, make_stream: Callable[..., SyntheticStream], no_host_read: Any
) -> None:
    teacher = make_teacher(model="dfkd:tiny_residual")
    ends = {}
    for weight in (0.0, 1000.0):
        torch.manual_seed(3)
        student, stream = tiny("tiny_plain"), make_stream(teacher=teacher)
        images, _ = stream.batch(0)
        hints = attention_hints(student, teacher, images[:1], weight)
        training = Fit(student, stream, steps=41, lr=0.02, hints=hints)
        for step in range(40):
            training.step(step)
        with no_host_read(*student.parameters(), *teacher.parameters()):
            training.step(40)
        with torch.no_grad(), hints.watch_student() as found, hints.watch_teacher() as wanted:
            student.eval()(images)
            teacher(images)
        ends[weight] = float(attention(found, wanted))
    assert ends[1000.0] < 0.7 * ends[0.0]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_what_hints_add_to_a_gradient_lies_in_memory_as_the_rest(
    make_teacher: MakeTeacher, make_stream: Callable[..., SyntheticStream], layout: torch.memory_format
) -> None:
    """Gradients of two layouts are added at a tenth of the speed; the gradient of a slice of images is contiguous."""
    teacher = make_teacher()
    student, found = tiny("tiny_plain").to(memory_format=layout), []
    hints = projected_hints(student, teacher, torch.zeros(1, 1, 8, 8), 1.0)
    training = Fit(student, make_stream(teacher=teacher, replay=4), steps=1, hints=hints)
    student.features[4].register_forward_pre_hook(lambda _, given: given[0].register_hook(found.append) and None)
    student.features[6].register_forward_hook(lambda _, given, output: output.register_hook(found.append) and None)
    training.step(0)
    assert len(found) == 2
    assert all(gradient.is_contiguous(memory_format=layout) for gradient in found)


@pytest.mark.parametrize("replay", [0, 4])
@pytest.mark.parametrize(("weight", "share"), [(3.0, 0.05 / (3.0 / 3 / 8)), (1.0, 1.0)])
def test_projected_maps_are_learned_in_units_of_the_teachers_spread(
    make_teacher: MakeTeacher, make_stream: Callable[..., SyntheticStream], weight: float, share: float, replay: int
) -> None:
    """Updates against the same in float64, written with torch alone, of a student of half the teacher's width: three of
    the warm-up, and one of the last quarter, over which the maps fade."""
    teacher = make_teacher(model="dfkd:tiny_residual", kwargs={"width": 8, "depth": 1})
    stream, again = (make_stream(teacher=teacher, replay=replay) for _ in range(2))  # each with a ring of its own
    student = tiny("tiny_plain", width=4)
    hints = projected_hints(student, teacher, torch.zeros(1, 1, 8, 8), weight)
    assert hints is not None
    training = Fit(student, stream, steps=20, lr=0.05, weight_decay=0.01, warmup=2, hints=hints)
    twin, reference = copy.deepcopy(student).double(), copy.deepcopy(teacher.model).double()
    kernels = [nn.Parameter(p.detach().double()) for p in training.projectors["maps"].parameters()]
    assert [tuple(kernel.shape) for kernel in kernels] == [(8, 4, 1, 1), (16, 8, 1, 1), (32, 16, 1, 1)]
    parameters = [[p for p in twin.parameters() if (p.dim() > 1) == decayed] for decayed in (True, False)]
    groups = [{"params": parameters[0], "weight_decay": 0.01}, {"params": parameters[1]}]
    groups.append({"params": kernels, "weight_decay": 0.01, "lr": 0.05 * share})
    sgd = torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True)
    late = (17, (1 + math.cos(math.pi * 15 / 18)) / 2, 0.6)
    for step, factor, fade in ((0, 1 / 3, 1), (1, 2 / 3, 1), (2, 1, 1), late):
        images, targets = again.batch(step)
        shown = len(images) // 2 if replay else len(images)
        loss = written_out("kl", twin(images.double()), targets.double(), 20.0)
        for kernel, ours, its in zip(kernels, PLAIN, RESIDUAL):
            wanted = reference.features[:its](images[:shown].double())
            spread = wanted.var((0, 2, 3), correction=0).mean().sqrt()
            guess = torch.einsum("oc,bchw->bohw", kernel[:, :, 0, 0], twin.features[:ours](images.double())[:shown])
            loss = loss + fade * weight / 3 * (guess - wanted / spread).var((0, 2, 3), correction=0).mean()
        value = training.step(step)["loss"]
        assert float(value) == pytest.approx(float(loss.detach()), rel=1e-4)
        for group, rate in zip(sgd.param_groups, (0.05, 0.05, 0.05 * share)):
            group["lr"] = rate * factor
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        learned = [*student.parameters(), *training.projectors["maps"].parameters()]
        for ours, right in zip(learned, [*twin.parameters(), *kernels], strict=True):
            assert torch.allclose(ours.double(), right, rtol=1e-3, atol=1e-5), step
    assert all(p.grad is None for p in teacher.parameters())
    assert not any(module._forward_hooks for module in (*student.modules(), *teacher.modules()))
