"""Frozen teachers with their own normalisation and input size, a scoped tap on their batch norms, and the zoo."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from dfkd.classifier import Classifier, check_trainable, head, remedy_for
from dfkd.collectives import all_reduce_mean, global_moments
from dfkd.draws import STILL, Moves
from dfkd.errors import UserError, in_a_line
from dfkd.models import build_model
from dfkd.models.checkpoints import folder_about, not_finite
from dfkd.norms import Moments, frozen_norms
from dfkd.paging import Pager, in_turn
from dfkd.runtime import eval_mode, full_precision, rng, say

NO_FEATURES = "has no features: no linear layer at its end makes the logits of one vector an image"
MAP_LAYERS = 6  # neighbouring layers say much the same, and a deep teacher should not cost more than a shallow one


@dataclass
class BatchNormStatistics:
    """What the batch norms saw in one forward: per layer the moments [C] of this process's batch, and the stored."""

    batch: list[Moments] = field(default_factory=list)
    stored: list[Moments] = field(default_factory=list)

    def gather(self) -> list[Moments]:
        """The moments of the global batch, mean and biased variance [C] per layer, differentiable."""
        return global_moments(self.batch)


def batch_norms(model: nn.Module) -> dict[str, nn.Module]:
    """The layers with running statistics by name: torch's and timm's batch norms, synchronised or frozen too. Those of
    an instance norm are of single images."""
    return {
        name: module
        for name, module in model.named_modules()
        if not isinstance(module, _InstanceNorm)
        and isinstance(getattr(module, "running_mean", None), Tensor)
        and isinstance(getattr(module, "running_var", None), Tensor)
    }


def map_layers(model: nn.Module) -> list[nn.Module]:
    """Up to MAP_LAYERS layers spread evenly over the depth: batch norms, or convolutions where there is none."""
    layers = list(batch_norms(model).values()) or [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    count = min(MAP_LAYERS, len(layers))
    return [layers[(2 * k + 1) * len(layers) // (2 * count)] for k in range(count)]


class Teacher(Classifier):
    """A trained classifier, frozen: images [B, C, H, W] in [0, 1] -> logits [B, K] in float32.

    Wraps any nn.Module and freezes that very one: eval mode, no gradients (give a copy of what is to be trained). mean,
    std and input_size are those it was trained with, moves is how its training moved images at random, weight its share
    in the zoo's means. Where it has a pager, its network comes to the device when called.
    """

    pager: Pager | None = None

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str = "teacher",
        mean: Sequence[float] = (),
        std: Sequence[float] = (),
        input_size: int | None = None,
        moves: Moves = STILL,
        weight: float = 1.0,
    ) -> None:
        super().__init__(model, name=f"teacher {name}", mean=mean, std=std, input_size=input_size)
        self.name, self.moves, self.weight = name, moves, weight
        program = isinstance(model, torch.jit.ScriptModule)
        try:
            self.eval().requires_grad_(False)
        except NotImplementedError:  # of torch.export
            program = True
        if program:
            raise UserError(
                f"teacher {name} is a compiled or exported program, into whose layers nothing can look; give the "
                "Python module that it was made of"
            )

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in eval mode: a teacher is frozen, its batch norms included."""
        super().train(False)
        return self

    def forward(self, images: Tensor) -> Tensor:
        if self.pager is not None:
            self.pager.fetch(self.model)
        return super().forward(images)

    @contextmanager
    def tap(self) -> Iterator[BatchNormStatistics]:
        """Collect batch-norm input statistics of the forwards in its scope."""
        seen = BatchNormStatistics()

        def collect(norm: Any, moments: Moments) -> None:
            seen.batch.append(moments)
            # One number a channel, in whatever shape a layer of the user's own keeps it.
            seen.stored.append(
                (full_precision(norm.running_mean).flatten(), full_precision(norm.running_var).flatten())
            )

        with frozen_norms(batch_norms(self.model).values(), collect):
            yield seen

    def tap_means(self) -> AbstractContextManager[list[Tensor]]:
        """Collect what CMI tells images apart by: per batch norm the means over pixels [B, C] of its input."""
        return tap_inputs(
            batch_norms(self.model).values(),
            lambda _, x: full_precision(x).reshape(*x.shape[:2], -1).mean(2),  # [B, C] is one pixel
        )

    def tap_maps(self, look: Callable[[Tensor], Tensor]) -> AbstractContextManager[list[Tensor]]:
        """Collect look(maps) of the forwards in its scope, maps [B, C, ...] being the inputs of map_layers."""
        return tap_inputs(map_layers(self.model), lambda _, x: look(x) if x.dim() > 2 else None)


@contextmanager
def tap_inputs(layers: Iterable[nn.Module], look: Callable[[nn.Module, Tensor], Any]) -> Iterator[list[Any]]:
    """Collect look(layer, input) of every forward of some layers in its scope, None left out; no hook outlives it."""
    seen: list[Any] = []

    def collect(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if (found := look(layer, inputs[0])) is not None:
            seen.append(found)

    handles = [layer.register_forward_pre_hook(collect) for layer in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def tap_features(network: nn.Module) -> AbstractContextManager[list[Tensor]]:
    """Collect the features of a network's forwards in its scope: the input [B, D] of its last linear layer, if any."""
    last = head(network)
    return tap_inputs([] if last is None else [last], lambda _, x: full_precision(x.flatten(1)))


def features_of(network: nn.Module, seen: Sequence[Tensor], logits: Tensor) -> Tensor:
    """The features [B, D] of a forward that gave logits [B, K], of what tap_features saw in it. Raises UserError where
    they are none: where no head made all of the logits of one vector an image."""
    last = head(network)
    sizes = [(len(logits), last.in_features)] if last is not None and last.out_features == logits.shape[1] else []
    if not sizes or [tuple(x.shape) for x in seen] != sizes:
        raise UserError(
            f"{getattr(network, 'name', 'the network')} {NO_FEATURES}; set distill.features=0, in Python features=False"
        )
    return seen[0]


@torch.no_grad()
def have_features(networks: Mapping[str, nn.Module], image: Tensor, key: str) -> bool:
    """Whether all networks have features for an image [1, C, H, W]; says of the first that has none, and the key that
    would leave them out."""
    for name, network in networks.items():
        with eval_mode(network), tap_features(network) as seen:
            logits = network(image)
        try:
            features_of(network, seen, logits)
        except UserError:
            say(f"{name} {NO_FEATURES}, so none are learned, as with {key}=0")
            return False
    return True


def check_channels(zoo: Iterable[Teacher], channels: int) -> None:
    """Raise UserError where a teacher normalises images of another number of channels, in the forward a traceback."""
    for teacher in zoo:
        given = len(teacher.normalisation[0])
        if given not in (0, 1, channels):  # one value serves all
            raise UserError(
                f"teacher {teacher.name} has a mean of {given} channels, the images have {channels}; give mean and std "
                "one value for each"
            )


def check_teacher(teacher: Teacher, *, classes: int, channels: int, size: int, to_train: bool = False) -> None:
    """Raise UserError where a teacher's classes, output or weights do not suit the run, or one that is to be trained
    cannot be."""
    name, device = teacher.name, teacher.mean.device
    if broken := not_finite(teacher.model):
        raise UserError(
            f"teacher {name}: {broken[0]} holds NaN or infinity; give a sound checkpoint (teachers.{name}.weights)"
        )
    images = torch.rand(8, channels, size, size, generator=rng(device, "check"), device=device)
    answers: list[object] = []
    handle = teacher.model.register_forward_hook(lambda network, given, answer: answers.append(answer))
    try:
        with torch.no_grad():
            logits = teacher(images)
    except Exception as error:  # whatever a stranger's network may raise
        if answers and not isinstance(answers[0], Tensor):
            raise UserError(
                f"teacher {name} gives a {type(answers[0]).__name__} where logits [B, {classes}] belong; give a model "
                "whose forward returns them alone"
            ) from None
        reason = in_a_line(error)
        remedy = remedy_for(reason, f"set teachers.{name}.input_size, image.size or image.channels")
        raise UserError(
            f"teacher {name} does not take images [B, {channels}, {size}, {size}]: {reason}; {remedy}"
        ) from None
    finally:
        handle.remove()
    if logits.dim() != 2 or logits.shape[1] != classes:
        raise UserError(
            f"teacher {name} gives {tuple(logits.shape[1:])} outputs where classes={classes}; make them agree"
        )
    if (logits >= 0).all() and torch.allclose(logits.sum(1), torch.ones(8, device=device), atol=1e-3):
        raise UserError(f"teacher {name} ends in a softmax (its outputs sum to one); give the network without it")
    if to_train:
        check_trainable(teacher, images, f"teacher {name}")


SPEC = {"model", "weights", "mean", "std", "input_size", "moves", "weight", "kwargs"}  # keys of a teacher in load_zoo
KEPT = ("mean", "std", "input_size")  # what the folder of a trained model tells, besides how training moved images


def load_zoo(
    specs: Mapping[str, Mapping[str, Any]],
    *,
    classes: int,
    channels: int = 3,
    size: int = 32,
    device: torch.device | str = "cpu",
    channels_last: bool = False,
    trust_code: bool = False,
    memory_gb: float = 0.0,
    untrained: bool = False,
) -> list[Teacher]:
    """The teachers of `{name: {model, weights, mean, std, input_size, moves, weight, kwargs}}`, checked and frozen.

    model and weights are as in a recipe; moves, a dfkd.draws.Moves, stands for its pad and flip. What weights that are
    the folder of a trained model tell of mean, std, input_size and moves (for images of `size` as far in proportion)
    holds where the spec says nothing else.
    With memory_gb their networks are on the host, and on the device as many as so many GB (10^9 bytes) hold; with
    untrained those without weights keep random ones. Raises UserError for an unknown key, no weights, a model,
    checkpoint, class count or output that does not fit (see check_teacher), or where one takes more than memory_gb.
    """
    zoo = []
    pager = Pager(torch.device(device), memory_gb * 1e9) if memory_gb else None
    for name, spec in specs.items():
        check_spec(name, spec, untrained)
        try:
            model = build_model(
                spec["model"],
                classes=classes,
                channels=channels,
                weights=spec.get("weights", ""),
                kwargs=spec.get("kwargs"),
                trust_code=trust_code,
            )
        except UserError as error:
            raise UserError(f"teachers.{name}: {error}") from error
        about = folder_about(spec.get("weights", ""))
        kept = {key: about[key] for key in KEPT if about.get(key)}
        if kept.get("input_size") == size:  # images of another size are then meant to be seen so (synthesis.coarse)
            del kept["input_size"]
        own = {key: spec[key] for key in KEPT if spec.get(key) is not None and torch.as_tensor(spec[key]).numel()}
        moves = spec.get("moves") or kept_moves(about, size)
        teacher = Teacher(model, name=name, moves=moves, weight=spec.get("weight", 1.0), **kept | own)
        if channels_last:
            teacher.to(memory_format=torch.channels_last)
        if pager is None:
            teacher.to(device)
        else:
            teacher.mean, teacher.std = teacher.mean.to(device), teacher.std.to(device)
            pager.add(teacher.model, name)
            teacher.pager = pager
        to_train = not spec.get("weights")
        check_teacher(teacher, classes=classes, channels=channels, size=size, to_train=to_train)
        zoo.append(teacher)
    return zoo


def kept_moves(about: Mapping[str, Any], size: int) -> Moves:
    """How a model.json says that training moved images at random, in pixels of images of `size`."""
    moves = Moves(*about.get("moves", STILL))
    return moves._replace(shift=round(moves.shift * size / about.get("size", size)))


def check_spec(name: str, spec: object, untrained: bool) -> None:
    """Raise UserError where what describes a teacher is no mapping of SPEC, or gives it no weights."""
    if not isinstance(spec, Mapping) or not isinstance(spec.get("model", ""), str):
        given = type(spec["model"] if isinstance(spec, Mapping) else spec).__name__
        raise UserError(
            f"teachers.{name} is given as a {given}; give a mapping such as {{'model': 'timm:resnet18', 'weights': "
            "PATH}, or for a module of your own put Teacher(module, name=...) into the zoo, which is a list"
        )
    unknown = sorted({*spec} - SPEC)
    if "model" not in spec or unknown:
        wrong = f"has unknown keys {unknown}" if unknown else "has no model"
        raise UserError(f"teachers.{name} {wrong}; allowed are {', '.join(sorted(SPEC))}")
    if not (spec.get("weights") or untrained):
        raise UserError(
            f"teachers.{name} has no weights; give a path, a URL or pretrained (untrained=True leaves it random: to "
            "measure time or memory)"
        )


def sample_teachers(zoo: Sequence[Teacher], count: int, seed: int, step: int) -> list[Teacher]:
    """m' of the M teachers for a generator step, the same on every process (MixMix section 4.1)."""
    if count >= len(zoo):
        return list(zoo)
    order = torch.randperm(len(zoo), generator=rng("cpu", seed, "teachers", step)).tolist()
    return [zoo[k] for k in sorted(order[:count])]


def zoo_logits(zoo: Sequence[Teacher], images: Tensor) -> Tensor:
    """The zoo's weighted mean logits [B, K], each teacher's first standardised to unit spread and then scaled back by
    the mean spread, so that no teacher counts more for shouting louder. Raises UserError where they have other classes.
    """
    if len(zoo) == 1:
        return zoo[0](images)
    shares = shares_of(zoo)
    logits = [teacher(images) for teacher in in_turn(zoo)]
    if len({each.shape for each in logits}) > 1:
        given = ", ".join(f"{teacher.name} {each.shape[1]}" for teacher, each in zip(zoo, logits))
        raise UserError(f"teachers of other numbers of classes have no mean logits: {given}")
    spreads = all_reduce_mean(torch.stack([each.std(dim=1).mean() for each in logits])).clamp_min(1e-6)
    spread = sum(share * each for share, each in zip(shares, spreads))
    return torch.stack([share * each / s for share, each, s in zip(shares, logits, spreads)]).sum(0) * spread


def shares_of(zoo: Sequence[Teacher]) -> list[float]:
    """Each teacher's share in the zoo's means, by weight; a single one's is 1 whatever its weight."""
    total = sum(teacher.weight for teacher in zoo)
    if len(zoo) > 1 and total <= 0:
        raise UserError(
            f"the weights of {', '.join(each.name for each in zoo)} sum to {total:g}; give one a weight above 0"
        )
    return [teacher.weight / total for teacher in zoo] if len(zoo) > 1 else [1.0]


def logits_and_features(zoo: Sequence[Teacher], images: Tensor) -> Tensor:
    """The zoo's mean logits, and behind them every teacher's features [B, K + D + ...], float32. Raises UserError where
    a teacher has none."""
    with ExitStack() as stack:
        taps = [stack.enter_context(tap_features(teacher)) for teacher in zoo]
        logits = zoo_logits(zoo, images)
    features = [features_of(teacher, seen, logits) for teacher, seen in zip(zoo, taps)]
    return torch.cat([logits, *features], 1)
