"""The one student loop: its update, schedule and weight decay against torch's own, and that a student learns."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fit_fixture import MakeTeacher, batches, network, written_out
from torch import Tensor, nn

from dfkd.compress.fit import Batches, Fit, cosine, fit, hold_zeros, no_decay_split
from dfkd.compress.hints import projected_hints
from dfkd.errors import UserError
from dfkd.losses import STUDENT_LOSSES
from dfkd.models import build_model
from dfkd.stream import SyntheticStream, as_dataloader
from dfkd.teachers import Teacher


@pytest.mark.parametrize("kind", sorted(STUDENT_LOSSES))
def test_updates_are_those_of_torchs_sgd(make_stream: Callable[..., SyntheticStream], kind: str) -> None:
    stream, student = make_stream(), network()
    twin = copy.deepcopy(student).double()
    kernels = [twin[k].weight for k in (0, 3, 6)]
    others = [twin[k].bias for k in (0, 3, 6)] + list(twin[1].parameters())
    sgd = torch.optim.SGD(
        [{"params": kernels, "weight_decay": 0.01}, {"params": others}], lr=0.0, momentum=0.9, nesterov=True
    )
    training = Fit(student, stream, steps=30, lr=0.05, weight_decay=0.01, warmup=2, loss=kind, temperature=4.0)
    factors = [1 / 3, 2 / 3, *((1 + math.cos(math.pi * k / 28)) / 2 for k in range(3))]
    for step, factor in enumerate(factors):
        images, logits = stream.batch(step)
        answer = twin(images.double())
        loss = written_out(kind, answer, logits.double(), 4.0)
        terms = training.step(step)
        assert float(terms["loss"]) == pytest.approx(float(loss.detach()), rel=1e-4)
        agree = sum(int(a.argmax()) == int(b.argmax()) for a, b in zip(answer, logits)) / 16
        assert float(terms["agreement"]) == pytest.approx(agree)
        for group in sgd.param_groups:
            group["lr"] = 0.05 * factor
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        for (name, value), wanted in zip(student.state_dict().items(), twin.state_dict().values()):
            assert torch.allclose(value.double(), wanted.double(), rtol=1e-4, atol=1e-6), (step, name)


@pytest.mark.parametrize(("weight", "share"), [(3.0, 32 / 60), (0.5, 1.0)])
def test_features_are_learned_through_a_linear_map_of_the_students(
    make_stream: Callable[..., SyntheticStream], weight: float, share: float
) -> None:
    """Two updates against the same in float64, written with torch alone, of 32 features."""
    teacher = build_model("dfkd:tiny_plain", classes=3, channels=1, kwargs={"width": 8, "depth": 1})
    assert teacher.linear.in_features == 32
    stream, student = make_stream(teacher=Teacher(teacher), features=True), network()
    training = Fit(student, stream, steps=30, lr=0.05, weight_decay=0.01, warmup=0, features=weight)
    twin, projector = copy.deepcopy(student).double(), copy.deepcopy(training.projectors["features"]).double()
    kernels = [twin[k].weight for k in (0, 3, 6)]
    others = [twin[k].bias for k in (0, 3, 6)] + list(twin[1].parameters())
    groups = [{"params": kernels, "weight_decay": 0.01}, {"params": others}]
    groups.append({"params": list(projector.parameters()), "weight_decay": 0.01, "lr": 0.05 * share})
    sgd = torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True)
    for step, factor in enumerate((1.0, (1 + math.cos(math.pi / 30)) / 2)):
        images, targets = stream.batch(step)
        logits, features = targets.double().split([3, 32], 1)
        inner = twin[:6](images.double())
        loss = written_out("kl", twin[6](inner), logits, 20.0)
        spread = features.var(0, correction=0).mean().sqrt()
        loss = loss + weight * (projector(inner) - features / spread).var(0, correction=0).mean()
        terms = training.step(step)
        assert float(terms["loss"]) == pytest.approx(float(loss.detach()), rel=1e-4)
        for group, rate in zip(sgd.param_groups, (0.05, 0.05, 0.05 * share)):
            group["lr"] = rate * factor
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        for ours, wanted in ((student, twin), (training.projectors["features"], projector)):
            for (name, value), right in zip(ours.state_dict().items(), wanted.state_dict().values()):
                assert torch.allclose(value.double(), right.double(), rtol=1e-4, atol=1e-5), (step, name)


def test_teachers_count_by_their_weights(
    make_stream: Callable[..., SyntheticStream], make_teacher: MakeTeacher
) -> None:
    """By weights of 3, 1 and 0 the error is that of the first's three times and of the second's, over four."""
    zoo = [make_teacher(str(weight), seed=weight, weight=weight) for weight in (3, 1, 0)]
    stream = make_stream(teacher=zoo, features=True)
    training = Fit(network(), stream, steps=1, lr=0.0, features=2.0)
    images, targets = stream.batch(0)
    logits, *features = targets.split([3, *stream.widths], 1)
    inner = training.student[:6](images)
    wanted = written_out("kl", training.student[6](inner), logits, 20.0)
    guesses = inner @ training.projectors["features"].weight.mT
    for share, guess, its in zip((0.75, 0.25, 0.0), guesses.split(stream.widths, 1), features):
        rest = guess - its / its.var(0, correction=0).mean().sqrt()
        wanted = wanted + 2 * share * rest.var(0, correction=0).mean()
    assert float(training.step(0)["loss"]) == pytest.approx(float(wanted.detach()), rel=1e-4)


def test_a_single_teacher_counts_whole_whatever_its_weight(
    make_stream: Callable[..., SyntheticStream], make_teacher: MakeTeacher
) -> None:
    losses = [
        Fit(network(), make_stream(teacher=make_teacher(weight=weight), features=True), steps=1).step(0)["loss"]
        for weight in (0.0, 1.0)
    ]
    assert losses[0] == losses[1] > 3


@pytest.mark.parametrize("hold_norms", [False, True])
def test_measuring_the_student_between_two_updates_changes_nothing(
    make_stream: Callable[..., SyntheticStream], hold_norms: bool
) -> None:
    def trained(measure: bool) -> dict[str, Tensor]:
        student = network(seed=4)
        fit = Fit(student, make_stream(), steps=3, hold_norms=hold_norms)
        for step in range(3):
            fit.step(step)
            if measure:
                student.train(hold_norms)
        return student.state_dict()

    alone, measured = trained(False), trained(True)
    assert all(torch.equal(alone[name], measured[name]) for name in alone)


def test_without_weight_features_change_nothing(make_stream: Callable[..., SyntheticStream]) -> None:
    ends = [
        fit(network(), make_stream(features=given), steps=3, features=0.0).state_dict().values() for given in (0, 1)
    ]
    assert all(torch.equal(one, other) for one, other in zip(*ends))


def test_a_student_without_a_linear_layer_cannot_learn_features(make_stream: Callable[..., SyntheticStream]) -> None:
    student = nn.Sequential(nn.Conv2d(1, 3, 8), nn.BatchNorm2d(3), nn.Flatten())
    with pytest.raises(UserError, match="got 1, of which 1 do not; give features=False"):
        Fit(student, make_stream(features=True), steps=1)
    fit(student, make_stream(), steps=1)


class Tokens(nn.Module):
    """Its logits are a mean over tokens: no vector of features an image."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Conv2d(1, 5, 4, 4), nn.Linear(5, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.embed(images).flatten(2).mT).mean(1)


class Spare(nn.Module):
    """Its last linear layer is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.network, self.spare = network(), nn.Linear(96, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)


@pytest.mark.parametrize("odd", [Tokens, Spare])
def test_networks_whose_head_is_none_are_refused_in_one_line(
    make_stream: Callable[..., SyntheticStream], odd: Callable[[], nn.Module]
) -> None:
    torch.manual_seed(0)
    with pytest.raises(UserError, match="no linear layer at its end makes the logits of one vector an image"):
        fit(odd(), make_stream(features=True), steps=1)
    with pytest.raises(UserError, match="odd has no features"):
        fit(network(), make_stream(teacher=Teacher(odd(), name="odd"), features=True), steps=1)


def test_only_kernels_and_matrices_decay() -> None:
    model = network()
    model[6].bias.requires_grad_(False)
    decaying, others = no_decay_split(model, 0.3)
    assert decaying["weight_decay"] == 0.3
    assert others["weight_decay"] == 0
    assert [id(p) for p in decaying["params"]] == [id(model[k].weight) for k in (0, 3, 6)]
    assert {id(p) for p in others["params"]} == {
        id(p) for p in (model[0].bias, model[1].weight, model[1].bias, model[3].bias)
    }


@pytest.mark.parametrize(
    ("step", "steps", "warmup", "factor"),
    [
        (0, 100, 0, 1.0),
        (50, 100, 0, 0.5),
        (25, 100, 0, (1 + math.sqrt(0.5)) / 2),
        (100, 100, 0, 0.0),
        (0, 100, 10, 1 / 11),
        (9, 100, 10, 10 / 11),
        (10, 100, 10, 1.0),
        (55, 100, 10, 0.5),
        (0, 20, 100, 1 / 3),  # a warm-up takes no more than a tenth of the steps
        (11, 20, 100, 0.5),
        (0, 1, 100, 1.0),
    ],
)
def test_the_learning_rate_warms_up_and_falls_as_a_cosine(step: int, steps: int, warmup: int, factor: float) -> None:
    assert cosine(step, steps, warmup) == pytest.approx(factor, abs=1e-9)


@pytest.mark.parametrize("kind", sorted(STUDENT_LOSSES))
def test_a_student_learns_its_teacher(
    make_stream: Callable[..., SyntheticStream], make_teacher: MakeTeacher, kind: str
) -> None:
    with torch.random.fork_rng(devices=[]):
        teacher = Teacher(network(seed=3))
    stream = make_stream(teacher=teacher, replay=4, shift=0.125)
    training = Fit(network(), stream, steps=120, lr=0.05, loss=kind, temperature=4.0)
    losses = [float(training.step(step)["loss"]) for step in range(120)]
    assert sum(losses[-10:]) < 0.4 * sum(losses[:10])
    assert all(math.isfinite(loss) for loss in losses)


def test_a_student_trains_in_training_mode_comes_back_in_eval_mode_and_the_teacher_stays(
    make_stream: Callable[..., SyntheticStream], make_teacher: MakeTeacher
) -> None:
    teacher = make_teacher()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student = network().eval()
    returned = fit(student, make_stream(teacher=teacher), steps=3)
    assert returned is student
    assert int(student[1].num_batches_tracked) == 3  # in training mode
    assert not any(module.training for module in student.modules())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


@pytest.mark.parametrize("replay", [0, 3])
def test_two_students_of_one_stream_are_alike(
    make_stream: Callable[..., SyntheticStream], make_teacher: MakeTeacher, replay: int
) -> None:
    stream = make_stream(teacher=make_teacher(), replay=replay)
    first, second = (fit(network(), stream, steps=4).state_dict() for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_students_updates_seed_a_generator_that_draws(
    make_stream: Callable[..., SyntheticStream], make_teacher: MakeTeacher
) -> None:
    def trained(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        noise = lambda shard, count, position: (torch.rand(count, 1, 8, 8), torch.zeros(count).long())  # noqa: E731
        stream = SyntheticStream(noise, batch_size=8, teacher=make_teacher())
        return fit(network(), stream, steps=3).state_dict()

    first, second = trained(0), trained(1)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_an_epoch_is_other_images_and_torchs_generator_stays_as_it_was(
    make_stream: Callable[..., SyntheticStream], make_teacher: MakeTeacher
) -> None:
    def trained(epoch: int) -> Tensor:
        stream = make_stream(teacher=make_teacher(), features=True)
        stream.set_epoch(epoch)
        student, before = network(), torch.get_rng_state()
        fit(student, stream, steps=2, hints=projected_hints(student, stream.teachers[0], torch.zeros(1, 1, 8, 8), 1.0))
        assert torch.equal(torch.get_rng_state(), before)
        return torch.cat([x.detach().flatten() for x in student.parameters()])

    first = trained(0)
    assert torch.equal(trained(0), first)
    assert not torch.equal(trained(1), first)


def test_a_student_that_cannot_learn_is_refused(
    make_stream: Callable[..., SyntheticStream], make_teacher: MakeTeacher
) -> None:
    student = network()
    Teacher(student)  # freezes it
    with pytest.raises(UserError, match=r"the student has no parameter that learns; .*\(a Teacher freezes"):
        fit(student, make_stream(teacher=make_teacher()), steps=3)
    with pytest.raises(UserError, match="steps=-1 is not allowed"):
        fit(network(), make_stream(teacher=make_teacher()), steps=-1)


@pytest.mark.parametrize("features", [False, True])
def test_a_run_taken_up_again_ends_bitwise_the_same(
    make_stream: Callable[..., SyntheticStream], features: bool
) -> None:
    """With features also what projects maps; its first weights are drawn by position, whatever came before."""

    def begin(seed: int) -> Fit:
        student, stream = network(seed), make_stream(replay=3, shift=0.125, features=features)
        maps = projected_hints(student, stream.teachers[0], torch.zeros(1, 1, 8, 8), float(features))
        return Fit(student, stream, steps=9, warmup=0, hints=maps)

    whole = begin(1)
    whole.run()
    half, resumed = begin(1), begin(2)
    for step in range(5):
        half.step(step)
    resumed.load_state_dict(copy.deepcopy(half.state_dict()))
    for step in range(5, resumed.steps):
        resumed.step(step)
    state, wanted = resumed.student.state_dict(), whole.student.state_dict()
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)


def test_frozen_weights_stay(make_stream: Callable[..., SyntheticStream]) -> None:
    student = network()
    student[0].requires_grad_(False)
    before = student[0].weight.clone()
    fit(student, make_stream(), steps=2)
    assert torch.equal(student[0].weight, before)


def test_a_step_waits_for_no_value(make_stream: Callable[..., SyntheticStream], no_host_read: Any) -> None:
    student, stream = network(), make_stream(replay=2, shift=0.125, flip=True, mix=1.0, features=True)
    training = Fit(student, stream, steps=5)
    drawn, targets = stream.batch(0)
    roots = [*student.parameters(), drawn, targets]
    with no_host_read(*roots):
        terms = training.step(1)
        with pytest.raises(AssertionError, match="waits for the device"):
            float(terms["loss"])


def test_an_unknown_loss_is_refused_by_name(make_stream: Callable[..., SyntheticStream]) -> None:
    with pytest.raises(UserError, match=r"'cosine'; choose from .*kl"):
        Fit(network(), make_stream(), steps=1, loss="cosine")


def test_a_student_asks_for_no_batch_past_the_end(make_stream: Callable[..., SyntheticStream]) -> None:
    student = network()
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(UserError, match="3 updates need as many batches, the stream has num_batches=2"):
        fit(student, make_stream(num_batches=2), steps=3)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    fit(student, make_stream(num_batches=3), steps=3)


def test_any_iterable_of_images_is_gone_through_again_and_again() -> None:
    stream = batches(3, mean=[0.5], std=[0.25])
    pairs = [stream.watched_batch(step) for step in range(7)]
    given = [each for each, _ in stream.images]
    assert all(torch.equal(x, given[k % 3]) for k, (x, _) in enumerate(pairs))
    reference = network(seed=3).eval()
    for x, logits in pairs:
        assert torch.allclose(logits, reference((x - 0.5) / 0.25), atol=1e-5)
        assert not logits.requires_grad


def test_images_in_double_precision_are_given_as_float32_ones() -> None:
    stream = Batches([torch.rand(4, 1, 8, 8).double()])
    stream.teachers = [Teacher(network())]
    assert [x.dtype for x in stream.watched_batch(0)] == [torch.float32] * 2


@pytest.mark.parametrize("images", [[], iter([torch.zeros(1, 1, 8, 8)])])
def test_an_iterable_that_ends_for_good_is_refused(images: Any) -> None:
    stream = Batches(images)
    stream.teachers = [Teacher(network())]
    with pytest.raises(
        UserError, match=r"no batch for update [01]: it is empty, or .* at its end; give one that can be gone"
    ):
        [stream.watched_batch(step) for step in range(2)]


def test_weights_that_are_zero_are_held_and_all_others_learn() -> None:
    student = network()
    with torch.no_grad():
        student[0].weight[::2] = 0
        student[6].weight[:, ::3] = 0
        student[3].bias[0] = 0  # a bias is no pruned weight
    held = {k: student[k].weight == 0 for k in (0, 3, 6)}
    before = copy.deepcopy(student)
    hold_zeros(student)
    fit(student, batches(), steps=5, lr=0.1, warmup=0)
    assert [int(mask.sum()) for mask in held.values()] == [27, 0, 96]
    for k, mask in held.items():
        assert torch.equal(student[k].weight == 0, mask)
        assert (student[k].weight != before[k].weight)[~mask].float().mean() > 0.9
    assert student[3].bias[0] != 0


@pytest.mark.parametrize("hold", [False, True])
def test_statistics_are_held_where_asked(hold: bool) -> None:
    student = network()
    norm = student[1]
    norm.running_mean.fill_(0.25)
    mean, var, scale = norm.running_mean.clone(), norm.running_var.clone(), norm.weight.clone()
    training = Fit(student, batches(), steps=3, hold_norms=hold)
    assert [module.training for module in student] == [not hold] * 7
    training.run()
    assert torch.equal(norm.running_mean, mean) == torch.equal(norm.running_var, var) == hold
    assert not torch.equal(norm.weight, scale)


def test_without_a_teachers_logits_there_is_nothing_to_learn(make_stream: Callable[..., SyntheticStream]) -> None:
    bare = make_stream(teacher=None)
    for given in (bare, as_dataloader(make_stream())):
        with pytest.raises(UserError, match="a SyntheticStream with a teacher"):
            fit(network(), given, steps=1)  # type: ignore[arg-type]


def test_a_student_that_diverges_is_not_handed_back(make_stream: Callable[..., SyntheticStream]) -> None:
    with pytest.raises(UserError, match="of the student holds NaN or infinity after 20 updates; lower lr"):
        fit(network(), make_stream(), steps=20, lr=1e12)


def test_a_student_of_other_classes_is_refused(make_stream: Callable[..., SyntheticStream]) -> None:
    for classes in (2, 4):
        student = nn.Sequential(*network()[:6], nn.Linear(96, classes))
        with pytest.raises(UserError, match=f"gives {classes} numbers an image and its teacher logits of 3 classes"):
            fit(student, make_stream(), steps=1)
    with pytest.raises(UserError, match="gives 6 x 4 x 4 numbers an image and its teacher"):
        fit(network()[:5], make_stream(), steps=1)
    paired = network()
    paired.register_forward_hook(lambda module, given, logits: (logits, logits))
    for features in (False, True):
        with pytest.raises(UserError, match=r"the student gives a tuple where logits \[B, 3\] belong"):
            fit(paired, make_stream(features=features), steps=1)


def test_gradients_are_clipped_where_asked() -> None:
    norms = []
    for clip in (0.0, 0.01):
        student = network()
        Fit(student, batches(), steps=1, clip=clip).step(0)
        norms.append(float(torch.cat([p.grad.flatten() for p in student.parameters()]).norm()))
    assert norms[0] > 0.02
    assert norms[1] == pytest.approx(0.01, rel=1e-3)


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop, self.head, self.masks = nn.Dropout(0.5), nn.Linear(64, 3), list[Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        self.masks.append(self.drop(torch.ones(64)))
        return self.head(x.flatten(1) * self.masks[-1])


def test_every_update_drops_other_units_the_same_ones_after_a_resume() -> None:
    student = Masked()
    fit = Fit(student, batches(), steps=3)
    for step in (0, 1, 0):
        fit.step(step)
    assert not torch.equal(student.masks[0], student.masks[1])
    assert torch.equal(student.masks[0], student.masks[2])


def test_bytes_are_255ths_of_an_image_in_training() -> None:
    stream = batches(1)
    whole = torch.randint(256, (4, 1, 8, 8), dtype=torch.uint8)
    stream.images = [whole]
    assert torch.equal(stream.watched_batch(0)[0], whole.float() / 255)
