"""The one student loop: whatever is to be trained from a stream is trained here."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dfkd.classifier import Classifier
from dfkd.compress.graph import images_of, watch
from dfkd.cuda_graphs import DIRECT, Calls
from dfkd.errors import UserError
from dfkd.losses import STUDENT_LOSSES, attention, hints, map_error, unexplained
from dfkd.models.selection import last_blocks
from dfkd.norms import learning_norms
from dfkd.renewal import draw_anew, every_layer
from dfkd.runtime import Shard, autocast_of, eval_mode, prepare, reseed, to_float
from dfkd.stream import SyntheticStream, Watch, feature_widths
from dfkd.teachers import Teacher, features_of, shares_of, tap_features


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
            raise UserError("the stream gave no batch; give an iterable that can be gone through more than once")
        images = to_float(images.to(self.teachers[0].mean.device))
        with watch() if watch else nullcontext([]) as seen:
            targets = self.teachers[0](images)
        return images, targets, *seen


class MapProjector(nn.ModuleList):
    """1x1 convolutions, one for each of a student's maps: what they give is compared with the teacher's."""

    def __init__(self, widths: Sequence[tuple[int, int]]) -> None:
        super().__init__(nn.utils.skip_init(nn.Conv2d, own, its, 1, bias=False) for own, its in widths)
        self.narrowest = min(its for _, its in widths)

    def forward(self, *maps: Tensor) -> list[Tensor]:
        """The projected maps."""
        return [layer(x) for layer, x in zip(self, maps)]


@dataclass
class Hints:
    """Layers whose outputs a student learns besides the logits: pairs of names, the student's and the teacher's, one of
    losses.py's functions of the two lists of tensors, and where the student's are not compared as they are, what is
    trained to make the teacher's of them."""

    student: nn.Module
    teacher: nn.Module
    pairs: Sequence[tuple[str, str]]
    weight: float
    loss: Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor] = hints
    projector: MapProjector | None = None

    @property
    def layers(self) -> list[str]:
        """The teacher's layers."""
        return [name for _, name in self.pairs]

    def watch_student(self) -> AbstractContextManager[list[Tensor]]:
        """Collect what the student's layers give in a forward within its scope, pair by pair."""
        return collected(self.student, [name for name, _ in self.pairs])

    def watch_teacher(self) -> AbstractContextManager[list[Tensor]]:
        """Collect what the teacher's layers give in a forward within its scope, pair by pair."""
        return collected(self.teacher, self.layers)

    def term(self, ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
        """The weighted loss of what was collected from the student and from the teacher, a float32 scalar."""
        return self.weight * self.loss(ours, theirs)


class _First(torch.autograd.Function):
    """The first rows of a batch; its gradient lies in memory as the batch does, a slice's would be contiguous."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: int) -> Tensor:
        last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
        ctx.like = x.shape, torch.channels_last if last else torch.contiguous_format
        return x[:rows]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        shape, layout = ctx.like
        whole = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=layout).zero_()
        whole[: len(grad)] = grad
        return whole, None


@contextmanager
def collected(network: nn.Module, names: Sequence[str]) -> Iterator[list[Tensor]]:
    """Collect as `watch` does, into a list in the order of the names, which is filled as the scope ends."""
    found: list[Tensor] = []
    with watch(network, names) as seen:
        yield found
    if missing := [name for name in names if name not in seen]:
        raise UserError(
            f"{missing[0]} was not called in training, though it is otherwise; set distill.maps, distill.hints and "
            "distill.attention to 0, in Python hints=None"
        )
    found += [seen[name] for name in names]


Maps = dict[tuple[int, int], tuple[str, int]]  # by size: a module's name and its channels
# Whose outputs are no stages of a network: some may be as square as a map (attention), or larger than the last.
NO_MAPS = (nn.Identity, nn.Dropout, nn.Softmax, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)


@torch.no_grad()
def last_maps(model: nn.Module, image: Tensor) -> Maps:
    """Per size (H, W) above 1 the module that is last to give a map of it for one image [1, C, H, W], and its channels.

    A block that strides belongs to the size it ends with, and nothing in it is looked at that has the size it begins
    with: of a ResNet these are the stages. Modules that hold maps of three sizes or more, and nn.Sequential, are no
    such blocks. None where what the network hands on is tokens [B, N, C] or [B, H, W, C], as a transformer does: what
    maps it has are of its stem.
    """
    with eval_mode(model), watch(model, [name for name, _ in model.named_modules() if name]) as seen:
        model(image)
    outputs = {  # in order of execution
        name: x
        for name, x in seen.items()
        if isinstance(x, Tensor) and x.dim() > 2 and not isinstance(model.get_submodule(name), NO_MAPS)
    }
    sizes = {  # of maps, which have the image's proportions
        name: (x.shape[2], x.shape[3])
        for name, x in outputs.items()
        if x.dim() == 4 and (x.shape[2] * image.shape[3] == x.shape[3] * image.shape[2] or x[0, 0].numel() == 1)
    }
    within = {name: {sizes[each] for each in sizes if each.startswith(f"{name}.")} for name in sizes}
    blocks = [
        name
        for name in sizes
        if not isinstance(model.get_submodule(name), nn.Sequential) and len(within[name] - {(1, 1)}) < 3
    ]
    found = {}
    for name, x in outputs.items():
        around = [block for block in blocks if name.startswith(f"{block}.")]
        if name not in sizes and not around:
            return {}
        if name in sizes and min(sizes[name]) > 1 and all(sizes[block] == sizes[name] for block in around):
            found[sizes[name]] = name, x.shape[1]
    return found


def pairs_of(ours: Maps, theirs: Maps) -> dict[tuple[str, str], tuple[int, int]]:
    """The modules (student's, teacher's) whose `last_maps` are of one size, with their channels."""
    return {(name, theirs[size][0]): (width, theirs[size][1]) for size, (name, width) in ours.items() if size in theirs}


def attention_hints(student: nn.Module, teacher: nn.Module, image: Tensor, weight: float) -> Hints:
    """Attention transfer, with a weight, where both networks have maps of one size for an image [1, C, H, W]. Raises
    UserError where there are none."""
    ours, theirs = last_maps(student, image), last_maps(teacher, image)
    if not (pairs := pairs_of(ours, theirs)):
        sizes = [", ".join("x".join(map(str, size)) for size in maps) or "none" for maps in (ours, theirs)]
        raise UserError(
            f"attention needs feature maps of one size in both networks, the student has {sizes[0]} and the teacher "
            f"{sizes[1]}; set distill.attention=0"
        )
    return Hints(student, teacher, list(pairs), weight, attention)


def projected_hints(student: nn.Module, teacher: nn.Module, image: Tensor, weight: float) -> Hints | None:
    """Hints, with a weight, of the maps that both networks have of one size for an image [1, C, H, W], whatever their
    channels: a 1x1 convolution of each of the student's, dropped afterwards, is to tell images and places apart as the
    teacher's map does.

    None where the weight is 0, where there are none, where one network has maps of one size alone (it has no stages)
    and where they resize images to other sizes: a size would then be of another depth. FitNets (Romero et al. 2015) eq.
    3 with a regressor of one layer, of several maps at once.
    """
    ours, theirs = last_maps(student, image), last_maps(teacher, image)
    resized = [network.input_size if isinstance(network, Classifier) else None for network in (student, teacher)]
    pairs = pairs_of(ours, theirs)
    alike = len({size or image.shape[-1] for size in resized}) == 1
    if not (weight and pairs and alike and min(len(ours), len(theirs)) > 1):
        return None
    return Hints(student, teacher, list(pairs), weight, map_error, MapProjector(list(pairs.values())))


@torch.no_grad()
def stage_pairs(student: nn.Module, teacher: nn.Module, image: Tensor) -> list[tuple[str, str]]:
    """The blocks (student's, teacher's) whose outputs a student that has weights of its teacher is to give too: the
    last of every row of blocks, where both give the image [1, C, H, W] an output of one shape."""
    pairs = last_blocks(student, teacher)
    seen = []
    for k, network in enumerate((student, teacher)):
        with eval_mode(network), watch(network, [pair[k] for pair in pairs]) as outputs:
            network(image)
        seen.append({name: x.shape for name, x in outputs.items() if isinstance(x, Tensor)})
    return [(ours, theirs) for ours, theirs in pairs if ours in seen[0] and seen[0][ours] == seen[1].get(theirs)]


def stage_hints(student: nn.Module, teacher: nn.Module, image: Tensor, weight: float) -> Hints | None:
    """Hints between `stage_pairs`, with a weight; None where it is 0 or there are none."""
    pairs = stage_pairs(student, teacher, image) if weight else []
    return Hints(student, teacher, pairs, weight) if pairs else None


def hold_zeros(model: nn.Module) -> None:
    """Let no gradient reach the weights that are zero now: what was pruned stays so (decay of zero is zero too)."""
    for weight in model.parameters():
        kept = weight.detach() != 0
        if weight.dim() > 1 and not kept.all():
            weight.register_hook(partial(torch.mul, kept))


def check_length(stream: Any, steps: int) -> None:
    """Raise UserError where a stream ends before so many updates are done."""
    if isinstance(stream, SyntheticStream) and stream.num_batches is not None and stream.num_batches < steps:
        raise UserError(
            f"{steps} updates need as many batches, the stream has num_batches={stream.num_batches}; give it more, or "
            "leave num_batches out"
        )


class Fit:
    """A student in training: SGD with momentum and cosine schedule on a stream whose targets are teacher logits.

    On a stream with features it also learns, with the weight `features`, what the teachers' heads are given, which a
    linear map (dropped afterwards) is to find in what its own head is given; with hints, what they say: projected ones
    fade out as the learning rate does, since a small student cannot learn maps and logits to the end.
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
        check_length(stream, steps)
        if not any(parameter.requires_grad for parameter in student.parameters()):
            raise UserError(
                "the student has no parameter that learns; call student.requires_grad_(True) (a Teacher freezes the "
                "network it is made of: give it a copy)"
            )
        # In eval mode batch norms keep their statistics, the teacher's: a synthetic batch's would spoil them.
        self.student, self.stream, self.steps, self.hints = student.train(not hold_norms), stream, steps, hints
        self.clip = clip
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
        given = self.stream.watched_batch(step, watch=self.hints.watch_teacher if self.hints is not None else None)
        images = given[0]
        reseed(images.device, self.stream.seed, "student", self.stream.shard.rank, step)  # the same after a resume
        for group, rate in zip(self.optimizer.param_groups, self.rates):
            group["lr"] = rate * cosine(step, self.steps, self.warmup)
        if "maps" in self.project:
            self.ramp.fill_(cosine(step, self.steps, 0))
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
        projected = None
        with self.autocast():
            with norms, tap as seen, watched as ours:
                logits = self.prepared(images)
            if "features" in self.project:
                projected = self.project["features"](features_of(self.student, seen, logits))
            # A replayed image comes with no more than its targets.
            ours = [_First.apply(x, len(y)) if len(y) < len(x) else x for x, y in zip(ours, theirs)]
            if "maps" in self.project:
                ours = self.project["maps"](*ours)
        classes = targets.shape[1] - sum(self.stream.widths)
        if logits.shape != (len(targets), classes):
            shape = " x ".join(map(str, logits.shape[1:]))
            raise UserError(
                f"the student gives {shape} numbers an image and its teacher logits of {classes} classes; build the "
                f"student with {classes} outputs"
            )
        targets, features = targets.split([classes, sum(self.stream.widths)], 1)
        loss = self.loss(logits, targets, self.temperature)
        if projected is not None:
            widths = list(self.stream.widths)
            loss = loss + (self.weights * unexplained(projected.split(widths, 1), features.split(widths, 1))).sum()
        if self.hints is not None:
            loss = loss + self.ramp * self.hints.term(ours, theirs)
        return loss, (logits.detach().argmax(1) == targets.argmax(1)).float().mean()

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

    def run(self, start: int = 0) -> nn.Module:
        """All steps from `start`; returns the student in eval mode. torch's global generators are left as they were."""
        device = next(self.student.parameters()).device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            for step in range(start, self.steps):
                self.step(step)
        return self.student.eval()


def fit(student: nn.Module, stream: SyntheticStream, *, steps: int, **options: Any) -> nn.Module:
    """Train a student in place on a stream with a teacher (and maybe features), and return it in eval mode; options are
    those of Fit.

    The student is given images in [0, 1] as they are streamed: one with a normalisation of its own is wrapped in a
    dfkd.classifier.Classifier. A stream's set_epoch says which images. Raises UserError where the stream is none, is
    too short, has no teacher or one of other classes than the student's, or nothing in the student learns.
    """
    if not (isinstance(stream, SyntheticStream | Batches) and stream.teachers):
        raise UserError(
            "fit() takes a SyntheticStream with a teacher, whose logits the student learns; give it teacher="
        )
    if steps < 1:
        raise UserError(f"steps={steps} is not allowed; training takes 1 update or more")
    return Fit(student, stream, steps=steps, **options).run()
