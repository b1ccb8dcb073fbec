"""The training loop of a run: generator and student in turn, then the student alone; logged and resumable."""

import math
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dfkd.checkpoints import Checkpoints
from dfkd.collectives import agreed, averaged, float_buffers, largest, mean_over_processes
from dfkd.compress.fit import Fit
from dfkd.draws import draw_latents
from dfkd.errors import Paused, UserError
from dfkd.evaluate import diversity
from dfkd.metrics import Metrics, learning_rates
from dfkd.models.checkpoints import not_finite
from dfkd.paging import in_turn
from dfkd.runtime import Deadline, Shard, autocast_of, eval_mode, to_bytes, to_float
from dfkd.synthesis import Synthesizer
from dfkd.teachers import Teacher, tap_features
from dfkd.verdict import generator_notes, moving_mean, student_notes
from generators import ImageGenerator

GRID_COLUMNS, GRID_ROWS, LOOKED_AT, SAMPLE = 10, 10, 20, 200  # columns, rows, classes, images


@dataclass
class Plan:
    """How many steps of what: `synthesis` generator updates, each followed by `per` student updates, then `frozen`
    student updates on the finished generator. name tells the phases of a run apart."""

    name: str
    synthesis: int
    per: int
    frozen: int

    @property
    def alternating(self) -> int:
        """Loop steps in which the generator still learns."""
        return self.synthesis * max(1, self.per)

    @property
    def first_student(self) -> int:
        """The loop step of the first student update."""
        return 0 if self.per else self.alternating

    @property
    def students(self) -> int:
        """Student updates in all."""
        return self.synthesis * self.per + self.frozen

    @property
    def total(self) -> int:
        """Loop steps in all."""
        return self.alternating + self.frozen

    def evaluated(self, times: int) -> set[int]:
        """The counts of loop steps after which the student is measured: evenly, and at the end."""
        return {self.first_student + math.ceil(self.students * k / times) for k in range(1, times + 1)}


@dataclass
class Loop:
    """All that takes part in one phase, and its state for resume."""

    plan: Plan
    generator: ImageGenerator
    zoo: Sequence[Teacher]
    synthesizer: Synthesizer | None
    fit: Fit | None
    accelerator: Accelerator
    shard: Shard
    metrics: Metrics
    checkpoints: Checkpoints
    offset: int
    spent: dict[str, float]
    log_every: int
    grid_every: int
    checkpoint_every: float
    deadline: Deadline
    evaluate: Callable[[], Mapping[str, float]] | None  # the student's figures
    evaluations: int
    usual: float | None = None  # the student's agreement with its teacher, a moving mean over the batches logged
    best: float = 0.0  # the highest of it

    def run(self, start: int = 0) -> None:
        """Go from loop step `start` to the end. Raises UserError where a term is NaN or the disk is full, and Paused,
        with a checkpoint, where the deadline would come before the next line is logged, or a signal came."""
        plan, saved, counted = self.plan, time.perf_counter(), time.perf_counter()
        measured = plan.evaluated(self.evaluations) if self.evaluate is not None else set()
        terms: dict[str, Tensor] = {}

        def has_line(done: int) -> bool:
            ends = done in (plan.alternating, plan.total) or self._ends_round(done - 1)
            return ends or not done % self.log_every or done in measured

        self.metrics.new_phase()
        for k in range(start, plan.total):
            if self.synthesizer is not None and k == plan.alternating:
                self.synthesizer.settle()
            with torch.compiler.set_stance("default"):  # what is compiled is so for the steps alone
                if self.synthesizer is not None and k < plan.alternating and k % max(1, plan.per) == 0:
                    self.synthesizer.step(k // max(1, plan.per))
                if self.fit is not None and k >= plan.first_student:
                    terms = self.fit.step(k - plan.first_student)
            done = k + 1
            line = has_line(done)
            # Several processes look at the deadline together, at lines alone.
            if not line and (self.deadline.stopped_by is None or self.shard.world > 1):
                continue
            last_line, counted = counted, self._account(counted)
            if line:
                self._log(done, terms)
                passed = done - done % self.grid_every  # a grid is due with the first line from there on
                first = passed and not any(map(has_line, range(passed, done)))
                if self.zoo and (first or done in (plan.alternating, plan.total)):
                    self.snapshot(done)
            if self.evaluate is not None and done in measured:
                self._refuse_broken(done)
                counted = self._account(counted)
                with averaged(float_buffers(self.fit.student) if self.fit is not None else []):
                    try:
                        figures = {**self.evaluate(), "trained": self.spent[plan.name]}  # seconds, over all calls
                    except UserError as error:  # weights may be huge where none is infinite yet
                        raise UserError(f"step {self.offset + done}: {error}; {self._remedy()}") from None
                self.metrics.write("evaluation", self.offset + done, figures)
                counted = self._account(counted, "measuring the student")
            late = done != plan.total and out_of_time(self.deadline, counted - last_line, self.shard.device)
            due = agreed(time.perf_counter() - saved >= self.checkpoint_every, self.shard.device)
            if done == plan.total or late or due:
                self._refuse_broken(done)
                self.checkpoints.save(self.offset + done, self.state_dict(done))
                saved = time.perf_counter()
            if late:
                raise Paused(f"{plan.name} is at step {done} of {plan.total}")
        if self.synthesizer is not None and plan.frozen == 0:
            self.synthesizer.settle()
        if self.fit is not None:
            self.fit.graphs.forget()
            mean_over_processes(float_buffers(self.fit.student))
        self._account(counted)

    def _ends_round(self, k: int) -> bool:
        """Whether loop step k was a round of the synthesizer's: it may take long, and its images are kept for good, so
        it is logged, looked at for NaN and may be checkpointed."""
        pooled = self.synthesizer is not None and self.synthesizer.pool is not None
        return pooled and k < self.plan.alternating and k % max(1, self.plan.per) == 0

    def _account(self, begun: float, phase: str = "") -> float:
        """Count the time since `begun` for a phase, this one unless named; returns until when all is counted."""
        now, phase = time.perf_counter(), phase or self.plan.name
        self.spent[phase] = self.spent.get(phase, 0.0) + now - begun
        return now

    def _refuse_broken(self, done: int) -> None:
        """Raise UserError, on all processes alike, where a weight or statistic of one is NaN or infinite: no
        checkpoint may hold it."""
        learners: dict[str, nn.Module | None] = {
            "generator": self.synthesizer.generator if self.synthesizer is not None else None,
            "student": self.fit.student if self.fit is not None else None,
        }
        if self.fit is not None:
            learners |= {f"student's projector of {name}": each for name, each in self.fit.projectors.items()}
        broken = [
            f"{weight} of the {name}"
            for name, module in learners.items()
            if module is not None
            for weight in not_finite(module)[:1]
        ]
        if largest(len(broken), self.shard.device):
            first = broken[0] if broken else "a weight of another process"
            raise UserError(f"step {self.offset + done}: {first} holds NaN or infinity; {self._remedy()}")

    def _remedy(self) -> str:
        rates = learning_rates(self.plan.name)
        return f"checkpoints before it are kept: lower a learning rate ({rates}) or a loss weight"

    def _log(self, done: int, terms: dict[str, Tensor]) -> None:
        figures: dict[str, float] = {}
        if self.synthesizer is not None and done <= self.plan.alternating:
            bn = {f"bn_{name}": value for name, value in self.synthesizer.bn_last.items()}
            figures |= self.metrics.log("generator", self.offset + done, self.synthesizer.last | bn)
        if terms:
            name = "student" if self.plan.name in ("generator", "distill") else self.plan.name
            figures |= self.metrics.log(name, self.offset + done, terms)
            self.usual = moving_mean(self.usual, figures["agreement"])
            self.best = max(self.best, self.usual)
            if name == "student":
                self.metrics.warn(self.offset + done, student_notes(self.usual, self.best))
        shown = ("bn", "ce", "loss", "agreement")
        text = ", ".join(f"{name} {figures[name]:.3f}" for name in shown if name in figures)
        self.metrics.progress(done, self.plan.total, f"{self.plan.name}: {text}")

    def snapshot(self, done: int) -> None:
        """On rank 0: an image grid, spread within classes against between, the teachers' agreement with the labels."""
        if self.shard.rank:
            return
        phase = "generator" if self.synthesizer is not None and done <= self.plan.alternating else "frozen generator"
        figures = show(self.metrics, self.offset + done, phase, self.generator, self.zoo, self.accelerator)
        if phase == "generator" and self.synthesizer is not None:
            last, start = self.synthesizer.bn_last, self.synthesizer.bn_start
            bn = {name: (float(start[name]), float(value)) for name, value in last.items()}
            self.metrics.warn(
                self.offset + done, generator_notes(self.generator, figures, bn, done / self.plan.alternating)
            )

    def state_dict(self, done: int) -> dict[str, Any]:
        """All that a resume from loop step `done` needs, of this rank."""
        state: dict[str, Any] = {"phase": self.plan.name, "done": done, "spent": self.spent}
        state |= {"usual": self.usual, "best": self.best}
        if self.synthesizer is not None:
            state |= {"generator": self.generator.state_dict(), "synthesizer": self.synthesizer.state_dict()}
        if self.fit is not None:
            state["fit"] = self.fit.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> int:
        """Take up a state_dict; returns the loop step to go on from."""
        done = int(state["done"])
        self.usual, self.best = state["usual"], float(state["best"])
        if self.synthesizer is not None:
            self.generator.load_state_dict(state["generator"])
            self.synthesizer.load_state_dict(state["synthesizer"])
            if done > self.plan.alternating:
                self.generator.eval().requires_grad_(False)
        if self.fit is not None:
            self.fit.load_state_dict(state["fit"])
        return done


def out_of_time(deadline: Deadline, seconds: float, device: torch.device) -> bool:
    """Whether a run has to stop before so many seconds are over, on all processes alike: as the main one's clock says,
    or for a signal that came to any of them."""
    if number := largest(deadline.stopped_by or 0, device):
        deadline.stopped_by = signal.Signals(number)
    return agreed(deadline.within(seconds), device)


def show(
    metrics: Metrics, step: int, phase: str, generator: ImageGenerator, zoo: Sequence[Teacher], accelerator: Accelerator
) -> dict[str, float]:
    """Write down what a generator's images are like, with a grid of them; the figures."""
    figures, grid = look(generator, zoo, accelerator)
    metrics.write("images", step, figures)
    metrics.grid(phase.replace(" ", "-"), step, grid, GRID_COLUMNS)
    return figures


@torch.no_grad()
def look(
    generator: ImageGenerator, zoo: Sequence[Teacher], accelerator: Accelerator
) -> tuple[dict[str, float], Tensor]:
    """Figures of a generator's images, and a grid, one class a row: diversity, to the last teacher's eyes; per teacher
    class agreement in percent and predicted balance, the entropy of the classes it sees over that of balanced ones.
    Of many classes LOOKED_AT are looked at, spread evenly."""
    device, classes = accelerator.device, min(LOOKED_AT, generator.classes)
    each = max(GRID_COLUMNS, SAMPLE // classes)
    asked = torch.arange(classes, device=device) * generator.classes // classes
    labels = asked.repeat_interleave(each)
    latents = draw_latents(Shard(device), len(labels), generator.latent, "look")
    with eval_mode(generator), autocast_of(accelerator)():
        images = generator(latents, labels).float()
        seen: dict[str, Tensor] = {}
        for teacher in zoo:
            with tap_features(teacher) as features:
                logits = teacher(images)
            seen |= _seen(teacher.name, logits.argmax(1), labels, classes)
    group = torch.arange(classes, device=device).repeat_interleave(each)  # its means are few, however many classes
    figures = diversity(images, features[-1] if features else logits, group, classes=classes) | seen
    shown = torch.arange(min(classes, GRID_ROWS), device=device).unsqueeze(1) * each
    grid = images[(shown + torch.arange(GRID_COLUMNS, device=device)).flatten()]
    return {name: float(value) for name, value in figures.items()}, grid


def _seen(name: str, guesses: Tensor, labels: Tensor, classes: int) -> dict[str, Tensor]:
    """Class agreement and predicted balance of a teacher's guesses for images of so many classes, of these labels."""
    share = guesses.bincount() / len(guesses)
    balance = torch.special.entr(share).sum() / math.log(classes)
    return {
        f"class_agreement_{name}": (guesses == labels).float().mean() * 100,
        f"predicted_balance_{name}": balance.clamp_max(1),
    }


@torch.no_grad()
def look_at_all(
    generator: ImageGenerator, zoo: Sequence[Teacher], accelerator: Accelerator, each: int
) -> dict[str, float]:
    """Class agreement and predicted balance as `look` has them, of `each` images of every class, in 8 bits."""
    device, figures = accelerator.device, dict[str, Tensor]()
    labels = torch.arange(generator.classes, device=device).repeat(each)
    with eval_mode(generator), autocast_of(accelerator)():
        batches = [
            to_bytes(generator(draw_latents(Shard(device), len(y), generator.latent, "look at all", k), y))
            for k, y in enumerate(labels.split(SAMPLE))
        ]
        for teacher in in_turn(zoo):
            guesses = torch.cat([teacher(to_float(images)).argmax(1) for images in batches])
            figures |= _seen(teacher.name, guesses, labels, generator.classes)
    return {name: float(value) for name, value in figures.items()}
