"""Keys that are right alone and do not fit together."""

from collections.abc import Iterator

from dfkd.errors import UserError, nearest, shown
from dfkd.schema import Recipe


def check(recipe: Recipe) -> None:
    """Keys that are right alone must also fit together.

    Raises:
        UserError: the first contradiction, with the keys it is about.
    """
    for problem in (*_teacher_problems(recipe), *_run_problems(recipe)):
        raise UserError(problem)


def _teacher_problems(recipe: Recipe) -> Iterator[str]:
    zoo, channels = recipe.zoo_specs, recipe.image.channels
    known = [name for name, spec in recipe.teachers.items() if spec.model]
    for name, spec in recipe.teachers.items():
        if not spec.model:  # also where a mistyped name made a new teacher
            yield f"teachers.{name}.model is empty{nearest(name, known)}; --list names the models"
    if not any(spec.weight for spec in zoo.values()):
        yield "teachers: none is enabled with a weight above 0; give teachers.NAME.model, or a base that has some"
    for name, spec in zoo.items():
        for key, numbers in (("mean", spec.mean), ("std", spec.std)):
            if len(numbers) not in (0, channels):
                yield f"teachers.{name}.{key}={numbers}: image.channels={channels} needs as many, or []"
        if min(spec.std, default=1) <= 0:
            yield f"teachers.{name}.std={spec.std} is not allowed; it takes numbers above 0"
        if not all(0 <= value <= 1 for value in spec.mean):
            yield f"teachers.{name}.mean={spec.mean} is not allowed; images are in [0, 1]: divide mean and std by 255"
        if (spec.pad or 0) > (most := recipe.image.size // 2):
            yield f"teachers.{name}.pad={spec.pad} is not allowed; it takes 0 to {most}, half of image.size"
        if not spec.weights and recipe.data.dataset == "none":
            yield f"teachers.{name}.weights is empty and data.dataset is none: nothing to train it on"
    main, sample, names = recipe.zoo.main, recipe.zoo.sample, ", ".join(zoo)
    if main is not None and main not in zoo:
        yield f"zoo.main={shown(main)} is no enabled teacher{nearest(main, zoo)}; those are {names}"
    if sample > len(zoo):
        yield f"zoo.sample={sample} is not allowed; it takes 1 to {len(zoo)}, the enabled ones are {names}"


def _run_problems(recipe: Recipe) -> Iterator[str]:
    tasks, checkpoint, betas = recipe.tasks, recipe.generator.checkpoint, recipe.synthesis.betas
    if not tasks or len(set(tasks)) < len(tasks):
        yield f"tasks={shown(tasks)} is not allowed; it takes one or more tasks, each once"
    if "distill" in tasks and not recipe.student.model and recipe.distill.input is None:
        yield "student.model is empty, and tasks has distill; --list names the models"
    if "generator" in tasks and checkpoint:
        yield f"tasks has generator, and generator.checkpoint={shown(checkpoint)} is frozen; leave one out"
    if "generator" in tasks and tasks[0] != "generator":
        yield f"tasks={shown(tasks)} is not allowed: the generator comes first, tasks=[generator, distill, ...]"
    live = "distill" in tasks and tasks[0] != "generator" and not checkpoint  # generator and student in turn
    for key, idle in (("input", None), ("source", "generator")):
        if live and (given := getattr(recipe.distill, key)) != idle:
            yield (
                f"distill.{key}={given} needs a generator that is there before: give distill.steps, and "
                "generator.checkpoint or tasks=[generator, ..., distill]"
            )
    if not recipe.synthesis.steps and not checkpoint and recipe.generator.arch != "pixels":
        yield "synthesis.steps=0 leaves the generator untrained; set it above 0, or give generator.checkpoint"
    yield from _synthesis_problems(recipe)
    for task in ("qat", "ptq"):
        keys = getattr(recipe, task)
        for name, pair in {
            "ends": keys.ends,
            **{f"overrides.{key}": pair for key, pair in keys.overrides.items()},
        }.items():
            if len(pair) not in (1, 2):
                yield f"{task}.{name}={pair} is not allowed; it takes [weights, input], or [both]"
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        yield f"synthesis.betas={betas} is not allowed; it takes two numbers from 0 to below 1"


def _synthesis_problems(recipe: Recipe) -> Iterator[str]:
    synthesis, weights = recipe.synthesis, recipe.synthesis.losses
    if recipe.generator.checkpoint or not synthesis.steps:
        return
    if not recipe.generator.conditional and weights.ce + weights.diversity + weights.likeness > 0:
        yield (
            "generator.conditional=false draws no class on request; set synthesis.losses.ce, .diversity and .likeness "
            "to 0, and give synthesis.losses.one_hot and .information some weight (DAFL)"
        )
    if synthesis.penalise and not weights.ce + weights.one_hot + weights.information:
        yield (
            "synthesis.penalise=true weighs ce, one_hot and information, and none has weight; give one of "
            "synthesis.losses.{ce,one_hot,information} some"
        )
    if synthesis.penalise and synthesis.learn_weights:
        yield "synthesis.penalise and synthesis.learn_weights both change the weight of ce; set one of them to false"
    if weights.adversary and 2 * (synthesis.warmup + synthesis.fade) > 1:
        yield (
            f"synthesis.warmup={synthesis.warmup} and synthesis.fade={synthesis.fade}: the adversary never has its "
            "whole weight; keep their sum at 0.5 or below"
        )
    rounds = synthesis.inner > 1
    for key, given in (
        ("latent_lr", synthesis.latent_lr),
        ("renew", synthesis.renew != "none"),
        ("coarse", synthesis.coarse),
    ):
        if given and not rounds:
            yield f"synthesis.{key}={getattr(synthesis, key)} is about rounds; set synthesis.inner above 1 too"
    if rounds and "distill" in recipe.tasks and recipe.distill.replay:
        yield (
            f"distill.replay={recipe.distill.replay} and synthesis.inner={synthesis.inner}: rounds keep their images "
            "in a pool already; set distill.replay=0"
        )
    if recipe.generator.arch == "pixels":
        if not rounds or not synthesis.latent_lr:
            yield (
                "generator.arch=pixels has no network to train; set synthesis.inner above 1 and synthesis.latent_lr "
                "above 0 (image inversion), or synthesis.steps=0 (noise)"
            )
        for key, idle in (("redraw", 0), ("renew", "none")):
            if (given := getattr(synthesis, key)) != idle:
                yield f"synthesis.{key}={given} and generator.arch=pixels: it has no layers; set it to {idle}"
