"""Rounds: several updates on the same labels and latents, against a plain loop; what is drawn anew, moved and kept."""

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd import synthesis
from dfkd.contrast import Contrast
from dfkd.draws import Moves, augment, draw_latents
from dfkd.errors import UserError
from dfkd.losses import mode_seeking
from dfkd.mixing import draw_mix, make_mix
from dfkd.runtime import Shard
from dfkd.synthesis import ADAM_EPS, Synthesizer
from dfkd.teachers import Teacher, sample_teachers
from generators import ConvGenerator, ImageGenerator, PixelGenerator, PoolGenerator

MakeTeacher = Callable[..., Teacher]
MakeGenerator = Callable[..., ConvGenerator]
BATCH, INNER, SEED, STEPS = 8, 6, 5, 10
ALONE = Shard(torch.device("cpu"))
SIZES: dict[str, Any] = {"classes": 3, "channels": 1, "size": 8}
INVERSION = {"ce": 1.0, "bn": 0.5}


@pytest.fixture
def teacher(make_teacher: MakeTeacher) -> Teacher:
    return make_teacher(seed=1, mean=[0.4], std=[0.3])


def pool(capacity: int = 4 * BATCH) -> PoolGenerator:
    return PoolGenerator(capacity=capacity, **SIZES)


def pixels() -> PixelGenerator:
    return PixelGenerator(**SIZES, mean=[0.4], std=[0.3])


def build(generator: ImageGenerator, zoo: Any, weights: Mapping[str, float], **options: Any) -> Synthesizer:
    zoo = zoo if isinstance(zoo, list) else [zoo]
    defaults: dict[str, Any] = {"steps": STEPS, "batch_size": BATCH, "sample": 1, "clip": 0.0, "seed": SEED}
    defaults |= {"equalise": False, "inner": INNER, "pool": pool()}
    return Synthesizer(generator, zoo, losses=weights, **{**defaults, **options})


def plain_loss(teacher: Teacher, images: Tensor, labels: Tensor, weights: Mapping[str, float]) -> Tensor:
    """Cross-entropy and MixMix eq. 2, from hooks of our own."""
    norms = [module for module in teacher.modules() if isinstance(module, nn.BatchNorm2d)]
    distances: list[Tensor] = []

    def compare(norm: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        mean, var = inputs[0].mean((0, 2, 3)), inputs[0].var((0, 2, 3), correction=0)
        distances.append((mean - norm.running_mean).norm() + (var - norm.running_var).norm())

    handles = [norm.register_forward_hook(compare) for norm in norms]
    logits = teacher.model((images - teacher.mean) / teacher.std)
    for handle in handles:
        handle.remove()
    return weights["ce"] * F.cross_entropy(logits, labels) + weights["bn"] * torch.stack(distances).sum()


def watched(synthesizer: Synthesizer) -> list[tuple[Tensor, Tensor]]:
    """Latents and labels of every forward of the generator from now on."""
    inputs: list[tuple[Tensor, Tensor]] = []
    synthesizer.generator.register_forward_pre_hook(
        lambda module, given: inputs.append((given[0].detach().clone(), given[1]))
    )
    return inputs


def start(step: int, latent: int) -> Tensor:
    return draw_latents(ALONE, BATCH, latent, SEED, "synthesis", step)


# --- a round against a plain loop ---


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("betas", [(0.5, 0.999), (0.9, 0.999)])
def test_image_inversion_is_a_plain_loop_of_adam_on_images(
    teacher: Teacher, cosine: bool, betas: tuple[float, float]
) -> None:
    held = pool()
    options: dict[str, Any] = {"latent_lr": 0.1, "cosine": cosine, "betas": betas, "pool": held}
    synthesizer = build(pixels(), teacher, INVERSION, **options)
    inputs = watched(synthesizer)
    synthesizer.step(3)
    labels = inputs[0][1]
    assert sorted(labels.bincount(minlength=3).tolist()) == [2, 2, 4]  # four pairs
    x = start(3, 64).view(BATCH, 1, 8, 8).clone()  # normalised pixels, of a mean of 0.4 and a deviation of 0.3
    low, high = (0 - 0.4) / 0.3, (1 - 0.4) / 0.3
    x.clamp_(low, high).requires_grad_()
    adam = torch.optim.Adam([x], lr=0.1, betas=betas, eps=ADAM_EPS)
    for k in range(INNER):
        adam.param_groups[0]["lr"] = 0.1 * (0.5 + 0.5 * math.cos(math.pi * k / INNER) if cosine else 1)
        adam.zero_grad()
        loss = plain_loss(teacher, x * 0.3 + 0.4, labels, INVERSION)
        loss.backward()
        adam.step()
        with torch.no_grad():
            x.clamp_(low, high)
    found = inputs[-1][0].view_as(x)  # of the forward after the last update, into the pool
    assert len(inputs) == INNER + 1
    torch.testing.assert_close(found, x.detach(), rtol=0, atol=2e-4)
    moved = (x.detach() - start(3, 64).view_as(x).clamp(low, high)).abs()
    assert moved.median() > 0.1  # a thousand times the tolerance
    images = held.images[:BATCH].float() / 255
    torch.testing.assert_close(images, (x.detach() * 0.3 + 0.4).clamp(0, 1), rtol=0, atol=0.51 / 255)
    assert torch.equal(held.labels, torch.cat([labels, torch.full((len(held.labels) - BATCH,), 3)]))


@pytest.mark.parametrize(("latent_lr", "cosine"), [(0.0, False), (0.02, False), (0.02, True)])
def test_a_round_of_a_network_is_a_plain_loop_over_its_weights_and_latents(
    teacher: Teacher, make_generator: MakeGenerator, latent_lr: float, cosine: bool
) -> None:
    # A gentle rate: the batch norms of 8 images turn a rounding into much within few updates otherwise.
    held, generator, lr = pool(), make_generator(), 1e-3
    plain = copy.deepcopy(generator).train()
    synthesizer = build(
        generator, teacher, INVERSION, latent_lr=latent_lr, lr=lr, cosine=cosine, pool=held, betas=(0.9, 0.99)
    )
    inputs = watched(synthesizer)
    terms = synthesizer.step(2)
    labels, z = inputs[0][1], start(2, generator.latent).clone().requires_grad_()
    groups = [{"params": list(plain.parameters()), "lr": lr}, {"params": [z], "lr": latent_lr}]
    adam = torch.optim.Adam(groups, betas=(0.9, 0.99), eps=ADAM_EPS)
    for k in range(INNER):
        for group, rate in zip(adam.param_groups, (lr, latent_lr)):
            group["lr"] = rate * (0.5 + 0.5 * math.cos(math.pi * k / INNER) if cosine else 1)
        adam.zero_grad()
        loss = plain_loss(teacher, plain(z, labels), labels, INVERSION)
        loss.backward()
        adam.step()
    total = sum(INVERSION[name] * value for name, value in terms.items())
    assert float(total) == pytest.approx(loss.item(), rel=1e-4)
    for (name, found), wanted in zip(generator.named_parameters(), plain.parameters()):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4, msg=name)
    torch.testing.assert_close(inputs[-1][0], z.detach(), rtol=0, atol=1e-3)
    moved = (z.detach() - start(2, generator.latent)).abs()
    assert moved.max() == 0 if latent_lr == 0 else moved.median() > 0.02
    with torch.no_grad():
        images = plain(z, labels)
    torch.testing.assert_close(held.images[:BATCH].float() / 255, images, rtol=0, atol=0.005)
    assert all(torch.equal(each[1], labels) for each in inputs)


def test_every_round_starts_from_latents_and_labels_of_its_own(teacher: Teacher) -> None:
    held = pool(2 * BATCH)
    synthesizer = build(pixels(), teacher, INVERSION, latent_lr=0.1, pool=held)
    inputs = watched(synthesizer)
    images = []
    for step in range(3):
        synthesizer.step(step)
        first = inputs[step * (INNER + 1)][0]
        torch.testing.assert_close(first, start(step, 64).clamp(-0.4 / 0.3, 0.6 / 0.3))
        images.append(held.images[(step % 2) * BATCH :][:BATCH].clone())
    assert int(held.place) == BATCH  # two of the three rounds are kept, the first made way
    assert torch.equal(held.images, torch.cat([images[2], images[1]]))
    assert synthesizer.settle() is held
    assert not held.training


def test_the_bn_loss_of_a_finished_pool_is_that_of_what_it_draws(teacher: Teacher) -> None:
    held = pool()
    synthesizer = build(pixels(), teacher, INVERSION, latent_lr=0.1, equalise=True, pool=held)
    for step in range(4):
        synthesizer.step(step)
    drawn: list[Tensor] = []
    held.register_forward_hook(lambda module, given, images: drawn.append(images))
    synthesizer.settle()
    wanted = plain_loss(teacher, drawn[-1], torch.zeros(BATCH, dtype=torch.int64), {"ce": 0.0, "bn": 1.0})
    assert float(synthesizer.bn_end["plain"]) == pytest.approx(float(wanted), rel=1e-4)
    assert float(synthesizer.bn_end["plain"]) < float(synthesizer.bn_start["plain"])


# --- what is drawn anew before a round ---


def weights_of(generator: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in generator.named_parameters()}


class Starts(Synthesizer):
    """Keeps the weights and the optimiser's state as the first update of each round finds them."""

    def _backward(self, step: int, k: int, labels: Tensor, latents: Tensor) -> dict[str, Tensor]:
        if k == 0:
            state = self.optimizer.state if self.optimizer is not None else {}
            known = {name for name, p in self.generator.named_parameters() if p in state}
            self.starts = [*getattr(self, "starts", []), (weights_of(self.generator), known)]
        return super()._backward(step, k, labels, latents)


@pytest.mark.parametrize("renew", ["none", "first", "all"])
def test_layers_are_drawn_anew_before_every_round_but_the_first(
    teacher: Teacher, make_generator: MakeGenerator, renew: str
) -> None:
    generator = make_generator(mean=[0.3], std=[0.2])
    first = {id(p) for module in generator.first_layers() for p in module.parameters()}
    named = dict(generator.named_parameters())
    anew = {"none": set(), "first": {n for n, p in named.items() if id(p) in first}, "all": set(named)}[renew]
    assert renew == "none" or 0 < len(anew) <= len(named)
    synthesizer = Starts(
        generator,
        [teacher],
        losses=INVERSION,
        steps=STEPS,
        batch_size=BATCH,
        sample=1,
        inner=3,
        renew=renew,
        pool=pool(),
        lr=1e-2,
        seed=SEED,
    )
    before, trained = weights_of(generator), []
    for step in range(3):
        synthesizer.step(step)
        trained.append(weights_of(generator))
    begun = [weights for weights, _ in synthesizer.starts]
    assert all(torch.equal(begun[0][name], before[name]) for name in named)  # what it was built with is new enough
    random = {
        n for n in named if n in ("embed.weight", "project.weight", "to_pixels.weight") or n.endswith(".0.weight")
    }
    for step in (1, 2):
        for name in named:
            went_on = torch.equal(begun[step][name], trained[step - 1][name])
            assert went_on == (name not in anew), name
            if name in anew & random:  # drawn anew, not put back
                assert not torch.equal(begun[step][name], begun[step - 1][name]), name
        assert synthesizer.starts[step][1] == set(named) - anew
    if renew == "all":
        assert begun[2]["head.shift"].item() == pytest.approx(0.3)
        assert begun[2]["head.scale"].item() == pytest.approx(0.2)
        assert trained[1]["head.shift"].item() != pytest.approx(0.3, abs=1e-4)


def test_layers_drawn_anew_depend_on_seed_and_step(teacher: Teacher, make_generator: MakeGenerator) -> None:
    def embedding(step: int, seed: int) -> Tensor:
        synthesizer = build(make_generator(), teacher, INVERSION, renew="all", lr=0.0, inner=1, seed=seed)
        synthesizer.step(step)
        return weights_of(synthesizer.generator)["project.weight"]

    assert torch.equal(embedding(1, 1), embedding(1, 1))
    assert not torch.equal(embedding(1, 1), embedding(2, 1))
    assert not torch.equal(embedding(1, 1), embedding(1, 2))


# --- what the teachers are shown ---


class Shown:
    """The images that a teacher is given."""

    def __init__(self, teacher: Teacher) -> None:
        self.images: list[Tensor] = []
        teacher.register_forward_pre_hook(lambda module, given: self.images.append(given[0].detach().clone()))


def test_every_update_moves_images_anew_and_every_process_moves_them_alike(teacher: Teacher) -> None:
    shown = Shown(teacher)
    options: dict[str, Any] = {"latent_lr": 1e-12, "jitter": 3, "flip": True}
    build(pixels(), teacher, {"ce": 1.0}, **options).step(1)
    whole, shown.images = shown.images, []
    assert len(whole) == INNER
    assert len({tuple(each[0].flatten().tolist()) for each in whole}) >= INNER - 1  # two may be alike
    assert len({tuple(each[0].flatten().sort().values.tolist()) for each in whole}) == 1  # the same pixels
    for rank in (0, 1):
        build(
            pixels(), teacher, {"ce": 1.0}, **options, batch_size=BATCH // 2, shard=Shard(ALONE.device, rank, 2)
        ).step(1)
    parts = [torch.cat([a, b]) for a, b in zip(shown.images[:INNER], shown.images[INNER:])]
    for found, wanted in zip(parts, whole):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("share", "half"), [(0.0, 0), (0.4, 3), (0.5, 3), (1.0, 6)])
def test_the_first_share_of_a_round_is_seen_at_half_size(teacher: Teacher, share: float, half: int) -> None:
    teacher.moves = Moves(1, flip=True)  # of pixels as they are: images move before they shrink
    shown = Shown(teacher)
    synthesizer = build(pixels(), teacher, {"ce": 1.0}, latent_lr=0.1, coarse=share)
    inputs = watched(synthesizer)
    synthesizer.step(0)
    assert [each.shape[-1] for each in shown.images] == [4] * half + [8] * (INNER - half)
    for k, ((latents, labels), seen) in enumerate(zip(inputs, shown.images)):
        position = (synthesizer.seed, "synthesis", 0, *([k] if k else []))
        images = augment(synthesizer.generator(latents, labels), ALONE, teacher.moves, *position)
        blocks = images.reshape(BATCH, 1, 4, 2, 4, 2).mean((3, 5)) if seen.shape[-1] == 4 else images
        torch.testing.assert_close(seen, blocks, rtol=0, atol=1e-6)


# --- RDSKD's penalty ---


@pytest.mark.parametrize("rounds", [True, False])
def test_a_penalised_term_is_the_exponential_of_its_increase(
    teacher: Teacher, make_generator: MakeGenerator, rounds: bool
) -> None:
    weights = {"ce": 0.7, "one_hot": 0.4, "information": 2.0, "bn": 0.1}
    schedule: dict[str, Any] = {"inner": 2} if rounds else {"inner": 1, "pool": None}
    generator = make_generator()
    synthesizer = build(generator, teacher, weights, penalise=True, lr=3e-2, **schedule)
    penalised, found = ("ce", "one_hot", "information"), []
    kept = synthesizer._backward

    def spy(step: int, k: int, labels: Tensor, latents: Tensor) -> dict[str, Tensor]:
        state, before = copy.deepcopy(generator), {name: float(v) for name, v in synthesizer.last.items()}
        terms = kept(step, k, labels, latents)
        gradients = [p.grad.clone() for p in generator.parameters() if p.grad is not None]
        found.append((state, before, terms, gradients, labels, latents))
        return terms

    synthesizer._backward = spy  # type: ignore[method-assign]
    for step in range(2):
        synthesizer.step(step)
    assert len(found) == 2 * schedule["inner"]
    ratios = []
    for state, before, terms, gradients, labels, latents in found:
        images = state(latents.detach(), labels)
        logits = teacher(images)
        p = logits.softmax(1)
        values = {
            "ce": F.cross_entropy(logits, labels),
            "one_hot": -p.max(1).values.log().mean(),
            "information": (p.mean(0) * p.mean(0).log()).sum(),
            "bn": plain_loss(teacher, images, labels, {"ce": 0.0, "bn": 1.0}),
        }
        for name, value in values.items():
            assert float(terms[name]) == pytest.approx(value.item(), rel=1e-4, abs=1e-6)
        # d exp(v - before) = exp(v - before) dv, with `before` a number
        now = {
            n: weights[n] * (math.exp(v.item() - before.get(n, v.item())) if n in penalised else 1)
            for n, v in values.items()
        }
        ratios += [now[name] / weights[name] for name in penalised]
        wanted = torch.autograd.grad(sum(now[n] * v for n, v in values.items()), list(state.parameters()))  # type: ignore[arg-type]
        for a, b in zip(gradients, wanted):
            assert (a - b).abs().max() < 2e-3 * b.abs().max() + 1e-6
    assert ratios[:3] == [1, 1, 1]
    assert max(ratios) > 1.01
    assert min(ratios) < 0.99


# --- an adversary that counts everywhere ---


@pytest.mark.parametrize("kind", ["js", "mae", "kl"])
def test_an_unmasked_adversary_counts_images_on_which_both_disagree(
    teacher: Teacher, make_teacher: MakeTeacher, make_generator: MakeGenerator, kind: str
) -> None:
    student = make_teacher("student", seed=4).model.eval()
    weights = {"adversary": 1.0}
    options: dict[str, Any] = {"student": student, "adversary_loss": kind, "warmup": 0.0, "inner": 1, "pool": None}
    terms = {}
    for mask in (True, False):
        synthesizer = build(make_generator(), teacher, weights, adversary_mask=mask, **options)
        inputs = watched(synthesizer)
        before = copy.deepcopy(synthesizer.generator)
        terms[mask] = float(synthesizer.step(0)["adversary"])
    with torch.no_grad():
        images = before(*inputs[0])
        answer, target = student(images).double(), teacher(images).double()
    p, q = ((x / (3 if kind == "js" else 1)).softmax(1) for x in (target, answer))
    middle = (p + q) / 2
    each = {
        "mae": (answer - target).abs().mean(1),
        "kl": (p * (p / q).log()).sum(1),
        "js": 0.5 * ((p * (p / middle).log()).sum(1) + (q * (q / middle).log()).sum(1)),
    }[kind]
    agree = answer.argmax(1) == target.argmax(1)
    assert 0 < agree.sum() < BATCH
    assert terms[False] == pytest.approx(-float(each.mean()), rel=1e-4)
    assert terms[True] == pytest.approx(-float((each * agree).mean()), rel=1e-4)


# --- the contrastive term in a round ---


def test_a_round_with_the_contrastive_term_fills_the_bank_with_what_it_made(
    teacher: Teacher, make_generator: MakeGenerator
) -> None:
    held = pool()
    teacher.moves = Moves(1, flip=True)
    weights = INVERSION | {"contrastive": 0.8}
    synthesizer = build(make_generator(), teacher, weights, latent_lr=0.01, bank=12, pool=held, inner=2)
    assert synthesizer.contrast is not None
    head = weights_of(synthesizer.contrast)
    for step in range(2):
        assert set(synthesizer.step(step)) == set(weights)
    norms = [module for module in teacher.modules() if isinstance(module, nn.BatchNorm2d)]
    seen: list[Tensor] = []
    handles = [norm.register_forward_pre_hook(lambda m, x: seen.append(x[0].mean((2, 3)))) for norm in norms]
    for step, images in enumerate((held.images[: 2 * BATCH].float() / 255).split(BATCH)):
        teacher(augment(images, ALONE, teacher.moves, synthesizer.seed, "bank", step))
    for handle in handles:
        handle.remove()
    count = len(norms)
    features = torch.cat([torch.cat(seen[:count], 1), torch.cat(seen[count:], 1)])[-12:]
    bank = synthesizer.contrast.bank.roll(-synthesizer.contrast.next, 0)
    torch.testing.assert_close(bank, features, rtol=0, atol=0.05)  # half a grey level off
    spread = features.std(0).mean()
    assert (bank - features).abs().mean() < 0.1 * spread
    assert all(not torch.equal(p, head[name]) for name, p in synthesizer.contrast.named_parameters())


# --- resume, host reads, what is left alone ---


def run(generator: ImageGenerator, teacher: Teacher, first: int, last: int, state: Any, **options: Any) -> Any:
    held = pool(3 * BATCH)
    synthesizer = build(generator, teacher, pool=held, latent_lr=0.05, inner=2, jitter=1, flip=True, **options)
    if state is not None:
        held.load_state_dict(state["pool"])
        synthesizer.load_state_dict(state["synthesizer"])
    for step in range(first, last):
        synthesizer.step(step)
    return copy.deepcopy({"pool": held.state_dict(), "synthesizer": synthesizer.state_dict()})


FULL: dict[str, Any] = {
    "weights": INVERSION | {"contrastive": 0.5, "diversity": 0.1, "one_hot": 0.1},
    "bank": 20,
    "renew": "first",
    "redraw": 2,
    "learn_weights": True,
    "equalise": True,
    "penalise": True,
    "cosine": True,
}
WAYS = {"network": FULL, "pixels": {"weights": INVERSION, "learn_weights": True, "equalise": True}}


@pytest.mark.parametrize("way", WAYS)
def test_resumed_rounds_end_bitwise_where_uninterrupted_ones_do(
    teacher: Teacher, make_generator: MakeGenerator, way: str
) -> None:
    def make(seed: int) -> ImageGenerator:
        return make_generator(seed) if way == "network" else pixels()

    whole = run(make(0), teacher, 0, 6, None, **WAYS[way])
    half = run(make(0), teacher, 0, 3, None, **WAYS[way])
    resumed = run(make(9), teacher, 3, 6, half, **WAYS[way])
    one, other = (torch.utils._pytree.tree_leaves(state) for state in (whole, resumed))
    assert len(one) == len(other) > 10
    for a, b in zip(one, other):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
    assert not torch.equal(whole["pool"]["images"], half["pool"]["images"])


def test_a_round_waits_for_no_value(
    teacher: Teacher, make_generator: MakeGenerator, make_teacher: MakeTeacher, no_host_read: Any
) -> None:
    student = make_teacher("student", seed=4).model
    options = FULL | {"weights": FULL["weights"] | {"adversary": 1.0}, "renew": "none", "redraw": 0}
    synthesizer = build(
        make_generator(),
        teacher,
        latent_lr=0.05,
        jitter=2,
        flip=True,
        coarse=0.0,
        student=student,
        warmup=0.0,
        **options,
    )
    assert synthesizer.contrast is not None
    with no_host_read(*synthesizer.generator.parameters(), *synthesizer.contrast.parameters(), *teacher.buffers()):
        terms = synthesizer.step(1)
        synthesizer.step(2)
        with pytest.raises(AssertionError, match="waits for the device"):
            float(terms["ce"])


def test_a_term_of_weight_zero_asks_for_no_crop(
    teacher: Teacher, make_generator: MakeGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: Any) -> None:
        raise AssertionError("computed")

    monkeypatch.setattr(synthesis, "Contrast", fail)
    monkeypatch.setattr(Teacher, "tap_means", fail)
    build(make_generator(), teacher, INVERSION | {"contrastive": 0.0}).step(0)
    with pytest.raises(AssertionError, match="computed"):
        build(make_generator(), teacher, INVERSION | {"contrastive": 0.1}, bank=8)


def test_an_unknown_way_to_renew_is_refused_by_name(teacher: Teacher, make_generator: MakeGenerator) -> None:
    with pytest.raises(UserError, match=r"unknown choice 'last'; choose from \['all', 'first', 'none'\]"):
        build(make_generator(), teacher, INVERSION, renew="last")


def positions(step: int) -> list[tuple[int | str, ...]]:
    """Of every update of a round."""
    return [(SEED, "synthesis", step, *([k] if k else [])) for k in range(INNER)]


def test_every_update_of_a_round_asks_teachers_of_its_own(
    teacher: Teacher, make_teacher: MakeTeacher, make_generator: MakeGenerator
) -> None:
    zoo, asked = [teacher, make_teacher("b", seed=2), make_teacher("c", seed=3)], []
    for each in zoo:
        each.register_forward_pre_hook(lambda module, given: asked.append(module.name))
    synthesizer = build(make_generator(), zoo, {"ce": 1.0})
    for step in range(3):
        synthesizer.step(step)
    assert asked == [sample_teachers(zoo, 1, SEED, update)[0].name for update in range(3 * INNER)]
    assert len(set(asked[:INNER])) > 1


def test_every_update_of_a_round_mixes_in_boxes_of_its_own(teacher: Teacher) -> None:
    boxes: list[Tensor] = []
    mix = make_mix("resize")
    teacher.register_forward_pre_hook(lambda module, given: boxes.append(mix._params["box"].clone()))
    build(pixels(), teacher, {"ce": 1.0}, latent_lr=0.1, mix=mix).step(2)
    wanted = [draw_mix(make_mix("resize"), (BATCH, 1, 8, 8), ALONE, *each)["box"] for each in positions(2)]
    assert len(boxes) == len({str(box.tolist()) for box in boxes}) == INNER
    assert all(torch.equal(found, box) for found, box in zip(boxes, wanted))


def test_every_update_of_a_round_crops_its_views_anew(
    teacher: Teacher, make_generator: MakeGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[tuple[int | str, ...]] = []
    monkeypatch.setattr(Contrast, "_view", lambda self, images, *position: found.append(position) or images)
    build(make_generator(), teacher, {"ce": 1.0, "contrastive": 0.5}, bank=8).step(2)
    assert found == positions(2)


def test_the_contrasts_head_is_that_of_the_seed(teacher: Teacher, make_generator: MakeGenerator) -> None:
    one, again, other = (
        build(make_generator(), teacher, {"ce": 1.0, "contrastive": 0.5}, bank=8, seed=seed).contrast
        for seed in (1, 1, 2)
    )
    assert torch.equal(one.head[0].weight, again.head[0].weight)
    assert not torch.equal(one.head[0].weight, other.head[0].weight)


def test_the_bank_holds_images_as_teachers_are_shown_them(teacher: Teacher, make_generator: MakeGenerator) -> None:
    teacher.moves = Moves(2, black=True)
    held, generator = pool(), make_generator()
    weights = {"ce": 1.0, "contrastive": 0.5}
    synthesizer = build(generator, teacher, weights, bank=BATCH, pool=held, inner=1, as_trained=False)
    synthesizer.step(0)
    with torch.no_grad(), teacher.tap_means() as means:
        teacher(held.images[:BATCH].float() / 255)
    bank = synthesizer.contrast.bank  # type: ignore[union-attr]
    torch.testing.assert_close(bank, torch.cat(means, 1), rtol=0, atol=0.05)  # half a grey level off
    with torch.no_grad(), teacher.tap_means() as means:
        teacher(augment(held.images[:BATCH].float() / 255, ALONE, teacher.moves, SEED, "bank", 0))
    assert (bank - torch.cat(means, 1)).abs().max() > 0.2


def test_latents_that_are_learned_are_not_pulled_together_by_diversity(
    teacher: Teacher, make_generator: MakeGenerator
) -> None:
    """It is asked of the images: MSGAN's quotient would also grow where the latents come nearer."""
    weights = {"ce": 0.5, "diversity": 2.0}
    synthesizer = build(make_generator(), teacher, weights, latent_lr=0.1)
    labels, latents = synthesizer._draw(0)
    plain = copy.deepcopy(synthesizer.generator)
    z = latents.clone().requires_grad_()
    images = plain(z, labels)
    loss = 0.5 * F.cross_entropy(teacher(images), labels) + 2 * mode_seeking(images, latents, labels)
    (wanted,) = torch.autograd.grad(loss, z)
    synthesizer._backward(0, 0, labels, latents.requires_grad_())
    torch.testing.assert_close(latents.grad, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
