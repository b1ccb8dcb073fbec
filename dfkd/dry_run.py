"""`--dry-run`: build and check everything, say what would be done and roughly in how much memory, train nothing."""

import dataclasses
from pathlib import Path

import torch
from torch import nn

from dfkd import assemble
from dfkd.assemble import Parts
from dfkd.folder import may_run
from dfkd.inputs import COMPRESSIONS, distilled, settings
from dfkd.phases import learns_features, make_hints, plans, say_beginning
from dfkd.recipe import Loaded
from dfkd.run import build
from dfkd.runtime import make_accelerator, say, shut_down
from dfkd.schema import Recipe
from dfkd.stream import feature_widths
from dfkd.teachers import batch_norms


def dry_run(loaded: Loaded) -> None:
    """Build and check everything, print the plan, train nothing."""
    recipe = loaded.recipe
    accelerator, shard = make_accelerator(recipe.runtime.precision)
    may_run(loaded, Path(recipe.folder))
    phases = plans(recipe)
    parts = build(recipe, accelerator, shard)
    say(f"{recipe.name}: {shard.world} process(es) on {shard.device}, precision {accelerator.mixed_precision}")
    for teacher in parts.zoo:
        spec = recipe.teachers[teacher.name]
        origin = spec.weights or f"to be trained on {recipe.data.dataset}"
        say(f"  teacher {teacher.name}: {spec.model}, {assemble.parameters(teacher):,} parameters, {origin}")
    worker = parts.worker or parts.generator
    about = parts.generator.description
    kept = f", a pool of {about['capacity']:,} images" if about["arch"] == "pool" else ""
    say(f"  generator: {about.get('made_by', about['arch'])}, {assemble.parameters(worker):,} parameters{kept}")
    learner = distilled(parts)
    if learner.student is not None:
        given = recipe.distill.input if "distill" in recipe.tasks else None
        model = recipe.student.model if given is None else f"distill.input={given}"
        if given is not None and learner is parts:
            say(f"  student: {model}, which an earlier task makes")
        else:
            say(f"  student: {model}, {assemble.parameters(learner.student):,} parameters")
            say_beginning(learner, make_hints(learner))
    for phase in phases:
        if phase.name in COMPRESSIONS:
            keys = settings(recipe, phase.name)
            text = ", ".join(
                f"{key} {value}" for key, value in dataclasses.asdict(keys).items() if value not in ([], {}, None)
            )
            say(f"  task {phase.name}: {text}")
        else:
            rounds = f"rounds of {recipe.synthesis.inner} " if parts.worker is not None else ""
            control = recipe.distill.source != "generator" and phase.name == "distill"
            on = f", a control on {recipe.distill.source}" if control else ""
            updates = f"{phase.synthesis} {rounds}generator updates, {phase.students} student updates"
            say(f"  task {phase.name}: {updates}{on}")
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
    images = assemble.blank(recipe, parts.generator.device, 2)
    networks: list[nn.Module] = [*parts.zoo, *([parts.student] if parts.student else [])]
    largest = max(_activations(network, images) for network in networks)
    features = sum(norm.running_mean.numel() for norm in batch_norms(parts.zoo[0].model).values())  # type: ignore
    weights += recipe.synthesis.bank * features
    replayed = recipe.distill.replay * recipe.distill.batch_size * recipe.distill.fresh
    weights += replayed * recipe.classes
    teachers = assemble.main_teachers(recipe, parts.zoo)
    learner = parts.student if any(plan.students for plan in plans(recipe) if plan.name not in COMPRESSIONS) else None
    if learner is not None and learns_features(recipe, teachers, learner):
        width = sum(feature_widths(teachers))
        weights += (replayed + 3 * feature_widths([learner])[0]) * width  # in the ring, and the projector
    kept = replayed + parts.generator.description.get("capacity", 0)
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
