"""Checkpoints of one process: whole or absent, verified, two kept, `latest` on the newest whole one."""

import json
import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dfkd.checkpoints import Checkpoints
from dfkd.errors import UserError
from dfkd.whole import whole

CPU = torch.device("cpu")


def state(step: int) -> dict[str, Any]:
    return {"phase": "distill", "done": step, "weight": torch.full((3,), float(step))}


@pytest.fixture
def checkpoints(tmp_path: Path, accelerator: Any) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", "mine")


def folders(checkpoints: Checkpoints) -> list[str]:
    return sorted(path.name for path in checkpoints.folder.iterdir() if not path.is_symlink())


def tear(folder: Path) -> None:
    path = folder / "rank0.pt"
    path.write_bytes(path.read_bytes()[:-10])


def test_what_was_saved_is_loaded(checkpoints: Checkpoints) -> None:
    assert checkpoints.load(CPU) is None
    checkpoints.save(7, state(7))
    found = checkpoints.load(CPU)
    assert found is not None
    assert found.step == found.state["done"] == 7
    assert torch.equal(found.state["weight"], torch.full((3,), 7.0))
    assert found.warnings == []


def test_the_newest_two_are_kept_and_latest_is_the_newest(checkpoints: Checkpoints) -> None:
    for step in (3, 9, 10, 100):
        checkpoints.save(step, state(step))
        latest = checkpoints.folder / "latest"
        assert latest.is_symlink()
        assert os.readlink(latest) == f"step-{step:08d}"  # relative: the folder may be moved
        assert {path.name for path in latest.iterdir()} == {"manifest.json", "rank0.pt"}
    assert folders(checkpoints) == ["step-00000010", "step-00000100"]


def test_a_copy_without_links_goes_on(checkpoints: Checkpoints) -> None:
    checkpoints.save(1, state(1))
    latest = checkpoints.folder / "latest"
    latest.unlink()
    shutil.copytree(checkpoints.folder / "step-00000001", latest)
    checkpoints.save(2, state(2))
    assert os.readlink(latest) == "step-00000002"


def test_until_all_is_written_the_folder_has_its_partial_name_and_latest_the_one_before(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints.save(1, state(1))
    seen = []
    replace = os.replace

    def watch(source: Any, target: Any) -> None:
        name = Path(target).name
        if name not in ("manifest.json", "rank0.pt"):
            seen.append((name, folders(checkpoints), os.readlink(checkpoints.folder / "latest")))
        replace(source, target)

    monkeypatch.setattr(os, "replace", watch)
    checkpoints.save(2, state(2))
    assert seen == [
        ("step-00000002", ["step-00000001", "step-00000002.partial"], "step-00000001"),
        ("latest", ["step-00000001", "step-00000002"], "step-00000001"),
    ]


def test_a_partial_folder_is_no_checkpoint_and_goes_with_the_next(checkpoints: Checkpoints) -> None:
    checkpoints.save(1, state(1))
    shutil.copytree(checkpoints.folder / "step-00000001", checkpoints.folder / "step-00000002.partial")
    found = checkpoints.load(CPU)
    assert found is not None
    assert found.step == 1
    checkpoints.save(3, state(3))  # as a run does that saves by the clock
    found = checkpoints.load(CPU)
    assert found is not None
    assert found.state["done"] == 3
    assert folders(checkpoints) == ["step-00000001", "step-00000003"]


@pytest.mark.parametrize("how", ["truncated", "one bit", "no file", "no manifest", "torn manifest", "empty manifest"])
def test_a_torn_checkpoint_is_named_and_the_one_before_used(checkpoints: Checkpoints, how: str) -> None:
    for step in (1, 2):
        checkpoints.save(step, state(step))
    newest = checkpoints.folder / "step-00000002"
    content = bytearray((newest / "rank0.pt").read_bytes())
    if how == "truncated":
        tear(newest)
    elif how == "one bit":
        content[len(content) // 2] ^= 1
        (newest / "rank0.pt").write_bytes(content)
    elif how == "no file":
        (newest / "rank0.pt").unlink()
    elif how == "no manifest":
        (newest / "manifest.json").unlink()
    else:
        (newest / "manifest.json").write_text("{" if how == "torn manifest" else "{}")
    found = checkpoints.load(CPU)
    assert found is not None
    assert found.step == found.state["done"] == 1
    assert len(found.warnings) == 1
    assert str(newest) in found.warnings[0]
    assert "torn" in found.warnings[0]
    assert "\n" not in found.warnings[0]


def test_all_torn_is_a_start_from_nothing_that_names_them(checkpoints: Checkpoints) -> None:
    for step in (1, 2):
        checkpoints.save(step, state(step))
        tear(checkpoints.folder / f"step-{step:08d}")
    found = checkpoints.load(CPU)
    assert found is not None
    assert (found.step, found.state, len(found.warnings)) == (0, {}, 2)


def test_torn_ones_do_not_push_out_what_is_written_after_them(checkpoints: Checkpoints) -> None:
    for step in (20, 30):
        checkpoints.save(step, state(step))
        tear(checkpoints.folder / f"step-{step:08d}")
    for step in (5, 6, 7):  # a run that had to begin again
        checkpoints.save(step, state(step))
        found = checkpoints.load(CPU)
        assert found is not None
        assert found.step == step
        assert (checkpoints.folder / "latest" / "manifest.json").exists()
    assert folders(checkpoints) == ["step-00000006", "step-00000007"]


def test_anothers_checkpoint_is_refused_by_name(checkpoints: Checkpoints) -> None:
    checkpoints.save(4, state(4))
    with pytest.raises(UserError, match=r"step-00000004 is of another recipe, precision or number of processes"):
        Checkpoints(checkpoints.folder, "theirs").load(CPU)
    shutil.copytree(checkpoints.folder / "step-00000004", checkpoints.folder / "step-00000005")
    (checkpoints.folder / "step-00000005" / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"step-00000004 is of another"):  # not silently from the start
        Checkpoints(checkpoints.folder, "theirs").load(CPU)


def test_anothers_checkpoint_is_passed_over_where_there_is_one_of_ours(checkpoints: Checkpoints) -> None:
    checkpoints.save(4, state(4))
    Checkpoints(checkpoints.folder, "theirs").save(5, state(5))
    found = checkpoints.load(CPU)
    assert found is not None
    assert found.step == 4
    assert "step-00000005 is of another recipe" in found.warnings[0]


def test_a_failed_write_is_one_line_and_leaves_the_one_before(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints.save(1, state(1))

    def full(content: Any, file: Path) -> None:
        file.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=r"checkpoint of step 2 .*No space left on device.*free some space"):
        checkpoints.save(2, state(2))
    assert folders(checkpoints) == ["step-00000001"]
    found = checkpoints.load(CPU)
    assert found is not None
    assert found.state["done"] == 1


def test_only_tensors_and_plain_values_are_read(checkpoints: Checkpoints) -> None:
    checkpoints.save(1, {**state(1), "weight": Tensor([1.0])})
    assert "files" in json.loads((checkpoints.folder / "latest" / "manifest.json").read_text())
    checkpoints.save(2, {**state(2), "path": Path("x")})  # weights_only refuses to run what rebuilds it
    with pytest.raises(Exception, match=r"weights_only|Unsupported|WeightsUnpickler"):
        checkpoints.load(CPU)


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    with whole(path) as draft:
        draft.write_text("old")
    failing = ExitStack()
    failing.enter_context(whole(path)).write_text("half")
    assert path.read_text() == "old"
    failing.push(lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        failing.close()
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]
