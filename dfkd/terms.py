"""The generator's losses by name: one table of what a teacher is asked, one of what the images are asked."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dfkd import losses as L
from dfkd.collectives import all_reduce_mean
from dfkd.contrast import Contrast
from dfkd.errors import UserError
from dfkd.mixing import Mixed
from dfkd.norms import frozen_norms
from dfkd.runtime import Autocast
from dfkd.teachers import BatchNormStatistics, Teacher, batch_norms, check_channels, tap_features
from generators import ImageGenerator, PixelGenerator

UNUSED = (
    "the forward of teacher {} calls none of its batch norms; set synthesis.losses.{}=0 (synthesis.losses.ce and "
    ".adversary need none), or give another teacher"
)


@dataclass(frozen=True)
class Manner:
    """How the terms are taken: distances by name, and whether the adversary is masked."""

    bn_distance: str
    adversary_loss: str
    adversary_mask: bool


@dataclass
class Answer:
    """What one teacher makes of a batch of (mixed) images, as far as the wanted terms ask for it."""

    mixed: Mixed
    manner: Manner
    logits: Tensor
    bn: Tensor | None = None
    features: list[Tensor] = field(default_factory=list)
    likeness: list[Tensor] = field(default_factory=list)
    student: Tensor | None = None
    contrastive: Tensor | None = None


def _probabilities(answer: Answer) -> Tensor:
    return answer.logits.softmax(1)


TEACHER_TERMS: dict[str, Callable[[Answer], Tensor | None]] = {
    "ce": lambda a: L.mixed_ce(a.logits, a.mixed.labels, a.mixed.other, a.mixed.beta),
    "bn": lambda a: a.bn,
    "adversary": lambda a: (
        None
        if a.student is None
        else -L.masked_divergence(a.student, a.logits, a.manner.adversary_loss, a.manner.adversary_mask)
    ),
    "one_hot": lambda a: L.one_hot(a.logits),
    "activation": lambda a: L.activation(a.features[-1]),
    "information": lambda a: L.information(all_reduce_mean(_probabilities(a).mean(0))),
    "likeness": lambda a: torch.stack(a.likeness).mean(),
    "spread": lambda a: L.spread(a.mixed.images, _probabilities(a)),
    "contrastive": lambda a: a.contrastive,
}
IMAGE_TERMS: dict[str, Callable[[Tensor, Tensor, Tensor, Teacher], Tensor]] = {  # of images, latents, labels
    "diversity": lambda images, latents, labels, teacher: L.mode_seeking(images, latents, labels),
    "tv": lambda images, latents, labels, teacher: L.total_variation(images),
    "l2": lambda images, latents, labels, teacher: L.pixel_l2(images, teacher.mean, teacher.std),
    "smooth": lambda images, latents, labels, teacher: L.smooth(images),
}


def ask(
    teacher: Teacher,
    mixed: Mixed,
    wanted: Mapping[str, float],
    manner: Manner,
    autocast: Autocast,
    contrast: Contrast | None = None,
    position: tuple[int | str, ...] = (),
) -> Answer:
    """One forward of a teacher over mixed images [B, C, H, W], tapped for the wanted terms."""
    with ExitStack() as stack:
        statistics = stack.enter_context(
            teacher.tap() if "bn" in wanted else frozen_norms(batch_norms(teacher.model).values())
        )
        features = stack.enter_context(tap_features(teacher)) if "activation" in wanted else []
        likeness: list[Tensor] = []
        if "likeness" in wanted:
            likeness = stack.enter_context(teacher.tap_maps(lambda maps: L.likeness(maps, mixed.labels)))
        means = stack.enter_context(teacher.tap_means()) if contrast is not None else []
        stack.enter_context(autocast())
        logits = teacher(mixed.images)
    if "likeness" in wanted and not likeness:
        raise UserError(f"teacher {teacher.name} has no feature maps; set synthesis.losses.likeness=0")
    if "activation" in wanted and not features:
        raise UserError(
            f"teacher {teacher.name} does not use its last linear layer, so there are no features to read; set "
            "synthesis.losses.activation=0"
        )
    answer = Answer(mixed, manner, logits, features=features, likeness=likeness)
    if statistics is not None:
        answer.bn = bn_loss(teacher, statistics, manner.bn_distance)
    if contrast is not None:
        with autocast():
            answer.contrastive = contrast(teacher, mixed.images, means, *position)
    return answer


def bn_loss(teacher: Teacher, statistics: BatchNormStatistics, distance: str) -> Tensor:
    """The distance, by its name in BN_DISTANCES, of what a teacher's batch norms saw from what they have stored. Raises
    UserError where they saw nothing: a norm may stand in a network and serve its training alone."""
    if not statistics.batch:
        raise UserError(UNUSED.format(teacher.name, "bn"))
    return L.BN_DISTANCES[distance](statistics.gather(), statistics.stored)


def teacher_terms(answer: Answer, wanted: Mapping[str, float]) -> dict[str, Tensor]:
    """The wanted terms of one teacher, unweighted float32 scalars; what does not apply is left out."""
    found = {name: term(answer) for name, term in TEACHER_TERMS.items() if name in wanted}
    return _scalars({name: value for name, value in found.items() if value is not None})


def image_terms(
    images: Tensor, latents: Tensor, labels: Tensor, teacher: Teacher, wanted: Mapping[str, float]
) -> dict[str, Tensor]:
    """The wanted terms of images [B, C, H, W] themselves; the teacher gives the normalisation."""
    return _scalars(
        {name: term(images, latents, labels, teacher) for name, term in IMAGE_TERMS.items() if name in wanted}
    )


def _scalars(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    """The terms. Raises UserError where one of a user's own is no scalar."""
    for name, value in terms.items():
        if not isinstance(value, Tensor) or value.dim():
            given = list(value.shape) if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise UserError(f"the term {name} gives {given}; a term is a tensor of one number: take the mean")
    return terms


def check_losses(
    losses: Mapping[str, float],
    zoo: Sequence[Teacher],
    student: nn.Module | None,
    generator: ImageGenerator | None = None,
    bank: int = 0,
) -> None:
    """Raise UserError for loss weights by name that no table has, that are below 0, that contradict each other, or that
    these teachers and this generator cannot serve."""
    known = [*TEACHER_TERMS, *IMAGE_TERMS]
    if unknown := sorted(set(losses) - set(known)):
        raise UserError(f"unknown generator losses {unknown}; choose from {known}")
    if isinstance(zoo, nn.Module) or not len(zoo) or not all(isinstance(teacher, Teacher) for teacher in zoo):
        raise UserError(
            "a zoo is a list of one dfkd.Teacher or more: [Teacher(network, name=..., mean=..., std=...), ...]"
        )
    if generator is not None:
        check_channels(zoo, generator.channels)
    if below := sorted(name for name, weight in losses.items() if weight < 0):
        raise UserError(
            f"the weight of {below[0]} is {losses[below[0]]:g}; give 0 or more (the terms have their signs)"
        )
    if losses.get("adversary") and student is None:
        raise UserError(
            "synthesis.losses.adversary needs a student to disagree with; set student.model or its weight to 0"
        )
    if not any(losses.get(name) for name in TEACHER_TERMS):
        wanted = ", ".join(f"synthesis.losses.{name}" for name in TEACHER_TERMS)
        raise UserError(f"no loss asks a teacher anything; give one of {wanted} some weight")
    if bool(losses.get("contrastive")) != bool(bank):
        raise UserError(
            f"synthesis.losses.contrastive={losses.get('contrastive', 0):g} and synthesis.bank={bank} go together: "
            "the term contrasts images with the bank's; give both or none"
        )
    if losses.get("contrastive") and len(zoo) > 1:
        raise UserError(
            f"synthesis.losses.contrastive reads the features of one teacher, the zoo has "
            f"{', '.join(teacher.name for teacher in zoo)}; disable the others or set its weight to 0"
        )
    if losses.get("diversity") and isinstance(generator, PixelGenerator):
        raise UserError(
            "synthesis.losses.diversity asks what latents make of images, and with generator.arch=pixels they are the "
            "images; set its weight to 0"
        )
    labelled = [name for name in ("ce", "diversity", "likeness") if losses.get(name)]
    unlabelled = generator is not None and not generator.conditional and not isinstance(generator, PixelGenerator)
    if labelled and unlabelled:
        raise UserError(
            f"the generator draws no class on request (conditional=False), which {', '.join(labelled)} would need; set "
            "their weights to 0, and give one_hot and information some (DAFL)"
        )
    if len({teacher.name for teacher in zoo}) < len(zoo):
        raise UserError(f"teachers need names of their own, got {[teacher.name for teacher in zoo]}")
    for teacher in zoo:
        for name in ("bn", "contrastive"):
            if losses.get(name) and not batch_norms(teacher.model):
                raise UserError(
                    f"teacher {teacher.name} has no batch norm; set synthesis.losses.{name}=0 (synthesis.losses.ce and "
                    ".adversary need none), or give a teacher with batch norm"
                )
        if losses.get("activation") and not any(isinstance(module, nn.Linear) for module in teacher.modules()):
            raise UserError(
                f"teacher {teacher.name} has no linear layer to read features from; set synthesis.losses.activation=0"
            )
