"""Where a recipe's teachers come from: how their training moved images, on which, and where they are kept."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dfkd import zoo
from dfkd.assemble import make_student, pixel_statistics
from dfkd.classifier import Classifier
from dfkd.data import load_images
from dfkd.errors import Paused
from dfkd.models import build_model, save_model
from dfkd.recipe import load_recipe
from dfkd.schema import Recipe
from dfkd.zoo import (
    load_recipe_zoo,
    made_from,
    teacher_folder,
    trained_teacher,
    training_images,
    training_moves,
)


def load(*keys: str) -> Recipe:
    """Digits, 16x16, with one teacher, whose training shifts by an eighth of the image unless it is a checkpoint."""
    others = ("teachers.residual.enabled=false", "teachers.inverted.enabled=false", "zoo.sample=1")
    return load_recipe(["recipe=digits", *others, *keys]).recipe


WEIGHTS = "teachers.plain.weights=there"


@pytest.mark.parametrize(
    ("keys", "moves"),
    [
        ([], (2, False, False)),
        (["training.shift=0.25", "training.flip=true"], (4, True, False)),
        (["teachers.plain.flip=true"], (2, True, False)),
        (["training.flip=true", "teachers.plain.flip=false"], (2, False, False)),
        (["teachers.plain.pad=1", "training.flip=true"], (1, True, True)),
        ([WEIGHTS], (0, False, False)),  # of a checkpoint nothing is known
        ([WEIGHTS, "teachers.plain.pad=4"], (4, False, True)),
        ([WEIGHTS, "teachers.plain.pad=4", "teachers.plain.flip=true"], (4, True, True)),
        ([WEIGHTS, "training.shift=0.25", "training.flip=true"], (0, False, False)),
    ],
)
def test_how_a_teachers_training_moved_images(keys: list[str], moves: tuple[int, bool, bool]) -> None:
    recipe = load(*keys)
    assert training_moves(recipe, recipe.zoo_specs["plain"]) == moves


def test_a_teacher_is_trained_on_images_that_are_moved_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(zoo, "train_teacher", lambda *_, **keys: given.update(keys))  # and is not done
    recipe = load("teachers.plain.pad=3", f"training.cache={tmp_path}")
    with pytest.raises(Paused):
        trained_teacher(recipe, "plain", recipe.zoo_specs["plain"], torch.device("cpu"), print)
    assert given["moves"] == (3, False, True)


def test_a_folder_says_how_the_teacher_in_it_was_trained_unless_the_recipe_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there").mkdir()
    about = {"model": "dfkd:tiny_plain", "kwargs": {}, "classes": 10, "channels": 1, "moves": [3, True, False]}
    Path("there/model.json").write_text(json.dumps(about))
    cases = {
        (): (3, True, False),
        ("teachers.plain.pad=2",): (2, True, True),
        ("teachers.plain.pad=0",): (0, True, False),
        ("teachers.plain.flip=false",): (3, False, False),
    }
    for keys, moves in cases.items():
        recipe = load(WEIGHTS, *keys)
        assert training_moves(recipe, recipe.zoo_specs["plain"]) == moves


def test_a_folder_says_how_its_images_were_normalised_and_what_it_was_trained_on(tmp_path: Path) -> None:
    entry = {"source": "digits", "split": "test", "purpose": "control", "n": 540}
    about = {"model": "dfkd:tiny_plain", "kwargs": {"width": 4}, "classes": 10, "channels": 1}
    about |= {"mean": [0.9], "std": [0.7], "input_size": 32, "trained_on": entry}
    save_model(tmp_path / "made", build_model("dfkd:tiny_plain", classes=10, channels=1, kwargs={"width": 4}), about)
    of_it = f"={tmp_path / 'made'}"
    bare = ("teachers.plain.mean=[]", "teachers.plain.std=[]", "teachers.plain.kwargs={width: 4}")
    recipe = load(f"teachers.plain.weights{of_it}", *bare)
    (teacher,) = load_recipe_zoo(recipe, torch.device("cpu"), print)
    assert teacher.normalisation == ([0.9], [0.7])
    assert teacher.input_size == 32
    assert training_images(recipe) == [entry]
    said = load(f"teachers.plain.weights{of_it}", "teachers.plain.mean=[0.2]", "teachers.plain.std=[0.3]", bare[2])
    assert load_recipe_zoo(said, torch.device("cpu"), print)[0].normalisation == ([0.2], [0.3])

    recipe = load("student.model=dfkd:tiny_plain", "student.kwargs={width: 4}", f"student.weights{of_it}")
    student, described = make_student(recipe, [teacher], torch.device("cpu"))
    assert student.normalisation == ([0.9], [0.7])
    assert student.input_size == described["input_size"] == 32
    assert made_from(described) == [entry]


def test_a_generator_begins_with_the_mean_pixel_of_the_teachers_that_know_one() -> None:
    given = {"grey": ([0.5], [0.2]), "colour": ([0.1, 0.2, 0.3], [0.4, 0.4, 0.6]), "none": ([], [])}
    networks = [Classifier(nn.Identity(), name=name, mean=mean, std=std) for name, (mean, std) in given.items()]
    mean, std = pixel_statistics(networks, 3)
    assert mean == pytest.approx([0.3, 0.35, 0.4])
    assert std == pytest.approx([0.3, 0.3, 0.4])
    assert pixel_statistics(networks[:1], 3)[0] == [0.5] * 3
    assert pixel_statistics(networks[2:], 3) == ([0.5] * 3, [0.25] * 3)


@pytest.mark.parametrize(
    "key",
    [
        *("seed=1", "training.epochs=7", "training.lr=0.2", "training.batch_size=64", "training.weight_decay=0"),
        *("training.shift=0.2", "training.flip=true", "image.size=20", "data.root=x", "runtime.channels_last=false"),
        *("teachers.plain.kwargs={width: 9}", "teachers.plain.mean=[0.4]", "teachers.plain.model=dfkd:tiny_residual"),
    ],
)
def test_a_teacher_is_kept_by_all_that_it_was_trained_by_and_nothing_else(key: str) -> None:
    def folder(*keys: str) -> Path:
        recipe = load_recipe(["recipe=digits", *keys]).recipe
        return teacher_folder(recipe, "plain", recipe.zoo_specs["plain"])

    assert folder(key) != folder()
    assert folder("distill.lr=0.3") == folder("teachers.plain.weight=2") == folder()


def test_teachers_trained_otherwise_are_not_found_for_each_other() -> None:
    keys = ("teachers.plain.pad=2", "teachers.plain.flip=true", "runtime.precision=fp32", "runtime.precision=bf16")
    recipes = [load(key) for key in keys]
    assert len({teacher_folder(recipe, "plain", recipe.zoo_specs["plain"]) for recipe in recipes}) == 4


def trainings(monkeypatch: pytest.MonkeyPatch, cache: Path, *keys: str, name: str = "plain") -> tuple[Classifier, dict]:
    """The network, and how it would be trained, of a recipe's teacher."""
    found: list[tuple[Any, dict[str, Any]]] = []
    monkeypatch.setattr(zoo, "train_teacher", lambda *given, **options: found.append((given[0], options)))
    recipe = load_recipe(["recipe=digits", *keys, f"training.cache={cache}"]).recipe
    with pytest.raises(Paused):
        trained_teacher(recipe, name, recipe.zoo_specs[name], torch.device("cpu"), print)
    return found[0]


def test_a_teacher_is_trained_as_the_recipe_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = ("training.epochs=7", "training.batch_size=48", "training.lr=0.3", "training.weight_decay=0.002", "seed=11")
    of_it = ("teachers.plain.mean=[0.2]", "teachers.plain.std=[0.6]", "teachers.plain.input_size=24")
    run = ("runtime.precision=bf16", "runtime.channels_last=false")
    classifier, options = trainings(monkeypatch, tmp_path, *keys, *of_it, *run)
    wanted = {"epochs": 7, "batch_size": 48, "lr": 0.3, "weight_decay": 0.002, "seed": 11, "bf16": True}
    wanted |= {"channels_last": False}
    assert {key: options[key] for key in wanted} == wanted
    assert classifier.normalisation == ([0.2], [0.6])
    assert classifier.input_size == 24
    _, options = trainings(monkeypatch, tmp_path, "runtime.precision=fp32", "runtime.channels_last=true")
    assert (options["bf16"], options["channels_last"]) == (False, True)


def test_teachers_begin_with_weights_of_their_seed_and_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    same = ("teachers.residual.model=dfkd:tiny_plain", "teachers.residual.kwargs=${teachers.plain.kwargs}")

    def first(name: str, seed: int) -> torch.Tensor:
        classifier, _ = trainings(monkeypatch, tmp_path, *same, f"seed={seed}", name=name)
        return next(classifier.parameters()).detach()

    one = first("plain", 1)
    assert torch.equal(one, first("plain", 1))
    assert not torch.equal(one, first("plain", 2))
    assert not torch.equal(one, first("residual", 1))


def test_the_folder_of_a_trained_teacher_says_how_images_were_and_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zoo, "train_teacher", lambda *given, **options: True)
    recipe = load("teachers.plain.pad=3", "training.flip=true", "image.size=12", f"training.cache={tmp_path}")
    of_it = {"root": "", "train_root": None, "channels": 1, "size": 8, "classes": 10}
    load_images("digits", train=False, purpose="evaluate", **of_it)  # is not what it was trained on
    folder = trained_teacher(recipe, "plain", recipe.zoo_specs["plain"], torch.device("cpu"), print)
    about = json.loads((folder / "model.json").read_text())
    assert (about["moves"], about["size"], about["input_size"]) == ([3, True, True], 12, None)
    assert about["trained_on"] == {"source": "digits", "split": "train", "purpose": "train teacher", "n": 1257}
