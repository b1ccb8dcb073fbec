"""Quantisation from a stream: `quantize`, by rounding, by reconstruction, or by training with learned steps (LSQ)."""

import copy
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dfkd.classifier import Classifier
from dfkd.compress.fit import Batches, Fit, check_length, hold_zeros
from dfkd.compress.graph import (
    calibration_inputs,
    fold,
    joined,
    network_of,
    norms,
    remove_call,
    watch,
    with_network,
)
from dfkd.compress.hints import Hints
from dfkd.compress.quantize import Bits, GivenBits, name_quantizers, prepare, round_biases
from dfkd.compress.quantizers import activation_quantizers, quantized_layers
from dfkd.compress.reconstruct import Learner, reconstruct
from dfkd.compress.result import Compressed
from dfkd.compress.tracing import trace
from dfkd.compress.units import mark
from dfkd.cuda_graphs import DIRECT
from dfkd.errors import UserError, nearest
from dfkd.runtime import eval_mode
from dfkd.stream import Replay, SyntheticStream
from dfkd.teachers import Teacher

METHODS = ("nearest", "reconstruct", "train")


def quantize(
    model: nn.Module,
    stream: Iterable[Any],
    bits: GivenBits = 8,
    *,
    method: str = "reconstruct",
    images: int = 512,
    ends: GivenBits = (8, 8),
    overrides: Mapping[str, GivenBits] | None = None,
    ignore: Sequence[str] = (),
    **options: Any,
) -> Compressed:
    """A model with weights and activations in few bits, from a stream of its input images [B, C, H, W] (uint8: 255ths).

    bits: 2 to 8, or a pair (weights, activations); `ends` those of the first and last layer; overrides maps name
    patterns to bits, ignore names layers left float. method: `nearest` rounds to nearest with ranges calibrated on
    `images` images; `reconstruct` then learns the rounding (options: those of dfkd.compress.reconstruct); `train`
    trains weights and steps against the float model on the stream (options: steps, lr, temperature, hints, ...: those
    of Training). The given model is not changed. Raises UserError where network, pattern or stream will not do.
    """
    if method not in METHODS:
        given = f"method={method!r} is unknown; choose from {', '.join(METHODS)}"
        raise UserError(given + (f", here 'reconstruct' with unit={method!r}" if method in ("layer", "block") else ""))
    learners = {"nearest": (), "reconstruct": (Learner, reconstruct), "train": (Training,)}[method]
    signatures = [inspect.signature(each).parameters.values() for each in learners]
    known = [each.name for parameters in signatures for each in parameters if each.default is not each.empty]
    if unknown := [name for name in options if name not in known]:
        raise UserError(f"method={method!r} takes no {', '.join(unknown)}{nearest(unknown[0], known)}")
    if method == "train":
        training = Training(
            model, stream, bits, images=images, ends=ends, overrides=overrides, ignore=ignore, **options
        )
        training.fit.run()
        return training.result()
    inputs = calibration_inputs(model, stream, images)
    network = network_of(model)
    if options.get("fisher"):
        _check_logits(network, inputs[0][:1])
    graph = prepare(network, bits, inputs, folded=True, per_channel=True, ends=ends, overrides=overrides, ignore=ignore)
    naive = with_network(model, copy.deepcopy(graph))
    learned: list[dict[str, Any]] = []
    if method == "reconstruct":
        learned = reconstruct(graph, joined(inputs), **options)
    return result(model, with_network(model, graph), naive, inputs, learned)


@torch.no_grad()
def _check_logits(network: nn.Module, images: Tensor) -> None:
    """Raise UserError where a network gives something else than logits, which are to be compared."""
    with eval_mode(network):
        given = network(images)
    if not isinstance(given, Tensor):
        raise UserError(
            f"{type(network).__name__} gives a {type(given).__name__}, not logits, which method='train' and fisher "
            "compare; give method='reconstruct' without fisher, or a network with one head"
        )


class Training:
    """Quantisation-aware training (LSQ) of a model against itself in float.

    calibration gives the images for the first ranges (default: the stream), the same on every process; warm_start
    updates per block of reconstruction on them come before the training, 0 starts from rounding to nearest. lr is 0.01
    where a layer has 4 bits or fewer, else 0.001 (LSQ, section 3: so near is rounding to nearest then that larger ones
    lead away from it), unless given. `fit` trains; `result` then folds the batch norms, which exactly turns the one
    step per layer into one per channel.
    """

    def __init__(
        self,
        model: nn.Module,
        stream: Any,
        bits: GivenBits,
        *,
        calibration: Iterable[Any] | None = None,
        images: int = 512,
        ends: GivenBits = (8, 8),
        overrides: Mapping[str, GivenBits] | None = None,
        ignore: Sequence[str] = (),
        warm_start: int = 150,
        steps: int = 1000,
        lr: float | None = None,
        weight_decay: float = 1e-4,
        warmup: int = 50,
        temperature: float = 3.0,
        hints: float = 1.0,
        seed: int = 0,
        accelerator: Any = None,
    ) -> None:
        check_length(stream, steps)  # before the warm start, which may take minutes
        self.given = model
        self.inputs = calibration_inputs(model, stream if calibration is None else calibration, images)
        _check_logits(network_of(model), self.inputs[0][:1])
        reference = trace(network_of(model), self.inputs[0][:2])
        self.names = mark(reference)
        settings: dict[str, Any] = {"ends": ends, "overrides": overrides, "ignore": ignore}
        network = prepare(reference, bits, self.inputs, folded=False, per_channel=False, **settings)
        self.naive = prepare(network_of(model), bits, self.inputs, folded=True, per_channel=True, **settings)
        # A teacher's network comes frozen; what was pruned stays so, also through a rounding that is learned.
        hold_zeros(network.requires_grad_(True))
        if warm_start:  # at 2 bits the network rounded to nearest guesses, and training alone hardly leaves that
            first = joined(self.inputs)
            reconstruct(network, first, steps=warm_start, batch_size=min(32, len(first)), seed=seed)
        fewest = min(min(pair) for pair in network.meta["bits"].values())
        self.student = with_network(model, network)
        batches = copy.copy(stream) if isinstance(stream, SyntheticStream) else Batches(stream)
        batches.teachers, batches.widths = [as_teacher(model, reference)], []
        batches.graphs = DIRECT  # those of the stream hold its own teachers
        if batches.replay is not None:
            batches.replay = Replay(batches.replay.slots)  # whose targets are this teacher's
        self.fit = Fit(
            self.student,
            batches,
            steps=steps,
            lr=(0.01 if fewest <= 4 else 0.001) if lr is None else lr,
            weight_decay=weight_decay,
            warmup=warmup,
            temperature=temperature,
            hold_norms=True,
            clip=5.0,
            hints=Hints(network, reference, [(name, name) for name in self.names], hints) if hints else None,
            accelerator=accelerator,
        )
        # A step that reached zero would divide by it, one below would turn the grid round, as would the scale of a norm
        # that is folded into it.
        quantizers = [layer.quantizer for layer in quantized_layers(network).values()]
        quantizers += activation_quantizers(network).values()
        floors = [(each.scale, float(each.scale.detach().min()) * 1e-3) for each in quantizers]
        folded: list[Any] = [network.get_submodule(name) for name in norms(network).values()]
        floors += [(norm.weight, 0.0) for norm in folded if norm.weight is not None]

        def keep_positive(*_: object) -> None:
            for scale, floor in floors:
                scale.data.clamp_(min=floor)

        self.fit.optimizer.register_step_post_hook(keep_positive)

    def result(self) -> Compressed:
        """The trained model, its batch norms folded."""
        network: Any = network_of(self.student)
        for name in self.names:
            remove_call(network, name)
        name_quantizers(fold(network.eval()))
        for name, value in network.state_dict().items():
            if not torch.isfinite(value).all():
                raise UserError(f"{name} is NaN or infinite after training with few bits; lower lr, or raise the bits")
        return result(self.given, self.student.eval(), with_network(self.given, self.naive), self.inputs)


def as_teacher(model: nn.Module, network: nn.Module) -> Teacher:
    """A network as frozen teacher with the model's normalisation."""
    if not isinstance(model, Classifier):
        return Teacher(network)
    mean, std = model.normalisation
    return Teacher(network, mean=mean, std=std, input_size=model.input_size).to(model.mean.device)


def result(
    model: nn.Module,
    quantized: nn.Module,
    naive: nn.Module,
    inputs: Sequence[Tensor],
    learned: Sequence[Mapping[str, Any]] = (),
) -> Compressed:
    """What quantize hands back: figures per layer and per unit that was reconstructed, and what a file needs."""
    network: Any = network_of(quantized)
    round_biases(network)
    signal = signal_to_noise(fold(trace(network_of(model), inputs[0][:2])), network, inputs[0])
    bits: dict[str, Bits] = network.meta["bits"]
    layers: dict[str, dict[str, Any]] = {
        name: {"layer": name, "weight_bits": each[0], "activation_bits": each[1], "sqnr_db": signal[name]}
        for name, each in bits.items()
    }
    for unit in learned:
        figures = {key: unit[key] for key in ("error_before", "error_after") if key in unit}
        figures |= {"note": f"rounded to nearest: {unit['skipped']}"} if "skipped" in unit else {}
        layers[unit["unit"]] = layers.get(unit["unit"], {"layer": unit["unit"]}) | figures
    signed = [name for name, quantizer in activation_quantizers(network).items() if quantizer.signed]
    about = {
        "bits": {name: list(each) for name, each in bits.items()},
        "signed": signed,
        "input": list(inputs[0].shape[1:]),
    }
    return Compressed(quantized, naive, list(layers.values()), {"quantized": about})


@torch.no_grad()
def signal_to_noise(reference: nn.Module, network: nn.Module, inputs: Tensor) -> dict[str, float]:
    """Power of each quantised layer's float output over that of its error, in dB, errors of earlier layers included."""
    names = list(quantized_layers(network))
    with watch(reference, names) as wanted, watch(network, names) as found:
        reference(inputs)
        network(inputs)
    signal = {}
    for name in names:
        power, noise = (x.square().mean().clamp_min(1e-20) for x in (wanted[name], found[name] - wanted[name]))
        signal[name] = round(float(10 * torch.log10(power / noise)), 2)
    return signal
