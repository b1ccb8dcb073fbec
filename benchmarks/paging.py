"""A generator step on the zoo of recipe=imagenet_zoo (random weights) by the memory that its teachers may take.

    python benchmarks/paging.py [--batch 8] [--steps 4] [--budgets 0,1,0.6]

Prints per zoo.memory_gb the seconds of a step, the most that teachers held of the device after a step, and whether the
generator came out bit for bit as without a budget. On a CPU "the device" is a second place in the same memory.
"""

import argparse
from statistics import median

import torch
from step import seconds_of
from torch import Tensor

from dfkd.recipe import load_recipe
from dfkd.runtime import Shard, make_accelerator
from dfkd.schema import Recipe
from dfkd.synthesis import Synthesizer
from dfkd.teachers import SPEC, Teacher, load_zoo
from generators import ConvGenerator


def make_zoo(recipe: Recipe, budget: float, shard: Shard) -> list[Teacher]:
    """The recipe's teachers with random weights that do not depend on the budget."""
    torch.manual_seed(0)
    own = SPEC - {"weights", "moves"}
    specs = {name: {key: getattr(spec, key) for key in own} for name, spec in recipe.zoo_specs.items()}
    size = recipe.image.size
    return load_zoo(
        specs,
        classes=recipe.classes,
        size=size,
        device=shard.device,
        channels_last=True,
        memory_gb=budget,
        untrained=True,
    )


def held(zoo: list[Teacher]) -> float:
    """GB of the device that the networks of a zoo take now."""
    total = 0.0
    for teacher in zoo:
        if teacher.pager is None or teacher.model in teacher.pager.present:
            total += sum(t.numel() * t.element_size() for t in teacher.model.state_dict().values())
    return total / 1e9


def main() -> None:
    """Measure each budget and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--budgets", default="0,1,0.6", help="zoo.memory_gb, with commas between; 0: all stay")
    given = parser.parse_args()
    recipe = load_recipe(["recipe=imagenet_zoo"]).recipe
    accelerator, shard = make_accelerator("auto")
    print(
        f"device {shard.device}, {accelerator.mixed_precision}, batch {given.batch}, torch {torch.__version__}, seed 0"
    )
    first: list[Tensor] = []
    for budget in map(float, given.budgets.split(",")):
        zoo = make_zoo(recipe, budget, shard)
        torch.manual_seed(0)
        spec = recipe.generator
        size = recipe.image.size
        generator = ConvGenerator(latent=spec.latent, classes=recipe.classes, channels=3, size=size, width=spec.width)
        synthesizer = Synthesizer(
            generator.to(shard.device, memory_format=torch.channels_last),  # type: ignore[call-overload]
            zoo,
            losses={"ce": 1.0, "bn": 1.0, "diversity": 1.0},
            steps=100,
            batch_size=given.batch,
            sample=recipe.zoo.sample,
            equalise=False,  # whose first step asks all teachers
            accelerator=accelerator,
            shard=shard,
        )
        seconds, most = [], 0.0
        for step in range(given.steps):
            seconds.append(seconds_of(synthesizer.step, step, shard.device))
            most = max(most, held(zoo))
        weights = [p.detach().cpu() for p in generator.parameters()]
        first = first or weights
        same = all(torch.equal(ours, theirs) for ours, theirs in zip(weights, first))
        print(
            f"zoo.memory_gb={budget:g}: {median(seconds):.2f} s a step, {len(zoo)} teachers, at most {most:.2f} GB of "
            f"them on the device, weights {'as' if same else 'NOT as'} in the first row",
            flush=True,
        )


if __name__ == "__main__":
    main()
