"""The loop of a run: when it measures, what it counts and warns of; what is looked at in a generator."""

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from networks_fixture import KNOWN_CLASSES, Knows, Says
from torch import Tensor, nn

from dfkd import training
from dfkd.errors import UserError
from dfkd.runtime import Deadline, Shard
from dfkd.teachers import Teacher
from dfkd.training import GRID_COLUMNS, GRID_ROWS, LOOKED_AT, Loop, Plan, look, look_at_all
from generators import ConvGenerator


def test_classes_that_the_generator_does_not_draw_are_noticed_wherever_they_are(accelerator: Accelerator) -> None:
    zoo = [Teacher(Says(), name="t")]
    figures, grid = look(Knows(KNOWN_CLASSES), zoo, accelerator)
    assert (figures["class_agreement_t"], round(figures["predicted_balance_t"], 5)) == (100.0, 1.0)
    classes = grid.flatten(1).argmax(1).view(GRID_ROWS, GRID_COLUMNS)
    assert (classes == classes[:, :1]).all()  # a row is a class
    assert classes[:, 0].unique().numel() == GRID_ROWS
    # Of 20 classes, spread evenly, the first 8 are below 20; of all 50 it is 20.
    figures, _ = look(Knows(20), zoo, accelerator)
    assert figures["class_agreement_t"] == 100 * 8 / LOOKED_AT
    figures = look_at_all(Knows(20), zoo, accelerator, 6)
    assert figures["class_agreement_t"] == 100 * 20 / KNOWN_CLASSES
    share = torch.tensor([31 / KNOWN_CLASSES] + 19 * [1 / KNOWN_CLASSES])
    torch.testing.assert_close(
        torch.tensor(figures["predicted_balance_t"]),
        torch.distributions.Categorical(share).entropy() / torch.tensor(KNOWN_CLASSES).log(),
    )


def test_looking_at_a_generator_that_learns_leaves_it_as_it_is(
    make_generator: Callable[..., ConvGenerator], make_teacher: Callable[..., Teacher], accelerator: Accelerator
) -> None:
    generator = make_generator().train()
    before = {name: value.clone() for name, value in generator.state_dict().items()}
    look(generator, [make_teacher()], accelerator)
    look_at_all(generator, [make_teacher()], accelerator, 4)
    assert generator.training
    assert all(torch.equal(value, before[name]) for name, value in generator.state_dict().items())


def test_a_student_that_learns_after_the_generator_is_measured_over_its_own_updates() -> None:
    assert Plan("distill", 20, 0, 40).evaluated(4) == {30, 40, 50, 60}
    assert Plan("distill", 20, 2, 40).evaluated(4) == {20, 40, 60, 80}


# --- the loop, with a student whose update takes a second and whose measurement takes a hundred ---


class Noted:
    """Stands in for Metrics and Checkpoints: keeps what it is given."""

    def __init__(self) -> None:
        self.written: list[tuple[str, int, dict[str, float]]] = []
        self.warned: list[tuple[int, set[str]]] = []
        self.saved: list[int] = []

    def new_phase(self) -> None: ...

    def progress(self, *_: object) -> None: ...

    def log(self, phase: str, step: int, terms: dict[str, Tensor]) -> dict[str, float]:
        return {name: float(value) for name, value in terms.items()}

    def write(self, phase: str, step: int, figures: dict[str, float]) -> None:
        self.written.append((phase, step, figures))

    def warn(self, step: int, notes: dict[str, str]) -> None:
        self.warned += [(step, set(notes))] if notes else []

    def save(self, step: int, state: dict[str, Any]) -> None:
        self.saved.append(step)


MakeLoop = Callable[..., tuple[Loop, Noted]]


@pytest.fixture
def make_loop(monkeypatch: pytest.MonkeyPatch) -> MakeLoop:
    """A loop on a clock of its own, whose student agrees with its teacher as given, update by update."""
    now = [0.0]
    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def make(plan: Plan, agreements: Sequence[float], **given: Any) -> tuple[Loop, Noted]:
        def step(k: int) -> dict[str, Tensor]:
            now[0] += 1
            return {"agreement": torch.tensor(agreements[k], dtype=torch.float64)}

        def measured() -> dict[str, float]:
            now[0] += 100
            return {"accuracy": 50.0, "images": 9}

        fit = SimpleNamespace(
            step=step,
            student=nn.Linear(1, 1),
            projectors={},
            graphs=SimpleNamespace(forget=lambda: None),
            state_dict=dict,
            load_state_dict=lambda state: None,
        )
        noted, device = Noted(), torch.device("cpu")
        usual: dict[str, Any] = {"zoo": [], "generator": None, "synthesizer": None, "fit": fit, "accelerator": None}
        usual |= {"shard": Shard(device), "metrics": noted, "checkpoints": noted, "offset": 0, "spent": {}}
        usual |= {"log_every": 1, "grid_every": 10, "checkpoint_every": 1e9, "deadline": Deadline()}
        return Loop(plan, **{**usual, "evaluate": measured, "evaluations": 2, **given}), noted

    return make


def test_measuring_a_student_is_no_time_of_its_training(make_loop: MakeLoop) -> None:
    spent = {"teachers": 50.0, "generator": 7.0}
    loop, noted = make_loop(Plan("distill", 0, 0, 8), [0.9] * 8, offset=30, spent=spent)
    loop.run()
    assert spent == {"teachers": 50, "generator": 7, "distill": 8, "measuring the student": 200}
    measured = {"accuracy": 50.0, "images": 9}
    assert noted.written == [
        ("evaluation", 34, {**measured, "trained": 4}),
        ("evaluation", 38, {**measured, "trained": 8}),
    ]
    assert noted.saved == [38]


@pytest.mark.parametrize(("here", "there"), [(True, False), (False, True)])
def test_no_process_goes_on_where_one_has_a_broken_weight(
    make_loop: MakeLoop, monkeypatch: pytest.MonkeyPatch, here: bool, there: bool
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(training, "largest", lambda number, _: asked.append(number) or max(number, int(there)))
    monkeypatch.setattr(training, "out_of_time", lambda *_: False)  # which asks the largest, too
    loop, noted = make_loop(Plan("distill", 0, 0, 2), [0.9] * 2, evaluate=None)
    assert loop.fit is not None
    with torch.no_grad():
        loop.fit.student.weight.fill_(math.nan if here else 1.0)
    with pytest.raises(UserError, match="^step 2: weight of the student" if here else "^step 2: a weight of another"):
        loop.run()
    assert (asked[-1], noted.saved) == (int(here), [])


def test_a_student_is_warned_of_by_its_mean_agreement_also_after_a_resume(make_loop: MakeLoop) -> None:
    lucky = [0.4] * 10 + [0.95] + [0.4] * 10  # of which the mean is never above 0.51
    loop, noted = make_loop(Plan("distill", 0, 0, len(lucky)), lucky, evaluate=None)
    loop.run()
    assert noted.warned == []
    fallen = [0.9] * 10 + [0.1] * 10
    plan = Plan("distill", 0, 0, len(fallen))
    whole, wanted = make_loop(plan, fallen, evaluate=None)
    whole.run()
    first, _ = make_loop(Plan("distill", 0, 0, 12), fallen, evaluate=None)
    first.run()
    second, found = make_loop(plan, fallen, evaluate=None)
    second.run(second.load_state_dict(first.state_dict(12)))
    assert found.warned == wanted.warned != []


@pytest.mark.parametrize(
    ("changed", "end", "told"),
    [({}, 20.0, set()), ({"class_agreement_a": 30.0}, 20.0, {"class a"}), ({}, 90.0, {"statistics a"})],
)
def test_a_generator_is_warned_of_by_its_own_progress_and_what_it_began_with(
    make_loop: MakeLoop,
    make_generator: Callable[..., ConvGenerator],
    monkeypatch: pytest.MonkeyPatch,
    changed: dict[str, float],
    end: float,
    told: set[str],
) -> None:
    figures = {"class_agreement_a": 90.0, "predicted_balance_a": 0.98, "feature_ratio": 0.6, **changed}
    monkeypatch.setattr(training, "show", lambda *_: figures)
    bn = {"bn_start": {"a": torch.tensor(100.0)}, "bn_last": {"a": torch.tensor(end)}}
    given = {"generator": make_generator(), "synthesizer": SimpleNamespace(**bn)}
    loop, noted = make_loop(Plan("distill", 20, 1, 180), [], **given)
    loop.snapshot(20)  # the generator's last step, of 200 in all
    assert noted.warned == ([(20, told)] if told else [])
