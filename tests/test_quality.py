"""Figures of images against formulas written another way, and the command on sources of every kind."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from runs_fixture import Runs, start
from safetensors.torch import save_file
from sklearn.metrics.pairwise import cosine_distances as sk_cosine
from sklearn.metrics.pairwise import euclidean_distances
from torch import Tensor, nn

from dfkd import quality as Q
from dfkd.data import RealImages, load_folder, opened
from dfkd.draws import Moves, augment
from dfkd.errors import UserError
from dfkd.evaluate import accuracy, diversity
from dfkd.judge import _streamed, grid, slug, table
from dfkd.losses import bn_l2
from dfkd.models import build_model
from dfkd.quality import quality
from dfkd.runtime import Shard
from dfkd.stream import SyntheticStream, from_generator, materialize
from dfkd.teachers import Teacher, tap_features
from generators import ConvGenerator, PoolGenerator, save_generator

Make = Callable[..., Teacher]


def varied(n: int = 50, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Smooth grey uint8 images [n, 1, 8, 8] that differ, and labels of three classes."""
    rng = torch.Generator().manual_seed(seed)
    small = torch.rand(n, 1, 4, 4, generator=rng)
    images = (nn.functional.interpolate(small, size=(8, 8), mode="bilinear") * 255).round().to(torch.uint8)
    return images, torch.randint(3, (n,), generator=rng)


@pytest.fixture
def zoo(make_teacher: Make) -> list[Teacher]:
    return [make_teacher("plain"), make_teacher("residual", "dfkd:tiny_residual", seed=1, kwargs={"width": 4})]


# --- what teachers make of images ---


def test_accuracy_is_that_of_evaluate_with_its_interval(zoo: list[Teacher]) -> None:
    images, labels = varied(200)
    figures = quality(images, labels, zoo).figures
    scores = [accuracy(t, RealImages(images, labels, ["a", "b", "c"], "test"), device="cpu") for t in zoo]
    for teacher, score in zip(zoo, scores):
        each = figures["teachers"][teacher.name]
        assert each["accuracy"] == pytest.approx(score.percent)
        assert each["interval"] == pytest.approx(list(score.interval))
    percent = np.array([score.percent for score in scores])
    assert 0 < percent.min() < percent.max()
    spread = {"mean": percent.mean(), "std": percent.std(), "min": percent.min(), "max": percent.max()}
    assert figures["accuracy"] == pytest.approx(spread)


def test_confidence_and_balance_by_hand(zoo: list[Teacher]) -> None:
    images, labels = varied(90)
    figures = quality(images, labels, zoo).figures
    logits = zoo[0](images.float() / 255).double().numpy()
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    share = np.bincount(logits.argmax(1), minlength=3) / 90
    assert (share > 0).all()
    each = figures["teachers"]["plain"]
    assert each["confidence"] == pytest.approx(100 * p.max(1).mean(), rel=1e-6)
    assert each["class_balance"] == pytest.approx(-(share * np.log(share)).sum() / np.log(3), rel=1e-9)
    share = np.bincount(labels.numpy(), minlength=3) / 90
    assert figures["class_balance"] == pytest.approx(-(share * np.log(share)).sum() / np.log(3), rel=1e-9)
    assert Q.balance(torch.zeros(5, dtype=torch.int64), 3) == 0
    assert Q.balance(torch.arange(6) % 3, 3) == pytest.approx(1)


def test_batch_norm_losses_are_those_of_one_batch_of_everything(zoo: list[Teacher]) -> None:
    images, labels = varied(50)
    plainly = quality(images, labels, zoo).figures["teachers"][zoo[0].name]
    zoo[0].moves = Moves(3, black=True)  # its batch norms hold the statistics of crops; what it names are whole images
    figures = quality(images, labels, zoo).figures["teachers"]
    assert [figures[name]["moves"] for name in ("plain", "residual")] == [[3, False, True], [0, False, False]]
    cropped = figures[zoo[0].name]
    assert [cropped[key] for key in ("accuracy", "confidence")] == [plainly[key] for key in ("accuracy", "confidence")]
    assert abs(cropped["bn_l2"] / plainly["bn_l2"] - 1) > 1e-3
    for batch_size in (7, 16, 50):
        figures = quality(images, labels, zoo, batch_size=batch_size).figures
        for teacher in zoo:
            with teacher.tap() as seen:
                teacher(augment(images.float() / 255, Shard(images.device), teacher.moves, "quality"))
            each = figures["teachers"][teacher.name]
            assert each["bn_l2"] == pytest.approx(bn_l2(seen.batch, seen.stored).item(), rel=1e-5)
            divergences = [
                torch.distributions.kl_divergence(  # an independent KL of Gaussians, and its mean over all channels
                    torch.distributions.Normal(mean, (var + 1e-5).sqrt()),
                    torch.distributions.Normal(mu, (sigma2 + 1e-5).sqrt()),
                )
                for (mean, var), (mu, sigma2) in zip(seen.batch, seen.stored)
            ]
            assert each["bn_kl"] == pytest.approx(torch.cat(divergences).mean().item(), rel=1e-4)


def test_moments_of_batches_are_pooled_not_averaged() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(1000, 1, (10, 4)) * [1, 2, 3, 4]  # far from 0: E[x^2] - E[x]^2 would cancel
    parts = [x[:3], x[3:]]
    moments = [[(torch.tensor(part.mean(0)), torch.tensor(part.var(0)))] for part in parts]
    [(mean, var)] = Q.pooled(moments, [3, 7])
    np.testing.assert_allclose(mean.numpy(), x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(var.numpy(), x.var(0), rtol=1e-10)


def test_a_last_image_alone_is_no_batch_and_floats_are_as_bytes(zoo: list[Teacher]) -> None:
    images, labels = varied(33)
    small = quality(images, labels, zoo, batch_size=32).figures  # 17 and 16
    floats = quality(images.float() / 255, labels, zoo, batch_size=33).figures
    assert small["teachers"]["plain"]["bn_l2"] == pytest.approx(floats["teachers"]["plain"]["bn_l2"], rel=1e-5)
    assert small["diversity"]["pixel"] == floats["diversity"]["pixel"]
    assert quality(images, labels, zoo, batch_size=32).figures == small  # to the last bit


def test_without_labels_classes_are_what_the_teacher_sees(zoo: list[Teacher]) -> None:
    images, _ = varied(60)
    blind = quality(images, None, zoo, features="residual")
    seen = zoo[1](images.float() / 255).argmax(1)
    assert torch.equal(blind.classes, seen)
    labelled = quality(images, seen, zoo, features="residual").figures
    assert blind.figures["diversity"] == labelled["diversity"]
    assert blind.figures["classes"] == "predictions of teacher residual"
    assert blind.figures["accuracy"] is blind.figures["class_balance"] is None
    assert blind.figures["teachers"]["plain"]["accuracy"] is blind.figures["teachers"]["plain"]["interval"] is None
    assert labelled["teachers"]["residual"]["accuracy"] == 100


def test_a_teacher_without_linear_layer_and_batch_norm_gives_logits_and_no_loss() -> None:
    class Pooled(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).mean((2, 3))

    torch.manual_seed(0)
    teacher = Teacher(Pooled(nn.Conv2d(1, 3, 3)), name="bare")
    images, labels = varied()
    figures = quality(images, labels, [teacher]).figures
    assert figures["features"] == {"teacher": "bare", "layer": "logits", "size": 3}
    assert figures["teachers"]["bare"]["bn_l2"] is figures["teachers"]["bare"]["bn_kl"] is None
    assert figures["accuracy"]["std"] == 0


# --- diversity ---


@pytest.mark.parametrize("block", [7, 64])
def test_distances_are_scikit_learns(block: int) -> None:
    rng = np.random.default_rng(1)
    points, classes = rng.normal(3, 1, (40, 5)).astype(np.float32), rng.integers(4, size=40)
    points[::4] *= np.array([1, 0, 0, 0, 0], np.float32)
    points[8] = points[4] + np.float32(1e-3)
    apart, cosine = euclidean_distances(points.astype(np.float64)), sk_cosine(points.astype(np.float64))
    pairs = ~np.eye(40, dtype=bool)
    alike = (classes[:, None] == classes) & pairs
    nearest = np.where(pairs, apart, np.inf).min(1)
    found = Q.distances(torch.from_numpy(points), torch.from_numpy(classes), block)
    mean = apart[pairs].mean()
    assert found["mean_distance"] == pytest.approx(mean, rel=1e-6)
    assert found["mean_within"] == pytest.approx(apart[alike].mean(), rel=1e-6)
    assert found["nearest"] == pytest.approx(nearest.mean(), rel=1e-5)
    assert found["near_duplicates"] == pytest.approx(100 * (nearest <= 0.05 * mean).mean())
    assert found["near_duplicates"] >= 5
    angles = Q.cosine_distances(torch.from_numpy(points), torch.from_numpy(classes))
    assert angles["mean_cosine"] == pytest.approx(cosine[pairs].mean(), rel=1e-6)
    assert angles["mean_cosine_within"] == pytest.approx(cosine[alike].mean(), rel=1e-6)


def test_no_two_of_a_class() -> None:
    points, classes = torch.rand(3, 4), torch.arange(3)
    assert Q.distances(points, classes)["mean_within"] is None
    assert Q.cosine_distances(points, classes)["mean_cosine_within"] is None


def test_planted_duplicates_are_found(zoo: list[Teacher]) -> None:
    images, labels = varied(60)
    clean = quality(images, labels, zoo).figures
    assert clean["exact_duplicates"] == clean["diversity"]["pixel"]["near_duplicates"] == 0
    images[10:13], images[30] = images[0], images[31]  # six images that have a twin
    images[40] = images[41]
    images[40, 0, 0, 0] ^= 1  # one bit apart: two near-duplicates more
    figures = quality(images, labels, zoo).figures
    assert figures["exact_duplicates"] == pytest.approx(10)
    assert figures["diversity"]["pixel"]["near_duplicates"] == pytest.approx(100 * 8 / 60)
    assert figures["diversity"]["feature"]["near_duplicates"] >= 100 * 8 / 60


def test_collapse_shows(zoo: list[Teacher]) -> None:
    images, labels = varied(60)
    whole = quality(images, labels, zoo).figures["diversity"]
    each = quality(images[labels], labels, zoo).figures  # one image per class
    for kind in ("pixel", "feature"):
        assert whole[kind]["mean_within"] > 0.5 * whole[kind]["mean_distance"]
        assert each["diversity"][kind]["near_duplicates"] == 100
        assert each["diversity"][kind]["mean_within"] == each["diversity"][kind]["nearest"] == 0
        assert each["diversity"][kind]["ratio"] < 1e-6
    assert each["exact_duplicates"] == 100
    one = quality(images[:1].expand(60, -1, -1, -1), labels, zoo).figures  # one image in all: the mean distance is 0
    assert one["diversity"]["pixel"]["near_duplicates"] == one["diversity"]["feature"]["near_duplicates"] == 100


def test_spreads_are_those_of_evaluate(zoo: list[Teacher]) -> None:
    images, labels = varied(60)
    figures = quality(images, labels, zoo).figures
    with tap_features(zoo[0]) as features:
        zoo[0](images.float() / 255)
    expected = diversity(images.float() / 255, features[0], labels, classes=3)
    for kind in ("pixel", "feature"):
        for key in ("within", "between", "ratio"):
            assert figures["diversity"][kind][key] == pytest.approx(expected[f"{kind}_{key}"].item(), rel=1e-4)
    assert figures["features"] == {"teacher": "plain", "layer": "penultimate layer", "size": features[0].shape[1]}


def test_wrong_arguments_are_named(zoo: list[Teacher]) -> None:
    images, labels = varied()
    for given, words in (
        ((images[:1], labels[:1], zoo), "N of 2 or more"),
        ((images, labels[:3], zoo), "labels are"),
        ((images, labels + 1, zoo), "labels run from 1 to 3; those of teacher plain from 0 to 2"),
        ((images, labels - 1, zoo), "labels run from -1 to 1; those of teacher plain from 0 to 2"),
        ((images.float(), labels, zoo), "images in"),
        ((images / 255 - 0.1, labels, zoo), "images in"),
        ((torch.full((4, 1, 8, 8), torch.nan), None, zoo), "images in"),
    ):
        with pytest.raises(UserError, match=words):
            quality(*given)
    with pytest.raises(UserError, match=r"no teacher 'inverted'.*plain, residual"):
        quality(images, labels, zoo, features="inverted")
    with torch.no_grad():
        zoo[1].model.linear.bias[0] = torch.nan
    with pytest.raises(UserError, match=r"teacher residual.s logits are NaN or infinite for 50 of 50"):
        quality(images, labels, zoo)


# --- folders of images ---


def save(images: Tensor, paths: list[str], root: Path) -> Path:
    for image, name in zip(images, paths, strict=True):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(path)
    return root


def opened_folder(root: Path, **changes: Any) -> tuple[Tensor, Tensor | None]:
    return load_folder(root, **{"channels": 1, "size": 8, "classes": 3, "limit": 100, **changes})


def test_class_folders_by_position_or_by_number_and_flat_ones(tmp_path: Path) -> None:
    images, _ = varied(6)
    named = save(
        images, ["cat/1.png", "cat/2.png", "ant/1.png", "dog/x/1.png", "dog/2.png", "cat/0.png"], tmp_path / "a"
    )
    (named / "cat" / "notes.txt").write_text("no image")
    save(images[:1], [".ipynb_checkpoints/1.png"], named)
    found, labels = opened_folder(named)
    assert labels is not None
    assert labels.tolist() == [0, 1, 1, 1, 2, 2]
    assert torch.equal(found, images[[2, 5, 0, 1, 4, 3]])
    numbered = save(images, [f"{k:05d}/{n}.png" for n, k in enumerate([2, 2, 0, 0, 2, 0])], tmp_path / "b")
    assert opened_folder(numbered)[1].tolist() == [0, 0, 0, 2, 2, 2]  # type: ignore[union-attr]
    flat = save(images, [f"{n}.png" for n in range(6)], tmp_path / "c")
    found, labels = opened_folder(flat)
    assert torch.equal(found, images)
    assert labels is None
    assert torch.equal(opened_folder(flat, limit=3)[0], images[[0, 2, 4]])
    assert opened_folder(flat, size=16, channels=3)[0].shape == (6, 3, 16, 16)


def test_folders_that_will_not_do(tmp_path: Path) -> None:
    images, _ = varied(4)
    four = save(images, [f"{name}/1.png" for name in "abcd"], tmp_path / "four")
    two = save(images[:2], ["a/1.png", "b/1.png"], tmp_path / "two")
    fourth = save(images[:2], ["00000/1.png", "00003/1.png"], tmp_path / "fourth")
    both = save(images[:2], ["a/1.png", "1.png"], tmp_path / "both")
    torn = save(images[:1], ["1.png"], tmp_path / "torn")
    (torn / "1.png").write_bytes((torn / "1.png").read_bytes()[:40])
    (tmp_path / "empty" / "sub").mkdir(parents=True)
    for root, words in (
        (four, "4 class folders .a, b, c, d. but classes=3"),
        (two, "2 class folders .* 00000 to 00002"),
        (fourth, "2 class folders .* 00000 to 00002"),
        (both, "beside folders of images"),
        (torn, "1.png cannot be read as an image"),
        (tmp_path / "empty", "holds no image"),
        (tmp_path / "nowhere", "cannot be read as a folder"),
    ):
        with pytest.raises(UserError, match=words):
            opened_folder(root)


# --- the command ---


def test_the_grid_has_a_class_a_row() -> None:
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 1, 32, 32) * 50
    picture = grid(images, torch.tensor([2, 0, 2, 0, 2]), 3)
    cells = [[float(picture[0, 2 + 34 * row + 5, 2 + 34 * column + 5]) for column in range(4)] for row in range(3)]
    expected = [[50, 150, 255, 255], [255] * 4, [0, 100, 200, 255]]
    assert np.allclose(cells, np.array(expected) / 255)
    assert picture.shape == (3, 3 * 34 + 2, 10 * 34 + 2)


def test_names_of_folders() -> None:
    assert slug("noise") == "noise"
    assert slug("runs/Digits/generator/") == "runs-digits-generator"
    assert slug(".") == Path.cwd().name
    first, second = (slug(f"{'deep/' * 40}{name}") for name in ("a", "b"))
    assert first != second  # the figures of one would be written over the other's
    assert len(first) <= 100


def test_every_figure_stands_under_its_own_head() -> None:
    teacher = {"accuracy": 11.0, "interval": [10.0, 12.0], "confidence": 13.0, "class_balance": 0.5}
    heads = ("ratio", "mean_distance", "mean_within", "nearest", "near_duplicates", "mean_cosine", "mean_cosine_within")
    figures = {
        **{"images": 64, "about": "images", "seed": 0, "device": "cpu", "opened": [], "class_balance": 0.25},
        **{"teachers": {"a": {**teacher, "bn_l2": 6.5, "bn_kl": 7.5}}, "classes": "labels", "exact_duplicates": 0.0},
        "accuracy": {"mean": 21.0, "std": 22.0, "min": 23.0, "max": 24.0},
        "features": {"teacher": "a", "layer": "logits", "size": 3},
        "diversity": {"feature": dict(zip(heads, range(1, 8)))},
    }
    lines = [re.split("  +", line) for line in table(figures).splitlines()]
    assert dict(zip(*lines[2:4], strict=True)) == {
        **{"teacher": "a", "accuracy %": "11.00", "95 % interval": "10.00 to 12.00", "confidence %": "13.00"},
        **{"class balance": "0.5000", "BN loss": "6.5", "BN KL": "7.5"},
    }
    assert "mean 21.00 %, standard deviation 22.00, 23.00 to 24.00; class balance of labels 0.2500" in table(figures)
    shown = ("within/between", "distance", "in class", "nearest", "near-duplicates %", "cosine", "in class")
    assert list(zip(*lines[6:8], strict=True))[1:] == list(zip(shown, "1234567"))


def generator_folder(folder: Path, conditional: bool = True, classes: int = 10) -> Path:
    sizes = {"latent": 4, "classes": classes, "channels": 1, "size": 8, "width": 4}
    torch.manual_seed(0)
    generator = ConvGenerator(**sizes, conditional=conditional, prototypes=1)
    save_generator(
        folder,
        generator,
        {"arch": "conv", "mean": [0.5], "std": [0.25], "conditional": conditional, "prototypes": 1, **sizes},
    )
    return folder


def judged(runs: Runs, source: str, *given: str) -> tuple[dict[str, Any], str]:
    """The figures that the command leaves of a source, and what it prints."""
    called = runs.run("out", f"--quality={source}", "--images=64", *given)
    assert called.code == 0, called.err
    folder = runs.folder / "out" / "quality" / slug(source)
    assert Image.open(folder / "grid.png").size == (10 * 34 + 2, 10 * 34 + 2)
    return json.loads((folder / "quality.json").read_text()), called.out


def test_noise_and_real_are_told_apart(runs: Runs) -> None:
    noise, text = judged(runs, "noise")
    real, shown = judged(runs, "real")
    assert noise["images"] == real["images"] == 64
    for name in ("plain", "residual"):
        assert noise["teachers"][name]["accuracy"] < 40 < real["teachers"][name]["accuracy"]
        assert noise["teachers"][name]["bn_l2"] > real["teachers"][name]["bn_l2"]
        assert name in text
    assert {(entry["purpose"], entry["n"]) for entry in real["opened"]} == {("train teacher", 1257), ("control", 1257)}
    assert {entry["purpose"] for entry in noise["opened"]} == {"train teacher"}
    assert "1,257 of digits (train) for 'control'" in shown
    assert "features: the penultimate layer of teacher plain" in shown
    assert not (runs.folder / "out" / "config.yaml").exists()  # a run may still begin there


def test_two_processes_measure_once(runs: Runs) -> None:
    alone, _ = judged(runs, "noise")
    log = runs.folder / "log"
    assert start(runs.arguments("two", "--quality=noise", "--images=64"), log, world=2).join(120) == [0, 0]
    both = json.loads((runs.folder / "two" / "quality" / "noise" / "quality.json").read_text())
    same = ("teachers", "diversity", "accuracy", "opened")
    assert {key: both[key] for key in same} == {key: alone[key] for key in same}
    assert log.read_text().count("accuracy over the teachers") == 1


def test_generators_with_labels_and_without(runs: Runs) -> None:
    folder = str(generator_folder(runs.folder / "ours"))
    figures, text = judged(runs, folder, "zoo.main=residual")
    assert figures["class_balance"] > 0.95
    assert figures["features"]["teacher"] == "residual"
    assert "accuracy over the teachers" in text
    blind, text = judged(runs, str(generator_folder(runs.folder / "blind", conditional=False)))
    assert blind["accuracy"] is None
    assert blind["classes"] == "predictions of teacher plain"
    assert "accuracy over the teachers" not in text


def test_a_pool_is_judged_by_what_it_holds(runs: Runs) -> None:
    images, labels = varied(40)
    pool = PoolGenerator(classes=10, channels=1, size=8, capacity=50)
    pool.push(images.float() / 255, labels)
    about = {"arch": "pool", "classes": 10, "channels": 1, "size": 8, "capacity": 50, "conditional": True}
    save_generator(runs.folder / "pool", pool, about)
    assert judged(runs, "pool", "--images=16")[0]["images"] == 16
    figures, _ = judged(runs, "pool")
    assert figures["images"] == 40
    assert figures["exact_duplicates"] == 0


def test_folders_of_images(runs: Runs) -> None:
    images, labels = varied(40)
    save(images, [f"{label:05d}/{n}.png" for n, label in enumerate(labels.tolist())], runs.folder / "sorted")
    save(images, [f"{n:02d}.png" for n in range(40)], runs.folder / "flat")
    figures, text = judged(runs, "sorted")
    assert figures["images"] == 40
    assert figures["accuracy"] is not None
    assert "40 of folder sorted (all) for 'quality'" in text
    flat, _ = judged(runs, "flat")
    assert flat["accuracy"] is None
    assert flat["diversity"]["pixel"]["mean_distance"] == pytest.approx(
        figures["diversity"]["pixel"]["mean_distance"], rel=1e-9
    )


def test_without_batch_norm_there_is_still_the_rest(runs: Runs) -> None:
    (runs.folder / "theirs.py").write_text(
        "from torch import nn\n\ndef bare(classes, channels):\n"
        "    return nn.Sequential(nn.Conv2d(channels, 4, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(36, classes))\n"
    )
    bare = ("teachers.plain.model=python:theirs.py:bare", "teachers.plain.kwargs={}", "trust_code=true")
    figures, text = judged(runs, "noise", *bare)
    assert figures["teachers"]["plain"]["bn_l2"] is None
    assert figures["teachers"]["residual"]["bn_l2"] > 0
    assert " - " in text


TINY = {"width": 4, "depth": 1}  # the recipe's first teacher
WRONG = {
    "no such source": (["--quality=nowhere"], ["--quality=nowhere is no folder", "noise or real"]),
    "no source": (["--quality"], ["--quality: --quality takes =VALUE", "noise or real"]),
    "empty source": (["--quality="], ["--quality=: --quality takes =VALUE"]),
    "value of another flag": (["--dry-run=3"], ["--dry-run=3: --dry-run takes no value"]),
    "few images": (["--quality=noise", "--images=3"], ["--images=3 is not allowed; it takes an integer from 16"]),
    "no number": (["--quality=noise", "--images=x"], ["--images=x is not allowed"]),
    "images alone": (["--images=64"], ["give --quality=SOURCE too"]),
    "two things at once": (["--quality=noise", "--dry-run"], ["--quality goes with --images alone"]),
    "two other things": (["--quality=noise", "--print-config"], ["--quality goes with --images alone"]),
    "empty folder": (["--quality=empty"], ["empty holds no image"]),
    "folder of few": (["--quality=few"], ["--quality=few: there are 2 images; 16 or more say something"]),
    "other classes": (["--quality=five"], ["the generator in five has classes=5, the recipe 10"]),
    "no real images": (
        [
            "--quality=real",
            "data.dataset=none",
            "teachers.plain.weights=w.safetensors",
            "teachers.residual.enabled=false",
        ],
        ["data.dataset=none: no real images for 'control'; use noise as control"],
    ),
    "no place": (["--quality=noise", "output=tiny.yaml/x"], ["could not write in tiny.yaml/x/quality/noise"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line(runs: Runs, case: str) -> None:
    given, expected = WRONG[case]
    (runs.folder / "empty").mkdir()
    save(varied(2)[0], ["1.png", "2.png"], runs.folder / "few")
    generator_folder(runs.folder / "five", classes=5)
    save_file(build_model("dfkd:tiny_plain", classes=10, channels=1, kwargs=TINY).state_dict(), "w.safetensors")
    output = () if any("output=" in argument for argument in given) else ("output=out",)
    line = runs.call(f"recipe={runs.recipe}", f"training.cache={runs.cache}", *output, *given).refused()
    for words in expected:
        assert words in line


def test_images_to_measure_are_those_of_the_seed_and_no_ones_to_train_on(
    make_generator: Callable[..., ConvGenerator],
) -> None:
    source, device = from_generator(make_generator().eval()), torch.device("cpu")
    first, again, other = (_streamed(SimpleNamespace(seed=seed), source, 32, device)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    rows = {image.numpy().tobytes() for image in first}
    assert len(rows) == 32
    assert not rows & {image.numpy().tobytes() for image in other}
    for seed in (1, 0):
        trained = materialize(SyntheticStream(source, batch_size=len(first), seed=seed, shard=Shard(device)), 32)
        assert not rows & {image.numpy().tobytes() for image in trained.tensors[0]}


def test_some_images_of_class_folders_keep_their_labels(tmp_path: Path) -> None:
    images, _ = varied(6)
    root = save(images, ["a/1.png", "b/1.png", "b/2.png", "b/3.png", "c/1.png", "c/2.png"], tmp_path)
    found, labels = opened_folder(root, limit=3)
    assert torch.equal(found, images[[0, 2, 4]])
    assert labels is not None
    assert labels.tolist() == [0, 1, 2]
    assert opened()[-1] == {"source": f"folder {root}", "split": "all", "purpose": "quality", "n": 3}
