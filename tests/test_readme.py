"""The Python in the documentation that trains: run as it stands, with fewer steps."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dfkd import Synthesizer, terms
from dfkd.teachers import Teacher
from generators import ConvGenerator, load_generator

ROOT = Path(__file__).parents[1]


def block(path: str, word: str) -> str:
    """The Python block of a document that has a word in it."""
    (found,) = (text for text in re.findall(r"```python\n(.*?)```", (ROOT / path).read_text(), re.S) if word in text)
    return str(found)


def test_a_generator_and_a_student_are_trained_as_the_readme_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_teacher: Callable[..., Teacher]
) -> None:
    monkeypatch.chdir(tmp_path)
    code = block("README.md", "Synthesizer").replace("steps, each = 600, 4", "steps, each = 3, 2")
    student = nn.Sequential(nn.Conv2d(1, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(196, 10))
    before = student[0].weight.detach().clone()
    names: dict[str, Any] = {"net": make_teacher(classes=10).model, "student": student}
    exec(code, names)
    inputs = torch.randn(4, 128), torch.arange(4)
    assert torch.equal(load_generator("mine/generator")(*inputs), names["generator"](*inputs))
    assert not torch.equal(student[0].weight, before)
    assert not student.training
    assert names["learner"].optimizer.param_groups[0]["lr"] == pytest.approx(0.05 * (1 + math.cos(math.pi * 5 / 6)))


def test_terms_of_ones_own_work_without_a_change(
    monkeypatch: pytest.MonkeyPatch, make_teacher: Callable[..., Teacher], make_generator: Callable[..., ConvGenerator]
) -> None:
    for table in ("TEACHER_TERMS", "IMAGE_TERMS"):
        monkeypatch.setattr(terms, table, getattr(terms, table).copy())
    monkeypatch.setattr("dfkd.synthesis.TEACHER_TERMS", terms.TEACHER_TERMS)
    monkeypatch.setattr("dfkd.synthesis.IMAGE_TERMS", terms.IMAGE_TERMS)
    exec(block("docs/methods.md", "margin"), {})
    losses = {"ce": 1.0, "margin": 0.1, "contrast": 0.5}
    found = Synthesizer(make_generator(), [make_teacher()], losses=losses, steps=2).step(0)
    assert found.keys() == losses.keys()
    assert found["margin"] < 0 < found["contrast"]
