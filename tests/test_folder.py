"""A run's folder: taken up, begun anew without what is not a run's, or left alone."""

import shutil
from pathlib import Path

import pytest
import torch
from runs_fixture import Runs, start, wait_for

from dfkd.errors import UserError
from dfkd.folder import may_run, owner
from dfkd.models import build_model
from dfkd.recipe import load_recipe
from dfkd.runtime import resolve_precision
from generators import build_generator, save_generator

SHORT = ("synthesis.steps=2", "distill.steps=2", "tasks=[distill]")


def asked(folder: Path, *given: str, recipe: str = "digits") -> bool:
    loaded = load_recipe([f"recipe={recipe}", f"output={folder}", *given])
    return may_run(loaded, Path(loaded.recipe.folder))


def test_starting_over_leaves_what_no_run_made(runs: Runs) -> None:
    assert runs.run("run", *SHORT).code == 0
    folder = runs.folder / "run"
    for name in ("notes.txt", "mine/weights.pt", "quality/mine/quality.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    before = (folder / "student" / "model.safetensors").read_bytes()
    assert runs.run("run", *SHORT, "seed=1", "overwrite=true").code == 0
    assert (folder / "student" / "model.safetensors").read_bytes() != before
    assert (folder / "notes.txt").read_text() == (folder / "mine" / "weights.pt").read_text() == "mine"
    assert not (folder / "quality").exists()  # of the generator before


def test_a_folder_at_which_another_command_works_is_left_to_it(runs: Runs) -> None:
    folder, long = runs.folder / "run", ("distill.steps=1000000", "tasks=[distill]")
    job = start(runs.arguments("run", *long), runs.folder / "log")
    assert wait_for(lambda: any((folder / "checkpoints").glob("*")), job.alive)
    for given in ((), ("overwrite=true",)):
        assert "another command is at work in" in runs.run("run", *long, *given).refused()
    several = start(runs.arguments("run", *long), runs.folder / "several", world=2)
    assert several.join() == [2, 2]
    told = (runs.folder / "several").read_text().splitlines()
    assert sorted(line.partition(":")[0] for line in told) == ["error", "error (process 1)"]
    assert job.kill()
    assert any((folder / "checkpoints").glob("*"))
    assert runs.run("run", *SHORT, "overwrite=true").code == 0


@pytest.mark.parametrize("given", [(), ("overwrite=true",)])
@pytest.mark.parametrize("content", ["a: 1\n", "not: [yaml\n", "- a list\n", ""])
def test_a_config_of_something_else_is_no_runs(tmp_path: Path, content: str, given: tuple[str, ...]) -> None:
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(UserError, match=r"holds no run: its config\.yaml .*choose another output"):
        asked(tmp_path, *given)


def test_what_a_run_needs_is_not_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    (folder / "student").mkdir(parents=True)
    (folder / "generator").mkdir()
    loaded = load_recipe(["recipe=digits", f"output={folder}"])
    (folder / "config.yaml").write_text(loaded.yaml())
    (folder / "student" / "net.py").write_text("")
    (folder / "net.pt").write_text("")
    needed = {
        "run/student/net.py": ["student.model=python:run/student/net.py:make", "trust_code=true"],
        "run/generator": ["generator.checkpoint=run/generator"],
    }
    (folder / "student" / "weights.pt").write_text("")
    (tmp_path / "link").symlink_to(folder / "student")
    needed["link/weights.pt"] = ["teachers.plain.weights=link/weights.pt"]
    (tmp_path / "elsewhere.pt").write_text("")
    (folder / "student" / "elsewhere.pt").symlink_to(tmp_path / "elsewhere.pt")
    needed["run/student/elsewhere.pt"] = ["teachers.plain.weights=run/student/elsewhere.pt"]
    monkeypatch.setenv("HOME", str(tmp_path))
    needed["~/run/generator"] = ["generator.checkpoint=~/run/generator"]
    for path, keys in needed.items():
        with pytest.raises(UserError, match=f"overwrite=true would remove {path}, which this run needs"):
            asked(folder, "overwrite=true", *keys)
    assert asked(folder, "overwrite=true", recipe="run/config.yaml")  # its own record, which it writes again
    assert asked(folder, "overwrite=true", "teachers.plain.weights=run/net.pt")  # no run's, so it stays


@pytest.mark.parametrize(
    "key", ["data.root", "data.train_root", "training.cache", "prune.input", "distill.input", "student.weights"]
)
def test_data_and_models_in_a_runs_folder_are_not_removed(tmp_path: Path, key: str) -> None:
    folder = tmp_path / "run"
    given = folder / "images" / "mine"
    given.mkdir(parents=True)
    recipe = ["recipe=digits", f"output={folder}", "tasks=[generator,prune]"]
    (folder / "config.yaml").write_text(load_recipe(recipe).yaml())
    with pytest.raises(UserError, match=f"overwrite=true would remove {given}"):
        may_run(load_recipe([*recipe, "overwrite=true", f"{key}={given}"]), folder)


def test_a_run_does_not_go_on_where_auto_is_another_precision(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = (*SHORT, "runtime.precision=auto", "runtime.minutes=0.0001")
    assert runs.run("teachers", *pieces[:-1]).code == 0  # in this precision, so that the run's time is not theirs
    assert "the same command goes on" in runs.run("run", *pieces).out
    assert list((runs.folder / "run" / "checkpoints").glob("step-*"))
    here = resolve_precision("auto", torch.device("cpu"))
    for module in ("run", "runtime", "zoo"):
        elsewhere = {"bf16": "fp32", "fp32": "bf16"}[here]
        monkeypatch.setattr(f"dfkd.{module}.resolve_precision", lambda given, device, of=elsewhere: of)
    assert "is of another recipe, precision or number of processes" in runs.run("run", *pieces).refused()


def test_a_run_does_not_go_on_with_networks_that_have_changed(runs: Runs) -> None:
    given = (*SHORT, "runtime.minutes=0.0001", "teachers.plain.weights=net.pt", f"generator.checkpoint={runs.folder}/g")
    torch.manual_seed(0)
    network = build_model("dfkd:tiny_plain", classes=10, channels=1, kwargs={"width": 4, "depth": 1})
    torch.save(network.state_dict(), runs.folder / "net.pt")
    shape = {"arch": "conv", "latent": 8, "classes": 10, "channels": 1, "size": 8, "width": 4}
    save_generator(runs.folder / "g", build_generator(shape))
    assert runs.run("teachers", *SHORT).code == 0
    assert "the same command goes on" in runs.run("run", *given).out
    for change in ("net.pt", "g/model.safetensors"):
        content = (runs.folder / change).read_bytes()
        if change == "net.pt":
            torch.save({name: x + 1 for name, x in network.state_dict().items()}, runs.folder / change)
        else:
            save_generator(runs.folder / "g", build_generator(shape))
        assert "networks whose files changed" in runs.run("run", *given).refused()
        (runs.folder / change).write_bytes(content)
    (runs.folder / "g" / "notes.txt").write_text("mine")
    assert "resuming" in runs.run("run", *given).out
    # Nor without a checkpoint, as after tasks that have none: what was made so far is of the other ones.
    for step in (runs.folder / "run" / "checkpoints").glob("step-*"):
        shutil.rmtree(step)
    (runs.folder / "run" / "results.json").unlink(missing_ok=True)
    torch.save({name: x + 1 for name, x in network.state_dict().items()}, runs.folder / "net.pt")
    line = runs.run("run", *given).refused()
    assert f"what {runs.folder / 'run'} holds is of another recipe" in line
    assert "networks whose files changed" in line


def test_a_run_belongs_to_every_file_that_its_networks_are_of(tmp_path: Path) -> None:
    keys = ("student.weights", "distill.input", "prune.input", "generator.checkpoint", "teachers.plain.weights")
    names = ("model.safetensors", "model.json", "generator.json")
    given = ["recipe=digits", "tasks=[distill,prune]", *(f"{key}={tmp_path / key}" for key in keys)]
    recipe = load_recipe(given).recipe
    for key in keys:
        (tmp_path / key).mkdir()
        for name in names:
            (tmp_path / key / name).write_text("as it was")
    before = owner(recipe, "fp32", 1)
    assert len({before, owner(recipe, "bf16", 1), owner(recipe, "fp32", 2)}) == 3
    for key in keys:
        for name in names:
            path = tmp_path / key / name
            path.write_text("another")
            assert owner(recipe, "fp32", 1) != before, path
            path.write_text("as it was")
            (tmp_path / key / "notes.txt").write_text("mine")
            assert owner(recipe, "fp32", 1) == before


def test_images_measured_before_there_is_a_run_are_in_nobodys_way(tmp_path: Path) -> None:
    (tmp_path / "quality").mkdir()
    assert asked(tmp_path, "overwrite=true")
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match="holds no run"):
        asked(tmp_path, "overwrite=true")


def test_a_dry_run_looks_at_the_folder_too(runs: Runs) -> None:
    assert runs.run("run", *SHORT).code == 0
    assert (
        "holds a run with other keys (seed: 0 there, 1 here)"
        in runs.run("run", *SHORT, "seed=1", "--dry-run").refused()
    )
    assert runs.run("run", *SHORT, "--dry-run").code == 0
    (runs.folder / "file").write_text("")
    assert "is a file" in runs.run("file", *SHORT, "--dry-run").refused()


def test_a_run_that_starts_over_in_pieces_says_how_it_goes_on(runs: Runs) -> None:
    pieces = (*SHORT, "runtime.minutes=0.0001")
    assert "the same command goes on" in runs.run("run", *pieces).out
    assert "the same command without overwrite=true goes on" in runs.run("run", *pieces, "overwrite=true").out
