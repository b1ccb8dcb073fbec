"""That the steps suit CUDA graphs, on any device, and what only a GPU can show."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from dfkd.classifier import Classifier
from dfkd.compress.fit import Fit
from dfkd.compress.hints import Hints, attention_hints, projected_hints
from dfkd.cuda_graphs import DIRECT, Calls, Graphs, recorder
from dfkd.draws import Moves
from dfkd.mixing import make_mix
from dfkd.models import build_model
from dfkd.pretrain import train_teacher
from dfkd.runtime import Shard
from dfkd.stream import SyntheticStream
from dfkd.synthesis import Synthesizer
from dfkd.teachers import Teacher, load_zoo
from generators import ConvGenerator

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
WEIGHTS = {"ce": 1.0, "bn": 1.0, "adversary": 1.0, "diversity": 1.0}


@pytest.fixture(autouse=True)
def deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN's convolutions sum in one order."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


@pytest.mark.parametrize(("wanted", "device", "world"), [(True, "cpu", 1), (False, "cuda", 1), (True, "cuda", 2)])
def test_nothing_is_recorded_without_a_gpu_or_with_several_processes(wanted: bool, device: str, world: int) -> None:
    assert recorder(wanted, Shard(torch.device(device), 0, world)) is DIRECT


class Trained:
    """Generator and student in turn, as a run trains them, on two of three teachers."""

    def __init__(self, device: torch.device, bf16: bool, calls: Callable[[], Calls], **options: Any) -> None:
        torch.manual_seed(0)
        shard = Shard(device)
        names = ("plain", "residual", "inverted")
        moves, hints = dict(zip(names, options.pop("moves", (Moves(),) * 3))), options.pop("hints", "")
        like: dict[str, Any] = {"kwargs": {"width": 8}, "mean": [0.5], "std": [0.25]}
        specs = {n: {"model": f"dfkd:tiny_{n}", "moves": moves[n], **like} for n in names}
        zoo = load_zoo(specs, classes=10, channels=1, size=16, device=device, channels_last=True, untrained=True)
        self.generator = ConvGenerator(latent=16, classes=10, channels=1, size=16, width=8, prototypes=2).to(device)
        network = build_model(
            "dfkd:tiny_plain", classes=10, channels=1, kwargs={"width": 8 if hints == "outputs" else 4}
        )
        network.linear = nn.Sequential(nn.Dropout(0.2), network.linear)
        self.student = Classifier(network).to(device)
        self.synthesizer = Synthesizer(
            self.generator,
            zoo,
            losses=WEIGHTS,
            steps=100,
            batch_size=32,
            mix=make_mix("resize", 0.5),
            student=self.student,
            shard=shard,
            graphs=calls(),
            **{"warmup": 0.0, "fade": 0.0, **options},
        )
        graphs = calls()
        own: dict[str, Any] = {"shard": shard, "graphs": graphs}
        stream = SyntheticStream(
            self.generator, batch_size=32, teacher=zoo, replay=4, shift=0.1, mix=0.5, features=True, **own
        )
        image = torch.zeros(1, 1, 16, 16, device=device)
        kinds = {
            "": None,
            "attention": attention_hints(self.student, zoo[0], image, 300.0),
            "projected": projected_hints(self.student, zoo[0], image, 3.0),
            "outputs": Hints(self.student, zoo[0], [("model.features.5", "model.features.5")], 10.0),
        }
        self.fit = Fit(self.student, stream, steps=100, hints=kinds[hints], graphs=graphs)
        for part in (self.synthesizer, stream, self.fit):
            part.autocast = lambda: torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=False)

    def train(self, start: int, stop: int) -> list[Tensor]:
        terms: list[Tensor] = []
        for step in range(start, stop):
            terms += self.synthesizer.step(step).values()
            terms += self.fit.step(2 * step).values()
            terms += self.fit.step(2 * step + 1).values()
        self.synthesizer.settle(2)
        return terms

    def weights(self) -> list[Tensor]:
        return [*self.generator.state_dict().values(), *self.fit.learners.state_dict().values()]


def assert_same(one: list[Tensor], other: list[Tensor]) -> None:
    assert len(one) == len(other) > 0
    for mine, its in zip(one, other):
        assert torch.equal(mine, its)


class Memory(NamedTuple):
    """What calls that share memory leave in it: gradients, and how many forwards there were."""

    kept: list[Tensor]
    forwards: list[object]


class Handed(torch.autograd.Function):
    """Passes a gradient on in memory that it keeps a hold of; spoilt where another forward came before its backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, memory: Memory) -> Tensor:
        ctx.memory, ctx.call = memory, len(memory.forwards)
        return x.detach()  # a view would give a lone channel other strides

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        spoilt = len(ctx.memory.forwards) > ctx.call
        ctx.memory.kept.append(grad.clone().fill_(torch.nan) if spoilt else grad.clone())
        return ctx.memory.kept[-1].detach(), None


class Overwriting(Calls):
    """A graph's manners without a GPU: the first call's Python is that of all; what gradients an input was given, and
    what a forward left for its backward, is overwritten as soon as a call shares the memory."""

    def __init__(self) -> None:
        self.known: dict[Any, Any] = {}
        self.memory: dict[str, Memory] = {}

    def call(self, key: tuple[str, ...], network: Any, function: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
        memory = self.memory.setdefault(key[0], Memory([], []))
        for gradient in memory.kept:
            gradient.fill_(torch.nan)
        memory.kept.clear()
        memory.forwards.append(0)
        return self._first(key, network, function, inputs)(*(Handed.apply(x, memory) for x in inputs))

    def learn(self, key: tuple[str, ...], network: Any, function: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
        return super().learn(key, network, self._first(key, network, function, inputs), *inputs)

    def _first(self, key: tuple[str, ...], network: Any, function: Any, inputs: tuple[Tensor, ...]) -> Any:
        shapes = tuple((x.shape, x.dtype, x.requires_grad) for x in inputs)
        training = network is not None and network.training
        return self.known.setdefault((key, training, torch.is_grad_enabled(), shapes), function)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"warmup": 0.03},  # the adversary comes in at step 3
    {"redraw": 10},
    {"equalise": False, "adversary_mask": False},
    {"learn_weights": True},
    {"penalise": True},
    {"jitter": 2, "flip": True},
    {"hints": "attention"},
    {"hints": "projected"},
    {"hints": "outputs"},
    {"moves": (Moves(), Moves(2, flip=True), Moves(4, black=True))},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_steps_suit_graphs(options: dict[str, Any]) -> None:
    overwriting, direct = (Trained(CPU, False, calls, **options) for calls in (Overwriting, Calls))
    assert_same(overwriting.train(0, 12), direct.train(0, 12))
    assert_same(overwriting.weights(), direct.weights())


@on_gpu
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("bf16", [False, True])
def test_graphs_compute_what_the_plain_calls_do(
    bf16: bool, options: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    recorded, direct = (Trained(GPU, bf16, calls, **options) for calls in (Graphs, Calls))
    assert_same(recorded.train(0, 12), direct.train(0, 12))
    assert_same(recorded.weights(), direct.weights())
    assert "CUDA graph" not in capfd.readouterr().out  # nothing went without


@on_gpu
def test_a_resumed_run_with_graphs_is_the_uninterrupted_one(capfd: pytest.CaptureFixture[str]) -> None:
    whole, first, second = (Trained(GPU, True, Graphs) for _ in range(3))
    whole.train(0, 5), first.train(0, 5)
    for part in ("generator", "synthesizer", "fit"):
        getattr(second, part).load_state_dict(getattr(first, part).state_dict())
    for trained in (whole, second):
        trained.generator.train().requires_grad_(True)
        trained.train(5, 9)
    assert_same(second.weights(), whole.weights())
    assert "CUDA graph" not in capfd.readouterr().out


@on_gpu
def test_a_teacher_trained_with_graphs_is_the_same(capfd: pytest.CaptureFixture[str]) -> None:
    rng = torch.Generator().manual_seed(0)
    images, labels = torch.randint(256, (128, 3, 8, 8), generator=rng, dtype=torch.uint8), torch.arange(128) % 4
    found = []
    for graphs in (DIRECT, Graphs()):
        torch.manual_seed(0)
        classifier = Classifier(build_model("dfkd:resnet20", classes=4, channels=3))
        assert train_teacher(classifier, images, labels, epochs=2, batch_size=32, device=GPU, bf16=True, graphs=graphs)
        found.append(list(classifier.state_dict().values()))
    assert_same(*found)
    assert "CUDA graph" not in capfd.readouterr().out


@on_gpu
def test_what_waits_for_the_host_goes_without_a_graph(capfd: pytest.CaptureFixture[str]) -> None:
    norm = nn.BatchNorm1d(4).to(GPU)
    seen: list[float] = []

    def waits(x: Tensor) -> tuple[Tensor]:
        seen.append(float(x.sum()))
        return (norm(x),)

    graphs, x = Graphs(), torch.rand(8, 4, device=GPU)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    (y,) = graphs.call(("net",), norm, waits, x)
    assert "net could not be recorded as a CUDA graph" in capfd.readouterr().out
    torch.testing.assert_close(y, (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt())
    torch.testing.assert_close(norm.running_mean, 0.9 * before["running_mean"] + 0.1 * x.mean(0))
    count = len(seen)
    graphs.call(("net",), norm, waits, x)
    assert len(seen) == count + 1
    y.sum().backward()
    assert norm.bias.grad is not None


@on_gpu
def test_teachers_that_take_turns_on_the_gpu_change_no_bit() -> None:
    found = []
    for gigabytes in (0.0, 3.8e-3):
        torch.manual_seed(0)
        names = ("resnet20", "resnet32", "resnet44")
        specs = {n: {"model": f"dfkd:{n}", "mean": [0.5] * 3, "std": [0.25] * 3} for n in names}
        zoo: list[Teacher] = load_zoo(specs, classes=10, device=GPU, memory_gb=gigabytes, untrained=True)
        generator = ConvGenerator(latent=16, classes=10, channels=3, size=32, width=8).to(GPU)
        weights = {"ce": 1.0, "bn": 1.0}
        synthesizer = Synthesizer(
            generator, zoo, losses=weights, steps=50, batch_size=16, shard=Shard(GPU), graphs=recorder(True, Shard(GPU))
        )
        for step in range(8):
            synthesizer.step(step)
        found.append([parameter.detach().clone() for parameter in generator.parameters()])
    assert_same(*found)
