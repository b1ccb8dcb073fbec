"""The training phases of a run: which there are, and what takes part in each, from a recipe."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

from torch import nn

from dfkd import assemble
from dfkd.assemble import Parts
from dfkd.checkpoints import Checkpoints
from dfkd.classifier import Classifier
from dfkd.compress.fit import Fit
from dfkd.compress.hints import Hints, attention_hints, projected_hints, stage_hints
from dfkd.cuda_graphs import recorder
from dfkd.data import opened, sample
from dfkd.draws import Moves
from dfkd.errors import UserError
from dfkd.evaluate import accuracy, agreement, guesses
from dfkd.inputs import COMPRESSIONS, settings, task_source
from dfkd.metrics import Metrics
from dfkd.mixing import make_mix
from dfkd.runtime import Deadline, autocast_of, eval_mode, say
from dfkd.schema import Recipe
from dfkd.synthesis import Synthesizer
from dfkd.tasks import TRAINED, held_out, training_stream
from dfkd.teachers import Teacher, have_features, zoo_logits
from dfkd.training import Loop, Plan
from dfkd.verdict import teacher_notes
from dfkd.zoo import made_from
from generators import PoolGenerator

JUDGED_ON_REAL, JUDGED_ON_DRAWN = 2000, 512  # images, of the test set or of the generator
SHOWN, SMALL = 1000, 64 * 64  # test images that teachers are shown, and pixels up to which they are shown so many


def plans(recipe: Recipe) -> list[Plan]:
    """The training phases that the tasks come down to. Raises UserError where there would be nothing to train."""
    synthesis, per, frozen = recipe.synthesis.steps, recipe.synthesis.student_steps, recipe.distill.steps
    adversary = recipe.synthesis.losses.adversary > 0
    phases = []
    live = recipe.generator.checkpoint is None
    for task in recipe.tasks:
        if task in COMPRESSIONS:
            if live:
                raise UserError(
                    f"task {task} needs a generator (if only to measure agreement): put generator or distill before "
                    "it, or give generator.checkpoint"
                )
            phases.append(Plan(task, 0, 0, settings(recipe, task).steps if task in TRAINED else 0))
        elif task == "generator":
            phases.append(Plan("generator", synthesis, per if adversary else 0, 0))
            live = False
        elif live:
            phases.append(Plan("distill", synthesis, per, frozen))
            live = False
        else:
            phases.append(Plan("distill", 0, 0, frozen))
    if recipe.generator.checkpoint is None and adversary and not per:
        raise UserError("synthesis.losses.adversary needs a student that learns: set synthesis.student_steps above 0")
    for phase in phases:
        noise = phase.name == "generator" and recipe.generator.arch == "pixels"  # nothing to train, but to save
        trained = phase.students if phase.name == "distill" else phase.total
        if not trained and phase.name not in COMPRESSIONS and not noise:
            wanted = "distill.steps" if phase.name == "distill" else "synthesis.steps"
            raise UserError(f"task {phase.name} has nothing to train: set {wanted} above 0")
    return phases


def make_synthesizer(parts: Parts) -> Synthesizer:
    """The synthesizer of a recipe's `synthesis`."""
    recipe, synthesis = parts.recipe, parts.recipe.synthesis
    mix = synthesis.mix
    return Synthesizer(
        parts.worker or parts.generator,
        parts.zoo,
        losses=dataclasses.asdict(synthesis.losses),
        steps=synthesis.steps,
        batch_size=synthesis.batch_size,
        sample=recipe.zoo.sample,
        mix=make_mix(mix.kind, mix.probability, mix.antialias) if mix.probability else None,
        student=parts.student,
        lr=synthesis.lr,
        betas=synthesis.betas,
        clip=synthesis.clip,
        bn_distance=synthesis.bn_distance,
        equalise=synthesis.equalise,
        learn_weights=synthesis.learn_weights,
        penalise=synthesis.penalise,
        adversary_loss=synthesis.adversary_loss,
        adversary_mask=synthesis.adversary_mask,
        warmup=synthesis.warmup,
        fade=synthesis.fade,
        redraw=synthesis.redraw,
        pool=parts.generator if isinstance(parts.generator, PoolGenerator) else None,
        inner=synthesis.inner,
        renew=synthesis.renew,
        latent_lr=synthesis.latent_lr,
        cosine=synthesis.cosine,
        as_trained=synthesis.as_trained,
        jitter=synthesis.jitter,
        flip=synthesis.flip,
        coarse=synthesis.coarse,
        bank=synthesis.bank,
        seed=recipe.seed,
        accelerator=parts.accelerator,
        shard=parts.shard,
        graphs=recorder(recipe.runtime.cuda_graphs, parts.shard),
    )


def make_fit(parts: Parts, plan: Plan) -> Fit:
    """The student's training of a recipe's `distill` on the stream of the generator, or in that task on a control's (in
    the task `generator` the student is the adversary alone)."""
    recipe, distill = parts.recipe, parts.recipe.distill
    if parts.student is None:
        raise UserError("there is no student to train: set student.model")
    hints = make_hints(parts)
    say_beginning(parts, hints)
    graphs = recorder(recipe.runtime.cuda_graphs, parts.shard)
    source = distill.source if plan.name == "distill" else "generator"
    before = len(opened())
    control = None if source == "generator" else task_source(parts, source, parts.student)
    about = parts.student_about
    moves = Moves(round(distill.shift * recipe.image.size), distill.flip)
    made = {"source": source, "moves": list(moves), "size": recipe.image.size}
    parts.student_about = {**about, **made, "opened": made_from(about) + opened()[before:]}
    teachers = assemble.main_teachers(recipe, parts.zoo)
    stream = training_stream(
        parts,
        control or parts.generator,
        teachers,
        distill.batch_size,
        replay=distill.replay,
        fresh=distill.fresh,
        graphs=graphs,
        features=learns_features(recipe, teachers, parts.student),
    )
    return Fit(
        parts.student,
        stream,
        steps=plan.students,
        lr=distill.lr,
        weight_decay=distill.weight_decay,
        warmup=distill.warmup,
        loss=distill.loss,
        temperature=distill.temperature,
        clip=distill.clip,
        hints=hints,
        features=distill.features,
        accelerator=parts.accelerator,
        graphs=graphs,
    )


def learns_features(recipe: Recipe, teachers: Sequence[Teacher], student: Classifier) -> bool:
    """Whether distill.features has weight and every network has features; says so of one that has none."""
    networks = {**{f"teacher {teacher.name}": teacher for teacher in teachers}, "student": student}
    image = assemble.blank(recipe, student.mean.device)
    return recipe.distill.features > 0 and have_features(networks, image, "distill.features")


def make_hints(parts: Parts) -> Hints | None:
    """What the student learns of a teacher's layers: attention, where it has weight; else, where it began with the
    teacher's weights, what the last block of every row of blocks gives in the same channels; else its maps, projected.
    """
    recipe, student, distill = parts.recipe, parts.student, parts.recipe.distill
    if student is None:
        return None
    teachers = assemble.main_teachers(recipe, parts.zoo)
    teacher = max(teachers, key=lambda each: each.weight)  # the first, where all weigh as much
    image = assemble.blank(recipe, teacher.mean.device)
    if distill.attention:
        return attention_hints(student, teacher, image, distill.attention)
    selected = "selected" in parts.student_about
    hints = stage_hints(student, teachers[0], image, distill.hints) if selected else None
    return hints or projected_hints(student, teacher, image, distill.maps)


def say_beginning(parts: Parts, hints: Hints | None) -> None:
    """Say what the student has of its teacher's weights, and which of the teacher's layers it learns."""
    if selected := parts.student_about.get("selected"):
        say(f"{100 * selected['share']:.3g} % of the student begin as weights of teacher {selected['teacher']}")
    if hints is None:
        say(
            "the student learns no layers of a teacher: distill.{maps,hints,attention} are 0, or there are no stages "
            "of one size to pair (nor are there where it sees images of another size: input_size)"
        )
    else:
        through = ", through 1x1 convolutions" if hints.projector else ""
        say(f"the student learns layers of {hints.teacher.name}{through}: {', '.join(hints.layers)}")


def make_loop(
    parts: Parts,
    plan: Plan,
    synthesizer: Synthesizer | None,
    fit: Fit | None,
    *,
    metrics: Metrics,
    checkpoints: Checkpoints,
    offset: int,
    spent: dict[str, float],
    deadline: Deadline,
) -> Loop:
    """The loop of one phase."""
    runtime = parts.recipe.runtime
    judged = plan.name == "distill" and runtime.evaluations > 0
    return Loop(
        plan,
        parts.generator,
        parts.zoo if plan.name not in COMPRESSIONS else [],  # a task's loop has no images of its own to look at
        synthesizer,
        fit,
        parts.accelerator,
        parts.shard,
        metrics,
        checkpoints,
        offset,
        spent,
        log_every=runtime.log_every,
        grid_every=runtime.grid_every,
        checkpoint_every=runtime.checkpoint_every,
        deadline=deadline,
        evaluate=student_judge(parts, fit.student) if fit is not None and judged else None,
        evaluations=runtime.evaluations,
    )


def notes_on_teachers(parts: Parts) -> dict[str, str]:
    """By name what looks wrong with the teachers, of what they make of some test images; empty where there are none."""
    if parts.test is None:
        return {}
    pixels = parts.test.images[0, 0].numel()
    some = sample(parts.test, max(SHOWN // 10, min(SHOWN, SHOWN * SMALL // pixels)))  # it is to take seconds
    autocast, notes = autocast_of(parts.accelerator), dict[str, str]()
    for teacher in parts.zoo:
        try:
            named = guesses(teacher, some, device=parts.shard.device, autocast=autocast)
        except UserError as error:
            raise UserError(f"teacher {teacher.name}: {error}") from None
        notes |= teacher_notes(teacher.name, some.labels, named, some.class_names)
    return notes


def student_judge(parts: Parts, student: nn.Module) -> Callable[[], dict[str, float]]:
    """What measures the student while it trains, in percent, and on how many images: its accuracy on test images
    spread evenly over the test set, or without one its agreement with the teacher on images of the generator."""
    autocast = autocast_of(parts.accelerator)
    if parts.test is None:

        def agrees() -> dict[str, float]:
            teacher = partial(zoo_logits, assemble.main_teachers(parts.recipe, parts.zoo))
            with eval_mode(parts.generator):  # it may be learning
                found = agreement(student, teacher, held_out(parts, JUDGED_ON_DRAWN, autocast), autocast=autocast)
            return {"agreement": float(found["percent"]), "images": int(found["n"])}  # type: ignore[arg-type]

        return agrees
    images = sample(parts.test, JUDGED_ON_REAL)

    def measured() -> dict[str, float]:
        score = accuracy(student, images, device=parts.shard.device, autocast=autocast)
        return {"accuracy": score.percent, "images": score.n}

    return measured
