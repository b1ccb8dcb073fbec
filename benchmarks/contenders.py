"""What step.py and its neighbours measure: networks of five sizes, and three ways to take a step with them.

- Ours:  `Synthesizer.step`, `Fit.step` and `SyntheticStream.batch`, prepared as a run prepares them, with the default
  terms (at weights of 1, which cost what others do), the adversary fully ramped up.
- Naive: the same losses on the same draws in float32 and NCHW, with teachers that take gradients, hooks that are never
  removed, a student whose gradients are computed in the adversary, and teachers that are asked again about every
  replayed image. Drawing, replay and augmentation are ours: no loss terms or bugs of others are held against them.
- Floor: network forward and backward at our precision and memory format, on fixed inputs, and nothing else: per sampled
  teacher and for the adversary forward and input gradient, generator forward and backward; for the student its forward
  and backward, the teachers' and the generator's forward for the fresh half; for the stream the generator's forward.
  What finds the teachers' features and maps in the student's is not in it.

On a GPU the networks of Ours and Floor are CUDA graphs where asked, as runtime.cuda_graphs has them. All weights are
random.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from dfkd import losses as L
from dfkd.classifier import Classifier
from dfkd.compress.fit import Fit
from dfkd.compress.hints import Hints, projected_hints
from dfkd.cuda_graphs import Outputs, recorder
from dfkd.draws import draw_labels, draw_latents
from dfkd.models import build_model
from dfkd.runtime import Shard, autocast_of, eval_mode, frozen
from dfkd.stream import SyntheticStream, Watch, feature_widths
from dfkd.synthesis import Synthesizer
from dfkd.teachers import Teacher, batch_norms, load_zoo, logits_and_features, sample_teachers
from generators import ConvGenerator

SAMPLE = 2  # m': teachers of a generator step
WEIGHTS = {"ce": 1.0, "bn": 1.0, "adversary": 1.0, "diversity": 1.0}
CLIP = 5.0
FRESH = 0.5  # of a student batch, the rest is replayed
MIXED = 0.5  # probability that what is fresh is mixed
MAPS = 3.0  # weight of the teacher's maps
SCHEDULE = 10_000  # length of the run that a measured step is part of

Model = tuple[str, Mapping[str, Any]]  # model string and kwargs


@dataclass(frozen=True)
class Case:
    """Networks and sizes of a measurement; the student learns the mean logits and the features of all, and the maps of
    the first."""

    teachers: Sequence[Model]
    student: Model
    classes: int = 10
    channels: int = 3
    size: int = 32
    latent: int = 256
    width: int = 64
    batch: int = 128
    replay: int = 200

    @property
    def stream(self) -> dict[str, Any]:
        """Options of the student's stream."""
        return {"batch_size": self.batch, "replay": self.replay, "fresh": FRESH, "shift": 0.125, "mix": MIXED}


TINY = [(f"dfkd:tiny_{family}", {"width": 16}) for family in ("plain", "inverted", "residual")]
CASES = {
    "digits": Case(TINY, ("dfkd:tiny_plain", {"width": 8}), channels=1, size=16, latent=128, width=32),
    "resnet": Case([("dfkd:resnet20", {}), ("dfkd:resnet56", {})], ("dfkd:resnet20", {})),
    "wrn": Case([("dfkd:wrn_40_2", {})], ("dfkd:wrn_16_1", {})),
    "resnet34": Case([("dfkd:resnet34", {})], ("dfkd:resnet18", {})),
    "imagenet": Case(
        [("torchvision:resnet50", {}), ("torchvision:mobilenet_v2", {})],
        ("torchvision:mobilenet_v2", {}),
        classes=1000,
        size=224,
        batch=32,
        replay=20,
    ),
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
    zoo = load_zoo(specs, classes=case.classes, channels=case.channels, size=case.size, untrained=True)
    name, kwargs = case.student
    student = Classifier(build_model(name, classes=case.classes, channels=case.channels, kwargs=kwargs), **image)
    generator = ConvGenerator(
        latent=case.latent,
        classes=case.classes,
        channels=case.channels,
        size=case.size,
        width=case.width,
        prototypes=8,
    )
    for network in (generator, student, *zoo):
        network.to(device, memory_format=memory_format)  # type: ignore[call-overload]
    return Networks(generator, zoo, student)


def maps_hints(case: Case, networks: Networks) -> Hints | None:
    """The maps of the first teacher, which the student learns besides."""
    image = torch.zeros(1, case.channels, case.size, case.size, device=networks.student.mean.device)
    return projected_hints(networks.student, networks.zoo[0], image, MAPS)


class Contender(Protocol):
    """One way to take the steps."""

    def generator_step(self, step: int) -> object:
        """One update of the generator."""

    def student_step(self, step: int) -> object:
        """One update of the student."""

    def stream_step(self, step: int) -> object:
        """One batch of images."""


class Ours:
    """The steps of a run."""

    def __init__(
        self,
        case: Case,
        seed: int,
        shard: Shard,
        accelerator: Accelerator | None = None,
        sample: int = SAMPLE,
        graphs: bool = False,
    ) -> None:
        self.networks = generator, zoo, student = build(case, seed, shard.device, torch.channels_last)
        self.synthesizer = Synthesizer(
            generator,
            zoo,
            losses=WEIGHTS,
            steps=SCHEDULE,
            batch_size=case.batch,
            sample=sample,
            student=student,
            clip=CLIP,
            warmup=0.0,
            fade=0.0,
            seed=seed,
            accelerator=accelerator,
            shard=shard,
            graphs=recorder(graphs, shard),
        )
        calls = recorder(graphs, shard)
        options: dict[str, Any] = {"seed": seed, "shard": shard, "channels_last": True}
        options["autocast"] = autocast_of(accelerator)
        stream = SyntheticStream(generator, teacher=zoo, features=True, graphs=calls, **case.stream, **options)
        hints = maps_hints(case, self.networks)
        self.fit = Fit(student, stream, steps=SCHEDULE, hints=hints, accelerator=accelerator, graphs=calls)
        self.images = SyntheticStream(generator, batch_size=case.batch, graphs=recorder(graphs, shard), **options)

    def generator_step(self, step: int) -> dict[str, Tensor]:
        """One `Synthesizer.step`."""
        return self.synthesizer.step(step)

    def student_step(self, step: int) -> dict[str, Tensor]:
        """One `Fit.step`."""
        return self.fit.step(step)

    def stream_step(self, step: int) -> tuple[Tensor, Tensor]:
        """One batch of the bare stream."""
        with eval_mode(self.networks.generator):
            return self.images.batch(step)


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


class AskedAgain:
    """A stream whose teachers are asked about every image of a batch, replayed or not."""

    def __init__(self, stream: SyntheticStream, zoo: list[Teacher]) -> None:
        self.stream, self.teachers, self.widths = stream, zoo, feature_widths(zoo)
        self.seed, self.shard, self.replay = stream.seed, stream.shard, stream.replay

    @torch.no_grad()
    def watched_batch(self, step: int, epoch: int | None = None, watch: Watch | None = None) -> tuple[Tensor, ...]:
        """Images, the zoo's logits and features, and what `watch` collects, as Fit asks for them."""
        images, _ = self.stream.batch(step, epoch)
        with watch() if watch else nullcontext([]) as seen:
            targets = logits_and_features(self.teachers, images)
        return images, targets, *seen


class Naive:
    """The same steps as they are commonly written; float32, contiguous, eager, one backward for all teachers."""

    def __init__(self, case: Case, seed: int, shard: Shard) -> None:
        self.networks = build(case, seed, shard.device, torch.contiguous_format)
        self.generator, self.zoo, self.student = self.networks
        self.case, self.seed, self.shard = case, seed, shard
        for teacher in self.zoo:
            teacher.requires_grad_(True)
        self.hooks = {t.name: [StatisticsHook(norm) for norm in batch_norms(t.model).values()] for t in self.zoo}
        self.optimizer = torch.optim.Adam(self.generator.parameters(), lr=1e-3, betas=(0.5, 0.999))
        stream = AskedAgain(SyntheticStream(self.generator, seed=seed, shard=shard, **case.stream), self.zoo)
        hints = maps_hints(case, self.networks)
        self.fit = Fit(self.student, stream, steps=SCHEDULE, hints=hints)  # type: ignore[arg-type]
        self.images = SyntheticStream(self.generator, batch_size=case.batch, seed=seed, shard=shard)
        self.start = self._measure_start()

    def generator_step(self, step: int) -> dict[str, Tensor]:
        """One update of the generator; returns the unweighted terms."""
        images, latents, labels = self._draw(step)
        with eval_mode(self.student):
            answer = self.student(images)
        chosen = sample_teachers(self.zoo, SAMPLE, self.seed, step)
        each = [self._teacher_terms(teacher, images, labels, answer) for teacher in chosen]
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

    def stream_step(self, step: int) -> tuple[Tensor, Tensor]:
        """One batch of the bare stream, in float32."""
        with eval_mode(self.generator):
            return self.images.batch(step)

    def _draw(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        position = (self.seed, "synthesis", step)
        labels = draw_labels(self.shard, self.case.batch, self.case.classes, *position, repeats=2)
        latents = draw_latents(self.shard, self.case.batch, self.case.latent, *position)
        return self.generator(latents, labels), latents, labels

    def _teacher_terms(self, teacher: Teacher, images: Tensor, labels: Tensor, answer: Tensor) -> dict[str, Tensor]:
        logits = teacher(images)
        return {
            "ce": F.cross_entropy(logits, labels),
            "bn": self._bn_loss(teacher) / self.start[teacher.name],
            "adversary": -L.masked_divergence(answer, logits, "kl"),
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

    def __init__(
        self, case: Case, seed: int, shard: Shard, accelerator: Accelerator | None = None, graphs: bool = False
    ) -> None:
        self.networks = build(case, seed, shard.device, torch.channels_last)
        self.graphs = recorder(graphs, shard)
        self.generator, self.zoo, self.student = self.networks
        self.autocast = autocast_of(accelerator)
        self.seed, self.fresh = seed, math.ceil(FRESH * case.batch)
        self.latents = draw_latents(shard, case.batch, case.latent, seed, "floor")
        self.labels = draw_labels(shard, case.batch, case.classes, seed, "floor")
        with torch.no_grad():
            images = self.generator(self.latents, self.labels)
        self.images = images.contiguous(memory_format=torch.channels_last)
        self.gradient = torch.ones(case.batch, case.classes, device=shard.device)

    def generator_step(self, step: int) -> None:
        """Generator forward and backward; forward and input gradient of the sampled teachers and of the adversary."""
        (images,) = self._ask("generator", self.generator, self.generator, self.latents, self.labels)
        leaf = images.detach().requires_grad_()
        leaf.grad = torch.zeros_like(leaf)
        with eval_mode(self.student), frozen(self.student):
            for network in (*sample_teachers(self.zoo, SAMPLE, self.seed, step), self.student):
                self._ask(network.name, None, network, leaf)[0].backward(self.gradient)
        self.generator.zero_grad()
        images.backward(leaf.grad)

    def student_step(self, step: int) -> None:
        """Student forward and backward, forward of every teacher and of the generator for the fresh half."""
        with torch.no_grad():
            self._ask("fresh", self.generator, self.generator, self.latents[: self.fresh], self.labels[: self.fresh])
            for teacher in self.zoo:
                self._ask(teacher.name, None, teacher, self.images[: self.fresh])
        self.graphs.learn(("student",), self.student, self._learnt, self.images)

    @torch.no_grad()
    def stream_step(self, step: int) -> Tensor:
        """Generator forward."""
        with eval_mode(self.generator):
            return self._ask("stream", self.generator, self.generator, self.latents, self.labels)[0]

    def _learnt(self, images: Tensor) -> Outputs:
        with self.autocast():
            return (self.student(images).sum(),)

    def _ask(self, name: str, learner: nn.Module | None, network: nn.Module, *inputs: Tensor) -> Outputs:
        def forward(*inputs: Tensor) -> Outputs:
            with self.autocast():
                return (network(*inputs),)

        return self.graphs.call((name,), learner, forward, *inputs)
