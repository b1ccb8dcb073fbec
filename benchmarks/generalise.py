"""Do images made from mixed zoos suit networks that no zoo held? MixMix's Tables 1, 2, 6 and 8 by one command.

python benchmarks/generalise.py [--out runs/generalise] [--seeds 0,1,2] [recipe=digits_families] [KEY=VALUE ...]

Each source of images (--list names them) is one run per seed: one teacher alone, or the zoo with m' teachers sampled
per update, with Data Mixing and without ("unmixed"); by a generator, or by optimising the pixels themselves; noise and
real images as controls. Equal for all of them: image-updates, synthesis.steps times synthesis.batch_size; not equal:
the time, since an update asks m' teachers. Every source is then tried on the teachers of the zoo and on those held out
of it: batch-norm loss, accuracy on the images' labels; and the held-out ones are compressed on its images and judged on
real test images. The teachers are the same for all seeds, trained at the recipe's seed where they have no weights.

Goes on where it stopped: every figure is a line of OUT/figures.jsonl. Writes OUT/generalise.md and OUT/generalise.svg.
"""

import argparse
import contextlib
import copy
import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bookkeeping import (
    Keys,
    add,
    count,
    exit_code,
    given_keys,
    keep_recipes,
    keep_settings,
    numbers,
    picked,
    trained_keys,
    written,
)
from generalise_figures import CASES, CONTROLS, SAMPLES, Line, plot, table

from dfkd.assemble import Parts, control_images, reload_generator, train_zoo
from dfkd.compress.fit import Fit
from dfkd.curves import whole_lines
from dfkd.data import sample
from dfkd.errors import UserError
from dfkd.inputs import task_input, task_source
from dfkd.quality import quality
from dfkd.recipe import load_recipe
from dfkd.results import describe_device
from dfkd.run import build, run
from dfkd.runtime import Shard, make_accelerator, say
from dfkd.schema import Recipe
from dfkd.stream import Source, SyntheticStream, from_generator
from dfkd.tasks import HELD_OUT_EPOCH, TASKS, measure, pool_images
from dfkd.teachers import Teacher
from generators import PoolGenerator

# How images are made: by the recipe's generator, or without one.
WAYS: dict[str, Keys] = {
    "generator": {},
    "images": {
        "generator.arch": "pixels",
        "synthesis.latent_lr": "0.5",
        "synthesis.cosine": "true",
        "synthesis.losses.diversity": "0",
        "synthesis.losses.tv": "10",
    },
}
STUDY: Keys = {"tasks": "[ptq]", "export.input": "none", "student.model": "", "synthesis.losses.adversary": "0"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and measure what is missing, print and write the table and the plot; the exit code: 2 for a wrong
    argument."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/generalise"))
    parser.add_argument("--seeds", type=numbers, default="0,1,2", help="with commas between")
    parser.add_argument("--sources", default="", help="with commas between; all of --list unless given")
    parser.add_argument("--held-out", default="regnet,shuffle,se", help="teachers of the recipe that are in no zoo")
    parser.add_argument("--cases", default=",".join(CASES), help="; ".join(CASES).replace("%", "%%"))
    parser.add_argument("--rounds", type=count, default=4, help="of image optimisation, of steps / rounds updates each")
    parser.add_argument("--image-keys", default="", help="KEY=VALUE ... for image optimisation alone")
    parser.add_argument("--images", type=count, default=1024, help="on which batch-norm loss and accuracy are measured")
    parser.add_argument("--list", action="store_true", help="name the sources and stop")
    options, given = parser.parse_known_args(arguments)
    return exit_code(lambda: study(options, {"recipe": "digits_families", **given_keys(given, "the study", ())}))


def study(options: argparse.Namespace, keys: Keys) -> bool:
    """All that main does for its options and the KEY=VALUE arguments; whether every source could be made."""
    recipe = load_recipe(written({**keys, **STUDY, "output": str(options.out)})).recipe
    held_out = options.held_out.split(",")
    zoo, image_keys = zoo_names(recipe, held_out), given_keys(options.image_keys.split(), "image optimisation", ())
    sources = all_sources(zoo, recipe.synthesis.steps, options.rounds, image_keys)
    if options.list:
        print("\n".join(sources))
        return True
    cases, chosen = picked(CASES, options.cases), picked(sources, options.sources) if options.sources else sources
    if recipe.data.dataset == "none":
        raise UserError("the study judges compressed networks on real test images: set data.dataset")
    alike = {"keys": keys, "held_out": held_out, "rounds": options.rounds, "images": options.images}
    keep_settings(options.out / "settings.json", {**alike, "image_keys": image_keys})
    keep_recipes(options.out, {"": recipe})
    parts = assembled(recipe)  # on its device, which the names of trained teachers depend on
    # So every seed of the study takes the same ones; with them its runs need no real image, and get none.
    keys = keys | STUDY | trained_keys(recipe) | {"data.dataset": "none"}
    keys |= {f"teachers.{name}.enabled": "false" for name in held_out}
    keys |= {"tasks": "[generator]", "zoo.main": "null"}
    path = options.out / "figures.jsonl"
    lines, absent = whole_lines(path), []
    figures = [("images", teacher.name) for teacher in parts.zoo]
    figures += [(case, model) for case in cases for model in held_out]
    for seed in options.seeds:
        for name, own in chosen.items():
            found = {(line["case"], line["model"]) for line in lines if (line["source"], line["seed"]) == (name, seed)}
            wanted = [each for each in figures if each not in found]
            if not wanted:
                continue
            try:
                seconds = train_source(options.out, name, seed, {**keys, **own}) if own is not None else 0.0
            except UserError as error:
                print(f"{name}, seed {seed}, not made: {error}", flush=True)
                absent.append(f"{name} (seed {seed})")
                continue
            for line in measured(parts, options.out, name, seed, wanted, options.images):
                line |= {"held_out": line["model"] in held_out, "training_seconds": seconds}
                lines.append(line)
                add(path, line)
            print(f"{name}, seed {seed}: trained in {seconds:.0f} s", flush=True)
    shown = [line for name in chosen for line in lines if line["source"] == name]
    shown = [line for line in shown if line["case"] in ("images", *cases) and line["seed"] in options.seeds]
    if not shown:
        raise UserError("no source could be made: there is nothing to show")
    text = table(shown) + (f"\n\nNot there: {'; '.join(absent)}" if absent else "")
    print(text)
    (options.out / "generalise.md").write_text(text + "\n")
    (options.out / "generalise.svg").write_text(plot(shown))
    return not absent


# --- sources ---


def zoo_names(recipe: Recipe, held_out: Sequence[str]) -> list[str]:
    """The enabled teachers that are not held out. Raises UserError where one held out is no teacher, or all are."""
    unknown = sorted(set(held_out) - set(recipe.zoo_specs))
    names = [name for name in recipe.zoo_specs if name not in held_out]
    if unknown or not names:
        raise UserError(
            f"--held-out {','.join(held_out)}: "
            + (f"{', '.join(unknown)} is no enabled teacher; choose from " if unknown else "no teacher is left of ")
            + ", ".join(recipe.zoo_specs)
        )
    return names


def all_sources(zoo: Sequence[str], steps: int, rounds: int, image_keys: Mapping[str, str]) -> dict[str, Keys | None]:
    """The keys of every source by name, with further ones for image optimisation; None for the controls, which nothing
    trains."""
    if not 1 <= rounds <= steps // 2:
        raise UserError(f"--rounds {rounds}: each has synthesis.steps={steps} / rounds updates, and needs 2 or more")
    by_round = {"synthesis.steps": str(rounds), "synthesis.inner": str(steps // rounds), "synthesis.redraw": "0"}
    sources: dict[str, Keys | None] = {}
    for way, keys in WAYS.items():
        keys = {**keys, **image_keys, **by_round} if way == "images" else keys
        for name in zoo:
            others = {f"teachers.{other}.enabled": "false" for other in zoo if other != name}
            sources[f"{way} {name}"] = {**keys, **others, "zoo.sample": "1", "synthesis.mix.probability": "0"}
        for m in SAMPLES[: len(zoo)]:
            sources[f"{way} m={m}"] = {**keys, "zoo.sample": str(m)}
            sources[f"{way} m={m} unmixed"] = {**keys, "zoo.sample": str(m), "synthesis.mix.probability": "0"}
    return {**sources, **dict.fromkeys(CONTROLS)}


def assembled(recipe: Recipe) -> Parts:
    """All teachers of the recipe, trained where they must be, and its test images."""
    accelerator, shard = make_accelerator(recipe.runtime.precision)
    parts = build(recipe, accelerator, shard)
    train_zoo(parts, say)
    return parts


def source_folder(out: Path, name: str, seed: int) -> Path:
    """Where the run of a source is."""
    return out / "sources" / f"{name.replace(' ', '-')}-{seed}"


def train_source(out: Path, name: str, seed: int, keys: Mapping[str, str]) -> float:
    """Make a source as any run is made, or take up what there is of it. Returns the seconds of its training."""
    folder = source_folder(out, name, seed)
    command = written({**keys, "seed": str(seed), "output": str(folder)})
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.log", "a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        code = run(load_recipe(command), " ".join(["train.py", *command]))
    if code:  # a signal stopped it
        sys.exit(code)
    return float(json.loads((folder / "results.json").read_text())["seconds"]["generator"])


# --- measures ---


def measured(
    parts: Parts, out: Path, name: str, seed: int, wanted: Sequence[tuple[str, str]], count: int
) -> Iterator[Line]:
    """The wanted figures of one source, (case, model) each; `count` images for those of the images themselves."""
    here, device = copy.copy(parts), parts.shard.device
    here.recipe = dataclasses.replace(parts.recipe, seed=seed)
    if name not in CONTROLS:
        here.generator = reload_generator(parts.recipe, source_folder(out, name, seed) / "generator", device)
    images = looked_at(here, name, count) if any(case == "images" for case, _ in wanted) else {}
    for case, model in wanted:
        begun = time.perf_counter()
        figures = images[model] if case == "images" else compressed(here, name, model, *CASES[case])
        about = {"source": name, "seed": seed, "case": case, "model": model, "device": describe_device(parts.shard)}
        yield {**about, **figures, "seconds": time.perf_counter() - begun}


def source_of(parts: Parts, name: str, teacher: Teacher) -> Source:
    """Where a source's images come from; noise has the teacher's pixel statistics."""
    return task_source(parts, name, teacher) if name in CONTROLS else from_generator(parts.generator)


def looked_at(parts: Parts, name: str, count: int) -> dict[str, Line]:
    """What every teacher makes of `count` images of a source (dfkd.quality: batch-norm loss over all of them at once,
    accuracy on their labels), by name; and of the images, which is the same for all, how much they differ in a class.
    """
    if name == "real":  # as they are, each once: a stream draws with replacement
        real = sample(control_images(parts.recipe), count)
        images, labels = real.images, real.labels
    elif name not in CONTROLS and isinstance(parts.generator, PoolGenerator):
        images, labels = pool_images(parts.generator, count)
    else:
        seed, source = parts.recipe.seed, source_of(parts, name, parts.zoo[0])
        stream = SyntheticStream(source, batch_size=count, seed=seed, shard=Shard(parts.shard.device))
        images, labels = stream.batch(0, HELD_OUT_EPOCH)
    figures = quality(images, labels, parts.zoo).figures
    pixels = figures["diversity"]["pixel"]
    same = {"n": len(images), "within_over_between": pixels["ratio"], "near_duplicates": pixels["near_duplicates"]}
    return {model: {**of_model, **same} for model, of_model in figures["teachers"].items()}


def compressed(parts: Parts, name: str, model: str, task: str, keys: Mapping[str, Any]) -> Line:
    """Accuracy of one teacher on the real test images before, naively compressed, and after a task on a source's
    images; null and the reason where the task cannot be done to it."""
    here, recipe = copy.copy(parts), parts.recipe
    settings = dataclasses.replace(getattr(recipe, task), **keys)
    here.recipe = dataclasses.replace(recipe, zoo=dataclasses.replace(recipe.zoo, main=model), **{task: settings})
    network, _ = task_input(here, "main")
    try:
        done = TASKS[task](here, network, source_of(here, name, here.zoo[0]), Fit.run)
    except UserError as error:
        return {"after": None, "why": str(error)}
    scores = {"before": measure(here, network), "naive": measure(here, done.naive), "after": measure(here, done.model)}
    n = next(score.n for score in scores.values() if score is not None)
    return {**{key: score and score.percent for key, score in scores.items()}, "n": n}


if __name__ == "__main__":
    sys.exit(main())
