"""Checkpoints for resume: written whole or not at all, verified before use, one file per process."""

import hashlib
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from dfkd.errors import UserError, in_a_line
from dfkd.whole import whole

KEEP = 2
OWNER = "owner"
FOREIGN = "is of another recipe, precision or number of processes, an older version or networks whose files changed"


class Resumed(NamedTuple):
    """What was found: the step it was written at, this rank's state, and a line for each one passed over."""

    step: int
    state: dict[str, Any]
    warnings: list[str]


def save_state(state: dict[str, Any], path: Path) -> None:
    """torch.save, whole or not at all. Raises OSError."""
    try:
        with whole(path) as draft:
            torch.save(state, draft)
    except RuntimeError as error:  # how torch reports a failed write
        raise OSError(in_a_line(error)) from error


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Checkpoints:
    """The folder `checkpoints/` of a run: step-N/rankR.pt and manifest.json, `owner`, and `latest`, a link.

    owner names what the states belong to (a digest of recipe, precision and number of processes): others are refused.
    """

    def __init__(self, folder: Path, owner: str) -> None:
        self.folder, self.owner, self.state = folder, owner, PartialState()

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write every rank's state for `step` (collective). Raises UserError where the disk is full."""
        partial, final = self.folder / f"step-{step:08d}.partial", self.folder / f"step-{step:08d}"
        if self.state.is_main_process:
            for stale in self.folder.glob("step-*.partial"):  # what a kill or a full disk left
                shutil.rmtree(stale, ignore_errors=True)
            partial.mkdir(parents=True)
        self.state.wait_for_everyone()
        name = f"rank{self.state.process_index}.pt"
        failure = ""
        try:
            save_state(state, partial / name)
        except OSError as error:
            failure = in_a_line(error)
        digests = gather_object([{name: failure or _digest(partial / name), "failed": bool(failure)}])
        failures = [entry for entry in digests if entry["failed"]]
        if failures:
            if self.state.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)
            reason = next(text for text in failures[0].values() if isinstance(text, str))
            raise UserError(
                f"could not write the checkpoint of step {step} in {self.folder} ({reason}); free some space and run "
                "the same command again: the previous checkpoint is whole"
            )
        if self.state.is_main_process:
            files = {key: value for entry in digests for key, value in entry.items() if key != "failed"}
            manifest = {"step": step, "owner": self.owner, "files": files}
            with whole(partial / "manifest.json") as draft:
                draft.write_text(json.dumps(manifest))
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
            self._point_latest_at(final)
            # A newer one was torn when this run resumed: kept, it would push whole ones out.
            found = self._found()
            at = found.index(final)
            for old in found[:at] + found[at + KEEP :]:
                shutil.rmtree(old, ignore_errors=True)
        self.state.wait_for_everyone()

    def load(self, device: torch.device) -> Resumed | None:
        """The newest whole checkpoint of this owner, or None where there is none; torn ones are passed over by name.

        Raises UserError where none can be used and one has another owner.
        """
        warnings: list[str] = []
        foreign: list[Path] = []
        for folder in self._found():
            problem = self._problem(folder)
            if not problem:
                path = folder / f"rank{self.state.process_index}.pt"
                where = "cpu" if device.type == "cpu" else device  # torch.load does not know Accelerate's `cpu:0`
                state = torch.load(path, map_location=where, weights_only=True)
                return Resumed(int(folder.name.split("-")[1]), state, warnings)
            if problem == FOREIGN:
                foreign.append(folder)
            warnings.append(f"checkpoint {folder} {problem}; using the one before it")
        mark = self.folder / OWNER
        if foreign or (mark.exists() and mark.read_text() != self.owner):
            what = f"checkpoint {foreign[0]}" if foreign else f"what {self.folder.parent} holds"
            raise UserError(
                f"{what} {FOREIGN}; run the command and the launcher options that began this run, on a machine where "
                "runtime.precision=auto is the same, choose another output=..., or overwrite=true to start over"
            )
        return Resumed(0, {}, warnings) if warnings else None

    def claim(self) -> None:
        """Have the main process write down whose the run is: a part of it is finished, maybe without a checkpoint."""
        if self.state.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            with whole(self.folder / OWNER) as draft:
                draft.write_text(self.owner)

    def _found(self) -> list[Path]:
        return sorted(self.folder.glob("step-" + "[0-9]" * 8), reverse=True)

    def _problem(self, folder: Path) -> str:
        """Why a checkpoint cannot be used; empty where it can."""
        try:
            manifest = json.loads((folder / "manifest.json").read_text())
            if manifest["owner"] != self.owner:
                return FOREIGN
            torn = [name for name, digest in manifest["files"].items() if _digest(folder / name) != digest]
        except (OSError, ValueError, KeyError, TypeError) as error:
            return f"is torn ({in_a_line(error)})"
        return f"is torn ({', '.join(torn)})" if torn else ""

    def _point_latest_at(self, folder: Path) -> None:
        link, latest = self.folder / "latest.partial", self.folder / "latest"
        if latest.is_dir() and not latest.is_symlink():  # a copy of the folder without links
            shutil.rmtree(latest)
        link.unlink(missing_ok=True)
        with suppress(OSError):  # a file system without links: for people alone, nothing reads it
            link.symlink_to(folder.name)
            os.replace(link, latest)
