"""What the tasks of a run are given, and what is refused before anything is trained."""

from typing import get_args

import pytest
from runs_fixture import Runs

from dfkd.inputs import COMPRESSIONS
from dfkd.models import build_model, save_model
from dfkd.schema import Task
from dfkd.tasks import TASKS

REFUSED = [
    (("tasks=[generator,ptq]", "ptq.ends=[8,4,2]"), "ptq.ends=[8, 4, 2] is not allowed; it takes [weights, input]"),
    (("tasks=[generator,qat]", "qat.input=generator"), "qat.input=generator is no earlier task"),
    (("tasks=[generator,distill,qat]", "distill.input=ptq"), "distill.input=ptq is no earlier task"),
    (("tasks=[generator,udfc]", "udfc.ratio=0"), "udfc.ratio=0 and udfc.bits=null leave nothing to do"),
    (("tasks=[distill]", "distill.input=main"), "distill.input=main needs a generator that is there before"),
    (("tasks=[ptq]",), "task ptq needs a generator"),
    (("tasks=[generator,qat,prune]", "qat.input=prune"), "qat.input=prune is no earlier task and no folder"),
    (("tasks=[generator,ptq,qat]", "qat.input=ptq"), "qat.input=ptq is quantised by then"),
    (("tasks=[generator,ptq]", "ptq.overrides={'stem.*': [8, 8]}"), "'stem.*' matches no layer"),
    (("tasks=[generator,prune]", "prune.ignore=[nothing]"), "prune: the ignore pattern 'nothing' matches no layer"),
    (("tasks=[generator,ptq]", "ptq.weights=9"), "ptq.weights=9 is not allowed; it takes integer from 2 to 8"),
    (("tasks=[generator,ptq]", "export.input=qat"), "export.input=qat is nothing that this run writes"),
    (("tasks=[ptq,generator]",), "the generator comes first"),
    (("tasks=[generator,prune]", "prune.ignore=['*']"), "has no channels that can be taken out"),
    (("tasks=[generator,prune]", "prune.kind=weights", "prune.ignore=['*']"), "no convolution or linear layer left"),
    (("tasks=[generator,udfc]", "udfc.ignore=['*']"), "no filter can be taken out"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED)
def test_what_will_not_do_is_refused_before_anything_is_trained(
    runs: Runs, given: tuple[str, ...], message: str
) -> None:
    line = runs.run("run", *given).refused()
    assert message in line
    assert not (runs.folder / "run").exists()


@pytest.mark.parametrize(("channels", "classes"), [(3, 10), (1, 9)])
@pytest.mark.parametrize("task", ["distill", "qat", "prune"])
def test_an_input_of_other_images_or_classes_is_refused_before_anything_is_trained(
    runs: Runs, task: str, channels: int, classes: int
) -> None:
    about = {"model": "dfkd:tiny_plain", "classes": classes, "channels": channels, "kwargs": {"width": 4}}
    model = build_model(about["model"], classes=classes, channels=channels, kwargs=about["kwargs"])
    save_model(runs.folder / "other", model, about)
    line = runs.run("run", f"tasks=[generator,{task}]", f"{task}.input={runs.folder / 'other'}").refused()
    assert f"{task}.input={runs.folder / 'other'}: it " in line
    assert ("gives (9,) outputs where classes=10" if classes == 9 else "does not take images [B, 1, ") in line
    assert not (runs.folder / "run").exists()


def test_an_input_without_a_model_is_refused_before_anything_is_trained(runs: Runs) -> None:
    (runs.folder / "empty").mkdir()
    line = runs.run("run", "tasks=[generator,distill]", f"distill.input={runs.folder / 'empty'}").refused()
    assert f"distill.input={runs.folder / 'empty'}: " in line
    assert "is no model folder" in line


def test_teachers_that_cannot_be_kept_are_not_trained(runs: Runs) -> None:
    runs.cache = runs.recipe
    line = runs.run("run", "training.epochs=2").refused()
    assert f"training.cache={runs.recipe} is a file; choose another training.cache=..." in line


# Without batch norms.
NETWORK = """
from torch import nn

def make(classes, channels):
    layers = nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, classes)
    return nn.Sequential(*layers)
"""


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("tasks=[generator,udfc]",), "no filter can be taken out: 0 has no batch norm; "),
        (("tasks=[generator,prune]", "prune.repair=batch_norm"), "repair='batch_norm' needs batch norms"),
    ],
)
def test_what_needs_batch_norms_is_refused_before_anything_is_trained(
    runs: Runs, given: tuple[str, ...], message: str
) -> None:
    (runs.folder / "net.py").write_text(NETWORK)
    teacher = (f"teachers.plain.model=python:{runs.folder / 'net.py'}:make", "teachers.plain.kwargs={}")
    teacher += ("trust_code=true", "zoo.main=plain", "synthesis.losses.bn=0", "synthesis.learn_weights=false")
    assert message in runs.run("run", *teacher, *given).refused()
    assert not (runs.folder / "run").exists()


def test_each_compression_can_be_asked_for_and_carried_out() -> None:
    assert {*get_args(Task)} - {"generator", "distill"} == {*COMPRESSIONS} == {*TASKS}
