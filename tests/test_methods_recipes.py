"""Every recipe of recipes/methods: what it says survives another base, and it runs in a second with tiny networks."""

import dataclasses
import json
from functools import cache, reduce
from typing import Any

import pytest
import torch
from runs_fixture import ROOT, Runs

from dfkd.errors import UserError
from dfkd.recipe import Loaded, load_recipe
from generators import PixelGenerator, PoolGenerator, load_generator

METHODS = sorted(path.stem for path in (ROOT / "recipes" / "methods").glob("*.yaml"))
NOISE, OFFLINE = {"kw_gaussian"}, {"rdskd"}  # no generator to train; the student on the finished generator alone
ONE_TEACHER = """
base: tiny.yaml
teachers: {residual: {enabled: false}}
synthesis: {learn_weights: false}
runtime: {checkpoint_every: 99, log_every: 1}
"""


@pytest.fixture
def base(runs: Runs) -> str:
    """The tiny recipe with one teacher."""
    (runs.folder / "one.yaml").write_text(ONE_TEACHER)
    return f"base={runs.folder / 'one.yaml'}"


@cache
def own(method: str) -> Loaded:
    """A method as it stands."""
    return load_recipe([f"recipe=methods/{method}"])


def value(loaded: Loaded, key: str) -> Any:
    return reduce(lambda group, name: group[name], key.split("."), dataclasses.asdict(loaded.recipe))


def few_steps(method: str) -> list[str]:
    """Two rounds or four updates of what takes minutes."""
    recipe = own(method).recipe
    given = ["synthesis.steps=2", "synthesis.inner=2"] if recipe.synthesis.inner > 1 else ["synthesis.steps=4"]
    given = ["synthesis.steps=0"] if method in NOISE else given
    given += [f"distill.steps={2 if recipe.distill.steps else 0}", "distill.batch_size=16", "distill.warmup=1"]
    return [*given, f"synthesis.student_steps={min(2, recipe.synthesis.student_steps)}"]


def test_there_are_methods() -> None:
    assert len(METHODS) >= 17
    assert set(METHODS) >= NOISE | OFFLINE


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"dfkd"}))
def test_a_published_method_does_not_follow_the_defaults(method: str) -> None:
    loaded, keys = own(method), ["distill.mix", "distill.features", "student.weights"]
    if method not in NOISE:
        keys += ["synthesis.losses.adversary", "synthesis.redraw"]
        keys += ["synthesis.fade"] if loaded.recipe.synthesis.losses.adversary else []
        keys += ["synthesis.losses.ce", "synthesis.losses.bn"]
        keys += ["synthesis.bn_distance", "synthesis.equalise"] if loaded.recipe.synthesis.losses.bn else []
    assert [key for key in keys if not loaded.sources.get(key, "").startswith("recipes/methods/")] == []


@pytest.mark.parametrize("method", METHODS)
def test_what_a_method_says_survives_another_base(base: str, method: str) -> None:
    alone, other = own(method), load_recipe([f"recipe=methods/{method}", base])
    said = {key for key, source in alone.sources.items() if source.startswith("recipes/methods/")} - {"name"}
    assert "description" in said
    for key in said:
        assert value(other, key) == value(alone, key), key
        assert other.sources[key] == alone.sources[key]
    assert (alone.recipe.name, other.recipe.name) == (method, f"{method}-one")
    assert other.recipe.image.size == 8
    assert list(other.recipe.zoo_specs) == ["plain"]


def test_a_method_is_no_base_of_another(runs: Runs) -> None:
    (runs.folder / "own.yaml").write_text("base: methods/dfq\n")
    for base in ("methods/dfq", f"{runs.folder}/own.yaml"):
        with pytest.raises(
            UserError, match=r"builds on recipes/methods/dfq\.yaml, whose terms recipes/methods/zskt\.yaml"
        ):
            load_recipe(["recipe=methods/zskt", f"base={base}"])
    assert load_recipe([f"recipe={runs.folder}/own.yaml", "base=digits"]).recipe.synthesis.losses.information == 20


@pytest.mark.parametrize("method", METHODS)
def test_a_method_runs(runs: Runs, base: str, method: str) -> None:
    given = [f"recipe=methods/{method}", base, *runs.arguments(method, *few_steps(method))[1:]]
    called = runs.call(*given)
    assert (called.code, called.err) == (0, "")
    folder = runs.folder / method
    found = json.loads((folder / "results.json").read_text())
    assert 0 <= found["student"]["accuracy"] <= 100
    assert found["student"]["agreement"]["n"] > 0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    recipe = own(method).recipe
    weights = dataclasses.asdict(recipe.synthesis.losses)
    terms = {name for line in lines if line["phase"] == "generator" for name in line} & set(weights)
    assert terms == ({name for name, weight in weights.items() if weight} if method not in NOISE else set())
    updates = [line["step"] for line in lines if line["phase"] == "student"]
    rounds = recipe.synthesis.inner > 1
    alternating = (2 if rounds else 4) * min(2, recipe.synthesis.student_steps)
    assert len(updates) == (2 if method in NOISE | OFFLINE else alternating)
    generator = load_generator(folder / "generator")
    assert isinstance(generator, PoolGenerator) == rounds
    assert isinstance(generator, PixelGenerator) == (method in NOISE)
    latents, labels = torch.randn(30, generator.latent), torch.arange(30) % 10
    images = generator(latents, labels)
    assert images.shape == (30, 1, 8, 8)
    assert 0.01 < float(images.std()) < 0.6
    if isinstance(generator, PoolGenerator):
        assert int((generator.labels < 10).sum()) == 2 * 16 == generator.capacity
        assert generator.description["made_by"] == recipe.generator.arch
        assert found["student"]["agreement"]["n"] == generator.capacity  # all there are, each once
