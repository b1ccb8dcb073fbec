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
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from dfkd.assemble import Parts, load_recipe_zoo, reload_generator, teacher_folder
from dfkd.compress.fit import Fit
from dfkd.errors import UserError
from dfkd.quality import quality
from dfkd.recipe import load_recipe
from dfkd.results import describe_device
from dfkd.run import build, run
from dfkd.runtime import Shard, make_accelerator, say
from dfkd.schema import Recipe
from dfkd.stream import Source, SyntheticStream, from_generator
from dfkd.tasks import HELD_OUT_EPOCH, TASKS, measure, task_input, task_source
from dfkd.teachers import Teacher
from generators import GeneratorError

Line = dict[str, Any]
Keys = dict[str, str]

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
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "W4A4 PTQ": ("ptq", {"weights": 4, "activations": 4}),
    "W2A4 PTQ": ("ptq", {"weights": 2, "activations": 4}),
    "50 % channels": ("prune", {"kind": "channels", "ratio": 0.5}),
}
CONTROLS = ("noise", "real")
STUDY: Keys = {"tasks": "[ptq]", "export.input": "none", "student.model": "", "synthesis.losses.adversary": "0"}
SAMPLES = (1, 2, 3, 4)  # m'


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and measure what is missing, print and write the table and the plot; the exit code: 2 for a wrong
    argument."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/generalise"))
    parser.add_argument("--seeds", default="0,1,2", help="with commas between")
    parser.add_argument("--sources", default="", help="with commas between; all of --list unless given")
    parser.add_argument("--held-out", default="regnet,shuffle,se", help="teachers of the recipe that are in no zoo")
    parser.add_argument("--cases", default=",".join(CASES), help="; ".join(CASES).replace("%", "%%"))
    parser.add_argument("--rounds", type=int, default=4, help="of image optimisation, of steps / rounds updates each")
    parser.add_argument("--image-keys", default="", help="KEY=VALUE ... for image optimisation alone")
    parser.add_argument("--images", type=int, default=1024, help="on which batch-norm loss and accuracy are measured")
    parser.add_argument("--list", action="store_true", help="name the sources and stop")
    options, given = parser.parse_known_args(arguments)
    try:
        study(options, {"recipe": "digits_families", **read(given)})
    except (UserError, GeneratorError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def study(options: argparse.Namespace, keys: Keys) -> None:
    """All that main does for its options and the KEY=VALUE arguments."""
    recipe = load_recipe(written({**keys, **STUDY, "output": str(options.out)})).recipe
    held_out = options.held_out.split(",")
    zoo, image_keys = zoo_names(recipe, held_out), read(options.image_keys.split())
    sources = all_sources(zoo, recipe.synthesis.steps, options.rounds, image_keys)
    if options.list:
        print("\n".join(sources))
        return
    cases, chosen = picked(CASES, options.cases), picked(sources, options.sources) if options.sources else sources
    if recipe.data.dataset == "none":
        raise UserError("the study judges compressed networks on real test images: set data.dataset")
    alike = {"keys": keys, "held_out": held_out, "rounds": options.rounds, "images": options.images}
    keep_settings(options.out, {**alike, "image_keys": image_keys})
    keys = keys | STUDY | trained_weights(recipe) | {f"teachers.{name}.enabled": "false" for name in held_out}
    keys |= {"tasks": "[generator]", "zoo.main": "null"}
    parts = assembled(recipe)
    path = options.out / "figures.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    figures = [("images", teacher.name) for teacher in parts.zoo]
    figures += [(case, model) for case in cases for model in held_out]
    for seed in map(int, options.seeds.split(",")):
        for name, own in chosen.items():
            found = {(line["case"], line["model"]) for line in lines if (line["source"], line["seed"]) == (name, seed)}
            wanted = [each for each in figures if each not in found]
            if not wanted:
                continue
            seconds = train_source(options.out, name, seed, {**keys, **own}) if own is not None else 0.0
            for line in measured(parts, options.out, name, seed, wanted, options.images):
                line |= {"held_out": line["model"] in held_out, "training_seconds": seconds}
                lines.append(line)
                with path.open("a") as file:
                    file.write(json.dumps(line) + "\n")
            print(f"{name}, seed {seed}: trained in {seconds:.0f} s", flush=True)
    shown = [line for name in chosen for line in lines if line["source"] == name]
    text = table(shown)
    print(text)
    (options.out / "generalise.md").write_text(text + "\n")
    (options.out / "generalise.svg").write_text(plot(shown))


def keep_settings(out: Path, settings: dict[str, Any]) -> None:
    """Write down what all figures of a folder have in common. Raises UserError where it holds others."""
    path = out / "settings.json"
    before = json.loads(path.read_text()) if path.exists() else settings
    if changed := [key for key, value in settings.items() if before.get(key) != value]:
        words = "; ".join(f"{key}: {before.get(key)} there, {settings[key]} here" for key in changed)
        raise UserError(f"{out} holds figures of other settings ({words}); choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings) + "\n")


def picked(table: Mapping[str, Any], names: str) -> dict[str, Any]:
    """The entries of a table that names with commas between choose. Raises UserError where one is not in it."""
    chosen = list(filter(None, names.split(",")))
    if unknown := sorted(set(chosen) - set(table)):
        raise UserError(f"unknown {unknown[0]!r}; choose from {', '.join(table)}")
    return {name: table[name] for name in chosen}


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


def read(arguments: Sequence[str]) -> Keys:
    """Keys as a command line has them, KEY=VALUE each. Raises UserError where one is not."""
    if wrong := [argument for argument in arguments if "=" not in argument]:
        raise UserError(f"{wrong[0]!r} is not KEY=VALUE; see --help")
    return {key: value for key, _, value in (argument.partition("=") for argument in arguments)}


def written(keys: Mapping[str, str]) -> list[str]:
    """Keys as a command line has them."""
    return [f"{key}={value}" for key, value in keys.items()]


def assembled(recipe: Recipe) -> Parts:
    """All teachers of the recipe, trained where they must be, and its test images."""
    accelerator, shard = make_accelerator(recipe.runtime.precision)
    parts = build(recipe, accelerator, shard)
    parts.zoo = load_recipe_zoo(recipe, shard.device, say)
    return parts


def trained_weights(recipe: Recipe) -> Keys:
    """Keys that name the teachers trained at the recipe's seed, so that every seed of the study takes the same ones;
    with them its runs need no real image, and get none."""
    untrained = {name: spec for name, spec in recipe.zoo_specs.items() if not spec.weights}
    folders = {f"teachers.{name}.weights": str(teacher_folder(recipe, name, s)) for name, s in untrained.items()}
    return {**folders, "data.dataset": "none"}


def source_folder(out: Path, name: str, seed: int) -> Path:
    """Where the run of a source is."""
    return out / "sources" / f"{name.replace(' ', '-')}-{seed}"


def train_source(out: Path, name: str, seed: int, keys: Mapping[str, str]) -> float:
    """Make a source as any run is made, or take up what there is of it. Returns the seconds of its training."""
    folder = source_folder(out, name, seed)
    command = written({**keys, "seed": str(seed), "output": str(folder)})
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.log", "a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        run(load_recipe(command), " ".join(["train.py", *command]))
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
    seed, source = parts.recipe.seed, source_of(parts, name, parts.zoo[0])
    stream = SyntheticStream(source, batch_size=count, seed=seed, shard=Shard(parts.shard.device))
    images, labels = stream.batch(0, HELD_OUT_EPOCH)
    figures = quality(images, labels, parts.zoo).figures
    pixels = figures["diversity"]["pixel"]
    same = {"n": count, "within_over_between": pixels["ratio"], "near_duplicates": pixels["near_duplicates"]}
    return {model: {**of_model, **same} for model, of_model in figures["teachers"].items()}


def compressed(parts: Parts, name: str, model: str, task: str, keys: Mapping[str, Any]) -> Line:
    """Accuracy of one teacher on the real test images before, naively compressed, and after a task on a source's
    images; null and the reason where the task cannot be done to it."""
    here, recipe = copy.copy(parts), parts.recipe
    settings = dataclasses.replace(getattr(recipe, task), **keys)
    here.recipe = dataclasses.replace(recipe, zoo=dataclasses.replace(recipe.zoo, main=model), **{task: settings})
    network, _ = task_input(here, "main")
    try:
        done = TASKS[task](here, network, source_of(here, name, here.zoo[0]), train)
    except UserError as error:
        return {"after": None, "why": str(error)}
    scores = {"before": measure(here, network), "naive": measure(here, done.naive), "after": measure(here, done.model)}
    n = next(score.n for score in scores.values() if score is not None)
    return {**{key: score and score.percent for key, score in scores.items()}, "n": n}


def train(fit: Fit) -> None:
    """All steps at once, without checkpoints."""
    fit.run()


# --- figures over models, then over seeds ---


def relative_bn(lines: Sequence[Line]) -> Callable[[Line], float | None]:
    """A line's batch-norm loss in units of real images' on the same model and seed; None where these are missing."""
    real = {(line["model"], line["seed"]): line["bn_l2"] for line in lines if shows(line, "images", "real")}

    def relative(line: Line) -> float | None:
        unit = real.get((line["model"], line["seed"]))
        return line["bn_l2"] / unit if unit else None

    return relative


def shows(line: Line, case: str, source: str | None = None) -> bool:
    """Whether a line is of a case, and of a source where one is given."""
    return line["case"] == case and source in (None, line["source"])


def over_seeds(
    lines: Sequence[Line],
    figure: Callable[[Line], float | None],
    over_models: Callable[[list[float]], float] = statistics.fmean,
) -> list[float]:
    """One value per seed: the mean (or other summary) over models of a figure of the lines; lines without it count
    nothing."""
    values: dict[int, list[float]] = {}
    for line in lines:
        value = figure(line)
        if value is not None:
            values.setdefault(line["seed"], []).append(value)
    return [over_models(of_models) for _, of_models in sorted(values.items())]


def columns(lines: Sequence[Line], source: str) -> dict[str, list[float]]:
    """What the table says of a source, by column: one value per seed."""
    own = [line for line in lines if line["source"] == source]
    images = [line for line in own if shows(line, "images")]
    held_out = [line for line in images if line["held_out"]]
    relative = relative_bn(lines)
    by_case = {
        case: over_seeds([line for line in own if shows(line, case)], lambda line: line["after"]) for case in CASES
    }
    return {
        "bn loss, zoo": over_seeds([line for line in images if not line["held_out"]], relative),
        "bn loss, held out": over_seeds(held_out, relative),
        "accuracy, held out": over_seeds(held_out, lambda line: line["accuracy"]),
        "accuracy, all": over_seeds(images, lambda line: line["accuracy"]),
        "spread": over_seeds(images, lambda line: line["accuracy"], statistics.pstdev),
        **{case: values for case, values in by_case.items() if values},
        "seconds": over_seeds(images, lambda line: line["training_seconds"]),
    }


def said(values: Sequence[float], digits: int = 1) -> str:
    """Mean and, of several values, their standard deviation (n - 1) in words."""
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{deviation}"


def table(lines: Sequence[Line]) -> str:
    """Markdown: a row per source, means over models as mean ± deviation over seeds."""
    sources = list(dict.fromkeys(line["source"] for line in lines))
    figures = {source: columns(lines, source) for source in sources}
    names = list(dict.fromkeys(name for of_source in figures.values() for name in of_source))
    rows = ["| source | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
    for source in sources:
        cells = [said(figures[source].get(name, []), 2 if "bn" in name else 1) for name in names]
        rows.append(f"| {source} | " + " | ".join(cells) + " |")
    naive = [line for line in lines if shows(line, line["case"], "real") and line.get("naive") is not None]
    cells = [said(over_seeds([line for line in naive if shows(line, n)], lambda line: line["naive"])) for n in names]
    rows.append("| naive, on real images | " + " | ".join(cells) + " |")
    before = {line["model"]: line["before"] for line in lines if line.get("before") is not None}
    whole = ", ".join(f"{model} {value:.2f} %" for model, value in sorted(before.items()))
    skipped = {f"{line['case']} of {line['model']}: {line['why']}" for line in lines if "why" in line}
    seeds = ", ".join(map(str, sorted({line["seed"] for line in lines})))
    notes = [f"Held out, before compression: {whole}. Seeds {seeds}."]
    return "\n".join([*rows, "", *notes, *(f"Not done: {text}" for text in sorted(skipped))])


# --- the plot ---

SIZE, MARGIN = (300, 200), (52, 26, 12, 34)  # of a panel's axes; left, top, right, bottom of them
SERIES = {  # source name without its m', colour, dash
    "generator m={}": ("generator, mixed", "#1f6fb4", ""),
    "generator m={} unmixed": ("generator, unmixed", "#1f6fb4", "5 3"),
    "images m={}": ("images, mixed", "#c0501f", ""),
    "images m={} unmixed": ("images, unmixed", "#c0501f", "5 3"),
}
PANELS = ("bn loss, held out", "accuracy, held out", *CASES)


def plot(lines: Sequence[Line]) -> str:
    """SVG: a panel per measure against m'; teachers alone as rings at the left, controls as grey lines."""
    sources = list(dict.fromkeys(line["source"] for line in lines))
    figures = {source: columns(lines, source) for source in sources}
    shown = [name for name in PANELS if any(of_source.get(name) for of_source in figures.values())]
    width, height = SIZE[0] + MARGIN[0] + MARGIN[2], SIZE[1] + MARGIN[1] + MARGIN[3]
    parts = [panel(name, figures, (k % 3) * width, (k // 3) * height) for k, name in enumerate(shown)]
    rows = -(-len(shown) // 3)
    text = "".join(parts) + legend(rows * height + 14)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {3 * width} {rows * height + 24}" '
        f'font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="white"/>{text}</svg>\n'
    )


def panel(name: str, figures: Mapping[str, Mapping[str, list[float]]], left: float, top: float) -> str:
    """One measure of all sources; the y axis spans all but noise, which stands at its edge where it is beyond."""
    values = {source: of[name] for source, of in figures.items() if of.get(name)}
    inside = [value for source, of in values.items() if source != "noise" for value in of]
    low, high = min(inside, default=0.0), max(inside, default=1.0)
    high += (high - low or 1.0) * 0.05
    x0, y0 = left + MARGIN[0], top + MARGIN[1]

    def at(m: float) -> float:
        return x0 + SIZE[0] * m / (len(SAMPLES) + 0.5)

    def up(value: float) -> float:
        return y0 + SIZE[1] * (1 - (value - low) / (high - low))

    title = f"{name}, {'real images = 1' if 'bn' in name else '%'}"
    marks = [f'<text x="{x0}" y="{y0 - 12}" font-weight="bold">{escape(title)}</text>']
    for share in (0.0, 0.5, 1.0):
        value = low + share * (high - low)
        marks.append(f'<line x1="{x0}" x2="{x0 + SIZE[0]}" y1="{up(value):.1f}" y2="{up(value):.1f}" stroke="#ddd"/>')
        marks.append(f'<text x="{x0 - 5}" y="{up(value) + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    for m, label in ((0.4, "alone"), *((m, f"m' = {m}") for m in SAMPLES)):
        marks.append(f'<text x="{at(m):.1f}" y="{y0 + SIZE[1] + 16}" text-anchor="middle">{escape(label)}</text>')
    for source in (source for source in CONTROLS if source in values):
        y = up(min(max(statistics.fmean(values[source]), low), high))
        ends = f'x1="{x0}" x2="{x0 + SIZE[0]}" y1="{y:.1f}" y2="{y:.1f}"'
        marks.append(f'<line {ends} stroke="#888" stroke-dasharray="2 3"/>')
        words = f"{source} {statistics.fmean(values[source]):.4g}"
        marks.append(f'<text x="{x0 + SIZE[0]}" y="{y - 3:.1f}" text-anchor="end" fill="#666">{words}</text>')
    for template, (_, colour, dash) in SERIES.items():
        points = [(at(m), values[template.format(m)]) for m in SAMPLES if template.format(m) in values]
        marks.append(curve(points, up, colour, dash))
    for source in (source for source in values if source not in CONTROLS and " m=" not in source):
        colour = SERIES[f"{source.split()[0]} m={{}}"][1]
        x, y = at(0.3 if source.startswith("generator") else 0.5), up(statistics.fmean(values[source]))
        ring = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="none" stroke="{colour}">'
        marks.append(f"{ring}<title>{escape(source)}</title></circle>")
    return "".join(marks)


def curve(points: Sequence[tuple[float, list[float]]], up: Callable[[float], float], colour: str, dash: str) -> str:
    """Means joined by a line, each with a bar of one standard deviation over seeds either way."""
    style = f'stroke="{colour}" fill="none"'
    means = [(x, statistics.fmean(of), statistics.stdev(of) if len(of) > 1 else 0.0) for x, of in points]
    line = " ".join(f"{x:.1f},{up(mean):.1f}" for x, mean, _ in means)
    marks = [f'<polyline points="{line}" {style} stroke-width="1.6" stroke-dasharray="{dash}"/>']
    for x, mean, deviation in means:
        marks.append(f'<circle cx="{x:.1f}" cy="{up(mean):.1f}" r="2.5" fill="{colour}"/>')
        ends = f'y1="{up(mean - deviation):.1f}" y2="{up(mean + deviation):.1f}"'
        marks.append(f'<line x1="{x:.1f}" x2="{x:.1f}" {ends} {style}/>')
    return "".join(marks)


def legend(y: float) -> str:
    """What the lines and rings are."""
    marks = []
    for k, (name, colour, dash) in enumerate(SERIES.values()):
        x = MARGIN[0] + 180 * k
        line = f'<line x1="{x}" x2="{x + 28}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="1.6" '
        marks.append(f'{line}stroke-dasharray="{dash}"/><text x="{x + 34}" y="{y + 4}">{escape(name)}</text>')
    x = MARGIN[0] + 180 * len(SERIES)
    marks.append(f'<circle cx="{x}" cy="{y}" r="3.5" fill="none" stroke="black"/>')
    return "".join(marks) + f'<text x="{x + 10}" y="{y + 4}">one teacher of the zoo alone</text>'


if __name__ == "__main__":
    sys.exit(main())
