"""Where and how a run computes: the Accelerator, randomness by position, module modes, torch.compile."""

import copy
import gc
import hashlib
import math
import operator
import os
import re
import shlex
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any

import psutil
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    AutocastKwargs,
    DistributedDataParallelKwargs,
    get_mixed_precision_context_manager,
    parse_flag_from_env,
)
from torch import Tensor, nn

from dfkd.errors import UserError, in_a_line

COMPILED = 256  # graphs at the most: the limit of torch, 8, is for all networks together

Autocast = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Shard:
    """The part of every global batch that this process works on."""

    device: torch.device
    rank: int = 0
    world: int = 1

    def take(self, x: Tensor) -> Tensor:
        """Rows of this rank out of a tensor [world * B, ...] that every rank drew alike: [B, ...]."""
        size = x.shape[0] // self.world
        return x[self.rank * size : (self.rank + 1) * size]


def default_shard(device: torch.device | None = None) -> Shard:
    """This process's part of torch's process group, where there is one, on a device, else on that which torch or
    Accelerate has chosen. Raises UserError where several processes have no group yet."""
    rank, world = 0, 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    elif (launched := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise UserError(
            f"this is one of {launched} processes without a process group, so that each would draw the same images; "
            "make an Accelerator, or call torch.distributed.init_process_group, before; or give shard="
        )
    if device is not None:
        return Shard(device, rank, world)
    if PartialState._shared_state:
        return Shard(PartialState().device, rank, world)
    chosen = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return Shard(chosen or torch.device("cpu"), rank, world)


@dataclass
class Deadline:
    """When a run has to stop: `minutes` after `begun` (time.perf_counter; 0 minutes: never), or now, by a signal."""

    minutes: float = 0.0
    begun: float = field(default_factory=time.perf_counter)
    stopped_by: signal.Signals | None = None

    @property
    def cause(self) -> str:
        """What it comes for."""
        return self.stopped_by.name if self.stopped_by is not None else f"runtime.minutes={self.minutes:g}"

    @contextmanager
    def or_signal(self) -> Iterator[None]:
        """Let the first SIGINT (Ctrl-C) or SIGTERM within its scope be the deadline; a second one acts at once. What is
        ignored, as by a job in the background, stays so."""
        if threading.current_thread() is not threading.main_thread():  # which alone hears of signals
            yield
            return
        handlers = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
        before = {each: handler for each, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}

        def note(number: int, frame: object) -> None:
            self.stopped_by = signal.Signals(number)
            for each, handler in before.items():
                signal.signal(each, handler)
            if PartialState().is_main_process:
                # print may be at work already, and must not be called within itself; the reader of a pipe may be gone.
                with suppress(OSError):
                    os.write(2, f"{self.cause}: stopping once what is done is kept; again stops at once\n".encode())

        for each in before:
            signal.signal(each, note)
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)

    def left(self) -> float:
        """Minutes until then, or infinity."""
        if self.stopped_by is not None:
            return 0.0
        return self.minutes - (time.perf_counter() - self.begun) / 60 if self.minutes else math.inf

    def within(self, seconds: float) -> bool:
        """Whether it comes before `seconds` are over."""
        return 60 * self.left() <= seconds


def rng(device: torch.device | str, *position: int | str) -> torch.Generator:
    """A random generator that depends on its position (seed, purpose, step, ...) alone, so nothing need be saved."""
    # numpy's whole numbers have another repr.
    plain = tuple(each if isinstance(each, str) else operator.index(each) for each in position)
    digest = hashlib.blake2b(repr(plain).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


@contextmanager
def drawn_at(*position: int | str) -> Iterator[None]:
    """Let the host's global generator, which layers and Kornia draw from, depend on a position alone in its scope."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(rng("cpu", *position).initial_seed())
        yield


def forked(device: torch.device) -> AbstractContextManager[None]:
    """Leave torch's global generators, the host's and a GPU's, behind its scope as they were before."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def reseed(device: torch.device, *position: int | str) -> None:
    """Seed torch's global generators of the host and of a device by position, for layers that draw from them (dropout).

    torch.manual_seed does so for every kind of device, and takes down a traceback for each that is not in use: 0.6 ms,
    which is as long as all else that the host draws for a small student's update.
    """
    seed = rng("cpu", *position).initial_seed()
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    elif device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def autocast_of(accelerator: Accelerator | None) -> Autocast:
    """What opens the mixed precision that an accelerator was made with; of None: none.

    accelerator.autocast opens the same, but looks its settings up each time with all environment variables taken away
    and put back: 0.7 ms, where a small network's forward takes as long.
    """
    if accelerator is None:
        return nullcontext
    if accelerator.mixed_precision == "fp16":
        raise UserError(
            "mixed_precision=fp16 would need its gradients scaled, which nothing here does; give bf16 or no"
        )
    context = get_mixed_precision_context_manager(accelerator.native_amp, accelerator.autocast_handler)
    return partial(copy.copy, context)


def prepare(accelerator: Accelerator | None, network: nn.Module) -> Any:
    """A network as an accelerator has it in training: over several processes in DDP. Its own forward stays as it was.

    Accelerate puts mixed precision into it for good. It would then compute in it wherever this process calls it, and
    not once it is loaded from its file: a run in pieces would end with other bits. The steps open it by autocast_of.
    """
    if accelerator is None:
        return network
    places = ("forward", "_original_forward")  # where Accelerate does it, and where a network may have its own
    before = {name: vars(network)[name] for name in places if name in vars(network)}
    held = list(accelerator._models)
    prepared = accelerator.prepare(network)
    accelerator._models[:] = held  # else it would hold every network of a run, with its gradients, to the run's end
    for name in places:
        vars(network).pop(name, None)
    vars(network).update(before)
    return prepared


def full_precision(x: Tensor) -> Tensor:
    """x in float32, or float64 where it is that: what losses and statistics are computed in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def to_bytes(images: Tensor) -> Tensor:
    """Images in [0, 1] as uint8, rounded to the nearest level."""
    return (images * 255).round().to(torch.uint8)


def to_float(images: Tensor) -> Tensor:
    """Images in [0, 1], float32, from uint8 or float ones."""
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


def plain_strides(images: Tensor) -> Tensor:
    """Images [B, C, H, W] as they are, but of one channel with the strides of the contiguous layout. To torch these are
    in both layouts whatever their strides, by which its convolutions choose the layout of what they give."""
    return images if images.shape[1] > 1 else images.flatten(1).view(images.shape)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A tensor, the host's as a rule, on a device, without waiting for what the device has still to do."""
    pinned = device.type == "cuda" and x.device.type == "cpu"
    return x.pin_memory().to(device, non_blocking=True) if pinned else x.to(device)


@contextmanager
def eval_mode(*modules: nn.Module) -> Iterator[None]:
    """Put modules in eval mode, and on leaving give every submodule the mode it had."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Let no gradient reach the module's own parameters, and on leaving restore which ones took it."""
    wanted = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


def check_compile(device: torch.device) -> None:
    """Raise UserError where this machine cannot compile for a device."""
    try:
        with torch.compiler.set_stance("default"), torch._dynamo.config.patch(suppress_errors=False):
            torch.compile(torch.sin)(torch.ones(2, device=device))
    except Exception as error:  # whatever a missing compiler leads to
        raise UserError(
            f"runtime.compile=true, but torch.compile does not work here ({in_a_line(error)}); "
            "install a C++ compiler, or on a GPU Triton, or set runtime.compile=false"
        ) from None


@contextmanager
def compiled(networks: Iterable[nn.Module]) -> Iterator[None]:
    """Have networks compiled in its scope, in place, for calls within torch.compiler.set_stance("default"): those of
    the steps, as whatever is called in other shapes or modes would be compiled anew. Nothing outlives it.

    Raises UserError where a network cannot be compiled.
    """
    changed = list(networks)
    settings = {
        "suppress_errors": False,
        "recompile_limit": COMPILED,
        "skip_nnmodule_hook_guards": False,  # hooks of ours come and go from call to call
    }
    with torch._dynamo.config.patch(settings), torch.compiler.set_stance("force_eager"):
        try:
            for network in changed:
                network.compile(dynamic=False)  # else one network's second batch size makes all others' general
            yield
        except torch._dynamo.exc.TorchDynamoException as error:
            raise UserError(
                f"runtime.compile=true, but a network could not be compiled ({in_a_line(error)}); "
                "set runtime.compile=false"
            ) from error
        finally:
            for network in changed:
                network._compiled_call_impl = None


def fast_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu" and os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            return any("avx512_bf16" in line or "amx_bf16" in line for line in file if line.startswith("flags"))
    return False


def resolve_precision(precision: str, device: torch.device) -> str:
    """`fp32` or `bf16` for a recipe's `auto`, `fp32` or `bf16`."""
    if precision != "auto":
        return precision
    return "bf16" if fast_bf16(device) else "fp32"


def make_accelerator(precision: str) -> tuple[Accelerator, Shard]:
    """The Accelerator at a recipe's precision and this process's shard; checks the launch (see check_launch)."""
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU")
    if not cpu and not torch.accelerator.is_available():
        # Accelerate would let the processes meet first, and one that leaves then resets a connection of another's.
        check_launch(1)
    # The main process trains missing teachers while the others wait; a dead process ends the job without this.
    state = PartialState(cpu=cpu, timeout=timedelta(days=1))
    torch.backends.cudnn.deterministic = True  # or a resumed run may sum in another order
    check_launch(state.num_processes)
    if state.device.type == "cpu":
        share_cores()
    bf16 = resolve_precision(precision, state.device) == "bf16"
    # SyncBatchNorm of ours keeps buffers equal; broadcasting them in DDP breaks two forwards in one step on CUDA.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False)
    # Gradients that a CUDA graph leaves come from its own stream, which is waited for.
    warnings.filterwarnings("ignore", message="The AccumulateGrad node's stream does not match", category=UserWarning)
    # Hardly a weight is used twice in a forward, and a CUDA graph must not read a copy that was made outside of it.
    autocast = AutocastKwargs(cache_enabled=False)
    accelerator = Accelerator(mixed_precision="bf16" if bf16 else "no", kwargs_handlers=[ddp, autocast])
    return accelerator, Shard(accelerator.device, accelerator.process_index, accelerator.num_processes)


def share_cores() -> None:
    """Divide the cores among this machine's processes: `accelerate launch` gives each one thread unless the user set
    OMP_NUM_THREADS."""
    launcher = _launcher()
    if launcher is not None and "OMP_NUM_THREADS" not in launcher.environ():
        torch.set_num_threads(max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def cores() -> int:
    """The CPU cores that this process may use, of a machine's that may be shared."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_launch(processes: int) -> None:
    """Raise UserError where a launch asked for more processes than joined: accelerate would go on silently, with one
    process (`--cpu --num_processes 2`) or with several that know nothing of each other (`--multi_gpu` on a CPU)."""
    wanted = max(int(os.environ.get("WORLD_SIZE", "1")), _asked_of_launcher())
    if wanted != processes:
        raise UserError(
            f"launched for {wanted} processes but {processes} joined; on a CPU use: ACCELERATE_USE_CPU=true "
            f"accelerate launch --multi_gpu --num_processes {wanted} train.py recipe=NAME"
        )


def _launcher() -> psutil.Process | None:
    """The `accelerate launch` that started this process, if one did."""
    try:
        parent = psutil.Process().parent()
        words = [os.path.basename(word) for word in parent.cmdline()[:4]] if parent is not None else []
    except psutil.Error:
        return None
    started = any(word.startswith("accelerate") for word in words) and any("launch" in word for word in words)
    return parent if started else None


def command_of(given: Sequence[str]) -> str:
    """The command that started this process with these arguments: Accelerate's launcher with its options, where it did;
    other launchers are not named."""
    launcher = _launcher()
    chosen = launcher.environ() if launcher is not None else os.environ
    settings = [f"{key}={chosen[key]}" for key in ("ACCELERATE_USE_CPU", "OMP_NUM_THREADS") if key in chosen]
    if launcher is None:
        return shlex.join([*settings, "python", "train.py", *given])
    words = launcher.cmdline()
    name = next(word for word in words if os.path.basename(word).startswith("accelerate"))
    rest = [word for word in words[words.index(name) + 1 :] if word != "launch"]
    return shlex.join([*settings, "accelerate", "launch", *rest])


def _asked_of_launcher() -> int:
    """What `accelerate launch --num_processes` was given; 1 where it was not, or did not start this process."""
    launcher = _launcher()
    text = " ".join(launcher.cmdline()) if launcher is not None else ""
    found = re.search(r"--num_processes (\d+)", text.replace("=", " ").replace("--num-processes", "--num_processes"))
    return int(found.group(1)) if found else 1


def say(text: str) -> None:
    """Print a line on the main process; where nobody reads it any more (Ctrl-C ends `| tee` too) it costs no run."""
    if PartialState().is_main_process:
        try:
            print(text, flush=True)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def shut_down(accelerator: Accelerator) -> None:
    """Leave the process group; DDP's buckets must be gone before it is, or gloo aborts at exit."""
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    gc.collect()
    accelerator.end_training()
