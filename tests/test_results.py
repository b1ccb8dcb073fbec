"""What a run comes to: of which network and images its figures are, and how its time adds up."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from networks_fixture import KNOWN_CLASSES, Knows, Says

from dfkd import results
from dfkd.phases import student_judge
from dfkd.run import save_phase
from dfkd.runtime import Shard
from dfkd.teachers import Teacher
from dfkd.training import Plan
from generators import ConvGenerator

CPU = torch.device("cpu")


def test_class_agreement_is_of_the_images_that_it_says(accelerator: Accelerator) -> None:
    """Of all classes alike, not of the twenty that are looked at while it trains."""
    parts = SimpleNamespace(generator=Knows(21), zoo=[Teacher(Says(), name="a_b")], accelerator=accelerator, bn={})
    parts.generator.description = {"arch": "knows"}
    about, figures = results._generator_results(parts)  # type: ignore[arg-type]
    assert about["class_agreement"] == {"a_b": pytest.approx(100 * 21 / KNOWN_CLASSES)}
    assert about["class_agreement_n"] == 1000
    assert figures["class_agreement_a_b"] == about["class_agreement"]["a_b"]


def test_the_last_quarter_is_the_students_own_in_a_run_of_several_tasks() -> None:
    entries = [
        {"phase": phase, "step": step, "accuracy": float(step), "images": 9}
        for phase in ("evaluation", "student")
        for step in range(10, 161, 10)
    ]
    for phases, kept in (
        ([Plan("distill", 0, 0, 160)], [130, 140, 150, 160]),
        ([Plan("generator", 80, 1, 0), Plan("distill", 0, 0, 80)], [150, 160]),  # 80 + 60 steps are not of it
        ([Plan("distill", 80, 0, 80)], [150, 160]),  # nor are those of the generator alone
        ([Plan("distill", 0, 0, 80), Plan("qat", 0, 0, 80)], [70, 80]),
    ):
        found = results._last_quarter(phases, entries)
        assert found is not None
        assert (found["mean"], found["lowest"], found["evaluations"]) == (sum(kept) / len(kept), kept[0], len(kept))


def test_a_generator_whose_statistics_did_not_come_closer_is_told_at_the_end() -> None:
    sound = {"class_agreement_a": 90.0, "predicted_balance_a": 0.98, "feature_ratio": 0.6}
    recipe = SimpleNamespace(generator=SimpleNamespace(checkpoint=None))
    generator = ConvGenerator(latent=4, classes=3, channels=1, size=8, width=4)
    for end, told in ((20.0, False), (95.0, True)):
        parts = SimpleNamespace(recipe=recipe, generator=generator, bn={"a": {"start": 100.0, "end": end}})
        notes = results._notes(parts, sound, {})  # type: ignore[arg-type]
        assert set(notes) == ({"statistics a"} if told else set())


def test_a_student_is_judged_on_the_way_by_the_teachers_that_it_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    images = Knows(KNOWN_CLASSES)(torch.zeros(KNOWN_CLASSES, 2), torch.arange(KNOWN_CLASSES))
    monkeypatch.setattr("dfkd.phases.held_out", lambda parts, count, autocast: [images] * (count // 128))
    zoo = [Teacher(Says(1), name="other", weight=3.0), Teacher(Says(), name="main")]
    for main, percent in (("main", 100.0), (None, 0.0)):  # of both it is the other one's word that counts
        recipe = SimpleNamespace(zoo=SimpleNamespace(main=main))
        parts = SimpleNamespace(
            recipe=recipe, zoo=zoo, test=None, accelerator=None, generator=Knows(KNOWN_CLASSES).train()
        )
        assert student_judge(parts, Says())() == {"agreement": percent, "images": 4 * KNOWN_CLASSES}  # type: ignore[arg-type]
        assert parts.generator.training


def test_the_seconds_of_a_run_are_of_all_its_calls_and_each_counts_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter((1000.0, 1004.0))  # measuring takes four seconds
    monkeypatch.setattr(results, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    told: list[Any] = []
    stubs: dict[str, Any] = {
        "_generator_results": lambda parts: ({}, {}),
        "_student_results": lambda parts: None,
        "_notes": lambda *_: {},
        "_data_free": lambda *_: [],
        "_guesses": lambda *_: None,
        "_teacher_results": lambda *_: {},
        "describe_device": lambda _: "cpu",
        "task_results": lambda recipe, name: {"seconds": {"qat": 45.0, "ptq": 9.0}[name], "opened": []},
        "verdict": lambda *given: told.append(given) or {},
        "write_report": lambda folder: None,
    }
    for name, stub in stubs.items():
        monkeypatch.setattr(results, name, stub)
    zoo = SimpleNamespace(main="b")
    recipe = SimpleNamespace(name="x", seed=0, tasks=["qat", "ptq"], zoo=zoo, export=SimpleNamespace(input="none"))
    teachers = [Teacher(Says(), name=name) for name in "ab"]
    parts = SimpleNamespace(recipe=recipe, folder=tmp_path, shard=Shard(CPU), zoo=teachers)
    parts.accelerator = SimpleNamespace(mixed_precision="no")
    # The loop of qat worked for 40 of the 45 seconds that the task took in all calls.
    results.finish(parts, [], {"before": 1.0, "teachers": 2.0, "qat": 40.0}, "", {})  # type: ignore[arg-type]
    assert json.loads((tmp_path / "results.json").read_text())["seconds"] == {
        "before": 1.0,
        "teachers": 2.0,
        "qat": 45.0,
        "ptq": 9.0,
        "evaluation": 4.0,
        "total": 61.0,
    }
    assert told[0][3] == ["b"]  # the student is held against the teacher that it learned from


def test_the_statistics_told_of_a_generator_are_those_of_the_finished_one() -> None:
    bn = {name: {"a": torch.tensor(value)} for name, value in (("start", 100.0), ("last", 30.0), ("end", 20.0))}
    synthesizer: Any = SimpleNamespace(bn_start=bn["start"], bn_last=bn["last"], bn_end=bn["end"])
    recipe = SimpleNamespace(synthesis=SimpleNamespace(steps=9), generator=SimpleNamespace(checkpoint=None))
    waited = SimpleNamespace(wait_for_everyone=lambda: None)
    parts: Any = SimpleNamespace(recipe=recipe, folder=None, shard=Shard(CPU, 1, 2), bn={}, student=None)
    parts.accelerator = waited
    save_phase(parts, Plan("distill", 9, 1, 0), synthesizer)  # of a process that writes nothing
    assert parts.bn == {"a": {"start": 100, "end": 20}}
