"""A run: build and check everything, train what the tasks ask for, measure, write the results."""

import dataclasses
import hashlib
import json
import platform
import shutil
import time
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from omegaconf import OmegaConf
from torch import nn

from dfkd import assemble
from dfkd.checkpoints import Checkpoints, write_atomically
from dfkd.classifier import Classifier
from dfkd.collectives import sync_batchnorm
from dfkd.compress.fit import Fit
from dfkd.data import RealImages, opened
from dfkd.errors import UserError
from dfkd.evaluate import Accuracy, accuracy, agreement
from dfkd.metrics import Metrics
from dfkd.mixing import make_mix
from dfkd.recipe import Loaded
from dfkd.report import closing_table, write_report
from dfkd.runtime import Shard, make_accelerator, shut_down
from dfkd.schema import Recipe
from dfkd.stream import SyntheticStream
from dfkd.synthesis import Synthesizer, check_losses
from dfkd.teachers import Teacher, zoo_logits
from dfkd.training import Loop, Plan, look
from generators import ImageGenerator, save_generator

HELD_OUT_EPOCH = 1_000_003  # an epoch that no student ever trains on
HELD_OUT_BATCHES, HELD_OUT_SIZE = 8, 256
# Keys that change how a run goes, not what comes out: they may differ when it is resumed.
FREE_KEYS = ("overwrite", "output", "trust_code", "description")
FREE_RUNTIME_KEYS = ("checkpoint_every", "log_every", "grid_every")


def say(text: str) -> None:
    """Print a line on the main process."""
    if PartialState().is_main_process:
        print(text, flush=True)


@dataclass
class Parts:
    """What a recipe builds; networks are checked and on the device."""

    zoo: list[Teacher]
    generator: ImageGenerator
    description: dict[str, Any]
    student: Classifier | None
    test: RealImages | None
    bn: dict[str, dict[str, float]] = field(default_factory=dict)


def plans(recipe: Recipe) -> list[Plan]:
    """The training phases that the tasks come down to. Raises UserError where there would be nothing to train."""
    synthesis, per, frozen = recipe.synthesis.steps, recipe.synthesis.student_steps, recipe.distill.steps
    adversary = recipe.synthesis.losses.adversary > 0
    phases = []
    live = recipe.generator.checkpoint is None
    for task in recipe.tasks:
        if task == "generator":
            phases.append(Plan("generator", synthesis, per if adversary else 0, 0))
            live = False
        elif live:
            phases.append(Plan("distill", synthesis, per, frozen))
        else:
            phases.append(Plan("distill", 0, 0, frozen))
    if recipe.generator.checkpoint is None and adversary and not per:
        raise UserError("synthesis.losses.adversary needs a student that learns: set synthesis.student_steps above 0")
    for phase in phases:
        if phase.total == 0:
            wanted = "distill.steps" if phase.name == "distill" else "synthesis.steps"
            raise UserError(f"task {phase.name} has nothing to train: set {wanted} above 0")
    return phases


def build(recipe: Recipe, device: torch.device) -> Parts:
    """Build and check all networks and data; no teacher is trained yet."""
    test = None
    if recipe.data.dataset != "none":
        with PartialState().local_main_process_first():  # the first one downloads
            test = assemble.real_images(recipe, train=False, purpose="evaluate")
    zoo = assemble.load_recipe_zoo(recipe, device, say, train=False)
    generator, description = assemble.make_generator(recipe, zoo, device)
    student = assemble.make_student(recipe, zoo, device) if recipe.student.model else None
    if recipe.generator.checkpoint is None:
        check_losses(dataclasses.asdict(recipe.synthesis.losses), zoo, student)
    make_mix(recipe.synthesis.mix.kind)
    return Parts(zoo, generator, description, student, test)


def dry_run(loaded: Loaded) -> None:
    """Build and check everything, print the plan, train nothing."""
    recipe = loaded.recipe
    accelerator, shard = make_accelerator(recipe.runtime.precision)
    phases = plans(recipe)
    parts = build(recipe, shard.device)
    say(f"{recipe.name}: {shard.world} process(es) on {shard.device}, precision {accelerator.mixed_precision}")
    for teacher in parts.zoo:
        spec = recipe.teachers[teacher.name]
        origin = spec.weights or f"to be trained on {recipe.data.dataset}"
        say(f"  teacher {teacher.name}: {spec.model}, {assemble.parameters(teacher):,} parameters, {origin}")
    say(f"  generator: {parts.description['arch']}, {assemble.parameters(parts.generator):,} parameters")
    if parts.student is not None:
        say(f"  student: {recipe.student.model}, {assemble.parameters(parts.student):,} parameters")
    for phase in phases:
        students = phase.synthesis * phase.per + phase.frozen
        say(f"  task {phase.name}: {phase.synthesis} generator updates, {students} student updates")
    say(f"  estimated memory: {estimated_memory(recipe, parts) / 2**30:.2f} GiB per process")
    say("nothing was trained (--dry-run)")
    shut_down(accelerator)


@torch.no_grad()
def estimated_memory(recipe: Recipe, parts: Parts) -> float:
    """A rough figure in bytes per process: weights with gradients and optimiser states, twice the activations of the
    largest teacher or student at the batch size (the generator's are of that order), the replay ring."""
    weights = sum(assemble.parameters(t) for t in parts.zoo) + 4 * assemble.parameters(parts.generator)
    weights += 3 * assemble.parameters(parts.student) if parts.student is not None else 0
    shape = (2, recipe.image.channels, recipe.image.size, recipe.image.size)
    images = torch.zeros(shape, device=next(parts.generator.parameters()).device)
    networks: list[nn.Module] = [*parts.zoo, *([parts.student] if parts.student else [])]
    largest = max(_activations(network, images) for network in networks)
    replay = recipe.distill.replay * recipe.distill.batch_size / 2 * images[0].numel()
    return 4 * (weights + largest * recipe.synthesis.batch_size * 2) + replay


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
    """Carry out a recipe; the same call resumes what was begun, and says so where it is finished already."""
    recipe = loaded.recipe
    started = time.perf_counter()
    accelerator, shard = make_accelerator(recipe.runtime.precision)
    folder = Path(recipe.folder)
    if may_run(loaded, folder):
        phases = plans(recipe)
        parts = build(recipe, shard.device)  # whatever is wrong shows before anything is written or trained
        try:
            open_folder(loaded, folder, accelerator)
            begun = time.perf_counter()
            parts.zoo = assemble.load_recipe_zoo(recipe, shard.device, say)
            spent = {"teachers": time.perf_counter() - begun}
            train(loaded, parts, phases, accelerator, shard, spent)
            spent["before"] = begun - started
            finish(loaded, parts, accelerator, shard, spent, command)
        except OSError as error:
            raise UserError(
                f"could not write in {folder}: {error}; free some space and run the same command again"
            ) from None
    if shard.rank == 0:
        results = json.loads((folder / "results.json").read_text())
        print(closing_table(results))
        print(f"{folder}/report.html shows the run; {folder}/results.json holds the figures")
    shut_down(accelerator)


def may_run(loaded: Loaded, folder: Path) -> bool:
    """False where the folder holds this very run, finished. Raises UserError where it holds another one."""
    config = folder / "config.yaml"
    if loaded.recipe.overwrite:
        _may_remove(loaded.recipe, folder)
    elif config.exists():
        changed = _differences(loaded.recipe, config)
        if changed:
            raise UserError(
                f"{folder} holds a run with other keys ({'; '.join(changed[:3])}); choose output=... for a new run, "
                "or overwrite=true to start this one over"
            )
        if all((folder / name).exists() for name in ("results.json", "report.html")):  # the last two that are written
            say(f"the run in {folder} is finished; overwrite=true starts it over")
            return False
    return True


def _may_remove(recipe: Recipe, folder: Path) -> None:
    """Raise UserError where overwrite=true would remove anything but a run of ours, or what this run needs."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "config.yaml").exists():
        raise UserError(f"{folder} holds no run (no config.yaml) and is not removed; choose another output=...")
    weights = [recipe.student.weights, *(spec.weights for spec in recipe.teachers.values())]
    needed = [recipe.generator.checkpoint, recipe.data.root, recipe.data.train_root, recipe.training.cache, *weights]
    for path in filter(None, needed):
        if Path(path).exists() and Path(path).resolve().is_relative_to(folder.resolve()):
            raise UserError(f"overwrite=true would remove {path}, which this run needs; choose another output=...")


def open_folder(loaded: Loaded, folder: Path, accelerator: Accelerator) -> None:
    """Make the run's folder, empty where the recipe says overwrite, or take it up (collective)."""
    accelerator.wait_for_everyone()  # all have looked into it
    if accelerator.is_main_process:
        if loaded.recipe.overwrite:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "config.yaml", loaded.yaml())
    accelerator.wait_for_everyone()


def _comparable(config: dict[str, Any]) -> dict[str, Any]:
    """A resolved recipe without the keys that may change, as flat dotted keys."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                walk(f"{prefix}{key}.", inner)
        else:
            flat[prefix[:-1]] = value

    walk("", config)
    free = {*FREE_KEYS, *(f"runtime.{key}" for key in FREE_RUNTIME_KEYS)}
    return {key: value for key, value in flat.items() if key not in free}


def _differences(recipe: Recipe, config: Path) -> list[str]:
    try:
        before = _comparable(OmegaConf.to_container(OmegaConf.load(config)))  # type: ignore[arg-type]
    except Exception as error:
        return [f"its config.yaml cannot be read: {' '.join(str(error).split())[:200]}"]
    now = _comparable(dataclasses.asdict(recipe))
    keys = sorted(set(before) | set(now))
    return [f"{key}: {before.get(key)} there, {now.get(key)} here" for key in keys if before.get(key) != now.get(key)]


def owner(recipe: Recipe, world: int) -> str:
    """What a checkpoint belongs to: the recipe, less the keys that may change, and the number of processes."""
    text = json.dumps([_comparable(dataclasses.asdict(recipe)), world], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def train(
    loaded: Loaded, parts: Parts, phases: list[Plan], accelerator: Accelerator, shard: Shard, spent: dict[str, float]
) -> None:
    """Go through the phases, from the newest checkpoint where there is one; write generator and student."""
    recipe, folder = loaded.recipe, Path(loaded.recipe.folder)
    checkpoints = Checkpoints(folder / "checkpoints", owner(recipe, shard.world))
    found = checkpoints.load(shard.device)
    for warning in found.warnings if found else []:
        say(warning)
    state = found.state if found else {}
    if state:
        say(f"resuming {folder} after step {found.step}")  # type: ignore[union-attr]
    metrics = Metrics(folder, main=shard.rank == 0, resumed_after=found.step if found else 0)
    offset = 0
    for plan in phases:
        if state and state["phase"] != plan.name:  # finished before the checkpoint was written
            parts.generator = assemble.reload_generator(recipe, folder / "generator", shard.device)
            parts.bn = parts.generator.description["bn_loss"]
        else:
            loop = make_loop(recipe, plan, parts, accelerator, shard, metrics, checkpoints)
            loop.offset, loop.spent = offset, spent
            start = loop.load_state_dict(state) if state else 0
            state = {}
            loop.run(start)
            save_phase(recipe, plan, parts, loop, shard)
        offset += plan.total
    metrics.close()


def make_loop(
    recipe: Recipe,
    plan: Plan,
    parts: Parts,
    accelerator: Accelerator,
    shard: Shard,
    metrics: Metrics,
    checkpoints: Checkpoints,
) -> Loop:
    """The loop of one phase: a synthesizer where the generator learns, a fit where a student does."""
    runtime, students = recipe.runtime, plan.per * plan.synthesis + plan.frozen
    if runtime.sync_batchnorm and parts.student is not None:
        sync_batchnorm(parts.student)
    synthesizer = make_synthesizer(recipe, parts, accelerator, shard) if plan.synthesis else None
    fit = make_fit(recipe, parts, students, accelerator, shard) if students else None
    return Loop(
        plan,
        parts.generator,
        parts.zoo,
        synthesizer,
        fit,
        accelerator,
        shard,
        metrics,
        checkpoints,
        log_every=runtime.log_every,
        grid_every=runtime.grid_every,
        checkpoint_every=runtime.checkpoint_every,
    )


def make_synthesizer(recipe: Recipe, parts: Parts, accelerator: Accelerator, shard: Shard) -> Synthesizer:
    """The synthesizer of a recipe's `synthesis`."""
    synthesis = recipe.synthesis
    mix = synthesis.mix
    return Synthesizer(
        parts.generator,
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
        adversary_loss=synthesis.adversary_loss,
        warmup=synthesis.warmup,
        redraw=synthesis.redraw,
        seed=recipe.seed,
        accelerator=accelerator,
        shard=shard,
    )


def make_fit(recipe: Recipe, parts: Parts, steps: int, accelerator: Accelerator, shard: Shard) -> Fit:
    """The student's training of a recipe's `distill`, on the stream of the generator."""
    distill = recipe.distill
    if parts.student is None:
        raise UserError("there is no student to train: set student.model")
    stream = SyntheticStream(
        parts.generator,
        batch_size=distill.batch_size,
        teacher=assemble.main_teachers(recipe, parts.zoo),
        seed=recipe.seed,
        replay=distill.replay,
        shift=distill.shift,
        flip=distill.flip,
        mix=distill.mix,
        shard=shard,
        autocast=accelerator.autocast,
        channels_last=recipe.runtime.channels_last,
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
        accelerator=accelerator,
    )


def save_phase(recipe: Recipe, plan: Plan, parts: Parts, loop: Loop, shard: Shard) -> None:
    """Write what a phase made: the generator where it learned, the student where it is not the adversary's alone."""
    folder = Path(recipe.folder)
    synthesizer = loop.synthesizer
    if synthesizer is not None:
        for name, value in synthesizer.bn_start.items():
            parts.bn[name] = {"start": float(value), "end": float(synthesizer.bn_end[name])}
        if shard.rank == 0:
            about = {**parts.description, "steps": plan.synthesis, "bn_loss": parts.bn}
            save_generator(folder / "generator", parts.generator, about)
    if plan.name == "distill" and shard.rank == 0 and parts.student is not None:
        assemble.save_student(recipe, folder / "student", parts.student)
    if plan.name == "generator" and parts.student is not None:
        parts.student = assemble.make_student(recipe, parts.zoo, shard.device)


def finish(
    loaded: Loaded, parts: Parts, accelerator: Accelerator, shard: Shard, spent: dict[str, float], command: str
) -> None:
    """Measure, and on the main process write results.json and report.html. Every process measures the same: the zoo's
    mean logits are a collective."""
    begun = time.perf_counter()
    recipe, folder = loaded.recipe, Path(loaded.recipe.folder)
    figures, _ = look(parts.generator, parts.zoo, accelerator)
    results: dict[str, Any] = {
        "name": recipe.name,
        "command": command,
        "seed": recipe.seed,
        "device": describe_device(shard),
        "processes": shard.world,
        "precision": accelerator.mixed_precision,
        "versions": versions(),
        "teachers": {t.name: _teacher_results(recipe, parts, t, accelerator) for t in parts.zoo},
        "student": _student_results(recipe, parts, accelerator, shard) if "distill" in recipe.tasks else None,
        "generator": {
            "parameters": assemble.parameters(parts.generator),
            "bn_loss": parts.bn or None,
            "class_agreement": {t.name: figures[f"class_agreement_{t.name}"] for t in parts.zoo}
            if parts.description["conditional"]
            else None,
        },
        "diversity": {name: value for name, value in figures.items() if not name.startswith("class_agreement")},
        "tasks": {},
    }
    results["verdict"] = verdict(results)
    results["data_free"] = assemble.training_images(recipe) + [e for e in opened() if e["purpose"] == "evaluate"]
    spent["evaluation"] = time.perf_counter() - begun
    spent["total"] = sum(spent.values())
    results["seconds"] = {name: round(value, 1) for name, value in spent.items()}
    if shard.rank == 0:
        write_atomically(folder / "results.json", json.dumps(results, indent=2) + "\n")
        write_report(folder)


def _measured(score: Accuracy | None) -> dict[str, Any]:
    if score is None:
        return {"accuracy": None, "n": None, "interval": None}
    return {"accuracy": score.percent, "n": score.n, "interval": list(score.interval)}


def _accuracy(model: nn.Module, parts: Parts, accelerator: Accelerator) -> Accuracy | None:
    if parts.test is None:
        return None
    return accuracy(model, parts.test, device=accelerator.device, autocast=accelerator.autocast)


def _teacher_results(recipe: Recipe, parts: Parts, teacher: Teacher, accelerator: Accelerator) -> dict[str, Any]:
    spec = recipe.teachers[teacher.name]
    return {
        "model": spec.model,
        "parameters": assemble.parameters(teacher),
        **_measured(_accuracy(teacher, parts, accelerator)),
        "trained_here": not spec.weights,
    }


def _student_results(recipe: Recipe, parts: Parts, accelerator: Accelerator, shard: Shard) -> dict[str, Any] | None:
    student = parts.student
    if student is None:
        return None
    teachers = assemble.main_teachers(recipe, parts.zoo)
    held_out = SyntheticStream(
        parts.generator,
        batch_size=HELD_OUT_SIZE,
        seed=recipe.seed,
        shard=Shard(shard.device),
        autocast=accelerator.autocast,
    )
    images = (held_out.batch(k, HELD_OUT_EPOCH)[0] for k in range(HELD_OUT_BATCHES))
    size, whole = assemble.parameters(student), max(assemble.parameters(teacher) for teacher in teachers)
    return {
        "model": recipe.student.model,
        "parameters": size,
        "ratio": size / whole,
        **_measured(_accuracy(student, parts, accelerator)),
        "agreement": agreement(student, partial(zoo_logits, teachers), images, autocast=accelerator.autocast),
    }


def verdict(results: dict[str, Any]) -> dict[str, Any]:
    """Whether the run looks sound, and for each thing that does not what to do."""
    notes = []
    for name, percent in (results["generator"]["class_agreement"] or {}).items():
        if percent < 50:
            notes.append(
                f"teacher {name} sees the asked class in {percent:.0f} % of the images: raise synthesis.losses.ce or "
                "synthesis.steps, or lower synthesis.losses.diversity"
            )
    for name, loss in (results["generator"]["bn_loss"] or {}).items():
        if loss["end"] > 0.7 * loss["start"]:
            notes.append(
                f"the batch-norm statistics of teacher {name} do not fit ({loss['start']:.3g} -> {loss['end']:.3g}): "
                "raise synthesis.losses.bn or .steps, or check its mean and std"
            )
    if results["diversity"]["pixel_ratio"] < 0.05:
        notes.append(
            "the images of a class hardly differ (the generator ignores its latents): raise synthesis.losses.diversity "
            "or synthesis.redraw"
        )
    student = results["student"]
    if student and student["agreement"]["percent"] < 80:
        notes.append(
            f"the student agrees with its teacher on {student['agreement']['percent']:.0f} % of fresh images: raise "
            "distill.steps or synthesis.student_steps, or choose a larger student"
        )
    return {"ok": not notes, "notes": notes}


def describe_device(shard: Shard) -> str:
    """The device in words, with the threads of a CPU."""
    if shard.device.type == "cuda":
        return torch.cuda.get_device_name(shard.device)
    return f"{shard.device.type}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    names = ("dfkd", "torch", "torchvision", "timm", "accelerate", "kornia")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
