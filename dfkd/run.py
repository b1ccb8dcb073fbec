"""A run: build and check everything, train what the tasks ask for, measure, write the results."""

import dataclasses
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from torch import nn

from dfkd import assemble
from dfkd.assemble import Parts
from dfkd.checkpoints import Checkpoints
from dfkd.classifier import Classifier
from dfkd.collectives import agreed, sync_batchnorm
from dfkd.compress.files import save_compressed
from dfkd.compress.fit import Fit, Hints, hold_zeros, map_pairs
from dfkd.cuda_graphs import recorder
from dfkd.errors import Paused, UserError
from dfkd.evaluate import accuracy, agreement
from dfkd.folder import may_run, open_folder, owner
from dfkd.losses import attention
from dfkd.metrics import Metrics
from dfkd.mixing import make_mix
from dfkd.recipe import Loaded
from dfkd.report import closing_table
from dfkd.results import finish
from dfkd.runtime import Deadline, Shard, check_compile, compiled, eval_mode, make_accelerator, say, shut_down
from dfkd.schema import Recipe
from dfkd.stream import SyntheticStream
from dfkd.synthesis import Synthesizer
from dfkd.tasks import TASKS, check_layers, check_tasks, finished, held_out, run_task, settings, task_input
from dfkd.teachers import Teacher, batch_norms, zoo_logits
from dfkd.terms import check_losses
from dfkd.training import Loop, Plan
from generators import PoolGenerator, save_generator

JUDGED_ON_REAL, JUDGED_ON_DRAWN = 2000, 512  # images, of the test set or of the generator


def plans(recipe: Recipe) -> list[Plan]:
    """The training phases that the tasks come down to. Raises UserError where there would be nothing to train."""
    synthesis, per, frozen = recipe.synthesis.steps, recipe.synthesis.student_steps, recipe.distill.steps
    adversary = recipe.synthesis.losses.adversary > 0
    phases = []
    live = recipe.generator.checkpoint is None
    for task in recipe.tasks:
        if task in TASKS:
            if live:
                raise UserError(
                    f"task {task} needs a generator (if only to measure agreement): put generator or distill before "
                    "it, or give generator.checkpoint"
                )
            phases.append(Plan(task, 0, 0, {"qat": recipe.qat.steps, "prune": recipe.prune.steps}.get(task, 0)))
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
        if phase.total == 0 and phase.name not in TASKS and not noise:
            wanted = "distill.steps" if phase.name == "distill" else "synthesis.steps"
            raise UserError(f"task {phase.name} has nothing to train: set {wanted} above 0")
    return phases


def build(recipe: Recipe, accelerator: Accelerator, shard: Shard) -> Parts:
    """Build and check all networks and data; no teacher is trained yet."""
    check_tasks(recipe)
    device = shard.device
    if recipe.runtime.compile:
        check_compile(device)
    test = None
    if recipe.data.dataset != "none":
        with PartialState().local_main_process_first():  # the first one downloads
            test = assemble.real_images(recipe, train=False, purpose="evaluate")
    zoo = assemble.load_recipe_zoo(recipe, device, say, train=False)
    generator, description = assemble.make_generator(recipe, zoo, device)
    parts = Parts(recipe, accelerator, shard, zoo, generator, description, None, {}, test)
    if recipe.student.model:
        new_student(parts)
    synthesis = recipe.synthesis
    if recipe.generator.checkpoint is None and synthesis.steps:
        check_losses(dataclasses.asdict(synthesis.losses), zoo, parts.student, generator, synthesis.bank)
        adversary = [parts.student] if parts.student is not None and synthesis.losses.adversary else []
        assemble.check_coarse(recipe, [*zoo, *adversary])
        if synthesis.inner > 1:
            parts.worker = generator
            parts.generator, parts.description = assemble.make_pool(recipe, description, shard)
    if parts.student is not None:
        attention_hints(recipe, parts.student, assemble.main_teachers(recipe, zoo)[0])  # raises where there is no pair
    make_mix(recipe.synthesis.mix.kind)
    check_layers(parts)
    return parts


def new_student(parts: Parts) -> None:
    """Give the run a fresh student of student.model."""
    recipe = parts.recipe
    parts.student = assemble.make_student(recipe, parts.zoo, parts.shard.device)
    parts.student_about = assemble.describe(recipe, recipe.student.model, recipe.student.kwargs, parts.student)


def dry_run(loaded: Loaded) -> None:
    """Build and check everything, print the plan, train nothing."""
    recipe = loaded.recipe
    accelerator, shard = make_accelerator(recipe.runtime.precision)
    phases = plans(recipe)
    parts = build(recipe, accelerator, shard)
    say(f"{recipe.name}: {shard.world} process(es) on {shard.device}, precision {accelerator.mixed_precision}")
    for teacher in parts.zoo:
        spec = recipe.teachers[teacher.name]
        origin = spec.weights or f"to be trained on {recipe.data.dataset}"
        say(f"  teacher {teacher.name}: {spec.model}, {assemble.parameters(teacher):,} parameters, {origin}")
    worker = parts.worker or parts.generator
    about = parts.description
    kept = f", a pool of {about['capacity']:,} images" if about["arch"] == "pool" else ""
    say(f"  generator: {about.get('made_by', about['arch'])}, {assemble.parameters(worker):,} parameters{kept}")
    if parts.student is not None:
        say(f"  student: {recipe.student.model}, {assemble.parameters(parts.student):,} parameters")
    for phase in phases:
        if phase.name in TASKS:
            keys = settings(recipe, phase.name)
            text = ", ".join(
                f"{key} {value}" for key, value in dataclasses.asdict(keys).items() if value not in ([], {}, None)
            )
            say(f"  task {phase.name}: {text}")
        else:
            rounds = f"rounds of {recipe.synthesis.inner} " if parts.worker is not None else ""
            say(f"  task {phase.name}: {phase.synthesis} {rounds}generator updates, {phase.students} student updates")
    say(f"  estimated memory: {estimated_memory(recipe, parts) / 2**30:.2f} GiB per process")
    say("nothing was trained (--dry-run)")
    shut_down(accelerator)


@torch.no_grad()
def estimated_memory(recipe: Recipe, parts: Parts) -> float:
    """A rough figure in bytes per process: weights with gradients and optimiser states, twice the activations of the
    largest teacher or student at the batch size (the generator's are of that order), the replay ring or the pool, the
    memory bank."""
    zoo = sum(assemble.parameters(t) for t in parts.zoo)
    weights = min(zoo, recipe.zoo.memory_gb * 1e9 / 4) if recipe.zoo.memory_gb else zoo
    weights += 4 * assemble.parameters(parts.worker or parts.generator)
    weights += 3 * assemble.parameters(parts.student) if parts.student is not None else 0
    shape = (2, recipe.image.channels, recipe.image.size, recipe.image.size)
    images = torch.zeros(shape, device=parts.generator.device)
    networks: list[nn.Module] = [*parts.zoo, *([parts.student] if parts.student else [])]
    largest = max(_activations(network, images) for network in networks)
    features = sum(norm.running_mean.numel() for norm in batch_norms(parts.zoo[0].model).values())  # type: ignore
    weights += recipe.synthesis.bank * features
    replayed = recipe.distill.replay * recipe.distill.batch_size * recipe.distill.fresh
    weights += replayed * recipe.classes
    kept = replayed + parts.description.get("capacity", 0)
    return 4 * (weights + largest * recipe.synthesis.batch_size * 2) + kept * images[0].numel()


def _activations(network: nn.Module, images: torch.Tensor) -> float:
    """Numbers that a network's layers put out per image."""
    count = 0

    def add(module: nn.Module, inputs: object, output: object) -> None:
        nonlocal count
        count += output.numel() if isinstance(output, torch.Tensor) else 0

    leaves = [module for module in network.modules() if not list(module.children())]
    handles = [module.register_forward_hook(add) for module in leaves]
    training = network.training
    network.eval()(images)
    network.train(training)
    for handle in handles:
        handle.remove()
    return count / len(images)


def run(loaded: Loaded, command: str) -> None:
    """Carry out a recipe; the same call resumes what was begun, and says so where it is finished already. After
    runtime.minutes it stops, with a whole checkpoint, and says how far it is."""
    recipe = loaded.recipe
    started = time.perf_counter()
    deadline = Deadline(recipe.runtime.minutes, started)
    folder = Path(recipe.folder)
    accelerator, shard = make_accelerator(recipe.runtime.precision)
    if may_run(loaded, folder):
        phases = plans(recipe)
        parts = build(recipe, accelerator, shard)  # whatever is wrong shows before anything is written or trained
        try:
            open_folder(loaded, folder, accelerator)
            begun = time.perf_counter()
            parts.zoo = []  # the one that was checked must not be in memory beside the one that is used
            parts.zoo = assemble.load_recipe_zoo(recipe, shard.device, say, deadline=deadline)
            spent = {"teachers": time.perf_counter() - begun}
            carry_out(parts, phases, spent, deadline)
            spent["before"] = begun - started
            finish(parts, spent, command)
        except OSError as error:
            raise UserError(
                f"could not write in {folder}: {error}; free some space and run the same command again"
            ) from None
        except Paused as paused:
            say(f"stopped for runtime.minutes={recipe.runtime.minutes:g}: {paused}; the same command goes on")
            shut_down(accelerator)
            return
    if shard.rank == 0:
        results = json.loads((folder / "results.json").read_text())
        print(closing_table(results))
        print(f"{folder}/report.html shows the run; {folder}/results.json holds the figures")
    shut_down(accelerator)


def carry_out(parts: Parts, phases: list[Plan], spent: dict[str, float], deadline: Deadline | None = None) -> None:
    """Go through the tasks, from the newest checkpoint where there is one; write what each makes. Raises Paused where
    the deadline comes first."""
    recipe, folder, shard = parts.recipe, parts.folder, parts.shard
    deadline = deadline or Deadline()
    checkpoints = Checkpoints(folder / "checkpoints", owner(recipe, shard.world))
    found = checkpoints.load(shard.device)
    for warning in found.warnings if found else []:
        say(warning)
    state = found.state if found else {}
    if found:
        say(f"resuming {folder} after step {found.step}")
    metrics = Metrics(folder, main=shard.rank == 0, resumed_after=found.step if found else 0)
    reached = [plan.name for plan in phases].index(state["phase"]) if state else 0
    offset, worked = 0, False
    try:
        for k, plan in enumerate(phases):
            if worked and agreed(deadline.within(0), shard.device):
                raise Paused(f"task {plan.name} is next")
            if plan.name not in TASKS and state and k < reached:  # finished before the checkpoint was written
                take_up(parts, plan)
            elif plan.name not in TASKS:
                prepare_student(parts, plan)
                synthesizer = make_synthesizer(parts) if plan.synthesis else None
                fit = make_fit(parts, plan.students) if plan.students else None
                loop = make_loop(parts, plan, synthesizer, fit, metrics, checkpoints, offset, spent, deadline)
                begun = loop.load_state_dict(state) if state and k == reached else 0
                with compiled(networks(parts) if recipe.runtime.compile else []):
                    loop.run(begun)
                save_phase(parts, plan, synthesizer)
                worked = begun < plan.total
            elif not finished(recipe, plan.name):
                say(f"task {plan.name}")

                def train(
                    fit: Fit, plan: Plan = plan, here: bool = bool(state) and k == reached, offset: int = offset
                ) -> None:
                    loop = make_loop(parts, plan, None, fit, metrics, checkpoints, offset, spent, deadline)
                    loop.run(loop.load_state_dict(state) if here else 0)

                run_task(parts, plan.name, train)
                worked = True
            offset += plan.total
    finally:
        metrics.close()


def take_up(parts: Parts, plan: Plan) -> None:
    """Load what a finished phase left."""
    if plan.synthesis:
        parts.generator = assemble.reload_generator(parts.recipe, parts.folder / "generator", parts.shard.device)
        parts.bn = parts.generator.description["bn_loss"]
    if plan.name == "distill":
        parts.student, parts.student_about = task_input(parts, "student")


def prepare_student(parts: Parts, plan: Plan) -> None:
    """Where distill.input names a model, make it the student; and synchronise batch norms where the recipe says so."""
    if plan.name == "distill" and parts.recipe.distill.input is not None:
        parts.student, parts.student_about = task_input(parts, parts.recipe.distill.input)
        hold_zeros(parts.student.requires_grad_(True))
    if parts.recipe.runtime.sync_batchnorm and parts.student is not None:
        sync_batchnorm(parts.student)


def networks(parts: Parts) -> list[nn.Module]:
    """The networks that work in the steps of a phase."""
    classifiers = [*parts.zoo, *([parts.student] if parts.student is not None else [])]
    return [parts.worker or parts.generator, *(each.model for each in classifiers)]


def make_loop(
    parts: Parts,
    plan: Plan,
    synthesizer: Synthesizer | None,
    fit: Fit | None,
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
        parts.zoo if plan.name not in TASKS else [],  # a task's loop has no images of its own to look at
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


def student_judge(parts: Parts, student: nn.Module) -> Callable[[], dict[str, float]]:
    """What measures the student while it trains, in percent, and on how many images: its accuracy on test images
    spread evenly over the test set, or without one its agreement with the teacher on images of the generator."""
    autocast = parts.accelerator.autocast
    if parts.test is None:

        def agrees() -> dict[str, float]:
            teacher = partial(zoo_logits, assemble.main_teachers(parts.recipe, parts.zoo))
            with eval_mode(parts.generator):  # it may be learning
                found = agreement(student, teacher, held_out(parts, JUDGED_ON_DRAWN, autocast), autocast=autocast)
            return {"agreement": float(found["percent"]), "images": int(found["n"])}  # type: ignore[arg-type]

        return agrees
    some = min(len(parts.test), JUDGED_ON_REAL)
    rows = torch.arange(some) * len(parts.test) // some
    images = dataclasses.replace(parts.test, images=parts.test.images[rows], labels=parts.test.labels[rows])

    def measured() -> dict[str, float]:
        score = accuracy(student, images, device=parts.shard.device, autocast=autocast)
        return {"accuracy": score.percent, "images": score.n}

    return measured


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
        jitter=synthesis.jitter,
        flip=synthesis.flip,
        coarse=synthesis.coarse,
        bank=synthesis.bank,
        seed=recipe.seed,
        accelerator=parts.accelerator,
        shard=parts.shard,
        graphs=recorder(recipe.runtime.cuda_graphs, parts.shard),
    )


def make_fit(parts: Parts, steps: int) -> Fit:
    """The student's training of a recipe's `distill`, on the stream of the generator."""
    recipe, distill = parts.recipe, parts.recipe.distill
    if parts.student is None:
        raise UserError("there is no student to train: set student.model")
    hints = attention_hints(recipe, parts.student, assemble.main_teachers(recipe, parts.zoo)[0])
    graphs = recorder(recipe.runtime.cuda_graphs, parts.shard)
    stream = SyntheticStream(
        parts.generator,
        batch_size=distill.batch_size,
        teacher=assemble.main_teachers(recipe, parts.zoo),
        seed=recipe.seed,
        replay=distill.replay,
        fresh=distill.fresh,
        shift=distill.shift,
        flip=distill.flip,
        mix=distill.mix,
        shard=parts.shard,
        autocast=parts.accelerator.autocast,
        channels_last=recipe.runtime.channels_last,
        graphs=graphs,
    )
    return Fit(
        parts.student,
        stream,
        steps=steps,
        lr=distill.lr,
        weight_decay=distill.weight_decay,
        warmup=distill.warmup,
        loss=distill.loss,
        temperature=distill.temperature,
        clip=distill.clip,
        hints=hints,
        accelerator=parts.accelerator,
        graphs=graphs,
    )


def attention_hints(recipe: Recipe, student: Classifier, teacher: Teacher) -> Hints | None:
    """What distill.attention makes the student learn besides the logits; None where it has no weight."""
    if not recipe.distill.attention:
        return None
    size = recipe.image.size
    image = torch.zeros(1, recipe.image.channels, size, size, device=teacher.mean.device)
    pairs = map_pairs(student, teacher, image)
    return Hints(student, teacher, pairs, recipe.distill.attention, attention, inputs=True)


def save_phase(parts: Parts, plan: Plan, synthesizer: Synthesizer | None) -> None:
    """Write what a phase made: the generator where it learned, the student where it is not the adversary's alone."""
    folder, main = parts.folder, parts.shard.rank == 0
    if synthesizer is not None:
        for name, value in synthesizer.bn_start.items():
            parts.bn[name] = {"start": float(value), "end": float(synthesizer.bn_end[name])}
    untrained = not parts.recipe.synthesis.steps and parts.recipe.generator.checkpoint is None  # noise
    if main and (synthesizer is not None or untrained):
        about = {**parts.description, "steps": plan.synthesis, "bn_loss": parts.bn}
        save_generator(folder / "generator", parts.generator, about)
    if plan.name == "generator" and parts.student is not None:
        new_student(parts)
    if plan.name == "distill" and main and parts.student is not None:
        save_compressed(folder / "student", parts.student, parts.student_about)
    parts.accelerator.wait_for_everyone()  # a later task may read the files
