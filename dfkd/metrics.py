"""What a run tells while it goes: metrics.jsonl, TensorBoard, image grids, a progress bar or plain lines."""

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

from dfkd.collectives import mean_over_processes
from dfkd.errors import UserError
from dfkd.runtime import say
from dfkd.whole import whole

LINE_EVERY = 15.0  # seconds between lines where there is no terminal


def learning_rates(phase: str) -> str:
    """The keys of the learning rates of a phase or of a logged group of terms."""
    return "synthesis.lr, distill.lr" if phase in ("generator", "student", "distill") else f"{phase}.lr"


class Metrics:
    """Writes a run's figures; on every rank but 0 it only takes part in the averaging.

    Lines of steps past `resumed_after`, of 0 all, are dropped: they will be written again, and no step stands twice.
    """

    def __init__(self, folder: Path, *, main: bool, resumed_after: int = 0) -> None:
        self.folder, self.main, self.begin = folder, main, time.perf_counter()
        self.bar: tqdm | None = None
        self.said = self.begin_progress = 0.0
        self.first: int | None = None
        self.warned: set[str] = set()
        if not main:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        kept = _lines_until(path, resumed_after) if resumed_after else []
        self.warned = {entry["name"] for entry in map(json.loads, kept) if entry["phase"] == "warning"}
        with whole(path) as draft:
            draft.write_text("".join(kept))
        self.file = open(path, "a", buffering=1)  # noqa: SIM115 (closed by close)
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_after + 1)

    def log(self, phase: str, step: int, terms: dict[str, Tensor]) -> dict[str, float]:
        """Average scalars over processes and write them; returns them. Collective, and the step's only host sync.

        Raises UserError naming the first term that is NaN or infinite.
        """
        if not terms:
            return {}
        values = torch.stack([value.float() for value in terms.values()])
        mean_over_processes([values])
        figures = dict(zip(terms, values.tolist()))
        broken = [name for name, value in figures.items() if not math.isfinite(value)]
        if broken:
            raise UserError(
                f"{phase} step {step}: the term {broken[0]!r} is {figures[broken[0]]}; checkpoints before it are kept: "
                f"lower a learning rate ({learning_rates(phase)}) or that term's weight, or try runtime.precision=fp32"
            )
        self.write(phase, step, figures)
        return figures

    def write(self, phase: str, step: int, figures: Mapping[str, float]) -> None:
        """Write scalars that are known on the host already."""
        if not self.main:
            return
        line = {"phase": phase, "step": step, "seconds": round(time.perf_counter() - self.begin, 3), **figures}
        self.file.write(json.dumps(line) + "\n")
        for name, value in figures.items():
            self.board.add_scalar(f"{phase}/{name}", value, step)

    def warn(self, step: int, notes: dict[str, str]) -> None:
        """Say what looks wrong, each thing once, and write it down for the verdict."""
        for name, text in notes.items() if self.main else ():
            if name not in self.warned:
                self.warned.add(name)
                say(f"warning at step {step}: {text}")
                seconds = round(time.perf_counter() - self.begin, 3)
                line = {"phase": "warning", "step": step, "seconds": seconds, "name": name, "text": text}
                self.file.write(json.dumps(line) + "\n")

    def grid(self, phase: str, step: int, images: Tensor, columns: int) -> None:
        """Write images [N, C, H, W] in [0, 1] as a grid, to images/PHASE-STEP.png and TensorBoard."""
        if not self.main:
            return
        picture = make_grid(enlarged(images.cpu()), nrow=columns)
        path = self.folder / "images" / f"{phase}-{step:06d}.png"
        path.parent.mkdir(exist_ok=True)
        save_image(picture, path)
        self.board.add_image(phase, picture, step)

    def new_phase(self) -> None:
        """Start the progress anew."""
        if self.bar is not None:
            self.bar.close()
        self.bar = self.first = None

    def progress(self, done: int, total: int, text: str) -> None:
        """Show progress on rank 0: a bar with ETA on a terminal, else a plain line now and then."""
        if not self.main:
            return
        if sys.stderr.isatty():
            self.bar = self.bar or tqdm(total=total, initial=done, unit="step", dynamic_ncols=True)
            self.bar.update(done - self.bar.n)
            self.bar.set_postfix_str(text, refresh=False)
            return
        now = time.perf_counter()
        if self.first is None:
            self.first, self.begin_progress = done, now
        if now - self.said >= LINE_EVERY or done == total:
            taken, steps = now - self.begin_progress, done - self.first
            left = f", {(total - done) * taken / steps:.0f} s to go" if steps else ""
            say(f"{done}/{total} steps{left}: {text}")
            self.said = now

    def close(self) -> None:
        """Close the files and the bar."""
        if self.bar is not None:
            self.bar.close()
        if self.main:
            self.file.close()
            self.board.close()


def enlarged(images: Tensor) -> Tensor:
    """Images [N, C, H, W] with every pixel repeated, where they are smaller than 32 pixels."""
    zoom = max(1, 32 // images.shape[-1])
    return images.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)


def _lines_until(path: Path, step: int) -> list[str]:
    """The whole lines of metrics.jsonl of steps up to `step`."""
    if not path.exists():
        return []
    kept = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue  # the write that a kill cut off
        if isinstance(entry, dict) and entry.get("step", 0) <= step:
            kept.append(f"{line}\n")
    return kept
