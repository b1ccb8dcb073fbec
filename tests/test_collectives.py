"""Sums over processes: batch moments, their gradients, and two processes of batch B against one of batch 2B."""

import copy
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from dfkd.collectives import (
    SyncBatchNorm,
    all_reduce_mean,
    averaged,
    float_buffers,
    global_moments,
    mean_over_processes,
    sync_batchnorm,
)
from dfkd.draws import Moves
from dfkd.errors import UserError
from dfkd.losses import information, kd_l1
from dfkd.metrics import Metrics
from dfkd.mixing import make_mix
from dfkd.norms import batch_moments
from dfkd.runtime import Shard, make_accelerator, shut_down
from dfkd.stream import SyntheticStream, as_dataloader
from dfkd.synthesis import Synthesizer
from dfkd.teachers import Teacher, zoo_logits
from generators import ConvGenerator

BATCH, STEPS = 8, 4  # of each of two processes


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- what runs in every process; alone, it is the reference ---


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 3))


def moments_and_gradients(shard: Shard, wrap: Callable[[nn.Module], nn.Module]) -> dict[str, Any]:
    """Global moments of two layers, and the gradient of a loss that is not linear in them."""
    model = network()
    seen: list[tuple[Tensor, Tensor]] = []
    for index in (0, 2):
        model[index].register_forward_hook(lambda module, x, y: seen.append(batch_moments(y)))
    wrapped = wrap(model)  # its hooks live as long as it does
    logits = wrapped(shard.take(draw(2 * BATCH, 2, 6, 6) + 2))
    moments = global_moments(seen)
    loss = sum((mean - 0.3).norm() + (var - 0.7).norm() for mean, var in moments) + logits.square().mean()
    loss = loss + information(all_reduce_mean(logits.softmax(1).mean(0)))
    loss = loss + kd_l1(logits, shard.take(draw(2 * BATCH, 3, seed=4)))
    loss.backward()
    return {
        "loss": all_reduce_mean(loss.detach()),
        "moments": [x.detach() for pair in moments for x in pair],
        "gradients": [p.grad for p in model.parameters()],
    }


NORMS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "images": lambda: (nn.BatchNorm2d(3), 2 * draw(2 * BATCH, 3, 4, 5) + 1),
    "vectors": lambda: (nn.BatchNorm1d(3, eps=1e-3, momentum=0.3), draw(2 * BATCH, 3)),
    "without affine": lambda: (nn.BatchNorm2d(3, affine=False), draw(2 * BATCH, 3, 2, 2)),
    "cumulative average": lambda: (nn.BatchNorm2d(3, momentum=None), draw(2 * BATCH, 3, 2, 2)),
    "far from zero": lambda: (nn.BatchNorm2d(3), 0.1 * draw(2 * BATCH, 3, 8, 8) + 100),
}


def norm_and_gradients(case: str, shard: Shard, convert: Callable[[nn.Module], nn.Module]) -> dict[str, Tensor]:
    """Two forwards and one backward of a batch norm in training, then a forward in eval mode."""
    norm, x = NORMS[case]()
    if norm.affine:
        norm.weight.data, norm.bias.data = draw(3, seed=2), draw(3, seed=3)
    model = convert(nn.Sequential(norm))
    x = shard.take(x).requires_grad_()
    model(2 * x.detach())
    out = model(x)
    (out * shard.take(draw(*NORMS[case]()[1].shape, seed=1))).sum().backward()
    values = {"train": out.detach(), "grad": x.grad, "eval": model.eval()(x.detach()).detach()}
    values |= {f"buffer {name}": value for name, value in norm.named_buffers()}
    return values | {f"grad of {name}": p.grad for name, p in norm.named_parameters()}  # type: ignore[return-value]


def zoo() -> list[Teacher]:
    torch.manual_seed(1)
    networks = [
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
        for _ in range(2)
    ]
    return [Teacher(model, name=str(k), moves=Moves(2 * k, flip=True)) for k, model in enumerate(networks)]


def training(shard: Shard, accelerator: Any) -> dict[str, Any]:
    """Some generator updates with everything that couples the images of a batch."""
    torch.manual_seed(2)
    generator = ConvGenerator(latent=4, classes=3, channels=1, size=8, width=4)
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    weights = {"ce": 1.0, "bn": 1.0, "adversary": 1.0, "diversity": 0.1, "tv": 0.1, "information": 0.5, "likeness": 0.5}
    synthesizer = Synthesizer(
        generator,
        zoo(),
        losses=weights,
        steps=STEPS,
        batch_size=2 * BATCH // shard.world,
        mix=make_mix("resize"),
        student=student,
        warmup=0.0,
        fade=0.0,
        redraw=1,
        learn_weights=True,
        lr=1e-2,
        betas=(0.5, 0.9),
        accelerator=accelerator,
        shard=None if accelerator else shard,  # the accelerator knows it
    )
    terms = []
    for step in range(STEPS):
        values = synthesizer.step(step)
        terms.append(torch.stack([all_reduce_mean(values[name]) for name in weights]))
    return {
        "terms": torch.stack(terms),
        "weights": {name: value.clone() for name, value in generator.state_dict().items()},
        "balance": torch.stack([value.detach() for value in synthesizer.log_variance.values()]),
    }


def refused() -> str:
    """What is said where the processes of a group would each train a generator of their own."""
    generator = ConvGenerator(latent=4, classes=3, channels=1, size=8, width=4)
    try:
        Synthesizer(generator, zoo(), losses={"ce": 1.0}, steps=STEPS)
    except UserError as error:
        return str(error)
    return ""


def rank_streams(shard: Shard) -> SyntheticStream:
    torch.manual_seed(3)
    generator = ConvGenerator(latent=4, classes=3, channels=1, size=8, width=4).eval()
    return SyntheticStream(generator, batch_size=BATCH, num_batches=3, teacher=zoo()[0], shift=0.125, shard=shard)


def process(rank: int, folder: str, port: int) -> None:
    """One of two processes; leaves what it found in a file."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    os.environ |= {"ACCELERATE_NUM_PROCESSES": "2"}
    accelerator, shard = make_accelerator("fp32")
    assert dist.get_world_size() == 2
    tensors = [torch.full((2, 3), float(rank)), torch.tensor(5.0 - rank)]
    mean_over_processes(tensors)
    metrics = Metrics(Path(folder), main=False)
    loader = accelerator.prepare(as_dataloader(rank_streams(shard)))
    with torch.no_grad():
        logits = zoo_logits(zoo(), shard.take(draw(2 * BATCH, 1, 8, 8)))
    found = {
        "shard": (shard.rank, shard.world),
        "moments": moments_and_gradients(shard, nn.parallel.DistributedDataParallel),
        "norms": {case: norm_and_gradients(case, shard, sync_batchnorm) for case in NORMS},
        "means": tensors,
        "logged": metrics.log("student", 1, {"loss": torch.tensor(1.0 + rank), "share": torch.tensor(rank)}),
        "zoo": logits,
        "loader": list(loader),
        "alone": refused(),
        "training": training(shard, accelerator),
    }
    torch.save(found, Path(folder) / f"{rank}.pt")
    shut_down(accelerator)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes found; they must also end cleanly."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.start_processes(process, args=(str(folder), free_port()), nprocs=2, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


ALONE = Shard(torch.device("cpu"))


def near(value: Tensor, wanted: Tensor, rtol: float = 1e-5) -> None:
    torch.testing.assert_close(
        value.detach(), wanted.detach(), rtol=rtol, atol=rtol * float(wanted.detach().abs().max())
    )


# --- one process ---


def test_alone_nothing_is_summed() -> None:
    x = draw(4)
    assert all_reduce_mean(x) is x
    mean_over_processes([x])
    assert torch.equal(x, draw(4))


def test_every_torch_batch_norm_becomes_a_synchronised_one_with_the_same_parameters() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1)), nn.BatchNorm3d(2))
    parameters, keys = [id(p) for p in model.parameters()], list(model.state_dict())
    sync_batchnorm(model)
    assert sum(isinstance(module, SyncBatchNorm) for module in model.modules()) == 3
    assert [id(p) for p in model.parameters()] == parameters
    assert list(model.state_dict()) == keys


class AnotherNorm(nn.BatchNorm2d):
    """As timm's, which adds an activation."""


def test_norms_that_cannot_be_synchronised_are_refused_before_any_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.BatchNorm2d(2), nn.Sequential(AnotherNorm(2)))
    sync_batchnorm(copy.deepcopy(model))  # one process has nothing to synchronise
    monkeypatch.setattr("dfkd.collectives.world_size", lambda: 2)
    with pytest.raises(UserError, match=r"AnotherNorm cannot be synchronised.*runtime\.sync_batchnorm=false"):
        sync_batchnorm(model)
    assert type(model[0]) is nn.BatchNorm2d


@pytest.mark.parametrize("case", NORMS)
def test_alone_it_is_torchs_batch_norm(case: str) -> None:
    converted, plain = norm_and_gradients(case, ALONE, sync_batchnorm), norm_and_gradients(case, ALONE, lambda m: m)
    assert all(torch.equal(converted[name], plain[name]) for name in plain)


def test_buffers_to_average_are_the_running_statistics() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    assert [id(b) for b in float_buffers(model)] == [id(model[1].running_mean), id(model[1].running_var)]


# --- two processes ---


def test_a_process_knows_its_part(ranks: list[dict[str, Any]]) -> None:
    assert [found["shard"] for found in ranks] == [(0, 2), (1, 2)]


def test_processes_without_an_accelerator_train_no_generator(ranks: list[dict[str, Any]]) -> None:
    assert [found["alone"].partition("; ")[2] for found in ranks] == ["give accelerator="] * 2


def test_global_moments_and_ddp_gradients_are_those_of_the_global_batch(ranks: list[dict[str, Any]]) -> None:
    model, moments = network(), []
    for index in (0, 2):
        model[index].register_forward_hook(
            lambda module, x, y: moments.append((y.mean((0, 2, 3)), y.var((0, 2, 3), unbiased=False)))
        )
    model.double()
    logits = model((draw(2 * BATCH, 2, 6, 6) + 2).double())
    p = logits.softmax(1).mean(0)
    teacher = draw(2 * BATCH, 3, seed=4).double()
    centred, target = logits - logits.mean(1, keepdim=True), teacher - teacher.mean(1, keepdim=True)
    loss = sum((mean - 0.3).norm() + (var - 0.7).norm() for mean, var in moments) + logits.square().mean()
    loss = loss + (p * p.log()).sum() + (centred - target).abs().mean() / target.square().mean().sqrt()
    loss.backward()
    for found in ranks:
        near(found["moments"]["loss"].double(), loss.detach())
        for value, wanted in zip(found["moments"]["moments"], [x for pair in moments for x in pair]):
            near(value.double(), wanted.detach())
        for value, parameter in zip(found["moments"]["gradients"], model.parameters()):
            near(value.double(), parameter.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", NORMS)
def test_synchronised_batch_norm_is_torchs_on_the_global_batch(ranks: list[dict[str, Any]], case: str) -> None:
    wanted = norm_and_gradients(case, ALONE, lambda module: module)
    tolerance = 1e-3 if case == "far from zero" else 1e-5
    for name, value in wanted.items():
        parts = [found["norms"][case][name] for found in ranks]
        if name in ("train", "grad", "eval"):
            near(torch.cat(parts), value, tolerance)
        elif name.startswith("grad of"):
            near(parts[0] + parts[1], value, tolerance)
        else:
            near(parts[0].double(), value.double(), tolerance)
            assert torch.equal(parts[0], parts[1])


def test_means_over_processes(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert torch.equal(found["means"][0], torch.full((2, 3), 0.5))
        assert torch.equal(found["means"][1], torch.tensor(4.5))
        assert found["logged"] == {"loss": 1.5, "share": 0.5}  # metrics.jsonl has those of all, not of the first


def test_the_zoos_logits_do_not_depend_on_how_the_batch_is_split(ranks: list[dict[str, Any]]) -> None:
    with torch.no_grad():
        whole = zoo_logits(zoo(), draw(2 * BATCH, 1, 8, 8))
    near(torch.cat([found["zoo"] for found in ranks]), whole)


def test_a_prepared_loader_keeps_each_ranks_own_stream(ranks: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(ranks):
        own = list(rank_streams(Shard(ALONE.device, rank, 2)))
        assert len(found["loader"]) == len(own) == 3
        for pair, wanted in zip(found["loader"], own):
            assert all(torch.equal(a, b) for a, b in zip(pair, wanted))
    assert not torch.equal(ranks[0]["loader"][0][0], ranks[1]["loader"][0][0])


def test_two_processes_train_a_generator_as_one(ranks: list[dict[str, Any]]) -> None:
    alone = training(ALONE, None)
    for found in ranks:
        near(found["training"]["terms"], alone["terms"], 1e-4)
        near(found["training"]["balance"], alone["balance"], 1e-4)
        for name, value in found["training"]["weights"].items():
            near(value, alone["weights"][name], 1e-3)  # Adam divides by gradients near zero
    assert all(torch.equal(v, ranks[1]["training"]["weights"][k]) for k, v in ranks[0]["training"]["weights"].items())


def test_what_is_averaged_for_a_look_is_each_processs_own_again(monkeypatch: pytest.MonkeyPatch) -> None:
    own, mean = [draw(3), draw(2, 2, seed=1)], [draw(3, seed=2), draw(2, 2, seed=3)]
    tensors = [each.clone() for each in own]
    monkeypatch.setattr(
        "dfkd.collectives.mean_over_processes", lambda given: [a.copy_(b) for a, b in zip(given, mean, strict=True)]
    )
    with averaged(tensors):
        assert all(map(torch.equal, tensors, mean))
    assert all(map(torch.equal, tensors, own))
    with pytest.raises(ZeroDivisionError), averaged(tensors):
        raise ZeroDivisionError
    assert all(map(torch.equal, tensors, own))
