"""Quantisation-aware training: weights and step sizes learned from a stream (LSQ)."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dfkd.classifier import Classifier
from dfkd.compress.fit import Batches, Fit, check_training, hold_zeros
from dfkd.compress.graph import (
    calibration_inputs,
    fold,
    joined,
    network_of,
    norms,
    remove_call,
    with_network,
)
from dfkd.compress.hints import Hints
from dfkd.compress.prepare import GivenBits, name_quantizers, prepare
from dfkd.compress.quantizers import activation_quantizers, quantized_layers
from dfkd.compress.reconstruct import reconstruct
from dfkd.compress.result import Compressed, quantized
from dfkd.compress.tracing import trace
from dfkd.compress.units import mark
from dfkd.cuda_graphs import DIRECT
from dfkd.errors import UserError
from dfkd.runtime import eval_mode
from dfkd.stream import Replay, SyntheticStream
from dfkd.teachers import Teacher


@torch.no_grad()
def check_logits(network: nn.Module, images: Tensor) -> None:
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
        # Before the warm start, which may take minutes.
        check_training(stream, steps, warm_start, lr=lr, weight_decay=weight_decay, temperature=temperature)
        self.given = model
        self.inputs = calibration_inputs(model, stream if calibration is None else calibration, images)
        check_logits(network_of(model), self.inputs[0][:1])
        reference = trace(network_of(model), self.inputs[0][:2])
        self.names = mark(reference)
        same = [(name, name) for name in self.names]
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
            hints=Hints(network, reference, same, hints) if hints and same else None,
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
        """The trained model, its batch norms folded; the student in training stays as it is."""
        network: Any = copy.deepcopy(network_of(self.student))
        for name in self.names:
            remove_call(network, name)
        name_quantizers(fold(network.eval()))
        for name, value in network.state_dict().items():
            if not torch.isfinite(value).all():
                raise UserError(f"{name} is NaN or infinite after training with few bits; lower lr, or raise the bits")
        return quantized(
            self.given, with_network(self.given, network), with_network(self.given, self.naive), self.inputs
        )


def as_teacher(model: nn.Module, network: nn.Module) -> Teacher:
    """A network as frozen teacher with the model's normalisation."""
    if not isinstance(model, Classifier):
        return Teacher(network)
    mean, std = model.normalisation
    return Teacher(network, mean=mean, std=std, input_size=model.input_size).to(model.mean.device)
