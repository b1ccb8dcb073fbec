"""Killed at any moment and started again by the same command, a run ends with the same bits."""

import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from runs_fixture import RECIPE, ROOT, STEPS, Job, Runs, start, wait_for

KILLS = 4
ROUNDS = ("synthesis.inner=2", "distill.replay=0", "synthesis.pool=200", "synthesis.jitter=1", "synthesis.flip=true")
POOLED = (
    *("teachers.residual.enabled=false", "synthesis.latent_lr=0.01", "synthesis.renew=first", "synthesis.cosine=true"),
    *("synthesis.losses.contrastive=0.5", "synthesis.losses.one_hot=0.1", "synthesis.bank=100"),
    *("synthesis.penalise=true", "synthesis.learn_weights=false", "runtime.sync_batchnorm=false", *ROUNDS),
)
INVERSION = (
    *("generator.arch=pixels", "synthesis.latent_lr=0.1", "synthesis.redraw=0", "synthesis.losses.diversity=0"),
    *("synthesis.adversary_loss=js", "synthesis.adversary_mask=false", *ROUNDS),
)
SELECTED = (
    *("zoo.main=residual", "teachers.residual.model=dfkd:resnet32", "student.model=dfkd:resnet20"),
    *("student.kwargs={width: 8}", "student.weights=teacher"),
)
# How many processes, what is computed in, other keys: every one has its own uninterrupted run to compare with.
SETTINGS: dict[str, tuple[int, str, tuple[str, ...]]] = {
    "fp32": (1, "fp32", ()),
    "bf16": (1, "bf16", SELECTED),
    "two": (2, "fp32", ()),
    "inversion": (1, "bf16", INVERSION),
    "pooled two": (2, "fp32", POOLED),
}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONUNBUFFERED": "1"}
LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no"]


def weights(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name / "model.safetensors").read_bytes() for name in ("generator", "student")}


def logged(folder: Path) -> list[tuple[str, int, str]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(line["phase"], line["step"], line.get("name", "")) for line in lines]


class Place:
    """Where the runs of this file go: their recipe, their teachers, and the uninterrupted runs, each made once."""

    def __init__(self, folder: Path, cache: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.runs = Runs(folder, cache, None)
        self.recipe = self.runs.recipe
        self.recipe.write_text(RECIPE)
        self.whole: dict[str, Path] = {}

    def arguments(self, setting: str, name: str, *given: str) -> list[str]:
        return self.runs.arguments(name, f"runtime.precision={SETTINGS[setting][1]}", *SETTINGS[setting][2], *given)

    def start(self, setting: str, name: str, *given: str) -> Job:
        return start(self.arguments(setting, name, *given), self.log(name), SETTINGS[setting][0])

    def log(self, name: str) -> Path:
        return self.runs.folder / f"{name}.log"

    def finish(self, setting: str, name: str, *given: str) -> None:
        job = self.start(setting, name, *given)
        assert job.join() == [0] * len(job.ranks), self.log(name).read_text()

    def uninterrupted(self, setting: str) -> Path:
        if setting not in self.whole:
            self.finish(setting, f"{setting}-whole")
            self.whole[setting] = self.runs.folder / f"{setting}-whole"
        return self.whole[setting]

    def same(self, setting: str, name: str) -> None:
        """The run of this name ended as the uninterrupted one."""
        folder, wanted = self.runs.folder / name, self.uninterrupted(setting)
        assert weights(folder) == weights(wanted)
        assert logged(folder) == logged(wanted)
        assert len(set(logged(folder))) == len(logged(folder))
        found, whole = (json.loads((path / "results.json").read_text()) for path in (folder, wanted))
        for figure in ("student", "teachers", "generator", "diversity"):
            assert found[figure] == whole[figure]
        assert found["seconds"]["distill"] > 0
        evaluated = [
            line for line in map(json.loads, (folder / "metrics.jsonl").open()) if line["phase"] == "evaluation"
        ]
        assert evaluated[-1]["accuracy"] == found["student"]["accuracy"]  # of several processes as of one


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, teacher_cache: Path) -> Place:
    return Place(tmp_path_factory.mktemp("resume"), teacher_cache)


def kill_at_random(job: Job, folder: Path, rng: random.Random) -> bool:
    """SIGKILL some time after the next checkpoint; whether the run was still going."""
    latest = folder / "checkpoints" / "latest"
    before = os.readlink(latest) if latest.is_symlink() else ""
    wait_for(lambda: latest.is_symlink() and os.readlink(latest) != before, job.alive)
    time.sleep(rng.random() * 0.04)  # about two steps
    return job.kill()


def kill_while_saving(job: Job, folder: Path, times: int) -> bool:
    """SIGKILL the moment the `times`th checkpoint's folder is there and not whole yet."""
    seen: set[str] = set()

    def saving() -> bool:
        found = (folder / "checkpoints").glob("step-*.partial")
        seen.update(path.name for path in found)
        return len(seen) >= times

    wait_for(saving, job.alive)
    return job.kill()


@pytest.mark.parametrize("setting", SETTINGS)
def test_killed_again_and_again_it_ends_with_the_same_bits(place: Place, setting: str) -> None:
    rng, name = random.Random(setting), f"{setting}-killed"
    folder = place.runs.folder / name
    place.uninterrupted(setting)
    killed = 0
    for k in range(KILLS):
        job = place.start(setting, name)
        if k % 2:
            killed += kill_while_saving(job, folder, times=1 + k)
        else:
            killed += kill_at_random(job, folder, rng)
    place.finish(setting, name)
    place.same(setting, name)
    said = place.log(name).read_text()
    assert killed >= 3, said  # at least these were in the middle of it
    assert said.count("resuming") >= 2, said
    assert "Traceback" not in said


def test_killed_within_its_writes(place: Place) -> None:
    """At the 5th write of a life (a rank's file), the 10th (a manifest), the 3rd, the 6th: each within a checkpoint."""
    folder = place.runs.folder / "writes"
    place.uninterrupted("fp32")  # first, so that it trains the teachers
    for write in (5, 10, 3, 6):
        job = start(place.arguments("fp32", "writes"), place.log("writes"), kill_at_write=write)
        assert job.join() == [-signal.SIGKILL]
        assert list(folder.glob("checkpoints/step-*.partial")), write
        latest = folder / "checkpoints" / "latest"
        assert torch.load(latest / "rank0.pt")["done"] == int(os.readlink(latest)[5:])
    place.finish("fp32", "writes")
    place.same("fp32", "writes")
    assert not list(folder.rglob("*.partial"))


def test_killed_at_the_end_of_a_phase_and_between_phases(place: Place) -> None:
    tasks = "tasks=[generator,distill]"
    place.finish("fp32", "phases-whole", tasks)
    folder = place.runs.folder / "phases"
    for condition in (
        lambda: (folder / "checkpoints" / "step-00000020").exists(),  # the generator is done, maybe not yet saved
        lambda: (folder / "checkpoints" / "step-00000024").exists(),  # within the second phase
        lambda: (folder / "student" / "model.safetensors").exists(),  # trained, not yet measured
    ):
        job = place.start("fp32", "phases", tasks)
        wait_for(condition, job.alive)
        job.kill()
    place.finish("fp32", "phases", tasks)
    wanted = place.runs.folder / "phases-whole"
    assert weights(folder) == weights(wanted)
    assert logged(folder) == logged(wanted)
    found, whole = (json.loads((path / "results.json").read_text()) for path in (folder, wanted))
    assert found["generator"] == whole["generator"]
    assert found["generator"]["bn_loss"] is not None


def stopped(place: Place, setting: str, name: str) -> Path:
    """A run that was killed somewhere past its second checkpoint; its folder of checkpoints."""
    checkpoints = place.runs.folder / name / "checkpoints"
    job = place.start(setting, name)
    assert wait_for(lambda: (checkpoints / "step-00000008").exists(), job.alive)
    assert job.kill()
    return checkpoints


@pytest.mark.parametrize("setting", ["fp32", "two"])
def test_a_torn_checkpoint_is_named_and_the_one_before_used(place: Place, setting: str) -> None:
    name = f"{setting}-torn"
    checkpoints = stopped(place, setting, name)
    found = sorted(path for path in checkpoints.glob("step-*") if path.suffix != ".partial")
    newest, before = found[-1], found[-2]
    last = newest / f"rank{SETTINGS[setting][0] - 1}.pt"
    last.write_bytes(last.read_bytes()[:-100])
    place.log(name).unlink()
    place.finish(setting, name)
    said = place.log(name).read_text()
    assert f"checkpoint {newest} is torn ({last.name}); using the one before it" in said
    assert f"after step {int(before.name[5:])}" in said
    place.same(setting, name)


def test_anothers_checkpoint_is_refused_by_name(place: Place) -> None:
    checkpoints = stopped(place, "fp32", "foreign")
    kept = sorted(path.name for path in checkpoints.iterdir())
    job = place.start("fp32", "foreign", "distill.lr=0.07")
    assert job.join() == [2]
    assert "holds a run with other keys (distill.lr: 0.05 there, 0.07 here)" in place.log("foreign").read_text()
    # the same keys in another number of processes, or a checkpoint that was copied here
    job = place.start("two", "foreign")
    assert 2 in job.join()
    said = place.log("foreign").read_text()
    assert "is of another recipe, precision or number of processes" in said
    assert str(checkpoints / "step-0") in said
    assert "Traceback" not in said
    assert sorted(path.name for path in checkpoints.iterdir()) == kept
    shutil.rmtree(checkpoints)
    shutil.copytree(place.uninterrupted("bf16") / "checkpoints", checkpoints, symlinks=True)
    job = place.start("fp32", "foreign")
    assert job.join() == [2]


# --- the real command lines ---


def wait_for_step(checkpoints: Path, running: Callable[[], bool]) -> None:
    latest = checkpoints / "latest"
    assert wait_for(lambda: latest.is_symlink() and int(os.readlink(latest)[5:]) >= 8, running, 120)


def test_python_train_py_resumes(place: Place) -> None:
    name = "command"
    command = [sys.executable, str(ROOT / "train.py"), *place.arguments("fp32", name)]
    running = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    wait_for_step(place.runs.folder / name / "checkpoints", lambda: running.poll() is None)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    ended = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert "resuming" in ended.stdout
    place.same("fp32", name)
    settings = ["ACCELERATE_USE_CPU=true", "OMP_NUM_THREADS=1"]
    assert recorded(place.runs.folder / name) == [*settings, "python", "train.py", *command[2:]]


def recorded(folder: Path) -> list[str]:
    """The words of the command that a run's results name."""
    return shlex.split(json.loads((folder / "results.json").read_text())["command"])


def ranks(launcher: int) -> list[psutil.Process]:
    return [p for p in psutil.Process(launcher).children(recursive=True) if "train.py" in " ".join(p.cmdline())]


def test_a_rank_that_dies_ends_the_job_and_the_same_launch_resumes_it(place: Place) -> None:
    name = "launched"
    folder = place.runs.folder / name
    place.uninterrupted("two")  # first, so that it trains the teachers
    command = [sys.executable, *LAUNCH, str(ROOT / "train.py"), *place.arguments("two", name)]
    running = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_step(folder / "checkpoints", lambda: running.poll() is None)
    rank = ranks(running.pid)[1]
    rank.kill()
    assert running.wait(120) != 0
    assert not rank.is_running()
    assert not (folder / "results.json").exists()
    latest = folder / "checkpoints" / "latest"
    manifest: dict[str, Any] = json.loads((latest / "manifest.json").read_text())
    assert manifest["files"].keys() == {"rank0.pt", "rank1.pt"}
    for file in manifest["files"]:
        assert torch.load(latest / file)["done"] == manifest["step"] < STEPS
    ended = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("resuming") == 1  # rank 0 alone speaks
    place.same("two", name)
    assert recorded(folder) == ["ACCELERATE_USE_CPU=true", "OMP_NUM_THREADS=1", "accelerate", "launch", *command[3:]]


@pytest.mark.parametrize("setting", ["fp32", "two"])
def test_a_run_in_pieces_of_given_minutes_ends_with_the_same_bits(setting: str, tmp_path: Path) -> None:
    places = {name: Place(tmp_path / name, tmp_path / name / "teachers") for name in ("pieces", "whole")}
    folders = {name: place.runs.folder / setting for name, place in places.items()}
    arguments, calls = ("training.epochs=2", "runtime.log_every=10", "runtime.evaluations=2"), 0
    while not (folders["pieces"] / "results.json").exists():
        places["pieces"].finish(setting, setting, *arguments, "runtime.minutes=1e-4")
        calls += 1
        assert calls < 20
    said = places["pieces"].log(setting).read_text().splitlines()
    stops = [line.partition(": ")[2] for line in said if line.startswith("stopped for runtime.minutes=0.0001: ")]
    # Two teachers of two epochs; of the 30 steps lines at 10, 20 and 15, 30.
    assert [stop.split()[0] for stop in stops] == ["teacher"] * 2 + ["distill"] * 3
    assert calls == len(stops) + 1
    places["whole"].finish(setting, setting, *arguments)
    assert weights(folders["pieces"]) == weights(folders["whole"])
    assert logged(folders["pieces"]) == logged(folders["whole"])
    teachers = [sorted(place.runs.cache.glob("*/model.safetensors")) for place in places.values()]
    assert len(teachers[0]) == 2
    assert [path.read_bytes() for path in teachers[0]] == [path.read_bytes() for path in teachers[1]]
    assert not list(tmp_path.rglob("training.p*"))


LONG = ("distill.steps=1000000", "runtime.evaluations=0", "runtime.checkpoint_every=1000")


def trained(metrics: Path, before: int = 0) -> Callable[[], bool]:
    """What tells whether a line has been logged since the file had so many bytes."""
    return lambda: metrics.exists() and metrics.stat().st_size > before


@pytest.mark.parametrize(("setting", "ranks"), [("fp32", [0]), ("two", [0, 1]), ("two", [1])])
def test_a_signal_stops_a_run_with_a_checkpoint_from_which_the_same_command_goes_on(
    place: Place, setting: str, ranks: list[int]
) -> None:
    name = f"signalled {setting} {ranks}"
    metrics, stops = place.runs.folder / name / "metrics.jsonl", []
    for number in (signal.SIGINT, signal.SIGTERM):
        before = metrics.stat().st_size if metrics.exists() else 0
        job = place.start(setting, name, *LONG)
        assert wait_for(trained(metrics, before), job.alive), place.log(name).read_text()
        for rank in ranks:
            os.kill(job.ranks[rank].pid, number)
        assert job.join() == [128 + number] * len(job.ranks), place.log(name).read_text()
        stops.append(torch.load(metrics.parent / "checkpoints" / "latest" / "rank0.pt")["done"])
    assert 0 < stops[0] < stops[1]
    said = place.log(name).read_text()
    for signalled, done in zip(("SIGINT", "SIGTERM"), stops):
        line = f"stopped for {signalled}: distill is at step {done} of 1000020; the same command goes on\n"
        assert said.count(line) == 1
        assert said.count(f"{signalled}: stopping once what is done is kept; again stops at once\n") == int(0 in ranks)
    assert said.count(f"after step {stops[0]}\n") == 1
    assert "Traceback" not in said


def test_one_process_stops_at_the_next_step_and_where_nobody_reads_what_it_says(place: Place) -> None:
    """As with Ctrl-C in `python train.py ... 2>&1 | tee log`, which ends tee too."""
    name = "piped"
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        *place.arguments("fp32", name, *LONG, "runtime.log_every=1000000"),
    ]
    running = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    folder = place.runs.folder / name
    assert wait_for((folder / "metrics.jsonl").exists, lambda: running.poll() is None, 120)
    assert running.stdout is not None
    running.stdout.close()
    running.send_signal(signal.SIGINT)
    assert running.wait(60) == 130
    assert torch.load(folder / "checkpoints" / "latest" / "rank0.pt")["done"] > 0


def test_a_second_signal_stops_at_once_and_in_a_line(place: Place) -> None:
    name = "impatient"
    job = place.start("fp32", name, "tasks=[generator,ptq]", "ptq.steps=1000000", "ptq.images=64", "overwrite=true")
    assert wait_for(place.log(name).exists, job.alive)
    assert wait_for(lambda: "task ptq\n" in place.log(name).read_text(), job.alive)
    os.kill(job.ranks[0].pid, signal.SIGINT)
    assert wait_for(lambda: "again stops at once" in place.log(name).read_text(), job.alive)
    os.kill(job.ranks[0].pid, signal.SIGINT)
    assert job.join() == [130]
    said = place.log(name).read_text()
    ending = "what was checkpointed is kept, and the same command without overwrite=true goes on from there"
    assert said.splitlines()[-1] == f"error: interrupted; {ending}"
    assert "Traceback" not in said


def test_a_run_does_not_go_on_with_a_trained_teacher_that_has_changed(tmp_path: Path) -> None:
    place = Place(tmp_path / "runs", tmp_path / "teachers")
    checkpoints = stopped(place, "fp32", "changed")
    file = next(path for path in place.runs.cache.glob("plain-*/model.safetensors"))
    content = file.read_bytes()
    file.write_bytes(content[:-4] + b"\x00\x00\x80\x3f")
    job = place.start("fp32", "changed")
    assert job.join() == [2]
    assert "networks whose files changed" in place.log("changed").read_text()
    file.write_bytes(content)
    assert checkpoints.exists()
    place.finish("fp32", "changed")
