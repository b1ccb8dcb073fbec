"""The compression tasks of a run: from an input model and the stream to a smaller model, its files and its figures."""

import copy
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dfkd import assemble
from dfkd.assemble import Parts
from dfkd.classifier import Classifier
from dfkd.compress.closed_form import closed_form
from dfkd.compress.cost import cost
from dfkd.compress.files import load_compressed, save_compressed
from dfkd.compress.fit import Fit, hold_zeros
from dfkd.compress.graph import images_of
from dfkd.compress.hints import stage_hints
from dfkd.compress.prune import prune
from dfkd.compress.qat import Training, as_teacher
from dfkd.compress.quantize import quantize
from dfkd.compress.result import Compressed
from dfkd.data import evenly, opened
from dfkd.errors import UserError
from dfkd.evaluate import Accuracy, accuracy, agreement
from dfkd.export import export_onnx
from dfkd.inputs import bits_by_layer, settings, task_input, task_source
from dfkd.metrics import LINE_EVERY
from dfkd.runtime import Autocast, Shard, autocast_of, rng, say, to_float
from dfkd.schema import Recipe
from dfkd.stream import Source, SyntheticStream
from dfkd.teachers import Teacher, have_features
from dfkd.verify import verify
from dfkd.whole import whole
from dfkd.zoo import made_from
from generators import ImageGenerator, PoolGenerator

HELD_OUT_EPOCH = 1_000_003  # an epoch that nothing ever trains on
HELD_OUT, HELD_OUT_BATCH = 2048, 256  # images
CALIBRATION_EPOCH = 1_000_004  # nor is it trained on: it sets ranges and repairs
CALIBRATION_BATCH = 128
TRAINED = ("qat", "prune")  # tasks that train a network whole, in the loop with checkpoints
DONE = "task.json"  # written last: with it a task is finished


def calibration(parts: Parts, source: Source) -> SyntheticStream:
    """Images for ranges and repairs: the same on every process."""
    return SyntheticStream(
        source,
        batch_size=CALIBRATION_BATCH,
        seed=parts.recipe.seed,
        shard=Shard(parts.shard.device),
        epoch=CALIBRATION_EPOCH,
    )


def augmentation(recipe: Recipe) -> dict[str, Any]:
    """How images are moved and mixed before a network learns from them: as a student's."""
    distill = recipe.distill
    return {"shift": distill.shift, "flip": distill.flip, "mix": distill.mix}


def training_stream(
    parts: Parts,
    source: ImageGenerator | Source,
    teacher: Teacher | Sequence[Teacher] | None,
    batch_size: int,
    **options: Any,
) -> SyntheticStream:
    """Images that a student or what is compressed trains on, moved and mixed, this process's share of them, with the
    logits of a teacher or of several; options of SyntheticStream."""
    return SyntheticStream(
        source,
        batch_size=batch_size,
        teacher=teacher,
        seed=parts.recipe.seed,
        shard=parts.shard,
        autocast=autocast_of(parts.accelerator),
        channels_last=parts.recipe.runtime.channels_last,
        **augmentation(parts.recipe),
        **options,
    )


Train = Callable[[Fit], object]  # runs a Fit to its end, with logging and checkpoints


def blocks_done() -> Callable[[int, int], None]:
    """What says now and then how many blocks of a reconstruction are done, and how long the rest may take."""
    begun = said = time.perf_counter()

    def log(done: int, of: int) -> None:
        nonlocal said
        now = time.perf_counter()
        if now - said >= LINE_EVERY:
            say(f"block {done} of {of}, {(of - done) * (now - begun) / done:.0f} s to go")
            said = now

    return log


def _ptq(parts: Parts, model: Classifier, source: Source, train: Train) -> Compressed:
    keys = parts.recipe.ptq
    options: dict[str, Any] = {}
    if keys.method != "nearest":
        options = {"unit": keys.method, "steps": keys.steps, "drop": keys.drop, "fisher": keys.fisher}
        options |= {"seed": parts.recipe.seed, "log": blocks_done(), "autocast": autocast_of(parts.accelerator)}
    return quantize(
        model,
        calibration(parts, source),
        (keys.weights, keys.activations),
        method="nearest" if keys.method == "nearest" else "reconstruct",
        images=keys.images,
        **bits_by_layer(keys),
        **options,
    )


def _qat(parts: Parts, model: Classifier, source: Source, train: Train) -> Compressed:
    keys = parts.recipe.qat
    training = Training(
        model,
        training_stream(parts, source, None, keys.batch_size, replay=keys.replay),  # Training gives it its teacher
        (keys.weights, keys.activations),
        calibration=calibration(parts, source),
        images=keys.images,
        **bits_by_layer(keys),
        warm_start=keys.warm_start,
        seed=parts.recipe.seed,
        steps=keys.steps,
        lr=keys.lr,
        weight_decay=keys.weight_decay,
        temperature=keys.temperature,
        hints=keys.hints,
        accelerator=parts.accelerator,
    )
    say(f"qat trains with a peak learning rate of {training.fit.rates[0]:g}")
    train(training.fit)
    return training.result()


def _prune(parts: Parts, model: Classifier, source: Source, train: Train) -> Compressed:
    keys = parts.recipe.prune
    pruned = prune(
        model,
        calibration(parts, source),
        keys.ratio,
        kind=keys.kind,
        repair=keys.repair,
        ignore=keys.ignore,
        images=keys.images,
        inner_only=keys.inner_only,
    )
    if keys.steps:
        pruned.repaired = copy.deepcopy(pruned.model)  # training may also make it worse, which would not show
        hold_zeros(pruned.model.requires_grad_(True))
        teacher = as_teacher(model, copy.deepcopy(model.model))
        image = assemble.blank(parts.recipe, parts.shard.device)
        hints = stage_hints(pruned.model, teacher, image, keys.hints)
        networks = {"the network before": teacher, "what was pruned": pruned.model}
        features = keys.features > 0 and have_features(networks, image, "prune.features")
        say(f"what was pruned learns, of the layers before: {', '.join(hints.layers) if hints else 'none'}")
        train(
            Fit(
                pruned.model,
                training_stream(parts, source, teacher, keys.batch_size, features=features),
                steps=keys.steps,
                lr=keys.lr,
                temperature=keys.temperature,
                hold_norms=True,
                clip=5.0,
                hints=hints,
                features=keys.features,
                accelerator=parts.accelerator,
            )
        )
    return pruned


def _udfc(parts: Parts, model: Classifier, source: Source, train: Train) -> Compressed:
    keys = parts.recipe.udfc
    return closed_form(
        model,
        keys.ratio,
        keys.bits,
        method=keys.method,
        alpha1=keys.alpha1,
        alpha2=keys.alpha2,
        ignore=keys.ignore,
        image=assemble.blank(parts.recipe, parts.shard.device),
    )


TASKS: dict[str, Callable[[Parts, Classifier, Source, Train], Compressed]] = {
    "ptq": _ptq,
    "qat": _qat,
    "prune": _prune,
    "udfc": _udfc,
}


def finished(recipe: Recipe, task: str) -> bool:
    """Whether a compression task of this run has been done."""
    return (Path(recipe.folder) / task / DONE).is_file()


def task_results(recipe: Recipe, task: str) -> dict[str, Any]:
    """The figures that a finished task wrote."""
    return read_figures(Path(recipe.folder) / task / DONE)


def read_figures(path: Path) -> dict[str, Any]:
    """The figures in a file that a run wrote. Raises UserError where it is torn."""
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is torn ({error}); remove it and run the same command again") from None


def run_task(parts: Parts, task: str, train: Train, trained: float) -> None:
    """Carry out one compression task: compress, write the model and its exports, measure, write task.json. Earlier
    calls, which were stopped, have trained it for `trained` seconds.

    Every process computes the same; the main one writes.
    """
    begun, opened_before = time.perf_counter(), len(opened())
    keys = settings(parts.recipe, task)
    model, about = task_input(parts, keys.input)
    name = getattr(keys, "source", None)  # of udfc none: it looks at no image
    source = task_source(parts, name or "generator", model)
    done = TASKS[task](parts, model, source, train)
    structure = {**about.get("structure", {}), **done.structure}
    folder = parts.folder / task
    figures: dict[str, Any] = {
        "input": keys.input,
        "source": name or "no data",
        **compare(parts, model, done),
        "layers": done.layers,
        "opened": made_from(about) + opened()[opened_before:],
    }
    if parts.shard.rank == 0:
        made = dataclasses.asdict(keys) | (augmentation(parts.recipe) if task in TRAINED and keys.steps else {})
        history = {**about.get("compressed_by", {}), task: made}
        description = {**about, "structure": structure, "compressed_by": history, "opened": figures["opened"]}
        save_compressed(folder, done.model, description)
        figures["not_loaded"] = not_loaded(parts.recipe, folder, done.model)
        if parts.recipe.export.input in ("tasks", task):
            figures["export"] = export(parts, folder, model, done.model)
        figures["seconds"] = round(trained + time.perf_counter() - begun, 1)
        with whole(folder / DONE) as draft:
            draft.write_text(json.dumps(figures, indent=2) + "\n")
    parts.accelerator.wait_for_everyone()


def compare(parts: Parts, before: Classifier, done: Compressed) -> dict[str, Any]:
    """The model before, naively compressed, repaired before it was trained further (None: it was not), and after:
    accuracy, cost, and agreement with the one before."""
    recipe = parts.recipe
    image = assemble.blank(recipe, parts.shard.device)
    models = {"before": before, "naive": done.naive, "repaired": done.repaired, "after": done.model}
    scores = {name: None if model is None else measure(parts, model) for name, model in models.items()}
    costs = {name: cost(model, image) for name, model in (("before", before), ("after", done.model))}
    after = scores["after"]
    return {
        **{name: None if score is None else score.percent for name, score in scores.items()},
        "interval": None if after is None else list(after.interval),
        "intervals": {name: None if score is None else list(score.interval) for name, score in scores.items()},
        "n": None if after is None else after.n,
        "agreement": {
            name: None if model is None else agreement(model, before, held_out(parts))
            for name, model in models.items()
            if name != "before"
        },
        "cost": costs,
    }


@torch.no_grad()
def not_loaded(recipe: Recipe, folder: Path, model: nn.Module) -> str | None:
    """Why a folder does not give the model back that was saved in it; None where it does."""
    size = recipe.image.size
    images = torch.rand(2, recipe.image.channels, size, size, generator=rng("cpu", "check"))
    try:
        loaded = load_compressed(folder, trust_code=recipe.trust_code)
    except UserError as error:
        return str(error)
    same = torch.allclose(loaded(images), copy.deepcopy(model).cpu()(images), rtol=1e-3, atol=1e-4)
    return None if same else "what is loaded gives other logits than what was saved"


def measure(parts: Parts, model: nn.Module) -> Accuracy | None:
    """Accuracy on the real test images, in float32 whatever the run's precision: a quantised model is exact in it."""
    return None if parts.test is None else accuracy(model, parts.test, device=parts.shard.device)


def pool_images(pool: PoolGenerator, count: int) -> tuple[Tensor, Tensor]:
    """At most `count` of the images that a pool holds, uint8, spread evenly over all its rounds, and their labels. A
    stream of it would draw with replacement."""
    images, labels = pool.kept()
    rows = evenly(len(labels), count).to(labels.device)
    return images[rows], labels[rows]


def held_out(parts: Parts, count: int = HELD_OUT, autocast: Autocast = nullcontext) -> Iterator[Tensor]:
    """Batches of synthetic images, `count` in all, that nothing has trained on; of a pool its own, each once and no
    more than it has: what trained on the pool has seen them all."""
    if isinstance(parts.generator, PoolGenerator):
        images, _ = pool_images(parts.generator, count)
        return (to_float(each) for each in images.split(HELD_OUT_BATCH) if len(each))
    stream = SyntheticStream(
        parts.generator,
        batch_size=HELD_OUT_BATCH,
        seed=parts.recipe.seed,
        shard=Shard(parts.shard.device),
        autocast=autocast,
        epoch=HELD_OUT_EPOCH,
    )
    return images_of(stream, count)


def export(parts: Parts, folder: Path, before: nn.Module, after: nn.Module) -> dict[str, Any]:
    """Write the files to deploy beside the model, with the float model they are compared with, and verify them. What
    cannot be exported is said, and costs nothing else: the model is there."""
    try:
        return _export(parts, folder, before, after)
    except UserError as error:
        say(f"{folder.name} is not exported: {error}")
        return {"error": str(error)}


def _export(parts: Parts, folder: Path, before: nn.Module, after: nn.Module) -> dict[str, Any]:
    keys, recipe = parts.recipe.export, parts.recipe
    example = assemble.blank(recipe, torch.device("cpu"), 2)
    after = copy.deepcopy(after).cpu()  # .cpu() would move the zoo's own
    path = export_onnx(after, example, folder / "model.onnx")
    if not keys.verify:
        return {"file": path.name, "bytes": path.stat().st_size}
    float_path = export_onnx(before, example, folder / "before.onnx")
    images = torch.cat([batch.cpu().float() for batch in held_out(parts, keys.images)])
    return {"file": path.name, **verify(path, after, images, float_path=float_path, threads=keys.threads)}
