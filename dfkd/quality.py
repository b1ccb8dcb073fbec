"""How good images are, in the eyes of given teachers: no network from elsewhere is needed, no real image to compare."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dfkd.draws import draw_moves, moved
from dfkd.errors import UserError
from dfkd.evaluate import diversity, refuse_broken, wilson
from dfkd.losses import bn_kl, bn_l2
from dfkd.norms import Moments
from dfkd.runtime import Shard, to_bytes, to_float
from dfkd.teachers import Teacher, tap_features

NEAR = 0.05  # a neighbour nearer than this share of the mean distance of all pairs is a near-duplicate
SAME = 1e-6  # float32 points whose distance is below this share of their length are one point
BLOCK = 1024  # points: the distances of BLOCK x BLOCK pairs are held at a time


class Quality(NamedTuple):
    """Figures of N images, and the classes [N] that they were grouped by."""

    figures: dict[str, Any]
    classes: Tensor


class View(NamedTuple):
    """What a teacher makes of N images, on the CPU: logits [N, K], features [N, D] of a layer, and the moments [C] of
    what its batch norms saw in all N, moved as its training moved images, float64, beside the stored ones."""

    logits: Tensor
    features: Tensor
    layer: str
    batch: list[Moments]
    stored: list[Moments]


@torch.no_grad()
def quality(
    images: Tensor,
    labels: Tensor | None,
    zoo: Sequence[Teacher],
    *,
    features: str | None = None,
    batch_size: int = 256,
) -> Quality:
    """Figures of images [N, C, H, W], uint8 or float in [0, 1], with labels int64 [N] in [0, K) or None.

    `teachers`: by name what judgement() says, and `moves`: the shift, flip and black of draws.Moves by which the images
    were moved for its batch-norm figures; `accuracy`: over_teachers(); `class_balance` of the labels; `diversity`:
    of pixels and of the features of the teacher named `features` (the first where None) what distances() and
    evaluate.diversity() say, by class: by label, or where there is none by what that teacher sees;
    `exact_duplicates`, percent. Deterministic, no collective. Raises UserError where the images or labels will not do
    or a logit is NaN or infinite.
    """
    name = features or zoo[0].name
    _check(images, labels, zoo, name)
    views = {teacher.name: look(teacher, images, batch_size) for teacher in zoo}
    teachers = {t.name: {**judgement(views[t.name], labels, t.name), "moves": list(t.moves)} for t in zoo}
    eyes = views[name]
    classes = eyes.logits.argmax(1) if labels is None else labels.cpu()
    pixels = to_float(images).cpu()
    figures = {
        "images": len(images),
        "teachers": teachers,
        "accuracy": over_teachers([each["accuracy"] for each in teachers.values()]),
        "class_balance": None if labels is None else balance(classes, eyes.logits.shape[1]),
        "classes": f"predictions of teacher {name}" if labels is None else "labels",
        "features": {"teacher": name, "layer": eyes.layer, "size": eyes.features.shape[1]},
        "diversity": differences(pixels, eyes.features, classes, eyes.logits.shape[1], zoo[0].mean.device),
        "exact_duplicates": exact_duplicates(pixels),
    }
    return Quality(figures, classes)


def _check(images: Tensor, labels: Tensor | None, zoo: Sequence[Teacher], features: str) -> None:
    """Raise UserError where the arguments of quality will not do; `features` is the name of a teacher."""
    if images.dim() != 4 or len(images) < 2:
        raise UserError(f"images are {tuple(images.shape)}; give [N, C, H, W] with N of 2 or more")
    if images.is_floating_point() and not (images.min() >= 0 and images.max() <= 1):  # NaN is neither
        raise UserError(f"pixels run from {images.min():.4g} to {images.max():.4g}; give images in [0, 1], or uint8")
    if labels is not None and labels.shape != (len(images),):
        raise UserError(f"labels are {tuple(labels.shape)} for {len(images)} images; give one each, or None")
    names = [teacher.name for teacher in zoo]
    if features not in names:
        raise UserError(f"no teacher {features!r} to take features of; choose from {', '.join(names)}")


def look(teacher: Teacher, images: Tensor, batch_size: int = 256) -> View:
    """Show a teacher images [N, C, H, W], batch by batch, and for the moments again, moved as in its training. Its
    features are the input of its last linear layer, or its logits where it has none."""
    logits, features, moments = [], [], []
    counts: list[int] = []
    stored: list[Moments] = []
    layer = "logits"
    parts = math.ceil(len(images) / batch_size)  # even: one image alone may have no variance
    draws = draw_moves(Shard(teacher.mean.device), len(images), "quality").tensor_split(parts)
    for batch, u in zip(images.tensor_split(parts), draws):
        shown = to_float(batch.to(teacher.mean.device))
        with teacher.tap() as seen, tap_features(teacher) as tapped:
            logits.append(teacher(shown).cpu())
        features.append(tapped[-1].cpu() if tapped else logits[-1])
        layer = "penultimate layer" if tapped else layer
        if seen.batch and not teacher.moves.still:
            with teacher.tap() as seen:
                teacher(moved(shown, u.to(shown.device), teacher.moves))
        moments.append([_double(each) for each in seen.batch])
        stored = [_double(each) for each in seen.stored]
        counts.append(len(batch))
    return View(torch.cat(logits), torch.cat(features), layer, pooled(moments, counts), stored)


def _double(moments: Moments) -> Moments:
    mean, var = moments
    return mean.double().cpu(), var.double().cpu()


def pooled(parts: Sequence[Sequence[Moments]], counts: Sequence[int]) -> list[Moments]:
    """The moments [C] per layer of all images, from those of batches of `counts` images: law of total variance."""
    share = torch.tensor(counts, dtype=torch.float64) / sum(counts)
    whole = []
    for layer in zip(*parts):
        means, variances = (torch.stack(each) for each in zip(*layer))  # [batches, C]
        mean = share @ means
        whole.append((mean, share @ (variances + (means - mean).square())))
    return whole


def judgement(view: View, labels: Tensor | None, name: str) -> dict[str, Any]:
    """One teacher's figures: `accuracy` on the images' own labels with its Wilson 95 % `interval` (None without
    labels) and mean `confidence`, percent; `class_balance` of its predictions, 0 (one class) to 1 (all alike).

    Of images moved as in training, None without batch norms: `bn_l2`, MixMix eq. 2 over all images; `bn_kl`, its KL in
    nats, the mean over channels of all layers: the similarity measure of The Knowledge Within (Haroush et al. 2020),
    section 3.2.
    """
    refuse_broken([~view.logits.isfinite().all(1)], f"teacher {name}'s")
    n, count = view.logits.shape
    if labels is not None and not ((labels >= 0) & (labels < count)).all():
        raise UserError(
            f"labels run from {int(labels.min())} to {int(labels.max())}; those of teacher {name} from 0 to {count - 1}"
        )
    guesses = view.logits.argmax(1)
    hits = None if labels is None else int((guesses == labels.cpu()).sum())
    channels = sum(len(mean) for mean, _ in view.batch)
    return {
        "accuracy": None if hits is None else 100 * hits / n,
        "interval": None if hits is None else list(wilson(hits, n)),
        "confidence": 100 * view.logits.double().softmax(1).amax(1).mean().item(),
        "class_balance": balance(guesses, count),
        "bn_l2": bn_l2(view.batch, view.stored).item() if channels else None,
        "bn_kl": bn_kl(view.batch, view.stored).item() / channels if channels else None,
    }


def balance(classes: Tensor, count: int) -> float:
    """Entropy of classes [N] in [0, count) over log(count): 1 where all are equally frequent, 0 for one alone."""
    share = classes.bincount(minlength=count).double() / len(classes)
    return torch.special.entr(share).sum().item() / math.log(count)


def over_teachers(accuracies: Sequence[float | None]) -> dict[str, float] | None:
    """Mean accuracy over the teachers with its spread (standard deviation of just these, least, greatest), percent."""
    known = torch.tensor([each for each in accuracies if each is not None], dtype=torch.float64)
    if not len(known):
        return None
    spread = {"std": known.std(correction=0), "min": known.min(), "max": known.max()}
    return {"mean": known.mean().item(), **{key: value.item() for key, value in spread.items()}}


def differences(
    images: Tensor, features: Tensor, classes: Tensor, count: int, device: torch.device
) -> dict[str, dict[str, float | None]]:
    """How much images [N, C, H, W] and their features [N, D] differ, by class of classes [N] in [0, count): by `pixel`
    and `feature` what distances() and evaluate.diversity() say, of features also cosine_distances()."""
    spread = diversity(images, features, classes, classes=count)
    return {
        kind: {
            **{key: spread[f"{kind}_{key}"].item() for key in ("within", "between", "ratio")},
            **distances(points.flatten(1).to(device), classes.to(device)),
            **(cosine_distances(points, classes) if kind == "feature" else {}),
        }
        for kind, points in (("pixel", images), ("feature", features))
    }


def distances(points: Tensor, classes: Tensor, block: int = BLOCK) -> dict[str, float | None]:
    """Euclidean distances of points [N, D] in classes [N], float64: `mean_distance` over all pairs, `mean_within`
    over those of one class (None where there is none), `nearest`: the mean over points to their nearest neighbour.

    `near_duplicates`, percent: points with a neighbour within NEAR of the mean distance. Not of the median, which is 0
    where the points have collapsed into one more often than not. Takes N^2 D steps and memory for block^2 pairs.
    """
    floor = SAME**2 * points.square().sum(1, dtype=torch.float64).mean()
    points = points - points.mean(0, dtype=torch.float64).to(points.dtype)  # squares of small numbers cancel less
    nearest = torch.full((len(points),), math.inf, dtype=torch.float64, device=points.device)
    total = within = pairs = torch.zeros((), dtype=torch.float64, device=points.device)
    rows = torch.arange(len(points), device=points.device).split(block)
    for here in rows:
        for there in rows:
            apart = _between(points[here].double(), points[there].double(), floor)
            alike = (classes[here, None] == classes[there]) & (here[:, None] != there)
            total, within, pairs = total + apart.sum(), within + (apart * alike).sum(), pairs + alike.sum()
            others = apart.masked_fill(here[:, None] == there, math.inf)
            nearest[here] = torch.minimum(nearest[here], others.amin(1))
    mean = total / (len(points) * (len(points) - 1))
    return {
        "mean_distance": mean.item(),
        "mean_within": (within / pairs).item() if pairs else None,
        "nearest": nearest.mean().item(),
        "near_duplicates": 100 * (nearest <= NEAR * mean).double().mean().item(),
    }


def _between(one: Tensor, two: Tensor, floor: Tensor) -> Tensor:
    """Distances [A, B] of points [A, D] and [B, D]; squares below `floor` are rounding, and 0."""
    square = one.square().sum(1)[:, None] + two.square().sum(1) - 2 * one @ two.T
    return torch.where(square > floor, square, 0).sqrt()


def cosine_distances(points: Tensor, classes: Tensor) -> dict[str, float | None]:
    """1 - cosine of points [N, D], 0 (alike) to 2: the mean over all pairs and over pairs of one class of classes [N].

    The sum of all pairs' dot products is that of the sum with itself, less the points' own: no pair is looked at.
    """
    directions = F.normalize(points.double(), dim=1)
    own = directions.square().sum(1)  # 1, or 0 for a point at the origin
    member = F.one_hot(classes).double()  # [N, K]
    counts, sums = member.sum(0), member.T @ directions
    pairs, alike = len(points) * (len(points) - 1), (counts * (counts - 1)).sum()
    within = sums.square().sum() - own.sum()
    return {
        "mean_cosine": 1 - ((directions.sum(0).square().sum() - own.sum()) / pairs).item(),
        "mean_cosine_within": 1 - (within / alike).item() if alike else None,
    }


def exact_duplicates(images: Tensor) -> float:
    """Percent of images [N, ...] in [0, 1] that equal another in 8 bits, as they would in a file."""
    counts = Counter(image.numpy().tobytes() for image in to_bytes(images))
    return 100 * sum(count for count in counts.values() if count > 1) / len(images)
