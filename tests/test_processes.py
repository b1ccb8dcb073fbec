"""Two processes of batch B train a generator and a student as one process of batch 2B does."""

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

from dfkd.collectives import all_reduce_mean, sync_batchnorm
from dfkd.compress.fit import Fit
from dfkd.compress.hints import Hints, projected_hints
from dfkd.mixing import make_mix
from dfkd.models import build_model
from dfkd.runtime import Shard, make_accelerator, shut_down
from dfkd.stream import SyntheticStream
from dfkd.synthesis import Synthesizer
from dfkd.teachers import Teacher, batch_norms
from generators import ConvGenerator, ImageGenerator, PixelGenerator, PoolGenerator

BATCH, STEPS, REPLAY_STEPS = 8, 20, 5  # images of each of two processes; steps
LOSSES = {"ce": 1.0, "bn": 1.0, "diversity": 0.1, "adversary": 1.0}
# The defaults' rates in float64, gentle ones in float32: at the defaults a rounding that turns a ReLU, the clamp or
# the adversary's mask the other way changes a gradient at once, and Adam makes full steps of it (7e-3 after 20 steps).
GENTLE = {"lr": 1e-4, "student_lr": 1e-3}
RATES = {"lr": 3e-3, "student_lr": 0.1}


class AnyDtypeGenerator(ConvGenerator):
    """Takes the float32 latents at its own precision, so that a float64 one trains on the same draws."""

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        return super().forward(latents.to(self.to_pixels.weight.dtype), labels)


def zoo(dtype: torch.dtype) -> list[Teacher]:
    """Three small teachers of different families, with random statistics and logits of unit spread."""
    teachers = []
    for seed, family in enumerate(("plain", "residual", "inverted")):
        torch.manual_seed(seed)
        network = build_model(f"dfkd:tiny_{family}", classes=3, channels=1, kwargs={"width": 4, "depth": 1})
        for norm in batch_norms(network).values():
            norm.running_mean.uniform_(-0.5, 0.5)  # type: ignore[operator, union-attr]
            norm.running_var.uniform_(0.5, 1.5)  # type: ignore[operator, union-attr]
        teacher = Teacher(network, name=family)
        with torch.no_grad():
            network.linear.weight /= teacher(torch.rand(64, 1, 8, 8)).std(0).unsqueeze(1)  # type: ignore[union-attr]
        teachers.append(teacher.to(dtype))
    return teachers


def training(
    shard: Shard, accelerator: Any, dtype: torch.dtype, *, steps: int, lr: float, student_lr: float, replay: int = 0
) -> dict[str, Any]:
    """`steps` updates of a generator and a student in turn, as the loop of a run makes them."""
    torch.manual_seed(5)
    generator = AnyDtypeGenerator(latent=6, classes=3, channels=1, size=8, width=4, prototypes=1).to(dtype)
    student = sync_batchnorm(build_model("dfkd:tiny_plain", classes=3, channels=1, kwargs={"width": 4})).to(dtype)
    teachers, batch = zoo(dtype), 2 * BATCH // shard.world
    synthesizer = Synthesizer(
        generator,
        teachers,
        losses=LOSSES,
        steps=STEPS,
        batch_size=batch,
        sample=2,
        mix=make_mix("resize"),
        student=student,
        adversary_loss="l1",
        warmup=0.1,
        fade=0.0,
        lr=lr,
        accelerator=accelerator,
        shard=shard,
    )
    stream = SyntheticStream(
        generator,
        batch_size=batch,
        teacher=teachers,
        replay=replay,
        shift=0.125,
        flip=True,
        mix=0.5,
        shard=shard,
        features=True,
    )
    stages = [("features.2", "model.features.2"), ("features.9", "model.features.6")]
    learnt = Hints(student, teachers[0], stages, 0.5)
    if replay:
        projected = projected_hints(student, teachers[0], torch.zeros(1, 1, 8, 8, dtype=dtype), 0.5)
        assert projected is not None
        learnt = projected
    fitting = Fit(student, stream, steps=STEPS, lr=student_lr, warmup=2, hints=learnt, accelerator=accelerator)
    terms, gradients = [], {}
    for step in range(steps):
        found = {**synthesizer.step(step), **{f"student {k}": v for k, v in fitting.step(step).items()}}
        terms.append({name: all_reduce_mean(value) for name, value in found.items()})
        if step == 0:
            networks = {"generator": generator, "student": student, **fitting.projectors}
            gradients = {name: [p.grad.clone() for p in m.parameters()] for name, m in networks.items()}
    return {
        "terms": terms,
        "bn": synthesizer.bn_last,
        "gradients": gradients,
        "generator": generator.state_dict(),
        "student": student.state_dict(),
        "replay": stream.replay.images if stream.replay else None,
    }


SIZES: dict[str, Any] = {"classes": 3, "channels": 1, "size": 8}
ROUNDS: dict[str, dict[str, Any]] = {
    "network": {
        "losses": {"ce": 1.0, "bn": 0.5, "contrastive": 0.8, "diversity": 0.1, "one_hot": 0.3, "information": 0.5},
        "bank": 20,
        "renew": "first",
        "penalise": True,
        "latent_lr": 0.01,
        "jitter": 2,
        "flip": True,
    },
    "pixels": {
        "losses": {"ce": 1.0, "bn": 0.5, "adversary": 0.5, "tv": 0.1, "spread": 0.1, "smooth": 0.2},
        "adversary_loss": "js",
        "adversary_mask": False,
        "warmup": 0.0,
        "fade": 0.0,
        "latent_lr": 0.05,
        "coarse": 0.5,
        "cosine": True,
        "bn_distance": "square",
        "equalise": False,
    },
}


class DoubleLatents(Synthesizer):
    """Learns the float32 latents at float64."""

    def _draw(self, step: int) -> tuple[Tensor, Tensor]:
        labels, latents = super()._draw(step)
        return labels, latents.double()


def rounds(shard: Shard, accelerator: Any, kind: str) -> dict[str, Any]:
    """Four rounds of three updates in float64: what they learned, and what they put into pool and memory bank."""
    torch.manual_seed(5)
    generator: ImageGenerator = AnyDtypeGenerator(latent=6, width=4, **SIZES)
    generator = (generator if kind == "network" else PixelGenerator(**SIZES)).double()
    pool = PoolGenerator(capacity=3 * 2 * BATCH, **SIZES)
    student = build_model("dfkd:tiny_plain", classes=3, channels=1, kwargs={"width": 4}).double()
    teacher = zoo(torch.float64)[0]
    with torch.no_grad():  # sure of one class whatever the image, it would leave nothing to spread
        teacher.model.linear.bias -= teacher(torch.rand(64, 1, 8, 8).double()).mean(0)  # type: ignore[operator, union-attr]
    synthesizer = DoubleLatents(
        generator,
        [teacher],
        steps=4,
        batch_size=2 * BATCH // shard.world,
        inner=3,
        pool=pool,
        student=student,
        accelerator=accelerator,
        shard=shard,
        **ROUNDS[kind],
    )
    if synthesizer.contrast is not None:
        synthesizer.contrast.double()
    latents: list[Tensor] = []
    generator.register_forward_pre_hook(lambda module, given: latents.append(given[0].detach().clone()))
    terms = [{name: all_reduce_mean(x) for name, x in synthesizer.step(step).items()} for step in range(4)]
    contrast = synthesizer.contrast.state_dict() if synthesizer.contrast is not None else {}
    contrast.pop("_extra_state", None)
    return {
        "terms": terms,
        "learned": generator.state_dict(),
        "contrast": contrast,
        "latents": [latents[0], latents[-1]],
        "pool": pool.state_dict(),
        "draw": pool(torch.linspace(-2, 2, 50).view(-1, 1), torch.arange(50) % 3),
    }


def runs(shard: Shard, accelerator: Any) -> dict[str, Any]:
    single, double = torch.float32, torch.float64
    return {
        "double": training(shard, accelerator, double, steps=STEPS, **RATES),
        "single": training(shard, accelerator, single, steps=STEPS, **GENTLE),
        "replay": training(shard, accelerator, double, steps=REPLAY_STEPS, replay=3, **RATES),
        "rounds": {kind: rounds(shard, accelerator, kind) for kind in ROUNDS},
    }


def process(rank: int, folder: str, port: int) -> None:
    """One of two processes; leaves what it found in a file."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    accelerator, shard = make_accelerator("fp32")
    torch.save(runs(shard, accelerator), Path(folder) / f"{rank}.pt")
    shut_down(accelerator)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = int(server.getsockname()[1])
    mp.start_processes(process, args=(str(folder), port), nprocs=2, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    """What one process with the whole batch found."""
    return runs(Shard(torch.device("cpu")), None)


def flat(tensors: Any) -> Tensor:
    tensors = tensors.values() if isinstance(tensors, dict) else tensors
    return torch.cat([x.detach().double().flatten() for x in tensors if x.is_floating_point()])


def distance(found: Any, wanted: Any) -> float:
    """The norm of the difference, relative to the wanted."""
    return float((flat(found) - flat(wanted)).norm() / flat(wanted).norm())


def test_the_reference_learns(one: dict[str, Any]) -> None:
    # a comparison of two that stand still would show nothing
    fresh = training(Shard(torch.device("cpu")), None, torch.float64, steps=0, **RATES)
    for network in ("generator", "student"):
        assert distance(one["double"][network], fresh[network]) > 0.05
    for name in ("double", "single", "replay"):
        run = one[name]
        assert all({"ce", "bn", "diversity", "student loss"} <= set(terms) for terms in run["terms"])
    assert "adversary" in one["single"]["terms"][-1]
    assert one["double"]["bn"].keys() == {"plain", "residual", "inverted"}


@pytest.mark.parametrize("network", ["generator", "student"])
def test_in_float64_20_steps_give_the_same_weights(
    two: list[dict[str, Any]], one: dict[str, Any], network: str
) -> None:
    for found in two:
        assert distance(found["double"][network], one["double"][network]) < 1e-9
        for key, value in one["double"][network].items():
            torch.testing.assert_close(found["double"][network][key], value, rtol=1e-7, atol=1e-9)
    parameters = {key: value for key, value in two[1]["double"][network].items() if "running" not in key}
    assert all(torch.equal(value, two[0]["double"][network][key]) for key, value in parameters.items())


def test_in_float64_every_term_of_20_steps_is_the_same(two: list[dict[str, Any]], one: dict[str, Any]) -> None:
    for found in two:
        for terms, wanted in zip(found["double"]["terms"], one["double"]["terms"], strict=True):
            assert terms.keys() == wanted.keys()
            for name, value in wanted.items():
                torch.testing.assert_close(terms[name].double(), value.double(), rtol=1e-6, atol=1e-6)


def test_in_float32_losses_batch_norm_term_and_gradients_agree(two: list[dict[str, Any]], one: dict[str, Any]) -> None:
    for found in two:
        for name, value in one["single"]["terms"][0].items():
            assert float(found["single"]["terms"][0][name]) == pytest.approx(float(value), rel=1e-5), name
        for network, gradients in one["single"]["gradients"].items():
            # Rounding that a backward amplifies, by each CPU's kernels: 1.5e-5 without AMX; in float64, above, 1e-9.
            assert distance(found["single"]["gradients"][network], gradients) < 5e-5


@pytest.mark.parametrize("network", ["generator", "student"])
def test_in_float32_20_steps_give_the_same_weights(
    two: list[dict[str, Any]], one: dict[str, Any], network: str
) -> None:
    for found in two:
        assert distance(found["single"][network], one["single"][network]) < 1e-5


def test_with_replay_each_process_keeps_its_part_of_the_ring(two: list[dict[str, Any]], one: dict[str, Any]) -> None:
    whole = one["replay"]["replay"]  # [slots, half of the global batch, C, H, W] uint8
    parts = torch.cat([found["replay"]["replay"] for found in two], 1)
    assert whole.shape == parts.shape
    assert int((whole.int() - parts.int()).abs().max()) <= 1  # one rounds up where the other rounds down
    for found in two:  # a grey level that rounds the other way is 1/255 of a pixel
        assert distance(found["replay"]["generator"], one["replay"]["generator"]) < 1e-6
        assert distance(found["replay"]["student"], one["replay"]["student"]) < 1e-6


@pytest.mark.parametrize("kind", ROUNDS)
def test_in_float64_rounds_fill_the_same_pool(two: list[dict[str, Any]], one: dict[str, Any], kind: str) -> None:
    wanted = one["rounds"][kind]
    first, last = wanted["latents"]
    assert (last - first).abs().max() > 0.01  # they learned
    assert set(wanted["terms"][-1]) == set(ROUNDS[kind]["losses"])
    parts = [torch.cat([found["rounds"][kind]["latents"][k] for found in two]) for k in (0, 1)]
    assert torch.equal(parts[0], first)
    torch.testing.assert_close(parts[1], last, rtol=0, atol=1e-8)
    for found in (each["rounds"][kind] for each in two):
        for terms, expected in zip(found["terms"], wanted["terms"]):
            for name, value in expected.items():
                torch.testing.assert_close(terms[name], value, rtol=1e-7, atol=1e-9, msg=name)
        for group in ("learned", "contrast"):
            assert found[group].keys() == wanted[group].keys()
            for key, value in wanted[group].items():
                torch.testing.assert_close(found[group][key], value, rtol=1e-7, atol=1e-9, msg=key)
        for key, value in wanted["pool"].items():
            assert int((found["pool"][key].long() - value.long()).abs().max()) <= (key == "images")  # a grey level
        assert (found["pool"]["images"] != wanted["pool"]["images"]).float().mean() < 0.01
        torch.testing.assert_close(found["draw"], wanted["draw"], rtol=0, atol=1.01 / 255)
    assert bool(wanted["contrast"]) == ("bank" in ROUNDS[kind])
    ours, theirs = (each["rounds"][kind]["pool"] for each in two)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)  # every process draws from the very same images
