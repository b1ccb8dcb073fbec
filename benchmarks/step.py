"""Images per second of a generator step and of a student step, between the bare floor and the naive form.

    python benchmarks/step.py --case wrn --repeats 15

- ours:  `Synthesizer.step` and `Fit.step`, prepared as a run prepares them, adversary fully ramped up.
- naive: the same losses on the same draws in float32 and NCHW, with teachers that take gradients, hooks that are never
  removed and a student whose gradients are computed in the adversary. Drawing, mixing, replay and augmentation are
  ours: no loss terms or bugs of others are held against them.
- floor: network forward and backward at our precision and memory format, on fixed inputs, and nothing else: per sampled
  teacher and for the adversary forward and input gradient, generator forward and backward; for the student its forward
  and backward, the teacher's forward, the generator's for the fresh half.

The three take turns step by step, so that a ratio compares neighbours in time. Weights are random.
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any, NamedTuple, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dfkd import losses as L
from dfkd.classifier import Classifier
from dfkd.compress.fit import Fit
from dfkd.mixing import Mixed, make_mix, mix_batch
from dfkd.models import build_model
from dfkd.runtime import Shard, eval_mode, frozen, make_accelerator, resolve_precision
from dfkd.stream import SyntheticStream
from dfkd.synthesis import Synthesizer, draw_labels, draw_latents
from dfkd.teachers import Teacher, batch_norms, load_zoo, sample_teachers
from generators import ConvGenerator

CLASSES = 10
SAMPLE = 2  # m': teachers of a generator step
WEIGHTS = {"ce": 1.0, "bn": 1.0, "adversary": 1.0, "diversity": 1.0}
CLIP = 5.0
STREAM: dict[str, Any] = {"replay": 200, "shift": 0.125, "mix": 0.5}
SCHEDULE = 10_000  # length of the run that a measured step is part of
WARMUP = 3  # rounds before the clock starts
STUDENT_STEPS = 5  # per generator step in a round of the usual run

Model = tuple[str, Mapping[str, Any]]  # model string and kwargs


@dataclass(frozen=True)
class Case:
    """Networks and sizes of a measurement; the student learns the mean logits of all teachers."""

    teachers: Sequence[Model]
    student: Model
    channels: int = 3
    size: int = 32
    latent: int = 256
    width: int = 64
    batch: int = 128


TINY = [(f"dfkd:tiny_{family}", {"width": 16}) for family in ("plain", "inverted", "residual")]
CASES = {
    "digits": Case(TINY, ("dfkd:tiny_plain", {"width": 8}), channels=1, size=16, latent=128, width=32),
    "resnet": Case([("dfkd:resnet20", {}), ("dfkd:resnet56", {})], ("dfkd:resnet20", {})),
    "wrn": Case([("dfkd:wrn_40_2", {})], ("dfkd:wrn_16_1", {})),
}


class Networks(NamedTuple):
    """What a step works with, on the device."""

    generator: ConvGenerator
    zoo: list[Teacher]
    student: Classifier


def build(case: Case, seed: int, device: torch.device, memory_format: torch.memory_format) -> Networks:
    """The networks of a case with random weights that depend on the seed alone."""
    torch.manual_seed(seed)
    image: dict[str, Any] = {"mean": [0.5] * case.channels, "std": [0.25] * case.channels}
    specs = {name: {"model": name, "kwargs": kwargs, **image} for name, kwargs in case.teachers}
    zoo = load_zoo(specs, classes=CLASSES, channels=case.channels, size=case.size)
    name, kwargs = case.student
    student = Classifier(build_model(name, classes=CLASSES, channels=case.channels, kwargs=kwargs), **image)
    generator = ConvGenerator(
        latent=case.latent, classes=CLASSES, channels=case.channels, size=case.size, width=case.width
    )
    for network in (generator, student, *zoo):
        network.to(device, memory_format=memory_format)  # type: ignore[call-overload]
    return Networks(generator, zoo, student)


class Contender(Protocol):
    """One way to take the two steps."""

    def generator_step(self, step: int) -> object:
        """One update of the generator."""

    def student_step(self, step: int) -> object:
        """One update of the student."""


class Ours:
    """The steps of a run."""

    def __init__(self, case: Case, seed: int, shard: Shard, accelerator: Accelerator | None = None) -> None:
        self.networks = generator, zoo, student = build(case, seed, shard.device, torch.channels_last)
        self.synthesizer = Synthesizer(
            generator,
            zoo,
            losses=WEIGHTS,
            steps=SCHEDULE,
            batch_size=case.batch,
            sample=SAMPLE,
            mix=make_mix("resize"),
            student=student,
            clip=CLIP,
            warmup=0.0,
            seed=seed,
            accelerator=accelerator,
            shard=shard,
        )
        options = STREAM | ({"autocast": accelerator.autocast} if accelerator else {})
        stream = SyntheticStream(
            generator, batch_size=case.batch, teacher=zoo, seed=seed, shard=shard, channels_last=True, **options
        )
        self.fit = Fit(student, stream, steps=SCHEDULE, accelerator=accelerator)

    def generator_step(self, step: int) -> dict[str, Tensor]:
        """One `Synthesizer.step`."""
        return self.synthesizer.step(step)

    def student_step(self, step: int) -> dict[str, Tensor]:
        """One `Fit.step`."""
        return self.fit.step(step)


class StatisticsHook:
    """The loss of one batch norm, MixMix eq. 2, as the hooks of DataFree compute it (datafree/hooks.py:88-89)."""

    def __init__(self, norm: nn.Module) -> None:
        self.loss = torch.zeros(())
        norm.register_forward_hook(self)

    def __call__(self, norm: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        (x,) = inputs
        mean = x.mean([0, 2, 3])
        var = x.permute(1, 0, 2, 3).contiguous().view(x.shape[1], -1).var(1, unbiased=False)
        self.loss = torch.norm(norm.running_var - var, 2) + torch.norm(norm.running_mean - mean, 2)  # type: ignore[operator]


class Naive:
    """The same steps as they are commonly written; float32, contiguous, eager, one backward for all teachers."""

    def __init__(self, case: Case, seed: int, shard: Shard) -> None:
        self.networks = build(case, seed, shard.device, torch.contiguous_format)
        self.generator, self.zoo, self.student = self.networks
        self.case, self.seed, self.shard, self.mix = case, seed, shard, make_mix("resize")
        for teacher in self.zoo:
            teacher.requires_grad_(True)
        self.hooks = {t.name: [StatisticsHook(norm) for norm in batch_norms(t.model).values()] for t in self.zoo}
        self.optimizer = torch.optim.Adam(self.generator.parameters(), lr=1e-3, betas=(0.5, 0.999))
        stream = SyntheticStream(
            self.generator, batch_size=case.batch, teacher=self.zoo, seed=seed, shard=shard, **STREAM
        )
        self.fit = Fit(self.student, stream, steps=SCHEDULE)
        self.start = self._measure_start()

    def generator_step(self, step: int) -> dict[str, Tensor]:
        """One update of the generator; returns the unweighted terms."""
        images, latents, labels = self._draw(step)
        mixed = mix_batch(self.mix, images, labels, self.shard, self.seed, "synthesis", step)
        with eval_mode(self.student):
            answer = self.student(mixed.images)
        chosen = sample_teachers(self.zoo, SAMPLE, self.seed, step)
        each = [self._teacher_terms(teacher, mixed, answer) for teacher in chosen]
        terms = {name: torch.stack([of_one[name] for of_one in each]).mean() for name in each[0]}
        terms["diversity"] = L.mode_seeking(images, latents, labels)
        self.optimizer.zero_grad()
        self.student.zero_grad()
        torch.stack([WEIGHTS[name] * value for name, value in terms.items()]).sum().backward()
        torch.nn.utils.clip_grad_norm_(self.generator.parameters(), CLIP)
        self.optimizer.step()
        return terms

    def student_step(self, step: int) -> dict[str, Tensor]:
        """One `Fit.step` in float32, the hooks of the teachers still on."""
        return self.fit.step(step)

    def _draw(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        position = (self.seed, "synthesis", step)
        labels = draw_labels(self.shard, self.case.batch, CLASSES, *position, repeats=2)
        latents = draw_latents(self.shard, self.case.batch, self.case.latent, *position)
        return self.generator(latents, labels), latents, labels

    def _teacher_terms(self, teacher: Teacher, mixed: Mixed, answer: Tensor) -> dict[str, Tensor]:
        logits = teacher(mixed.images)
        return {
            "ce": L.mixed_ce(logits, mixed.labels, mixed.other, mixed.beta),
            "bn": self._bn_loss(teacher) / self.start[teacher.name],
            "adversary": -L.masked_divergence(answer, logits, "l1"),
        }

    def _bn_loss(self, teacher: Teacher) -> Tensor:
        return torch.stack([hook.loss for hook in self.hooks[teacher.name]]).sum()

    @torch.no_grad()
    def _measure_start(self) -> dict[str, Tensor]:
        images, _, _ = self._draw(0)
        start = {}
        for teacher in self.zoo:
            teacher(images)
            start[teacher.name] = self._bn_loss(teacher)
        return start


class Floor:
    """The network work without which neither step can be."""

    def __init__(self, case: Case, seed: int, shard: Shard, accelerator: Accelerator | None = None) -> None:
        self.networks = build(case, seed, shard.device, torch.channels_last)
        self.generator, self.zoo, self.student = self.networks
        self.autocast = accelerator.autocast if accelerator else nullcontext
        self.seed, self.half = seed, case.batch // 2
        self.latents = draw_latents(shard, case.batch, case.latent, seed, "floor")
        self.labels = draw_labels(shard, case.batch, CLASSES, seed, "floor")
        with torch.no_grad():
            images = self.generator(self.latents, self.labels)
        self.images = images.contiguous(memory_format=torch.channels_last)
        self.gradient = torch.ones(case.batch, CLASSES, device=shard.device)

    def generator_step(self, step: int) -> None:
        """Generator forward and backward; forward and input gradient of the sampled teachers and of the adversary."""
        with self.autocast():
            images = self.generator(self.latents, self.labels)
        leaf = images.detach().requires_grad_()
        with eval_mode(self.student), frozen(self.student):
            for network in (*sample_teachers(self.zoo, SAMPLE, self.seed, step), self.student):
                self._backward(network, leaf)
        self.generator.zero_grad()
        images.backward(leaf.grad)

    def student_step(self, step: int) -> None:
        """Student forward and backward, forward of every teacher, generator forward for the fresh half."""
        with torch.no_grad(), self.autocast():
            self.generator(self.latents[: self.half], self.labels[: self.half])
            for teacher in self.zoo:
                teacher(self.images)
        self.student.zero_grad()
        self._backward(self.student, self.images)

    def _backward(self, network: nn.Module, images: Tensor) -> None:
        with self.autocast():
            logits = network(images)
        logits.backward(self.gradient)


Seconds = dict[str, list[float]]  # contender -> seconds of each repetition


def seconds_of(call: Callable[[int], object], step: int, device: torch.device) -> float:
    """Wall-clock time of a call, the device's queue empty before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call(step)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure(contenders: Mapping[str, Contender], repeats: int, device: torch.device) -> dict[str, Seconds]:
    """Seconds per kind of step; contenders take turns, and another one begins at every repetition."""
    names = list(contenders)
    seconds: dict[str, Seconds] = {kind: {name: [] for name in names} for kind in ("generator", "student")}
    for step in range(WARMUP + repeats):
        first = step % len(names)
        for name in names[first:] + names[:first]:
            contender = contenders[name]
            for kind, call in (("generator", contender.generator_step), ("student", contender.student_step)):
                taken = seconds_of(call, step, device)
                if step >= WARMUP:
                    seconds[kind][name].append(taken)
    return seconds


def per_round(seconds: Mapping[str, Seconds]) -> Seconds:
    """Seconds of a generator step and the student steps that follow it in the usual run."""
    generator, student = seconds["generator"], seconds["student"]
    return {name: [g + STUDENT_STEPS * s for g, s in zip(generator[name], student[name])] for name in generator}


def with_quartiles(values: Sequence[float]) -> str:
    """Median and quartiles of a list of ratios."""
    low, _, high = quantiles(values, n=4, method="inclusive")
    return f"{median(values):.2f} [{low:.2f}, {high:.2f}]"


def row(label: str, images: int, seconds: Seconds) -> str:
    """A line of the table: images/s at the median time, ratios of times repetition by repetition."""
    speeds = [f"{images / median(seconds[name]):>9,.0f}" for name in ("floor", "ours", "naive")]
    over = with_quartiles([ours / floor for ours, floor in zip(seconds["ours"], seconds["floor"])])
    faster = with_quartiles([naive / ours for naive, ours in zip(seconds["naive"], seconds["ours"])])
    return f"{label:<22}{''.join(speeds)}   {over:<19}{faster}"


def table(name: str, case: Case, seconds: Mapping[str, Seconds]) -> str:
    """The lines of a case."""
    rounds = 1 + STUDENT_STEPS
    return "\n".join(
        [
            row(f"{name} generator", case.batch, seconds["generator"]),
            row(f"{name} student", case.batch, seconds["student"]),
            row(f"{name} 1 gen + {STUDENT_STEPS} stu", rounds * case.batch, per_round(seconds)),
        ]
    )


def header(device: torch.device, precision: str, repeats: int, seed: int) -> str:
    """Under which circumstances the table was made, and what its columns are."""
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    threads = torch.get_num_threads()
    return (
        f"device {hardware}, {threads} threads, {precision} channels_last (naive: fp32 contiguous), "
        f"torch {torch.__version__}, seed {seed}, {repeats} repeats: medians, [quartiles]\n"
        f"{'images/s':<22}{'floor':>9}{'ours':>9}{'naive':>9}   {'time ours/floor':<19}time naive/ours"
    )


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--case", choices=[*CASES, "all"], default="all")
    parser.add_argument("--repeats", type=int, default=15, help="timed steps of each kind, at least 2")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="of ours and the floor")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's choice unless given")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.repeats < 2:
        parser.error("--repeats must be at least 2: the spread needs two values")
    return given


def main() -> None:
    """Measure the cases asked for and print the table."""
    given = arguments()
    if given.threads:
        torch.set_num_threads(given.threads)
    accelerator, shard = make_accelerator(given.precision)
    print(header(shard.device, resolve_precision(given.precision, shard.device), given.repeats, given.seed))
    for name in CASES if given.case == "all" else [given.case]:
        case = CASES[name]
        contenders: dict[str, Contender] = {
            "floor": Floor(case, given.seed, shard, accelerator),
            "ours": Ours(case, given.seed, shard, accelerator),
            "naive": Naive(case, given.seed, shard),
        }
        print(table(name, case, measure(contenders, given.repeats, shard.device)), flush=True)


if __name__ == "__main__":
    main()
