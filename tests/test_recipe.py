"""Recipes: precedence, typing, one-line errors, contradictions, and the texts made from the schema."""

import dataclasses
import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from dfkd import recipe as room
from dfkd.contradictions import check
from dfkd.errors import UserError
from dfkd.recipe import Loaded, Recipe, help_text, list_text, load_recipe, print_config

MINIMAL = """\
tasks: [distill]
synthesis: {steps: 10}
data: {dataset: digits}
teachers:
  vgg: {model: "dfkd:vgg", weights: vgg.pt, mean: [0.5, 0.5, 0.5], std: [1, 1, 1]}
zoo: {sample: 1}
student: {model: "dfkd:small"}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe folder with one good recipe, `tiny`, in place of the project's."""
    monkeypatch.setattr(room, "FOLDER", tmp_path.resolve() / "recipes")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/tiny.yaml").write_text(MINIMAL)
    return tmp_path / "recipes"


def load(*arguments: str) -> Loaded:
    return load_recipe(["recipe=tiny", *arguments])


def message(*arguments: str) -> str:
    """The one line a user reads."""
    with pytest.raises(UserError) as caught:
        load_recipe(arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_recipe_of_the_project_loads() -> None:
    names = room._names()
    assert names
    for name in names:
        assert load_recipe([f"recipe={name}"]).recipe.name


def test_minimal_recipe(folder: Path) -> None:
    loaded = load()
    assert isinstance(loaded.recipe, Recipe)
    assert loaded.recipe.name == "tiny"
    assert loaded.recipe.teachers["vgg"].mean == [0.5, 0.5, 0.5]
    assert loaded.recipe.seed == Recipe().seed
    assert loaded.recipe.trust_code is False
    assert loaded.sources["teachers.vgg.model"] == "recipes/tiny.yaml"
    assert loaded.sources["seed"] == "default"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], "runs/tiny"),
        (["generator.checkpoint=runs/tiny/generator", "tasks=[qat]"], "runs/tiny-qat"),
        (["generator.checkpoint=./runs/tiny/generator", "tasks=[distill,ptq]"], "runs/tiny-distill-ptq"),
        (["generator.checkpoint=runs/tiny2/generator", "tasks=[qat]"], "runs/tiny"),
        (["generator.checkpoint=runs/tiny/../b/generator", "tasks=[qat]"], "runs/tiny"),
        (["generator.checkpoint=~nobody-of-this-name/generator", "tasks=[qat]"], "runs/tiny"),
        (["generator.checkpoint=runs/tiny/generator", "tasks=[qat]", "output=runs/mine"], "runs/mine"),
    ],
)
def test_a_run_on_the_generator_of_runs_name_is_written_beside_it(
    folder: Path, given: list[str], expected: str
) -> None:
    """So that `recipe=NAME`, then `recipe=NAME tasks=[qat] generator.checkpoint=runs/NAME/generator` both run."""
    assert load(*given).recipe.folder == expected


def test_precedence_base_recipe_command_line(folder: Path) -> None:
    (folder / "child.yaml").write_text("base: tiny\nseed: 2\nclasses: 7\nteachers: {vgg: {weight: 0.5}}\n")
    (folder / "tiny.yaml").write_text(MINIMAL + "seed: 1\nclasses: 5\nimage: {size: 8}\n")
    loaded = load_recipe(["recipe=child", "seed=3"])
    assert (loaded.recipe.seed, loaded.recipe.classes, loaded.recipe.image.size) == (3, 7, 8)
    assert loaded.sources["seed"] == "command line"
    assert loaded.sources["classes"] == "recipes/child.yaml"
    assert loaded.sources["image.size"] == "recipes/tiny.yaml"
    vgg = loaded.recipe.teachers["vgg"]
    assert (vgg.model, vgg.weight) == ("dfkd:vgg", 0.5)


def test_name_and_description_are_not_inherited(folder: Path) -> None:
    (folder / "tiny.yaml").write_text(MINIMAL + "name: shared\ndescription: the base\n")
    (folder / "child.yaml").write_text("base: tiny\n")
    child = load_recipe(["recipe=child"]).recipe
    assert (child.name, child.description) == ("child", "")
    assert load().recipe.name == "shared"
    assert load("name=mine").recipe.name == "mine"


def test_a_base_on_the_command_line_stands_in_for_the_recipes_own(folder: Path) -> None:
    (folder / "child.yaml").write_text("base: tiny\nseed: 2\nimage: {size: 12}\ndescription: mine\n")
    (folder / "other.yaml").write_text(MINIMAL.replace("vgg", "wrn") + "seed: 1\nclasses: 5\nimage: {size: 8}\n")
    (folder / "upper.yaml").write_text("base: other\nname: above\ndescription: theirs\nclasses: 6\n")
    loaded = load_recipe(["recipe=child", "base=upper", "image.channels=3"])
    recipe = loaded.recipe
    assert list(recipe.teachers) == ["wrn"]  # nothing of tiny is left
    assert (recipe.seed, recipe.classes, recipe.image.size) == (2, 6, 12)
    assert (recipe.name, recipe.folder, recipe.description) == ("child-upper", "runs/child-upper", "mine")
    assert loaded.sources["classes"] == "recipes/upper.yaml"
    assert loaded.sources["seed"] == "recipes/child.yaml"
    assert load_recipe(["recipe=child", "base=other", "name=own"]).recipe.name == "own"
    assert load_recipe(["recipe=child", f"base={folder}/other.yaml"]).recipe.name == "child-other"
    assert load_recipe(["recipe=other", "base=tiny"]).recipe.teachers.keys() == {"vgg", "wrn"}  # it had none
    again = folder.parent / "config.yaml"
    again.write_text(loaded.yaml())
    assert load_recipe(["recipe=config.yaml"]).recipe == recipe  # a saved recipe has no base left to replace
    assert "recipes/child.yaml -> recipes/child.yaml" in message("recipe=child", "base=child")
    assert "base is given twice" in message("recipe=child", "base=tiny", "base=other")


def test_a_method_keeps_the_method_it_builds_on_when_its_base_is_replaced(folder: Path) -> None:
    (folder / "methods").mkdir()
    (folder / "methods/first.yaml").write_text("base: tiny\nsynthesis: {lr: 0.5, clip: 0}\n")
    (folder / "methods/second.yaml").write_text("base: first\nsynthesis: {lr: 0.25}\n")
    (folder / "other.yaml").write_text(MINIMAL.replace("vgg", "wrn").replace("{steps: 10}", "{steps: 10, clip: 9}"))
    recipe = load_recipe(["recipe=methods/second", "base=other"]).recipe
    assert (recipe.name, list(recipe.teachers)) == ("second-other", ["wrn"])
    assert (recipe.synthesis.lr, recipe.synthesis.clip) == (0.25, 0)


def test_shared_base_applies_once(folder: Path) -> None:
    (folder / "left.yaml").write_text("base: tiny\nseed: 5\n")
    (folder / "right.yaml").write_text("base: tiny\nclasses: 6\n")
    (folder / "tiny.yaml").write_text(MINIMAL + "seed: 1\nclasses: 2\n")
    (folder / "both.yaml").write_text("base: [left, right]\n")
    both = load_recipe(["recipe=both"]).recipe
    assert (both.seed, both.classes) == (5, 6)


def test_recipes_by_path_subfolder_and_name(folder: Path) -> None:
    (folder / "methods").mkdir()
    (folder / "methods/dafl.yaml").write_text("base: ../tiny\nclasses: 4\n")
    (folder.parent / "mine.yaml").write_text("base: methods/dafl\n")
    assert load_recipe(["recipe=methods/dafl"]).recipe.name == "dafl"
    assert load_recipe(["recipe=mine.yaml"]).recipe.classes == 4
    loaded = load_recipe([f"recipe={folder.parent}/mine.yaml"])
    assert loaded.recipe.name == "mine"
    assert loaded.sources["classes"] == "recipes/methods/dafl.yaml"
    assert loaded.sources["name"] == "mine.yaml"
    assert message("recipe=mine").startswith("command line: no recipe 'mine'")
    (folder.parent / "methods").mkdir()
    (folder.parent / "methods/dafl.yaml").write_text("base: tiny\nclasses: 3\n")
    assert load_recipe(["recipe=methods/dafl"]).recipe.classes == 3


def test_base_cycle_is_shown(folder: Path) -> None:
    (folder / "a.yaml").write_text("base: b\n")
    (folder / "b.yaml").write_text("base: [tiny, a]\n")
    assert message("recipe=a").endswith("recipes/a.yaml -> recipes/b.yaml -> recipes/a.yaml")
    (folder / "own.yaml").write_text("base: own\n")
    assert "recipes/own.yaml -> recipes/own.yaml" in message("recipe=own")


def test_command_line_text_is_typed_by_the_schema(folder: Path) -> None:
    recipe = load("output=no", "name=007", "distill.lr=1e-3", "runtime.channels_last=no", "zoo.main=null").recipe
    assert (recipe.output, recipe.name, recipe.distill.lr) == ("no", "007", 1e-3)
    assert recipe.runtime.channels_last is False
    assert recipe.zoo.main is None
    assert load("tasks=[distill]", "synthesis.betas=[0, 0.9]").recipe.synthesis.betas == [0.0, 0.9]
    assert "runtime.precision" in message("recipe=tiny", "runtime.precision=no")


def test_teachers_are_overridden_and_added(folder: Path) -> None:
    recipe = load(
        "teachers.vgg.weight=0.5",
        "teachers.new={model: 'timm:a', weights: a.pt}",
        "teachers.new.kwargs.depth=3",
    ).recipe
    assert recipe.teachers["vgg"].weight == 0.5
    assert recipe.teachers["vgg"].weights == "vgg.pt"
    assert (recipe.teachers["new"].model, recipe.teachers["new"].kwargs) == ("timm:a", {"depth": 3})


def test_kwargs_entries_and_replacement(folder: Path) -> None:
    (folder / "tiny.yaml").write_text(MINIMAL.replace('"dfkd:small"', '"dfkd:small", kwargs: {width: 8}'))
    loaded = load("student.kwargs.rate=0.5", "student.kwargs.act=silu", "student.kwargs.se=true")
    assert loaded.recipe.student.kwargs == {"width": 8, "rate": 0.5, "act": "silu", "se": True}
    assert loaded.sources["student.kwargs.width"] == "recipes/tiny.yaml"
    assert loaded.sources["student.kwargs.rate"] == "command line"
    replaced = load("student.kwargs={depth: 3}")
    assert replaced.recipe.student.kwargs == {"depth": 3}
    assert replaced.sources["student.kwargs.depth"] == "command line"
    assert load("student.kwargs={}").recipe.student.kwargs == {}


def test_interpolations_resolve_typed_and_unshared(folder: Path) -> None:
    recipe = load(
        "classes=9",
        "image.size=${classes}",
        "teachers.vgg.kwargs={width: 4}",
        "student.kwargs=${teachers.vgg.kwargs}",
        "student.kwargs.depth=2",
    ).recipe
    assert recipe.image.size == 9
    assert recipe.student.kwargs == {"width": 4, "depth": 2}
    assert recipe.teachers["vgg"].kwargs == {"width": 4}
    assert "command line: zoo.main" in message("recipe=tiny", "zoo.main=${nope.x}")
    assert "command line: seed" in message("recipe=tiny", "seed=${student.model}")
    assert "recipes/loop.yaml: name" in message_of_file(folder, "loop", "name: ${name}\n")


def message_of_file(folder: Path, name: str, text: str) -> str:
    (folder / f"{name}.yaml").write_text(text)
    return message(f"recipe={name}")


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("student.modl=x", ["'student.modl'", "did you mean student.model?", "kwargs"]),
        ("stduent.model=x", ["'stduent'", "did you mean student?"]),
        ("lr=0.1", ["'lr'", "distill.lr", "synthesis.lr"]),
        ("seed.x=1", ["'seed.x'", "seed is no group"]),
        ("student=x", ['student="x"', "group of keys"]),
        ("teachers.vgg=null", ["teachers.vgg=null", "enabled: false"]),
        ("teachers..weight=1", ["''", "teachers"]),
        ("distill.lr=fast", ['distill.lr="fast"', "number from 0"]),
        ("image.size=8.5", ['image.size="8.5"', "integer from 4"]),
        ("image.size=2", ["image.size=2", "integer from 4"]),
        ("image.size=null", ["image.size=null", "integer from 4"]),
        ("distill.lr=nan", ["distill.lr=NaN", "number from 0"]),
        ("distill.lr=inf", ["distill.lr=Infinity", "number from 0"]),
        ("teachers.vgg.mean=[.nan, 0, 0]", ["teachers.vgg.mean=", "list of number"]),
        ("teachers.vgg.mean=0.5", ["teachers.vgg.mean=", "list of number"]),
        ("teachers.vgg.input_size=big", ["or null"]),
        ("distill.loss=kll", ['distill.loss="kll"', "did you mean 'kl'?"]),
        ("data.dataset=cifar", ["cifar10 | cifar100", "did you mean 'cifar10"]),
        ("tasks=[distil]", ['tasks=["distil"]', "did you mean 'distill'?"]),
        ("tasks=distill", ['tasks="distill"', "list of"]),
        ("runtime.channels_last=maybe", ["true or false"]),
        ("student.kwargs=8", ["student.kwargs=", "mapping"]),
        ("student.kwargs={width: ", ["student.kwargs='{width: '", "not YAML"]),
        ("name=${", ["name"]),
        ("base=tinny", ["base: no recipe 'tinny'", "did you mean 'tiny'?", "the recipes are tiny"]),
        ("base=", ["base: no recipe ''"]),
    ],
)
def test_wrong_arguments(folder: Path, argument: str, parts: list[str]) -> None:
    text = message("recipe=tiny", argument)
    assert text.startswith("command line: ")
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("student: {modl: x}", ["recipes/bad.yaml: unknown key 'student.modl'", "student.model"]),
        ("student.model: x", ["recipes/bad.yaml: unknown key 'student.model'", "did you mean"]),
        ("runtime: {precision: no}", ["recipes/bad.yaml: runtime.precision=false", "bf16"]),
        ("name: no", ["recipes/bad.yaml: name=false", "text"]),
        ("image: {size: 2}", ["recipes/bad.yaml: image.size=2", "from 4"]),
        ("base: 3", ["recipes/bad.yaml: base=3"]),
        ("base: tinny", ["recipes/bad.yaml: base: no recipe 'tinny'", "did you mean 'tiny'?"]),
        ("base: tiny\nseed: 1\nseed: 2", ["recipes/bad.yaml:3: ", "duplicate key seed"]),
        ("a: 1\nb: [", ["recipes/bad.yaml:3: "]),
        ("- 1", ["recipes/bad.yaml: ", "list"]),
        ("just text", ["recipes/bad.yaml: "]),
        ("base: tiny\ntrust_code: true", ["recipes/bad.yaml: trust_code", "command line"]),
        ("teachers: {vgg: null}", ["teachers.vgg=null", "enabled: false"]),
        ("teachers: {'a.b': {model: x}}", ["'a.b'", "letters"]),
    ],
)
def test_wrong_files(folder: Path, text: str, parts: list[str]) -> None:
    shown = message_of_file(folder, "bad", text + "\n")
    for part in parts:
        assert part in shown


def test_unreadable_files(folder: Path) -> None:
    (folder / "bad.yaml").write_bytes(b"name: \xff\xfe\n")
    assert message("recipe=bad").startswith("recipes/bad.yaml: not a readable recipe")
    assert "no recipe 'no/such.yaml'" in message("recipe=no/such.yaml")


def test_arguments_that_are_no_keys(folder: Path) -> None:
    assert "the recipes are tiny" in message("seed=1")
    assert "the recipes are tiny" in message("recipe=")
    assert "did you mean 'tiny'?" in message("recipe=tinny")
    assert "'--fast' is not key=value" in message("recipe=tiny", "--fast")
    assert "'=3' is not key=value" in message("recipe=tiny", "=3")
    assert "seed is given twice: '1' and '2'" in message("recipe=tiny", "seed=1", "seed=2")
    assert "recipe is given twice" in message("recipe=tiny", "recipe=tiny")


def test_trust_code_on_the_command_line(folder: Path) -> None:
    (folder / "saved.yaml").write_text("base: tiny\ntrust_code: true\n")
    assert load("trust_code=true").recipe.trust_code
    assert load_recipe(["recipe=saved", "trust_code=true"]).recipe.trust_code
    assert "command line" in message("recipe=saved", "overwrite=true")


ROUNDS = ("synthesis.inner=4", "distill.replay=0")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["teachers.vgg.enabled=false"], "teachers: none is enabled"),
        (["teachers.vgg.weight=0"], "teachers: none is enabled with a weight"),
        (["teachers.vg.weight=1"], "teachers.vg.model is empty; did you mean 'vgg'?"),
        (["zoo.main=vg"], "did you mean 'vgg'?; those are vgg"),
        (["zoo.sample=2"], "zoo.sample=2"),
        (["student.model="], "student.model is empty"),
        (["image.channels=1"], "teachers.vgg.mean=[0.5, 0.5, 0.5]: image.channels=1"),
        (["teachers.vgg.std=[1, 1]"], "teachers.vgg.std=[1.0, 1.0]: image.channels=3"),
        (["teachers.vgg.std=[1, 0, 1]"], "teachers.vgg.std=[1.0, 0.0, 1.0]"),
        (["teachers.vgg.mean=[124, 117, 104]"], "images are in [0, 1]: divide mean and std by 255"),
        (["teachers.vgg.pad=17"], "teachers.vgg.pad=17 is not allowed; it takes 0 to 16, half of image.size"),
        (["teachers.vgg.weights=", "data.dataset=none"], "teachers.vgg.weights is empty"),
        (["tasks=[]"], "tasks=[]"),
        (["tasks=[distill, distill]"], 'tasks=["distill", "distill"]'),
        (["tasks=[generator]", "generator.checkpoint=runs/a"], 'generator.checkpoint="runs/a"'),
        (["synthesis.steps=0", "distill.steps=0"], "synthesis.steps=0 leaves the generator untrained"),
        (["synthesis.latent_lr=0.1"], "synthesis.latent_lr=0.1 is about rounds; set synthesis.inner above 1"),
        (["synthesis.renew=first"], "synthesis.renew=first is about rounds; set synthesis.inner above 1"),
        (["synthesis.losses.adversary=1", "synthesis.warmup=0.4", "synthesis.fade=0.2"], "their sum at 0.5 or below"),
        (["synthesis.coarse=0.5"], "synthesis.coarse=0.5 is about rounds; set synthesis.inner above 1"),
        (["synthesis.inner=2"], "distill.replay=200 and synthesis.inner=2"),
        ([*ROUNDS, "generator.arch=pixels", "synthesis.redraw=0"], "synthesis.latent_lr above 0 (image inversion)"),
        (["generator.arch=pixels", "synthesis.redraw=0"], "set synthesis.inner above 1 and synthesis.latent_lr"),
        (
            [*ROUNDS, "generator.arch=pixels", "synthesis.latent_lr=0.1", "synthesis.redraw=6"],
            "synthesis.redraw=6 and generator.arch=pixels",
        ),
        (["synthesis.penalise=true", "synthesis.losses.ce=0"], "synthesis.losses.{ce,one_hot,information}"),
        (["generator.conditional=false"], "synthesis.losses.ce, .diversity and .likeness to 0"),
        (["synthesis.penalise=true", "synthesis.learn_weights=true"], "both change the weight of ce"),
        (["distill.source=real"], "distill.source=real needs a generator that is there before"),
        (["distill.input=runs/a"], "distill.input=runs/a needs a generator that is there before"),
        (["synthesis.betas=[0.5]"], "synthesis.betas=[0.5]"),
        (["synthesis.betas=[0.5, 1]"], "synthesis.betas=[0.5, 1.0]"),
    ],
)
def test_contradictions(folder: Path, arguments: list[str], part: str) -> None:
    assert part in message("recipe=tiny", *arguments)


def test_what_does_not_contradict(folder: Path) -> None:
    load("teachers.vgg.mean=[]", "teachers.vgg.std=[]", "image.channels=1")
    load("tasks=[generator]", "student.model=")
    load("teachers.vgg.weights=")
    load("data.dataset=none", "zoo.main=vgg")
    load(*ROUNDS, "synthesis.latent_lr=0.1", "synthesis.renew=all", "synthesis.coarse=0.5")
    load("synthesis.inner=4", "tasks=[generator]")  # whose replay nobody asks for
    load(*ROUNDS, "generator.arch=pixels", "synthesis.latent_lr=0.1", "synthesis.redraw=0")
    load("generator.arch=pixels", "synthesis.steps=0", "distill.steps=5")  # noise, whatever else is said of synthesis
    load("generator.conditional=false", "generator.checkpoint=runs/a")
    load("synthesis.penalise=true", "synthesis.losses.ce=0", "synthesis.losses.one_hot=0.1")
    load("distill.source=real", "generator.checkpoint=runs/a")
    load("distill.source=noise", "tasks=[generator, distill]")
    load("distill.source=real", "tasks=[generator]")  # whose student is the adversary alone


def test_check_refuses_a_recipe_made_by_hand() -> None:
    with pytest.raises(UserError, match="teachers"):
        check(Recipe())


def test_saved_recipe_loads_to_the_same(folder: Path) -> None:
    recipe = load(
        "output=no",
        "name=1e-3",
        "description=a # b: 'c' é " + "long " * 40,
        "teachers.vgg.kwargs={a: [1, {b: null}]}",
        "student.kwargs.width=8",
        "distill.lr=3e-7",
        "classes=9",
        "image.size=${classes}",
        "zoo.main=vgg",
    )
    saved = folder.parent / "config.yaml"
    saved.write_text(recipe.yaml(), encoding="utf-8")
    again = load_recipe(["recipe=config.yaml"])
    assert again.recipe == recipe.recipe
    assert again.yaml() == recipe.yaml()
    assert set(again.sources.values()) == {"config.yaml"}
    asked = load("overwrite=true", "trust_code=true")
    saved.write_text(asked.yaml(), encoding="utf-8")
    kept = load_recipe(["recipe=config.yaml"]).recipe  # what removes a run, or trusts code, is asked for every time
    assert (kept.overwrite, kept.trust_code) == (False, False)
    assert dataclasses.replace(kept, overwrite=True, trust_code=True) == asked.recipe


def leaves(value: object, prefix: str = "") -> list[str]:
    """The dotted leaf keys of a plain nested mapping."""
    if isinstance(value, dict) and value:
        return [leaf for key, entry in value.items() for leaf in leaves(entry, f"{prefix}.{key}" if prefix else key)]
    return [prefix]


def test_print_config_lists_every_key_with_its_source(folder: Path) -> None:
    given = (
        "student.kwargs={width: 8}",
        "description=a: b # c",
        "distill.lr=1e-7",
        "qat.overrides={'*conv1': [8, 8], 'on': [8, 8], layer1: [8, 8]}",
    )
    loaded = load(*given)
    text = print_config(loaded)
    keys = leaves(dataclasses.asdict(loaded.recipe))
    assert set(keys) == set(loaded.sources)
    values = [line for line in text.splitlines() if "  # " in line]
    assert len(values) == len(keys)
    for key, line in zip(keys, values, strict=True):
        name = key.rpartition(".")[2]
        assert line.lstrip().startswith(f'"{name}": ' if name in ("*conv1", "on") else f"{name}: ")
        assert line.endswith("  # " + loaded.sources[key])
    assert OmegaConf.to_container(OmegaConf.create(text)) == dataclasses.asdict(loaded.recipe)


def test_help_lists_every_key() -> None:
    text = help_text()
    assert text.startswith("accelerate launch train.py recipe=digits")
    for key in leaves(dataclasses.asdict(Recipe())):
        assert re.search(rf"^{key}(=|\.NAME\.)", text, flags=re.MULTILINE), key
    assert "teachers.NAME.weight=" in text
    assert re.search(r"^image\.size=\d+  \(integer from 4.*\)\n    \w", text, flags=re.MULTILINE)


def test_list_names_recipes_models_generators(folder: Path) -> None:
    (folder / "methods").mkdir()
    (folder / "methods/dafl.yaml").write_text("base: tiny\ndescription: DAFL's losses\n")
    text = list_text(["dfkd:vgg", "dfkd:small"], ["conv"])
    assert re.search(r"^  methods/dafl +DAFL's losses$", text, flags=re.MULTILINE)
    assert re.findall(r"^  (\S+)", text, flags=re.MULTILINE) == [
        "methods/dafl",
        "tiny",
        "dfkd:vgg",
        "dfkd:small",
        "conv",
    ]
