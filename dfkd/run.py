"""A run: build and check everything, train what the tasks ask for, measure, write the results."""

import dataclasses
import errno
import os
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator, PartialState
from torch import nn

from dfkd import assemble
from dfkd.assemble import Parts
from dfkd.checkpoints import Checkpoints, Resumed
from dfkd.collectives import check_synchronisable, sync_batchnorm
from dfkd.compress.files import save_compressed
from dfkd.compress.fit import Fit, hold_zeros
from dfkd.errors import Paused, UserError
from dfkd.folder import may_run, open_folder, owner
from dfkd.inputs import COMPRESSIONS, check_layers, check_tasks, distilled, given_student, settings, task_input
from dfkd.metrics import Metrics
from dfkd.mixing import GROUP, make_mix
from dfkd.norms import check_triton, triton_norms
from dfkd.phases import make_fit, make_hints, make_loop, make_synthesizer, notes_on_teachers, plans
from dfkd.recipe import Loaded
from dfkd.report import closing_table
from dfkd.results import finish, versions
from dfkd.runtime import Deadline, Shard, check_compile, compiled, make_accelerator, resolve_precision, say, shut_down
from dfkd.schema import SELECTED, Recipe
from dfkd.stream import FRESH, drawn_anew
from dfkd.synthesis import Synthesizer
from dfkd.tasks import TRAINED, finished, read_figures, run_task
from dfkd.terms import check_losses
from dfkd.training import Loop, Plan, out_of_time, show
from dfkd.zoo import load_recipe_zoo, real_images
from generators import save_generator

NO_PLACE = (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS)


def build(recipe: Recipe, accelerator: Accelerator, shard: Shard) -> Parts:
    """Build and check all networks and data; no teacher is trained yet."""
    check_tasks(recipe)
    device = shard.device
    if recipe.runtime.compile:
        check_compile(device)
    if recipe.runtime.triton and device.type == "cuda":
        check_triton(device)
    test = None
    if recipe.data.dataset != "none":
        with PartialState().local_main_process_first():  # the first one downloads
            test = real_images(recipe, train=False, purpose="evaluate")
    zoo = load_recipe_zoo(recipe, device, say, train=False)
    generator = assemble.make_generator(recipe, zoo, device)
    parts = Parts(recipe, accelerator, shard, zoo, generator, None, {}, test)
    if recipe.student.model:
        new_student(parts)
    synthesis = recipe.synthesis
    if recipe.generator.checkpoint is None and synthesis.steps:
        check_losses(dataclasses.asdict(synthesis.losses), zoo, parts.student, generator, synthesis.bank)
        adversary = [parts.student] if parts.student is not None and synthesis.losses.adversary else []
        assemble.check_coarse(recipe, [*zoo, *adversary])
        if synthesis.inner > 1:
            parts.worker = generator
            parts.generator = assemble.make_pool(recipe, generator, shard)
    make_hints(parts)  # raises where there is no pair
    make_mix(recipe.synthesis.mix.kind)
    check_layers(parts)
    if (learner := distilled(parts)) is not parts:
        make_hints(learner)
    learners: list[nn.Module] = [generator] if recipe.generator.checkpoint is None else []
    learners += [learner.student] if learner.student is not None and recipe.runtime.sync_batchnorm else []
    for network in learners:
        check_synchronisable(network)
    say_groups(recipe, shard.world)
    return parts


def say_groups(recipe: Recipe, world: int) -> None:
    """Say which batches several processes mix otherwise than one process would: images are paired within a process, in
    groups of GROUP, and of a batch with replay those that are drawn anew."""
    if world == 1:
        return
    synthesis, batches = recipe.synthesis, {}
    paired = synthesis.mix.probability or synthesis.losses.spread or synthesis.batch_size % 2  # others pair by two
    if recipe.generator.checkpoint is None and paired:
        batches["synthesis.batch_size"] = synthesis.batch_size
    for plan in plans(recipe) if recipe.distill.mix else ():
        task = plan.name if plan.name in TRAINED else "distill"  # the adversary of a generator is a student too
        keys = settings(recipe, task)
        if plan.students:
            images = drawn_anew(keys.batch_size, getattr(keys, "replay", 0), getattr(keys, "fresh", FRESH))
            batches[f"{task}.batch_size"] = images
    for key, images in batches.items():
        if images % GROUP:
            say(
                f"{images} images a process and update of {key} are no whole groups of {GROUP}, in which images are "
                f"paired: {world} processes train otherwise than one of as many images"
            )


def new_student(parts: Parts) -> None:
    """Give the run a fresh student of student.model."""
    parts.student, parts.student_about = assemble.make_student(parts.recipe, parts.zoo, parts.shard.device)


def run(loaded: Loaded, command: str) -> int:
    """Carry out a recipe; the same call resumes what was begun, and says so where it is finished already. After
    runtime.minutes, or with Ctrl-C (SIGINT) or SIGTERM, it stops, with a whole checkpoint, and says how far it is.
    Returns the exit code: 0, or what a shell expects of a program that a signal stopped."""
    recipe = loaded.recipe
    started = time.perf_counter()
    deadline = Deadline(recipe.runtime.minutes, started)
    folder = Path(recipe.folder)
    same = "the same command" + (" without overwrite=true" if recipe.overwrite else "")
    accelerator, shard = make_accelerator(recipe.runtime.precision)
    if may_run(loaded, folder):
        used = versions()  # before the files of the code may change
        phases = plans(recipe)
        parts = build(recipe, accelerator, shard)  # whatever is wrong shows before anything is written or trained
        try:
            with open_folder(loaded, folder, accelerator):
                begun = time.perf_counter()
                with deadline.or_signal():
                    assemble.train_zoo(parts, say, deadline)
                    if recipe.student.weights == SELECTED and recipe.student.model:
                        new_student(parts)  # the one that was checked may have an untrained teacher's
                    spent = {"teachers": time.perf_counter() - begun}
                    carry_out(parts, phases, spent, deadline)
                spent["before"] = begun - started
                finish(parts, phases, spent, command, used)
        except OSError as error:
            # Of a full disk torch gives no number.
            remedy = "free some space and " if error.errno in (None, errno.ENOSPC, errno.EDQUOT) else ""
            again = f"{remedy}run {same} again"
            if error.errno in NO_PLACE and str(folder.absolute()) in os.path.abspath(str(error.filename)):
                again = "choose another output=..."
            raise UserError(f"could not write in {folder}: {error}; {again}") from None
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"interrupted; what was checkpointed is kept, and {same} goes on from there"
            ) from None
        except Paused as paused:
            out_of_time(deadline, 0, shard.device)  # all processes end alike, whichever got the signal
            say(f"stopped for {deadline.cause}: {paused}; {same} goes on")
            shut_down(accelerator)
            return 128 + deadline.stopped_by if deadline.stopped_by is not None else 0
    if shard.rank == 0:
        print(closing_table(read_figures(folder / "results.json")))
        print(f"{folder}/report.html shows the run; {folder}/results.json holds the figures")
    shut_down(accelerator)
    return 0


def carry_out(parts: Parts, phases: list[Plan], spent: dict[str, float], deadline: Deadline | None = None) -> None:
    """Go through the tasks, from the newest checkpoint where there is one; write what each makes. Raises Paused where
    the deadline comes first."""
    recipe, folder, shard = parts.recipe, parts.folder, parts.shard
    deadline = deadline or Deadline()
    checkpoints = Checkpoints(
        folder / "checkpoints", owner(recipe, resolve_precision(recipe.runtime.precision, shard.device), shard.world)
    )
    step, state, warnings = checkpoints.load(shard.device) or Resumed(0, {}, [])
    for warning in warnings:
        say(warning)
    spent |= state.get("spent", {})
    if state:
        say(f"resuming {folder} after step {step}")
    metrics = Metrics(folder, main=shard.rank == 0, resumed_after=step)
    if not step and shard.rank == 0:
        metrics.warn(step, notes_on_teachers(parts))
        sources = [getattr(settings(recipe, plan.name), "source", None) for plan in phases if plan.name in COMPRESSIONS]
        if len(sources) == len(phases) and "generator" in sources:  # no loop shows what they learn from
            show(metrics, step, "frozen generator", parts.generator, parts.zoo, parts.accelerator)
    reached = [plan.name for plan in phases].index(state["phase"]) if state else 0
    loop_of = partial(make_loop, parts, metrics=metrics, checkpoints=checkpoints, spent=spent, deadline=deadline)
    offset, worked = 0, False
    with closing(metrics), triton_norms(recipe.runtime.triton and shard.device.type == "cuda"):
        for k, plan in enumerate(phases):
            if worked and out_of_time(deadline, 0, shard.device):
                raise Paused(f"task {plan.name} is next")
            mine = state if k == reached else {}
            if plan.name not in COMPRESSIONS and k < reached:  # finished before the checkpoint was written
                take_up(parts, plan)
            elif plan.name not in COMPRESSIONS:
                worked = carry_out_phase(parts, plan, partial(loop_of, plan, offset=offset), mine) < plan.total
                checkpoints.claim()
            elif not finished(recipe, plan.name):
                say(f"task {plan.name}")
                trained = partial(train, partial(loop_of, plan, None, offset=offset), mine)
                run_task(parts, plan.name, trained, spent.get(plan.name, 0.0))
                checkpoints.claim()
                worked = True
            mine.clear()  # of a task that was finished already nobody took it up
            offset += plan.total


def carry_out_phase(parts: Parts, plan: Plan, loop_of: Callable[..., Loop], state: dict[str, Any]) -> int:
    """Train a phase's generator and student, from a checkpoint's state where there is one, and write them; returns the
    step that it went on from. Optimisers, graphs and replayed images are let go of at its end."""
    prepare_student(parts, plan)
    synthesizer = make_synthesizer(parts) if plan.synthesis else None
    loop = loop_of(synthesizer, make_fit(parts, plan) if plan.students else None)
    begun = go_on(loop, state)
    with compiled(networks(parts) if parts.recipe.runtime.compile else []):
        loop.run(begun)
    save_phase(parts, plan, synthesizer)
    return begun


def train(loop_of: Callable[[Fit], Loop], state: dict[str, Any], fit: Fit) -> None:
    """Train what a task trains, from a checkpoint's state where there is one."""
    loop = loop_of(fit)
    loop.run(go_on(loop, state))


def go_on(loop: Loop, state: dict[str, Any]) -> int:
    """The step from which a loop goes on: a checkpoint's, whose state it takes up, else 0. The state is emptied, lest
    the device hold networks and replayed images twice until the run ends."""
    begun = loop.load_state_dict(state) if state else 0
    state.clear()
    return begun


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
        parts.student, parts.student_about = given_student(parts, parts.recipe.distill.input)
        hold_zeros(parts.student.requires_grad_(True))
    if parts.recipe.runtime.sync_batchnorm and parts.student is not None:
        sync_batchnorm(parts.student)


def networks(parts: Parts) -> list[nn.Module]:
    """The networks that work in the steps of a phase."""
    classifiers = [*parts.zoo, *([parts.student] if parts.student is not None else [])]
    return [parts.worker or parts.generator, *(each.model for each in classifiers)]


def save_phase(parts: Parts, plan: Plan, synthesizer: Synthesizer | None) -> None:
    """Write what a phase made: the generator where it learned, the student where it is not the adversary's alone."""
    folder, main = parts.folder, parts.shard.rank == 0
    if synthesizer is not None:
        for name, value in synthesizer.bn_start.items():
            parts.bn[name] = {"start": float(value), "end": float(synthesizer.bn_end[name])}
    untrained = not parts.recipe.synthesis.steps and parts.recipe.generator.checkpoint is None  # noise
    if main and (synthesizer is not None or untrained):
        about = {**parts.generator.description, "steps": plan.synthesis, "bn_loss": parts.bn}
        save_generator(folder / "generator", parts.generator, about)
    if plan.name == "generator" and parts.student is not None:
        new_student(parts)
    if plan.name == "distill" and main and parts.student is not None:
        save_compressed(folder / "student", parts.student, parts.student_about)
    parts.accelerator.wait_for_everyone()  # a later task may read the files
