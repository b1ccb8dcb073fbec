"""What several test files share: one thread, the smallest networks that have every part, a watch on host reads."""

import gc
import importlib
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", str(int(not torch.cuda.is_available())))  # before accelerate imports Triton

from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from runs_fixture import RECIPE, Runs, reset_accelerate
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dfkd.models import build_model
from dfkd.runtime import Shard
from dfkd.stream import SyntheticStream
from dfkd.teachers import Teacher, batch_norms
from generators import ConvGenerator

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `pytest &` ignores it, and so would the runs
multiprocessing.set_forkserver_preload(["dfkd.cli", "sklearn.model_selection"])  # slow: once is enough


SLOW = ("test_resume", "test_tasks", "test_runs", "test_processes", "test_pairs", "test_methods", "test_errors")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first: a process that begins one of them last works on alone at the end."""
    items.sort(key=lambda item: item.path.stem not in SLOW)


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Give the batch norms of an untrained network statistics and affine parameters that differ by channel."""
    rng = torch.Generator().manual_seed(seed)
    for norm in batch_norms(model).values():
        for tensor, low in ((norm.running_mean, -0.5), (norm.running_var, 0.5), (norm.weight, 0.5), (norm.bias, -0.5)):
            tensor.detach().copy_(torch.rand(tensor.shape, generator=rng) + low)
    return model


@pytest.fixture
def make_teacher() -> Callable[..., Teacher]:
    """Teachers of 8x8 images by name, model string and seed: untrained, with random batch-norm statistics, and a last
    layer such that they name every class."""

    def make(
        name: str = "plain",
        model: str = "dfkd:tiny_plain",
        *,
        classes: int = 3,
        channels: int = 1,
        seed: int = 0,
        kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> Teacher:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            kwargs = {"width": 4, "depth": 1} if kwargs is None else kwargs
            network = build_model(model, classes=classes, channels=channels, kwargs=kwargs)
            teacher = Teacher(randomise(network, seed), name=name, **options)
            if isinstance(getattr(network, "linear", None), nn.Linear):
                with torch.no_grad():
                    logits = teacher(nn.Upsample(scale_factor=2)(torch.rand(64, channels, 4, 4)))
                    network.linear.weight /= logits.std(0).unsqueeze(1)
                    network.linear.bias.copy_((network.linear.bias - logits.mean(0)) / logits.std(0))
        return teacher

    return make


@pytest.fixture
def make_generator() -> Callable[..., ConvGenerator]:
    """Generators of 8x8 images of three classes by seed: untrained, their batch norms' statistics those of a batch."""

    def make(seed: int = 0, **options: Any) -> ConvGenerator:
        sizes = {"latent": 6, "classes": 3, "channels": 1, "size": 8, "width": 4}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            generator = ConvGenerator(**{**sizes, **options})
            norms = [module for module in generator.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
            for norm in norms:
                norm.momentum = 1.0
            with torch.no_grad():
                generator(torch.randn(64, generator.latent), torch.randint(generator.classes, (64,)))
            for norm in norms:
                norm.momentum = 0.1
            return generator

    return make


@pytest.fixture
def make_stream(
    make_generator: Callable[..., ConvGenerator], make_teacher: Callable[..., Teacher]
) -> Callable[..., SyntheticStream]:
    """Streams of 16 images of an untrained generator with an untrained teacher."""

    def make(**options: Any) -> SyntheticStream:
        defaults = {"batch_size": 16, "teacher": make_teacher(), "shard": Shard(torch.device("cpu"))}
        return SyntheticStream(make_generator().eval(), **{**defaults, **options})

    return make


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    """An Accelerator on the CPU whose process-wide state is gone after the test."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="session")
def teacher_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs of a session keep their teachers: trained by the first that needs them."""
    return tmp_path_factory.mktemp("teachers")


@pytest.fixture
def runs(tmp_path: Path, teacher_cache: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runs]:
    """A folder to run the tiny recipe in, and it is the working directory."""
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    gc.freeze()  # a run ends with a collection, which would take half its time to look at what all tests imported
    yield Runs(tmp_path, teacher_cache, capfd)
    gc.unfreeze()


READS = {"tolist", "numpy", "__array__", "item", "cpu", "__bool__", "__int__", "__float__", "__index__", "__repr__"}
READS |= {"_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "_unique2", "bincount"}


class _Watch:
    """Marks what is computed from given tensors, by storage, and fails where the host asks for its values."""

    def __init__(self, roots: list[Tensor]) -> None:
        self.marked = {root.untyped_storage()._cdata: root.untyped_storage() for root in roots}

    def check(self, name: str, args: Any, kwargs: Any) -> bool:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        marked = [x for x in tensors if x.untyped_storage()._cdata in self.marked]
        by_mask = "index" in name and any(x.dtype == torch.bool for x in tensors[1:])
        assert not (marked and (name in READS or by_mask)), f"{name} waits for the device"
        return bool(marked)

    def mark(self, result: Any) -> None:
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.marked[leaf.untyped_storage()._cdata] = leaf.untyped_storage()


class NoHostRead(TorchDispatchMode):
    """Within it nothing computed from the given tensors may be read by the host, forward or backward.

    On an accelerator each such read waits for the device; what was drawn on the host may be read.
    """

    def __init__(self, *roots: Tensor) -> None:
        super().__init__()
        self.watch = _Watch(list(roots))
        self.calls = _Calls(self.watch)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        marked = self.watch.check(func.overloadpacket.__name__, args, kwargs)
        result = func(*args, **(kwargs or {}))
        if marked:
            self.watch.mark(result)
        return result

    def __enter__(self) -> "NoHostRead":
        self.calls.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.calls.__exit__(*error)


class _Calls(TorchFunctionMode):
    """The reads of a CPU tensor that go past the dispatcher: tolist, numpy, bool."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in READS:
            self.watch.check(name, args, kwargs)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """A benchmark's module by name, as its neighbours import it; what it then does is on a CPU."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    return importlib.import_module


@pytest.fixture
def children(
    benchmark: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> list[tuple[str, dict[str, str]]]:
    """The calls of the benchmarks' child processes, (name, keys) each; they are carried out in this process."""
    calls = []
    equal, child, books = (benchmark(name) for name in ("equal_time", "child", "bookkeeping"))

    def launch(name: str, keys: dict[str, str], seconds: float, log: Path, threads: int) -> dict[str, Any]:
        calls.append((name, keys))
        reset_accelerate()
        try:
            return json.loads(json.dumps(child.CHILDREN[name](books.written(keys), seconds)))
        finally:
            reset_accelerate()

    monkeypatch.setattr(equal, "launch", launch)
    monkeypatch.setattr(child, "FIRST_PROBE", 4)
    return calls


@pytest.fixture
def no_host_read() -> type[NoHostRead]:
    return NoHostRead
