"""What looks wrong in a run and what to do about it: asked while it trains, and once more at its end."""

import math
import statistics
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from dfkd.evaluate import wilson
from generators import ImageGenerator, PixelGenerator, PoolGenerator

FEW_CLASSES = 0.5  # entropy of the classes that a teacher sees, over that of balanced ones
ALIKE = 0.1  # spread of a teacher's features within classes over that between them; real CIFAR-10 images have 0.56
UNSEEN, DISAGREES = 50.0, 80.0  # % of the images
UNMATCHED = 0.7  # batch-norm loss over its value at the start
FALLEN = 0.5  # agreement of the student over the best it had
NEWEST = 0.2  # share of a moving mean that is the newest value's
UNCLEAR = 15.0  # points above chance that few images leave open
LOST = 10.0  # points below what it was made from at which a model is told of
SWING = 5.0  # points by which the last quarter of training may fall below its mean
# What to do where a task does worse than rounding or cutting alone.
ADDED = {
    "qat": "lower qat.lr or raise qat.steps",
    "ptq": "raise ptq.images or ptq.steps",
    "prune": "lower prune.lr, or raise prune.images or prune.steps",
    "udfc": "set udfc.method=rectified, lower udfc.ratio or raise udfc.bits",
}
# Shares of the generator's steps before which a thing is not asked; layers are drawn anew up to 80 %.
SETTLED, HALFWAY, LATE = 0.25, 0.5, 0.9


def generator_notes(
    generator: ImageGenerator,
    figures: Mapping[str, float],
    bn: Mapping[str, tuple[float, float]],
    progress: float = 1.0,
) -> dict[str, str]:
    """By name what looks wrong with a generator: figures are those of training.look (or look_at_all), bn the
    batch-norm loss of each teacher at the start and now, progress the share of its steps that are done."""
    notes = dict[str, str]()
    if isinstance(generator, PixelGenerator):  # noise, which nothing trained
        return notes
    pooled = isinstance(generator, PoolGenerator)
    rate = "synthesis.lr (of pixels synthesis.latent_lr)" if pooled else "synthesis.lr"
    seen = {name.partition("_agreement_")[2]: figures[name] for name in figures if name.startswith("class_agreement_")}
    for name, percent in seen.items() if progress >= SETTLED else ():
        balance = figures[f"predicted_balance_{name}"]
        if balance < FEW_CLASSES:
            remedy = "ce" if generator.conditional else "information"
            notes[f"collapse {name}"] = (
                f"teacher {name} sees hardly more than a few classes in the images (balance {balance:.2f} of 1), the "
                f"generator has collapsed: raise synthesis.losses.{remedy} or lower {rate}"
            )
        elif progress >= LATE and generator.conditional and percent < UNSEEN:
            notes[f"class {name}"] = (
                f"teacher {name} sees the asked class in {percent:.0f} % of the images: raise synthesis.losses.ce or "
                "synthesis.steps, or lower synthesis.losses.diversity"
            )
    if progress >= SETTLED and figures["feature_ratio"] < ALIKE and generator.conditional:
        remedy = "latent_lr or .jitter" if pooled else "losses.diversity or generator.prototypes"
        notes["alike"] = (
            f"the images of a class hardly differ (the generator ignores its latents): raise synthesis.{remedy}"
        )
    for name, (start, end) in bn.items() if progress >= HALFWAY else ():
        if end > UNMATCHED * start:
            notes[f"statistics {name}"] = (
                f"the batch-norm statistics of teacher {name} do not fit ({start:.3g} -> {end:.3g}): raise "
                f"synthesis.losses.bn or {'.inner' if pooled else '.steps'}, or check its mean and std"
            )
    return notes


def teacher_notes(name: str, labels: Tensor, guesses: Tensor, classes: Sequence[str]) -> dict[str, str]:
    """By name what looks wrong with a teacher, of the classes [N] that it names for test images and their labels [N]:
    that it knows the classes in another order, or does not do better than chance."""
    n, counts = len(labels), Counter(zip(labels.tolist(), guesses.tolist()))
    of_class, guessed = Counter(labels.tolist()), Counter(guesses.tolist())
    usual: dict[int, int] = {}  # what it calls most images of each class
    for (label, guess), _ in counts.most_common():
        usual.setdefault(label, guess)
    right = sum(counts[label, label] for label in of_class)
    renamed = sum(counts[label, guess] for label, guess in usual.items())
    apart = len(set(usual.values())) > 0.9 * len(usual)
    if n >= 10 * len(classes) and apart and renamed > max(right + 0.2 * n, 0.5 * n):
        label, output = next((label, guess) for label, guess in sorted(usual.items()) if label != guess)
        text = (
            f"teacher {name} has {100 * right / n:.0f} % of {n} test images, and {100 * renamed / n:.0f} % where its "
            f"outputs stand for the classes in another order (output {output} for {classes[label]!r}, which is class "
            f"{label} here): the folders of data.root in alphabetical order are to be its outputs in theirs"
        )
        return {f"order {name}": text}
    chance = 100 * sum(of_class[label] / n * guessed[label] / n for label in of_class)
    low, high = wilson(right, n)
    if low <= chance and high < chance + UNCLEAR and len(classes) > 1:
        text = (
            f"teacher {name} has {100 * right / n:.1f} % of {n} test images, no more than by chance: check its "
            "weights, its mean and std, and that the images' classes are its own, in the order of its outputs"
        )
        return {f"chance {name}": text}
    return {}


def moving_mean(mean: float | None, now: float) -> float:
    """A figure's mean over the last few lines logged (None: none yet): a batch that is hard is no fall."""
    return now if mean is None else mean + NEWEST * (now - mean)


def student_notes(agreement: float, best: float) -> dict[str, str]:
    """By name what looks wrong with a student in training: the moving mean of its agreement with the teacher, of 1, now
    and at best."""
    if agreement >= FALLEN * best:
        return {}
    text = (
        f"the student's agreement with its teacher fell from {100 * best:.0f} to {100 * agreement:.0f} %: lower "
        "distill.lr or synthesis.losses.adversary, or raise distill.replay"
    )
    return {"student": text}


def last_quarter(evaluations: Sequence[Mapping[str, Any]], last: int, first: int = 0) -> dict[str, Any] | None:
    """Mean, sample deviation and lowest of a student's figures over the last quarter of its training, which begins
    after loop step `first` and ends with `last`, in percent; None where it was not measured then. evaluations are
    {step, accuracy or agreement, images} each."""
    late = min(last - 1, first + math.ceil(0.75 * (last - first)))
    evaluations = [entry for entry in evaluations if late < entry["step"] <= last]
    if not evaluations:
        return None
    of = "accuracy" if "accuracy" in evaluations[-1] else "agreement"
    values = [entry[of] for entry in evaluations if of in entry]
    return {
        "of": of,
        "mean": statistics.fmean(values),
        "deviation": statistics.stdev(values) if len(values) > 1 else None,
        "lowest": min(values),
        "evaluations": len(values),
        "images": int(evaluations[-1]["images"]),
    }


def verdict(
    results: Mapping[str, Any],
    notes: Mapping[str, str],
    warnings: Sequence[Mapping[str, Any]],
    learned: Collection[str] = (),
) -> dict[str, Any]:
    """Whether a run looks sound at its end: notes on its generator, and what its results say of tasks and student;
    beside them, as `warnings`, what looked wrong on the way. learned names the teachers that the student learned from
    (none: all)."""
    found, student = list(notes.values()), results["student"]
    made = {f"task {name}": task for name, task in results["tasks"].items()} | {"the student": student or {}}
    for title, each in made.items():
        exported = each.get("export") or {}
        if error := exported.get("error"):
            found.append(f"{title} is not exported: {error}")
        agree = exported.get("agreement")
        if agree is not None and agree < 99.5:
            found.append(
                f"the file of {title} agrees with torch on {agree:.1f} % of images: look at it before deploying"
            )
    for name, task in results["tasks"].items():
        if error := task.get("not_loaded"):
            found.append(f"task {name} cannot be loaded again: {error}; report this as a bug")
        agreement = task.get("agreement") or {}
        naive, repaired, after = (agreement.get(which) for which in ("naive", "repaired", "after"))
        made_for = task.get("source") in (None, "generator", "no data")  # not for other images, as a control is
        if made_for and naive and after and after["interval"][1] < naive["interval"][0]:
            found.append(
                f"task {name} agrees with the network before on {after['percent']:.1f} % of synthetic images, and on "
                f"{naive['percent']:.1f} % without what it adds to plain rounding or cutting: {ADDED[name]}"
            )
        if made_for and repaired and after and after["interval"][1] < repaired["interval"][0]:
            found.append(
                f"task {name} agrees with the network before on {after['percent']:.1f} % of synthetic images, and on "
                f"{repaired['percent']:.1f} % before it was trained: lower {name}.lr, raise {name}.steps or set "
                "it to 0"
            )
        elif made_for and task["before"] is not None and task["after"] < task["before"] - LOST:
            found.append(
                f"task {name} lost {task['before'] - task['after']:.0f} points: compress less, or train longer after it"
            )
        elif made_for and task["before"] is None and after and after["percent"] < DISAGREES:
            found.append(
                f"task {name} agrees with the network before on {after['percent']:.0f} % of synthetic images: compress "
                "less, or train longer after it"
            )
    for name, trained in {**results["tasks"], "distill": student or {}}.items():
        if any(entry["split"] == "test" for entry in trained.get("opened", [])):
            found.append(f"{name} or its input was trained on the test images: set data.train_root for a fair control")
    control = student and student.get("source", "generator") != "generator"  # not made for the generator's images
    if student and not control and student["agreement"]["percent"] < DISAGREES:
        found.append(
            f"the student agrees with its teacher on {student['agreement']['percent']:.0f} % of synthetic images: "
            "raise distill.steps, synthesis.student_steps or synthesis.fade, or choose a larger student"
        )
    figures = [each["accuracy"] for name, each in results.get("teachers", {}).items() if not learned or name in learned]
    known = [accuracy for accuracy in figures if accuracy is not None]
    if student and not control and known and student.get("interval") and student["interval"][1] < min(known) - LOST:
        found.append(
            f"the student has {student['accuracy']:.1f} % of the test images, its teachers {min(known):.1f} or more: "
            "train longer, or choose a larger student"
        )
    quarter = student and student["last_quarter"]
    if quarter and quarter["lowest"] < quarter["mean"] - SWING:
        found.append(
            f"the student's {quarter['of']} swings in the last quarter of its training (mean {quarter['mean']:.1f}, "
            f"lowest {quarter['lowest']:.1f} %): lower distill.lr, or raise distill.steps"
        )
    return {"ok": not found, "notes": found, "warnings": list(warnings)}
