"""Weight selection: a student that begins as a part of its teacher computes what that part computes."""

import copy
import json
from typing import Any

import pytest
import torch
from conftest import randomise
from networks_fixture import images
from runs_fixture import Runs
from torch import Tensor, nn

from dfkd.compress.files import load_compressed
from dfkd.errors import UserError
from dfkd.models import build_model
from dfkd.models.selection import select_weights
from dfkd.recipe import load_recipe
from dfkd.zoo import teacher_folder


def network(name: str, seed: int, **kwargs: Any) -> nn.Module:
    """A network of random weights and statistics, in double precision."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return randomise(build_model(name, classes=5, kwargs=kwargs), seed).double().eval()


def outputs(*networks: nn.Module) -> list[Tensor]:
    given = images(4, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        return [network(given) for network in networks]


@pytest.mark.parametrize(
    ("small", "large", "skipped"),
    [
        ("dfkd:resnet20", "dfkd:resnet56", {f"layer{k}": (1, 2, 3, 5, 6, 7) for k in (1, 2, 3)}),
        ("dfkd:wrn_16_1", "dfkd:wrn_40_1", {f"block{k}.layer": (1, 2, 3, 4) for k in (1, 2, 3)}),
        ("timm:resnet18", "timm:resnet34", {"layer1": (1,), "layer2": (1, 2), "layer3": (1, 2, 3, 4), "layer4": (1,)}),
    ],
)
def test_a_shallow_student_is_its_teacher_without_the_blocks_between(
    small: str, large: str, skipped: dict[str, tuple[int, ...]]
) -> None:
    student, teacher = network(small, seed=0), network(large, seed=1)
    assert select_weights(student, teacher) == 1
    with torch.no_grad():  # what the student has no room for adds nothing to the residual stream
        for name, blocks in skipped.items():
            for k in blocks:
                modules = teacher.get_submodule(f"{name}.{k}").modules()
                last = [module for module in modules if isinstance(module, nn.BatchNorm2d | nn.Conv2d)][-1]
                last.weight.zero_()
                if last.bias is not None:
                    last.bias.zero_()
    ours, theirs = outputs(student, teacher)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["tiny_residual", "tiny_plain", "resnet20"])
@pytest.mark.parametrize("width", [12, 8])
def test_a_narrow_student_is_its_teacher_without_the_channels_between(name: str, width: int) -> None:
    large = 2 * width if width == 8 else 16  # of 16 channels twelve are not evenly spaced
    student, teacher = network(f"dfkd:{name}", 0, width=width), network(f"dfkd:{name}", 1, width=large)
    assert select_weights(student, teacher) == 1
    with torch.no_grad():
        for module in teacher.modules():
            if isinstance(module, nn.Conv2d | nn.Linear) and module.weight.shape[1] % large == 0:
                many = module.weight.shape[1]
                few = many * width // large
                dead = torch.ones(many, dtype=torch.bool)
                dead[torch.arange(few) * many // few] = False
                module.weight[:, dead] = 0
    ours, theirs = outputs(student, teacher)
    torch.testing.assert_close(ours, theirs)


def test_what_the_teacher_lacks_stays() -> None:
    student, teacher = network("dfkd:tiny_plain", 0, width=8), network("dfkd:tiny_plain", 1, width=16)
    teacher.linear = nn.Linear(64, 3).double()  # fewer classes
    before = {name: value.clone() for name, value in student.state_dict().items() if value.is_floating_point()}
    share = select_weights(student, teacher)
    same = {name for name, value in before.items() if torch.equal(value, student.state_dict()[name])}
    assert same == {"linear.weight", "linear.bias"}
    assert share == pytest.approx(1 - (32 + 1) * 5 / sum(value.numel() for value in before.values()))


def test_layers_of_another_kind_or_kernel_and_indices_stay() -> None:
    def small() -> nn.Module:
        row = nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 64, 1), nn.Flatten()
        )
        row.register_buffer("index", torch.arange(4))
        return row

    student, teacher = small(), small()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    teacher[0], teacher[1] = nn.Conv2d(2, 8, 5), nn.GroupNorm(4, 4)
    with torch.no_grad():
        teacher[1].bias.fill_(7.0)
        teacher[0].bias.fill_(7.0)
    teacher.index = torch.arange(8) + 5
    select_weights(student, teacher)
    assert torch.equal(student[0].weight, before["0.weight"])
    assert (student[0].bias == 7).all()
    assert torch.equal(student[1].bias, before["1.bias"])
    assert torch.equal(student.index, before["index"])
    assert torch.equal(student[3].weight, teacher[3].weight)


def test_a_copy_and_a_stranger_are_refused() -> None:
    student = network("dfkd:resnet20", 0)
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(UserError, match="the student would be its teacher"):
        select_weights(student, network("dfkd:resnet20", 1))
    assert all(torch.equal(x, before[name]) for name, x in student.state_dict().items())
    with pytest.raises(UserError, match="0 of the student's 16 layers, 0% of its numbers"):
        select_weights(network("dfkd:wrn_16_1", 0), nn.Sequential(nn.Linear(3, 5)))
    with pytest.raises(UserError, match="choose a smaller network of the teacher's kind"):  # other blocks of some names
        select_weights(network("dfkd:tiny_residual", 0), network("dfkd:tiny_residual", 1, depth=2))
    # A large head does not make up for convolutions.
    with pytest.raises(UserError, match="4 of the student's 11 layers, 93% of its numbers"):
        select_weights(network("torchvision:vgg11", 0), network("torchvision:vgg13", 1))


NARROW = ("zoo.main=residual", "student.model=dfkd:tiny_residual", "student.kwargs.width=4")
SHORT = ("synthesis.steps=2", "distill.steps=2", "runtime.log_every=1")


def test_a_run_begins_with_the_trained_teacher(runs: Runs) -> None:
    given = ("student.weights=teacher", *NARROW, *SHORT, "distill.lr=0")
    called = runs.run("selected", *given)
    assert (called.code, called.err) == (0, "")
    assert "the student began with weights of teacher residual (100 % of its own)" in called.out
    student = dict(load_compressed(runs.folder / "selected" / "student").model.named_parameters())
    recipe = load_recipe(runs.arguments("selected", *given)).recipe
    trained = load_compressed(teacher_folder(recipe, "residual", recipe.teachers["residual"])).model
    teacher = dict(trained.named_parameters())
    assert student.keys() == teacher.keys()
    torch.testing.assert_close(student["features.0.weight"], teacher["features.0.weight"][::2])
    torch.testing.assert_close(student["linear.weight"], teacher["linear.weight"][:, ::2])
    selected = json.loads((runs.folder / "selected" / "results.json").read_text())["student"]["selected"]
    assert selected == {"teacher": "residual", "share": 1}
    (entry,) = json.loads((runs.folder / "selected" / "student" / "model.json").read_text())["opened"]
    assert (entry["purpose"], entry["split"]) == ("train teacher", "train")


def test_a_student_that_began_so_learns_its_teachers_maps_and_no_other_does(runs: Runs) -> None:
    shallow = ("zoo.main=residual", "student.model=dfkd:resnet20", "student.kwargs={width: 8}", *SHORT)
    deep = ("teachers.residual.model=dfkd:resnet32",)
    losses: dict[str, list[float]] = {}
    for weights in ("teacher", ""):
        for hints in (100, 0):
            name = f"{weights or 'random'}-{hints}"
            assert runs.run(name, f"student.weights={weights}", f"distill.hints={hints}", *shallow, *deep).code == 0
            entries = map(json.loads, (runs.folder / name / "metrics.jsonl").read_text().splitlines())
            losses[name] = [entry["loss"] for entry in entries if entry["phase"] == "student"]
    assert losses["teacher-100"][0] > losses["teacher-0"][0] + 1
    assert losses["random-100"] == losses["random-0"]


def test_a_run_refuses_a_copy_before_anything_is_trained(runs: Runs) -> None:
    given = ("student.weights=teacher", "zoo.main=plain", "student.kwargs.width=4")
    assert "choose a smaller student.model" in runs.run("copy", *given).refused()
    assert not (runs.folder / "copy").exists()
