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
from dfkd.mixing import make_mix
from dfkd.models import build_model
from dfkd.runtime import Shard, make_accelerator, shut_down
from dfkd.stream import SyntheticStream
from dfkd.synthesis import Synthesizer
from dfkd.teachers import Teacher, batch_norms
from generators import ConvGenerator

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
    generator = AnyDtypeGenerator(latent=6, classes=3, channels=1, size=8, width=4).to(dtype)
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
        warmup=0.1,
        lr=lr,
        accelerator=accelerator,
        shard=shard,
    )
    stream = SyntheticStream(
        generator, batch_size=batch, teacher=teachers, replay=replay, shift=0.125, flip=True, mix=0.5, shard=shard
    )
    fitting = Fit(student, stream, steps=STEPS, lr=student_lr, warmup=2, accelerator=accelerator)
    terms, gradients = [], {}
    for step in range(steps):
        found = {**synthesizer.step(step), **{f"student {k}": v for k, v in fitting.step(step).items()}}
        terms.append({name: all_reduce_mean(value) for name, value in found.items()})
        if step == 0:
            networks = {"generator": generator, "student": student}
            gradients = {name: [p.grad.clone() for p in m.parameters()] for name, m in networks.items()}
    return {
        "terms": terms,
        "bn": synthesizer.bn_last,
        "gradients": gradients,
        "generator": generator.state_dict(),
        "student": student.state_dict(),
        "replay": stream.replay.images if stream.replay else None,
    }


def runs(shard: Shard, accelerator: Any) -> dict[str, Any]:
    single, double = torch.float32, torch.float64
    return {
        "double": training(shard, accelerator, double, steps=STEPS, **RATES),
        "single": training(shard, accelerator, single, steps=STEPS, **GENTLE),
        "replay": training(shard, accelerator, double, steps=REPLAY_STEPS, replay=3, **RATES),
    }


def process(rank: int, folder: str, port: int) -> None:
    """One of two processes; leaves what it found in a file."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
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
    for run in one.values():
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
            assert distance(found["single"]["gradients"][network], gradients) < 1e-5


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
