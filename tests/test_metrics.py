"""What a run tells while it goes: lines of metrics.jsonl, also after a kill, and a NaN by its name."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dfkd import metrics as module
from dfkd.errors import UserError
from dfkd.metrics import Metrics

Open = Callable[..., Metrics]


@pytest.fixture
def make_metrics(tmp_path: Path) -> Iterator[Open]:
    opened = []

    def make(**options: Any) -> Metrics:
        opened.append(Metrics(tmp_path, **{"main": True, **options}))
        return opened[-1]

    yield make
    for metrics in opened:
        metrics.close()


def lines(folder: Path) -> list[tuple[str, int]]:
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(entry["phase"], entry["step"]) for entry in entries]


def test_a_line_per_logged_step(make_metrics: Open, tmp_path: Path) -> None:
    metrics = make_metrics()
    figures = metrics.log("student", 4, {"loss": torch.tensor(0.5), "agreement": torch.tensor(1.0).double()})
    assert figures == {"loss": 0.5, "agreement": 1.0}
    (entry,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())  # at once: a kill loses nothing
    assert entry.pop("seconds") >= 0
    assert entry == {"phase": "student", "step": 4, "loss": 0.5, "agreement": 1.0}


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_the_term_that_is_no_number_is_named_and_not_written(make_metrics: Open, tmp_path: Path, value: str) -> None:
    metrics = make_metrics()
    with pytest.raises(UserError, match=rf"generator step 3: the term 'bn' is {value}; .*synthesis.lr") as caught:
        metrics.log("generator", 3, {"ce": torch.tensor(1.0), "bn": torch.tensor(float(value))})
    assert "\n" not in str(caught.value)
    assert lines(tmp_path) == []


def test_resumed_lines_past_the_checkpoint_are_dropped(make_metrics: Open, tmp_path: Path) -> None:
    metrics = make_metrics()
    for step in (2, 4, 6):
        metrics.write("generator", step, {"bn": 1.0})
        metrics.write("student", step, {"loss": 1.0})
    metrics.close()
    make_metrics(resumed_after=4).write("generator", 6, {"bn": 2.0})
    assert lines(tmp_path) == [(p, s) for s in (2, 4) for p in ("generator", "student")] + [("generator", 6)]
    make_metrics(resumed_after=0)
    assert lines(tmp_path) == []


@pytest.mark.parametrize("rest", ['{"phase": "student", "st', '{"phase": "student", "step": 4}', ""])
def test_a_line_that_a_kill_cut_off_does_not_spoil_the_next(make_metrics: Open, tmp_path: Path, rest: str) -> None:
    # cut within, or just before the line's end
    (tmp_path / "metrics.jsonl").write_text(f'{{"phase": "generator", "step": 4}}\n{rest}')
    make_metrics(resumed_after=4).write("generator", 6, {"bn": 1.0})
    whole = [("student", 4)] if rest.endswith("}") else []
    assert lines(tmp_path) == [("generator", 4), *whole, ("generator", 6)]


def test_a_kill_while_lines_are_dropped_loses_none(
    make_metrics: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_metrics().write("student", 2, {"loss": 1.0})
    monkeypatch.setattr(os, "replace", lambda source, target: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        make_metrics(resumed_after=2)
    assert lines(tmp_path) == [("student", 2)]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "run", main=False)
    assert metrics.log("student", 1, {"loss": torch.tensor(2.0)}) == {"loss": 2.0}
    metrics.grid("generator", 1, torch.rand(4, 1, 8, 8), 2)
    metrics.progress(1, 2, "text")
    metrics.close()
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="loss"):  # they must not go on alone either
        metrics.log("student", 2, {"loss": torch.tensor(float("nan"))})


def test_a_grid_is_a_picture_large_enough_to_see(make_metrics: Open, tmp_path: Path) -> None:
    make_metrics().grid("frozen-generator", 12, torch.rand(6, 1, 8, 8), 3)
    with Image.open(tmp_path / "images" / "frozen-generator-000012.png") as picture:
        assert picture.width >= 3 * 32
        assert picture.height >= 2 * 32


def test_without_a_terminal_a_plain_line_now_and_then(
    make_metrics: Open, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr(module.time, "perf_counter", lambda: now)
    metrics = make_metrics()
    for done in (10, 20, 30, 40):
        metrics.progress(done, 40, "distill: loss 0.5")
        now += module.LINE_EVERY / 2
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(" steps")[0] for line in said] == ["10/40", "30/40", "40/40"]
    assert said[0] == "10/40 steps: distill: loss 0.5"  # how long a step takes is not known yet
    assert said[1] == "30/40 steps, 8 s to go: distill: loss 0.5"  # 20 steps took 15 s


def test_a_new_phase_counts_its_own_steps_and_time(
    make_metrics: Open, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr(module.time, "perf_counter", lambda: now)
    metrics = make_metrics()
    for done in (0, 20):
        metrics.progress(done, 20, "slow")
        now += 1000.0
    metrics.new_phase()
    for done in (100, 110):  # goes on in its middle, ten steps in 30 s
        metrics.progress(done, 130, "fast")
        now += 30.0
    said = capsys.readouterr().out.splitlines()
    assert said[-2:] == ["100/130 steps: fast", "110/130 steps, 60 s to go: fast"]


def test_tensorboard_has_every_step_once_over_a_resume(make_metrics: Open, tmp_path: Path) -> None:
    first = make_metrics()
    for step in (2, 4, 6):
        first.write("generator", step, {"bn": step / 2})
    first.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    events.rename(events.with_name("events.out.tfevents.0"))  # is read first: names of one second may not be
    resumed = make_metrics(resumed_after=4)
    resumed.write("generator", 6, {"bn": 7.0})
    resumed.close()
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(each.step, each.value) for each in board.Scalars("generator/bn")] == [(2, 1.0), (4, 2.0), (6, 7.0)]


def test_a_warning_is_given_once_also_over_a_resume(
    make_metrics: Open, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = make_metrics()
    metrics.warn(2, {"alike": "hardly differ"})
    metrics.warn(4, {"alike": "hardly differ", "late": "comes later"})
    assert capsys.readouterr().out.splitlines() == [
        "warning at step 2: hardly differ",
        "warning at step 4: comes later",
    ]
    assert lines(tmp_path) == [("warning", 2), ("warning", 4)]
    resumed = make_metrics(resumed_after=3)
    resumed.warn(4, {"alike": "hardly differ", "late": "comes later"})
    assert capsys.readouterr().out == "warning at step 4: comes later\n"  # its line had been dropped with the others
    assert make_metrics(main=False).warn(6, {"other": "rank 1"}) is None
    assert lines(tmp_path) == [("warning", 2), ("warning", 4)]
