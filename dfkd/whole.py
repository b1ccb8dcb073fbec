"""Files that are written whole or not at all, and folders that may be."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dfkd.errors import UserError


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A draft to write, which takes the place of `path` where the block ends, on the disk by then: a reader, also one
    after a kill, finds the old file or the new one. Where the block raises nothing is left. Raises OSError."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.partial")  # two runs may train one teacher at once
    try:
        yield draft
        with open(draft, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def place(key: str, folder: Path) -> Path:
    """A folder, or the nearest above it that there is. Raises UserError where it cannot be one, of what `key` says."""
    try:
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    except OSError as error:  # too long a name, or no right to look
        raise UserError(f"{key}={folder} can be no folder: {error.strerror}; choose another {key}=...") from None
    if not there.is_dir():
        what = "is" if there == folder.absolute() else f"lies in {there}, which is"
        raise UserError(f"{key}={folder} {what} a file; choose another {key}=...")
    return there


def check_writable(key: str, folder: Path) -> None:
    """Raise UserError where nothing may be written in a folder, be it there or not, that `key` names."""
    there = place(key, folder)
    if not os.access(there, os.W_OK):
        raise UserError(f"{key}={folder}: nothing may be written in {there}; choose another {key}=...")
