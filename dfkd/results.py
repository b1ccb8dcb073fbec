"""What a run comes to: everything measured once at its end, results.json, the report and a verdict."""

import json
import platform
import time
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from dfkd import assemble
from dfkd.assemble import Parts
from dfkd.checkpoints import write_atomically
from dfkd.data import opened
from dfkd.evaluate import Accuracy, accuracy, agreement
from dfkd.report import write_report
from dfkd.runtime import Shard
from dfkd.tasks import TASKS, export, held_out, task_input, task_results
from dfkd.teachers import Teacher, zoo_logits
from dfkd.training import look


def finish(parts: Parts, spent: dict[str, float], command: str) -> None:
    """Measure, and on the main process write results.json and report.html. Every process measures the same: the zoo's
    mean logits are a collective."""
    begun = time.perf_counter()
    recipe, folder, accelerator, shard = parts.recipe, parts.folder, parts.accelerator, parts.shard
    figures, _ = look(parts.generator, parts.zoo, accelerator)
    tasks = {name: task_results(recipe, name) for name in recipe.tasks if name in TASKS}
    results: dict[str, Any] = {
        "name": recipe.name,
        "command": command,
        "seed": recipe.seed,
        "device": describe_device(shard),
        "processes": shard.world,
        "precision": accelerator.mixed_precision,
        "versions": versions(),
        "teachers": {t.name: _teacher_results(parts, t) for t in parts.zoo},
        "student": _student_results(parts) if "distill" in recipe.tasks else None,
        "generator": {
            "arch": parts.description["arch"],
            "parameters": assemble.parameters(parts.generator),
            "bn_loss": parts.bn or None,
            "class_agreement": {t.name: figures[f"class_agreement_{t.name}"] for t in parts.zoo}
            if parts.description["conditional"]
            else None,
        },
        "diversity": {name: value for name, value in figures.items() if not name.startswith("class_agreement")},
        "tasks": tasks,
    }
    results["verdict"] = verdict(results)
    results["data_free"] = assemble.training_images(recipe) + [e for e in opened() if e["purpose"] == "evaluate"]
    results["data_free"] += [entry for task in tasks.values() for entry in task.pop("opened")]
    spent |= {name: task["seconds"] for name, task in tasks.items()}
    spent["evaluation"] = time.perf_counter() - begun
    spent["total"] = sum(spent.values())
    results["seconds"] = {name: round(value, 1) for name, value in spent.items()}
    if shard.rank == 0:
        if results["student"] and recipe.export.input == "student":
            teacher, student = (task_input(parts, name)[0] for name in ("main", "student"))
            results["student"]["export"] = export(parts, folder / "student", teacher, student)
        write_atomically(folder / "results.json", json.dumps(results, indent=2) + "\n")
        write_report(folder)


def _measured(score: Accuracy | None) -> dict[str, Any]:
    if score is None:
        return {"accuracy": None, "n": None, "interval": None}
    return {"accuracy": score.percent, "n": score.n, "interval": list(score.interval)}


def _accuracy(model: nn.Module, parts: Parts) -> Accuracy | None:
    if parts.test is None:
        return None
    return accuracy(model, parts.test, device=parts.shard.device, autocast=parts.accelerator.autocast)


def _teacher_results(parts: Parts, teacher: Teacher) -> dict[str, Any]:
    spec = parts.recipe.teachers[teacher.name]
    return {
        "model": spec.model,
        "parameters": assemble.parameters(teacher),
        **_measured(_accuracy(teacher, parts)),
        "trained_here": not spec.weights,
    }


def _student_results(parts: Parts) -> dict[str, Any] | None:
    student = parts.student
    if student is None:
        return None
    teachers = assemble.main_teachers(parts.recipe, parts.zoo)
    autocast = parts.accelerator.autocast
    size, whole = assemble.parameters(student), max(assemble.parameters(teacher) for teacher in teachers)
    return {
        "model": parts.student_about["model"],
        "parameters": size,
        "ratio": size / whole,
        **_measured(_accuracy(student, parts)),
        "agreement": agreement(
            student, partial(zoo_logits, teachers), held_out(parts, autocast=autocast), autocast=autocast
        ),
    }


def verdict(results: dict[str, Any]) -> dict[str, Any]:
    """Whether the run looks sound, and for each thing that does not what to do."""
    notes = []
    for name, percent in (results["generator"]["class_agreement"] or {}).items():
        if percent < 50:
            notes.append(
                f"teacher {name} sees the asked class in {percent:.0f} % of the images: raise synthesis.losses.ce or "
                "synthesis.steps, or lower synthesis.losses.diversity"
            )
    for name, loss in (results["generator"]["bn_loss"] or {}).items():
        if loss["end"] > 0.7 * loss["start"]:
            notes.append(
                f"the batch-norm statistics of teacher {name} do not fit ({loss['start']:.3g} -> {loss['end']:.3g}): "
                "raise synthesis.losses.bn or .steps, or check its mean and std"
            )
    if results["diversity"]["pixel_ratio"] < 0.05:
        remedies = {"conv": "synthesis.losses.diversity or synthesis.redraw", "pool": "synthesis.latent_lr or .jitter"}
        notes.append(
            "the images of a class hardly differ (the generator ignores its latents): raise "
            f"{remedies.get(results['generator']['arch'], 'generator.latent')}"
        )
    for name, task in results["tasks"].items():
        agree = (task.get("export") or {}).get("agreement")
        if agree is not None and agree < 99.5:
            notes.append(
                f"the file of task {name} agrees with torch on {agree:.1f} % of images: look at it before deploying"
            )
        if task["before"] is not None and task["after"] < task["before"] - 10:
            notes.append(
                f"task {name} lost {task['before'] - task['after']:.0f} points: compress less, or train longer after it"
            )
        if any(entry["split"] == "test" for entry in task.get("opened", [])):
            notes.append(f"{name}.source=real used the test images themselves: set data.train_root for a fair control")
    student = results["student"]
    if student and student["agreement"]["percent"] < 80:
        notes.append(
            f"the student agrees with its teacher on {student['agreement']['percent']:.0f} % of fresh images: raise "
            "distill.steps or synthesis.student_steps, or choose a larger student"
        )
    return {"ok": not notes, "notes": notes}


def describe_device(shard: Shard) -> str:
    """The device in words, with the threads of a CPU."""
    if shard.device.type == "cuda":
        return torch.cuda.get_device_name(shard.device)
    return f"{shard.device.type}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    names = ("dfkd", "torch", "torchvision", "timm", "accelerate", "kornia")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
