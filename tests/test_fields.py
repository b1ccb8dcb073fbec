"""docs/fields.md and the files of a run name the same fields."""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
from runs_fixture import ROOT, Runs

from dfkd.terms import IMAGE_TERMS, TEACHER_TERMS

TASKS = ("prune", "qat", "ptq", "udfc")
PIXELS = ("synthesis.latent_lr=0.1", "synthesis.redraw=0", "synthesis.losses.diversity=0", "synthesis.losses.spread=0")
CHEAP = (
    f"tasks=[distill,{','.join(TASKS)}]",
    *("synthesis.steps=4", "distill.steps=4", "student.weights=teacher", "zoo.main=residual"),
    *("student.model=dfkd:tiny_residual", "student.kwargs={width: 4}"),
    "runtime.grid_every=2",  # grids of a generator that knows nothing yet: there are warnings to look at
    *("prune.images=16", "prune.steps=2", "prune.batch_size=8"),
    *("qat.images=8", "qat.steps=2", "qat.batch_size=8", "ptq.images=32", "ptq.steps=1"),
    *("udfc.bits=4", "export.input=udfc", "export.images=8"),  # one file: an export takes longer than a task
)

# By the file or phase that a heading names its fields, each with what it is always in: "" is the file or line itself,
# None says that it is there only at times.
Fields = Mapping[str, str | None]


@pytest.fixture(scope="module")
def documented() -> dict[str, Fields]:
    found: dict[str, dict[str, str | None]] = defaultdict(dict)
    heading: list[str] = []
    for line in (ROOT / "docs" / "fields.md").read_text().splitlines():
        if line.startswith("#"):
            heading = re.findall("`(.+?)`", line)
        elif line.startswith("| `"):
            cells = line.strip("| ").split(" | ")
            always = re.fullmatch("always(?: in `(.+)`)?", cells[-1])
            for name in heading:
                found[name] |= dict.fromkeys(re.findall("`(.+?)`", cells[0]), always and (always[1] or ""))
    return found


def paths(value: Any) -> set[str]:
    """The paths of all keys of nested dicts, also of those in lists; of what is null or empty there are none."""
    if isinstance(value, list):
        return {path for each in value for path in paths(each)}
    below = {key: paths(each) for key, each in value.items()} if isinstance(value, dict) else {}
    return {path for key, rest in below.items() for path in (key, *(f"{key}.{each}" for each in rest))}


def compare(found: set[str], fields: Fields) -> None:
    def among(field: str, names: Iterable[str]) -> bool:
        pattern = re.escape(field).replace("NAME", "[^.]+").replace("LAYER", ".+")  # a layer's name has dots
        return any(re.fullmatch(pattern, name) for name in names)

    assert [path for path in sorted(found) if not any(among(field, [path]) for field in fields)] == []
    wanted = [field for field, parent in fields.items() if parent == "" or parent in found]
    assert [field for field in wanted if not among(field, found)] == []


def test_the_document_and_a_run_have_the_same_fields(runs: Runs, documented: dict[str, Fields]) -> None:
    assert runs.run("fields", *CHEAP).code == 0
    folder = runs.folder / "fields"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    files = {"metrics.jsonl", "results.json", "task.json", "generator.json", "model.json"}
    assert {line["phase"] for line in lines} == documented.keys() - files
    for line in lines:
        compare(paths(line), {**documented["metrics.jsonl"], **documented[line["phase"]]})
    results = json.loads((folder / "results.json").read_text())
    for name in TASKS:
        task = json.loads((folder / name / "task.json").read_text())
        compare(paths(task), documented["task.json"])
        assert results["tasks"][name] == {key: value for key, value in task.items() if key != "opened"}
        results["tasks"][name] = None
    compare(paths(results), documented["results.json"])
    rounds = ("tasks=[generator]", "synthesis.steps=2", "synthesis.inner=2")
    assert runs.run("pool", *rounds).code == 0
    assert runs.run("pixels", *rounds, "generator.arch=pixels", *PIXELS).code == 0
    for run in (folder, runs.folder / "pool", runs.folder / "pixels"):
        compare(paths(json.loads((run / "generator" / "generator.json").read_text())), documented["generator.json"])
    (teacher, *_) = runs.cache.glob("plain-*")
    for model in [folder / "student", *(folder / name for name in TASKS), teacher]:
        compare(paths(json.loads((model / "model.json").read_text())), documented["model.json"])


def test_the_document_has_every_loss_of_the_generator(documented: dict[str, Fields]) -> None:
    assert {*TEACHER_TERMS, *IMAGE_TERMS} <= set(documented["generator"])
