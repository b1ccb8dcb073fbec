"""Files that are written whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
