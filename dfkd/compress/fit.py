"""The one student loop: whatever is to be trained from a stream is trained here."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from numbers import Integral
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dfkd.compress.graph import as_floats, images_of
from dfkd.compress.hints import Hints, first_rows
from dfkd.cuda_graphs import DIRECT, Calls
from dfkd.errors import UserError
from dfkd.losses import STUDENT_LOSSES, unexplained
from dfkd.models.checkpoints import not_finite
from dfkd.norms import learning_norms
from dfkd.renewal import draw_anew, every_layer
from dfkd.runtime import Shard, autocast_of, forked, prepare, reseed
from dfkd.stream import SyntheticStream, Watch, feature_widths
from dfkd.teachers import Teacher, features_of, shares_of, tap_features

FADE = 0.25  # share of the updates, at the end, over which a projector's maps lose their weight


def no_decay_split(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: weight decay on matrices and kernels, none on biases and batch norms."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]


def cosine(step: int, steps: int, warmup: int) -> float:
    """Learning-rate factor: linear warm-up, then cosine to 0 at `steps`."""
    warmup = min(warmup, steps // 10)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


class Batches:
    """Any iterable of images as a stream: begun again at its end, its targets the logits of `teachers[0]`."""

    replay: None = None
    graphs: Calls = DIRECT
    seed = 0
    widths: Sequence[int] = ()

    def __init__(self, images: Iterable[Any]) -> None:
        self.images = images
        self.teachers: list[Teacher] = []
        self.shard = Shard(torch.device("cpu"))
        self.iterator: Iterator[Tensor] = iter(())

    @torch.no_grad()
    def watched_batch(self, step: int, epoch: int | None = None, watch: Watch | None = None) -> tuple[Tensor, ...]:
        """The next batch, and what `watch` collects of the teacher's forward; `step` counts them."""
        images = next(self.iterator, None)
        if images is None:
            self.iterator = images_of(self.images)
            images = next(self.iterator, None)
        if images is None:
            raise UserError(
                f"the stream has no batch for update {step}: it is empty, or an iterator that is at its end; give "
                "one that can be gone through again, as a list or a DataLoader can"
            )
        images = as_floats(self.teachers[0], images.to(self.teachers[0].mean.device))
        with watch() if watch else nullcontext([]) as seen:
            targets = self.teachers[0](images)
        return images, targets, *seen


def hold_zeros(model: nn.Module) -> None:
    """Let no gradient reach the weights that are zero now: what was pruned stays so (decay of zero is zero too)."""
    for weight in model.parameters():
        kept = weight.detach() != 0
        if weight.dim() > 1 and not kept.all():
            weight.register_hook(partial(torch.mul, kept))


def check_training(
    stream: Any, steps: int, warm_start: int = 0, *, lr: float | None, weight_decay: float, temperature: float
) -> None:
    """Raise UserError for numbers out of range, and where a stream ends before so many updates."""
    for name, updates in {"steps": steps, "warm_start": warm_start}.items():
        if not (isinstance(updates, Integral) and updates >= 0):
            raise UserError(f"{name}={updates!r} is not allowed; training takes a whole number of updates, 0 or more")
    if not ((lr is None or lr >= 0) and weight_decay >= 0 and temperature > 0):  # NaN is none of these
        raise UserError(
            f"training takes lr and weight_decay of 0 or more and a temperature above 0, got {lr}, {weight_decay} and "
            f"{temperature}"
        )
    if isinstance(stream, SyntheticStream) and stream.num_batches is not None and stream.num_batches < steps:
        raise UserError(
            f"{steps} updates need as many batches, the stream has num_batches={stream.num_batches}; give it more, or "
            "leave num_batches out"
        )


class Fit:
    """A student in training: SGD with momentum and cosine schedule on a stream whose targets are teacher logits.

    On a stream with features it also learns, with the weight `features`, what the teachers' heads are given, which a
    linear map (dropped afterwards) is to find in what its own head is given; with hints, what they say: projected ones
    fade out over the last quarter of the updates, since a small student cannot learn maps and logits to the end.
    """

    def __init__(
        self,
        student: nn.Module,
        stream: SyntheticStream | Batches,
        *,
        steps: int,
        lr: float = 0.1,
        weight_decay: float = 5e-4,
        warmup: int = 100,
        loss: str = "kl",
        temperature: float = 20.0,
        hold_norms: bool = False,
        clip: float = 0.0,
        hints: Hints | None = None,
        features: float = 3.0,
        accelerator: Accelerator | None = None,
        graphs: Calls = DIRECT,
    ) -> None:
        check_training(stream, steps, lr=lr, weight_decay=weight_decay, temperature=temperature)
        if not any(parameter.requires_grad for parameter in student.parameters()):
            raise UserError(
                "the student has no parameter that learns; call student.requires_grad_(True) (a Teacher freezes the "
                "network it is made of: give it a copy)"
            )
        # In eval mode batch norms keep their statistics, the teacher's: a synthetic batch's would spoil them.
        self.student, self.stream, self.steps, self.hints = student.train(not hold_norms), stream, steps, hints
        self.clip, self.hold_norms = clip, hold_norms
        self.graphs = graphs
        self.prepared = prepare(accelerator, student)
        self.warmup, self.temperature = warmup, temperature
        if loss not in STUDENT_LOSSES:
            raise UserError(f"unknown loss {loss!r}; choose from {sorted(STUDENT_LOSSES)}")
        self.loss = STUDENT_LOSSES[loss]
        groups, self.rates = no_decay_split(student, weight_decay), [lr, lr]
        self.learners = nn.ModuleList([student])
        self.projectors: dict[str, nn.Module] = {}  # trained beside the student and dropped afterwards
        self.project: dict[str, Any] = {}  # the same, as an accelerator has them
        self.ramp = torch.ones((), device=next(student.parameters()).device)  # of the hints: a CUDA graph reads it

        def add(name: str, projector: nn.Module, steepest: float) -> None:
            """Have a projector learn, of whose outputs none weighs more in the loss than `steepest`."""
            self.projectors[name] = projector.to(next(student.parameters()))
            draw_anew(every_layer(projector), stream.seed, name)
            self.project[name] = prepare(accelerator, projector)
            self.learners.append(projector)
            groups.append({"params": list(projector.parameters()), "weight_decay": weight_decay})
            # Its loss is then no steeper in its weights than KL is in those of a head of ten classes.
            self.rates.append(lr * min(1.0, 0.05 / steepest))

        if stream.widths and features:
            (own,), shares = feature_widths([student]), shares_of(stream.teachers)
            self.weights = features * torch.tensor(shares).to(next(student.parameters()))
            steepest = features * max(share / width for share, width in zip(shares, stream.widths))
            add("features", nn.utils.skip_init(nn.Linear, own, sum(stream.widths), bias=False), steepest)
        if hints is not None and hints.projector is not None:
            add("maps", hints.projector, hints.weight / len(hints.pairs) / hints.projector.narrowest)
        self.learners.train(student.training)
        self.optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True, fused=True)
        self.autocast = autocast_of(accelerator)

    def step(self, step: int) -> dict[str, Tensor]:
        """One student update on batch `step` of the stream; returns detached scalars on the device (no host sync)."""
        if self.student.training == self.hold_norms:  # whoever measured it between two steps may have left it so
            self.student.train(not self.hold_norms)
        # What layers draw in their forward (dropout), the student's and those of a generator that is still learning,
        # is the same after a resume.
        reseed(self.ramp.device, self.stream.seed, "student", self.stream.shard.rank, step)
        given = self.stream.watched_batch(step, watch=self.hints.watch_teacher if self.hints is not None else None)
        for group, rate in zip(self.optimizer.param_groups, self.rates):
            group["lr"] = rate * cosine(step, self.steps, self.warmup)
        if "maps" in self.project:
            self.ramp.fill_(min(1.0, (1 - step / self.steps) / FADE))
        loss, agree = self.graphs.learn(("student",), self.learners, self._loss_and_agreement, *given)
        if self.clip:
            nn.utils.clip_grad_norm_(self.student.parameters(), self.clip)
        self.optimizer.step()
        return {"loss": loss, "agreement": agree}

    def _loss_and_agreement(self, images: Tensor, targets: Tensor, *theirs: Tensor) -> tuple[Tensor, Tensor]:
        """The student's loss, and how often it names its teacher's class; theirs is what hints watch of the teacher."""
        watched = self.hints.watch_student() if self.hints is not None else nullcontext([])
        norms = learning_norms(self.student.modules())
        tap = tap_features(self.student) if "features" in self.project else nullcontext([])
        projected, classes = None, targets.shape[1] - sum(self.stream.widths)
        with self.autocast():
            with norms, tap as seen, watched as ours:
                logits = self.prepared(images)
            self._check_logits(logits, len(targets), classes)
            if "features" in self.project:
                projected = self.project["features"](features_of(self.student, seen, logits))
            # A replayed image comes with no more than its targets.
            ours = [first_rows(x, len(y)) for x, y in zip(ours, theirs)]
            if "maps" in self.project:
                ours = self.project["maps"](*ours)
        targets, features = targets.split([classes, sum(self.stream.widths)], 1)
        loss = self.loss(logits, targets, self.temperature)
        if projected is not None:
            widths = list(self.stream.widths)
            loss = loss + (self.weights * unexplained(projected.split(widths, 1), features.split(widths, 1))).sum()
        if self.hints is not None:
            loss = loss + self.ramp * self.hints.term(ours, theirs)
        return loss, (logits.detach().argmax(1) == targets.argmax(1)).float().mean()

    def _check_logits(self, logits: object, count: int, classes: int) -> None:
        """Raise UserError where the student gives something else than its teachers' logits [count, classes]."""
        if not isinstance(logits, Tensor):
            raise UserError(
                f"the student gives a {type(logits).__name__} where logits [B, {classes}] belong; give a network whose "
                "forward returns them alone"
            )
        if logits.shape != (count, classes):
            shape = " x ".join(map(str, logits.shape[1:]))
            raise UserError(
                f"the student gives {shape} numbers an image and its teacher logits of {classes} classes; build the "
                f"student with {classes} outputs"
            )

    def state_dict(self) -> dict[str, Any]:
        """All that a resume needs: the student, its optimiser, the stream's replay ring."""
        state: dict[str, Any] = {"student": self.student.state_dict(), "optimizer": self.optimizer.state_dict()}
        state |= {name: projector.state_dict() for name, projector in self.projectors.items()}
        if self.stream.replay is not None:
            state["replay"] = self.stream.replay.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state_dict."""
        self.student.load_state_dict(state["student"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name, projector in self.projectors.items():
            projector.load_state_dict(state[name])
        if self.stream.replay is not None:
            self.stream.replay.load_state_dict(state["replay"])

    def run(self) -> nn.Module:
        """All steps, with an empty replay ring at first; returns the student in eval mode. torch's global generators
        are left as they were.

        Raises UserError where the student has diverged.
        """
        device = next(self.student.parameters()).device
        if self.stream.replay is not None:
            self.stream.replay.clear()  # of another student's batches
        with forked(device):
            for step in range(self.steps):
                self.step(step)
        if broken := not_finite(self.student):
            raise UserError(
                f"{broken[0]} of the student holds NaN or infinity after {self.steps} updates; lower lr, and see that "
                "the teacher's logits are finite"
            )
        return self.student.eval()


def fit(student: nn.Module, stream: SyntheticStream, *, steps: int, **options: Any) -> nn.Module:
    """Train a student in place on a stream with a teacher (and maybe features), and return it in eval mode; options are
    those of dfkd.compress.fit.Fit: lr, weight_decay, warmup, loss, temperature, clip, hints, features and others.

    The student is given images in [0, 1] as they are streamed: one with a normalisation of its own is wrapped in a
    dfkd.classifier.Classifier. A stream's set_epoch says which images. Raises UserError where the stream is none, is
    too short, has no teacher or one of other classes than the student's, nothing in the student learns, or a number is
    out of range.
    """
    if not (isinstance(stream, SyntheticStream | Batches) and stream.teachers):
        raise UserError(
            "fit() takes a SyntheticStream with a teacher, whose logits the student learns; give the stream itself, "
            "made with teacher="
        )
    if steps < 1:
        raise UserError(f"steps={steps} is not allowed; training takes 1 update or more")
    return Fit(student, stream, steps=steps, **options).run()
