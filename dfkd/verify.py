"""ONNX files in ONNX Runtime: agreement with the torch model, which kernels run, size, latency."""

import json
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd.classifier import Classifier
from dfkd.compress.graph import images_of
from dfkd.errors import UserError, in_a_line
from dfkd.export import package
from dfkd.runtime import eval_mode, to_float

# ONNX Runtime's names after its optimisation: on integers, and in float.
KERNELS = {
    "convolutions": ({"QLinearConv", "ConvInteger"}, {"Conv", "FusedConv"}),
    "linear": (
        {"QGemm", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat"},
        {"Gemm", "FusedGemm", "MatMul", "FusedMatMul"},
    ),
    "additions": ({"QLinearAdd"}, {"Add"}),
}
PRODUCTS = ("MatMul", "FusedMatMul")  # of two activations, as attention makes: no layers


def _session(path: str | Path, threads: int, optimised: str = "") -> Any:
    """The file in ONNX Runtime on the CPU; `optimised` is where it writes the graph that it runs."""
    runtime = package("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.optimized_model_filepath = optimised
    options.add_session_config_entry("session.x64quantprecision", "1")  # else sums overflow on x86 without VNNI
    try:
        return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's have no common class
        reason = in_a_line(error)
        raise UserError(f"ONNX Runtime cannot read {path}: {reason}; give a file of dfkd.export.export_onnx") from None


def _logits(session: Any, images: Tensor) -> Tensor:
    return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def _kernels(path: str | Path, threads: int) -> dict[str, int]:
    """How many operators of each kind run on integers and in float, after ONNX Runtime's optimisation."""
    with TemporaryDirectory() as folder:
        _session(path, threads, f"{folder}/optimised.onnx")
        graph = package("onnx").load(f"{folder}/optimised.onnx").graph
    fixed = {tensor.name for tensor in graph.initializer}
    for node in graph.node:  # in the order of their use
        if fixed.issuperset(node.input):
            fixed.update(node.output)
    layers = [node for node in graph.node if node.op_type not in PRODUCTS or fixed.intersection(node.input)]
    counts = Counter(node.op_type for node in layers)
    found = {}
    for what, (integer, floating) in KERNELS.items():
        found[f"integer_{what}"] = sum(counts[name] for name in integer)
        found[f"float_{what}"] = sum(counts[name] for name in floating)
    return found


def _sized(images: Tensor, size: Sequence[int]) -> Tensor:
    """Images [B, C, H, W] of a size (H, W): to be timed on, so how they are resized does not matter."""
    return images if list(images.shape[2:]) == list(size) else F.interpolate(images, size=tuple(size))


def _latencies(sessions: dict[str, Any], images: Tensor, repeats: int) -> dict[str, float]:
    """Median milliseconds per batch by session, measured in turns: what else the machine does then hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in sessions}
    # A student's teacher may take images of another size.
    given = {name: _sized(images, session.get_inputs()[0].shape[2:]) for name, session in sessions.items()}
    for _ in range(repeats + 3):  # the first three warm up
        for name, session in sessions.items():
            started = time.perf_counter()
            _logits(session, given[name])
            times[name].append(1000 * (time.perf_counter() - started))
    return {name: round(statistics.median(each[3:]), 3) for name, each in times.items()}


@torch.no_grad()
def verify(
    path: str | Path,
    model: nn.Module,
    images: Iterable[Any] | Tensor,
    *,
    float_path: str | Path | None = None,
    threads: int = 1,
    repeats: int = 30,
) -> dict[str, Any]:
    """What a file gives in ONNX Runtime on the CPU beside the torch model it was exported from.

    images are [N, C, H, W] in [0, 1], or a finite iterable of such batches (or of `(images, ...)`). agreement is the
    share in % of equal classes (of one logit: signs), max_error the largest difference of logits, relative_error that
    of all logits (root mean square, over that of the model's). latency_ms is a median per image, latency_32_ms per
    batch of 32; with a float_path the float file is timed in turns with it. nodes counts what runs on integers and in
    float. simulated says that most layers of a quantised network run in float: small storage, no speed. Raises
    UserError where a package is missing, no image came, or images or logits have another size than the file's.
    """
    runtime, _ = package("onnxruntime"), package("onnx")  # what is missing is told before the work
    if getattr(images, "num_batches", 0) is None:
        raise UserError("the stream of images has no end; give it num_batches")
    if repeats < 1:
        raise UserError(f"repeats={repeats} is not allowed; a latency takes 1 or more")
    session = _session(path, threads)
    expected, given, last = _both_logits(path, session, model, images)
    error = given - expected
    nodes = _kernels(path, threads)
    result: dict[str, Any] = {
        "agreement": round(100 * (_classes(given) == _classes(expected)).float().mean().item(), 2),
        "n": len(expected),
        "max_error": error.abs().max().item(),
        "relative_error": (error.norm() / expected.norm()).item(),
        "size_bytes": Path(path).stat().st_size,
        "threads": threads,
        "device": f"cpu (ONNX Runtime {runtime.__version__})",
        "nodes": nodes,
    }
    sessions = {"": session}
    if float_path is not None:
        sessions["float_"] = _session(float_path, threads)
        result["float_size_bytes"] = Path(float_path).stat().st_size
    for count, name in ((1, "latency_ms"), (32, "latency_32_ms")):
        shown = last[torch.arange(count) % len(last)]
        result |= {f"{which}{name}": value for which, value in _latencies(sessions, shown, repeats).items()}
    return result | _on_integers(path, nodes)


def _classes(logits: Tensor) -> Tensor:
    """The classes [N] that logits [N, K] name: of a single one, which of two its sign says."""
    return logits.argmax(1) if logits.shape[1] > 1 else logits[:, 0] > 0


def _both_logits(
    path: str | Path, session: Any, model: nn.Module, images: Iterable[Any] | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [N, K] of the model and of its file, and the last batch as the file is given it. Raises UserError where
    they cannot be compared."""
    batches = images.split(128) if isinstance(images, Tensor) else images_of(images)
    device = next(model.parameters(), torch.empty(0)).device
    mine, theirs, last = [], [], torch.empty(0)
    with eval_mode(model):
        for batch in batches:
            batch = to_float(batch)
            last = batch.cpu()
            last = model.resized(last) if isinstance(model, Classifier) else last
            if (shape := list(last.shape[1:])) != (own := session.get_inputs()[0].shape[1:]):
                raise UserError(f"{path} takes images of {own}, not {shape}; give such, or export it with an example")
            logits = model(batch.to(device))
            if not isinstance(logits, Tensor):
                raise UserError(
                    f"the model gives a {type(logits).__name__}; verify compares one that gives logits alone"
                )
            mine.append(logits.float().cpu())
            theirs.append(_logits(session, last))
            if (shape := list(theirs[-1].shape)) != (own := list(logits.shape)):
                raise UserError(f"{path} gives logits {shape} where the model gives {own}; give the model of the file")
    if not len(last):
        raise UserError("no image to verify the file on; give at least one")
    expected, given = torch.cat(mine), torch.cat(theirs)
    if not (expected.isfinite().all() and given.isfinite().all()):
        raise UserError(f"logits of the model or of {path} are NaN or infinite; there is nothing to compare")
    return expected, given, last


def _on_integers(path: str | Path, nodes: dict[str, int]) -> dict[str, Any]:
    """Whether a file is quantised but runs in float for the most part, and a note on which kernels it runs."""
    about = {entry.key: entry.value for entry in package("onnx").load(str(path)).metadata_props}.get("dfkd", "{}")
    bits = json.loads(about).get("bits", {})
    integer = nodes["integer_convolutions"] + nodes["integer_linear"]
    total = integer + nodes["float_convolutions"] + nodes["float_linear"]
    note = f"{integer} of {total} convolutions and linear layers run on 8-bit integer kernels"
    if any(min(pair) < 8 for pair in bits.values()):
        note += "; fewer bits than 8 save storage" + (
            ", and where they run in float no time" if integer < total else ""
        )
    return {"simulated": bool(bits) and 2 * integer < total, "note": note}
