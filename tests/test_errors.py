"""What a user can do wrong, and what the machine can do to a run: one line each, and nothing is lost."""

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from runs_fixture import ROOT, Runs, free_port, start
from safetensors import SafetensorError
from safetensors.torch import save_file

from dfkd import synthesis
from dfkd.compress.fit import Fit
from dfkd.errors import UserError
from dfkd.models import build_model
from dfkd.stream import SyntheticStream
from generators import ConvGenerator, save_generator

SHORT = ("synthesis.steps=3", "distill.steps=2", "runtime.log_every=1")
STRANGERS = """
from torch import nn

def without_bn(classes, channels):
    return nn.Sequential(nn.Conv2d(channels, 4, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(36, classes))

def softmaxed(classes, channels):
    return nn.Sequential(nn.Conv2d(channels, 4, 3, 2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, classes),
                         nn.Softmax(1))

def sized(classes, channels):
    return nn.Sequential(nn.Conv2d(channels, 4, 3, 2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, classes))

def small(classes, channels):
    return nn.Sequential(nn.Conv2d(channels, 4, 3, 2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 7))

def lazy(classes, channels):
    return nn.Sequential(nn.Conv2d(channels, 4, 3, 2), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(classes))

class Auxiliary(nn.Module):
    def __init__(self, classes, channels):
        super().__init__()
        self.net = sized(classes, channels)

    def forward(self, x):
        return (self.net(x), self.net(x)) if self.training else self.net(x)

class Pair(Auxiliary):
    def forward(self, x):
        return {"logits": self.net(x)}
"""


def generator_folder(folder: Path, classes: int = 10) -> Path:
    sizes = {"latent": 4, "classes": classes, "channels": 1, "size": 8, "width": 4}
    about = {"arch": "conv", "conditional": True, "prototypes": 1, "mean": [0.5], "std": [0.25], **sizes}
    save_generator(folder, ConvGenerator(**sizes, prototypes=1), about)
    return folder


@pytest.fixture
def prepared(runs: Runs) -> Runs:
    """The tiny recipe's folder, with the wrong things of each kind in it."""
    folder = runs.folder
    (folder / "theirs.py").write_text(STRANGERS)
    torch.manual_seed(0)
    network = build_model("dfkd:tiny_plain", classes=10, channels=1, kwargs={"width": 4, "depth": 1})
    state = network.state_dict()
    save_file(state, folder / "good.safetensors")
    (folder / "torn.safetensors").write_bytes((folder / "good.safetensors").read_bytes()[:-50])
    save_file(
        {k: v for k, v in state.items() if k != "linear.bias"} | {"extra": state["linear.bias"]}, "keys.safetensors"
    )
    save_file(state | {"linear.weight": torch.zeros(7, 16), "linear.bias": torch.zeros(7)}, "shapes.safetensors")
    state["linear.bias"][0] = float("nan")
    save_file(state, folder / "nan.safetensors")
    generator_folder(folder / "five", classes=5)
    torn = generator_folder(folder / "torn-generator")
    (torn / "model.safetensors").write_bytes((torn / "model.safetensors").read_bytes()[:-9])
    (folder / "empty").mkdir()
    for name in "abcdefghij":
        (folder / "pictures" / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(folder / "pictures" / name / "black.png")
    return runs


ROUNDS = ("synthesis.inner=2", "distill.replay=0")
PLAIN, THEIRS = "teachers.plain.model", "python:theirs.py"
INPUTS: dict[str, tuple[list[str], list[str]]] = {
    "unknown key": (["synthesis.step=3"], ["unknown key 'synthesis.step'", "did you mean synthesis.steps"]),
    "unknown value": (["synthesis.mix.kind=resise"], ["synthesis.mix.kind", "resize | cutmix | mixup", "did you mean"]),
    "unknown recipe": (["recipe=digit"], ["no recipe 'digit'", "did you mean 'digits'"]),
    "unknown option": (["--dryrun"], ["unknown option --dryrun", "--dry-run"]),
    "unknown model": (["student.model=dfkd:tiny_plane"], ["unknown model", "did you mean 'dfkd:tiny_plain'"]),
    "unknown model of a teacher": (["teachers.plain.model=timm:resnet19x"], ["unknown model 'timm:resnet19x'"]),
    "unknown data set": (["data.dataset=digit"], ["data.dataset", "imagefolder", "did you mean 'digits'"]),
    "unknown task": (["tasks=[distil]"], ["tasks", "did you mean 'distill'"]),
    "unknown generator": (["generator.arch=conf"], ["generator.arch='conf'", "conv"]),
    "missing checkpoint": (["teachers.plain.weights=no.pt"], ["teachers.plain: checkpoint 'no.pt' does not exist"]),
    "torn checkpoint": (["teachers.plain.weights=torn.safetensors"], ["checkpoint 'torn.safetensors' is torn"]),
    "other keys": (["teachers.plain.weights=keys.safetensors"], ["1 missing: linear.bias", "1 unexpected: extra"]),
    "other shapes": (
        ["teachers.plain.weights=shapes.safetensors"],
        ["2 of another shape", "linear.weight (7, 16) in the file, (10, 16) in the model"],
    ),
    "NaN in a teacher": (["teachers.plain.weights=nan.safetensors"], ["nan.safetensors", "nan or inf in linear.bias"]),
    "no image folder": (["data.dataset=imagefolder", "data.root=nowhere"], ["data.root=nowhere is no folder"]),
    "no images to train a teacher on": (
        ["data.dataset=imagefolder", "data.root=pictures"],
        ["teacher plain has no weights and is to be trained first: data.train_root=null", "teachers.plain.weights"],
    ),
    "recipe file": (["recipe=mine/own.yaml"], ["no recipe 'mine/own.yaml', no file /", "/mine/own.yaml"]),
    "task of no input": (
        ["tasks=[generator,ptq]", "ptq.input=student"],
        ["ptq.input=student is no earlier task and no folder of a model; give a folder such as", "main"],
    ),
    "empty image folder": (["data.dataset=imagefolder", "data.root=empty"], ["empty is not an image folder"]),
    "classes of the data": (["classes=5"], ["digits has 10 classes but classes=5"]),
    "classes of a teacher": (
        [f"{PLAIN}={THEIRS}:small", "trust_code=true"],
        ["teacher plain gives (7,)", "classes=10"],
    ),
    "classes of the generator": (["generator.checkpoint=five"], ["the generator in five has classes=5, the recipe 10"]),
    "classes of the student": (
        [f"student.model={THEIRS}:small", "student.kwargs={}", "trust_code=true"],
        ["the student gives (7,) outputs where classes=10"],
    ),
    "no batch norm": (
        [f"{PLAIN}={THEIRS}:without_bn", "trust_code=true"],
        ["teacher plain has no batch norm; set synthesis.losses.bn=0", "or give a teacher with batch norm"],
    ),
    "lazy layers": ([f"{PLAIN}={THEIRS}:lazy", "trust_code=true"], ["has lazy layers", "give them their sizes"]),
    "auxiliary heads of a teacher": (
        [f"{PLAIN}={THEIRS}:Auxiliary", "trust_code=true"],
        ["teacher plain gives a tuple in training mode", "aux_logits"],
    ),
    "auxiliary heads of the student": (
        [f"student.model={THEIRS}:Auxiliary", "student.kwargs={}", "trust_code=true"],
        ["the student python:theirs.py:Auxiliary gives a tuple in training mode"],
    ),
    "outputs of the student": (
        [f"student.model={THEIRS}:Pair", "student.kwargs={}", "trust_code=true"],
        ["the student gives a dict where logits [B, K] belong"],
    ),
    "outputs of a teacher": (
        [f"{PLAIN}={THEIRS}:Pair", "trust_code=true"],
        ["teacher plain gives a dict where logits [B, 10] belong"],
    ),
    "softmax": ([f"{PLAIN}={THEIRS}:softmaxed", "trust_code=true"], ["teacher plain ends in a softmax"]),
    "image size of a network": (
        [f"student.model={THEIRS}:without_bn", "student.kwargs={}", "trust_code=true", "image.size=16"],
        ["the student", "does not take images [B, 1, 16, 16]"],
    ),
    "code that is not trusted": ([f"{PLAIN}={THEIRS}:small"], ["runs other people's code", "trust_code=true"]),
    "no generator": (["generator.checkpoint=empty"], ["no generator in empty"]),
    "torn generator": (["generator.checkpoint=torn-generator"], ["the generator in torn-generator is torn"]),
    "generator that is made by a run": (["generator.arch=pool"], ["generator.arch='pool'", "['conv', 'pixels']"]),
    "half-size images": (
        [f"{PLAIN}={THEIRS}:sized", "trust_code=true", *ROUNDS, "synthesis.coarse=0.5"],
        ["does not take images [B, 1, 4, 4]", "synthesis.coarse=0.5", "set it to 0", "input_size"],
    ),
    "half-size images for the adversary": (
        [f"student.model={THEIRS}:sized", "student.kwargs={}", "trust_code=true", *ROUNDS, "synthesis.coarse=0.5"],
        ["student does not take images [B, 1, 4, 4]", "synthesis.coarse=0.5"],
    ),
    "contrastive without a bank": (["synthesis.losses.contrastive=1"], ["losses.contrastive=1 and synthesis.bank=0"]),
    "contrastive with two teachers": (
        ["synthesis.losses.contrastive=1", "synthesis.bank=64"],
        ["the zoo has plain, residual"],
    ),
    "diversity of pixels": (
        [*ROUNDS, "generator.arch=pixels", "synthesis.latent_lr=0.1", "synthesis.redraw=0"],
        ["synthesis.losses.diversity", "generator.arch=pixels"],
    ),
    "no adversary": (
        ["student.model=", "tasks=[generator]"],
        ["synthesis.losses.adversary needs a student to disagree with"],
    ),
    "no loss": (
        [f"synthesis.losses.{name}=0" for name in ("ce", "bn", "adversary")],
        ["no loss asks a teacher anything"],
    ),
    "control without images": (
        [
            "distill.source=real",
            "generator.checkpoint=five",
            "classes=5",
            "data.dataset=none",
            "teachers.plain.weights=x.pt",
            "teachers.residual.weights=x.pt",
        ],
        ["distill.source=real needs real images", "data.dataset"],
    ),
    "control without training images": (
        [
            "distill.source=real",
            "tasks=[generator, distill]",
            "data.dataset=imagefolder",
            "data.train_root=nowhere",
            "data.root=.",
        ],
        ["data.train_root=nowhere is no folder"],
    ),
    "no student update": (
        ["synthesis.student_steps=0", "synthesis.losses.adversary=0", "distill.steps=0"],
        ["nothing to train", "distill.steps"],
    ),
    "nothing to train": (["distill.steps=0", "generator.checkpoint=five", "classes=5"], ["nothing to train"]),
    "folder that is a file": (
        ["output=tiny.yaml/run"],
        ["output=tiny.yaml/run lies in /", "tiny.yaml, which is a file"],
    ),
    "name that is too long": ([f"output={'x' * 300}"], ["can be no folder: File name too long", "another output="]),
}


@pytest.mark.parametrize("case", INPUTS)
def test_wrong_input_is_one_line_before_anything_is_trained(prepared: Runs, case: str) -> None:
    given, expected = INPUTS[case]
    before = sorted(prepared.folder.rglob("*"))
    keys = {argument.partition("=")[0] for argument in given}
    standing = {"recipe": str(prepared.recipe), "training.cache": "cache", "output": "run"}
    # Kwargs of the recipe's own teacher do not suit a stranger's.
    standing |= {"teachers.plain.kwargs": "{}"} if any(PLAIN in argument for argument in given) else {}
    called = prepared.call(*given, *(f"{key}={value}" for key, value in standing.items() if key not in keys))
    line = called.refused()
    for words in expected:
        assert words in line
    assert "loss" not in called.out  # no teacher was trained
    # nothing is left behind: the same command, put right, must not find another run in its place
    left = [path for path in sorted(prepared.folder.rglob("*")) if "__pycache__" not in path.parts]
    assert left == before


def test_a_dry_run_finds_it_too(prepared: Runs) -> None:
    assert "(7,)" in prepared.run("run", "--dry-run", "teachers.plain.weights=shapes.safetensors").refused()


def test_an_old_run_survives_a_wrong_command_that_would_start_over(prepared: Runs) -> None:
    assert prepared.run("old", *SHORT).code == 0
    before = sorted((prepared.folder / "old").rglob("*"))
    assert "five" in prepared.run("old", *SHORT, "overwrite=true", "generator.checkpoint=five").refused()
    assert sorted((prepared.folder / "old").rglob("*")) == before


def test_no_recipe(runs: Runs) -> None:
    assert "recipe=NAME" in runs.call().refused()


# --- numbers that are none ---


@pytest.mark.parametrize(("key", "rate"), [("synthesis.lr", "1e30"), ("distill.lr", "1e30"), ("distill.lr", "1e8")])
def test_a_learning_rate_that_breaks_a_run_is_named_and_the_last_good_checkpoint_kept(
    runs: Runs, key: str, rate: str
) -> None:
    called = runs.run("broken", f"{key}={rate}", "runtime.log_every=1", "synthesis.clip=0")
    line = called.refused()
    assert key in line
    assert "NaN or infinity" in line or "NaN or infinite" in line or "the term " in line
    assert "checkpoints before it are kept" in line
    checkpoints = runs.folder / "broken" / "checkpoints"
    assert not list(checkpoints.glob("*.partial"))
    for path in checkpoints.glob("step-*"):
        state = torch.load(path / "rank0.pt")
        values = [*state["generator"].values(), *state["fit"]["student"].values()]
        assert all(torch.isfinite(value).all() for value in values)
    assert not (runs.folder / "broken" / "results.json").exists()


def test_a_broken_weight_is_named_and_not_saved(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Fit.step

    def break_at(self: Fit, number: int) -> dict[str, torch.Tensor]:
        terms = step(self, number)
        if number == 5:  # the update, after finite terms
            next(self.student.parameters()).data[0] = float("nan")
        return terms

    monkeypatch.setattr(Fit, "step", break_at)
    line = runs.run("broken", "runtime.log_every=3").refused()
    assert "step 6: model.features.0.weight of the student holds NaN" in line
    assert os.readlink(runs.folder / "broken" / "checkpoints" / "latest") == "step-00000003"


def test_statistics_that_break_name_their_term(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        synthesis.L.BN_DISTANCES,
        "l2",
        lambda batch, stored: torch.stack([m for m, _ in batch][:1]).sum() * float("nan"),
    )
    assert "the term 'bn' is nan" in runs.run("broken", *SHORT).refused()


# --- no space left ---


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """No file may grow past `size` bytes: writes beyond fail as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(runs: Runs) -> None:
    assert runs.run("whole", *SHORT).code == 0  # also trains the teachers
    with small_disk(20_000):
        line = runs.run("full", *SHORT).refused()
    assert "could not write the checkpoint of step 1" in line
    assert "free some space and run the same command again" in line
    assert runs.run("full", *SHORT).code == 0
    student = Path("student") / "model.safetensors"
    assert (runs.folder / "full" / student).read_bytes() == (runs.folder / "whole" / student).read_bytes()


FULL = OSError(28, "No space left on device")
WRITES = {
    "generators.files.save_file": SafetensorError("Error while serializing: I/O error: No space left on device"),
    "dfkd.run.save_compressed": FULL,
    "dfkd.results.write_report": FULL,
    "dfkd.metrics.Metrics.write": FULL,
}


@pytest.mark.parametrize("place", WRITES)
def test_a_disk_that_fills_up_later_loses_nothing(runs: Runs, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    def full(*given: Any, **named: Any) -> None:
        raise WRITES[place]

    with monkeypatch.context() as patch:
        patch.setattr(place, full)
        line = runs.run("full", *SHORT).refused()
    assert "No space left on device" in line
    assert "free some space and run the same command again" in line
    called = runs.run("full", *SHORT)
    assert called.code == 0
    assert ("resuming" in called.out) == ("Metrics" not in place)  # those fail before the first checkpoint
    for name in ("results.json", "report.html", "generator/model.safetensors", "student/model.safetensors"):
        assert (runs.folder / "full" / name).exists()


# --- launches, streams, packages ---


def test_processes_that_did_not_join_are_refused_with_the_right_command(runs: Runs) -> None:
    """`--cpu --num_processes 2`: accelerate would start one process without a word."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", str(ROOT / "train.py")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE")}
    command += runs.arguments("run", *SHORT)
    called = subprocess.run(command, env={**environment, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert called.returncode != 0
    told = [line for line in called.stderr.splitlines() if line.startswith("error")]
    assert len(told) == 1
    assert "launched for 2 processes but 1 joined" in told[0]
    assert "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 train.py" in told[0]
    assert 'train.py", line' not in called.stderr  # no traceback of ours; the launcher's own is its business
    assert not (runs.folder / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU this launch is right")
def test_processes_that_know_nothing_of_each_other_are_refused(runs: Runs) -> None:
    """`--multi_gpu --num_processes 2` on a CPU without ACCELERATE_USE_CPU: what its launcher sets in a process.

    Each refuses by itself: one that met the other first could find it gone, and fail in a connection.
    """
    log = runs.folder / "log"
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment = {**meeting, "RANK": "1", "LOCAL_RANK": "1", "ACCELERATE_USE_CPU": ""}
    assert start(runs.arguments("run", *SHORT), log, environment=environment).join() == [2]
    (told,) = log.read_text().splitlines()
    assert told.startswith("error (process 1): launched for 2 processes but 1 joined; on a CPU use: ACCELERATE_USE")
    assert not (runs.folder / "run").exists()


def test_a_stream_consumed_past_its_end() -> None:
    generator = ConvGenerator(latent=4, classes=3, channels=1, size=8, width=4).eval()
    stream = SyntheticStream(generator, batch_size=4, num_batches=2)
    assert len(list(stream)) == 2
    with pytest.raises(UserError, match="batch 2 is past the end of a stream of 2; give a larger num_batches"):
        stream.batch(2)


def test_a_package_that_is_missing_names_the_extra(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "sklearn"]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("sklearn", "sklearn.datasets", "sklearn.model_selection"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "needs scikit-learn: pip install 'dfkd[demo]'" in runs.run("run", *SHORT).refused()
    assert not (runs.folder / "run").exists()
