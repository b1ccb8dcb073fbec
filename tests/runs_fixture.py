"""A run that takes a second: its recipe, and the command line called here or in processes that may be killed."""

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState

from dfkd.cli import main

ROOT = Path(__file__).parents[1]
STEPS = 30  # loop steps: 20 alternating, 10 of the student alone

RECIPE = """
description: a run of a second
tasks: [distill]
classes: 10
data: {dataset: digits}
image: {channels: 1, size: 8}
training: {epochs: 2, batch_size: 64, lr: 0.1}
teachers:
  plain: {model: "dfkd:tiny_plain", mean: [0.3], std: [0.33], kwargs: {width: 4, depth: 1}}
  residual: {model: "dfkd:tiny_residual", mean: [0.3], std: [0.33], kwargs: {width: 8}}
zoo: {sample: 1}
generator: {latent: 8, width: 4}
synthesis:
  steps: 20
  student_steps: 1
  batch_size: 16
  lr: 1.0e-3
  losses: {ce: 1.0, bn: 1.0, adversary: 1.0, diversity: 1.0}
  mix: {probability: 0.5}
  learn_weights: true
  redraw: 2
student: {model: "dfkd:tiny_plain", kwargs: {width: 2, depth: 1}}
distill: {steps: 10, batch_size: 16, lr: 0.05, warmup: 2, replay: 4, mix: 0.5, flip: true}
runtime: {precision: fp32, checkpoint_every: 0, log_every: 2, grid_every: 10, evaluations: 5, sync_batchnorm: true}
"""


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def reset_accelerate() -> None:
    """Forget Accelerate's process-wide state, which a command line leaves to the end of its process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@dataclass
class Called:
    """How a command line ended and what it said."""

    code: int
    out: str
    err: str

    def refused(self) -> str:
        """The one line of an input error."""
        lines = self.err.strip().splitlines()
        assert self.code == 2, f"exit code {self.code}: {self.err}"
        assert len(lines) == 1, self.err
        assert lines[0].startswith("error: "), self.err
        return lines[0]


@dataclass
class Runs:
    """A place with the recipe `tiny.yaml`, and ways to run it."""

    folder: Path
    cache: Path
    capture: Any

    @property
    def recipe(self) -> Path:
        return self.folder / "tiny.yaml"

    def arguments(self, name: str, *given: str) -> list[str]:
        """The command line of a run that writes in folder/name."""
        return [f"recipe={self.recipe}", f"training.cache={self.cache}", f"output={self.folder / name}", *given]

    def call(self, *given: str) -> Called:
        """A command line in this process."""
        reset_accelerate()
        self.capture.readouterr()
        try:
            code = main(given)
        finally:
            reset_accelerate()
        return Called(code, *self.capture.readouterr())

    def run(self, name: str, *given: str) -> Called:
        """A run in this process, in folder/name."""
        return self.call(*self.arguments(name, *given))


# --- processes of their own, which may be killed ---


def _kill_at_write(number: int) -> None:
    """SIGKILL this process as its `number`th write of a file that must be whole goes to the disk."""
    fsync, calls = os.fsync, 0

    def counted(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)

    os.fsync = counted


def _act(arguments: list[str], log: str, environment: dict[str, str], kill_at_write: int) -> None:
    if kill_at_write:
        _kill_at_write(kill_at_write)
    os.environ |= environment
    for name in [name for name, value in environment.items() if not value]:
        del os.environ[name]
    torch.set_num_threads(1)
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(main(arguments))


@dataclass
class Job:
    """The processes of one command line."""

    ranks: list[Any]
    log: Path

    def alive(self) -> bool:
        return any(rank.is_alive() for rank in self.ranks)

    def kill(self) -> bool:
        """SIGKILL to every process; whether one was still at work."""
        at_work = self.alive()
        for rank in self.ranks:
            if rank.is_alive():
                os.kill(rank.pid, signal.SIGKILL)
        self.join()
        return at_work and any(rank.exitcode == -signal.SIGKILL for rank in self.ranks)

    def join(self, timeout: float = 60) -> list[int]:
        """The exit codes, once all have ended."""
        for rank in self.ranks:
            rank.join(timeout)
            assert rank.exitcode is not None, "still running"
        return [rank.exitcode for rank in self.ranks]


def start(
    arguments: list[str],
    log: Path,
    world: int = 1,
    environment: dict[str, str] | None = None,
    kill_at_write: int = 0,
) -> Job:
    """Start a command line in `world` processes forked from one that has imported everything: no launcher.

    An empty value unsets a variable.
    """
    context = multiprocessing.get_context("forkserver")
    shared = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **(environment or {})}
    if world > 1:
        shared |= {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = []
    for rank in range(world):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {}
        ranks.append(context.Process(target=_act, args=(arguments, str(log), shared | own, kill_at_write), daemon=True))
        ranks[-1].start()
    return Job(ranks, log)


def wait_for(condition: Callable[[], bool], while_: Callable[[], bool], timeout: float = 60) -> bool:
    """Wait until a condition holds; False where `while_` ended first."""
    end = time.monotonic() + timeout
    while not condition():
        if not while_():
            return False
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.0005)
    return True
