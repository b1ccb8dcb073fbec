"""What a run comes to: everything measured once at its end, results.json, the report and a verdict."""

import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dfkd import assemble
from dfkd.assemble import Parts
from dfkd.curves import entries
from dfkd.data import entry
from dfkd.evaluate import agreement, guesses, score
from dfkd.inputs import COMPRESSIONS, task_input
from dfkd.report import write_report
from dfkd.runtime import Shard, autocast_of
from dfkd.tasks import export, held_out, task_results
from dfkd.teachers import Teacher, zoo_logits
from dfkd.training import Plan, look, look_at_all
from dfkd.verdict import generator_notes, last_quarter, teacher_notes, verdict
from dfkd.whole import whole
from dfkd.zoo import made_from, teacher_folder, training_images

JUDGED = 1000  # images of the finished generator, or a few more, whose classes the teachers are asked for


def finish(
    parts: Parts, phases: Sequence[Plan], spent: dict[str, float], command: str, used: dict[str, str | None]
) -> None:
    """Measure, and on the main process write results.json and report.html. Every process measures the same: the zoo's
    mean logits are a collective. used are the versions() of when the run began."""
    begun = time.perf_counter()
    recipe, folder, shard = parts.recipe, parts.folder, parts.shard
    generator, figures = _generator_results(parts)
    named = {teacher.name: _guesses(teacher, parts) for teacher in parts.zoo}
    tasks = {name: task_results(recipe, name) for name in recipe.tasks if name in COMPRESSIONS}
    results: dict[str, Any] = {
        "name": recipe.name,
        "command": command,
        "seed": recipe.seed,
        "device": describe_device(shard),
        "processes": shard.world,
        "precision": parts.accelerator.mixed_precision,
        "versions": used,
        "teachers": {t.name: _teacher_results(parts, t, named[t.name]) for t in parts.zoo},
        "student": _student_results(parts) if "distill" in recipe.tasks else None,
        "generator": generator,
        "diversity": {name: value for name, value in figures.items() if not name.startswith("class_agreement")},
        "tasks": tasks,
    }
    along = entries(folder / "metrics.jsonl")
    if results["student"]:
        results["student"]["last_quarter"] = _last_quarter(phases, along)
        if recipe.export.input == "student" and shard.rank == 0:
            teacher, student = (task_input(parts, name)[0] for name in ("main", "student"))
            results["student"]["export"] = export(parts, folder / "student", teacher, student)
    warnings = [{key: e[key] for key in ("step", "text")} for e in along if e.get("phase") == "warning"]
    learned = [teacher.name for teacher in assemble.main_teachers(recipe, parts.zoo)]
    results["verdict"] = verdict(results, _notes(parts, figures, named), warnings, learned)
    trained = [*([results["student"]] if results["student"] else []), *tasks.values()]
    results["data_free"] = _data_free(parts, [line for each in trained for line in each.pop("opened")])
    spent |= {name: task["seconds"] for name, task in tasks.items()}  # with its figures and files
    spent["evaluation"] = time.perf_counter() - begun
    spent["total"] = sum(spent.values())
    results["seconds"] = {name: round(value, 1) for name, value in spent.items()}
    if shard.rank == 0:
        with whole(folder / "results.json") as draft:
            draft.write_text(json.dumps(results, indent=2) + "\n")
        write_report(folder)


def _measured(named: Tensor | None, parts: Parts) -> dict[str, Any]:
    if named is None or parts.test is None:
        return {"accuracy": None, "n": None, "interval": None}
    found = score(named, parts.test)
    return {"accuracy": found.percent, "n": found.n, "interval": list(found.interval)}


def _guesses(model: nn.Module, parts: Parts) -> Tensor | None:
    if parts.test is None:
        return None
    return guesses(model, parts.test, device=parts.shard.device, autocast=autocast_of(parts.accelerator))


def _teacher_results(parts: Parts, teacher: Teacher, named: Tensor | None) -> dict[str, Any]:
    spec = parts.recipe.teachers[teacher.name]
    return {
        "model": spec.model,
        "parameters": assemble.parameters(teacher),
        **_measured(named, parts),
        "trained_here": not spec.weights,
        "weights": spec.weights or str(teacher_folder(parts.recipe, teacher.name, spec)),
    }


def _generator_results(parts: Parts) -> tuple[dict[str, Any], dict[str, float]]:
    """What results.json says of the generator, and the figures of its images: diversity, and by teacher."""
    generator, each = parts.generator, max(2, math.ceil(JUDGED / parts.generator.classes))
    figures, _ = look(generator, parts.zoo, parts.accelerator)
    figures |= look_at_all(generator, parts.zoo, parts.accelerator, each)
    agreed = {teacher.name: figures[f"class_agreement_{teacher.name}"] for teacher in parts.zoo}
    about = {
        "arch": generator.description["arch"],
        "parameters": assemble.parameters(generator),
        "bn_loss": parts.bn or None,
        "class_agreement": agreed if generator.conditional else None,
        "class_agreement_n": each * generator.classes,
    }
    return about, figures


def _student_results(parts: Parts) -> dict[str, Any] | None:
    student = parts.student
    if student is None:
        return None
    teachers = assemble.main_teachers(parts.recipe, parts.zoo)
    autocast = autocast_of(parts.accelerator)
    size, whole = assemble.parameters(student), max(assemble.parameters(teacher) for teacher in teachers)
    return {
        "model": parts.student_about["model"],
        "parameters": size,
        "ratio": size / whole,
        "source": parts.student_about["source"],
        "selected": parts.student_about.get("selected"),
        "opened": made_from(parts.student_about),
        **_measured(_guesses(student, parts), parts),
        "agreement": agreement(
            student, partial(zoo_logits, teachers), held_out(parts, autocast=autocast), autocast=autocast
        ),
    }


def _last_quarter(phases: Sequence[Plan], along: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The student's accuracy over the last quarter of its updates, of the entries of metrics.jsonl."""
    at = [plan.name for plan in phases].index("distill")
    begins = sum(plan.total for plan in phases[:at]) + phases[at].first_student
    ends = sum(plan.total for plan in phases[: at + 1])
    return last_quarter([entry for entry in along if entry.get("phase") == "evaluation"], ends, begins)


def _notes(parts: Parts, figures: dict[str, float], named: dict[str, Tensor | None]) -> dict[str, str]:
    """What is wrong with the generator, by its images' figures, and with teachers, by what they name test images."""
    bn = {name: (loss["start"], loss["end"]) for name, loss in parts.bn.items()}
    notes = generator_notes(parts.generator, figures, bn)
    if parts.recipe.generator.checkpoint is not None:  # nothing here trains it
        notes = {name: f"{text.partition(': ')[0]}; take another generator.checkpoint" for name, text in notes.items()}
    for name, classes in named.items():
        if parts.test is not None and classes is not None:
            notes |= teacher_notes(name, parts.test.labels, classes, parts.test.class_names)
    return notes


def _data_free(parts: Parts, of_inputs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """All real images that the run rests on: its teachers' training, measuring, and what its inputs say of theirs."""
    judged_on = [] if parts.test is None else [entry(parts.test, train=False, purpose="evaluate")]
    found: list[dict[str, Any]] = []
    for each in [*training_images(parts.recipe), *judged_on, *of_inputs]:
        if each not in found:
            found.append(each)
    return found


def describe_device(shard: Shard) -> str:
    """The device in words, with the threads of a CPU."""
    if shard.device.type == "cuda":
        return torch.cuda.get_device_name(shard.device)
    return f"{shard.device.type}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str | None]:
    """Versions of what the figures depend on; `not installed` where one runs from its folder."""
    found: dict[str, str | None] = {"python": platform.python_version(), "commit": commit(Path(__file__).parents[1])}
    for name in ("dfkd", "torch", "torchvision", "timm", "accelerate", "kornia"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # it must not cost the run that ends here
            found[name] = "not installed"
    return found


def commit(root: Path) -> str | None:
    """The commit of a checkout, with `+` where files differ from it; None where the folder is none."""
    if not (root / ".git").exists():
        return None
    git = ["git", "--no-optional-locks", "-C", str(root), "describe", "--always", "--exclude=*"]
    own = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}  # a hook's are its checkout's
    try:
        words = [*git, "--abbrev=12", "--dirty=+"]
        return subprocess.run(words, env=own, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git here, or another user's checkout
        return None
